"""The registered operators of upsampling with a convolution: opcheck, gradients, transforms, compile, export, and the
calls of the compiled extension."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from upsample_conv_cases import ACTIVATIONS, LAYOUTS, MODES, always_folded, by_torch

import aeup
from aeup.ops import compiled
from aeup.ops import upsample_conv_kernels as kernels
from aeup.ops.epilogue import ACTIVATIONS as NAMES
from aeup.ops.epilogue import activate, activation_gradient
from aeup.ops.interpolate import MODES as NUMBERED

pytestmark = pytest.mark.usefixtures("one_thread", "folded")
OPS = torch.ops.aeup
# size, mode, align_corners, scale_h, scale_w, padding, groups of input [2, 4, 3, 4] with weight [6, 4 / groups, 3, 2]
ARGUMENTS = (
    ((6, 8), "nearest", False, 2.0, 2.0, (1, 0), 1),
    ((9, 8), "nearest-exact", False, None, None, (0, 3), 2),
    ((6, 8), "bilinear", False, 2.0, 2.0, (1, 1), 2),
    ((5, 7), "bicubic", True, None, None, (1, 0), 1),
)


@pytest.fixture
def folded():
    with always_folded():
        yield


def tensors(arguments, dtype=torch.float64, layout="nchw", grad=True, batch=2):
    g = torch.Generator().manual_seed(0)
    shapes = (batch, 4, 3, 4), (6, 4 // arguments[6], 3, 2), (6,)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    (uh, uw), *_, (ph, pw), _ = arguments
    dy = torch.randn(batch, 6, uh + 2 * ph - 2, uw + 2 * pw - 1, generator=g, dtype=torch.float64).to(dtype)
    dy = dy.contiguous(memory_format=LAYOUTS[layout])
    return tuple(t.requires_grad_(grad) for t in (x, w, b, dy))


def of_gradients(x, w, dy, arguments):
    return (dy, w, x.shape[2:], *arguments), (dy, x, w.shape[2:], *arguments)


def public(arguments):
    size, mode, align, scale_h, scale_w, padding, groups = arguments
    how = {"size": size} if scale_h is None else {"scale_factor": (scale_h, scale_w)}
    return how | {"mode": mode, "align_corners": align or None, "padding": padding, "groups": groups}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(arguments, layout):
    x, w, b, dy = tensors(arguments, torch.float32, layout)
    for bias, activation in ((b, None), (None, "relu")):
        torch.library.opcheck(OPS.upsample_conv2d.default, (x, w, bias, *arguments, activation))
    of_x, of_w = of_gradients(x, w, dy, arguments)
    torch.library.opcheck(OPS.upsample_conv2d_input_gradient.default, of_x)
    torch.library.opcheck(OPS.upsample_conv2d_weight_gradient.default, of_w)


def test_opcheck_activations_and_empty_batch():
    for arguments in ARGUMENTS[::2]:
        x, w, b, _ = tensors(arguments, torch.float32)
        for activation in ("leaky_relu", "silu", "gelu", "tanh", "sigmoid"):
            torch.library.opcheck(OPS.upsample_conv2d.default, (x, w, b, *arguments, activation, 0.2))
        torch.library.opcheck(OPS.upsample_conv2d.default, (x.detach()[:0], w, b, *arguments))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_gradients_of_first_and_second_order(arguments):
    x, w, b, dy = tensors(arguments, batch=1)
    fast = partial(torch.autograd.gradgradcheck, fast_mode=True)
    call = partial(aeup.upsample_conv2d, **public(arguments))
    torch.testing.assert_close(call(x, w, b), by_torch(x, w, b, **public(arguments)))
    assert torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True, check_batched_grad=True)
    assert fast(call, (x, w, b), check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(lambda x, w, b: OPS.upsample_conv2d(x, w, b, *arguments), (x, w, b))
    assert fast(lambda x, w, b: OPS.upsample_conv2d(x, w, b, *arguments), (x, w, b))
    of_x, of_w = of_gradients(x, w, dy, arguments)
    for op, args in ((OPS.upsample_conv2d_input_gradient, of_x), (OPS.upsample_conv2d_weight_gradient, of_w)):
        assert torch.autograd.gradcheck(lambda a, b, op=op, r=args[2:]: op(a, b, *r), args[:2])
        assert fast(lambda a, b, op=op, r=args[2:]: op(a, b, *r), args[:2])


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS[:3:2], ids=str)
def test_gradients_with_activation(activation, arguments):
    x, w, b, _ = tensors(arguments, batch=1)
    name, slope = activation if isinstance(activation, tuple) else (activation, 0.01)
    call = partial(aeup.upsample_conv2d, **public(arguments), activation=activation)
    assert torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b), fast_mode=True)

    def registered(x, w, b):
        return OPS.upsample_conv2d(x, w, b, *arguments, name, slope)

    assert torch.autograd.gradcheck(registered, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(registered, (x, w, b), fast_mode=True)
    torch.testing.assert_close(registered(x, w, b), by_torch(x, w, b, activation, **public(arguments)))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_adjoints(arguments):
    """<dy, T(x, w)> = <x, X(dy, w)> = <w, W(dy, x)>."""
    x, w, _, dy = tensors(arguments, grad=False)
    of_x, of_w = of_gradients(x, w, dy, arguments)
    forward = (OPS.upsample_conv2d(x, w, None, *arguments) * dy).sum()
    torch.testing.assert_close((OPS.upsample_conv2d_input_gradient(*of_x) * x).sum(), forward)
    torch.testing.assert_close((OPS.upsample_conv2d_weight_gradient(*of_w) * w).sum(), forward)


# --- transforms ---


def transform_call(mode, x, w, b, activation=None):
    return aeup.upsample_conv2d(x, w, b, mode=mode, padding=1, groups=2, activation=activation)


def registered_call(mode, x, w, b, activation=None):
    return OPS.upsample_conv2d(x, w, b, (6, 10), mode, False, 2.0, 2.0, (1, 1), 2, activation)


@pytest.mark.parametrize("mode", ("nearest", "bilinear"))
@pytest.mark.parametrize("call", (transform_call, registered_call))
def test_vmap(call, mode):
    shapes = (2, 4, 3, 5), (6, 2, 3, 3), (6,)
    one = [torch.randn(s, dtype=torch.float64) for s in shapes]
    for batched in list(itertools.product((True, False), repeat=3))[:-1]:
        many = [
            torch.randn(*s, 3, dtype=torch.float64) if m else t for s, t, m in zip(shapes, one, batched, strict=True)
        ]
        dims = tuple(-1 if m else None for m in batched)
        for activation in (None, "tanh"):
            got = torch.vmap(partial(call, mode, activation=activation), dims)(*many)
            expected = [
                call(mode, *(t[..., i] if m else t for t, m in zip(many, batched, strict=True)), activation)
                for i in range(3)
            ]
            torch.testing.assert_close(got, torch.stack(expected))


def test_vmap_of_the_gradients():
    x, w, _, dy = tensors(ARGUMENTS[0], grad=False)
    for op, args in zip(
        (OPS.upsample_conv2d_input_gradient, OPS.upsample_conv2d_weight_gradient),
        of_gradients(x, w, dy, ARGUMENTS[0]),
        strict=True,
    ):
        for dims in ((0, None), (None, 1), (2, 0)):
            a, b = (t if d is None else torch.stack([t, t * 2, t + 1], d) for t, d in zip(args, dims, strict=False))
            got = torch.vmap(lambda a, b, op=op, r=args[2:]: op(a, b, *r), dims)(a, b)
            for i in range(3):
                pair = [t if d is None else t.select(d, i) for t, d in zip((a, b), dims, strict=True)]
                torch.testing.assert_close(got[i], op(*pair, *args[2:]))


@pytest.mark.parametrize("mode", ("nearest", "bicubic"))
def test_function_transforms(mode):
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((3, 4, 3, 2), (6, 2, 3, 3), (6,)))

    def loss(x, w, b):
        return transform_call(mode, x, w, b, "silu").square().sum()

    def theirs(x, w, b):
        return F.silu(by_torch(x, w, b, mode=mode, padding=1, groups=2)).square().sum()

    every = (0, 1, 2)
    for transform in (
        lambda f: torch.func.grad(f, every),
        lambda f: torch.vmap(torch.func.grad(lambda x, w, b: f(x.unsqueeze(0), w, b), every), (0, None, None)),
        lambda f: torch.func.hessian(f, 2),
        lambda f: lambda *p: torch.func.jvp(f, p, tuple(t + 1 for t in p)),
        lambda f: lambda *p: torch.func.jvp(torch.func.grad(f, every), p, tuple(t + 1 for t in p)),
    ):
        torch.testing.assert_close(transform(loss)(x, w, b), transform(theirs)(x, w, b))


# --- compile and export ---


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_whole_graph(dynamic):
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        aeup.UpsampleConv2d(4, 6, 3, padding=1, activation="relu"),
        aeup.UpsampleConv2d(6, 3, 3, mode="bilinear", padding="same", groups=3, activation=("leaky_relu", 0.2)),
        aeup.UpsampleConv2d(3, 2, 2, (1.5, 2), padding="same", activation="gelu"),
    )
    compiled_model = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 4, 5, 6), (1, 4, 8, 4), (3, 4, 9, 7)) if dynamic else ((2, 4, 5, 6),):
        x = torch.randn(shape, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        got, expected = compiled_model(x), model(z)
        torch.testing.assert_close(got, expected)
        mine = torch.autograd.grad(got.square().sum(), [x, *model.parameters()])
        theirs = torch.autograd.grad(expected.square().sum(), [z, *model.parameters()])
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_compile_with_inductor_and_autocast():
    torch._dynamo.reset()
    layer = aeup.UpsampleConv2d(4, 3, 3, padding=1, activation="relu")
    fn = torch.compile(lambda x: layer(x + 1) * 3, fullgraph=True)
    for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(fn(x), layer(x + 1) * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x))


def test_export_with_dynamic_sizes():
    model = torch.nn.Sequential(
        aeup.UpsampleConv2d(4, 6, 3, padding=1, activation="relu"), aeup.UpsampleConv2d(6, 3, 3, mode="bicubic")
    )
    n, h = (torch.export.Dim(name, min=2, max=64) for name in ("n", "h"))
    program = torch.export.export(model, (torch.randn(2, 4, 8, 9),), dynamic_shapes=({0: n, 2: h},))
    assert sum(node.target is OPS.upsample_conv2d.default for node in program.graph.nodes) == 2
    x = torch.randn(5, 4, 11, 9)
    torch.testing.assert_close(program.module()(x), model(x))


def test_modes_and_subclasses_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 2, 2)
    with Log():
        aeup.upsample_conv2d(x, w, activation="relu")
    assert OPS.upsample_conv2d.default in seen

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    for args in ((x.as_subclass(Named), w), (x, w.as_subclass(Named))):
        seen.clear()
        assert isinstance(aeup.upsample_conv2d(*args), Named) and aeup.upsample_conv2d in seen
    assert aeup.upsample_conv2d(x.to("meta"), w.to("meta")).shape == (1, 2, 5, 5)


# --- the registered operators check what they are given ---


def test_bad_input():
    x, w, b, dy = tensors(ARGUMENTS[0], torch.float32, grad=False)
    size, mode, *rest = ARGUMENTS[0]
    for args, error, says in (
        ((x[:, :3], w, b, *ARGUMENTS[0]), RuntimeError, "to have 4 channels, but got 3"),
        ((x, w.double(), None, *ARGUMENTS[0]), RuntimeError, "one dtype and device"),
        ((x, w, b[:2], *ARGUMENTS[0]), RuntimeError, "bias"),
        ((x[0], w, b, *ARGUMENTS[0]), RuntimeError, "4-D input"),
        ((x, w, b, (0, 8), mode, *rest), RuntimeError, "should be greater than 0"),
        ((x, w, b, size, "area", *rest), ValueError, "mode must be one of nearest"),
        ((x, w, b, *ARGUMENTS[0], "swish"), ValueError, "activation must be None or one of relu.*'swish'"),
    ):
        with pytest.raises(error, match=says):
            OPS.upsample_conv2d(*args)
    of_x, of_w = of_gradients(x, w, dy, ARGUMENTS[0])
    with pytest.raises(RuntimeError, match=r"input_gradient: grad_output \[.*does not fit weight"):
        OPS.upsample_conv2d_input_gradient(of_x[0][:, :, 1:], *of_x[1:])
    with pytest.raises(RuntimeError, match="groups must be at least 1"):
        OPS.upsample_conv2d_input_gradient(*of_x[:-1], 0)
    with pytest.raises(RuntimeError, match="weight_gradient: .*does not fit input"):
        OPS.upsample_conv2d_weight_gradient(of_w[0][:1], *of_w[1:])
    with pytest.raises(RuntimeError, match="one dtype and device"):
        OPS.upsample_conv2d_weight_gradient(of_w[0].double(), *of_w[1:])
    with pytest.raises(RuntimeError, match="4-D"):
        OPS.upsample_conv2d_weight_gradient(of_w[0][0], *of_w[1:])


# --- the compiled operators, played by torch: the arguments that they get and what becomes of their results ---


class Extension:
    """aeup_native, recorded."""

    def __init__(self):
        self.calls, self.family = [], "hopper"

    def __call__(self, name):
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
    kernels._yields.cache_clear()
    yield played
    kernels._family.cache_clear()
    kernels._yields.cache_clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", (None, "relu", "tanh"))
@pytest.mark.parametrize("needs", ((True, True, True), (False, True, True), (True, False, False)))
def test_calls_of_the_extension(activation, needs, mode, extension):
    given = [torch.randn(s, dtype=torch.float64) for s in ((2, 6, 5, 4), (8, 3, 4, 3), (8,))]
    args = {"scale_factor": (3.0, 2.0), "padding": (1, 2), "groups": 2, "mode": mode}

    def gradients(fn):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
        y = fn(*leaves)
        y.backward(torch.full_like(y, 0.5))
        return y, [t.grad for t in leaves]

    with aeup.backend("cuda"):
        y, got = gradients(partial(aeup.upsample_conv2d, **args, activation=activation))
    expected_y, expected = gradients(partial(by_torch, **args, activation=activation))
    ran = [name for name in extension.calls if not name.endswith("kernel")]
    if mode.startswith("nearest"):
        assert ran == ["upsample_conv2d", "upsample_conv2d_backward"]
    else:
        assert ran[0] == "resample_conv2d" and "upsample_conv2d_backward" not in ran
    torch.testing.assert_close(y, expected_y)
    for mine, true, need in zip(got, expected, needs, strict=True):
        assert (mine is None) == (not need)
        if need:
            torch.testing.assert_close(mine, true)


def test_auto_takes_the_extension_only_where_it_is_known_to_be_fast(extension):
    x, w = torch.randn(2, 4, 5, 4), torch.randn(3, 4, 3, 3)
    g, _ = aeup.functional.upsample_geometry_of(x.shape, w.shape, 2, "nearest", 1, 1)
    cuda = kernels.MAPS[kernels.Y].kernels["cuda"]
    args = (x, w, None, g, None, 0.0)
    extension.family = "hopper"
    assert cuda.refuses(*args) is None and "tuned table" in (cuda.passes(*args) or "tuned table")
    for family, says in (("gemm (hopper: no)", "gemm kernels are not measured"), ("refuses: too long", "too long")):
        kernels._family.cache_clear()
        kernels._yields.cache_clear()
        extension.family = family
        assert says in cuda.passes(*args)
    smooth = args[:3] + (g._replace(m=g.m._replace(mode="bilinear")), *args[4:])
    assert cuda.refuses(*smooth) is None and "ask for it by name" in cuda.passes(*smooth)
