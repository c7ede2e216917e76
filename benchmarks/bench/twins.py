"""The torch twin of a model: the same parameters and state_dict keys, with torch's own modules in the place of
aeup's. `aeup.swap` goes the other way."""

from __future__ import annotations

import copy

from torch import Tensor, nn

import aeup
from aeup.functional import parse_activation

_PLAIN = {
    aeup.Upsample: nn.Upsample,
    aeup.UpsamplingNearest2d: nn.UpsamplingNearest2d,
    aeup.UpsamplingBilinear2d: nn.UpsamplingBilinear2d,
    aeup.Conv2d: nn.Conv2d,
    aeup.ConvTranspose2d: nn.ConvTranspose2d,
    aeup.BatchNorm2d: nn.BatchNorm2d,
    aeup.GroupNorm: nn.GroupNorm,
}
_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU}
_ACTIVATIONS |= {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def twin(model: nn.Module) -> nn.Module:
    """A copy of `model` [any input -> any output] without aeup's ops: nn.Upsample, nn.Conv2d, nn.ConvTranspose2d,
    nn.BatchNorm2d, nn.GroupNorm and activation modules in the place of `aeup.Upsample`, `UpsampleConv2d`, `Conv2d`,
    `ConvTranspose2d`, `BatchNorm2d` and `GroupNorm`. Parameters are copied, their names stay.

    Raises:
        TypeError: a module of aeup.nn that has no entry here.
    """
    return _converted(copy.deepcopy(model))


def _converted(module: nn.Module) -> nn.Module:
    if isinstance(module, aeup.UpsampleConv2d):
        return _UpsampleConv2d(module)
    if type(module) in _PLAIN:
        activation = getattr(module, "activation", None)
        module.__class__ = _PLAIN[type(module)]
        return module if activation is None else _with_activation(module, activation)
    if type(module).__module__ == "aeup.nn":
        raise TypeError(f"twin: no torch form is known of aeup.{type(module).__name__}")
    for name, child in module.named_children():
        setattr(module, name, _converted(child))
    return module


def _activation_module(activation) -> nn.Module:
    """In place where torch has it, as people write it after a convolution or a norm."""
    name, slope = parse_activation(activation)
    kw = {"relu": {"inplace": True}, "leaky_relu": {"negative_slope": slope, "inplace": True}}.get(name, {})
    return _ACTIVATIONS[name](**kw)


class _UpsampleConv2d(nn.Module):
    """nn.Upsample, nn.Conv2d, activation: the convolution is a child of the name `conv`, as in aeup's module."""

    def __init__(self, fused: aeup.UpsampleConv2d) -> None:
        super().__init__()
        self.upsample = nn.Upsample(fused.size, fused.scale_factor, fused.mode, fused.align_corners)
        self.conv = fused.conv
        self.activation = nn.Identity() if fused.activation is None else _activation_module(fused.activation)
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(self.upsample(x)))


class _Conv2d(nn.Conv2d):
    """nn.Conv2d, then `after`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))


class _ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d, then `after`."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.after(super().forward(x, output_size))


class _BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, then `after`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))


class _GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, then `after`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))


_THEN = {nn.Conv2d: _Conv2d, nn.ConvTranspose2d: _ConvTranspose2d}
_THEN |= {nn.BatchNorm2d: _BatchNorm2d, nn.GroupNorm: _GroupNorm}


def _with_activation(layer: nn.Module, activation) -> nn.Module:
    layer.__class__ = _THEN[type(layer)]
    layer.after = _activation_module(activation).train(layer.training)
    return layer
