"""What every bundled model gives to the training loop and to the commands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Model(nn.Module):
    """A model that `aeup train` can train, built as ``Model(Model.Config(...))``.

    ``loss`` holds no control flow that depends on data and never waits for a GPU, so that the whole training step can
    be one CUDA graph; noise comes from torch's default generator. What a model can do besides is told by the methods
    it has:

    - ``encode(x)``: a latent vector [N, latent_dim]; of the VAE a pair, mean and log variance;
    - ``decode(z)``: [N, latent_dim] -> the image's logits [N, C, H, W];
    - ``reconstruct(x)``: images [N, C, H, W] in [0, 1];
    - ``sample(n)``: images [n, C, H, W] in [0, 1];
    - ``corrupt(x)``: the damaged image that a denoiser is trained to clean;
    - ``segment(x)``: labels [N, H, W], int64;
    - ``log_likelihood(x, samples)``: an estimate of log p(x), [N], in nats.
    """

    name: str  # on the command line
    Config: type  # dataclass of the model's options
    objective: str | None = None  # the validation loss that "best" follows, lower is better; None: best is the last
    targets = False  # trains on pairs (images, labels), with labels int64 [N, H, W] below config.classes
    defaults: dict[str, Any] = {}  # the training configuration that suits this model, where it is not the usual one
    plain_weights = True  # the loss reads weights by the modules' own forward alone: autocast's copies may stand in
    minimise: dict[str, str]  # player -> the entry of its loss that its optimizer minimises

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("objective") is not None and "minimise" not in cls.__dict__:
            cls.minimise = {"model": cls.objective}

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config if config is not None else self.Config()

    def players(self) -> dict[str, nn.Module]:
        """What takes a step, in this order, each with an optimizer of its own."""
        return {"model": self}

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        """Scalars for images [N, C, H, W] in [0, 1], means over the images; ``minimise[player]`` names the one whose
        gradient trains `player`."""
        raise NotImplementedError

    def set_progress(self, step: int, steps: int) -> None:
        """Writes what changes during training into buffers, where a captured step reads it. `step` counts from 0."""

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, float]:
        """Every entry of every player's ``loss``, weighted by the number of images in a batch."""
        totals: dict[str, Tensor] = {}
        count = 0
        for x, target in batches:
            for player in self.players():
                for key, value in self.loss(x, target, player).items():
                    totals[key] = totals.get(key, 0.0) + value.double() * len(x)
            count += len(x)
        if count == 0:
            raise ValueError("batches must hold at least one image, got none")
        return {key: (total / count).item() for key, total in totals.items()}

    def like(self) -> Tensor:
        """A parameter, for the device and dtype of new tensors."""
        return next(self.parameters())


class BatchMean(nn.Module):
    """[N, ...] -> [...]: the mean over the images of the batch, also where many processes hold a share of it each (in
    training: `aeup.train.distributed` sees to that). For a loss that is more than a mean of the images' own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


def check_choice(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_real(name: str, value: object, least: float = 0.0, most: float = math.inf, strict: bool = False) -> float:
    """A finite number from `least` to `most`, without the ends if `strict`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    inside = least < value < most if strict else least <= value <= most
    if not (inside and math.isfinite(value)):
        ends = ("above", "below") if strict else ("at least", "at most")
        below = f" and {ends[1]} {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} must be finite, {ends[0]} {least:g}{below}, got {value}")
    return float(value)
