"""The progress bar of a run: one line that moves, and one line kept for each epoch."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ACRONYMS = {word.lower(): word for word in ("PSNR", "SSIM", "KL", "ELBO", "IU")}


def title(name: str) -> str:
    """``negative_elbo`` -> ``negative ELBO``"""
    return " ".join(ACRONYMS.get(word, word) for word in name.split("_"))


def describe(losses: dict[str, float]) -> str:
    """``reconstruction 78.20  KL 25.65  -ELBO 103.84``"""
    return "  ".join(f"{title(key).replace('negative ', '-')} {short(value)}" for key, value in losses.items())


def short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


class Bar:
    """Images of the epoch, images/s and the last losses."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[losses]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=None, rate="", losses="")
        self.begin = time.perf_counter()

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def start_epoch(self, epoch: int, images: int) -> None:
        self.begin = time.perf_counter()
        text = f"epoch {epoch + 1}/{self.epochs}"
        self.progress.update(self.task, description=text, total=images, completed=0)

    def step(self, images: int, losses: dict[str, float]) -> None:
        rate = images / max(time.perf_counter() - self.begin, 1e-9)
        self.progress.update(self.task, completed=images, rate=f"{rate:,.0f} images/s", losses=describe(losses))

    def log(self, row: dict[str, Any], objective: str | None) -> None:
        """One training loss, the objective if there is one, and all of the validation."""
        width = len(str(self.epochs))
        train = row["train"]
        shown = objective if objective in train else next(iter(train))
        self.console.print(
            f"epoch {row['epoch']:>{width}}/{self.epochs}  train: {describe({shown: train[shown]})}  "
            f"validation: {describe(row['validation'])}  {row['images_per_second']:,.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )
