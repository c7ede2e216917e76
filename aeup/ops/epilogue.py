"""Bias and activation, added as a convolution's result is written: the activations, and the gradient of both as an op,
torch.ops.aeup.conv_epilogue_gradient: from the output's gradient and the output to the gradient before the activation
and of the bias."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aeup.backends import Op, choose

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")
NUMBER = {None: 0, **{name: i for i, name in enumerate(ACTIVATIONS, 1)}}  # in the extension
AFTER = ("silu", "gelu")  # gradients that need the value before the activation
_aten = torch.ops.aten


def activate(y: Tensor, activation: str | None, slope: float, inplace: bool = False) -> Tensor:
    """The activation by torch; `inplace`: of a result that nothing else holds. Not leaky_relu where autograd may
    record: in place it needs its result, which nobody may change then; else its input."""
    if activation == "relu":
        return y.relu_() if inplace else y.relu()
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope, inplace and not torch.is_grad_enabled())
    if activation == "silu":
        return F.silu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "tanh":
        return y.tanh_() if inplace else y.tanh()
    if activation == "sigmoid":
        return y.sigmoid_() if inplace else y.sigmoid()
    return y


def activation_gradient(grad: Tensor, y: Tensor, activation: str | None, slope: float) -> Tensor:
    """The gradient before the activation, differentiable. `y`: its output, or for silu and gelu its input."""
    if activation == "relu":
        return _aten.threshold_backward(grad, y, 0)
    if activation == "leaky_relu":
        return _aten.leaky_relu_backward(grad, y, slope, True)
    if activation == "silu":
        s = y.sigmoid()  # aten's own gradient has none
        return grad * s * (1 + y * (1 - s))
    if activation == "gelu":
        return _aten.gelu_backward(grad, y)
    if activation == "tanh":
        return _aten.tanh_backward(grad, y)
    if activation == "sigmoid":
        return _aten.sigmoid_backward(grad, y)
    return grad


def check_activation(activation, slope) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not 0 <= slope < float("inf"):
        raise ValueError(f"the slope of leaky_relu must be finite and at least 0, got {slope}")


def reference(grad, output, activation, slope, bias) -> tuple:
    """The gradient by torch's operators; of the bias an empty tensor where it is not asked for."""
    before = activation_gradient(grad, output, activation, slope)
    return before, before.sum((0, 2, 3)) if bias else grad.new_empty(0)


# --- the registered op ---


def _check(grad, output, activation, slope, bias):
    check_activation(activation, slope)
    if activation in AFTER:
        raise ValueError(f"the gradient of {activation} cannot be computed from its output")
    if activation and (output is None or output.shape != grad.shape):
        given = None if output is None else list(output.shape)
        raise RuntimeError(f"output must have the shape of grad_output, {list(grad.shape)}; got {given}")


def _fake(grad, output, activation, slope, bias):
    _check(grad, output, activation, slope, bias)
    before = torch.empty_like(grad, memory_format=suggest_memory_format(grad))
    return before, grad.new_empty(grad.shape[1] if bias else 0)


def _context(ctx, inputs, output):
    grad, y, ctx.activation, ctx.slope, ctx.bias = inputs
    ctx.save_for_backward(grad, y)


def _gradient(ctx, of_before, of_bias):
    grad, y = ctx.saved_tensors
    total = of_before + of_bias.view(-1, 1, 1) if ctx.bias else of_before
    dy = None
    if ctx.activation in ("tanh", "sigmoid") and ctx.needs_input_grad[1]:
        dy = grad * total * (-2 * y if ctx.activation == "tanh" else 1 - 2 * y)
    return activation_gradient(total, y, ctx.activation, ctx.slope), dy, None, None, None


def _vmap(info, in_dims, grad, y, activation, slope, bias):
    def fold(t, dim):
        if t is None:
            return None
        t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.transpose(0, 1).flatten(1, 2)

    op = torch.ops.aeup.conv_epilogue_gradient.default
    before, of_bias = op(fold(grad, in_dims[0]), fold(y, in_dims[1]), activation, slope, bias)
    return (before.unflatten(1, (info.batch_size, -1)), of_bias.view(info.batch_size, -1)), (1, 0)


def register(lib: torch.library.Library, op: Op) -> None:
    name = "conv_epilogue_gradient"

    def run(grad, output, activation, slope, bias):
        _check(grad, output, activation, slope, bias)
        args = (grad, output if activation else None, activation, slope, bias)
        before, of_bias = choose(op, grad, args).run(*args)
        before = before.contiguous(memory_format=suggest_memory_format(grad))
        return before.clone() if before is grad else before, of_bias

    lib.define(
        f"{name}(Tensor grad_output, Tensor? output, str? activation, float slope, bool bias) -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aeup::{name}", _fake, lib=lib)
    torch.library.register_autograd(f"aeup::{name}", _gradient, setup_context=_context, lib=lib)
    torch.library.register_vmap(f"aeup::{name}", _vmap, lib=lib)
