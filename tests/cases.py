"""The table of resampling cases: what every implementation is checked on, and the error budget (rule 8)."""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMOOTH = ("bilinear", "bicubic")
MODES = ("nearest", "nearest-exact", *SMOOTH)

# Geometries: integer and other scales, up and down, each axis its own, one pixel, sizes that fill no register.
GEOMETRIES = (
    {"scale_factor": 2},
    {"scale_factor": 3},
    {"scale_factor": (4, 8)},
    {"scale_factor": (1.7, 2.3)},
    {"scale_factor": (0.6, 1.3)},
    {"scale_factor": (1.7, 0.6), "recompute_scale_factor": True},
    {"size": (23, 37)},
    {"size": (5, 6)},
    {"size": (9, 29)},
    {"size": (1, 1)},
    {"size": (131, 40)},
)
OPTIONS = {
    "nearest": ({},),
    "nearest-exact": ({},),
    "bilinear": ({}, {"align_corners": True}, {"antialias": True}),
    "bicubic": ({}, {"align_corners": True}, {"antialias": True}),
}


@dataclass(frozen=True)
class Case:
    mode: str
    kwargs: dict = field(hash=False)
    shape: tuple = (2, 3, 9, 13)

    def __str__(self):
        options = "-".join(f"{k}={v}" for k, v in self.kwargs.items()).replace(" ", "")
        return f"{self.mode}-{options}-{'x'.join(map(str, self.shape))}"

    def call(self, fn, x):
        return fn(x, mode=self.mode, **self.kwargs)


def cases(shapes=((2, 3, 9, 13),)):
    for mode, geometry, shape in itertools.product(MODES, GEOMETRIES, shapes):
        for option in OPTIONS[mode]:
            yield Case(mode, {**geometry, **option}, shape)


def sample(case, dtype, layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.shape, generator=g, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


def torch_serves(case, dtype):
    """torch has no antialias in half precision on the CPU."""
    return not (case.kwargs.get("antialias") and dtype in (torch.bfloat16, torch.float16))


def gradient(fn, case, x, grad):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return torch.autograd.grad(case.call(fn, x), x, grad)[0]


def check_budget(got, reference, torch_result, floor_ulps=2, terms=0):
    """got's largest error against the float64 `reference` is at most twice torch's own plus a few ulps; the same on
    the borders alone. In float64 torch is the reference: positions carry rounding of the order of the axis length, sums
    of many `terms` that of a random walk."""
    assert got.shape == reference.shape
    assert torch.isfinite(got).all(), "unwritten (poisoned) or non-finite output"
    scale = reference.abs().max().item()
    ulps = floor_ulps if got.dtype != torch.float64 else max(16 + 2 * max(reference.shape[-2:]), terms**0.5)
    floor = ulps * torch.finfo(got.dtype).eps * scale

    def error(a):
        return (a.double() - reference).abs()

    budget = 2 * error(torch_result) if torch_result is not None else torch.zeros_like(reference)
    edge = torch.zeros(reference.shape[-2:], dtype=torch.bool, device=reference.device)
    edge[[0, -1], :] = True
    edge[:, [0, -1]] = True
    for name, where in (("everywhere", torch.ones_like(edge)), ("on the border", edge)):
        errors, allowed = error(got)[..., where], budget[..., where].max().item() + floor
        if not errors.max() <= allowed:
            at = torch.unravel_index((error(got) * where).argmax(), got.shape)
            at = tuple(int(i) for i in at)
            raise AssertionError(
                f"error {errors.max().item():.3g}, allowed {allowed:.3g}, {name}; {int((errors > allowed).sum())} of "
                f"{errors.numel()} elements; worst at {at} of {tuple(got.shape)}: {got[at]}, not {reference[at]}"
            )


def reference_of(case, x):
    return case.call(F.interpolate, x.double())
