"""Batch normalisation with the activation on a real GPU."""

import copy
import itertools

import pytest
import torch
from batch_norm_cases import check, results, unfused
from cases import LAYOUTS
from test_batch_norm import ACTIVATIONS, by_torch, tensors
from torch import nn

import aeup
from aeup.ops import batch_norm as norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Vectors of channels, of pixels, and neither; more channels than one tile; one channel, pixel, image; many blocks.
SHAPES = (
    (32, 64, 7, 7), (16, 128, 16, 16), (3, 5, 7, 3), (2, 40, 4, 4), (9, 1, 5, 8), (700, 3, 1, 1), (64, 512, 4, 4),
    (1, 24, 90, 64), (5, 33, 31, 29), (8, 100, 12, 14), (2, 2053, 3, 2), (3, 16, 200, 200),
)  # fmt: skip


BACKENDS = ("cuda", "triton")


def on_gpu(shape, dtype, layout, affine=True):
    return [t if t is None else t.cuda() for t in tensors(shape, dtype, layout, affine)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(shape, dtype, layout):
    for activation in (None, "relu", "silu"):
        check(shape, dtype, layout, activation)
    check(shape, dtype, layout, "relu", affine=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_on_triton(shape, layout):
    """Each of these compiles four kernels: so one activation a dtype."""
    for dtype, activation in ((torch.bfloat16, "silu"), (torch.float32, "relu")):
        check(shape, dtype, layout, activation, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation, backend):
    for dtype, layout, training in itertools.product(DTYPES, LAYOUTS, (True, False)):
        check((16, 48, 9, 8), dtype, layout, activation, training, backend=backend)
        if backend == "cuda":
            check((5, 7, 9, 5), dtype, layout, activation, training)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_on_every_run(layout, backend):
    for dtype in (torch.bfloat16, torch.float32):
        given = on_gpu((64, 96, 32, 32), dtype, layout)
        grad = torch.randn_like(given[0])
        with aeup.backend(backend):
            first, *others = (results(aeup.batch_norm, given, grad, training=True, activation="silu") for _ in range(4))
        for again in others:
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_the_inputs_dtype(dtype, backend):
    given = [t.to(dtype) for t in on_gpu((16, 48, 9, 8), dtype, "nhwc")]
    grad = torch.randn_like(given[0])
    for training in (True, False):
        with aeup.backend(backend):
            got = results(aeup.batch_norm, given, grad, training=training, activation="relu")
        exact = unfused([t.double() for t in given], grad.double(), training=training, activation="relu")
        for a, b in zip(got, exact, strict=True):
            assert a.dtype is dtype
            torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=2**-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_far_from_zero(backend):
    x = torch.randn(64, 64, 32, 32, device="cuda") * 0.1 + 1000
    exact = 1 / (x.double().var((0, 2, 3), unbiased=False) + 1e-5).sqrt()
    for layout in LAYOUTS.values():
        with aeup.backend(backend):
            _, _, invstd, *_ = torch.ops.aeup.batch_norm(
                x.contiguous(memory_format=layout), None, None, None, None, True, 0.1, 1e-5
            )
        torch.testing.assert_close(invstd.double(), exact, rtol=1e-3, atol=0)


@pytest.fixture(params=BACKENDS)
def asked(request):
    with aeup.backend(request.param):
        yield


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("shape", [(16, 64, 16, 16), (3, 5, 7, 3)], ids=str)
def test_order_on_the_stream_and_graph_capture(shape):
    """One graph holds the statistics, the counter and both passes; nothing waits for the GPU."""
    layer = aeup.BatchNorm2d(shape[1], activation="silu").cuda()
    x = torch.randn(shape, device="cuda").to(memory_format=torch.channels_last).bfloat16()
    given = [torch.randn(shape[1], device="cuda").requires_grad_() for _ in range(2)]

    def step(x):
        leaf = x.detach().requires_grad_()
        y = aeup.batch_norm(leaf, None, None, *given, training=True, activation="silu")
        return y, *torch.autograd.grad(y, (leaf, *given), x)

    step(x)
    copy.deepcopy(layer)(x)  # Triton compiles before the capture
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = step(x * 2)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, step(x * 2), strict=True))
    graph, static = torch.cuda.CUDAGraph(), x.clone(memory_format=torch.preserve_format)
    before = layer.num_batches_tracked.item()
    with torch.cuda.graph(graph):
        got, _ = step(static), layer(static)
    for i in range(3):
        static.copy_(x * (3 + i))
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(x * 5), strict=True))
    torch.cuda.synchronize()
    assert layer.num_batches_tracked.item() == before + 3
    other = nn.BatchNorm2d(shape[1]).cuda()
    for i in range(3):
        other((x * (3 + i)).float())
    torch.testing.assert_close(layer.running_mean, other.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var, other.running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("asked")
def test_strided_inputs_offsets_and_gradients():
    x, mean, var, weight, bias = on_gpu((8, 80, 17, 15), torch.bfloat16, "nchw")
    views = {
        "offset": x.flatten()[1 : 1 + 4 * 64 * 8 * 8].view(4, 64, 8, 8),
        "slice": x[1:7, 3:67, 1:9, ::2],
        "expanded": x[:1, 2:66].expand(3, -1, -1, -1),
        "channels-last slice": x.contiguous(memory_format=torch.channels_last)[:, 7:71],
    }
    for name, view in views.items():
        parameters = [t[:64] for t in (mean, var, weight, bias)]
        found = []
        for fn, of in ((aeup.batch_norm, torch.bfloat16), (by_torch, torch.float64)):
            leaf = view.detach().to(of).requires_grad_()
            y = fn(
                leaf, *(t.to(torch.float32 if of is torch.bfloat16 else of).clone() for t in parameters), training=True
            )
            found.append((y, *torch.autograd.grad(y.sum(), leaf)))  # a gradient of strides 0
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2**-6), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, mean, var, weight, bias = on_gpu((4, 24, 5, 4), dtype, "nhwc")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.aeup.batch_norm.default, (*leaves, mean, var, True, 0.1, 1e-5, "silu", 0.0))
    grad = torch.randn_like(x).requires_grad_()
    statistics = mean.detach(), var.detach()
    args = grad, x, *statistics, weight, bias, True, "silu", 0.0, [True, True, True]
    torch.library.opcheck(torch.ops.aeup.batch_norm_backward.default, args)


def test_gradients_of_second_order():
    x, _, _, weight, bias = on_gpu((2, 2, 3, 2), torch.float64, "nchw")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    call = lambda x, w, b: aeup.batch_norm(x, None, None, w, b, True, activation="silu")  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_module_by_the_compiler_and_under_autocast(layout):
    torch._dynamo.reset()
    layer = aeup.BatchNorm2d(32, activation="relu").cuda()
    x = torch.randn(4, 32, 16, 16, device="cuda").contiguous(memory_format=LAYOUTS[layout]).bfloat16()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        z = torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == z.dtype == torch.bfloat16 and layer.num_batches_tracked == 2
    torch.testing.assert_close(y, z)
    grads = [torch.autograd.grad(t.float().sin().sum(), list(layer.parameters())) for t in (y, z)]
    torch.testing.assert_close(*grads)
    assert grads[0][0].dtype == torch.float32


def test_explain_and_what_goes_to_torch():
    x, mean, var, weight, bias = on_gpu((4, 24, 5, 4), torch.bfloat16, "nhwc")
    choices = aeup.explain(aeup.batch_norm, x, mean, var, weight, bias, training=True)
    assert [c.backend for c in choices] == ["cuda"] * 2 and all(c.kernel for c in choices)
    half = [t.bfloat16() for t in (mean, var, weight, bias)]
    mixed = *half[:2], weight, bias
    assert aeup.explain(aeup.batch_norm, x, *mixed, training=True)[0].backend == "torch"
    empty = aeup.batch_norm(x[:0], mean, var, weight, bias, True)
    assert empty.shape[0] == 0 and norms.OP.kernels["cuda"].refuses(x, None, None, None, None, None, None) is None


def test_gradient_keeps_the_backend_of_the_forward():
    x, mean, var, weight, bias = on_gpu((4, 24, 5, 4), torch.float32, "nhwc")
    with aeup.backend("cuda"):
        y = aeup.batch_norm(x.requires_grad_(), mean, var, weight, bias, True)
    assert y.grad_fn.plan.backend == "cuda"
