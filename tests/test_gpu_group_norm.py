"""Group normalisation with the activation on a real GPU."""

import copy

import pytest
import torch
from cases import LAYOUTS
from group_norm_cases import by_torch, check, results, tensors
from test_batch_norm import ACTIVATIONS, views
from test_swap_group_norms import autoencoder

import aeup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (shape, groups). Of decoders; vectors of channels, of pixels, of a group's elements alone, and neither; one channel,
# pixel, group; groups larger than a tile, and parts of two in one; many samples; many blocks.
SHAPES = (
    ((1, 512, 64, 64), 32), ((2, 128, 96, 80), 32), ((8, 256, 16, 16), 32), ((3, 6, 7, 3), 2), ((2, 40, 7, 7), 5),
    ((9, 1, 5, 8), 1), ((700, 12, 1, 1), 3), ((64, 512, 4, 4), 1), ((1, 24, 90, 64), 24), ((5, 36, 31, 29), 4),
    ((2, 2050, 3, 2), 41), ((300, 32, 9, 8), 8),
)  # fmt: skip


def on_gpu(shape, dtype, layout, affine=True):
    return [t if t is None else t.cuda() for t in tensors(shape, dtype, layout, affine)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_error_budget(shape, groups, dtype, layout):
    for activation in (None, "relu", "silu"):
        check(shape, groups, dtype, layout, activation)
    check(shape, groups, dtype, layout, "silu", affine=False)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation):
    for dtype in DTYPES:
        for layout in LAYOUTS:
            check((16, 48, 9, 8), 6, dtype, layout, activation)
            check((5, 6, 9, 5), 3, dtype, layout, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero(layout):
    for away in (100.0, 1e4):
        check((2, 64, 64, 48), 8, torch.float32, layout, "leaky_relu", away=away)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_the_inputs_dtype(dtype):
    for layout in LAYOUTS:
        check((4, 48, 9, 8), 6, dtype, layout, "silu", narrow=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_on_every_run(layout):
    for dtype in (torch.bfloat16, torch.float32):
        given = on_gpu((3, 96, 64, 48), dtype, layout)
        grad = torch.randn_like(given[0])
        first, *others = (results(aeup.group_norm, given, grad, 8, activation="silu") for _ in range(4))
        for again in others:
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape, groups", [((2, 64, 16, 16), 8), ((3, 6, 7, 3), 2)], ids=str)
def test_order_on_the_stream_and_graph_capture(shape, groups):
    """One graph holds both passes of both directions; nothing waits for the GPU."""
    x = torch.randn(shape, device="cuda").to(memory_format=torch.channels_last).bfloat16()
    given = [torch.randn(shape[1], device="cuda").requires_grad_() for _ in range(2)]

    def step(x):
        leaf = x.detach().requires_grad_()
        y = aeup.group_norm(leaf, groups, *given, activation="silu")
        return y, *torch.autograd.grad(y, (leaf, *given), x)

    step(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = step(x * 2)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, step(x * 2), strict=True))
    graph, static = torch.cuda.CUDAGraph(), x.clone(memory_format=torch.preserve_format)
    with torch.cuda.graph(graph):
        got = step(static)
    for i in range(3):
        static.copy_(x * (3 + i))
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(x * 5), strict=True))


def test_strided_inputs_offsets_and_gradients():
    x, weight, bias = on_gpu((4, 9, 7, 6), torch.bfloat16, "nchw")
    for view in views(x).values():
        found = []
        for fn, of in ((aeup.group_norm, torch.bfloat16), (by_torch, torch.float64)):
            leaf = view.detach().to(of).requires_grad_()
            parameters = [t[2:8].to(torch.float32 if of is torch.bfloat16 else of) for t in (weight, bias)]
            y = fn(leaf, 3, *parameters)
            found.append((y, *torch.autograd.grad(y.sum(), leaf)))  # a gradient of strides 0
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    leaves = [t.requires_grad_() for t in on_gpu((2, 24, 5, 4), dtype, "nhwc")]
    x, weight, bias = leaves
    torch.library.opcheck(torch.ops.aeup.group_norm.default, (x, 4, weight, bias, 1e-5, "silu", 0.0))
    _, mean, invstd = torch.ops.aeup.group_norm(x, 4, weight, bias, 1e-5, "silu")
    grad = torch.randn_like(x).requires_grad_()
    args = grad, x, mean.detach(), invstd.detach(), weight, bias, 4, "silu", 0.0, [True, True, True]
    torch.library.opcheck(torch.ops.aeup.group_norm_backward.default, args)


def test_gradients_of_second_order():
    leaves = [t.requires_grad_() for t in on_gpu((2, 4, 3, 2), torch.float64, "nchw")]
    call = lambda x, w, b: aeup.group_norm(x, 2, w, b, activation="silu")  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_module_by_the_compiler_and_under_autocast(layout):
    torch._dynamo.reset()
    layer = aeup.GroupNorm(8, 32, activation="silu").cuda()
    x = torch.randn(4, 32, 16, 16, device="cuda").contiguous(memory_format=LAYOUTS[layout]).bfloat16()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        z = torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == z.dtype == torch.bfloat16 and y.stride() == z.stride() == x.stride()
    torch.testing.assert_close(y, z)
    grads = [torch.autograd.grad(t.float().sin().sum(), list(layer.parameters())) for t in (y, z)]
    torch.testing.assert_close(*grads)
    assert grads[0][0].dtype == torch.float32


def test_explain_and_what_goes_to_torch():
    x, weight, bias = on_gpu((4, 24, 5, 4), torch.bfloat16, "nhwc")
    choices = aeup.explain(aeup.group_norm, x, 4, weight, bias)
    assert [c.backend for c in choices] == ["cuda"] * 2 and all(c.kernel for c in choices)
    assert aeup.explain(aeup.group_norm, x, 4, weight, bias.bfloat16())[0].backend == "torch"
    assert aeup.group_norm(x[:0], 4, weight.bfloat16(), bias.bfloat16()).shape[0] == 0
    with aeup.backend("cuda"):
        y = aeup.group_norm(x.requires_grad_(), 4, weight, bias)
    assert y.grad_fn.plan.backend == "cuda"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_swapped_autoencoder(layout):
    """bfloat16: errors at most twice torch's; every norm but those of attention by our kernel."""
    model = autoencoder().cuda().to(memory_format=LAYOUTS[layout])
    x = torch.randn(2, 4, 24, 16, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        exact = copy.deepcopy(model).double().decode(x.double()).sample
        model, x = model.bfloat16(), x.bfloat16()
        theirs = model.decode(x).sample
        aeup.swap(model)
        ours = model.decode(x).sample
        norms = [c for c in aeup.explain(lambda t: model.decode(t).sample, x) if c.op == "aeup.group_norm"]
    assert len(norms) == 13 and all(c.backend == "cuda" for c in norms)
    error, other = ((t.double() - exact).norm() / exact.norm() for t in (ours, theirs))
    assert error <= 2 * other + 4e-3
