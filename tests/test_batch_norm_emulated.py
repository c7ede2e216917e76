"""The CUDA kernels of batch normalisation without a GPU: csrc/cuda runs on the host (tests/emulate), against float64
torch.

The emulator itself fails a run that reads outside the tensors, uses a misaligned vector, stores an element of the
result twice or not at all, or has a data race.
"""

import pytest
import torch
from cases import LAYOUTS
from emulate.emulator import emulated, tensor  # noqa: F401
from emulate.emulator_batch_norm import run, run_backward
from emulate.emulator_convolution import ACTIVATIONS

from aeup.ops.epilogue import activate

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ULP = {F32: 2.0**-23, F64: 2.0**-52, F16: 2.0**-10, BF16: 2.0**-7}
SLOPE, EPS, MOMENTUM = 0.0625, 1e-3, 0.3
# Vectors of channels and of pixels, and neither; tiles that c fills and does not; several blocks; one channel or pixel.
SHAPES = ((2, 8, 3, 5), (3, 5, 7, 3), (2, 40, 4, 4), (9, 1, 5, 8), (70, 3, 1, 1), (1, 24, 9, 16), (1, 33, 2, 1))


def exact(x, weight, bias, grad, mean, var, training, activation):
    """In float64: output, mean, invstd, next running statistics, and the gradients of input, weight and bias."""
    x, weight, bias = (t if t is None else t.double().requires_grad_() for t in (x.detach(), weight, bias))
    count = x.numel() // x.shape[1]
    of_x = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    used = of_x if training else (mean.double(), var.double())
    by_channel = lambda t: t.view(-1, 1, 1)  # noqa: E731
    invstd = 1 / (used[1] + EPS).sqrt()
    z = (x - by_channel(used[0])) * by_channel(invstd)
    z = z if weight is None else z * by_channel(weight)
    z = z if bias is None else z + by_channel(bias)
    y = activate(z, None if activation == "none" else activation, SLOPE)
    leaves = [t for t in (x, weight, bias) if t is not None]
    found = iter(torch.autograd.grad(y, leaves, grad.double()))
    gradients = [None if t is None else next(found) for t in (x, weight, bias)]
    next_mean = (1 - MOMENTUM) * mean.double() + MOMENTUM * of_x[0]
    next_var = (1 - MOMENTUM) * var.double() + MOMENTUM * of_x[1] * count / max(count - 1, 1)
    return [t if t is None else t.detach() for t in (y, used[0], invstd, next_mean, next_var, *gradients)]


def close(got, want, rounding, terms=1.0, of=F32):
    """Within a rounding of the result to `rounding` and a few of sums in `of`; terms: what their sizes add up to, for
    a result of size 1."""
    scale = max(want.abs().max().item(), 1e-3)
    bound = ULP[rounding] * want.abs() + 16 * terms * ULP[of] * scale
    assert torch.isfinite(got).all(), "unwritten (poisoned) or not finite"
    assert ((got.double() - want).abs() <= bound).all(), ((got.double() - want).abs() / bound).max()


def problem(shape, dtype, nhwc, offset=0, of_grad=0, affine=True, away=0.5, narrow=False):
    torch.manual_seed(0)
    c, of = shape[1], dtype if narrow else F64 if dtype == F64 else F32
    x, grad = tensor(shape, dtype, nhwc, offset), tensor(shape, dtype, nhwc, of_grad)
    x.add_(torch.randn(c).view(-1, 1, 1) * away)
    weight, bias, mean = (torch.randn(c, dtype=of) for _ in range(3))
    return x, grad, *((weight, bias) if affine else (None, None)), mean, torch.rand(c).to(of) + 0.5


def check(
    emulated,  # noqa: F811
    shape,
    dtype,
    nhwc,
    activation="relu",
    training=True,
    blocks=5,
    wanted=(True, True, True),
    **how,
):
    x, grad, weight, bias, mean, var = problem(shape, dtype, nhwc, **how)
    of, counter, narrow = F64 if dtype == F64 else F32, torch.tensor([41]), mean.dtype
    want = exact(x, weight, bias, grad, mean, var, training, activation)
    same = dict(channels_last=nhwc, training=training, activation=activation, slope=SLOPE, blocks=blocks)
    same["offset"] = how.get("offset", 0)
    got = run(
        emulated, x, weight, bias, mean, var, counter if training else None, momentum=MOMENTUM, eps=EPS, **same
    )  # fmt: skip
    spread = (x.double().abs().amax() * want[2].max()).item() + 1  # of normalised values
    close(got[0], want[0], dtype, spread, of)
    for found, expected, rounding in zip(got[1:5], want[1:5], (of, of, narrow, narrow), strict=True):
        if found is not None:
            close(found, expected, rounding, spread, of)
    assert not training or got[5].item() == 42
    # From the exact statistics: what is checked is this pass.
    statistics = [t.to(of) for t in want[1:3]]
    wanted = wanted if weight is not None else (True, False, False)
    gradients = run_backward(emulated, x, grad, *statistics, weight, bias, wanted=wanted, **same)
    for found, expected, name in zip(gradients, want[5:], ("input", "weight", "bias"), strict=True):
        if found is not None:
            rounding, terms = (dtype, 1) if name == "input" else (narrow, (x.numel() // shape[1]) ** 0.5)
            close(found, expected, rounding, spread * terms, of)


@pytest.mark.parametrize("nhwc", [False, True], ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_training(emulated, dtype, nhwc):  # noqa: F811
    for i, shape in enumerate(SHAPES):
        check(emulated, shape, dtype, nhwc, ACTIVATIONS[i % len(ACTIVATIONS)])
    check(emulated, (2, 16, 3, 8), dtype, nhwc, "none", affine=False)
    check(emulated, (2, 16, 3, 8), dtype, nhwc, "leaky_relu", offset=1)
    check(emulated, (2, 16, 3, 8), dtype, nhwc, "silu", of_grad=1)
    if dtype in (F16, BF16):
        check(emulated, (2, 16, 3, 8), dtype, nhwc, narrow=True)
        check(emulated, (2, 5, 3, 3), dtype, nhwc, training=False, narrow=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(emulated, activation):  # noqa: F811
    for dtype in (BF16, F32, F64):
        for training in (False, True):
            check(emulated, (2, 16, 2, 8), dtype, True, activation, training)
            check(emulated, (2, 3, 2, 8), dtype, False, activation, training)


@pytest.mark.parametrize("shape", [(1, 8, 3, 8), (1, 5, 3, 3)], ids=["vectors", "elements"])
def test_gradient_at_nan_is_torchs(emulated, shape):  # noqa: F811
    x, grad, weight, bias, mean, var = problem(shape, F32, False)
    bias[2] = torch.nan
    statistics = mean, 1 / (var + EPS).sqrt()
    for activation in ("none", "relu", "leaky_relu"):
        how = dict(channels_last=False, training=False, activation=activation, slope=SLOPE, blocks=3)
        got = run_backward(emulated, x, grad, *statistics, weight, bias, **how)[2][2]
        slope = SLOPE if activation == "leaky_relu" else 1.0
        torch.testing.assert_close(got, grad[:, 2].sum() * slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 16, 3, 8), (2, 5, 3, 3)], ids=["vectors", "elements"])
def test_relu_is_flat_for_an_infinite_gradient(emulated, shape):  # noqa: F811
    x, grad, weight, bias, mean, var = problem(shape, F32, False)
    want = exact(x, weight, bias, grad, mean, var, False, "relu")
    flat = want[0] == 0
    want = exact(x, weight, bias, grad.masked_fill(flat, 0), mean, var, False, "relu")[5:]
    how = dict(channels_last=False, training=False, activation="relu", blocks=3)
    statistics = mean, 1 / (var + EPS).sqrt()
    grad = grad.masked_fill(flat, torch.inf)
    for found, expected in zip(run_backward(emulated, x, grad, *statistics, weight, bias, **how), want, strict=True):
        close(found, expected, F32, 100)


@pytest.mark.parametrize("nhwc", [False, True], ids=LAYOUTS)
def test_gradients_that_are_not_wanted(emulated, nhwc):  # noqa: F811
    for training in (False, True):
        for wanted in ((True, False, False), (False, True, True), (False, False, True)):
            check(emulated, (2, 24, 5, 4), BF16, nhwc, training=training, wanted=wanted)


@pytest.mark.parametrize("blocks", [1, 2, 13, 40])
def test_many_blocks(emulated, blocks):  # noqa: F811
    for shape in ((5, 64, 9, 8), (3, 136, 4, 4), (40, 3, 7, 5)):
        for nhwc in (False, True):
            check(emulated, shape, BF16, nhwc, "silu", blocks=blocks)


@pytest.mark.parametrize("blocks", [1, 7])
def test_variance_far_from_zero(emulated, blocks):  # noqa: F811
    """Where the mean is 10,000 times the deviation, and where one value is far from all others: the first."""
    for nhwc in (False, True):
        for first in (1000.0, -1000.0):
            x = tensor((4, 8, 16, 16), F32, nhwc) * 0.1 + 1000
            x = x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
            x[0, :, 0, 0] = x[-1, :, -1, -1] = first
            y, mean, invstd, *_ = run(emulated, x, None, None, None, None, None, channels_last=nhwc, blocks=blocks)
            wide = x.double()
            var = wide.var((0, 2, 3), unbiased=False)
            assert (mean.double() - wide.mean((0, 2, 3))).abs().max() <= 4 * ULP[F32] * 1000
            # Partial means are rounded by up to 1000 ULP / 2, and with them their distances, about a deviation.
            bound = 1000 * ULP[F32] / (var + 1e-5).sqrt().min().item()
            torch.testing.assert_close(invstd.double(), 1 / (var + 1e-5).sqrt(), rtol=bound / 2, atol=0)
            assert torch.isfinite(y).all()


def test_same_bits_in_both_directions_of_the_threads(emulated):  # noqa: F811
    """The emulator runs every second block backwards; here the same blocks at two addresses."""
    x, grad, weight, bias, *_ = problem((6, 16, 9, 8), BF16, True)
    how = dict(channels_last=True, activation="silu", blocks=3)
    runs = []
    for _ in range(2):
        y, mean, invstd, *_ = run(emulated, x, weight, bias, None, None, None, **how)
        runs.append((y, mean, invstd, *run_backward(emulated, x, grad, mean, invstd, weight, bias, **how)))
        x, grad = x.clone(), grad.clone()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty(emulated):  # noqa: F811
    for shape in ((0, 3, 2, 2), (2, 3, 0, 4)):
        x = torch.empty(shape)
        ones = torch.ones(3)
        with pytest.raises(RuntimeError, match="byte 0 of the result was not stored"):  # nothing is launched
            run(emulated, x, ones, ones, ones, ones, None, channels_last=False)
