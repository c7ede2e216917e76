"""The plain convolutional autoencoder.

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
from torch import nn

from aeup.decoder import Decoder
from aeup.models.encoder import Encoder

LOSSES = ("bernoulli", "squared")


@dataclass
class AutoencoderConfig:
    image_size: tuple[int, int] = (28, 28)
    in_channels: int = 1
    latent_dim: int = 20
    channels: tuple[int, ...] = (64, 32, 16)  # the decoder's widths; the encoder mirrors them
    hidden: int = 128  # units of the encoder's linear layer
    upsample: str = "nearest"
    norm: str | None = "batch"
    activation: str = "silu"
    loss: str = "bernoulli"


class Autoencoder(nn.Module):
    """Convolutional autoencoder with latent vector [N, latent_dim] for images [N, in_channels, H, W] in [0, 1]."""

    name = "ae"
    Config = AutoencoderConfig
    objective = "reconstruction"

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__()
        c = self.config = config if config is not None else AutoencoderConfig()
        if c.loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {c.loss!r}")
        self.encoder = Encoder(c.channels, c.in_channels, c.image_size, c.latent_dim, c.hidden, c.norm, c.activation)
        self.decoder = Decoder(
            c.channels, c.in_channels, c.image_size, c.latent_dim, c.upsample, c.norm, c.activation, head=None
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> code [N, latent_dim]."""
        return self.encoder(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Code [N, latent_dim] -> logits [N, C, H, W]."""
        return self.decoder(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> logits [N, C, H, W]."""
        return self.decode(self.encode(x))

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> images in [0, 1] of the same shape."""
        return torch.sigmoid(self(x))

    def loss(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """``{"reconstruction": scalar}``, the mean over the images of the sum over the pixels."""
        logits = self(x).to(x.dtype)
        if self.config.loss == "bernoulli":
            total = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        else:
            total = F.mse_loss(torch.sigmoid(logits), x, reduction="sum")
        return {"reconstruction": total / len(x)}
