"""The search for data races of emulated kernels (tests/emulate/races.cpp): tiny kernels with one barrier, wait or store
left out are found, at their line, and the right ones are not."""

import ctypes

import pytest
import torch
from emulate.emulator import HERE, build, explained, once

FOUND = {
    "block": ("store after an unordered load", "load after an unordered store"),
    "overwritten": ("store after an unordered load", "load after an unordered store"),
    "warp": ("load after an unordered store",),
    "copy read early": ("load after an unordered store",),
    "copy issued early": ("store after an unordered load",),
    "blocks": ("load after an unordered store", "store after an unordered load"),
    "past": ("access outside of the block's memory",),
    "table": ("load of what was not stored",),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    sources = [HERE / "broken.cu", HERE / "races.cpp"]
    lib = ctypes.CDLL(str(once(tmp_path_factory, "races", lambda d: build(d, sources, "libraces.so"))))
    lib.aeup_race.restype = ctypes.c_char_p
    return lib


def run(library, name, right):
    source, result = torch.ones(256), torch.empty(128)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (source, result))
    return library.aeup_race(name.encode(), ctypes.c_bool(right), *pointers)


@pytest.mark.parametrize("name", FOUND)
def test_right_kernels_are_silent(library, name):
    assert run(library, name, True) is None


@pytest.mark.parametrize("name", FOUND)
def test_what_is_left_out_is_found(library, name):
    message = str(explained(run(library, name, False) or b"nothing", library._name))
    assert any(found in message for found in FOUND[name]), message
    assert "broken.cu:" in message, message


def test_again_after_an_error(library):
    """A kernel that fails leaves nothing behind for the next."""
    for _ in range(2):
        assert run(library, "block", False) is not None
        assert run(library, "block", True) is None
