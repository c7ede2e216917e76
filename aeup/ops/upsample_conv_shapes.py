"""The geometry of an upsampling with the convolution after it: sizes, checked, and the transposed convolution that it
is where the upsampling repeats pixels."""

from functools import lru_cache
from typing import NamedTuple

import torch

from aeup.ops.conv_shapes import Geometry, geometry, int_pair, same_padding
from aeup.ops.interpolate import MODES, Map, map_of


class UpsampleGeometry(NamedTuple):
    """x [N, ci, ih, iw], resampled by `m` to [N, ci, uh, uw], convolved with w [co, ci / groups, kh, kw] at stride 1
    and zero padding p to y [N, co, oh, ow]."""

    m: Map
    ci: int
    co: int
    oh: int
    ow: int
    kh: int
    kw: int
    ph: int
    pw: int
    groups: int

    @property
    def input_size(self) -> tuple:
        return self.m.ih, self.m.iw

    @property
    def size(self) -> tuple:
        return self.m.oh, self.m.ow

    @property
    def kernel_size(self) -> tuple:
        return self.kh, self.kw

    @property
    def padding(self) -> tuple:
        return self.ph, self.pw

    @property
    def weight_shape(self) -> tuple:
        return self.co, self.ci // self.groups, self.kh, self.kw


def upsample_geometry(name: str, m: Map, ci, w_shape, ph, pw, groups) -> UpsampleGeometry:
    """Raises RuntimeError, as torch's convolution, where the sizes do not go together; ValueError for another mode."""
    if m.mode not in MODES:
        raise ValueError(f"{name}: mode must be one of {', '.join(MODES)}; got {m.mode!r}")
    if m.ih < 1 or m.iw < 1 or m.oh < 1 or m.ow < 1 or ci < 1:
        raise RuntimeError(
            f"{name}: input channels and sizes should be greater than 0, got {ci} channels, input (H: {m.ih}, W: "
            f"{m.iw}), upsampled (H: {m.oh}, W: {m.ow})"
        )
    if len(w_shape) != 4:
        raise RuntimeError(
            f"{name}: expected a 4-D weight [out_channels, in_channels / groups, kH, kW], got shape {list(w_shape)}"
        )
    if groups < 1:
        raise RuntimeError(f"{name}: groups must be at least 1, got {groups}")
    if ph < 0 or pw < 0:
        raise RuntimeError(f"{name}: negative padding is not supported, got {(ph, pw)}")
    co, cig, kh, kw = w_shape
    if cig * groups != ci:
        raise RuntimeError(
            f"{name}: given groups={groups}, weight of size {list(w_shape)}, expected input to have {cig * groups} "
            f"channels, but got {ci} channels instead"
        )
    if co < 1 or co % groups != 0 or kh < 1 or kw < 1:
        raise RuntimeError(
            f"{name}: expected a weight without empty dimensions, whose first is divisible by groups={groups}, got "
            f"size {list(w_shape)}"
        )
    oh, ow = m.oh + 2 * ph - kh + 1, m.ow + 2 * pw - kw + 1
    if oh < 1 or ow < 1:
        raise RuntimeError(
            f"{name}: padded upsampled size: ({m.oh + 2 * ph} x {m.ow + 2 * pw}). Kernel size: ({kh} x {kw}). Kernel "
            "size can't be greater than the padded upsampled size"
        )
    return UpsampleGeometry(m, ci, co, oh, ow, kh, kw, ph, pw, groups)


# --- the fold ---


class Fold(NamedTuple):
    """The transposed convolution that an upsampling by whole repetition with its convolution is, borders included.

    Along an axis with scale s, kernel k and padding p it has kernel k + s - 1 (and `extra` zeros on both sides where
    p > k - 1), stride s and padding k - 1 - p; its weight at t is the sum of w[j] over 0 <= r < s with
    r - j + k - 1 = t."""

    g: Geometry
    extra: tuple


@lru_cache(1024)
def fold(g: UpsampleGeometry) -> Fold | None:
    """None where the upsampling does not repeat every pixel the same whole number of times."""
    m = g.m
    if not (m.mode.startswith("nearest") and _repeats(m.ih, m.oh, m.mode, m.scale_h)):
        return None
    if not _repeats(m.iw, m.ow, m.mode, m.scale_w):
        return None
    sh, sw = m.oh // m.ih, m.ow // m.iw
    extra = max(g.ph - g.kh + 1, 0), max(g.pw - g.kw + 1, 0)
    kernel = g.kh + sh - 1 + 2 * extra[0], g.kw + sw - 1 + 2 * extra[1]
    padding = max(g.kh - 1 - g.ph, 0), max(g.kw - 1 - g.pw, 0)
    shape = (g.ci, g.co // g.groups, *kernel)
    found = geometry((1, g.ci, m.ih, m.iw), shape, sh, sw, *padding, 0, 0, g.groups, 1, 1)
    assert (found.oh, found.ow) == (g.oh, g.ow)
    return Fold(found, extra)


@lru_cache(1024)
def _repeats(i: int, o: int, mode: str, scale: float | None) -> bool:
    """Whether torch's nearest takes input j for the outputs [j * s, (j + 1) * s), s = o / i, in float and in double."""
    if o % i != 0:
        return False
    s = o // i
    for dtype in (torch.float32, torch.float64):
        step = torch.tensor(i / o if scale is None else 1 / scale, dtype=dtype, device="cpu")
        index = torch.arange(o, dtype=dtype, device="cpu") + (0.5 if mode == "nearest-exact" else 0)
        index = (index * step).floor_().clamp_(max=i - 1).long()
        if not torch.equal(index, torch.arange(o, device="cpu") // s):
            return False
    return True


def upsample_geometry_of(x_shape, w_shape, scale_factor, mode, padding, groups) -> tuple[UpsampleGeometry, tuple]:
    """The geometry of an upsample_conv2d, and the rows and columns that "same" leaves out at the top and left."""
    return geometry_of_call(x_shape, w_shape, None, scale_factor, mode, None, padding, groups)


def check_upsampling(size, scale_factor, mode, align_corners) -> None:
    """Raises the error that :func:`aeup.upsample_conv2d` would raise of these arguments on any input."""
    geometry_of_call((1, 1, 2**24, 2**24), (1, 1, 1, 1), size, scale_factor, mode, align_corners, 0, 1)


def geometry_of_call(x_shape, w_shape, size, scale_factor, mode, align_corners, padding, groups):
    """The geometry, and the rows and columns to leave out at the top and left ("same" with an even kernel)."""
    name = "aeup.upsample_conv2d"
    if mode not in MODES:
        raise ValueError(f"{name}: mode must be one of {', '.join(MODES)}; got {mode!r}")
    if len(x_shape) != 4:
        raise RuntimeError(f"{name}: expected a 4-D input [N, C, H, W], got shape {list(x_shape)}")
    if x_shape[1] == 0:
        raise RuntimeError(f"{name}: expected an input with channels, got shape {list(x_shape)}")
    if len(w_shape) != 4:
        raise RuntimeError(
            f"{name}: expected a 4-D weight [out_channels, in_channels / groups, kH, kW], got shape {list(w_shape)}"
        )
    if size is not None and scale_factor == 2:
        scale_factor = None
    m = map_of(tuple(x_shape[2:]), size, scale_factor, mode, align_corners, None, False)
    crop = (0, 0)
    if padding == "valid":
        pads = (0, 0)
    elif padding == "same":
        pads, crop = same_padding(w_shape[2:])
    elif isinstance(padding, str):
        raise ValueError(f"{name}: padding must be an int, a pair of ints, 'same' or 'valid'; got {padding!r}")
    else:
        pads = int_pair(padding)
        if pads is None:
            raise TypeError(f"{name}: padding must be an int, a pair of ints, 'same' or 'valid'; got {padding!r}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{name}: groups must be an int, got {groups!r}")
    return upsample_geometry(name, m, x_shape[1], w_shape, *pads, groups), crop
