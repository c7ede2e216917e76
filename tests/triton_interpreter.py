"""What the tests of the Triton kernels share: on a GPU they run for real, elsewhere in Triton's interpreter.

TRITON_INTERPRET must be set before Triton is imported and would change every other test of the process, so that without
a GPU a test file runs itself in a process of its own (`check_in_the_interpreter`)."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
MARKS = [  # the interpreter's own, on conversions and on infinities
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory, the results' and the scratch buffers', holds NaN; integers, 113."""
    real = torch.empty

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(torch.nan if out.dtype.is_floating_point else 113)

    monkeypatch.setattr(torch, "empty", empty)


def check_in_the_interpreter(file, shards=("",)):
    """Runs the tests of ``file`` with TRITON_INTERPRET=1, each shard (a pytest -k expression) in its own process."""
    file, env, runs = Path(file), {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, []
    for shard in shards:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", shard, file.name]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        runs.append(subprocess.Popen(command, cwd=file.parent, env=env, **pipes))
    for run in runs:
        output = run.communicate()[0]
        assert run.returncode == 0, output
        assert " passed" in output


def select_tests(module):
    """Deletes from a test file's globals `test_in_the_interpreter` where the others can run here, else the others."""
    for name in [n for n in module if n.startswith("test_") and (n == "test_in_the_interpreter") == HERE]:
        del module[name]


def patch_language_once():
    """The interpreter patches triton.language at every call of a jitted function, which is most of its time: once will
    do."""
    import triton.runtime.interpreter as interpreter

    patch, patched = interpreter._patch_lang, {}

    class Kept:
        def restore(self):
            pass

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched[id(fn.__globals__)] = (fn, patch(fn))
        return Kept()

    interpreter._patch_lang = patch_once


def keep_types():
    """The interpreter makes its types anew, their names included, for every value of every operation."""
    import triton.language.core as core
    import triton.runtime.interpreter as interpreter

    numpy_type = interpreter._get_np_dtype
    kept_numpy_type = functools.cache(numpy_type)

    def scalar_numpy_type(ty):
        return (kept_numpy_type if type(ty.scalar) is core.dtype else numpy_type)(ty.scalar)

    interpreter._get_np_dtype = scalar_numpy_type

    make, blocks = core.block_type.__init__, {}

    def block_type(self, element_ty, shape):
        if type(element_ty) is not core.dtype:  # pointers have no hash
            return make(self, element_ty, shape)
        key = element_ty, *map(core._unwrap_if_constexpr, shape)
        if key not in blocks:
            make(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    core.block_type.__init__ = block_type

    type_for, tuples = core._type_for_tuple_values, {}

    def tuple_type(values, fields=None):
        if fields or not all(isinstance(v, core.constexpr) and type(v.value) is int for v in values):
            return type_for(values, fields)
        key = tuple(v.value for v in values)
        if key not in tuples:
            tuples[key] = type_for(values)
        return tuples[key]

    core._type_for_tuple_values = tuple_type


if INTERPRETED:
    patch_language_once()
    keep_types()
