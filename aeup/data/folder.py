"""A folder of images: checked when it is opened, decoded when it is read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aeup.data.error import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MODES = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class Folder:
    """Every image below a folder, in order of path; one size and one mode (L or RGB) for all.

    ``shape`` is (N, C, H, W). ``folder[i]`` decodes one image: uint8 [C, H, W].
    """

    paths: list[Path]
    mode: str
    size: tuple[int, int]  # height, width

    @classmethod
    def open(cls, folder: Path) -> Folder:
        """Reads the header of every image. Raises `DataError` for an empty folder, mixed sizes or modes."""
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not paths:
            raise DataError(f"{folder}: no images in this folder (looked for {', '.join(SUFFIXES)})")
        first = None
        for path in paths:
            with _opened(path) as image:
                mode, h, w = image.mode, image.height, image.width
            if mode not in MODES:
                raise DataError(f"{path}: mode {mode}, allowed are {', '.join(MODES)}: convert the image")
            first = first or (mode, h, w)
            if (mode, h, w) != first:
                raise DataError(
                    f"{path}: {h}x{w} {mode}, but {paths[0]} is {first[1]}x{first[2]} {first[0]}; "
                    "all images must have one size and mode"
                )
        return cls(paths, first[0], first[1:])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), MODES[self.mode], *self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        path = self.paths[i]
        with _opened(path) as image:
            array = np.array(image)
            same = image.mode == self.mode and array.shape[:2] == self.size
        if not same:
            raise DataError(f"{path}: changed since the folder was opened")
        return torch.from_numpy(array.reshape(*self.size, MODES[self.mode])).permute(2, 0, 1).contiguous()

    def take(self, index: np.ndarray | torch.Tensor) -> Folder:
        """The folder with these images only, in this order."""
        return dataclasses.replace(self, paths=[self.paths[i] for i in index.tolist()])

    def read(self) -> np.ndarray:
        """All images: uint8 [N, C, H, W]."""
        out = np.empty(self.shape, np.uint8)
        for i in range(len(self)):
            out[i] = self[i].numpy()
        return out


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image in a file, for Pillow to decode inside."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Exception as e:  # Pillow has many kinds for damaged files
        raise DataError(f"{path}: not a readable image ({e})") from e
