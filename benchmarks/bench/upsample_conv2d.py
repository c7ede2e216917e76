"""`aeup bench upsample_conv2d`: upsampling and the convolution after it, with bias and ReLU. See `layer`.

aeup's weight is the convolution's: folding it is part of what is timed. torch runs interpolate, then conv2d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

import aeup

from . import decoders, layer
from .layer import BUDGET, LAYER_DTYPES, NOTES, chosen_dtypes, compiled_other_layout, torch_other_layout
from .peers import Peer
from .workload import Operator, set_of

MODES = ("nearest", "bilinear", "bicubic")  # of the set "main"


@dataclass(frozen=True)
class Geometry:
    """[n, ci, h, w], upsampled by `scale`, with a weight [co, ci, k, k] -> [n, co, oh, ow]."""

    n: int
    ci: int
    h: int
    w: int
    co: int
    mode: str = "nearest"
    k: int = 3
    scale: int = 2
    padding: int = 1

    @property
    def input(self) -> tuple[int, int, int, int]:
        return self.n, self.ci, self.h, self.w

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.co, self.ci, self.k, self.k

    @property
    def output(self) -> tuple[int, int, int, int]:
        def size(i: int) -> int:
            return i * self.scale + 2 * self.padding - self.k + 1

        return self.n, self.co, size(self.h), size(self.w)

    @property
    def terms(self) -> float:
        return self.ci * self.k**2

    @property
    def products(self) -> int:
        """Nearest as a transposed convolution, (k + scale - 1)^2 per input pixel and pair of channels; else k^2 per
        output pixel. The resampling itself is not counted."""
        pairs = self.n * self.ci * self.co
        if self.mode.startswith("nearest"):
            return pairs * self.h * self.w * (self.k + self.scale - 1) ** 2
        return pairs * math.prod(self.output[2:]) * self.k**2

    def edges(self, direction: str) -> tuple[int, int]:
        """Rows with a tap in the padding or a clamped one."""
        reach = {"bilinear": 1, "bicubic": 2}.get(self.mode, 0)  # input pixels beyond the nearest one
        edge = self.padding + reach * self.scale if direction == "forward" else 1 + reach
        return max(edge, 1), max(edge, 1)

    def describe(self) -> dict:
        return {"mode": self.mode, "scale_factor": self.scale, "padding": self.padding}

    def torch(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=self.scale, mode=self.mode), w, b, padding=self.padding)

    def aeup(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        kw = {"scale_factor": self.scale, "mode": self.mode, "padding": self.padding, "activation": "relu"}
        return aeup.upsample_conv2d(x, w, b, **kw)


@dataclass(frozen=True)
class Case(layer.Case):
    NAMES: ClassVar[tuple[str, ...]] = ("shape", "mode", "dtype", "layout")

    @property
    def mode(self) -> str:
        return self.geometry.mode

    def group(self, direction: str) -> str:
        return f"{direction} {self.mode} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Workload:
    """A layer of a real model. `cpu`: batch size, height and width on a CPU; the rest is the same."""

    name: str
    gpu: Geometry
    cpu: tuple[int, int, int]
    source: str
    modes: tuple[str, ...] = ("nearest",)
    set: str = "main"

    def geometry(self, device: str, mode: str) -> Geometry:
        n, h, w = self.cpu if device == "cpu" else (self.gpu.n, self.gpu.h, self.gpu.w)
        return replace(self.gpu, n=n, h=h, w=w, mode=mode)


# --- the table ---


def _layer(name: str, sizes: str, cpu: tuple[int, int, int], source: str, modes=("nearest",)) -> Workload:
    n, ci, h, w, co = map(int, sizes.replace("->", ",").split(","))
    return Workload(name, Geometry(n, ci, h, w, co), cpu, source, modes)


_SD = "Stable Diffusion VAE decoder, 512x512 (diffusers autoencoders/vae.py)"
# sizes: batch, input channels, height, width -> output channels. Batch sizes are ours where the source leaves them
# open. The models upsample by nearest; the other modes, which Odena et al. (2016) compare, run on the same layers. On a
# CPU the same channels, with 50 MFLOP to 1.3 GFLOP a call.
WORKLOADS: tuple[Workload, ...] = (
    _layer("sd1", "1, 512, 64, 64 -> 512", (1, 8, 8), _SD, MODES),
    _layer("sd2", "1, 512, 128, 128 -> 512", (1, 10, 14), _SD),
    _layer("sd3", "1, 256, 256, 256 -> 256", (1, 16, 16), _SD),
    _layer("sd_b8_3", "8, 256, 128, 128 -> 256", (2, 12, 12), "the last of them, batch 8 (same file)"),
    _layer("esrgan", "4, 64, 128, 128 -> 64", (1, 48, 48), "ESRGAN x4, first upsampling (RRDBNet_arch.py)", MODES),
    _layer("taesd", "8, 64, 64, 64 -> 64", (1, 64, 64), "TAESD decoder, batch 8 (taesd.py)", MODES),
    _layer("ae32", "64, 64, 32, 32 -> 32", (4, 32, 32), "autoencoder on 64x64 images, batch 64, last layer", MODES),
    *(
        Workload(
            row.name, Geometry(*row.input, **row.arguments), row.cpu, row.source, (row.arguments["mode"],), "models"
        )
        for row in decoders.rows("upsample_conv2d")
    ),
)
SETS = ("main", "models")
SHAPES = tuple(w.name for w in WORKLOADS)
AXES = {
    "set": SETS,
    "shape": SHAPES,
    "mode": ("nearest-exact", *MODES),
    "dtype": LAYER_DTYPES,
    "layout": ("NHWC", "NCHW"),
}


def upsample_conv2d_cases(
    device: str = "cpu",
    sets: Sequence[str] = (),
    shapes: Sequence[str] = (),
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
) -> list[Case]:
    """The cases for a device type, layer by layer. An empty filter means the default: the set "main" or those of the
    shapes, all modes, `DEFAULT_DTYPES`, both layouts. Raises ValueError for an unknown value, and for tf32 on a CPU,
    which has none."""
    chosen = chosen_dtypes(AXES, device, dtypes, sets=sets, shapes=shapes, modes=modes, layouts=layouts)
    sets = set_of(sets, shapes, WORKLOADS)
    return [
        Case(w.name, w.geometry(device, mode), dtype, layout, w.source, w.set)
        for w in WORKLOADS
        if w.set in sets and (not shapes or w.name in shapes)
        for mode in w.modes
        if not modes or mode in modes
        for dtype in chosen
        for layout in layouts or AXES["layout"]
    ]


def more_peers(device: str, compiled: bool) -> tuple[list[Peer], dict[str, str]]:
    peers = [torch_other_layout(), compiled_other_layout()] if compiled else [torch_other_layout()]
    return peers, {"flag_gems": "has no fused upsampling and convolution"}


OPERATOR = Operator(
    "upsample_conv2d",
    AXES,
    columns=Case.NAMES,
    quick=("sd1", "taesd"),
    cases=upsample_conv2d_cases,
    peers=more_peers,
    min_time={"cpu": 0.15, "cuda": 0.03},
    group="class",
    eager=True,
    budget=BUDGET,
    notes=(
        *NOTES,
        "aeup folds the weight in every call; products (floor, TFLOP/s): nearest as folded, else one tap each",
    ),
)
