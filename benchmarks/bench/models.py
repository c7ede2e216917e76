"""`aeup bench models`: whole models. Decoders forward (`decoding`) and training steps (`steps`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from aeup.decoder import UPSAMPLE

from . import nets
from .decoding import DecodeCase, Decoding
from .layer import torch_other_layout
from .peers import Peer
from .steps import CURVE, CURVE_FLOOR, Generator, StepCase, Training
from .whole import WholeCase
from .workload import Operator, checked, set_of

MODES = ("eager", "graph")
_SMALL_SD = functools.partial(nets.sd_vae, (128, 128, 64, 32))
_SD = "Stable Diffusion VAE decoder, 512x512 (diffusers autoencoders/vae.py); on a CPU a quarter of the channels"
_TAESD = "TAESD decoder, 512x512 (taesd.py)"
WORKLOADS: tuple[Decoding | Training, ...] = (
    Decoding("sd_vae", _SD, nets.sd_vae, (1, 4, 64, 64), (1, 4, 12, 12), _SMALL_SD),
    Decoding("sd_vae_b4", _SD, nets.sd_vae, (4, 4, 64, 64), (2, 4, 12, 12), _SMALL_SD, "more"),
    Decoding("sd_vae_1024", _SD, nets.sd_vae, (1, 4, 128, 128), (1, 4, 16, 16), _SMALL_SD, "more"),
    Decoding("taesd", _TAESD, nets.taesd, (1, 4, 64, 64), (1, 4, 12, 12)),
    Decoding("taesd_b8", _TAESD, nets.taesd, (8, 4, 64, 64), (4, 4, 8, 8)),
    Decoding("dcgan_decoder", "pytorch/examples dcgan/main.py", nets.dcgan, (128, 100, 1, 1), (8, 100, 1, 1)),
    Training("vae", "vae", 128, 64),
    Training("vae_plain", "vae", 128, 64, {"channels": (64, 64, 32), "depth": 0, "norm": None, "activation": "relu"}),
    Training("vae_flow", "vae", 128, 64, {"posterior": "flow"}),
    Training("ae", "ae", 128, 64),
    Training("denoising", "denoising", 128, 64),
    Training("sparse", "sparse", 128, 64),
    Training("contractive", "contractive", 128, 64),
    *(Training(f"generator_{m}", "dcgan", 256, 16, {"upsample": m}, {"width": 32}, cls=Generator) for m in UPSAMPLE),
    *(
        Training(f"dcgan_{mode}", "dcgan", 256, 16, {"upsample": mode}, {"width": 32}, "generator", set)
        for mode, set in zip(UPSAMPLE, ("main", "more", "more", "main"), strict=True)
    ),
    Training("fcn", "fcn", 64, 4),
    *(
        Training(f"vae_{mode}", "vae", 128, 64, {"upsample": mode}, set="more")
        for mode in ("conv_transpose", "bilinear", "bicubic")
    ),
    Training("fcn_bilinear", "fcn", 64, 4, {"upsample": "bilinear"}, set="more"),
)
AXES = {
    "set": ("main", "more"),
    "shape": tuple(w.name for w in WORKLOADS),
    "mode": MODES,
    "dtype": ("bf16", "fp32", "tf32"),
    "layout": ("NHWC", "NCHW"),
}
DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def model_cases(
    device: str = "cpu",
    sets: Sequence[str] = (),
    shapes: Sequence[str] = (),
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
) -> list[DecodeCase | StepCase]:
    """The cases for a device type. An empty filter means the default: the set "main" or those of the models, bf16 (of a
    training step: autocast) on a GPU and fp32 on a CPU, eager and (on a GPU) as a CUDA graph; decoders in both layouts,
    steps in that of `aeup train`. Raises ValueError for an unknown value, and for what a CPU does not have."""
    checked(AXES, sets=sets, shapes=shapes, modes=modes, dtypes=dtypes, layouts=layouts)
    kind = "cpu" if device == "cpu" else "cuda"
    if kind == "cpu" and ("tf32" in dtypes or "graph" in modes):
        raise ValueError("a CPU has no tf32 and no CUDA graph: expected modes eager, dtypes some of bf16, fp32")
    sets = set_of(sets, shapes, WORKLOADS)
    return [
        (DecodeCase if isinstance(w, Decoding) else StepCase)(w.name, w, mode, dtype, layout, device)
        for w in WORKLOADS
        if w.set in sets and (not shapes or w.name in shapes)
        for dtype in dtypes or (DEFAULT_DTYPE[kind],)
        for layout in layouts or (AXES["layout"] if isinstance(w, Decoding) else AXES["layout"][:1])
        for mode in modes or (MODES[:1] if kind == "cpu" else MODES)
    ]


def more_peers(device: str, compiled: bool) -> tuple[list[Peer], dict[str, str]]:
    return [torch_other_layout()], {"graph": "no CUDA device: eager calls alone"} if device == "cpu" else {}


OPERATOR = Operator(
    "models",
    AXES,
    columns=WholeCase.NAMES,
    quick=("taesd", "vae"),
    cases=model_cases,
    peers=more_peers,
    min_time={"cpu": 0.5, "cuda": 0.1},
    group="class",
    eager=True,
    budget=f"losses of {CURVE} steps: also twice the effect of small changes of the weights, and of the largest loss "
    + ", ".join(f"{floor:g} ({name})" for name, floor in CURVE_FLOOR.items()),
    directions=("forward", "step"),
    notes=(
        "forward: a decoder of torch's modules, and the same after aeup.swap(model), without gradients",
        "step: zero_grad, loss, backward, Adam, of the bundled model and of its torch twin; bf16: autocast",
        "torch-other: torch in the other layout, images converted for free; cudnn.benchmark is on",
        "graph: the whole call is one CUDA graph, of torch as well; the input is copied into it",
        "contractive: its default form does not upsample, so that the ratio shows the measurement's own error",
        "floor, TFLOP/s: the products of torch's modules; aeup's nearest upsampling needs 16 of 36 in its convolutions",
    ),
)
