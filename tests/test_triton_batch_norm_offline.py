"""Every Triton kernel of batch normalisation compiled to a cubin with no GPU, as the launcher calls it (see
triton_offline.py)."""

import importlib
import re
import sys

import pytest
import torch
from triton_offline import compilations, compile_for, compiled, report

# n, channels, plane, dtype, nhwc; dtype of the parameters; activation
SIZES = 256, 64, 32 * 32
# The main case, whose kernels must make 16-byte accesses, in one layout from load to store.
MAIN = [((*SIZES, t, nhwc), "fp32", 3) for t in ("bf16", "fp32") for nhwc in (True, False)]
OTHERS = [
    ((*SIZES, "bf16", True), "bf16", 4),
    ((32, 20, 49, "fp16", True), "fp16", 2),  # vectors of 4 channels
    ((3, 5, 21, "fp64", False), "fp64", 6),
    ((64, 512, 16, "fp32", False), "fp32", 1),  # two channels a program
    ((4, 2053, 6, "bf16", True), "fp32", 0),
    ((256, 64, 1 << 18, "bf16", True), "fp32", 3),  # 64-bit offsets
    ((256, 64, 1 << 18, "fp32", False), "fp32", 1),
    ((1 << 13, 2, 1 << 18, "bf16", False), "fp32", 1),  # 2^31 pixels, a number of vectors of 32 bits
]
BUFFERS = "weight", "bias", "running_mean", "running_var", "dweight", "dbias"


def compile_all(arch, cases):
    compile_for(arch)
    host, types = (importlib.import_module(f"aeup.kernels.{name}") for name in ("batch_norm", "convolution"))
    report(sorted(host.kernels()))
    for sizes, parameters, activation in cases:
        dtype, arithmetic = sizes[3], host.accumulator(sizes[3])
        others = dict.fromkeys(BUFFERS, parameters) | {"mean": arithmetic, "invstd": arithmetic, "counter": "i64"}
        calls = {}
        for training in (True, False) if sizes == MAIN[0][0] else (True,):
            p = host.Norm(*sizes, training, True, True, activation, 0.25, "default")
            calls[f"forward {training}"] = host.forward_plan, p, training, training, 0.1, 1e-5
            calls[f"backward {training}"] = host.backward_plan, p, True, training, training
        for name, call in calls.items():
            plan, launches = host.prepared(*call)
            made = compilations(plan, launches, dtype, types.TYPES | {"i64": torch.int64}, others)
            for (row, asm), launch in zip(made, plan.launches, strict=True):
                row |= {"pass": name, "case": sizes, "main": (sizes, parameters, activation) in MAIN}
                row["copies"] = sorted(set(re.findall(r"cp\.async[^;]*, (0x\w+),", asm["ptx"])))
                row["stores"] = "st.global.v4.b32" in asm["ptx"]
                tile = [launch.constants[name] for name in (("BM", "BC") if sizes[4] else ("BC", "BM"))]
                row["moved"] = bool(re.search(r"convert_layout .*-> tensor<{}x{}x".format(*tile), asm["ttgir"]))
                row["pixels"] = "arith.muli %pixels" not in asm["ttir"] or sizes[0] * sizes[2] < 1 << 31
                report(row)


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_cubins(arch, tmp_path):
    known, *rows = compiled(__file__, arch, tmp_path)
    assert {row["kernel"] for row in rows} == set(known)
    assert any(row["main"] for row in rows)
    for row in rows:
        assert row["arch"] == arch and row["elf"], row
        assert row["shared"] <= 99 << 10, f"more shared memory than the smallest GPU has: {row}"
        assert row["stack"] == 0, f"spills: {row}"
        assert row["pixels"], f"the number of pixels is multiplied in 32 bits: {row}"
        if row["main"]:
            assert not row["moved"], f"tiles go through shared memory once more: {row}"
            assert row["copies"] == ["0x10"], f"no 16-byte copies: {row}"
            assert row["stores"] or row["kernel"] in ("statistics", "sum_gradients"), f"no 16-byte stores: {row}"


if __name__ == "__main__":
    ARCH = int(sys.argv[1])
    compile_all(ARCH, MAIN + OTHERS if ARCH == 90 else MAIN[:1] + MAIN[-1:])
