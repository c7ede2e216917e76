"""Measures one case after another: gate first, then all green peers in one interleaved run.

Method. Inputs, gradients, graphs and compiled code are made before the timed region; a peer allocates its own output
in it, as every peer must. Backward is `torch.autograd.grad` of the output on a kept graph, with a dense gradient in
the op's layout: compiled peers have no other entry, and it is what training runs, so all pay the same engine.
The copy ceiling (`copy_` of the same number of bytes, half read, half written) and on a GPU the byte mover run in the
same rotation. How the clock is read: see `timing`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .gate import Check, Gate, autograd_backward
from .machine import Machine
from .peers import Peer
from .timing import CONTENDED_CPUS, Call, Settings, Timing, peak_bytes, time_eager, time_gpu, time_undisturbed
from .workload import Case, Part

COPY, MOVER = "copy", "mover"
ROTATED_BYTES = 64 << 20


@dataclass
class Result:
    """One peer in one row. status: ok, red (failed the gate), error (raised), unsupported (no such op), missing.
    `checks` has a verdict for each tensor that the peer gives."""

    status: str = "missing"
    reason: str | None = None
    checks: dict[str, Check] = field(default_factory=dict)
    timing: Timing | None = None
    eager: Timing | None = None
    peak_bytes: int | None = None
    backend: str | None = None
    kernel: str | None = None

    @property
    def check(self) -> Check | None:
        """The worst verdict."""
        return max(self.checks.values(), key=lambda check: check.severity, default=None)

    @property
    def seconds(self) -> float | None:
        """What a program waits for a call: eager time where it was measured, else the median of `timing`."""
        timing = self.eager or self.timing
        return timing.median if timing else None


@dataclass
class Row:
    """One case in one direction. `ceilings` holds the timings of `copy` and, on a GPU, `mover`. `floor`: seconds at the
    machine's limits. `lacking_cpus`: how many CPUs other programs took, on average, from the threads that were measured
    (None where it is not known)."""

    case: Case
    direction: str
    subject: str
    results: dict[str, Result] = field(default_factory=dict)
    ceilings: dict[str, Timing] = field(default_factory=dict)
    torch_error: float | None = None
    floor: float | None = None
    lacking_cpus: float | None = None

    @property
    def contended(self) -> bool:
        """Other programs took CPUs from the measurement."""
        return (self.lacking_cpus or 0) > CONTENDED_CPUS

    @property
    def id(self) -> str:
        return f"{self.case.id}/{self.direction}"

    @property
    def status(self) -> str:
        return self.results.get(self.subject, Result()).status

    def median(self, peer: str) -> float | None:
        """Seconds by `timing`: on a GPU, device time."""
        timing = self.results.get(peer, Result()).timing
        return timing.median if timing else None

    def _seconds(self, peer: str, device_only: bool) -> float | None:
        return self.median(peer) if device_only else self.results.get(peer, Result()).seconds

    def ratio(self, peer: str | None, device_only: bool = False) -> float | None:
        """How many times as fast the subject is as `peer`: eager where it was measured, or by device time alone."""
        own = self._seconds(self.subject, device_only)
        other = self._seconds(peer, device_only) if peer else None
        return other / own if own and other else None

    def best_peer(self, device_only: bool = False) -> str | None:
        timed = {n: t for n in self.results if n != self.subject and (t := self._seconds(n, device_only))}
        return min(timed, key=timed.__getitem__) if timed else None

    def fraction(self, ceiling: str, peer: str | None = None) -> float | None:
        """The part of the ceiling's bandwidth that the peer (default: the subject) reaches."""
        own = self.median(peer or self.subject)
        return self.ceilings[ceiling].median / own if own and ceiling in self.ceilings else None

    def fraction_of_floor(self, peer: str | None = None) -> float | None:
        """The part of the machine's limit that the peer (default: the subject) reaches."""
        own = self.median(peer or self.subject)
        return self.floor / own if own and self.floor else None


def _rotation(tensor_bytes: int, s: Settings) -> int:
    """How many inputs a call goes through, so that a CPU's cache does not hold them."""
    return max(2, min(32, math.ceil(ROTATED_BYTES / tensor_bytes))) if s.device == "cpu" else 2


def _ceilings(case: Case, direction: str, s: Settings) -> dict[str, Call]:
    half = max(1, case.bytes(direction) // 8)  # float32 elements on each side
    sources = [torch.zeros(half, device=s.device) for _ in range(_rotation(4 * half, s))]
    target = torch.zeros(half, device=s.device)
    calls = {COPY: Call(target.copy_, sources)}
    if s.device != "cpu" and not case.flops(direction):
        from . import mover

        src, dst = mover.buffers(*case.sizes(direction), device=torch.device(s.device))
        calls[MOVER] = Call(lambda x: mover.move(x, dst), [src])
    return calls


def _poison(case: Case, parts: Sequence[Part], s: Settings) -> None:
    """Leave NaNs in the memory that the allocator is likely to hand to the results."""
    shapes = [part.reference.shape for part in parts]
    _ = [torch.full(shape, math.nan, dtype=case.torch_dtype, device=s.device) for shape in shapes]


def bind(fn: Callable[..., Tensor], direction: str, inputs: Sequence[Tensor]) -> Callable[[Tensor], object]:
    """`fn` of what changes from call to call: the first input, or the output's gradient (backward)."""
    if direction == "backward":
        return autograd_backward(fn, inputs)
    rest = inputs[1:]
    return (lambda x: fn(x, *rest)) if rest else fn


def measure(case: Case, direction: str, peers: Sequence[Peer], s: Settings, machine: Machine | None = None) -> Row:
    """Gate and time every peer on one case. Exceptions of a peer end in its `Result`; KeyboardInterrupt passes."""
    with case.context():
        return _measure(case, direction, peers, s, machine)


def _measure(case: Case, direction: str, peers: Sequence[Peer], s: Settings, machine: Machine | None) -> Row:
    row = Row(case, direction, next(p.name for p in peers if p.subject))
    row.floor = machine.floor(case, direction) if machine else None
    problem = case.problem(s.device, s.seed)
    parts, inputs = problem.parts(direction), problem.inputs
    given = problem.grad if direction == "backward" else inputs[0]
    gate = Gate(case, direction, parts, case.outcome(bind(case.torch(), direction, inputs), given))
    rotated = [given] + [given.clone() for _ in range(_rotation(given.nbytes, s) - 1)]
    calls: dict[str, Call] = {}
    for peer in sorted(peers, key=lambda peer: not peer.is_torch):  # torch first: it sets the budget
        result = row.results[peer.name] = Result()
        if reason := peer.refuses(case, direction):
            result.status, result.reason = "unsupported", reason
            continue
        try:
            with peer.context():
                own = tuple(peer.adapt(case, x) for x in inputs)
                own_rotated = [peer.adapt(case, x) for x in rotated]
                made = peer.make(case)
                fn = bind(made, direction, own)
                _poison(case, parts, s)
                out = case.outcome(fn, own_rotated[0])
                if peer.is_torch:
                    gate.widen(out)
                result.checks = gate.check(out, keep_layout=peer.subject)
                del out
                result.backend, result.kernel = peer.explain(case, direction, own)
                if s.device != "cpu" and s.eager and not result.check.reason:
                    peak = case.peak(direction, made, own, own_rotated[0])
                    result.peak_bytes = peak_bytes(peak) if peak else None
        except peer.refusal as error:
            result.status, result.reason = "unsupported", str(error)
            continue
        except Exception as error:  # one peer's failure is a line in the report, not the end of the run
            result.status, result.reason = "error", f"{type(error).__name__}: {error}"
            continue
        if result.check.reason and peer.name != "torch":  # torch is timed whatever its error is
            name = next(name for name, check in result.checks.items() if check is result.check)
            result.status = "red"
            result.reason = f"{name}: {result.check.reason}" if len(parts) > 1 else result.check.reason
            continue
        result.status = "ok"
        calls[peer.name] = Call(fn, own_rotated, peer.context)
    row.torch_error = gate.torch_error
    if row.status == "ok":
        _time(row, calls, s)
    return row


def _time(row: Row, calls: dict[str, Call], s: Settings) -> None:
    every = calls | _ceilings(row.case, row.direction, s)
    if s.device == "cpu":
        timings, row.lacking_cpus = time_undisturbed(every, s)
    else:
        timings = time_gpu(every, s)
        if s.eager:
            for name, timing in time_eager(calls, s).items():
                row.results[name].eager = timing
    for name, timing in timings.items():
        if name in row.results:
            row.results[name].timing = timing
        else:
            row.ceilings[name] = timing


def run(
    cases: Sequence[Case],
    directions: Sequence[str],
    peers: Sequence[Peer],
    s: Settings,
    before: Callable[[Row], None] = lambda row: None,
    after: Callable[[list[Row]], None] = lambda rows: None,
    machine: Machine | None = None,
    until: float | None = None,
) -> tuple[list[Row], bool]:
    """Measure all cases. Returns a row for each, those not reached with status "missing", and whether it was
    interrupted (KeyboardInterrupt). `before` gets the row that comes next, `after` all rows after each one. `until`: no
    row begins after this time (time.monotonic), and the shapes come in random order, always the same; the cases of one
    stay together, since they share data."""
    if sum(p.subject for p in peers) != 1:
        raise ValueError(f"peers: expected exactly one subject, got {[p.name for p in peers if p.subject]}")
    subject = next(p.name for p in peers if p.subject)
    rows = [Row(case, d, subject) for case in cases for d in directions if d in case.directions]
    order = list(range(len(rows)))
    if until is not None:
        shapes = list(dict.fromkeys(case.shape for case in cases))
        random.Random(s.seed).shuffle(shapes)
        order.sort(key=lambda i: shapes.index(rows[i].case.shape))
    try:
        for i in order:
            if until is not None and time.monotonic() > until:
                break
            row = rows[i]
            before(row)
            try:
                rows[i] = measure(row.case, row.direction, peers, s, machine)
            except Exception as error:  # the machine's memory, say; the other rows are still worth having
                row.results[subject] = Result("error", f"{type(error).__name__}: {error}")
            after(rows)
    except KeyboardInterrupt:
        return rows, True
    return rows, False
