"""PNG grids."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from aeup.functional import interpolate
from aeup.train.checkpoint import write_atomic

GAP = 2


def grid(images: torch.Tensor, columns: int, zoom: int | None = None) -> torch.Tensor:
    """[N, C, H, W] in [0, 1] -> one uint8 image [H', W', C], row by row, on a mid-grey ground.

    Small images are enlarged by a whole factor (``zoom``, by default the one that brings them to about 56 pixels).
    """
    images = images.detach().float().clamp(0, 1).cpu()
    n, c, h, w = images.shape
    zoom = max(1, 56 // max(h, w)) if zoom is None else zoom
    if zoom > 1:
        images = interpolate(images, scale_factor=zoom, mode="nearest")
        h, w = h * zoom, w * zoom
    rows = -(-n // columns)
    canvas = torch.full((c, rows * (h + GAP) + GAP, columns * (w + GAP) + GAP), 0.5)
    for i, image in enumerate(images):
        y, x = GAP + i // columns * (h + GAP), GAP + i % columns * (w + GAP)
        canvas[:, y : y + h, x : x + w] = image
    return (canvas * 255).round().to(torch.uint8).permute(1, 2, 0)


def save_png(path: Path, image: torch.Tensor) -> None:
    """uint8 [H, W, C] with C = 1 or 3 -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(2).numpy()).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


def pairs(originals: torch.Tensor, reconstructions: torch.Tensor, columns: int) -> torch.Tensor:
    """Interleave rows of originals with the rows of their reconstructions below them: [2N, C, H, W]."""
    rows = zip(originals.split(columns), reconstructions.to(originals).split(columns), strict=True)
    return torch.cat([part for pair in rows for part in pair])
