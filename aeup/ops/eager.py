"""What decides whether an eager call may go the short way: no compiler, mode, transform, tracer or subclass active."""

import marshal
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from aeup import tuned

_MOST_PLANS = 4096
_KINDS, _ROWS = (int, float, bool, str), (tuple, list, torch.Size)
_PLAIN = (Tensor, torch.nn.Parameter)
_modes_active = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


def forward_ad_active() -> bool:
    return _forward_ad._current_level >= 0


class Plans(dict):
    """The plans of an op's eager calls, by all that a call depends on."""

    def __init__(self) -> None:
        tuned.on_change.append(self.clear)

    def keep(self, key: tuple, plan):
        if len(self) >= _MOST_PLANS:  # sizes that change from call to call
            self.clear()
        self[key] = plan
        return plan


def scripted() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records: torch's operators then, as what they make runs without
    aeup, and at any size."""
    return _tracing() is not None or (is_compiling() and torch.onnx.is_in_onnx_export())


def traced(a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> bool:
    """Whether something watches the operators: the compiler, a mode, a subclass, a tracer."""
    return (
        is_compiling()
        or type(a) not in _PLAIN
        or (b is not None and type(b) not in _PLAIN)
        or (c is not None and type(c) not in _PLAIN)
        or _modes_active() != 0
        or _tracing() is not None
    )


def differentiated() -> bool:
    """Whether a gradient that is being made shall have a derivative itself."""
    return torch.is_grad_enabled() or transforms_active() or forward_ad_active()


def unwatched(a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> bool:
    """Whether an eager call may go by its plan: neither `traced` nor transformed, by torch.func or forward AD. One
    expression, since every call asks."""
    return not (
        is_dynamo_compiling()  # other compilers and exporters come with a mode and tensors of their own
        or type(a) not in _PLAIN
        or (b is not None and type(b) not in _PLAIN)
        or (c is not None and type(c) not in _PLAIN)
        or _modes_active()
        or _tracing() is not None
        or transforms_active()
        or _forward_ad._current_level >= 0
    )


def applied(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` for a plan, whose calls are not transformed: without what torch does first in Python for
    torch.func, and, in the backward, to find `function.backward`."""
    function._backward_cls.apply = function.backward
    return super(torch.autograd.Function, function).apply


def exact(options: tuple) -> bytes | None:
    """A key that keeps 2, 2.0 and True apart, which are equal. None for options of no plain kind."""
    try:
        return marshal.dumps(options, 2)
    except ValueError:
        if torch.Size not in map(type, options):
            return None
        return exact(tuple(tuple(x) if type(x) is torch.Size else x for x in options))


def plain(options: tuple) -> bool:
    """Whether no others have the key of these options: `exact` writes NumPy scalars and arrays as their bytes alone."""
    return all(plain(x) if type(x) in _ROWS else x is None or type(x) in _KINDS for x in options)
