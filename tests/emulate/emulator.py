"""Builds the CUDA kernels for the host and runs them on CPU tensors (see cuda_on_host.h)."""

import concurrent.futures
import ctypes
import fcntl
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
MODES = {"nearest": 0, "nearest-exact": 1, "bilinear": 2, "bicubic": 3}
OWN = {"cuda_on_host.h", "invoke.h", "std_function.h"}  # lines that say nothing about a kernel
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}
FLAGS = ("-O0", "-g1", "-fsanitize=thread")  # every kernel that runs is also searched for data races: races.h


def sources():
    """What the library is made of. The Hopper kernels stay out, but for those that pack: emulator_hopper.py."""
    kernels = [s for s in sorted((CSRC / "cuda").glob("*.cu")) if not s.name.startswith("hopper") or "pack" in s.name]
    return kernels + sorted(HERE.glob("*.cpp"))


def build(directory, sources, library="libaeup_emulated.so", flags=FLAGS) -> Path:
    """Compile ``sources`` as C++ into one shared library in ``directory`` and return its path."""
    include = [f"-I{path}" for path in (CSRC, CSRC / "cuda", HERE)]
    compiler = os.environ.get("CXX", "g++")
    base = [compiler, "-std=c++17", "-fPIC", "-DAEUP_EMULATE", "-Wno-unknown-pragmas", *include, "-x", "c++"]
    objects = {s: Path(directory) / (s.name + ".o") for s in sorted(sources, key=lambda s: -s.stat().st_size)}

    def compile_one(source):
        # races.cpp is the runtime that -fsanitize=thread calls: in place of the compiler's, which is not linked.
        how = ("-O2",) if source.name == "races.cpp" else flags
        command = [*base, *how, "-c", str(source), "-o", str(objects[source])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:5000]}")

    with concurrent.futures.ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, objects))
    to = Path(directory) / library
    subprocess.run([compiler, "-shared", "-o", str(to), *map(str, objects.values()), "-ldl"], check=True)
    return to


def once(tmp_path_factory, name, make) -> Path:
    """The file that ``make(directory)`` returns, made once in a session, however many processes it has."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = root / f"{name}.done"
        if not done.exists():
            directory = root / name
            directory.mkdir(exist_ok=True)
            done.write_text(str(make(directory)))
        return Path(done.read_text())


def explained(error: bytes, library) -> RuntimeError:
    """What the library says, its addresses of code (@hexadecimal: after the call) as file:line of the kernels."""
    text = error.decode()
    found = sorted(set(re.findall("@([0-9a-f]+)", text)))
    if not found:
        return RuntimeError(text)
    command = ["addr2line", "-s", "-i", "-a", "-e", str(library), *(hex(int(at, 16) - 1) for at in found)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("0x")] + [len(lines)]
    places = {}
    for at, (first, last) in zip(found, itertools.pairwise(starts), strict=True):
        inlined = [line.split(" (")[0] for line in lines[first + 1 : last]]
        places[at] = " < ".join(line for line in inlined if line.split(":")[0] not in OWN and "?" not in line)
    text = re.sub(" @([0-9a-f]+)", lambda m: f" < {places[m[1]]}" if places[m[1]] else "", text)
    return RuntimeError(text)


class Emulated:
    """The emulated library. ``run`` executes one problem, ``kernel`` names the kernel that serves it."""

    def __init__(self, library: Path):
        self.lib = ctypes.CDLL(str(library))
        for name in ("aeup_emulate", "aeup_emulate_end", "aeup_kernel", "aeup_refusal"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.lib.aeup_launches.restype = ctypes.c_int64

    @staticmethod
    def arguments(src, dst, mode, align_corners, antialias, scale, backward):
        x, y = (dst, src) if backward else (src, dst)
        # A size-1 axis makes both layouts contiguous: then the strides tell (torch's rule).
        nhwc = is_channels_last(src)
        order = (0, 2, 3, 1) if nhwc else (0, 1, 2, 3)
        assert src.permute(order).is_contiguous() and dst.permute(order).is_contiguous()
        size = (ctypes.c_int64 * 6)(*x.shape, *y.shape[2:])
        how = (ctypes.c_int * 6)(MODES[mode], DTYPES[src.dtype], align_corners, antialias, nhwc, backward)
        pointers = ctypes.c_void_p(src.data_ptr()), ctypes.c_void_p(dst.data_ptr())
        return *pointers, size, (ctypes.c_double * 2)(*(scale or (0.0, 0.0))), how

    def run(self, src, dst, mode, align_corners=False, antialias=False, scale=None, backward=False):
        """Fill ``dst``. Forward: src [n, c, ih, iw] to dst [n, c, oh, ow]; backward: gradients, the other way."""
        error = self.lib.aeup_emulate(*self.arguments(src, dst, mode, align_corners, antialias, scale, backward))
        if error is not None:
            raise explained(error, self.lib._name)
        return dst

    def run_end(self, src, dst, mode, blocks, backward=False):
        """Only the last ``blocks`` thread blocks: the tensors may be too large to compute, or to be in memory."""
        arguments = self.arguments(src, dst, mode, False, False, None, backward)
        error = self.lib.aeup_emulate_end(*arguments, ctypes.c_int64(blocks))
        if error is not None:
            raise explained(error, self.lib._name)

    def kernel(self, src, dst, mode, align_corners=False, antialias=False, scale=None, backward=False):
        name = self.lib.aeup_kernel(*self.arguments(src, dst, mode, align_corners, antialias, scale, backward))
        return name.decode() if name is not None else None

    def refusal(self, src, dst, mode, align_corners=False, antialias=False, scale=None, backward=False):
        why = self.lib.aeup_refusal(*self.arguments(src, dst, mode, align_corners, antialias, scale, backward))
        return why.decode() if why is not None else None

    def launches(self):
        return self.lib.aeup_launches()


def is_channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last) and t.stride(1) == 1 and t.shape[1] > 1


def tensor(shape, dtype, nhwc=False, offset=0, fill=None):
    """A dense tensor ``offset`` elements past an aligned address: random, or full of ``fill``."""
    n, c, h, w = shape
    count = n * c * h * w
    storage = torch.empty(count + offset + 64, dtype=dtype)
    flat = storage[offset : offset + count]
    if fill is not None:
        flat.fill_(fill)
    elif dtype == torch.uint8:
        flat.copy_(torch.randint(0, 256, (count,)))
    else:
        flat.copy_(torch.randn(count, dtype=torch.float64).to(dtype))
    return flat.view(n, h, w, c).permute(0, 3, 1, 2) if nhwc else flat.view(n, c, h, w)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library, built once for all processes of a session."""
    return Emulated(once(tmp_path_factory, "emulated", lambda directory: build(directory, sources())))
