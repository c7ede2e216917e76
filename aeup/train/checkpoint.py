"""Checkpoints: every file is whole or absent.

A checkpoint NAME ("last" or "best") is two files:

- ``NAME.safetensors``: the model's weights; the model's name and configuration in the metadata. For use.
  The averaged weights where the run averages them.
- ``NAME.pt``: weights, their average, the optimizers of all players, random states, step, history and configuration,
  readable with ``torch.load(weights_only=True)``. For ``--resume``. It repeats the weights on purpose: a run that is
  killed between the two writes still leaves one file from which it can go on exactly.

Each kind has its own format number, which rises when an older aeup could no longer read the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from aeup.models import MODELS

MODEL_FORMAT = 1  # of .safetensors
STATE_FORMAT = 2  # of .pt; 1 held one optimizer and counted epochs only


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message names the file and what is wrong with it."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary file in the same folder, flush it to the disk, then rename it over ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):  # not there, or not to be changed
            temporary.unlink()
        if isinstance(e, OSError):
            raise OSError(e.errno, e.strerror, str(path)) from e  # a write's error does not name the file
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes: safetensors files have no checksum of their own."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save_model(path: Path, model: nn.Module, **extra: Any) -> None:
    """Weights as safetensors; model name, configuration and ``extra`` (JSON values) in the metadata."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    about = {"format": MODEL_FORMAT, "model": model.name, "config": dataclasses.asdict(model.config), **extra}
    metadata = {"aeup": json.dumps(about), "sha256": digest(tensors)}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a ``.safetensors`` file that `save_model` wrote, in evaluation mode.

    Raises:
        CheckpointError: missing, damaged, or of another program, model or format.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({e})") from e
    if "aeup" not in metadata or "sha256" not in metadata:
        raise CheckpointError(f"{path}: safetensors file, but not an aeup checkpoint (no aeup entry in its metadata)")
    try:
        about = json.loads(metadata["aeup"])
    except ValueError as e:
        raise CheckpointError(f"{path}: damaged: its metadata is not JSON ({e})") from e
    _check(path, about, MODEL_FORMAT)
    if digest(tensors) != metadata["sha256"]:
        raise CheckpointError(f"{path}: damaged: the weights do not match their checksum")
    try:
        model = build_model(about["model"], about["config"])
    except (KeyError, TypeError, ValueError) as e:
        fault = f"its configuration does not fit the {about['model']} model"
        raise CheckpointError(f"{path}: {fault} ({type(e).__name__}: {e})") from e
    _load_weights(path, model, tensors)
    return model.to(device).eval()


def build_model(name: str, config: dict[str, Any]) -> nn.Module:
    """A model from its name and configuration; lists become the tuples that the dataclass wants."""
    model = MODELS[name]
    return model(model.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))


def save_state(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"format": STATE_FORMAT, **state}, buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: str | Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU. Raises `CheckpointError`."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()  # torch.load itself does not compare checksums
        if damaged is not None:
            raise CheckpointError(f"{path}: damaged: {damaged} does not match its checksum")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as e:
        raise CheckpointError(f"{path}: not a whole checkpoint ({one_line(e)})") from e
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointError(f"{path}: a torch file, but not an aeup checkpoint")
    _check(path, state, STATE_FORMAT)
    return state


def load_last(run: Path) -> dict[str, Any]:
    """The state from which the run in a folder goes on. Raises `CheckpointError`."""
    try:
        return load_state(run / "last.pt")
    except CheckpointError as e:
        try:
            epoch = load_state(run / "best.pt")["epoch"]
        except CheckpointError:
            raise e from None
        raise CheckpointError(f"{e}; copy {run / 'best.pt'} over it to go on from epoch {epoch}") from e


def _check(path: Path, about: dict[str, Any], reads: int) -> None:
    found = about.get("format")
    if found != reads:
        newer = isinstance(found, int) and found > reads
        hint = "; it is newer than this aeup" if newer else ""
        raise CheckpointError(f"{path}: checkpoint format {found!r}, this aeup reads {reads}{hint}")
    if about.get("model") not in MODELS:
        raise CheckpointError(f"{path}: unknown model {about.get('model')!r}, this aeup knows {sorted(MODELS)}")


def _load_weights(path: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise CheckpointError(f"{path}: the weights do not fit the {model.name} model ({one_line(e)})") from e


def one_line(e: BaseException) -> str:
    """Its text, without the frames of C++ that torch adds to some."""
    return " ".join(str(e).split("\nException raised from ")[0].split()) or type(e).__name__
