"""The Triton kernels of batch normalisation against torch in float64: on a GPU for real, elsewhere in Triton's
interpreter (see triton_interpreter.py)."""

import importlib
import itertools

import pytest
import torch
from aeup.kernels import plans
from batch_norm_cases import check, results
from cases import LAYOUTS
from test_batch_norm import ACTIVATIONS, by_torch, tensors, views
from triton_interpreter import DEVICE, MARKS, check_in_the_interpreter, poison, select_tests  # noqa: F401

import aeup

pytestmark = MARKS

host = importlib.import_module("aeup.kernels.batch_norm")
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Vectors of channels and of pixels, and neither; blocks of channels that c fills and does not; one channel, one pixel.
SHAPES = ((2, 8, 3, 5), (3, 5, 7, 3), (2, 40, 4, 4), (9, 1, 5, 8), (70, 3, 1, 1), (1, 24, 9, 16), (1, 33, 2, 1))
ON = {"backend": "triton", "device": DEVICE}


@pytest.fixture
def sizes():
    """Sets the sizes of every kernel: small tiles of few channels, and many ranges, unless others are given."""
    with plans.trying({"batch_norm": (chosen := {})}):

        def use(**given):
            chosen.update({"lanes": 8, "warps": 1, "stages": 2, "programs": 5, "segment": 32} | given)
            plans.forget()

        yield use


def run(given, grad=None, **options):
    """As `results`, by the kernels, on the CPU."""
    given = [t if t is None else t.to(DEVICE) for t in given]
    grad = given[0] if grad is None else grad.to(DEVICE)
    with aeup.backend("triton"):
        found = results(aeup.batch_norm, given, grad, **{"training": True} | options)
    return [t.detach().cpu() for t in found]


def ranges(shape, dtype, nhwc):
    """Ranges of positions, and tiles of one, of the kernels in training."""
    n, c, h, w = shape
    p = host.Norm(n, c, h * w, host.FLOATS[dtype], nhwc, True, True, True, 0, 0.0, "interpreter")
    launches = host.forward_plan(p, True, True, 0.1, 1e-5).launches + host.backward_plan(p, True, True, True).launches
    return {(x.grid // x.scalars["blocks"], x.scalars["steps"]) for x in launches}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (F32, F64, F16, BF16), ids=str)
def test_training(dtype, layout):
    for i, shape in enumerate(SHAPES):
        check(shape, dtype, layout, ACTIVATIONS[i % len(ACTIVATIONS)], **ON)
    check((2, 16, 3, 8), dtype, layout, None, affine=False, **ON)
    if dtype in (F16, BF16):
        check((2, 16, 3, 8), dtype, layout, "relu", narrow=True, **ON)
        check((2, 5, 3, 3), dtype, layout, "relu", training=False, narrow=True, **ON)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation):
    for dtype in (BF16, F32, F64):
        for training in (False, True):
            check((2, 16, 2, 8), dtype, "nhwc", activation, training, **ON)
            check((2, 3, 2, 8), dtype, "nchw", activation, training, **ON)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranges(sizes, layout, monkeypatch):
    """One of many tiles, and many, of which few are read at once."""
    monkeypatch.setattr(host, "AT_ONCE", 4)
    seen = set()
    for lanes, programs, segment, shape, dtype in ((8, 1, 16, (4, 3, 5, 8), F32), (2, 10, 64, (3, 8, 5, 4), BF16)):
        sizes(lanes=lanes, programs=programs, segment=segment)
        check(shape, dtype, layout, "silu", **ON)
        seen |= ranges(shape, dtype, layout == "nhwc")
    counts, steps = zip(*seen, strict=True)
    assert min(counts) == 1 < 4 < max(counts) and max(steps) >= 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets(sizes, layout, monkeypatch):
    """The 64-bit variants of the kernels compute the same."""
    given, once = tensors((3, 8, 5, 4), F32, layout), []
    for limit in (host.LIMIT32, 100):
        monkeypatch.setattr(host, "LIMIT32", limit)
        sizes(lanes=16, programs=4)
        once.append(run(given, activation="silu"))
    torch.testing.assert_close(*once, rtol=1e-6, atol=1e-6)


def moments(x, eps, **options):
    """Mean and 1 / sqrt(var + eps) of a batch, by the kernels."""
    _, *found = host.batch_norm(x.to(DEVICE), *[None] * 5, True, 0.1, eps, **options)
    return [t.cpu().double() for t in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_far_from_zero(sizes, layout):
    """Where the mean is 10,000 times the deviation; and where two values are far from all others."""
    check((4, 3, 16, 16), F32, layout, None, away=1e4, **ON)
    eps = torch.finfo(F32).eps
    for first, programs in itertools.product((1000.0, -1000.0), (1, 7)):
        sizes(lanes=32, programs=programs)
        x = tensors((4, 8, 16, 16), F32, layout)[0] * 0.1 + 1000
        x[0, :, 0, 0] = x[-1, :, -1, -1] = first
        mean, invstd = moments(x, 1e-5)
        var = x.double().var((0, 2, 3), unbiased=False)
        assert (mean - x.double().mean((0, 2, 3))).abs().max() <= 4 * eps * 1000
        # Partial means are rounded by up to 1000 eps / 2, and with them their distances, about a deviation.
        bound = 1000 * eps / (var + 1e-5).sqrt().min().item()
        torch.testing.assert_close(invstd, 1 / (var + 1e-5).sqrt(), rtol=bound / 2, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_are_not_wanted(layout):
    given = tensors((2, 12, 5, 4), F32, layout)
    x, _, _, weight, bias = (t.to(DEVICE) for t in given)
    for training in (False, True):
        statistics = host.batch_norm(x, weight, bias, *(t.to(DEVICE) for t in given[1:3]), None, training, 0.1, 1e-5)[
            1:
        ]
        call = x.cos(), x, *statistics, weight, bias, training, "relu", 0.0
        every = host.batch_norm_backward(*call, (True, True, True))
        for wanted in itertools.product((True, False), repeat=3):
            for want, got, t in zip(wanted, host.batch_norm_backward(*call, wanted), every, strict=True):
                torch.testing.assert_close(got, t if want else t.new_empty(0))


def test_two_launches_in_training_and_one_outside():
    def names(make, training, *rest):
        p = host.Norm(2, 8, 16, "fp32", True, training, True, True, 1, 0.0, "interpreter")
        return [launch.kernel for launch in make(p, *rest).launches]

    assert names(host.forward_plan, True, True, True, 0.1, 1e-5) == ["statistics", "normalise"]
    assert names(host.forward_plan, False, False, False, 0.1, 1e-5) == ["normalise"]
    for training, *wanted in ((True, True, False, False), (False, True, True, False), (True, False, True, False)):
        assert names(host.backward_plan, training, *wanted) == ["sum_gradients", "input_gradient"]
    assert names(host.backward_plan, False, True, False, False) == ["input_gradient"]


def test_views_and_mixed_layouts():
    x, *parameters = tensors((4, 9, 7, 6), F32)
    for name, view in views(x).items():
        given = view, *(t[2:8].clone() for t in parameters)
        for grad in (
            torch.ones(()).expand(view.shape),
            view.cos().contiguous(),
            view.cos().contiguous(memory_format=torch.channels_last),
        ):
            got, want = (
                run(given, grad, activation="relu"),
                results(by_torch, given, grad, training=True, activation="relu"),
            )
            for a, b in zip(got, want, strict=True):
                assert a.stride() == b.stride(), name
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_in_place_updates_are_as_known_to_autograd_as_torchs():
    x, mean, var, weight, bias = (t.to(DEVICE) for t in tensors((2, 4, 3, 3), F32))
    counter = torch.tensor(41, device=DEVICE)
    before = mean._version, var._version, counter._version
    host.batch_norm(x, weight, bias, mean, var, counter, False, 0.1, 1e-5)
    assert (mean._version, var._version, counter._version) == before and counter == 41
    host.batch_norm(x, weight, bias, mean, var, counter, True, 0.1, 1e-5)
    assert (mean._version, var._version, counter._version) == (*before[:2], before[2] + 1) and counter == 42


def test_same_bits(sizes):
    for layout in LAYOUTS:
        given = tensors((3, 8, 5, 4), BF16, layout)
        sizes(lanes=16, programs=6)
        assert all(map(torch.equal, run(given, activation="silu"), run(given, activation="silu")))


def test_nan_and_infinity():
    """With running statistics they pass as in torch; and no gradient comes where relu is flat, whatever arrives."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 100.0, -1.0]).view(1, 1, 1, 5)
    ones = [torch.zeros(1), torch.ones(1)]
    for activation in (None, "relu", "leaky_relu", "silu", "tanh", "sigmoid"):
        with aeup.backend("triton"):
            got = aeup.batch_norm(x.to(DEVICE), *(t.to(DEVICE) for t in ones), activation=activation).cpu()
        torch.testing.assert_close(got, by_torch(x, *ones, activation=activation), equal_nan=True, msg=str(activation))
    for activation in ("relu", "leaky_relu"):
        given, grad = (x.nan_to_num(1.0, 1.0, -1.0), *ones), torch.full_like(x, torch.inf)
        got = run(given, grad, training=False, activation=activation)
        want = results(by_torch, given, grad, training=False, activation=activation)
        torch.testing.assert_close(got[3], want[3])


def test_a_module_in_training():
    """As aeup.BatchNorm2d calls it, and as the registered operator, which changes nothing in place."""
    layer = aeup.BatchNorm2d(6, activation="gelu").to(DEVICE)
    other = torch.nn.BatchNorm2d(6)
    for seed in range(2):
        x = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(seed))
        with aeup.backend("triton"):
            y = layer(x.to(DEVICE))
        torch.testing.assert_close(y.cpu(), torch.nn.functional.gelu(other(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close({k: v.cpu() for k, v in layer.state_dict().items()}, other.state_dict())
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    with aeup.backend("triton"):
        args = x.to(DEVICE), layer.weight, layer.bias, layer.running_mean, layer.running_var
        *_, next_mean, next_var = torch.ops.aeup.batch_norm(*args, True, 0.1, 1e-5, "gelu")
    other(x)
    torch.testing.assert_close((next_mean.cpu(), next_var.cpu()), (other.running_mean, other.running_var))
    assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, var)


def test_refusals():
    x, ones = torch.zeros(2, 3, 2, 2, device=DEVICE), torch.ones(3, device=DEVICE)
    rest = (True, 0.1, 1e-5)

    def why(x, *args, name="batch_norm"):
        return host.refuses_batch_norm(name, x, *args)

    assert why(x, *[ones] * 4, None, *rest) is None and why(x, *[None] * 5, *rest, "gelu", 0.0) is None
    assert why(x.half(), ones, None, ones.half(), ones.half(), None, *rest) is None
    assert "meta" in why(x.to("meta"), *[None] * 5, *rest)
    assert "int64" in why(x.long(), *[None] * 5, *rest)
    assert "4-D" in why(x[0], *[None] * 5, *rest) and "no elements" in why(x[:0], *[None] * 5, *rest)
    assert "bias is torch.float16" in why(x, ones, ones.half(), *[None] * 3, *rest)
    assert "weight must have 3" in why(x, ones[:2], *[None] * 4, *rest)
    assert "adjacent" in why(x, torch.ones(6, device=DEVICE)[::2], *[None] * 4, *rest)
    assert "elu" in why(x, *[None] * 5, *rest, "elu", 0.0)
    assert "belong together" in why(x, None, None, ones, None, None, *rest)
    assert "outside training" in why(x, *[None] * 5, False, 0.1, 1e-5)
    assert "no variance" in why(x[:1, :, :1, :1], *[None] * 5, *rest)
    assert "counter" in why(x, *[None] * 4, ones, *rest)
    huge = x[:, :, :1, :1].expand(2, 3, 1 << 16, 1 << 16)
    assert "one image of x" in why(huge, *[None] * 5, *rest)
    back = x, x, ones, ones, None, None, True, None, 0.0, (True, False, False)
    assert why(*back, name="batch_norm_backward") is None
    assert "mean is torch.float64" in why(x, x, ones.double(), *back[3:], name="batch_norm_backward")
    assert "like x" in why(x[:1], *back[1:], name="batch_norm_backward")
    with pytest.raises(RuntimeError, match="aeup.kernels.batch_norm: dtype torch.int64"):
        host.batch_norm(x.long(), *[None] * 5, *rest)


def test_in_the_interpreter():
    """Runs the tests above with TRITON_INTERPRET=1."""
    check_in_the_interpreter(__file__)


select_tests(globals())
