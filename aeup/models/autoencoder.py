"""The plain autoencoder, convolutional or a multi-layer perceptron.

An encoder f and a decoder g, trained so that g(f(x)) is close to x (Hinton & Salakhutdinov, Science 313, 2006;
the convolutional form: Masci et al., ICANN 2011). Minimise L(x, g(f(x))) with L either

    Bernoulli cross-entropy   -sum_i [x_i log y_i + (1 - x_i) log(1 - y_i)]   in nats per image, or
    squared error             sum_i (x_i - y_i)^2                             in squared grey levels per image,

where y = sigmoid(logits) and x has grey levels in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.decoder import check_int
from aeup.models.base import Model, check_choice
from aeup.models.networks import Encoder, LatentDecoder, NetworkConfig

LOSSES = ("bernoulli", "squared")


@dataclass
class AutoencoderConfig(NetworkConfig):
    loss: str = "bernoulli"  # bernoulli, squared


class Autoencoder(Model):
    """Autoencoder with codes [N, latent_dim] for images [N, in_channels, H, W] in [0, 1].

    Raises:
        ValueError, TypeError: an option that is not allowed.
    """

    name = "ae"
    Config = AutoencoderConfig
    objective = "reconstruction"

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__(config)
        check_int("latent_dim", self.config.latent_dim)
        check_choice("loss", self.config.loss, LOSSES)
        self.encoder = Encoder(self.config, self.config.latent_dim)
        self.decoder = LatentDecoder(self.config)

    def encode(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> code [N, latent_dim]."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Code [N, latent_dim] -> logits [N, C, H, W]."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, C, H, W]."""
        return self.decode(self.encode(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> images in [0, 1] of the same shape."""
        return torch.sigmoid(self(x))

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """L: the mean over the images of the sum over the pixels."""
        logits = logits.to(x.dtype)
        if self.config.loss == "bernoulli":
            total = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        else:
            total = F.mse_loss(torch.sigmoid(logits), x, reduction="sum")
        return total / len(x)

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        """``{"reconstruction": L}``."""
        return {"reconstruction": self.reconstruction(self(x), x)}
