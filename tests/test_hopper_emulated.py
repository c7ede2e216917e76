"""The Hopper kernels without a GPU: csrc/cuda/hopper* run on the host (tests/emulate/hopper), against float64 torch.

The emulator does what is asynchronous as late as it may, and fails a run that breaks a rule of Hopper's units."""

import ctypes

import pytest
import test_fold_emulated as fold
import torch
from emulate.emulator import tensor
from emulate.emulator_convolution import pointer, run
from emulate.emulator_hopper import configured, hopper  # noqa: F401
from test_conv_emulated import BF16, F16, F32, LAYOUTS, Case, check, check_convolution

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = PASSES = range(3)


def run_fault(hopper, fault, rounds=3):  # noqa: F811
    """64 x 64 times 64 x 32 ``rounds`` times over, through one stage of shared memory. Returns product and want."""
    torch.manual_seed(0)
    a, b = (torch.randn(n, 64).to(BF16) for n in (64, 32))
    out = torch.full((64, 32), float("nan"))
    entry = hopper.lib.aeup_emulate_fault
    entry.restype = ctypes.c_char_p
    error = entry(pointer(a), pointer(b), pointer(out), rounds, fault)
    if error is not None:
        raise RuntimeError(error.decode())
    return out, rounds * (a.double() @ b.double().T)


FAULTS = [  # as in faults.cpp; None: the product is wrong
    "deadlock: threads wait at different barriers",
    "more arrivals than the barrier has",
    None,
    None,
    "wgmma without a wgmma.fence since the last wait",
    "a barrier that is not initialised, or before its fence",
    "wgmma reads what ordinary stores wrote",
    "more arrivals than the barrier has",
    "deadlock: threads wait at different barriers",
    "a block ended before its copies",
]


@pytest.mark.parametrize("fault", range(len(FAULTS) + 1))
def test_emulator_finds(hopper, fault):  # noqa: F811
    message = FAULTS[fault - 1] if fault else None
    if message:
        with pytest.raises(RuntimeError, match=message):
            run_fault(hopper, fault)
    else:
        got, want = run_fault(hopper, fault)
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-4) == (fault == 0)


CASES = [
    Case((2, 72, 5, 7), 40),
    Case((3, 20, 4, 3), 17),
    Case((1, 24, 1, 1), 40, (4, 4), (1, 1), (0, 0)),
    Case((2, 33, 6, 5), 136, (2, 2), (2, 2), (0, 0)),
    Case((1, 16, 9, 19), 24, (3, 3), (2, 2), (1, 1), (1, 1)),
    Case((1, 16, 7, 5), 18, (5, 3), (3, 1), (2, 0), (1, 0)),
    Case((2, 16, 4, 5), 16, (2, 1), (3, 3), (0, 0), (2, 1)),
    Case((1, 18, 5, 4), 20, (3, 3), (2, 2), (1, 1), (1, 1), 1, (2, 2)),
    Case((1, 16, 4, 3), 16, (2, 3), (3, 1), (1, 1), (3, 2), 1, (4, 4)),
    Case((1, 16, 5, 6), 22, (5, 5), (2, 2), (4, 4)),
    Case((2, 16, 1, 1), 16, (1, 1), (2, 2), (0, 0)),
    Case((1, 16, 2, 140), 16, (3, 3), (1, 1), (1, 1)),
    Case((9, 16, 4, 4), 16),
    Case((1, 16, 3, 4), 16, (8, 8), (4, 4), (2, 2)),
    Case((1, 16, 6, 5), 20, (3, 2), (2, 2), (4, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_half(hopper, case):  # noqa: F811
    check(hopper, case, BF16, *LAYOUTS["nchw"], "hopper", activation="relu")
    check(hopper, case, F16, *LAYOUTS["nhwc"], "hopper", activation="leaky_relu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float(hopper, case):  # noqa: F811
    check(hopper, case, F32, *LAYOUTS["nchw"], "hopper_float", activation="leaky_relu")
    check(hopper, case, F32, *LAYOUTS["nhwc"], "hopper_float", tf32=True)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_what_reaches_nothing_may_be_infinite(hopper, layout):  # noqa: F811
    """Outputs of phases without a tap are the bias, and inputs that reach no output have a gradient of 0."""
    nhwc, last = LAYOUTS[layout]
    for case, which in (
        (Case((2, 16, 4, 5), 16, (2, 1), (3, 3), (0, 0), (2, 1)), FORWARD),
        (Case((2, 16, 1, 1), 16, (1, 1), (3, 3), (1, 1), (2, 2)), INPUT_GRADIENT),
    ):
        x, w, b = tensor(case.input, BF16, nhwc), tensor(case.weight, BF16, last), tensor((1, 16, 1, 1), BF16).flatten()
        x[:] = float("inf")
        want = case.forward(x.double(), w.double(), b.double())
        how = dict(shapes=(case.input, case.weight, tuple(want.shape)), channels_last=nhwc, weight_channels_last=last)
        if which == FORWARD:
            given = dict(input=x, bias=b, activation="none", slope=0.0)
        else:
            given, want = dict(grad=torch.full_like(want, float("inf")).to(BF16)), torch.zeros(case.input).double()
        got = tensor(tuple(want.shape), BF16, nhwc, 0, fill=float("nan"))
        run(hopper, "hopper", which, got, weight=w, **given, **how, **case.how)
        free = want.isfinite()
        assert free.any() and torch.equal(got[free].double(), want[free])


@pytest.mark.parametrize("kernel, stride", [((8, 16), (4, 16)), ((8, 9), (1, 33)), ((8, 8), (1, 1))], ids=str)
def test_one_input_row_and_many_phases(hopper, kernel, stride):  # noqa: F811
    """With one input row the stride is the kernel's extent, but for more phases than there are groups."""
    for width in (1, 3):
        case = Case((1, 16, 1, width), 16, kernel, stride, (0, 0))
        check(hopper, case, BF16, *LAYOUTS["nhwc"], "hopper", (FORWARD,), "relu")
        check(hopper, case, F32, *LAYOUTS["nhwc"], "hopper_float", (FORWARD,))


def test_refuses_more_phases_than_32_bits_count(hopper):  # noqa: F811
    case = Case((1, 16, 1, 1), 16, (3, 3), (1 << 16, 1 << 16), (0, 0))
    for which in PASSES:
        with pytest.raises(RuntimeError, match="too many phases"):
            check(hopper, case, BF16, *LAYOUTS["nhwc"], "hopper", (which,))


TILED = Case((2, 20, 7, 11), 70, (3, 3), (2, 2), (1, 1), (1, 1))  # several tiles whatever their size
BACK = Case((2, 70, 7, 11), 20, (3, 3), (2, 2), (1, 1), (1, 1))
ALIKE = Case((2, 20, 7, 11), 40)  # as many taps in each phase, and few enough channels for phases as columns
SEPARATE, MERGED, COLUMNS, TURNED = range(4)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_tiles(hopper, dtype):  # noqa: F811
    """Every tile of every arrangement."""
    nhwc, nchw = LAYOUTS["nhwc"], LAYOUTS["nchw"]
    for config in range(6) if dtype == BF16 else (1, 5):
        with configured(config):
            check(hopper, TILED, dtype, *nhwc, "hopper", (FORWARD,))
            check(hopper, BACK, dtype, *nhwc, "hopper", (INPUT_GRADIENT,))
        with configured(config, COLUMNS):
            check(hopper, ALIKE, dtype, *nhwc, "hopper", (FORWARD,), "silu")
    with configured(1, MERGED):
        check(hopper, Case((2, 20, 7, 11), 70), dtype, *nhwc, "hopper", (FORWARD,), "relu")
    for config in range(3):
        with configured(config, TURNED):
            check(hopper, TILED, dtype, *nchw, "hopper", (FORWARD,))
            check(hopper, BACK, dtype, *nchw, "hopper", (INPUT_GRADIENT,))
            activation = "tanh" if config else "relu"  # the first tile has no long activations
            check(hopper, Case((1, 16, 9, 12), 24, (3, 3), (1, 1)), dtype, *nchw, "hopper", (FORWARD,), activation)


def test_half_words(hopper):  # noqa: F811
    """Several neighbours in one store: in a row, in rows that follow each other, in columns of several phases."""
    nhwc, nchw = LAYOUTS["nhwc"], LAYOUTS["nchw"]
    for config in range(3):
        with configured(config, TURNED):
            check(hopper, Case((2, 20, 3, 8), 70), BF16, *nchw, "hopper", (FORWARD,), "relu")
            check(hopper, Case((3, 20, 7, 8), 16, (2, 2)), BF16, *nchw, "hopper", (INPUT_GRADIENT,))
            check(hopper, Case((5, 70, 8, 6), 16, (2, 2)), BF16, *nchw, "hopper", (INPUT_GRADIENT,))
    with configured(0, COLUMNS):
        check(hopper, Case((1, 21, 3, 4), 21, (16, 16), (8, 8), (4, 4)), BF16, *nhwc, "hopper", (FORWARD,))
        check(hopper, Case((1, 36, 3, 4), 18, (4, 4), (4, 4), (0, 0)), BF16, *nhwc, "hopper", (FORWARD,))


def test_input_gradient_where_the_output_lacks_phases(hopper):  # noqa: F811
    """Strides longer than the output: few kernel indices meet it, or none; a range of the sum must not be empty."""
    cases = (
        Case((3, 20, 1, 1), 40, (2, 6), (4, 3), (2, 0), (3, 0), 1, (1, 2)),
        Case((3, 20, 1, 1), 40, (1, 8), (1, 8), (0, 4), (0, 1)),
        Case((3, 20, 2, 2), 40, (8, 1), (2, 8), (2, 2), (1, 0), 1, (3, 1)),
    )
    for case in cases:
        for layout in ("nchw", "nhwc"):
            check(hopper, case, BF16, *LAYOUTS[layout], "hopper", (INPUT_GRADIENT,))
            check(hopper, case, F32, *LAYOUTS[layout], "hopper_float", (INPUT_GRADIENT,))


def test_weight_gradient_of_an_image_that_is_padded_away(hopper):  # noqa: F811
    small, large = (Case((1, 16, n, n), 16, (1, 1), (2, 2), (n - 1, 0), (0, 0)) for n in (64, 65))
    for dtype, family in ((BF16, "hopper"), (F32, "hopper_float")):
        check(hopper, small, dtype, *LAYOUTS["nhwc"], family, (WEIGHT_GRADIENT,))
        with pytest.raises(RuntimeError, match="an output shorter than the stride"):
            check(hopper, large, dtype, *LAYOUTS["nhwc"], family, (WEIGHT_GRADIENT,))


def test_input_gradient_in_several_ranges(hopper):  # noqa: F811
    """The sum over taps and channels is split; a second kernel adds the parts, and turns them round for NCHW."""
    short, long = Case((2, 20, 7, 11), 70), Case((3, 70, 1, 1), 200, (2, 3), (1, 1), (0, 0))
    for splits, config in ((2, 0), (2, 5), (4, 1), (4, 3)):
        with configured(config + 100 * splits):
            check(hopper, short, BF16, *LAYOUTS["nhwc"], "hopper", (INPUT_GRADIENT,))
            check(hopper, short, BF16, *LAYOUTS["nchw"], "hopper", (INPUT_GRADIENT,))
            check(hopper, long, F16, *LAYOUTS["nchw"], "hopper", (INPUT_GRADIENT,))
    check(hopper, Case((3, 33, 1, 1), 256, (4, 4), (1, 1), (0, 0)), BF16, *LAYOUTS["nhwc"], "hopper", (INPUT_GRADIENT,))


@pytest.mark.parametrize("tf32", [False, True], ids=["strict", "tf32"])
def test_float_tiles(hopper, tf32):  # noqa: F811
    for config in range(0 if tf32 else 2, 6):
        layout = LAYOUTS["nhwc" if config % 2 else "nchw"]
        with configured(config):
            check(hopper, TILED, F32, *layout, "hopper_float", (FORWARD,), tf32=tf32)
            check(hopper, BACK, F32, *layout, "hopper_float", (INPUT_GRADIENT,), tf32=tf32)
        with configured(config, COLUMNS):
            check(hopper, ALIKE, F32, *layout, "hopper_float", (FORWARD,), "gelu", tf32=tf32)


def test_weight_gradient_in_several_ranges(hopper):  # noqa: F811
    """Pixels enough for more than one range, and a result that is written at once or by the second kernel."""
    many = Case((5, 16, 13, 31), 16, (2, 2), (2, 2), (0, 0))
    for layout in ("nchw", "nhwc", "mixed", "mixed2"):
        check(hopper, many, BF16, *LAYOUTS[layout], "hopper", (WEIGHT_GRADIENT,))
    for co in (16, 17, 70):  # 1, 2 and 4 boxes of columns
        for kernel in ((1, 1), (1, 2)):
            case = Case((1, 150, 4, 3), co, kernel, (1, 1), (0, 0))
            check(hopper, case, F16, *LAYOUTS["nhwc"], "hopper", (WEIGHT_GRADIENT,))


WEIGHT_TILES = 4  # configured: an index of kShapes, in place of an arrangement


@pytest.mark.parametrize("config", range(5))
def test_weight_gradient_tiles(hopper, config):  # noqa: F811
    """Every tile: kernel rows in pairs and without a partner, several blocks of rows and columns, images smaller than a
    tile, more than one range or one alone, results by whole lines and by elements."""
    cases = [
        (Case((1, 130, 9, 10), 72), "nhwc"),
        (Case((3, 40, 5, 3), 17, (3, 3), (2, 2), (1, 1), (1, 1)), "nchw"),
        (Case((1, 130, 3, 9), 18, (5, 2), (1, 2), (2, 0)), "mixed2"),
        (Case((2, 16, 17, 4), 24, (3, 1), (3, 2), (0, 0), (0, 1), 1, (2, 1)), "nchw"),
        (Case((9, 20, 1, 2), 68, (4, 1), (2, 1), (0, 0), (0, 0), 1, (3, 1)), "mixed"),
        (Case((1, 16, 4, 3), 16, (1, 3), (1, 1), (0, 1)), "mixed"),
    ]
    with configured(config, WEIGHT_TILES):
        for case, layout in cases:
            check(hopper, case, BF16, *LAYOUTS[layout], "hopper", (WEIGHT_GRADIENT,))
        folded = fold.Case((2, 40, 5, 4), 24)
        check(hopper, folded, F16, *LAYOUTS["nhwc"], "hopper", (WEIGHT_GRADIENT,))
        for layout in ("nchw", "nhwc"):  # one range: rounded before the weight's layout, which is off alignment here
            case = Case((1, 24, 1, 1), 40, (4, 4), (1, 1), (0, 0))
            check(hopper, case, BF16, *LAYOUTS[layout], "hopper", (WEIGHT_GRADIENT,), result_offset=1)


@pytest.mark.parametrize("tf32", [False, True], ids=["strict", "tf32"])
def test_float_weight_gradient_in_several_ranges(hopper, tf32):  # noqa: F811
    """The same in float32, with one and two tiles of input channels."""
    many = Case((5, 16, 13, 31), 18, (2, 2), (2, 2), (0, 0))
    for layout in ("nchw", "nhwc", "mixed", "mixed2"):
        check(hopper, many, F32, *LAYOUTS[layout], "hopper_float", (WEIGHT_GRADIENT,), tf32=tf32)
    for ci, co, kernel in ((150, 17, (1, 1)), (136, 72, (1, 3)), (64, 40, (3, 1)), (33, 34, (7, 7))):
        case = Case((1, ci, 6, 5), co, kernel, (1, 1), (0, 0))
        check(hopper, case, F32, *LAYOUTS["nhwc"], "hopper_float", (WEIGHT_GRADIENT,), tf32=tf32)


@pytest.mark.parametrize("layout", ["mixed", "mixed2"])
def test_layouts_of_the_weight(hopper, layout):  # noqa: F811
    for dtype, family in ((BF16, "hopper"), (F32, "hopper_float")):
        check(hopper, Case((1, 24, 5, 3), 40), dtype, *LAYOUTS[layout], family, activation="sigmoid")
        check(hopper, Case((1, 20, 2, 4), 17), dtype, *LAYOUTS[layout], family, bias=False)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_off_alignment(hopper, layout):  # noqa: F811
    """Tensors that no tensor map can have go through copies."""
    case, how = Case((1, 24, 3, 5), 40), dict(offset=1, result_offset=0)
    check(hopper, case, F16, *LAYOUTS[layout], "hopper", **how)
    check(hopper, case, F32, *LAYOUTS[layout], "hopper_float", tf32=True, **how)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
def test_activations(hopper, activation):  # noqa: F811
    case = Case((1, 16, 3, 4), 24)
    for layout in ("nchw", "nhwc"):
        check(hopper, case, BF16, *LAYOUTS[layout], "hopper", (FORWARD,), activation)
        check(hopper, case, F32, *LAYOUTS[layout], "hopper_float", (FORWARD,), activation)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolutions(hopper, case):  # noqa: F811
    """The convolution with its bias and activation, by the kernels of the input's gradient."""
    check_convolution(hopper, case, BF16, *LAYOUTS["nchw"], "hopper", "relu")
    check_convolution(hopper, case, F16, *LAYOUTS["nhwc"], "hopper")
    check_convolution(hopper, case, F32, *LAYOUTS["nchw"], "hopper_float", "silu")
    check_convolution(hopper, case, F32, *LAYOUTS["nhwc"], "hopper_float", "relu", tf32=True)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
def test_activations_of_convolutions(hopper, activation):  # noqa: F811
    """What is no bound is computed by the kernel that adds ranges, and that does bounds too."""
    for layout in ("nchw", "nhwc"):
        check_convolution(hopper, BACK, BF16, *LAYOUTS[layout], "hopper", activation)
        check_convolution(hopper, CASES[1], F32, *LAYOUTS[layout], "hopper_float", activation)
        with configured(5 + 100 * 2):
            check_convolution(hopper, TILED, F16, *LAYOUTS[layout], "hopper", activation)


def test_upsampling_by_1_in_several_ranges(hopper):  # noqa: F811
    """It runs as the input's gradient, whose ranges are added with bias and activation."""
    case = fold.Case((1, 40, 5, 6), 24, (3, 3), (1, 1), (1, 1))
    for layout in ("nchw", "nhwc"):
        with configured(5 + 100 * 2):
            check(hopper, case, BF16, *LAYOUTS[layout], "hopper", (FORWARD,), "relu")
        check(hopper, case, BF16, *LAYOUTS[layout], "hopper", (FORWARD,), "leaky_relu")


GRADIENTS = (INPUT_GRADIENT, WEIGHT_GRADIENT)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 3, 5, 10)], ids=str)
def test_shared_gradient(hopper, case):  # noqa: F811
    """Both gradients read the output's gradient in the form that was made once for both."""
    check(hopper, case, BF16, *LAYOUTS["nchw"], "hopper", GRADIENTS, share=True)
    check(hopper, case, F32, *LAYOUTS["nchw"], "hopper_float", GRADIENTS, share=True)
    if case.co % 4:
        check(hopper, case, F32, *LAYOUTS["nhwc"], "hopper_float", GRADIENTS, share=True, tf32=True)
    if case.co % 8:
        check(hopper, case, F16, *LAYOUTS["nhwc"], "hopper", GRADIENTS, share=True)
        check(hopper, case, F16, *LAYOUTS["mixed2"], "hopper", GRADIENTS, share=True)
    else:
        with pytest.raises(RuntimeError, match="nothing to share"):
            check(hopper, case, F16, *LAYOUTS["nhwc"], "hopper", GRADIENTS, share=True)


FOLDED = [
    fold.Case((2, 72, 5, 4), 40),
    fold.Case((1, 17, 3, 5), 19, (5, 3), (2, 3), (2, 1)),
    fold.Case((2, 20, 4, 3), 70, (2, 2), (2, 2), (0, 1)),
    fold.Case((1, 16, 2, 4), 18, (1, 4), (4, 2), (0, 2)),
    fold.Case((2, 24, 1, 3), 33, (3, 3), (4, 2), (1, 1)),
    fold.Case((1, 40, 2, 3), 24, (3, 3), (3, 2), (4, 0)),
    fold.Case((1, 16, 9, 2), 16, (5, 5), (1, 2), (2, 2)),
]


@pytest.mark.parametrize("case", FOLDED, ids=str)
def test_folded(hopper, case):  # noqa: F811
    """Nearest upsampling and a convolution: the weight is folded while it is packed."""
    check(hopper, case, F16, *LAYOUTS["nchw"], "hopper", activation="relu")
    check(hopper, case, BF16, *LAYOUTS["nhwc"], "hopper")
    check(hopper, case, F32, *LAYOUTS["nchw"], "hopper_float", tf32=True)
    check(hopper, case, F32, *LAYOUTS["nhwc"], "hopper_float", activation="relu")


def test_folded_layouts(hopper):  # noqa: F811
    for layout in ("mixed", "mixed2"):
        check(hopper, FOLDED[2], BF16, *LAYOUTS[layout], "hopper", bias=False)
    check(hopper, FOLDED[1], BF16, *LAYOUTS["nchw"], "hopper", GRADIENTS, share=True)
    check(hopper, FOLDED[1], BF16, *LAYOUTS["nhwc"], "hopper", GRADIENTS, share=True)


def test_folded_tiles(hopper):  # noqa: F811
    case = fold.Case((1, 24, 5, 6), 40)
    with configured(1, MERGED):
        check(hopper, case, BF16, *LAYOUTS["nhwc"], "hopper", (FORWARD,))
    with configured(3, COLUMNS):
        check(hopper, case, BF16, *LAYOUTS["nhwc"], "hopper", (FORWARD,))
        check(hopper, case, F32, *LAYOUTS["nchw"], "hopper_float", (FORWARD,))


@pytest.mark.parametrize(
    "case, dtype, family, why",
    [
        (Case((1, 32, 4, 4), 32, groups=2), BF16, "hopper", "one group only"),
        (Case((1, 8, 4, 4), 32), F16, "hopper", "fewer than 16 channels"),
        (Case((1, 16, 4, 4), 16), F32, "hopper", "bfloat16 and float16 only"),
        (Case((1, 16, 4, 4), 16), BF16, "hopper_float", "float32 only"),
        (Case((1, 16, 4, 4), 16, (17, 17)), F32, "hopper_float", "more than 256 kernel elements"),
    ],
    ids=lambda v: str(v).replace(" ", "_"),
)
def test_refuses(hopper, case, dtype, family, why):  # noqa: F811
    with pytest.raises(RuntimeError, match=f"refused: {family}: {why}"):
        check(hopper, case, dtype, False, False, family, (FORWARD,))
