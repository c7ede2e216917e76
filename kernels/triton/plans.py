"""From a geometry to kernel launches. Plain numbers only: no GPU, no Triton; one plan per geometry, cached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

from aeup import tuned

from .axis import TAPS, antialias_taps, integer_scale, make_axis, phases, transposed, window

# Item sizes in bytes and the types in which Triton names tensors and accumulators.
ITEMSIZE = {"fp32": 4, "fp64": 8, "fp16": 2, "bf16": 2, "u8": 1}
WIDE = 16  # bytes per access
PROGRAMS = 512  # where a configuration names no other number: below it strips become shorter, to fill the GPU
LIMIT32 = (1 << 31) - (1 << 20)  # elements that 32-bit offsets reach, with room for masked lanes
POLY_SCALES = (1, 2, 4, 8)
KEPT_WEIGHTS = 24  # candidate weights per column that taps_backward keeps in registers


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `buffers` name its tensors in order, `scalars` and `constants` its other arguments."""

    kernel: str
    buffers: tuple[str, ...]
    grid: int
    scalars: dict
    constants: dict
    warps: int


@dataclass(frozen=True)
class Plan:
    """`scratch`: name -> (elements, type name) of the buffers besides src and dst."""

    launches: tuple[Launch, ...]
    scratch: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if _asked:
            raise _PlannedError


# --- configurations ---

_trial: dict[str, dict] = {}  # what the tuner tries, before the tables
_asked: list[str] = []


class _PlannedError(Exception):
    pass


def configuration(device: str, *problem: str) -> dict:
    """The entry for `problem` (kernel, mode, layout, type) of this device in the tuned tables; its last parts may be
    missing there."""
    if _asked:
        _asked.append(".".join(problem))
    for table in (_trial, *tuned.triton(device)):
        for n in range(len(problem), 0, -1):
            if entry := table.get(".".join(problem[:n])):
                return entry
    raise KeyError(f"no configuration for {problem[0]}")


def forget() -> None:
    """Plans are made anew, from the tables as they are then."""
    for module in [m for name, m in sys.modules.items() if name.startswith(__package__ + ".")]:
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


tuned.on_change.append(forget)


@contextmanager
def trying(sizes: dict[str, dict]) -> Iterator[None]:
    """Inside, these problems have these sizes, whatever the tables say."""
    _trial.update(sizes)
    forget()
    try:
        yield
    finally:
        _trial.clear()
        forget()


def problems(call: Callable[[], object]) -> tuple[str, ...]:
    """The problems that the kernels of `call` would ask the tables for. Nothing is launched: `call` is stopped at its
    first plan."""
    forget()
    _asked.append("")  # recording
    try:
        call()
    except _PlannedError:
        pass
    finally:
        found = [tuple(problem.split(".")) for problem in dict.fromkeys(_asked[1:])]
        _asked.clear()
    full = {kernel: max(len(p) for p in found if p[0] == kernel) for kernel, *_ in found}  # the others ask for a class
    return tuple(".".join(p) for p in found if len(p) == full[p[0]])


def vector(elements: int, most: int) -> int:
    """The largest power of two that divides `elements`, at most `most`."""
    return min(elements & -elements, max(most, 1))


def _strips(rows: int, blocks: int, config: dict) -> tuple[int, int]:
    """Rows per strip and number of strips."""
    longest = config["rows"]
    while longest > 1 and blocks * -(-rows // longest) < config.get("programs", PROGRAMS):
        longest //= 2
    return longest, -(-rows // longest)


def _accumulator(dtype: str, copies: bool) -> str:
    return dtype if copies or dtype == "fp64" else "fp32"


def _poly(n, c, vertical, horizontal, dtype, nhwc, backward, device, wide) -> Plan | None:
    """Integer scales, or None where another kernel serves better."""
    sh, sw, mode = integer_scale(vertical), integer_scale(horizontal), vertical.mode
    if sh not in POLY_SCALES or sw not in POLY_SCALES:
        return None
    ih, iw, per_access = vertical.size_in, horizontal.size_in, WIDE // ITEMSIZE[dtype]
    ph, pw = phases(mode, sh), phases(mode, sw)
    taps = ph.before + 1 + ph.after
    acc = _accumulator(dtype, TAPS[mode] == 1 and not backward)
    words = max(ITEMSIZE[acc] // 4, 1)
    if nhwc:
        q, v = 1, vector(c, per_access)
        if not backward and v * 2 < per_access:
            return None  # few channels: taps_forward makes wider stores
    else:
        q, v = vector(iw, per_access // sw), 1
    down = transposed(mode, sw, q)
    if not backward and taps * sw * q * v * words > 96:
        return None  # the ring of filtered rows would not fit into registers
    while backward and v > 1 and (down.left + sw * q + down.right) * v * words > 64:
        v //= 2
    lw, cg = iw // q, c // v if nhwc else 1
    lanes = (n if nhwc else n * c) * lw * cg
    kernel = "poly_backward" if backward else "poly_forward"
    config = configuration(device, kernel, mode, "nhwc" if nhwc else "nchw", dtype)
    blocks = -(-lanes // config["lanes"])
    rows, strips = _strips(ih, blocks, config)
    constants = {"SH": sh, "LH": ph.before, "HH": ph.after, "WH": ph.weight, "SW": sw}
    if backward:
        constants |= {"LEFT": down.left, "RIGHT": down.right, "WT": down.weight, "LO": down.low, "HI": down.high}
    else:
        constants |= {"LW": pw.before, "HW": pw.after, "WW": pw.weight}
    constants |= {"Q": q, "V": v, "NHWC": nhwc, "ACC": acc, "IDX64": wide, "BW": config["lanes"], "R": rows}
    scalars = {"lanes": lanes, "strips": strips, "lw": lw, "cg": cg, "ih": ih}
    return Plan((Launch(kernel, ("src", "dst"), blocks * strips, scalars, constants, config["warps"]),))


def _taps(n, c, vertical, horizontal, dtype, nhwc, backward, device, wide) -> Plan:
    mode, k = vertical.mode, TAPS[vertical.mode]
    ih, oh, iw, ow = vertical.size_in, vertical.size_out, horizontal.size_in, horizontal.size_out
    per_access = WIDE // ITEMSIZE[dtype]
    outer = n if nhwc else n * c
    real = "fp64" if vertical.real().itemsize == 8 else "fp32"
    constants = {"K": k, "ALIGN": vertical.align_corners, "EXACT": mode == "nearest-exact", "S": real}
    constants["ACC"] = _accumulator(dtype, k == 1 and not backward)
    kernel = "taps_backward" if backward else "taps_forward"
    config = configuration(device, kernel, mode, "nhwc" if nhwc else "nchw", dtype)
    v = vector(c, per_access) if nhwc else 1
    if backward:
        cg = c // v if nhwc else 1
        groups, height = iw * cg, ih
        down, across = window(vertical), window(horizontal)
        once = across.width <= KEPT_WEIGHTS
        t = -(-across.width // 4) * 4 if once else 8
        constants |= {"T": t, "ONCE": once}
    else:
        layout = (1 if v * 2 >= per_access else 2) if nhwc else 0
        if layout != 1:
            v = vector(ow * (c if nhwc else 1), min(per_access, 16 // k))  # each element has k offsets and k weights
        cg = (c // v if layout == 1 else c) if nhwc else 1
        groups, height = ow * (c if nhwc else 1) // v, oh
        constants["LAYOUT"] = layout
    lanes = outer * groups
    blocks = -(-lanes // config["lanes"])
    rows, strips = _strips(height, blocks, config)
    scalars = {"lanes": lanes, "strips": strips, "groups": groups, "cg": cg, "ih": ih, "iw": iw, "oh": oh}
    if backward:
        scalars["ow"] = ow
    scalars |= {"scale_h": vertical.bits, "scale_w": horizontal.bits}
    if backward:
        scalars |= {"reach": down.reach, "inverse_h": down.inverse, "pad_h": down.pad}
        scalars |= {"inverse_w": across.inverse, "pad_w": across.pad, "chunks": -(-across.width // t)}
    constants |= {"V": v, "IDX64": wide, "BW": config["lanes"], "R": rows}
    return Plan((Launch(kernel, ("src", "dst"), blocks * strips, scalars, constants, config["warps"]),))


def _antialias(n, c, vertical, horizontal, dtype, nhwc, backward, device) -> Plan:
    """A table and a banded product per axis that changes; between the two passes the smaller intermediate."""
    acc = _accumulator(dtype, False)
    outer, lanes_per_pixel = (n, c) if nhwc else (n * c, 1)
    sizes = [axis.size_out if backward else axis.size_in for axis in (vertical, horizontal)]
    targets = [axis.size_in if backward else axis.size_out for axis in (vertical, horizontal)]
    order = [
        i for i, axis in enumerate((vertical, horizontal)) if not (axis.size_in == axis.size_out and axis.scale == 1)
    ]
    if len(order) == 2 and sizes[0] * targets[1] < targets[0] * sizes[1]:
        order.reverse()
    launches, scratch, source = [], {}, "src"
    for step, i in enumerate(order):
        axis = (vertical, horizontal)[i]
        k, down = antialias_taps(axis), window(axis)
        width = down.width if backward else k
        dst = "dst" if step == len(order) - 1 else "middle"
        before = outer * (1 if i == 0 else sizes[0])
        inner = (sizes[1] if i == 0 else 1) * lanes_per_pixel
        elements = (before * sizes[i] * inner, before * targets[i] * inner)
        scratch |= {f"start{i}": (targets[i], "i32"), f"table{i}": (width * targets[i], acc)}
        if dst == "middle":
            scratch["middle"] = (elements[1], acc)
        table = {"size_in": axis.size_in, "size_out": axis.size_out, "scale": axis.bits, "K": k, "T": width}
        table |= {"reach": down.reach, "inverse": down.inverse, "pad": down.pad}
        constants = {"CUBIC": axis.mode == "bicubic", "TRANSPOSED": backward, "S": acc, "BLOCK": 128}
        names = (f"start{i}", f"table{i}")
        launches.append(Launch("antialias_table", names, -(-targets[i] // 128), table, constants, 4))
        v = vector(inner, WIDE // max(ITEMSIZE[dtype], ITEMSIZE[acc]))
        config = configuration(device, "banded", axis.mode, "nhwc" if nhwc else "nchw", dtype)
        lanes = elements[1] // v
        scalars = {"lanes": lanes, "size_in": sizes[i], "size_out": targets[i], "groups": inner // v, "T": width}
        constants = {"V": v, "ACC": acc, "IDX64": max(elements) >= LIMIT32, "BW": config["lanes"]}
        grid = -(-lanes // config["lanes"])
        launches.append(Launch("banded", (source, dst, *names), grid, scalars, constants, config["warps"]))
        source, sizes[i] = dst, targets[i]
    return Plan(tuple(launches), scratch)


@lru_cache(maxsize=1024)
def make_plan(
    n, c, ih, iw, oh, ow, mode, align_corners, antialias, scale_h, scale_w, backward, dtype, nhwc, device="default"
) -> Plan:
    """The launches for one call; no launch at all means that the output is a copy of the input."""
    same = ih == oh and iw == ow
    if same and not antialias:
        return Plan(())
    double = dtype == "fp64"
    vertical = make_axis(ih, oh, mode, align_corners, antialias, scale_h, double, same)
    horizontal = make_axis(iw, ow, mode, align_corners, antialias, scale_w, double, same)
    if antialias:
        return _antialias(n, c, vertical, horizontal, dtype, nhwc, backward, device)
    wide = n * c * max(ih * iw, oh * ow) >= LIMIT32
    common = (n, c, vertical, horizontal, dtype, nhwc, backward, device, wide)
    return _poly(*common) or _taps(*common)
