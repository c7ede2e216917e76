"""How long calls take, measured side by side.

CPU: peers take turns in slices of equal time, in random order, so that drift of the machine and what one leaves in
the caches hit all alike; each call reads another input of a set of at least 64 MB. Where other programs took CPUs
that the measured threads needed, the row is measured again, and called contended if that did not help: a thread that
waits for its CPU turns a millisecond into a scheduler's tick, for every peer alike, and ratios then mean nothing.
GPU, device time: before each call the L2 cache is flushed, and a spin kernel keeps the device busy while the host
enqueues the call, so that CUDA events see device time alone; the host's time to enqueue is kept apart. The host
synchronises between rounds only.
GPU, eager time: batches of calls one after another, nothing in between, the wall clock after a synchronisation divided
by the number of calls: the larger one of the device's and the host's time, as a program sees it.
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
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SPIN = 20e-3  # seconds: covers the host's time of a whole model's step
WARM_SECONDS = 5e-3  # a CPU slice of calls shorter than this begins with an untimed one
CONTENDED_CPUS = 0.2
SAMPLE_SECONDS = 50e-6  # a CPU sample is at least this long: shorter calls are timed in groups
EAGER_BATCHES = 5
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


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


@dataclass(frozen=True)
class Settings:
    """`min_time`: seconds for one peer in one row (slow calls take longer: `min_rounds` turns each at the least).
    `retries`: how often a contended row is measured again. `eager`: on a GPU, measure eager time as well. `clock`: on a
    CPU, one of `CLOCKS`; the processor's time is that of one thread, and other programs do not count in it."""

    device: str = "cpu"
    min_time: float = 0.15
    min_rounds: int = 5
    max_rounds: int = 15
    retries: int = 1
    seed: int = 0
    eager: bool = False
    clock: str = "wall"


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


def time_cpu(calls: dict[str, Call], s: Settings) -> dict[str, Timing]:
    now = CLOCKS[s.clock]
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


def cpu_seconds() -> tuple[float, float] | None:
    """CPU seconds that the whole machine and that this process have used so far; None where it cannot be known."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), time.process_time()


def time_undisturbed(calls: dict[str, Call], s: Settings) -> tuple[dict[str, Timing], float | None]:
    """`time_cpu`, again if contended; the least contended timings, and how many CPUs they lacked."""
    if s.clock == "processor":
        return time_cpu(calls, s), None
    spare = (os.cpu_count() or 1) - torch.get_num_threads()
    best: tuple[dict[str, Timing], float | None] = {}, math.inf
    for _ in range(1 + s.retries):
        start, before = time.monotonic(), cpu_seconds()
        timings = time_cpu(calls, s)
        after = cpu_seconds()
        if before is None or after is None:
            return timings, None
        others = (after[0] - before[0] - (after[1] - before[1])) / (time.monotonic() - start)
        lacking = max(0.0, others - spare)
        if lacking < best[1]:
            best = timings, lacking
        if lacking <= CONTENDED_CPUS:
            break
    return best


def time_gpu(calls: dict[str, Call], s: Settings) -> dict[str, Timing]:
    """Device time."""
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

    costs, spins = {}, {}  # of one sample: wall-clock seconds, flush and spin included; cycles of the spin
    for name, call in calls.items():
        with call.context():
            spin = 0
            for _ in range(4):
                at = now()
                _, _, host = once(call, 0, spin)
                cuda.synchronize()
                costs[name] = now() - at
                spin = spins[name] = int(2e9 * min(MOST_SPIN, 2 * host + 50e-6))  # at 2 GHz or less
    shuffle = random.Random(s.seed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(s.min_rounds, min(100, int(s.min_time / max(costs.values()))))
    with _no_collector():
        for turn in range(rounds):
            for name, call in shuffle.sample(list(calls.items()), len(calls)):
                repeats = max(1, min(8, round(s.min_time / rounds / costs[name])))
                with call.context():
                    pending = [once(call, turn * repeats + i, spins[name]) for i in range(repeats)]
                cuda.synchronize()
                samples[name] += [start.elapsed_time(end) * 1e-3 for start, end, _ in pending]
                hosts[name] += [host for _, _, host in pending]
    return {name: Timing.of(samples[name], hosts[name]) for name in calls}


def time_eager(calls: dict[str, Call], s: Settings) -> dict[str, Timing]:
    """Eager time on a GPU: each sample is a batch of calls."""
    now = time.perf_counter

    def batch(call: Call, n: int) -> float:
        fn, inputs, rotation = call.fn, call.inputs, len(call.inputs)
        with call.context():
            torch.cuda.synchronize()
            start = now()
            for i in range(n):
                fn(inputs[i % rotation])
            torch.cuda.synchronize()
            return (now() - start) / n

    sizes = {}
    for name, call in calls.items():
        batch(call, 2)
        sizes[name] = max(4, min(200, int(s.min_time / EAGER_BATCHES / batch(call, 4))))
    shuffle = random.Random(s.seed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _no_collector():
        for _ in range(EAGER_BATCHES):
            for name, call in shuffle.sample(list(calls.items()), len(calls)):
                samples[name].append(batch(call, sizes[name]))
    return {name: Timing.of(v) for name, v in samples.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """How far the call raises torch's allocated GPU memory above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
