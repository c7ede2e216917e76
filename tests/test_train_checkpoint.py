"""Checkpoint files: whole or absent, and refused by name where they are damaged, foreign or newer."""

import zipfile
from pathlib import Path

import pytest
import torch

from aeup.models import VAE
from aeup.train import CheckpointError, checkpoint, load_model
from aeup.train.checkpoint import load_state, save_model, save_state, write_atomic


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, step, error):
    write_atomic(tmp_path / "x", b"old")

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, step, fail)
        with pytest.raises(type(error)):
            write_atomic(tmp_path / "x", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_a_read_only_folder_names_the_file(tmp_path, monkeypatch):
    def fail(*args, **more):
        raise OSError(30, "Read-only file system", "x.tmp")

    monkeypatch.setattr("builtins.open", fail), monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OSError, match="Read-only file system") as failed:
        write_atomic(tmp_path / "x", b"new")
    assert failed.value.filename == str(tmp_path / "x")


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = VAE(VAE.Config(image_size=(8, 8), channels=(6, 4, 4), hidden=8, latent_dim=3))
    save_model(tmp_path / "m.safetensors", model, epoch=3)
    weights = dict(model.state_dict())
    save_state(tmp_path / "m.pt", {"model": "vae", "epoch": 3, "weights": weights})
    return tmp_path, model


def test_model_file_round_trip(saved):
    folder, model = saved
    again = load_model(folder / "m.safetensors")
    assert not again.training and again.config == model.config
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.load(folder / "m.pt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_files_are_named(saved, keep):
    folder, _ = saved
    for name, read in (("m.safetensors", load_model), ("m.pt", load_state)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=f"{name}: not a "):
            read(folder / name)


def test_a_flipped_bit_is_noticed(saved):
    folder, _ = saved
    data = bytearray((folder / "m.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "m.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="m.safetensors: damaged: the weights do not match"):
        load_model(folder / "m.safetensors")
    with zipfile.ZipFile(folder / "m.pt") as archive:
        biggest = max(archive.infolist(), key=lambda i: i.file_size)
    data = bytearray((folder / "m.pt").read_bytes())
    data[biggest.header_offset + biggest.compress_size] ^= 1
    (folder / "m.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="m.pt: damaged: .*checksum"):
        load_state(folder / "m.pt")


@pytest.mark.parametrize(
    "before, after", [(b': \\"vae', b', \\"vae'), (b"config", b"bonfig"), (b"latent_dim", b"latent_dam")]
)
def test_damaged_metadata_is_named(saved, before, after):
    folder, _ = saved
    data = (folder / "m.safetensors").read_bytes()
    assert before in data
    (folder / "m.safetensors").write_bytes(data.replace(before, after))
    with pytest.raises(CheckpointError, match="m.safetensors: (damaged: its metadata|its configuration does not fit)"):
        load_model(folder / "m.safetensors")


def test_foreign_and_newer_checkpoints(saved, monkeypatch):
    import safetensors.torch

    folder, model = saved
    safetensors.torch.save_file({"w": torch.zeros(2)}, folder / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="foreign.safetensors: .*not an aeup checkpoint"):
        load_model(folder / "foreign.safetensors")
    torch.save({"w": torch.zeros(2)}, folder / "foreign.pt")
    with pytest.raises(CheckpointError, match="foreign.pt: .*not an aeup checkpoint"):
        load_state(folder / "foreign.pt")
    with pytest.raises(CheckpointError, match="absent.pt: cannot be read"):
        load_state(folder / "absent.pt")
    with pytest.raises(CheckpointError, match="absent.safetensors: not a readable"):
        load_model(folder / "absent.safetensors")
    for name, read in (("m.safetensors", load_model), ("m.pt", load_state)):
        kind = "MODEL_FORMAT" if read is load_model else "STATE_FORMAT"
        now = getattr(checkpoint, kind)
        monkeypatch.setattr(checkpoint, kind, 99)
        with pytest.raises(CheckpointError, match=f"{name}: checkpoint format {now}, this aeup reads 99$"):
            read(folder / name)
        monkeypatch.setattr(checkpoint, kind, 0)
        with pytest.raises(CheckpointError, match=f"{name}: .* reads 0; it is newer than this aeup"):
            read(folder / name)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "MODELS", {})
    with pytest.raises(CheckpointError, match="unknown model 'vae'"):
        load_state(folder / "m.pt")
