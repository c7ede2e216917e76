"""Choosing a backend: forced, refused with a reason, explained; modules; imports."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import aeup
from aeup import _native

X = torch.randn(1, 2, 3, 4)


@pytest.mark.parametrize(
    "call", ['torch_call_dispatcher("aten::empty", "memory_format"', "aoti_torch_empty_strided(rank"]
)
def test_what_could_not_be_allocated_has_torchs_type(call):
    """All that torch 2.11 and later leave of the error is the shim's call that failed."""
    error = RuntimeError(f"{call}, ...) API call failed at csrc/tensors.h, line 1")
    with pytest.raises(torch.OutOfMemoryError, match="could not allocate .* on cpu"):
        _native.raise_if_out_of_memory(error, X.device)
    assert (
        _native.raise_if_out_of_memory(RuntimeError("torch_get_const_data_ptr(...) API call failed"), X.device) is None
    )


def test_auto_takes_the_extension():
    assert _native.missing is None
    choices = aeup.explain(aeup.interpolate, X, scale_factor=2, mode="bilinear")
    assert [c.backend for c in choices] == ["cpu", "cpu"]
    assert "gradient" in choices[1].call
    assert "the tensor is on cpu" in choices[0].others["cuda"]
    assert "comes after cpu" in choices[0].others["torch"]
    assert "triton" in choices[0].others and "bilinear" in str(choices)


def test_forced_backend_serves_or_raises_with_the_reason():
    expected = F.interpolate(X, scale_factor=2)
    with aeup.backend("torch"):
        assert aeup.get_backend() == "torch"
        assert aeup.explain(aeup.interpolate, X, scale_factor=2)[0].backend == "torch"
        assert torch.equal(aeup.interpolate(X, scale_factor=2), expected)
        with aeup.backend("auto"):
            assert aeup.get_backend() == "auto"
    assert aeup.get_backend() == "auto"
    with aeup.backend("cuda"), pytest.raises(aeup.BackendError, match="'cuda' cannot serve.*(CUDA|on cpu)"):
        aeup.interpolate(X, scale_factor=2)
    with aeup.backend("cuda"):
        assert aeup.explain(aeup.interpolate, X, scale_factor=2)[0].backend == "none"
    with aeup.backend("cpu"), pytest.raises(aeup.BackendError, match="int32"):
        aeup.interpolate(X.int(), scale_factor=2)
    for name in ("cudnn", ""):
        with pytest.raises(ValueError, match="backend must be one of auto, cuda, triton, cpu, torch; got"):
            aeup.set_backend(name)


def test_backward_keeps_the_backend_of_the_forward():
    x = X.clone().requires_grad_()
    with aeup.backend("torch"):
        y = aeup.interpolate(x, scale_factor=2)
    assert y.grad_fn.plan.backend == "torch"
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4))


def test_backend_is_local_to_its_thread_and_set_backend_is_not():
    seen = []
    try:
        aeup.set_backend("torch")
        with aeup.backend("cpu"):
            thread = threading.Thread(target=lambda: seen.append(aeup.get_backend()))
            thread.start()
            thread.join()
            assert aeup.get_backend() == "cpu"
    finally:
        aeup.set_backend("auto")
    assert seen == ["torch"]


def test_torch_serves_what_the_kernels_do_not_and_explain_says_so():
    for x, mode in ((torch.randn(1, 2, 5), "linear"), (torch.randn(1, 2, 3, 4, 5), "trilinear"), (X, "area")):
        assert torch.equal(aeup.interpolate(x, scale_factor=2, mode=mode), F.interpolate(x, scale_factor=2, mode=mode))
        (choice,) = aeup.explain(aeup.interpolate, x, scale_factor=2, mode=mode)
        assert choice.backend == "torch" and "4-D input in modes" in choice.others["cpu"]


def test_explain_a_model_computes_nothing():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), aeup.Upsample(scale_factor=2), torch.nn.ReLU())
    huge = torch.empty(64, 2, 8192, 8192, device="meta")
    assert len(aeup.explain(model, X)) == 2
    assert "no aeup op" in str(aeup.explain(torch.nn.ReLU(), X))
    assert aeup.explain(aeup.interpolate, huge, scale_factor=4)[0].backend == "torch"


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_environment_variable():
    out = run("import aeup; print(aeup.get_backend())", AEUP_BACKEND="torch")
    assert out.stdout.strip() == "torch", out.stderr
    out = run("import aeup", AEUP_BACKEND="nonsense")
    assert out.returncode == 1 and "backend must be one of" in out.stderr


def test_import_without_the_extension_explains_and_torch_serves():
    code = """
import sys
sys.modules["aeup._C"] = None
import torch, aeup
x = torch.randn(1, 1, 2, 2)
assert aeup.interpolate(x, scale_factor=2).shape == (1, 1, 4, 4)
print(aeup.explain(aeup.interpolate, x, scale_factor=2))
"""
    out = run(code)
    assert "-> torch" in out.stdout, out.stderr
    assert "cannot be loaded" in out.stdout and torch.__version__ in out.stdout and "pip install" in out.stdout


def test_import_initialises_no_cuda_and_no_triton():
    out = run("import aeup, sys, torch; print(torch.cuda.is_initialized(), 'triton' in sys.modules)")
    assert out.stdout.split() == ["False", "False"], out.stdout + out.stderr


MODULES = [
    (aeup.Upsample, torch.nn.Upsample, {"scale_factor": 2}),
    (aeup.Upsample, torch.nn.Upsample, {"size": (5, 9), "mode": "bicubic", "align_corners": True}),
    (
        aeup.Upsample,
        torch.nn.Upsample,
        {"scale_factor": (1.5, 2.5), "mode": "bilinear", "recompute_scale_factor": True},
    ),
    (aeup.UpsamplingNearest2d, torch.nn.UpsamplingNearest2d, {"scale_factor": 3}),
    (aeup.UpsamplingBilinear2d, torch.nn.UpsamplingBilinear2d, {"size": 7}),
]


@pytest.mark.parametrize(("ours", "theirs", "kwargs"), MODULES)
def test_modules(ours, theirs, kwargs):
    a, b = ours(**kwargs), theirs(**kwargs)
    assert isinstance(a, torch.nn.Upsample)
    assert a.extra_repr() == b.extra_repr() and a.state_dict() == b.state_dict()
    torch.testing.assert_close(a(X), b(X))
