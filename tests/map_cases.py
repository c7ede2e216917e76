"""What the tables of the ops of three maps (aeup.ops.maps) share: a case, its tensors and its gradients."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aeup.ops.epilogue import activation_gradient

ACTIVATIONS = (None, "relu", ("leaky_relu", 0.2), "silu", "gelu", "tanh", "sigmoid")
DRAWN = {  # for hypothesis: what is drawn beside a case
    "dtype": st.sampled_from(DTYPES),
    "layout": st.sampled_from(tuple(LAYOUTS)),
    "activation": st.sampled_from(ACTIVATIONS),
}


@dataclass(frozen=True)
class MapCase:
    """One call of an op; a subclass says which: `by_torch`, and what its weight's dimensions are."""

    name: str
    shape: tuple  # of the input, [N, CI, H, W]
    weight: tuple
    kwargs: dict = field(default_factory=dict, hash=False)

    def __str__(self):
        return self.name

    def tensors(self, dtype, layout="nchw", device="cpu", seed=0):
        """x, weight, bias and a gradient of the output; the same values in every dtype up to rounding."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=g, dtype=torch.float64)
        w = torch.randn(self.weight, generator=g, dtype=torch.float64) / self.fan_in() ** 0.5
        b = torch.randn(self.out_channels(), generator=g, dtype=torch.float64)
        grad = torch.randn(self.by_torch(x, w, b, **self.kwargs).shape, generator=g, dtype=torch.float64)
        x, w, b, grad = (t.to(dtype) for t in (x, w, b, grad))
        x, w, grad = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, w, grad))
        return tuple(t.to(device) for t in (x, w, b, grad))


def activated(y, activation):
    """By torch's own function."""
    if isinstance(activation, tuple):
        return F.leaky_relu(y, activation[1])
    return y if activation is None else getattr(F, activation)(y)


def run(fn, case, tensors, activation=None, **more):
    """Output and gradients of x, weight and bias."""
    x, w, b, grad = tensors
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    y = fn(*leaves, **case.kwargs, activation=activation, **more)
    return y, *torch.autograd.grad(y, leaves, grad)


def of_own_output(case, tensors, got, exact, theirs, activation):
    """`exact` and `theirs` (results of run) with the gradients that an activation has at our own output, where it is
    made of the output: relu switches at 0, and outputs near 0 differ in sign by rounding."""
    if activation in (None, "silu", "gelu"):
        return exact, theirs
    name, slope = activation if isinstance(activation, tuple) else (activation, 0.01)
    x, w, b, grad = (t.double() for t in tensors)
    ours = run(case.by_torch, case, (x, w, b, activation_gradient(grad, got[0].detach().double(), name, slope)))[1:]
    shifted = [t.double() + o - e for t, o, e in zip(theirs[1:], ours, exact[1:], strict=True)]
    return (exact[0], *ours), (theirs[0], *shifted)


def gradients_where(needs, fn, tensors, grad=None):
    """The output and the .grad of x, weight and bias, None where it is not needed; grad: 0.5 everywhere."""
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    y = fn(*leaves)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(torch.full_like(y, 0.5) if grad is None else grad)
    assert [t.grad is not None for t in leaves] == list(needs)
    return y, *(t.grad for t in leaves)


def views_of(x):
    """Inputs of x's shape [2, 6, 5, 7], up to transposition, with other offsets and strides."""
    return {
        "offset": torch.randn(x.numel() + 1)[1:].view(x.shape),
        "slice": torch.randn(3, 9, 7, 9)[1:, 1:7, 1:6, 1:8],
        "step": torch.randn(4, 12, 10, 14)[::2, ::2, ::2, ::2],
        "transposed": x.transpose(2, 3),
        "expanded": x[:1, :1].expand(2, 6, -1, -1),
        "channels-last slice": torch.randn(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)[:, :6],
    }


class Log(TorchDispatchMode):
    """Lists the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """Lists the functions that are called with one of its kind."""

    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})
