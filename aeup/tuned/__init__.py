"""The tuned tables: for each device, which backend serves a class of calls the fastest, and the Triton kernels' sizes.

A table is a JSON file:

    schema   1
    device   the name of its device; "default" for every GPU that no table is near to
    choices  rules for backend="auto": {"op", "pass", "dtype", "layout", ..., "backend", "why"}. What a rule names must
             agree with the call (a list: one of them); the first rule that agrees names the backend to take, if that
             can serve the call. "pixels" lie within least_pixels and most_pixels. See `Op.features` of each op.
    triton   problem of a Triton kernel -> its sizes, see kernels/triton/plans.py
    measured, rows   of the tuner: when and with what, and every measurement

The tables in this folder ship with the package. Before them comes the user's own, which `aeup bench --tune` writes for
exactly the device that it ran on, a CPU with its number of threads: ``$AEUP_TUNED/<device>.json``, by default in
``$XDG_CACHE_HOME/aeup/tuned`` or ``~/.cache/aeup/tuned``. An empty AEUP_TUNED turns the user's tables off. Tables are
read at the first call that asks for them. A table decides speed and never results, so one that cannot be read, or that
a newer aeup wrote, is left out with a warning that names the file.
"""

import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch

SCHEMA = 1
BACKENDS = ("cuda", "triton", "cpu", "composed", "torch")
FEATURES = ("op", "pass", "dtype", "layout", "mode", "family")
_LEAST, _MOST = "least_pixels", "most_pixels"
_HERE = Path(__file__).parent
_ignoring_user = False
on_change: list[Callable[[], None]] = []  # called when tables change: what was derived from them is forgotten


class Rule(NamedTuple):
    when: dict  # feature -> the values that it may have
    least: float
    most: float
    backend: str
    why: str

    def may_fit(self, features: dict) -> bool:
        """Whether it agrees with these features, of which some may be missing."""
        return all(features[name] in values for name, values in self.when.items() if name in features)

    def fits(self, features: dict) -> bool:
        agrees = all(features.get(name) in values for name, values in self.when.items())
        return agrees and self.least <= features["pixels"] <= self.most


# --- files ---


def check(table: object) -> None:
    """Raises ValueError, saying what is wrong with a table."""
    if not isinstance(table, dict) or not isinstance(table.get("device"), str):
        raise ValueError("it is not a tuned table: it names no device")
    if table.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {table.get('schema')!r}, this aeup reads {SCHEMA}")
    choices, triton = table.get("choices", []), table.get("triton", {})
    if not isinstance(choices, list) or not isinstance(triton, dict):
        raise ValueError("choices must be a list and triton an object")
    for rule in choices:
        if not isinstance(rule, dict) or rule.get("backend") not in BACKENDS:
            raise ValueError(f"the backend of a rule must be one of {', '.join(BACKENDS)}: {rule!r}")
        for name, value in rule.items():
            values = value if isinstance(value, list) else [value]
            numeric = name in (_LEAST, _MOST)
            if name not in (*FEATURES, _LEAST, _MOST, "backend", "why") or not all(
                isinstance(v, int if numeric else str) for v in values
            ):
                raise ValueError(f"a rule cannot have {name}={value!r}: {rule!r}")
    known = _shipped()["default"]["triton"] if triton and table["device"] != "default" else triton
    for problem, sizes in triton.items():
        least = known.get(problem.split(".")[0])
        if least is None or not isinstance(sizes, dict) or not set(least) <= set(sizes):
            raise ValueError(
                f"triton: {problem!r} must be a known kernel's, with sizes {sorted(least or ())}: {sizes!r}"
            )


@lru_cache(None)
def _shipped() -> dict[str, dict]:
    tables = [json.loads(path.read_text()) for path in sorted(_HERE.glob("*.json"))]
    return {table["device"]: table for table in tables}


def _nearest(name: str) -> dict:
    """The shipped table whose device's name has the longest beginning in common with `name`, all before the first digit
    at the least; or none. "NVIDIA H200" takes that of "NVIDIA H100"."""
    found = [
        (len(common), device)
        for device in _shipped()
        if len(common := commonprefix((name, device))) >= len(re.match(r"\D*", device)[0])
    ]
    return _shipped()[max(found)[1]] if found else {}


def folder() -> Path | None:
    """Where the user's tables are; None where they are turned off."""
    given = os.environ.get("AEUP_TUNED")
    if given is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "aeup" / "tuned"
    return Path(given) if given else None


def path_of(name: str) -> Path | None:
    """The user's table for the device of that name."""
    at = folder()
    return at and at / (re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") + ".json")


@lru_cache(None)
def users(name: str) -> dict:
    """The user's table for the device of that name; {} where there is none."""
    path = None if _ignoring_user else path_of(name)
    try:
        if path is None or not path.is_file():
            return {}
        table = json.loads(path.read_text())
        check(table)
        if table["device"] != name:
            raise ValueError(f"it is for {table['device']!r}, this is {name!r}")
    except (OSError, ValueError) as error:
        warnings.warn(f"aeup: the tuned table {path} is left out: {error}", stacklevel=2)
        return {}
    return table


def forget() -> None:
    """Tables are read again at the next call that asks for them."""
    users.cache_clear()
    for change in on_change:
        change()


@contextmanager
def ignoring_users() -> Iterator[None]:
    """Inside, only the shipped tables hold."""
    global _ignoring_user
    before, _ignoring_user = _ignoring_user, True
    forget()
    try:
        yield
    finally:
        _ignoring_user = before
        forget()


# --- what they say ---


@lru_cache(None)
def processor() -> str:
    """The CPU's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name by which tables know a device: a GPU's own; a CPU's with its number of threads now."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else ""


def _rules(table: dict, source: str) -> list[Rule]:
    found = []
    for rule in table.get("choices", []):
        when = {n: (rule[n],) if isinstance(rule[n], str) else tuple(rule[n]) for n in FEATURES if n in rule}
        why = f"{rule['why']} ({source})" if rule.get("why") else ""
        found.append(Rule(when, rule.get(_LEAST, 0), rule.get(_MOST, float("inf")), rule["backend"], why))
    return found


def rules(device: torch.device, name: str | None = None) -> tuple[Rule, ...]:
    """For backend="auto" on `device`, the user's first. `name`: of the device, if it is not to be asked."""
    if device.type not in ("cpu", "cuda"):
        return ()
    name = device_name(device) if name is None else name
    own, measured = users(name), users(name).get("measured", {})
    when = ", ".join(filter(None, (measured.get("date", "")[:10], f"torch {measured.get('torch', 'unknown')}")))
    shipped = _nearest(name) or (_shipped()["default"] if device.type == "cuda" else {})
    return (*_rules(own, f"your tuned table, {when}"), *_rules(shipped, "tuned table"))


@lru_cache(None)
def _triton(name: str) -> tuple[dict, ...]:
    return tuple(table.get("triton", {}) for table in (users(name), _nearest(name), _shipped()["default"]))


on_change.append(_triton.cache_clear)


def triton(name: str) -> tuple[dict, ...]:
    """The Triton kernels' sizes for the device of that name: the tables to look them up in, one after the other."""
    return _triton(name)
