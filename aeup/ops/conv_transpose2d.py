"""2-D transposed convolution: torch.ops.aeup.conv_transpose2d, its two gradients, and the gradient of its epilogue.

With x [N, CI, ih, iw], w [CI, CO / groups, kh, kw] and y [N, CO, oh, ow], the form <y, T(x, w)> is linear in each of
the three tensors. So there are three maps, each giving one of them from the two others: T gives y (the transposed
convolution), X gives x (a strided convolution of y by w), W gives w (a sum over pixels). The gradients of each map are
the two others: the set is closed, and gradients of any order come for free. Bias and activation are T's epilogue.

Along an axis, output o takes kernel index k of input i exactly when o + p = s * i + d * k (Dumoulin & Visin, 2016, "A
guide to convolution arithmetic for deep learning", arXiv 1603.07285, relationship 14).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aeup.backends import choose, get_backend, note
from aeup.ops.conv_kernels import (
    ACTIVATIONS,
    EPILOGUE,
    MAPS,
    activate,
    activation_gradient,
    convolution_backward,
    cuda_backward,
)
from aeup.ops.conv_shapes import Geometry, W, X, Y, geometry, of_gradient

# What each map takes, in the order of its op's arguments.
_TAKES = {Y: (X, W), X: (Y, W), W: (Y, X)}
_AFTER = ("silu", "gelu")  # gradients that need the value before the activation


def memory_format(a: Tensor, b: Tensor) -> torch.memory_format:
    """torch's rule for a convolution: channels-last if one of its operands is."""
    if type(a.shape[0]) is int and a.shape[0] == 0:
        return torch.contiguous_format
    last = torch.channels_last
    return last if last in (suggest_memory_format(a), suggest_memory_format(b)) else torch.contiguous_format


# --- the three maps ---

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_modes_active = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_forward_ad = torch.autograd.forward_ad


def _traced(a: Tensor, b: Tensor, c: Tensor | None = None) -> bool:
    """Whether something watches the operators: the compiler, a mode, a subclass, a tracer."""
    return (
        torch.compiler.is_compiling()
        or type(a) not in _PLAIN
        or type(b) not in _PLAIN
        or type(c) not in _PLAIN
        or _modes_active() != 0
        or _tracing() is not None
    )


def _run(kind: int, a: Tensor, b: Tensor, g: Geometry, backend: str | None = None) -> Tensor:
    args = {Y: (a, b, None, g, None, 0.0), X: (a, b, g), W: (a, b, g, None)}[kind]
    return choose(MAPS[kind], a, args, backend).run(*args)


def _dispatched(kind: int, a: Tensor, b: Tensor, g: Geometry, *_) -> Tensor:
    """A map by its registered operator."""
    ops, pairs = torch.ops.aeup, (g.stride, g.padding, g.groups, g.dilation)
    if kind == Y:
        return ops.conv_transpose2d.default(a, b, None, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
    if kind == X:
        return ops.conv_transpose2d_input_gradient.default(a, b, (g.ih, g.iw), *pairs)
    return ops.conv_transpose2d_weight_gradient.default(a, b, (g.kh, g.kw), *pairs)


def _linear(kind: int, a: Tensor, b: Tensor, g: Geometry, backend: str | None) -> Tensor:
    """One of the three maps, differentiable. `backend` None: that of the context."""
    if _traced(a, b):
        return _dispatched(kind, a, b, g)
    backend = backend or get_backend()
    if _transforms_active():
        return _TransformedLinear.apply(a, b, kind, g, backend)
    if (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)) or _forward_ad._current_level >= 0:
        return _Linear.apply(a, b, kind, g, backend)
    return _run(kind, a, b, g, backend)


def _of_gradients(backend: str) -> str:
    # The cpu backend is made of torch's own convolutions: it serves the cases where another composition of them wins.
    return "auto" if backend == "cpu" else backend


def _map(kind: int, values: dict, g: Geometry, backend: str | None) -> Tensor:
    first, second = _TAKES[kind]
    return _linear(kind, values[first], values[second], g, backend)


class _Linear(torch.autograd.Function):
    """One of the three maps, without the dispatcher."""

    @staticmethod
    def forward(ctx, a, b, kind, g, backend):
        ctx.kind, ctx.g, ctx.backend = kind, g, backend
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)
        return _run(kind, a, b, g, backend)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None, None
        first, second = _TAKES[ctx.kind]
        values = {first: ctx.saved_tensors[0], second: ctx.saved_tensors[1], ctx.kind: grad}
        backend = _of_gradients(ctx.backend)
        a = _map(first, values, ctx.g, backend) if ctx.needs_input_grad[0] else None
        b = _map(second, values, ctx.g, backend) if ctx.needs_input_grad[1] else None
        return a, b, None, None, None

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b, *_):
        (a, b), backend = ctx.saved_tensors, _of_gradients(ctx.backend)
        parts = [] if tangent_a is None else [_linear(ctx.kind, tangent_a, b, ctx.g, backend)]
        if tangent_b is not None:
            parts.append(_linear(ctx.kind, a, tangent_b, ctx.g, backend))
        return sum(parts[1:], parts[0]) if parts else None


class _TransformedLinear(_Linear):
    """For torch.func, which wants the context apart."""

    @staticmethod
    def forward(a, b, kind, g, backend):
        return _run(kind, a, b, g, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, ctx.kind, ctx.g, ctx.backend = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info, in_dims, a, b, kind, g, backend):
        return _vmap(_linear, kind, info.batch_size, in_dims[:2], a, b, g, backend)


def _vmap(call, kind: int, size: int, dims: tuple, a: Tensor, b: Tensor, g: Geometry, backend: str | None = None):
    """vmap of a map, as (result, its batch dimension): the batch joins N where the weight has none, else the groups.
    `call` is _linear or _dispatched."""
    if kind != W and dims[1] is None:
        a = a.movedim(dims[0], 0)
        out = call(kind, a.flatten(0, 1), b, g, backend)
        return out.unflatten(0, a.shape[:2]), 0

    def into_groups(slot, t, dim):
        t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1) if slot == W else t.transpose(0, 1).flatten(1, 2)

    first, second = _TAKES[kind]
    grouped = g._replace(ci=g.ci * size, co=g.co * size, groups=g.groups * size)
    out = call(kind, into_groups(first, a, dims[0]), into_groups(second, b, dims[1]), grouped, backend)
    at = 0 if kind == W else 1
    return out.unflatten(at, (size, -1)), at


# --- with bias and activation ---


def _gradients(grad, x, w, y, g, activation, slope, backend, needs):
    """Gradients of x, w and bias where `needs` asks for them, else None. `y` is the activated output, if any."""
    if torch.is_grad_enabled() or _transforms_active():  # differentiable, by torch's own operators
        if activation:
            grad = activation_gradient(grad, y, activation, slope)
        bias = grad.sum((0, 2, 3)) if needs[2] else None
    elif _traced(grad, x, w):
        bias = None
        if activation:
            grad, bias = torch.ops.aeup.conv_epilogue_gradient.default(grad, y, activation, slope, needs[2])
        elif needs[2]:
            bias = grad.sum((0, 2, 3))
    else:
        kernel_x = choose(MAPS[X], grad, (grad, w, g), backend) if needs[0] else None
        kernel_w = choose(MAPS[W], grad, (grad, x, g, w), backend) if needs[1] else None
        if kernel_x in (None, MAPS[X].kernels["torch"]) and kernel_w in (None, MAPS[W].kernels["torch"]):
            if activation:
                grad = activation_gradient(grad, y, activation, slope)
            return convolution_backward(grad, x, w, g, needs)
        if kernel_x in (None, MAPS[X].kernels["cuda"]) and kernel_w in (None, MAPS[W].kernels["cuda"]):
            return cuda_backward(grad, x, w, y, g, activation, slope, needs)
        bias = None
        if activation or needs[2]:
            args = (grad, y if activation else None, activation, slope, needs[2])
            grad, bias = choose(EPILOGUE, grad, args, backend).run(*args)
        dx = kernel_x.run(grad, w, g) if kernel_x else None
        dw = kernel_w.run(grad, x, g, w) if kernel_w else None
        return dx, dw, bias if needs[2] else None
    dx = _linear(X, grad, w, g, backend) if needs[0] else None
    dw = _linear(W, grad, x, g, backend) if needs[1] else None
    return dx, dw, bias if needs[2] else None


class _ConvTranspose2d(torch.autograd.Function):
    """The short way of eager calls: no dispatcher where no transform, subclass or mode is active."""

    @staticmethod
    def forward(ctx, x, w, bias, g, activation, slope, kernel, backend):
        y = kernel.run(x, w, bias, g, activation, slope)
        ctx.save_for_backward(x, w, y if activation else None)
        ctx.g, ctx.activation, ctx.slope, ctx.backend = g, activation, slope, backend
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 8
        found = _gradients(
            grad, *ctx.saved_tensors, ctx.g, ctx.activation, ctx.slope, ctx.backend, ctx.needs_input_grad[:3]
        )
        return *found, None, None, None, None, None


def conv_transpose2d(
    x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry, activation: str | None, slope: float
) -> Tensor:
    """activation(T(x, w) + bias), differentiable: [N, co, oh, ow]. The tensors have one dtype and device."""
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)
    )
    fused = None if needs_grad and activation in _AFTER else activation
    if _traced(x, w, bias):
        y = torch.ops.aeup.conv_transpose2d.default(
            x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation, fused, slope
        )
    elif _transforms_active() or _forward_ad._current_level >= 0:
        fused, y = None, _linear(Y, x, w, g, None)
        if bias is not None:
            y = y + bias.view(-1, 1, 1)
    else:
        backend, args = get_backend(), (x, w, bias, g, fused, slope)
        kernel = choose(MAPS[Y], x, args, backend)
        if needs_grad and kernel is not MAPS[Y].kernels["torch"]:
            y = _ConvTranspose2d.apply(*args, kernel, _of_gradients(backend))
        else:  # torch's own kernel has torch's own gradient
            y = kernel.run(*args)
    return y if fused == activation else activate(y, activation, slope)


# --- registration ---

_PAIRS = "SymInt[2] stride, SymInt[2] padding, SymInt groups, SymInt[2] dilation"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib = torch.library.Library("aeup", "FRAGMENT")
for _schema in (
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] output_padding, SymInt groups, SymInt[2] dilation, str? activation=None, float slope=0.01) -> Tensor",
    f"conv_transpose2d_input_gradient(Tensor grad_output, Tensor weight, SymInt[2] input_size, {_PAIRS}) -> Tensor",
    f"conv_transpose2d_weight_gradient(Tensor grad_output, Tensor input, SymInt[2] kernel_size, {_PAIRS}) -> Tensor",
    "conv_epilogue_gradient(Tensor grad_output, Tensor? output, str? activation, float slope, bool bias) "
    "-> (Tensor, Tensor)",
):
    _lib.define(_schema, tags=_TAGS)


def _of_forward(x, w, bias, stride, padding, output_padding, groups, dilation, activation=None, slope=0.01):
    """The kernel's arguments, checked."""
    flat = (*stride, *padding, *output_padding, groups, *dilation)
    g = geometry(x.shape, w.shape, *flat)
    kind = bias is None or (bias.shape == (w.shape[1] * groups,) and bias.dtype == x.dtype)
    if g is None or not kind or w.dtype != x.dtype:
        F.conv_transpose2d(x, w, bias, stride, padding, output_padding, groups, dilation)  # names what is wrong
        raise RuntimeError(f"aeup.conv_transpose2d: cannot serve input {list(x.shape)} with weight {list(w.shape)}")
    _check_activation(activation, slope)
    return x, w, bias, g, activation, slope


def _check_activation(activation, slope) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not 0 <= slope < float("inf"):
        raise ValueError(f"the slope of leaky_relu must be finite and at least 0, got {slope}")


def _empty(like: Tensor, shape: tuple, other: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like, other))


def _forward(*args):
    x, w, *rest = args = _of_forward(*args)
    y = choose(MAPS[Y], x, args).run(*args)
    return y.contiguous(memory_format=memory_format(x, w)) if y.numel() else _empty(x, tuple(y.shape), w)


def _forward_fake(*args, **kwargs):
    x, w, bias, g, activation, slope = _of_forward(*args, **kwargs)
    y = _empty(x, (x.shape[0], g.co, g.oh, g.ow), w)
    s, p, d = (f"{a}x{b}" if a != b else str(a) for a, b in (g.stride, g.padding, g.dilation))
    call = f"{list(x.shape)} -> {g.co}, k{g.kh}x{g.kw}, s{s}, p{p}" + (f", d{d}" if d != "1" else "")
    call += (f", groups={g.groups}" if g.groups != 1 else "") + (f", {activation}" if activation else "")
    call += f", {str(x.dtype)[6:]}"
    note(MAPS[Y], x.device, (x, w, bias, g, activation, slope), call)
    note(MAPS[X], x.device, (y, w, g), "gradient of input, " + call)
    note(MAPS[W], x.device, (y, x, g, None), "gradient of weight, " + call)
    return y


def _forward_context(ctx, inputs, output):
    x, w, bias, ctx.g, ctx.activation, ctx.slope = _of_forward(*inputs)
    ctx.save_for_backward(x, w, bias if ctx.activation in _AFTER else None, output if ctx.activation else None)
    ctx.rest = len(inputs) - 3


def _forward_gradient(ctx, grad):
    x, w, bias, y = ctx.saved_tensors
    activation, g, slope = ctx.activation, ctx.g, ctx.slope
    if activation in _AFTER:  # only where the op itself is called with it: once more, without
        before = _linear(Y, x, w, g, None)
        before = before if bias is None else before + bias.view(-1, 1, 1)
        grad, activation = activation_gradient(grad, before, activation, slope), None
    return *_gradients(grad, x, w, y, g, activation, slope, None, ctx.needs_input_grad[:3]), *[None] * ctx.rest


def _forward_vmap(info, in_dims, *args):
    x, w, bias, *rest = args
    dims = tuple(in_dims[:3])
    one = [t if d is None else t.select(d, 0) for t, d in zip(args[:3], dims, strict=True)]
    *_, g, activation, slope = _of_forward(*one, *rest)
    if dims[:2] == (None, None):
        y, at = _dispatched(Y, x, w, g).expand(info.batch_size, -1, -1, -1, -1), 0
    else:
        y, at = _vmap(_dispatched, Y, info.batch_size, dims[:2], x, w, g)
    y = y.movedim(at, 0)
    if bias is not None:
        bias = bias if dims[2] is None else bias.movedim(dims[2], 0).unsqueeze(1)
        y = y + bias.unsqueeze(-1).unsqueeze(-1)
    return activate(y, activation, slope), 0


def _register_forward() -> None:
    name = "aeup::conv_transpose2d"
    _lib.impl("conv_transpose2d", _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(name, _forward_fake, lib=_lib)
    torch.library.register_autograd(name, _forward_gradient, setup_context=_forward_context, lib=_lib)
    torch.library.register_vmap(name, _forward_vmap, lib=_lib)

    def autocast(keys):
        def call(*args):
            tensors = args[:3]
            device = args[0].device.type
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return torch.ops.aeup.conv_transpose2d.default(*autocast_to(device, *tensors), *args[3:])

        return call

    for key in ("AutocastCPU", "AutocastCUDA"):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        _lib.impl("conv_transpose2d", autocast(keys), key)


def autocast_to(device: str, *tensors: Tensor | None) -> tuple:
    """The tensors in autocast's dtype for `device`; float64 stays, as in torch."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    )


def _register_gradient(kind: int, name: str) -> None:
    def run(a, b, size, *args):
        g = of_gradient(kind, a, b, size, *args)
        return _run(kind, a, b, g).contiguous(memory_format=memory_format(a, b))

    def fake(a, b, size, *args):
        g = of_gradient(kind, a, b, size, *args)
        return _empty(a, (a.shape[0], g.ci, g.ih, g.iw) if kind == X else (g.ci, g.co // g.groups, g.kh, g.kw), b)

    def context(ctx, inputs, output):
        a, b, *rest = inputs
        ctx.save_for_backward(a, b)
        ctx.g = of_gradient(kind, a, b, *rest)

    def gradient(ctx, grad):
        first, second = _TAKES[kind]
        values = {first: ctx.saved_tensors[0], second: ctx.saved_tensors[1], kind: grad}
        a = _map(first, values, ctx.g, None) if ctx.needs_input_grad[0] else None
        b = _map(second, values, ctx.g, None) if ctx.needs_input_grad[1] else None
        return a, b, *[None] * 5

    def vmap(info, in_dims, a, b, *rest):
        one = [t if d is None else t.select(d, 0) for t, d in ((a, in_dims[0]), (b, in_dims[1]))]
        return _vmap(_dispatched, kind, info.batch_size, tuple(in_dims[:2]), a, b, of_gradient(kind, *one, *rest))

    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aeup::{name}", fake, lib=_lib)
    torch.library.register_autograd(f"aeup::{name}", gradient, setup_context=context, lib=_lib)
    torch.library.register_vmap(f"aeup::{name}", vmap, lib=_lib)


# --- the gradient of the epilogue, from its output: before the activation, and of the bias ---


def _check_epilogue(grad, output, activation, slope, bias):
    _check_activation(activation, slope)
    if activation in _AFTER:
        raise ValueError(f"the gradient of {activation} cannot be computed from its output")
    if activation and (output is None or output.shape != grad.shape):
        given = None if output is None else list(output.shape)
        raise RuntimeError(f"output must have the shape of grad_output, {list(grad.shape)}; got {given}")


def _epilogue(grad, output, activation, slope, bias):
    _check_epilogue(grad, output, activation, slope, bias)
    args = (grad, output if activation else None, activation, slope, bias)
    before, of_bias = choose(EPILOGUE, grad, args).run(*args)
    before = before.contiguous(memory_format=suggest_memory_format(grad))
    return before.clone() if before is grad else before, of_bias


def _epilogue_fake(grad, output, activation, slope, bias):
    _check_epilogue(grad, output, activation, slope, bias)
    before = torch.empty_like(grad, memory_format=suggest_memory_format(grad))
    return before, grad.new_empty(grad.shape[1] if bias else 0)


def _epilogue_context(ctx, inputs, output):
    grad, y, ctx.activation, ctx.slope, ctx.bias = inputs
    ctx.save_for_backward(grad, y)


def _epilogue_gradient(ctx, of_before, of_bias):
    grad, y = ctx.saved_tensors
    total = of_before + of_bias.view(-1, 1, 1) if ctx.bias else of_before
    dy = None
    if ctx.activation in ("tanh", "sigmoid") and ctx.needs_input_grad[1]:
        dy = grad * total * (-2 * y if ctx.activation == "tanh" else 1 - 2 * y)
    return activation_gradient(total, y, ctx.activation, ctx.slope), dy, None, None, None


def _epilogue_vmap(info, in_dims, grad, y, activation, slope, bias):
    def fold(t, dim):
        if t is None:
            return None
        t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.transpose(0, 1).flatten(1, 2)

    op = torch.ops.aeup.conv_epilogue_gradient.default
    before, of_bias = op(fold(grad, in_dims[0]), fold(y, in_dims[1]), activation, slope, bias)
    return (before.unflatten(1, (info.batch_size, -1)), of_bias.view(info.batch_size, -1)), (1, 0)


_register_forward()
_register_gradient(X, "conv_transpose2d_input_gradient")
_register_gradient(W, "conv_transpose2d_weight_gradient")
_lib.impl("conv_epilogue_gradient", _epilogue, "CompositeExplicitAutograd")
torch.library.register_fake("aeup::conv_epilogue_gradient", _epilogue_fake, lib=_lib)
torch.library.register_autograd(
    "aeup::conv_epilogue_gradient", _epilogue_gradient, setup_context=_epilogue_context, lib=_lib
)
torch.library.register_vmap("aeup::conv_epilogue_gradient", _epilogue_vmap, lib=_lib)
