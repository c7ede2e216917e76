"""What :func:`aeup.swap` measures where it is asked to: a model's forward without aeup and with it."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["SwapBenchmark", "compare"]


@dataclass(frozen=True)
class SwapBenchmark:
    """Forward before and after, without gradients, measured in turns. Times are medians in milliseconds; `ratio` is
    before / after, the median over the rounds with its `quartiles`; `difference` is the largest difference of outputs,
    relative to the largest output."""

    device: str
    before: float
    after: float
    ratio: float
    quartiles: tuple[float, float]
    difference: float

    @property
    def gained(self) -> bool:
        return self.quartiles[0] > 1

    def __str__(self) -> str:
        times = f"{self.before:.3f} ms -> {self.after:.3f} ms, " if self.device != "cpu" else ""
        low, high = self.quartiles
        verdict = "" if self.gained else ("slower: " if high < 1 else "nothing was gained: ")
        return (
            f"{verdict}{times}{self.ratio:.2f}x (quartiles {low:.2f} to {high:.2f}) on {self.device}; outputs differ "
            f"by {self.difference:.1e} of the largest"
        )


def compare(model: nn.Module, inputs, swapped: Callable[[bool], None]) -> SwapBenchmark:
    """`swapped` puts aeup in, or takes it out; it is out before and after, whatever fails."""
    args, kwargs = _arguments(inputs)
    training = [(m, m.training) for m in model.modules()]
    tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)] + list(model.parameters())
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))

    def output() -> list[torch.Tensor]:
        torch.manual_seed(0)  # models that sample
        return [t.double() for t in tree_leaves(_plain(model(*args, **kwargs))) if torch.is_tensor(t)]

    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            before = output()
            swapped(True)
            after = output()
            swapped(False)
            both = [(b, a) for b, a in zip(before, after, strict=True) if b.numel()]
            largest = max((b.abs().max().item() for b, _ in both), default=0.0)
            difference = max(((a - b).abs().max().item() for b, a in both), default=0.0) / (largest or 1.0)
            del before, after, both
            rounds = _rounds(lambda: model(*args, **kwargs), swapped, device)
    finally:
        swapped(False)
        for module, mode in training:
            module.training = mode
    ratios = sorted(b / a for b, a in rounds)
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = (statistics.median(times) for times in zip(*rounds, strict=True))
    return SwapBenchmark(device.type, *medians, statistics.median(ratios), (low, high), difference)


def _arguments(inputs) -> tuple[tuple, dict]:
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if torch.is_tensor(inputs):
        return (inputs,), {}
    raise TypeError(f"aeup.swap: benchmark must be a tensor, a tuple or a dict, got {type(inputs).__name__}")


def _plain(output):
    """Outputs that are no pytree (a library's dataclass) as one."""
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):
        return [getattr(output, f.name) for f in dataclasses.fields(output)]
    return dict(output) if isinstance(output, Mapping) else output


def _rounds(run: Callable, swapped: Callable[[bool], None], device: torch.device) -> list[tuple[float, float]]:
    """(before, after) in milliseconds a call, once per round; the order within a round alternates."""
    gpu = device.type == "cuda"

    def measure(calls: int) -> float:
        if gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize(device)
            return start.elapsed_time(end) / calls
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) * 1e3 / calls

    warm = []
    for on in (False, True):
        swapped(on)
        measure(2)
        warm.append(measure(1))
        swapped(False)
    once = max(*warm, 1e-3)
    calls = max(1, min(100, int(20 / once)))
    rounds = []
    for i in range(max(5, min(25, int(4000 / (2 * once * calls))))):
        times = {}
        for on in (i % 2 == 1, i % 2 == 0):
            swapped(on)
            times[on] = measure(calls)
            swapped(False)
        rounds.append((times[False], times[True]))
    return rounds
