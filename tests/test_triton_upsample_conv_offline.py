"""Every Triton kernel of the convolution of an upsampled map compiled to a cubin with no GPU, as the launcher calls it
(see triton_offline.py)."""

import importlib
import re
import sys

import pytest
from triton_offline import compilations, compile_for, compiled, report

# (n, ci, co, ih, iw), (uh, uw), kernel, groups
MAIN_SIZES = (8, 64, 64, 64, 64), (128, 128), 3, 1
OTHER_SIZES = (2, 12, 30, 7, 9), (13, 31), 2, 2
HUGE_SIZES = (256, 64, 64, 256, 512), (512, 1024), 3, 1
MAIN = [(MAIN_SIZES, mode, t, True) for mode in ("nearest", "bilinear", "bicubic") for t in ("bf16", "fp32")]
OTHERS = [(OTHER_SIZES, "bilinear", "fp64", False), (OTHER_SIZES, "nearest-exact", "fp16", False)]
OTHERS += [(MAIN_SIZES, "bilinear", "strict", False), (HUGE_SIZES, "bicubic", "bf16", False)]
ONE = [(MAIN_SIZES, "nearest", "bf16", True), (MAIN_SIZES, "bilinear", "bf16", True)]
PRODUCT = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}


def compile_all(arch, cases):
    compile_for(arch)
    host, types = (importlib.import_module(f"aeup.kernels.{name}") for name in ("upsample_conv", "convolution"))
    plans = importlib.import_module("aeup.kernels.upsample_conv_plans")
    report(sorted(set(host.kernels()) - set(types.convolution_kernels())))
    for ((n, ci, co, *size), up, k, groups), mode, kind, nhwc in cases:
        dtype = "fp32" if kind == "strict" else kind
        axes = plans.axes_of(tuple(size), up, mode, False, (None, None), dtype == "fp64")
        made = tuple(u + 3 - k for u in up)
        key = (n, ci // groups, co // groups, groups, *axes, (k, k), (1, 1), made, dtype, nhwc, nhwc)
        u = plans.UpsampleConv(*key, kind != "strict", "default", False)
        passes = {"forward": (plans.map_plan, u, False, True, 1, 0.0), "input_gradient": (plans.map_plan, u, True)}
        for name, call in (passes | {"weight_gradient": (plans.weight_gradient_plan, u)}).items():
            plan, launches = host.prepared(*call)
            for row, asm in compilations(plan, launches, dtype, types.TYPES):
                row |= {"pass": name, "case": [mode, kind, nhwc]}
                row["main"] = (n, ci, co, *size) == MAIN_SIZES[0] and kind in ("bf16", "fp32")
                row["product"] = bool(re.search(PRODUCT[arch], asm["ptx"]))
                report(row)


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_cubins(arch, tmp_path):
    known, *rows = compiled(__file__, arch, tmp_path)
    assert {row["kernel"] for row in rows} >= set(known)
    assert any(row["main"] for row in rows)
    for row in rows:
        assert row["arch"] == arch and row["elf"], row
        assert row["shared"] <= 99 << 10, f"more shared memory than the smallest GPU has: {row}"
        if row["main"]:
            assert row["stack"] == 0, f"spills: {row}"
            if row["kernel"].startswith("resample"):
                assert row["product"], f"no tensor cores: {row}"


if __name__ == "__main__":
    ARCH = int(sys.argv[1])
    compile_all(ARCH, MAIN + OTHERS if ARCH == 90 else ONE)
