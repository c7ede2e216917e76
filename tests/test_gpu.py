"""The CUDA and Triton kernels on a real GPU (elsewhere: the host emulation and Triton's interpreter)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, GEOMETRIES, LAYOUTS, MODES, OPTIONS, SMOOTH, Case, check_budget, gradient, reference_of

import aeup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
BACKENDS = ("triton", "cuda")  # the slower first: its tests start first
SHAPES = ((2, 3, 9, 13), (2, 64, 16, 24), (1, 21, 7, 32), (3, 8, 33, 40))
# Triton compiles its kernels for every geometry and dtype, a second each: all geometries in float32, the others in
# those where the dtype counts (x2 has weights of its own, any scale computes them, a reduction has long windows).
TRITON_GEOMETRIES = {
    torch.float32: GEOMETRIES,
    torch.bfloat16: ({"scale_factor": 2}, {"scale_factor": (1.7, 2.3)}, {"size": (5, 6)}),
    torch.float16: ({"scale_factor": 2}, {"scale_factor": (1.7, 2.3)}),
    torch.float64: ({"scale_factor": 2}, {"scale_factor": (1.7, 2.3)}),
}


def by_torch(fn, *tensors):
    """fn(*tensors) by torch's own kernels: outside deterministic mode, which would take other ones or raise. Its
    antialias on CUDA refuses large scales; there by those on the CPU, which need float32 or float64."""
    torch.use_deterministic_algorithms(False)
    try:
        return fn(*tensors)
    except RuntimeError as error:
        if "Too much shared memory required" not in str(error):
            raise
        on_cpu = [t.cpu() if t.dtype == torch.float64 else t.cpu().float() for t in tensors]
        return fn(*on_cpu).to(tensors[0])
    finally:
        torch.use_deterministic_algorithms(True)


def nearest_gradient(case, x, grad):
    """The float64 gradient of a nearest mode for the pixels that torch's forward takes at x's dtype and layout. In
    float64 it may take others, and its backward gathers by another formula than its forward."""
    n, c, h, w = x.shape

    def taken(numbers):  # [h, w], below 128: exact in every dtype -> [oh, ow]
        probe = torch.empty_like(x).copy_(numbers.to(x))
        return by_torch(lambda: case.call(F.interpolate, probe))[0, 0].long()

    rows = taken(torch.arange(h)[:, None].expand(h, w))[:, 0]
    columns = taken(torch.arange(w)[None, :].expand(h, w))[0]
    return by_torch(lambda: F.one_hot(rows, h).double().t() @ (grad.double() @ F.one_hot(columns, w).double()))


def sample(shape, dtype, layout, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64, device="cuda").to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


def check_case(case, dtype, layout, backend):
    """Forward and gradient of one problem against float64, within twice torch's own error; all on the GPU."""
    x = sample(case.shape, dtype, layout, seed=0)
    theirs = by_torch(lambda x: case.call(F.interpolate, x), x)
    grad = sample(theirs.shape, dtype, layout, seed=1)
    with aeup.backend(backend):
        y = case.call(aeup.interpolate, x)
        got = gradient(aeup.interpolate, case, x, grad)
    assert y.dtype == dtype and y.stride() == theirs.stride()
    if case.mode in SMOOTH:
        check_budget(y, by_torch(lambda x: reference_of(case, x), x.double()), theirs)
    else:
        assert torch.equal(y, theirs), "nearest takes another pixel than torch"
    theirs = by_torch(lambda x, grad: gradient(F.interpolate, case, x, grad), x, grad)
    if case.mode in SMOOTH:
        exact = by_torch(lambda x, grad: gradient(F.interpolate, case, x, grad), x.double(), grad.double())
    else:  # torch's error counts as far as rounding a sum of `terms` explains it
        exact = nearest_gradient(case, x, grad)
        terms = math.ceil(y.shape[2] / x.shape[2]) * math.ceil(y.shape[3] / x.shape[3])
        wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        rounding = (terms * wide.eps + torch.finfo(dtype).eps) * exact.abs().max().item()
        theirs = exact + (theirs.double() - exact).clamp(-rounding, rounding)
    check_budget(got, exact, theirs)


@pytest.mark.parametrize("mode,option", [(m, option) for m in MODES for option in OPTIONS[m]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradient_within_budget(mode, option, dtype, backend):
    geometries, failed = GEOMETRIES if backend == "cuda" else TRITON_GEOMETRIES[dtype], []
    for geometry, shape, layout in itertools.product(geometries, SHAPES, LAYOUTS):
        case = Case(mode, {**geometry, **option}, shape)
        try:
            check_case(case, dtype, layout, backend)
        except AssertionError as e:
            failed.append(f"{case} {layout}: {e}")
    assert not failed, f"{len(failed)} problems fail:\n" + "\n".join(failed)


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
