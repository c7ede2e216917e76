"""Triton kernels compiled to cubins with no GPU, as a launcher calls them: its plans, its arguments, Triton's own
specialisation. A test file compiles the kernels of each architecture in a process of its own, without TRITON_INTERPRET,
by running itself as a script (`compiled`), and that script prints lines of JSON (`report`): the names of the launcher's
kernels, then what each compilation gave."""

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

pytest.importorskip("triton")


def compiled(script, arch, tmp_path):
    """The lines that ``script`` reports of an architecture."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script, str(arch)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def report(line):
    print(json.dumps(line), flush=True)


def compile_for(arch):
    """Makes Triton compile for a GPU that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Offline:
        """What JITFunction asks of a driver before it compiles."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    driver.set_active(Offline())


def compilations(plan, launches, dtype, types, others=()):
    """Compiles every launch of a plan; for each, what a report says of it, and the text of each stage (ttir, ptx).
    dtype: of the buffers that are neither scratch nor in `others`, buffer -> dtype; types: torch's of each name."""
    named = dict(others) | {b: kind for b, (_, kind) in plan.scratch.items()}
    import triton
    from triton.runtime.jit import MockTensor

    for launch, (kernel, buffers, grid, scalars, options) in zip(plan.launches, launches, strict=True):
        tensors = [MockTensor(types[named.get(b, dtype)]) for b in buffers]
        binary = kernel.warmup(*tensors, *scalars, **options, grid=grid)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        row = {"kernel": launch.kernel, "arch": binary.metadata.target.arch, "shared": binary.metadata.shared}
        row |= {"elf": binary.asm["cubin"][:4] == b"\x7fELF", "registers": int(re.search(r"REG:(\d+)", usage)[1])}
        yield row | {"stack": int(re.search(r"STACK:(\d+)", usage)[1])}, binary.asm
