"""Every Triton resampling kernel compiled to a cubin with no GPU, as the launcher calls it (see triton_offline.py)."""

import importlib
import re
import sys

import pytest
from triton_offline import compilations, compile_for, compiled, report

MODES = ("nearest", "bilinear", "bicubic")
# The main case, x2, whose kernels must stay in registers and make 16-byte accesses: (mode, type, nhwc, backward).
MAIN = [(m, t, nhwc, back) for m in MODES for t in ("fp32", "bf16") for nhwc in (False, True) for back in (False, True)]
ONE = [("bilinear", "bf16", False, False), ("bilinear", "fp32", True, True), ("bicubic", "bf16", False, True)]
SHAPE = (16, 64, 128, 128, 256, 256)
# (n, c, ih, iw, oh, ow), mode, align_corners, antialias, backward, type, nhwc
OTHERS = [
    ((16, 128, 56, 72, 129, 200), "bicubic", False, False, False, "bf16", False),
    ((16, 128, 56, 72, 129, 200), "bicubic", True, False, True, "fp32", True),
    ((8, 21, 64, 64, 512, 512), "bilinear", False, False, False, "bf16", True),
    ((8, 21, 64, 64, 256, 256), "bilinear", False, False, True, "fp16", False),
    ((1, 2, 5, 7, 9, 300), "bilinear", False, False, True, "fp32", False),
    ((4, 3, 33, 65, 50, 99), "bicubic", True, False, False, "fp64", False),
    ((4, 3, 33, 65, 50, 99), "bilinear", False, False, True, "fp64", True),
    ((4, 3, 33, 65, 50, 99), "nearest-exact", False, False, True, "bf16", False),
    ((4, 3, 32, 64, 64, 128), "nearest", False, False, False, "u8", False),
    ((4, 3, 32, 64, 50, 128), "nearest", False, False, False, "u8", True),
    ((64, 64, 1024, 1024, 2048, 2048), "bilinear", False, False, False, "fp32", False),
    ((64, 64, 1024, 1024, 1500, 1500), "nearest", False, False, True, "fp16", True),
    ((16, 64, 128, 128, 100, 50), "bicubic", False, True, False, "bf16", False),
    ((16, 64, 128, 128, 100, 50), "bilinear", False, True, True, "fp64", True),
]


def carried_scalars(ir):
    """The scalar types that each loop carries, in order; `for` and `while` of MLIR's scf dialect."""
    types = [
        re.split(r" : i\d+ \{| \{", line.split("->")[1])[0] for line in re.findall(r"= scf\.(?:for|while) .*->.*", ir)
    ]
    return [re.findall(r"\b[if]\d+\b", re.sub(r"tensor<.*?>>|tensor<[^<>]*>", "", t)) for t in types]


def compile_all(arch, main, others):
    compile_for(arch)
    host = importlib.import_module("aeup.kernels.interpolate")
    report(sorted(host.kernels()))
    types = {name: dtype for dtype, name in host.DTYPES.items()} | host.SCRATCH
    calls = [(SHAPE, mode, False, False, back, kind, nhwc) for mode, kind, nhwc, back in main] + others
    for sizes, mode, align, antialias, back, kind, nhwc in calls:
        plan, ready = host._prepared((*sizes, mode, align, antialias, None, None, back, kind, nhwc, "default"))
        for row, asm in compilations(plan, ready, kind, types):
            row["call"] = [sizes, mode, kind, "nhwc" if nhwc else "nchw", "backward" if back else "forward"]
            row["main"] = sizes == SHAPE
            row["carried"] = [carried_scalars(asm["ttir"]), carried_scalars(asm["ttgir"])]
            row["wide"] = bool(re.search(("ld" if back else "st") + r"\.global[\w.:]*\.v4\.b32", asm["ptx"]))
            report(row)


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_cubins(arch, tmp_path):
    known, *rows = compiled(__file__, arch, tmp_path)
    assert {row["kernel"] for row in rows} == set(known)
    for row in rows:
        assert row["arch"] == arch and row["elf"], row
        assert row["stack"] == 0, f"spills: {row}"
        # Triton 3.6 takes a carried value that only bounds an inner `for` for dead: it keeps its first value.
        assert row["carried"][0] == row["carried"][1], f"a pass lost a loop-carried value: {row}"
        if row["main"]:
            assert row["kernel"].startswith("poly") and row["shared"] == 0 and row["wide"], row
    assert sum(row["main"] for row in rows) == len(MAIN if arch == 90 else ONE)


if __name__ == "__main__":
    ARCH = int(sys.argv[1])
    compile_all(ARCH, MAIN if ARCH == 90 else ONE, OTHERS)
