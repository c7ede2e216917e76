"""What may run as one operation, and why not: upsampling and the convolution after it; a convolution, a transposed one,
a batch norm or a group norm and the activation after it. Everything is looked at when it runs, so modules that are
hooked, replaced or sliced later stay right: they then run one by one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from aeup import functional
from aeup import nn as aeup_nn
from aeup.functional import Activation, conv_transpose2d, interpolate
from aeup.nn import watched
from aeup.ops.interpolate import MODES

TRANSPOSED = (nn.ConvTranspose2d, aeup_nn.ConvTranspose2d)
CONVOLUTIONS = (nn.Conv2d, aeup_nn.Conv2d)
GROUP_NORMS = (nn.GroupNorm, aeup_nn.GroupNorm)
NORMS = (nn.BatchNorm2d, aeup_nn.BatchNorm2d, *GROUP_NORMS)
UPSAMPLES = (
    nn.Upsample,
    nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d,
    aeup_nn.Upsample,
    aeup_nn.UpsamplingNearest2d,
    aeup_nn.UpsamplingBilinear2d,
)
_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_PLAIN_WEIGHTS = (nn.Parameter, Tensor, type(None))
ACTIVATION_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.leaky_relu: ("leaky_relu", 0.01),
    F.silu: "silu",
    F.gelu: "gelu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
}
_ONE_ARGUMENT = (torch.relu, torch.tanh, torch.sigmoid, F.tanh, F.sigmoid)
_NORMS = (nn.BatchNorm2d, nn.LazyBatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)  # and subclasses: served, or named
SERVED = (*_ACTIVATIONS, nn.LeakyReLU, nn.GELU)  # perhaps: by their arguments


class Resampling(NamedTuple):
    """The arguments of an interpolate."""

    size: int | Sequence[int] | None = None
    scale_factor: float | Sequence[float] | None = None
    mode: str = "nearest"
    align_corners: bool | None = None
    recompute_scale_factor: bool | None = None
    antialias: bool = False


def _kind(module: nn.Module, kinds: tuple[type, ...]) -> str:
    name = type(module).__name__
    if "_Parametrized" in name or "parametrizations" in module._modules:
        return "is parametrised"
    if "quantized" in type(module).__module__ or ".ao." in type(module).__module__:
        return "is quantised"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "is lazy: run the model once, then swap"
    return "is a subclass: exact types only" if isinstance(module, kinds) else f"is no {kinds[0].__name__}"


def has_plain_weight(module: nn.Module) -> bool:
    """Whether its weight, if any, is a tensor or stands for one while torch traces: no DTensor, nothing quantised."""
    kind = type(module.weight)
    return kind in _PLAIN_WEIGHTS or kind.__module__.startswith("torch._subclasses.")


def refuses_type(module: nn.Module, kinds: tuple[type, ...]) -> str:
    """Why a module is not served that has none of these types."""
    return f"{type(module).__name__} {_kind(module, kinds)}"


def refuses_upsampling(up: Resampling) -> str | None:
    if up.mode not in MODES:
        return f"mode {up.mode!r} is not one of {', '.join(MODES)}"
    if up.antialias:
        return "antialias is not fused"
    return "recompute_scale_factor is not fused" if up.recompute_scale_factor else None


def serves_alone(module: nn.Module, bias: bool = True) -> bool:
    """Whether a convolution without an upsampling gains by aeup: its bias, or an activation, is added in the kernel.
    `bias` False: whether it would, with a bias."""
    return (
        type(module) in CONVOLUTIONS
        and _refuses_alone(module) is None
        and (module.bias is not None or not bias)
        and module.groups == 1
        and min(module.in_channels, module.out_channels) >= 16
        and min(module.kernel_size) > 1
    )


def refuses_convolution(conv: nn.Module) -> str | None:
    """Why the convolution cannot take its input at the lower resolution, or None."""
    if reason := _refuses_alone(conv):
        return reason
    return None if conv.stride == (1, 1) else f"the convolution has stride {conv.stride}"


def _refuses_alone(conv: nn.Module) -> str | None:
    what = "the convolution"
    if reason := _refuses(conv, CONVOLUTIONS, what):
        return reason
    if conv.dilation != (1, 1):
        return f"{what} has dilation {conv.dilation}"
    return None if conv.padding_mode == "zeros" else f"{what} has padding_mode {conv.padding_mode!r}"


def refuses_transposed(conv: nn.Module) -> str | None:
    """Why a transposed convolution cannot be one operation with the activation after it, or None."""
    return _refuses(conv, TRANSPOSED, "the convolution")


def refuses_norm(norm: nn.Module) -> str | None:
    """Why a norm cannot be one operation with the activation after it, or None."""
    if type(norm) is nn.SyncBatchNorm:
        return "SyncBatchNorm normalises with the statistics of all processes"
    return _refuses(norm, NORMS, "the norm")


def _refuses(module: nn.Module, kinds: tuple[type, ...], what: str) -> str | None:
    if type(module) not in kinds:
        return refuses_type(module, kinds)
    if module.__dict__.get("activation") is not None:
        return f"{what} has an activation already"
    if not has_plain_weight(module):
        return f"{what}'s weight is a {type(module.weight).__name__}"
    reason = watched(module)
    return reason and f"{what} {reason}"


def upsampling_of(module: nn.Module) -> Resampling:
    return Resampling(
        module.size, module.scale_factor, module.mode, module.align_corners, module.recompute_scale_factor
    )


def activation_of(module: nn.Module, after: nn.Module | None = None) -> Activation:
    """The activation as aeup names it, or None. `after`: what takes its result, if known."""
    kind = type(module)
    name = _ACTIVATIONS.get(kind)
    if name is None:
        if kind is nn.LeakyReLU and 0 <= module.negative_slope < float("inf") and not _overwritten(module, after):
            name = ("leaky_relu", module.negative_slope)
        elif kind is nn.GELU and module.approximate == "none":
            name = "gelu"
    return name if name is None or watched(module) is None else None


def _overwritten(module: nn.LeakyReLU, after: nn.Module | None) -> bool:
    """Whether what comes after works in place. torch's gradient of an activation out of place needs its input, the
    fused one its result; of the other activations also torch's needs the result."""
    return not module.inplace and after is not None and bool(first_of(after).__dict__.get("inplace"))


def refuses_activation(module: nn.Module, after: nn.Module | None = None) -> str | None:
    """Why :func:`activation_of` has none for it, or None."""
    if activation_of(module, after) is not None:
        return None
    if reason := watched(module):
        return f"the activation {reason}"
    if activation_of(module) is not None:
        return f"what comes after {module} works in place"
    return f"{module} is not one of aeup's activations"


def is_sequence(module: nn.Module) -> bool:
    """An nn.Sequential, or a subclass that runs as one."""
    cls = type(module)
    return (
        isinstance(module, nn.Sequential)
        and cls.forward in (nn.Sequential.forward, forward_of_sequence)
        and cls.__iter__ is nn.Sequential.__iter__  # its forward takes what that gives
    )


def first_of(module: nn.Module) -> nn.Module:
    """What takes the module's input: the first in a sequence, at any depth."""
    while is_sequence(module) and len(module) and watched(module) is None:
        module = next(iter(module._modules.values()))
    return module


def _upsample_conv(input: Tensor, up: Resampling, conv: nn.Conv2d, activation: Activation) -> Tensor:
    return functional.upsample_conv2d(
        input, conv.weight, conv.bias, scale_factor=up.scale_factor, size=up.size, mode=up.mode,
        align_corners=up.align_corners, padding=conv.padding, groups=conv.groups, activation=activation,
    )  # fmt: skip


def _conv_transpose(module: nn.ConvTranspose2d, input: Tensor, activation: Activation) -> Tensor:
    return conv_transpose2d(
        input, module.weight, module.bias, module.stride, module.padding, module.output_padding, module.groups,
        module.dilation, activation=activation,
    )  # fmt: skip


# What runs as one operation with the activation after it: (module, input, activation).
_WITH_ACTIVATION = {
    **dict.fromkeys(TRANSPOSED, _conv_transpose),
    aeup_nn.Conv2d: aeup_nn.Conv2d.activated,
    **dict.fromkeys(NORMS, aeup_nn.normalised),
    **dict.fromkeys(GROUP_NORMS, aeup_nn.group_normalised),
}
_STARTS = frozenset((*_WITH_ACTIVATION, *UPSAMPLES))  # of a pair


def run_sequence(modules: list[nn.Module], input, up: Resampling | None = None):
    """`modules` after one another, the first on `input` resampled by `up`, pairs fused. Where `up` is given, the first
    module (or the first in it) is one that :func:`refuses_convolution` has nothing against."""
    i, n = 0, len(modules)
    while i < n:
        module = modules[i]
        kind = type(module)
        if up is None and kind not in _STARTS:
            input, i = module(input), i + 1
            continue
        if up is None and kind in UPSAMPLES and i + 1 < n and watched(module) is None:
            found = upsampling_of(module)
            if _fuses(found, modules[i + 1], input):
                up, i, module = found, i + 1, modules[i + 1]
                kind = type(module)
        if up is not None and kind not in CONVOLUTIONS:
            input, up, i = run_sequence(list(module._modules.values()), input, up), None, i + 1
            continue
        fusable = i + 1 < n and (up is not None or (kind in _WITH_ACTIVATION and _takes_activation(module, input)))
        activation = activation_of(*modules[i + 1 : i + 3]) if fusable else None
        if up is not None:
            input, up = _upsample_conv(input, up, module, activation), None
        elif activation is not None:
            input = _WITH_ACTIVATION[kind](module, input, activation)
        else:
            input = module(input)
        i += 1 if activation is None else 2
    return input


def _takes_activation(module: nn.Module, input) -> bool:
    return (
        isinstance(input, Tensor)
        and watched(module) is None
        and module.__dict__.get("activation") is None
        and has_plain_weight(module)
    )


def _fuses(up: Resampling, module: nn.Module, input) -> bool:
    return (
        refuses_upsampling(up) is None
        and isinstance(input, Tensor)
        and input.dim() == 4
        and not _has_any_global_hook()
        and refuses_convolution(first_of(module)) is None
    )


def forward_of_sequence(self, input):
    if _has_any_global_hook():  # they want to see every module
        return nn.Sequential.forward(self, input)
    return run_sequence(list(self._modules.values()), input)


def pair(module, input: Tensor, *args, **kwargs):
    """``module(interpolate(input, ...))``, as one operation where `module` is a convolution that allows it, or a
    sequence that starts with one."""
    if isinstance(module, nn.Module):
        up = Resampling(*args, **kwargs)
        if _fuses(up, module, input):
            if type(module) in CONVOLUTIONS:
                return _upsample_conv(input, up, module, None)
            return run_sequence([module], input, up)
    return module(interpolate(input, *args, **kwargs))


def activated(norm, activation, input, *args, **kwargs):
    """``activation(norm(input), ...)``, as one operation where `norm` is a group norm that allows it."""
    if type(norm) in GROUP_NORMS and isinstance(input, Tensor) and not _has_any_global_hook():
        module = isinstance(activation, nn.Module)
        name = activation_of(activation) if module else activation_of_call(activation, args, kwargs)
        if name is not None and refuses_norm(norm) is None:
            return aeup_nn.group_normalised(norm, input, name)
    return activation(norm(input), *args, **kwargs)


def activation_of_call(function, args: tuple = (), kwargs: dict | None = None) -> Activation:
    """The activation that ``function(input, *args, **kwargs)`` is, as aeup names it, or None. Called in place is the
    same: nothing else sees the input."""
    name, kwargs = ACTIVATION_FUNCTIONS.get(function), dict(kwargs or {})
    if name is None or not (args or kwargs):
        return name
    if name == "gelu" or function in _ONE_ARGUMENT or not isinstance(kwargs.pop("inplace", False), bool):
        return None
    if function is F.leaky_relu:
        slope = args[0] if len(args) == 1 else kwargs.pop("negative_slope", 0.01) if not args else None
        known = type(slope) in (int, float) and 0 <= slope < float("inf") and not kwargs
        return ("leaky_relu", slope) if known else None
    return None if args or kwargs else name


def refuses_activated(norm: nn.Module, activation) -> str | None:
    """Why :func:`activated` would not fuse, or None."""
    return refuses_norm(norm) or (refuses_activation(activation) if isinstance(activation, nn.Module) else None)


class NormNames(NamedTuple):
    """The attributes of a module that are group norms, and those that may be an activation after one."""

    norms: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()


NO_NORMS = NormNames()


def refuses_pair(module) -> str | None:
    """Why :func:`pair` would not fuse with `module`, or None."""
    return refuses_convolution(first_of(module))


def pairs_in(sequence: nn.Sequential) -> list[tuple[int, int, str | None]]:
    """The pairs in a sequence: (index, number of modules, why it is not fused or None)."""
    modules, found, i = list(sequence._modules.values()), [], 0
    while i + 1 < len(modules):
        module, after, size = modules[i], modules[i + 1], 2
        activation = modules[i + 1 : i + 3]  # and what comes after it
        if isinstance(module, nn.Upsample):
            conv = first_of(after)
            if isinstance(conv, nn.modules.conv._ConvNd) or "Conv" in type(conv).__name__:
                up = upsampling_of(module)
                reason = None if type(module) in UPSAMPLES else refuses_type(module, UPSAMPLES)
                reason = reason or refuses_upsampling(up) or refuses_convolution(conv)
                if reason is None and watched(module):
                    reason = f"the upsampling {watched(module)}"
                if reason is None and conv is after and i + 2 < len(modules) and activation_of(*modules[i + 2 : i + 4]):
                    size = 3
                found.append((i, size, reason))
                i += conv is after  # it belongs to this pair
        elif type(module) in CONVOLUTIONS and activation_of(*activation) is not None:
            if serves_alone(module):
                found.append((i, 2, None))
            elif module.bias is None and serves_alone(module, bias=False):
                found.append((i, 2, "without a bias it was not measured to be faster than torch"))
        elif isinstance(module, nn.ConvTranspose2d) and type(after).__module__ == "torch.nn.modules.activation":
            found.append((i, 2, refuses_transposed(module) or refuses_activation(*activation)))
        elif isinstance(module, _NORMS) and type(after) in SERVED:
            found.append((i, 2, refuses_norm(module) or refuses_activation(*activation)))
        i += 1
    return found
