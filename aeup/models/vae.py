"""The variational autoencoder.

D. P. Kingma and M. Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114. The encoder gives the mean mu and the
logarithm of the variance of a Gaussian q(z|x); a sample z = mu + sigma * eps with eps ~ N(0, I) lets the gradient
through; the decoder gives the logits of p(x|z). Training minimises the negative evidence lower bound

    -ELBO = -E_q[log p(x|z)] + KL(q(z|x) || N(0, I)),    KL = -1/2 sum_j (1 + log var_j - mu_j^2 - var_j),

with one sample of z for each image. The likelihood is Bernoulli on grey levels: the cross-entropy with targets in
[0, 1], not binarised. Everything is in nats per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from aeup.decoder import Decoder
from aeup.models.encoder import Encoder


@dataclass
class VAEConfig:
    image_size: tuple[int, int] = (28, 28)
    in_channels: int = 1
    latent_dim: int = 20
    channels: tuple[int, ...] = (64, 32, 16)  # the decoder's widths; the encoder mirrors them
    hidden: int = 128  # units of the encoder's linear layer
    upsample: str = "nearest"
    norm: str | None = "batch"
    activation: str = "silu"


class VAE(nn.Module):
    """Convolutional VAE with latent vector [N, latent_dim] for images [N, in_channels, H, W] in [0, 1]."""

    name = "vae"
    Config = VAEConfig
    objective = "negative_elbo"

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        c = self.config = config if config is not None else VAEConfig()
        self.encoder = Encoder(
            c.channels, c.in_channels, c.image_size, 2 * c.latent_dim, c.hidden, c.norm, c.activation
        )
        self.decoder = Decoder(
            c.channels, c.in_channels, c.image_size, c.latent_dim, c.upsample, c.norm, c.activation, head=None
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> mean and log variance of q(z|x), each [N, latent_dim]."""
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        return mu, log_var

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent [N, latent_dim] -> logits [N, C, H, W]."""
        return self.decoder(z)

    def reparameterise(self, mu: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
        """A sample of N(mu, exp(log_var)) from torch's default generator, differentiable in both."""
        return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> logits [N, C, H, W] of one sample, mean and log variance [N, latent_dim]."""
        mu, log_var = self.encode(x)
        return self.decode(self.reparameterise(mu, log_var)), mu, log_var

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the mean image in [0, 1] at the posterior's mean."""
        return torch.sigmoid(self.decode(self.encode(x)[0]))

    def sample(self, n: int) -> torch.Tensor:
        """``n`` mean images [n, C, H, W] in [0, 1], decoded from z ~ N(0, I)."""
        weight = self.decoder.project.weight
        z = torch.randn(n, self.config.latent_dim, device=weight.device, dtype=weight.dtype)
        return torch.sigmoid(self.decode(z))

    def loss(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """``{"reconstruction", "kl", "negative_elbo"}``: scalars, means over the images, in nats per image."""
        logits, mu, log_var = (t.to(x.dtype) for t in self(x))
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        kl = -0.5 * torch.sum(1 + log_var - mu.square() - log_var.exp()) / len(x)
        return {"reconstruction": reconstruction, "kl": kl, "negative_elbo": reconstruction + kl}
