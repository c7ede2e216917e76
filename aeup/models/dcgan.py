"""The deep convolutional generative adversarial network.

A. Radford, L. Metz and S. Chintala, arXiv 1511.06434, after Goodfellow et al., arXiv 1406.2661. The generator G makes
images from z ~ N(0, I), the discriminator D gives the logit of "this is a real image". They step in turn:

    D minimises  E_x[softplus(-D(x))] + E_z[softplus(D(G(z)))],
    G minimises  E_z[softplus(-D(G(z)))],    the loss that does not saturate (1406.2661, section 3),

each with fresh noise. G: z to a map of 4x4 (7x7 for 28x28 images), then stages that double the size, ReLU, batch norm
everywhere but at the image, tanh. D: strided convolutions, leaky ReLU of slope 0.2, batch norm everywhere but at the
image. Weights start as N(0, 0.02). ``upsample="conv_transpose"`` is the paper's generator (kernel 4, stride 2); the
others enlarge first and convolve with kernel 3 then (Odena et al., distill.pub/2016/deconv-checkerboard).
Images in [0, 1] outside are in [-1, 1] inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aeup.decoder import UPSAMPLE, check_int, check_size, norm_and_activation
from aeup.models.base import Model, check_choice
from aeup.nn import Conv2d, ConvTranspose2d, UpsampleConv2d


@dataclass
class DCGANConfig:
    image_size: tuple[int, int] = (64, 64)
    in_channels: int = 3
    latent_dim: int = 100
    width: int = 64  # channels of the largest map; each smaller one has twice as many
    upsample: str = "conv_transpose"  # conv_transpose, nearest, bilinear, bicubic


class Generator(nn.Module):
    """z [N, latent_dim] -> images [N, out_channels, H, W] in [-1, 1], through maps of ``width * 2**i`` channels."""

    def __init__(self, latent_dim: int, out_channels: int, size: tuple[int, int], width: int, upsample: str) -> None:
        super().__init__()
        check_choice("upsample", upsample, UPSAMPLE)
        stages, start = halvings(size)
        widths = [width * 2**i for i in reversed(range(stages))]
        layers: list[nn.Module] = [nn.Unflatten(1, (latent_dim, 1, 1))]
        layers += [ConvTranspose2d(latent_dim, widths[0], start, bias=False)]
        for c_in, c_out in zip(widths, widths[1:], strict=False):
            layers += [*norm_and_activation("batch", c_in, "relu"), enlarge(c_in, c_out, upsample, bias=False)]
        layers += norm_and_activation("batch", width, "relu")
        layers += [enlarge(width, out_channels, upsample, activation="tanh")]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Discriminator(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N]."""

    def __init__(self, in_channels: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        stages, start = halvings(size)
        first = Conv2d(in_channels, width, 4, stride=2, padding=1, activation=("leaky_relu", 0.2))
        layers: list[nn.Module] = [first, nn.Identity()]
        for i in range(stages - 1):
            c = width * 2**i
            layers += [Conv2d(c, 2 * c, 4, stride=2, padding=1, bias=False)]
            layers += norm_and_activation("batch", 2 * c, "leaky_relu")
        layers += [nn.Conv2d(width * 2 ** (stages - 1), 1, start), nn.Flatten(0)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DCGAN(Model):
    """DCGAN for images [N, in_channels, H, W] in [0, 1].

    H and W must halve without rest until one is below 8: 28, 32, 64, 128 ...

    Raises:
        ValueError, TypeError: an option that is not allowed.
    """

    name = "dcgan"
    Config = DCGANConfig
    objective = None
    minimise = {"discriminator": "discriminator", "generator": "generator"}
    defaults = {"lr": 2e-4, "betas": (0.5, 0.999), "warmup": 0, "schedule": "constant", "epochs": 25}

    def __init__(self, config: DCGANConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        size = check_size("image_size", c.image_size)
        for name in ("in_channels", "latent_dim", "width"):
            check_int(name, getattr(c, name))
        self.generator = Generator(c.latent_dim, c.in_channels, size, c.width, c.upsample)
        self.discriminator = Discriminator(c.in_channels, size, c.width)
        self.apply(initialise)

    def players(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "generator": self.generator}

    def decode(self, z: Tensor) -> Tensor:
        """z [N, latent_dim] -> images [N, C, H, W] in [-1, 1]."""
        return self.generator(z)

    def sample(self, n: int) -> Tensor:
        """`n` images [n, C, H, W] in [0, 1] from z ~ N(0, I)."""
        return (self.decode(self.noise(n)) + 1) / 2

    def noise(self, n: int) -> Tensor:
        """z [n, latent_dim] from torch's default generator."""
        like = self.like()
        return torch.randn(n, self.config.latent_dim, device=like.device, dtype=like.dtype)

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "discriminator") -> dict[str, Tensor]:
        """discriminator: its loss, and the mean probability "real" that it gives to ``real`` and ``fake`` images.
        generator: its loss."""
        if player == "discriminator":
            real = self.discriminator(2 * x - 1).to(x.dtype)
            with torch.no_grad():
                images = self.generator(self.noise(len(x)))
            fake = self.discriminator(images).to(x.dtype)
            total = F.softplus(-real).mean() + F.softplus(fake).mean()
            return {"discriminator": total, "real": real.sigmoid().mean(), "fake": fake.sigmoid().mean()}
        check_choice("player", player, tuple(self.minimise))
        # Detached parameters: the generator's step needs no gradient of the discriminator's weights.
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fake = torch.func.functional_call(self.discriminator, fixed, self.generator(self.noise(len(x))))
        return {"generator": F.softplus(-fake.to(x.dtype)).mean()}


def halvings(size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """How often a size is halved until a side is below 8, and what is left."""
    stages, (h, w) = 0, size
    while min(h, w) >= 8:
        if h % 2 or w % 2:
            raise ValueError(f"image_size must halve without rest until a side is below 8 (28, 32, 64 ...), got {size}")
        stages, h, w = stages + 1, h // 2, w // 2
    if stages == 0 or min(h, w) < 1:
        raise ValueError(f"image_size must be at least 8 in both directions, got {size}")
    return stages, (h, w)


def enlarge(c_in: int, c_out: int, upsample: str, bias: bool = True, activation: str | None = None) -> nn.Module:
    """[N, c_in, H, W] -> [N, c_out, 2H, 2W]."""
    if upsample == "conv_transpose":
        return ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=bias, activation=activation)
    return UpsampleConv2d(c_in, c_out, 3, mode=upsample, padding=1, bias=bias, activation=activation)


def initialise(module: nn.Module) -> None:
    """The paper's section 4: N(0, 0.02); batch norm's scale around 1."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
