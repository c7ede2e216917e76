"""Decoders in plain torch, written from the published shapes, with no word of aeup: what a user has before
`aeup.swap(model)`. Weights are random."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# --- Stable Diffusion's VAE (diffusers models/autoencoders/vae.py, Decoder) ---


class _Residual(nn.Module):
    """[N, c_in, H, W] -> [N, c_out, H, W]: twice group norm, SiLU and a 3x3 convolution, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, 1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, 1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class _Attention(nn.Module):
    """Attention of one head over the pixels of [N, c, H, W]."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, c, 1e-6)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, c]
        q, k, v = self.qkv(rows).chunk(3, dim=2)
        y = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


def sd_vae(widths: Sequence[int] = (512, 512, 256, 128)) -> nn.Sequential:
    """Latent [N, 4, H, W] -> image [N, 3, 8H, 8W]; `widths`: of the blocks at 1, 2, 4 and 8 times the latent's size,
    multiples of 32."""
    c = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(4, c, 3, padding=1), _Residual(c, c), _Attention(c), _Residual(c, c)]
    for i, width in enumerate(widths):
        for _ in range(3):
            layers += [_Residual(c, width)]
            c = width
        if i + 1 < len(widths):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
    return nn.Sequential(*layers, nn.GroupNorm(32, c, 1e-6), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))


# --- TAESD (taesd.py, Decoder) ---


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class _Block(nn.Module):
    """[N, c, H, W] -> the same shape: three 3x3 convolutions with ReLU, added to the input."""

    def __init__(self, c: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(c, c, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


def taesd(c: int = 64) -> nn.Sequential:
    """Latent [N, 4, H, W] -> image [N, 3, 8H, 8W], with `c` channels inside."""
    layers: list[nn.Module] = [_Clamp(), nn.Conv2d(4, c, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [*(_Block(c) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(c, c, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, _Block(c), nn.Conv2d(c, 3, 3, padding=1))


# --- DCGAN (pytorch/examples dcgan/main.py, Generator) ---


def dcgan(latent: int = 100, width: int = 64) -> nn.Sequential:
    """z [N, latent, 1, 1] -> image [N, 3, 64, 64]."""
    widths = [8 * width, 4 * width, 2 * width, width]
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], 4, bias=False)]
    for c, c_out in zip(widths, [*widths[1:], 3], strict=True):
        layers += [nn.BatchNorm2d(c), nn.ReLU(True), nn.ConvTranspose2d(c, c_out, 4, 2, 1, bias=False)]
    return nn.Sequential(*layers, nn.Tanh())
