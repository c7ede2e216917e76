"""aeup.intercept: what is taken, that results and gradients are torch's, and that nothing leaks out of the block."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aeup
from aeup import intercept, swap

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*upsample:UserWarning")]


def decode(x, weight):
    x = F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=True)
    x = F.conv_transpose2d(x, weight, stride=2, padding=1)
    x = torch.conv_transpose2d(x.relu(), weight.transpose(0, 1), None, 1)
    x = F.upsample_nearest(x, scale_factor=2)
    return F.upsample_bilinear(F.upsample(x, size=(31, 20), mode="bilinear"), scale_factor=2)


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in ((2, 3, 5, 4), (3, 2, 3, 3))]


def results(fn, x, weight):
    out = fn(x, weight)
    return out, *torch.autograd.grad(out.square().sum(), (x, weight))


def test_the_same_results_and_gradients():
    want = results(decode, *inputs())
    with intercept() as mode:
        got = results(decode, *inputs())
    with intercept():
        out = decode(*(arguments := inputs()))
    later = out, *torch.autograd.grad(out.square().sum(), arguments)  # backward outside of the block
    for other in (got, later):
        for a, b in zip(other, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert [c.function for c in mode.calls].count("F.interpolate") == 4
    assert [c.taken for c in mode.calls if c.function == "F.conv_transpose2d"] == ["aeup.conv_transpose2d"] * 2


def test_aeup_runs_inside_and_torch_outside():
    x, weight = inputs()

    def inside(x, weight):
        with intercept():
            return decode(x, weight)

    ops = [c.op for c in aeup.explain(inside, x, weight)]
    assert ops.count("aeup.interpolate") == 8 and ops.count("aeup.conv_transpose2d") == 2  # each with its gradient
    assert list(aeup.explain(decode, x, weight)) == []


def test_the_calls_that_it_lists():
    x = torch.randn(2, 3, 4, 4)
    with intercept() as mode:
        assert str(mode.calls) == "no upsampling function of torch was called"
        for _ in range(3):
            F.interpolate(x, scale_factor=2)
        F.interpolate(x, scale_factor=0.5, mode="area")
        F.interpolate(x[0], size=3, mode="linear")
        F.conv_transpose2d(x.to(torch.complex64), torch.randn(3, 2, 2, 2).to(torch.complex64))
        F.interpolate(x.to(torch.uint8), size=3)
        torch.add(x, x)
    first, area, linear, complex_, byte = mode.calls
    assert str(first) == "F.interpolate([2, 3, 4, 4], nearest, float32) (3 times) -> aeup.interpolate"
    assert first.count == 3 and byte.taken == "aeup.interpolate"
    assert str(area).endswith("-> torch: aeup serves 4-D input in modes nearest, nearest-exact, bilinear, bicubic")
    assert linear.taken == "" and "float32, float64" in complex_.reason and "weight [3, 2, 2, 2]" in complex_.call
    assert str(mode.calls).count("\n") == 4


def test_errors_are_torchs():
    with intercept() as mode:
        with pytest.raises(ValueError, match="only one of size or scale_factor"):
            F.interpolate(torch.randn(1, 1, 2, 2), size=3, scale_factor=2)
        with pytest.raises(RuntimeError):
            F.conv_transpose2d(torch.randn(1, 3, 2, 2), torch.randn(2, 3, 1, 1))
        with pytest.raises(TypeError):
            F.interpolate(torch.randn(1, 1, 2, 2), 3, unknown=1)
    assert mode.calls == []
    x = torch.randn(1, 1, 2, 2)
    assert aeup.explain(lambda x: F.interpolate(x, size=3), x) == []  # the block is left after errors, too


def test_modules_nesting_and_threads():
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(3, 2, 2))
    x = torch.randn(1, 3, 4, 4)
    want = model(x)
    with intercept() as outer, intercept() as inner:
        torch.testing.assert_close(model(x), want)
    assert len(inner.calls) == 2 and len(outer.calls) == 0
    swap(model)
    with intercept() as mode:
        torch.testing.assert_close(model(x), want)
    assert mode.calls == []  # aeup's already
    found = []
    with intercept() as mode:
        thread = threading.Thread(target=lambda: found.append(F.interpolate(x, scale_factor=2)))
        thread.start()
        thread.join()
    assert found[0].shape == (1, 3, 8, 8) and mode.calls == []


def test_traced_inside():
    """Of torch.fx and torch.jit: the same function, and nothing is listed, as nothing has a size yet."""
    model, x = nn.Sequential(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(3, 2, 2)), torch.randn(1, 3, 4, 4)
    with intercept() as mode:
        traced = torch.jit.trace(model, x, check_trace=False), torch.fx.symbolic_trace(model)
    assert mode.calls == []
    for size in (4, 7):
        x = torch.randn(2, 3, size, size + 1)
        for other in traced:
            torch.testing.assert_close(other(x), model(x))


def test_autocast_keeps_the_dtype():
    x = torch.randn(1, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), intercept():
        assert F.interpolate(x, scale_factor=2, mode="bilinear").dtype == torch.bfloat16
        assert F.conv_transpose2d(x.float(), torch.randn(3, 2, 2, 2)).dtype == torch.bfloat16


def test_compile_and_export():
    x, weight = (t.detach().float() for t in inputs())
    want = decode(x, weight)

    def inside(x, weight):
        with intercept():
            return decode(x, weight)

    class Model(nn.Module):
        def forward(self, x, weight):
            return inside(x, weight)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weight), want, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        around = torch.compile(decode, fullgraph=True, backend="aot_eager")
        with intercept():
            torch.testing.assert_close(around(x, weight), want, rtol=1e-4, atol=1e-4)
        program = torch.export.export(Model(), (x, weight), strict=False)
    names = [str(n.target) for n in program.graph.nodes]
    assert names.count("aeup.interpolate.default") == 4 and names.count("aeup.conv_transpose2d.default") == 2
