"""Training: resume, checkpoints that are whole or absent, pictures, bad losses."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from aeup.data import DataError
from aeup.models import VAE
from aeup.train import (
    CheckpointError,
    Interrupted,
    TrainConfig,
    TrainingError,
    checkpoint,
    load_model,
    loop,
    make_config,
    train,
)
from aeup.train.checkpoint import load_state, save_model, save_state
from aeup.train.distributed import World
from aeup.train.events import EventFile
from aeup.train.pictures import grid, stacked
from aeup.train.step import Step

OPTIONS = dict(channels=(6, 4, 4), hidden=8, latent_dim=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def silent(**more):
    return Console(file=io.StringIO(), **more)


@pytest.fixture
def config(tmp_path):
    shapes = np.random.default_rng(0).random((50, 8, 12)) * (np.arange(12) > 4)
    np.savez(tmp_path / "data.npz", images=shapes)
    return TrainConfig(
        data=str(tmp_path / "data.npz"), epochs=4, batch_size=12, warmup=3, options=OPTIONS, tensorboard=False
    )


def losses(rows):
    return [(row["epoch"], row["step"], row["lr"], row["train"], row["validation"]) for row in rows]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def stop_at(monkeypatch, call, error):
    """The model's loss raises at its n-th call in training."""
    real, count = VAE.loss, [0]

    def loss(self, x, *rest):
        count[0] += self.training
        if count[0] == call:
            raise error
        return real(self, x, *rest)

    monkeypatch.setattr(VAE, "loss", loss)


@pytest.mark.parametrize("name", ["vae", "ae"])
def test_training_lowers_the_loss_and_leaves_its_files(tmp_path, config, name):
    config.model = name
    rows = train(config, tmp_path / "run", console=silent())
    objective = "negative_elbo" if name == "vae" else "reconstruction"
    assert rows[-1]["validation"][objective] < rows[0]["validation"][objective]
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"]["image_size"] == [8, 12] and stored["train"]["batch_size"] == 12
    files = {p.name for p in (tmp_path / "run").iterdir()}
    pictures = {"reconstructions.png", "losses.png"} | ({"samples.png"} if name == "vae" else set())
    kept = {"last.pt", "last.safetensors", "best.pt", "best.safetensors", "config.json", "metrics.jsonl"}
    assert files == kept | pictures
    for picture in pictures:
        with Image.open(tmp_path / "run" / picture) as image:
            assert image.mode == ("RGBA" if picture == "losses.png" else "L") and len(np.unique(np.asarray(image))) > 2


def test_the_seed_decides_the_losses_and_the_caller_keeps_its_random_state(tmp_path, config):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train(config, tmp_path / "a", console=silent())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    again = train(config, tmp_path / "b", console=silent())
    config.seed = 1
    other = train(config, tmp_path / "c", console=silent())
    assert losses(first) == losses(again) != losses(other)


@pytest.mark.parametrize(
    "extra", [{}, {"channels_last": True}, {"bf16": True}, {"ema": 0.9, "clip": 1.0, "schedule": "constant"}]
)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, config, monkeypatch, extra):
    for key, value in extra.items():
        setattr(config, key, value)
    whole = train(config, tmp_path / "whole", console=silent())
    with monkeypatch.context() as patch:
        stop_at(patch, 2 * 4 + 3, KeyboardInterrupt())  # in the third epoch of four batches each
        with pytest.raises(Interrupted, match="stopped in epoch 3; .*last.pt holds epoch 2") as stopped:
            train(config, tmp_path / "run", console=silent())
    assert stopped.value.signum == signal.SIGINT
    assert load_state(tmp_path / "run" / "last.pt")["epoch"] == 2
    rows = train(out=tmp_path / "run", resume=True, console=silent())
    assert losses(rows) == losses(whole)
    a, b = (load_state(tmp_path / run / "last.pt") for run in ("whole", "run"))
    assert all(same(a[key], b[key]) for key in ("weights", "average", "optimizers", "random", "best", "step"))
    a, b = (load_model(tmp_path / run / "best.safetensors") for run in ("whole", "run"))
    assert same(dict(a.state_dict()), dict(b.state_dict()))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_interrupted_before_the_first_epoch_ends(tmp_path, config, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted, match="stopped in epoch 1"):
            train(config, tmp_path / "run", console=silent())
    whole = train(config, tmp_path / "whole", console=silent())
    assert losses(train(out=tmp_path / "run", resume=True, console=silent())) == losses(whole)


@pytest.mark.parametrize("sent", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_a_signal_waits_for_the_end_of_the_step_and_a_second_one_does_not(tmp_path, config, monkeypatch, capfd, sent):
    handled, ended, real = (signal.SIGINT, signal.SIGTERM), [], Step.__call__
    before = [signal.getsignal(s) for s in handled]

    def step(self, *args):
        for signum in sent:
            signal.raise_signal(signum)
        ended.append(real(self, *args))
        return ended[-1]

    monkeypatch.setattr(Step, "__call__", step)
    with pytest.raises(Interrupted, match="stopped in epoch 1") as stopped:
        train(config, tmp_path / "run", console=silent())
    assert stopped.value.signum == sent[-1] and len(ended) == 2 - len(sent)
    assert [signal.getsignal(s) for s in handled] == before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_resume_to_more_epochs_and_not_to_fewer(tmp_path, config):
    train(config, tmp_path / "run", console=silent())
    assert len(train(out=tmp_path / "run", resume=True, console=silent())) == 4
    assert len(train(out=tmp_path / "run", resume=True, epochs=5, console=silent())) == 5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["epochs"] == 5
    with pytest.raises(ValueError, match="epochs=2, but .* already has 5"):
        train(out=tmp_path / "run", resume=True, epochs=2, console=silent())


def test_steps_cut_the_last_epoch_and_resume_in_the_middle_of_it(tmp_path, config):
    """Nine epochs' worth of schedule in both; one run stops within its second epoch."""
    config.schedule = "constant"
    config.steps = 9
    whole = train(config, tmp_path / "whole", console=silent())
    assert [(row["epoch"], row["step"]) for row in whole] == [(1, 4), (2, 8), (3, 9)]
    config.steps = 6
    assert [row["step"] for row in train(config, tmp_path / "run", console=silent())] == [4, 6]
    rows = train(out=tmp_path / "run", resume=True, steps=9, console=silent())
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 4), (2, 6), (2, 8), (3, 9)]
    a, b = (load_state(tmp_path / run / "last.pt") for run in ("whole", "run"))
    assert all(same(a[key], b[key]) for key in ("weights", "optimizers", "random", "step"))
    with pytest.raises(ValueError, match="steps=5, but .* already has 9"):
        train(out=tmp_path / "run", resume=True, steps=5, console=silent())
    with pytest.raises(ValueError, match="with resume only .*epochs.* can be given, got lr"):
        train(out=tmp_path / "run", resume=True, lr=1.0, console=silent())


def test_averaged_weights_are_validated_and_saved_for_use(tmp_path, config):
    config.ema, config.epochs = 0.8, 2
    seen = []
    real = Step._update

    def update(self, slot):
        losses = real(self, slot)
        seen.append({k: v.clone() for k, v in self.model.named_parameters()})
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "_update", update)
        rows = train(config, tmp_path / "run", console=silent())
    state = load_state(tmp_path / "run" / "last.pt")
    torch.manual_seed(config.seed)
    mean = dict(VAE(VAE.Config(image_size=(8, 12), **OPTIONS)).named_parameters())  # the first weights
    for weights in seen:
        mean = {k: 0.8 * mean[k] + 0.2 * weights[k] for k in mean}
    for key, value in mean.items():
        torch.testing.assert_close(state["average"][key], value.detach(), rtol=1e-5, atol=1e-6)
    model = load_model(tmp_path / "run" / "last.safetensors")
    assert same(dict(model.state_dict()), dict(state["average"]))
    assert not same(dict(state["weights"]), dict(state["average"]))
    config.ema = None
    assert train(config, tmp_path / "plain", console=silent())[-1]["train"] == rows[-1]["train"]


def test_clipping_bounds_the_gradient_of_a_step(tmp_path, config):
    config.clip, config.epochs = 1e-3, 1
    norms = []
    real = torch.optim.Adam.step

    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        train(config, tmp_path / "run", console=silent())
    assert len(norms) == 4 and max(norms) <= 1e-3 * 1.001


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_beyond_the_memory_gives_the_same_losses(tmp_path, config, workers):
    (tmp_path / "pictures").mkdir()
    for i, array in enumerate((np.random.default_rng(0).random((20, 8, 12)) * 255).astype(np.uint8)):
        Image.fromarray(array).save(tmp_path / "pictures" / f"{i:02}.png")
    config.data, config.image_size, config.epochs = str(tmp_path / "pictures"), (10, 12), 2
    held = train(config, tmp_path / "held", console=silent())
    config.memory, config.workers = 0.0, workers
    loaded = train(config, tmp_path / "loaded", console=silent())
    assert losses(held) == losses(loaded)
    assert load_model(tmp_path / "loaded" / "best.safetensors").config.image_size == (10, 12)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_after_the_start_is_named(tmp_path, config, monkeypatch, workers):
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        Image.new("L", (12, 8), i).save(tmp_path / "pictures" / f"{i:02}.png")
    path = tmp_path / "pictures" / "07.png"
    path.write_bytes(path.read_bytes()[:-20])  # its header is whole
    config.data, config.memory, config.workers = str(tmp_path / "pictures"), 0.0, workers
    config.seed = 1
    with pytest.raises(DataError, match="^[^\n]*07.png: not a readable image[^\n]*$"):
        train(config, tmp_path / "run", console=silent())


LOADER_KILLED = """
import multiprocessing, sys
from aeup.cli import main
from aeup.models import VAE
real = VAE.loss
def loss(self, *args):
    for process in multiprocessing.active_children():
        process.kill()
    return real(self, *args)
VAE.loss = loss
main(sys.argv[1:])
"""


def test_a_killed_loader_is_named(tmp_path):
    """In a process of its own: a signal handler of torch raises there for as long as the loader lives."""
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        Image.new("L", (12, 8), i).save(tmp_path / "pictures" / f"{i:02}.png")
    args = ["train", "vae", "--data", tmp_path / "pictures", "--memory", 0, "--workers", 1, "--epochs", 100]
    args += ["--threads", 1, "--out", tmp_path / "run"]
    command = [sys.executable, "-c", LOADER_KILLED, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"a process that loads images ended .*last\.pt holds epoch \d+$", done.stderr, re.M), done.stderr


def test_batch_norm_and_one_image(tmp_path, config):
    """Left over, it is left out; alone, on maps of one pixel, it is refused. Without batch norm it is trained on."""
    np.savez(config.data, images=np.random.default_rng(0).random((21, 4, 4)))
    config.batch_size, config.epochs = 8, 1
    assert train(config, tmp_path / "two", console=silent())[0]["step"] == 2  # of 17 images
    config.batch_size = 1
    with pytest.raises(TrainingError, match="a norm has one value a channel .*last.pt holds epoch 0"):
        train(config, tmp_path / "one", console=silent())
    config.batch_size, config.options = 8, {**OPTIONS, "norm": None}
    assert train(config, tmp_path / "three", console=silent())[0]["step"] == 3


def test_event_files_hold_scalars_and_images(tmp_path, config):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config.tensorboard, config.epochs = True, 2
    rows = train(config, tmp_path / "run", console=silent())
    read = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    scalars = read.Scalars("validation/negative_elbo")
    assert [(e.step, e.value) for e in scalars] == [
        (row["step"], pytest.approx(row["validation"]["negative_elbo"], rel=1e-6)) for row in rows
    ]
    assert {"train/kl", "rate/lr", "rate/images per second"} <= set(read.Tags()["scalars"])
    assert {"reconstructions", "samples"} <= set(read.Tags()["images"])
    picture = read.Images("samples")[-1]
    assert picture.encoded_image_string == (tmp_path / "run" / "samples.png").read_bytes()
    assert (picture.width, picture.height) == Image.open(tmp_path / "run" / "samples.png").size
    assert not [t for t in threading.enumerate() if t.daemon and "event" in type(t).__name__.lower()]
    # What a stopped run wrote after the step from which it goes on is forgotten.
    EventFile(tmp_path / "run" / "tensorboard", purge=rows[0]["step"] + 1).close()
    read = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    assert [e.step for e in read.Reload().Scalars("train/kl")] == [rows[0]["step"]]


def test_an_event_file_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory: '.*events.out.tfevents"):
        EventFile(tmp_path / "file" / "tensorboard")
    if os.path.exists("/dev/full"):
        file = EventFile(tmp_path)
        with open("/dev/full", "wb") as full:
            file.file.close()
            file.file = file.writer._writer = full
            with pytest.raises(OSError, match="No space left on device: '.*events.out.tfevents"):
                file.add(1, {"loss": 1.0}, [])
            file.close()


def test_event_files_without_the_package_are_refused(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    config.tensorboard = True
    with pytest.raises(ValueError, match="event files need tensorboard .*--no-tensorboard"):
        train(config, tmp_path / "run", console=silent())
    assert not (tmp_path / "run").exists()


def test_two_players_each_with_an_optimizer(tmp_path, config):
    config = make_config("dcgan", data=config.data, image_size=(8, 8), epochs=2, batch_size=12, tensorboard=False,
                         options={"width": 4, "latent_dim": 5})  # fmt: skip
    assert (config.lr, config.betas) == (2e-4, (0.5, 0.999))
    rows = train(config, tmp_path / "whole", console=silent())
    assert {"discriminator", "generator"} <= rows[-1]["train"].keys() == rows[-1]["validation"].keys()
    config.epochs = 1
    config.schedule = "constant"
    train(config, tmp_path / "run", console=silent())
    state = load_state(tmp_path / "run" / "last.pt")
    assert list(state["optimizers"]) == ["discriminator", "generator"]
    assert state["optimizers"]["generator"]["state"][0]["step"] == len(rows) * 4 / 2
    assert same(state["weights"], load_state(tmp_path / "run" / "best.pt")["weights"])  # the last is the best
    config.epochs = 2
    whole = train(config, tmp_path / "constant", console=silent())
    assert losses(train(out=tmp_path / "run", resume=True, epochs=2, console=silent())) == losses(whole)


def test_a_segmentation_model_trains_on_scenes_and_refuses_plain_images(tmp_path, config, monkeypatch):
    monkeypatch.setattr("aeup.data.SCENES", 40)
    small = dict(epochs=1, tensorboard=False, options={"channels": (2, 2, 3, 3, 4)})
    rows = train(make_config("fcn", image_size=(32, 32), **small), tmp_path / "run", console=silent())
    assert {"cross_entropy", "mean_iu", "pixel_accuracy"} <= rows[0]["validation"].keys()
    assert (tmp_path / "run" / "segmentation.png").exists()
    with pytest.raises(ValueError, match="fcn needs images with a class for each pixel"):
        train(make_config("fcn", data=config.data, **small), tmp_path / "no", console=silent())
    assert not (tmp_path / "no").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, config, monkeypatch):
    real, count = os.fsync, [0]

    def fsync(file):
        count[0] += 1
        if count[0] > 20:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            train(config, tmp_path / "run", console=silent())
    assert not list((tmp_path / "run").glob(".*"))
    assert 1 <= load_state(tmp_path / "run" / "last.pt")["epoch"] < 4
    load_model(tmp_path / "run" / "last.safetensors")
    whole = train(config, tmp_path / "whole", console=silent())
    assert losses(train(out=tmp_path / "run", resume=True, console=silent())) == losses(whole)


def test_sigterm_stops_a_real_process_with_a_whole_checkpoint(tmp_path, config):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "aeup", "train", "vae", "--data", config.data, "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--out", str(run), "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (run / "samples.png").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "continue with: aeup train vae --resume" in err and "Traceback" not in err
    assert load_state(run / "last.pt")["epoch"] >= 1
    assert load_model(run / "last.safetensors").config.image_size == (8, 12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step(tmp_path, config, monkeypatch, bad):
    real, count = VAE.loss, [0]

    def loss(self, x, *rest):
        count[0] += self.training
        parts = real(self, x, *rest)
        if count[0] == 7:
            parts["kl"] = parts["kl"] * bad
        return parts

    monkeypatch.setattr(VAE, "loss", loss)
    with pytest.raises(
        TrainingError, match="step 7, training images .*KL (nan|inf).* is not finite; .*last.pt holds epoch 1"
    ):
        train(config, tmp_path / "run", console=silent())
    assert all(v.isfinite().all() for v in load_state(tmp_path / "run" / "last.pt")["weights"].values())
    about = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert about["step"] == 7 and sorted(about["losses"]) == sorted(["reconstruction", "kl", "negative_elbo", "loss"])
    run = loop.Run(config, tmp_path / "other", None, World(torch.device("cpu")), silent())
    assert about["indices"] == run._order(1)[24:36].tolist()


def test_a_bad_step_between_looks_is_still_the_one_named(tmp_path, config, monkeypatch):
    """As on a GPU, where the losses are looked at every few steps only."""
    monkeypatch.setattr(loop, "CHECK_EVERY", {"cpu": 3})
    config.epochs, config.lr = 1, 1.0
    real, count = VAE.loss, [0]

    def loss(self, x, *rest):
        count[0] += self.training
        parts = real(self, x, *rest)
        return {k: v + (float("nan") if count[0] == 2 else 0.0) for k, v in parts.items()}

    monkeypatch.setattr(VAE, "loss", loss)
    with pytest.raises(TrainingError, match="step 2, training images"):
        train(config, tmp_path / "run", console=silent())


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, config):
    with pytest.raises(FileExistsError, match="is not empty: choose another folder$"):
        train(config, tmp_path, console=silent())
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_changed_data_is_noticed(tmp_path, config):
    train(config, tmp_path / "run", console=silent())
    np.savez(config.data, images=np.zeros((40, 8, 12)))
    with pytest.raises(TrainingError, match="data.npz: training images .*the data changed"):
        train(out=tmp_path / "run", resume=True, epochs=5, console=silent())


def test_a_state_of_other_weights_is_refused(tmp_path, config):
    config.epochs = 1
    train(config, tmp_path / "run", console=silent())
    state = load_state(tmp_path / "run" / "last.pt")
    state["weights"].pop("encoder.output.bias")
    save_state(tmp_path / "run" / "last.pt", state)
    with pytest.raises(CheckpointError, match="last.pt: the state does not fit .*encoder.output.bias"):
        train(out=tmp_path / "run", resume=True, epochs=2, console=silent())


def test_the_progress_bar_shows_rate_and_losses(tmp_path, config):
    console = silent(force_terminal=True, width=160)
    train(config, tmp_path / "run", console=console)
    text = console.file.getvalue()
    assert "epoch 4/4" in text and "images/s" in text
    assert "reconstruction" in text and "KL" in text and "-ELBO" in text


def test_the_readme_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/vae-20260101-120000").mkdir(parents=True)
    save_model(tmp_path / "runs/vae-20260101-120000/best.safetensors", VAE())
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["image"].shape == (4, 3, 28, 28) and names["images"].shape == (16, 1, 28, 28)


def test_grid_and_stacked_rows():
    x = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 3) / 3
    picture = grid(x, columns=2, zoom=1)
    assert picture.shape == (2 * 4 + 2, 2 * 5 + 2, 1) and picture.dtype == torch.uint8
    assert picture[2:4, 2:5].eq(0).all() and picture[6:8, 7:10].eq(255).all() and picture[0].eq(128).all()
    assert grid(x, columns=4).shape[1] == 4 * (3 * 18 + 2) + 2
    order = stacked(2, x, x + 10)[:, 0, 0, 0] * 3
    torch.testing.assert_close(order, torch.tensor([0.0, 1, 30, 31, 2, 3, 32, 33]))
