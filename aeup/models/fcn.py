"""The fully convolutional network for segmentation.

J. Long, E. Shelhamer and T. Darrell, Fully Convolutional Networks for Semantic Segmentation, arXiv 1411.4038. A
backbone halves the map five times. Head "32s": a 1x1 convolution scores the classes on the map of stride 32, and a
transposed convolution enlarges the scores 32 times. "16s": the scores are enlarged twice and added to scores made from
the map of stride 16 (``pool4``), then 16 times. "8s": once more, with the map of stride 8 (``pool3``).

As in the paper (sections 3.3, 4.3), transposed convolutions start as bilinear interpolation; the x2 ones are learnt,
the last one stays as it is; the skips' scores start at zero. Kernel 2s, stride s, padding s/2 keep the maps aligned
with the image, so sizes that 32 does not divide are only cut at the bottom and right. The backbone is small: five
blocks of two 3x3 convolutions with batch norm and ReLU, each followed by a 2x2 max pooling (paper: VGG-16).

Trained with the cross-entropy of each pixel. Mean IU, sum_c n_cc / (t_c + sum_i n_ic - n_cc) / n_classes with n_ij the
pixels of class i predicted as class j (section 5), over the classes that occur.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aeup.decoder import UPSAMPLE, check_int, norm_and_activation
from aeup.models.base import Model, check_choice
from aeup.nn import ConvTranspose2d, Upsample

HEADS = {"32s": 32, "16s": 16, "8s": 8}


@dataclass
class FCNConfig:
    image_size: tuple[int, int] = (64, 64)  # of the training images; any size may follow
    in_channels: int = 1
    classes: int = 11
    head: str = "8s"  # 32s, 16s, 8s
    channels: tuple[int, ...] = (16, 32, 64, 96, 128)  # widths of the five blocks
    upsample: str = "conv_transpose"  # conv_transpose, nearest, bilinear, bicubic


class FCN(Model):
    """FCN for images [N, in_channels, H, W] in [0, 1] and labels [N, H, W] in 0 ... classes - 1.

    Raises:
        ValueError, TypeError: an option that is not allowed.
    """

    name = "fcn"
    Config = FCNConfig
    objective = "cross_entropy"
    targets = True
    defaults = {"data": "scenes", "epochs": 15}

    def __init__(self, config: FCNConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        check_choice("head", c.head, tuple(HEADS))
        check_choice("upsample", c.upsample, UPSAMPLE)
        check_int("classes", c.classes, 2)
        check_int("in_channels", c.in_channels)
        if not isinstance(c.channels, Sequence) or len(c.channels) != 5:
            raise ValueError(f"channels must be five widths, one for each block, got {c.channels!r}")
        widths = [c.in_channels, *(check_int(f"channels[{i}]", w) for i, w in enumerate(c.channels))]
        self.blocks = nn.ModuleList(block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.score = nn.Conv2d(widths[-1], c.classes, 1)
        skips = {"32s": [], "16s": [4], "8s": [4, 3]}[c.head]
        self.skips = nn.ModuleDict({f"pool{i}": nn.Conv2d(widths[i], c.classes, 1) for i in skips})
        for skip in self.skips.values():
            nn.init.zeros_(skip.weight), nn.init.zeros_(skip.bias)
        scales = [2] * len(skips) + [HEADS[c.head]]
        if c.upsample == "conv_transpose":
            self.enlarge = nn.ModuleList(bilinear_conv_transpose(c.classes, scale) for scale in scales)
            self.enlarge[-1].requires_grad_(False)
        else:
            self.enlarge = nn.ModuleList(Upsample(scale_factor=scale, mode=c.upsample) for scale in scales)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> scores [N, classes, H, W]."""
        maps, y = {}, x
        for i, layer in enumerate(self.blocks, 1):
            y = F.max_pool2d(layer(y), 2, ceil_mode=True)
            maps[f"pool{i}"] = y
        y = self.score(y)
        for enlarge, (name, skip) in zip(self.enlarge, self.skips.items(), strict=False):
            y = cut(enlarge(y), maps[name]) + skip(maps[name])
        return cut(self.enlarge[-1](y), x)

    def segment(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> labels [N, H, W]."""
        return self(x).argmax(1)

    def loss(self, x: Tensor, target: Tensor | None = None, player: str = "model") -> dict[str, Tensor]:
        """``{"cross_entropy": scalar}``, the mean over the pixels, in nats."""
        return {"cross_entropy": F.cross_entropy(self._scores(x, target), target)}

    def _scores(self, x: Tensor, target: Tensor | None) -> Tensor:
        if target is None or target.shape != (x.shape[0], *x.shape[2:]):
            given = None if target is None else list(target.shape)
            raise RuntimeError(f"target must be labels [N, H, W] = {[x.shape[0], *x.shape[2:]]}, got {given}")
        return self(x).to(x.dtype)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, float]:
        """``cross_entropy``, ``mean_iu`` and ``pixel_accuracy``."""
        n = self.config.classes
        total, counts, pixels = 0.0, 0, 0
        for x, target in batches:
            scores = self._scores(x, target)
            total = total + F.cross_entropy(scores, target, reduction="sum").double()
            counts = counts + confusion(scores.argmax(1), target, n)
            pixels += target.numel()
        if pixels == 0:
            raise ValueError("batches must hold at least one image, got none")
        hits = counts.diagonal().double()
        union = counts.sum(0) + counts.sum(1) - hits
        return {
            "cross_entropy": (total / pixels).item(),
            "mean_iu": (hits / union)[union > 0].mean().item(),
            "pixel_accuracy": (hits.sum() / pixels).item(),
        }


def cut(y: Tensor, like: Tensor) -> Tensor:
    """The upper left corner of `y`, of the size of `like`."""
    return y[:, :, : like.shape[2], : like.shape[3]]


def block(c_in: int, c_out: int) -> nn.Sequential:
    """Two convolutions at the size of their input."""
    layers: list[nn.Module] = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), *norm_and_activation("batch", c_out, "relu")]
    return nn.Sequential(*layers)


def bilinear_conv_transpose(channels: int, scale: int) -> ConvTranspose2d:
    """[N, channels, H, W] -> [N, channels, H * scale, W * scale], for an even `scale`. Away from the border it is
    bilinear interpolation with ``align_corners=False``: a tent on the diagonal of the channels, no bias."""
    layer = ConvTranspose2d(channels, channels, 2 * scale, stride=scale, padding=scale // 2, bias=False)
    tent = 1 - (torch.arange(2 * scale) + 0.5 - scale).abs() / scale
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None] * tent[:, None] * tent)
    return layer


def confusion(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """n [classes, classes], int64: n_ij pixels of class i are predicted as class j."""
    return torch.bincount((target * classes + predicted).flatten(), minlength=classes**2).view(classes, classes)
