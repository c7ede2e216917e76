"""Training steps of the bundled models (`aeup.train.step`) beside their torch twins (`twins`).

A step is judged by its loss curve: from the same weights and noise, a few steps on one batch, against the twin's in
float64. It may be off by twice as much as torch's is, twice what small changes of the weights do to the exact
curve (`_sensitivity`), and a floor.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import aeup
from aeup.models import DCGAN, MODELS, DCGANConfig, Model
from aeup.train.config import TrainConfig
from aeup.train.distributed import World
from aeup.train.step import EAGER_STEPS, Step

from .gate import FLOOR_ULPS
from .twins import twin
from .whole import WholeCase, random_generator
from .workload import EPS, LAYOUTS, Part

CURVE = EAGER_STEPS + 2  # steps that the gate looks at; those of a CUDA graph are among them
NOISE_SEED = 1
CURVE_FLOOR = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 2e-3}  # of the largest loss
SUM_ERROR = {"fp32": 2**-20, "tf32": 2**-10, "bf16": 2**-8}  # relative, about, of a layer's sums


class Generator(Model):
    """DCGAN's generator by itself, on the squared error: what its decoder costs in training."""

    name, Config, objective, defaults = "generator", DCGANConfig, "loss", DCGAN.defaults
    noise = DCGAN.noise

    def __init__(self, config: DCGANConfig | None = None) -> None:
        super().__init__(config)
        self.generator = DCGAN(self.config).generator

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        images = self.generator(self.noise(len(x))).to(x.dtype)
        return {"loss": (images - (2 * x - 1)).square().mean()}


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
    cls: type[Model] | None = None  # in the place of `model`, of which it is a part

    @property
    def source(self) -> str:
        part = f"{self.cls.name} of " if self.cls else ""
        return f"aeup/models, {part}{self.model}, as `aeup train {self.model}` makes it"

    def batch(self, device: str) -> int:
        return self.cpu if device == "cpu" else self.gpu

    def config(self, device: str) -> dict:
        return {**self.options, **(self.small if device == "cpu" else {})}

    def made(self, device: str) -> Model:
        cls = self.cls or MODELS[self.model]
        return cls(cls.Config(**self.config(device))).train()


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
    parameters, rng = list(model.parameters()), random_generator(x.device.type, seed)
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
    model, rng = _bundled(workload, device), random_generator(device, seed)
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
class StepCase(WholeCase):
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
