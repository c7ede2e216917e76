"""The registered operators: opcheck, gradients of any order, transforms, compile, export, autocast; torch's OpInfo."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, MODES, SMOOTH, check_budget
from map_cases import Log, Named
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import ErrorInput

import aeup

KWARGS = (
    {"scale_factor": 2},
    {"size": (7, 5)},
    {"scale_factor": (0.6, 1.7)},
)


def options(mode):
    yield {}
    if mode in SMOOTH:
        yield {"align_corners": True}
        yield {"antialias": True}


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    for option in options(mode):
        args = (mode, option.get("align_corners", False), option.get("antialias", False), 1.75, None)
        for layout in LAYOUTS.values():
            x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
            torch.library.opcheck(torch.ops.aeup.interpolate.default, (x, (7, 9), *args))
            grad = torch.randn(2, 3, 7, 9).contiguous(memory_format=layout).requires_grad_()
            torch.library.opcheck(torch.ops.aeup.interpolate_backward.default, (grad, (4, 5), *args))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_first_and_second_order(mode):
    for option in options(mode):
        for kwargs in KWARGS:
            for layout in LAYOUTS.values():
                x = torch.randn(2, 2, 4, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()

                size = aeup.interpolate(x, mode=mode, **kwargs).shape[2:]
                flags = (option.get("align_corners", False), option.get("antialias", False))
                call = partial(aeup.interpolate, mode=mode, **kwargs, **option)
                registered = partial(torch.ops.aeup.interpolate, size=size, mode=mode)
                registered = partial(registered, align_corners=flags[0], antialias=flags[1])
                assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
                assert torch.autograd.gradgradcheck(call, x)
                assert torch.autograd.gradcheck(registered, x)
                assert torch.autograd.gradgradcheck(registered, x)


@pytest.mark.parametrize("mode", MODES)
def test_adjoint(mode):
    """<A x, y> = <x, A^T y>."""
    for option in options(mode):
        x, y = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(2, 3, 11, 13, dtype=torch.float64)
        args = (mode, option.get("align_corners", False), option.get("antialias", False))
        forward = torch.ops.aeup.interpolate(x, (11, 13), *args)
        backward = torch.ops.aeup.interpolate_backward(y, (6, 5), *args)
        torch.testing.assert_close((forward * y).sum(), (x * backward).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_whole_graph(mode, dynamic):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def net(x):
        y = aeup.interpolate(x * 2, scale_factor=2, mode=mode)
        return aeup.interpolate(y, size=(x.shape[2] * 3, 11), mode=mode).sin()

    for shape in ((2, 3, 5, 6), (1, 3, 8, 4), (3, 3, 9, 7)) if dynamic else ((2, 3, 5, 6),):
        x = torch.randn(shape, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        y = net(x)
        once = aeup.interpolate(z * 2, scale_factor=2, mode=mode)
        again = aeup.interpolate(once, size=(shape[2] * 3, 11), mode=mode).sin()
        torch.testing.assert_close(y, again)
        y.sum().backward()
        again.sum().backward()
        torch.testing.assert_close(x.grad, z.grad)


def test_compile_with_inductor(inductor):
    up = torch.compile(lambda x: aeup.interpolate(x + 1, scale_factor=2, mode="bilinear") * 3, fullgraph=True)
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(up(x), F.interpolate(x + 1, scale_factor=2, mode="bilinear") * 3)


def test_export_with_dynamic_sizes():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), aeup.Upsample(scale_factor=2, mode="bicubic"))
    n, h, w = (torch.export.Dim(name, min=2, max=64) for name in ("n", "h", "w"))
    program = torch.export.export(model, (torch.randn(2, 3, 8, 9),), dynamic_shapes=({0: n, 2: h + 3, 3: w + 3},))
    assert any(node.target is torch.ops.aeup.interpolate.default for node in program.graph.nodes)
    x = torch.randn(3, 3, 12, 17)
    torch.testing.assert_close(program.module()(x), model(x))


def test_function_transforms():
    def up(x):
        return aeup.interpolate(x, scale_factor=2, mode="bicubic")

    x = torch.randn(4, 2, 3, 5, 6)
    torch.testing.assert_close(torch.vmap(up)(x), torch.stack([up(row) for row in x]))
    torch.testing.assert_close(torch.vmap(up, in_dims=2, out_dims=1)(x), torch.stack([up(c) for c in x.unbind(2)], 1))
    grad = torch.func.grad(lambda x: (up(x) ** 2).sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    (up(leaf) ** 2).sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    per_sample = torch.vmap(torch.func.grad(lambda x: (up(x[None]) ** 2).sum()))(x[0])
    torch.testing.assert_close(per_sample, leaf.grad)
    out, tangent = torch.func.jvp(up, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, up(x[1]))


def test_modes_see_the_operator():
    from torch.utils.flop_counter import FlopCounterMode

    with Log() as log, FlopCounterMode(display=False):
        aeup.interpolate(torch.randn(1, 1, 2, 2), scale_factor=2)
    assert torch.ops.aeup.interpolate.default in log.seen
    Named.seen.clear()
    y = aeup.interpolate(torch.randn(1, 1, 2, 2).as_subclass(Named), scale_factor=2)
    assert isinstance(y, Named) and aeup.interpolate in Named.seen


@pytest.mark.parametrize("mode", MODES)
def test_autocast_keeps_the_dtype(mode):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(1, 2, 3, 4, dtype=dtype, requires_grad=True)
            y = aeup.interpolate(x, scale_factor=2, mode=mode)
            assert y.dtype == dtype
            y.sum().backward()
            assert x.grad.dtype == dtype
            assert torch.ops.aeup.interpolate(x, (5, 5), mode).dtype == dtype


def test_inference_mode_and_no_grad():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    with torch.no_grad():
        assert not aeup.interpolate(x, scale_factor=2).requires_grad
    with torch.inference_mode():
        assert aeup.interpolate(x, scale_factor=2).is_inference()


# --- PyTorch's own samples ---

OPS = [op for op in op_db if op.name in ("nn.functional.interpolate", "nn.functional.upsample_nearest")]
OPS += [op for op in op_db if op.name == "nn.functional.upsample_bilinear"]


def ours(op):
    if op.name == "nn.functional.upsample_nearest":
        return lambda x, *a, **k: aeup.interpolate(x, *a, mode="nearest", **k)
    if op.name == "nn.functional.upsample_bilinear":
        return lambda x, *a, **k: aeup.interpolate(x, *a, mode="bilinear", align_corners=True, **k)
    return aeup.interpolate


@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.variant_test_name}")
def test_opinfo(op):
    """Samples in every dtype that torch has on the CPU, forward and backward, and the error inputs."""
    fn, ran = ours(op), 0
    for dtype in sorted(op.supported_dtypes("cpu"), key=str):
        samples = list(op.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point))
        if op.reference_inputs_func is not None:
            samples += list(op.reference_inputs("cpu", dtype, requires_grad=dtype.is_floating_point))
        for s in samples:
            try:
                expected = op.op(s.input, *s.args, **s.kwargs)
            except NotImplementedError:  # torch: antialias in half precision
                assert s.kwargs["antialias"] and dtype.itemsize == 2
                continue
            got = fn(s.input, *s.args, **s.kwargs)
            assert got.shape == expected.shape and got.stride() == expected.stride() and got.dtype == expected.dtype
            exact = s.input.detach().double().requires_grad_()
            reference = op.op(exact, *s.args, **s.kwargs)
            if not dtype.is_floating_point:  # torch rounds and clamps between its two passes: many grey levels away
                error, theirs = ((y - reference.clamp(0, 255)).abs().max() for y in (got, expected))
                assert error <= max(theirs, 0.501)
                continue
            check_budget(got, reference, expected)
            grad = torch.ones_like(expected) / 3
            by_torch = torch.autograd.grad(expected, s.input, grad)[0]
            exact_grad = torch.autograd.grad(reference, exact, grad.double())[0]
            check_budget(torch.autograd.grad(got, s.input, grad)[0], exact_grad, by_torch)
            ran += 1
    if op.error_inputs_func is not None:
        for error in op.error_inputs("cpu"):
            assert isinstance(error, ErrorInput)
            s = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                fn(s.input, *s.args, **s.kwargs)
    assert ran > 0


# --- bad input: torch's exception type, and a message that names the argument and the value ---

X = torch.zeros(2, 3, 4, 5)
BAD = [
    (X, {}, "size or scale_factor"),
    (X, {"size": 3, "scale_factor": 2}, "only one of size or scale_factor.*size=3.*scale_factor=2"),
    (X, {"size": (3, 3, 3)}, r"output size of \(3, 3, 3\)"),
    (X, {"scale_factor": (2, 2, 2)}, r"scale_factor of shape \(2, 2, 2\)"),
    (X, {"size": (3.5, 2)}, "size with types"),
    (X, {"scale_factor": 2, "align_corners": True}, "align_corners.*mode='nearest'"),
    (X, {"scale_factor": 2, "antialias": True}, "Anti-alias.*mode='nearest'"),
    (X, {"size": 8, "recompute_scale_factor": True}, "recompute_scale_factor"),
    (X, {"scale_factor": 0.1, "mode": "bilinear"}, r"should be greater than 0.*H: 4, W: 5.*H: 0, W: 0"),
    (X, {"size": (0, 4)}, r"should be greater than 0.*output \(H: 0, W: 4"),
    (X, {"size": (-3, 4)}, r"output \(H: -3, W: 4"),
    (X[:, :, :0], {"size": 4}, r"input \(H: 0, W: 5"),
    (X[:, :0], {"size": 4}, r"\[2, 0, 4, 5\]"),
    (X, {"scale_factor": -1.0}, "greater than 0"),
    (X.int(), {"scale_factor": 2}, "not implemented for 'Int'"),
    (X, {"size": (True, 4)}, "size with types.*bool"),
    (X, {"size": True}, "size with types.*bool"),
    (X, {"size": np.array([8])}, "scalar"),
    (X, {"scale_factor": np.array([2.0, 3.0])}, "scale_factor with types.*ndarray"),
    (X, {"scale_factor": np.array(2.0)}, "scale_factor with types.*ndarray"),
    (X, {"scale_factor": torch.tensor(2.0)}, "scale_factor with types.*Tensor"),
    (X, {"scale_factor": (torch.tensor(2.0), 2)}, "scale_factor with types.*Tensor"),
    (X, {"scale_factor": Fraction(3, 2)}, "scale_factor with types.*Fraction"),
    (X, {"scale_factor": "2"}, "scale_factor with types.*str"),
    (X, {"scale_factor": (2, float("nan")), "recompute_scale_factor": True}, "scale_factor must be finite"),
    (X, {"scale_factor": float("inf"), "recompute_scale_factor": True}, "scale_factor must be finite"),
    (X, {"size": (2**64, 4)}, r"output size.*2\^63"),
    (X, {"scale_factor": 1e30, "recompute_scale_factor": True}, r"output size.*2\^63.*1e\+30"),
    (X, {"size": 8, "mode": "bilinear", "align_corners": 1}, "align_corners must be a bool"),
    (X[0, 0], {"scale_factor": 2}, ""),
    (X, {"scale_factor": 2, "mode": "cubic"}, ""),
]


@pytest.mark.parametrize(("x", "kwargs", "message"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_bad_input(x, kwargs, message):
    with pytest.raises(Exception) as theirs:
        F.interpolate(x, **kwargs)
    with pytest.raises(theirs.type, match=message):
        aeup.interpolate(x, **kwargs)


def test_options_of_other_kinds():
    """What torch takes besides ints, floats and bools; and a call is not taken for one whose options have its bytes."""
    for kwargs in (
        {"size": (np.int64(8), 9)},
        {"scale_factor": np.float32(2.1)},
        {"scale_factor": (np.int64(2), True)},
        {"scale_factor": torch.tensor(1.7), "recompute_scale_factor": True},
        {"scale_factor": 2, "mode": "bilinear", "antialias": "yes"},
    ):
        for _ in range(2):
            torch.testing.assert_close(aeup.interpolate(X, **kwargs), F.interpolate(X, **kwargs))
    assert aeup.interpolate(X, np.int64(8)).shape == (2, 3, 8, 8)
    with pytest.raises(TypeError):
        aeup.interpolate(X, np.array([8]))


@pytest.mark.parametrize("scale", (float("nan"), float("inf")))
def test_scale_factor_must_be_finite(scale):
    with pytest.raises(RuntimeError, match="scale_factor must be finite"):
        aeup.interpolate(X, scale_factor=scale)


def test_output_too_large():
    with pytest.raises(RuntimeError, match="allocate|overflow|memory"):
        aeup.interpolate(torch.zeros(1, 1, 4, 4), size=(2**21, 2**21))
    with pytest.raises(ValueError, match="expected a 4-D tensor"):
        torch.ops.aeup.interpolate(X[0], (3, 3), "nearest")
    with pytest.raises(ValueError, match="mode must be one of"):
        torch.ops.aeup.interpolate(X, (3, 3), "area")
