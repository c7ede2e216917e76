"""Pictures of a model at work, as PNG files: grids of images, and curves drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from aeup.functional import interpolate
from aeup.train.checkpoint import write_atomic
from aeup.train.progress import title

GAP = 2
# Of the classes of a segmentation and of a scatter; class 0 of a segmentation, the background, is not coloured.
# Ten colours that differ in hue and lightness (Tableau 10, which people without full colour vision can tell apart).
COLOURS = torch.tensor(
    [[78, 121, 167], [242, 142, 43], [225, 87, 89], [118, 183, 178], [89, 161, 79], [237, 201, 72], [176, 122, 161],
     [255, 157, 167], [156, 117, 95], [186, 176, 172]]
) / 255  # fmt: skip


def grid(images: Tensor, columns: int, zoom: int | None = None) -> Tensor:
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


def png(image: Tensor) -> bytes:
    """uint8 [H, W, C] with C = 1 or 3 -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(2).numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: Path, image: Tensor) -> None:
    """uint8 [H, W, C] with C = 1 or 3 -> a PNG file, whole or not at all."""
    write_atomic(path, png(image))


def stacked(columns: int, *rows: Tensor) -> Tensor:
    """Images for `grid`: a row of `columns` images of each [N, C, H, W], one below the other, then the next ones.

    Places that stay empty are grey as the ground is. Returns [len(rows) * ceil(N / columns) * columns, C, H, W].
    """
    empty = rows[0].new_full((-len(rows[0]) % columns, *rows[0].shape[1:]), 0.5)
    parts = [torch.cat([row.to(rows[0]), empty]).split(columns) for row in rows]
    return torch.cat([part for group in zip(*parts, strict=True) for part in group])


def overlay(images: Tensor, labels: Tensor, opacity: float = 0.8) -> Tensor:
    """Images [N, 1 or 3, H, W] in [0, 1] tinted by their labels, int64 [N, H, W]: RGB [N, 3, H, W].

    Class 0 is left as it is; class k > 0 gets colour (k - 1) mod 10 of `COLOURS`.
    """
    rgb = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    labels = labels.cpu()
    colour = COLOURS[(labels - 1) % len(COLOURS)].permute(0, 3, 1, 2)
    return torch.where((labels > 0)[:, None], rgb * (1 - opacity) + colour * opacity, rgb)


@torch.no_grad()
def draw(model: nn.Module, images: Tensor, targets: Tensor | None = None, seed: int = 0) -> dict[str, Tensor]:
    """The pictures that show what a model can do: name -> uint8 image [H, W, C].

    - ``segmentation``: image, truth (if there are `targets`) and prediction below each other;
    - ``denoising``: clean, corrupted and denoised;
    - ``reconstructions``: originals and reconstructions;
    - ``samples``: 64 new images;
    - ``manifold``: of a model with a prior and two latent dimensions.

    The model is in evaluation mode meanwhile, and torch's random state is afterwards what it was.

    Args:
        model: see `aeup.models.base.Model`; the methods that it has decide what is drawn.
        images: [N, C, H, W] in [0, 1] on the model's device.
        targets: labels [N, H, W], int64, of a model with ``segment``.
        seed: of noise and samples.
    """
    from aeup.train.latent import latent_dim, manifold

    x = images
    most = 8 if max(x.shape[2:]) > 40 else 16
    columns = -(-len(x) // max(1, -(-len(x) // most)))  # of as few rows as needed, the fullest
    pictures = {}
    training = [m for m in model.modules() if m.training]
    with torch.random.fork_rng(devices=_gpus(x)):
        torch.manual_seed(seed)
        model.eval()
        try:
            if len(x) and hasattr(model, "segment"):
                truth = [overlay(x, targets)] if targets is not None else []
                rows = [x.float().cpu().expand(-1, 3, -1, -1), *truth, overlay(x, model.segment(x))]
                zoom = max(1, 128 // max(x.shape[2:]))  # thin things, told apart by their colour, need more pixels
                pictures["segmentation"] = grid(stacked(columns, *rows), columns, zoom)
            if len(x) and hasattr(model, "reconstruct"):
                pictures["reconstructions"] = grid(stacked(columns, x, model.reconstruct(x)), columns)
                if hasattr(model, "corrupt"):
                    noisy = model.corrupt(x)
                    pictures["denoising"] = grid(stacked(columns, x, noisy, model.reconstruct(noisy)), columns)
            if hasattr(model, "sample"):
                pictures["samples"] = grid(model.sample(64), 8)
                if latent_dim(model) == 2:
                    pictures["manifold"] = grid(manifold(model, 20), 20)
        finally:
            for m in training:
                m.training = True
    return pictures


def write_pictures(
    model: nn.Module, images: Tensor, targets: Tensor | None, out: str | Path, seed: int = 0
) -> list[Path]:
    """Writes what `draw` draws of the first 32 images to ``<name>.png`` in the folder `out`; returns the files. Each is
    whole or absent."""
    files = []
    for name, picture in draw(model, images[:32], None if targets is None else targets[:32], seed).items():
        files.append(Path(out) / f"{name}.png")
        save_png(files[-1], picture)
    return files


# --- curves ---


def figure_png(width: float, height: float, paint: Any) -> bytes:
    """``paint(figure)`` draws on a matplotlib figure of `width` x `height` inches; 100 pixels an inch.

    Without pyplot: the user's backend, open figures and settings stay as they are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    paint(figure)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def write_curves(history: Sequence[Mapping[str, Any]], out: str | Path) -> Path | None:
    """Losses against epochs to ``losses.png`` in the folder `out`: one panel an entry, training and validation.

    Args:
        history: one row an epoch, with "epoch" and the dicts "train" and "validation" (name -> value).
        out: the run's folder.

    Returns:
        The file, or None where the history is empty: nothing is written then.
    """
    names = list(dict.fromkeys(name for row in history for part in PARTS for name in row.get(part) or {}))
    if not names:
        return None

    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)

    def paint(figure: Any) -> None:
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, name in zip(axes.flat, names, strict=False):
            for part, style in PARTS.items():
                points = [(row["epoch"], row[part][name]) for row in history if name in (row.get(part) or {})]
                if points:
                    axis.plot(*zip(*points, strict=True), label=part, **style)
            axis.set_title(title(name), fontsize=11)
            axis.set_xlabel("epoch", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e6e6e6", lw=0.8)
            axis.set_axisbelow(True)
            _frame(axis)
        axes.flat[0].legend(frameon=False, fontsize=9)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)

    path = Path(out) / "losses.png"
    write_atomic(path, figure_png(4.6 * columns, 3.2 * rows, paint))
    return path


PARTS = {
    "train": {"color": "#b0b7c3", "lw": 1.6, "marker": ".", "ms": 5},
    "validation": {"color": "#4c72b0", "lw": 1.8, "marker": ".", "ms": 5},
}


def _frame(axis: Any) -> None:
    """The first epochs of a long run are far above the rest: leave out what is above twice the range of the rest."""
    values = [y for line in axis.lines for y in line.get_ydata()[max(1, len(line.get_ydata()) // 10) :]]
    every = [y for line in axis.lines for y in line.get_ydata()]
    values, every = ([v for v in part if math.isfinite(v)] for part in (values, every))
    if len(values) < 8:
        return
    low, high = min(values), max(values)
    if high > low and max(every) > low + 3 * (high - low):
        axis.set_ylim(min(every) - 0.1 * (high - low), low + 2 * (high - low))


def _gpus(x: Tensor) -> list[int]:
    return [x.device.index or 0] if x.device.type == "cuda" else []
