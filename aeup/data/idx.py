"""The IDX format of the MNIST family (yann.lecun.com/exdb/mnist), plain or gzipped.

A file is: two zero bytes, a type byte, the number of dimensions, each size as a big-endian int32, then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from aeup.data.error import DataError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file. Raises `DataError`, naming the file, for anything that is not one whole IDX file."""
    path = Path(path)
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as e:
            raise DataError(f"{path}: damaged gzip file ({e})") from e
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in TYPES:
        raise DataError(f"{path}: not an IDX file (it starts with {data[:4].hex(' ') or 'nothing'})")
    dtype, ndim = np.dtype(TYPES[data[2]]), data[3]
    start = 4 + 4 * ndim
    if ndim == 0 or len(data) < start:
        raise DataError(f"{path}: IDX header is cut short ({ndim} dimensions, {len(data)} bytes)")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    want, have = math.prod(shape) * dtype.itemsize, len(data) - start
    if want != have:
        sizes = "x".join(map(str, shape))
        raise DataError(f"{path}: IDX header promises {sizes} values = {want} bytes, but {have} bytes follow it")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
