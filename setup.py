"""Builds aeup._C from csrc/: C++ for the CPU always, CUDA where nvcc is found.

Environment: AEUP_CUDA=0 leaves CUDA out, AEUP_CUDA=1 insists on it; TORCH_CUDA_ARCH_LIST names the GPU architectures
("8.0;9.0" and so on, "+PTX" on the last for newer ones); CUDA_HOME, CXX, MAX_JOBS as usual.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = (2, 10)  # the oldest torch that the binary loads into (stable ABI)
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]  # of csrc/cuda/hopper*.cu, whose instructions no other GPU has
# Instruction sets for the kernels of csrc/cpu, lowest first: templates shared with the standard library are kept from
# the first object that has them, so this order keeps wide instructions out of narrow machines.
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


def torch_root():
    """The torch to build against: importable here, or (in pip's isolated build) of the environment around it."""
    spec = find_spec("torch")
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    outer = Path(sysconfig.get_path("purelib")) / "torch"
    return outer if (outer / "version.py").exists() else None


def cuda_home():
    """A toolkit with headers, or None. `nvcc` on the path can be a wrapper outside the toolkit."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        candidates.insert(2, Path(nvcc).resolve().parent.parent)
    candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for home in filter(None, candidates):
        if (Path(home) / "include/cuda_runtime.h").exists() and (Path(home) / "bin/nvcc").exists():
            return Path(home)
    return None


def gencode():
    flags, names = [], os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    names = names.replace(" ", ";").split(";")
    for name in filter(None, names):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, names


def with_headers(source, seen=None):
    """A source and the headers of csrc/ that it includes, and those include."""
    seen = set() if seen is None else seen
    if source not in seen:
        seen.add(source)
        for name in re.findall(r'^#include "(.+?)"', source.read_text(), re.MULTILINE):
            for header in (source.parent / name, CSRC / name):
                if header.exists():
                    with_headers(header.resolve(), seen)
                    break
    return seen


class BuildExt(build_ext):
    def run(self):
        self.in_source = self.inplace or self.editable_mode  # setuptools clears inplace while it builds
        super().run()

    def build_extension(self, ext):
        torch = torch_root()
        if torch is None:
            raise SystemExit("aeup needs torch >= 2.10 to build: `pip install torch` first")
        want = os.environ.get("AEUP_CUDA", "auto")
        cuda = None if want == "0" else cuda_home()
        if want == "1" and cuda is None:
            raise SystemExit("AEUP_CUDA=1, but no CUDA toolkit with nvcc and include/cuda_runtime.h was found")

        out = Path(self.get_ext_fullpath(ext.name))
        temp = ROOT / "build" / "objects"  # kept: pip gives every editable build a fresh temporary folder
        temp.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{CSRC}", f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        include.append(f"-I{sysconfig.get_path('include')}")
        target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        prefixes = [f"-ffile-prefix-map={torch}=torch", f"-ffile-prefix-map={ROOT}=."]
        base = [*cxx, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-attributes"]
        base += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", *prefixes, *include, target]
        if cuda:
            base += ["-DAEUP_WITH_CUDA", "-DUSE_CUDA", f"-I{cuda / 'include'}"]

        jobs = []  # (object, command), in link order
        for source in (*sorted(s.name for s in CSRC.glob("*.cpp")), "cpu/dispatch.cpp"):
            obj = temp / (source.replace("/", "-") + ".o")
            jobs.append((obj, CSRC / source, [*base, "-c", str(CSRC / source), "-o", str(obj)]))
        for isa, flags in ISAS.items():
            for source in (CSRC / f"cpu/{name}.cpp" for name in ("banded", "batch_norm", "columns", "group_norm")):
                obj = temp / f"cpu-{source.stem}-{isa}.o"
                jobs.append((obj, source, [*base, f"-DAEUP_ISA={isa}", *flags, "-c", str(source), "-o", str(obj)]))
        architectures = []
        if cuda:
            flags, architectures = gencode()
            hopper = HOPPER if any(a.startswith("9.0") for a in architectures) else [*flags, "-DAEUP_WITHOUT_HOPPER"]
            nvcc = [str(cuda / "bin/nvcc"), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-ccbin", cxx[0]]
            nvcc += ["-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CSRC}"]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                obj = temp / f"cuda-{source.name}.o"
                target = hopper if source.name.startswith("hopper") else flags
                jobs.append((obj, source, [*nvcc, *target, "-c", str(source), "-o", str(obj)]))

        def compile_one(job):
            obj, source, command = job
            stamp = obj.with_suffix(".cmd")
            text = shlex.join(command)
            newest = max(f.stat().st_mtime for f in with_headers(source))
            if obj.exists() and stamp.exists() and stamp.read_text() == text and obj.stat().st_mtime > newest:
                return
            print(f"compiling {source.relative_to(ROOT)} -> {obj.name}", flush=True)
            start = time.time()
            subprocess.run(command, check=True)
            os.utime(obj, (start, start))  # a source that was changed meanwhile is newer
            stamp.write_text(text)

        slow_first = sorted(jobs, key=lambda job: job[1].suffix != ".cu")
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, slow_first))

        link = [*cxx, "-shared", *(str(obj) for obj, _, _ in jobs), f"-L{torch / 'lib'}"]
        link += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
        if cuda:
            lib = next(d for d in (cuda / "lib64", cuda / "lib") if d.exists())
            link += [f"-L{lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link += ["-Wl,--exclude-libs,ALL", "-o", str(out)]
        subprocess.run(link, check=True)

        version = {}
        exec((torch / "version.py").read_text(), version)
        info = {
            "torch": str(version["__version__"]),
            "torch_min": ".".join(map(str, TORCH_TARGET)),
            "cuda": [a for a in architectures if a] or None,
            "isas": list(ISAS),
            "machine": platform.machine(),
        }
        folders = {out.parent, ROOT / "aeup"} if self.in_source else {out.parent}
        for folder in folders:
            (folder / "_C.json").write_text(json.dumps(info) + "\n")


abi3 = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(
    ext_modules=[Extension("aeup._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildExt},
    options=abi3,
    setup_requires=[] if torch_root() else ["torch>=2.10"],
)
