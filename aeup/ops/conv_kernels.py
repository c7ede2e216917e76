"""The backends of the transposed convolution: for each of its maps the kernels, why not, and torch's own operators.

The arguments of the maps' kernels: Y (x, w, bias, geometry, activation, slope), X (grad, w, geometry),
W (grad, x, geometry, w or None: the tensor whose layout the result shall have). The epilogue's: (grad, output,
activation, slope, bias).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.backends import Kernel, Op
from aeup.ops import compiled, epilogue
from aeup.ops.conv_shapes import Geometry, W, X, Y
from aeup.ops.epilogue import NUMBER, activate

_aten = torch.ops.aten
_LAST = torch.channels_last


# --- torch ---


def _torch_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    y = F.conv_transpose2d(x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
    return activate(y, activation, slope, inplace=True) if activation else y


def convolution_backward(grad, x, w, g: Geometry, needs) -> tuple:
    """torch's gradients of x, w and bias. Of an x or w that is not asked for, only shape and layout are read."""
    # With the bias oneDNN takes up to 5 times as long as without, and a sum.
    apart = needs[2] and grad.is_cpu
    dx, dw, bias = _aten.convolution_backward.default(
        grad, x, w, [g.co] if needs[2] else None, g.stride, g.padding, g.dilation, True, g.output_padding, g.groups,
        (needs[0], needs[1], needs[2] and not apart),
    )  # fmt: skip
    return dx, dw, grad.sum((0, 2, 3)) if apart else bias


def _torch_x(grad, w, g: Geometry) -> Tensor:
    x = F.conv2d(grad, w, None, g.stride, g.padding, g.dilation, g.groups)
    if x.shape[2:] == (g.ih, g.iw):
        return x
    return x[:, :, : g.ih, : g.iw].clone()  # output_padding reaches the stride: outputs that x does not have


def _torch_w(grad, x, g: Geometry, w) -> Tensor:
    w = grad.new_empty((g.ci, g.co // g.groups, g.kh, g.kw)) if w is None else w
    return convolution_backward(grad, x, w, g, [False, True, False])[1]


# --- cpu: compositions of torch's operators that are faster than its own kernel for the call ---
# Measured with oneDNN 3.12 on AVX-512 with bf16: ratios of medians, 2 threads, both layouts.


@lru_cache(None)
def _half_is_slow() -> bool:
    """Without half arithmetic in oneDNN torch takes its plain loops: 1.3 to 58 times slower than by float32."""
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _by_float32(a: Tensor, g: Geometry) -> bool:
    if a.dtype is torch.bfloat16 and g.ow < g.sw:
        return True  # oneDNN reads past the end of a y that is narrower than the stride: in W, and in X of small groups
    if a.shape[0] * g.ci * g.ih * g.iw * (g.co // g.groups) * g.kh * g.kw < 1 << 18:
        return False  # so few products that converting costs more
    if a.dtype is torch.float16:
        return _half_is_slow()
    return a.dtype is torch.bfloat16 and 1 < g.groups == g.ci == g.co and g.sh * g.sw > 1  # strided depthwise


def _bias_after(x: Tensor, w: Tensor, g: Geometry) -> bool:
    """oneDNN's deconvolution takes its reference kernel for these with a bias, a fast one without."""
    if x.dtype is torch.float64:
        return False
    if g.sh * g.sw == 1:
        if x.is_contiguous() and w.is_contiguous():
            return True
    elif g.dh * g.dw > 1 or g.oh % g.sh or g.ow % g.sw:
        return True
    if g.groups == 1:
        return False
    each, out = g.ci // g.groups, g.co // g.groups
    if x.dtype is torch.bfloat16:
        return each == out == 1 or (each in (4, 8, 16) and out in (4, 8, 16))
    return each == out and each in (1, 8)


def _merges(x: Tensor, g: Geometry) -> bool:
    """Few output channels: one convolution that makes all phases of an output position fills the vectors."""
    return (
        g.co <= 4
        and g.groups == 1
        and g.dh * g.dw == 1
        and min(g.sh, g.sw) > 1
        and min(g.kh, g.kw) >= 4
        and g.kh % g.sh == g.kw % g.sw == 0
        and g.output_padding[0] <= g.ph
        and g.output_padding[1] <= g.pw
        and x.dtype is not torch.float64
        and x.numel() >= 1 << 17
    )


def _cpu_way(x, w, bias, g: Geometry) -> str | None:
    if x.dtype is not torch.float32 and _by_float32(x, g):
        return "through float32"
    if g.co <= 4 and _merges(x, g):
        return "merged phases"
    return "bias after" if bias is not None and _bias_after(x, w, g) else None


def _cpu_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    way = _cpu_way(x, w, bias, g)
    if way == "through float32":
        y = _add_bias(x.float(), w.float(), None if bias is None else bias.float(), g)
        return activate(y, activation, slope, inplace=True).to(x.dtype)
    y = _merged(x, w, bias, g) if way == "merged phases" else _add_bias(x, w, bias, g)
    return activate(y, activation, slope, inplace=True)


def _add_bias(x, w, bias, g: Geometry) -> Tensor:
    if bias is None or not _bias_after(x, w, g):
        return _torch_y(x, w, bias, g, None, 0.0)
    return _torch_y(x, w, None, g, None, 0.0).add_(bias.view(-1, 1, 1))


def _merged(x, w, bias, g: Geometry) -> Tensor:
    """One convolution of stride 1 with sh * sw * co outputs, whose kernel holds each phase's taps, then the phases
    interleaved: the outputs without padding, of which [ph, ph + oh) x [pw, pw + ow) are kept."""
    rows, columns = g.kh // g.sh, g.kw // g.sw
    taps = w.reshape(g.ci, g.co, rows, g.sh, columns, g.sw).flip(2, 4)
    pad = (rows - 1, columns - 1)
    if x.is_contiguous():
        taps = taps.permute(1, 3, 5, 0, 2, 4).reshape(-1, g.ci, rows, columns)
        bias = None if bias is None else bias.repeat_interleave(g.sh * g.sw)
        y = F.conv2d(x, taps, bias, 1, pad)
        n, _, h, v = y.shape
        y = y.view(n, g.co, g.sh, g.sw, h, v).permute(0, 1, 4, 2, 5, 3).reshape(n, g.co, h * g.sh, v * g.sw)
        y = y[:, :, g.ph : g.ph + g.oh, g.pw : g.pw + g.ow]
        return y.contiguous()
    taps = taps.permute(3, 5, 1, 0, 2, 4).reshape(-1, g.ci, rows, columns)
    bias = None if bias is None else bias.repeat(g.sh * g.sw)
    y = F.conv2d(x.contiguous(memory_format=_LAST), taps, bias, 1, pad)
    n, _, h, v = y.shape
    y = y.permute(0, 2, 3, 1).view(n, h, v, g.sh, g.sw, g.co).transpose(2, 3).reshape(n, h * g.sh, v * g.sw, g.co)
    y = y[:, g.ph : g.ph + g.oh, g.pw : g.pw + g.ow].permute(0, 3, 1, 2)
    return y.contiguous(memory_format=_LAST)


def cpu_refusal(t: Tensor, way: str | None) -> str | None:
    if not t.is_cpu:
        return f"the tensor is on {t.device}"
    return None if way else "torch's own kernel is the fastest composition for this call"


def _cpu_refuses_y(x, w, bias, g, activation, slope) -> str | None:
    return cpu_refusal(x, _cpu_way(x, w, bias, g) if x.is_cpu else None)


def _gradient_way(grad: Tensor, g: Geometry) -> str | None:
    return "through float32" if _by_float32(grad, g) else None


def _cpu_refuses_gradient(grad, other, g, w=None) -> str | None:
    return cpu_refusal(grad, _gradient_way(grad, g) if grad.is_cpu else None)


def _cpu_x(grad, w, g: Geometry) -> Tensor:
    return _torch_x(grad.float(), w.float(), g).to(grad.dtype)


def _cpu_w(grad, x, g: Geometry, w) -> Tensor:
    return _torch_w(grad.float(), x.float(), g, None).to(grad.dtype)


# --- cuda: the compiled extension ---


def _forward_args(g: Geometry) -> tuple:
    return (*g.stride, *g.padding, *g.output_padding, g.groups, *g.dilation)


def _cuda_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    return compiled.call(
        "conv_transpose2d", x, w, bias, *_forward_args(g), NUMBER[activation], slope, compiled.tf32(x), ""
    )


def _cuda_plan(x, w, bias, g: Geometry, activation, slope):
    args = (*_forward_args(g), NUMBER[activation], slope, compiled.tf32(x))
    return compiled.planned("conv_transpose2d", x, w, *args)


def _cuda_x(grad, w, g: Geometry) -> Tensor:
    args = (g.ih, g.iw, g.sh, g.sw, g.ph, g.pw, g.groups, g.dh, g.dw, compiled.tf32(grad), "")
    return compiled.call("conv_transpose2d_input_gradient", grad, w, *args)


def _cuda_w(grad, x, g: Geometry, w) -> Tensor:
    if w is None:
        layout = _LAST if compiled.either_last(grad, x) else torch.contiguous_format
        shape = (g.ci, g.co // g.groups, g.kh, g.kw)
        w = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    args = (g.sh, g.sw, g.ph, g.pw, g.groups, g.dh, g.dw, compiled.tf32(grad), "")
    return compiled.call("conv_transpose2d_weight_gradient", grad, x, w, *args)


def _cuda_epilogue(grad, output, activation, slope, bias):
    return compiled.call("conv_epilogue_gradient", grad, output, NUMBER[activation], slope, bias)


def cuda_backward(grad, x, w, y, g: Geometry, activation, slope, needs) -> tuple:
    """The gradients of x, w and bias that `needs` asks for, else None, in one call of the extension."""
    args = (*g.stride, *g.padding, g.groups, *g.dilation, NUMBER[activation], slope, compiled.tf32(grad), *needs)
    found = compiled.call("conv_transpose2d_backward", grad, x, w, y if activation else None, *args)
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


def cuda_refusal(t: Tensor, name: str, g: Geometry | None = None) -> str | None:
    reason = compiled.refusal(t, name)
    return reason or ("a size is 2^30 or more" if g is not None and max(g[:15]) >= 2**30 else None)


_PASSES = {Y: "forward", X: "input_gradient", W: "weight_gradient"}  # numbered in this order by the extension


def _empty_operands(g: Geometry, n: int, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    """x and w on the meta device."""
    layout = _LAST if last else torch.contiguous_format
    shapes = (n, g.ci, g.ih, g.iw), (g.ci, g.co // g.groups, g.kh, g.kw)
    return tuple(torch.empty(shape, dtype=dtype, device="meta", memory_format=layout) for shape in shapes)


def _families(kind: int, x: Tensor, w: Tensor, g: Geometry, tf32: bool, device) -> str:
    """The family of kernels that would serve, and in brackets why the ones before it would not."""
    args = (list(_PASSES).index(kind), tf32, *compiled.capability(device))
    return torch.ops.aeup_native.conv_transpose2d_kernel.default(x, w, *_forward_args(g), *args)


def _label(kind: int):
    def label(device, a, b, *rest) -> str:
        g = next(r for r in rest if isinstance(r, Geometry))
        last = a.is_contiguous(memory_format=_LAST) and not a.is_contiguous()
        x, w = _empty_operands(g, a.shape[0], a.dtype, last)
        x, w = {Y: (a, b), X: (x, b), W: (b, w)}[kind]
        return _families(kind, x, w, g, compiled.tf32(a), device)

    return label


# --- for the tuned tables ---


def _problem(kind: int):
    def problem(a, b, *rest) -> tuple:
        g, bias = (rest[1], rest[0] is not None) if kind == Y else (rest[0], False)
        last = not (a.is_contiguous() and b.is_contiguous()) and compiled.either_last(a, b)
        return g, a.shape[0], a.dtype, compiled.tf32(a), last, bias

    return problem


def _features(kind: int):
    def features(problem: tuple, device: torch.device) -> dict:
        """`pixels`: of the input. `family`: of the extension's kernels; on a CPU, the cpu backend's way."""
        g, n, dtype, tf32, last, bias = problem
        family = ""
        if device.type == "cpu":
            x, w = _empty_operands(g, n, dtype, last)
            family = (_cpu_way(x, w, w if bias else None, g) if kind == Y else _gradient_way(x, g)) or ""
        elif not isinstance(compiled.raw(_NAMES[kind]), str) and dtype in compiled.FLOATS and max(g[:15]) < 2**30:
            family = _families(kind, *_empty_operands(g, n, dtype, last), g, tf32, device).split(" ")[0]
        found = {"dtype": "tf32" if tf32 else str(dtype)[6:], "layout": "NHWC" if last else "NCHW"}
        return found | {"family": family, "pixels": n * g.ih * g.iw}

    return features


# --- triton ---


def _public_y(x, w, bias, g, activation, slope):
    return x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation, activation, slope


def _public_x(grad, w, g):
    return grad, w, (g.ih, g.iw), g.stride, g.padding, g.groups, g.dilation


def _public_w(grad, x, g, w=None):
    return grad, x, (g.kh, g.kw), g.stride, g.padding, g.groups, g.dilation


def _public_epilogue(*args):
    return args


# --- the ops ---


def serves(*args) -> None:
    return None


def _map_op(kind: int, name: str, cuda, refuses, cpu, cpu_refuses, reference, public) -> Op:
    kernels = {
        "cuda": Kernel(cuda, refuses, _label(kind), plan=_cuda_plan if kind == Y else None),
        "triton": compiled.triton_kernel(name, public, "refuses_convolution"),
        "cpu": Kernel(cpu, cpu_refuses, lambda device, *args: _cpu_label(kind, *args)),
        "torch": Kernel(reference, serves),
    }
    of_call = {"op": _NAMES[Y], "pass": _PASSES[kind]}
    return Op(f"aeup.{name}", kernels, of_call, _problem(kind), _features(kind))


def _cpu_label(kind: int, a: Tensor, b: Tensor, *rest) -> str:
    return "through float32" if kind != Y else _cpu_way(a, b, *rest[:2])


_NAMES = {Y: "conv_transpose2d", X: "conv_transpose2d_input_gradient", W: "conv_transpose2d_weight_gradient"}
MAPS = {
    Y: _map_op(
        Y, _NAMES[Y], _cuda_y, lambda x, w, bias, g, *_: cuda_refusal(x, _NAMES[Y], g), _cpu_y, _cpu_refuses_y,
        _torch_y, _public_y,
    ),
    X: _map_op(
        X, _NAMES[X], _cuda_x, lambda a, b, g: cuda_refusal(a, _NAMES[X], g), _cpu_x, _cpu_refuses_gradient,
        _torch_x, _public_x,
    ),
    W: _map_op(
        W, _NAMES[W], _cuda_w, lambda a, b, g, w: cuda_refusal(a, _NAMES[W], g), _cpu_w, _cpu_refuses_gradient,
        _torch_w, _public_w,
    ),
}  # fmt: skip
EPILOGUE = Op(
    "aeup.conv_epilogue_gradient",
    {
        "cuda": Kernel(_cuda_epilogue, lambda grad, *_: cuda_refusal(grad, "conv_epilogue_gradient")),
        "triton": compiled.triton_kernel("conv_epilogue_gradient", _public_epilogue, "refuses_convolution", False),
        "cpu": Kernel(epilogue.reference, lambda grad, *_: cpu_refusal(grad, None)),
        "torch": Kernel(epilogue.reference, serves),
    },
)
