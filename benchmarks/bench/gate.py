"""The correctness gate: no result that fails it is timed.

A result passes if its largest error against float64 torch on the same inputs is at most twice torch's own largest
error at that dtype, plus 2 ulps at the largest reference value; and again on the border alone, where edges are
clamped. Nearest copies, so its forward must be exact; its reference uses the source indices that torch chooses at the
case's dtype and layout (float64's may differ). Its backward is a plain sum, so torch's error counts only as far as
rounding explains it: a torch that gathers from other indices than its forward widens no budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case

FLOOR_ULPS = 2


@dataclass(frozen=True)
class Check:
    """Largest absolute errors and what was allowed. `reason` is None if the check is green."""

    error: float
    budget: float
    border_error: float
    border_budget: float
    reason: str | None


def autograd_backward(fn, x: Tensor):
    """grad_output -> grad_input of `fn` at `x`, by `torch.autograd.grad` on one kept graph: the same for every peer."""
    leaf = x.detach().requires_grad_()
    y = fn(leaf)
    if not y.requires_grad:
        raise RuntimeError("the result does not require a gradient although the input does")
    return lambda g: torch.autograd.grad(y, leaf, g, retain_graph=True)[0]


def torch_result(case: Case, direction: str, x: Tensor, given: Tensor) -> Tensor:
    """Eager torch on `given` (input or output gradient); `x` is an input of the right shape."""
    if direction == "forward":
        return F.interpolate(given, **case.kwargs())
    return autograd_backward(lambda t: F.interpolate(t, **case.kwargs()), x)(given)


def nearest_sources(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source row of each output row [oh] and source column of each output column [ow], as torch chooses them."""
    g = case.geometry

    def probe(values: Tensor) -> Tensor:  # [h, w] of whole numbers below 128, exact in every dtype -> [oh, ow]
        x = values.to(case.torch_dtype).expand(1, g.c, g.h, g.w).contiguous(memory_format=case.memory_format)
        return F.interpolate(x, **case.kwargs())[0, 0].long()

    rows = torch.arange(g.h, device=device)[:, None].expand(g.h, g.w)
    cols = torch.arange(g.w, device=device)[None, :].expand(g.h, g.w)
    row = probe(rows // 128)[:, 0] * 128 + probe(rows % 128)[:, 0]
    col = probe(cols // 128)[0] * 128 + probe(cols % 128)[0]
    return row, col


def reference(case: Case, direction: str, given: Tensor) -> Tensor:
    """The float64 result [n, c, h, w] for `given` (input or output gradient)."""
    g, wide = case.geometry, given.detach().double().contiguous()
    if case.mode.startswith("nearest"):
        row, col = nearest_sources(case, given.device)
        if direction == "forward":
            return wide.index_select(2, row).index_select(3, col)
        pick_rows = F.one_hot(row, g.h).double()  # [oh, h]
        pick_cols = F.one_hot(col, g.w).double()  # [ow, w]
        return pick_rows.t() @ (wide @ pick_cols)
    x = wide if direction == "forward" else wide.new_zeros(g.input)
    return torch_result(case, direction, x, wide)


def _error_maps(result: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """Largest error and largest reference value over batch and channels, each [h, w]. NaN stays NaN."""
    return (result.double() - ref).abs_().amax((0, 1)), ref.abs().amax((0, 1))


def _worst(m: Tensor, frame: tuple[int, int]) -> tuple[float, float]:
    """Largest value of a map [h, w], everywhere and on the frame of the given height and width alone."""
    h, w = (min(f, s) for f, s in zip(frame, m.shape, strict=True))
    edges = torch.stack([m[:h].max(), m[-h:].max(), m[:, :w].max(), m[:, -w:].max()])
    return m.max().item(), edges.max().item()


class Gate:
    """Holds the reference and torch's own error for one case and direction."""

    def __init__(self, case: Case, direction: str, given: Tensor, torch_out: Tensor):
        self.case, self.direction = case, direction
        self.ref = reference(case, direction, given)
        g = case.geometry
        # Rows and columns of the result that a clamped tap can reach: two input pixels.
        reach = (math.ceil(g.oh / g.h), math.ceil(g.ow / g.w)) if direction == "forward" else (1, 1)
        self.frame = (2 * reach[0], 2 * reach[1])
        self.torch_stride = torch_out.stride()
        errors, sizes = _error_maps(torch_out, self.ref)
        floor = FLOOR_ULPS * torch.finfo(case.torch_dtype).eps
        self.torch_error, self.torch_border_error = _worst(errors, self.frame)
        size, border_size = _worst(sizes, self.frame)
        cap = math.inf
        if case.mode.startswith("nearest"):
            terms = math.ceil(g.oh / g.h) * math.ceil(g.ow / g.w)
            cap = terms * torch.finfo(torch.float32).eps if direction == "backward" else 0.0
            floor = floor if direction == "backward" else 0.0
        self.budget = 2 * min(self.torch_error, cap * size) + floor * size
        self.border_budget = 2 * min(self.torch_border_error, cap * border_size) + floor * border_size

    def check(self, result: Tensor, keep_layout: bool = False) -> Check:
        """Judge a result. `keep_layout`: its strides must be torch's; a gradient may also keep the case's layout, where
        torch itself loses it."""
        nan, case = math.nan, self.case
        if result.shape != self.ref.shape:
            return Check(nan, nan, nan, nan, f"shape {tuple(result.shape)}, expected {tuple(self.ref.shape)}")
        if result.dtype != case.torch_dtype:
            return Check(nan, nan, nan, nan, f"dtype {result.dtype}, expected {case.torch_dtype}")
        error, border_error = _worst(_error_maps(result, self.ref)[0], self.frame)
        reason = None
        if not error <= self.budget:  # also catches NaN
            reason = f"error {error:.3g} above the budget {self.budget:.3g}"
        elif not border_error <= self.border_budget:
            reason = f"error {border_error:.3g} on the border above the budget {self.border_budget:.3g}"
        elif keep_layout and result.stride() != self.torch_stride:
            if self.direction == "forward" or not result.is_contiguous(memory_format=case.memory_format):
                reason = f"strides {result.stride()}, torch has {self.torch_stride}"
        return Check(error, self.budget, border_error, self.border_budget, reason)
