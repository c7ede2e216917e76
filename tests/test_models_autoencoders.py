"""The autoencoders: each loss is its formula, and each does on real digits what it is for."""

import math

import pytest
import torch
from model_cases import batch, build, fit, losses

from aeup.data import load
from aeup.models import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")


def double(case, **more):
    model = build(case, **more).double().eval()
    return model, batch(model, 5)[0].double()


@pytest.fixture(scope="module")
def digits():
    return load("mnist5k")


def trained(name, digits, steps, **options):
    torch.manual_seed(0)
    model = MODELS[name](MODELS[name].Config(**{"network": "mlp", "depth": 1, "hidden": 256, **options}))
    return fit(model, digits.train, steps=steps, lr=model.defaults.get("lr", 3e-3))


@pytest.mark.parametrize("loss", ["bernoulli", "squared"])
def test_reconstruction_is_the_formula(loss):
    model, x = double("ae", loss=loss)
    y = model.reconstruct(x)
    pixel = (x - y) ** 2 if loss == "squared" else -(x * y.log() + (1 - x) * (1 - y).log())
    assert model.loss(x)["reconstruction"].item() == pytest.approx(pixel.sum().item() / 5, rel=1e-12)


def test_an_mlp_without_hidden_layers_is_one_linear_layer_each_way():
    model = build("ae", network="mlp", depth=0)
    assert [tuple(p.shape) for p in model.parameters()] == [(3, 120), (3,), (120, 3), (120,)]


@pytest.mark.parametrize("corruption, level", [("mask", 0.3), ("salt_pepper", 0.3), ("gaussian", 0.3)])
def test_corruptions(corruption, level):
    model = build("denoising-mask", corruption=corruption, level=level, in_channels=3)
    x = 0.25 + 0.5 * torch.rand(50, 3, 12, 10)
    before = x.clone()
    torch.manual_seed(0)
    y = model.corrupt(x)
    torch.manual_seed(0)
    assert torch.equal(y, model.corrupt(x)) and torch.equal(x, before)
    if corruption == "gaussian":
        assert (y - x).std().item() == pytest.approx(0.3, rel=0.03) and abs((y - x).mean()) < 0.01
        return
    changed = (y != x).any(1)
    assert torch.equal(changed, (y != x).all(1))  # a pixel with all its channels
    assert changed.float().mean().item() == pytest.approx(0.3, rel=0.05)
    ones = (y == 1).all(1)
    assert ones.float().mean().item() == pytest.approx(0.15 if corruption == "salt_pepper" else 0, rel=0.1)
    assert torch.equal(changed, ones | (y == 0).all(1))
    none, whole = (build("denoising-mask", corruption=corruption, level=v).corrupt(x) for v in (0.0, 1.0))
    assert torch.equal(none, x) and ((whole == 0) | (whole == 1)).all()


def test_denoising_sees_the_corrupted_and_aims_at_the_clean_image():
    model, x = double("denoising-gaussian")
    torch.manual_seed(4)
    y = model.reconstruct(model.corrupt(x))
    want = -(x * y.log() + (1 - x) * (1 - y).log()).sum().item() / 5
    assert losses(model, x, seed=4)["reconstruction"].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("penalty", ["kl", "l1"])
def test_sparse_penalty_is_the_formula(penalty):
    model, x = double("sparse", penalty=penalty, weight=0.7, target=0.1)
    found, code = model.loss(x), model.encode(x)
    mean = [sum(code[i, j].item() for i in range(5)) / 5 for j in range(3)]
    kl = sum(0.1 * math.log(0.1 / a) + 0.9 * math.log(0.9 / (1 - a)) for a in mean)
    assert found["penalty"].item() == pytest.approx(kl if penalty == "kl" else sum(mean), rel=1e-12)
    assert found["loss"].item() == pytest.approx((found["reconstruction"] + 0.7 * found["penalty"]).item(), rel=1e-12)
    assert found["activation"].item() == pytest.approx(sum(mean) / 3, rel=1e-12)


def test_sparse_divergence_is_that_of_bernoulli_variables_and_finite_where_units_saturate():
    model = build("sparse", target=0.2)
    a = torch.tensor([0.01, 0.2, 0.7])
    want = torch.distributions.kl_divergence(torch.distributions.Bernoulli(0.2), torch.distributions.Bernoulli(a))
    torch.testing.assert_close(model.kl(a), want.sum())
    assert model.kl(torch.tensor([0.2, 0.2])).abs() < 1e-7
    assert model.kl(torch.tensor([0.0, 1.0])).isfinite()


def jacobian(model, x):
    """[N, latent_dim, pixels], one image at a time."""
    one = torch.func.jacrev(lambda image: model.encode(image[None])[0])
    return torch.stack([one(image).flatten(1) for image in x])


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_contractive_closed_form_is_the_exact_jacobian_with_its_gradient(activation):
    model, x = double("contractive", activation=activation)
    want = jacobian(model, x).square().sum((1, 2))
    torch.testing.assert_close(model.closed_form(model.encode(x)), want, rtol=1e-12, atol=0)
    found = model.loss(x)
    assert found["jacobian"].item() == pytest.approx(want.mean().item(), rel=1e-12)
    weight = model.encoder.output.weight
    (got,) = torch.autograd.grad(found["jacobian"], weight)  # through W as well as through h
    (exact,) = torch.autograd.grad(jacobian(model, x).square().sum((1, 2)).mean(), weight)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-14)
    assert model.decode(model.encode(x)).flatten(1).allclose(model.encode(x) @ weight + model.bias)


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_contractive_estimate_has_the_exact_mean(network):
    model, x = double("contractive-deep", network=network)
    want = jacobian(model, x).square().sum((1, 2)).mean().item()
    torch.manual_seed(0)
    draws = torch.stack([model.loss(x)["jacobian"].detach() for _ in range(400)])
    error = (draws.std() / math.sqrt(len(draws))).item()
    assert abs(draws.mean().item() - want) < 4 * error and 0 < error < 0.05 * want


def test_contractive_estimate_is_one_product_with_its_gradient():
    model, x = double("contractive-deep")
    torch.manual_seed(3)
    v = (torch.rand_like(model.encode(x)) < 0.5).double() * 2 - 1
    exact = torch.einsum("nlp,nl->np", jacobian(model, x), v).square().sum() / 5
    got = losses(model, x, seed=3)["jacobian"]
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=0)
    for name, parameter in model.encoder.named_parameters():
        a, b = (torch.autograd.grad(s, parameter, retain_graph=True, allow_unused=True)[0] for s in (got, exact))
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-8, atol=1e-12), name
    with torch.no_grad():
        torch.testing.assert_close(losses(model, x, seed=3)["jacobian"], got.detach())


def psnr(y, x):
    return (-10 * (y - x).square().mean((1, 2, 3)).log10()).mean().item()


@pytest.mark.parametrize("corruption, level", [("salt_pepper", 0.3), ("mask", 0.5)])
def test_denoising_beats_plain_on_corrupted_digits_by_2_db(digits, corruption, level):
    plain = trained("ae", digits, 500, latent_dim=64)
    model = trained("denoising", digits, 500, latent_dim=64, corruption=corruption, level=level)
    torch.manual_seed(1)
    x = digits.validation
    bad = model.corrupt(x)
    with torch.no_grad():
        clean, naive = psnr(model.reconstruct(bad), x), psnr(plain.reconstruct(bad), x)
    assert clean > max(naive + 2, psnr(bad, x))


def test_sparse_reaches_its_target(digits):
    model = trained("sparse", digits, 600)
    with torch.no_grad():
        activation = model.encode(digits.validation).mean().item()
    assert activation == pytest.approx(model.config.target, rel=0.2)


def test_contractive_halves_its_penalty_at_little_cost(digits):
    """On new digits, against the same model with weight 0. The norm, not squared, takes a longer run to halve."""
    found = []
    for weight in (0.0, MODELS["contractive"].Config().weight):
        model = trained("contractive", digits, 600, depth=0, weight=weight)
        found.append(model.validate([(digits.validation, None)]))
    plain, contracted = found
    assert contracted["jacobian"] < plain["jacobian"] / 2
    assert contracted["reconstruction"] < 1.2 * plain["reconstruction"]
