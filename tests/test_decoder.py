"""The decoder."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aeup import UpsampleConv2d, explain
from aeup.decoder import ACTIVATION, UPSAMPLE, Decoder, make_activation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("out_size", [28, 30, (9, 14), (5, 3)])
def test_decoder_reaches_any_size_from_a_vector(upsample, out_size):
    decoder = Decoder((6, 5, 4), 3, out_size, latent_dim=7, upsample=upsample)
    h, w = out_size if isinstance(out_size, tuple) else (out_size, out_size)
    assert decoder(torch.randn(2, 7)).shape == (2, 3, h, w)
    assert decoder.sizes == [(math.ceil(h / 4), math.ceil(w / 4)), (math.ceil(h / 2), math.ceil(w / 2)), (h, w)]


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("out_size", [None, 13])
def test_decoder_takes_a_feature_map(upsample, out_size):
    decoder = Decoder((6, 4, 4), 3, out_size, upsample=upsample)
    x = torch.randn(2, 6, 4, 4)
    y = decoder(x)
    assert y.shape == (2, 3, out_size or 16, out_size or 16)
    decoder.eval()
    y = decoder(x)
    last = decoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "bicubic"])
def test_decoder_is_the_composition_of_torch_modules(upsample):
    torch.manual_seed(0)
    decoder = Decoder((4, 3), 2, 6, upsample=upsample, norm=None, activation="relu", head="tanh").double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    conv = decoder.stages[0][0].conv
    y = F.interpolate(x, size=(6, 6), mode=upsample)
    y = F.relu(F.conv2d(y, conv.weight, conv.bias, padding=1))
    want = torch.tanh(F.conv2d(y, decoder.to_image.weight, decoder.to_image.bias, padding=1))
    torch.testing.assert_close(decoder(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("upsample", UPSAMPLE)
@pytest.mark.parametrize("activation", [*ACTIVATION, nn.PReLU(4)])
def test_decoder_fuses_the_activation_where_no_norm_is_between(upsample, activation):
    """The same values as with the activation as a module."""
    torch.manual_seed(0)
    decoder = Decoder((4, 4, 4), 2, 15, upsample=upsample, norm=None, activation=activation)
    fuses = isinstance(activation, str) and activation != "elu"
    after = make_activation(activation)
    x = torch.randn(2, 4, 4, 4)
    expected, stages = x, copy.deepcopy(decoder.stages)
    for own, (enlarge, norm, act) in zip(stages, decoder.stages, strict=True):
        assert isinstance(norm, nn.Identity) and isinstance(act, nn.Identity) == fuses
        assert (enlarge.activation is not None) == fuses
        own[0].activation = None
        expected = after(own[0](expected))
    torch.testing.assert_close(decoder(x), decoder.to_image(expected))
    assert Decoder((4, 4), upsample=upsample).stages[0][0].activation is None


@pytest.mark.parametrize("upsample", ["nearest", "bilinear", "bicubic"])
def test_decoder_stages_are_fused_ops(upsample):
    decoder = Decoder((32, 32, 32), 1, 30, upsample=upsample, norm=None)
    assert [type(stage[0]) for stage in decoder.stages] == [UpsampleConv2d] * 2
    assert [stage[0].size for stage in decoder.stages] == [(15, 15), (30, 30)]
    found = [c for c in explain(decoder, torch.randn(16, 32, 8, 8)) if c.op == "aeup.upsample_conv2d"]
    taken = ["composed", "cpu"] if upsample == "nearest" else ["composed"] * 2  # 8 -> 15 repeats unevenly
    assert [c.backend for c in found] == taken and all("relu" in c.call for c in found)


@pytest.mark.parametrize("norm", ["batch", "group", None])
@pytest.mark.parametrize("activation", [*ACTIVATION, nn.Softplus, nn.PReLU(4)])
def test_decoder_options_and_gradient_flow(norm, activation):
    decoder = Decoder((4, 4, 4), 1, 8, latent_dim=2, norm=norm, activation=activation, head="sigmoid", kernel_size=5)
    y = decoder(torch.randn(3, 2))
    assert 0 <= y.min() and y.max() <= 1
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in decoder.parameters())


def test_decoder_copies_an_activation_module_for_each_stage():
    decoder = Decoder((4, 4, 4), 1, 8, latent_dim=2, activation=nn.PReLU(4))
    assert len({id(m) for m in decoder.modules() if isinstance(m, nn.PReLU)}) == 3


def test_conv_transpose_kernel_covers_every_pixel_equally():
    decoder = Decoder((1, 1), 1, 9, upsample="conv_transpose", norm=None)
    deconv = decoder.stages[0][0]
    nn.init.ones_(deconv.weight), nn.init.zeros_(deconv.bias)
    taps = deconv(torch.ones(1, 1, 5, 5))[0, 0]
    assert taps.shape == (9, 9) and (taps[1:-1, 1:-1] == 4).all()


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(upsample="area"), ValueError, "upsample must be one of .*'area'"),
        (dict(norm="layer"), ValueError, "norm must be one of .*'layer'"),
        (dict(head="softmax"), ValueError, "head must be one of .*'softmax'"),
        (dict(activation="swish"), ValueError, "activation must be one of .*'swish'"),
        (dict(activation=3), TypeError, "activation must be .* got 3"),
        (dict(channels=(4,)), ValueError, "channels must have at least 2"),
        (dict(channels=8), TypeError, "channels must be a sequence"),
        (dict(channels=(4, 0)), ValueError, r"channels\[1\] must be at least 1, got 0"),
        (dict(out_channels=0), ValueError, "out_channels must be at least 1, got 0"),
        (dict(kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
        (dict(out_size=2.5), TypeError, "out_size must be an int or a pair"),
        (dict(out_size=(4, 4, 4)), TypeError, "out_size must be an int or a pair"),
        (dict(out_size=2, channels=(4, 4, 4)), ValueError, "out_size=2 is too small for 2"),
        (dict(out_size=None), ValueError, "out_size must be given with latent_dim"),
        (dict(latent_dim=0), ValueError, "latent_dim must be at least 1, got 0"),
    ],
)
def test_decoder_refuses_wrong_arguments(change, error, says):
    with pytest.raises(error, match=says):
        Decoder(**{**dict(channels=(4, 4), out_channels=1, out_size=8, latent_dim=2), **change})


def test_decoder_refuses_wrong_inputs():
    with pytest.raises(RuntimeError, match=r"must be \[N, 2\] .* got \[3, 4\]"):
        Decoder((4, 4), latent_dim=2)(torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"must be \[N, 4, h, w\] .* got \[3, 5, 2, 2\]"):
        Decoder((4, 4))(torch.zeros(3, 5, 2, 2))
    with pytest.raises(RuntimeError, match="must be 14x14 to reach out_size .* got 13x14"):
        Decoder((4, 4), upsample="conv_transpose")(torch.zeros(3, 4, 13, 14))


@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_decoder_under_compile_and_autocast(upsample):
    torch.manual_seed(0)
    decoder = Decoder((4, 4), 2, 6, latent_dim=3, upsample=upsample, norm="group")
    z = torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(decoder, backend="aot_eager", fullgraph=True)(z), decoder(z))
    with torch.autocast("cpu", torch.bfloat16):
        y = decoder(z)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), decoder(z), rtol=0.1, atol=0.05)


def test_decoder_works_on_an_empty_batch():
    assert Decoder((4, 4), latent_dim=2).eval()(torch.zeros(0, 2)).shape == (0, 1, 28, 28)
