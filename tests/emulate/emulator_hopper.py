"""Builds the Hopper kernels for the host, in a library of their own (see hopper/hopper_on_host.h). Its entry points are
those of emulator_convolution.py and emulator_fold.py, for the families hopper and hopper_float."""

import contextlib
import ctypes
import os
from pathlib import Path

import pytest

from .emulator import CSRC, HERE, build, once

# AEUP_TUNE: the tile can be forced (configured).
FLAGS = ("-O0", "-DAEUP_EMULATE_HOPPER", "-DAEUP_TUNE", "-Wno-psabi", f"-I{HERE / 'hopper'}")


def sources():
    kernels = [s for name in ("hopper*", "convolution", "fold*") for s in (CSRC / "cuda").glob(f"{name}.cu")]
    shared = (HERE / name for name in ("entry_convolution.cpp", "entry_fold.cpp", "races.cpp"))
    return [*kernels, *shared, *(HERE / "hopper").glob("*.cpp")]


class Hopper:
    def __init__(self, library: Path):
        self.lib = ctypes.CDLL(str(library))


@contextlib.contextmanager
def configured(config=None, arrangement=0):
    """Forces a tile: an index of kGemmConfigs or kFloatConfigs, and how the phases are arranged (0 a tile each, 1 four
    in a tile, 2 as columns, 3 the tiles for NCHW: an index of kNchwConfigs; 4 the weight gradient: an index of its
    kShapes)."""
    if config is not None:
        os.environ["AEUP_HOPPER"] = str(10 * arrangement + config)
    try:
        yield
    finally:
        os.environ.pop("AEUP_HOPPER", None)


@pytest.fixture(scope="session")
def hopper(tmp_path_factory):
    """The library, built once for all processes of a session."""
    name = "libaeup_emulated_hopper.so"
    return Hopper(once(tmp_path_factory, "emulated_hopper", lambda folder: build(folder, sources(), name, FLAGS)))
