"""The CUDA kernels of group normalisation without a GPU: csrc/cuda runs on the host (tests/emulate), against float64
torch. See test_batch_norm_emulated.py."""

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from emulate.emulator import emulated, tensor  # noqa: F401
from emulate.emulator_convolution import ACTIVATIONS
from emulate.emulator_group_norm import run, run_backward
from test_batch_norm_emulated import BF16, EPS, F16, F32, F64, SLOPE, ULP, close

from aeup.ops.epilogue import activate

# (shape, groups). Vectors of channels and of pixels, and neither; vectors of a group's elements alone; tiles of several
# groups, of a part of one and of parts of two; planes that a block holds several of; one channel, pixel, group.
SHAPES = (
    ((2, 8, 3, 5), 4),
    ((3, 6, 7, 3), 2),
    ((2, 40, 4, 4), 5),
    ((5, 1, 5, 8), 1),
    ((30, 12, 1, 1), 3),
    ((1, 24, 9, 16), 1),
    ((2, 36, 2, 1), 4),
    ((2, 96, 3, 4), 2),
    ((2, 10, 4, 2), 10),
)


def exact(x, weight, bias, grad, groups, activation):
    """In float64: output, mean, invstd, and the gradients of input, weight and bias."""
    x, weight, bias = (t if t is None else t.double().requires_grad_() for t in (x.detach(), weight, bias))
    y = activate(F.group_norm(x, groups, weight, bias, EPS), None if activation == "none" else activation, SLOPE)
    leaves = [t for t in (x, weight, bias) if t is not None]
    found = iter(torch.autograd.grad(y, leaves, grad.double()))
    gradients = [None if t is None else next(found) for t in (x, weight, bias)]
    var, mean = torch.var_mean(x.detach().unflatten(1, (groups, -1)), (2, 3, 4), correction=0)
    return y.detach(), mean.flatten(), 1 / (var.flatten() + EPS).sqrt(), *gradients


def problem(shape, dtype, nhwc, offset=0, of_grad=0, affine=True, away=0.5, narrow=False):
    torch.manual_seed(0)
    c, of = shape[1], dtype if narrow else F64 if dtype == F64 else F32
    x, grad = tensor(shape, dtype, nhwc, offset), tensor(shape, dtype, nhwc, of_grad)
    x.add_(torch.randn(c).view(-1, 1, 1) * away)
    weight, bias = (torch.randn(c, dtype=of) for _ in range(2))
    return x, grad, *((weight, bias) if affine else (None, None))


def check(
    emulated,  # noqa: F811
    shape,
    groups,
    dtype,
    nhwc,
    activation="relu",
    blocks=5,
    wanted=(True, True, True),
    **how,
):
    x, grad, weight, bias = problem(shape, dtype, nhwc, **how)
    of = F64 if dtype == F64 else F32
    want = exact(x, weight, bias, grad, groups, activation)
    same = dict(channels_last=nhwc, activation=activation, slope=SLOPE, blocks=blocks, offset=how.get("offset", 0))
    got = run(emulated, x, weight, bias, groups, eps=EPS, **same)
    spread = (x.double().abs().amax() * want[2].max()).item() + 1  # of normalised values
    close(got[0], want[0], dtype, spread, of)
    for found, expected in zip(got[1:], want[1:3], strict=True):
        close(found, expected, of, spread, of)
    statistics = [t.to(of) for t in want[1:3]]  # what is checked is this pass
    wanted = wanted if weight is not None else (True, False, False)
    gradients = run_backward(emulated, x, grad, *statistics, weight, bias, groups, wanted=wanted, **same)
    for found, expected, name in zip(gradients, want[3:], ("input", "weight", "bias"), strict=True):
        if found is not None:
            rounding, terms = (dtype, 1) if name == "input" else (weight.dtype, (x.numel() // shape[1]) ** 0.5)
            close(found, expected, rounding, spread * terms, of)


@pytest.mark.parametrize("nhwc", [False, True], ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_shapes(emulated, dtype, nhwc):  # noqa: F811
    for i, (shape, groups) in enumerate(SHAPES):
        check(emulated, shape, groups, dtype, nhwc, ACTIVATIONS[i % len(ACTIVATIONS)])
    check(emulated, (2, 16, 3, 8), 4, dtype, nhwc, "none", affine=False)
    check(emulated, (2, 16, 3, 8), 4, dtype, nhwc, "leaky_relu", offset=1)
    check(emulated, (2, 16, 3, 8), 4, dtype, nhwc, "silu", of_grad=1)
    if dtype in (F16, BF16):
        check(emulated, (2, 16, 3, 8), 4, dtype, nhwc, narrow=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(emulated, activation):  # noqa: F811
    for dtype in (BF16, F32):
        check(emulated, (2, 16, 2, 8), 2, dtype, True, activation)
        check(emulated, (2, 4, 2, 8), 2, dtype, False, activation)


@pytest.mark.parametrize("nhwc", [False, True], ids=LAYOUTS)
def test_gradients_that_are_not_wanted(emulated, nhwc):  # noqa: F811
    for wanted in ((True, False, False), (False, True, True), (False, False, True)):
        check(emulated, (2, 24, 5, 4), 3, BF16, nhwc, wanted=wanted)


@pytest.mark.parametrize("blocks", [1, 2, 13, 40])
def test_many_blocks(emulated, blocks):  # noqa: F811
    """A group's sum over many blocks, and blocks with many tiles in turn."""
    for shape, groups in (((1, 64, 24, 16), 32), ((3, 72, 4, 4), 3), ((2, 4, 40, 32), 2)):
        for nhwc in (False, True):
            check(emulated, shape, groups, BF16, nhwc, "silu", blocks=blocks)


@pytest.mark.parametrize("blocks", [1, 7])
def test_variance_far_from_zero(emulated, blocks):  # noqa: F811
    """Where the mean is 10,000 times the deviation, and where one value is far from all others: the first."""
    for nhwc in (False, True):
        for first in (1000.0, -1000.0):
            x = tensor((2, 8, 16, 16), F32, nhwc) * 0.1 + 1000
            x = x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
            x[0, 0, 0, 0] = x[-1, -1, -1, -1] = first
            y, mean, invstd = run(emulated, x, None, None, 2, channels_last=nhwc, blocks=blocks)
            var, of_x = torch.var_mean(x.double().unflatten(1, (2, 4)), (2, 3, 4), correction=0)
            assert (mean.double() - of_x.flatten()).abs().max() <= 4 * ULP[F32] * 1000
            # Partial means are rounded by up to 1000 ULP / 2, and with them their distances, about a deviation.
            bound = 1000 * ULP[F32] / (var + 1e-5).sqrt().min().item()
            torch.testing.assert_close(invstd.double(), 1 / (var.flatten() + 1e-5).sqrt(), rtol=bound / 2, atol=0)
            assert torch.isfinite(y).all()


def test_same_bits_at_two_addresses(emulated):  # noqa: F811
    x, grad, weight, bias = problem((3, 16, 9, 8), BF16, True)
    how = dict(channels_last=True, activation="silu", blocks=3)
    runs = []
    for _ in range(2):
        y, mean, invstd = run(emulated, x, weight, bias, 4, **how)
        runs.append((y, mean, invstd, *run_backward(emulated, x, grad, mean, invstd, weight, bias, 4, **how)))
        x, grad = x.clone(), grad.clone()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty(emulated):  # noqa: F811
    x, ones = torch.empty(0, 4, 2, 2), torch.ones(4)
    y, *_ = run(emulated, x, ones, ones, 2, channels_last=False)  # nothing is launched
    assert y.shape == x.shape
