"""Pictures, judged by their pixels."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aeup.train.latent import decode, encode, interpolations, lerp, manifold, project, slerp, traversals, write_scatter
from aeup.train.pictures import COLOURS, draw, grid, overlay, stacked, write_curves, write_pictures


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


class Latent(nn.Module):
    """Two latents, an image of 2x2: its first pixel decodes to the first latent, its last to the second."""

    name = "latent"
    config = SimpleNamespace(latent_dim=2)

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def encode(self, x):
        return x.flatten(1)[:, [0, 3]] * 6 - 3 + self.bias

    def decode(self, z):
        assert not self.training
        return torch.stack([z[:, 0], torch.zeros_like(z[:, 0]), torch.zeros_like(z[:, 0]), z[:, 1]], 1).view(
            -1, 1, 2, 2
        )


class Painter(Latent):
    """All that can be drawn: reconstructions are inverted, corruption is random, samples are too."""

    config = SimpleNamespace(latent_dim=3)

    def reconstruct(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return 1 - x

    def corrupt(self, x):
        return torch.rand_like(x)

    def sample(self, n):
        return torch.rand(n, 1, 2, 2)


class Segmenter(nn.Module):
    name, config = "segmenter", SimpleNamespace()

    def segment(self, x):
        return (x[:, 0] > 0.5).long() * 2


@pytest.fixture
def latent():
    return Latent().eval()


def test_stacked_puts_rows_below_each_other_and_fills_with_grey():
    x = torch.arange(1.0, 6).view(5, 1, 1, 1)
    got = stacked(3, x, 10 * x, 100 * x).flatten().tolist()
    assert got == [1, 2, 3, 10, 20, 30, 100, 200, 300, 4, 5, 0.5, 40, 50, 0.5, 400, 500, 0.5]


def test_overlay_colours_every_class_but_the_background():
    images = torch.full((1, 1, 1, 4), 0.5)
    got = overlay(images, torch.tensor([[[0, 1, 3, 13]]]), opacity=0.8)[0, :, 0].T
    torch.testing.assert_close(got[0], torch.full((3,), 0.5))
    for k, colour in zip((1, 2, 3), COLOURS[[0, 2, 2]], strict=True):
        torch.testing.assert_close(got[k], 0.2 * 0.5 + 0.8 * colour)
    rgb = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(overlay(rgb, torch.zeros(2, 4, 5, dtype=torch.int64)), rgb)


def test_what_a_model_can_is_drawn(tmp_path):
    model, x = Painter(), torch.rand(40, 1, 2, 2)
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    files = write_pictures(model, x, None, tmp_path, seed=3)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert sorted(p.name for p in files) == ["denoising.png", "reconstructions.png", "samples.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)  # and no temporary file
    a = pixels(tmp_path / "reconstructions.png")
    # 16 columns of 32 images: 2 x (original, reconstruction); an image of 2x2 is drawn 56x56.
    assert a.shape == (4 * 58 + 2, 16 * 58 + 2, 3)
    for i in (0, 15, 16, 31):
        y, left = 2 + (i // 16) * 2 * 58, 2 + (i % 16) * 58
        for row, want in ((y, x[i]), (y + 58, 1 - x[i])):
            got = a[row + 14 : row + 56 : 28, left + 14 : left + 56 : 28, 0]
            assert np.abs(got - 255 * want[0].numpy()).max() <= 0.51
    again = {name: picture for name, picture in draw(model, x[:32], None, 3).items()}
    assert np.array_equal(again["samples"][..., 0], pixels(tmp_path / "samples.png")[..., 0])
    assert not np.array_equal(draw(model, x[:32], None, 4)["samples"], again["samples"])
    # clean, corrupted, denoised: the last is what becomes of the second.
    b = again["denoising"].int()
    corrupted, denoised = b[58 + 2 : 58 + 58], b[2 * 58 + 2 : 2 * 58 + 58]
    assert ((corrupted + denoised)[:, 2:58] - 255).abs().max() <= 1


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_segmentation_shows_image_truth_and_prediction(truth, channels):
    x = torch.zeros(3, channels, 64, 64)
    x[:, :, :, 32:] = 1
    targets = torch.ones(3, 64, 64, dtype=torch.int64) if truth else None
    picture = draw(Segmenter(), x, targets)["segmentation"].int()
    rows = 3 if truth else 2
    assert picture.shape == (rows * 130 + 2, 3 * 130 + 2, 3)
    left, right = picture[2:132, 40], picture[2:132, 100]
    assert (left[:128] == 0).all() and (right[:128] == 255).all()

    def tinted(grey, k):
        return ((0.2 * grey + 0.8 * COLOURS[k]) * 255).round().int()

    if truth:
        assert (picture[150, 40] == tinted(0, 0)).all() and (picture[150, 100] == tinted(1, 0)).all()
    last = 130 * (rows - 1) + 20
    assert (picture[last, 40] == 0).all() and (picture[last, 100] == tinted(1, 1)).all()


@pytest.mark.parametrize("n, shape", [(0, None), (1, (2, 1)), (5, (2, 5)), (17, (4, 9)), (31, (4, 16)), (40, (6, 14))])
def test_any_number_of_images(n, shape):
    pictures = draw(Painter(), torch.rand(n, 1, 28, 28))
    assert ("reconstructions" in pictures) == (n > 0) and "samples" in pictures
    if n:
        assert pictures["reconstructions"].shape == (shape[0] * 58 + 2, shape[1] * 58 + 2, 1)


def test_the_manifold_goes_through_the_inverse_gaussian(latent):
    images = manifold(latent, 4).view(4, 4, 2, 2)
    # Eighths of the unit interval: -1.1503, -0.3186, 0.3186, 1.1503; the second latent grows upwards.
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(4) + 0.5) / 4)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(torch.logit(images[row, column, 0, 0]), z[column], atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.logit(images[row, column, 1, 1]), z[3 - row], atol=1e-5, rtol=0)
    latent.sample = lambda n: torch.rand(n, 1, 2, 2)
    picture = draw(latent, torch.rand(2, 1, 2, 2))["manifold"]
    assert torch.equal(picture, grid(manifold(latent, 20), 20))
    with pytest.raises(ValueError, match="needs 2 latent dimensions, this model 'latent' has 3"):
        manifold(Painter().eval())


def test_traversals_move_one_latent_and_hold_the_others(latent):
    got = traversals(latent, torch.tensor([0.5, -1.0]), steps=3)
    z = torch.logit(got.view(2, 3, 2, 2)[..., [0, 1], [0, 1]])
    want = torch.tensor([[[-3, -1], [0, -1], [3, -1]], [[0.5, -3], [0.5, 0], [0.5, 3]]])
    torch.testing.assert_close(z, want, atol=1e-5, rtol=1e-5)
    got = traversals(latent, torch.zeros(2), torch.tensor([9.0, -2]), torch.tensor([9.0, 1]), 2, dimensions=[1])
    torch.testing.assert_close(torch.logit(got[:, 0, 1, 1]), torch.tensor([-2.0, 1]), atol=1e-5, rtol=1e-5)


def test_slerp_stays_on_the_sphere_and_keeps_its_ends():
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0])
    z = slerp(a, b, 7)
    torch.testing.assert_close(z.norm(dim=1), torch.full((7,), 3.0))
    torch.testing.assert_close(z[3], torch.tensor([3.0, 3, 0]) / 2**0.5)
    assert lerp(a, b, 7)[3].norm() < 2.2
    for p, q in ((a, b), (torch.tensor([1.0, 2]), torch.tensor([-3.0, 1]))):
        for path in (lerp, slerp):
            torch.testing.assert_close(path(p, q, 5)[[0, -1]], torch.stack([p, q]))
    for p, q in ((a, -a), (a, 2 * a), (a, 0 * a), (0 * a, 0 * a)):
        torch.testing.assert_close(slerp(p, q, 5), lerp(p, q, 5))


def test_interpolations_begin_and_end_with_the_images(latent):
    a, b = torch.rand(2, 1, 2, 2)
    rows = interpolations(latent, a, b, steps=4).view(2, 6, 1, 2, 2)
    za, zb = encode(latent, torch.stack([a, b]))[0]
    for row, path in zip(rows, (lerp, slerp), strict=True):
        assert torch.equal(row[0], a) and torch.equal(row[-1], b)
        torch.testing.assert_close(row[1:-1], decode(latent, path(za, zb, 4)))


def test_projection_to_principal_components():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    z = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([5.0, 2, 0.1, 0.1, 0.1, 0.1])
    points, what = project(z @ axes.T + 7)
    assert what == "principal component" and points.shape == (500, 2)
    centred = z - z.mean(0)
    for k in range(2):
        assert torch.corrcoef(torch.stack([points[:, k], centred[:, k]]))[0, 1].abs() > 0.99
    torch.testing.assert_close(points.std(0), centred[:, :2].std(0), rtol=0.01, atol=0)
    assert torch.equal(project(z[:, :2])[0], z[:, :2]) and project(z[:, :1])[0].shape == (500, 2)


def test_the_scatter_has_a_colour_for_each_class(tmp_path):
    torch.manual_seed(0)
    z = torch.randn(300, 2) + 8 * torch.arange(3).repeat(100)[:, None]
    write_scatter(tmp_path / "classes.png", z, torch.arange(3).repeat(100))
    write_scatter(tmp_path / "plain.png", z)

    def hues(path):
        a = pixels(path).reshape(-1, 3)
        # Dots are 3/4 opaque on white.
        return [bool((np.abs(a - (0.75 * c + 0.25).numpy() * 255).max(1) <= 2).sum() > 50) for c in COLOURS[:4]]

    assert hues(tmp_path / "classes.png") == [True, True, True, False]
    assert hues(tmp_path / "plain.png")[1:] == [False, False, False]


def history(*values):
    return [
        {"epoch": i + 1, "train": {"loss": v}, "validation": {"loss": 2 * v, "iu": 0.5}} for i, v in enumerate(values)
    ]


def test_curves(tmp_path):
    assert write_curves([], tmp_path) is None and not list(tmp_path.iterdir())
    path = write_curves(history(9.0, 5.0, 3.0, float("nan"), 2.5), tmp_path)
    assert path == tmp_path / "losses.png"
    a = pixels(path)
    assert a.shape == (320, 920, 3)  # two panels: loss, iu
    for colour, panels in (((0xB0, 0xB7, 0xC3), [True, False]), ((0x4C, 0x72, 0xB0), [True, True])):
        found = (np.abs(a - np.array(colour)).max(2) <= 2).sum(0)
        assert [found[:460].sum() > 40, found[460:].sum() > 40] == panels
    write_curves(history(1.0), tmp_path)  # one epoch: a point of each part
    a = pixels(path)[:, :460]
    for colour in ((0xB0, 0xB7, 0xC3), (0x4C, 0x72, 0xB0)):
        rows, columns = np.nonzero(np.abs(a - np.array(colour)).max(2) <= 2)
        assert ((columns > 200) & (columns < 300)).sum() > 4, colour  # the legend lies on the right
    assert write_curves([{"epoch": 1, "train": {"generator": 1.0}, "validation": {}}], tmp_path) == path


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path):
    import subprocess

    code = (
        "import sys, matplotlib; matplotlib.use('svg'); before = dict(matplotlib.rcParams)\n"
        "from aeup.train.pictures import write_curves\n"
        f"write_curves([{{'epoch': 1, 'train': {{'loss': 1.0}}, 'validation': {{}}}}], {str(tmp_path)!r})\n"
        "assert dict(matplotlib.rcParams) == before and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
