"""The torch twins of the bundled models: without aeup's ops, and with the same training."""

import pytest
import torch
from aeup.bench.twins import twin
from model_cases import CASES, batch, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import aeup

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BATCH = 5, 4
TOLERANCE = 1e-9  # of the largest loss, in float64, after five steps of every player


class Counted(TorchDispatchMode):
    """How many of aeup's ops run, backward included."""

    ours = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ours += func.namespace == "aeup"
        return func(*args, **(kwargs or {}))


def curve(model, optimizer=torch.optim.Adam):
    """All players' losses over a few steps, on another batch each, [STEPS, losses]."""
    model, found = model.double().train(), []
    x, target = batch(model, STEPS * BATCH)
    players = model.players()
    optimizers = {k: optimizer(p.parameters(), 1e-3) for k, p in players.items()}
    torch.manual_seed(3)
    for step in range(STEPS):
        rows, entries = slice(step * BATCH, (step + 1) * BATCH), {}
        for player in players:
            optimizers[player].zero_grad()
            losses = model.loss(x[rows].double(), None if target is None else target[rows], player)
            losses[model.minimise[player]].backward()
            optimizers[player].step()
            entries |= losses
        found.append(torch.stack([v.detach() for v in entries.values()]))
    return torch.stack(found)


@pytest.mark.parametrize("case", CASES)
def test_a_model_and_its_twin_have_the_same_loss_curve(case):
    model = build(case)
    ours, torchs = curve(build(case)), curve(twin(model))
    assert (ours - torchs).abs().max() <= TOLERANCE * torchs.abs().max()


@pytest.mark.parametrize("case", ["vae", "dcgan-nearest"])
def test_the_curves_part_where_a_gradient_or_an_op_is_another(case):
    """By SGD, which sees how large a gradient is: Adam's first steps see the signs alone."""
    torchs = curve(twin(build(case)), torch.optim.SGD)
    frozen, bilinear = twin(build(case)), twin(build(case))
    next(m for m in frozen.modules() if isinstance(getattr(m, "upsample", None), nn.Upsample)).requires_grad_(False)
    next(m for m in bilinear.modules() if isinstance(m, nn.Upsample)).mode = "bilinear"
    for other in (frozen, bilinear):
        assert (curve(other, torch.optim.SGD) - torchs).abs().max() > 100 * TOLERANCE * torchs.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_twin_has_no_op_of_aeup(case):
    model = build(case)
    other = twin(model)
    x, target = batch(model)
    counts = []
    for m in (model, other):
        for player in m.players():
            with Counted() as counted:
                m.loss(x, target, player)[m.minimise[player]].backward()
            counts.append((counted.ours, len(aeup.explain(m.loss, x, target, player))))
    ours, theirs = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    upsamples = any(type(m).__module__ == "aeup.nn" for m in model.modules()) or case == "fcn-bilinear"
    assert set(theirs) == {(0, 0)} and (ours[-1][0] > 0) is (ours[-1][1] > 0) is upsamples
    assert not [m for m in other.modules() if type(m).__module__ == "aeup.nn"]


def test_a_twin_is_a_copy_with_the_same_names():
    model = build("dcgan-nearest")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = twin(model)
    assert list(other.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.load_state_dict(other.state_dict())


LAYERS = {
    "size": lambda: aeup.UpsampleConv2d(3, 4, 3, size=(7, 9), padding=1),
    "bicubic": lambda: aeup.UpsampleConv2d(3, 4, 3, scale_factor=1.7, mode="bicubic", align_corners=True),
    "reflect": lambda: aeup.UpsampleConv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "upsample": lambda: aeup.Upsample(scale_factor=2, mode="bilinear"),
    "nearest": lambda: aeup.UpsamplingNearest2d(scale_factor=3),
    "corners": lambda: aeup.UpsamplingBilinear2d(size=(8, 5)),
    "transposed": lambda: aeup.ConvTranspose2d(3, 6, 3, 2, 1, output_padding=1, groups=3),
    "strided": lambda: aeup.Conv2d(3, 6, 3, 2, 1, groups=3),
    "strided-leaky_relu": lambda: aeup.Conv2d(3, 6, 4, 2, 1, activation=("leaky_relu", 0.3)),
    "norm": lambda: aeup.BatchNorm2d(3, momentum=0.3),
    "norm-silu": lambda: aeup.BatchNorm2d(3, activation="silu").eval(),
    "norm-leaky_relu": lambda: aeup.BatchNorm2d(3, activation=("leaky_relu", 0.3)),
    **{
        f"{name}-{activation}": lambda cls=cls, kw=kw, activation=activation: cls(3, 4, 3, activation=activation, **kw)
        for name, cls, kw in (("conv", aeup.UpsampleConv2d, {}), ("transpose", aeup.ConvTranspose2d, {"stride": 2}))
        for activation in ("relu", ("leaky_relu", 0.3), "silu", "gelu", "tanh", "sigmoid")
    },
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_twin_of_each_layer(layer):
    torch.manual_seed(0)
    ours = LAYERS[layer]().double()
    other = twin(ours)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert not aeup.explain(other, x) and (aeup.explain(ours, x) or layer == "reflect")
    results = []
    for model in (ours, other):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [leaf, *model.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_layer_without_a_twin_is_refused():
    made = type("Other", (nn.Module,), {"__module__": "aeup.nn"})
    with pytest.raises(TypeError, match="twin: no torch form is known of aeup.Other"):
        twin(nn.Sequential(made()))
