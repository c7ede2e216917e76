"""The VAE: its bound, its likelihoods, the flow's determinant, the importance-weighted estimate."""

import math

import pytest
import torch
from model_cases import batch, build, fit, losses

from aeup.data import load
from aeup.models import VAE, VAEConfig
from aeup.models.flow import MADE, InverseAutoregressiveFlow

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = ["vae", "vae-flow", "vae-mlp", "vae-gaussian"]


def double(case, n=5, **more):
    model = build(case, **more).double().eval()
    return model, batch(model, n)[0].double()


def test_the_loss_is_the_formula():
    model, x = double("vae")
    got = losses(model, x, seed=3)
    mu, log_var = model.encode(x)
    torch.manual_seed(3)
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
    assert torch.equal(got["loss"], got["negative_elbo"])


def test_the_gaussian_likelihood_is_that_of_torch_with_its_own_sigma():
    model, x = double("vae-gaussian")
    got = losses(model, x, seed=3)["reconstruction"]
    torch.manual_seed(3)
    mu, log_var = model.encode(x)
    y = torch.sigmoid(model.decode(mu + (0.5 * log_var).exp() * torch.randn_like(mu)))
    want = -torch.distributions.Normal(y, model.log_sigma.exp()).log_prob(x).sum() / 5
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(got, model.log_sigma)
    error = ((x - y) / model.log_sigma.exp()).square().sum() / 5
    torch.testing.assert_close(slope, x[0].numel() - error, rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", FORMS)
def test_kl_agrees_with_a_monte_carlo_estimate(case):
    """Of log q(z|x) - log p(z), with log q from the Gaussian's density and, for the flow, from the exact Jacobian."""
    model, x = double(case, n=1)
    with torch.no_grad():
        torch.nn.init.normal_(model.encoder.output.weight, std=2.0)  # a posterior away from the prior
    mu, log_var, context = model.posterior(x)
    torch.manual_seed(0)
    n = 2000 if model.flow else 20000
    base = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    z0 = base.sample((n,))[:, 0]
    log_q, z = base.log_prob(z0).sum(1), z0
    if model.flow:
        z = model.flow(z0, context.expand(n, -1))[0]
        jacobian = torch.func.vmap(torch.func.jacrev(lambda z: model.flow(z[None], context)[0][0]))
        log_q = log_q - torch.linalg.slogdet(jacobian(z0))[1]
    ratio = log_q - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    if model.flow:
        torch.manual_seed(1)
        z0, _ = model.draw(mu.repeat(2000, 1), log_var.repeat(2000, 1))
        added = model.flowed(z0, context.repeat(2000, 1))[1]
        kl, noise = model.loss(x.expand(2000, -1, -1, -1))["kl"].item(), (added.std() / math.sqrt(2000)).item()
    else:
        kl, noise = model.loss(x)["kl"].item(), 0.0
    error = math.hypot((ratio.std() / math.sqrt(n)).item(), noise)
    assert abs(ratio.mean().item() - kl) < 4 * error and kl > 10 * error


@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_made_is_autoregressive_and_uses_all_that_it_may(dim, reverse):
    torch.manual_seed(0)
    made = MADE(dim, 50, 4, reverse).double()
    z, context = torch.randn(dim).double(), torch.randn(4).double()
    j = torch.func.jacrev(lambda z: torch.stack(made(z[None], context[None]))[:, 0])(z)  # [2, dim, dim]
    before = torch.ones(dim, dim).tril(-1).bool()
    before = before.T if reverse else before
    assert (j[:, before] != 0).all() and (j[:, ~before] == 0).all()
    j = torch.func.jacrev(lambda c: torch.stack(made(z[None], c[None]))[:, 0])(context)
    assert (j != 0).all()


@pytest.mark.parametrize("dim, blocks, hidden", [(1, 1, 5), (3, 1, 8), (6, 2, 16), (5, 3, 3)])
def test_flow_determinant_is_that_of_the_exact_jacobian(dim, blocks, hidden):
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(dim, 4, blocks, hidden).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.4)
    z, context = torch.randn(6, dim).double(), torch.randn(6, 4).double()
    moved, log_det = flow(z, context)
    assert moved.shape == (6, dim) and log_det.shape == (6,) and log_det.std() > 0.1
    for i in range(6):
        j = torch.func.jacrev(lambda row, i=i: flow(row[None], context[i : i + 1])[0][0])(z[i])
        sign, want = torch.linalg.slogdet(j)
        assert sign == 1 and log_det[i].item() == pytest.approx(want.item(), abs=1e-10)
        if blocks == 1:
            assert torch.equal(j, j.tril())
    assert flow(z[:0], context[:0])[1].shape == (0,)


def test_flow_starts_as_the_identity_and_never_overflows():
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(8, 16, 2, 64)
    z, context = torch.randn(100, 8), torch.randn(100, 16)
    moved, log_det = flow(z, context)
    assert torch.equal(moved, z) and not log_det.any()
    with torch.no_grad():
        flow.blocks[0].output.bias.fill_(1000.0)
    assert all(t.isfinite().all() for t in flow(z, context))


def test_flow_reaches_encode_and_reconstruct():
    model, x = double("vae-flow")
    mu, log_var, context = model.posterior(x)
    mean, same = model.encode(x)
    assert torch.equal(mean, model.flow(mu, context)[0]) and not torch.equal(mean, mu) and torch.equal(same, log_var)


def log_weight(model, x, mu, log_var, context):
    """log p(x, z) - log q(z|x) of one sample for each row of the posterior."""
    z0, _ = model.draw(mu, log_var)
    z, added = model.flowed(z0, context)
    q, p = torch.distributions.Normal(mu, (log_var / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    return -model.nats(model.decode(z), x).sum((1, 2, 3)) - (q.log_prob(z0) - p.log_prob(z0)).sum(1) - added


@pytest.mark.parametrize("case", FORMS)
def test_the_estimate_is_the_formula_whatever_the_chunk(case):
    model, x = double(case, n=3)
    torch.manual_seed(0)
    mu, log_var, context = model.posterior(x)
    weights = []
    for _ in range(7):
        weights.append(log_weight(model, x, mu, log_var, context))
    want = torch.stack(weights).logsumexp(0) - math.log(7)
    torch.manual_seed(0)
    got = model.log_likelihood(x, 7, chunk=3)  # one sample at a time: the noise comes in the same order
    assert got.shape == (3,) and not got.requires_grad
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)
    many = [model.log_likelihood(x, 200, chunk) for chunk in (2, 100, 10**6)]
    assert all((m - many[0]).abs().max() < 0.5 for m in many)
    assert model.log_likelihood(x[:0], 5).shape == (0,)
    assert model.float().log_likelihood(x.float(), 2).dtype == torch.float64
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        model.log_likelihood(x, 0)


@pytest.mark.parametrize("case", FORMS)
def test_more_samples_tighten_the_bound(case):
    """E[log mean_K w] grows with K from the ELBO (K = 1) and stays under log p(x): arXiv 1509.00519, theorem 1."""
    model, x = double(case, n=1)
    with torch.no_grad():
        torch.nn.init.normal_(model.encoder.output.weight, std=0.3)
    torch.manual_seed(0)
    log_w = log_weight(model, x, *(t.repeat(2000, 1) for t in model.posterior(x))).detach()
    bounds = [log_w.view(-1, k).logsumexp(1).mean().item() - math.log(k) for k in (1, 10, 100, 1000)]
    assert bounds == sorted(bounds)
    torch.manual_seed(1)
    estimates = torch.cat([model.log_likelihood(x, 100) for _ in range(20)])  # bounds[2] is the mean of 20 such
    assert abs(estimates.mean().item() - bounds[2]) < 5 * estimates.std().item() * (2 / 20) ** 0.5
    elbo = -model.loss(x.expand(2000, -1, -1, -1))["negative_elbo"].item()
    assert abs(elbo - bounds[0]) < 6 * (log_w.std() / 2000**0.5).item()


def test_beta_and_warm_up_are_read_from_a_buffer():
    model = build("vae", beta=3.0, kl_warmup=0.5)
    x, _ = batch(model)
    weights = []
    for step in (0, 4, 9, 10, 19):
        buffer = model.kl_weight
        model.set_progress(step, 20)
        assert model.kl_weight is buffer  # what a captured step reads
        found = losses(model, x)
        weights.append(((found["loss"] - found["reconstruction"]) / found["kl"]).item())
        torch.testing.assert_close(found["negative_elbo"], found["reconstruction"] + found["kl"])
    assert weights == pytest.approx([0.3, 1.5, 3.0, 3.0, 3.0], rel=1e-3)
    plain = build("vae", beta=3.0)
    plain.set_progress(0, 20)
    assert plain.kl_weight == 3
    assert "kl_weight" not in model.state_dict()


def test_the_gradient_is_the_numerical_one():
    model, x = double("vae-flow", n=2, norm=None)
    losses(model, x)["loss"].backward()
    for parameter in (
        model.encoder.output.weight,
        model.decoder.output.to_image.weight,
        model.flow.blocks[0].output.weight,
        model.flow.blocks[1].context.weight,
    ):
        with torch.no_grad():
            direction, before, values = torch.randn_like(parameter), parameter.clone(), []
            for sign in (1, -1):
                parameter.copy_(before + sign * 1e-6 * direction)
                values.append(losses(model, x)["loss"].item())
            parameter.copy_(before)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4)


def test_a_short_run_learns_digits():
    """1,000 digits, 250 steps: far below the best independent pixels."""
    data = load("mnist5k")
    torch.manual_seed(0)
    model = fit(
        VAE(VAEConfig(network="mlp", latent_dim=10, hidden=256, depth=1, kl_warmup=0.5)), data.train[:1000], steps=250
    )
    mean = data.train[:1000].mean(0, keepdim=True).clamp(1e-3, 1 - 1e-3)
    x = data.validation[:200]
    apart = -(x * mean.log() + (1 - x) * (1 - mean).log()).sum().item() / len(x)
    torch.manual_seed(0)
    found = model.validate([(x, None)])
    assert found["negative_elbo"] < apart - 30
    assert model.log_likelihood(x, 50).mean() > -found["negative_elbo"]
