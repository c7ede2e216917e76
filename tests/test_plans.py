"""An eager call's plan is looked up by everything that its result or its kernel depends on."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import aeup
from aeup import tuned
from aeup.ops.conv_transpose2d import CONV_TRANSPOSE2D
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
