"""`aeup bench --tune`: which backend is the fastest for a class of calls on the device at hand. See aeup/tuned.

Every call of an op that the benchmark's layers make, forward and gradients, is run by each backend that can serve it,
side by side; a result counts only if it passes the benchmark's gate. Calls that agree in all features but the pixels
are a class; within it, sizes between two powers of two. There a backend gets a rule if it is faster than what "auto"
takes without one: the 80 % quantile of its time below the 20 % quantile of the other's in at least half of the calls,
the opposite in none, and 5 % in the geometric mean. A call where it is so is timed twice, and the wider range counts.
Neighbouring sizes with the same backend share a rule. Times: on a CPU as the benchmark takes them, with one thread the
processor's; on a GPU eager, the host's time included.
"""

from __future__ import annotations

import json
import math
import pathlib
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from torch import Tensor
from torch.utils._pytree import tree_map_only

import aeup
from aeup import tuned
from aeup.backends import Choice, Op, calls, choose

from . import conv_transpose2d, interpolate, upsample_conv2d
from .gate import Judge
from .harness import ROTATED_BYTES
from .machine import environment
from .report import geometric_mean, write_whole
from .timing import CONTENDED_CPUS, Call, Settings, Timing, time_eager, time_undisturbed
from .workload import EPS, Case, Operator, Part

OPERATORS: tuple[Operator, ...] = (interpolate.OPERATOR, conv_transpose2d.OPERATOR, upsample_conv2d.OPERATOR)
MARGIN = 1.05
MIN_TIME = {"cpu": 0.06, "cuda": 0.02}
ROUNDS = 9  # at the least: with fewer samples quantiles lie apart by chance
WRITE_SECONDS = 30
VERSIONS = ("aeup", "commit", "torch", "triton", "cuda", "driver")  # measurements of others are not taken over
CLASS = ("op", "pass", "dtype", "layout", "mode", "family")
INDICES = 64  # ulps that no rounding explains: torch's float64 reads other pixels than its float32

Clock = Callable[[dict[str, Call], Settings], tuple[dict[str, Timing], float | None]]


def clock(timed: dict[str, Call], s: Settings) -> tuple[dict[str, Timing], float | None]:
    """Timings side by side, and on a CPU how many CPUs they lacked."""
    return time_undisturbed(timed, s) if s.device == "cpu" else (time_eager(timed, s), None)


# --- what is measured ---


@dataclass(frozen=True, eq=False)
class Task:
    """One call of an op within a case. The tensors of `args` are fake."""

    case: Case
    op: Op
    args: tuple
    device: torch.device

    def features(self) -> dict:
        return self.op.kind | self.op.features(self.op.problem(*self.args), self.device)

    @cached_property
    def id(self) -> str:
        return f"{self.op.name.removeprefix('aeup.')}/{self.case.id}/{self.features()['pass']}"

    def serving(self) -> list[str]:
        return [name for name, kernel in self.op.kernels.items() if kernel.refuses(*self.args) is None]

    def default(self) -> str:
        """What "auto" takes, by the shipped tables."""
        kernel = choose(self.op, self.args[0], self.args, "auto")
        return next(name for name, found in self.op.kernels.items() if found is kernel)


def tasks(device: str, operators: Sequence[Operator] = OPERATORS, **filters: Sequence[str]) -> list[Task]:
    """The calls of the operators' cases (default: as `aeup bench`), in random order: a time limit leaves out of all."""
    on = torch.empty(0, device=device).device
    found = []
    for operator in operators:
        for case in operator.cases(on.type, **filters):
            shapes = case.describe()
            inputs = [
                torch.empty(shapes[n], dtype=case.torch_dtype, device=on) for n in ("input", "weight") if n in shapes
            ]
            inputs = [x.contiguous(memory_format=case.memory_format) for x in inputs]
            if "weight" in shapes:
                inputs.append(torch.empty(shapes["output"][1], dtype=case.torch_dtype, device=on))
            with case.context(), aeup.backend("auto"):
                made = calls(case.aeup(), *inputs)
            found += [Task(case, call[0], call[2], on) for call in made if not isinstance(call, Choice)]
    random.Random(0).shuffle(found)
    return found


class Trial:
    """A task with data, and what is right. Made and used inside of the case's context."""

    def __init__(self, task: Task, seed: int = 0) -> None:
        rng = torch.Generator(device=task.device).manual_seed(seed)

        def normal(t: Tensor) -> Tensor:
            made = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=task.device)
            return made.copy_(torch.randn(t.shape, generator=rng, device=task.device))

        self.task, self.args = task, tree_map_only(Tensor, normal, task.args)
        by_torch, features = task.op.kernels["torch"].run, task.features()
        own = by_torch(*self.args)
        with torch.backends.cudnn.flags(enabled=False):
            reference = by_torch(*tree_map_only(Tensor, Tensor.double, self.args))
        eps = EPS[task.case.dtype]
        if features.get("mode", "").startswith("nearest"):
            if (own - reference).abs().max() > INDICES * eps * reference.abs().max():
                reference = own.double()
        frame = None if features["pass"] == "weight_gradient" else (2, 2)
        self._judge = Judge(task.case, "forward", Part(features["pass"], reference, eps, frame), own)
        self._judge.widen(by_torch(*tree_map_only(Tensor, self._other_layout, self.args)))

    def _other_layout(self, t: Tensor) -> Tensor:
        last = self.task.case.memory_format is torch.channels_last
        formats = torch.contiguous_format if last else torch.channels_last
        return t.contiguous(memory_format=formats) if t.dim() == 4 else t

    def run(self, backend: str) -> Callable[[Tensor], Tensor]:
        run, rest = self.task.op.kernels[backend].run, self.args[1:]
        return lambda x: run(x, *rest)

    def wrong(self, backend: str) -> str | None:
        """Why the backend's result does not count, or None. Exceptions end here."""
        part = self._judge.part.reference
        try:
            torch.full(part.shape, math.nan, dtype=self.args[0].dtype, device=self.task.device)  # in fresh memory
            return self._judge.check(self.run(backend)(self.args[0])).reason
        except Exception as error:  # of one backend or configuration: the others are still worth having
            return f"{type(error).__name__}: {error}"

    @cached_property
    def _inputs(self) -> list[Tensor]:
        x = self.args[0]
        count = max(2, min(32, math.ceil(ROTATED_BYTES / max(x.nbytes, 1)))) if x.is_cpu else 2
        return [x] + [x.clone() for _ in range(count - 1)]

    def call(self, backend: str) -> Call:
        return Call(self.run(backend), self._inputs)


def beats(own: Timing, other: Timing | None) -> bool:
    """Beyond the spread of both."""
    return other is not None and own.q80 < other.q20


def measure(task: Task, s: Settings, clock: Clock = clock) -> dict | None:
    """The row of a task; None where only one backend serves it."""
    with task.case.context(), torch.no_grad():
        names = task.serving()
        if len(names) < 2:
            return None
        trial = Trial(task)
        wrong = {name: reason for name in names if (reason := trial.wrong(name))}
        timed = {name: trial.call(name) for name in names if name not in wrong}
        row = task.features() | {"default": task.default(), "seconds": {}, "wrong": wrong, "contended": False}
        if len(timed) > 1:
            runs = [clock(timed, s)]
            if any(beats(t, runs[0][0].get(row["default"])) for t in runs[0][0].values()):
                runs.append(clock(timed, s))
            for name in timed:
                own = [timings[name] for timings, _ in runs]
                found = geometric_mean(t.median for t in own), min(t.q20 for t in own), max(t.q80 for t in own)
                row["seconds"][name] = [float(f"{v:.4g}") for v in found]
            row["contended"] = any((lacking or 0) > CONTENDED_CPUS for _, lacking in runs)
        return row


# --- what follows from it ---


def size_class(pixels: int) -> int:
    """k for 2^(k - 1) < pixels <= 2^k."""
    return max(pixels - 1, 0).bit_length()


def winner(rows: Sequence[dict]) -> tuple[str, str, float] | None:
    """The backend that beats what "auto" takes in these rows, that, and the ratio of its time; or None."""
    red = {name for row in rows for name in row["wrong"]}
    best = None
    for name in sorted({name for row in rows for name in row["seconds"]} - red):
        pairs = [(row["seconds"][name], row["seconds"].get(row["default"])) for row in rows if name in row["seconds"]]
        pairs = [(own, other) for own, other in pairs if other and own is not other]
        wins = sum(own[2] < other[1] for own, other in pairs)
        losses = sum(own[1] > other[2] for own, other in pairs)
        if not wins or losses or 2 * wins < len(pairs):
            continue
        ratio = geometric_mean(own[0] / other[0] for own, other in pairs)
        if ratio * MARGIN <= 1 and (best is None or ratio < best[2]):
            best = name, "+".join(sorted({row["default"] for row in rows} - {name})), ratio
    return best


def rules_of(rows: Iterable[dict]) -> list[dict]:
    """The rules for a tuned table."""

    def key(row: dict) -> tuple:
        return tuple(row.get(name, "") for name in CLASS)

    def size(row: dict) -> int:
        return size_class(row["pixels"])

    rules = []
    for of_class, members in groupby(sorted(rows, key=lambda row: (key(row), size(row))), key):
        sizes = [(k, list(of_size)) for k, of_size in groupby(members, size)]
        named = {name: value for name, value in zip(CLASS, of_class, strict=True) if value or name == "family"}
        found = [(k, of_size, winner(of_size)) for k, of_size in sizes]
        for backend, run in groupby(found, lambda at: at[2] and at[2][0]):
            if not backend:
                continue
            run = list(run)
            defaults = "+".join(dict.fromkeys(won[1] for _, _, won in run))
            ratio = geometric_mean(won[2] for _, _, won in run)
            n = sum(len(of_size) for _, of_size, _ in run)
            bounds = {"least_pixels": (1 << run[0][0] - 1) + 1 if run[0][0] else 0, "most_pixels": 1 << run[-1][0]}
            why = f"{backend} took {100 * ratio:.0f} % of the time of {defaults} in {n} measured call{'s' * (n > 1)}"
            rules.append(named | bounds | {"backend": backend, "why": why})
    return rules


# --- the table ---


@dataclass
class Table:
    """What the tuner writes: `rows` by task id; `sizes` and `searched` of the Triton kernels by problem."""

    device: torch.device
    rows: dict[str, dict] = field(default_factory=dict)
    sizes: dict[str, dict] = field(default_factory=dict)
    searched: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self.measured = tuned.device_name(self.device), environment(self.device.type)

    def take_over(self, old: dict) -> bool:
        """Whether an earlier table was made with the same versions; then what it measured is kept."""
        measured = old.get("measured", {})
        if any(measured.get(v) != self.measured[v] for v in VERSIONS):
            return False
        self.rows, self.searched = dict(old.get("rows", {})), dict(old.get("searched", {}))
        self.sizes = dict(old.get("triton", {}))
        return True

    def to_json(self) -> dict:
        table = {"schema": tuned.SCHEMA, "device": self.name, "measured": self.measured}
        table |= {"choices": rules_of(self.rows.values()), "triton": self.sizes}
        tuned.check(table)
        return table | {"searched": self.searched, "rows": self.rows}

    def write(self, path: pathlib.Path) -> None:
        """Whole or not at all; a line for each rule, size and row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = []
        for name, value in self.to_json().items():
            if isinstance(value, list) and value:
                lines = ",\n".join(f"    {json.dumps(v)}" for v in value)
                blocks.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
            elif isinstance(value, dict) and value:
                lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                blocks.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
            else:
                blocks.append(f"  {json.dumps(name)}: {json.dumps(value)}")
        write_whole(path, "{\n" + ",\n".join(blocks) + "\n}\n")

    def wrong(self) -> dict[str, dict]:
        return {name: row["wrong"] for name, row in self.rows.items() if row["wrong"]}

    def render(self, console: Console) -> None:
        rules = rules_of(self.rows.values())
        if rules:
            shown = RichTable(title=f"{self.name}: rules", title_justify="left")
            for column in (*CLASS, "pixels", "take", "because"):
                shown.add_column(column, overflow="fold")
            for rule in rules:
                pixels = f"{rule['least_pixels']} to {rule['most_pixels']}"
                shown.add_row(*(rule.get(n, "") for n in CLASS), pixels, rule["backend"], rule["why"])
            console.print(shown)
        for problem, sizes in self.sizes.items():
            text = ", ".join(f"{name} {value}" for name, value in sizes.items())
            console.print(f"triton {problem}: {text}: {self.searched[problem]:.2f} of the time", highlight=False)
        for name, reasons in self.wrong().items():
            for backend, reason in reasons.items():
                console.print(f"[red]wrong[/red] {name}, {backend}: {escape(reason)}", highlight=False, soft_wrap=True)
        text = f"{len(self.rows)} calls measured, {sum(row['contended'] for row in self.rows.values())} of them while "
        text += f"other programs ran; {len(rules)} rules"
        if self.searched:
            text += f"; {len(self.searched)} Triton problems searched, {len(self.sizes)} with better sizes"
        console.print(text, highlight=False)


@dataclass
class Deadline:
    end: float  # of time.monotonic

    def passed(self) -> bool:
        return time.monotonic() >= self.end


def tune_choices(
    table: Table,
    todo: Sequence[Task],
    s: Settings,
    deadline: Deadline,
    after: Callable[[Task], None],
    clock: Clock = clock,
) -> int:
    """Measures what the table does not have yet, until the deadline. Returns how many tasks were left out. A
    KeyboardInterrupt passes; the table keeps what was measured."""
    for i, task in enumerate(todo):
        if deadline.passed():
            return len(todo) - i
        if task.id not in table.rows:
            row = measure(task, s, clock)
            if row:
                table.rows[task.id] = row
        after(task)
    return 0


# --- the command ---


def tune(
    device: str,
    ops: Sequence[str],
    minutes: float,
    min_time: float | None,
    fresh: bool,
    step: Callable[[str, int, int], None],
) -> tuple[Table, pathlib.Path, str | None]:
    """Tunes `device` and writes the user's table. `step` is told what was done, how many are done and of how many.
    Returns the table, its path and why something was left out, or None. KeyboardInterrupt ends it like the deadline.

    Raises ValueError where the user's tables are turned off, OSError where the table cannot be written."""
    table = Table(torch.empty(0, device=device).device)
    path = tuned.path_of(table.name)
    if path is None:
        raise ValueError("AEUP_TUNED is empty, which turns the user's tables off: it must name a folder, or not be set")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()  # found out before the work, not after
    if not fresh:
        table.take_over(tuned.users(table.name))
    end, written, left, done = time.monotonic() + 60 * minutes, time.monotonic(), "", 0
    alone = device == "cpu" and torch.get_num_threads() == 1  # then other programs do not count
    clock = "processor" if alone else "wall"
    settings = Settings(device, min_time or MIN_TIME[table.device.type], min_rounds=ROUNDS, clock=clock)

    with tuned.ignoring_users(), ExitStack() as stack:
        try:
            todo = tasks(device, [o for o in OPERATORS if not ops or o.name in ops])
            total = len(todo)

            def after(name: str) -> None:
                nonlocal done, written
                done += 1
                step(name, done, total)
                if time.monotonic() - written > WRITE_SECONDS:
                    table.write(path)
                    written = time.monotonic()

            if table.device.type == "cuda":
                from . import tune_triton as by_triton

                problems = by_triton.problems(todo)
                total += len(problems)
                half = Deadline(time.monotonic() + (end - time.monotonic()) / 2)
                if n := by_triton.tune_triton(table, problems, table.name, settings, half, after):
                    left = f"{n} of {len(problems)} Triton problems"
                stack.enter_context(by_triton.plans.trying(table.sizes))  # the choice is between kernels at their best
            if n := tune_choices(table, todo, settings, Deadline(end), lambda task: after(task.id)):
                left += (" and " if left else "") + f"{n} of {len(todo)} calls"
            left = left and f"the time was up: {left} left out"
        except KeyboardInterrupt:
            left = "stopped"
        table.write(path)
    tuned.forget()
    return table, path, left or None
