"""An eager call's plan is looked up by everything that its result or its kernel depends on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import aeup
from aeup import _native, tuned
from aeup.ops.conv_transpose2d import CONV_TRANSPOSE2D
from aeup.ops.interpolate import PLANS
from aeup.ops.interpolate import plan_key as resample_key
from aeup.ops.maps import plan_key

X, W, B = torch.randn(2, 4, 5, 3), torch.randn(4, 6, 4, 4), torch.randn(6)
OPTIONS = (2, 1, 0, 1, 1, None)


def key(x=X, w=W, b=B, options=OPTIONS):
    return plan_key(x, w, b, options)


def test_one_plan_for_the_same_call():
    assert key() == key(X.clone(), W.clone(), B.clone())
    tuned.forget()
    for _ in range(3):
        aeup.conv_transpose2d(X, W, B, 2, 1)
    assert len(CONV_TRANSPOSE2D.plans) == 1
    tuned.forget()
    assert not CONV_TRANSPOSE2D.plans


CHANGES = {
    "batch": {"x": X[:1]},
    "dtype": {"x": X.double()},
    "layout": {"x": X.to(memory_format=torch.channels_last)},
    "gradient": {"x": X.clone().requires_grad_()},
    "device": {"x": X.to("meta")},
    "weight's layout": {"w": W.to(memory_format=torch.channels_last)},
    "weight's gradient": {"w": W.clone().requires_grad_()},
    "no bias": {"b": None},
    "bias's gradient": {"b": torch.nn.Parameter(B)},
    "shorter bias": {"b": B[:3]},
    "pair": {"options": ((2, 2), 1, 0, 1, 1, None)},
    "output padding": {"options": (2, 1, 1, 1, 1, None)},
    "activation": {"options": (2, 1, 0, 1, 1, "relu")},
    "slope": {"options": (2, 1, 0, 1, 1, ("leaky_relu", 0.2))},
    "float": {"options": (2.0, 1, 0, 1, 1, None)},
    "bool": {"options": (2, True, 0, 1, 1, None)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_calls_have_other_plans(change):
    assert key(**change) not in (None, key())


def test_the_backend_and_no_grad_are_in_the_key():
    leaf = X.clone().requires_grad_()
    with aeup.backend("torch"):
        by_torch = key()
    assert by_torch != key()
    with torch.no_grad():
        assert key(leaf) == key()
    assert key(leaf) != key()


@pytest.mark.parametrize("wrong", [2.0, (2, 2.0)], ids=str)
def test_a_plan_lets_no_wrong_argument_through(wrong):
    aeup.conv_transpose2d(X, W, B, 2, 1)
    with pytest.raises(TypeError):
        aeup.conv_transpose2d(X, W, B, wrong, 1)


def test_a_plan_is_not_taken_where_something_watches():
    with FlopCounterMode(display=False):
        assert key() is None
    assert torch.func.vmap(lambda x: torch.tensor(float(key(x) is None)))(X[None]).item() == 1

    class Sub(torch.Tensor):
        pass

    assert key(X.as_subclass(Sub)) is None


def test_results_follow_the_call_not_the_plan_before():
    for stride, padding, activation in [
        (2, 1, None),
        (1, 1, None),
        (2, 1, "relu"),
        ((2, 1), (1, 0), None),
        (2, 1, None),
    ]:
        y = aeup.conv_transpose2d(X, W, B, stride, padding, activation=activation)
        expected = F.conv_transpose2d(X, W, B, stride, padding)
        torch.testing.assert_close(y, expected.relu() if activation else expected)


RESIZE = (None, 2.0, "bilinear", None, None, False)
RESIZES = {
    "batch": (X[:1], RESIZE),
    "dtype": (X.double(), RESIZE),
    "layout": (X.to(memory_format=torch.channels_last), RESIZE),
    "integer scale": (X, (None, 2, *RESIZE[2:])),
    "mode": (X, (None, 2.0, "bicubic", *RESIZE[3:])),
    "align_corners": (X, (*RESIZE[:3], True, None, False)),
}


@pytest.mark.parametrize("change", RESIZES.values(), ids=RESIZES)
def test_other_resamplings_have_other_plans(change):
    assert resample_key(*change) not in (None, resample_key(X, RESIZE))


def test_a_plan_of_a_resampling_asks_for_the_gradient_anew():
    x = X.clone().requires_grad_()
    assert resample_key(x, RESIZE) == resample_key(X, RESIZE)
    for t, grad, expected in ((X, True, False), (x, True, True), (x, False, False)):
        with torch.set_grad_enabled(grad):
            assert aeup.interpolate(t, scale_factor=2.0, mode="bilinear").requires_grad is expected


@pytest.mark.parametrize("wrong", [10.0, (10, 1.0)], ids=str)
def test_a_plan_of_a_resampling_lets_no_wrong_size_through(wrong):
    for right in (10, (10, 1)):
        aeup.interpolate(X, right)
    with pytest.raises(TypeError):
        aeup.interpolate(X, wrong)


def test_the_shape_of_a_tensor_is_a_size():
    x, like = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 7, 5)
    key = resample_key(x, (like.shape[2:], None, "nearest", None, None, False))
    assert key is not None and key == resample_key(x, ((7, 5), None, "nearest", None, None, False))
    assert aeup.interpolate(x, size=like.shape[2:]).shape == (1, 2, 7, 5)
    assert key in PLANS


@pytest.mark.parametrize("fn", [aeup.conv2d, aeup.conv_transpose2d])
def test_numpy_options_have_no_plan(fn):
    # its key would be the bytes of the number, which are those of an array of one too
    x, w = torch.randn(1, 2, 6, 6), torch.randn(2, 2, 3, 3)
    fn(x, w, stride=np.int64(2))
    with pytest.raises((TypeError, RuntimeError)):
        fn(x, w, stride=np.array([2]))


def test_the_gradient_by_a_plan_follows_its_layout_and_can_be_differentiated():
    x = X.double().requires_grad_()
    for layout in (torch.contiguous_format, torch.channels_last):
        y = aeup.interpolate(x, scale_factor=2, mode="bicubic")
        grad = torch.randn_like(y).to(memory_format=layout)
        got, want = (
            torch.autograd.grad(f(x, scale_factor=2, mode="bicubic"), x, grad)[0]
            for f in (aeup.interpolate, F.interpolate)
        )
        torch.testing.assert_close(got, want)
        assert got.is_contiguous(memory_format=layout)
    grad.requires_grad_()
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    assert torch.autograd.grad(first.sum(), grad)[0].shape == y.shape


def _normed(fn, x):
    y = fn(x, torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype), training=True)
    return y.relu()


FORWARD_OVER_REVERSE = {
    "interpolate": lambda lib, x: lib.interpolate(x, scale_factor=2, mode="bilinear"),
    "conv_transpose2d": lambda lib, x: lib.conv_transpose2d(x, W.double(), stride=2),
    "conv2d": lambda lib, x: lib.conv2d(x, W.double().transpose(0, 1), padding=1),
    "upsample_conv2d": lambda lib, x: (
        lib.upsample_conv2d(x, W.double().transpose(0, 1), padding=1)
        if lib is aeup
        else F.conv2d(F.interpolate(x, scale_factor=2), W.double().transpose(0, 1), padding=1)
    ),
    "batch_norm": lambda lib, x: _normed(lib.batch_norm, x),
}


@pytest.mark.parametrize("call", FORWARD_OVER_REVERSE.values(), ids=FORWARD_OVER_REVERSE)
def test_a_gradient_by_a_plan_has_a_tangent(call):
    """Forward AD begins after the forward has gone by its plan."""
    x, found = X.double().requires_grad_(), []
    for lib in (aeup, F):
        y = call(lib, x)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.full_like(y, 0.3), torch.arange(y.numel()).view_as(y).double().cos())
            found.append(forward_ad.unpack_dual(torch.autograd.grad(y, x, grad)[0]))
    torch.testing.assert_close(found[0].primal, found[1].primal)
    torch.testing.assert_close(found[0].tangent, found[1].tangent)


def test_extension_refuses_other_tensors_than_those_of_a_number():
    ops, x = torch.ops.aeup_native, torch.randn(2, 3, 4, 5)
    number = ops.interpolate_plan(x, 4, 5, 8, 10, 0, False, False, 0.0, 0.0, False)
    assert torch.equal(ops.interpolate_planned(x, number), F.interpolate(x, scale_factor=2))
    for other in (x.double(), x[:1], x[0], x[..., 1:], x.contiguous(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError, match=f"not that of plan {number}"):
            ops.interpolate_planned(other, number)
    for unknown in (-1, number + 1):
        with pytest.raises(RuntimeError, match=f"there is no plan {unknown}"):
            ops.interpolate_planned(x, unknown)


@pytest.mark.skipif(not _native.cuda, reason="the extension was built without CUDA")
def test_the_extension_plans_convolutions():
    """Their argument lists: the calls themselves are a GPU's."""
    x, w = torch.empty(2, 8, 5, 7, device="meta"), torch.empty(8, 8, 3, 3, device="meta")
    ops, numbers = torch.ops.aeup_native, []
    for activation in (0, 1, 6):
        numbers.append(ops.conv_transpose2d_plan(x, w, 2, 2, 1, 1, 1, 0, 1, 1, 1, activation, 0.1, False))
        numbers.append(ops.upsample_conv2d_plan(x, w, 2, 2, 1, 1, 1, activation, 0.1, True))
    assert numbers == list(range(numbers[0], numbers[0] + 6))
    with pytest.raises(RuntimeError, match="activation must be 0 to 6, got 7"):
        ops.conv_transpose2d_plan(x, w, 2, 2, 1, 1, 1, 0, 1, 1, 1, 7, 0.1, False)
    with pytest.raises(RuntimeError, match="do not belong together"):
        ops.conv_transpose2d_plan(x, w, 2, 2, 1, 1, 2, 0, 1, 1, 1, 0, 0.1, False)
