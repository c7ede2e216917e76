"""What the machine at hand can do at best, measured once a run, and what it is."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

import aeup
from aeup import tuned

from .workload import DTYPES, Case, precision


@dataclass(frozen=True)
class Machine:
    """`copy`: bytes per second, read and written together, of a large device copy. `matrix`: FLOP/s of a square
    product of random matrices by dtype class."""

    copy: float
    matrix: dict[str, float]

    def floor(self, case: Case, direction: str) -> float:
        """Seconds that a call takes at least: its bytes at the copy's rate, or its products at the matrix rate."""
        return max(case.bytes(direction) / self.copy, case.flops(direction) / self.matrix[case.dtype])

    def to_json(self) -> dict:
        matrix = {name: rate / 1e12 for name, rate in self.matrix.items()}
        return {"copy_gb_per_s": self.copy / 1e9, "matrix_tflop_per_s": matrix}


def _seconds(fn: Callable[[], object], samples: int = 9) -> float:
    """Median seconds of a long call on the GPU."""
    times = []
    for _ in range(2 + samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[2:])


def _copy_rate(device: str, size: int) -> float:
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _matrix_rate(device: str, dtype: str, side: int) -> float:
    a, b, out = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(3))
    with precision(dtype):
        return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out))


def measure_machine(device: str, dtypes: Iterable[str], side: int = 8192, copied: int = 1 << 30) -> Machine:
    """A GPU's ceilings. `side`: of the matrices; `copied`: bytes."""
    rates = {dtype: _matrix_rate(device, dtype, side) for dtype in dict.fromkeys(dtypes)}
    return Machine(_copy_rate(device, copied), rates)


# --- what it is ---


def _output_of(*command: str, cwd: pathlib.Path | None = None) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this file lies in, and whether it has uncommitted changes. Without a checkout,
    that of the environment variable AEUP_COMMIT: what `git describe --always --dirty --abbrev=40 --exclude='*'` printed
    where the files came from."""
    here = pathlib.Path(__file__).resolve().parent
    top = _output_of("git", "rev-parse", "--show-toplevel", cwd=here)
    if top is None or pathlib.Path(top).resolve() / "benchmarks" / "bench" != here:
        told = os.environ.get("AEUP_COMMIT", "").strip()
        return (told.removesuffix("-dirty"), told.endswith("-dirty")) if told else (None, None)
    commit = _output_of("git", "rev-parse", "--verify", "HEAD", cwd=here)
    return commit, bool(_output_of("git", "status", "--porcelain", cwd=here)) if commit else None


def environment(device: str) -> dict:
    """Where the figures come from: device, driver, versions, commit, date."""
    commit, dirty = _commit()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = device != "cpu"
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device_type": device,
        "device": torch.cuda.get_device_name() if gpu else tuned.processor(),
        "driver": driver.splitlines()[0] if driver else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "aeup": aeup.__version__,
        "commit": commit,
        "dirty": dirty,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform().replace(platform.release(), platform.release().split("-")[0]),  # no local name
    }
