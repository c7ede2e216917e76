"""What the convolution ops share: a closed set of three bilinear maps with bias and activation, as registered ops.

With x [N, CI, ih, iw], w and y [N, CO, oh, ow], the form <y, T(x, w)> of such an op T is linear in each of the three
tensors. So there are three maps, each giving one of them from the two others: Y gives y (the op), X gives x, W gives w.
The gradients of each map are the two others: the set is closed, and gradients of any order come for free. Bias and
activation are Y's epilogue.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from aeup.backends import Kernel, Op, choose, get_backend, note
from aeup.ops import epilogue
from aeup.ops.compiled import memory_format, tf32
from aeup.ops.conv_kernels import EPILOGUE
from aeup.ops.conv_shapes import W, X, Y
from aeup.ops.eager import (
    Plans,
    applied,
    differentiated,
    exact,
    forward_ad_active,
    traced,
    transforms_active,
    unwatched,
)
from aeup.ops.epilogue import AFTER, activate, activation_gradient

# What each map takes, in the order of its op's arguments.
TAKES = {Y: (X, W), X: (Y, W), W: (Y, X)}
_TAGS = (torch.Tag.pt2_compliant_tag,)


def autocast_to(device: str, *tensors: Tensor | None) -> tuple:
    """The tensors in autocast's dtype for `device`; float64 stays, as in torch."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    )


def _empty(like: Tensor, shape: tuple, other: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like, other))


def plan_key(x: Tensor, w: Tensor, bias: Tensor | None, options: tuple) -> tuple | None:
    """All that an eager call's geometry and kernels depend on, to look its Plan up by. None for the calls that cannot
    have one: something watches or transforms the operators, or tensors or options are not of a plain kind."""
    if w is None or not unwatched(x, w, bias) or not x.layout is w.layout is torch.strided:
        return None
    given = exact(options)
    if given is None:
        return None
    return (
        _needs_grad(x, w, bias), get_backend(), given, tf32(x),
        x.shape, x.stride(), x.dtype, x.device,
        w.shape, w.stride(), w.dtype, w.device,
        bias is None or (bias.shape, bias.dtype, bias.device),
    )  # fmt: skip


def _needs_grad(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad))


def _of_gradients(backend: str) -> str:
    # The cpu backend is made of torch's own convolutions: it serves the cases where another composition of them wins.
    return "auto" if backend == "cpu" else backend


class Maps:
    """One op's three maps. A subclass says what is its own; its only instance registers the operators.

    The arguments of the maps' kernels: Y (x, w, bias, geometry, activation, slope), X (grad, w, geometry),
    W (grad, x, geometry, w or None: the tensor whose layout the result shall have). A geometry is a NamedTuple with ci,
    co and groups; a batch of weights joins them.
    """

    name: ClassVar[str]
    schemas: ClassVar[dict[int, str]]  # arguments of the operators
    ops: ClassVar[dict[int, Op]]
    by_torch: ClassVar[tuple[Kernel, ...]]  # kernels of Y made of differentiable operators, which need no help
    function: ClassVar[type]  # a subclass of Forward: its name is that of the grad_fn

    def arguments(self, kind: int, g) -> tuple:
        """What follows the tensors in the call of a map's operator; before activation and slope."""
        raise NotImplementedError

    def checked(self, x, w, bias, *rest) -> tuple:
        """The arguments of Y's kernel, from those of its operator."""
        raise NotImplementedError

    def of_gradient(self, kind: int, a, b, *rest):
        """The geometry of X or W, from the arguments of its operator."""
        raise NotImplementedError

    def shape(self, kind: int, g, n) -> tuple:
        raise NotImplementedError

    def call(self, x: Tensor, g) -> str:
        """For explain: shapes and options."""
        raise NotImplementedError

    def joint(self, kernel_x: Kernel | None, kernel_w: Kernel | None, g):
        """What gives the gradients of x, w and bias in one call, where these kernels (None: not asked for) have it:
        a function of (grad, x, w, y, g, activation, slope, needs)."""
        raise NotImplementedError

    # --- the maps ---

    def run(self, kind: int, a: Tensor, b: Tensor, g, backend: str | None = None) -> Tensor:
        args = {Y: (a, b, None, g, None, 0.0), X: (a, b, g), W: (a, b, g, None)}[kind]
        return choose(self.ops[kind], a, args, backend).run(*args)

    def dispatched(self, kind: int, a: Tensor, b: Tensor, g, *_) -> Tensor:
        """A map by its registered operator."""
        args = self.arguments(kind, g)
        return self.operators[kind](a, b, None, *args) if kind == Y else self.operators[kind](a, b, *args)

    def linear(self, kind: int, a: Tensor, b: Tensor, g, backend: str | None) -> Tensor:
        """One of the three maps, differentiable. `backend` None: that of the context."""
        if traced(a, b):
            return self.dispatched(kind, a, b, g)
        backend = backend or get_backend()
        if transforms_active():
            return _TransformedLinear.apply(a, b, (self, kind, g, backend))
        if (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)) or forward_ad_active():
            return _Linear.apply(a, b, (self, kind, g, backend))
        return self.run(kind, a, b, g, backend)

    def other(self, kind: int, values: dict, g, backend: str | None) -> Tensor:
        first, second = TAKES[kind]
        return self.linear(kind, values[first], values[second], g, backend)

    def vmap(self, call, kind: int, size: int, dims: tuple, a: Tensor, b: Tensor, g, backend: str | None = None):
        """vmap of a map, as (result, its batch dimension): the batch joins N where the weight has none, else the
        groups. `call` is self.linear or self.dispatched."""
        if kind != W and dims[1] is None:
            a = a.movedim(dims[0], 0)
            out = call(kind, a.flatten(0, 1), b, g, backend)
            return out.unflatten(0, a.shape[:2]), 0

        def into_groups(slot, t, dim):
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.flatten(0, 1) if slot == W else t.transpose(0, 1).flatten(1, 2)

        first, second = TAKES[kind]
        grouped = g._replace(ci=g.ci * size, co=g.co * size, groups=g.groups * size)
        out = call(kind, into_groups(first, a, dims[0]), into_groups(second, b, dims[1]), grouped, backend)
        at = 0 if kind == W else 1
        return out.unflatten(at, (size, -1)), at

    # --- with bias and activation ---

    def gradients(self, grad, x, w, y, g, activation, slope, backend, needs):
        """Gradients of x, w and bias where `needs` asks for them, else None. `y` is the activated output, if any."""
        if differentiated():  # by torch's own operators
            if activation:
                grad = activation_gradient(grad, y, activation, slope)
            bias = grad.sum((0, 2, 3)) if needs[2] else None
        elif traced(grad, x, w):
            bias = None
            if activation:
                grad, bias = torch.ops.aeup.conv_epilogue_gradient.default(grad, y, activation, slope, needs[2])
            elif needs[2]:
                bias = grad.sum((0, 2, 3))
        else:
            chosen = self.backward(grad, x, w, y, g, activation, slope, needs, backend)
            return chosen(grad, x, w, y, g, activation, slope, needs)
        dx = self.linear(X, grad, w, g, backend) if needs[0] else None
        dw = self.linear(W, grad, x, g, backend) if needs[1] else None
        return dx, dw, bias if needs[2] else None

    def needs_no_help(self, kernel: Kernel, x: Tensor, w: Tensor, g, backend: str) -> bool:
        """Whether autograd gives, through a kernel of Y made of differentiable operators, the gradients as they would
        be chosen: by the same backend's."""
        name = next(name for name, found in self.ops[Y].kernels.items() if found is kernel)
        grad = _empty(x, self.shape(Y, g, x.shape[0]), w)
        made = {X: (grad, w, g), W: (grad, x, g, w)}
        return all(choose(self.ops[k], grad, args, backend) is self.ops[k].kernels[name] for k, args in made.items())

    def backward(self, grad, x, w, y, g, activation, slope, needs, backend) -> Callable:
        """The function (grad, x, w, y, g, activation, slope, needs) that serves such a call."""
        kernel_x = choose(self.ops[X], grad, (grad, w, g), backend) if needs[0] else None
        kernel_w = choose(self.ops[W], grad, (grad, x, g, w), backend) if needs[1] else None
        joint = self.joint(kernel_x, kernel_w, g)
        if joint:
            return joint
        args = (grad, y if activation else None, activation, slope, needs[2])
        before = choose(EPILOGUE, grad, args, backend) if activation or needs[2] else None

        def one_by_one(grad, x, w, y, g, activation, slope, needs):
            bias = None
            if before:
                grad, bias = before.run(grad, y if activation else None, activation, slope, needs[2])
            dx = kernel_x.run(grad, w, g) if kernel_x else None
            dw = kernel_w.run(grad, x, g, w) if kernel_w else None
            return dx, dw, bias if needs[2] else None

        return one_by_one

    def __call__(self, key: tuple | None, x, w, bias, g, activation: str | None, slope: float) -> Tensor:
        """activation(T(x, w) + bias), differentiable: [N, co, oh, ow]. The tensors have one dtype and device. `key`:
        their plan_key, under which the plan is kept."""
        if key is not None:
            plan = Plan(self, *key[:2], x, w, bias, g, activation, slope)
            return self.plans.keep(key, plan).run(x, w, bias)
        if traced(x, w, bias):
            fused = None if activation in AFTER and _needs_grad(x, w, bias) else activation
            y = self.operators[Y](x, w, bias, *self.arguments(Y, g), fused, slope)
            return y if fused == activation else activate(y, activation, slope)
        y = self.linear(Y, x, w, g, None)
        return activate(y if bias is None else y + bias.view(-1, 1, 1), activation, slope)

    # --- registration ---

    def __init__(self) -> None:
        self.plans = Plans()
        lib = self._lib = torch.library.Library("aeup", "FRAGMENT")
        names = {Y: self.name, X: f"{self.name}_input_gradient", W: f"{self.name}_weight_gradient"}
        for kind, name in names.items():
            lib.define(f"{name}({self.schemas[kind]}) -> Tensor", tags=_TAGS)
        self.operators = {kind: getattr(torch.ops.aeup, name).default for kind, name in names.items()}
        _register_forward(lib, self)
        for kind in (X, W):
            _register_gradient(lib, self, kind, names[kind])


class _Linear(torch.autograd.Function):
    """One of the three maps, without the dispatcher. `call`: (maps, kind, geometry, backend)."""

    @staticmethod
    def forward(ctx, a, b, call):
        ctx.call = call
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)
        maps, kind, g, backend = call
        return maps.run(kind, a, b, g, backend)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None
        maps, kind, g, backend = ctx.call
        first, second = TAKES[kind]
        values = {first: ctx.saved_tensors[0], second: ctx.saved_tensors[1], kind: grad}
        backend = _of_gradients(backend)
        a = maps.other(first, values, g, backend) if ctx.needs_input_grad[0] else None
        b = maps.other(second, values, g, backend) if ctx.needs_input_grad[1] else None
        return a, b, None

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b, *_):
        maps, kind, g, backend = ctx.call
        (a, b), backend = ctx.saved_tensors, _of_gradients(backend)
        parts = [] if tangent_a is None else [maps.linear(kind, tangent_a, b, g, backend)]
        if tangent_b is not None:
            parts.append(maps.linear(kind, a, tangent_b, g, backend))
        return sum(parts[1:], parts[0]) if parts else None


class _TransformedLinear(_Linear):
    """For torch.func, which wants the context apart."""

    @staticmethod
    def forward(a, b, call):
        maps, kind, g, backend = call
        return maps.run(kind, a, b, g, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, ctx.call = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info, in_dims, a, b, call):
        maps, kind, g, backend = call
        return maps.vmap(maps.linear, kind, info.batch_size, in_dims[:2], a, b, g, backend)


class Plan:
    """The short way of eager calls, which costs little: no dispatcher, and everything decided once."""

    __slots__ = ("after", "apply", "backend", "backwards", "fused", "g", "kernel", "maps", "planned", "slope")

    def __init__(self, maps: Maps, needs_grad: bool, backend: str, x, w, bias, g, activation, slope) -> None:
        after = needs_grad and activation in AFTER
        self.maps, self.g, self.slope, self.backend = maps, g, slope, _of_gradients(backend)
        self.fused, self.after = (None, activation) if after else (activation, None)
        args = (x, w, bias, g, self.fused, slope)
        self.kernel = choose(maps.ops[Y], x, args, backend)
        self.planned = self.kernel.plan(*args) if self.kernel.plan else None
        alone = needs_grad and self.kernel in maps.by_torch and maps.needs_no_help(self.kernel, x, w, g, self.backend)
        self.apply = applied(maps.function) if needs_grad and not alone else None
        self.backwards: dict[tuple, Callable] = {}

    def run(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        y = self.apply(x, w, bias, self) if self.apply else self.forward(x, w, bias)
        return activate(y, self.after, self.slope) if self.after else y

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self.planned:
            return self.planned(x, w, bias)
        return self.kernel.run(x, w, bias, self.g, self.fused, self.slope)

    def gradients(self, grad: Tensor, x: Tensor, w: Tensor, y: Tensor | None, needs: tuple) -> tuple:
        rest = self.g, self.fused, self.slope
        if torch.is_grad_enabled() or not unwatched(grad, x, w):
            return self.maps.gradients(grad, x, w, y, *rest, self.backend, needs)
        key = (grad.stride(), needs, torch.get_num_threads())
        chosen = self.backwards.get(key)
        if chosen is None:
            chosen = self.backwards[key] = self.maps.backward(grad, x, w, y, *rest, needs, self.backend)
        return chosen(grad, x, w, y, *rest, needs)


class Forward(torch.autograd.Function):
    """The op with bias and activation. `plan`: its Plan."""

    @staticmethod
    def forward(ctx, x, w, bias, plan):
        y = plan.forward(x, w, bias)
        ctx.plan = plan
        ctx.save_for_backward(x, w, y if plan.fused else None)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        return *ctx.plan.gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad[:3]), None


def _register_forward(lib: torch.library.Library, maps: Maps) -> None:
    name = maps.name

    def run(*args):
        x, w, *_ = args = maps.checked(*args)
        y = choose(maps.ops[Y], x, args).run(*args)
        return y.contiguous(memory_format=memory_format(x, w)) if y.numel() else _empty(x, tuple(y.shape), w)

    def fake(*args, **kwargs):
        x, w, bias, g, activation, slope = maps.checked(*args, **kwargs)
        y = _empty(x, maps.shape(Y, g, x.shape[0]), w)
        call = maps.call(x, g) + (f", groups={g.groups}" if g.groups != 1 else "")
        call += (f", {activation}" if activation else "") + f", {str(x.dtype)[6:]}"
        note(maps.ops[Y], x.device, (x, w, bias, g, activation, slope), call)
        note(maps.ops[X], x.device, (y, w, g), "gradient of input, " + call)
        note(maps.ops[W], x.device, (y, x, g, None), "gradient of weight, " + call)
        return y

    def context(ctx, inputs, output):
        x, w, bias, ctx.g, ctx.activation, ctx.slope = maps.checked(*inputs)
        ctx.save_for_backward(x, w, bias if ctx.activation in AFTER else None, output if ctx.activation else None)
        ctx.rest = len(inputs) - 3

    def gradient(ctx, grad):
        x, w, bias, y = ctx.saved_tensors
        activation, g, slope = ctx.activation, ctx.g, ctx.slope
        if activation in AFTER:  # only where the op itself is called with it: once more, without
            before = maps.linear(Y, x, w, g, None)
            before = before if bias is None else before + bias.view(-1, 1, 1)
            grad, activation = activation_gradient(grad, before, activation, slope), None
        found = maps.gradients(grad, x, w, y, g, activation, slope, None, ctx.needs_input_grad[:3])
        return *found, *[None] * ctx.rest

    def vmap(info, in_dims, *args):
        x, w, bias, *rest = args
        dims = tuple(in_dims[:3])
        one = [t if d is None else t.select(d, 0) for t, d in zip(args[:3], dims, strict=True)]
        *_, g, activation, slope = maps.checked(*one, *rest)
        if dims[:2] == (None, None):
            y, at = maps.dispatched(Y, x, w, g).expand(info.batch_size, -1, -1, -1, -1), 0
        else:
            y, at = maps.vmap(maps.dispatched, Y, info.batch_size, dims[:2], x, w, g)
        y = y.movedim(at, 0)
        if bias is not None:
            bias = bias if dims[2] is None else bias.movedim(dims[2], 0).unsqueeze(1)
            y = y + bias.unsqueeze(-1).unsqueeze(-1)
        return activate(y, activation, slope), 0

    def autocast(keys):
        def call(*args):
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return maps.operators[Y](*autocast_to(args[0].device.type, *args[:3]), *args[3:])

        return call

    lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aeup::{name}", fake, lib=lib)
    torch.library.register_autograd(f"aeup::{name}", gradient, setup_context=context, lib=lib)
    torch.library.register_vmap(f"aeup::{name}", vmap, lib=lib)
    for key in ("AutocastCPU", "AutocastCUDA"):
        lib.impl(name, autocast(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))), key)


def _register_gradient(lib: torch.library.Library, maps: Maps, kind: int, name: str) -> None:
    def run(a, b, *args):
        g = maps.of_gradient(kind, a, b, *args)
        return maps.run(kind, a, b, g).contiguous(memory_format=memory_format(a, b))

    def fake(a, b, *args):
        return _empty(a, maps.shape(kind, maps.of_gradient(kind, a, b, *args), a.shape[0]), b)

    def context(ctx, inputs, output):
        a, b, *rest = inputs
        ctx.save_for_backward(a, b)
        ctx.g, ctx.rest = maps.of_gradient(kind, a, b, *rest), len(rest)

    def gradient(ctx, grad):
        first, second = TAKES[kind]
        values = {first: ctx.saved_tensors[0], second: ctx.saved_tensors[1], kind: grad}
        a = maps.other(first, values, ctx.g, None) if ctx.needs_input_grad[0] else None
        b = maps.other(second, values, ctx.g, None) if ctx.needs_input_grad[1] else None
        return a, b, *[None] * ctx.rest

    def vmap(info, in_dims, a, b, *rest):
        one = [t if d is None else t.select(d, 0) for t, d in ((a, in_dims[0]), (b, in_dims[1]))]
        g = maps.of_gradient(kind, *one, *rest)
        return maps.vmap(maps.dispatched, kind, info.batch_size, tuple(in_dims[:2]), a, b, g)

    lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aeup::{name}", fake, lib=lib)
    torch.library.register_autograd(f"aeup::{name}", gradient, setup_context=context, lib=lib)
    torch.library.register_vmap(f"aeup::{name}", vmap, lib=lib)


_epilogue_library = torch.library.Library("aeup", "FRAGMENT")
epilogue.register(_epilogue_library, EPILOGUE)
