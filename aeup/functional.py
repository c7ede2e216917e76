"""Functions with the signatures of torch.nn.functional, on aeup's kernels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from aeup.backends import note_torch
from aeup.ops import batch_norm as norms
from aeup.ops import group_norm as group_norms
from aeup.ops.conv2d import CONV2D
from aeup.ops.conv_shapes import convolution_of_call, transposed_of_call
from aeup.ops.conv_transpose2d import CONV_TRANSPOSE2D
from aeup.ops.eager import plain, scripted, transforms_active
from aeup.ops.epilogue import ACTIVATIONS, activate
from aeup.ops.interpolate import MODES, PLANS, Map, map_of, reference, resample
from aeup.ops.interpolate import Plan as ResamplePlan
from aeup.ops.interpolate import plan_key as resample_key
from aeup.ops.maps import autocast_to, memory_format, plan_key
from aeup.ops.upsample_conv2d import UPSAMPLE_CONV2D
from aeup.ops.upsample_conv_shapes import geometry_of_call, upsample_geometry

__all__ = ["batch_norm", "conv2d", "conv_transpose2d", "group_norm", "interpolate", "upsample_conv2d"]

Activation = str | tuple[str, float] | None


def interpolate(
    input: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Resamples `input` to `size`, or by `scale_factor`: :func:`torch.nn.functional.interpolate` on aeup's kernels.

    Signature, defaults, output shape, strides and errors are torch's. 4-D input [N, C, H, W] in the modes "nearest",
    "nearest-exact", "bilinear" and "bicubic" (the last two also with `antialias`) is served by aeup in float32,
    float64, float16, bfloat16 and (forward) uint8, NCHW or channels-last, and keeps its dtype and memory format, under
    autocast too. The gradient is a gather: deterministic, and differentiable again. Other ranks and modes go to torch;
    :func:`aeup.explain` says so.

    Args:
        input: [N, C, H, W]; N may be 0.
        size: output (oh, ow), or one int for both.
        scale_factor: multiplier(s) of the spatial size; output sizes are ``floor(input size * scale_factor)``.
        align_corners: "bilinear" and "bicubic" only: True maps corner pixel centres onto each other.
        recompute_scale_factor: True computes source positions from the sizes alone, as if `size` had been given.
        antialias: "bilinear" and "bicubic" only: widens the filter when shrinking.

    Returns:
        [N, C, oh, ow].

    Raises:
        ValueError: both or neither of `size` and `scale_factor`; a wrong number of values; `align_corners` or
            `antialias` with a mode that has none; `recompute_scale_factor` with `size`.
        TypeError: a `size` that is not made of ints.
        RuntimeError: an empty dimension other than the batch, an output without pixels, a scale factor that is not
            finite and positive.

    Source: bicubic: Keys, 1981, "Cubic convolution interpolation for digital image processing", a = -0.75 (-0.5 with
    antialias), as torch.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            interpolate, (input,), input, size=size, scale_factor=scale_factor, mode=mode, align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor, antialias=antialias,
        )  # fmt: skip
    options = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    key = resample_key(input, options)
    plan = None if key is None else PLANS.get(key)
    if plan is not None:
        return plan.run(input)
    if mode not in MODES or input.dim() != 4 or scripted():
        reason = f"serves 4-D input in modes {', '.join(MODES)}"
        note_torch("aeup.interpolate", lambda: f"{list(input.shape)}, {mode}", reason)
        return F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    shape = input.shape
    if shape[1] == 0:
        raise RuntimeError(f"Non-empty 4D data tensor expected but got a tensor with sizes {list(shape)}")
    m = map_of((shape[2], shape[3]), *options)
    if key is None or not plain(options):
        return resample(input, m)
    return PLANS.keep(key, ResamplePlan(key[0], input, m)).run(input)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    *,
    activation: Activation = None,
) -> Tensor:
    """Transposed convolution: :func:`torch.nn.functional.conv_transpose2d` on aeup's kernels, then an activation.

    Signature, defaults, output shape, strides and errors are torch's, autocast too (it runs in autocast's dtype).
    float64, float32, float16 and bfloat16, NCHW and channels-last. float32 is multiplied in tf32 on a GPU where
    ``torch.backends.cudnn.conv.fp32_precision`` (or the older ``allow_tf32``) lets torch do so. Gradients of any order;
    same bits on every run of aeup's own kernels. Other dtypes go to torch; :func:`aeup.explain` says so.

    Args:
        input: [N, C_in, H, W] (N may be 0) or [C_in, H, W].
        weight: [C_in, C_out / groups, kH, kW].
        bias: [C_out].
        stride, padding, dilation: an int, or a pair for (H, W).
        output_padding: rows and columns more at the bottom and right; less than stride or dilation.
        groups: divides C_in; each group of input channels makes its own C_out / groups outputs.
        activation: "relu", "leaky_relu" (slope 0.01; ("leaky_relu", 0.2) for another), "silu", "gelu" (exact), "tanh",
            "sigmoid" or None: applied with the bias, as the result is written.

    Returns:
        [N, C_out, oh, ow], or without N; oh = (H - 1) * stride - 2 * padding + dilation * (kH - 1) + output_padding + 1

    Raises:
        RuntimeError: shapes, dtypes or devices that do not go together, or arguments out of range.
        TypeError: an argument that is not made of ints.
        ValueError: an unknown `activation`, or a negative slope.

    Source: Dumoulin & Visin, 2016, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv_transpose2d, (input, weight, bias), input, weight, bias, stride, padding, output_padding, groups,
            dilation, activation=activation,
        )  # fmt: skip
    x, w, b = input, weight, bias
    if torch._C._is_any_autocast_enabled():
        x, w, b = _autocast(x, w, b)
    options = (stride, padding, output_padding, dilation, groups)
    key = plan_key(x, w, b, (*options, activation))
    plan = None if key is None else CONV_TRANSPOSE2D.plans.get(key)
    if plan is not None:
        return plan.run(x, w, b)
    key = key if key is None or plain(options) else None
    name, slope = parse_activation(activation)
    if not (isinstance(x, Tensor) and isinstance(w, Tensor) and (b is None or isinstance(b, Tensor))):
        return F.conv_transpose2d(input, weight, bias)  # raises
    g = transposed_of_call(x.shape, w.shape, *options) if _go_together(x, w, b) and not scripted() else None
    if g is None or (b is not None and b.shape[0] != g.co):
        if input.dim() in (3, 4) and weight.dim() != 4:
            raise RuntimeError(
                "Expected 4D weight [in_channels, out_channels / groups, kH, kW] for conv_transpose2d, but got weight "
                f"of size: {list(weight.shape)}"
            )
        named = dict(zip(("stride", "padding", "output_padding", "dilation", "groups"), options, strict=True))
        return _conv_by_torch(F.conv_transpose2d, input, weight, bias, named, name, slope)
    if x.dim() == 3:
        y = conv_transpose2d(
            x.unsqueeze(0), w, b, stride, padding, output_padding, groups, dilation, activation=activation
        )
        return y.squeeze(0)
    return CONV_TRANSPOSE2D(key, x, w, b, g, name, slope)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _autocast(x, w, b) -> tuple:
    """The tensors as autocast wants them."""
    device = x.device.type if isinstance(x, Tensor) else ""
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return autocast_to(device, x, w, b)
    return x, w, b


def parse_activation(activation: Activation) -> tuple[str | None, float]:
    """An activation's name and slope. Raises ValueError."""
    if activation is None:
        return None, 0.01
    name, slope = (activation, 0.01) if isinstance(activation, str) else (None, None)
    if isinstance(activation, tuple) and len(activation) == 2 and activation[0] == "leaky_relu":
        name, slope = activation
    if name not in ACTIVATIONS or isinstance(slope, bool) or not isinstance(slope, (int, float)):
        raise ValueError(
            f'activation must be None, {", ".join(map(repr, ACTIVATIONS))} or ("leaky_relu", slope); got {activation!r}'
        )
    if not 0 <= slope < math.inf:
        raise ValueError(f"the slope of leaky_relu must be finite and at least 0, got {slope}")
    return name, float(slope)


def _go_together(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    return (
        x.dtype in _FLOATS
        and w.dtype is x.dtype
        and w.device == x.device
        and x.layout is w.layout is torch.strided
        and (b is None or (b.dtype is x.dtype and b.device == x.device and b.dim() == 1))
    )


def _conv_by_torch(function, input, weight, bias, options: dict, activation: str | None, slope: float) -> Tensor:
    """What is not served: torch raises its error, or computes (integers, complex numbers, no output pixels)."""
    y = function(input, weight, bias, **options)
    reason = "serves dense float64, float32, float16 or bfloat16 tensors of one dtype and device, with output pixels"
    note_torch(f"aeup.{function.__name__}", lambda: f"{list(input.shape)}, {input.dtype}", reason)
    return activate(y, activation, slope)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: Activation = None,
) -> Tensor:
    """Convolution: :func:`torch.nn.functional.conv2d` on aeup's kernels, then an activation.

    Signature, defaults, output shape, strides and errors are torch's, autocast too. On a GPU it is the adjoint of
    :func:`conv_transpose2d`, by the same kernels, gradients as well; with stride and dilation 1 an
    :func:`upsample_conv2d` by 1. On a CPU torch's own kernel runs, except where another
    composition of its operators was measured to be faster. Dtypes, layouts, tf32 and gradients of any order as
    :func:`conv_transpose2d`.

    Args:
        input: [N, C_in, H, W] (N may be 0) or [C_in, H, W].
        weight: [C_out, C_in / groups, kH, kW].
        bias: [C_out].
        stride, dilation: an int, or a pair for (H, W).
        padding: zeros around the input: an int, a pair for (H, W), "valid" (none) or, with stride 1, "same" (output of
            the input's size).
        groups: divides C_in and C_out.
        activation: as :func:`conv_transpose2d`: applied with the bias, as the result is written.

    Returns:
        [N, C_out, oh, ow], or without N; oh = floor((H + 2 * padding - dilation * (kH - 1) - 1) / stride) + 1.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not go together, or arguments out of range.
        TypeError: an argument that is not made of ints.
        ValueError: an unknown `activation`, or a negative slope.

    Source: Dumoulin & Visin, 2016, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups, activation=activation
        )
    x, w, b = input, weight, bias
    if torch._C._is_any_autocast_enabled():
        x, w, b = _autocast(x, w, b)
    options = (stride, padding, dilation, groups)
    key = plan_key(x, w, b, ("conv2d", *options, activation))
    plan = None if key is None else CONV2D.plans.get(key) or UPSAMPLE_CONV2D.plans.get(key)
    if plan is not None:
        return plan.run(x, w, b)
    key = key if key is None or plain(options) else None
    name, slope = parse_activation(activation)
    if not (isinstance(x, Tensor) and isinstance(w, Tensor) and (b is None or isinstance(b, Tensor))):
        return F.conv2d(input, weight, bias)  # raises
    served = _go_together(x, w, b) and not scripted()
    g, crop = convolution_of_call(x.shape, w.shape, *options) if served else (None, None)
    if g is None or (b is not None and b.shape[0] != g.ci):
        named = dict(zip(("stride", "padding", "dilation", "groups"), options, strict=True))
        return _conv_by_torch(F.conv2d, input, weight, bias, named, name, slope)
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), w, b, *options, activation=activation).squeeze(0)
    if crop != (0, 0):
        return _cropped(conv2d(x, w, b, stride, g.padding, dilation, groups, activation=activation), crop, x, w)
    if not (x.is_cuda and g.stride == g.dilation == (1, 1)):
        return CONV2D(key, x, w, b, g, name, slope)
    same = Map(g.oh, g.ow, g.oh, g.ow, "nearest", False, False, None, None)
    alone = upsample_geometry("aeup.conv2d", same, g.co, w.shape, *g.padding, g.groups)
    return UPSAMPLE_CONV2D(key, x, w, b, alone, name, slope)


def _cropped(y: Tensor, crop: tuple, x: Tensor, w: Tensor) -> Tensor:
    y = y[:, :, crop[0] :, crop[1] :]
    return y if transforms_active() else y.contiguous(memory_format=memory_format(x, w))


def upsample_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale_factor: float | tuple[float, float] | None = 2,
    mode: str = "nearest",
    align_corners: bool | None = None,
    padding: int | tuple[int, int] | str = 0,
    groups: int = 1,
    activation: Activation = None,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Upsampling, the convolution after it and an activation, as one op that never writes the upsampled tensor:
    ``activation(F.conv2d(F.interpolate(input, size, scale_factor, mode, align_corners), weight, bias, 1, padding, 1,
    groups))``.

    Nearest by whole scales is one transposed convolution with the folded weight, exact at the borders: for scale 2 and
    a 3x3 kernel 16 products per input pixel in place of 36. Other modes and scales resample a tile at a time.
    float64, float32, float16 and bfloat16, NCHW and channels-last; dtype and memory format are kept. Under autocast it
    runs in autocast's dtype, as torch's convolution (torch's interpolate alone may go to float32). Gradients of any
    order. Other dtypes go to torch; :func:`aeup.explain` says so.

    Args:
        input: [N, C_in, H, W]; N may be 0.
        weight: [C_out, C_in / groups, kH, kW], as torch.nn.Conv2d's.
        bias: [C_out].
        scale_factor, size, mode, align_corners: as :func:`aeup.interpolate`; a `size` (oh, ow) of the upsampled map
            takes the place of the default scale_factor.
        padding: zeros around the upsampled map: an int, a pair for (H, W), "valid" (none) or "same" (output of the
            upsampled map's size).
        activation: "relu", "leaky_relu" (slope 0.01; ("leaky_relu", 0.2) for another), "silu", "gelu" (exact), "tanh",
            "sigmoid" or None.

    Returns:
        [N, C_out, uh + 2 * padding - kH + 1, uw + 2 * padding - kW + 1], (uh, uw) the size of the upsampled map.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not go together, or arguments out of range.
        TypeError: an argument of a wrong type.
        ValueError: an unknown `mode`, `padding` or `activation`; both or neither of `size` and `scale_factor`.

    Source: resize-convolution: Odena et al., 2016, "Deconvolution and checkerboard artifacts", Distill.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            upsample_conv2d, (input, weight, bias), input, weight, bias, scale_factor=scale_factor, mode=mode,
            align_corners=align_corners, padding=padding, groups=groups, activation=activation, size=size,
        )  # fmt: skip
    x, w, b = input, weight, bias
    if torch._C._is_any_autocast_enabled():
        x, w, b = _autocast(x, w, b)
    options = (size, scale_factor, mode, align_corners, padding, groups)
    key = plan_key(x, w, b, (*options, activation))
    plan = None if key is None else UPSAMPLE_CONV2D.plans.get(key)
    if plan is not None:
        return plan.run(x, w, b)
    key = key if key is None or plain(options) else None
    name, slope = parse_activation(activation)
    for what, t in (("input", x), ("weight", w), ("bias", b)):
        if not isinstance(t, Tensor) and (t is not None or what != "bias"):
            raise TypeError(f"aeup.upsample_conv2d: {what} must be a Tensor, got {type(t).__name__}")
    if scripted():
        return activate(F.conv2d(F.interpolate(x, *options[:4]), w, b, 1, padding, 1, groups), name, slope)
    g, crop = geometry_of_call(x.shape, w.shape, *options)
    if b is not None and b.shape != (g.co,):
        raise RuntimeError(f"aeup.upsample_conv2d: expected bias to be [{g.co}], got {list(b.shape)}")
    for what, t in (("weight", w), ("bias", b)):
        if t is not None and (t.dtype is not x.dtype or t.device != x.device):
            raise RuntimeError(
                f"aeup.upsample_conv2d: input and {what} should be of one dtype and device, got {x.dtype} on "
                f"{x.device} and {t.dtype} on {t.device}"
            )
    pads = g.ph, g.pw  # torch.compile of torch 2.10 knows no property of a named tuple
    if crop != (0, 0):
        y = upsample_conv2d(
            x, w, b, scale_factor=scale_factor, mode=mode, align_corners=align_corners, padding=pads,
            groups=groups, activation=activation, size=size,
        )  # fmt: skip
        return _cropped(y, crop, x, w)
    if x.dtype not in _FLOATS or not x.layout is w.layout is torch.strided:
        reason = "serves dense float64, float32, float16 or bfloat16 tensors"
        note_torch("aeup.upsample_conv2d", lambda: f"{list(x.shape)}, {x.dtype}", reason)
        return activate(F.conv2d(reference(x, g.m, False), w, b, 1, pads, 1, groups), name, slope)
    return UPSAMPLE_CONV2D(key, x, w, b, g, name, slope)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
) -> Tensor:
    """Batch normalisation: :func:`torch.nn.functional.batch_norm`, then an activation, as one op. In training it reads
    the input twice and writes once, and its gradient reads twice and writes once; outside training once each.

    Signature, defaults, strides and errors are torch's; the dtype and the memory format of `input` are kept, under
    autocast too. aeup serves float64, float32, float16 and bfloat16, NCHW and channels-last, with all [C] tensors in
    float32 (float64 beside float64) or in the dtype of `input`; arithmetic is in float32 (float64), with the same bits
    on every run. Gradients of any order. Everything else goes to torch, and what :func:`torch.compile` makes for a CPU;
    :func:`aeup.explain` says so.

    Args:
        input: [N, C, H, W].
        running_mean, running_var: [C]; outside training what is normalised with; in training None, or updated in place:
            ``running += momentum * (batch - running)``, with the unbiased variance of the batch.
        weight, bias: [C], or None for ones and zeros.
        training: normalise with the batch's mean and (biased) variance.
        eps: added to the variance.
        activation: as :func:`conv_transpose2d`.

    Returns:
        [N, C, H, W].

    Raises:
        ValueError: one value per channel in training, an `eps` out of range, an unknown `activation`.
        RuntimeError: shapes, dtypes or devices that do not go together; no running statistics outside training.

    Source: Ioffe & Szegedy, 2015, "Batch Normalization", arXiv 1502.03167; sums of squares about block means: Chan,
    Golub & LeVeque, 1983, "Algorithms for computing the sample variance".
    """
    return counted_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, activation=activation
    )


def counted_batch_norm(
    input, running_mean, running_var, weight, bias, training, momentum, eps, *, activation: Activation, counter=None
) -> Tensor:
    """:func:`batch_norm` that in training also adds 1 to `counter`, one int64, if given: then `momentum` may be None,
    for the mean over all batches."""
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        options = {"training": training, "momentum": momentum, "eps": eps, "activation": activation}
        if counter is None:
            return handle_torch_function(batch_norm, tensors, *tensors, **options)
        return handle_torch_function(counted_batch_norm, tensors, *tensors, **options, counter=counter)
    name, slope = parse_activation(activation)
    if not isinstance(input, Tensor):
        return F.batch_norm(*tensors, training, momentum, eps)  # raises
    average = momentum is None and counter is not None and running_mean is not None and running_var is not None
    statistics, momentum = (running_mean, running_var), 1.0 if average else momentum
    if average:  # over all batches: of this one alone first
        statistics = tuple(map(torch.zeros_like, statistics))
    norm = norms.Norm(training, momentum, eps, name, slope)
    y = norms.batch_norm(input, weight, bias, *statistics, counter, norm)
    if average:
        running = running_mean, running_var
        # As unseen by autograd as torch's own update: the norm may be in the graph more than once.
        with torch.autograd._unsafe_preserve_version_counter(running):
            for mean, of_batch in zip(running, statistics, strict=True):
                mean.lerp_(of_batch, counter.to(mean.device, mean.dtype).reciprocal())
    return y


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
) -> Tensor:
    """Group normalisation: :func:`torch.nn.functional.group_norm`, then an activation, as one op. It reads the input
    twice and writes once, and its gradient reads twice and writes once.

    Signature, defaults and errors are torch's; the dtype and the memory format of `input` are kept, under autocast too
    (there torch computes in float32 on a GPU and returns that). aeup serves 4-D input in float64, float32, float16 and
    bfloat16, NCHW and channels-last, with `weight` and `bias` in float32 (float64 beside float64) or in the dtype of
    `input`; arithmetic is in float32 (float64), with the same bits on every run. Gradients of any order. Everything
    else goes to torch, and what :func:`torch.compile` makes for a CPU; :func:`aeup.explain` says so.

    Args:
        input: [N, C, H, W].
        num_groups: of adjacent channels; it must divide C.
        weight, bias: [C], or None for ones and zeros.
        eps: added to the (biased) variance of a group.
        activation: as :func:`conv_transpose2d`.

    Returns:
        [N, C, H, W].

    Raises:
        ValueError: one value per channel in all, an unknown `activation`.
        RuntimeError: a `num_groups` that does not divide C; shapes, dtypes or devices that do not go together.

    Source: Wu & He, 2018, "Group Normalization", arXiv 1803.08494; sums of squares as in :func:`batch_norm`.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            group_norm, (input, weight, bias), input, num_groups, weight, bias, eps, activation=activation
        )
    name, slope = parse_activation(activation)
    if not isinstance(input, Tensor):
        return F.group_norm(input, num_groups, weight, bias, eps)  # raises
    return group_norms.group_norm(input, weight, bias, group_norms.Norm(num_groups, eps, name, slope))
