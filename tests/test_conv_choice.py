"""The tuned table of the transposed convolution, and what "auto" makes of it."""

import json
from importlib.resources import files

import pytest
import torch

import aeup
from aeup.backends import Kernel, Op, choose
from aeup.ops.conv_choice import why_torch

RULE = {
    "family": {"hopper", "hopper_float", "few", "generic"},
    "pass": {"forward", "input_gradient", "weight_gradient"},
    "dtype": {"float32", "tf32", "float64", "float16", "bfloat16"},
    "layout": {"NCHW", "NHWC"},
    "backend": {"cuda", "torch"},
}


def test_every_rule_is_well_formed():
    table = json.loads(files("aeup.ops").joinpath("conv_choice.json").read_text())
    assert "default" in table
    for rules in table.values():
        for rule in rules:
            for key, value in rule.items():
                if key == "most_pixels":
                    assert isinstance(value, int)
                elif key != "why":
                    assert value in RULE[key], (key, value)
            assert rule["backend"] == "cuda" or rule["why"]


@pytest.mark.parametrize(
    "device, family, which, dtype, layout, pixels, torch_is_faster",
    [
        ("NVIDIA H100 80GB HBM3", "hopper", "forward", "bfloat16", "NHWC", 1 << 16, False),
        ("NVIDIA H100 80GB HBM3", "generic", "forward", "bfloat16", "NHWC", 1 << 16, True),
        ("NVIDIA H100 80GB HBM3", "generic", "weight_gradient", "float32", "NHWC", 1 << 16, False),
        ("NVIDIA H100 80GB HBM3", "generic", "weight_gradient", "float32", "NCHW", 1 << 16, True),
        ("NVIDIA H200", "generic", "weight_gradient", "float32", "NHWC", 1 << 16, False),  # the nearest entry
        ("NVIDIA A100-SXM4-80GB", "generic", "weight_gradient", "float32", "NHWC", 1 << 16, True),
        ("", "few", "forward", "bfloat16", "NHWC", 1 << 16, False),
    ],
)
def test_first_fitting_rule_decides(device, family, which, dtype, layout, pixels, torch_is_faster):
    assert (why_torch(device, family, which, dtype, layout, pixels) is not None) == torch_is_faster


def test_auto_goes_past_a_kernel_that_yields_and_a_name_insists():
    kernels = {"cpu": Kernel(lambda x: "cpu", lambda x: None, yields=lambda x: "torch is faster")}
    kernels |= {n: Kernel(lambda x, n=n: n, lambda x: None) for n in ("cuda", "triton", "torch")}
    op, x = Op("aeup.test", kernels), torch.zeros(1)
    assert choose(op, x, (x,), "auto").run(x) == "torch"
    assert choose(op, x, (x,), "cpu").run(x) == "cpu"
    assert kernels["cpu"].passes(x) == "torch is faster"


def test_explain_gives_the_tables_reason(monkeypatch):
    from aeup.ops import conv_kernels

    kernel = conv_kernels.MAPS[conv_kernels.Y].kernels["torch"]
    yielding = Kernel(kernel.run, kernel.refuses, yields=lambda *args: "cuDNN is faster (tuned table)")
    monkeypatch.setitem(conv_kernels.MAPS[conv_kernels.Y].kernels, "cpu", yielding)
    text = str(aeup.explain(aeup.ConvTranspose2d(4, 5, 3), torch.zeros(1, 4, 6, 6)))
    assert "cpu: cuDNN is faster (tuned table)" in text
