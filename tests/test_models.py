"""The decoder and the bundled models."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aeup.decoder import ACTIVATION, UPSAMPLE, Decoder
from aeup.models import MODELS, VAE, Autoencoder, AutoencoderConfig, VAEConfig

SMALL = dict(image_size=(12, 10), latent_dim=3, channels=(6, 4, 4), hidden=8)


pytestmark = pytest.mark.usefixtures("one_thread")


def small(name, **more):
    torch.manual_seed(0)
    model = MODELS[name]
    return model(model.Config(**{**SMALL, **more}))


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("out_size", [28, 30, (9, 14), (5, 3)])
def test_decoder_reaches_any_size_from_a_vector(upsample, out_size):
    decoder = Decoder((6, 5, 4), 3, out_size, latent_dim=7, upsample=upsample)
    h, w = out_size if isinstance(out_size, tuple) else (out_size, out_size)
    assert decoder(torch.randn(2, 7)).shape == (2, 3, h, w)
    assert decoder.sizes == [(math.ceil(h / 4), math.ceil(w / 4)), (math.ceil(h / 2), math.ceil(w / 2)), (h, w)]


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("out_size", [None, 13])
def test_decoder_takes_a_feature_map(upsample, out_size):
    decoder = Decoder((6, 4, 4), 3, out_size, upsample=upsample)
    x = torch.randn(2, 6, 4, 4)
    y = decoder(x)
    assert y.shape == (2, 3, out_size or 16, out_size or 16)
    decoder.eval()
    y = decoder(x)
    last = decoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "bicubic"])
def test_decoder_is_the_composition_of_torch_modules(upsample):
    torch.manual_seed(0)
    decoder = Decoder((4, 3), 2, 6, upsample=upsample, norm=None, activation="relu", head="tanh").double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    conv = decoder.stages[0][1]
    y = F.interpolate(x, size=(6, 6), mode=upsample)
    y = F.relu(F.conv2d(y, conv.weight, conv.bias, padding=1))
    want = torch.tanh(F.conv2d(y, decoder.to_image.weight, decoder.to_image.bias, padding=1))
    torch.testing.assert_close(decoder(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "group", None])
@pytest.mark.parametrize("activation", [*ACTIVATION, nn.Softplus, nn.PReLU(4)])
def test_decoder_options_and_gradient_flow(norm, activation):
    decoder = Decoder((4, 4, 4), 1, 8, latent_dim=2, norm=norm, activation=activation, head="sigmoid", kernel_size=5)
    y = decoder(torch.randn(3, 2))
    assert 0 <= y.min() and y.max() <= 1
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in decoder.parameters())


def test_decoder_copies_an_activation_module_for_each_stage():
    decoder = Decoder((4, 4, 4), 1, 8, latent_dim=2, activation=nn.PReLU(4))
    assert len({id(m) for m in decoder.modules() if isinstance(m, nn.PReLU)}) == 3


def test_conv_transpose_kernel_covers_every_pixel_equally():
    decoder = Decoder((1, 1), 1, 9, upsample="conv_transpose", norm=None)
    deconv = decoder.stages[0][0]
    nn.init.ones_(deconv.weight), nn.init.zeros_(deconv.bias)
    taps = deconv(torch.ones(1, 1, 5, 5))[0, 0]
    assert taps.shape == (9, 9) and (taps[1:-1, 1:-1] == 4).all()


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(upsample="area"), ValueError, "upsample must be one of .*'area'"),
        (dict(norm="layer"), ValueError, "norm must be one of .*'layer'"),
        (dict(head="softmax"), ValueError, "head must be one of .*'softmax'"),
        (dict(activation="swish"), ValueError, "activation must be one of .*'swish'"),
        (dict(activation=3), TypeError, "activation must be .* got 3"),
        (dict(channels=(4,)), ValueError, "channels must have at least 2"),
        (dict(channels=8), TypeError, "channels must be a sequence"),
        (dict(channels=(4, 0)), ValueError, r"channels\[1\] must be at least 1, got 0"),
        (dict(out_channels=0), ValueError, "out_channels must be at least 1, got 0"),
        (dict(kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
        (dict(out_size=2.5), TypeError, "out_size must be an int or a pair"),
        (dict(out_size=(4, 4, 4)), TypeError, "out_size must be an int or a pair"),
        (dict(out_size=2, channels=(4, 4, 4)), ValueError, "out_size=2 is too small for 2"),
        (dict(out_size=None), ValueError, "out_size must be given with latent_dim"),
        (dict(latent_dim=0), ValueError, "latent_dim must be at least 1, got 0"),
    ],
)
def test_decoder_refuses_wrong_arguments(change, error, says):
    with pytest.raises(error, match=says):
        Decoder(**{**dict(channels=(4, 4), out_channels=1, out_size=8, latent_dim=2), **change})


def test_decoder_refuses_wrong_inputs():
    with pytest.raises(RuntimeError, match=r"must be \[N, 2\] .* got \[3, 4\]"):
        Decoder((4, 4), latent_dim=2)(torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"must be \[N, 4, h, w\] .* got \[3, 5, 2, 2\]"):
        Decoder((4, 4))(torch.zeros(3, 5, 2, 2))
    with pytest.raises(RuntimeError, match="must be 14x14 to reach out_size .* got 13x14"):
        Decoder((4, 4), upsample="conv_transpose")(torch.zeros(3, 4, 13, 14))
    with pytest.raises(RuntimeError, match=r"images must be \[N, 1, 12, 10\] .* got \[2, 1, 12, 11\]"):
        small("vae")(torch.zeros(2, 1, 12, 11))


@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_decoder_under_compile_and_autocast(upsample):
    torch.manual_seed(0)
    decoder = Decoder((4, 4), 2, 6, latent_dim=3, upsample=upsample, norm="group")
    z = torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(decoder, backend="aot_eager", fullgraph=True)(z), decoder(z))
    with torch.autocast("cpu", torch.bfloat16):
        y = decoder(z)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), decoder(z), rtol=0.1, atol=0.05)


def test_decoder_works_on_an_empty_batch():
    assert Decoder((4, 4), latent_dim=2).eval()(torch.zeros(0, 2)).shape == (0, 1, 28, 28)


def test_vae_loss_is_the_formula_in_float64():
    model = small("vae").double()
    x = torch.rand(5, 1, 12, 10, dtype=torch.float64)
    model.eval()
    torch.manual_seed(3)
    got = model.loss(x)
    torch.manual_seed(3)
    mu, log_var = model.encode(x)
    eps = torch.randn_like(mu)
    reconstruction = kl = 0.0
    for i in range(5):
        p = torch.sigmoid(model.decode(mu + log_var.exp().sqrt() * eps)[i])
        reconstruction -= (x[i] * p.log() + (1 - x[i]) * (1 - p).log()).sum().item() / 5
        for m, v in zip(mu[i].tolist(), log_var[i].exp().tolist(), strict=True):
            kl += 0.5 * (m * m + v - 1 - math.log(v)) / 5
    assert got["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-12)
    assert got["kl"].item() == pytest.approx(kl, rel=1e-12)
    assert got["negative_elbo"].item() == pytest.approx(reconstruction + kl, rel=1e-12)


def test_kl_agrees_with_torch_distributions():
    model = small("vae").double().eval()
    x = torch.rand(4, 1, 12, 10, dtype=torch.float64)
    mu, log_var = model.encode(x)
    q = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    want = torch.distributions.kl_divergence(q, p).sum() / 4
    torch.testing.assert_close(model.loss(x)["kl"], want)


@pytest.mark.parametrize("loss", ["bernoulli", "squared"])
def test_autoencoder_loss_is_the_formula_in_float64(loss):
    model = small("ae", loss=loss).double().eval()
    x = torch.rand(5, 1, 12, 10, dtype=torch.float64)
    y = model.reconstruct(x)
    pixel = (x - y) ** 2 if loss == "squared" else -(x * y.log() + (1 - x) * (1 - y).log())
    assert model.loss(x)["reconstruction"].item() == pytest.approx(pixel.sum().item() / 5, rel=1e-12)


def test_autoencoder_refuses_an_unknown_loss():
    with pytest.raises(ValueError, match="loss must be one of .*'l1'"):
        Autoencoder(AutoencoderConfig(loss="l1"))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_every_parameter_gets_a_gradient(name, upsample):
    model = small(name, upsample=upsample, in_channels=3, image_size=(9, 13))
    x = torch.rand(4, 3, 9, 13)
    losses = model.loss(x)
    losses[model.objective].backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead
    assert model.reconstruct(x).shape == x.shape


def test_vae_gradient_is_the_numerical_one():
    model = small("vae", norm=None, channels=(2, 2, 2), hidden=3).double()
    x = torch.rand(2, 1, 12, 10, dtype=torch.float64)

    def loss():
        torch.manual_seed(1)
        return model.loss(x)["negative_elbo"]

    loss().backward()
    for parameter in (model.encoder.output.weight, model.decoder.project.weight, model.decoder.stages[0][1].weight):
        with torch.no_grad():
            direction = torch.randn_like(parameter)
            before = parameter.clone()
            parameter.copy_(before + 1e-6 * direction)
            above = loss()
            parameter.copy_(before - 1e-6 * direction)
            below = loss()
            parameter.copy_(before)
        slope = ((above - below) / 2e-6).item()
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4)


def test_the_default_models_fit_mnist_and_follow_the_seed():
    x = torch.rand(2, 1, 28, 28)
    for model in (VAE, Autoencoder):
        torch.manual_seed(5)
        first = model().loss(x)
        torch.manual_seed(5)
        second = model().loss(x)
        assert all(torch.equal(first[k], second[k]) for k in first)
    vae = VAE(VAEConfig()).eval()
    torch.manual_seed(1)
    a = vae.sample(3)
    torch.manual_seed(1)
    assert torch.equal(a, vae.sample(3))
    assert a.shape == (3, 1, 28, 28) and 0 <= a.min() and a.max() <= 1
