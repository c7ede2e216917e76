"""aeup.swap: what is left as it is, and the reasons."""

import pytest
import torch
from swap_helpers import classes_of, close
from torch import nn
from torch.nn.utils import parametrizations

from aeup import swap, unswap

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(torch.Tensor):
    pass


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module):
    module.register_forward_hook(lambda *args: None)
    return module


PLAIN = nn.Parameter(torch.randn(3, 3, 3, 3).as_subclass(Plain))
REASONS = {
    "stride": (nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, stride=2)), "stride (2, 2)"),
    "dilation": (nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, dilation=2)), "dilation (2, 2)"),
    "padding mode": (
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        "padding_mode 'reflect'",
    ),
    "linear": (nn.Upsample(scale_factor=2, mode="linear"), "mode 'linear'"),
    "recompute": (
        nn.Sequential(nn.Upsample(scale_factor=2, recompute_scale_factor=True), nn.Conv2d(3, 3, 3)),
        "recompute_scale_factor",
    ),
    "1-D": (nn.ConvTranspose1d(3, 3, 3), "1-D or 3-D"),
    "3-D": (nn.ConvTranspose3d(3, 3, 3), "1-D or 3-D"),
    "lazy": (nn.Sequential(nn.LazyConvTranspose2d(3, 3), nn.ReLU()), "lazy"),
    "lazy pair": (nn.Sequential(nn.Upsample(scale_factor=2), nn.LazyConv2d(3, 3)), "lazy"),
    "subclass": (type("Mine", (nn.ConvTranspose2d,), {})(3, 3, 3), "subclass"),
    "parametrised": (parametrizations.weight_norm(nn.ConvTranspose2d(3, 3, 3)), "parametrised"),
    "parametrised pair": (
        nn.Sequential(nn.Upsample(scale_factor=2), parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))),
        "parametrised",
    ),
    "gelu": (nn.Sequential(nn.ConvTranspose2d(3, 3, 3), nn.GELU("tanh")), "GELU(approximate='tanh')"),
    "slope": (nn.Sequential(nn.ConvTranspose2d(3, 3, 3), nn.LeakyReLU(-0.1)), "negative_slope=-0.1"),
    "in place": (
        nn.Sequential(nn.ConvTranspose2d(3, 3, 3), nn.LeakyReLU(0.1), nn.Sequential(nn.ReLU(True))),
        "what comes after LeakyReLU(negative_slope=0.1) works in place",
    ),
    "quantised": (
        nn.Sequential(nn.Upsample(scale_factor=2), torch.ao.nn.quantized.Conv2d(3, 3, 3)),
        "quantised",
    ),
    "quantised transposed": (torch.ao.nn.quantized.ConvTranspose2d(3, 3, 3), "quantised"),
    "transposed": (
        nn.Sequential(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(3, 3, 3)),
        "ConvTranspose2d is no Conv2d",
    ),
    "weight": (changed(nn.ConvTranspose2d(3, 3, 3), weight=PLAIN), "its weight is a Plain"),
    "weight of a pair": (
        nn.Sequential(nn.Upsample(scale_factor=2), changed(nn.Conv2d(3, 3, 3), weight=PLAIN)),
        "the convolution's weight is a Plain",
    ),
    "forward": (changed(nn.Upsample(scale_factor=2), forward=torch.tanh), "has a forward of its own"),
    "forward of a pair": (
        nn.Sequential(nn.Upsample(scale_factor=2), changed(nn.Conv2d(3, 3, 3), forward=torch.tanh)),
        "the convolution has a forward of its own",
    ),
    "hook": (nn.Sequential(hooked(nn.Upsample(scale_factor=2)), nn.Conv2d(3, 3, 3)), "the upsampling has hooks"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_left_has_a_reason(name):
    model, reason = REASONS[name]
    classes = classes_of(model)
    report = swap(model)
    assert not report.fused
    assert any(reason in r.reason for r in report.left), str(report)
    assert reason in str(report)
    if name not in ("quantised", "quantised transposed", "1-D", "3-D", "linear", "lazy", "lazy pair"):
        x = torch.randn(2, 3, 7, 6)
        model.eval()
        after = model(x)
        torch.testing.assert_close(after, unswap(model)(x))
    assert classes_of(unswap(model)) == classes


def test_a_module_that_is_compiled_in_place():
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3)).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    before = model(x)
    model[1].compile(backend="eager")
    report = swap(model)
    assert "the convolution is compiled by itself" in str(report) and not report.fused
    close([model(x)], [before])
