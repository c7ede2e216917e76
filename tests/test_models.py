"""The bundled models."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from model_cases import CASES, batch, build, losses
from torch._subclasses import FakeTensorMode

from aeup.decoder import UPSAMPLE
from aeup.models import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES)
def test_every_trained_parameter_of_each_player_gets_a_gradient(case):
    model = build(case)
    for player, module in model.players().items():
        model.zero_grad()
        x, target = batch(model)
        found = model.loss(x, target, player)
        assert all(v.shape == () and v.isfinite() and v.dtype == torch.float32 for v in found.values())
        found[model.minimise[player]].backward()
        trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
        dead = [k for k, p in trained.items() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
        assert trained and not dead


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("case", ["ae", "vae-flow", "dcgan", "fcn"])
def test_every_upsampling_in_every_model(case, upsample):
    model = build(case, upsample=upsample)
    x, target = batch(model)
    for player in model.players():
        model.loss(x, target, player)[model.minimise[player]].backward()
    used = {type(m).__name__ for m in model.modules()}
    assert ("ConvTranspose2d" in used) == (upsample == "conv_transpose" or case == "dcgan")  # dcgan: its first layer


@pytest.mark.parametrize("case", CASES)
def test_what_a_model_can_do_has_the_right_shape_and_range(case):
    model = build(case).eval()
    x, _ = batch(model)
    n, image = len(x), x.shape[1:]
    images = []
    if hasattr(model, "reconstruct"):
        z = model.encode(x)
        z = z[0] if isinstance(z, tuple) else z
        assert z.shape == (n, model.config.latent_dim)
        assert torch.equal(torch.sigmoid(model.decode(z)), model.reconstruct(x))
        images += [model.reconstruct(x)]
    if hasattr(model, "sample"):
        torch.manual_seed(1)
        images += [model.sample(n)]
        torch.manual_seed(1)
        assert torch.equal(model.sample(n), images[-1])
    if hasattr(model, "segment"):
        labels = model.segment(x)
        assert labels.shape == (n, *image[1:]) and labels.dtype == torch.int64 and labels.max() < 3
    assert all(y.shape == x.shape and 0 <= y.min() and y.max() <= 1 for y in images)
    assert images or hasattr(model, "segment")


@pytest.mark.parametrize("case", CASES)
def test_the_loss_never_looks_at_a_value(case):
    """No .item(), no control flow that depends on data: a fake tensor has no values to look at."""
    with FakeTensorMode() as mode:
        model = build(case)
        c = model.config
        x = torch.rand(4, c.in_channels, *c.image_size)
        target = torch.zeros(4, *c.image_size, dtype=torch.int64) if model.targets else None
        for player in model.players():
            found = model.loss(x, target, player)
            found[model.minimise[player]].backward()
            assert all(v.fake_mode is mode for v in found.values())


@pytest.mark.parametrize("case", ["ae-mlp", "contractive-deep", "vae-flow", "dcgan", "fcn"])
def test_the_whole_loss_compiles_into_one_graph(case):
    model = build(case)
    x, target = batch(model)
    want = losses(model, x, target)
    torch.compiler.reset()
    for player in model.players():
        torch.manual_seed(2)
        step = torch.compile(lambda x, target, p=player: model.loss(x, target, p), backend="aot_eager", fullgraph=True)
        for key, value in step(x, target).items():
            torch.testing.assert_close(value, want[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_configuration_make_the_same_model_again(case):
    model = build(case)
    x, target = batch(model)
    losses(model, x, target)  # batch norm's statistics move
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    config = type(model.config)(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    torch.manual_seed(9)
    again = type(model)(config)
    again.load_state_dict(model.state_dict())
    for a, b in ((model, again), (copy.deepcopy(model), again)):
        got, want = losses(a.eval(), x, target), losses(b.eval(), x, target)
        assert all(torch.equal(got[k], want[k]) for k in want)
        assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}


@pytest.mark.parametrize("case", CASES)
def test_autocast_and_channels_last(case):
    model = build(case).eval()
    x, target = batch(model)
    want = losses(model, x, target)
    with torch.autocast("cpu", torch.bfloat16):
        low = losses(model, x, target)
    last = losses(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), target)
    for key, value in want.items():
        assert low[key].dtype == torch.float32
        torch.testing.assert_close(low[key], value, rtol=0.05, atol=0.05)
        torch.testing.assert_close(last[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["ae", "sparse", "vae-mlp", "dcgan"])
def test_validation_is_the_mean_over_the_images(case):
    model = build(case).eval()
    x, target = batch(model, 5)
    torch.manual_seed(0)
    got = model.validate([(x[:3], target), (x[3:], target)])
    torch.manual_seed(0)
    parts = [
        {k: v.item() for player in model.players() for k, v in model.loss(part, None, player).items()}
        for part in (x[:3], x[3:])
    ]
    assert got == pytest.approx({k: (3 * parts[0][k] + 2 * parts[1][k]) / 5 for k in parts[0]}, rel=1e-6)
    with pytest.raises(ValueError, match="at least one image"):
        model.validate([])


def test_the_default_models_fit_mnist_and_follow_the_seed():
    x = torch.rand(2, 1, 28, 28)
    for name, model in MODELS.items():
        options = dict(image_size=(28, 28), in_channels=1)
        target = torch.randint(11, (2, 28, 28)) if model.targets else None
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            made = model(model.Config(**options))
            found.append({k: v for player in made.players() for k, v in made.loss(x, target, player).items()})
        assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
        assert made.name == name and set(made.minimise) == set(made.players())
        assert made.objective is None or made.objective in made.validate([(x, target)])


def test_the_defaults_are_fields_of_the_training_configuration():
    fields = {f.name for f in dataclasses.fields(pytest.importorskip("aeup.train").TrainConfig)}
    for model in MODELS.values():
        assert set(model.defaults) <= fields


@pytest.mark.parametrize(
    "case, change, error, says",
    [
        ("ae", dict(loss="l1"), ValueError, "loss must be one of .*'l1'"),
        ("ae", dict(network="vit"), ValueError, "network must be one of .*'vit'"),
        ("ae", dict(latent_dim=0), ValueError, "latent_dim must be at least 1, got 0"),
        ("ae", dict(hidden=2.5), TypeError, "hidden must be an int, got 2.5"),
        ("ae", dict(depth=-1), ValueError, "depth must be at least 0, got -1"),
        ("ae-mlp", dict(image_size=(0, 3)), ValueError, r"image_size\[0\] must be at least 1, got 0"),
        ("denoising-mask", dict(corruption="blur"), ValueError, "corruption must be one of .*'blur'"),
        ("denoising-mask", dict(level=1.5), ValueError, "level must be finite, at least 0 and at most 1, got 1.5"),
        ("denoising-gaussian", dict(level=-0.1), ValueError, "level must be finite, at least 0, got -0.1"),
        ("denoising-gaussian", dict(level="0.1"), TypeError, "level must be a number, got '0.1'"),
        ("sparse", dict(penalty="l0"), ValueError, "penalty must be one of .*'l0'"),
        ("sparse", dict(target=0.0), ValueError, "target must be finite, above 0 and below 1, got 0.0"),
        ("sparse", dict(weight=math.nan), ValueError, "weight must be finite, at least 0, got nan"),
        ("contractive", dict(jacobian="exact"), ValueError, "jacobian must be one of .*'exact'"),
        ("contractive", dict(depth=1), ValueError, "'closed' is for one layer.*depth=1.*'hutchinson'"),
        ("contractive-deep", dict(norm="batch"), ValueError, "norm='batch' ties"),
        ("vae", dict(likelihood="poisson"), ValueError, "likelihood must be one of .*'poisson'"),
        ("vae", dict(posterior="iaf"), ValueError, "posterior must be one of .*'iaf'"),
        ("vae", dict(beta=-1.0), ValueError, "beta must be finite, at least 0, got -1.0"),
        ("vae", dict(kl_warmup=1.5), ValueError, "kl_warmup must be finite, at least 0 and at most 1, got 1.5"),
        ("vae-flow", dict(flow_blocks=0), ValueError, "flow_blocks must be at least 1, got 0"),
        ("vae-flow", dict(latent_dim=-2), ValueError, "latent_dim must be at least 1, got -2"),
        ("dcgan", dict(image_size=(30, 30)), ValueError, r"image_size must halve without rest.*\(30, 30\)"),
        ("dcgan", dict(image_size=(4, 4)), ValueError, r"image_size must be at least 8.*\(4, 4\)"),
        ("dcgan", dict(upsample="area"), ValueError, "upsample must be one of .*'area'"),
        ("dcgan", dict(width=0), ValueError, "width must be at least 1, got 0"),
        ("fcn", dict(head="4s"), ValueError, "head must be one of .*'4s'"),
        ("fcn", dict(classes=1), ValueError, "classes must be at least 2, got 1"),
        ("fcn", dict(channels=(4, 4)), ValueError, r"channels must be five widths.*\(4, 4\)"),
        ("fcn", dict(upsample="area"), ValueError, "upsample must be one of .*'area'"),
    ],
)
def test_bad_options(case, change, error, says):
    with pytest.raises(error, match=says):
        build(case, **change)


@pytest.mark.parametrize("case", ["ae", "ae-mlp", "vae-flow"])
def test_images_of_another_shape(case):
    with pytest.raises(RuntimeError, match=r"images must be \[N, 1, 12, 10\] for this model, got \[2, 1, 12, 11\]"):
        build(case).loss(torch.zeros(2, 1, 12, 11))
    with pytest.raises(RuntimeError, match=r"must be \[N, "):
        build(case).decode(torch.zeros(2, 4))
