"""What a run leaves for people to look at: metrics, pictures, curves and TensorBoard's event files."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from aeup.models import Model
from aeup.train.checkpoint import write_atomic
from aeup.train.events import EventFile
from aeup.train.pictures import write_curves, write_pictures

CURVES_EVERY = 30.0  # seconds between drawings of the curves, which take part of one


class Outputs:
    """Writes into the run's folder ``out`` after each epoch.

    Files: ``metrics.jsonl``, one row an epoch; the model's pictures and ``losses.png``; ``tensorboard/``, by `writer`.
    """

    def __init__(self, out: Path, writer: type[EventFile] | None, step: int) -> None:
        self.out, self.drawn = out, -math.inf
        purge = step + 1 if step else None  # what a stopped run wrote after its last checkpoint
        self.events = None if writer is None else writer(out / "tensorboard", purge)

    def metrics(self, history: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_atomic(self.out / "metrics.jsonl", lines.encode())

    def epoch(
        self,
        history: list[dict[str, Any]],
        model: Model,
        images: torch.Tensor,
        targets: torch.Tensor | None,
        seed: int,
        last: bool,
    ) -> None:
        """After an epoch, with validation images [N, C, H, W] and targets on the model's device."""
        self.metrics(history)
        files = write_pictures(model, images, targets, self.out, seed)
        if last or time.monotonic() - self.drawn > CURVES_EVERY:
            write_curves(history, self.out)
            self.drawn = time.monotonic()
        if self.events is not None:
            self._add_events(history[-1], files)

    def _add_events(self, row: dict[str, Any], files: list[Path]) -> None:
        scalars = {f"{part}/{name}": value for part in ("train", "validation") for name, value in row[part].items()}
        rates = {"rate/lr": row["lr"], "rate/images per second": row["images_per_second"]}
        self.events.add(row["step"], scalars | rates, files)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
