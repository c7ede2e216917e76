"""Every Triton kernel of the convolution of an upsampled map compiled to a cubin with no GPU, as the launcher calls it
(see test_triton_convolution_offline.py)."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

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
    """Prints lines of JSON: the names of this op's kernels, then what each compilation gave."""
    import importlib
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import MockTensor

    class Offline:
        """What JITFunction asks of a driver before it compiles."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    driver.set_active(Offline())
    host, types = (importlib.import_module(f"aeup.kernels.{name}") for name in ("upsample_conv", "convolution"))
    plans = importlib.import_module("aeup.kernels.upsample_conv_plans")
    print(json.dumps(sorted(set(host.kernels()) - set(types.convolution_kernels()))), flush=True)
    for ((n, ci, co, *size), up, k, groups), mode, kind, nhwc in cases:
        dtype = "fp32" if kind == "strict" else kind
        axes = plans.axes_of(tuple(size), up, mode, False, (None, None), dtype == "fp64")
        made = tuple(u + 3 - k for u in up)
        key = (n, ci // groups, co // groups, groups, *axes, (k, k), (1, 1), made, dtype, nhwc, nhwc)
        u = plans.UpsampleConv(*key, kind != "strict", "default", False)
        passes = {"forward": (plans.map_plan, u, False, True, 1, 0.0), "input_gradient": (plans.map_plan, u, True)}
        for name, call in (passes | {"weight_gradient": (plans.weight_gradient_plan, u)}).items():
            plan, launches = host.prepared(*call)
            for launch, (kernel, buffers, grid, scalars, options) in zip(plan.launches, launches, strict=True):
                tensors = [MockTensor(types.TYPES[plan.scratch.get(b, (0, dtype))[1]]) for b in buffers]
                binary = kernel.warmup(*tensors, *scalars, **options, grid=grid)
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(binary.asm["cubin"])
                    file.flush()
                    tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
                    usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
                row = {"kernel": launch.kernel, "pass": name, "case": [mode, kind, nhwc]}
                row |= {"main": (n, ci, co, *size) == MAIN_SIZES[0] and kind in ("bf16", "fp32")}
                row |= {"arch": binary.metadata.target.arch, "elf": binary.asm["cubin"][:4] == b"\x7fELF"}
                row |= {"stack": int(re.search(r"STACK:(\d+)", usage)[1]), "shared": binary.metadata.shared}
                row |= {"registers": int(re.search(r"REG:(\d+)", usage)[1])}
                row["product"] = bool(re.search(PRODUCT[arch], binary.asm["ptx"]))
                print(json.dumps(row), flush=True)


def compiled(arch, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, __file__, str(arch)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_cubins(arch, tmp_path):
    known, *rows = compiled(arch, tmp_path)
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
