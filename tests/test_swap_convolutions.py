"""aeup.Conv2d, and aeup.swap putting it in the place of convolutions alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from swap_helpers import close, output_and_gradients
from torch import nn
from torch.nn.utils import parametrizations

import aeup
from aeup import swap, unswap
from aeup.ops import upsample_conv_plain as plain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[False, True], ids=["cpu", "as on a gpu"])
def on_gpu(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(aeup.Conv2d, "_refuses", lambda self, input: None)
    return request.param


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(16, 20, (3, 2), padding="same"),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(20, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.SiLU(),
        nn.Conv2d(16, 16, 1),  # and what gains nothing, or is not served
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 3, 3),
        nn.Conv2d(3, 16, 3, bias=False),
    ).double()


def test_convolutions_alone(on_gpu):
    """Where torch is no match: with a bias. On a CPU they run by torch."""
    model, x = convolutions(), torch.randn(2, 16, 9, 7, dtype=torch.float64)
    before = output_and_gradients(model, x)
    report = swap(model)
    assert [r.path for r in report.replaced if r.now == "aeup.Conv2d"] == ["0", "2", "4", "6"]
    assert [(r.path, r.now) for r in report.fused] == [
        ("0, 1", "aeup.Conv2d with activation"),
        ("3, 4, 5", "aeup.upsample_conv2d with activation"),
        ("6, 7", "aeup.Conv2d with activation"),
    ]
    explained = [c for c in aeup.explain(model, x) if "gradient" not in c.call]
    assert [c.op for c in explained] == ["aeup.conv2d"] * 2 + ["aeup.upsample_conv2d", "aeup.conv2d"]
    assert {c.backend for c in explained if c.op == "aeup.conv2d"} == {"torch"}
    assert ("relu" in explained[0].call) == ("s2, p1, silu" in explained[3].call) == on_gpu
    close(output_and_gradients(model, x), before)
    unswap(model)
    assert {type(m) for m in model if "Conv" in type(m).__name__} == {nn.Conv2d}


def test_an_activation_after_a_convolution_without_a_bias_is_left():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 3, 3, bias=False), nn.ReLU())
    report = swap(model)
    assert not report.replaced and not report.fused  # three channels gain nothing with a bias either
    assert [(r.path, r.was) for r in report.left] == [("0, 1", "Conv2d -> ReLU")]
    assert "not fused: without a bias it was not measured" in report.left[0].reason


def test_a_convolution_of_aeup_is_torchs():
    made = aeup.Conv2d(16, 8, 3, 2, 1, 1, 2, padding_mode="reflect", activation=("leaky_relu", 0.3)).double()
    plain = nn.Conv2d(16, 8, 3, 2, 1, 1, 2, padding_mode="reflect").double()
    plain.load_state_dict(made.state_dict())
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    for input in (x, x[0]):
        close((made(input),), (torch.nn.functional.leaky_relu(plain(input), 0.3),))
    assert "activation=('leaky_relu', 0.3)" in repr(made)
    with pytest.raises(ValueError, match="activation"):
        aeup.Conv2d(16, 8, 3, activation="rely")
    with pytest.raises(RuntimeError, match="channels"):
        made(x[:, :3])


def test_what_torch_serves():
    conv, x = aeup.Conv2d(16, 16, 3), torch.randn(2, 16, 5, 6)
    assert "on a GPU" in conv._refuses(x) and conv._refuses(SimpleNamespace(is_cuda=True)) is None
    padded = aeup.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
    assert padded._refuses(SimpleNamespace(is_cuda=True)) == "pads with zeros, padding_mode is 'circular'"


def test_nothing_is_copied(monkeypatch):
    """The upsampled map of an upsampling by 1 is the input."""
    for chain in (plain.BY_AEUP, plain.BY_TORCH):
        monkeypatch.setattr(chain, "resample", None)
    monkeypatch.setattr(plain, "Plan", None)
    x, w = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    for backend in ("auto", "torch"):
        with aeup.backend(backend):
            y = aeup.upsample_conv2d(x, w, scale_factor=1, padding=1, activation="relu")
        want = torch.conv2d(x, w, padding=1).relu()
        torch.testing.assert_close(y, want)
        grad = torch.randn_like(y)
        for a, b in zip(*(torch.autograd.grad(t, (x, w), grad) for t in (y, want)), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(TypeError):  # nearest to the same size by another scale is no copy
        aeup.upsample_conv2d(x, w, scale_factor=1.1)


def test_a_parametrised_weight_is_computed_once(on_gpu):
    """Each time that it is read, spectral_norm iterates."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).double()
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    other = copy.deepcopy(model)
    swap(model)
    for m in (model, other):
        torch.manual_seed(0)
        parametrizations.spectral_norm(m[0])
    close(output_and_gradients(model, x), output_and_gradients(other, x))
    close(model.state_dict().values(), other.state_dict().values())


def test_compile_export_and_fx(on_gpu):
    model, x = convolutions(), torch.randn(2, 16, 9, 7, dtype=torch.float64)
    other = copy.deepcopy(model)
    swap(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for input in (x, torch.randn(3, 16, 8, 11, dtype=torch.float64)):
        close(output_and_gradients(compiled, input), output_and_gradients(other, input))
    close([torch.fx.symbolic_trace(model)(x)], [other(x)])
    batch = torch.export.Dim("batch")
    for strict in (False, True):
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict).module()
        close([program(torch.cat([x, x, x]))], [other(torch.cat([x, x, x]))])


def test_what_torch_serves_is_compiled_whole():
    """Notes for aeup.explain break no graph."""
    model = nn.Sequential(aeup.Upsample(scale_factor=2, mode="linear"), nn.Flatten(1, -1), nn.Unflatten(1, (4, 1, -1)))
    other = nn.Sequential(nn.Upsample(scale_factor=2, mode="linear"), *model[1:])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in (5, 8):
        x = torch.randn(3, 4, size)
        close([compiled(x)], [other(x)])
