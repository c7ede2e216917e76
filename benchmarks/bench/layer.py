"""What the benchmarks of layers share: activation(linear(input, weight) + bias), three gradients, matrix products.

What is timed is what a decoder runs: forward, the layer with bias and ReLU without a graph; backward, the gradients of
input, weight and bias from that of the output, the activation's included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .peers import Peer
from .workload import EPS, LAYOUTS, OpCase, Part, checked, precision

OTHER_LAYOUT = {"NCHW": "NHWC", "NHWC": "NCHW"}
MARGIN = 1 / 32  # of the standard deviation before the activation
LAYER_DTYPES = ("bf16", "fp16", "fp32", "tf32")  # fp32 beside tf32: they share their data
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp32", "tf32")}
BUDGET = "bias gradient: also the rounding of a pairwise sum in float32"
NOTES = (
    "bias and ReLU on, F.relu in place in torch; every result is checked over the whole batch",
    "torch-other: torch in the other layout, conversions for free; cudnn.benchmark is on",
    "fp32: tf32 forbidden; tf32: float32 with torch.backends.cudnn.allow_tf32",
)


class Geometry(Protocol):
    """The layer's sizes, hashable. `input`, `weight`, `output`: shapes, the output's channels second."""

    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    output: tuple[int, int, int, int]

    @property
    def terms(self) -> float:
        """How many products an output is the sum of, about; where taps read the same input, their variance."""

    @property
    def products(self) -> int:
        """Multiply-adds of the forward, in the form that needs the fewest."""

    def edges(self, direction: str) -> tuple[int, int]:
        """Height and width of the border of the output, or of the input's gradient, that padding changes."""

    def describe(self) -> dict:
        """The arguments, in the JSON file."""

    def torch(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """The layer without its activation, by torch."""

    def aeup(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """The layer with its activation."""


@dataclass(frozen=True)
class Case(OpCase):
    """One layer in one dtype class and layout, input and weight alike."""

    shape: str
    geometry: Geometry
    dtype: str
    layout: str
    source: str
    set: str = "main"
    NAMES: ClassVar[tuple[str, ...]] = ("shape", "dtype", "layout")

    def group(self, direction: str) -> str:
        return f"{direction} {self.dtype} {self.layout}"

    def sizes(self, direction: str) -> tuple[int, int]:
        """Forward reads input, weight and bias and writes the output. Backward reads the output and its gradient, the
        input and the weight, and writes the gradients of input, weight and bias."""
        g, item = self.geometry, self.torch_dtype.itemsize
        x, w, y, b = math.prod(g.input), math.prod(g.weight), math.prod(g.output), g.output[1]
        reads, writes = (x + w + b, y) if direction == "forward" else (2 * y + x + w, x + w + b)
        return reads * item, writes * item

    def flops(self, direction: str) -> int:
        """The gradients of input and weight have the forward's products each."""
        return (2 if direction == "forward" else 4) * self.geometry.products

    def describe(self) -> dict:
        g = self.geometry
        return {"input": list(g.input), "weight": list(g.weight), "output": list(g.output), **g.describe()}

    def context(self) -> AbstractContextManager:
        return precision(self.dtype)

    def torch(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, w, b: F.relu(self.geometry.torch(x, w, b), inplace=True)

    def aeup(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self.geometry.aeup

    def problem(self, device: str, seed: int) -> Problem:
        return Problem(self, _oracle(self.geometry, self.torch_dtype, device, seed))


# --- what is right ---


def _without_cudnn() -> AbstractContextManager:
    """torch's own kernels: in float64 they run cuBLAS products, which are faster and whose summation is known."""
    return torch.backends.cudnn.flags(enabled=False)


class Oracle:
    """Random data of one layer, in one dtype, and its float64 output and gradients, over the whole batch.

    input ~ N(0, 1); weight ~ N(0, 1 / terms of an output), so that outputs are about N(0, 1) too; bias ~ N(0, 1/4).
    The output's gradient is N(0, 1), but 0 where the value before the activation is so near 0 (`MARGIN`) that rounding
    decides its sign: there a right backward may give or keep the gradient back, and no reference could tell.
    """

    def __init__(self, g: Geometry, dtype: torch.dtype, device: str, seed: int):
        rng = torch.Generator(device=device).manual_seed(seed)

        def normal(shape: Sequence[int], deviation: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=rng, device=device).mul_(deviation).to(dtype)

        self.inputs = normal(g.input), normal(g.weight, g.terms**-0.5), normal((g.output[1],), 0.5)
        self._leaves = [t.double().requires_grad_() for t in self.inputs]
        with _without_cudnn():
            self._before = g.torch(*self._leaves)
        before = self._before.detach()
        self.output = before.relu()
        self.grad = normal(g.output).mul_(before.abs() >= MARGIN * before.std(correction=0))

    @functools.cached_property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of input, weight and bias."""
        inner = self.inner_grad()
        with _without_cudnn():
            gradients = torch.autograd.grad(self._before, self._leaves, inner)
        self._before = self._leaves = None
        return gradients

    def inner_grad(self) -> Tensor:
        """The gradient before the activation."""
        return self.grad.double().mul_(self.output > 0)

    @functools.cached_property
    def bias_noise(self) -> float:
        """Rounding error of the sum of a bias gradient in float32, pairwise. A channel's terms can cancel, so that its
        size says nothing; and with few channels torch's own error is a matter of luck."""
        terms = self.output.numel() // self.output.shape[1]
        norm = self.inner_grad().square().sum((0, 2, 3)).sqrt().max().item()
        return EPS["fp32"] * norm * math.sqrt(max(1.0, math.log2(terms)))


@functools.lru_cache(1)  # layouts, directions and dtype classes that share data come one after another
def _oracle(g: Geometry, dtype: torch.dtype, device: str, seed: int) -> Oracle:
    return Oracle(g, dtype, device, seed)


class Problem:
    def __init__(self, case: Case, oracle: Oracle):
        self.case, self.oracle = case, oracle
        self.inputs = tuple(in_layout(case, t) for t in oracle.inputs)
        self.grad = in_layout(case, oracle.grad)

    def parts(self, direction: str) -> tuple[Part, ...]:
        oracle, eps, edges = self.oracle, EPS[self.case.dtype], self.case.geometry.edges(direction)
        if direction == "forward":
            return (Part("output", oracle.output, eps, edges),)
        x, w, b = oracle.gradients
        plain = torch.finfo(self.case.torch_dtype).eps  # no product, so no tf32
        return (
            Part("input gradient", x, eps, edges),
            Part("weight gradient", w, eps),
            Part("bias gradient", b, plain, noise=oracle.bias_noise),
        )


def in_layout(case: Case, x: Tensor, layout: str | None = None) -> Tensor:
    """A 4-D tensor, dense in the case's layout (or another); any other tensor as it is."""
    return x.contiguous(memory_format=LAYOUTS[layout or case.layout]) if x.dim() == 4 else x


def chosen_dtypes(axes, device: str, dtypes: Sequence[str], **filters: Sequence[str]) -> tuple[str, ...]:
    """The dtypes to measure; an empty filter means `DEFAULT_DTYPES`. Raises ValueError for an unknown value of any
    filter, and for tf32 on a CPU, which has none."""
    checked(axes, dtypes=dtypes, **filters)
    if device == "cpu" and "tf32" in dtypes:
        raise ValueError("dtypes: tf32 is a number format of GPUs; on a CPU expected some of bf16, fp16, fp32")
    wanted = dtypes or DEFAULT_DTYPES["cpu" if device == "cpu" else "cuda"]
    return tuple(dtype for dtype in LAYER_DTYPES if dtype in wanted)


# --- peers ---


def _convert(case: Case, x: Tensor) -> Tensor:
    return in_layout(case, x, OTHER_LAYOUT[case.layout])


def _other(case: Case) -> Case:
    return replace(case, layout=OTHER_LAYOUT[case.layout])


def torch_other_layout() -> Peer:
    """Eager torch in the layout that is not the case's: input, weight and gradient are converted for free, and what it
    gives stays in its layout. The better one of this and "torch" is the best that cuDNN can do."""
    return Peer("torch-other", lambda case: _other(case).torch(), adapt=_convert, is_torch=True)


def compiled_other_layout() -> Peer:
    return Peer("compiled-other", lambda case: _other(case).compiled(), adapt=_convert)
