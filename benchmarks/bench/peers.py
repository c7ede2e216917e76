"""The implementations that are measured against each other, as small adapters.

Every peer is a function of the inputs alone, bound to a case before anything is timed. A peer that is not installed is
a gap with a name and a reason, never an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

import aeup

from .workload import Case, Operator

BACKENDS = ("auto", *aeup.backends.NAMES)


def _serves_all(case: Case, direction: str) -> str | None:
    return None


def _as_it_is(case: Case, x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Peer:
    """`make(case)` gives inputs -> output. `context` is entered around every use, outside of the timed region.

    `adapt(case, x)` is x, an input or the output's gradient, as the peer likes it; it is not timed.
    `refuses(case, direction)` is the reason why the peer has no such op, or None; an exception of the type `refusal`
    says the same later. `explain(case, direction, inputs)` names the backend and the kernel that run on the inputs. The
    `subject` is the implementation that the others are compared with. `is_torch`: eager torch, whose error sets the
    budget.
    """

    name: str
    make: Callable[[Case], Callable[..., Tensor]]
    context: Callable[[], AbstractContextManager] = nullcontext
    adapt: Callable[[Case, Tensor], Tensor] = _as_it_is
    refuses: Callable[[Case, str], str | None] = _serves_all
    refusal: tuple[type[Exception], ...] = ()
    explain: Callable[[Case, str, tuple], tuple[str | None, str | None]] = lambda case, direction, inputs: (None, None)
    subject: bool = False
    is_torch: bool = False


def torch_eager() -> Peer:
    return Peer("torch", lambda case: case.torch(), is_torch=True)


def torch_compiled() -> Peer:
    return Peer("compiled", lambda case: case.compiled())


def aeup_peer(backend: str = "auto") -> Peer:
    """aeup itself, the subject; with `backend` other than "auto" it is made to use that backend or to say why not."""

    def explain(case: Case, direction: str, inputs: tuple) -> tuple[str, str]:
        chosen = [(choice.backend, choice.kernel) for choice in case.chosen(direction, inputs)] or [("", "")]
        return tuple(" + ".join(dict.fromkeys(filter(None, names))) for names in zip(*chosen, strict=True))

    name, context = ("aeup", nullcontext) if backend == "auto" else (f"aeup:{backend}", lambda: aeup.backend(backend))
    return Peer(name, lambda case: case.aeup(), context, refusal=(aeup.BackendError,), explain=explain, subject=True)


def available(
    operator: Operator, device: str, compiled: bool, backend: str = "auto"
) -> tuple[list[Peer], dict[str, str]]:
    """The peers for a device type, and the gaps: name of a missing peer -> reason."""
    peers, gaps = [torch_eager()], {}
    if compiled:
        peers.append(torch_compiled())
    else:
        gaps["compiled"] = "switched off, turn it on with --compiled"
    more, missing = operator.peers(device, compiled)
    return [*peers, *more, aeup_peer(backend)], {**gaps, **missing}
