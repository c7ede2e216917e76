"""Many processes: the losses are those of one, one of them writes, and a lost one ends the run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import aeup.data
from aeup.cli import main
from aeup.models import Sparse
from aeup.train import ConfigError, connect, load_model, make_config, train
from aeup.train.checkpoint import load_state
from aeup.train.distributed import GlobalNoise, SyncBatchMean, SyncBatchNorm, World, synchronise

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]

OPTIONS = ["--set", "channels=6,4,4", "--set", "hidden=8", "--latent", "3", "--no-tensorboard"]


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).random((60, 8, 12)) * (np.arange(12) > 4))
    return str(tmp_path / "data.npz")


def environment(**more):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def start(*args, n=2):
    """`n` processes of Python as torchrun starts them, without its own start-up and its watch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [
        subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=Path(__file__).parent,
            env=environment(
                RANK=str(i), WORLD_SIZE=str(n), LOCAL_RANK=str(i), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            **pipes,
        )
        for i in range(n)
    ]


def start_train(*args):
    return start("-m", "aeup", "train", *args, "--threads", "1", "--device", "cpu")


def finish(processes, timeout=120):
    try:
        return [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()


def alone(*args):
    done = CliRunner().invoke(main, ["train", *map(str, args), "--device", "cpu"])
    assert done.exit_code == 0, done.output


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(a, b):
    assert [(row["epoch"], row["step"], row["lr"]) for row in a] == [
        (row["epoch"], row["step"], row["lr"]) for row in b
    ]
    for x, y in zip(a, b, strict=True):
        for part in ("train", "validation"):
            assert x[part] == pytest.approx(y[part], rel=2e-5)


def test_two_processes_go_on_with_the_losses_of_one(tmp_path, data):
    """The noise, batch norm, clipping and averaging run over both."""
    options = ["--clip", "50", "--ema", "0.9", "--schedule", "constant", "--batch-size", "12"]
    args = ["vae", "--data", data, *OPTIONS, *options]
    alone(*args, "--epochs", "2", "--out", tmp_path / "one")
    alone(*args, "--epochs", "1", "--out", tmp_path / "both")
    both = start_train("vae", "--epochs", "2", "--resume", tmp_path / "both")
    errors = [err for _, err in finish(both)]
    assert [p.returncode for p in both] == [0, 0], errors
    one, two = (load_state(tmp_path / run / "last.pt") for run in ("one", "both"))
    assert_same_losses(rows(tmp_path / "one"), rows(tmp_path / "both"))
    assert torch.equal(one["random"]["cpu"], two["random"]["cpu"])


def test_uneven_shares_under_torchrun(tmp_path, data):
    """48 training images in batches of 13, the last of 9: shares of 7 and 6, and of 5 and 4. One process writes."""
    args = ["sparse", "--data", data, *OPTIONS, "--batch-size", "13", "--epochs", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "aeup"]
    command = [*torchrun, "train", *args, "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "both")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == done.stdout.count("pictures and checkpoints") == 1
    assert "2 processes, cpu" in done.stdout
    alone(*args, "--out", tmp_path / "one")
    assert_same_losses(rows(tmp_path / "one"), rows(tmp_path / "both"))
    load_model(tmp_path / "both" / "best.safetensors")


def test_a_killed_process_ends_the_run_with_a_readable_checkpoint(tmp_path, data):
    run = tmp_path / "run"
    both = start_train("vae", "--data", data, *OPTIONS, "--epochs", "100000", "--out", run)
    try:
        deadline = time.monotonic() + 90
        while not (run / "samples.png").exists() and both[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        both[1].send_signal(signal.SIGKILL)
        out, err = both[0].communicate(timeout=60)
    finally:
        finish(both)
    assert both[0].returncode == 1, err
    assert "process 0 of 2: another process of this run ended or cannot be reached" in err
    assert "last.pt holds epoch" in err and "Traceback" not in err
    assert load_state(run / "last.pt")["epoch"] >= 1
    load_model(run / "last.safetensors")


def train_gan_and_segmentation(out, data):
    """Batch norm in both players of a GAN and in a loss over pixels; a setting that is wrong in all processes; the mean
    that the sparse model's penalty is of."""
    random = np.random.default_rng(2)
    digits = random.integers(0, 256, (60, 1, 28, 28), np.uint8), random.integers(0, 10, 60)
    small = dict(epochs=1, batch_size=13, tensorboard=False)
    with pytest.MonkeyPatch.context() as patch, connect(torch.device("cpu")) as world:
        patch.setattr(aeup.data, "read_mnist5k", lambda: digits)
        patch.setattr(aeup.data, "SCENES", 60)
        gan = {"width": 4, "latent_dim": 5}
        train(make_config("dcgan", data=data, image_size=(8, 8), options=gan, **small), Path(out, "dcgan"))
        net = {"channels": (4, 4, 4, 4, 4)}
        train(make_config("fcn", image_size=(32, 32), options=net, **small), Path(out, "fcn"))
        if world.size > 1:
            with pytest.raises(ConfigError, match="batch_size=1 is less than the 2 processes"):
                train(make_config("ae", data=data, batch_size=1), Path(out, "ae"))
            model, x = Sparse(), torch.arange(7.0)[:, None]
            synchronise(model, world)
            assert model.mean(x[world.shard(torch.arange(7))]) == 3 and world.offset(7) in (0, 4)


def test_models_with_batch_norm_and_a_wrong_setting(tmp_path, data):
    code = "import sys, test_distributed as t; t.train_gan_and_segmentation(*sys.argv[1:])"
    both = start("-c", code, tmp_path / "both", data)
    errors = [err for _, err in finish(both)]
    assert [p.returncode for p in both] == [0, 0], errors
    train_gan_and_segmentation(tmp_path / "one", data)
    for name in ("dcgan", "fcn"):
        assert_same_losses(rows(tmp_path / "one" / name), rows(tmp_path / "both" / name))
    assert not (tmp_path / "both" / "ae").exists()


DRAWS = [
    lambda x: torch.randn_like(x),
    lambda x: torch.rand_like(x),
    lambda x: torch.randn(len(x), 5),
    lambda x: torch.randn((len(x), 5, 2)),
    lambda x: torch.rand(size=(len(x),), dtype=torch.float64),
    lambda x: torch.bernoulli(x.abs().clamp(0, 1)),
    lambda x: F.dropout(x, 0.5),
    lambda x: nn.Dropout2d(0.5)(x),
    lambda x: nn.functional.dropout(x.clone(), 0.3, inplace=True),
    lambda x: torch.empty_like(x).normal_(2.0, 3.0),
    lambda x: x.clone().bernoulli_(0.3),
]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_shares_noise_is_that_of_the_whole_batch(draw, layout):
    x = torch.randn(7, 3, 4, 5).contiguous(memory_format=layout)
    torch.manual_seed(3)
    whole, after = draw(x), torch.rand(2)
    for rank in range(3):
        world = World(torch.device("cpu"), rank, 3)
        rows = world.shard(torch.arange(7))
        assert rows[0] == world.offset(7)
        torch.manual_seed(3)
        with GlobalNoise(len(rows), 7, world.offset(7)):
            share = draw(x[rows])
        assert torch.equal(share, whole[rows]) and torch.equal(torch.rand(2), after)


def test_noise_of_another_shape_is_alike_and_gradients_pass():
    torch.manual_seed(3)
    want = torch.randn(5, 2)
    torch.manual_seed(3)
    with GlobalNoise(2, 4, 2):
        assert torch.equal(torch.randn(5, 2), want)
        x = torch.ones(2, 50, requires_grad=True)
        F.dropout(x, 0.5).sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


def test_batch_mean_of_two_shares_and_its_gradient():
    x = torch.rand(7, 3)
    mean = x.mean(0)
    for mine, other in ((x[:4], x[4:]), (x[4:], x[:4])):
        # What the other process adds to the sums, and to the gradient of (mean ** 2).sum() weighted by its share.
        sums = torch.cat([other.sum(0), torch.tensor([float(len(other))])])
        gradient = torch.cat([len(other) / 7 * 2 * mean / 7, torch.zeros(1)])
        added = iter([sums, gradient])
        layer = SyncBatchMean(SimpleNamespace(sum_=lambda t, added=added: t.add_(next(added))))
        leaf = mine.clone().requires_grad_()
        got = layer(leaf)
        torch.testing.assert_close(got, mean)
        (got.square().sum() * len(mine) / 7).backward()
        torch.testing.assert_close(leaf.grad, (2 * mean / 7).expand_as(leaf))
        assert torch.equal(layer.eval()(mine), mine.mean(0))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_batch_norm_of_one_process_is_torchs(momentum, dtype, bound):
    like = nn.BatchNorm2d(3, momentum=momentum)
    nn.init.normal_(like.weight)
    other = nn.BatchNorm2d(3, momentum=momentum)
    other.load_state_dict(like.state_dict())
    mine = SyncBatchNorm(other, World(torch.device("cpu")))
    assert mine.state_dict().keys() == like.state_dict().keys()
    x = (torch.randn(5, 3, 4, 2) * 3 + 10).to(dtype)
    for _ in range(2):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = like(a), mine(b)
        assert z.dtype == dtype
        g = torch.randn_like(y)
        y.backward(g), z.backward(g)
        torch.testing.assert_close(z, y, rtol=bound, atol=bound * 4)
        torch.testing.assert_close(b.grad, a.grad, rtol=bound, atol=bound * 4)
    torch.testing.assert_close(mine.state_dict(), like.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.eval()(x), like.eval()(x))
