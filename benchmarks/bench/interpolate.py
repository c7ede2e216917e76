"""`aeup bench interpolate`: workloads, references and peers, for benchmarks and tests alike.

A `Workload` is a named shape from a real kind of model, once in the size for a GPU and once in the size for a CPU.
`interpolate_cases` crosses the workloads with modes, dtypes and layouts into `Case` objects, each a complete call.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import aeup

from . import decoders
from .gate import autograd_backward
from .peers import Peer
from .workload import EPS, LAYOUTS, OpCase, Operator, Part, checked, set_of

MODES = ("nearest", "bilinear", "bicubic")
DEFAULT_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Geometry:
    """[n, c, h, w] -> [n, c, oh, ow]."""

    n: int
    c: int
    h: int
    w: int
    oh: int
    ow: int

    @property
    def input(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def output(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.oh, self.ow

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w} -> {self.oh}x{self.ow}"


@dataclass(frozen=True)
class Workload:
    """One row of the table. `by` says how the model asks for the output size: "scale" or "size"."""

    name: str
    gpu: Geometry
    cpu: Geometry
    source: str
    by: str = "scale"
    modes: tuple[str, ...] = MODES
    align_corners: bool | None = None
    set: str = "main"

    def geometry(self, device: str) -> Geometry:
        return self.cpu if device == "cpu" else self.gpu


@dataclass(frozen=True)
class Case(OpCase):
    """One call of `interpolate`: shapes, arguments, dtype and layout. `id` names it in reports and tests."""

    shape: str
    geometry: Geometry
    mode: str
    dtype: str
    layout: str
    by: str
    align_corners: bool | None
    set: str
    source: str
    NAMES: ClassVar[tuple[str, ...]] = ("shape", "mode", "dtype", "layout")

    def sizes(self, direction: str) -> tuple[int, int]:
        g, item = self.geometry, self.torch_dtype.itemsize
        sizes = g.n * g.c * g.h * g.w * item, g.n * g.c * g.oh * g.ow * item
        return sizes if direction == "forward" else sizes[::-1]

    def flops(self, direction: str) -> int:
        return 0

    def group(self, direction: str) -> str:
        return self.mode

    def context(self) -> AbstractContextManager:
        return nullcontext()

    @property
    def scale_factor(self) -> tuple[float, float]:
        return self.geometry.oh / self.geometry.h, self.geometry.ow / self.geometry.w

    def kwargs(self) -> dict:
        """The keyword arguments after the input, as for `torch.nn.functional.interpolate`."""
        kw: dict = {"mode": self.mode}
        if self.by == "size":
            kw["size"] = (self.geometry.oh, self.geometry.ow)
        else:
            kw["scale_factor"] = self.scale_factor
        if self.align_corners is not None:
            kw["align_corners"] = self.align_corners
        return kw

    def tensor(self, direction: str, device: str | torch.device = "cpu", seed: int = 0) -> Tensor:
        """What the call reads, dense in the case's layout: the input (forward) or the output's gradient (backward)."""
        shape = self.geometry.input if direction == "forward" else self.geometry.output
        rng = torch.Generator(device=device).manual_seed(seed)
        x = torch.randn(shape, generator=rng, device=device)
        return x.to(self.torch_dtype).contiguous(memory_format=self.memory_format)

    def describe(self) -> dict:
        sizes = {"input": list(self.geometry.input), "output": list(self.geometry.output)}
        return {**sizes, "by": self.by, "mode": self.mode, "align_corners": self.align_corners}

    def torch(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(F.interpolate, **self.kwargs())

    def aeup(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(aeup.interpolate, **self.kwargs())

    def problem(self, device: str, seed: int) -> Problem:
        return Problem(self, device, seed)


class Problem:
    """The data of a case, each tensor made when it is first asked for."""

    def __init__(self, case: Case, device: str, seed: int):
        self.case, self.device, self.seed = case, device, seed

    @functools.cached_property
    def inputs(self) -> tuple[Tensor]:
        return (self.case.tensor("forward", self.device, self.seed),)

    @functools.cached_property
    def grad(self) -> Tensor:
        return self.case.tensor("backward", self.device, self.seed + 1)

    def parts(self, direction: str) -> tuple[Part]:
        return parts(self.case, direction, self.inputs[0] if direction == "forward" else self.grad)


# --- what is right ---


def torch_result(case: Case, direction: str, x: Tensor, given: Tensor) -> Tensor:
    """Eager torch on `given` (input or output gradient); `x` is an input of the right shape."""
    if direction == "forward":
        return case.torch()(given)
    return autograd_backward(case.torch(), (x,))(given)[0]


def nearest_sources(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source row of each output row [oh] and source column of each output column [ow], as torch chooses them."""
    g = case.geometry

    def probe(values: Tensor) -> Tensor:  # [h, w] of whole numbers below 128, exact in every dtype -> [oh, ow]
        x = values.to(case.torch_dtype).expand(1, g.c, g.h, g.w).contiguous(memory_format=case.memory_format)
        return F.interpolate(x, **case.kwargs())[0, 0].long()

    rows = torch.arange(g.h, device=device)[:, None].expand(g.h, g.w)
    cols = torch.arange(g.w, device=device)[None, :].expand(g.h, g.w)
    row = probe(rows // 128)[:, 0] * 128 + probe(rows % 128)[:, 0]
    col = probe(cols // 128)[0] * 128 + probe(cols % 128)[0]
    return row, col


def reference(case: Case, direction: str, given: Tensor) -> Tensor:
    """The float64 result [n, c, h, w] for `given` (input or output gradient)."""
    g, wide = case.geometry, given.detach().double().contiguous()
    if case.mode.startswith("nearest"):
        row, col = nearest_sources(case, given.device)
        if direction == "forward":
            return wide.index_select(2, row).index_select(3, col)
        pick_rows = F.one_hot(row, g.h).double()  # [oh, h]
        pick_cols = F.one_hot(col, g.w).double()  # [ow, w]
        return pick_rows.t() @ (wide @ pick_cols)
    x = wide if direction == "forward" else wide.new_zeros(g.input)
    return torch_result(case, direction, x, wide)


def parts(case: Case, direction: str, given: Tensor) -> tuple[Part]:
    """The result for `given` and its bounds. Nearest copies, so its forward must be exact; its reference uses the
    source indices that torch chooses at the case's dtype and layout (float64's may differ). Its backward is a plain
    sum, so torch's error counts only as far as rounding explains it: a torch that gathers from other indices than its
    forward widens no budget."""
    g, eps, cap = case.geometry, EPS[case.dtype], math.inf
    scale = math.ceil(g.oh / g.h), math.ceil(g.ow / g.w)
    # Rows and columns of the result that a clamped tap can reach: two input pixels.
    frame = (2 * scale[0], 2 * scale[1]) if direction == "forward" else (2, 2)
    if case.mode.startswith("nearest"):
        eps, cap = (0.0, 0.0) if direction == "forward" else (eps, scale[0] * scale[1] * EPS["fp32"])
    name = "output" if direction == "forward" else "input gradient"
    return (Part(name, reference(case, direction, given), eps, frame, cap=cap),)


# --- the table ---


def _of_models() -> list[Workload]:
    return [
        Workload(
            row.name,
            Geometry(*row.input, *row.arguments["size"]),
            Geometry(*row.cpu, *row.input[2:], *row.arguments["size"]),
            row.source,
            row.arguments["by"],
            (row.arguments["mode"],),
            row.arguments["align_corners"],
            "models",
        )
        for row in decoders.rows("interpolate")
    ]


# main: five large shapes that between them need every specialisation, and a small one that shows the host's cost.
# On a CPU the same kinds, with outputs of 5 to 14 MB in float32: larger than a core's L2 cache.
# models: as the models call it.
WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "feat_x2",
        Geometry(16, 64, 128, 128, 256, 256),
        Geometry(2, 64, 64, 64, 128, 128),
        "feature map of a U-Net or ESRGAN decoder, 64 channels (Pytorch-UNet unet_parts.py, RRDBNet_arch.py)",
    ),
    Workload(
        "deep_x2",
        Geometry(8, 512, 64, 64, 128, 128),
        Geometry(1, 512, 32, 32, 64, 64),
        "first upsampling of the Stable Diffusion VAE decoder, 512 channels (diffusers vae.py)",
    ),
    Workload(
        "rgb_x2",
        Geometry(16, 3, 512, 512, 1024, 1024),
        Geometry(4, 3, 256, 256, 512, 512),
        "RGB pictures, as in super-resolution and image losses",
    ),
    Workload(
        "seg_x8",
        Geometry(8, 21, 64, 64, 512, 512),
        Geometry(1, 21, 32, 32, 256, 256),
        "21 class scores of a segmentation network with stride 8 (FCN-8s, DeepLab)",
    ),
    Workload(
        "odd",
        Geometry(16, 128, 56, 72, 129, 200),
        Geometry(2, 64, 56, 72, 129, 200),
        "non-integer scale to a given size, as in feature pyramids",
        by="size",
    ),
    Workload(
        "small",
        Geometry(1, 64, 16, 16, 32, 32),
        Geometry(1, 64, 16, 16, 32, 32),
        "small feature map: launch and host cost",
    ),
    *_of_models(),
)
SETS = tuple(dict.fromkeys(w.set for w in WORKLOADS))
SHAPES = tuple(w.name for w in WORKLOADS)
AXES = {
    "set": SETS,
    "shape": SHAPES,
    "mode": tuple(dict.fromkeys(m for w in WORKLOADS for m in w.modes)),
    "dtype": ("fp32", "bf16", "fp16"),
    "layout": tuple(LAYOUTS),
}


def interpolate_cases(
    device: str = "cpu",
    sets: Sequence[str] = (),
    shapes: Sequence[str] = (),
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
) -> list[Case]:
    """The cases for a device type, in table order. An empty filter means the default: the set "main" or those of the
    shapes, all modes, `DEFAULT_DTYPES`, both layouts."""
    checked(AXES, sets=sets, shapes=shapes, modes=modes, dtypes=dtypes, layouts=layouts)
    sets = set_of(sets, shapes, WORKLOADS)
    return [
        Case(w.name, w.geometry(device), mode, dtype, layout, w.by, w.align_corners, w.set, w.source)
        for w in WORKLOADS
        if w.set in sets and (not shapes or w.name in shapes)
        for mode in w.modes
        if not modes or mode in modes
        for dtype in dtypes or DEFAULT_DTYPES
        for layout in layouts or LAYOUTS
    ]


# --- peers ---


def flag_gems() -> Peer:
    """FlagGems' own functions, called directly; they follow the schema of torch.ops.aten.upsample_*."""
    import flag_gems as gems

    def op(case: Case, suffix: str = ""):
        return getattr(gems, f"upsample_{case.mode.replace('-', '_')}2d{suffix}", None)

    def refuses(case: Case, direction: str) -> str | None:
        if op(case) is None:
            return f"this release has no {case.mode} 2-D"
        if direction == "backward" and op(case, "_backward") is None:
            return f"this release has no {case.mode} 2-D backward"
        return None if case.layout == "NCHW" else "NCHW only"

    def make(case: Case):
        g = case.geometry
        corners = () if case.mode.startswith("nearest") else (bool(case.align_corners),)
        scales = (None, None) if case.by == "size" else case.scale_factor
        forward, backward = op(case), op(case, "_backward")

        class Interpolate(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return forward(x, [g.oh, g.ow], *corners, *scales)

            @staticmethod
            def backward(ctx, grad):
                return backward(grad, [g.oh, g.ow], list(g.input), *corners, *scales)

        return lambda x: Interpolate.apply(x) if x.requires_grad else forward(x, [g.oh, g.ow], *corners, *scales)

    return Peer("flag_gems", make, refuses=refuses)


def more_peers(device: str, compiled: bool) -> tuple[list[Peer], dict[str, str]]:
    if device == "cpu":
        return [], {"flag_gems": "has no CPU kernels"}
    if importlib.util.find_spec("flag_gems") is None:
        return [], {"flag_gems": "not installed (pip install flag-gems)"}
    try:
        return [flag_gems()], {}
    except Exception as error:  # a peer that is broken on this machine must not stop the others
        return [], {"flag_gems": f"cannot be imported: {type(error).__name__}: {error}"}


OPERATOR = Operator(
    "interpolate",
    AXES,
    columns=("shape", "mode", "dtype", "layout"),
    quick=("feat_x2", "odd"),
    cases=interpolate_cases,
    peers=more_peers,
    group="mode",
    budget="nearest: ulps alone, forward exact",
)
