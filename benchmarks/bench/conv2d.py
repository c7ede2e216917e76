"""`aeup bench conv2d`: the strided convolutions of encoders and discriminators with bias and ReLU. See `layer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

import aeup

from .layer import BUDGET, LAYER_DTYPES, NOTES, Case, chosen_dtypes, torch_other_layout
from .workload import Operator


@dataclass(frozen=True)
class Geometry:
    """[n, ci, h, w] with a weight [co, ci, k, k] -> [n, co, oh, ow]."""

    n: int
    ci: int
    h: int
    w: int
    co: int
    k: int
    stride: int
    padding: int

    @property
    def input(self) -> tuple[int, int, int, int]:
        return self.n, self.ci, self.h, self.w

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.co, self.ci, self.k, self.k

    @property
    def output(self) -> tuple[int, int, int, int]:
        def size(i: int) -> int:
            return (i + 2 * self.padding - self.k) // self.stride + 1

        return self.n, self.co, size(self.h), size(self.w)

    @property
    def terms(self) -> float:
        return self.ci * self.k**2

    @property
    def products(self) -> int:
        return math.prod(self.output) * self.ci * self.k**2

    def edges(self, direction: str) -> tuple[int, int]:
        padded = math.ceil(self.padding / self.stride)  # rows of the output with a tap in the padding
        edge = padded if direction == "forward" else self.k - 1 - self.padding
        return max(edge, 1), max(edge, 1)

    def describe(self) -> dict:
        return {"stride": self.stride, "padding": self.padding}

    def torch(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, self.stride, self.padding)

    def aeup(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aeup.conv2d(x, w, b, self.stride, self.padding, activation="relu")


@dataclass(frozen=True)
class Workload:
    """A layer of a real model. `cpu`: batch size, height and width on a CPU; the rest is the same."""

    name: str
    gpu: Geometry
    cpu: tuple[int, int, int]
    source: str

    def geometry(self, device: str) -> Geometry:
        n, h, w = self.cpu if device == "cpu" else (self.gpu.n, self.gpu.h, self.gpu.w)
        return replace(self.gpu, n=n, h=h, w=w)


# --- the table ---


def _layer(name: str, sizes: str, k: int, s: int, p: int, cpu: tuple[int, int, int], source: str) -> Workload:
    n, ci, h, w, co = map(int, sizes.replace("->", ",").split(","))
    return Workload(name, Geometry(n, ci, h, w, co, k, s, p), cpu, source)


_DCGAN = "DCGAN discriminator at 64x64, batch 128 (pytorch/examples dcgan/main.py)"
_PATCH = "PatchGAN 70x70 on 256x256 images (pytorch-CycleGAN-and-pix2pix networks.py)"
_VAE = "encoder of the bundled VAE on 28x28 images, batch 128 (aeup/models/networks.py)"
_SD = "Stable Diffusion VAE encoder, 512x512, its input padded (diffusers downsampling.py)"
# sizes: batch, input channels, height, width -> output channels. On a CPU the same channels and taps, with 3 MFLOP to 1
# GFLOP a call.
WORKLOADS: tuple[Workload, ...] = (
    _layer("dcgan1", "128, 3, 64, 64 -> 64", 4, 2, 1, (4, 64, 64), _DCGAN),
    _layer("dcgan2", "128, 64, 32, 32 -> 128", 4, 2, 1, (4, 32, 32), _DCGAN),
    _layer("dcgan3", "128, 128, 16, 16 -> 256", 4, 2, 1, (4, 16, 16), _DCGAN),
    _layer("dcgan4", "128, 256, 8, 8 -> 512", 4, 2, 1, (4, 8, 8), _DCGAN),
    _layer("patch1", "16, 6, 256, 256 -> 64", 4, 2, 1, (1, 64, 64), _PATCH),
    _layer("patch2", "16, 64, 128, 128 -> 128", 4, 2, 1, (1, 64, 64), _PATCH),
    _layer("vae1", "128, 1, 28, 28 -> 16", 3, 2, 1, (64, 28, 28), _VAE),
    _layer("vae2", "128, 16, 14, 14 -> 32", 3, 2, 1, (32, 14, 14), _VAE),
    _layer("sd1", "1, 128, 513, 513 -> 128", 3, 2, 0, (1, 33, 33), _SD),
    _layer("sd3", "1, 512, 129, 129 -> 512", 3, 2, 0, (1, 17, 17), _SD),
    _layer("resnet3", "32, 128, 56, 56 -> 128", 3, 2, 1, (1, 56, 56), "ResNet-50, stage 3 (torchvision resnet.py)"),
    _layer("patches", "32, 3, 224, 224 -> 96", 4, 4, 0, (2, 224, 224), "ConvNeXt's stem (torchvision convnext.py)"),
    _layer("odd", "16, 96, 65, 63 -> 80", 3, 2, 1, (1, 33, 31), "sizes with a rest"),
)
SHAPES = tuple(w.name for w in WORKLOADS)
AXES = {"shape": SHAPES, "dtype": LAYER_DTYPES, "layout": ("NHWC", "NCHW")}


def conv2d_cases(
    device: str = "cpu", shapes: Sequence[str] = (), dtypes: Sequence[str] = (), layouts: Sequence[str] = ()
) -> list[Case]:
    """The cases for a device type, layer by layer. An empty filter means the default: all layers, `DEFAULT_DTYPES`,
    both layouts. Raises ValueError for an unknown value, and for tf32 on a CPU, which has none."""
    chosen = chosen_dtypes(AXES, device, dtypes, shapes=shapes, layouts=layouts)
    return [
        Case(w.name, w.geometry(device), dtype, layout, w.source)
        for w in WORKLOADS
        if not shapes or w.name in shapes
        for dtype in chosen
        for layout in layouts or AXES["layout"]
    ]


OPERATOR = Operator(
    "conv2d",
    AXES,
    columns=Case.NAMES,
    quick=("dcgan2", "patch2", "vae2"),
    cases=conv2d_cases,
    peers=lambda device, compiled: ([torch_other_layout()], {}),
    min_time={"cpu": 0.15, "cuda": 0.03},
    group="class",
    eager=True,
    budget=BUDGET,
    notes=NOTES,
    by_torch=("cpu",),
)
