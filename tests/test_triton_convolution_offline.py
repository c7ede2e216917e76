"""Every Triton convolution kernel compiled to a cubin with no GPU, as the launcher calls it (see triton_offline.py)."""

import importlib
import re
import sys

import pytest
from triton_offline import compilations, compile_for, compiled, report

# (n, ci, co, ih, iw), (kernel, stride, padding, output padding, dilation), groups
DCGAN = (128, 128, 64, 16, 16), (4, 2, 1, 0, 1), 1
UNET = (8, 256, 128, 128, 128), (2, 2, 0, 0, 1), 1
RGB = (16, 128, 3, 128, 128), (4, 2, 1, 0, 1), 1
FCN = (8, 21, 21, 64, 64), (16, 8, 4, 0, 1), 1
ODD = (2, 100, 30, 7, 9), (3, 2, 1, 1, 2), 2
HUGE = (256, 64, 64, 256, 512), (3, 3, 1, 2, 1), 1
PASSES = ("forward", "input_gradient", "weight_gradient")
# The main case, which must not spill and, in 16 bits, runs on the tensor cores of the architecture.
MAIN = [(DCGAN, t, nhwc) for t in ("bf16", "fp32", "strict") for nhwc in (True, False)]
OTHERS = [(UNET, "bf16", True), (RGB, "fp16", False), (FCN, "bf16", True), (ODD, "fp64", False), (HUGE, "fp32", True)]
ONE = [(DCGAN, "bf16", True), (DCGAN, "fp32", False)]
PRODUCT = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


def compile_all(arch, cases):
    compile_for(arch)
    host = importlib.import_module("aeup.kernels.convolution")
    plans = importlib.import_module("aeup.kernels.convolution_plans")
    report(sorted(host.convolution_kernels()))
    for ((n, ci, co, *size), (k, s, p, op, d), groups), kind, nhwc in cases:
        dtype = "fp32" if kind == "strict" else kind
        axes = [plans.Axis(i, host.output_size(i, k, s, p, op, d), k, s, p, d) for i in size]
        key = (n, ci // groups, co // groups, groups, *axes, dtype, nhwc, nhwc, kind != "strict", "default", False)
        c = plans.Convolution(*key)
        plane = axes[0].size_out * axes[1].size_out
        made = [
            ("forward", host.prepared(plans.gemm_plan, c, False, True, 4 if k > 3 else 1, 0.0)),
            ("input_gradient", host.prepared(plans.gemm_plan, c, True)),
            ("weight_gradient", host.prepared(plans.weight_plan, c)),
            ("epilogue", host.prepared(plans.epilogue_plan, n, co, plane, dtype, nhwc, 3, 0.0, True, "default")),
        ]
        for name, (plan, ready) in made:
            for row, asm in compilations(plan, ready, dtype, host.TYPES):
                row |= {"pass": name, "case": [n, ci, co, size, k, kind, nhwc], "ptx": asm["ptx"].count("\n")}
                row["product"] = bool(re.search(PRODUCT[arch], asm["ptx"]))
                row["copies"] = sorted(set(re.findall(r"cp\.async[^;]*, (0x\w+),", asm["ptx"])))
                row["narrow"] = asm["ptx"].count("ld.global.b16")
                report(row)


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_cubins(arch, tmp_path):
    known, *rows = compiled(__file__, arch, tmp_path)
    assert {row["kernel"] for row in rows} == set(known)
    main = [row for row in rows if row["case"][:4] == [*DCGAN[0][:3], list(DCGAN[0][3:])]]
    assert main and len(main) < len(rows) or arch != 90
    for row in rows:
        assert row["arch"] == arch and row["elf"], row
        assert row["shared"] <= 99 << 10, f"more shared memory than the smallest GPU has: {row}"
    for row in main:
        assert row["stack"] == 0, f"spills: {row}"
        if row["kernel"] in ("phase_gemm", "weight_gradient"):
            assert row["product"], f"no tensor cores: {row}"
            if row["case"][-2] == "bf16":  # every operand comes in 16-byte copies, in NCHW by way of a transposed copy
                assert row["copies"] == ["0x10"] and row["narrow"] <= 8, row  # the bias's


if __name__ == "__main__":
    ARCH = int(sys.argv[1])
    compile_all(ARCH, MAIN + OTHERS if ARCH == 90 else ONE)
