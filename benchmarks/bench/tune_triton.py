"""The part of `aeup bench --tune` that searches sizes for the Triton kernels: tiles, warps, stages. See tune.

Each problem that the kernels ask the tuned tables for (kernels/triton/plans.py) is searched on at most two of the
benchmark's calls that ask for it, the smallest and the largest: from the shipped sizes, one number at a time, up and
down its list, as long as that is faster. Sizes count only if every result passes the gate. The best ones are then timed
against the shipped ones in turns, and kept if they are faster in every turn. Times are the device's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from aeup.kernels import plans

from .report import geometric_mean
from .timing import Settings, time_gpu
from .tune import MARGIN, Clock, Deadline, Table, Task, Trial

TURNS = 3
_STRIPS = {"lanes": (64, 128, 256, 512), "rows": (1, 2, 4, 8, 16, 32), "warps": (2, 4, 8)}
_TILES = {
    "m": (64, 128, 256),
    "n": (32, 64, 128, 256),
    "k": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4, 5),
}
SPACES = {  # by the beginning of the problem
    "poly": _STRIPS,
    "taps": _STRIPS,
    "banded": {"lanes": (64, 128, 256, 512, 1024), "warps": (2, 4, 8)},
    "batch_norm": {"lanes": (256, 512, 1024, 2048), "warps": (4, 8, 16), "stages": (1, 2, 3, 4)},
    "conv_epilogue": {"elements": (1024, 2048, 4096, 8192), "warps": (2, 4, 8)},
    "conv": _TILES,
    "resample": _TILES | {"m": (32, 64, 128), "n": (32, 64, 128)},
}
ACCUMULATORS = 128  # 32-bit registers per thread that a tile's sums may take
ITEMS = {"bf16": 2, "fp16": 2, "fp64": 8}


def device_clock(timed, s: Settings):
    return time_gpu(timed, s), None


def space_of(problem: str) -> dict[str, Sequence[int]]:
    return next(space for name, space in SPACES.items() if problem.startswith(name))


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may use."""
    if device.type != "cuda":
        return 99 << 10
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)


def allowed(problem: str, sizes: dict, shared: int) -> bool:
    """Whether it is worth a compilation: a tile must fit into registers and shared memory."""
    threads = 32 * sizes["warps"]
    if "m" not in sizes:
        return sizes.get("lanes", sizes.get("elements")) >= threads
    item = next((ITEMS[part] for part in problem.split(".") if part in ITEMS), 4)
    words = sizes["m"] * sizes["n"] * max(item, 4) // 4
    staged = (sizes["m"] + sizes["n"]) * sizes["k"] * item * sizes["stages"]
    return words <= ACCUMULATORS * threads and staged <= shared


def steps(problem: str, sizes: dict, name: str, up: bool, shared: int) -> Iterator[dict]:
    """Sizes with one number after the other of the list of `name`, away from the present one."""
    values = [v for v in space_of(problem)[name] if (v > sizes[name] if up else v < sizes[name])]
    for value in values if up else reversed(values):
        changed = sizes | {name: value}
        if name == "lanes":  # with the warps that it can fill
            changed["warps"] = min(sizes["warps"], value // 32)
        if allowed(problem, changed, shared):
            yield changed


def compile_ahead(problem: str, trials: Sequence[Trial], candidates: Sequence[dict]) -> None:
    """Compiles the kernels of the trials with each of the candidates, side by side; nothing is launched. What fails
    here fails again when it is tried, and is counted there."""
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    def compile_only(kernel, grid):
        return partial(kernel.warmup, grid=grid)

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
        patch.object(JITFunction, "__getitem__", compile_only),
    ):
        for sizes in candidates:
            for trial in trials:
                with suppress(Exception), trial.task.case.context(), torch.no_grad(), plans.trying({problem: sizes}):
                    trial.run("triton")(trial.args[0])


@dataclass
class Search:
    """The search of one problem. `seconds` of sizes that are wrong or fail are None."""

    problem: str
    trials: Sequence[Trial]
    settings: Settings
    clock: Clock
    ahead: Callable[[str, Sequence[Trial], Sequence[dict]], None] = lambda *_: None
    tried: int = 0
    failed: int = 0

    def seconds(self, sizes: dict) -> float | None:
        """Of a call, the geometric mean."""
        self.tried += 1
        found = []
        for trial in self.trials:
            with trial.task.case.context(), torch.no_grad(), plans.trying({self.problem: sizes}):
                if trial.wrong("triton"):
                    self.failed += 1
                    return None
                timings, _ = self.clock({"triton": trial.call("triton")}, self.settings)
                found.append(timings["triton"].median)
        return geometric_mean(found)

    def run(self, base: dict, shared: int, stop: Callable[[], bool]) -> tuple[dict, float]:
        """The best sizes found and the ratio of their time to that of `base`; `base` and 1 where none is faster."""
        best, least = base, self.seconds(base)
        if least is None:
            return base, 1.0
        known, moved, ways = [base], True, [(name, up) for name in space_of(self.problem) for up in (True, False)]
        while moved:
            moved = False
            nearest = [next(steps(self.problem, best, name, up, shared), base) for name, up in ways]
            self.ahead(self.problem, self.trials, [sizes for sizes in nearest if sizes not in known])
            for name, up in ways:
                for sizes in steps(self.problem, best, name, up, shared):
                    if stop():
                        return base, 1.0
                    if sizes in known:
                        break
                    known.append(sizes)
                    seconds = self.seconds(sizes)
                    if seconds is None or seconds >= least:
                        break
                    best, least, moved = sizes, seconds, True
        if best is base:
            return base, 1.0
        turns = [(self.seconds(best), self.seconds(base)) for _ in range(TURNS)]
        if not all(own and other for own, other in turns):
            return base, 1.0
        ratio = geometric_mean(own / other for own, other in turns)
        if max(own for own, _ in turns) < min(other for _, other in turns) and ratio * MARGIN <= 1:
            return best, ratio
        return base, 1.0


def problems(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Problem -> the tasks whose Triton kernels ask for it, from few pixels to many; the most asked for first."""
    found: dict[str, dict[int, Task]] = {}
    pixels = {}
    for task in tasks:
        kernel = task.op.kernels.get("triton")
        with task.case.context():
            if kernel is None or kernel.refuses(*task.args):
                continue
            pixels[task] = task.features()["pixels"]
            for problem in plans.problems(lambda run=kernel.run, args=task.args: run(*args)):
                found.setdefault(problem, []).append(task)
    found = {problem: sorted(asking, key=pixels.__getitem__) for problem, asking in found.items()}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def tune_triton(
    table: Table,
    todo: dict[str, list[Task]],
    name: str,
    s: Settings,
    deadline: Deadline,
    after: Callable[[str], None],
    clock: Clock = device_clock,
) -> int:
    """Searches the problems that the table does not have yet, until the deadline. `name`: of the device in the tables.
    Returns how many were left out. A KeyboardInterrupt passes; the table keeps what was found."""
    shared = shared_memory(table.device)
    for i, (problem, asking) in enumerate(todo.items()):
        if deadline.passed():
            return len(todo) - i
        if problem not in table.searched:
            trials = []
            for task in dict.fromkeys((asking[0], asking[-1])):
                with task.case.context(), torch.no_grad():
                    trials.append(Trial(task))
            base = plans.configuration(name, *problem.split("."))
            ahead = {"ahead": compile_ahead} if table.device.type == "cuda" else {}
            sizes, ratio = Search(problem, trials, s, clock, **ahead).run(base, shared, deadline.passed)
            if deadline.passed():
                return len(todo) - i
            table.searched[problem] = ratio
            if sizes is not base:
                table.sizes[problem] = sizes
        after(problem)
    return 0
