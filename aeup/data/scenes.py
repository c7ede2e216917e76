"""Scenes for segmentation: real digits pasted on a canvas, with a label for each pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 3  # digits in a scene
SIDES = (0.4, 0.8)  # a digit image's side, as a fraction of the canvas
INK = 0.5  # a pixel belongs to a digit from this grey level on


def scenes(n: int, size: int, seed: int, digits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`n` scenes of one to three digits each, of random size and place; where digits cross, the brighter one counts.

    Args:
        n: how many.
        size: height and width of the canvas, in pixels.
        seed: the scenes follow from it and the digits alone.
        digits: float [M, 1, h, w] in [0, 1]; each scene draws from them.
        labels: int64 [M], the digits' classes, from 0.

    Returns:
        images [n, 1, size, size], float in [0, 1], and labels [n, size, size], int64: 0 background, 1 + class.

    Raises:
        ValueError: no digits, or a shape, dtype or count that does not fit.
    """
    if digits.dim() != 4 or digits.shape[1] != 1 or not digits.is_floating_point() or len(digits) == 0:
        raise ValueError(f"digits must be float [M, 1, h, w], M at least 1, got {digits.dtype} {list(digits.shape)}")
    if labels.shape != digits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{len(digits)}], got {labels.dtype} {list(labels.shape)}")
    if n < 1 or size < 8:
        raise ValueError(f"n must be at least 1 and size at least 8, got n={n} and size={size}")
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(digits), (n, MOST), generator=random)
    there = torch.arange(MOST) < torch.randint(1, MOST + 1, (n, 1), generator=random)
    side = SIDES[0] + (SIDES[1] - SIDES[0]) * torch.rand(n, MOST, generator=random)
    room = (1 - 0.8 * side)[..., None]  # a digit image's margin is empty: a tenth of it may lie outside
    centre = room * (2 * torch.rand(n, MOST, 2, generator=random) - 1)
    images, classes = digits.new_zeros(n, 1, size, size), labels.new_zeros(n, size, size)
    for i in range(MOST):
        pasted = _paste(digits[chosen[:, i].to(digits.device)], side[:, i], centre[:, i], size)
        pasted = pasted * there[:, i, None, None, None].to(pasted)
        label = labels[chosen[:, i].to(labels.device)][:, None, None] + 1
        above = (pasted >= INK) & (pasted > images)
        classes = torch.where(above[:, 0], label, classes)
        images = torch.maximum(images, pasted)
    return images, classes


def _paste(digits: Tensor, side: Tensor, centre: Tensor, size: int) -> Tensor:
    """Digits [n, 1, h, w] on empty canvases [n, 1, size, size]; side [n] and centre [n, 2] for canvases [-1, 1]^2."""
    theta = torch.zeros(len(digits), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / side
    theta[:, :, 2] = -centre / side[:, None]
    grid = F.affine_grid(theta.to(digits), [len(digits), 1, size, size], align_corners=False)
    return F.grid_sample(digits, grid, align_corners=False)
