"""The drop-in decoder: a latent vector or a feature map in, an image out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from aeup.functional import Activation
from aeup.nn import BatchNorm2d, Conv2d, ConvTranspose2d, GroupNorm, UpsampleConv2d

UPSAMPLE = ("nearest", "bilinear", "bicubic", "conv_transpose")
NORM = ("batch", "group", None)
HEAD = ("sigmoid", "tanh", None)
ACTIVATION: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}
_FUSED = {"relu": "relu", "leaky_relu": ("leaky_relu", 0.2), "silu": "silu", "gelu": "gelu", "tanh": "tanh"}


def make_norm(norm: str | None, channels: int, activation: Activation = None) -> nn.Module:
    """Batch norm or group norm (8 groups, or the largest common divisor) with an activation, or nothing."""
    if norm not in NORM:
        raise ValueError(f"norm must be one of {NORM}, got {norm!r}")
    if norm == "batch":
        return BatchNorm2d(channels, activation=activation)
    if norm == "group":
        return GroupNorm(math.gcd(8, channels), channels, activation=activation)
    return nn.Identity()


def make_activation(activation: str | nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A new activation module from a name, a module (copied) or a class."""
    if isinstance(activation, str):
        if activation not in ACTIVATION:
            raise ValueError(f"activation must be one of {tuple(ACTIVATION)} or a module, got {activation!r}")
        return ACTIVATION[activation]()
    module = copy.deepcopy(activation) if isinstance(activation, nn.Module) else activation
    if not isinstance(module, nn.Module) and callable(module):
        module = module()
    if not isinstance(module, nn.Module):
        raise TypeError(f"activation must be a name, a torch.nn.Module or a class of one, got {activation!r}")
    return module


def norm_and_activation(
    norm: str | None, channels: int, activation: str | nn.Module | Callable[[], nn.Module]
) -> list[nn.Module]:
    """A norm and the activation after it. Where the norm can have the activation it is part of it, with an Identity in
    its place, so that the modules after it keep their names."""
    fused = _FUSED.get(activation) if norm is not None and isinstance(activation, str) else None
    return [make_norm(norm, channels, fused), nn.Identity() if fused else make_activation(activation)]


def after_convolution(
    norm: str | None, channels: int, activation: str | nn.Module | Callable[[], nn.Module]
) -> tuple[Activation, list[nn.Module]]:
    """What a convolution takes of the activation, all where there is no norm, and the two modules after it."""
    fused = _FUSED.get(activation) if norm is None and isinstance(activation, str) else None
    return fused, [nn.Identity(), nn.Identity()] if fused else norm_and_activation(norm, channels, activation)


def check_int(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_widths(channels: Sequence[int]) -> tuple[int, ...]:
    if isinstance(channels, (str, int)) or not isinstance(channels, Sequence):
        raise TypeError(f"channels must be a sequence of ints, got {channels!r}")
    if len(channels) < 2:
        raise ValueError(f"channels must have at least 2 widths (one stage lies between two), got {tuple(channels)}")
    return tuple(check_int(f"channels[{i}]", c) for i, c in enumerate(channels))


def check_size(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name} must be an int or a pair (H, W), got {size!r}")
    return check_int(f"{name}[0]", pair[0]), check_int(f"{name}[1]", pair[1])


class Decoder(nn.Module):
    """Latent vector or feature map to image, by ``len(channels) - 1`` stages that double the size each.

    A stage is: upsample, convolution, norm, activation. The last convolution maps to ``out_channels`` and the head
    bounds the values. The sizes are planned backwards from ``out_size``, halved and rounded up, so that the image has
    exactly that size: 28 with two stages goes 7 -> 14 -> 28, and 30 goes 8 -> 15 -> 30.

    ``upsample="nearest" | "bilinear" | "bicubic"`` is the resize-convolution of Odena et al.
    (distill.pub/2016/deconv-checkerboard), as one op: ``aeup.UpsampleConv2d``. ``"conv_transpose"`` is
    ``aeup.ConvTranspose2d`` with stride 2 and the even kernel ``kernel_size + 1``, so that every output pixel is
    reached by equally many taps. Norm and activation are one op, ``aeup.BatchNorm2d`` or ``aeup.GroupNorm``; without
    a norm the activation is part of the convolution. Activations that the ops do not have are modules of their own.

    Args:
        channels: widths from the start map to the last hidden map, at least two.
        out_channels: channels of the image.
        out_size: height and width of the image, an int or ``(H, W)``. ``None`` (feature maps only): every stage
            doubles whatever comes in.
        latent_dim: length of the latent vector; ``None`` if the input is a feature map with ``channels[0]`` channels.
        upsample: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"conv_transpose"``.
        norm: ``"batch"``, ``"group"`` or ``None``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, ``"elu"``, ``"tanh"``, a module (copied for
            each stage) or a module class.
        head: ``"sigmoid"``, ``"tanh"`` or ``None`` (raw values, such as logits).
        kernel_size: odd kernel of the convolutions.

    Shape:
        - Input: ``[N, latent_dim]``, or ``[N, channels[0], h, w]`` when ``latent_dim`` is ``None``.
        - Output: ``[N, out_channels, H, W]`` in the input's dtype (autocast applies); a channels-last feature map
          gives a channels-last image.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or not allowed.
        RuntimeError: the input's shape does not fit.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int = 1,
        out_size: int | tuple[int, int] | None = 28,
        latent_dim: int | None = None,
        upsample: str = "nearest",
        norm: str | None = "batch",
        activation: str | nn.Module | Callable[[], nn.Module] = "relu",
        head: str | None = None,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        self.channels = check_widths(channels)
        check_int("out_channels", out_channels)
        check_int("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if upsample not in UPSAMPLE:
            raise ValueError(f"upsample must be one of {UPSAMPLE}, got {upsample!r}")
        if head not in HEAD:
            raise ValueError(f"head must be one of {HEAD}, got {head!r}")
        if latent_dim is not None:
            check_int("latent_dim", latent_dim)
        self.upsample, self.latent_dim, self.out_channels = upsample, latent_dim, out_channels
        self.sizes = self._plan(out_size, len(self.channels) - 1)

        if latent_dim is not None:
            if self.sizes is None:
                raise ValueError("out_size must be given with latent_dim: a vector has no size to start from")
            c, (h, w) = self.channels[0], self.sizes[0]
            self.project = nn.Linear(latent_dim, c * h * w)
            self.start = nn.Sequential(*norm_and_activation(norm, c, activation))
        self.stages = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(self.channels, self.channels[1:], strict=False)):
            target = self.sizes[i + 1] if self.sizes is not None else None
            fused, after = after_convolution(norm, c_out, activation)
            enlarge = self._enlarge(c_in, c_out, target, kernel_size, norm is None, fused)
            self.stages.append(nn.Sequential(enlarge, *after))
        self.to_image = Conv2d(self.channels[-1], out_channels, kernel_size, padding=kernel_size // 2, activation=head)

    @staticmethod
    def _plan(out_size: int | tuple[int, int] | None, stages: int) -> list[tuple[int, int]] | None:
        """Sizes from the start map to the image."""
        if out_size is None:
            return None
        sizes = [check_size("out_size", out_size)]
        for _ in range(stages):
            h, w = sizes[0]
            if min(h, w) < 2:
                raise ValueError(
                    f"out_size={out_size} is too small for {stages} doubling stages (len(channels) - 1): "
                    f"a stage would start from {h}x{w}; give fewer channels or at least {2 ** (stages - 1) + 1}"
                )
            sizes.insert(0, ((h + 1) // 2, (w + 1) // 2))
        return sizes

    def _enlarge(
        self, c_in: int, c_out: int, target: tuple[int, int] | None, k: int, bias: bool, activation: Activation
    ) -> nn.Module:
        if self.upsample != "conv_transpose":
            size = {"scale_factor": 2.0} if target is None else {"size": target}
            return UpsampleConv2d(
                c_in, c_out, k, mode=self.upsample, padding=k // 2, bias=bias, activation=activation, **size
            )
        # An odd target 2i - 1 is the map to 2i without its first row: padding one larger, output_padding 1.
        odd = (0, 0) if target is None else (target[0] % 2, target[1] % 2)
        padding = (k // 2 + odd[0], k // 2 + odd[1])
        return ConvTranspose2d(
            c_in, c_out, k + 1, stride=2, padding=padding, output_padding=odd, bias=bias, activation=activation
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.latent_dim is not None:
            if x.dim() != 2 or x.shape[1] != self.latent_dim:
                raise RuntimeError(f"Decoder input must be [N, {self.latent_dim}] (latent_dim), got {list(x.shape)}")
            x = self.start(self.project(x).unflatten(1, (self.channels[0], *self.sizes[0])))
        else:
            if x.dim() != 4 or x.shape[1] != self.channels[0]:
                raise RuntimeError(
                    f"Decoder input must be [N, {self.channels[0]}, h, w] (channels[0]), got {list(x.shape)}"
                )
            if self.upsample == "conv_transpose" and self.sizes is not None and tuple(x.shape[2:]) != self.sizes[0]:
                raise RuntimeError(
                    f"Decoder input must be {self.sizes[0][0]}x{self.sizes[0][1]} to reach out_size "
                    f"{self.sizes[-1]} with upsample='conv_transpose', got {x.shape[2]}x{x.shape[3]}"
                )
        for stage in self.stages:
            x = stage(x)
        return self.to_image(x)

    def extra_repr(self) -> str:
        path = "doubling" if self.sizes is None else " -> ".join(f"{h}x{w}" for h, w in self.sizes)
        return f"upsample={self.upsample!r}, {path}"
