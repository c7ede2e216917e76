"""The denoising autoencoder.

P. Vincent et al., Stacked Denoising Autoencoders, JMLR 11, 2010, section 3: the encoder sees a corrupted image x~, the
target is the clean one: minimise L(x, g(f(x~))). Three corruptions, as in section 3.3, each by a `level`:

    mask         a fraction `level` of the pixels, chosen anew for each image, is set to 0;
    gaussian     x~ = x + level * N(0, I);
    salt_pepper  a fraction `level` of the pixels is set to 0 or 1, with equal chances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aeup.models.autoencoder import Autoencoder, AutoencoderConfig
from aeup.models.base import check_choice, check_real

CORRUPTIONS = ("mask", "gaussian", "salt_pepper")


@dataclass
class DenoisingConfig(AutoencoderConfig):
    corruption: str = "gaussian"  # mask, gaussian, salt_pepper
    level: float = 0.5  # fraction of the pixels; gaussian: standard deviation
    latent_dim: int = 64


class Denoising(Autoencoder):
    """Autoencoder that is trained to undo a corruption. ``reconstruct`` cleans the image that it is given."""

    name = "denoising"
    Config = DenoisingConfig

    def __init__(self, config: DenoisingConfig | None = None) -> None:
        super().__init__(config)
        check_choice("corruption", self.config.corruption, CORRUPTIONS)
        most = {} if self.config.corruption == "gaussian" else {"most": 1.0}
        check_real("level", self.config.level, **most)

    def corrupt(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> x~; mask and salt_pepper take all channels of a pixel."""
        level = self.config.level
        if self.config.corruption == "gaussian":
            return x + level * torch.randn_like(x)
        u = torch.rand_like(x[:, :1])
        if self.config.corruption == "mask":
            return torch.where(u < level, 0.0, x)
        return torch.where(u < level, (u < level / 2).to(x.dtype), x)

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        """``{"reconstruction": L(x, g(f(x~)))}``."""
        return {"reconstruction": self.reconstruction(self(self.corrupt(x)), x)}
