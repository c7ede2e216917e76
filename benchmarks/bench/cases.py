"""The workload table of `aeup.interpolate`, for benchmarks and tests alike.

A `Workload` is a named shape from a real kind of model, once in the size for a GPU and once in the size for a CPU.
`interpolate_cases` crosses the workloads with modes, dtypes and layouts into `Case` objects, each a complete call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("nearest", "bilinear", "bicubic")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_DTYPES = ("fp32", "bf16")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DIRECTIONS = ("forward", "backward")


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
class Case:
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

    @property
    def id(self) -> str:
        return f"{self.shape}/{self.mode}/{self.dtype}/{self.layout}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.layout]

    @property
    def bytes(self) -> int:
        """Bytes that a call must move: the input once and the output once. The same for forward and backward."""
        g = self.geometry
        return g.n * g.c * (g.h * g.w + g.oh * g.ow) * self.torch_dtype.itemsize

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


def _models(name, gpu, cpu, source, mode, by="scale", align_corners=None) -> Workload:
    return Workload(name, Geometry(*gpu), Geometry(*cpu), source, by, (mode,), align_corners, "models")


# main: five large shapes that between them need every specialisation, and a small one that shows the host's cost.
# On a CPU the same kinds, with outputs of 5 to 14 MB in float32: larger than a core's L2 cache.
# models: as the models call it; the batch size is our choice where the source leaves it open, and smaller on a CPU.
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
    _models(
        "unet_bilinear",
        (4, 64, 256, 256, 512, 512),
        (1, 16, 256, 256, 512, 512),
        "Pytorch-UNet unet_parts.py, last Up at 512x512",
        "bilinear",
        align_corners=True,
    ),
    _models(
        "fpn",
        (2, 256, 25, 34, 50, 68),
        (2, 256, 25, 34, 50, 68),
        "torchvision ops/feature_pyramid_network.py, top-down path",
        "nearest",
        by="size",
    ),
    _models(
        "deeplab",
        (8, 21, 65, 65, 520, 520),
        (1, 21, 65, 65, 520, 520),
        "torchvision models/segmentation/_utils.py",
        "bilinear",
        by="size",
        align_corners=False,
    ),
    _models(
        "bifpn",
        (8, 64, 32, 32, 64, 64),
        (8, 64, 32, 32, 64, 64),
        "effdet efficientdet.py, EfficientDet-D0",
        "nearest",
    ),
    _models(
        "nvae_nearest",
        (200, 256, 4, 4, 8, 8),
        (200, 256, 4, 4, 8, 8),
        "NVAE neural_operations.py",
        "nearest",
    ),
    _models(
        "nvae_bilinear",
        (200, 64, 16, 16, 32, 32),
        (50, 64, 16, 16, 32, 32),
        "NVAE neural_operations.py",
        "bilinear",
        align_corners=True,
    ),
    _models(
        "raft",
        (1, 2, 55, 128, 440, 1024),
        (1, 2, 55, 128, 440, 1024),
        "torchvision models/optical_flow/_utils.py, upsample_flow",
        "bilinear",
        by="size",
        align_corners=True,
    ),
    _models(
        "keypoint",
        (100, 17, 28, 28, 56, 56),
        (50, 17, 28, 28, 56, 56),
        "torchvision models/detection/keypoint_rcnn.py, KeypointRCNNPredictor",
        "bilinear",
        align_corners=False,
    ),
    _models(
        "wan_exact",
        (4, 192, 240, 416, 480, 832),
        (1, 16, 240, 416, 480, 832),
        "diffusers autoencoder_kl_wan.py, WanUpsample",
        "nearest-exact",
    ),
    _models(
        "vit_position",
        (1, 768, 14, 14, 24, 24),
        (1, 768, 14, 14, 24, 24),
        "torchvision models/vision_transformer.py, interpolate_embeddings",
        "bicubic",
        by="size",
        align_corners=True,
    ),
)
SETS = tuple(dict.fromkeys(w.set for w in WORKLOADS))
SHAPES = tuple(w.name for w in WORKLOADS)
QUICK_SHAPES = ("feat_x2", "odd")


def interpolate_cases(
    device: str = "cpu",
    sets: Iterable[str] = ("main",),
    shapes: Sequence[str] = (),
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = DEFAULT_DTYPES,
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> list[Case]:
    """The cases for a device type, in table order. An empty `shapes` or `modes` filters nothing."""
    sets = tuple(sets)
    for argument, given, allowed in (
        ("sets", sets, SETS),
        ("shapes", shapes, SHAPES),
        ("modes", modes, {m for w in WORKLOADS for m in w.modes}),
        ("dtypes", dtypes, DTYPES),
        ("layouts", layouts, LAYOUTS),
    ):
        if unknown := [v for v in given if v not in allowed]:
            raise ValueError(f"{argument}: unknown {unknown}, expected some of {sorted(allowed)}")
    return [
        Case(w.name, w.geometry(device), mode, dtype, layout, w.by, w.align_corners, w.set, w.source)
        for w in WORKLOADS
        if w.set in sets and (not shapes or w.name in shapes)
        for mode in w.modes
        if not modes or mode in modes
        for dtype in dtypes
        for layout in layouts
    ]
