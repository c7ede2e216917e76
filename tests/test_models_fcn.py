"""The FCN: bilinear start, alignment, the measures of segmentation, and the order of the heads."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import batch, build, fit

from aeup.data.scenes import scenes
from aeup.models import FCN, FCNConfig
from aeup.models.fcn import bilinear_conv_transpose, confusion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scale", [2, 8, 16, 32])
def test_the_start_is_bilinear_interpolation_away_from_the_border(scale):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y = bilinear_conv_transpose(3, scale).double()(x)
    want = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    assert y.shape == want.shape
    inner = (..., slice(scale // 2, -scale // 2), slice(scale // 2, -scale // 2))
    torch.testing.assert_close(y[inner], want[inner], rtol=1e-6, atol=1e-6)  # the weights are float32's


@pytest.mark.parametrize("head, stride", [("32s", 32), ("16s", 16), ("8s", 8)])
def test_a_new_model_enlarges_the_coarsest_scores(head, stride):
    """The skips' scores are zero at first: every head is bilinear interpolation of the stride-32 map, twice or more."""
    model = build("fcn", head=head).eval()
    x = torch.rand(1, 1, 96, 96)
    y = x
    for layer in model.blocks:
        y = F.max_pool2d(layer(y), 2, ceil_mode=True)
    y = model.score(y)
    for layer in model.enlarge:
        y = layer(y)
    torch.testing.assert_close(model(x), y)
    assert len(model.skips) == {"32s": 0, "16s": 1, "8s": 2}[head] and model.enlarge[-1].stride == (stride, stride)
    assert not model.enlarge[-1].weight.requires_grad
    assert all(layer.weight.requires_grad for layer in model.enlarge[:-1])


@pytest.mark.parametrize("upsample", ["conv_transpose", "nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("head", ["32s", "16s", "8s"])
def test_scores_have_the_size_of_any_image_and_lie_over_it(head, upsample):
    model = build("fcn", head=head, upsample=upsample).eval()
    for h, w in ((1, 1), (33, 70), (64, 96)):
        assert model(torch.rand(2, 1, h, w)).shape == (2, 3, h, w)
    assert model(torch.rand(0, 1, 40, 35)).shape == (0, 3, 40, 35)
    x = torch.zeros(1, 1, 160, 192)
    y = x.clone()
    y[..., 64:96, 96:128] = 1
    change = (model(y) - model(x)).abs().sum(1)[0]
    weight = change / change.sum()
    centre = [(weight.sum(1 - d) * (torch.arange(change.shape[d]) + 0.5)).sum().item() for d in (0, 1)]
    assert centre == pytest.approx([80, 112], abs=8)


def test_the_fused_scores_are_the_sum_of_both_maps():
    model = build("fcn", head="16s").double().eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.skips["pool4"].weight)
    x = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    maps = [x]
    for layer in model.blocks:
        maps.append(F.max_pool2d(layer(maps[-1]), 2))
    fused = model.enlarge[0](model.score(maps[5])) + model.skips["pool4"](maps[4])
    torch.testing.assert_close(model(x), model.enlarge[1](fused))


def test_the_loss_is_the_mean_over_pixels_and_wants_labels():
    model = build("fcn").double().eval()
    x, target = batch(model)
    x = x.double()
    scores = model(x).log_softmax(1)
    want = -sum(scores[n, target[n, i, j], i, j] for n in range(4) for i in range(40) for j in range(35)) / (
        4 * 40 * 35
    )
    assert model.loss(x, target)["cross_entropy"].item() == pytest.approx(want.item(), rel=1e-10)
    with pytest.raises(RuntimeError, match=r"target must be labels \[N, H, W\] = \[4, 40, 35\], got None"):
        model.loss(x)
    with pytest.raises(RuntimeError, match=r"target must be labels .* got \[4, 1, 40, 35\]"):
        model.loss(x, target[:, None])


def test_mean_iu_against_a_naive_count(monkeypatch):
    torch.manual_seed(0)
    target = torch.randint(3, (6, 9, 7))
    scores = torch.randn(6, 4, 9, 7)
    scores[:, 3] -= 100  # class 3 neither occurs nor is predicted
    predicted = scores.argmax(1)
    ius = []
    for c in range(3):
        both = ((predicted == c) & (target == c)).sum().item()
        ius.append(both / ((predicted == c) | (target == c)).sum().item())
    model = FCN(FCNConfig(image_size=(9, 7), classes=4)).eval()
    monkeypatch.setattr(model, "forward", lambda x: scores[x[:, 0, 0, 0].long()])
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 9, 7)
    found = model.validate([(x[:4], target[:4]), (x[4:], target[4:])])
    assert found["mean_iu"] == pytest.approx(sum(ius) / 3)
    assert found["pixel_accuracy"] == pytest.approx((predicted == target).float().mean().item())
    assert found["cross_entropy"] == pytest.approx(F.cross_entropy(scores, target).item(), rel=1e-6)
    counts = confusion(predicted, target, 4)
    assert counts.sum() == target.numel() and counts[1, 2] == ((target == 1) & (predicted == 2)).sum()
    with pytest.raises(ValueError, match="at least one image"):
        model.validate([])


def test_finer_heads_reach_a_higher_mean_iu():
    """On squares whose grey level is their class: what is to be learnt is easy, so that the stride decides."""
    levels = torch.tensor([0.6, 0.8, 1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8).contiguous()
    x, target = scenes(200, 64, 0, levels, torch.arange(3))
    new = scenes(60, 64, 1, levels, torch.arange(3))
    found = {}
    for head in ("32s", "16s", "8s"):
        torch.manual_seed(0)
        model = FCN(FCNConfig(classes=4, channels=(8, 8, 16, 16, 16), head=head))
        fit(model, x, target, steps=80, size=16, lr=1e-2)
        found[head] = model.validate([new])["mean_iu"]
    assert 0.3 < found["32s"] < found["16s"] - 0.02 < found["8s"] - 0.04, found
