"""The CUDA and Triton kernels on a real GPU (elsewhere: the host emulation and Triton's interpreter)."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, MODES, SMOOTH, Case, cases, check_budget, gradient, reference_of, sample

import aeup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
BACKENDS = ("cuda", "triton")
SHAPES = ((2, 3, 9, 13), (2, 64, 16, 24), (1, 21, 7, 32), (3, 8, 33, 40))


def by_torch(fn):
    """torch's own kernels: outside deterministic mode, which would take other ones or raise."""
    torch.use_deterministic_algorithms(False)
    try:
        return fn()
    finally:
        torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_forward_and_gradient_within_budget(case, dtype, backend):
    for shape in SHAPES:
        case = Case(case.mode, case.kwargs, shape)
        for layout in LAYOUTS:
            x = sample(case, dtype, layout).cuda()
            with aeup.backend(backend):
                y = case.call(aeup.interpolate, x)
                grad = sample(Case(case.mode, {}, tuple(y.shape)), dtype, layout, seed=1).cuda()
                got = gradient(aeup.interpolate, case, x, grad)
            theirs = by_torch(lambda c=case, x=x: c.call(F.interpolate, x))
            assert y.dtype == dtype and y.stride() == theirs.stride()
            exact = by_torch(lambda c=case, x=x: reference_of(c, x))
            if case.mode in SMOOTH:
                check_budget(y.cpu(), exact.cpu(), theirs.cpu())
            else:
                assert torch.equal(y, theirs), "nearest takes another pixel than torch"
            exact = by_torch(lambda c=case, x=x, g=grad: gradient(F.interpolate, c, x.double(), g.double()))
            theirs = by_torch(lambda c=case, x=x, g=grad: gradient(F.interpolate, c, x, g))
            check_budget(got.cpu(), exact.cpu(), theirs.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_order_on_the_stream_and_graph_capture(mode, backend):
    x = torch.randn(4, 16, 32, 32, device="cuda")

    def step(x):
        leaf = x.detach().requires_grad_()
        y = aeup.interpolate(leaf, scale_factor=2, mode=mode)
        return y, torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    with aeup.backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            z = x * 2
            y, grad = step(z)
        stream.synchronize()
        expected = step(x * 2)
        assert torch.equal(y, expected[0]) and torch.equal(grad, expected[1])

        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            y, grad = step(static)
        static.copy_(x * 3)
        graph.replay()
        expected = step(x * 3)
        assert torch.equal(y, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_past_two_to_the_31_elements(layout, backend):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # no need to fill 4 GiB with NaN first
    x = torch.zeros(5, 4, 5300, 5300, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=LAYOUTS[layout])
    x[4, 3, -1, -1] = 7
    with aeup.backend(backend):
        y = aeup.interpolate(x, scale_factor=2, mode="bilinear")
        assert y.numel() > 2**31 and y[4, 3, -1, -1] == 7 and y[4, 3, :-3].max() == 0
        back = torch.ops.aeup.interpolate_backward(y, (5300, 5300), "nearest")
        assert back[4, 3, -1, -1] > 7


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    x = torch.randn(2, 3, 4, 5, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.aeup.interpolate.default, (x, (7, 9), mode))
    grad = torch.randn(2, 3, 7, 9, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.aeup.interpolate_backward.default, (grad, (4, 5), mode))


def test_out_of_memory_has_torchs_type():
    with pytest.raises(torch.OutOfMemoryError):
        aeup.interpolate(torch.zeros(64, 64, 1024, 1024, dtype=torch.uint8, device="cuda"), scale_factor=16)
