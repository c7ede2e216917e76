"""aeup.interpolate against torch: values, indices, shapes, strides, layouts, extreme inputs."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    LAYOUTS,
    MODES,
    SMOOTH,
    Case,
    cases,
    check_budget,
    gradient,
    reference_of,
    sample,
    torch_serves,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import aeup

pytestmark = pytest.mark.usefixtures("poison")
SHAPES = ((2, 3, 9, 13), (1, 1, 7, 40), (2, 21, 6, 5), (1, 64, 5, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_forward_and_gradient_within_budget(case, dtype):
    for shape in SHAPES:
        case = Case(case.mode, case.kwargs, shape)
        for layout in LAYOUTS:
            x = sample(case, dtype, layout)
            y, exact = case.call(aeup.interpolate, x), reference_of(case, x)
            by_torch = case.call(F.interpolate, x) if torch_serves(case, dtype) else None
            assert y.dtype == dtype
            if by_torch is not None:
                assert y.shape == by_torch.shape and y.stride() == by_torch.stride()
            if case.mode in SMOOTH:
                check_budget(y, exact, by_torch)
            else:
                assert torch.equal(y, by_torch), "nearest takes another pixel than torch"

            grad = sample(Case(case.mode, {}, tuple(y.shape)), dtype, layout, seed=1)
            got = gradient(aeup.interpolate, case, x, grad)
            assert got.dtype == dtype
            if y.shape[2] * y.shape[3] > 1:  # a gradient of one pixel has no layout to keep
                assert got.is_contiguous(memory_format=LAYOUTS[layout])
            exact = gradient(F.interpolate, case, x.double(), grad.double())
            by_torch = gradient(F.interpolate, case, x, grad) if torch_serves(case, dtype) else None
            check_budget(got, exact, by_torch)


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.uint8), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nearest_index_is_torchs_bit_for_bit(mode, dtype, layout):
    """Every input pixel carries its own number, so equality of values is equality of indices."""
    fmt = LAYOUTS[layout]
    for size in (*range(1, 70), 127, 128, 129, 200, 255):
        for channels in (1, 4):
            x = torch.arange(size * channels, dtype=torch.float64).reshape(1, channels, 1, size) % 251
            x = x.to(dtype).contiguous(memory_format=fmt)
            for width in (1, 2, 3, 7, 31, 64, 97, 130, 255):
                ours = aeup.interpolate(x, (1, width), mode=mode)
                assert torch.equal(ours, F.interpolate(x, (1, width), mode=mode)), (size, width)
            for scale in (0.3, 0.7, 1.1, 1.5, 1.9, 2.0, 2.1, 2.9, 3.3, 8.0):
                if size * scale >= 1:
                    ours = aeup.interpolate(x, scale_factor=(1, scale), mode=mode)
                    assert torch.equal(ours, F.interpolate(x, scale_factor=(1, scale), mode=mode)), (size, scale)


sizes = st.integers(1, 40)
scales = st.floats(0.2, 5.0)


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), sizes, sizes),
    size=st.one_of(st.tuples(sizes, sizes), st.none()),
    scale=st.tuples(scales, scales),
    option=st.sampled_from((None, "align_corners", "antialias")),
    recompute=st.booleans(),
    layout=st.sampled_from(tuple(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_geometry(mode, shape, size, scale, option, recompute, layout, dtype):
    kwargs = {"size": size} if size else {"scale_factor": scale, "recompute_scale_factor": recompute}
    if not size and min(int(shape[2] * scale[0]), int(shape[3] * scale[1])) < 1:
        return
    if option and mode in SMOOTH:
        kwargs[option] = True
    case = Case(mode, kwargs, shape)
    if not torch_serves(case, dtype):
        return
    if kwargs.get("antialias") and 1 in (shape[3], size[1] if size else int(shape[3] * scale[1])):
        return  # of one column, or to one, torch resamples no rows (2.13: four rows of 1.541 from 1.541 and -0.293)
    x = sample(case, dtype, layout)
    y, by_torch = case.call(aeup.interpolate, x), case.call(F.interpolate, x)
    assert y.shape == by_torch.shape and y.stride() == by_torch.stride()
    if y.numel() == 0:
        return
    if mode in SMOOTH:
        check_budget(y, reference_of(case, x), by_torch)
    else:
        assert torch.equal(y, by_torch)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    adjoint = gradient(aeup.interpolate, case, x, grad)
    if mode in SMOOTH and not size and (y.shape[2] == shape[2] or y.shape[3] == shape[3]):
        # With a scale at an unchanged size torch's gradient need not belong to its forward.
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        exact, by_torch = transposed(case, x.double(), grad.double()), transposed(case, x.to(wide), grad.to(wide))
        check_budget(adjoint, exact, by_torch.to(dtype))
        return
    smooth = mode in SMOOTH
    exact = gradient(F.interpolate, case, x.double(), grad.double()) if smooth else scattered(case, x, grad)
    check_budget(adjoint, exact, gradient(F.interpolate, case, x, grad))


def scattered(case, x, grad):
    """The gradient by torch's own nearest indices: its float64 kernel for it, contiguous, takes others now and then
    (nearest-exact, 30 columns to 97 with the scale recomputed: output 48 reads input 15, its gradient goes to 14)."""
    image = torch.arange(x[0, 0].numel(), dtype=torch.promote_types(x.dtype, torch.float32)).view(x.shape[2:])
    index = case.call(F.interpolate, torch.empty_like(x, dtype=image.dtype).copy_(image)).long()
    exact = torch.zeros(*x.shape[:2], image.numel(), dtype=torch.float64)
    return exact.scatter_add_(2, index.flatten(2), grad.double().flatten(2)).view(x.shape)


def transposed(case, x, grad):
    """The transpose of torch's own map, column by column, of grad [N, C, oh, ow]: [N, C, ih, iw]."""
    ih, iw = x.shape[2:]
    columns = case.call(F.interpolate, torch.eye(ih * iw, dtype=x.dtype).view(-1, 1, ih, iw))  # [ih * iw, 1, oh, ow]
    return torch.einsum("nchw,khw->nck", grad, columns[:, 0]).view(x.shape)


def test_the_gradient_at_an_unchanged_size_is_that_of_the_scale():
    x = torch.randn(1, 1, 2, 1, dtype=torch.float64)
    case = Case("bicubic", {"scale_factor": (1.25, 1.0)}, x.shape)
    grad = torch.tensor([3.0, 1.0], dtype=x.dtype).view(1, 1, 2, 1)
    ours = gradient(aeup.interpolate, case, x, grad)
    torch.testing.assert_close(ours, transposed(case, x, grad), rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours, grad)  # which is what torch gives


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_sums_of_few_rows_and_many_columns(mode, dtype):
    """The gradient of nearest in channels-last, whole numbers: blocks of every shape up to 9 pixels, and beyond."""
    for sh, sw in ((h, w) for h in range(1, 12) for w in range(1, 12) if h * w < 13):
        x = torch.zeros(2, 35, 3, 2, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = aeup.interpolate(x, scale_factor=(sh, sw), mode=mode)
        grad = torch.randint(-3, 4, y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
        (got,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(got, grad.unflatten(3, (2, sw)).unflatten(2, (3, sh)).sum((3, 5))), (sh, sw)


@pytest.mark.parametrize("mode", MODES)
def test_strides_and_offsets(mode):
    base = torch.randn(3, 8, 12, 20)
    views = {
        "offset": torch.randn(3 * 8 * 12 * 20 + 1)[1:].view(3, 8, 12, 20),
        "slice": base[:, 1:5, 2:9, 3:14],
        "step": base[::2, ::3, ::2, ::2],
        "transposed": base.transpose(2, 3),
        "expanded": base[:1, :1].expand(2, 5, -1, -1),
        "stride-0 all": base[:1, :1, :1, :1].expand(2, 3, 6, 5),
        "channels-last slice": base.contiguous(memory_format=torch.channels_last)[:, :3],
    }
    for name, x in views.items():
        y, by_torch = (fn(x, scale_factor=2, mode=mode) for fn in (aeup.interpolate, F.interpolate))
        assert y.stride() == by_torch.stride(), name
        torch.testing.assert_close(y, by_torch, msg=name)
        grads = []
        for fn in (aeup.interpolate, F.interpolate):
            leaf = x.clone().requires_grad_()
            fn(leaf, scale_factor=2, mode=mode).sum().backward()  # a gradient of strides 0
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_and_single_pixels(mode):
    x = torch.randn(0, 3, 4, 5, requires_grad=True)
    y = aeup.interpolate(x, scale_factor=2, mode=mode)
    assert y.shape == (0, 3, 8, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape
    x = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(aeup.interpolate(x, size=(5, 4), mode=mode), x.expand(2, 3, 5, 4))


@pytest.mark.parametrize("mode", SMOOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", (1, 3, 40))
def test_inf_and_nan_spread_no_further_than_in_torch(mode, layout, channels):
    g = torch.Generator().manual_seed(3)
    for kwargs in (
        {"scale_factor": 2},
        {"size": (29, 23)},
        {"scale_factor": 2, "align_corners": True},
        {"size": (9, 8)},
    ):
        for bad in (float("inf"), float("-inf"), float("nan")):
            x = torch.randn(1, channels, 12, 11, generator=g)
            x[torch.rand(x.shape, generator=g) < 0.02] = bad
            x[0, 0, 0, 0] = bad
            x = x.contiguous(memory_format=LAYOUTS[layout])
            ours, by_torch = (fn(x, mode=mode, **kwargs) for fn in (aeup.interpolate, F.interpolate))
            assert not (~ours.isfinite() & by_torch.isfinite()).any()
            reached = F.interpolate((~x.isfinite()).double(), mode="bilinear", **kwargs) > 1e-3
            assert not ours[reached].isfinite().any()


@pytest.mark.parametrize("mode", MODES)
def test_uint8(mode):
    """Computed in float32 and rounded once: never further from the exact value than torch's fixed-point path."""
    for layout, channels in (("nchw", 1), ("nchw", 5), ("nhwc", 3), ("nhwc", 20)):
        x = torch.randint(0, 256, (2, channels, 19, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        x = x.contiguous(memory_format=LAYOUTS[layout])
        for kwargs in ({"scale_factor": 2}, {"size": (41, 30)}, {"size": (7, 9)}):
            y = aeup.interpolate(x, mode=mode, **kwargs)
            exact = F.interpolate(x.double(), mode=mode, **kwargs).clamp(0, 255)
            assert y.dtype == torch.uint8
            assert (y.double() - exact).abs().max() <= (0.501 if mode in SMOOTH else 0)
    with pytest.raises(aeup.BackendError, match="uint8 has no gradient"):
        with aeup.backend("cpu"):
            torch.ops.aeup.interpolate_backward(x, (19, 23), mode)


def test_known_trouble_in_torch_is_absent():
    """fp16 bicubic gradients saturate at 2048 in torch (pytorch#104157): 128x128 outputs of one input sum to 16384."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float16, requires_grad=True)
    aeup.interpolate(x, (128, 128), mode="bicubic").sum().backward()
    assert x.grad.item() == 16384


@pytest.mark.parametrize("mode", ("nearest", "bilinear"))
def test_past_two_to_the_31_elements(mode):
    x = torch.zeros(3, 1, 20000, 10000, dtype=torch.uint8)
    x[2, 0, -1, -2:] = torch.tensor([10, 250], dtype=torch.uint8)
    x[1, 0, 7, 7] = 200
    y = aeup.interpolate(x, scale_factor=2, mode=mode)
    assert y.numel() > 2**31
    patch = F.interpolate(x[2:, :, -8:, -8:].float(), scale_factor=2, mode=mode)
    assert (y[2:, :, -8:, -8:] - patch[..., -8:, -8:]).abs().max() <= 0.501
    assert y[1, 0, 14, 14] > 100 and y[0].max() == 0 and y[2, 0, :-4].max() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_on_every_run_and_thread_count(mode, layout):
    x = torch.randn(1, 5, 133, 147).contiguous(memory_format=LAYOUTS[layout])  # enough work for several threads
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        leaf = x.clone().requires_grad_()
        y = aeup.interpolate(leaf, (260, 301), mode=mode)
        (y * y).sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.set_num_threads(threads)
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])


SMALL = """
import torch, torch.nn.functional as F, aeup, sys
sys.path.insert(0, sys.argv[1])
from cases import *
assert aeup.explain(aeup.interpolate, torch.zeros(1, 1, 2, 2), scale_factor=2)[0].kernel.endswith(sys.argv[2])
for case in cases():
    for dtype in DTYPES:
        for layout, channels in (("nchw", 2), ("nhwc", 3), ("nhwc", 19)):
            case = Case(case.mode, case.kwargs, (1, channels, 9, 13))
            if not torch_serves(case, dtype): continue
            x = sample(case, dtype, layout)
            y, t = case.call(aeup.interpolate, x), case.call(F.interpolate, x)
            assert torch.equal(y, t) if case.mode not in SMOOTH else check_budget(y, reference_of(case, x), t) is None
            g = torch.ones_like(y) / 7
            check_budget(gradient(aeup.interpolate, case, x, g), gradient(F.interpolate, case, x.double(), g.double()),
                         gradient(F.interpolate, case, x, g))
print("checked")
"""


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_every_instruction_set(isa):
    """The other code paths of this processor; the tests above run its best one."""
    here = aeup.explain(aeup.interpolate, torch.zeros(1, 1, 2, 2), scale_factor=2)[0].kernel
    if here.endswith("baseline"):
        pytest.skip("this processor has the baseline only")
    command = [sys.executable, "-c", SMALL, os.path.dirname(__file__), isa]
    out = subprocess.run(command, env={**os.environ, "AEUP_ISA": isa}, capture_output=True, text=True)
    assert "checked" in out.stdout, out.stderr
