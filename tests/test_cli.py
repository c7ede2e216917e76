"""The command line: exit codes, messages, and the way through a run."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aeup import backend
from aeup.cli import main
from aeup.models import MODELS, VAE
from aeup.train import TrainConfig
from aeup.train.checkpoint import load_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).random((30, 8, 8)))
    return str(tmp_path / "data.npz")


def aeup(*args):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert "Traceback" not in result.output
    return result


def test_every_model_can_be_named_and_shows_its_options():
    help = " ".join(aeup("train", "--help").output.split())
    for name, model in MODELS.items():
        assert name in help and f"{name}: " in help
        for field in vars(model.Config()):
            assert f"{field}=" in help


def test_file_and_set_and_options(tmp_path, data):
    (tmp_path / "run.toml").write_text("[train]\nepochs = 1\nlr = 0.001\nbatch_size = 9\n[model]\nlatent_dim = 7\n")
    sets = ["--set", "hidden=16", "--set", "channels=4,3,2", "--set", "norm=none", "--set", "betas=0.8,0.9"]
    args = ["--config", tmp_path / "run.toml", "--data", data, *sets, "--lr", 0.002, "--latent", 2]
    result = aeup("train", "vae", *args, "--no-tensorboard", "--device", "cpu", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    state = load_state(tmp_path / "run" / "last.pt")
    train, model = state["train"], state["model_config"]
    assert (train["epochs"], train["lr"], train["batch_size"], train["betas"]) == (1, 0.002, 9, (0.8, 0.9))
    assert (model["latent_dim"], model["hidden"], model["channels"], model["norm"]) == (2, 16, (4, 3, 2), None)
    # The stored configuration makes the same run.
    again = ["--config", tmp_path / "run" / "config.json", "--device", "cpu", "--out", tmp_path / "again"]
    assert aeup("train", "vae", *again).exit_code == 0
    other = load_state(tmp_path / "again" / "last.pt")
    assert other["history"][0]["validation"] == state["history"][0]["validation"]
    assert {k: v for k, v in other["train"].items() if k != "options"} == {
        k: v for k, v in train.items() if k != "options"
    }


def test_train_and_resume(tmp_path, data):
    run = tmp_path / "run"
    options = ["--data", data, "--epochs", 2, "--batch-size", 8, "--latent", 3, "--upsample", "bilinear", "--seed", 4]
    result = aeup("train", "vae", *options, "--lr", 0.002, "--device", "cpu", "--out", run)
    assert result.exit_code == 0, result.output
    assert "epoch 2/2  train: -ELBO " in result.output and "\nvalidation: -ELBO " in result.output
    assert str(run) in result.output
    state = load_state(run / "last.pt")
    assert state["train"]["seed"] == 4 and state["train"]["lr"] == 0.002 and state["train"]["batch_size"] == 8
    assert state["model_config"]["latent_dim"] == 3 and state["model_config"]["upsample"] == "bilinear"
    assert state["train"]["bf16"] is False and state["train"]["channels_last"] is True
    result = aeup("train", "vae", "--resume", run, "--epochs", 3)
    assert result.exit_code == 0 and "epoch 3/3" in result.output and "epoch 2/3" not in result.output
    result = aeup("train", "vae", "--resume", run)
    assert result.exit_code == 0 and "nothing left to train after 9 steps" in result.output


def test_the_default_folder_is_named_after_the_model_and_the_time(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert aeup("train", "ae", "--data", data, "--epochs", 1).exit_code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("ae-20") and (run / "best.safetensors").exists()


@pytest.mark.parametrize(
    "args, says",
    [
        (["paint"], "No such command 'paint'"),
        (["train"], "Missing argument"),
        (["train", "gan"], "'gan' is not one of"),
        (["train", "vae", "--epochs", "0"], "--epochs"),
        (["train", "vae", "--lr", "-1"], "--lr"),
        (["train", "vae", "--upsample", "area"], "'area' is not one of"),
        (["train", "vae", "--device", "abacus"], "'abacus' is not a device"),
        (["train", "vae", "--device", "meta"], "allowed are cpu and cuda"),
        (["train", "vae", "--device", "cuda:99"], "CUDA devices"),
        (["train", "vae", "--resume", "run", "--seed", "1"], "cannot be combined with --seed"),
        (["train", "vae", "--resume", "run", "--set", "hidden=3"], "cannot be combined with --set"),
        (["train", "vae", "--epochs", "2", "--steps", "3"], "epochs or steps, not both: got epochs=2 and steps=3"),
        (["train", "vae", "--epochs", "2", "--set", "steps=3"], "epochs or steps, not both"),
        (["train", "vae", "--set", "hidden"], "--set wants KEY=VALUE, got 'hidden'"),
        (["train", "vae", "--set", "hiden=3"], "vae has no option 'hiden'; it has image_size, "),
        (["train", "vae", "--set", "hidden=many"], "hidden must be a whole number, got 'many'"),
        (["train", "vae", "--config", "absent.toml"], "absent.toml: cannot be read"),
        (["train", "dcgan", "--latent", "0"], "--latent"),
        (["train", "fcn", "--latent", "3"], "has no field 'latent_dim'; it has "),
        (["train", "vae", "--graph", "--device", "cpu"], "graph needs a CUDA device"),
        (["train", "vae", "--set", "image_size=9"], "image_size must be 2 whole numbers (such as 1,2) or none"),
        (["train", "vae", "--seed", str(2**63)], "seed must be at least 0 and below 2**63"),
        (["sample", "run", "--seed", str(2**63)], "--seed': must be below 2**63"),
        (["train", "fcn", "--set", "classes=3"], "classes=3 of the model allow labels below that"),
        (["train", "vae", "--set", f"latent_dim={10**30}", "--data", "{data}"], "Overflow when unpacking long long\n"),
        (["train", "vae", "--config", "{toml}", "--data", "{data}"], "image_size=(9, 9) of the model, but the images"),
        (["train", "vae", "--set", "in_channels=3", "--data", "{data}"], "in_channels=3 of the model, but the images"),
        (["train", "vae", "--memory", "-1"], "--memory"),
    ],
)
def test_wrong_usage_is_exit_code_2(tmp_path, data, args, says):
    (tmp_path / "run.toml").write_text("[model]\nimage_size = [9, 9]\n")
    result = aeup(*(a.format(toml=tmp_path / "run.toml", data=data) for a in args))
    assert result.exit_code == 2 and says in result.output


def test_failures_are_exit_code_1(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    for args, says in [
        (["--data", tmp_path / "nowhere"], "nowhere: no such file or folder"),
        (["--data", ""], "data is empty"),
        (["--data", data, "--set", f"latent_dim={10**12}"], "out of memory on cpu: try a lower --batch-size"),
        (["--data", data, "--out", tmp_path], "is not empty"),
        (["--resume", run], "last.pt: cannot be read"),
        (["--data", data, "--lr", "1e30", "--out", run], "is not finite"),
    ]:
        result = aeup("train", "vae", "--epochs", 3, *args)
        assert result.exit_code == 1, result.output
        assert says in result.output and result.output.startswith(("Error: ", "vae: "))
    assert not (tmp_path / "runs").exists()
    result = aeup("train", "ae", "--resume", run)
    assert result.exit_code == 2 and "holds a run of 'vae', not 'ae'" in result.output
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    result = aeup("train", "vae", "--resume", run)
    assert result.exit_code == 1 and "last.pt: not a whole checkpoint" in result.output and "copy" not in result.output
    assert aeup("train", "vae", "--data", data, "--epochs", 1, "--out", tmp_path / "other").exit_code == 0
    (tmp_path / "other" / "last.pt").unlink()
    result = aeup("train", "vae", "--resume", tmp_path / "other", "--epochs", 2)
    assert result.exit_code == 1 and "best.pt over it to go on from epoch 1" in result.output
    (tmp_path / "other" / "best.pt").rename(tmp_path / "other" / "last.pt")
    assert aeup("train", "vae", "--resume", tmp_path / "other", "--epochs", 2).exit_code == 0


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(tmp_path, data, monkeypatch):
    def loss(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(VAE, "loss", loss)
    result = aeup("train", "vae", "--data", data, "--out", tmp_path / "run")
    assert result.exit_code == 130 and f"--resume {tmp_path / 'run'}" in result.output


def test_too_many_stages_for_small_images_is_said(tmp_path):
    np.savez(tmp_path / "tiny.npz", images=np.zeros((9, 2, 2)))
    result = aeup("train", "vae", "--data", tmp_path / "tiny.npz", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "is too small for 2 doubling stages" in result.output


def test_a_backend_that_cannot_serve_is_said(tmp_path, data):
    with backend("cuda"):
        result = aeup("train", "vae", "--data", data, "--device", "cpu", "--out", tmp_path / "run")
    assert result.exit_code == 1 and re.search("Error: aeup.* backend 'cuda' cannot serve", result.output)


def test_the_help_states_the_real_defaults():
    help = " ".join(aeup("train", "--help").output.split())
    config, model = TrainConfig(), VAE.Config()
    for default in (config.epochs, config.batch_size, config.lr, config.seed, model.latent_dim, model.upsample):
        assert f"[default: {default}]" in help
    assert f"{config.data} (default)" in help


def test_info_names_versions_devices_and_backends():
    result = aeup("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.output and "cuda" in result.output and "-> " in result.output
    for name in ("cuda", "triton", "cpu", "torch", "tuned table of this cpu: "):
        assert name in result.output


def test_info_says_what_the_extension_is_built_for(monkeypatch, tmp_path):
    found = {"torch": "2.10", "torch_min": "2.10", "cuda": ["8.0", "9.0"], "isas": ["baseline"], "machine": "x86_64"}
    monkeypatch.setattr("aeup._native.missing", None)
    monkeypatch.setattr("aeup._native.build_info", lambda: found)
    monkeypatch.setenv("AEUP_TUNED", "")
    assert "x86_64 kernels baseline; CUDA kernels for sm_80, sm_90\n" in aeup("info").output
    found["cuda"] = None
    result = aeup("info")
    assert "no CUDA kernels (nvcc was not found" in result.output and "this cpu: turned off" in result.output
    monkeypatch.setattr("aeup._native.missing", "it cannot be loaded")
    monkeypatch.setenv("AEUP_TUNED", str(tmp_path))
    result = aeup("info")
    assert "extension: it cannot be loaded\n" in result.output and "this cpu: none of your own" in result.output


def test_a_full_disk_names_the_file_and_keeps_the_checkpoint(tmp_path, data, monkeypatch):
    run = tmp_path / "run"
    assert aeup("train", "ae", "--data", data, "--epochs", 1, "--out", run).exit_code == 0
    before = (run / "last.pt").read_bytes()

    def fsync(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aeup.train.checkpoint.os.fsync", fsync)
    result = aeup("train", "ae", "--resume", run, "--epochs", 2)
    assert result.exit_code == 1 and "run/" in result.output and "No space left on device" in result.output
    assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*"))


def test_a_command_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aeup.cli_train", None)
    assert aeup("--help").exit_code == 0
    result = aeup("train", "vae", "--json", "x")
    assert result.exit_code == 1 and 'pip install "aeup[train]"' in result.output


def test_bench_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aeup.bench.cli", None)
    assert aeup("--help").exit_code == 0
    result = aeup("bench", "interpolate", "--json", "x")
    assert result.exit_code == 1 and 'pip install "aeup[bench]"' in result.output


def test_threads_and_module_entry(tmp_path, data):
    command = [sys.executable, "-m", "aeup", "train", "ae", "--data", data, "--epochs", "1", "--threads", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout and (tmp_path / "run" / "reconstructions.png").exists()
