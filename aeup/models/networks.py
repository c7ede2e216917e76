"""The encoder and the decoder that the autoencoders and the VAE share: convolutional, or a multi-layer perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from aeup.decoder import Decoder, after_convolution, check_int, check_size, check_widths, make_activation
from aeup.models.base import check_choice
from aeup.nn import Conv2d

NETWORKS = ("conv", "mlp")


@dataclass
class NetworkConfig:
    image_size: tuple[int, int] = (28, 28)
    in_channels: int = 1
    latent_dim: int = 20
    network: str = "conv"  # conv, mlp
    hidden: int = 128  # units of each linear layer between image (or feature map) and latent vector
    depth: int = 2  # how many such layers; with none, an mlp's encoder and decoder are one linear layer each
    activation: str = "silu"
    channels: tuple[int, ...] = (64, 32, 16)  # conv: the decoder's widths; the encoder mirrors them
    upsample: str = "nearest"  # conv: nearest, bilinear, bicubic, conv_transpose
    norm: str | None = "batch"  # conv: batch, group, None


class Encoder(nn.Module):
    """Images [N, in_channels, H, W] to vectors [N, out_features].

    conv, the mirror of `aeup.Decoder`: stride-2 convolutions of kernel 3 halve the size, rounded up, through the
    decoder's hidden widths in reverse (``channels[1:]`` reversed). Then, and of an mlp alone, `depth` linear layers of
    `hidden` units and a linear output.
    """

    def __init__(self, config: NetworkConfig, out_features: int) -> None:
        super().__init__()
        c = config
        check_choice("network", c.network, NETWORKS)
        self.in_channels = width = check_int("in_channels", c.in_channels)
        self.image_size = h, w = check_size("image_size", c.image_size)
        layers: list[nn.Module] = []
        for c_out in reversed(check_widths(c.channels)[1:]) if c.network == "conv" else ():
            fused, after = after_convolution(c.norm, c_out, c.activation)
            layers += [Conv2d(width, c_out, 3, stride=2, padding=1, bias=c.norm is None, activation=fused), *after]
            width, h, w = c_out, (h + 1) // 2, (w + 1) // 2
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden, width = dense(width * h * w, c)
        self.output = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_channels, *self.image_size):
            h, w = self.image_size
            raise RuntimeError(f"images must be [N, {self.in_channels}, {h}, {w}] for this model, got {list(x.shape)}")
        return self.output(self.hidden(self.features(x)))


class LatentDecoder(nn.Module):
    """Vectors [N, latent_dim] to logits [N, in_channels, H, W]: `depth` linear layers of `hidden` units, then
    `aeup.Decoder`, or of an mlp a linear layer."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        c = config
        self.latent_dim = check_int("latent_dim", c.latent_dim)
        self.hidden, width = dense(c.latent_dim, c)
        if c.network == "mlp":
            shape = (c.in_channels, *check_size("image_size", c.image_size))
            self.output = nn.Sequential(nn.Linear(width, math.prod(shape)), nn.Unflatten(1, shape))
        else:
            self.output = Decoder(c.channels, c.in_channels, c.image_size, width, c.upsample, c.norm, c.activation)

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise RuntimeError(f"latent vectors must be [N, {self.latent_dim}] (latent_dim), got {list(z.shape)}")
        return self.output(self.hidden(z))


def dense(width: int, config: NetworkConfig) -> tuple[nn.Sequential, int]:
    """The linear layers for vectors [N, width], each with its activation; and the width that they end with."""
    hidden, depth = check_int("hidden", config.hidden), check_int("depth", config.depth, 0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), make_activation(config.activation)]
        width = hidden
    return nn.Sequential(*layers), width
