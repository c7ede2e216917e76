"""`aeup bench conv_transpose2d`: the layers of the transposed convolution with bias and ReLU. See `layer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import aeup

from . import decoders
from .layer import BUDGET, LAYER_DTYPES, NOTES, Case, chosen_dtypes, torch_other_layout
from .workload import Operator, set_of


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

    @property
    def terms(self) -> float:
        return self.ci * max(1, self.k / self.stride) ** 2

    @property
    def products(self) -> int:
        """As torch.utils.flop_counter: every input pixel with every tap, also where padding cuts the output off."""
        return self.n * self.h * self.w * math.prod(self.weight)

    def edges(self, direction: str) -> tuple[int, int]:
        if direction == "forward":
            edge = max(1, self.k - 1 - self.padding + self.output_padding)  # rows that lack a tap
        else:
            edge = max(1, math.ceil(self.padding / self.stride))
        return edge, edge

    def describe(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "output_padding": self.output_padding}

    def arguments(self) -> tuple[int, int, int, int, int]:
        """stride, padding, output_padding, groups, dilation."""
        return self.stride, self.padding, self.output_padding, 1, 1

    def torch(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv_transpose2d(x, w, b, *self.arguments())

    def aeup(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aeup.conv_transpose2d(x, w, b, *self.arguments(), activation="relu")


@dataclass(frozen=True)
class Workload:
    """A layer of a real model. `cpu`: batch size, height and width on a CPU; the rest is the same."""

    name: str
    gpu: Geometry
    cpu: tuple[int, int, int]
    source: str
    set: str = "main"

    def geometry(self, device: str) -> Geometry:
        g = self.gpu
        n, h, w = self.cpu if device == "cpu" else (g.n, g.h, g.w)
        return Geometry(n, g.ci, h, w, g.co, g.k, g.stride, g.padding, g.output_padding)


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
    *(
        Workload(row.name, Geometry(*row.input, **row.arguments), row.cpu, row.source, "models")
        for row in decoders.rows("conv_transpose2d")
    ),
)
SETS = ("main", "models")
SHAPES = tuple(w.name for w in WORKLOADS)
AXES = {"set": SETS, "shape": SHAPES, "dtype": LAYER_DTYPES, "layout": ("NHWC", "NCHW")}


def conv_transpose2d_cases(
    device: str = "cpu",
    sets: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
) -> list[Case]:
    """The cases for a device type, layer by layer. An empty filter means the default: the set "main" or those of the
    shapes, `DEFAULT_DTYPES`, both layouts. Raises ValueError for an unknown value, and for tf32 on a CPU, which has
    none."""
    chosen = chosen_dtypes(AXES, device, dtypes, sets=sets, shapes=shapes, layouts=layouts)
    sets = set_of(sets, shapes, WORKLOADS)
    return [
        Case(w.name, w.geometry(device), dtype, layout, w.source, w.set)
        for w in WORKLOADS
        if w.set in sets and (not shapes or w.name in shapes)
        for dtype in chosen
        for layout in layouts or AXES["layout"]
    ]


OPERATOR = Operator(
    "conv_transpose2d",
    AXES,
    columns=Case.NAMES,
    quick=("dcgan4", "unet3", "mnist_out"),
    cases=conv_transpose2d_cases,
    peers=lambda device, compiled: ([torch_other_layout()], {"flag_gems": "has no transposed convolution"}),
    min_time={"cpu": 0.15, "cuda": 0.03},
    group="class",
    eager=True,
    budget=BUDGET,
    notes=NOTES,
)
