"""`aeup bench models`: whole models. Decoders forward, torch's modules (`nets`) beside the same after `aeup.swap`, as a
user would do it; and training steps of the bundled models (`aeup.train.step`) beside their torch twins (`twins`).

A step is judged by its loss curve: from the same weights and noise, a few steps on one batch, against the twin's in
float64. It may be off by twice as much as torch's is, twice what small changes of the weights do to the exact
curve (`_sensitivity`), and a floor.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import aeup
from aeup.decoder import UPSAMPLE
from aeup.models import MODELS, Model
from aeup.train.config import TrainConfig
from aeup.train.distributed import World
from aeup.train.step import EAGER_STEPS, Step

from . import nets
from .gate import FLOOR_ULPS
from .layer import in_layout, torch_other_layout
from .peers import Peer
from .twins import twin
from .workload import DTYPES, EPS, LAYOUTS, Operator, Part, RowCase, checked, precision, set_of

CURVE = EAGER_STEPS + 2  # steps that the gate looks at; those of a CUDA graph are among them
NOISE_SEED = 1
CURVE_FLOOR = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 2e-3}  # of the largest loss
SUM_ERROR = {"fp32": 2**-20, "tf32": 2**-10, "bf16": 2**-8}  # relative, about, of a layer's sums
BORDER = 8  # pixels: one of the latent's, in an image
MODES = ("eager", "graph")


# --- the table ---


@dataclass(frozen=True)
class Decoding:
    """A decoder's forward, from an input of the shape `gpu` or `cpu`; `small` makes it for a CPU."""

    name: str
    source: str
    make: Callable[[], nn.Module]
    gpu: tuple[int, int, int, int]
    cpu: tuple[int, int, int, int]
    small: Callable[[], nn.Module] | None = None
    set: str = "main"

    def input(self, device: str) -> tuple[int, int, int, int]:
        return self.cpu if device == "cpu" else self.gpu

    def made(self, device: str) -> nn.Module:
        return (self.small or self.make)() if device == "cpu" else self.make()


@dataclass(frozen=True)
class Training:
    """A step of the bundled model `model`, configured by `options` (on a CPU, by those of `small` too), with batches of
    `gpu` or `cpu` images; of `player` alone where there are several."""

    name: str
    model: str
    gpu: int
    cpu: int
    options: Mapping = field(default_factory=dict, hash=False)
    small: Mapping = field(default_factory=dict, hash=False)
    player: str = "model"
    set: str = "main"

    @property
    def source(self) -> str:
        return f"aeup/models, {self.model}, as `aeup train {self.model}` makes it"

    def batch(self, device: str) -> int:
        return self.cpu if device == "cpu" else self.gpu

    def config(self, device: str) -> dict:
        return {**self.options, **(self.small if device == "cpu" else {})}

    def made(self, device: str) -> Model:
        cls = MODELS[self.model]
        return cls(cls.Config(**self.config(device))).train()


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
    *(Training(f"dcgan_{mode}", "dcgan", 256, 16, {"upsample": mode}, {"width": 32}, "generator") for mode in UPSAMPLE),
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


@dataclass(frozen=True)
class _Case(RowCase):
    """One model in one dtype class and layout. `mode`: eager calls, or one CUDA graph."""

    shape: str
    workload: Decoding | Training
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


def _random(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# --- decoders ---


class _Graph:
    """x -> fn(x), replayed: the first call captures. The result is overwritten by the next one."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn, self.graph = fn, None

    def _capture(self, x: Tensor) -> None:
        self.x, stream = x.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(EAGER_STEPS):  # libraries and tuners set themselves up
                self.fn(self.x)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.y = self.fn(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        if self.graph is None:
            self._capture(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.y


@functools.lru_cache(1)
def _decoder(workload: Decoding, device: str) -> nn.Module:
    """In float32, for copying."""
    torch.manual_seed(0)
    return workload.made(device).eval().requires_grad_(False).to(device)


@functools.lru_cache(1)
def _decoded(workload: Decoding, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Latents in `dtype` and their float64 image, by the decoder with weights of `dtype`."""
    z = torch.randn(workload.input(device), generator=_random(device, seed), device=device).to(dtype)
    model = copy.deepcopy(_decoder(workload, device)).to(dtype).double()
    with torch.backends.cudnn.flags(enabled=False):
        return z, model(z.double())


@functools.cache
def _decoding_work(workload: Decoding, device: str) -> tuple[int, int]:
    """FLOP of one call by torch's modules; elements that it reads: parameters and latents."""
    shape = workload.input(device)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = workload.made(device)
        model(torch.empty(shape))
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters()) + math.prod(shape)


@dataclass(frozen=True)
class DecodeCase(_Case):
    directions: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def input(self) -> tuple[int, int, int, int]:
        return self.workload.input(self.device)

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, _, h, w = self.input
        return (n, 3, 64, 64) if (h, w) == (1, 1) else (n, 3, 8 * h, 8 * w)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def sizes(self, direction: str) -> tuple[int, int]:
        """Reads parameters and latents, writes the image."""
        reads, item = _decoding_work(self.workload, self.device)[1], self.torch_dtype.itemsize
        return reads * item, math.prod(self.output) * item

    def flops(self, direction: str) -> int:
        return _decoding_work(self.workload, self.device)[0]

    def describe(self) -> dict:
        return {"mode": self.mode, "input": list(self.input), "output": list(self.output)}

    def problem(self, device: str, seed: int) -> Decoded:
        return Decoded(self, device, seed)

    def _model(self) -> nn.Module:
        model = copy.deepcopy(_decoder(self.workload, self.device))
        return model.to(dtype=self.torch_dtype, memory_format=self.memory_format)

    def _swapped(self) -> nn.Module:
        model = self._model()
        aeup.swap(model)
        return model

    def _run(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return _Graph(fn) if self.mode == "graph" else fn

    def torch(self) -> Callable[[Tensor], Tensor]:
        return self._run(self._model())

    def compiled(self) -> Callable[[Tensor], Tensor]:
        torch._dynamo.reset()  # the recompile limit counts per function, not per case
        return self._run(torch.compile(self._model(), dynamic=False, fullgraph=True))

    def aeup(self) -> Callable[[Tensor], Tensor]:
        return self._run(self._swapped())

    def outcome(self, call: Callable[[Tensor], object], given: Tensor) -> tuple[Tensor, ...]:
        return (call(given),)

    def chosen(self, direction: str, inputs: tuple[Tensor, ...]) -> Sequence[aeup.backends.Choice]:
        return [c for c in aeup.explain(self._swapped(), *inputs) if not c.call.startswith("gradient of")]


class Decoded:
    def __init__(self, case: DecodeCase, device: str, seed: int):
        z, self.image = _decoded(case.workload, device, case.torch_dtype, seed)
        self.eps, self.inputs = EPS[case.dtype], (in_layout(case, z),)

    def parts(self, direction: str) -> tuple[Part, ...]:
        return (Part("image", self.image, self.eps, (BORDER, BORDER)),)


# --- training steps ---


class FloatNoise(TorchFunctionMode):
    """Noise for a model in float64 is drawn in float32, so that it is that of the model in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn_like, torch.rand_like):
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if func in (torch.randn, torch.rand):
            return func(*args, **kwargs | {"dtype": torch.float32}).to(kwargs.get("dtype"))
        return func(*args, **kwargs)


@functools.lru_cache(1)
def _bundled(workload: Training, device: str) -> Model:
    """In float32, for copying."""
    torch.manual_seed(0)
    return workload.made(device).to(device)


def _alone(model: Model, player: str) -> Model:
    """The model with no player but this one."""
    only = model.players()[player]
    model.players = lambda: {player: only}
    return model


def train_config(workload: Training, **fields) -> TrainConfig:
    """`aeup train`'s, at its full learning rate from the first step on."""
    defaults = {k: v for k, v in MODELS[workload.model].defaults.items() if k in ("lr", "betas")}
    return TrainConfig(workload.model, warmup=0, schedule="constant", **defaults | fields)


def _losses(workload: Training, batch: Sequence[Tensor], change: float = 0.0, seed: int = 0) -> Tensor:
    """The float64 twin's losses in the first steps, [CURVE, losses]. `change`: before each step every parameter changes
    by up to this fraction of it, at random."""
    x, target = (*batch, None)[:2]
    model, player, settings = twin(_bundled(workload, x.device.type)).double(), workload.player, train_config(workload)
    parameters, rng = list(model.parameters()), _random(x.device.type, seed)
    own = [p for p in model.players()[player].parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(own, settings.lr, settings.betas), []
    torch.manual_seed(NOISE_SEED)
    with torch.backends.cudnn.flags(enabled=False), FloatNoise():
        for _ in range(CURVE):
            for p in parameters if change else ():
                p.data *= 1 + change * (2 * torch.empty_like(p).uniform_(generator=rng) - 1)
            optimizer.zero_grad()
            found = model.loss(x.double(), target, player)
            found[model.minimise[player]].backward(inputs=own)
            optimizer.step()
            losses.append(torch.stack([loss.detach() for loss in found.values()]))
    return torch.stack(losses)


@functools.lru_cache(1)
def _curve(workload: Training, device: str, layout: str, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A batch (images, and labels where the model wants them), and `_losses`."""
    model, rng = _bundled(workload, device), _random(device, seed)
    shape = workload.batch(device), model.config.in_channels, *model.config.image_size
    batch = [torch.rand(shape, generator=rng, device=device).contiguous(memory_format=LAYOUTS[layout])]
    if model.targets:
        labels = shape[0], *shape[2:]
        batch.append(torch.randint(model.config.classes, labels, generator=rng, device=device))
    return tuple(batch), _losses(workload, batch)


@functools.lru_cache(1)
def _sensitivity(workload: Training, device: str, layout: str, dtype: str, seed: int) -> Tensor:
    """How far the exact losses go where the weights change by `SUM_ERROR`, the larger one of two trials, [CURVE,
    losses]. A training can be chaotic: one ReLU whose input is almost 0 decides which way it goes."""
    batch, exact = _curve(workload, device, layout, seed)
    return torch.stack([(_losses(workload, batch, SUM_ERROR[dtype], i) - exact).abs() for i in (1, 2)]).amax(0)


@functools.cache
def _training_work(workload: Training, device: str) -> tuple[int, int, int]:
    """FLOP of one step by the twin; elements of its parameters and of the batch's images."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model, n, player = twin(workload.made(device)), workload.batch(device), workload.player
        size = model.config.image_size
        x = torch.empty(n, model.config.in_channels, *size)
        target = torch.empty(n, *size, dtype=torch.long) if model.targets else None
        parameters = [p for p in model.players()[player].parameters() if p.requires_grad]
        model.loss(x, target, player)[model.minimise[player]].backward(inputs=parameters)
    return counter.get_total_flops(), sum(p.numel() for p in parameters), x.numel()


@dataclass(frozen=True)
class StepCase(_Case):
    directions: ClassVar[tuple[str, ...]] = ("step",)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of images, parameters and losses, under autocast too."""
        return torch.float32

    def sizes(self, direction: str) -> tuple[int, int]:
        """Reads the images, reads and writes the parameters and Adam's two moments."""
        _, parameters, images = _training_work(self.workload, self.device)
        return 4 * (3 * parameters + images), 4 * 3 * parameters

    def flops(self, direction: str) -> int:
        return _training_work(self.workload, self.device)[0]

    def describe(self) -> dict:
        w = self.workload
        what = {"model": w.model, "options": w.config(self.device), "player": w.player, "batch": w.batch(self.device)}
        return {"mode": self.mode, **what}

    def problem(self, device: str, seed: int) -> Curve:
        return Curve(self, device, seed)

    def _step(self, model: Model, compile: bool = False) -> Callable[..., Tensor]:
        """images, labels -> the losses of one step after another."""
        model = _alone(model.to(memory_format=self.memory_format), self.workload.player)
        fields = {"bf16": self.dtype == "bf16", "channels_last": self.layout == "NHWC", "graph": self.mode == "graph"}
        step = Step(model, train_config(self.workload, compile=compile, **fields), World(torch.device(self.device)))
        return lambda x, target=None: step(x, target, len(x), 0, 1)

    def torch(self) -> Callable[..., Tensor]:
        return self._step(twin(_bundled(self.workload, self.device)))

    def compiled(self) -> Callable[..., Tensor]:
        torch._dynamo.reset()
        return self._step(twin(_bundled(self.workload, self.device)), compile=True)

    def aeup(self) -> Callable[..., Tensor]:
        return self._step(copy.deepcopy(_bundled(self.workload, self.device)))

    def outcome(self, call: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Tensor, ...]:
        """The losses of the first steps."""
        torch.manual_seed(NOISE_SEED)
        losses = torch.stack([call(given) for _ in range(CURVE)])
        return losses[:1], losses

    def chosen(self, direction: str, inputs: tuple[Tensor, ...]) -> Sequence[aeup.backends.Choice]:
        x, target = (*inputs, None)[:2]
        model = copy.deepcopy(_bundled(self.workload, self.device)).to(memory_format=self.memory_format)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16"):
            return aeup.explain(model.loss, x, target, self.workload.player)


class Curve:
    def __init__(self, case: StepCase, device: str, seed: int):
        at = case.workload, device, case.layout
        self.inputs, self.losses = _curve(*at, seed)
        self.sensitivity, self.floor = _sensitivity(*at, case.dtype, seed), CURVE_FLOOR[case.dtype]

    def parts(self, direction: str) -> tuple[Part, ...]:
        """The first loss again by itself: there nothing has grown yet."""

        def part(name: str, steps: int) -> Part:
            losses, moved = self.losses[:steps], self.sensitivity[:steps].max().item()
            return Part(name, losses, EPS["fp32"], noise=self.floor * losses.abs().max().item() / FLOOR_ULPS + moved)

        return part("first loss", 1), part("losses", CURVE)


def more_peers(device: str, compiled: bool) -> tuple[list[Peer], dict[str, str]]:
    return [torch_other_layout()], {"graph": "no CUDA device: eager calls alone"} if device == "cpu" else {}


OPERATOR = Operator(
    "models",
    AXES,
    columns=_Case.NAMES,
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
