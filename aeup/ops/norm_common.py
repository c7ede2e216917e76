"""What the normalisations share (batch_norm, group_norm): the arguments of their compiled kernels, the plan of an eager
call, and how gradients are taken.

Kernels, forward: (x, weight, bias, ..., norm) to (y, mean, invstd); backward: (grad, x, mean, invstd, weight, bias,
norm, wanted) to the gradients of x, weight and bias, empty where not wanted. `norm` holds what is no tensor.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aeup.backends import Op, choose
from aeup.ops import compiled
from aeup.ops.eager import applied, scripted, traced, transforms_active, unwatched


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of the sums and of everything per channel."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def refusal(name: str, what: str, device: str, x: Tensor, **by_channel: Tensor | None) -> str | None:
    """Why the compiled kernel `name` cannot serve. `what`: the tensors of one value a channel, in words."""
    reason = compiled.refusal(x, name, device)
    if reason:
        return reason
    given = {name: t for name, t in by_channel.items() if t is not None}
    dtypes = {t.dtype for t in given.values()}
    if dtypes and dtypes not in ({arithmetic(x)}, {x.dtype}):
        served = " or ".join(dict.fromkeys(str(d)[6:] for d in (arithmetic(x), x.dtype)))
        found = ", ".join(f"{name} {str(t.dtype)[6:]}" for name, t in given.items())
        return f"{what} must all be {served}, got {found}"
    return next((f"{name} is not contiguous" for name, t in given.items() if not t.is_contiguous()), None)


def instructions(device: torch.device) -> str:
    """The end of a kernel's label."""
    return f", {torch.ops.aeup_native.cpu_instruction_set.default()}" if device.type == "cpu" else ""


def of_the_compiler(x: Tensor) -> bool:
    """On the CPU the compiler joins torch's operators to their neighbours; TorchScript has torch's operators only."""
    return (x.is_cpu and torch.compiler.is_compiling()) or scripted()


def registered(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a call goes by the registered operator: its autograd cannot be transformed (torch.func)."""
    return torch.compiler.is_compiling() or (traced(x, weight, bias) and not transforms_active())


def place(t: Tensor | None) -> tuple | None:
    """What a plan depends on."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def if_wanted(found: tuple, wanted: tuple) -> tuple:
    return tuple(t if want else t.new_empty(0) for t, want in zip(found, wanted, strict=True))


def in_dtypes(found: tuple, like: tuple, wanted: tuple) -> tuple:
    """The gradients that are wanted, in the dtypes of what they are of, else None."""
    of = zip(found, like, wanted, strict=True)
    return tuple((g if g.dtype is t.dtype else g.to(t.dtype)) if want else None for g, t, want in of)


def gradient_of_gradients(tensors: tuple, grads: tuple, wanted: tuple, gradients: Callable) -> tuple:
    """The gradient of the `wanted` ones of ``gradients(*tensors)`` for all tensors, None where one is None."""
    given = [i for i, t in enumerate(tensors) if t is not None]

    def chosen(*some):
        every = [None] * len(tensors)
        for i, t in zip(given, some, strict=True):
            every[i] = t
        return tuple(t for t, want in zip(gradients(*every), wanted, strict=True) if want)

    _, pull = torch.func.vjp(chosen, *(tensors[i] for i in given))
    found = dict(zip(given, pull(tuple(g for g, want in zip(grads, wanted, strict=True) if want)), strict=True))
    return tuple(found.get(i) for i in range(len(tensors)))


def compiled_kernel(name: str, scalars: Callable, tensors: int) -> dict:
    """`run` and `plan` of the compiled operator `name`, which takes so many tensors and then ``scalars(...)`` of what
    follows them in a kernel's arguments."""

    def plan(*args):
        return compiled.bound(name, args[0].device.type, *scalars(*args[tensors:]))

    return {"run": lambda *args: plan(*args)(*args[:tensors]), "plan": plan}


class Plan:
    """The kernels of an eager call, decided once: no dispatcher. `key` begins with whether a gradient is needed, the
    backend's name and the norm. A subclass says of which ops; `composed`: the call by torch; `any_gradients`: the
    gradients wherever they may be asked for."""

    __slots__ = ("alone", "backend", "backwards", "forward", "needs_grad", "norm")
    op: Op
    backward: Op
    composed: Callable
    any_gradients: Callable

    def __init__(self, key: tuple, args: tuple) -> None:
        self.needs_grad, self.backend, self.norm, self.backwards = *key[:3], {}
        kernel = choose(self.op, args[0], args, self.backend)
        self.alone = kernel is self.op.kernels["torch"]
        self.forward = kernel.plan(*args) if kernel.plan else lambda *tensors: kernel.run(*tensors, self.norm)

    def run(self, args: tuple) -> Tensor:
        if self.alone:
            return self.composed(*args)
        return _apply(*args[:-1], self) if self.needs_grad else self.forward(*args[:-1])[0]

    def gradients(self, grad, x, weight, bias, mean, invstd, wanted: tuple) -> tuple:
        if torch.is_grad_enabled() or not unwatched(grad, x):
            return self.any_gradients(grad, x, weight, bias, mean, invstd, self.norm, wanted)
        tensors, key = (grad, x, mean, invstd, weight, bias), (grad.stride(), wanted)
        chosen = self.backwards.get(key)
        if chosen is None:
            chosen = self.backwards[key] = self.chosen(tensors, wanted)
        return chosen(*tensors)

    def chosen(self, tensors: tuple, wanted: tuple) -> Callable:
        """What gives the gradients of such tensors that are wanted, else None."""
        args = *tensors, self.norm, wanted
        kernel = choose(self.backward, tensors[1], args, self.backend)
        planned = kernel.plan(*args) if kernel.plan else lambda *tensors: kernel.run(*tensors, self.norm, wanted)
        if kernel.plan and all(wanted):
            return planned  # in the dtypes of what they are of

        def run(grad, x, mean, invstd, weight, bias):
            return in_dtypes(planned(grad, x, mean, invstd, weight, bias), (x, weight, bias), wanted)

        return run


class _Norm(torch.autograd.Function):
    """(x, weight, bias, ..., plan) to y."""

    @staticmethod
    def forward(ctx, x, weight, bias, *rest):
        *others, plan = rest
        y, mean, invstd = plan.forward(x, weight, bias, *others)
        ctx.plan, ctx.rest = plan, (None,) * len(rest)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, *ctx.rest
        return *ctx.plan.gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad[:3]), *ctx.rest


_apply = applied(_Norm)


def register(lib: torch.library.Library, name: str, run, fake, context, gradient) -> None:
    lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aeup::{name}", fake, lib=lib)
    torch.library.register_autograd(f"aeup::{name}", gradient, setup_context=context, lib=lib)


def register_backward(lib: torch.library.Library, name: str, op: Op, checked, reference, gradients) -> None:
    """The operator `name` of (grad, x, mean, invstd, weight, bias, ..., wanted). `checked(grad, x, mean, invstd, ...,
    wanted)` gives the norm, or raises; `reference`: for empty tensors; `gradients`: all three, differentiable."""

    def run(grad, x, mean, invstd, weight, bias, *rest):
        norm, wanted = checked(grad, x, mean, invstd, *rest), tuple(rest[-1])
        args = grad, x, mean, invstd, weight, bias, norm, wanted
        dx, *others = choose(op, x, args).run(*args) if x.numel() else reference(*args)
        dx = dx.contiguous(memory_format=suggest_memory_format(x)) if wanted[0] else dx
        return dx, *(t.to(mean.dtype) for t in others)

    def fake(grad, x, mean, invstd, weight, bias, *rest):
        checked(grad, x, mean, invstd, *rest)
        wanted = rest[-1]
        dx = torch.empty_like(x, memory_format=suggest_memory_format(x)) if wanted[0] else x.new_empty(0)
        return dx, *(mean.new_empty(x.shape[1] if want else 0) for want in wanted[1:])

    def context(ctx, inputs, output):
        tensors, rest = inputs[:6], inputs[6:]
        ctx.norm, ctx.wanted, ctx.rest = checked(*tensors[:4], *rest), rest[-1], (None,) * len(rest)
        ctx.save_for_backward(*tensors)

    def gradient(ctx, *grads):
        function = partial(gradients, norm=ctx.norm)
        return *gradient_of_gradients(ctx.saved_tensors, grads, ctx.wanted, function), *ctx.rest

    register(lib, name, run, fake, context, gradient)
