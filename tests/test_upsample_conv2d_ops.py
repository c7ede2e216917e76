"""Upsampling with a convolution: what its registered operators refuse, and the calls of the compiled extension. All
that it has in common with the transposed convolution is in test_conv_ops."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from map_cases import gradients_where
from map_ops import UPSAMPLE_CONV
from upsample_conv_cases import MODES, always_folded, by_torch

import aeup
from aeup import tuned
from aeup.ops import compiled
from aeup.ops import upsample_conv_kernels as kernels
from aeup.ops import upsample_conv_plain as plain
from aeup.ops.epilogue import ACTIVATIONS as NAMES
from aeup.ops.epilogue import activate, activation_gradient
from aeup.ops.interpolate import MODES as NUMBERED
from aeup.ops.interpolate import Map, resample
from aeup.ops.upsample_conv_shapes import upsample_geometry, upsample_geometry_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folded():
    with always_folded():
        yield


def test_bad_input():
    op, arguments = UPSAMPLE_CONV, UPSAMPLE_CONV.arguments[0]
    x, w, b, dy = op.tensors(arguments, torch.float32, grad=False)
    size, mode, *rest = arguments
    for args, error, says in (
        ((x[0], w, b, *arguments), RuntimeError, "4-D input"),
        ((x, w, b, (0, 8), mode, *rest), RuntimeError, "should be greater than 0"),
        ((x, w, b, size, "area", *rest), ValueError, "mode must be one of nearest"),
    ):
        with pytest.raises(error, match=says):
            op.forward(*args)
    of_x, _ = op.of_gradients(x, w, dy, arguments)
    with pytest.raises(RuntimeError, match="groups must be at least 1"):
        op.gradients[0](*of_x[:-1], 0)


# --- the compiled operators, played by torch: the arguments that they get and what becomes of their results ---


class Extension:
    """aeup_native, recorded."""

    def __init__(self):
        self.calls, self.kept, self.family = [], [], "hopper"

    def __call__(self, name, *device):
        def call(*args):
            self.calls.append(name)
            return getattr(self, name)(*args)

        return call

    def upsample_conv2d_kernel(self, x, w, sh, sw, ph, pw, groups, which, tf32, major, minor):
        assert x.is_meta and w.shape[1] * groups == x.shape[1] and which in (0, 1, 2)
        return self.family

    resample_conv2d_kernel = None

    @staticmethod
    def _act(y, number, slope):
        return activate(y, (None, *NAMES)[number], slope)

    def upsample_conv2d(self, x, w, b, sh, sw, ph, pw, groups, number, slope, tf32, family):
        return self._act(by_torch(x, w, b, scale_factor=(sh, sw), padding=(ph, pw), groups=groups), number, slope)

    def upsample_conv2d_plan(self, x, w, *args):
        self.kept.append((x.shape, x.stride(), w.shape, w.stride(), args))
        return len(self.kept) - 1

    def conv_planned(self, x, w, b, number):
        *alike, args = self.kept[number]
        assert [x.shape, x.stride(), w.shape, w.stride()] == alike
        return self.upsample_conv2d(x, w, b, *args, "")

    def upsample_conv2d_backward(self, grad, x, w, y, sh, sw, ph, pw, groups, number, slope, tf32, *wanted):
        grad = activation_gradient(grad, y, (None, *NAMES)[number], slope)
        return self._gradients(grad, x, w, wanted, scale_factor=(sh, sw), padding=(ph, pw), groups=groups)

    def upsample_conv2d_input_gradient(self, grad, w, ih, iw, sh, sw, ph, pw, groups, tf32, family):
        x = grad.new_zeros(grad.shape[0], w.shape[1] * groups, ih, iw)
        return self._gradients(
            grad, x, w, (True, False, False), scale_factor=(sh, sw), padding=(ph, pw), groups=groups
        )[0]

    def resample_conv2d(self, x, w, b, uh, uw, mode, align, scale_h, scale_w, ph, pw, groups, number, slope, tf32):
        return self._act(
            by_torch(x, w, b, **self._how(uh, uw, mode, align, scale_h, scale_w, ph, pw, groups)), number, slope
        )

    def resample_conv2d_input_gradient(self, grad, w, ih, iw, *rest):
        x = grad.new_zeros(grad.shape[0], w.shape[1] * rest[-2], ih, iw)
        return self._gradients(grad, x, w, (True, False, False), **self._how(*rest[:-1]))[0]

    def resample_conv2d_weight_gradient(self, grad, x, w, *rest):
        return self._gradients(grad, x, w, (False, True, False), **self._how(*rest[:-1]))[1]

    def conv_epilogue_gradient(self, grad, y, number, slope, bias):
        before = activation_gradient(grad, y, (None, *NAMES)[number], slope)
        return before, before.sum((0, 2, 3)) if bias else grad.new_empty(0)

    def _how(self, uh, uw, mode, align, scale_h, scale_w, ph, pw, groups):
        how = {"size": (uh, uw)} if scale_h == 0.0 else {"scale_factor": (scale_h, scale_w)}
        mode = NUMBERED[mode]
        return how | {"mode": mode, "align_corners": align or None, "padding": (ph, pw), "groups": groups}

    def _gradients(self, grad, x, w, wanted, **how):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, w, grad.new_zeros(w.shape[0]))]
            found = torch.autograd.grad(by_torch(*leaves, **how), leaves, grad)
        return tuple(t if want else grad.new_empty(0) for t, want in zip(found, wanted, strict=True))


@pytest.fixture
def extension(monkeypatch):
    played = Extension()
    played.resample_conv2d_kernel = lambda x, w, *rest: "tile"
    monkeypatch.setattr(compiled, "raw", played)
    monkeypatch.setattr(compiled, "refusal", lambda *args: None)
    kernels._family.cache_clear()
    yield played
    kernels._family.cache_clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", (None, "relu", "tanh"))
@pytest.mark.parametrize("needs", ((True, True, True), (False, True, True), (True, False, False)))
def test_calls_of_the_extension(activation, needs, mode, extension):
    given = [torch.randn(s, dtype=torch.float64) for s in ((2, 6, 5, 4), (8, 3, 4, 3), (8,))]
    args = {"scale_factor": (3.0, 2.0), "padding": (1, 2), "groups": 2, "mode": mode}

    with aeup.backend("cuda"):
        got = gradients_where(needs, partial(aeup.upsample_conv2d, **args, activation=activation), given)
    expected = gradients_where(needs, partial(by_torch, **args, activation=activation), given)
    ran = [name for name in extension.calls if not name.endswith("kernel")]
    if mode.startswith("nearest"):
        assert ran == ["upsample_conv2d_plan", "conv_planned", "upsample_conv2d_backward"]
    else:
        assert ran[0] == "resample_conv2d" and "upsample_conv2d_backward" not in ran
    torch.testing.assert_close(got, expected)


def test_tables_take_the_extension_only_where_it_is_known_to_be_fast(extension):
    g, _ = upsample_geometry_of((2, 4, 5, 4), (3, 4, 3, 3), 2, "nearest", 1, 1)
    op, gpu = kernels.MAPS[kernels.Y], torch.device("cuda")

    def taken(g, family):
        kernels._family.cache_clear()
        extension.family = family
        x, w = torch.randn(2, 4, 5, 4), torch.randn(3, 4, 3, 3)
        features = op.kind | op.features(op.problem(x, w, None, g, None, 0.0), gpu)
        return features["family"], next(rule for rule in tuned.rules(gpu, "") if rule.fits(features))

    assert taken(g, "hopper")[1].backend == "cuda"
    for family, known_as in (("gemm (hopper: no)", "gemm"), ("refuses: too long", "")):
        name, rule = taken(g, family)
        assert name == known_as and rule.backend == "composed" and "not measured" in rule.why
    smooth = g._replace(m=g.m._replace(mode="bilinear"))
    name, rule = taken(smooth, "hopper")
    assert name == "tile" and rule.backend == "composed" and "ask for it by name" in rule.why


@pytest.mark.parametrize("activation", (None, "relu", "silu"))
def test_the_composition_takes_the_convolution_that_is_chosen(activation):
    """As on a GPU: an upsampling by 1 is a convolution alone."""
    with_chosen = plain._OneAfterTheOther(
        partial(resample, backend="auto"), lambda t, g: plain._TORCH if plain.alone(g) else plain.CHOSEN
    )
    shape = (8, 6, 3, 3)
    g = upsample_geometry("test", Map(9, 7, 18, 14, "bilinear", False, False, 2.0, 2.0), 6, shape, 1, 1, 1)
    x, w, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 6, 9, 7), shape, shape[:1]))
    (y, dy), (want, dwant) = (
        (y, torch.autograd.grad(y, (x, w, b), torch.ones_like(y)))
        for y in (op.y(x, w, b, g, activation, 0.0) for op in (with_chosen, plain.BY_TORCH))
    )
    torch.testing.assert_close((y, *dy), (want, *dwant))
    with torch.no_grad():
        grad = torch.randn_like(y)
        for needs in itertools.product((True, False), repeat=3):
            kept = None if activation == "silu" else activation
            got, want = (op.backward(grad, x, w, y, g, kept, 0.0, needs) for op in (with_chosen, plain.BY_TORCH))
            for a, c, need in zip(got, want, needs, strict=True):
                assert not need or torch.equal(a, c) or torch.allclose(a, c)
        torch.testing.assert_close(with_chosen.x(grad, w, g), plain.BY_TORCH.x(grad, w, g))
        torch.testing.assert_close(with_chosen.w(grad, x, g, w), plain.BY_TORCH.w(grad, x, g, w))


def test_an_even_kernel_with_padding_same_in_transforms():
    """It makes a row too many, which goes: in channels-last, of which torch.func knows nothing."""

    def ours(x, w):
        return aeup.upsample_conv2d(x, w, padding="same")

    def theirs(x, w):
        return F.conv2d(F.interpolate(x, scale_factor=2), w, padding=(1, 1))[:, :, 1:]

    xs, ws = (torch.randn(3, *size, dtype=torch.float64) for size in ((2, 6, 4, 5), (4, 6, 2, 3)))
    last = xs[0].contiguous(memory_format=torch.channels_last)
    for transform in (
        lambda fn: torch.func.vmap(fn)(xs, ws),
        lambda fn: torch.func.vmap(fn, in_dims=(None, 0))(last, ws),
        lambda fn: torch.func.vmap(fn, in_dims=(0, None))(xs, ws[0].contiguous(memory_format=torch.channels_last)),
        lambda fn: torch.func.jacfwd(fn, argnums=1)(last, ws[0]),
        lambda fn: torch.func.vmap(torch.func.grad(lambda w, x: fn(x, w).sin().sum()), in_dims=(0, None))(ws, last),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))
