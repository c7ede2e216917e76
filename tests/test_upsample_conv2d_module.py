"""aeup.UpsampleConv2d, aeup.to_conv_transpose and aeup.icnr_."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import aeup

MODULES = (
    ((4, 6, 3), {"padding": 1}),
    ((4, 6, (3, 2)), {"scale_factor": (3, 2), "padding": (1, 0), "groups": 2, "bias": False}),
    ((4, 6, 3), {"padding": "same", "mode": "bilinear", "align_corners": True, "dtype": torch.float64}),
    ((4, 6, 5), {"size": (9, 7), "padding": 2, "mode": "bicubic"}),
    ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}),
    ((4, 6, 3), {"padding": (2, 1), "padding_mode": "replicate", "mode": "bilinear"}),
    ((4, 6, 4), {"padding": "same", "padding_mode": "circular", "scale_factor": 3}),
)


def pair(args, kwargs, **more):
    """Ours, and the Sequential that it stands for, with the same weights."""
    up = {k: kwargs[k] for k in ("size", "mode", "align_corners") if k in kwargs}
    if "size" not in up:
        up["scale_factor"] = kwargs.get("scale_factor", 2)
    conv = {k: kwargs[k] for k in ("padding", "groups", "bias", "padding_mode", "dtype") if k in kwargs}
    theirs = nn.Sequential(nn.Upsample(**up), nn.Conv2d(*args, **conv))
    ours = aeup.UpsampleConv2d(*args, **kwargs, **more)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, torch.randn(2, 4, 5, 4, dtype=kwargs.get("dtype", torch.float32))


@pytest.mark.parametrize(("args", "kwargs"), MODULES, ids=str)
def test_module(args, kwargs):
    ours, theirs, x = pair(args, kwargs)
    assert list(ours.state_dict()) == ["conv.weight"] + ["conv.bias"] * kwargs.get("bias", True)
    x.requires_grad_()
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected)
    mine = torch.autograd.grad(ours(x).square().sum(), [x, *ours.parameters()])
    other = torch.autograd.grad(expected.square().sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    active, _, _ = pair(args, kwargs, activation=("leaky_relu", 0.2))
    active.load_state_dict(ours.state_dict())
    expected = F.leaky_relu(expected, 0.2)
    saved = io.BytesIO()
    torch.save(active, saved)
    saved.seek(0)
    for module in (
        active,
        copy.deepcopy(active),
        pickle.loads(pickle.dumps(active)),
        torch.load(saved, weights_only=False),
    ):
        torch.testing.assert_close(module(x), expected)
    assert "activation=('leaky_relu', 0.2)" in repr(active) and "activation" not in repr(ours)


def test_defaults_and_repr():
    module = aeup.UpsampleConv2d(4, 6, 3)
    assert "scale_factor=2, mode='nearest'" in repr(module) and module.conv.padding == (0, 0)
    assert "size=(9, 7), mode='bilinear', align_corners=True" in repr(
        aeup.UpsampleConv2d(4, 6, 3, mode="bilinear", align_corners=True, size=(9, 7))
    )
    assert aeup.UpsampleConv2d(4, 6, 3, device="meta", dtype=torch.float16).conv.weight.is_meta


def test_channels_last_and_autocast():
    module = aeup.UpsampleConv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_state_dict_of_a_sequential_loads():
    outer = nn.Sequential(OrderedDict(a=nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3)), b=nn.ReLU()))
    ours = nn.Sequential(OrderedDict(a=aeup.UpsampleConv2d(4, 6, 3), b=nn.ReLU()))
    state = outer.state_dict()
    assert not any(ours.load_state_dict(state)) and list(state) == ["a.1.weight", "a.1.bias"]
    assert torch.equal(ours.a.conv.weight, outer.a[1].weight) and torch.equal(ours.a.conv.bias, outer.a[1].bias)
    assert not any(ours.load_state_dict(ours.state_dict()))
    with pytest.raises(RuntimeError, match='Unexpected key.*"a.2.weight"'):
        ours.load_state_dict({**ours.state_dict(), "a.2.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match='Missing key.*"a.conv.bias"'):
        ours.load_state_dict({"a.1.weight": state["a.1.weight"]})
    with pytest.raises(RuntimeError, match="size mismatch for a.conv.weight"):
        ours.load_state_dict({**state, "a.1.weight": torch.zeros(6, 4, 5, 5)})


def test_explain_names_the_padding_mode():
    module = aeup.UpsampleConv2d(4, 6, 3, padding=1, padding_mode="reflect")
    choices = aeup.explain(module, torch.randn(2, 4, 5, 6))
    assert choices[0].op == "aeup.upsample_conv2d" and choices[0].backend == "torch"
    assert "padding_mode is 'reflect'" in choices[0].others["cpu"] and choices[1].op == "aeup.interpolate"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    (
        ({"mode": "area"}, ValueError, "mode must be one of nearest"),
        ({"align_corners": True}, ValueError, "align_corners option can only be set"),
        ({"scale_factor": 0}, RuntimeError, "scale_factor must be finite and greater than 0"),
        ({"scale_factor": None}, ValueError, "either size or scale_factor"),
        ({"scale_factor": 3, "size": 4}, ValueError, "only one of size or scale_factor"),
        ({"size": 2.5}, TypeError, "expected size to be one of int"),
        ({"padding": "full"}, ValueError, "Invalid padding string 'full'"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
        ({"groups": 3}, ValueError, "in_channels must be divisible by groups"),
        ({"activation": "swish"}, ValueError, "activation must be None, 'relu'"),
    ),
)
def test_bad_arguments(change, error, says):
    with pytest.raises(error, match=says):
        aeup.UpsampleConv2d(4, 6, 3, **change)


HOOKED = {
    "weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "parametrised": lambda conv: nn.utils.parametrizations.weight_norm(conv),
}


@pytest.mark.parametrize("how", HOOKED)
def test_a_weight_that_is_made_anew_in_each_call_is_trained(how):
    ours, theirs, x = pair(*MODULES[0])
    found = []
    for module, conv in ((ours, ours.conv), (theirs, theirs[1])):
        torch.manual_seed(0)
        HOOKED[how](conv)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        found.append([module(x), *conv.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    backends = [c.backend for c in aeup.explain(ours, x)]
    assert (backends[0] == "torch") == (how != "parametrised")


def test_a_convolution_in_the_place_of_ours_runs():
    ours, _, x = pair(*MODULES[0])
    expected, weight = ours(x), ours.conv.weight
    for cls in (aeup.Conv2d, nn.Conv2d):
        ours.conv.__class__ = cls  # as aeup.swap does
        assert torch.equal(ours(x), expected)
    ours.conv = aeup.Conv2d(4, 6, 3, padding=1, activation="relu")
    ours.conv.weight, ours.conv.bias = weight, None
    torch.testing.assert_close(ours(x), F.conv2d(F.interpolate(x, scale_factor=2), weight, None, 1, 1).relu())
    ours.conv = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh())
    torch.testing.assert_close(ours(x), ours.conv(F.interpolate(x, scale_factor=2)))
    seen = []
    ours.conv = nn.Conv2d(4, 6, 3)
    ours.conv.register_forward_hook(lambda conv, given, y: seen.append((given[0].shape, y.shape)))
    ours(x)
    assert seen == [((2, 4, 10, 8), (2, 6, 8, 6))]


# --- the transposed convolution ---


@pytest.mark.parametrize("padding", (0, 1, 2, 3, "same", "valid"))
@pytest.mark.parametrize("kernel", (1, 2, 3, (4, 5)))
@pytest.mark.parametrize("scale", (2, 3.0, (4, 2)))
def test_to_conv_transpose(scale, kernel, padding):
    module = aeup.UpsampleConv2d(4, 6, kernel, scale, padding=padding, groups=2, activation="tanh", dtype=torch.float64)
    made = aeup.to_conv_transpose(module.eval())
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(made(x), module(x))
    assert type(made) is aeup.ConvTranspose2d and not made.training
    assert made.weight.is_leaf and made.weight.requires_grad


def test_to_conv_transpose_keeps_scale_1_and_refuses_the_rest():
    module = aeup.UpsampleConv2d(4, 6, 3, 1, padding=1, bias=False)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(aeup.to_conv_transpose(module)(x), module(x))
    for kwargs in ({"mode": "bilinear"}, {"size": (4, 4)}, {"padding_mode": "reflect", "padding": 1}):
        with pytest.raises(ValueError, match="only nearest by a scale_factor with zero padding"):
            aeup.to_conv_transpose(aeup.UpsampleConv2d(4, 6, 3, **kwargs))
    with pytest.raises(ValueError, match="must be a whole number, got 1.5"):
        aeup.to_conv_transpose(aeup.UpsampleConv2d(4, 6, 3, 1.5))
    with pytest.raises(ValueError, match="has no transposed convolution"):
        aeup.to_conv_transpose(aeup.UpsampleConv2d(4, 6, 2, 1, padding="same"))
    with pytest.raises(TypeError, match="must be an aeup.UpsampleConv2d, got Conv2d"):
        aeup.to_conv_transpose(nn.Conv2d(4, 6, 3))


@pytest.mark.parametrize(("kernel", "scale", "groups"), ((4, 2, 1), (6, 3, 2), ((5, 2), (3, 2), 1)))
def test_icnr_starts_a_transposed_convolution_as_a_resize_convolution(kernel, scale, groups):
    layer = nn.ConvTranspose2d(4, 6, kernel, scale, bias=False, groups=groups, dtype=torch.float64)
    before = layer.weight
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    assert aeup.icnr_(layer.weight, scale, groups=groups) is before
    kh, kw = layer.kernel_size
    sh, sw = layer.stride
    inside = (slice(None), slice(None), slice(kh - 1, -kh + 1 or None), slice(kw - 1, -kw + 1 or None))
    y = layer(torch.ones(1, 4, 9, 9, dtype=torch.float64))[inside]
    torch.testing.assert_close(y, y[:, :, :1, :1].expand_as(y))  # no checkerboard
    bound = 1 / (4 // groups * (kh - sh + 1) * (kw - sw + 1)) ** 0.5
    assert 0 < layer.weight.abs().max() <= sh * sw * bound
    aeup.icnr_(layer.weight, scale, groups=groups, init=nn.init.ones_)
    assert layer.weight.flatten(2).sum(2).unique().item() == (kh - sh + 1) * (kw - sw + 1) * sh * sw


def test_icnr_starts_a_sub_pixel_convolution_as_a_convolution_and_nearest():
    layer = nn.Conv2d(3, 8 * 6, 3, padding=1, bias=False)
    aeup.icnr_(layer.weight, (2, 2), transposed=False)
    x = torch.randn(2, 3, 5, 4)
    low = F.conv2d(x, layer.weight[::4], padding=1)
    torch.testing.assert_close(F.pixel_shuffle(layer(x), 2), F.interpolate(low, scale_factor=2))


def test_icnr_refuses():
    for weight, scale, kwargs, says in (
        (torch.zeros(4, 6, 3), 2, {}, "weight must be 4-D"),
        (torch.zeros(4, 6, 3, 3), 0, {}, "scale a whole number"),
        (torch.zeros(4, 6, 3, 3), 2.0, {}, "scale a whole number .* got .4, 6, 3, 3., 2.0, 1"),
        (torch.zeros(4, 6, 1, 3), 2, {}, "kernels of at least scale=2"),
        (torch.zeros(4, 6, 3, 3), 2, {"groups": 3}, "groups=3 divides"),
        (torch.zeros(6, 4, 3, 3), 2, {"transposed": False}, "a multiple of scale.2 . groups = 4 output channels"),
    ):
        with pytest.raises(ValueError, match=says):
            aeup.icnr_(weight, scale, **kwargs)
