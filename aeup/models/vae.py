"""The variational autoencoder.

D. P. Kingma and M. Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114. The encoder gives the mean mu and the
logarithm of the variance of a Gaussian q(z|x); a sample z = mu + sigma * eps with eps ~ N(0, I) lets the gradient
through; the decoder gives the logits of p(x|z). Training minimises the negative evidence lower bound

    -ELBO = -E_q[log p(x|z)] + KL(q(z|x) || N(0, I)),    KL = -1/2 sum_j (1 + log var_j - mu_j^2 - var_j),

with one sample of z for each image; everything is in nats per image.

Likelihood. bernoulli: the cross-entropy with grey levels in [0, 1] as targets, not binarised. gaussian: x ~ N(y,
sigma^2 I) with y = sigmoid(logits) and one learnt sigma for all pixels (Rybkin et al., arXiv 2006.13202).

Posterior. gaussian: as above, KL in closed form. flow: z_0 from the Gaussian goes through an inverse autoregressive
flow (Kingma et al., arXiv 1606.04934; `aeup.models.flow`) whose context the encoder makes. The same sample gives what
that adds to the KL; as the Gaussian's part stays in closed form, a flow near the identity adds little noise:

    KL(q(z|x) || p) = KL(q(z_0|x) || p) + E[1/2 sum_j (z_j^2 - z_0j^2) - log |det dz/dz_0|].

beta weighs the KL (Higgins et al., beta-VAE, ICLR 2017); with ``kl_warmup`` it grows from 0 to beta over that fraction
of the training (Bowman et al., arXiv 1511.06349). The importance-weighted estimate of log p(x) is that of Burda et al.,
arXiv 1509.00519: log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), z_k ~ q(z|x); its mean is never above log p(x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aeup.decoder import check_int
from aeup.models.base import Model, check_choice, check_real
from aeup.models.flow import InverseAutoregressiveFlow
from aeup.models.networks import Encoder, LatentDecoder, NetworkConfig

LIKELIHOODS = ("bernoulli", "gaussian")
POSTERIORS = ("gaussian", "flow")


@dataclass
class VAEConfig(NetworkConfig):
    likelihood: str = "bernoulli"  # bernoulli, gaussian
    posterior: str = "gaussian"  # gaussian (mean field), flow
    flow_blocks: int = 2
    flow_hidden: int = 128  # units of a block's two hidden layers; also the context's length
    beta: float = 1.0
    kl_warmup: float = 0.0  # fraction of the training in which beta grows from 0


class VAE(Model):
    """VAE with latent vector [N, latent_dim] for images [N, in_channels, H, W] in [0, 1].

    Raises:
        ValueError, TypeError: an option that is not allowed.
    """

    name = "vae"
    Config = VAEConfig
    objective = "negative_elbo"
    minimise = {"model": "loss"}

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        check_choice("likelihood", c.likelihood, LIKELIHOODS)
        check_choice("posterior", c.posterior, POSTERIORS)
        check_real("beta", c.beta)
        check_real("kl_warmup", c.kl_warmup, 0.0, 1.0)
        check_int("latent_dim", c.latent_dim)
        check_int("flow_blocks", c.flow_blocks), check_int("flow_hidden", c.flow_hidden)
        flow = c.posterior == "flow"
        context = c.flow_hidden if flow else 0
        self.encoder = Encoder(c, 2 * c.latent_dim + context)
        self.flow = InverseAutoregressiveFlow(c.latent_dim, context, c.flow_blocks, c.flow_hidden) if flow else None
        self.decoder = LatentDecoder(c)
        self.log_sigma = nn.Parameter(torch.tensor(-2.0)) if c.likelihood == "gaussian" else None
        self.register_buffer("kl_weight", torch.tensor(float(c.beta)), persistent=False)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, C, H, W] -> mean and log variance of the Gaussian, and the flow's context (empty without a flow)."""
        d, found = self.config.latent_dim, self.encoder(x).to(x.dtype)
        mu, log_var, context = found.split((d, d, found.shape[1] - 2 * d), dim=1)
        return mu, log_var, context

    def draw(self, mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        """A sample z_0 [N, latent_dim] of the Gaussian, and its noise, from torch's default generator."""
        eps = torch.randn_like(mu)
        return mu + torch.exp(0.5 * log_var) * eps, eps

    def flowed(self, z0: Tensor, context: Tensor) -> tuple[Tensor, Tensor | float]:
        """z [N, latent_dim], to which the flow takes z_0, and what it adds to log q(z|x) - log p(z), [N]. Without a
        flow z_0 and 0."""
        if self.flow is None:
            return z0, 0.0
        z, log_det = self.flow(z0, context)
        return z, 0.5 * (z.square() - z0.square()).sum(1) - log_det

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> mean and log variance of q(z|x), each [N, latent_dim]. With a flow: the point to which the
        flow takes the Gaussian's mean, which decodes as a mean does, and the Gaussian's log variance."""
        mu, log_var, context = self.posterior(x)
        return mu if self.flow is None else self.flow(mu, context)[0], log_var

    def decode(self, z: Tensor) -> Tensor:
        """Latent [N, latent_dim] -> logits [N, C, H, W]."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the mean image in [0, 1] at ``encode(x)``'s mean."""
        return torch.sigmoid(self.decode(self.encode(x)[0]))

    def sample(self, n: int) -> Tensor:
        """`n` mean images [n, C, H, W] in [0, 1], decoded from z ~ N(0, I)."""
        like = self.like()
        return torch.sigmoid(self.decode(torch.randn(n, self.config.latent_dim, device=like.device, dtype=like.dtype)))

    def nats(self, logits: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) of each pixel, in the shape of `logits`, [..., C, H, W]."""
        logits = logits.to(x.dtype)
        if self.log_sigma is None:
            return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        error = (x - torch.sigmoid(logits)) * torch.exp(-self.log_sigma)
        return 0.5 * error.square() + self.log_sigma + 0.5 * math.log(2 * math.pi)

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        """``loss`` = ``reconstruction`` + beta * ``kl``; ``negative_elbo`` is the same with beta = 1."""
        mu, log_var, context = self.posterior(x)
        z, added = self.flowed(self.draw(mu, log_var)[0], context)
        reconstruction = self.nats(self.decode(z), x).sum() / len(x)
        kl = (log_var.expm1() - log_var + mu.square()).sum() * (0.5 / len(x))
        if self.flow is not None:
            kl = kl + added.sum() / len(x)
        return {
            "negative_elbo": reconstruction + kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "loss": reconstruction + self.kl_weight.to(kl.dtype) * kl,
        }

    def set_progress(self, step: int, steps: int) -> None:
        if self.config.kl_warmup > 0:
            self.kl_weight.fill_(self.config.beta * min(1.0, (step + 1) / (self.config.kl_warmup * steps)))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, samples: int = 1000, chunk: int | None = None) -> Tensor:
        """The importance-weighted estimate of log p(x), float64 [N], in nats, for images [N, C, H, W].

        Args:
            samples: K. What it needs of memory does not grow with it.
            chunk: how many images are decoded at once, at most; by default as many as have 2**18 pixels, whose maps a
                CPU's caches hold, or 2**22 on a GPU.

        Raises:
            ValueError, TypeError: `samples` or `chunk` is no int of at least 1.
        """
        if chunk is None:
            chunk = max(1, 2 ** (18 if x.device.type == "cpu" else 22) // math.prod(x.shape[1:]))
        check_int("samples", samples), check_int("chunk", chunk)
        return torch.cat([self._log_likelihood(rows, samples, chunk) for rows in x.split(chunk)])

    def _log_likelihood(self, x: Tensor, samples: int, chunk: int) -> Tensor:
        n, posterior = len(x), self.posterior(x)
        at_once = max(1, chunk // max(1, n))
        total = x.new_full((n,), -math.inf, dtype=torch.float64)  # log sum_k of the weights so far
        for done in range(0, samples, at_once):
            k = min(at_once, samples - done)
            mu, log_var, context = (t.repeat(k, 1) for t in posterior)
            z0, eps = self.draw(mu, log_var)
            z, added = self.flowed(z0, context)
            log_ratio = 0.5 * (z0.square() - eps.square() - log_var).sum(1) + added  # log q(z|x) - log p(z)
            nats = self.nats(self.decode(z).unflatten(0, (k, n)), x).sum((-3, -2, -1))
            log_weights = -nats - log_ratio.unflatten(0, (k, n))  # log p(x, z_k) - log q(z_k|x), [k, N]
            total = torch.logaddexp(total, log_weights.double().logsumexp(0))
        return total - math.log(samples)
