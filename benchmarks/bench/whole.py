"""What the rows of whole models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .workload import RowCase, precision


@dataclass(frozen=True)
class WholeCase(RowCase):
    """One model in one dtype class and layout. `mode`: eager calls, or one CUDA graph."""

    shape: str
    workload: Any  # a row of the table, with `set` and `source`
    mode: str
    dtype: str
    layout: str
    device: str
    NAMES: ClassVar[tuple[str, ...]] = ("shape", "mode", "dtype", "layout")

    @property
    def set(self) -> str:
        return self.workload.set

    @property
    def source(self) -> str:
        return self.workload.source

    def group(self, direction: str) -> str:
        return f"{direction} {self.mode} {self.dtype} {self.layout}"

    def context(self) -> AbstractContextManager:
        return precision(self.dtype)

    def peak(self, direction: str, made, inputs: Sequence[Tensor], given: Tensor) -> Callable[[], object] | None:
        """One call. A graph has its memory from its capture on."""
        return (lambda: made(*inputs)) if self.mode == "eager" else None


def random_generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
