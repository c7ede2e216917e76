"""The training loop: passes over the images, validation, checkpoints. See `aeup.train.step` for one step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from aeup.data import Batches, DataError, Dataset, load
from aeup.models import MODELS, Model
from aeup.train.checkpoint import (
    CheckpointError,
    build_model,
    load_last,
    one_line,
    save_model,
    save_state,
    write_atomic,
)
from aeup.train.config import CHANGEABLE, ConfigError, TrainConfig, TrainingError, check_length, field_types
from aeup.train.distributed import PeerError, World, current, synchronise
from aeup.train.events import event_writer
from aeup.train.outputs import Outputs
from aeup.train.progress import Bar, describe
from aeup.train.signals import Interrupted, Stop
from aeup.train.step import Step

CHECK_EVERY = {"cpu": 1, "cuda": 50}  # steps between looks at the losses; on a GPU each look waits for it
VALIDATION_BATCH = 250  # at least
PICTURED = 32  # validation images that the pictures may show


def train(
    config: TrainConfig | None = None,
    out: str | Path = "runs/run",
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    console: Console | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Train a model into the folder ``out`` and return one row of metrics an epoch.

    Files: ``config.json``, ``metrics.jsonl``, ``last`` and ``best`` checkpoints (see `aeup.train.checkpoint`), and
    what `aeup.train.outputs` writes. Where torch.distributed is initialised, all its processes must call this, and
    the first one writes.

    Args:
        config: the run; ignored with ``resume``, which takes the stored one.
        out: the run's folder; new or empty, or with ``resume`` one that holds ``last.pt``.
        resume: go on after the last whole epoch. On a CPU with the same threads the losses are, bit for bit, those of
            an uninterrupted run.
        device: where the model and all images are held.
        console: where progress goes; by default the terminal.
        changes: with ``resume``, new values of the fields `aeup.train.config.CHANGEABLE`, such as ``epochs``: the new
            total (it stretches the learning rate's schedule).

    Raises:
        TrainingError: a loss is NaN or infinite, the data changed since the run began, or another process ended.
        CheckpointError, DataError, FileExistsError: a file is missing, damaged or in the way.
        ConfigError: a setting that is not allowed.
        Interrupted: Ctrl-C or SIGTERM.
    """
    out, world = Path(out), current(torch.device(device))
    console = (console or Console()) if world.first else Console(quiet=True)
    config, state = _begin(config, out, resume, changes, world)
    gpus = [world.device.index or 0] if world.device.type == "cuda" else []
    run = None
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(config.seed)
        try:
            with Stop() as stop:
                run = Run(config, out, state, world, console)
                run.fit(stop)
        except KeyboardInterrupt as e:
            saved = f"stopped in epoch {run.saved + 1}; {run.held()}" if run else "stopped before the first step"
            raise Interrupted(saved, getattr(e, "signum", signal.SIGINT)) from None
        except (RuntimeError, ValueError) as e:
            if (reason := _reason(e)) is None:
                raise
            raise TrainingError(f"{reason} ({one_line(e)})" + (f"; {run.held()}" if run else "")) from e
        finally:
            if run is not None:
                run.outputs.close()
    return run.history


def _reason(e: Exception) -> str | None:
    """What the errors mean that the model and the data have not made themselves."""
    if isinstance(e, PeerError):
        return "another process of this run ended or cannot be reached"
    if "DataLoader worker" in str(e):  # from torch's signal handler, by Stop.check, or from the loader
        return "a process that loads images ended"
    if "Expected more than 1 value per channel" in str(e):
        return "a norm has one value a channel to train on: take more images a batch, larger ones, or norm=none"
    return None


def _begin(
    config: TrainConfig | None, out: Path, resume: bool, changes: dict[str, Any], world: World
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The run's configuration, with the choices that depend on the device made, and the state to go on from."""
    state = None
    if resume:
        state = load_last(out)
        if unknown := set(changes) - set(CHANGEABLE):
            raise ConfigError(f"with resume only {', '.join(CHANGEABLE)} can be given, got {', '.join(unknown)}")
        check_length(changes)
        if "epochs" in changes:
            changes = {"steps": None, **changes}
        try:
            config = dataclasses.replace(TrainConfig(**state["train"]), **changes)
        except TypeError as e:
            raise CheckpointError(f"{out / 'last.pt'}: its configuration does not fit this aeup ({e})") from e
        done = {"epochs": state["epoch"], "steps": state["step"]}
        limit = "steps" if config.steps is not None else "epochs"
        if getattr(config, limit) < done[limit]:
            raise ConfigError(f"{limit}={getattr(config, limit)}, but {out} already has {done[limit]}")
    else:
        config = config or TrainConfig()
        if changes:
            raise TypeError(f"only with resume: {', '.join(changes)}")
        if world.first and out.is_dir() and any(out.iterdir()):
            also = ", or resume the run in it" if (out / "last.pt").exists() else ""
            raise FileExistsError(f"{out} is not empty: choose another folder{also}")
    gpu = world.device.type == "cuda"
    if config.graph and not gpu:
        raise ConfigError(f"graph needs a CUDA device, the run is on {world.device}")
    if config.compile and world.size > 1:
        raise ConfigError("compile works in one process only: each image's noise is drawn outside the compiled code")
    if config.batch_size < world.size:
        raise ConfigError(f"batch_size={config.batch_size} is less than the {world.size} processes")
    automatic = {name: gpu for name in ("bf16", "graph") if getattr(config, name) is None}
    return dataclasses.replace(config, **automatic), state


class Run:
    """One training run: model, optimizers, data and random state, kept in step with the folder ``out``."""

    def __init__(
        self, config: TrainConfig, out: Path, state: dict[str, Any] | None, world: World, console: Console
    ) -> None:
        self.config, self.out, self.world, self.console = config, out, world, console
        self.device = world.device
        self.train, self.validation = self._parts()
        self.model = self._build().to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        synchronise(self.model, world)
        self.take_step = Step(self.model, config, world)
        if len(self.train) < world.size:
            raise ConfigError(f"{config.data}: {len(self.train)} training images for {world.size} processes")
        # One image, left over, would give batch norm no statistics to speak of, or none at all.
        normed = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        least = max(world.size, 2 if normed and config.batch_size > 1 else 1)
        self.batches = list(torch.arange(len(self.train)).split(config.batch_size))
        if len(self.batches) > 1 and len(self.batches[-1]) < least:
            self.batches.pop()
        self.steps = config.steps or config.epochs * len(self.batches)
        self.epochs = -(-self.steps // len(self.batches))
        self.step, self.best, self.history = 0, math.inf, []
        self.saved = 0  # the epoch that last.pt holds
        writer = event_writer(config.tensorboard if world.first else False)
        if state is not None:
            self._restore(state)
        elif world.first:  # only now: a run that cannot start leaves no folder
            out.mkdir(parents=True, exist_ok=True)
            self._write_config()
            self._save("last")
        self.outputs = Outputs(out, writer, self.step)
        if state is not None and world.first:
            self._write_config()  # with the fields that changed
            self.outputs.metrics(self.history)

    def _parts(self) -> tuple[Batches, Batches]:
        config, wants = self.config, MODELS[self.config.model].targets
        size, memory = config.image_size, config.memory * 2**30
        try:
            data: Dataset = load(config.data, config.seed, self.device, config.validation, size, memory)
        except ValueError as e:
            raise e if isinstance(e, DataError) else ConfigError(str(e)) from e
        if wants and data.train_target is None:
            raise ConfigError(f"{config.model} needs images with a class for each pixel; {config.data} has none")
        parts = (data.train, data.train_target), (data.validation, data.validation_target)
        return tuple(Batches(x, t if wants else None, self.device, size, config.workers) for x, t in parts)

    def _build(self) -> Model:
        """The images decide the shape that the model is built for."""
        config, (c, *size) = self.config, self.train.image_shape
        known = field_types(MODELS[config.model].Config)
        shape = {k: v for k, v in (("image_size", tuple(size)), ("in_channels", c)) if k in known}
        for key, value in shape.items():
            given = config.options.get(key, value)
            if (tuple(given) if isinstance(given, list) else given) != value:
                hint = "; --image-size resamples them" if key == "image_size" else ""
                raise ConfigError(f"{key}={given} of the model, but the images of {config.data} have {value}{hint}")
        try:
            model = build_model(config.model, {**config.options, **shape})
        except (TypeError, ValueError) as e:
            raise ConfigError(f"{config.model}: {one_line(e)}") from e
        for target in (self.train.target, self.validation.target):  # another class would be an index out of bounds
            if target is not None and (most := int(target.max())) >= model.config.classes:
                allowed = f"classes={model.config.classes} of the model allow labels below that"
                raise ConfigError(f"{allowed}, but those of {config.data} go up to {most}")
        return model

    @property
    def epoch(self) -> int:
        """Epochs done; one that ``steps`` cut short counts."""
        return -(-self.step // len(self.batches))

    @property
    def judged(self) -> Model:
        """The model that is validated, pictured and saved for use."""
        return self.take_step.average or self.model

    def held(self) -> str:
        return f"{self.out / 'last.pt'} holds epoch {self.saved}"

    def fit(self, stop: Stop) -> None:
        n, size = sum(p.numel() for p in self.model.parameters()), "x".join(map(str, self.train.image_shape))
        counts = f"{len(self.train):,} training and {len(self.validation):,} validation images {size}"
        where = str(self.device) if self.world.size == 1 else f"{self.world.size} processes, {self.device.type}"
        text = f"{self.config.model}: {n:,} parameters; {self.config.data}: {counts}; {where}; {self.out}"
        self.console.print(text, highlight=False, soft_wrap=True)
        if self.step == self.steps:
            self.console.print(f"nothing left to train after {self.steps} steps: give more --epochs or --steps")
        with Bar(self.console, self.epochs) as bar:
            while self.step < self.steps:
                row = self._train_epoch(bar, stop)
                row["validation"] = self.world.from_first(self._validate() if self.world.first else None)
                self._check_finite(row["validation"], f"validation after epoch {row['epoch']}")
                self._finish_epoch(row)
                bar.log(row, self.model.objective)

    def _train_epoch(self, bar: Bar, stop: Stop) -> dict[str, Any]:
        """The rest of the epoch in which ``step`` lies."""
        epoch, skip = divmod(self.step, len(self.batches))
        order = self._order(epoch)
        batches = [order[b] for b in self.batches][skip : skip + self.steps - self.step]
        every, first = CHECK_EVERY[self.device.type], self.step
        seen, sizes, losses, begin = 0, [len(b) for b in batches], [], time.perf_counter()
        pending: list[torch.Tensor] = []
        self.model.train()
        bar.start_epoch(epoch, sum(sizes))
        shares = [self.world.shard(b) for b in batches]
        for i, (x, target) in enumerate(self.train(shares)):
            stop.check()
            share = len(x) / sizes[i] if self.world.size > 1 else 1.0
            pending.append(self.take_step(x, target, sizes[i], first + i, self.steps) * share)
            seen += sizes[i]
            if (i + 1) % every == 0 or i + 1 == len(batches):
                new = self.world.sum_(torch.stack(pending)).tolist()
                for values in new:
                    named = dict(zip(self.take_step.names, values, strict=True))
                    self._check_batch(named, first + len(losses), batches)
                    losses.append(values)
                pending.clear()
                bar.step(seen, named)
        self.step += len(batches)
        weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        means = (torch.tensor(losses, dtype=torch.float64) * weights[:, None]).sum(0).tolist()
        seconds = time.perf_counter() - begin
        return {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.config.lr_at(self.step - 1, self.steps),
            "seconds": round(seconds, 3),
            "images_per_second": round(sum(sizes) / seconds, 1),
            "train": dict(zip(self.take_step.names, means, strict=True)),
        }

    def _order(self, epoch: int) -> torch.Tensor:
        """The same on every device and in every process, and for every epoch without those before it."""
        generator = torch.Generator().manual_seed(self.config.seed)
        seed = torch.randint(2**62, (epoch + 1,), generator=generator)[-1].item()
        return torch.randperm(len(self.train), generator=generator.manual_seed(seed))

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """With the same noise at every epoch, and none taken from training."""
        chunks = torch.arange(len(self.validation)).split(max(self.config.batch_size, VALIDATION_BATCH))
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        images = ((x.contiguous(memory_format=layout), target) for x, target in self.validation(chunks))
        self.judged.eval()
        with self._own_noise(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            return self.judged.validate(images)

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        if not self.world.first:
            self.saved = self.epoch
            return
        value = row["validation"].get(self.model.objective, -self.step)  # without an objective the last is the best
        if value < self.best:  # before "last": a run killed in between goes on from the older "last"
            self.best = value
            self._save("best")
        self._save("last")
        self.judged.eval()
        images, target = self.validation.head(PICTURED)
        last = self.step == self.steps
        with self._own_noise(), torch.no_grad():
            self.outputs.epoch(self.history, self.judged, images, target, self.config.seed + 1, last)

    @contextlib.contextmanager
    def _own_noise(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device.index or 0] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed + 1)
            yield

    def _check_batch(self, losses: dict[str, float], step: int, batches: list[torch.Tensor]) -> None:
        if all(map(math.isfinite, losses.values())):
            return
        batch = batches[step - self.step].tolist()
        if self.world.first:
            about = {"step": step + 1, "losses": {k: str(v) for k, v in losses.items()}, "indices": batch}
            write_atomic(self.out / "bad_batch.json", (json.dumps(about) + "\n").encode())
        shown = ", ".join(map(str, batch[:8])) + (", ..." if len(batch) > 8 else "")
        where = f"step {step + 1}, training images {shown} (all {len(batch)}: {self.out / 'bad_batch.json'})"
        self._check_finite(losses, where)

    def _check_finite(self, losses: dict[str, float], where: str) -> None:
        if not all(map(math.isfinite, losses.values())):
            raise TrainingError(f"{where}: {describe(losses)} is not finite; try a lower --lr or --clip; {self.held()}")

    # The folder.

    def _save(self, name: str) -> None:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "model": self.config.model,
            "model_config": dataclasses.asdict(self.model.config),
            "train": dataclasses.asdict(self.config),
            "data_shape": [len(self.train), *self.train.image_shape],
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "weights": self.model.state_dict(),
            "random": random,
            **self.take_step.state(),
        }
        save_state(self.out / f"{name}.pt", state)
        if name == "last":
            self.saved = self.epoch
        losses = self.history[-1]["validation"] if self.history else {}
        save_model(self.out / f"{name}.safetensors", self.judged, epoch=self.epoch, validation=losses)

    def _restore(self, state: dict[str, Any]) -> None:
        shape = [len(self.train), *self.train.image_shape]
        if state["data_shape"] != shape:
            raise TrainingError(
                f"{self.config.data}: training images {shape}, but the run in {self.out} began with "
                f"{state['data_shape']}: the data changed"
            )
        try:
            self.model.load_state_dict(state["weights"])
            self.take_step.load_state(state)
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["random"]:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
            self.step, self.best, self.history = state["step"], state["best"], state["history"]
            self.saved = state["epoch"]
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            fault = f"the state does not fit the {self.config.model} model ({one_line(e)})"
            raise CheckpointError(f"{self.out / 'last.pt'}: {fault}") from e

    def _write_config(self) -> None:
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k != "options"}
        about = {
            "train": settings,
            "model": dataclasses.asdict(self.model.config),
            "environment": {
                "device": str(self.device),
                "processes": self.world.size,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_atomic(self.out / "config.json", (json.dumps(about, indent=2) + "\n").encode())
