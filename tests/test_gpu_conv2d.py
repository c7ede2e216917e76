"""aeup.conv2d with strides and dilations by the CUDA and Triton kernels on a real GPU."""

import pytest
import torch
import torch.nn.functional as F
from cases import check_budget
from conv2d_cases import ACTIVATIONS, CASES, DTYPES, LAYOUTS, Case, by_torch, run
from test_conv_transpose2d import check_all
from test_gpu_conv import BACKENDS, float32_precision, rounded_to_tf32

import aeup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
BIG = (  # tiles that fill, and do not fill, those of the matrix kernels
    Case("discriminator", (8, 64, 32, 32), (128, 64, 4, 4), {"stride": 2, "padding": 1}),
    Case("encoder", (2, 64, 41, 27), (72, 64, 3, 3), {"stride": 2, "padding": 1}),
    Case("image", (4, 3, 64, 66), (64, 3, 4, 4), {"stride": 2, "padding": 1}),
    Case("patches", (2, 32, 48, 32), (96, 32, 4, 4), {"stride": 4}),
    Case("atrous", (1, 64, 33, 31), (64, 64, 3, 3), {"padding": 6, "dilation": 6}),
    Case("long-sum", (4, 256, 8, 8), (200, 256, 4, 4), {"stride": 2, "padding": 1}),
    Case("big-groups", (2, 64, 34, 33), (128, 32, 4, 4), {"stride": 2, "padding": 1, "groups": 2}),
    Case("big-depthwise", (2, 96, 40, 41), (96, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 96}),
)


def theirs(case, tensors, activation=None):
    """torch's own kernels: outside deterministic mode, which would take other ones or raise."""
    torch.use_deterministic_algorithms(False)
    try:
        return run(by_torch, case, tensors, activation)
    finally:
        torch.use_deterministic_algorithms(True)


def check(case, dtype, layout, backend, activation=None, tf32=False):
    tensors = case.tensors(dtype, layout, "cuda")
    with aeup.backend(backend):
        got = run(aeup.conv2d, case, tensors, activation)
    exact = theirs(case, [t.double() for t in tensors], activation)
    other = theirs(case, tensors, activation)
    kept = layout == "nhwc" and got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[0].dtype == dtype and (got[0].stride() == other[0].stride() or kept)
    if tf32:  # torch may use tf32 and often does not: its budget is the error of rounding what is multiplied
        other = [t.float() for t in theirs(case, [rounded_to_tf32(t).double() for t in tensors], activation)]
    check_all(*([t.cpu() for t in group] for group in (got, exact, other)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + BIG, ids=str)
def test_all_passes_within_budget(case, dtype, backend):
    for layout in LAYOUTS:
        for precision in ("ieee", "tf32") if dtype is torch.float32 else ("ieee",):
            with float32_precision(precision):
                check(case, dtype, layout, backend, tf32=precision == "tf32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
@pytest.mark.parametrize("case", (CASES[1], CASES[14], *BIG[:3], BIG[5]), ids=str)
def test_activations(case, activation, backend):
    for dtype in DTYPES:
        for layout in LAYOUTS:
            with float32_precision("ieee"):
                check(case, dtype, layout, backend, activation)
                x, w, b, _ = case.tensors(dtype, layout, "cuda")
                with torch.no_grad(), aeup.backend(backend):  # silu and gelu too are then in the kernel
                    y = aeup.conv2d(x, w, b, **case.kwargs, activation=activation)
                exact, other = (
                    by_torch(x.to(d), w.to(d), b.to(d), activation, **case.kwargs) for d in (torch.double, dtype)
                )
                check_budget(y.cpu(), exact.cpu(), other.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_on_every_run(backend, layout):
    for case in BIG:
        for dtype in (torch.bfloat16, torch.float32):
            tensors = case.tensors(dtype, layout, "cuda")
            with aeup.backend(backend):
                first = run(aeup.conv2d, case, tensors, "relu")
                for _ in range(3):
                    again = run(aeup.conv2d, case, tensors, "relu")
                    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", (BIG[0], BIG[2]), ids=str)
def test_graph_capture(case, backend):
    tensors = case.tensors(torch.bfloat16, "nhwc", "cuda")

    def step(x):
        return run(aeup.conv2d, case, (x, *tensors[1:]), ("leaky_relu", 0.2))

    with aeup.backend(backend):
        step(tensors[0])
        graph, static = torch.cuda.CUDAGraph(), tensors[0].clone(memory_format=torch.preserve_format)
        with torch.cuda.graph(graph):
            got = step(static)
        static.copy_(tensors[0] * 3)
        graph.replay()
        expected = step(tensors[0] * 3)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_strides_and_offsets(backend):
    case = BIG[1]
    x, w, b, _ = case.tensors(torch.bfloat16, "nhwc", "cuda")
    views = {
        "offset": torch.randn(x.numel() + 1, device="cuda").bfloat16()[1:].view(x.shape),
        "slice": torch.randn(2, 80, 43, 30, device="cuda").bfloat16()[:, 3:67, 1:42, 2:29],
        "expanded": x[:1, :1].expand(2, 64, -1, -1),
        "channels-last slice": torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 7:71],
    }
    with aeup.backend(backend):
        assert aeup.conv2d(x[:0], w, b, **case.kwargs, activation="relu").shape[0] == 0
        for name, view in views.items():
            exact = F.conv2d(view.double(), w.double(), b.double(), **case.kwargs)
            got = aeup.conv2d(view, w, b, **case.kwargs)
            check_budget(got.cpu(), exact.cpu(), exact.bfloat16().cpu()), name


def test_opcheck():
    x, w, b, grad = (t.requires_grad_() for t in CASES[1].tensors(torch.bfloat16, device="cuda"))
    rest = (2, 2), (1, 1), (1, 1), 1
    torch.library.opcheck(torch.ops.aeup.conv2d.default, (x, w, b, *rest, "relu"))
    torch.library.opcheck(torch.ops.aeup.conv2d_input_gradient.default, (grad, w, x.shape[2:], *rest))
    torch.library.opcheck(torch.ops.aeup.conv2d_weight_gradient.default, (grad, x, w.shape[2:], *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_second_order(backend):
    x, w, b, _ = (t.requires_grad_() for t in CASES[2].tensors(torch.float64, device="cuda"))
    with aeup.backend(backend):
        call = lambda x, w, b: aeup.conv2d(x[:1, :, :4, :5], w, b, 2, 1, activation="tanh")  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, w, b)) and torch.autograd.gradgradcheck(call, (x, w, b))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step_by_the_compiler_and_under_autocast(layout):
    torch._dynamo.reset()
    layer = aeup.Conv2d(64, 32, 4, 2, 1, activation="relu").cuda().to(memory_format=LAYOUTS[layout])
    x = torch.randn(4, 64, 17, 16, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        z = torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z)
    grads = [torch.autograd.grad(t.float().sum(), list(layer.parameters())) for t in (y, z)]
    torch.testing.assert_close(*grads)


def test_the_module_is_the_function_and_the_choice_that_of_the_maps():
    layer = aeup.Conv2d(64, 64, 4, 2, 1).cuda().bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 32, 32, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    found = aeup.explain(layer, x)
    mirrored = aeup.explain(aeup.conv_transpose2d, layer(x), layer.weight, stride=2, padding=1)
    assert [c.op for c in found] == ["aeup.conv2d", "aeup.conv2d_input_gradient", "aeup.conv2d_weight_gradient"]
    assert [c.kernel for c in found] == [mirrored[i].kernel for i in (1, 0, 2)]
    assert aeup.explain(aeup.Conv2d(64, 64, 3, padding=1).cuda(), x.float())[0].op == "aeup.upsample_conv2d"
