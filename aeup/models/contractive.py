"""The contractive autoencoder.

S. Rifai et al., Contractive Auto-Encoders, ICML 2011: minimise L(x, g(f(x))) + weight * ||J||^2, J = df/dx the
encoder's Jacobian [latent_dim, pixels] at x and ||.|| the Frobenius norm, averaged over the images. The code is
h = sigmoid(f(x)). Two ways to the penalty:

    closed      the paper's model, one layer h = sigmoid(W x + b) and the decoder's weights tied to it, W^T h + c (which
                keeps W from shrinking while the decoder grows): ||J||^2 = sum_i (h_i (1 - h_i))^2 sum_j W_ij^2;
    hutchinson  any encoder: ||J||^2 = E ||J^T v||^2 for v with independent entries +1 and -1, by one vector-Jacobian
                product a step (M. Hutchinson, 1990). Its decoder is not tied.

Batch norm is not allowed: an image's Jacobian would depend on the other images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aeup.models.autoencoder import Autoencoder, AutoencoderConfig
from aeup.models.base import check_choice, check_real

JACOBIANS = ("closed", "hutchinson")


@dataclass
class ContractiveConfig(AutoencoderConfig):
    latent_dim: int = 256
    network: str = "mlp"
    depth: int = 0
    norm: str | None = "group"
    jacobian: str = "closed"  # closed, hutchinson
    weight: float = 0.4


class Contractive(Autoencoder):
    """Autoencoder whose codes [N, latent_dim] in (0, 1) change little with the image."""

    name = "contractive"
    Config = ContractiveConfig
    objective = "loss"
    plain_weights = False  # the closed form's, in float32
    defaults = {"lr": 1e-2, "epochs": 60}

    def __init__(self, config: ContractiveConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        check_choice("jacobian", c.jacobian, JACOBIANS)
        check_real("weight", c.weight)
        if c.jacobian == "closed":
            if (c.network, c.depth) != ("mlp", 0):
                raise ValueError(
                    "jacobian='closed' is for one layer: network='mlp' and depth=0, got "
                    f"network={c.network!r} and depth={c.depth}; deeper encoders take jacobian='hutchinson'"
                )
            del self.decoder
            self.bias = nn.Parameter(torch.zeros(self.encoder.output.in_features))
        elif c.network == "conv" and c.norm == "batch":
            raise ValueError("norm='batch' ties an image's Jacobian to the other images; take 'group' or None")

    def encode(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> code [N, latent_dim] in (0, 1)."""
        return torch.sigmoid(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Code [N, latent_dim] -> logits [N, C, H, W]."""
        if self.config.jacobian == "hutchinson":
            return self.decoder(z)
        shape = (self.config.in_channels, *self.encoder.image_size)
        return F.linear(z, self.encoder.output.weight.t(), self.bias).unflatten(1, shape)

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        """``loss`` = ``reconstruction`` + weight * ``jacobian``, the mean of ||J||^2 (hutchinson: its estimate)."""
        if self.config.jacobian == "closed":
            code = self.encode(x)
            norm = self.closed_form(code.to(x.dtype)).sum() / len(x)
        else:
            code, vjp = torch.func.vjp(self.encode, x)
            (product,) = vjp((torch.rand_like(code) < 0.5).to(code.dtype) * 2 - 1)
            norm = product.to(x.dtype).square().sum() / len(x)
        reconstruction = self.reconstruction(self.decode(code), x)
        return {
            "loss": reconstruction + self.config.weight * norm,
            "reconstruction": reconstruction,
            "jacobian": norm,
        }

    def closed_form(self, code: Tensor) -> Tensor:
        """Codes [N, latent_dim] of the one-layer encoder -> ||J||^2 of each image, [N]."""
        return ((code * (1 - code)).square() * self.encoder.output.weight.square().sum(1)).sum(1)
