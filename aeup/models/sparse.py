"""The sparse autoencoder: a code of sigmoid units, few of which are on for any one image.

Minimise L(x, g(f(x))) + weight * penalty, with one of

    kl   sum_j KL(rho || rho_j) = sum_j rho log(rho / rho_j) + (1 - rho) log((1 - rho) / (1 - rho_j)),
         rho_j the mean of unit j over the batch and rho the target (A. Ng, Sparse autoencoder, CS294A notes, 2011;
         H. Lee, C. Ekanadham, A. Ng, NIPS 2007);
    l1   the mean over the images of sum_j |h_j|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aeup.models.autoencoder import Autoencoder, AutoencoderConfig
from aeup.models.base import BatchMean, check_choice, check_real

PENALTIES = ("kl", "l1")


@dataclass
class SparseConfig(AutoencoderConfig):
    latent_dim: int = 128
    penalty: str = "kl"  # kl, l1
    target: float = 0.05  # kl: the mean activation of a unit
    weight: float = 5.0


class Sparse(Autoencoder):
    """Autoencoder with sparse codes [N, latent_dim] in (0, 1)."""

    name = "sparse"
    Config = SparseConfig
    objective = "loss"

    def __init__(self, config: SparseConfig | None = None) -> None:
        super().__init__(config)
        check_choice("penalty", self.config.penalty, PENALTIES)
        check_real("target", self.config.target, 0.0, 1.0, strict=True)
        check_real("weight", self.config.weight)
        self.mean = BatchMean()

    def encode(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> code [N, latent_dim] in (0, 1)."""
        return torch.sigmoid(self.encoder(x))

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        """``loss`` = ``reconstruction`` + weight * ``penalty``; ``activation``: the mean of all units."""
        code = self.encode(x)
        reconstruction = self.reconstruction(self.decode(code), x)
        code = code.to(x.dtype)
        penalty = self.kl(self.mean(code)) if self.config.penalty == "kl" else code.sum() / len(x)
        return {
            "loss": reconstruction + self.config.weight * penalty,
            "reconstruction": reconstruction,
            "penalty": penalty,
            "activation": code.mean(),
        }

    def kl(self, activation: Tensor) -> Tensor:
        """Mean activations [latent_dim] -> the sum of their divergences from the target, in nats."""
        rho, a = self.config.target, activation.clamp(1e-6, 1 - 1e-6)  # a saturated unit would give infinity
        return (rho * (rho / a).log() + (1 - rho) * ((1 - rho) / (1 - a)).log()).sum()
