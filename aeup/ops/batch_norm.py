"""Batch normalisation and the activation after it: torch.ops.aeup.batch_norm and its gradient,
torch.ops.aeup.batch_norm_backward.

Forward: statistics, then output; backward: sums per channel, then the input's gradient. The backward computes the
normalised value and the activation's derivative anew from the input, so that nothing else of its size is kept.
Gradients of gradients are torch's own operators.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aeup.backends import Kernel, Op, choose, get_backend, note, note_torch
from aeup.ops import compiled
from aeup.ops.eager import Plans, differentiated, traced, unwatched
from aeup.ops.epilogue import AFTER, NUMBER, activate, activation_gradient, check_activation
from aeup.ops.norm_common import (
    Plan,
    arithmetic,
    compiled_kernel,
    if_wanted,
    in_dtypes,
    instructions,
    of_the_compiler,
    place,
    refusal,
    register,
    register_backward,
    registered,
)

_AXES = (0, 2, 3)


class Norm(NamedTuple):
    """activation(weight * (x - mean) / sqrt(var + eps) + bias), with the batch's statistics in `training`, which the
    running ones then follow: running += momentum * (batch - running), with the unbiased variance."""

    training: bool
    momentum: float
    eps: float
    activation: str | None = None
    slope: float = 0.01


def _by_channel(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1)


# --- kernels, of (x, weight, bias, running_mean, running_var, counter, norm): in training the running statistics and
# the counter of batches are updated in place ---


def reference(x, weight, bias, running_mean, running_var, counter, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's operators."""
    y = by_torch(x, weight, bias, running_mean, running_var, counter, norm)
    of = arithmetic(x)
    if not norm.training:
        return y, running_mean.to(of), torch.rsqrt(running_var.to(of) + norm.eps)
    if x.numel() == 0:
        return y, *(x.new_zeros(x.shape[1], dtype=of) for _ in range(2))
    var, mean = torch.var_mean(x.to(of), _AXES, correction=0)
    return y, mean, torch.rsqrt(var + norm.eps)


def gradients_by_torch(grad, x, mean, invstd, weight, bias, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """All three gradients for these statistics, differentiable: Ioffe & Szegedy, section 3, after the activation's."""
    of = arithmetic(x)
    scale, normal = invstd, (x.to(of) - _by_channel(mean)) * _by_channel(invstd)
    z, grad = normal, grad.to(of)
    if weight is not None:
        scale, z = invstd * weight, z * _by_channel(weight)
    if bias is not None:
        z = z + _by_channel(bias)
    if norm.activation:
        z = z if norm.activation in AFTER else activate(z, norm.activation, norm.slope)
        grad = activation_gradient(grad, z, norm.activation, norm.slope)
    of_bias, of_weight = grad.sum(_AXES), (grad * normal).sum(_AXES)
    if norm.training:
        count = max(x.numel() // x.shape[1], 1)
        grad = grad - (_by_channel(of_bias) + normal * _by_channel(of_weight)) / count
    return (grad * _by_channel(scale)).to(x.dtype), of_weight, of_bias


def _reference_backward(grad, x, mean, invstd, weight, bias, norm: Norm, wanted) -> tuple[Tensor, Tensor, Tensor]:
    found = gradients_by_torch(grad, x, mean, invstd, weight, bias, norm)
    return if_wanted(found, wanted)


def _scalars(norm: Norm) -> tuple:
    return norm.training, norm.momentum, norm.eps, NUMBER[norm.activation], norm.slope


def _backward_scalars(norm: Norm, wanted: tuple) -> tuple:
    return norm.training, NUMBER[norm.activation], norm.slope, *wanted


_refusal = partial(refusal, "batch_norm", "weight, bias and running statistics")


def _compiled(device: str) -> Kernel:
    def refuses(x, weight, bias, running_mean, running_var, counter, norm) -> str | None:
        return _refusal(device, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)

    return Kernel(refuses=refuses, label=_label, **compiled_kernel("batch_norm", _scalars, 6))


def _compiled_gradient(device: str) -> Kernel:
    def refuses(grad, x, mean, invstd, weight, bias, norm, wanted) -> str | None:
        return _refusal(device, x, weight=weight, bias=bias)

    made = compiled_kernel("batch_norm_backward", _backward_scalars, 6)
    return Kernel(refuses=refuses, label=_label_backward, **made)


def _label(device, *args) -> str:
    return ("statistics, then the output" if args[-1].training else "one pass") + instructions(device)


def _label_backward(device, *args) -> str:
    return "sums, then the input's gradient" + instructions(device)


def _public(*args) -> tuple:
    return *args[:-1], *args[-1]


def _public_backward(*args) -> tuple:
    *tensors, norm, wanted = args
    return *tensors, norm.training, norm.activation, norm.slope, wanted


OP = Op(
    "aeup.batch_norm",
    {
        "cuda": _compiled("cuda"),
        "triton": compiled.triton_kernel("batch_norm", _public, "refuses_batch_norm", False),
        "cpu": _compiled("cpu"),
        "torch": Kernel(reference, lambda *args: None),
    },
)
BACKWARD = Op(
    "aeup.batch_norm_backward",
    {
        "cuda": _compiled_gradient("cuda"),
        "triton": compiled.triton_kernel("batch_norm_backward", _public_backward, "refuses_batch_norm", False),
        "cpu": _compiled_gradient("cpu"),
        "torch": Kernel(_reference_backward, lambda *args: None),
    },
)


# --- the op as it is called ---


def by_torch(x, weight, bias, running_mean, running_var, counter, norm: Norm) -> Tensor:
    """torch's batch norm, then its activation: of any rank, differentiable, and torch's errors."""
    if counter is not None:
        counter.add_(1)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, norm.training, norm.momentum, norm.eps)
    return activate(y, norm.activation, norm.slope, inplace=True)


def _unserved(x, weight, bias, running_mean, running_var, norm: Norm, counter: Tensor | None = None) -> str | None:
    """Why this is torch's: to compute, or to raise its error."""
    if x.dim() != 4 or x.dtype not in compiled.FLOATS or x.layout is not torch.strided:
        return "serves dense float64, float32, float16 or bfloat16 tensors [N, C, H, W]"
    n, c, h, w = x.shape
    if n * c * h * w == 0:
        return "the input is empty"
    for t in (weight, bias, running_mean, running_var):
        if t is not None and (t.dim() != 1 or t.shape[0] != c or t.device != x.device):
            return "weight, bias and running statistics must have one element for each channel, beside the input"
    if (running_mean is None) != (running_var is None) or (running_mean is None and not norm.training):
        return "running_mean and running_var belong together, and are needed outside training"
    if counter is not None and (counter.device != x.device or counter.dtype is not torch.int64 or counter.numel() != 1):
        return "the counter of batches must be one int64 beside the input"
    if norm.training and n * h * w == 1:
        return "one value per channel has no variance"
    good = isinstance(norm.training, bool) and isinstance(norm.momentum, float)
    good = good and (norm.eps > 0 or (norm.eps == 0 and not norm.training))
    return None if good else "training must be a bool, momentum a float, eps positive (outside training, at least 0)"


def batch_norm(x, weight, bias, running_mean, running_var, counter, norm: Norm) -> Tensor:
    """activation(batch_norm(x)), [N, C, H, W], differentiable; in training updates the running statistics and the
    `counter` of batches, where they are given."""
    args = x, weight, bias, running_mean, running_var, counter, norm
    key = None
    if unwatched(x, weight, bias):
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3])
        by_channel = *map(place, args[1:5]), x.device, counter is None or (counter.device, counter.dtype)
        of_x = x.shape, x.stride(), x.dtype, x.layout
        key = needs_grad, get_backend(), norm, type(norm.training), *of_x, by_channel
        plan = PLANS.get(key)
        if plan is not None:
            return plan.run(args)
    elif of_the_compiler(x):
        return by_torch(*args)
    reason = _unserved(x, weight, bias, running_mean, running_var, norm, counter)
    if reason:
        note_torch("aeup.batch_norm", lambda: f"{list(x.shape)}, {x.dtype}", reason)
        return by_torch(*args)
    if registered(x, weight, bias):
        return _dispatched(*args)
    return by_torch(*args) if key is None else PLANS.keep(key, _Plan(key, args)).run(args)


PLANS = Plans()


def _dispatched(x, weight, bias, running_mean, running_var, counter, norm: Norm) -> Tensor:
    """By the registered operator, which changes nothing in place."""
    y, _, _, *statistics = torch.ops.aeup.batch_norm.default(x, weight, bias, running_mean, running_var, *norm)
    if norm.training:
        for t, now in zip((running_mean, running_var), statistics, strict=True):
            if t is not None:
                t.copy_(now)
        if counter is not None:
            counter.add_(1)
    return y


def _gradients(grad, x, weight, bias, mean, invstd, norm: Norm, wanted) -> tuple:
    """The gradients of x, weight and bias that are wanted, else None."""
    if differentiated():  # the statistics depend on x
        if norm.training:
            var, mean = torch.var_mean(x.to(arithmetic(x)), _AXES, correction=0)
            invstd = torch.rsqrt(var + norm.eps)
        found = gradients_by_torch(grad, x, mean, invstd, weight, bias, norm)
    elif traced(grad, x):
        flags = norm.training, norm.activation, norm.slope, wanted
        found = torch.ops.aeup.batch_norm_backward.default(grad, x, mean, invstd, weight, bias, *flags)
    else:
        args = grad, x, mean, invstd, weight, bias, norm, wanted
        found = choose(BACKWARD, x, args).run(*args)
    return in_dtypes(found, (x, weight, bias), wanted)


class _Plan(Plan):
    __slots__ = ()
    op, backward = OP, BACKWARD
    composed, any_gradients = staticmethod(by_torch), staticmethod(_gradients)


# --- registration ---

_lib = torch.library.Library("aeup", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib.define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
    "float momentum, float eps, str? activation=None, float slope=0.01) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_lib.define(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
    "bool training, str? activation, float slope, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _checked(x, weight, bias, running_mean, running_var, *rest) -> Norm:
    norm = Norm(*rest)
    check_activation(norm.activation, norm.slope)
    reason = _unserved(x, weight, bias, running_mean, running_var, norm)
    if reason and reason != "the input is empty":
        raise RuntimeError(f"aeup.batch_norm: {reason}; got input {list(x.shape)}, {x.dtype}")
    return norm


def _run(x, weight, bias, running_mean, running_var, *rest):
    norm = _checked(x, weight, bias, running_mean, running_var, *rest)
    # What the kernels update in place is a copy: the next statistics are results here.
    now = [x.new_empty(0) if t is None else t.clone() for t in (running_mean, running_var)]
    args = x, weight, bias, *(None if t is None else n for t, n in zip((running_mean, running_var), now, strict=True))
    args = *args, None, norm
    y, mean, invstd = choose(OP, x, args).run(*args) if x.numel() else reference(*args)
    return y.contiguous(memory_format=suggest_memory_format(x)), mean.clone(), invstd, *now


def _fake(x, weight, bias, running_mean, running_var, *rest):
    norm = _checked(x, weight, bias, running_mean, running_var, *rest)
    y = torch.empty_like(x, memory_format=suggest_memory_format(x))
    mean, invstd = (x.new_empty(x.shape[1], dtype=arithmetic(x)) for _ in range(2))
    call = f"{list(x.shape)}" + ("" if norm.training else ", running statistics")
    call += (f", {norm.activation}" if norm.activation else "") + f", {str(x.dtype)[6:]}"
    note(OP, x.device, (x, weight, bias, running_mean, running_var, None, norm), call)
    wanted = True, weight is not None, bias is not None
    note(BACKWARD, x.device, (y, x, mean, invstd, weight, bias, norm, wanted), "gradient of " + call)
    now = [x.new_empty(0) if t is None else torch.empty_like(t) for t in (running_mean, running_var)]
    return y, mean, invstd, *now


def _context(ctx, inputs, output):
    x, weight, bias, _, _, *rest = inputs
    ctx.norm = Norm(*rest)
    ctx.save_for_backward(x, weight, bias, *output[1:3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    return *_gradients(grad, *ctx.saved_tensors, ctx.norm, ctx.needs_input_grad[:3]), *[None] * 7


def _checked_backward(grad, x, mean, invstd, training, activation, slope, wanted) -> Norm:
    check_activation(activation, slope)
    if x.dim() != 4 or grad.shape != x.shape or mean.shape != x.shape[1:2] or invstd.shape != mean.shape:
        shapes = [list(t.shape) for t in (grad, x, mean, invstd)]
        raise RuntimeError(f"aeup.batch_norm: expected grad and input [N, C, H, W], mean and invstd [C]; got {shapes}")
    return Norm(training, 0.0, 0.0, activation, slope)


register(_lib, "batch_norm", _run, _fake, _context, _gradient)
register_backward(_lib, "batch_norm_backward", BACKWARD, _checked_backward, _reference_backward, gradients_by_torch)
# Under autocast the dtype stays what it is, as in torch: no autocast kernel falls through to that.
