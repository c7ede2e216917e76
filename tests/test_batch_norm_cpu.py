"""The CPU's kernels of batch norm: the error budget against float64, all instruction sets, no bit that depends on the
number of threads."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from batch_norm_cases import check, results
from cases import LAYOUTS
from test_batch_norm import ACTIVATIONS, by_torch, tensors

import aeup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Pixels that fill no register, or one; one pixel; one channel; channels that divide no register, few and many; more
# planes than a piece has; planes of more than a piece.
SHAPES = (
    (2, 3, 5, 7),
    (3, 16, 4, 4),
    (4, 20, 7, 7),
    (5, 7, 1, 1),
    (3, 1, 9, 11),
    (2, 513, 3, 2),
    (90, 2, 3, 37),
    (1, 3, 101, 103),
)
CPU = {"backend": "cpu", "device": "cpu"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype):
    for layout in LAYOUTS:
        for activation in ACTIVATIONS:
            check(shape, dtype, layout, activation, **CPU)
        for activation in (None, "relu", "gelu"):
            check(shape, dtype, layout, activation, training=False, **CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero(layout):
    for away in (100.0, 1e4):
        check((4, 20, 17, 19), torch.float32, layout, "leaky_relu", away=away, **CPU)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_parameters_of_the_inputs_dtype(dtype):
    for layout, training in itertools.product(LAYOUTS, (True, False)):
        check((2, 20, 7, 7), dtype, layout, "silu", training, narrow=True, **CPU)


def test_an_outlier_first():
    """Distances are from a mean of the first values."""
    x = torch.randn(4, 16, 40, 40, generator=torch.Generator().manual_seed(0))
    for layout in LAYOUTS.values():
        x[0, :, 0, 0] = 1e3
        given = x.contiguous(memory_format=layout)
        y = aeup.batch_norm(given, None, None, training=True)
        exact = by_torch(given.double(), None, None, training=True)
        assert (y - exact).abs().max() <= 2 * (by_torch(given, None, None, training=True) - exact).abs().max() + 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_and_infinity_stay_in_their_channel(activation):
    # torch's gelu of infinity is NaN, or not, by the vector that it lies in
    kinds = (float("nan"),) if activation == "gelu" else (float("nan"), float("inf"))
    for layout, bad in itertools.product(LAYOUTS, kinds):
        x, *rest = tensors((2, 20, 5, 5), torch.float32, layout)
        x[1, 7, 2, 2] = bad
        for training in (True, False):
            both = (aeup.batch_norm, by_torch)
            options = {"training": training, "activation": activation}
            found = [results(f, (x, *rest), torch.ones_like(x), **options) for f in both]
            (y, _, _, dx, *_), (z, _, _, dz, *_) = found
            assert torch.equal(y.isnan(), z.isnan())
            others = [i for i in range(20) if i != 7]
            assert torch.isfinite(dx[:, others]).all() and (not training or torch.equal(dx.isnan(), dz.isnan()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_at_nan_is_torchs(dtype):
    for layout, activation in itertools.product(LAYOUTS, ("relu", "leaky_relu")):
        x, mean, var, weight, bias = tensors((1, 20, 3, 5), dtype, layout)
        bias[7] = torch.nan
        given = (x, mean, var, weight, bias)
        found = [results(f, given, torch.ones_like(x), activation=activation) for f in (aeup.batch_norm, by_torch)]
        (*_, of_bias), (*_, expected) = found
        assert expected[7].isfinite()
        torch.testing.assert_close(of_bias[7], expected[7], rtol=2**-7, atol=0)


def test_large_arguments_of_the_activations():
    z = torch.tensor([-1e30, -200.0, -90.0, -20.0, -5.0, -1e-3, -1e-20, 0.0, 1e-20, 1e-3, 5.0, 20.0, 90.0, 200.0, 1e30])
    x, ones, zeros = z.view(1, 1, 1, -1), torch.ones(1), torch.zeros(1)
    for activation in ACTIVATIONS:
        y = aeup.batch_norm(x, zeros, ones, eps=0.0, activation=activation)
        torch.testing.assert_close(y, by_torch(x, zeros, ones, eps=0.0, activation=activation), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 32, 40, 40), (1, 300, 33, 17)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(layout, shape):
    given = tensors(shape, torch.float32, layout)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(results(aeup.batch_norm, given, given[0], training=True, activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


SMALL = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
from test_batch_norm_cpu import ACTIVATIONS, CPU, DTYPES, LAYOUTS, SHAPES, check
import torch, aeup
assert aeup.explain(aeup.batch_norm, torch.zeros(1, 1, 2, 2), None, None, training=True)[0].kernel.endswith(sys.argv[2])
for shape, dtype, layout in itertools.product(SHAPES[:4], DTYPES, LAYOUTS):
    for activation in ACTIVATIONS:
        check(shape, dtype, layout, activation, **CPU)
    check(shape, dtype, layout, "silu", training=False, **CPU)
print("checked")
"""


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_every_instruction_set(isa):
    """The other code paths of this processor; the tests above run its best one."""
    x = torch.zeros(1, 1, 2, 2)
    if aeup.explain(aeup.batch_norm, x, None, None, training=True)[0].kernel.endswith("baseline"):
        pytest.skip("this processor has the baseline only")
    command = [sys.executable, "-c", SMALL, os.path.dirname(__file__), isa]
    out = subprocess.run(command, env={**os.environ, "AEUP_ISA": isa}, capture_output=True, text=True)
    assert "checked" in out.stdout, out.stderr
