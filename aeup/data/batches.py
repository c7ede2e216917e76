"""Images by index, batch after batch, on the device: gathered there, or loaded from a folder by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from aeup.data.error import DataError
from aeup.data.folder import Folder
from aeup.functional import interpolate

Batch = tuple[torch.Tensor, torch.Tensor | None]


class Batches:
    """The images of one part of a data set.

    Args:
        images: float [N, C, H, W] in [0, 1] on ``device``, or a folder.
        target: int64 [N, ...] on ``device``, or None.
        size: height and width to which images of a folder are resampled.
        workers: processes that decode the images of a folder; 0: this one does.
    """

    def __init__(
        self,
        images: torch.Tensor | Folder,
        target: torch.Tensor | None,
        device: torch.device,
        size: tuple[int, int] | None = None,
        workers: int = 0,
    ) -> None:
        self.images, self.target, self.device, self.size = images, target, device, size
        c, h, w = images.shape[1:]
        self.image_shape = (c, *(size or (h, w)))
        self.order: list[list[int]] = []  # what the loader's workers are given
        self.loader = None
        if isinstance(images, Folder):
            self.loader = DataLoader(
                _Caught(images),
                batch_sampler=_Order(self.order),
                num_workers=workers,
                collate_fn=_collate,
                pin_memory=device.type == "cuda",
                persistent_workers=workers > 0,
                generator=torch.Generator(),  # its own: the loader's seeds take nothing from the training's noise
            )

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, indices: Sequence[torch.Tensor]) -> Iterator[Batch]:
        """For each tensor of indices (int64, on the CPU): float [n, C, H, W] in [0, 1] and the target."""
        if not len(indices):
            return
        held = torch.cat(list(indices)).to(self.device).split([len(i) for i in indices])
        if self.loader is None:
            images = (self.images[i] for i in held)
        else:
            self.order[:] = [i.tolist() for i in indices]
            images = map(self._ready, self.loader)
        for x, i in zip(images, held, strict=True):
            yield x, None if self.target is None else self.target[i]

    def head(self, n: int) -> Batch:
        """The first ``n`` images and targets."""
        return next(self([torch.arange(min(n, len(self)))]))

    def _ready(self, images: torch.Tensor | DataError) -> torch.Tensor:
        if isinstance(images, DataError):
            raise images
        return resample(images.to(self.device, non_blocking=True).float() / 255, self.size)


def resample(images: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """[N, C, H, W] in [0, 1] to another height and width, bilinear, smoothed where it shrinks."""
    if size is None or tuple(images.shape[2:]) == tuple(size):
        return images
    return interpolate(images, size=tuple(size), mode="bilinear", antialias=True).clamp(0, 1)


class _Order:
    """A batch sampler over a list that is refilled before each pass, so that the workers live on."""

    def __init__(self, order: list[list[int]]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(self.order))

    def __len__(self) -> int:
        return len(self.order)


class _Caught:
    """A bad image comes back as its error: an exception would lose its text on the way out of a worker."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> torch.Tensor | DataError:
        try:
            return self.folder[i]
        except DataError as e:
            return e


def _collate(items: list[torch.Tensor | DataError]) -> torch.Tensor | DataError:
    return next((i for i in items if isinstance(i, DataError)), None) or torch.stack(items)
