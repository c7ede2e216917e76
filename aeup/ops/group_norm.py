"""Group normalisation and the activation after it: torch.ops.aeup.group_norm and its gradient,
torch.ops.aeup.group_norm_backward.

Forward: the statistics of each sample's groups, then the output; backward: sums, then the input's gradient. The
backward computes the normalised value and the activation's derivative anew from the input. Gradients of gradients are
torch's own operators.
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

# On a CPU, measured forward and backward: the least pixels of an image (channels-last; NCHW in 16 bits; NCHW), and the
# least channels without an activation, where torch is as fast.
_LEAST_LAST, _LEAST_16_BIT, _LEAST, _WIDE = 32, 64, 256, 256


class Norm(NamedTuple):
    """activation(weight * (x - mean) / sqrt(var + eps) + bias), with mean and (biased) variance of each sample over
    each of `groups` groups of adjacent channels."""

    groups: int
    eps: float
    activation: str | None = None
    slope: float = 0.01


# --- kernels, of (x, weight, bias, norm); mean and invstd are [N * groups] ---


def _statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    wide = x.to(arithmetic(x)).unflatten(1, (norm.groups, x.shape[1] // norm.groups))
    var, mean = torch.var_mean(wide, (2, 3, 4), correction=0)
    return mean.flatten(), torch.rsqrt(var + norm.eps).flatten()


def reference(x, weight, bias, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's operators."""
    y = by_torch(x, weight, bias, norm)
    if x.numel() == 0:
        return y, *(x.new_zeros(x.shape[0] * norm.groups, dtype=arithmetic(x)) for _ in range(2))
    return y, *_statistics(x, norm)


def gradients_by_torch(grad, x, mean, invstd, weight, bias, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """All three gradients for these statistics, differentiable: Wu & He, section 3, after the activation's."""
    of, width = arithmetic(x), x.shape[1] // norm.groups
    cut = lambda t: t.to(of).unflatten(1, (norm.groups, width))  # noqa: E731
    of_group = lambda t: t.view(x.shape[0], norm.groups, 1, 1, 1)  # noqa: E731
    of_channel = lambda t: t.view(norm.groups, width, 1, 1)  # noqa: E731
    normal, grad = (cut(x) - of_group(mean)) * of_group(invstd), cut(grad)
    z = normal if weight is None else normal * of_channel(weight)
    z = z if bias is None else z + of_channel(bias)
    if norm.activation:
        z = z if norm.activation in AFTER else activate(z, norm.activation, norm.slope)
        grad = activation_gradient(grad, z, norm.activation, norm.slope)
    of_bias, of_weight = (t.sum((0, 3, 4)).flatten() for t in (grad, grad * normal))
    grad = grad if weight is None else grad * of_channel(weight)
    own = (2, 3, 4)
    grad = grad - grad.mean(own, keepdim=True) - normal * (grad * normal).mean(own, keepdim=True)
    return (grad * of_group(invstd)).flatten(1, 2).to(x.dtype), of_weight, of_bias


def _reference_backward(grad, x, mean, invstd, weight, bias, norm: Norm, wanted) -> tuple[Tensor, Tensor, Tensor]:
    return if_wanted(gradients_by_torch(grad, x, mean, invstd, weight, bias, norm), wanted)


def _scalars(norm: Norm) -> tuple:
    return norm.groups, norm.eps, NUMBER[norm.activation], norm.slope


def _backward_scalars(norm: Norm, wanted: tuple) -> tuple:
    return norm.groups, NUMBER[norm.activation], norm.slope, *wanted


_refusal = partial(refusal, "group_norm", "weight and bias")


def _compiled(device: str) -> Kernel:
    def refuses(x, weight, bias, norm) -> str | None:
        return _refusal(device, x, weight=weight, bias=bias)

    def yields(x, weight, bias, norm) -> str | None:
        return _as_fast(x, norm) if device == "cpu" and not _torch_crashes(x, weight, bias) else None

    label = lambda device, *args: "statistics, then the output" + instructions(device)  # noqa: E731
    return Kernel(refuses=refuses, label=label, yields=yields, **compiled_kernel("group_norm", _scalars, 3))


def _compiled_gradient(device: str) -> Kernel:
    def refuses(grad, x, mean, invstd, weight, bias, norm, wanted) -> str | None:
        return _refusal(device, x, weight=weight, bias=bias)

    def yields(grad, x, mean, invstd, weight, bias, norm, wanted) -> str | None:
        return _as_fast(x, norm) if device == "cpu" else None

    label = lambda device, *args: "sums, then the input's gradient" + instructions(device)  # noqa: E731
    made = compiled_kernel("group_norm_backward", _backward_scalars, 6)
    return Kernel(refuses=refuses, label=label, yields=yields, **made)


def _as_fast(x: Tensor, norm: Norm) -> str | None:
    """Why a CPU's tensors go to torch, or None."""
    last = compiled.is_last(x)
    if norm.activation is None and (not last or x.shape[1] >= _WIDE):
        return f"without an activation torch is as fast in NCHW, and from {_WIDE} channels on"
    least = _LEAST_LAST if last else _LEAST_16_BIT if x.itemsize == 2 else _LEAST
    return f"torch is as fast with fewer than {least} pixels" if x.shape[2] * x.shape[3] < least else None


def _torch_crashes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's own gradient for a CPU would end in a segmentation fault (2.13): channels-last, and the gradient
    of a parameter is asked for, the input's is not."""
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    return trained and not x.requires_grad and suggest_memory_format(x) is torch.channels_last


_NO_TRITON = Kernel(None, lambda *args: "there is no Triton kernel for group norm")
OP = Op(
    "aeup.group_norm",
    {
        "cuda": _compiled("cuda"),
        "triton": _NO_TRITON,
        "cpu": _compiled("cpu"),
        "torch": Kernel(reference, lambda *args: None),
    },
)
BACKWARD = Op(
    "aeup.group_norm_backward",
    {
        "cuda": _compiled_gradient("cuda"),
        "triton": _NO_TRITON,
        "cpu": _compiled_gradient("cpu"),
        "torch": Kernel(_reference_backward, lambda *args: None),
    },
)


# --- the op as it is called ---


def by_torch(x, weight, bias, norm: Norm) -> Tensor:
    """torch's group norm, then its activation: of any rank, differentiable, and torch's errors."""
    return activate(F.group_norm(x, norm.groups, weight, bias, norm.eps), norm.activation, norm.slope, inplace=True)


def _unserved(x, weight, bias, norm: Norm) -> str | None:
    """Why this is torch's: to compute, or to raise its error."""
    if x.dim() != 4 or x.dtype not in compiled.FLOATS or x.layout is not torch.strided:
        return "serves dense float64, float32, float16 or bfloat16 tensors [N, C, H, W]"
    n, c, h, w = x.shape
    if n * c * h * w == 0:
        return "the input is empty"
    if not isinstance(norm.groups, int) or norm.groups < 1 or c % norm.groups:
        return "num_groups must be an int that divides the channels"
    if n * (c // norm.groups) * h * w == 1:
        return "one value per channel has no variance"
    for t in (weight, bias):
        if t is not None and (t.dim() != 1 or t.shape[0] != c or t.device != x.device):
            return "weight and bias must have one element for each channel, beside the input"
    return None if isinstance(norm.eps, (int, float)) and norm.eps >= 0 else "eps must be a number, at least 0"


def group_norm(x, weight, bias, norm: Norm) -> Tensor:
    """activation(group_norm(x)), [N, C, H, W], differentiable."""
    args = x, weight, bias, norm
    key = None
    if unwatched(x, weight, bias):
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3])
        of_x = x.shape, x.stride(), x.dtype, x.device, x.layout, x.requires_grad
        key = needs_grad, get_backend(), norm, type(norm.groups), *of_x, *map(place, args[1:3])
        plan = PLANS.get(key)
        if plan is not None:
            return plan.run(args)
    elif of_the_compiler(x):
        return by_torch(*args)
    reason = _unserved(*args)
    if reason:
        note_torch("aeup.group_norm", lambda: f"{list(x.shape)}, {x.dtype}", reason)
        return by_torch(*args)
    if registered(x, weight, bias):
        groups, *rest = norm
        return torch.ops.aeup.group_norm.default(x, groups, weight, bias, *rest)[0]
    return by_torch(*args) if key is None else PLANS.keep(key, _Plan(key, args)).run(args)


PLANS = Plans()


def _gradients(grad, x, weight, bias, mean, invstd, norm: Norm, wanted) -> tuple:
    """The gradients of x, weight and bias that are wanted, else None."""
    if differentiated():  # the statistics depend on x
        found = gradients_by_torch(grad, x, *_statistics(x, norm), weight, bias, norm)
    elif traced(grad, x):
        flags = norm.groups, norm.activation, norm.slope, wanted
        found = torch.ops.aeup.group_norm_backward.default(grad, x, mean, invstd, weight, bias, *flags)
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
    "group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    "str? activation=None, float slope=0.01) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_lib.define(
    "group_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
    "int num_groups, str? activation, float slope, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _checked(x, weight, bias, *rest) -> Norm:
    norm = Norm(*rest)
    check_activation(norm.activation, norm.slope)
    reason = _unserved(x, weight, bias, norm)
    if reason == "the input is empty" and (norm.groups < 1 or x.shape[1] % norm.groups):
        reason = "num_groups must be an int that divides the channels"
    if reason and reason != "the input is empty":
        raise RuntimeError(f"aeup.group_norm: {reason}; got input {list(x.shape)}, {x.dtype}, {norm}")
    return norm


def _run(x, groups, weight=None, bias=None, eps=1e-5, *rest):  # torch leaves out what is a default
    norm = _checked(x, weight, bias, groups, eps, *rest)
    args = x, weight, bias, norm
    y, mean, invstd = choose(OP, x, args).run(*args) if x.numel() else reference(*args)
    return y.contiguous(memory_format=suggest_memory_format(x)), mean, invstd


def _fake(x, groups, weight=None, bias=None, eps=1e-5, *rest):
    norm = _checked(x, weight, bias, groups, eps, *rest)
    y = torch.empty_like(x, memory_format=suggest_memory_format(x))
    mean, invstd = (x.new_empty(x.shape[0] * groups, dtype=arithmetic(x)) for _ in range(2))
    call = f"{list(x.shape)}, {groups} groups" + (f", {norm.activation}" if norm.activation else "")
    call += f", {str(x.dtype)[6:]}"
    note(OP, x.device, (x, weight, bias, norm), call)
    wanted = True, weight is not None, bias is not None
    note(BACKWARD, x.device, (y, x, mean, invstd, weight, bias, norm, wanted), "gradient of " + call)
    return y, mean, invstd


def _context(ctx, inputs, output):
    x, groups, weight, bias, *rest = inputs
    ctx.norm = Norm(groups, *rest)
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    needed = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    of_x, *others = _gradients(grad, *ctx.saved_tensors, ctx.norm, needed)
    return of_x, None, *others, None, None, None


def _checked_backward(grad, x, mean, invstd, groups, activation, slope, wanted) -> Norm:
    check_activation(activation, slope)
    good = x.dim() == 4 and grad.shape == x.shape and groups > 0 and x.shape[1] % groups == 0
    if not good or mean.shape != (x.shape[0] * groups,) or invstd.shape != mean.shape:
        shapes = [list(t.shape) for t in (grad, x, mean, invstd)]
        raise RuntimeError(
            "aeup.group_norm: expected grad and input [N, C, H, W], mean and invstd [N * num_groups], num_groups a "
            f"divisor of C; got {shapes}, num_groups={groups}"
        )
    return Norm(groups, 0.0, activation, slope)


register(_lib, "group_norm", _run, _fake, _context, _gradient)
register_backward(_lib, "group_norm_backward", BACKWARD, _checked_backward, _reference_backward, gradients_by_torch)
# Under autocast the dtype stays what it is: no autocast kernel falls through to that, where torch goes to float32.
