"""What the benchmark of an op is made of.

An `Operator` is a workload table and its peers, of an op or of whole models; a `Case` is one complete call from that
table; a `Problem` is the case's data, with float64 references. Harness, gate, report and command line know what they
measure through these alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

import aeup

if TYPE_CHECKING:
    from .peers import Peer

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()} | {"tf32": 2.0**-10}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DIRECTIONS = ("forward", "backward")  # of an op


@dataclass(frozen=True)
class Part:
    """One tensor that a call gives, and how the gate judges it.

    `frame`: the height and width of the border that is judged again by itself; None for a tensor without borders.
    `eps`: the ulp of its dtype class at 1. `noise`: an absolute error that any summation order may have. `cap`: torch's
    error counts up to this fraction of the largest reference value.
    """

    name: str
    reference: Tensor
    eps: float
    frame: tuple[int, int] | None = None
    noise: float = 0.0
    cap: float = math.inf


class Problem(Protocol):
    """The data of a case: `inputs`, dense in the case's dtype and layout, the first of which is what a model feeds
    anew to every call, and `grad`, the gradient of the output."""

    inputs: tuple[Tensor, ...]
    grad: Tensor

    def parts(self, direction: str) -> tuple[Part, ...]:
        """What is right: the output (forward), the gradients of all inputs in their order (backward), or of a training
        step its losses (step)."""


class Case(Protocol):
    """One call: shapes, arguments, dtype class and layout. `id` names it in reports and tests."""

    directions: tuple[str, ...]
    shape: str
    set: str
    source: str
    dtype: str
    layout: str

    @property
    def id(self) -> str: ...

    @property
    def torch_dtype(self) -> torch.dtype: ...

    @property
    def memory_format(self) -> torch.memory_format: ...

    def group(self, direction: str) -> str:
        """The geometric mean that the case counts in."""

    def bytes(self, direction: str) -> int:
        """Bytes that a call must move at least: each tensor that it needs once, each that it gives once."""

    def flops(self, direction: str) -> int:
        """Operations in products, two for a multiply-add; 0 where the op is bound by memory alone."""

    def sizes(self, direction: str) -> tuple[int, int]:
        """Bytes that a call reads and writes at least."""

    def describe(self) -> dict:
        """The case in the JSON file."""

    def problem(self, device: str, seed: int) -> Problem: ...

    def context(self) -> AbstractContextManager:
        """The global settings that the case is run under."""

    def torch(self) -> Callable[..., Tensor]:
        """inputs -> output by eager torch."""

    def compiled(self) -> Callable[..., Tensor]:
        """inputs -> output by torch.compile."""

    def aeup(self) -> Callable[..., Tensor]:
        """inputs -> output by aeup."""

    def outcome(self, call: Callable[[Tensor], object], given: Tensor) -> tuple[Tensor, ...]:
        """What the gate judges of `call` (`harness.bind`), one tensor for each part of the problem."""

    def chosen(self, direction: str, inputs: tuple[Tensor, ...]) -> Sequence[aeup.backends.Choice]:
        """What aeup runs on the inputs."""

    def peak(self, direction: str, made, inputs: Sequence[Tensor], given: Tensor) -> Callable[[], object] | None:
        """What is run to see how much memory it takes; None where that is not reported."""


class RowCase:
    """What all cases share: the fields in `NAMES`, `dtype` and `layout` among them, name the case."""

    NAMES: ClassVar[tuple[str, ...]]

    @property
    def id(self) -> str:
        return "/".join(getattr(self, name) for name in self.NAMES)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.layout]

    def bytes(self, direction: str) -> int:
        return sum(self.sizes(direction))


class OpCase(RowCase):
    """What the cases of ops share."""

    directions: ClassVar[tuple[str, ...]] = DIRECTIONS

    def compiled(self) -> Callable[..., Tensor]:
        torch._dynamo.reset()  # the recompile limit counts per function, not per case
        call = self.torch()
        return torch.compile(lambda *inputs: call(*inputs), dynamic=False, fullgraph=True)

    def outcome(self, call: Callable[[Tensor], object], given: Tensor) -> tuple[Tensor, ...]:
        out = call(given)
        return out if isinstance(out, tuple) else (out,)

    def chosen(self, direction: str, inputs: tuple[Tensor, ...]) -> Sequence[aeup.backends.Choice]:
        calls = aeup.explain(self.aeup(), *inputs)  # the call, then its gradients
        return calls[:1] if direction == "forward" else calls[1:]

    def peak(self, direction: str, made, inputs: Sequence[Tensor], given: Tensor) -> Callable[[], object] | None:
        """Forward and backward together."""
        if direction == "forward":
            return None
        leaves = [x.detach().requires_grad_() for x in inputs]
        return lambda: torch.autograd.grad(made(*leaves), leaves, given)


@dataclass(frozen=True)
class Operator:
    """What a command of `aeup bench` measures: the op `aeup.<name>`, or whole models.

    `axes`: the filters (the names of the command line's options without the s) with their values. `columns`: the
    fields of a case that name it in the table. `cases(device type, **filters)` makes the table, with an empty filter
    for the default. `peers(device type, with torch.compile)` gives the peers besides torch and aeup, and the gaps.
    `min_time`: seconds for a peer and row, by device type. `eager`: also time calls one after another, with the host's
    time. `group`: what the cases' groups are; `budget`: what the gate does beyond its rule; `directions`: those that
    its cases have; `notes`: what a reader of the table must know; `by_torch`: device types on which aeup leaves all of
    them to torch.
    """

    name: str
    axes: Mapping[str, Sequence[str]]
    columns: tuple[str, ...]
    quick: tuple[str, ...]
    cases: Callable[..., list]
    peers: Callable[[str, bool], tuple[list[Peer], dict[str, str]]]
    min_time: Mapping[str, float] = field(default_factory=lambda: {"cpu": 0.15, "cuda": 0.05})
    group: str = "group"
    eager: bool = False
    budget: str = ""
    directions: tuple[str, ...] = DIRECTIONS
    notes: tuple[str, ...] = ()
    by_torch: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        return "whole models" if self.directions != DIRECTIONS else f"aeup.{self.name}"


def checked(axes: Mapping[str, Sequence[str]], **filters: Iterable[str]) -> None:
    """Raise ValueError if a filter (argument `<axis>s`) has a value that its axis does not know."""
    for argument, given in filters.items():
        allowed = axes[argument[:-1]]
        if unknown := [v for v in given if v not in allowed]:
            raise ValueError(f"{argument}: unknown {unknown}, expected some of {sorted(allowed)}")


def set_of(sets: Sequence[str], shapes: Sequence[str], workloads) -> set[str]:
    """The sets to measure: those given, else those of the shapes, else "main"."""
    return set(sets) or {w.set for w in workloads if w.name in shapes} or {"main"}


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float32 products in tf32 for the dtype class "tf32" and no other; cuDNN picks by measuring."""
    matmul, tf32 = torch.backends.cuda.matmul, dtype == "tf32"
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            yield
    finally:
        matmul.allow_tf32 = before
