"""A run's configuration: defaults, the model's own defaults, a TOML file, the command line, in this order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aeup.models import MODELS

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

SCHEDULES = ("cosine", "constant")
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the file or option and what is allowed."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why."""


@dataclass
class TrainConfig:
    """What decides a run's losses, together with the device, the thread count and the versions.

    The fields in `CHANGEABLE` decide how far and how fast a run goes; they may differ when it is resumed.
    """

    model: str = "vae"
    data: str = "mnist5k"
    image_size: tuple[int, int] | None = None  # the images are resampled to this height and width
    epochs: int = 30
    steps: int | None = None  # instead of epochs; the last epoch is cut short
    batch_size: int = 64  # over all processes; with batch norm a last batch of one image is left out
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 100  # steps of linear warm-up
    schedule: str = "cosine"  # or "constant", after the warm-up
    clip: float | None = None  # largest norm of the gradient, for each player
    ema: float | None = None  # decay of the averaged weights, which are then validated and saved for use
    seed: int = 0
    validation: float = 0.2  # fraction held out where the data has no split of its own
    bf16: bool | None = None  # autocast to bfloat16; None: on a GPU only
    channels_last: bool = True  # memory layout of images and weights; False: contiguous
    graph: bool | None = None  # the step is one CUDA graph; None: on a GPU only
    compile: bool = False  # torch.compile of the loss
    workers: int = 0  # processes that load a folder too large for the memory; 0: in the training process
    memory: float = 4.0  # GiB: a folder of images larger than this, as float32, is not held in memory
    tensorboard: bool | None = None  # event files; None: where the package is installed
    options: dict[str, Any] = field(default_factory=dict)  # fields of the model's configuration

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"model must be one of {sorted(MODELS)}, got {self.model!r}")
        for name, least in (("epochs", 1), ("steps", 1), ("batch_size", 1), ("warmup", 0), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ConfigError(f"image_size must be two sizes of at least 1, got {self.image_size}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be finite and above 0, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be at least 0 and below 2**63, got {self.seed}")
        if not self.memory >= 0:
            raise ConfigError(f"memory must be at least 0, got {self.memory}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must be between 0 and 1 (exclusive), got {self.ema}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")

    def lr_at(self, step: int, steps: int) -> float:
        """Linear warm-up, then half a cosine down to 0 at the last step, or the constant rate."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if self.schedule == "cosine" else 1.0
        return self.lr * warm * decay


CHANGEABLE = ("epochs", "steps", "graph", "compile", "workers", "memory", "tensorboard")


def make_config(model: str, file: str | Path | None = None, **given: Any) -> TrainConfig:
    """The configuration of a run of ``model``.

    Args:
        model: name of a bundled model.
        file: TOML file with the tables ``[train]`` (fields of `TrainConfig`) and ``[model]`` (fields of the model's
            ``Config``), or the ``config.json`` of an earlier run.
        given: fields of `TrainConfig`; ``options`` holds fields of the model's ``Config``. They win over the file.

    Raises:
        ConfigError: an unknown key, a value of a wrong type, or both epochs and steps.
    """
    check_length(given)
    defaults = dict(MODELS[model].defaults)
    train, options = ({}, {}) if file is None else read_config(file, model)
    options |= given.pop("options", {})
    if "epochs" in given and "steps" not in given:
        train.pop("steps", None)  # the command line's epochs win over the file's steps
        defaults.pop("steps", None)
    fields = {**defaults, **train, **given}
    return TrainConfig(
        model=model,
        **{k: convert(TrainConfig, k, v) for k, v in fields.items()},
        options={k: convert(MODELS[model].Config, k, v) for k, v in options.items()},
    )


def check_length(given: typing.Mapping[str, Any]) -> None:
    if {"epochs", "steps"} <= given.keys():
        raise ConfigError(f"give epochs or steps, not both: got epochs={given['epochs']} and steps={given['steps']}")


def read_config(file: str | Path, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables ``[train]`` and ``[model]`` of a file."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        tables = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:  # of either format, or not UTF-8
        raise ConfigError(f"{path}: not a readable {'JSON' if path.suffix == '.json' else 'TOML'} file ({e})") from e
    if path.suffix == ".json" and isinstance(tables, dict):
        tables.pop("environment", None)
    if not isinstance(tables, dict) or not all(k in ("train", "model") and isinstance(tables[k], dict) for k in tables):
        raise ConfigError(f"{path}: allowed are the tables [train] and [model], found {list(tables)}")
    train = dict(tables.get("train", {}))
    if train.pop("model", model) != model:
        raise ConfigError(f"{path}: is for the model {tables['train']['model']!r}, not {model!r}")
    for name, known in (("train", field_types(TrainConfig)), ("model", field_types(MODELS[model].Config))):
        for key in tables.get(name, {}):
            if key not in known or key == "options":
                raise ConfigError(f"{path}: unknown key {key!r} in [{name}]; allowed are {_names(known)}")
    options = dict(tables.get("model", {}))
    try:
        if path.suffix != ".json":  # which holds every field
            check_length(train)
        for table, config in ((train, TrainConfig), (options, MODELS[model].Config)):
            table |= {key: convert(config, key, value) for key, value in table.items()}
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    return train, options


def parse_set(model: str, pairs: typing.Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts to keywords of `make_config`: fields of TrainConfig or of the model's ``Config``.

    ``image_size`` is that of TrainConfig: the images decide for which size a model is built.
    """
    given: dict[str, Any] = {"options": {}}
    own, common = field_types(MODELS[model].Config), field_types(TrainConfig)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set wants KEY=VALUE, got {pair!r}")
        if key in common and key not in ("model", "options"):
            given[key] = convert(TrainConfig, key, text)
        elif key in own:
            given["options"][key] = convert(MODELS[model].Config, key, text)
        else:
            raise ConfigError(f"{model} has no option {key!r}; it has {_names(own)}; and of the run: {_names(common)}")
    return given


@functools.cache
def field_types(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config)}


def _names(known: typing.Iterable[str]) -> str:
    return ", ".join(name for name in known if name not in ("model", "options"))


def convert(config: type, key: str, value: Any) -> Any:
    """A value from a file, or the text of a command line, as the type of the field ``key``."""
    types_ = field_types(config)
    if key not in types_:
        raise ConfigError(f"{config.__name__} has no field {key!r}; it has {_names(types_)}")
    try:
        return _as(types_[key], value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key} must be {_in_words(types_[key])}, got {value!r}") from None


def _in_words(hint: Any) -> str:
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, inner))
    if typing.get_origin(hint) is tuple:
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"{count}{_in_words(inner[0]).split(' ', 1)[1]}s (such as {','.join('12345'[: len(inner)])})"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}[hint]


def _as(hint: Any, value: Any) -> Any:
    """Raises TypeError or ValueError."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if type(None) in inner and (value is None or (isinstance(value, str) and value.lower() == "none")):
            return None
        for each in (hint for hint in inner if hint is not type(None)):
            with contextlib.suppress(TypeError, ValueError):
                return _as(each, value)
        raise ValueError
    if typing.get_origin(hint) is tuple:
        items = [i for i in value.strip("()[]").split(",") if i] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise TypeError
        wanted = [inner[0]] * len(items) if inner[-1] is Ellipsis else inner
        return tuple(_as(h, i) for h, i in zip(wanted, items, strict=True))
    if hint is bool:
        value = BOOLEANS.get(value.lower()) if isinstance(value, str) else value
        allowed: tuple[type, ...] = (bool,)
    else:
        allowed = {int: (int, str), float: (int, float, str), str: (str,)}[hint]
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise TypeError
    return hint(value)
