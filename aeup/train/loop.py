"""The training loop: seeds, one pass an epoch, validation, checkpoints, metrics and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from aeup.data import Dataset, load
from aeup.models import MODELS
from aeup.train.checkpoint import (
    CheckpointError,
    build_model,
    load_state,
    one_line,
    save_model,
    save_state,
    write_atomic,
)
from aeup.train.pictures import grid, pairs, save_png
from aeup.train.progress import Bar, describe

CHECK_EVERY = {"cpu": 1, "cuda": 50}  # steps between looks at the losses; on a GPU each look waits for it


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal (``signum``); the last whole checkpoint is on the disk."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass
class TrainConfig:
    """What decides a run's losses, together with the device, the thread count and the versions."""

    model: str = "vae"
    data: str = "mnist5k"
    epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 100  # steps of linear warm-up before the cosine decay
    seed: int = 0
    validation: float = 0.2  # fraction held out where the data has no split of its own
    bf16: bool = False  # autocast to bfloat16
    channels_last: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # fields of the model's configuration

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {sorted(MODELS)}, got {self.model!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be finite and above 0, got {self.lr}")

    def lr_at(self, step: int, steps: int) -> float:
        """Linear warm-up, then half a cosine down to 0 at the last step."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    config: TrainConfig | None = None,
    out: str | Path = "runs/run",
    *,
    resume: bool = False,
    epochs: int | None = None,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train a model into the folder ``out`` and return one row of metrics an epoch.

    Files: ``config.json``, ``metrics.jsonl``, ``last`` and ``best`` checkpoints (see `aeup.train.checkpoint`),
    ``reconstructions.png`` (originals above their reconstructions) and, for a VAE, ``samples.png``.

    Args:
        config: the run; ignored with ``resume``, which takes the stored one.
        out: the run's folder; new or empty, or with ``resume`` one that holds ``last.pt``.
        resume: go on after the last whole epoch. On a CPU with the same threads the losses are, bit for bit, those of
            an uninterrupted run.
        epochs: with ``resume``, a new total (it stretches the learning rate's schedule).
        device: where the model and all images are held.
        console: where progress goes; by default the terminal.

    Raises:
        TrainingError: a loss is NaN or infinite, or the data changed since the run began.
        CheckpointError, DataError, FileExistsError: a file is missing, damaged or in the way.
        Interrupted: Ctrl-C or SIGTERM.
    """
    out, console, device = Path(out), console or Console(), torch.device(device)
    state = None
    if resume:
        state = load_state(out / "last.pt")
        config = TrainConfig(**state["train"])
        config = dataclasses.replace(config, epochs=epochs or config.epochs)
        if config.epochs < state["epoch"]:
            raise ValueError(f"epochs={config.epochs}, but {out} already has {state['epoch']}")
    else:
        config = config or TrainConfig()
        if out.is_dir() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty: choose another folder, or resume the run in it")
    gpus = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(config.seed)
        run = Run(config, out, state, device, console)
        try:
            with _sigterm_raises():
                run.fit()
        except KeyboardInterrupt as e:
            where = f"stopped in epoch {run.saved + 1}; {out / 'last.pt'} holds epoch {run.saved}"
            raise Interrupted(where, getattr(e, "signum", signal.SIGINT)) from None
    return run.history


class Run:
    """One training run: model, optimizer, data and random state, kept in step with the folder ``out``."""

    def __init__(
        self, config: TrainConfig, out: Path, state: dict[str, Any] | None, device: torch.device, console: Console
    ) -> None:
        self.config, self.out, self.device, self.console = config, out, device, console
        self.data: Dataset = load(config.data, config.seed, device, config.validation)
        shape = list(self.data.train.shape)
        options = {"image_size": shape[2:], "in_channels": shape[1], **config.options}
        self.model: nn.Module = build_model(config.model, options).to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.shuffle = torch.Generator().manual_seed(config.seed)  # on the CPU: the same order on every device
        self.steps_per_epoch = -(-shape[0] // config.batch_size)
        self.epoch, self.best, self.history = 0, math.inf, []
        self.saved = 0  # the epoch that last.pt holds
        if state is None:  # only now: a run that cannot start leaves no folder
            out.mkdir(parents=True, exist_ok=True)
            self._write_config()
            self._save("last")
        else:
            self._restore(state, shape)

    def fit(self) -> None:
        n, size = sum(p.numel() for p in self.model.parameters()), "x".join(map(str, self.data.image_shape))
        counts = f"{len(self.data.train):,} training and {len(self.data.validation):,} validation images {size}"
        text = f"{self.config.model}: {n:,} parameters; {self.config.data}: {counts}; {self.device}; {self.out}"
        self.console.print(text, highlight=False, soft_wrap=True)
        with Bar(self.console, self.config.epochs) as bar:
            while self.epoch < self.config.epochs:
                row = self._train_epoch(bar)
                row["validation"] = self._validate()
                self._finish_epoch(row)
                bar.log(row, self.model.objective)

    def _train_epoch(self, bar: Bar) -> dict[str, Any]:
        x, config = self.data.train, self.config
        self.model.train()
        order = torch.randperm(len(x), generator=self.shuffle).to(self.device)
        every = CHECK_EVERY[self.device.type]
        first = self.epoch * self.steps_per_epoch
        records, sizes, begin, checked = [], [], time.perf_counter(), 0
        bar.start_epoch(self.epoch, len(x))
        for i, index in enumerate(order.split(config.batch_size)):
            lr = config.lr_at(first + i, config.epochs * self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            losses = self._losses(x[index])
            self.optimizer.zero_grad(set_to_none=True)
            losses[self.model.objective].backward()
            self.optimizer.step()
            records.append(torch.stack([v.detach() for v in losses.values()]))
            sizes.append(len(index))
            if (i + 1) % every == 0 or i + 1 == self.steps_per_epoch:
                new = torch.stack(records[checked:]).tolist()
                for j, values in enumerate(new):
                    self._check_finite(dict(zip(losses, values, strict=True)), f"step {first + checked + j + 1}")
                checked = i + 1
                bar.step(sum(sizes), dict(zip(losses, new[-1], strict=True)))
        weights = torch.tensor(sizes, dtype=torch.float64) / len(x)
        means = (torch.stack(records).double().cpu() * weights[:, None]).sum(0).tolist()
        seconds = time.perf_counter() - begin
        return {
            "epoch": self.epoch + 1,
            "step": first + self.steps_per_epoch,
            "lr": lr,
            "seconds": round(seconds, 3),
            "images_per_second": round(len(x) / seconds, 1),
            "train": dict(zip(losses, means, strict=True)),
        }

    def _losses(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            return self.model.loss(x)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Means over the validation images, with the same noise at every epoch and none taken from training."""
        self.model.eval()
        totals: dict[str, float] = {}
        with self._own_noise():
            for x in self.data.validation.split(max(self.config.batch_size, 250)):
                for key, value in self._losses(x).items():
                    totals[key] = totals.get(key, 0.0) + value.item() * len(x)
        means = {key: total / len(self.data.validation) for key, total in totals.items()}
        self._check_finite(means, f"validation after epoch {self.epoch + 1}")
        return means

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        self.epoch = row["epoch"]
        self.history.append(row)
        better = row["validation"][self.model.objective] < self.best
        if better:
            self.best = row["validation"][self.model.objective]
        if better:  # before "last": a run killed in between goes on from the older "last" and writes it again
            self._save("best")
        self._save("last")
        self._write_metrics()
        self._pictures()

    @torch.no_grad()
    def _pictures(self) -> None:
        self.model.eval()
        images = self.data.validation[:32]
        columns = min(16, len(images))
        images = images[: len(images) // columns * columns]
        with self._own_noise():
            pictures = {"reconstructions.png": pairs(images, self.model.reconstruct(images), columns)}
            if hasattr(self.model, "sample"):
                pictures["samples.png"] = self.model.sample(64)
        for name, picture in pictures.items():
            save_png(self.out / name, grid(picture, columns))

    @contextlib.contextmanager
    def _own_noise(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device.index or 0] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed + 1)
            yield

    def _check_finite(self, losses: dict[str, float], where: str) -> None:
        if not all(map(math.isfinite, losses.values())):
            raise TrainingError(
                f"{where}: {describe(losses)} is not finite; try a lower --lr; "
                f"{self.out / 'last.pt'} holds epoch {self.saved}"
            )

    # The folder.

    def _save(self, name: str) -> None:
        random = {"cpu": torch.get_rng_state(), "shuffle": self.shuffle.get_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "model": self.config.model,
            "model_config": dataclasses.asdict(self.model.config),
            "train": dataclasses.asdict(self.config),
            "data_shape": list(self.data.train.shape),
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random,
        }
        save_state(self.out / f"{name}.pt", state)
        if name == "last":
            self.saved = self.epoch
        losses = self.history[-1]["validation"] if self.history else {}
        save_model(self.out / f"{name}.safetensors", self.model, epoch=self.epoch, validation=losses)

    def _restore(self, state: dict[str, Any], shape: list[int]) -> None:
        path = self.out / "last.pt"
        if state["data_shape"] != shape:
            raise TrainingError(
                f"{self.config.data}: training images {shape}, but the run in {self.out} began with "
                f"{state['data_shape']}: the data changed"
            )
        try:
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.shuffle.set_state(state["random"]["shuffle"])
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["random"]:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
            self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
            self.saved = self.epoch
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            fault = f"the state does not fit the {self.config.model} model ({one_line(e)})"
            raise CheckpointError(f"{path}: {fault}") from e
        self._write_metrics()

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomic(self.out / "metrics.jsonl", lines.encode())

    def _write_config(self) -> None:
        about = {
            "train": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.model.config),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_atomic(self.out / "config.json", (json.dumps(about, indent=2) + "\n").encode())


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends training as Ctrl-C does. Signals can be handled in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise Interrupted("SIGTERM", signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
