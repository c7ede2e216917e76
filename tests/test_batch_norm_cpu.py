"""The CPU's kernels of batch norm: the error budget against float64, all instruction sets, no bit that depends on the
number of threads."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
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
NAMES = ("output", "gradient of the input", "of the weight", "of the bias", "running mean", "running variance")


def results(fn, given, grad, training, activation):
    """Output, gradients, running statistics, in float64."""
    x, mean, var, weight, bias = (t.clone(memory_format=torch.preserve_format) for t in given)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = fn(x, mean, var, weight, bias, training, activation=activation)
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, leaves, grad.to(x.dtype)), mean, var)]


def check(shape, dtype, layout, training, activation, offset=0.0):
    """Within twice torch's own error against float64 plus a few ulps of the terms that are added, each normalised."""
    given = tensors(shape, dtype, layout)
    given = (given[0] + offset).to(dtype), given[1] + offset, *given[2:]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wide = [t.double() for t in given]
    ours, torchs = (results(f, given, grad, training, activation) for f in (aeup.batch_norm, by_torch))
    exact = results(by_torch, wide, grad, training, activation)
    values = given[0].numel() // shape[1]
    for i, name in enumerate(NAMES):
        got, want = ours[i], exact[i]
        scale = want.abs().max().item() + (values**0.5 if name in NAMES[2:4] else 0.0)
        eps = torch.finfo(dtype if i < 2 else given[1].dtype).eps
        if dtype is torch.float64:  # torch is the reference, and adds one by one
            eps *= values**0.5
        allowed = 2 * (torchs[i] - want).abs().max().item() + 4 * eps * scale
        error = (got - want).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype):
    for layout in LAYOUTS:
        for activation in ACTIVATIONS:
            check(shape, dtype, layout, True, activation)
        for activation in (None, "relu", "gelu"):
            check(shape, dtype, layout, False, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero(layout):
    for offset in (100.0, 1e4):
        check((4, 20, 17, 19), torch.float32, layout, True, "leaky_relu", offset)


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
            y, dx, *_ = results(aeup.batch_norm, (x, *rest), torch.ones_like(x), training, activation)
            z, dz, *_ = results(by_torch, (x, *rest), torch.ones_like(x), training, activation)
            assert torch.equal(y.isnan(), z.isnan())
            others = [i for i in range(20) if i != 7]
            assert torch.isfinite(dx[:, others]).all() and (not training or torch.equal(dx.isnan(), dz.isnan()))


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
            found.append(results(aeup.batch_norm, given, given[0], True, "silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


SMALL = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
from test_batch_norm_cpu import ACTIVATIONS, DTYPES, LAYOUTS, SHAPES, check
import torch, aeup
assert aeup.explain(aeup.batch_norm, torch.zeros(1, 1, 2, 2), None, None, training=True)[0].kernel.endswith(sys.argv[2])
for shape, dtype, layout in itertools.product(SHAPES[:4], DTYPES, LAYOUTS):
    for activation in ACTIVATIONS:
        check(shape, dtype, layout, True, activation)
    check(shape, dtype, layout, False, "silu")
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
