"""Measures one case after another: gate first, then all green peers in one interleaved run.

Method. Inputs, gradients, graphs and compiled code are made before the timed region; a peer allocates its own output
in it, as every peer must. Backward is `torch.autograd.grad` of the output on a kept graph, with a dense gradient in
the op's layout: compiled peers have no other entry, and it is what training runs, so all pay the same engine.
The copy ceiling (`copy_` of the same number of bytes, half read, half written) and on a GPU the byte mover run in the
same rotation.

CPU: peers take turns in slices of equal time, in random order, so that drift of the machine and what one leaves in
the caches hit all alike; each call reads another input of a set of at least 64 MB. Where other programs took CPUs
that the measured threads needed, the row is measured again, and called contended if that did not help: a thread that
waits for its CPU turns a millisecond into a scheduler's tick, for every peer alike, and ratios then mean nothing.
GPU: before each call the L2 cache is flushed, and a spin kernel keeps the device busy while the host enqueues the
call, so that CUDA events see device time alone; the host's time to enqueue is kept apart. The host synchronises
between rounds only.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .gate import Check, Gate, autograd_backward
from .peers import Peer

COPY, MOVER = "copy", "mover"
ROTATED_BYTES = 64 << 20
WARM_SECONDS = 5e-3  # a CPU slice of calls shorter than this begins with an untimed one
CONTENDED_CPUS = 0.2
SAMPLE_SECONDS = 50e-6  # a CPU sample is at least this long: shorter calls are timed in groups


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the 20 % and 80 % quantiles over the samples. `host`: median seconds to enqueue."""

    median: float
    q20: float
    q80: float
    samples: int
    host: float | None = None

    @property
    def spread(self) -> float:
        return (self.q80 - self.q20) / self.median

    @staticmethod
    def of(samples: Sequence[float], host: Sequence[float] = ()) -> Timing:
        ordered = sorted(samples)

        def quantile(q: float) -> float:
            at = q * (len(ordered) - 1)
            low = int(at)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

        return Timing(
            quantile(0.5), quantile(0.2), quantile(0.8), len(ordered), statistics.median(host) if host else None
        )


@dataclass
class Result:
    """One peer in one row. status: ok, red (failed the gate), error (raised), unsupported (no such op), missing."""

    status: str = "missing"
    reason: str | None = None
    check: Check | None = None
    timing: Timing | None = None
    backend: str | None = None
    kernel: str | None = None


@dataclass
class Row:
    """One case in one direction. `ceilings` holds the timings of `copy` and, on a GPU, `mover`. `lacking_cpus`: how
    many CPUs other programs took, on average, from the threads that were measured (None where it is not known)."""

    case: Case
    direction: str
    subject: str
    results: dict[str, Result] = field(default_factory=dict)
    ceilings: dict[str, Timing] = field(default_factory=dict)
    torch_error: float | None = None
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
        timing = self.results.get(peer, Result()).timing
        return timing.median if timing else None

    def ratio(self, peer: str) -> float | None:
        """How many times as fast the subject is as `peer`."""
        own, other = self.median(self.subject), self.median(peer)
        return other / own if own and other else None

    def best_peer(self) -> str | None:
        timed = {n: r.timing.median for n, r in self.results.items() if n != self.subject and r.timing}
        return min(timed, key=timed.__getitem__) if timed else None

    def fraction(self, ceiling: str, peer: str | None = None) -> float | None:
        """The part of the ceiling's bandwidth that the peer (default: the subject) reaches."""
        own = self.median(peer or self.subject)
        return self.ceilings[ceiling].median / own if own and ceiling in self.ceilings else None


@dataclass(frozen=True)
class Settings:
    """`min_time`: seconds for one peer in one row (slow calls take longer: `min_rounds` turns each at the least).
    `retries`: how often a contended row is measured again."""

    device: str = "cpu"
    min_time: float = 0.15
    min_rounds: int = 5
    max_rounds: int = 15
    retries: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Call:
    """What is timed: `fn` on one of `inputs` after another."""

    fn: Callable[[Tensor], object]
    inputs: Sequence[Tensor]
    context: Callable[[], AbstractContextManager] = nullcontext


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rounds(estimates: Sequence[float], s: Settings) -> int:
    return max(s.min_rounds, min(s.max_rounds, int(s.min_time / max(estimates))))


def _time_cpu(calls: dict[str, Call], s: Settings) -> dict[str, Timing]:
    now = time.perf_counter
    estimates = {}
    for name, call in calls.items():
        with call.context():
            call.fn(call.inputs[0])
            start = now()
            call.fn(call.inputs[-1])
            estimates[name] = max(now() - start, 1e-7)
    rounds = _rounds(list(estimates.values()), s)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turn = dict.fromkeys(calls, 0)
    shuffle = random.Random(s.seed)
    with _no_collector():
        for _ in range(rounds):
            for name, call in shuffle.sample(list(calls.items()), len(calls)):
                fn, inputs, at = call.fn, call.inputs, turn[name]
                group = max(1, math.ceil(SAMPLE_SECONDS / estimates[name]))
                repeats = max(1, round(s.min_time / rounds / (estimates[name] * group)))
                with call.context():
                    if estimates[name] < WARM_SECONDS:  # the peer before has left its own data in the caches
                        fn(inputs[at % len(inputs)])
                        at += 1
                    for _ in range(repeats):
                        batch = [inputs[(at + j) % len(inputs)] for j in range(group)]
                        at += group
                        start = now()
                        for x in batch:
                            out = fn(x)
                        samples[name].append((now() - start) / group)
                        del out
                turn[name] = at
    return {name: Timing.of(v) for name, v in samples.items()}


def _cpu_seconds() -> tuple[float, float] | None:
    """CPU seconds that the whole machine and that this process have used so far; None where it cannot be known."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), time.process_time()


def _time_undisturbed(calls: dict[str, Call], s: Settings) -> tuple[dict[str, Timing], float | None]:
    """`_time_cpu`, again if contended; the least contended timings, and how many CPUs they lacked."""
    spare = (os.cpu_count() or 1) - torch.get_num_threads()
    best: tuple[dict[str, Timing], float | None] = {}, math.inf
    for _ in range(1 + s.retries):
        start, before = time.monotonic(), _cpu_seconds()
        timings = _time_cpu(calls, s)
        after = _cpu_seconds()
        if before is None or after is None:
            return timings, None
        others = (after[0] - before[0] - (after[1] - before[1])) / (time.monotonic() - start)
        lacking = max(0.0, others - spare)
        if lacking < best[1]:
            best = timings, lacking
        if lacking <= CONTENDED_CPUS:
            break
    return best


def _time_gpu(calls: dict[str, Call], s: Settings) -> dict[str, Timing]:
    cuda, now = torch.cuda, time.perf_counter
    flush = torch.empty(256 << 20, dtype=torch.int8, device=s.device)

    def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def once(call: Call, turn: int, spin: int) -> tuple[torch.cuda.Event, torch.cuda.Event, float]:
        start, end = events()
        x = call.inputs[turn % len(call.inputs)]
        flush.zero_()
        cuda._sleep(spin)
        start.record()
        at = now()
        call.fn(x)
        host = now() - at
        end.record()
        return start, end, host

    estimates, spins = {}, {}
    for name, call in calls.items():
        with call.context():
            for _ in range(3):
                start, end, host = once(call, 0, 0)
                cuda.synchronize()
            estimates[name] = max(start.elapsed_time(end) * 1e-3, 1e-6)
            spins[name] = int(2e9 * min(2e-3, 2 * host + 50e-6))  # cycles, at 2 GHz or less
    shuffle = random.Random(s.seed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(s.min_rounds, min(100, int(s.min_time / max(estimates.values()))))
    with _no_collector():
        for turn in range(rounds):
            for name, call in shuffle.sample(list(calls.items()), len(calls)):
                repeats = max(1, min(8, round(s.min_time / rounds / estimates[name])))
                with call.context():
                    pending = [once(call, turn * repeats + i, spins[name]) for i in range(repeats)]
                cuda.synchronize()
                samples[name] += [start.elapsed_time(end) * 1e-3 for start, end, _ in pending]
                hosts[name] += [host for _, _, host in pending]
    return {name: Timing.of(samples[name], hosts[name]) for name in calls}


def _rotation(tensor_bytes: int, s: Settings) -> int:
    """How many inputs a call goes through, so that a CPU's cache does not hold them."""
    return max(2, min(32, math.ceil(ROTATED_BYTES / tensor_bytes))) if s.device == "cpu" else 2


def _ceilings(case: Case, direction: str, s: Settings) -> dict[str, Call]:
    half = max(1, case.bytes // 8)  # float32 elements on each side
    sources = [torch.zeros(half, device=s.device) for _ in range(_rotation(4 * half, s))]
    target = torch.zeros(half, device=s.device)
    calls = {COPY: Call(target.copy_, sources)}
    if s.device != "cpu":
        from . import mover

        g, item = case.geometry, case.torch_dtype.itemsize
        sizes = (g.n * g.c * g.h * g.w * item, g.n * g.c * g.oh * g.ow * item)
        src, dst = mover.buffers(*(sizes if direction == "forward" else sizes[::-1]), device=torch.device(s.device))
        calls[MOVER] = Call(lambda x: mover.move(x, dst), [src])
    return calls


def _poison(case: Case, direction: str, s: Settings) -> None:
    """Leave NaNs in the memory that the allocator is likely to hand to the result."""
    g = case.geometry
    torch.full(g.output if direction == "forward" else g.input, math.nan, dtype=case.torch_dtype, device=s.device)


def measure(case: Case, direction: str, peers: Sequence[Peer], s: Settings) -> Row:
    """Gate and time every peer on one case. Exceptions of a peer end in its `Result`; KeyboardInterrupt passes."""
    subject = next(p.name for p in peers if p.subject)
    row = Row(case, direction, subject)
    given = case.tensor(direction, s.device, s.seed)
    x = given if direction == "forward" else case.tensor("forward", s.device, s.seed + 1)

    def bind(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return fn if direction == "forward" else autograd_backward(fn, x)

    expected = bind(lambda t: F.interpolate(t, **case.kwargs()))(given)
    gate = Gate(case, direction, given, expected)
    row.torch_error = gate.torch_error
    del expected
    inputs = [given] + [given.clone() for _ in range(_rotation(given.nbytes, s) - 1)]
    calls: dict[str, Call] = {}
    for peer in peers:
        result = row.results[peer.name] = Result()
        if reason := peer.refuses(case, direction):
            result.status, result.reason = "unsupported", reason
            continue
        try:
            with peer.context():
                fn = bind(peer.make(case))
                _poison(case, direction, s)
                out = fn(given)
                result.check = gate.check(out, keep_layout=peer.subject)
                result.backend, result.kernel = peer.explain(case, direction, x)
        except peer.refusal as error:
            result.status, result.reason = "unsupported", str(error)
            continue
        except Exception as error:  # one peer's failure is a line in the report, not the end of the run
            result.status, result.reason = "error", f"{type(error).__name__}: {error}"
            continue
        # Eager torch sets the budget, so it is timed whatever its error is.
        if result.check.reason and peer.name != "torch":
            result.status, result.reason = "red", result.check.reason
            continue
        result.status = "ok"
        calls[peer.name] = Call(fn, inputs, peer.context)
    if row.status == "ok":
        calls |= _ceilings(case, direction, s)
        if s.device == "cpu":
            timings, row.lacking_cpus = _time_undisturbed(calls, s)
        else:
            timings = _time_gpu(calls, s)
        for name, timing in timings.items():
            if name in row.results:
                row.results[name].timing = timing
            else:
                row.ceilings[name] = timing
    return row


def run(
    cases: Sequence[Case],
    directions: Sequence[str],
    peers: Sequence[Peer],
    s: Settings,
    before: Callable[[Row], None] = lambda row: None,
    after: Callable[[list[Row]], None] = lambda rows: None,
) -> tuple[list[Row], bool]:
    """Measure all cases. Returns a row for each, those not reached with status "missing", and whether it was
    interrupted (KeyboardInterrupt). `before` gets the row that comes next, `after` all rows after each one."""
    if sum(p.subject for p in peers) != 1:
        raise ValueError(f"peers: expected exactly one subject, got {[p.name for p in peers if p.subject]}")
    subject = next(p.name for p in peers if p.subject)
    rows = [Row(case, direction, subject) for case in cases for direction in directions]
    try:
        for i, row in enumerate(rows):
            before(row)
            try:
                rows[i] = measure(row.case, row.direction, peers, s)
            except Exception as error:  # the machine's memory, say; the other rows are still worth having
                row.results[subject] = Result("error", f"{type(error).__name__}: {error}")
            after(rows)
    except KeyboardInterrupt:
        return rows, True
    return rows, False
