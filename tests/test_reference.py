"""aeup.reference: the matrix of a convolution against a naive loop, and the guide's relationships."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conv_cases import naive_matrix
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import aeup
from aeup.reference import RELATIONSHIPS, convolution_matrix

X = torch.tensor([[4, 5, 8, 7], [1, 8, 8, 8], [3, 6, 6, 4], [6, 5, 7, 8]], dtype=torch.float64)
K = torch.tensor([[1, 4, 1], [1, 4, 3], [3, 3, 1]], dtype=torch.float64)


def test_the_example_of_the_readme():
    c = convolution_matrix(K[None, None], (4, 4))
    assert c.shape == (4, 16)
    assert (c @ X.flatten()).view(2, 2).tolist() == [[122, 148], [126, 134]]
    y = torch.tensor([[2, 1], [4, 4]], dtype=torch.float64)
    expected = [[2, 9, 6, 1], [6, 29, 30, 7], [10, 29, 33, 13], [12, 24, 16, 4]]
    assert (c.T @ y.flatten()).view(4, 4).tolist() == expected
    assert aeup.conv_transpose2d(y[None, None], K[None, None])[0, 0].tolist() == expected
    assert c[1].tolist() == [0, 1, 4, 1, 0, 1, 4, 3, 0, 3, 3, 1, 0, 0, 0, 0]


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(
    channels=pairs,
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=pairs,
)
def test_matrix(channels, size, kernel, stride, padding, dilation):
    assume(all(i + 2 * p > d * (k - 1) for i, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    weight = torch.randn(*channels, *kernel, dtype=torch.float64, requires_grad=True)
    c = convolution_matrix(weight, size, stride, padding, dilation)
    sparse = convolution_matrix(weight, size, stride, padding, dilation, sparse=True)
    assert torch.equal(c, naive_matrix(weight.detach(), size, stride, padding, dilation))
    assert sparse.is_sparse and torch.equal(sparse.to_dense(), c)
    x = torch.randn(channels[1], *size, dtype=torch.float64)
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    torch.testing.assert_close((c @ x.flatten()).view_as(y), y)
    assert torch.autograd.gradcheck(
        lambda w: convolution_matrix(w, size, stride, padding, dilation) @ x.flatten(), weight
    )


def test_matrix_refuses():
    with pytest.raises(ValueError, match=r"weight must be \[C_out"):
        convolution_matrix(K, (4, 4))
    with pytest.raises(ValueError, match="no output: input_size"):
        convolution_matrix(K[None, None], (2, 4))
    with pytest.raises(ValueError, match="padding at least 0"):
        convolution_matrix(K[None, None], (4, 4), padding=-1)


def arguments_of(number, k, s, p):
    """s and p as the relationship asks for them."""
    names = inspect.signature(RELATIONSHIPS[number]).parameters
    s = s if "s" in names else 1
    p = p if "p" in names else {3: k // 2, 10: k // 2, 4: k - 1, 11: k - 1}.get(number, 0)
    return names, s, p


@pytest.mark.parametrize("number", range(1, 15))
def test_relationships(number):
    checked = 0
    for k in range(1, 6):
        if number in (3, 10) and k % 2 == 0:
            with pytest.raises(ValueError, match="odd k"):
                RELATIONSHIPS[number](5, k)
            continue
        for s in range(1, 4):
            for p in range(k):
                names, s_, p_ = arguments_of(number, k, s, p)
                given = {n: v for n, v in (("k", k), ("s", s_), ("p", p_)) if n in names}
                w = torch.zeros(1, 1, 1, k)
                for i in range(max(1, k - 2 * p_), k + 5):
                    if number == 7 and i >= k:
                        assert RELATIONSHIPS[7](i, **given) == F.max_pool1d(torch.zeros(1, 1, i), k, s_).shape[-1]
                    elif number < 7 and i + 2 * p_ >= k:
                        size = F.conv2d(torch.zeros(1, 1, 1, i), w, None, s_, (0, p_)).shape[-1]
                        assert RELATIONSHIPS[number](i, **given) == size
                    elif number > 7 and s_ * (i - 1) + k - 2 * p_ > 0:
                        for a in range(s_) if number == 14 else (0,):
                            extra = {"a": a} if number == 14 else {}
                            y = F.conv_transpose2d(torch.zeros(1, 1, 1, i), w, None, s_, (0, p_), (0, a))
                            assert RELATIONSHIPS[number](i, **given, **extra) == y.shape[-1]
                            assert RELATIONSHIPS[6](y.shape[-1], k, s_, p_) == i, "the convolution leads back"
                    else:
                        continue
                    checked += 1
    assert checked > 20


def test_ambiguity_of_the_stride():
    with pytest.raises(ValueError, match="0 <= a < s"):
        RELATIONSHIPS[14](3, 3, 2, 1, 2)
    assert sorted(RELATIONSHIPS) == list(range(1, 15))


def test_matrix_refuses_what_is_no_pair_of_ints_and_names_it():
    w = torch.ones(1, 1, 2, 2)
    for name, value in (("input_size", 5.0), ("stride", (1, 2, 3)), ("padding", (0, 0.5)), ("dilation", True)):
        with pytest.raises(TypeError, match=f"{name} must be an int or a pair of ints, got "):
            convolution_matrix(w, **{"input_size": 5, name: value})


def test_matrix_is_on_the_weights_device_whatever_the_default():
    w = torch.randn(2, 3, 2, 2)
    want = convolution_matrix(w, 4, 2, 1)
    with torch.device("meta"):
        assert torch.equal(convolution_matrix(w, 4, 2, 1), want)
        assert torch.equal(convolution_matrix(w, 4, 2, 1, sparse=True).to_dense(), want)
