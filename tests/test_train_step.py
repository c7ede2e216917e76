"""The training step: eager and captured, the same losses."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from aeup.models import MODELS
from aeup.train import TrainConfig, make_config, train
from aeup.train.checkpoint import build_model, load_state
from aeup.train.copies import Copies
from aeup.train.distributed import World
from aeup.train.step import EAGER_STEPS, Step

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "vae": {"channels": (6, 4, 4), "hidden": 8, "latent_dim": 3, "kl_warmup": 0.5},
    "dcgan": {"width": 4, "latent_dim": 5},
    "fcn": {"channels": (2, 2, 3, 3, 4)},
    "contractive": {"hidden": 8, "latent_dim": 3},
}


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def make_step(name, device="cpu", **settings):
    """A step and a function that takes the n-th of 20 steps with `size` images."""
    on = {"bf16": False, "channels_last": False, "graph": False, **settings}
    torch.manual_seed(0)
    shape = {"image_size": (16, 16), "in_channels": 1}
    model = build_model(name, {**shape, **SMALL[name]}).to(device).train()
    step = Step(model, TrainConfig(model=name, warmup=2, lr=1e-3, **on), World(torch.device(device)))
    generator = torch.Generator().manual_seed(1)

    def take(n, size=6):
        x = torch.rand(size, 1, 16, 16, generator=generator).to(device)
        target = torch.randint(11, (size, 16, 16), generator=generator).to(device) if model.targets else None
        return step(x, target, size, n, 20).tolist()

    return step, take


class Replayed:
    """Stands for a CUDA graph where there is no GPU: its replay is the step itself."""

    def __init__(self, step, slot):
        self.step, self.slot, self.replays = step, slot, 0

    def replay(self):
        self.replays += 1
        self.slot.losses = self.step._update(self.slot)


@pytest.fixture
def without_gpu(without_streams, monkeypatch):
    captured = []

    def capture(self, slot):
        slot.graph = Replayed(self, slot)
        captured.append(slot)

    monkeypatch.setattr(Step, "_capture", capture)
    return captured


@pytest.mark.parametrize("name", sorted(SMALL))
def test_each_size_is_captured_once_after_its_eager_steps(without_gpu, name):
    _, eager = make_step(name)
    step, graph = make_step(name, graph=True)
    sizes = [6, 6, 6, 3] * 5
    torch.manual_seed(2)
    want = [eager(n, size) for n, size in enumerate(sizes)]
    torch.manual_seed(2)
    assert [graph(n, size) for n, size in enumerate(sizes)] == want
    assert [len(slot.x) for slot in without_gpu] == [6, 3]
    assert [slot.graph.replays for slot in without_gpu] == [sizes.count(n) - EAGER_STEPS for n in (6, 3)]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_step_never_looks_at_values(name):
    """What would wait for a GPU, and break a capture: `item`, `bool`, a copy to another device."""
    step, take = make_step(name, clip=1.0, ema=0.9)
    take(0)  # the optimizers' first step makes their state

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            aten = torch.ops.aten
            assert func.overloadpacket not in (aten._local_scalar_dense, aten.nonzero, aten.equal), func
            return func(*args, **(kwargs or {}))

    with Watch():
        step._update(next(iter(step.slots.values())))


def test_the_schedules_are_written_into_tensors_that_stay():
    step, take = make_step("vae")
    take(0)
    addresses = [step.lr.data_ptr(), step.model.kl_weight.data_ptr()]
    seen = []
    for n in range(1, 20):
        take(n)
        seen.append((step.lr.item(), step.model.kl_weight.item()))
    assert addresses == [step.lr.data_ptr(), step.model.kl_weight.data_ptr()]
    assert all(group["lr"] is step.lr for o in step.optimizers.values() for group in o.param_groups)
    assert len({lr for lr, _ in seen}) > 15 and len({kl for _, kl in seen}) > 5
    assert seen[0][0] == pytest.approx(step.config.lr_at(1, 20)) and seen[-1][1] == 1.0


def test_resumed_optimizers_keep_the_learning_rates_tensor():
    step, take = make_step("dcgan")
    for n in range(3):
        take(n)
    other, go_on = make_step("dcgan")
    other.load_state(step.state())
    assert all(group["lr"] is other.lr for o in other.optimizers.values() for group in o.param_groups)
    with pytest.raises(ValueError, match="optimizers for .*'discriminator', 'generator'.*the model has .*'model'"):
        make_step("vae")[0].load_state(step.state())


def test_no_player_touches_the_other(monkeypatch):
    step, take = make_step("dcgan")
    model = step.model
    before = {k: v.clone() for k, v in model.named_parameters()}
    monkeypatch.setattr(step.optimizers["generator"], "step", lambda: None)
    take(0)
    changed = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("discriminator.") for k in changed)
    assert all(p.grad is not None for p in model.generator.parameters())


@pytest.mark.parametrize("settings", [{}, {"channels_last": True, "clip": 1.0, "ema": 0.9}])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_copies_of_the_weights_change_no_bit_of_autocasts_step(monkeypatch, name, settings):
    step, copied = make_step(name, bf16=True, **settings)
    monkeypatch.setattr(MODELS[name], "plain_weights", False)
    other, cast = make_step(name, bf16=True, **settings)
    assert bool(step.copies.of) == (name != "contractive") and not other.copies.of
    for n in range(4):
        torch.manual_seed(n)
        want = cast(n)
        torch.manual_seed(n)
        assert copied(n) == want
    for a, b in zip(step.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype is torch.float32
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


def test_copies_stand_in_for_tied_and_frozen_weights_and_go_again():
    one, two, norm = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)
    two.weight = one.weight
    one.bias.requires_grad_(False)
    model = nn.Sequential(one, norm, two)
    copies, parameters = Copies(model.modules()), [one.weight, *norm.parameters()]
    with torch.no_grad():
        one.weight.add_(1)  # as an optimizer does after the copies were made
    with pytest.raises(ZeroDivisionError), copies.in_use(parameters):
        assert one.weight is two.weight and one.weight.dtype is torch.bfloat16 and not one.bias.requires_grad
        assert torch.equal(one.weight, parameters[0].bfloat16()) and norm.weight is parameters[1]
        assert [p.dtype for p in model.parameters()] == 4 * [torch.float32]
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(4, 3)).float().square().sum().backward(inputs=copies.leaves(parameters))
        raise ZeroDivisionError
    copies.give_back(parameters)
    assert one.weight is two.weight is parameters[0] and one.bias.grad is None
    assert all(p.grad.dtype is torch.float32 and p.grad.abs().sum() > 0 for p in parameters)
    with copies.in_use(norm.parameters()):
        assert not one.weight.requires_grad


def data(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).random((50, 16, 16)))
    return str(tmp_path / "data.npz")


def run(tmp_path, name, folder, device, **settings):
    source = {} if MODELS[name].targets else {"data": data(tmp_path)}
    config = make_config(
        name,
        epochs=6,
        batch_size=12,
        warmup=3,
        tensorboard=False,
        options=SMALL[name],
        **source,
        **{"bf16": False, **settings},
    )
    return train(config, tmp_path / folder, device=device, console=Console(file=io.StringIO()))


def test_compile_gives_the_losses_of_eager(tmp_path, monkeypatch):
    """With the noise of eager; inductor's own differs. The compiled graph is run as it is: no C++ compiler needed."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, backend="aot_eager", **more))
    eager = run(tmp_path, "vae", "eager", "cpu")
    compiled = run(tmp_path, "vae", "compiled", "cpu", compile=True)
    for a, b in zip(eager, compiled, strict=True):
        assert a["train"] == pytest.approx(b["train"], rel=1e-4)


def assert_close(a, b, rel):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for part in ("train", "validation"):
            assert x[part] == pytest.approx(y[part], rel=rel)


@gpu
@pytest.mark.parametrize("settings", [{}, {"clip": 1.0, "ema": 0.9}, {"channels_last": False}, {"bf16": True}])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_graph_gives_the_losses_of_eager(tmp_path, monkeypatch, name, settings):
    """40 images in batches of 12 and 4, six epochs: both sizes are captured. Kernels that add atomically differ in
    the last bits from run to run, eager or not."""
    monkeypatch.setattr("aeup.data.SCENES", 50)
    size = {"image_size": (32, 32)} if name == "fcn" else {}
    eager = run(tmp_path, name, "eager", "cuda", graph=False, **size, **settings)
    replays, real = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), real(self))[1])
    graph = run(tmp_path, name, "graph", "cuda", **size, **settings)
    assert len(replays) == 6 * 4 - 2 * EAGER_STEPS and len(set(map(id, replays))) == 2
    assert_close(eager, graph, 1e-3)


@gpu
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_replayed_step_does_not_wait_for_the_gpu(name):
    step, _ = make_step(name, "cuda", graph=True)
    x = torch.rand(6, 1, 16, 16, device="cuda")
    target = torch.randint(11, (6, 16, 16), device="cuda") if step.model.targets else None
    for n in range(EAGER_STEPS + 1):
        step(x, target, 6, n, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step(x, target, 6, EAGER_STEPS + 1, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


@gpu
def test_a_resumed_run_on_a_gpu_goes_on_with_the_same_losses(tmp_path):
    settings = dict(batch_size=12, warmup=3, schedule="constant", tensorboard=False, bf16=False)
    options = {**SMALL["vae"], "kl_warmup": 0.0}  # the total number of steps must not count
    config = make_config("vae", data=data(tmp_path), epochs=3, options=options, **settings)
    quiet = Console(file=io.StringIO())
    train(config, tmp_path / "run", device="cuda", console=quiet)
    rows = train(out=tmp_path / "run", resume=True, epochs=6, device="cuda", console=quiet)
    config.epochs = 6
    whole = train(config, tmp_path / "again", device="cuda", console=quiet)
    assert_close(rows, whole, 1e-3)
    a, b = (load_state(tmp_path / folder / "last.pt")["random"]["cuda"] for folder in ("run", "again"))
    assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_have_the_losses_of_one(tmp_path):
    source = data(tmp_path)
    args = ["vae", "--data", source, "--epochs", "3", "--batch-size", "12", "--no-bf16", "--no-tensorboard"]
    for n, folder in ((1, "one"), (2, "two")):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        command = [*torchrun, "-m", "aeup", "train", *args, "--out", str(tmp_path / folder)]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    a, b = (load_state(tmp_path / folder / "last.pt")["history"] for folder in ("one", "two"))
    assert_close(a, b, 1e-3)
