"""The implementations that are measured against each other, as small adapters.

Every peer is a function of the input alone, bound to a case before anything is timed. A peer that is not installed is
a gap with a name and a reason, never an error.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import aeup

from .cases import Case

BACKENDS = ("auto", *aeup.backends.NAMES)


def _serves_all(case: Case, direction: str) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """`make(case)` gives input -> output. `context` is entered around every use, outside of the timed region.

    `refuses(case, direction)` is the reason why the peer has no such op, or None; an exception of the type `refusal`
    says the same later. `explain(case, direction, x)` names the backend and the kernel that run on the input `x`. The
    `subject` is the implementation that the others are compared with.
    """

    name: str
    make: Callable[[Case], Callable[[Tensor], Tensor]]
    context: Callable[[], AbstractContextManager] = nullcontext
    refuses: Callable[[Case, str], str | None] = _serves_all
    refusal: tuple[type[Exception], ...] = ()
    explain: Callable[[Case, str, Tensor], tuple[str | None, str | None]] = lambda case, direction, x: (None, None)
    subject: bool = False


def torch_eager() -> Peer:
    return Peer("torch", lambda case: functools.partial(F.interpolate, **case.kwargs()))


def torch_compiled() -> Peer:
    def make(case: Case):
        torch._dynamo.reset()  # the recompile limit counts per function, not per case
        kw = case.kwargs()
        return torch.compile(lambda x: F.interpolate(x, **kw), dynamic=False, fullgraph=True)

    return Peer("compiled", make)


def aeup_peer(backend: str = "auto") -> Peer:
    """aeup itself, the subject; with `backend` other than "auto" it is made to use that backend or to say why not."""

    def explain(case: Case, direction: str, x: Tensor) -> tuple[str, str]:
        calls = aeup.explain(aeup.interpolate, x, **case.kwargs())  # the call, then its gradient
        choice = calls[0 if direction == "forward" else 1]
        return choice.backend, choice.kernel

    def make(case: Case):
        return functools.partial(aeup.interpolate, **case.kwargs())

    name, context = ("aeup", nullcontext) if backend == "auto" else (f"aeup:{backend}", lambda: aeup.backend(backend))
    return Peer(name, make, context, refusal=(aeup.BackendError,), explain=explain, subject=True)


def flag_gems() -> Peer:
    """FlagGems' own functions, called directly; they follow the schema of torch.ops.aten.upsample_*."""
    import flag_gems as gems

    def op(case: Case, suffix: str = ""):
        return getattr(gems, f"upsample_{case.mode.replace('-', '_')}2d{suffix}", None)

    def refuses(case: Case, direction: str) -> str | None:
        if op(case) is None:
            return f"this release has no {case.mode} 2-D"
        if direction == "backward" and op(case, "_backward") is None:
            return f"this release has no {case.mode} 2-D backward"
        return None if case.layout == "NCHW" else "NCHW only"

    def make(case: Case):
        g = case.geometry
        corners = () if case.mode.startswith("nearest") else (bool(case.align_corners),)
        scales = (None, None) if case.by == "size" else case.scale_factor
        forward, backward = op(case), op(case, "_backward")

        class Interpolate(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return forward(x, [g.oh, g.ow], *corners, *scales)

            @staticmethod
            def backward(ctx, grad):
                return backward(grad, [g.oh, g.ow], list(g.input), *corners, *scales)

        return lambda x: Interpolate.apply(x) if x.requires_grad else forward(x, [g.oh, g.ow], *corners, *scales)

    return Peer("flag_gems", make, refuses=refuses)


def available(device: str, compiled: bool, backend: str = "auto") -> tuple[list[Peer], dict[str, str]]:
    """The peers for a device type, and the gaps: name of a missing peer -> reason."""
    peers, gaps = [torch_eager()], {}
    if compiled:
        peers.append(torch_compiled())
    else:
        gaps["compiled"] = "switched off, turn it on with --compiled"
    if device == "cpu":
        gaps["flag_gems"] = "has no CPU kernels"
    elif importlib.util.find_spec("flag_gems") is None:
        gaps["flag_gems"] = "not installed (pip install flag-gems)"
    else:
        try:
            peers.append(flag_gems())
        except Exception as error:  # a peer that is broken on this machine must not stop the others
            gaps["flag_gems"] = f"cannot be imported: {type(error).__name__}: {error}"
    peers.append(aeup_peer(backend))
    return peers, gaps
