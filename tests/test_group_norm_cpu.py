"""The CPU's kernels of group norm: the error budget against float64, all instruction sets, no bit that depends on the
number of threads."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import LAYOUTS
from group_norm_cases import SHAPES, by_torch, check, results, tensors
from test_batch_norm import ACTIVATIONS

import aeup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU = {"backend": "cpu", "device": "cpu"}


@pytest.fixture(autouse=True)
def own_kernels():
    """On a CPU "auto" leaves small images to torch."""
    with aeup.backend("cpu"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_error_budget(shape, groups, dtype):
    for layout in LAYOUTS:
        for activation in ACTIVATIONS:
            check(shape, groups, dtype, layout, activation, **CPU)
        check(shape, groups, dtype, layout, "silu", affine=False, **CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero(layout):
    for away, shape in itertools.product((100.0, 1e4), ((2, 20, 17, 19), (1, 8, 70, 70))):
        check(shape, 4, torch.float32, layout, "leaky_relu", away=away, **CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_that_are_far_apart(layout):
    """The variance of a group is then that of its channels' means."""
    x, *_ = tensors((2, 8, 9, 11), torch.float32, layout)
    x += torch.arange(8).view(-1, 1, 1) * 1e3
    y, exact, other = aeup.group_norm(x, 2), by_torch(x.double(), 2), by_torch(x, 2)
    assert (y - exact).abs().max() <= 2 * (other - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_parameters_of_the_inputs_dtype(dtype):
    for layout in LAYOUTS:
        check((2, 20, 7, 7), 4, dtype, layout, "silu", narrow=True, **CPU)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_and_infinity_stay_in_their_group(activation):
    # torch's gelu of infinity is NaN, or not, by the vector that it lies in
    kinds = (float("nan"),) if activation == "gelu" else (float("nan"), float("inf"))
    for layout, bad in itertools.product(LAYOUTS, kinds):
        given = tensors((2, 20, 5, 5), torch.float32, layout)
        given[0][1, 7, 2, 2] = bad  # in group 1 of the second sample
        y, dx, *_ = results(aeup.group_norm, given, torch.ones(2, 20, 5, 5), 5, activation=activation)
        z, *_ = results(by_torch, given, torch.ones(2, 20, 5, 5), 5, activation=activation)
        assert torch.equal(y.isnan(), z.isnan())
        dx[1, 4:8] = 0
        assert torch.isfinite(dx).all()


@pytest.mark.parametrize("shape, groups", [((2, 32, 40, 40), 8), ((1, 96, 65, 67), 4), ((9, 300, 9, 5), 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(layout, shape, groups):
    given = tensors(shape, torch.float32, layout)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(results(aeup.group_norm, given, given[0], groups, activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_sample_is_normalised_by_itself(layout):
    """The same bits alone and in a batch, whatever parts the tensors are cut into."""
    x, weight, bias = tensors((5, 32, 60, 61), torch.float32, layout)
    y = aeup.group_norm(x, 4, weight, bias, activation="silu")
    for i in range(5):
        assert torch.equal(y[i : i + 1], aeup.group_norm(x[i : i + 1], 4, weight, bias, activation="silu"))


SMALL = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
from test_group_norm_cpu import ACTIVATIONS, CPU, DTYPES, LAYOUTS, SHAPES, check
import torch, aeup
aeup.set_backend("cpu")
assert aeup.explain(aeup.group_norm, torch.zeros(1, 2, 2, 2), 1)[0].kernel.endswith(sys.argv[2])
for (shape, groups), dtype, layout in itertools.product(SHAPES[:5], DTYPES, LAYOUTS):
    for activation in ACTIVATIONS:
        check(shape, groups, dtype, layout, activation, **CPU)
print("checked")
"""


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_every_instruction_set(isa):
    """The other code paths of this processor; the tests above run its best one."""
    if aeup.explain(aeup.group_norm, torch.zeros(1, 2, 2, 2), 1)[0].kernel.endswith("baseline"):
        pytest.skip("this processor has the baseline only")
    command = [sys.executable, "-c", SMALL, os.path.dirname(__file__), isa]
    out = subprocess.run(command, env={**os.environ, "AEUP_ISA": isa}, capture_output=True, text=True)
    assert "checked" in out.stdout, out.stderr
