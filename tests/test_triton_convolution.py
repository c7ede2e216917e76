"""The Triton kernels of the transposed convolution against torch in float64: on a GPU for real, elsewhere in Triton's
interpreter (see triton_interpreter.py)."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, check_budget
from triton_cases import ConvCase, random
from triton_interpreter import DEVICE, INTERPRETED, MARKS, check_in_the_interpreter, poison, select_tests  # noqa: F401

pytestmark = MARKS

host = importlib.import_module("aeup.kernels.convolution")
plans = importlib.import_module("aeup.kernels.convolution_plans")

# (n, ci, co), input size, kernel, stride, padding, output padding, dilation, groups
GEOMETRIES = {
    "k4s2": ((2, 6, 5), (5, 7), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "k4s2-rgb": ((2, 4, 3), (4, 9), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "k4s2-one-channel": ((1, 3, 1), (4, 8), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "k3s2-op1": ((1, 4, 6), (6, 5), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1),
    "k2s2": ((2, 3, 4), (3, 5), (2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 1),
    "k4-one-pixel": ((3, 10, 4), (1, 1), (4, 4), (1, 1), (0, 0), (0, 0), (1, 1), 1),
    "k3s1": ((1, 5, 4), (4, 6), (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "k16s8": ((1, 3, 3), (2, 3), (16, 16), (8, 8), (4, 4), (0, 0), (1, 1), 1),
    "k6s3": ((1, 3, 2), (3, 4), (6, 6), (3, 3), (1, 2), (1, 2), (1, 1), 1),
    "axes": ((2, 3, 4), (5, 3), (5, 2), (3, 1), (2, 0), (1, 0), (1, 2), 1),
    "stride-over-kernel": ((1, 2, 3), (3, 4), (1, 2), (3, 4), (0, 0), (2, 3), (1, 1), 1),
    "dilated": ((1, 3, 4), (4, 5), (3, 3), (2, 3), (2, 1), (1, 2), (3, 2), 1),
    "dilated-common-factor": ((1, 2, 3), (3, 4), (3, 2), (4, 6), (1, 2), (3, 5), (2, 4), 1),
    "groups": ((2, 6, 9), (3, 4), (4, 3), (2, 2), (1, 1), (0, 1), (1, 1), 3),
    "depthwise": ((1, 4, 4), (4, 3), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 4),
    "padded-away": ((1, 2, 2), (8, 1), (3, 4), (1, 2), (4, 1), (0, 1), (1, 1), 1),
    "k1": ((2, 3, 4), (3, 2), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1),
}
FEW = ("k4s2", "k4s2-rgb", "k3s2-op1", "k4-one-pixel", "dilated", "groups")
ACTIVATIONS = {
    None: lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, _: F.silu(x),
    "gelu": lambda x, _: F.gelu(x),
    "tanh": lambda x, _: torch.tanh(x),
    "sigmoid": lambda x, _: torch.sigmoid(x),
}
HALF = (torch.bfloat16, torch.float16)


class Case(ConvCase):
    """Tensors of one geometry, and torch's results in float64 and in the type itself."""

    def __init__(self, geometry, dtype, layout, weight_layout=None):
        (n, ci, co), size, kernel, *args, groups = GEOMETRIES[geometry]
        self.stride, self.padding, self.output_padding, self.dilation, self.groups = *args, groups
        self.size, self.kernel, self.layout, self.dtype = size, kernel, layout, dtype
        self.x = random((n, ci, *size), dtype, layout, 0)
        self.w = random((ci, co // groups, *kernel), dtype, weight_layout or layout, 1)
        self.b = random((co,), dtype, layout, 2) if groups != 3 else None
        self.reference = self.torch(torch.float64, "relu", 0.0)
        self.grad = random(self.reference[0].shape, dtype, layout, 3)
        self.reference += self.gradients(torch.float64)
        self.own = self.torch(dtype, "relu", 0.0) + self.gradients(dtype)

    def linear(self, x, w, b=None):
        return F.conv_transpose2d(x, w, b, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def torch(self, dtype, activation, slope):
        x, w, b = (None if t is None else t.to(dtype) for t in (self.x, self.w, self.b))
        return (ACTIVATIONS[activation](self.linear(x, w, b), slope),)

    def forward(self, activation="relu", slope=0.01, **kwargs):
        x, w, b = (None if t is None else t.to(DEVICE) for t in (self.x, self.w, self.b))
        args = (self.stride, self.padding, self.output_padding, self.groups, self.dilation, activation, slope)
        return host.conv_transpose2d(x, w, b, *args, **kwargs).cpu()

    def input_gradient(self, **kwargs):
        args = (self.size, self.stride, self.padding, self.groups, self.dilation)
        return host.conv_transpose2d_input_gradient(self.grad.to(DEVICE), self.w.to(DEVICE), *args, **kwargs).cpu()

    def weight_gradient(self, **kwargs):
        args = (self.kernel, self.stride, self.padding, self.groups, self.dilation)
        return host.conv_transpose2d_weight_gradient(self.grad.to(DEVICE), self.x.to(DEVICE), *args, **kwargs).cpu()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float32(geometry, layout):
    Case(geometry, torch.float32, layout).check()


@pytest.mark.parametrize("dtype", (torch.float64, *HALF), ids=str)
@pytest.mark.parametrize("geometry", FEW)
def test_dtypes(geometry, dtype):
    for layout in {torch.float64: ("nchw",), torch.float16: ("nhwc",)}.get(dtype, LAYOUTS):
        Case(geometry, dtype, layout).check()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies in float32")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32(layout):
    """tf32 keeps 10 bits of each factor."""
    case = Case("k4s2", torch.float32, layout)
    for a, reference in zip(case.results(tf32=True), case.reference, strict=True):
        assert (a - reference).abs().max() <= 4e-3 * reference.abs().max()


def test_mixed_layouts():
    """A contiguous weight with a channels-last input, packed or read in place; and the reverse."""
    for layouts in (("nhwc", "nchw"), ("nchw", "nhwc")):
        Case("k4s2", torch.float32, *layouts).check_mixed_layouts()


@pytest.fixture
def blocks(monkeypatch):
    """Sets the block sizes of every kernel."""

    def clear():
        for cached in (host.prepared, plans.gemm_plan, plans.weight_plan, plans.epilogue_plan):
            cached.cache_clear()

    def use(**config):
        small = {
            "m": 16,
            "n": 16,
            "k": 16,
            "warps": 4,
            "stages": 2,
            "programs": 8,
            "least": 1,
            "elements": 32,
            "sum": 64,
        }
        config = small | config
        monkeypatch.setattr(plans, "configuration", lambda *_: config)
        clear()

    yield use
    clear()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks(blocks, layout):
    """Several blocks of rows, columns and reduced channels, the last ones part filled; more ranges than are summed at
    once; the copies that make channels innermost; and every way to put phases side by side."""
    GEOMETRIES["blocks"] = ((1, 21, 18), (4, 5), (4, 3), (2, 2), (1, 1), (0, 1), (1, 1), 1)
    case = Case("blocks", torch.float32, layout)
    for options in (
        {"transpose": True, "pack": True, "phases": [2, 2], "programs": 1000},
        {"transpose": False, "pack": False, "phases": [1, 2], "k": 32},
        {"transpose": False, "phases": [1, 1], "k": 32, "n": 32, "pair": False},
    ):
        blocks(**options)
        case.check()
    del GEOMETRIES["blocks"]


def test_wide_offsets(blocks, monkeypatch):
    """The 64-bit variants of the kernels compute the same."""
    cases = [Case("groups", torch.float32, "nhwc"), Case("k4s2", torch.bfloat16, "nchw")]
    monkeypatch.setattr(plans, "LIMIT32", 300)
    blocks(m=64, n=64, k=32, programs=2, elements=256)
    for case in cases:
        case.check()


def test_deterministic(blocks):
    """More ranges than are summed at once give the same bits each time."""
    x, grad = random((2, 4, 9, 17), torch.float32, "nhwc", 0), random((2, 3, 18, 34), torch.float32, "nhwc", 1)
    args = ((4, 4), (2, 2), (1, 1), 1, (1, 1))
    once = host.conv_transpose2d_weight_gradient(grad.to(DEVICE), x.to(DEVICE), *args)
    blocks(n=64, programs=100)
    made = []
    real = plans.summed
    plans.summed = lambda total, count, *rest, **to: made.append(count) or real(total, count, *rest, **to)
    try:
        ranged = [host.conv_transpose2d_weight_gradient(grad.to(DEVICE), x.to(DEVICE), *args) for _ in range(2)]
    finally:
        plans.summed = real
    assert made == [20]
    assert torch.equal(*ranged)
    torch.testing.assert_close(once, ranged[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, layout):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        case = Case("k4s2", dtype, layout)
        if dtype is torch.float64:
            case.w *= 1e-3  # near zero too
        args = (activation, 0.3)
        reference, own = case.torch(torch.float64, *args)[0], case.torch(dtype, *args)[0]
        check_budget(case.forward(*args), reference, own, floor_ulps=4)

        # The gradient before the activation, and the bias's, against autograd.
        z = case.torch(torch.float64, None, 0.0)[0].to(dtype)
        y = ACTIVATIONS[activation](z, 0.3)
        saved = None if activation is None else z if activation in ("silu", "gelu") else y
        given = None if saved is None else saved.to(DEVICE)
        at = z.double().requires_grad_()
        want = torch.autograd.grad(ACTIVATIONS[activation](at, 0.3), at, case.grad.double())[0]
        own_at = z.clone().requires_grad_()
        own = torch.autograd.grad(ACTIVATIONS[activation](own_at, 0.3), own_at, case.grad)[0]
        grad = case.grad.to(DEVICE)
        got, bias = host.conv_epilogue_gradient(grad, given, activation, 0.3, True)
        assert got.dtype == bias.dtype == dtype and bias.shape == (case.w.shape[1],)
        assert got is grad or got.is_contiguous(memory_format=LAYOUTS[layout])
        check_budget(got.cpu(), want, own, floor_ulps=8 if dtype in HALF else 4)  # tanh's y is rounded before 1 - y * y
        exact = want.sum((0, 2, 3))
        size = want.abs().sum((0, 2, 3)).max()
        assert (bias.cpu().double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * size
        again, none = host.conv_epilogue_gradient(grad, given, activation, 0.3, False)
        assert torch.equal(again, got) and none.shape == (0,)


@pytest.mark.parametrize("geometry", ("k4s2", "k4s2-rgb", "k3s2-op1", "k4-one-pixel", "stride-over-kernel", "groups"))
def test_convolutions(geometry):
    """Of the output by the same weight, with bias and activation: the kernel of the input's gradient."""
    for dtype, layout, activation in ((torch.float32, "nchw", "leaky_relu"), (torch.bfloat16, "nhwc", "silu")):
        case = Case(geometry, dtype, layout)
        bias = random(case.w.shape[:1], dtype, layout, 4)
        reference, own = (
            F.conv2d(
                *(t.to(d) for t in (case.grad, case.w, bias)), case.stride, case.padding, case.dilation, case.groups
            )
            for d in (torch.float64, dtype)
        )
        args = (t.to(DEVICE) for t in (case.grad, case.w, bias))
        got = host.conv2d(*args, case.stride, case.padding, case.groups, case.dilation, activation, 0.3).cpu()
        after = ACTIVATIONS[activation]
        check_budget(got, after(reference, 0.3), after(own, 0.3), floor_ulps=4)


def test_nan_and_infinity():
    """They pass as in torch."""
    x = torch.zeros(1, 1, 1, 4)
    x[0, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 100.0])
    w = torch.ones(1, 1, 1, 1)
    args = (None, (1, 1), (0, 0), (0, 0), 1, (1, 1))
    for activation, fn in ACTIVATIONS.items():
        got = host.conv_transpose2d(x.to(DEVICE), w.to(DEVICE), *args, activation, 0.3).cpu()
        want = fn(x, 0.3)
        if activation == "gelu":
            want[0, 0, 0, 1] = torch.inf  # torch's own on a CPU is NaN
        torch.testing.assert_close(got, want, equal_nan=True, msg=str(activation))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_gradients_of_nan_and_infinity(activation):
    """What the activation lets through is torch's, whatever the gradient."""
    of = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, -0.0, 0.0, 2.0])
    y, grad = (t.contiguous() for t in torch.cartesian_prod(of, of).T.view(2, 1, 7, 7, 1))
    aten = torch.ops.aten
    relu = activation == "relu"
    want = aten.threshold_backward(grad, y, 0) if relu else aten.leaky_relu_backward(grad, y, 0.3, True)
    got, _ = host.conv_epilogue_gradient(grad.to(DEVICE), y.to(DEVICE), activation, 0.3, False)
    torch.testing.assert_close(got.cpu(), want, equal_nan=True)


def test_views():
    """Offset, strided and expanded tensors."""
    case = Case("k4s2", torch.float32, "nchw")
    want = case.results()
    n, c, h, w = case.x.shape
    wide = torch.zeros(n, c + 2, h + 1, w + 3)
    wide[:, 1:-1, :h, 2:-1] = case.x
    case.x = wide[:, 1:-1, :h, 2:-1]
    turned = case.w.transpose(2, 3).contiguous().transpose(2, 3)
    case.w, case.b = turned, torch.stack((case.b, case.b), 1)[:, 0]
    case.grad = torch.cat((case.grad, case.grad))[n:]
    for got, expected in zip(case.results(), want, strict=True):
        torch.testing.assert_close(got, expected)
    ones = torch.ones(()).expand(case.grad.shape)
    case.grad = ones
    got = case.weight_gradient()
    case.grad = ones.contiguous()
    torch.testing.assert_close(got, case.weight_gradient())
    assert host.conv_epilogue_gradient(ones.to(DEVICE), None, None, 0.0, True)[1].cpu().eq(ones[:, 0].numel()).all()


def test_empty():
    args = ((2, 2), (1, 1), (0, 0), 1, (1, 1))
    x, w, b = torch.zeros(0, 3, 4, 5, device=DEVICE), torch.zeros(3, 2, 4, 4, device=DEVICE), torch.zeros(2).to(DEVICE)
    y = host.conv_transpose2d(x, w, b, *args)
    assert y.shape == (0, 2, 8, 10)
    args = ((2, 2), (1, 1), 1, (1, 1))
    assert host.conv_transpose2d_input_gradient(y, w, (4, 5), *args).shape == x.shape
    gradient = host.conv_transpose2d_weight_gradient(y, x, (4, 4), *args)
    assert gradient.shape == w.shape and not gradient.any()
    got, bias = host.conv_epilogue_gradient(y, y, "relu", 0.0, True)
    assert got.shape == y.shape and bias.shape == (2,) and not bias.any()


def test_refusals():
    x, w, b = (torch.zeros(s, device=DEVICE) for s in ((1, 4, 3, 3), (4, 2, 4, 4), (2,)))
    rest = ((2, 2), (1, 1), (0, 0), 1, (1, 1))

    def why(*args, name="conv_transpose2d"):
        return host.refuses_convolution(name, *args)

    assert why(x, w, b, *rest) is None and why(x, w, None, *rest, "gelu", 0.0) is None
    assert "meta" in why(x.to("meta"), w, b, *rest)
    assert "int64" in why(x.long(), w, b, *rest)
    assert "weight is torch.float64" in why(x, w.double(), b, *rest)
    assert "bias is torch.float16" in why(x, w, b.half(), *rest)
    assert "4-D" in why(x[0], w, b, *rest) and "1-D" in why(x, w, w, *rest)
    assert "elu" in why(x, w, b, *rest, "elu", 0.0)
    assert "4 channels and weight 3" in why(x, w[:3], b, *rest)
    assert "bias has 1" in why(x, w, b[:1], *rest)
    assert "groups 3" in why(x, w, None, (2, 2), (1, 1), (0, 0), 3, (1, 1))
    assert "stride" in why(x, w, b, (0, 2), *rest[1:])
    assert "positive" in why(x, w, b, (1, 1), (9, 9), (0, 0), 1, (1, 1))
    image = torch.empty(1, 4, 1 << 15, 1 << 15, device="meta") if INTERPRETED else None
    if image is not None:
        image_like = torch.zeros(()).expand(image.shape)
        assert "one image of input" in why(image_like, w, b, *rest)
    grad = torch.zeros(1, 2, 6, 6, device=DEVICE)
    back = ((2, 2), (1, 1), 1, (1, 1))
    assert why(grad, w, (3, 3), *back, name="conv_transpose2d_input_gradient") is None
    assert "channels" in why(x, w, (3, 3), *back, name="conv_transpose2d_input_gradient")
    assert why(x, w, None, *back, name="conv2d") == "input has 4 channels, weight and groups say 2"
    assert why(grad, w, None, *back, "gelu", 0.0, name="conv2d") is None
    assert "bias has 2" in why(grad, w, b, *back, name="conv2d")
    assert "swish" in why(grad, w, None, *back, "swish", 0.0, name="conv2d")
    assert "stride" in why(grad, w, None, (0, 1), *back[1:], name="conv2d")
    assert why(grad, x, (4, 4), *back, name="conv_transpose2d_weight_gradient") is None
    assert "batch" in why(grad, x[:0], (4, 4), *back, name="conv_transpose2d_weight_gradient")
    assert "output" in why(grad, None, "relu", 0.0, True, name="conv_epilogue_gradient")
    with pytest.raises(RuntimeError, match="aeup.kernels.conv_transpose2d: dtype torch.int64"):
        host.conv_transpose2d(x.long(), w, b, *rest)


def test_taps_are_those_of_the_definition():
    """Phases side by side visit each (output, kernel index) of the definition, and single ones no other."""
    for kernel in (1, 2, 3, 5, 16):
        for stride in (1, 2, 3, 4, 8):
            for padding in (0, 1, 2, 7):
                for dilation in (1, 2, 3):
                    axis = plans.Axis(9, 40, kernel, stride, padding, dilation)
                    pairs = sum(
                        (a + padding - dilation * k) % stride == 0 for a in range(stride) for k in range(kernel)
                    )
                    assert sum(plans.counts(axis, 1)) == pairs
                    if dilation == 1:
                        for together in plans._divisors(axis, 8):
                            visited = together * sum(plans.counts(axis, together))
                            assert visited >= pairs
                            assert (visited > pairs) == plans._partial(axis, together)


def test_in_the_interpreter():
    """Runs the tests above with TRITON_INTERPRET=1."""
    check_in_the_interpreter(__file__)


select_tests(globals())
