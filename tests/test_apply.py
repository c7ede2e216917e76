"""aeup sample, reconstruct, encode and evaluate on small models, and the figures behind them."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_cases import batch, build
from PIL import Image
from torch import nn

import aeup.data
from aeup.cli import main
from aeup.evaluate import Figure, NotAvailable, evaluate, psnr, ssim
from aeup.train import load_model
from aeup.train.checkpoint import save_model
from aeup.train.latent import encode
from aeup.train.pictures import grid

pytestmark = pytest.mark.usefixtures("one_thread")


def aeup_(*args):
    return CliRunner().invoke(main, [*map(str, args), "--device", "cpu"])


def ok(*args):
    result = aeup_(*args)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def images():
    return np.random.default_rng(0).random((20, 12, 10))


@pytest.fixture
def run(tmp_path, images):
    """A function that makes a run's folder."""
    np.savez(tmp_path / "data.npz", images=images)

    def make(case, data=tmp_path / "data.npz", config=True, **more):
        model, out = build(case, **more), tmp_path / case
        out.mkdir(exist_ok=True)
        save_model(out / "best.safetensors", model)
        if config:
            train = {"model": model.name, "data": str(data), "seed": 3, "validation": 0.25, "image_size": None}
            (out / "config.json").write_text(json.dumps({"train": train, "model": dataclasses.asdict(model.config)}))
        return out

    return make


@pytest.fixture
def digits(monkeypatch):
    """In the place of the 5,000 digits, which take seconds to read: 40."""
    random = np.random.default_rng(2)
    made = random.integers(0, 256, (40, 1, 28, 28), np.uint8), random.integers(0, 10, 40)
    monkeypatch.setattr(aeup.data, "read_mnist5k", lambda: made)
    return made


def gray(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


# --- sample ---


def test_sample_is_the_models_own_and_follows_the_seed(run, tmp_path):
    folder = run("vae")
    assert ok("sample", folder).strip() == str(folder / "pictures" / "samples.png")
    ok("sample", folder, "-n", 5, "--seed", 4, "--out", tmp_path / "five.npz")
    model = load_model(folder / "best.safetensors")
    torch.manual_seed(4)
    want = model.sample(5).detach()
    with np.load(tmp_path / "five.npz") as file:
        np.testing.assert_array_equal(file["images"], want.numpy())
    ok("sample", folder / "best.safetensors", "-n", 5, "--columns", 2, "--seed", 4, "--out", tmp_path / "five.png")
    np.testing.assert_array_equal(gray(tmp_path / "five.png"), grid(want, 2)[..., 0].numpy())
    ok("sample", run("dcgan"), "-n", 3)


# --- reconstruct ---


def test_reconstruct_draws_the_runs_validation_images(run):
    folder = run("denoising-gaussian")
    ok("reconstruct", folder, "-n", 4)
    data = aeup.data.load(str(folder.parent / "data.npz"), 3, validation=0.25)
    assert len(data.validation) == 5
    x = data.validation[:4]
    y = load_model(folder / "best.safetensors").reconstruct(x).detach()
    picture = grid(torch.cat([x, y]), 4)[..., 0].numpy()
    np.testing.assert_array_equal(gray(folder / "pictures" / "reconstructions.png"), picture)
    rows = gray(folder / "pictures" / "denoising.png")
    np.testing.assert_array_equal(rows[: len(picture) // 2], picture[: len(picture) // 2])
    assert rows.shape[0] > picture.shape[0]


def test_reconstruct_draws_the_latent_space(run, tmp_path):
    folder = run("vae-mlp", latent_dim=2)
    args = ["--interpolate", 0, 4, "--interpolate", 1, 2, "--traverse", 3, "--manifold", "--scatter", "--steps", 5]
    out = ok("reconstruct", folder, *args, "--out", tmp_path / "p").split()
    names = ["interpolation-0-4.png", "interpolation-1-2.png", "traversals-3.png", "manifold.png", "scatter.png"]
    assert out == [str(tmp_path / "p" / name) for name in names]
    h, w = (4 * 12 + 2, 4 * 10 + 2)
    shapes = [gray(tmp_path / "p" / name).shape for name in names]
    assert shapes[:4] == [(2 * h + 2, 7 * w + 2)] * 2 + [(2 * h + 2, 5 * w + 2), (5 * h + 2, 5 * w + 2)]


def test_traversals_of_an_autoencoder_go_where_its_codes_are(run, images):
    folder = run("ae-mlp", latent_dim=18)
    ok("reconstruct", folder, "--traverse", 2, "--steps", 3, "--part", "all")
    model = load_model(folder / "best.safetensors")
    x = torch.from_numpy(images).float()[:, None]
    z, _ = encode(model, x)
    chosen = sorted(range(18), key=lambda d: -z[:, d].var().item())[:16]
    points = z[2].repeat(16, 3, 1)
    for row, d in enumerate(sorted(chosen)):
        low, high = z[:, d].quantile(torch.tensor([0.01, 0.99]))
        points[row, :, d] = torch.stack([low, (low + high) / 2, high])
    with torch.no_grad():
        want = grid(torch.sigmoid(model.decode(points.flatten(0, 1))), 3)[..., 0].int()
    assert np.abs(gray(folder / "pictures" / "traversals-2.png") - want.numpy()).max() <= 1


def test_segmentation(run, digits, monkeypatch):
    monkeypatch.setattr(aeup.data, "SCENES", 40)
    folder = run("fcn", "scenes", classes=11)
    ok("reconstruct", folder, "-n", 3)
    with Image.open(folder / "pictures" / "segmentation.png") as image:
        a = np.asarray(image)
    assert a.shape == (3 * 130 + 2, 3 * 130 + 2, 3)
    top, truth = a[2:130], a[132:260]
    assert (top == top[..., :1]).all() and (truth != truth[..., :1]).any()  # a grey image, coloured labels
    ok("evaluate", folder)
    figures = json.loads((folder / "evaluate.json").read_text())["figures"]
    assert set(figures) == {"cross_entropy", "mean_iu", "pixel_accuracy"} and 0 <= figures["mean_iu"]["value"] <= 1


# --- encode ---


@pytest.mark.parametrize("case", ["vae", "vae-flow", "ae"])
def test_encode_keeps_the_order_of_the_file(run, images, case):
    folder = run(case)
    text = ok("encode", folder, "--part", "all")
    with np.load(folder / "latents.npz") as file:
        found = dict(file)
    model = load_model(folder / "best.safetensors")
    z, log_var = encode(model, torch.from_numpy(images).float()[:, None])
    np.testing.assert_allclose(found["latents"], z, rtol=1e-5, atol=1e-6)
    assert found.keys() == ({"latents"} if case == "ae" else {"latents", "log_variances"})
    if case != "ae":
        np.testing.assert_allclose(found["log_variances"], log_var, rtol=1e-5, atol=1e-6)
    assert "latents [20, 3]" in text


def test_encode_a_folder_gives_the_names(run, tmp_path):
    folder = run("ae", config=False)
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    names = ["b.png", "a.png", "sub/c.png"]
    random = np.random.default_rng(1)
    for name in names:
        Image.fromarray(random.integers(0, 256, (12, 10), np.uint8)).save(tmp_path / "pictures" / name)
    ok("encode", folder, "--data", tmp_path / "pictures", "--out", tmp_path / "z.npz")
    with np.load(tmp_path / "z.npz") as file:
        assert file["names"].tolist() == [str(tmp_path / "pictures" / name) for name in sorted(names)]
        x = torch.from_numpy(gray(tmp_path / "pictures" / "a.png").copy()).float()[None, None] / 255
        z = load_model(folder / "best.safetensors").encode(x).detach()
        np.testing.assert_allclose(file["latents"][0], z[0], rtol=1e-5, atol=1e-6)


def test_encode_keeps_the_labels(run, digits):
    folder = run("vae", "mnist5k", image_size=(28, 28))
    ok("encode", folder)
    chosen = torch.randperm(40, generator=torch.Generator().manual_seed(3))[30:]
    z, _ = encode(load_model(folder / "best.safetensors"), torch.from_numpy(digits[0])[chosen] / 255)
    with np.load(folder / "latents.npz") as file:
        np.testing.assert_array_equal(file["labels"], digits[1][chosen])
        np.testing.assert_allclose(file["latents"], z, rtol=1e-5, atol=1e-6)
    assert "scatter.png" in ok("reconstruct", folder, "--scatter")


# --- evaluate ---


class Known(nn.Module):
    """A model whose figures are known."""

    name, targets, config = "known", False, SimpleNamespace(in_channels=1, image_size=(16, 16), loss="squared")

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.seen = []

    def validate(self, batches):
        assert not self.training
        return {"reconstruction": sum(len(x) for x, _ in batches), "kl": torch.rand(()).item()}

    def log_likelihood(self, x, samples):
        self.seen.append(samples)
        return -x.sum((1, 2, 3))

    def reconstruct(self, x):
        return (x * 0.5 + self.bias).where(x < 0, x + 0.1)

    def corrupt(self, x):
        return x - 1


def batches(x):
    return lambda n: ((part, None) for part in x.split(n))


def test_figures_are_means_over_the_images():
    model, x = Known().train(), torch.rand(261, 1, 16, 16) * 0.8
    torch.manual_seed(1)
    before, calls = torch.get_rng_state(), []
    got = evaluate(model, batches(x), samples=7, seed=5, progress=lambda what, done: calls.append((what, done)))
    assert torch.equal(before, torch.get_rng_state()) and model.training and set(model.seen) == {7}
    assert got["reconstruction"] == Figure(261, "squared grey levels")
    assert got["kl"] == evaluate(model, batches(x), seed=5)["kl"] != evaluate(model, batches(x), seed=6)["kl"]
    sums = -x.sum((1, 2, 3)).double()
    assert got["log_likelihood"].value == pytest.approx(sums.mean().item(), rel=1e-6)
    assert got["log_likelihood"].error == pytest.approx(sums.std().item() / math.sqrt(261), rel=1e-4)
    assert got["psnr"].value == pytest.approx(20, abs=1e-4) and got["psnr"].unit == "dB"
    # The corrupted image is all black after clamping; its "denoised" one is (x - 1) / 2.
    assert got["corrupted_psnr"].value == pytest.approx(psnr(0 * x, x).mean().item(), rel=1e-6)
    assert got["denoised_psnr"].value == pytest.approx(psnr((x - 1) / 2, x).mean().item(), rel=1e-6)
    assert set(got) >= {"ssim", "corrupted_ssim", "denoised_ssim"} and got["denoised_ssim"].value < got["ssim"].value
    assert ("PSNR, SSIM", 261) in calls and ("log p(x), 7 samples", 32) in calls
    assert "log_likelihood" not in evaluate(model, batches(x))


def test_psnr_and_ssim():
    x = torch.rand(3, 3, 20, 15)
    y = torch.stack([x[0], x[1] + 0.01, 1 - x[2]])
    assert psnr(y, x)[0] == math.inf and psnr(y, x)[1].item() == pytest.approx(40, abs=1e-4)
    values = ssim(y, x)
    assert values.shape == (3,) and values[0].item() == pytest.approx(1) and values[1] > 0.99 and values[2] < 0
    with pytest.raises(NotAvailable, match="at least 11x11"):
        ssim(x[..., :10], x[..., :10])


def test_ssim_is_the_papers():
    """Equations 13 to 16 of Wang et al., window by window."""
    x, y = torch.rand(2, 2, 2, 13, 12).double()
    w = torch.exp(-((torch.arange(11) - 5.0).double() ** 2) / (2 * 1.5**2))
    w = w[:, None] * w / w.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    want = torch.zeros(2).double()
    for n, c, i, j in np.ndindex(2, 2, 3, 2):
        a, b = (t[n, c, i : i + 11, j : j + 11] for t in (x, y))
        p, q = (w * a).sum(), (w * b).sum()
        var, cov = (w * ((a - p) ** 2 + (b - q) ** 2)).sum(), (w * (a - p) * (b - q)).sum()
        want[n] += (2 * p * q + c1) * (2 * cov + c2) / ((p**2 + q**2 + c1) * (var + c2)) / 12
    torch.testing.assert_close(ssim(x, y), want, rtol=1e-6, atol=0)
    flat = torch.full((1, 1, 11, 11), 0.5)
    assert ssim(flat, flat / 2).item() == pytest.approx((2 * 0.125 + c1) / (0.25 + 0.0625 + c1), rel=1e-6)


def test_what_cannot_be_had_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    got = evaluate(Known(), batches(torch.rand(4, 1, 16, 16)))
    assert got["ssim"].value is None and "scikit-image cannot be imported" in got["ssim"].note
    assert got["psnr"].value == pytest.approx(20, abs=1e-4)


def test_evaluate_a_vae(run):
    folder = run("vae")
    text = ok("evaluate", folder, "--samples", 50)
    about = json.loads((folder / "evaluate.json").read_text())
    assert (about["model"], about["part"], about["images"], about["samples"]) == ("vae", "validation", 5, 50)
    figures = about["figures"]
    elbo, terms = figures["negative_elbo"]["value"], [figures[k]["value"] for k in ("reconstruction", "kl")]
    assert elbo == pytest.approx(sum(terms), rel=1e-6)
    # Of one and the same posterior, more samples bound log p(x) more tightly; both are near for an untrained model.
    assert figures["log_likelihood"]["value"] > -elbo - 0.5
    for word in ("negative ELBO", "KL", "log p(x), 50 samples", "PSNR", "SSIM", "nats", "5 images"):
        assert word in text
    assert "±" in text
    ok("evaluate", folder, "--force", "--part", "train", "--samples", 0)
    about = json.loads((folder / "evaluate.json").read_text())
    assert about["images"] == 15 and about["samples"] is None


def test_evaluate_some_of_the_images(run, images, monkeypatch):
    seen = []
    monkeypatch.setattr("aeup.models.VAE.log_likelihood", lambda self, x, k: seen.append(x) or x.sum((1, 2, 3)))
    assert "8 images of" in ok("evaluate", run("vae"), "--part", "all", "-n", 8)
    torch.testing.assert_close(torch.cat(seen), torch.from_numpy(images[[0, 2, 5, 7, 10, 12, 15, 17]]).float()[:, None])
    assert "20 images of" in ok("evaluate", run("vae"), "--force", "--part", "all", "-n", 99)


@pytest.mark.parametrize("case", ["ae-squared", "denoising-mask", "sparse", "contractive", "dcgan"])
def test_evaluate_every_kind(run, tmp_path, case):
    model = build(case)
    x, _ = batch(model, 6)
    np.savez(tmp_path / "own.npz", images=x.numpy())
    ok("evaluate", run(case), "--data", tmp_path / "own.npz")
    about = json.loads((tmp_path / case / "evaluate.json").read_text())
    assert about["part"] == "all" and about["images"] == 6
    assert all(f["value"] is not None or f["note"] for f in about["figures"].values())


# --- bad input ---


def test_nothing_is_overwritten_without_force(run):
    folder = run("vae")
    for args in (["sample"], ["reconstruct", "--scatter"], ["encode"], ["evaluate", "--samples", 0]):
        ok(args[0], folder, *args[1:])
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        result = aeup_(args[0], folder, *args[1:])
        assert result.exit_code == 1 and "exists: choose another --out, or overwrite it with --force" in result.output
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        ok(args[0], folder, *args[1:], "--force")


@pytest.mark.parametrize(
    "args, code, says",
    [
        (["sample", "{vae}", "-n", "0"], 2, "0 is not in the range"),
        (["sample", "{vae}", "--out", "x.jpg"], 2, "allowed are .png and .npz"),
        (["encode", "{vae}", "--out", "x.npy"], 2, "allowed is .npz"),
        (["evaluate", "{vae}", "--samples", "-1"], 2, "-1 is not in the range"),
        (["reconstruct", "{vae}", "--interpolate", "0", "5"], 2, "no image 5: {data} (validation) has 0 to 4"),
        (["reconstruct", "{vae}", "--traverse", "-1"], 2, "no image -1"),
        (["encode", "{bare}"], 2, "--data is needed: there is no config.json"),
        (["sample", "{vae}/absent"], 1, "absent: not a readable safetensors file"),
        (["sample", "{data}"], 1, "data.npz: not a readable safetensors file"),
        (["sample", "{ae}"], 1, "the model 'ae' cannot make new images"),
        (["reconstruct", "{dcgan}"], 1, "the model 'dcgan' takes no images"),
        (["encode", "{dcgan}"], 1, "the model 'dcgan' has no encoder"),
        (["reconstruct", "{vae}", "--manifold"], 1, "needs 2 latent dimensions, this model 'vae' has 3"),
        (["reconstruct", "{ae}", "--manifold"], 1, "has no prior"),
        (["evaluate", "{vae}", "--data", "absent"], 1, "absent: no such file or folder"),
        (["evaluate", "{fcn}", "--data", "{fcn-data}"], 1, "the model 'fcn' needs a label for each pixel"),
        (["evaluate", "{dcgan}"], 1, "this model 'dcgan' is for images of 16x24 with 1 channel, these are 12x10"),
    ],
)
def test_refuses(run, tmp_path, args, code, says):
    names = {"data": tmp_path / "data.npz", "fcn-data": tmp_path / "fcn.npz"}
    for case in ("vae", "ae", "dcgan", "fcn"):
        if any(f"{{{case}}}" in a for a in args):
            names[case] = run(case)
    if "{bare}" in args:
        names["bare"] = run("vae", config=False)
    np.savez(names["fcn-data"], images=np.zeros((2, 40, 35)))
    result = aeup_(*(a.format(**names) for a in args))
    assert result.exit_code == code, result.output
    assert says.format(**names) in " ".join(result.output.split()) and "Traceback" not in result.output


def test_a_full_disk_and_a_damaged_configuration_are_one_line(run, monkeypatch):
    folder = run("vae")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        result = aeup_("sample", folder)
        figures = aeup_("evaluate", folder, "-n", 1, "--samples", 0)
    assert result.exit_code == 1 and "No space left on device" in result.output
    assert figures.exit_code == 1 and "vae, 1 image of" in figures.output and "negative ELBO" in figures.output
    assert not [p for p in folder.rglob("*") if p.is_file() and p.parent != folder]
    (folder / "config.json").write_text("[]")
    result = aeup_("sample", folder)
    assert result.exit_code == 1 and "config.json: not the configuration of a run" in result.output
