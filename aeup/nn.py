"""torch.nn's upsampling modules on aeup's kernels: subclasses with the same constructors and state_dict keys."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aeup.backends import note_torch
from aeup.functional import (
    Activation,
    conv2d,
    conv_transpose2d,
    counted_batch_norm,
    group_norm,
    interpolate,
    parse_activation,
    upsample_conv2d,
)
from aeup.ops.conv_shapes import int_pair
from aeup.ops.epilogue import activate
from aeup.ops.upsample_conv_cpu import fold_weight
from aeup.ops.upsample_conv_shapes import check_upsampling, fold, upsample_geometry_of

__all__ = [
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "GroupNorm",
    "Upsample",
    "UpsampleConv2d",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
    "icnr_",
    "to_conv_transpose",
]


def refuse_script(module: nn.Module):
    """`__prepare_scriptable__` of aeup's modules: torch.jit.script says why it cannot."""
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script does not know aeup. Call aeup.unswap(model) first, if aeup.swap "
        "put it there, or use torch.jit.trace, which records torch's own operators"
    )


class _NoScript:
    __prepare_scriptable__ = refuse_script


class Upsample(_NoScript, nn.Upsample):
    """:class:`torch.nn.Upsample` by :func:`aeup.interpolate`: the same arguments, results and errors.

    Shapes: [N, C, H, W] -> [N, C, oh, ow]; other ranks go to torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        return interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor
        )


class UpsamplingNearest2d(Upsample, nn.UpsamplingNearest2d):
    """:class:`torch.nn.UpsamplingNearest2d` by :func:`aeup.interpolate`."""


class UpsamplingBilinear2d(Upsample, nn.UpsamplingBilinear2d):
    """:class:`torch.nn.UpsamplingBilinear2d` by :func:`aeup.interpolate`: bilinear with ``align_corners=True``."""


def watched(module: nn.Module) -> str | None:
    """Why a module must be called as it is: something sees its inputs or outputs, or runs in its place; or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks, which would see other values"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the instance"
    return "is compiled by itself" if module._compiled_call_impl is not None else None


class _WithActivation(_NoScript):
    """Before a module of torch: the keyword-only argument `activation`, checked and kept."""

    activation: Activation = None

    def __init__(self, *args, activation: Activation = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if activation is not None:
            parse_activation(activation)
        self.activation = activation

    def __init_subclass__(cls, **kwargs) -> None:
        """Torch's signature and `activation`: torch.nn.utils.skip_init, for one, looks for a `device` there."""
        super().__init_subclass__(**kwargs)
        if _WithActivation not in cls.__bases__:
            return

        def __init__(self, *args, **kwargs) -> None:
            _WithActivation.__init__(self, *args, **kwargs)

        theirs = inspect.signature(cls.__bases__[1].__init__)
        last = inspect.Parameter("activation", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Activation)
        __init__.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), last])
        cls.__init__ = __init__

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class ConvTranspose2d(_WithActivation, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` by :func:`aeup.conv_transpose2d`: the same constructor, ``state_dict``, results
    and errors, and keyword-only `activation`, applied with the bias: "relu", "leaky_relu" (or ("leaky_relu", slope)),
    "silu", "gelu", "tanh", "sigmoid" or None.

    Shapes: [N, in_channels, H, W] -> [N, out_channels, oh, ow], or both without N. ``forward(input, output_size=None)``
    takes the output's size (H, W) where the stride leaves more than one.

    Raises:
        ValueError: an unknown `activation`, a `padding_mode` other than "zeros", an `output_size` out of range.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
            )
        return conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation,
            activation=self.activation,
        )  # fmt: skip


class Conv2d(_WithActivation, nn.Conv2d):
    """:class:`torch.nn.Conv2d` by :func:`aeup.conv2d`: the same constructor, ``state_dict``, results and errors, and
    keyword-only `activation` as :class:`ConvTranspose2d` has it.

    What is not on a GPU, and a `padding_mode` other than "zeros", runs by torch.

    Raises:
        ValueError: an unknown `activation`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(input, self.activation)

    def activated(self, input: Tensor, activation: Activation) -> Tensor:
        """``activation(self(input))``, whatever this module's own is."""
        weight = self.weight  # once: a parametrisation computes it whenever it is read
        reason = self._refuses(input)
        if reason is None:
            return conv2d(
                input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups, activation=activation
            )
        if isinstance(input, Tensor):
            note_torch("aeup.conv2d", lambda: f"{list(input.shape)}, {nn.Conv2d.extra_repr(self)}", reason)
        y = self._conv_forward(input, weight, self.bias)
        return activate(y, *parse_activation(activation)) if activation else y

    def _refuses(self, input: Tensor) -> str | None:
        if isinstance(input, Tensor) and not input.is_cuda:  # else a tracer's proxy, or torch raises
            return f"serves convolutions on a GPU, the tensor is on {input.device}"
        return None if self.padding_mode == "zeros" else f"pads with zeros, padding_mode is {self.padding_mode!r}"


class UpsampleConv2d(nn.Module):
    """``nn.Sequential(nn.Upsample(size, scale_factor, mode, align_corners), nn.Conv2d(...))`` and an activation by
    :func:`aeup.upsample_conv2d`: the upsampled tensor is never written.

    ``conv`` holds the parameters: the keys are "conv.weight" and "conv.bias", and the Sequential's ("1.weight",
    "1.bias") load too. A `padding_mode` other than "zeros", and a ``conv`` that has hooks (pruning, the older
    ``weight_norm`` and ``spectral_norm``) or was replaced, run as :func:`aeup.interpolate` and ``conv``, one after the
    other.

    Shapes: [N, in_channels, H, W] -> [N, out_channels, uh + 2 * padding - kH + 1, uw + 2 * padding - kW + 1], where
    (uh, uw) is `size`, or floor((H, W) * scale_factor).

    Args:
        in_channels, out_channels, kernel_size, padding, groups, bias, padding_mode, device, dtype: as torch.nn.Conv2d;
            `padding` may be "same" or "valid".
        scale_factor, mode, align_corners: as torch.nn.Upsample; a `size` takes the place of the default scale_factor.
        activation: as :func:`aeup.upsample_conv2d`.

    Raises:
        ValueError, TypeError: an argument that torch.nn.Conv2d, torch.nn.functional.interpolate or
            :func:`aeup.upsample_conv2d` refuses.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        scale_factor: float | tuple[float, float] | None = 2,
        mode: str = "nearest",
        align_corners: bool | None = None,
        padding: int | tuple[int, int] | str = 0,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        size: int | tuple[int, int] | None = None,
        activation: Activation = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_upsampling(size, scale_factor, mode, align_corners)
        if activation is not None:
            parse_activation(activation)
        self.size = size
        self.scale_factor = None if size is not None else scale_factor
        self.mode, self.align_corners, self.activation = mode, align_corners, activation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, 1, padding, 1, groups, bias, padding_mode, device, dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        conv = self.conv
        reason = self._refuses()
        if reason is not None:
            return self._one_by_one(input, reason)
        return upsample_conv2d(
            input, conv.weight, conv.bias, scale_factor=self.scale_factor, mode=self.mode,
            align_corners=self.align_corners, padding=conv.padding, groups=conv.groups, activation=self.activation,
            size=self.size,
        )  # fmt: skip

    def _refuses(self) -> str | None:
        conv = self.conv
        if type(conv).forward not in _CONVOLVES or getattr(conv, "activation", None) is not None:
            return f"the convolution is {type(conv).__name__}, which computes something else"
        if conv.padding_mode != "zeros":
            return f"pads the upsampled map with zeros; padding_mode is {conv.padding_mode!r}"
        reason = watched(conv)  # pruning and the older weight_norm and spectral_norm make the weight in a hook
        return reason and f"the convolution {reason}"

    def _one_by_one(self, input: Tensor, reason: str) -> Tensor:
        note_torch("aeup.upsample_conv2d", lambda: f"{list(input.shape)}, {self.extra_repr()}", reason)
        y = self.conv(interpolate(input, self.size, self.scale_factor, self.mode, self.align_corners))
        return activate(y, *parse_activation(self.activation)) if self.activation else y

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ("weight", "bias"):  # of nn.Sequential(nn.Upsample(...), nn.Conv2d(...))
            if f"{prefix}1.{name}" in state_dict and f"{prefix}conv.{name}" not in state_dict:
                state_dict[f"{prefix}conv.{name}"] = state_dict.pop(f"{prefix}1.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"size={self.size}" if self.size is not None else f"scale_factor={self.scale_factor}"
        text += f", mode={self.mode!r}"
        text += f", align_corners={self.align_corners}" if self.align_corners is not None else ""
        return text + (f", activation={self.activation!r}" if self.activation else "")


_CONVOLVES = (nn.Conv2d.forward, Conv2d.forward)


class BatchNorm2d(_WithActivation, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` by :func:`aeup.batch_norm`: the same constructor, ``state_dict``, results and
    errors, and keyword-only `activation`, applied to the result as it is written: "relu", "leaky_relu" (or
    ("leaky_relu", slope)), "silu", "gelu", "tanh", "sigmoid" or None.

    Shapes: [N, C, H, W] -> [N, C, H, W]. What puts another norm in the place of every batch norm
    (``torch.nn.SyncBatchNorm.convert_sync_batchnorm``) knows nothing of the activation: it must be added again.

    Raises:
        ValueError: an unknown `activation`, an input that is not 4-D, one value per channel in training.
    """

    def forward(self, input: Tensor) -> Tensor:
        return normalised(self, input, self.activation)


def normalised(norm: nn.BatchNorm2d, input: Tensor, activation: Activation) -> Tensor:
    """``activation(norm(input))`` of torch's module, or of aeup's without its own activation, as one op."""
    if not isinstance(input, torch.fx.Proxy):
        norm._check_input_dim(input)
    training, tracks = norm.training, norm.training and norm.track_running_stats
    running = (norm.running_mean, norm.running_var) if tracks or not training else (None, None)
    counter = norm.num_batches_tracked if tracks else None
    unknown = running[0] is None and running[1] is None
    momentum = 0.0 if norm.momentum is None and (counter is None or unknown) else norm.momentum
    return counted_batch_norm(
        input, *running, norm.weight, norm.bias, training or unknown, momentum, norm.eps, activation=activation,
        counter=counter,
    )  # fmt: skip


class GroupNorm(_WithActivation, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` by :func:`aeup.group_norm`: the same constructor, ``state_dict``, results and errors,
    and keyword-only `activation` as :class:`BatchNorm2d` has it.

    Shapes: [N, C, H, W] -> [N, C, H, W]; other ranks go to torch.

    Raises:
        ValueError: an unknown `activation`, a `num_groups` that does not divide `num_channels`, one value per channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        return group_normalised(self, input, self.activation)


def group_normalised(norm: nn.GroupNorm, input: Tensor, activation: Activation) -> Tensor:
    """``activation(norm(input))`` of torch's module, or of aeup's without its own activation, as one op."""
    return group_norm(input, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=activation)


def to_conv_transpose(upsample_conv: UpsampleConv2d) -> ConvTranspose2d:
    """The transposed convolution that computes the same, borders included, for nearest by a whole scale and zero
    padding: kernel k + scale - 1, stride scale, padding k - 1 - p. Its weight is a new parameter.

    Raises:
        TypeError: not an UpsampleConv2d.
        ValueError: another mode, a scale_factor that is not a whole number (or a `size`), another padding_mode.
    """
    if not isinstance(upsample_conv, UpsampleConv2d):
        raise TypeError(f"upsample_conv must be an aeup.UpsampleConv2d, got {type(upsample_conv).__name__}")
    m, conv = upsample_conv, upsample_conv.conv
    if not m.mode.startswith("nearest") or m.scale_factor is None or conv.padding_mode != "zeros":
        raise ValueError(
            "only nearest by a scale_factor with zero padding is a transposed convolution, got "
            f"{m.extra_repr()}, padding_mode={conv.padding_mode!r}"
        )
    scale = m.scale_factor if isinstance(m.scale_factor, (tuple, list)) else (m.scale_factor,) * 2
    if any(s != int(s) or s < 1 for s in scale):
        raise ValueError(f"scale_factor must be a whole number, got {m.scale_factor}")
    side = 8  # any input: the weights of whole repetitions do not depend on its size
    g, crop = upsample_geometry_of(
        (1, conv.in_channels, side, side), conv.weight.shape, m.scale_factor, m.mode, conv.padding, conv.groups
    )
    f = fold(g)
    if f is None or any(c and s == 1 for c, s in zip(crop, f.g.stride, strict=True)):
        raise ValueError(f"scale_factor={m.scale_factor} with padding={conv.padding!r} has no transposed convolution")
    # A row left out at the top only: padding one larger, and output_padding for the bottom.
    padding = tuple(p + c for p, c in zip(f.g.padding, crop, strict=True))
    made = ConvTranspose2d(
        conv.in_channels, conv.out_channels, (f.g.kh, f.g.kw), f.g.stride, padding, crop, conv.groups,
        conv.bias is not None, activation=m.activation, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(fold_weight(conv.weight, g, f))
        if conv.bias is not None:
            made.bias.copy_(conv.bias)
    return made.train(m.training)


def icnr_(
    weight: Tensor,
    scale: int | tuple[int, int],
    *,
    transposed: bool = True,
    groups: int = 1,
    init: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Initialises, in place, the weight of a learned upsampling so that it starts without checkerboards (ICNR): as a
    convolution and a nearest resize, which are then free to part. Returns `weight`.

    Args:
        weight: with `transposed`, a transposed convolution's [C_in, C_out / groups, kH, kW] with stride `scale` and
            kernels of at least `scale`: it starts as the nearest upsampling by `scale` followed by a convolution with
            kernel k - scale + 1. Without, a sub-pixel convolution's [C_out * scale^2, C_in / groups, kH, kW] before
            torch.nn.PixelShuffle(scale): it starts as the convolution followed by the nearest upsampling.
        scale: the factor, or a pair for (H, W).
        groups: of the convolution.
        init: fills a convolution's weight in place; default torch.nn.Conv2d's, uniform within 1 / sqrt(fan_in).

    Raises:
        ValueError: a weight whose shape does not fit.

    Source: Aitken et al., 2017, "Checkerboard artifact free sub-pixel convolution", arXiv 1707.02937, section 3.2.
    """
    sh, sw = int_pair(scale) or (0, 0)
    if weight.dim() != 4 or min(sh, sw) < 1 or groups < 1:
        raise ValueError(
            f"weight must be 4-D, scale a whole number (or two) and, as groups, at least 1; got {list(weight.shape)}, "
            f"{scale!r}, {groups}"
        )
    init = init or (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)))
    a, b, kh, kw = weight.shape
    if transposed:
        if kh < sh or kw < sw or a % groups != 0:
            raise ValueError(
                f"weight {list(weight.shape)} of a transposed convolution must have kernels of at least scale={scale} "
                f"and input channels that groups={groups} divides"
            )
        kernel = kh - sh + 1, kw - sw + 1
        g, _ = upsample_geometry_of((1, a, kh, kw), (b * groups, a // groups, *kernel), (sh, sw), "nearest", 0, groups)
        drawn = weight.new_empty(g.weight_shape)
    else:
        if a % (sh * sw * groups) != 0:
            raise ValueError(
                f"weight {list(weight.shape)} must have a multiple of scale^2 * groups = "
                f"{sh * sw * groups} output channels"
            )
        drawn = weight.new_empty((a // (sh * sw), b, kh, kw))
    with torch.no_grad():
        init(drawn)
        weight.copy_(fold_weight(drawn, g, fold(g)) if transposed else drawn.repeat_interleave(sh * sw, 0))
    return weight
