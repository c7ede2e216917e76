"""Scenes of digits: images, labels, what decides them."""

import pytest
import torch
import torch.nn.functional as F

from aeup.data import load
from aeup.data.scenes import INK, scenes

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(n=6):
    """Digits without a margin: class i is a full block of grey level 0.6 + i / 20."""
    return (0.6 + torch.arange(n) / 20).view(n, 1, 1, 1).expand(n, 1, 7, 7).contiguous(), torch.arange(n)


def test_shapes_types_and_ranges():
    digits, labels = blocks()
    images, classes = scenes(5, 33, 0, digits, labels)
    assert images.shape == (5, 1, 33, 33) and images.dtype == torch.float32
    assert classes.shape == (5, 33, 33) and classes.dtype == torch.int64
    assert 0 <= images.min() and images.max() <= 1 and 0 <= classes.min() and classes.max() <= 6


def test_labels_are_where_the_ink_is_and_name_the_brightest_digit():
    digits, labels = blocks()
    images, classes = scenes(200, 40, 1, digits, labels)
    assert torch.equal(classes > 0, images[:, 0] >= INK)
    flat = F.max_pool2d(images, 3, 1, 1) + F.max_pool2d(-images, 3, 1, 1) < 1e-5  # no edge nearby
    inside = flat[:, 0] & (classes > 0)
    assert inside.float().mean() > 0.2
    torch.testing.assert_close(images[:, 0][inside], 0.6 + (classes[inside] - 1) / 20, rtol=0, atol=1e-5)
    assert set(classes.unique().tolist()) == set(range(7))


def test_sizes_and_places_vary_and_every_scene_has_a_digit():
    digits, labels = torch.ones(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    _, classes = scenes(400, 50, 2, digits, labels)
    area = classes.sum((1, 2))
    assert area.min() >= 0.3 * 0.4**2 * 50**2  # a corner digit may lose a tenth at two sides
    assert area.max() > 2 * area.min()
    covered = classes.float().mean(0)
    assert covered.min() > 0.02 and covered.max() < 0.98


def test_the_seed_and_the_digits_decide_everything():
    digits, labels = blocks()
    state = torch.get_rng_state()
    first, again, other = (scenes(4, 24, seed, digits, labels) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])
    double = scenes(4, 24, 3, digits.double(), labels)[0]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), first[0], rtol=0, atol=1e-5)


def test_real_digits():
    data = load("mnist5k")
    images, classes = scenes(64, 64, 0, data.train, data.train_labels)
    assert torch.equal(classes > 0, images[:, 0] >= INK)
    assert len(classes.unique()) == 11 and 0.03 < (classes > 0).float().mean() < 0.25


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(digits=torch.rand(3, 8, 8)), r"digits must be float \[M, 1, h, w\].* \[3, 8, 8\]"),
        (dict(digits=torch.zeros(6, 1, 8, 8, dtype=torch.uint8)), "digits must be float .* torch.uint8"),
        (dict(digits=torch.rand(0, 1, 8, 8)), "M at least 1"),
        (dict(labels=torch.zeros(5, dtype=torch.int64)), r"labels must be int64 \[6\], got torch.int64 \[5\]"),
        (dict(labels=torch.zeros(6)), r"labels must be int64 \[6\], got torch.float32"),
        (dict(n=0), "n must be at least 1 .* n=0"),
        (dict(size=4), "size at least 8, got n=2 and size=4"),
    ],
)
def test_bad_input(change, says):
    digits, labels = blocks()
    with pytest.raises(ValueError, match=says):
        scenes(**{**dict(n=2, size=16, seed=0, digits=digits, labels=labels), **change})
