"""The CUDA and Triton kernels of the transposed convolution on a real GPU."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import check_budget
from conv_cases import ACTIVATIONS, CASES, DTYPES, LARGE_FEW, LAYOUTS, Case, by_torch, run
from test_conv_transpose2d import check_all

import aeup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
BACKENDS = ("cuda", "triton")
BIG = (  # tiles that fill, and do not fill, those of the matrix kernels
    Case("dcgan3", (8, 256, 8, 8), (256, 128, 4, 4), {"stride": 2, "padding": 1}),
    Case("unet", (2, 128, 33, 31), (128, 64, 2, 2), {"stride": 2}),
    Case("k3op1", (2, 64, 40, 24), (64, 72, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    Case("fcn", (1, 21, 20, 17), (21, 21, 16, 16), {"stride": 8, "padding": 4}),
    Case("groups", (2, 128, 17, 16), (128, 32, 4, 4), {"stride": 2, "padding": 1, "groups": 2}),
    Case("depthwise", (2, 96, 20, 21), (96, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 96}),
    Case("latent", (32, 100, 1, 1), (100, 96, 4, 4)),
    Case("one-row", (2, 16, 1, 9), (16, 16, 8, 16), {"stride": (4, 16)}),
    Case("padded-away", (3, 20, 1, 1), (20, 40, 1, 8), {"stride": (1, 8), "padding": (0, 4), "output_padding": (0, 1)}),
)


@contextmanager
def float32_precision(value):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = value
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def theirs(case, tensors, activation=None):
    """torch's own kernels: outside deterministic mode, which would take other ones or raise."""
    torch.use_deterministic_algorithms(False)
    try:
        return run(by_torch, case, tensors, activation)
    finally:
        torch.use_deterministic_algorithms(True)


def rounded_to_tf32(t):
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def check(case, dtype, layout, backend, activation=None, tf32=False):
    tensors = case.tensors(dtype, layout, "cuda")
    with aeup.backend(backend):
        got = run(aeup.conv_transpose2d, case, tensors, activation)
    exact = theirs(case, [t.double() for t in tensors], activation)
    other = theirs(case, tensors, activation)
    assert got[0].dtype == dtype
    # Where cuDNN does not serve (float64, outputs past the last tap), torch loses channels-last; aeup keeps it.
    kept = layout == "nhwc" and got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[0].stride() == other[0].stride() or kept
    if tf32:  # torch may use tf32 and often does not: its budget is the error of rounding what is multiplied
        other = [t.float() for t in theirs(case, [rounded_to_tf32(t).double() for t in tensors], activation)]
    check_all(*([t.cpu() for t in group] for group in (got, exact, other)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE_FEW + BIG, ids=str)
def test_all_passes_within_budget(case, dtype, backend):
    for layout in LAYOUTS:
        for precision in ("ieee", "tf32") if dtype is torch.float32 else ("ieee",):
            with float32_precision(precision):
                check(case, dtype, layout, backend, tf32=precision == "tf32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
@pytest.mark.parametrize("case", (CASES[0], LARGE_FEW[0], BIG[0]), ids=str)
def test_activations(case, activation, backend):
    for dtype in DTYPES:
        for layout in LAYOUTS:
            with float32_precision("ieee"):
                check(case, dtype, layout, backend, activation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_nan_and_infinity(backend):
    of = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, -0.0, 0.0, 2.0], device="cuda")
    y, grad = (t.contiguous() for t in torch.cartesian_prod(of, of).T.view(2, 1, 7, 7, 1))
    wants = torch.ops.aten.threshold_backward(grad, y, 0), torch.ops.aten.leaky_relu_backward(grad, y, 0.3, True)
    for activation, want in zip(("relu", "leaky_relu"), wants, strict=True):
        with aeup.backend(backend):
            got, _ = torch.ops.aeup.conv_epilogue_gradient(grad, y, activation, 0.3, False)
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tf32_follows_torchs_setting(backend):
    x, w, _, _ = BIG[0].tensors(torch.float32, device="cuda")
    exact = F.conv_transpose2d(x.double(), w.double(), None, 2, 1)
    errors = {}
    for precision in ("ieee", "tf32"):
        with float32_precision(precision), aeup.backend(backend):
            errors[precision] = (aeup.conv_transpose2d(x, w, None, 2, 1) - exact).abs().max().item()
    assert errors["ieee"] < 1e-4, "float32 was multiplied in tf32"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_on_every_run(backend, layout):
    for case in (BIG[0], LARGE_FEW[0], CASES[14]):
        for dtype in (torch.bfloat16, torch.float32):
            tensors = case.tensors(dtype, layout, "cuda")
            with aeup.backend(backend):
                first = run(aeup.conv_transpose2d, case, tensors, "relu")
                for _ in range(3):
                    again = run(aeup.conv_transpose2d, case, tensors, "relu")
                    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("case", (BIG[0], LARGE_FEW[0]), ids=str)
def test_order_on_the_stream_and_graph_capture(case, dtype, backend):
    tensors = case.tensors(dtype, "nhwc", "cuda")

    def step(x):
        return run(aeup.conv_transpose2d, case, (x, *tensors[1:]), "relu")

    with aeup.backend(backend):
        step(tensors[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            got = step(tensors[0] * 2)
        stream.synchronize()
        expected = step(tensors[0] * 2)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

        graph, static = torch.cuda.CUDAGraph(), tensors[0].clone(memory_format=torch.preserve_format)
        with torch.cuda.graph(graph):
            got = step(static)
        static.copy_(tensors[0] * 3)
        graph.replay()
        expected = step(tensors[0] * 3)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_strides_and_offsets(backend):
    case = BIG[2]
    x, w, b, _ = case.tensors(torch.bfloat16, "nhwc", "cuda")
    views = {
        "offset": torch.randn(x.numel() + 1, device="cuda").bfloat16()[1:].view(x.shape),
        "slice": torch.randn(2, 80, 42, 27, device="cuda").bfloat16()[:, 3:67, 1:41, 2:26],
        "expanded": x[:1, :1].expand(2, 64, -1, -1),
        "channels-last slice": torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 7:71],
    }
    with aeup.backend(backend):
        assert aeup.conv_transpose2d(x[:0], w, b, **case.kwargs, activation="relu").shape[0] == 0
        for name, view in views.items():
            leaves = [t.detach().requires_grad_() for t in (view, w, b)]
            y = aeup.conv_transpose2d(*leaves, **case.kwargs)
            y.sum().backward()  # a gradient of strides 0
            exact = [t.detach().double().requires_grad_() for t in (view, w, b)]
            with aeup.backend("torch"):
                reference = aeup.conv_transpose2d(*exact, **case.kwargs)
                reference.sum().backward()
            check_budget(y.cpu(), reference.cpu(), reference.bfloat16().cpu()), name
            check_budget(leaves[1].grad.cpu(), exact[1].grad.cpu(), exact[1].grad.bfloat16().cpu())


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_opcheck(dtype):
    x, w, b, grad = (t.requires_grad_() for t in CASES[0].tensors(dtype, device="cuda"))
    pairs = (2, 2), (1, 1)
    torch.library.opcheck(torch.ops.aeup.conv_transpose2d.default, (x, w, b, *pairs, (0, 0), 1, (1, 1), "relu"))
    of_x, of_w = (grad, w, x.shape[2:], *pairs, 1, (1, 1)), (grad, x, w.shape[2:], *pairs, 1, (1, 1))
    torch.library.opcheck(torch.ops.aeup.conv_transpose2d_input_gradient.default, of_x)
    torch.library.opcheck(torch.ops.aeup.conv_transpose2d_weight_gradient.default, of_w)
    torch.library.opcheck(torch.ops.aeup.conv_epilogue_gradient.default, (grad, grad.detach(), "relu", 0.0, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_second_order(backend):
    x, w, b, _ = (t.requires_grad_() for t in CASES[2].tensors(torch.float64, device="cuda"))
    with aeup.backend(backend):
        call = lambda x, w, b: aeup.conv_transpose2d(x[:1, :, :2, :2], w, b, 2, 1, 1, activation="tanh")  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, w, b)) and torch.autograd.gradgradcheck(call, (x, w, b))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step_by_the_compiler_and_under_autocast(layout):
    torch._dynamo.reset()
    layer = aeup.ConvTranspose2d(64, 32, 4, 2, 1, activation="relu").cuda().to(memory_format=LAYOUTS[layout])
    x = torch.randn(4, 64, 16, 16, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        z = torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z)
    grads = [torch.autograd.grad(t.float().sum(), list(layer.parameters())) for t in (y, z)]
    torch.testing.assert_close(*grads)
    assert grads[0][0].dtype == torch.float32


def test_explain_names_the_kernel():
    x, w, b, _ = BIG[0].tensors(torch.bfloat16, "nhwc", "cuda")
    choices = aeup.explain(aeup.conv_transpose2d, x, w, b, stride=2, padding=1)
    assert [c.backend for c in choices] == ["cuda"] * 3 and all(c.kernel for c in choices)


def test_out_of_memory_has_torchs_type():
    with pytest.raises(torch.OutOfMemoryError):
        x = torch.zeros(64, 16, 1024, 1024, dtype=torch.bfloat16, device="cuda")
        aeup.conv_transpose2d(x, torch.zeros(16, 16, 16, 16, dtype=torch.bfloat16, device="cuda"), stride=16)
