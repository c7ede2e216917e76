"""The correctness gate: no result that fails it is timed.

A result passes if its largest error against float64 torch on the same inputs is at most twice torch's own largest
error at that dtype class, plus 2 ulps at the largest reference value; and again on the border alone, where edges are
clamped or cut. What an op needs beyond that is in its `Part`s.

Where torch has two ways to the same result (its two layouts), its own error is the larger one of the two; the second
counts up to four times the first, so that a torch that is wrong in one of them admits nothing wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .workload import Case, Part

FLOOR_ULPS = 2
SECOND_TORCH = 4


@dataclass(frozen=True)
class Check:
    """Largest absolute errors and what was allowed. `reason` is None if the check is green."""

    error: float
    budget: float
    border_error: float
    border_budget: float
    reason: str | None

    @property
    def severity(self) -> tuple[bool, float]:
        """Orders checks: red ones, then those that came closest to the budget."""
        near = self.error / self.budget if self.budget else self.error
        return self.reason is not None, near if math.isfinite(near) else math.inf


def autograd_backward(fn: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """grad_output -> gradients of all `inputs` of `fn`, by `torch.autograd.grad` on one kept graph: the same for every
    peer."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves)
    if not y.requires_grad:
        raise RuntimeError("the result does not require a gradient although the input does")
    return lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True)


def _error_maps(result: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Largest error and largest reference value, over batch and channels [h, w], or over all [1, 1] where the part has
    no border. NaN stays NaN."""
    maps = (result.double() - part.reference).abs_(), part.reference.abs()
    return tuple(m.amax((0, 1)) if part.frame else m.amax().view(1, 1) for m in maps)


def _worst(m: Tensor, frame: tuple[int, int] | None) -> tuple[float, float]:
    """Largest value of a map [h, w], everywhere and on the frame of the given height and width alone."""
    h, w = (min(f, s) for f, s in zip(frame or m.shape, m.shape, strict=True))
    edges = torch.stack([m[:h].max(), m[-h:].max(), m[:, :w].max(), m[:, -w:].max()])
    return tuple(torch.stack([m.max(), edges.max()]).tolist())


def _strides(t: Tensor) -> list[int]:
    """Strides of the axes that have any: one of size 1 has no place in memory."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


class Judge:
    """Holds one part's reference and torch's own error."""

    def __init__(self, case: Case, direction: str, part: Part, torch_result: Tensor):
        self.case, self.direction, self.part = case, direction, part
        self.torch_strides = _strides(torch_result)
        errors, sizes = _error_maps(torch_result, part)
        self.first_errors = self.torch_errors = _worst(errors, part.frame)  # everywhere, on the border
        self.sizes = _worst(sizes, part.frame)

    def widen(self, torch_result: Tensor) -> None:
        """Take in another result of torch."""
        others = _worst(_error_maps(torch_result, self.part)[0], self.part.frame)
        every = zip(self.torch_errors, others, self.first_errors, strict=True)
        self.torch_errors = tuple(max(own, min(other, SECOND_TORCH * first)) for own, other, first in every)

    def _budget(self, at: int) -> float:
        part, size, torch_error = self.part, self.sizes[at], self.torch_errors[at]
        counted = torch_error if math.isinf(part.cap) else min(torch_error, part.cap * size)
        return 2 * counted + FLOOR_ULPS * (part.eps * size + part.noise)

    @property
    def budget(self) -> float:
        return self._budget(0)

    @property
    def border_budget(self) -> float:
        return self._budget(1)

    def check(self, result: Tensor, keep_layout: bool = False) -> Check:
        """Judge a result. `keep_layout`: its strides must be torch's; a gradient may also keep the case's layout, where
        torch itself loses it."""
        nan, case, part = math.nan, self.case, self.part
        if result.shape != part.reference.shape:
            return Check(nan, nan, nan, nan, f"shape {tuple(result.shape)}, expected {tuple(part.reference.shape)}")
        if result.dtype != case.torch_dtype:
            return Check(nan, nan, nan, nan, f"dtype {result.dtype}, expected {case.torch_dtype}")
        error, border_error = _worst(_error_maps(result, part)[0], part.frame)
        reason = None
        if not error <= self.budget:  # also catches NaN
            reason = f"error {error:.3g} above the budget {self.budget:.3g}"
        elif not border_error <= self.border_budget:
            reason = f"error {border_error:.3g} on the border above the budget {self.border_budget:.3g}"
        elif keep_layout and _strides(result) != self.torch_strides:
            kept = result.dim() == 4 and result.is_contiguous(memory_format=case.memory_format)
            if self.direction == "forward" or not kept:
                reason = f"strides {result.stride()}, torch has {self.torch_strides}"
        return Check(error, self.budget, border_error, self.border_budget, reason)


class Gate:
    """Judges what a case gives in one direction: the output, or the gradients of all inputs."""

    def __init__(self, case: Case, direction: str, parts: Sequence[Part], torch_results: Sequence[Tensor]):
        pairs = zip(parts, torch_results, strict=True)
        self.judges = [Judge(case, direction, part, result) for part, result in pairs]

    @property
    def torch_error(self) -> float:
        return max(judge.torch_errors[0] for judge in self.judges)

    def widen(self, torch_results: Sequence[Tensor]) -> None:
        """Take in what torch gives in another way."""
        for judge, result in zip(self.judges, torch_results, strict=True):
            judge.widen(result)

    def check(self, results: Sequence[Tensor], keep_layout: bool = False) -> dict[str, Check]:
        """The verdict on each part, by its name."""
        pairs = zip(self.judges, results, strict=True)
        return {judge.part.name: judge.check(result, keep_layout) for judge, result in pairs}
