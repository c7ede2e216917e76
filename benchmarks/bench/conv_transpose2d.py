"""`aeup bench conv_transpose2d`: the layers, references and peers of the transposed convolution with bias and ReLU.

What is timed is what a decoder runs: forward, relu(conv_transpose2d(input, weight, bias)) without a graph; backward,
the gradients of input, weight and bias from that of the output, the activation's included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import aeup

from .peers import Peer
from .workload import DTYPES, EPS, LAYOUTS, Operator, Part, checked, precision

OTHER_LAYOUT = {"NCHW": "NHWC", "NHWC": "NCHW"}
MARGIN = 1 / 32  # of the standard deviation before the activation


@dataclass(frozen=True)
class Geometry:
    """[n, ci, h, w] with a weight [ci, co, k, k] -> [n, co, oh, ow]."""

    n: int
    ci: int
    h: int
    w: int
    co: int
    k: int
    stride: int
    padding: int
    output_padding: int

    @property
    def input(self) -> tuple[int, int, int, int]:
        return self.n, self.ci, self.h, self.w

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.ci, self.co, self.k, self.k

    @property
    def output(self) -> tuple[int, int, int, int]:
        def size(i: int) -> int:
            return (i - 1) * self.stride - 2 * self.padding + self.k + self.output_padding

        return self.n, self.co, size(self.h), size(self.w)

    def arguments(self) -> tuple[int, int, int, int, int]:
        """stride, padding, output_padding, groups, dilation."""
        return self.stride, self.padding, self.output_padding, 1, 1


@dataclass(frozen=True)
class Workload:
    """A layer of a real model. `cpu`: batch size, height and width on a CPU; the rest is the same."""

    name: str
    gpu: Geometry
    cpu: tuple[int, int, int]
    source: str

    def geometry(self, device: str) -> Geometry:
        g = self.gpu
        n, h, w = self.cpu if device == "cpu" else (g.n, g.h, g.w)
        return Geometry(n, g.ci, h, w, g.co, g.k, g.stride, g.padding, g.output_padding)


@dataclass(frozen=True)
class Case:
    """One layer in one dtype class and layout, input and weight alike."""

    shape: str
    geometry: Geometry
    dtype: str
    layout: str
    source: str
    set: str = "main"

    @property
    def id(self) -> str:
        return f"{self.shape}/{self.dtype}/{self.layout}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.layout]

    def group(self, direction: str) -> str:
        return f"{direction} {self.dtype} {self.layout}"

    def sizes(self, direction: str) -> tuple[int, int]:
        """Forward reads input, weight and bias and writes the output. Backward reads the output and its gradient, the
        input and the weight, and writes the gradients of input, weight and bias."""
        g, item = self.geometry, self.torch_dtype.itemsize
        x, w, y = math.prod(g.input), math.prod(g.weight), math.prod(g.output)
        reads, writes = (x + w + g.co, y) if direction == "forward" else (2 * y + x + w, x + w + g.co)
        return reads * item, writes * item

    def bytes(self, direction: str) -> int:
        return sum(self.sizes(direction))

    def flops(self, direction: str) -> int:
        """As torch.utils.flop_counter: every input pixel with every tap, also where padding cuts the output off."""
        g = self.geometry
        return (2 if direction == "forward" else 4) * g.n * g.h * g.w * math.prod(g.weight)

    def describe(self) -> dict:
        g = self.geometry
        sizes = {"input": list(g.input), "weight": list(g.weight), "output": list(g.output)}
        return {**sizes, "stride": g.stride, "padding": g.padding, "output_padding": g.output_padding}

    def context(self) -> AbstractContextManager:
        return precision(self.dtype)

    def torch(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        args = self.geometry.arguments()
        return lambda x, w, b: F.relu(F.conv_transpose2d(x, w, b, *args), inplace=True)

    def aeup(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        args = self.geometry.arguments()
        return lambda x, w, b: aeup.conv_transpose2d(x, w, b, *args, activation="relu")

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

        terms = g.ci * max(1, g.k / g.stride) ** 2
        self.inputs = normal(g.input), normal(g.weight, terms**-0.5), normal((g.co,), 0.5)
        self._leaves = [t.double().requires_grad_() for t in self.inputs]
        with _without_cudnn():
            self._before = F.conv_transpose2d(*self._leaves, *g.arguments())
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
        g, oracle, eps = self.case.geometry, self.oracle, EPS[self.case.dtype]
        if direction == "forward":
            edge = max(1, g.k - 1 - g.padding + g.output_padding)  # rows that lack a tap
            return (Part("output", oracle.output, eps, (edge, edge)),)
        edge = max(1, math.ceil(g.padding / g.stride))
        x, w, b = oracle.gradients
        plain = torch.finfo(self.case.torch_dtype).eps  # no product, so no tf32
        return (
            Part("input gradient", x, eps, (edge, edge)),
            Part("weight gradient", w, eps),
            Part("bias gradient", b, plain, noise=oracle.bias_noise),
        )


def in_layout(case: Case, x: Tensor, layout: str | None = None) -> Tensor:
    """A 4-D tensor, dense in the case's layout (or another); any other tensor as it is."""
    return x.contiguous(memory_format=LAYOUTS[layout or case.layout]) if x.dim() == 4 else x


# --- the table ---


def _layer(name: str, sizes: str, k: int, s: int, p: int, op: int, cpu: tuple[int, int, int], source: str) -> Workload:
    n, ci, h, w, co = map(int, sizes.replace("->", ",").split(","))
    return Workload(name, Geometry(n, ci, h, w, co, k, s, p, op), cpu, source)


_DCGAN = "DCGAN generator at 64x64, batch 128 (pytorch/examples dcgan/main.py)"
_POSE = "SimpleBaseline pose head (pose_resnet.py)"
_UNET = "U-Net, up path at 512x512 (Pytorch-UNet unet_parts.py)"
_PIX2PIX = "pix2pix U-Net-256 (pytorch-CycleGAN-and-pix2pix networks.py)"
_MNIST = "convolutional VAE on 28x28 images, batch 128"
# sizes: batch, input channels, height, width -> output channels. Batch sizes are ours where the source leaves them
# open. On a CPU the same channels and taps, with 3 MFLOP to 1 GFLOP a call.
WORKLOADS: tuple[Workload, ...] = (
    _layer("dcgan1", "128, 100, 1, 1 -> 512", 4, 1, 0, 0, (16, 1, 1), _DCGAN),
    _layer("dcgan2", "128, 512, 4, 4 -> 256", 4, 2, 1, 0, (4, 4, 4), _DCGAN),
    _layer("dcgan3", "128, 256, 8, 8 -> 128", 4, 2, 1, 0, (4, 8, 8), _DCGAN),
    _layer("dcgan4", "128, 128, 16, 16 -> 64", 4, 2, 1, 0, (4, 16, 16), _DCGAN),
    _layer("dcgan5", "128, 64, 32, 32 -> 3", 4, 2, 1, 0, (8, 32, 32), _DCGAN),
    _layer("pose1", "32, 2048, 8, 6 -> 256", 4, 2, 1, 0, (1, 8, 6), _POSE),
    _layer("pose3", "32, 256, 32, 24 -> 256", 4, 2, 1, 0, (1, 16, 12), _POSE),
    _layer("unet1", "8, 1024, 32, 32 -> 512", 2, 2, 0, 0, (1, 16, 16), _UNET),
    _layer("unet3", "8, 256, 128, 128 -> 128", 2, 2, 0, 0, (1, 32, 32), _UNET),
    _layer("unet4", "8, 128, 256, 256 -> 64", 2, 2, 0, 0, (1, 64, 64), _UNET),
    _layer("pix2pix", "16, 256, 64, 64 -> 64", 4, 2, 1, 0, (1, 32, 32), _PIX2PIX),
    _layer("pix2pix_rgb", "16, 128, 128, 128 -> 3", 4, 2, 1, 0, (1, 128, 128), _PIX2PIX),
    _layer(
        "fcn8s", "8, 21, 64, 64 -> 21", 16, 8, 4, 0, (1, 32, 32), "last upsampling of FCN-8s (pytorch-fcn fcn8s.py)"
    ),
    _layer("wide", "16, 256, 64, 64 -> 128", 4, 2, 1, 0, (1, 32, 32), "the size of a matrix product, large"),
    _layer(
        "k3op1",
        "16, 128, 64, 64 -> 64",
        3,
        2,
        1,
        1,
        (1, 32, 32),
        "3x3 kernel with output_padding, as in CycleGAN (same file)",
    ),
    _layer("mnist", "128, 64, 7, 7 -> 32", 4, 2, 1, 0, (16, 7, 7), _MNIST),
    _layer("mnist_out", "128, 32, 14, 14 -> 1", 4, 2, 1, 0, (16, 14, 14), _MNIST),
)
SHAPES = tuple(w.name for w in WORKLOADS)
AXES = {"shape": SHAPES, "dtype": ("bf16", "fp16", "fp32", "tf32"), "layout": ("NHWC", "NCHW")}
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp32", "tf32")}


def conv_transpose2d_cases(
    device: str = "cpu", shapes: Sequence[str] = (), dtypes: Sequence[str] = (), layouts: Sequence[str] = ()
) -> list[Case]:
    """The cases for a device type, layer by layer. An empty filter means the default: all layers, `DEFAULT_DTYPES`,
    both layouts. Raises ValueError for an unknown value, and for tf32 on a CPU, which has none."""
    checked(AXES, shapes=shapes, dtypes=dtypes, layouts=layouts)
    if device == "cpu" and "tf32" in dtypes:
        raise ValueError("dtypes: tf32 is a number format of GPUs; on a CPU expected some of bf16, fp16, fp32")
    chosen = dtypes or DEFAULT_DTYPES["cpu" if device == "cpu" else "cuda"]
    return [
        Case(w.name, w.geometry(device), dtype, layout, w.source)
        for w in WORKLOADS
        if not shapes or w.name in shapes
        for dtype in AXES["dtype"]  # fp32 beside tf32: they share their data
        if dtype in chosen
        for layout in layouts or AXES["layout"]
    ]


# --- peers ---


def torch_other_layout() -> Peer:
    """Eager torch in the layout that is not the case's: input, weight and gradient are converted for free, and what it
    gives stays in its layout. The better one of this and "torch" is the best that cuDNN can do."""

    def adapt(case: Case, x: Tensor) -> Tensor:
        return in_layout(case, x, OTHER_LAYOUT[case.layout])

    return Peer("torch-other", lambda case: case.torch(), adapt=adapt, is_torch=True)


OPERATOR = Operator(
    "conv_transpose2d",
    AXES,
    columns=("shape", "dtype", "layout"),
    quick=("dcgan4", "unet3", "mnist_out"),
    cases=conv_transpose2d_cases,
    peers=lambda device: ([torch_other_layout()], {"flag_gems": "has no transposed convolution"}),
    min_time={"cpu": 0.15, "cuda": 0.03},
    group="class",
    eager=True,
    budget="bias gradient: also the rounding of a pairwise sum in float32",
    notes=(
        "bias and ReLU on, F.relu in place in torch; every result is checked over the whole batch",
        "torch-other: torch in the other layout, conversions for free; cudnn.benchmark is on",
        "fp32: tf32 forbidden; tf32: float32 with torch.backends.cudnn.allow_tf32",
    ),
)
