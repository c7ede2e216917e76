"""The DCGAN: its architecture, its losses, and a short run that neither side wins."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import batch, build, fit, losses
from torch import nn

from aeup.data import load
from aeup.models import DCGAN, DCGANConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_papers_generator_and_discriminator():
    model = DCGAN(DCGANConfig(width=2))
    g = [m for m in model.generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [tuple(m.weight.shape) for m in g] == [
        (100, 16, 4, 4), (16, 8, 4, 4), (8, 4, 4, 4), (4, 2, 4, 4), (2, 3, 4, 4)
    ]  # fmt: skip
    assert [m.bias is None for m in g] == [True, True, True, True, False]
    d = [m for m in model.discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(m.weight.shape) for m in d] == [
        (2, 3, 4, 4),
        (4, 2, 4, 4),
        (8, 4, 4, 4),
        (16, 8, 4, 4),
        (1, 16, 4, 4),
    ]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.generator.modules()) == 4
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.discriminator.modules()) == 3
    assert model.players() == {"discriminator": model.discriminator, "generator": model.generator}
    weights = torch.cat(
        [m.weight.flatten() for m in (*DCGAN().generator.modules(),) if isinstance(m, nn.ConvTranspose2d)]
    )
    assert weights.std().item() == pytest.approx(0.02, rel=0.01) and abs(weights.mean().item()) < 1e-4


@pytest.mark.parametrize("upsample", ["conv_transpose", "nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (28, 28), (16, 24)])
def test_sizes(size, upsample):
    model = DCGAN(DCGANConfig(image_size=size, width=2, upsample=upsample, in_channels=1))
    images = model.decode(torch.randn(3, 100))
    assert images.shape == (3, 1, *size) and images.abs().max() <= 1
    assert model.discriminator(images).shape == (3,)
    kinds = [type(m).__name__ for m in model.generator.modules()]
    stages = {64: 4, 32: 3, 28: 2, 16: 2}[size[0]]
    assert kinds.count("ConvTranspose2d") == (1 + stages if upsample == "conv_transpose" else 1)
    assert kinds.count("UpsampleConv2d") == (0 if upsample == "conv_transpose" else stages)


def test_losses_are_the_formulas():
    model = build("dcgan").double()
    x = batch(model)[0].double()
    torch.manual_seed(2)
    found = model.loss(x, player="discriminator")
    torch.manual_seed(2)
    fake = model.discriminator(model.generator(model.noise(4)))
    real = model.discriminator(2 * x - 1)
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    want = F.binary_cross_entropy_with_logits(real, one) + F.binary_cross_entropy_with_logits(fake, zero)
    torch.testing.assert_close(found["discriminator"], want)
    torch.testing.assert_close(found["real"], real.sigmoid().mean())
    torch.testing.assert_close(found["fake"], fake.sigmoid().mean())
    torch.manual_seed(2)
    got = model.loss(x, player="generator")["generator"]
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(fake, one))
    with pytest.raises(ValueError, match="player must be one of"):
        model.loss(x, player="model")


def test_each_player_gets_its_own_gradient_only():
    model = build("dcgan")
    x, _ = batch(model)
    for player, other in (("discriminator", "generator"), ("generator", "discriminator")):
        model.zero_grad()
        model.loss(x, player=player)[player].backward()
        assert all(p.grad is not None for p in model.players()[player].parameters())
        assert all(p.grad is None for p in model.players()[other].parameters())
    torch.manual_seed(2)  # the generator's gradient is that through an ordinary call of the discriminator
    (want,) = torch.autograd.grad(
        F.softplus(-model.discriminator(model.generator(model.noise(4)))).mean(), model.generator.layers[1].weight
    )
    (got,) = torch.autograd.grad(losses(model, x)["generator"], model.generator.layers[1].weight)
    torch.testing.assert_close(got, want)


def test_a_short_run_does_not_collapse():
    x = F.avg_pool2d(F.pad(load("mnist5k").train, (2, 2, 2, 2)), 2)  # 16x16
    torch.manual_seed(0)
    model = DCGAN(DCGANConfig(image_size=(16, 16), in_channels=1, width=16, latent_dim=32))
    fit(model, x, steps=150, size=64, lr=1e-3)
    torch.manual_seed(0)
    found, images = losses(model, x[:500]), model.sample(200)
    assert all(v.isfinite() for v in found.values()) and 0.05 < found["fake"] < found["real"] + 0.5
    assert 0.02 < found["fake"] < 0.98 and 0.02 < found["real"] < 0.98
    real_spread, spread = (y.flatten(1).std(0).mean().item() for y in (x[:200], images))
    assert spread > 0.4 * real_spread  # the samples differ from each other
    assert images.mean().item() == pytest.approx(x.mean().item(), rel=0.5)
