"""Decoders forward: torch's modules (`nets`) beside the same after `aeup.swap`, as a user would do it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import aeup
from aeup.train.step import EAGER_STEPS

from .layer import in_layout
from .whole import WholeCase, random_generator
from .workload import DTYPES, EPS, Part

BORDER = 8  # pixels: one of the latent's, in an image


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
    z = torch.randn(workload.input(device), generator=random_generator(device, seed), device=device).to(dtype)
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
class DecodeCase(WholeCase):
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
