"""The latent space in pictures: scatter by class, the 2-D manifold, traversals, interpolations.

Each function gives images [N, C, H, W] in [0, 1] on the model's device, row by row for `aeup.train.pictures.grid`.
``model`` has ``encode`` and ``decode`` (see `aeup.models.base.Model`) and is in evaluation mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aeup.train.checkpoint import write_atomic
from aeup.train.pictures import COLOURS, figure_png

CHUNK = 512  # images at a time


def latent_dim(model: nn.Module) -> int | None:
    """Length of the latent vectors of a model with ``encode`` and ``decode``, else None."""
    return model.config.latent_dim if hasattr(model, "encode") and hasattr(model, "decode") else None


def need_latents(model: nn.Module) -> None:
    if latent_dim(model) is None:
        raise ValueError(f"the model {model.name!r} has no encoder to latent vectors")


@torch.no_grad()
def encode(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images [N, C, H, W] -> latents [N, D] (means, of a VAE) and log variances [N, D] or None."""
    need_latents(model)
    parts = [model.encode(part) for part in x.split(CHUNK)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts).float(), None
    return tuple(torch.cat(part).float() for part in zip(*parts, strict=True))


@torch.no_grad()
def decode(model: nn.Module, z: Tensor) -> Tensor:
    """Latents [N, D] -> images [N, C, H, W] in [0, 1]."""
    need_latents(model)
    like = next(model.parameters())
    return torch.cat([torch.sigmoid(model.decode(part)) for part in z.to(like).split(CHUNK)])


def manifold(model: nn.Module, steps: int = 20) -> Tensor:
    """A grid over a 2-D latent space [steps * steps, C, H, W]: Kingma & Welling, arXiv 1312.6114, figure 4.

    Points at (i + 1/2) / steps of the unit square go through the inverse of the Gaussian's cumulative distribution
    function, so that each image stands for the same share of the prior. The first latent grows to the right, the second
    upwards.

    Raises:
        ValueError: the latent space has not two dimensions.
    """
    if latent_dim(model) != 2:
        raise ValueError(
            f"the manifold needs 2 latent dimensions, this model {model.name!r} has {latent_dim(model) or 'none'}"
        )
    z = torch.special.ndtri((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)
    return decode(model, torch.cartesian_prod(z.flip(0), z).flip(1))


def traversals(
    model: nn.Module,
    z: Tensor,
    low: float | Tensor = -3.0,
    high: float | Tensor = 3.0,
    steps: int = 11,
    dimensions: list[int] | None = None,
) -> Tensor:
    """One row a dimension [len(dimensions) * steps, C, H, W]: that latent goes from `low` to `high`, the others stay.

    Args:
        z: the latent vector [D] to start from.
        low, high: numbers, or one for each dimension [D].
        steps: images in a row.
        dimensions: which, by default all.
    """
    dimensions = list(range(len(z))) if dimensions is None else dimensions
    low, high = (torch.as_tensor(v, dtype=torch.float32).cpu().expand(len(z)) for v in (low, high))
    t = torch.linspace(0, 1, steps)
    points = z.detach().float().cpu().repeat(len(dimensions), steps, 1)
    for row, d in enumerate(dimensions):
        points[row, :, d] = low[d] + t * (high[d] - low[d])
    return decode(model, points.flatten(0, 1))


def lerp(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """`steps` points [steps, D] on the line from `a` [D] to `b` [D], both ends included."""
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[:, None]
    return a + t * (b - a)


def slerp(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """`steps` points [steps, D] on the arc from `a` [D] to `b` [D]: T. White, Sampling Generative Networks, arXiv
    1609.04468, section 2.1. The points stay as far from the origin as the prior's mass is, where a line would pass near
    it. Where no single arc exists (a zero vector, or opposite directions) and where the arc is a line, this is `lerp`.
    """
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[:, None]
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny)
    omega = torch.acos(cosine.clamp(-1, 1))
    if omega.sin() < 1e-3 or not a.any() or not b.any():
        return lerp(a, b, steps)
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


def interpolations(model: nn.Module, first: Tensor, second: Tensor, steps: int = 12) -> Tensor:
    """Two rows [2 * (steps + 2), C, H, W] between two images [C, H, W]: linear above, spherical below; at the ends of
    each row the two images themselves."""
    z, _ = encode(model, torch.stack([first, second]))
    ends = (first[None], second[None])
    rows = [torch.cat([ends[0], decode(model, path(*z, steps)).to(first), ends[1]]) for path in (lerp, slerp)]
    return torch.cat(rows)


def project(latents: Tensor) -> tuple[Tensor, str]:
    """[N, D] -> [N, 2] and what its axes are: the latents themselves if D = 2, else the first two principal components
    (centred, in the latents' units), each turned so that its largest weight is positive; D = 1 gets a second axis 0."""
    latents = latents.detach().double().cpu()
    n, d = latents.shape
    if d == 1:
        return torch.cat([latents, torch.zeros_like(latents)], 1), "latent"
    if d == 2:
        return latents, "latent"
    centred = latents - latents.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :2]
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return centred @ (axes * sign), "principal component"


def write_scatter(path: str | Path, latents: Tensor, labels: Tensor | None = None) -> None:
    """A scatter of latents [N, D] (see `project`) as a PNG file, coloured by labels, int64 [N], where there are."""
    points, what = project(latents)

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        size = max(3.0, min(24.0, 24e3 / max(1, len(points))))
        if labels is None:
            axis.scatter(*points.T.numpy(), s=size, color="#4c72b0", alpha=0.6, lw=0)
        else:
            classes = labels.cpu().unique().tolist()
            for k, label in enumerate(classes):
                chosen = points[labels.cpu() == label]
                colour = COLOURS[k % len(COLOURS)].tolist()
                axis.scatter(*chosen.T.numpy(), s=size, color=colour, alpha=0.75, lw=0, label=str(label))
                if len(classes) <= 20:
                    x, y = chosen.median(0).values.tolist()
                    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour, "alpha": 0.85}
                    axis.text(x, y, str(label), ha="center", va="center", fontsize=10, bbox=box)
            if len(classes) <= 20:  # where labels cover each other
                figure.legend(loc="outside center right", frameon=False, fontsize=9, markerscale=2, title="class")
        axis.set_aspect("equal" if points[:, 1].any() else "auto")
        axis.set_xlabel(f"{what} 1", fontsize=10)
        axis.set_ylabel(f"{what} 2", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)

    write_atomic(Path(path), figure_png(7.5, 7, paint))
