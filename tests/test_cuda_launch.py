"""How CUDA kernels are launched, without a GPU: the host code of csrc/cuda/common.cuh on a stand-in for CUDA's runtime
(tests/launch). The emulator has its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc")
    homes += [Path(found).resolve().parent.parent] if found else []
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    homes = [Path(home) for home in homes if home and (Path(home) / "include/cuda_runtime.h").exists()]
    return next((home / "bin/nvcc" for home in homes if (home / "bin/nvcc").exists()), None)


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
def test_launch(tmp_path):
    """Arguments, sizes, errors, shared memory by device, early starts, and the blocks that a device holds."""
    program, sources = tmp_path / "launch", [HERE / "launch" / name for name in ("launch.cu", "runtime.cpp")]
    command = [
        nvcc(),
        "-std=c++17",
        "--expt-relaxed-constexpr",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-cudart=none",
    ]
    command += [f"-I{HERE.parent / 'csrc'}", f"-I{HERE / 'launch'}", *sources, "-o", program]
    built = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
