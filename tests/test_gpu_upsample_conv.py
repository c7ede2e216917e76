"""Nearest upsampling and a convolution as one folded transposed convolution, on a real GPU: the compiled operators by
family, and aeup.upsample_conv2d on them."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import check_budget
from conv_cases import LAYOUTS
from test_conv_transpose2d import check_all
from test_gpu_conv import float32_precision, rounded_to_tf32

import aeup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poison"),
]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")
SLOPE = 0.125


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple  # of the input, [N, CI, H, W]
    weight: tuple  # [CO, CI / groups, kH, kW]
    scale: tuple = (2, 2)
    padding: tuple = (1, 1)
    groups: int = 1

    def __str__(self):
        return self.name

    @property
    def geometry(self):
        return *self.scale, *self.padding, self.groups

    def plain(self, x, w, b):
        up = F.interpolate(x, scale_factor=tuple(map(float, self.scale)), mode="nearest")
        return F.conv2d(up, w, b, 1, self.padding, 1, self.groups)

    def fused(self, x, w, b, activation=None):
        return aeup.upsample_conv2d(
            x, w, b, scale_factor=self.scale, padding=self.padding, groups=self.groups, activation=activation
        )

    def tensors(self, dtype, layout="nchw", weight_layout=None, seed=0):
        """x, weight, bias and a gradient of the output; the same values in every dtype up to rounding."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=g, dtype=F64)
        w = torch.randn(self.weight, generator=g, dtype=F64) / (self.weight[1] * 2) ** 0.5
        b = torch.randn(self.weight[0], generator=g, dtype=F64)
        grad = torch.randn(self.plain(x, w, b).shape, generator=g, dtype=F64)
        formats = (layout, weight_layout or layout, layout)
        x, w, grad = (t.contiguous(memory_format=LAYOUTS[f]) for t, f in zip((x, w, grad), formats, strict=True))
        return tuple(t.to("cuda", dtype) for t in (x, w, b, grad))


CASES = (  # odd sizes, partly filled tiles, phases of different taps, zeros around the folded kernel
    Case("sd", (2, 128, 17, 19), (136, 128, 3, 3)),
    Case("narrow", (3, 64, 33, 31), (24, 64, 3, 3)),  # the phases are columns
    Case("odd-channels", (2, 35, 13, 9), (33, 35, 3, 3)),
    Case("k5", (1, 72, 12, 15), (40, 72, 5, 5), padding=(2, 2)),
    Case("k1", (2, 32, 9, 8), (48, 32, 1, 1), padding=(0, 0)),
    Case("k2", (2, 32, 9, 8), (48, 32, 2, 2), padding=(0, 1)),
    Case("x3", (1, 48, 10, 7), (32, 48, 3, 3), (3, 3)),
    Case("x4-each-axis", (2, 32, 6, 9), (40, 32, 3, 5), (4, 1), (0, 3)),
    Case("wide-padding", (1, 32, 5, 7), (32, 32, 2, 3), (2, 2), (3, 4)),
    Case("x1", (2, 48, 11, 9), (56, 48, 3, 3), (1, 1)),
    Case("one-pixel", (5, 40, 1, 1), (32, 40, 3, 3)),
    Case("x8", (1, 24, 5, 6), (20, 24, 3, 3), (8, 8)),
)
FEW = (
    Case("rgb", (2, 64, 32, 33), (3, 64, 3, 3)),
    Case("one-channel", (2, 40, 19, 70), (1, 40, 3, 3)),
    Case("two-k2", (1, 64, 9, 36), (2, 64, 2, 2), padding=(0, 1)),
)
GENERIC = (
    Case("groups", (2, 48, 9, 7), (32, 24, 3, 3), groups=2),
    Case("depthwise", (2, 33, 20, 11), (33, 1, 3, 3), groups=33),
    Case("many-elements", (1, 4, 6, 5), (6, 4, 23, 21), (2, 2), (11, 10)),
    Case("thin", (2, 5, 7, 6), (6, 5, 3, 3), (2, 3)),
)
FAMILIES = ("hopper", "hopper_float", "few", "generic")
MIXED = (("nchw", "nchw"), ("nhwc", "nhwc"), ("nchw", "nhwc"), ("nhwc", "nchw"))


def is_channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last)


def only_channels_last(t):
    return is_channels_last(t) and not t.is_contiguous()


def served(case, dtype, which, tf32=False):
    """The families that serve this pass here, the fastest first."""
    x = torch.empty(case.shape, dtype=dtype, device="meta")
    w = torch.empty(case.weight, dtype=dtype, device="meta")
    text = torch.ops.aeup_native.upsample_conv2d_kernel(
        x, w, *case.geometry, which, tf32, *torch.cuda.get_device_capability()
    )
    first = text.split(" ")[0]
    return (first, "generic") if first != "generic" else (first,)


def raw(case, tensors, which, family="", activation=0, tf32=False):
    x, w, b, grad = tensors
    ops = torch.ops.aeup_native
    if which == 0:
        return ops.upsample_conv2d(x, w, b, *case.geometry, activation, SLOPE, tf32, family)
    if which == 1:
        return ops.upsample_conv2d_input_gradient(grad, w, *x.shape[2:], *case.geometry, tf32, family)
    return ops.upsample_conv2d_weight_gradient(grad, x, w, *case.geometry, tf32, family)


def all_by_torch(case, tensors):
    """Output and gradients of x, weight and bias, by torch's own kernels."""
    torch.use_deterministic_algorithms(False)
    try:
        x, w, b, grad = tensors
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
        y = case.plain(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)
    finally:
        torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@pytest.mark.parametrize("case", CASES + FEW + GENERIC, ids=str)
def test_raw_operators_within_budget(case, dtype):
    for layout, weight_layout in MIXED:
        tensors = case.tensors(dtype, layout, weight_layout)
        exact = all_by_torch(case, [t.double() for t in tensors])
        for tf32 in (False, True) if dtype is F32 else (False,):
            if tf32:
                other = [t.float() for t in all_by_torch(case, [rounded_to_tf32(t).double() for t in tensors])]
            else:
                with float32_precision("ieee"):
                    other = all_by_torch(case, tensors)
            for which in range(3):
                for family in served(case, dtype, which, tf32):
                    got = raw(case, tensors, which, family, tf32=tf32)
                    assert got.dtype == dtype and got.shape == exact[which].shape
                    sources = ((tensors[0], tensors[1]), (tensors[3], tensors[1]), (tensors[1],))[which]
                    assert got.is_contiguous() or any(map(only_channels_last, sources))
                    assert is_channels_last(got) or not any(map(only_channels_last, sources))
                    check_budget(got.cpu(), exact[which].cpu(), other[which].cpu())


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the families are those of Hopper"
)
def test_families():
    """Each family is reached: what the test above compares is not the generic one everywhere."""
    assert served(CASES[0], BF16, 0)[0] == served(CASES[1], F16, 1)[0] == served(CASES[2], BF16, 2)[0] == "hopper"
    assert served(CASES[0], F32, 0)[0] == served(CASES[3], F32, 1, True)[0] == "hopper_float"
    assert all(served(FEW[0], dtype, which)[0] == "few" for dtype in (F32, BF16) for which in range(3))
    assert served(GENERIC[0], BF16, 0) == ("generic",)
    with pytest.raises(RuntimeError, match="no family 'fast'"):
        raw(CASES[0], CASES[0].tensors(BF16), 0, "fast")


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("case", (*CASES[:3], FEW[0], GENERIC[0]), ids=str)
def test_activations_and_the_backward_in_one_call(case, dtype):
    for layout in LAYOUTS:
        x, w, b, grad = tensors = case.tensors(dtype, layout)
        for number, activation in enumerate(ACTIVATIONS):
            y = raw(case, tensors, 0, activation=number)
            kept = raw(case, tensors, 0) if activation in ("silu", "gelu") else y
            got = torch.ops.aeup_native.upsample_conv2d_backward(
                grad, x, w, None if number == 0 else kept, *case.geometry, number, SLOPE, False, True, True, True
            )
            before, of_bias = torch.ops.aeup_native.conv_epilogue_gradient(
                grad, None if number == 0 else kept, number, SLOPE, True
            )
            apart = [raw(case, (x, w, b, before), which) for which in (1, 2)]
            assert all(torch.equal(a, c) for a, c in zip(got[:2], apart, strict=True))
            # One pass from NCHW to channels-last adds in another order.
            bound = 2**-20 * before.double().abs().sum((0, 2, 3)) + torch.finfo(dtype).eps * of_bias.double().abs()
            assert ((got[2].double() - of_bias.double()).abs() <= bound).all()
            apply = {"none": lambda t: t, "leaky_relu": lambda t: F.leaky_relu(t, SLOPE)}.get(activation)
            apply = apply or getattr(torch if hasattr(torch, activation) else F, activation)
            with float32_precision("ieee"):
                exact, other = (apply(case.plain(*ts)) for ts in ((x.double(), w.double(), b.double()), (x, w, b)))
            check_budget(y.cpu(), exact.cpu(), other.cpu(), floor_ulps=4)
        only = torch.ops.aeup_native.upsample_conv2d_backward(
            grad, x, w, None, *case.geometry, 0, 0.0, False, False, True, False
        )
        assert [t.numel() > 0 for t in only] == [False, True, False] and torch.equal(only[1], raw(case, tensors, 2))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_same_bits_on_every_run_and_in_a_captured_graph(dtype):
    for case in (CASES[0], CASES[1], CASES[8], FEW[0], GENERIC[0]):
        for layout in LAYOUTS:
            x, w, b, grad = case.tensors(dtype, layout)
            static = [t.clone(memory_format=torch.preserve_format) for t in (x, w)]

            def step(x, w, case=case, b=b, grad=grad):
                y = raw(case, (x, w, b, grad), 0, activation=1)
                return y, *torch.ops.aeup_native.upsample_conv2d_backward(
                    grad, x, w, y, *case.geometry, 1, 0.0, False, True, True, True
                )

            first, again = step(x, w), step(x, w)
            assert all(torch.equal(a, c) for a, c in zip(first, again, strict=True))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = step(*static)
            static[0].copy_(2 * x), static[1].copy_(-3 * w)
            graph.replay()
            assert all(torch.equal(a, c) for a, c in zip(got, step(2 * x, -3 * w), strict=True))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                there = step(x * 2, w)
            stream.synchronize()
            assert all(torch.equal(a, c) for a, c in zip(there, step(x * 2, w), strict=True))


def test_empty_batches_strides_and_offsets():
    case = CASES[1]
    x, w, b, grad = case.tensors(BF16, "nhwc")
    assert raw(case, (x[:0], w, b, grad), 0).shape == (0, *grad.shape[1:])
    assert raw(case, (x[:0], w, b, grad[:0]), 1).shape == (0, *x.shape[1:])
    assert not raw(case, (x[:0], w, b, grad[:0]), 2).any()
    exact = [t.double() for t in all_by_torch(case, [t.double() for t in (x, w, b, grad)])]

    def strided(t):
        return torch.cat([t, t, t], -1)[..., 1 : 1 + t.shape[-1]].copy_(t)

    def moved(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        return flat.as_strided(t.shape, t.stride()).copy_(t)

    for change in (strided, moved):
        given = [change(t) for t in (x, w, b, grad)]
        for which in range(3):
            got = raw(case, given, which)
            check_budget(got.cpu(), exact[which].cpu(), exact[which].bfloat16().cpu(), floor_ulps=4)
    ones = torch.ones((), dtype=BF16, device="cuda").expand(grad.shape)  # strides 0
    want = all_by_torch(case, [t.double() for t in (x, w, b, ones)])
    for which in (1, 2):
        got = raw(case, (x, w, b, ones), which)
        check_budget(got.cpu(), want[which].cpu(), want[which].bfloat16().cpu(), floor_ulps=4)


def test_results_past_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of device memory")
    torch.use_deterministic_algorithms(False)  # filling what is allocated would take most of the time
    case = Case("large", (1, 16, 8192, 4096 + 8), (16, 16, 3, 3))
    x = torch.randn(case.shape, dtype=BF16, device="cuda").contiguous(memory_format=torch.channels_last)
    w = torch.randn(case.weight, dtype=BF16, device="cuda") / 12
    b = torch.zeros(16, dtype=BF16, device="cuda")
    for family in served(case, BF16, 0):
        y = raw(case, (x, w, b, None), 0, family)
        assert y.numel() > 2**31
        want = case.plain(x[:, :, -9:, -9:].double(), w.double(), None)[:, :, 2:, 2:]
        got = y[:, :, -16:, -16:].contiguous()
        check_budget(got.cpu(), want.cpu(), want.bfloat16().cpu(), floor_ulps=4)
        del y, got
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@pytest.mark.parametrize("case", CASES[:8] + FEW + GENERIC[:2], ids=str)
def test_public_operator_within_budget(case, dtype):
    for layout in LAYOUTS:
        tensors = case.tensors(dtype, layout)
        exact = all_by_torch(case, [t.double() for t in tensors])
        with float32_precision("ieee"), aeup.backend("cuda"):
            other = all_by_torch(case, tensors)
            leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors[:3]]
            y = case.fused(*leaves)
            got = y, *torch.autograd.grad(y, leaves, tensors[3])
        check_all(*([t.detach().cpu() for t in group] for group in (got, exact, other)))


def test_public_operator_in_a_captured_training_step():
    layer = aeup.UpsampleConv2d(64, 32, 3, padding=1, activation="relu").cuda().bfloat16()
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 17, 15, device="cuda", dtype=BF16).contiguous(memory_format=torch.channels_last)

    def step():
        return torch.autograd.grad(layer(x).float().square().sum(), list(layer.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(-2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True)), "the weight was folded before the capture"


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("mode", ("bilinear", "bicubic"))
def test_resized_then_convolved_by_the_kernels_of_nearest(mode, dtype):
    case = CASES[0]
    for layout in LAYOUTS:
        x, w, b, grad = case.tensors(dtype, layout)

        def by_torch(x, w, b, grad):
            leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
            torch.use_deterministic_algorithms(False)  # torch's own resampling has no deterministic backward
            y = F.conv2d(F.interpolate(leaves[0], scale_factor=2, mode=mode), *leaves[1:], 1, case.padding).relu()
            found = y.detach(), *torch.autograd.grad(y, leaves, grad)
            torch.use_deterministic_algorithms(True)
            return found

        with float32_precision("ieee"):
            exact, other = by_torch(*(t.double() for t in (x, w, b, grad))), by_torch(x, w, b, grad)
            leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]

            def fused(x, w, b):
                return aeup.upsample_conv2d(x, w, b, scale_factor=2, mode=mode, padding=1, activation="relu")

            y = fused(*leaves)
            got = y, *torch.autograd.grad(y, leaves, grad)
            assert "by hopper" in aeup.explain(fused, *leaves)[0].kernel or torch.cuda.get_device_capability()[0] != 9
        check_all(*([t.detach().cpu() for t in group] for group in (got, exact, other)))
