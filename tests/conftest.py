import contextlib
import os

import pytest
import torch

os.environ["AEUP_TUNED"] = ""  # no user's tuned table


def pytest_configure(config):
    """Under pytest-xdist the processes share the processors."""
    if hasattr(config, "workerinput"):
        threads = max(1, torch.get_num_threads() // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


@pytest.fixture
def poison():
    """Fresh memory is NaN, what torch allocates and what the extension does: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    filled = torch.ops.aeup_native.fill_new_memory(True)
    yield
    torch.ops.aeup_native.fill_new_memory(filled)
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def user_tables(tmp_path, monkeypatch):
    """Where the user's tuned tables are; read anew before and after."""
    from aeup import tuned

    monkeypatch.setenv("AEUP_TUNED", str(tmp_path))
    tuned.forget()
    yield tmp_path
    monkeypatch.undo()
    tuned.forget()


@pytest.fixture
def without_streams(monkeypatch):
    """What captures on a side stream runs where there is no GPU."""

    class Stream:
        def __init__(self, *args):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inductor():
    """torch.compile with Inductor, which needs a C++ compiler."""
    from torch._inductor import cpp_builder, exc

    torch._dynamo.reset()
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as e:
        pytest.skip(f"Inductor has no C++ compiler: {e}")
