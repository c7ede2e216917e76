"""The CUDA convolution kernels without a GPU: csrc/cuda runs on the host (tests/emulate), against float64 torch.

The emulator itself fails a run that reads outside the tensors, uses a misaligned vector, or stores an element of the
result twice or not at all.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from emulate.emulator import emulated, tensor  # noqa: F401
from emulate.emulator_convolution import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, run, run_epilogue

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ULP = {F32: 2.0**-23, F64: 2.0**-52, F16: 2.0**-10, BF16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    """input [n, ci, h, w]; co output channels; the rest as in conv_transpose2d, per axis."""

    input: tuple
    co: int
    kernel: tuple = (4, 4)
    stride: tuple = (2, 2)
    padding: tuple = (1, 1)
    extra: tuple = (0, 0)
    groups: int = 1
    dilation: tuple = (1, 1)

    def __str__(self):
        return (
            "x".join(map(str, self.input))
            + f"-{self.co}-"
            + "-".join(
                "".join(map(str, v)) for v in (self.kernel, self.stride, self.padding, self.extra, self.dilation)
            )
            + (f"-g{self.groups}" if self.groups > 1 else "")
        )

    @property
    def weight(self):
        return (self.input[1], self.co // self.groups, *self.kernel)

    @property
    def how(self):
        return dict(stride=self.stride, padding=self.padding, groups=self.groups, dilation=self.dilation)

    def forward(self, x, w, bias=None):
        return F.conv_transpose2d(x, w, bias, output_padding=self.extra, **self.how)

    def results(self, x, w, bias, grad, dtype):
        """In float64: the output, the input's gradient and the weight's."""
        y = self.forward(x, w, bias)
        return y.detach(), *torch.autograd.grad(y, (x, w), grad)

    def terms(self, output):
        """The products in a sum of each of them."""
        taps, (n, ci, h, w) = math.prod(self.kernel), self.input
        return taps * ci, taps * self.co, n * h * w

    run = staticmethod(run)


SLOPE = 0.2  # between two numbers of any format


def activate(y, activation, slope=SLOPE):
    if activation == "none":
        return y
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope)
    return torch.tanh(y) if activation == "tanh" else getattr(F, activation)(y)


def close(got, want, dtype, terms, tf32=False):
    """Within the rounding of the result and of sums of `terms` products in float32 (float64, tf32)."""
    accumulate = ULP[F64] if dtype == F64 else 2.0**-12 if tf32 else ULP[F32]
    scale = want.abs().max().item() or 1.0
    bound = ULP[dtype] * want.abs() + (4 * math.sqrt(terms) * accumulate) * scale
    assert torch.isfinite(got).all(), "unwritten (poisoned) or not finite"
    assert ((got.double() - want).abs() <= bound).all()


def check(
    emulated,  # noqa: F811
    case,
    dtype,
    nhwc,
    weight_nhwc,
    family,
    passes=(FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT),
    activation="none",
    bias=True,
    offset=0,
    tf32=False,
    share=False,
    result_offset=None,
):
    torch.manual_seed(0)
    x, w = tensor(case.input, dtype, nhwc, offset), tensor(case.weight, dtype, weight_nhwc, offset)
    b = tensor((1, case.co, 1, 1), dtype).flatten() if bias else None
    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    b64 = b.double() if bias else None
    output = tuple(case.forward(x64, w64, b64).shape)
    grad = tensor(output, dtype, nhwc, offset)
    y, gx, gw = case.results(x64, w64, b64, grad.double(), dtype)
    given = (
        dict(input=x, weight=w, bias=b, activation=activation, slope=SLOPE),
        dict(weight=w, grad=grad),
        dict(input=x, grad=grad),
    )
    how = dict(shapes=(case.input, case.weight, output), tf32=tf32, **case.how)
    how.update(channels_last=nhwc, weight_channels_last=weight_nhwc, share=share)
    wants, terms = (activate(y, activation), gx, gw), case.terms(output)
    for which in passes:
        layout = weight_nhwc if which == WEIGHT_GRADIENT else nhwc
        at = offset if result_offset is None else result_offset
        got = tensor(tuple(wants[which].shape), dtype, layout, at, fill=math.nan)
        case.run(emulated, family, which, got, **given[which], **how)
        close(got, wants[which], dtype, terms[which], tf32)


def check_convolution(emulated, case, dtype, nhwc, weight_nhwc, family, activation="none", offset=0, tf32=False):  # noqa: F811
    """The convolution of `case`'s output by its weight, with a bias: its input's gradient with an epilogue."""
    torch.manual_seed(0)
    output = tuple(case.forward(*(torch.empty(shape, device="meta") for shape in (case.input, case.weight))).shape)
    y, w = tensor(output, dtype, nhwc, offset), tensor(case.weight, dtype, weight_nhwc, offset)
    w.div_(math.sqrt(math.prod(case.kernel) * case.co))  # so that a bias and the slope of an activation matter
    b = tensor((1, case.input[1], 1, 1), dtype).flatten()
    want = F.conv2d(y.double(), w.double(), b.double(), **case.how)[:, :, : case.input[2], : case.input[3]]
    got = tensor(case.input, dtype, nhwc, 0, fill=math.nan)
    how = dict(shapes=(case.input, case.weight, output), channels_last=nhwc, weight_channels_last=weight_nhwc)
    how.update(tf32=tf32, activation=activation, slope=SLOPE, **case.how)
    run(emulated, family, INPUT_GRADIENT, got, grad=y, weight=w, bias=b, **how)
    close(got, activate(want, activation), dtype, math.prod(case.kernel) * case.co, tf32)


GENERIC = [
    Case((2, 8, 5, 7), 12),
    Case((1, 16, 3, 4), 40, (3, 3), (2, 2), (1, 1), (1, 1)),
    Case((3, 5, 4, 3), 70, (2, 2), (2, 2), (0, 0)),
    Case((1, 3, 6, 5), 7, (3, 5), (1, 3), (2, 1), (0, 2), 1, (2, 1)),
    Case((2, 12, 3, 3), 5, (4, 1), (3, 1), (0, 0), (1, 0), 1, (2, 3)),
    Case((1, 10, 5, 4), 9, (3, 4), (4, 6), (1, 2), (3, 5), 1, (6, 4)),
    Case((2, 9, 1, 1), 33, (4, 4), (1, 1), (0, 0)),
    Case((1, 32, 3, 5), 32, (3, 3), (2, 1), (1, 1), (1, 0), 2),
    Case((1, 6, 5, 6), 6, (4, 4), (2, 2), (1, 1), (0, 0), 6),
    Case((2, 6, 4, 3), 12, (3, 3), (2, 2), (1, 0), (1, 0), 3),
    Case((1, 4, 7, 300), 3, (5, 5), (2, 2), (2, 2), (1, 1), 1),
    Case((1, 6, 6, 5), 5, (3, 2), (2, 2), (4, 3)),
]
LAYOUTS = {"nchw": (False, False), "nhwc": (True, True), "mixed": (False, True), "mixed2": (True, False)}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", GENERIC, ids=str)
def test_generic(emulated, case, layout):  # noqa: F811
    check(emulated, case, F32, *LAYOUTS[layout], "generic")


@pytest.mark.parametrize("dtype", [F64, F16, BF16], ids=str)
@pytest.mark.parametrize("case", [GENERIC[1], GENERIC[2], GENERIC[3], GENERIC[8]], ids=str)
def test_generic_dtypes(emulated, case, dtype):  # noqa: F811
    for layout in ("nchw", "nhwc"):
        check(emulated, case, dtype, *LAYOUTS[layout], "generic")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_generic_layouts_of_the_weight(emulated, dtype):  # noqa: F811
    """A weight in the other layout, tensors off alignment, and a weight large enough to be packed."""
    for layout in ("mixed", "mixed2"):
        check(emulated, GENERIC[0], dtype, *LAYOUTS[layout], "generic")
    check(emulated, GENERIC[1], dtype, True, True, "generic", offset=1)
    check(emulated, Case((2, 3, 40, 33), 4), dtype, True, False, "generic", passes=(0, 1))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
def test_generic_activations(emulated, activation):  # noqa: F811
    for case in (GENERIC[0], GENERIC[8]):
        check(emulated, case, F32, True, True, "generic", (FORWARD,), activation)
        check(emulated, case, F64, False, False, "generic", (FORWARD,), activation, bias=False)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
@pytest.mark.parametrize("family", ["generic", "few"])
def test_convolutions(emulated, family, activation):  # noqa: F811
    """The convolution with its bias and activation, by the kernels of the input's gradient."""
    for case in (GENERIC[1], GENERIC[3], GENERIC[8]) if family == "generic" else (FEW[3], FEW[4], FEW[7]):
        check_convolution(emulated, case, F32, *LAYOUTS["nhwc"], family, activation)
        check_convolution(emulated, case, BF16, *LAYOUTS["nchw"], family, activation, offset=1)


@pytest.mark.parametrize("case", GENERIC, ids=str)
def test_generic_convolutions(emulated, case):  # noqa: F811
    check_convolution(emulated, case, F64, *LAYOUTS["nchw"], "generic", "leaky_relu")
    check_convolution(emulated, case, F16, *LAYOUTS["nhwc"], "generic", "relu")


def test_unknown_family(emulated):  # noqa: F811
    with pytest.raises(RuntimeError, match="no family 'fast'; the families are hopper hopper_float few generic"):
        check(emulated, GENERIC[0], F32, False, False, "fast")


def check_epilogue(
    emulated,  # noqa: F811
    shape,
    dtype,
    nhwc,
    activation,
    bias=True,
    offset=0,
    other_offset=0,
    pitch=0,
    result_offset=None,
):
    torch.manual_seed(0)
    grad = tensor(shape, dtype, nhwc, offset)
    before = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    value = activate(before, activation)
    output = want = None
    if activation != "none":
        output = tensor(shape, dtype, nhwc, other_offset, fill=0.0)
        output.copy_((before if activation in ("silu", "gelu") else value).detach())
        at = output.double().requires_grad_()
        if activation in ("silu", "gelu"):
            (want,) = torch.autograd.grad(activate(at, activation), at, grad.double())
        else:
            leaky = torch.full_like(at, SLOPE).masked_fill(at > 0, 1.0)
            slopes = {"relu": (at > 0).double(), "leaky_relu": leaky, "tanh": 1 - at**2}
            want = grad.double() * slopes.get(activation, at * (1 - at)).detach()
    at = offset if result_offset is None else result_offset
    got, total = run_epilogue(emulated, grad, output, activation, SLOPE, bias, nhwc, at, pitch)
    want = grad.double() if want is None else want.detach()
    if got is not None:
        close(got[:, : shape[1]], want, dtype, 4)
        assert (got[:, shape[1] :] == 0).all()
    if bias:
        sums = want.sum((0, 2, 3))
        scale = grad.double().abs().sum((0, 2, 3)).max()
        bound = ULP[dtype] * sums.abs() + (ULP[F64] if dtype == F64 else ULP[F32]) * 4 * scale
        assert ((total.double() - sums).abs() <= bound).all()


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_epilogue(emulated, dtype, nhwc):  # noqa: F811
    for shape in ((2, 3, 7, 5), (3, 64, 4, 4), (1, 1, 1, 3), (2, 5, 1, 1), (1, 3, 60, 61), (5, 12, 2, 9)):
        check_epilogue(emulated, shape, dtype, nhwc, "none")
        check_epilogue(emulated, shape, dtype, nhwc, "relu")
        check_epilogue(emulated, shape, dtype, nhwc, "tanh", offset=1, other_offset=1)
        check_epilogue(emulated, shape, dtype, nhwc, "leaky_relu", offset=1)
    for activation in ("silu", "gelu", "sigmoid"):
        check_epilogue(emulated, (2, 3, 7, 5), dtype, nhwc, activation)
    check_epilogue(emulated, (2, 3, 7, 5), dtype, nhwc, "relu", bias=False)


def test_epilogue_of_many_channels_and_images(emulated):  # noqa: F811
    for shape in ((2, 2053, 2, 2), (3, 1001, 1, 2), (1, 4100, 1, 1), (700, 2, 3, 4), (1, 2, 150, 170)):
        for nhwc in (False, True):
            check_epilogue(emulated, shape, BF16, nhwc, "relu")
            check_epilogue(emulated, shape, F32, nhwc, "none")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_epilogue_of_few_channels(emulated, dtype):  # noqa: F811
    """Every period of the channels of a vector; one block and several; tensors off alignment."""
    for c in range(1, 41):
        check_epilogue(emulated, (3, c, 29, 11 + 180 // c), dtype, True, "relu")
        check_epilogue(emulated, (2, c, 13, 11), dtype, True, "none", offset=3)
        check_epilogue(emulated, (1, c, 3, 5), dtype, True, "gelu", offset=1, other_offset=1)
        check_epilogue(emulated, (5, c, 5, 7), dtype, False, "leaky_relu")
    for shape in ((4, 1, 28, 28), (2, 255, 9, 5), (2, 256, 9, 5), (2, 257, 9, 5)):
        check_epilogue(emulated, shape, dtype, True, "sigmoid")
        check_epilogue(emulated, shape, dtype, False, "relu", bias=False)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_epilogue_that_turns_to_channels_last(emulated, dtype):  # noqa: F811
    """From NCHW to rows of channels, with zeros up to a whole vector; planes that are whole vectors, and others."""
    vector = 16 // dtype.itemsize
    shapes = ((2, 17, 5, 7), (1, 64, 8, 8), (3, 65, 4, 6), (1, 1, 1, 1), (5, 9, 3, 1), (2, 130, 2, 4), (1, 24, 16, 50))
    for shape in shapes:
        how = dict(nhwc=False, pitch=-(-shape[1] // vector) * vector, result_offset=0)
        check_epilogue(emulated, shape, dtype, activation="relu", **how)
        check_epilogue(emulated, shape, dtype, activation="none", **how)
        check_epilogue(emulated, shape, dtype, activation="leaky_relu", bias=False, offset=1, **how)
        check_epilogue(emulated, shape, dtype, activation="silu", other_offset=vector // 2, **how)
    check_epilogue(emulated, (1, 40, 3, 5), dtype, False, "none", bias=False, pitch=48, result_offset=0)
    check_epilogue(emulated, (7, 300, 4, 4), dtype, False, "tanh", pitch=304, result_offset=vector)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_epilogue_of_nan_and_infinity(emulated, activation):  # noqa: F811
    """What the activation lets through is torch's, whatever the gradient."""
    of = torch.tensor([math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 2.0])
    output, grad = (t.contiguous() for t in torch.cartesian_prod(of, of).T.view(2, 1, 7, 7, 1))
    aten = torch.ops.aten
    relu = activation == "relu"
    want = aten.threshold_backward(grad, output, 0) if relu else aten.leaky_relu_backward(grad, output, SLOPE, True)
    for how in (dict(channels_last=False), dict(channels_last=True), dict(pitch=8)):
        given = [
            t.contiguous(memory_format=torch.channels_last) if how.get("channels_last") else t for t in (grad, output)
        ]
        got, _ = run_epilogue(emulated, *given, activation, SLOPE, bias=False, **how)
        torch.testing.assert_close(got[:, :7], want, rtol=0, atol=0, equal_nan=True, check_stride=False)


def test_epilogue_refuses_rows_off_alignment(emulated):  # noqa: F811
    for dtype, pitch, offset in ((BF16, 12, 0), (F32, 16, 2), (F32, 8, 0), (F64, 16, 0)):
        with pytest.raises(RuntimeError, match="channels-last rows"):
            check_epilogue(emulated, (1, 10, 2, 3), dtype, False, "relu", pitch=pitch, result_offset=offset)


FEW = [
    Case((1, 32, 6, 8), 3),
    Case((2, 64, 5, 32), 3),
    Case((1, 40, 9, 36), 1),
    Case((1, 24, 3, 65), 4, (3, 3), (2, 2), (1, 1), (1, 1)),
    Case((3, 8, 7, 5), 2, (2, 3), (2, 2), (0, 0)),
    Case((1, 7, 4, 6), 3, (4, 3), (2, 2), (1, 0), (1, 0)),
    Case((1, 16, 2, 133), 3, (4, 4), (2, 2), (1, 1), (0, 1)),
    Case((1, 8, 1, 1), 1, (1, 2), (2, 2), (0, 1), (0, 1)),
    Case((1, 8, 3, 136), 2),
    Case((2, 32, 14, 14), 1),
]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few(emulated, case, layout, dtype):  # noqa: F811
    check(emulated, case, dtype, *LAYOUTS[layout], "few", activation="relu")


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_few_convolutions(emulated, layout, dtype):  # noqa: F811
    for case in FEW:
        check_convolution(emulated, case, dtype, *LAYOUTS[layout], "few", "leaky_relu")
    check_convolution(emulated, FEW[2], F32, *LAYOUTS[layout], "few", "none", tf32=True)


def test_few_layouts_of_the_weight(emulated):  # noqa: F811
    for layout in ("mixed", "mixed2"):
        check(emulated, FEW[0], BF16, *LAYOUTS[layout], "few", activation="tanh")
    for layout in ("nchw", "nhwc"):
        check(emulated, FEW[0], F16, *LAYOUTS[layout], "few", offset=1)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_few_channels_of_many(emulated, layout):  # noqa: F811
    """More groups of channels than warps, several tiles or strips per block, tf32, pointers off alignment."""
    check(emulated, Case((1, 136, 3, 12), 1), F32, *LAYOUTS[layout], "few")
    check(emulated, Case((1, 72, 9, 4), 4), BF16, *LAYOUTS[layout], "few")
    check(emulated, Case((3, 16, 17, 4), 3), F16, *LAYOUTS[layout], "few")
    check(emulated, Case((1, 40, 4, 8), 3), F32, *LAYOUTS[layout], "few", tf32=True)
    check(emulated, Case((2, 20, 9, 40), 3), F32, *LAYOUTS[layout], "few", tf32=True)
    check(emulated, Case((3, 72, 6, 70), 4), F32, *LAYOUTS[layout], "few", offset=1)
    check(emulated, Case((3, 36, 5, 24), 2), BF16, *LAYOUTS[layout], "few", offset=1, activation="tanh")


@pytest.mark.parametrize(
    "case, dtype, why",
    [
        (Case((1, 8, 4, 4), 5), F32, "more than 4 output channels"),
        (Case((1, 8, 4, 4), 3), F64, "float64"),
        (Case((1, 8, 4, 4), 4, groups=2), F32, "groups"),
        (Case((1, 8, 4, 4), 3, stride=(2, 1)), F32, "a stride other than 2"),
        (Case((1, 8, 4, 4), 3, kernel=(4, 5)), F32, "a kernel outside"),
        (Case((1, 4096, 1, 1), 3), F32, "too many input channels"),
    ],
    ids=lambda v: str(v).replace(" ", "_"),
)
def test_few_refuses(emulated, case, dtype, why):  # noqa: F811
    with pytest.raises(RuntimeError, match=f"refused: few: {why}"):
        check(emulated, case, dtype, False, False, "few", (FORWARD,))
