"""Overlap maps and lattice energy against what is known of them (Odena et al., Distill 2016)."""

import math

import pytest
import torch
from torch import nn

import aeup
from aeup.checkerboard import checkerboard


def rows(cell):
    return cell.tolist()


@pytest.mark.parametrize(
    "kernel, stride, per_axis",
    [(3, 2, [2, 1]), (4, 2, [2, 2]), (5, 2, [3, 2]), (2, 2, [1, 1]), (3, 3, [1, 1, 1]), (3, 4, [1, 1, 1, 0])],
)
def test_overlap_of_a_kernel_and_a_stride(kernel, stride, per_axis):
    got = checkerboard(kernel, stride)
    axis = torch.tensor(per_axis, dtype=torch.float64)
    torch.testing.assert_close(got.cell, axis[:, None] * axis)
    flat = len(set(per_axis)) == 1
    assert ("flat" in str(got)) == flat and got.energy is None and "energy" not in str(got)


def test_kernel_and_stride_of_their_own_for_each_axis():
    cell = checkerboard((3, 4), (2, 3)).cell
    assert rows(cell) == [[4, 2, 2], [2, 1, 1]]
    assert tuple(checkerboard((1, 9), (2, 4)).cell.shape) == (2, 4)


@pytest.mark.parametrize("padding, output_padding, groups, dilation", [(1, 1, 1, 1), (0, 0, 2, 1), (2, 1, 4, 3)])
def test_overlap_of_a_module_is_the_count_of_its_taps(padding, output_padding, groups, dilation):
    layer = nn.ConvTranspose2d(4, 8, 3, 2, padding, output_padding, groups, dilation=dilation)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    got = checkerboard(layer)
    count = torch.zeros_like(got.overlap)
    h, w = count.shape
    for i in range(16):
        for j in range(16):
            for a in range(3):
                for b in range(3):
                    y, x = 2 * i + dilation * a - padding, 2 * j + dilation * b - padding
                    if 0 <= y < h and 0 <= x < w:
                        count[y, x] += 1
    torch.testing.assert_close(got.overlap, count)
    assert got.stride == (2, 2) and layer.training
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def resize(c_in=4, c_out=3, mode="nearest"):
    return nn.Sequential(aeup.Upsample(scale_factor=2, mode=mode), nn.Conv2d(c_in, c_out, 3, padding=1))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_a_resize_convolution_is_flat_and_repeats_nothing(mode):
    torch.manual_seed(0)
    got = checkerboard(resize(mode=mode))
    torch.testing.assert_close(got.cell, torch.full((2, 2), 9.0, dtype=torch.float64))
    assert got.energy == 0 and "flat" in str(got)
    # Two layers, the output of the first one rough at the scale of the second: still no preferred phase.
    assert checkerboard(nn.Sequential(resize(4, 4, mode), nn.ReLU(), resize(4, 3, mode))).energy == 0


def test_upsample_conv2d_is_flat():
    torch.manual_seed(0)
    got = checkerboard(aeup.UpsampleConv2d(4, 6, 3, 3, padding=1, groups=2, activation="sigmoid"))
    assert got.stride == (3, 3) and got.energy == 0
    torch.testing.assert_close(got.cell, torch.full((3, 3), 9.0, dtype=torch.float64))


def test_a_transposed_convolution_repeats_with_its_stride():
    torch.manual_seed(0)
    got = checkerboard(aeup.ConvTranspose2d(4, 3, 3, 2, 1, 1, activation="relu"))
    assert sorted(sum(rows(got.cell), [])) == [1, 2, 2, 4] and "uneven, 1 to 4" in str(got)
    assert got.energy == pytest.approx(1)  # all that a constant input leads to is the pattern
    noise = torch.randn(16, 4, 32, 32)
    assert checkerboard(aeup.ConvTranspose2d(4, 3, 3, 2, 1, 1), input=noise).energy > 0
    even = checkerboard(aeup.ConvTranspose2d(4, 3, 4, 2, 1))
    assert "flat" in str(even) and even.energy == pytest.approx(1)  # even overlap, weights that differ: k4 s2 can, too


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "bicubic", "conv_transpose"])
def test_decoders(upsample):
    torch.manual_seed(0)
    decoder = aeup.Decoder((8, 8, 8), 1, None, upsample=upsample).train()
    got = checkerboard(decoder)
    assert got.stride == (4, 4) and "flat" in str(got)
    assert (got.energy > 0.5) == (upsample == "conv_transpose")
    assert all(m.training for m in decoder.modules())
    vector = checkerboard(aeup.Decoder((8, 8, 8), 1, 32, latent_dim=5, upsample=upsample))
    assert vector.stride == (4, 4) and "flat" in str(vector)


def test_the_energy_of_an_image_is_that_of_its_phase_means():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 31, 46, dtype=torch.float64)
    got = checkerboard(x, (3, 5))
    x = x[..., :30, :45]
    phases = x.unflatten(2, (10, 3)).unflatten(4, (9, 5)).mean((2, 4))
    want = (phases.var((2, 3), correction=0) / x.var((2, 3), correction=0)).mean()
    assert got.energy == pytest.approx(want.item(), rel=1e-9)
    assert got.spectrum.sum() == pytest.approx(1) and got.overlap is None
    assert got.frequency[-1] >= math.sqrt(0.5) > got.frequency[-3]


def test_white_noise_has_what_noise_says():
    torch.manual_seed(0)
    got = checkerboard(torch.randn(400, 1, 32, 32), 4)
    assert got.energy == pytest.approx(got.noise, rel=0.05)


def test_a_pattern_is_found_at_its_frequency():
    x = torch.zeros(60, 60)
    x[::4] = 1  # every fourth row: 1/4 and 1/2
    got = checkerboard(x, 4)
    assert got.energy == pytest.approx(1) and checkerboard(x, 3).energy < 1e-9
    peaks = got.frequency[got.spectrum > 1e-9]
    torch.testing.assert_close(peaks, torch.tensor([0.25, 0.5], dtype=torch.float64))
    torch.testing.assert_close(got.spectrum[got.spectrum > 1e-9], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_constant_image_has_no_energy(dtype):
    got = checkerboard(torch.full((3, 9, 12), 7).to(dtype), 2)
    assert got.energy == 0 and not got.spectrum.any()


def test_what_has_other_weights_is_not_counted():
    module = nn.Sequential(nn.Conv2d(2, 2, 1), nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(2, 1, 4, 2)))
    got = checkerboard(module)
    assert got.overlap is None and got.cell is None and "not counted" in str(got) and got.energy is not None


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        (("k3s2", 2), TypeError, "module_or_image must be .*'k3s2'"),
        ((3,), ValueError, "stride must be given"),
        ((3, 0), ValueError, "stride must be at least 1, got 0"),
        ((3, 2.0), TypeError, "stride must be an int .* got 2.0"),
        (((3, 3, 3), 2), TypeError, r"the kernel size must be .* got \(3, 3, 3\)"),
        ((torch.zeros(5), 2), ValueError, r"an image must be .* got \[5\]"),
        ((torch.zeros(0, 4, 4), 2), ValueError, "not empty"),
        ((torch.zeros(4, 4), 3), ValueError, r"stride \(3, 3\) is too large for images of 4x4"),
        ((nn.Upsample(scale_factor=2),), ValueError, "input must be given: Upsample"),
        ((nn.Linear(3, 4), 2), ValueError, "the module must give images"),
        ((nn.Sequential(nn.Linear(2, 64), nn.Unflatten(1, (1, 8, 8))),), ValueError, "stride must be given"),
    ],
)
def test_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        checkerboard(*arguments)


def test_refuses_an_input_that_is_no_float_tensor():
    with pytest.raises(TypeError, match="input must be a tensor of floats"):
        checkerboard(resize(), input=torch.zeros(1, 4, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="input is for a module only"):
        checkerboard(3, 2, input=torch.zeros(1))


def test_default_device_is_not_looked_at():
    module, image = resize(), torch.randn(1, 1, 16, 16)
    calls = (lambda: checkerboard(3, 2), lambda: checkerboard(module), lambda: checkerboard(image, 2))
    want = [str(call()) for call in calls]
    with torch.device("meta"):
        assert [str(call()) for call in calls] == want
