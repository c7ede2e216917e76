"""The registered operators of the transposed convolution: opcheck, gradients, transforms, compile, export; torch's own
samples."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import check_budget
from conv_cases import ACTIVATIONS, LAYOUTS, by_torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import aeup

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = torch.ops.aeup
# stride, padding, output_padding, groups, dilation of input [2, 4, 3, 4] with weight [4, 3, 3, 2]
ARGUMENTS = (
    ((2, 1), (1, 0), (1, 0), 1, (1, 1)),
    ((1, 1), (0, 0), (0, 0), 2, (1, 2)),
    ((2, 3), (1, 0), (0, 3), 4, (3, 4)),
)
FUSED = (None, "relu", "leaky_relu", "tanh", "sigmoid")


def tensors(arguments, dtype=torch.float64, layout="nchw", grad=True):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, 4), (4, 3, 3, 2), (3 * arguments[3],)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    y = F.conv_transpose2d(x, w, b, *arguments)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return tuple(t.requires_grad_(grad) for t in (x, w, b, dy))


def of_gradients(x, w, dy, arguments):
    s, p, _, groups, d = arguments
    return (dy, w, x.shape[2:], s, p, groups, d), (dy, x, w.shape[2:], s, p, groups, d)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(arguments, layout):
    x, w, b, dy = tensors(arguments, torch.float32, layout)
    for bias, activation in ((b, None), (None, "relu")):
        torch.library.opcheck(OPS.conv_transpose2d.default, (x, w, bias, *arguments, activation))
    of_x, of_w = of_gradients(x, w, dy, arguments)
    torch.library.opcheck(OPS.conv_transpose2d_input_gradient.default, of_x)
    torch.library.opcheck(OPS.conv_transpose2d_weight_gradient.default, of_w)


@pytest.mark.parametrize("activation", FUSED)
def test_opcheck_epilogue(activation):
    _, _, _, dy = tensors(ARGUMENTS[0], torch.float32)
    y = torch.rand_like(dy.detach()).requires_grad_() if activation else None
    torch.library.opcheck(OPS.conv_epilogue_gradient.default, (dy, y, activation, 0.2, activation != "tanh"))


def test_opcheck_activations_and_empty_batch():
    x, w, b, _ = tensors(ARGUMENTS[0], torch.float32)
    for activation in ("leaky_relu", "silu", "gelu", "tanh", "sigmoid"):
        torch.library.opcheck(OPS.conv_transpose2d.default, (x, w, b, *ARGUMENTS[0], activation, 0.2))
    torch.library.opcheck(OPS.conv_transpose2d.default, (x.detach()[:0], w, b, *ARGUMENTS[0]))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_gradients_of_first_and_second_order(arguments):
    x, w, b, dy = tensors(arguments)
    x, dy = (t.detach()[:1].requires_grad_() for t in (x, dy))
    s, p, op, groups, d = arguments
    fast = partial(torch.autograd.gradgradcheck, fast_mode=True)
    call = partial(aeup.conv_transpose2d, stride=s, padding=p, output_padding=op, groups=groups, dilation=d)
    assert torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True, check_batched_grad=True)
    assert fast(call, (x, w, b), check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(lambda x, w, b: OPS.conv_transpose2d(x, w, b, *arguments), (x, w, b))
    assert fast(lambda x, w, b: OPS.conv_transpose2d(x, w, b, *arguments), (x, w, b))
    of_x, of_w = of_gradients(x, w, dy, arguments)
    for op, args in ((OPS.conv_transpose2d_input_gradient, of_x), (OPS.conv_transpose2d_weight_gradient, of_w)):
        assert torch.autograd.gradcheck(lambda a, b, op=op, r=args[2:]: op(a, b, *r), args[:2])
        assert fast(lambda a, b, op=op, r=args[2:]: op(a, b, *r), args[:2])


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
def test_gradients_with_activation(activation):
    x, w, b, dy = tensors(ARGUMENTS[0])
    x = x.detach()[:1].requires_grad_()
    name, slope = activation if isinstance(activation, tuple) else (activation, 0.01)
    s, p, op, groups, d = ARGUMENTS[0]
    kwargs = {"stride": s, "padding": p, "output_padding": op, "groups": groups, "dilation": d}
    call = partial(aeup.conv_transpose2d, **kwargs, activation=activation)
    assert torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b))

    def registered(x, w, b):
        return OPS.conv_transpose2d(x, w, b, *ARGUMENTS[0], name, slope)

    assert torch.autograd.gradcheck(registered, (x, w, b))
    assert torch.autograd.gradgradcheck(registered, (x, w, b))
    torch.testing.assert_close(registered(x, w, b), by_torch(x, w, b, activation, **kwargs))
    if name in FUSED:
        y = torch.rand(dy.shape, dtype=torch.float64).requires_grad_()

        def epilogue(dy, y):
            return OPS.conv_epilogue_gradient(dy, y, name, slope, True)

        assert torch.autograd.gradcheck(epilogue, (dy, y)) and torch.autograd.gradgradcheck(epilogue, (dy, y))


def test_epilogue_gradient():
    grad, y = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5) - 0.5
    derivative = {
        None: torch.ones_like(y),
        "relu": (y > 0).float(),
        "leaky_relu": torch.where(y > 0, 1.0, 0.2),
        "tanh": 1 - y * y,
        "sigmoid": y * (1 - y),
    }
    for name, by in derivative.items():
        before, bias = OPS.conv_epilogue_gradient(grad, y, name, 0.2, True)
        torch.testing.assert_close(before, grad * by)
        torch.testing.assert_close(bias, (grad * by).sum((0, 2, 3)))
        assert OPS.conv_epilogue_gradient(grad, y, name, 0.2, False)[1].numel() == 0


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_adjoints(arguments):
    """<dy, T(x, w)> = <x, X(dy, w)> = <w, W(dy, x)>."""
    x, w, _, dy = tensors(arguments, grad=False)
    of_x, of_w = of_gradients(x, w, dy, arguments)
    forward = (OPS.conv_transpose2d(x, w, None, *arguments) * dy).sum()
    torch.testing.assert_close((OPS.conv_transpose2d_input_gradient(*of_x) * x).sum(), forward)
    torch.testing.assert_close((OPS.conv_transpose2d_weight_gradient(*of_w) * w).sum(), forward)


# --- transforms ---


def transform_call(x, w, b, activation=None):
    return aeup.conv_transpose2d(x, w, b, 2, 1, 1, 2, activation=activation)


def registered_call(x, w, b, activation=None):
    return OPS.conv_transpose2d(x, w, b, (2, 2), (1, 1), (1, 1), 2, (1, 1), activation)


@pytest.mark.parametrize("call", (transform_call, registered_call))
@pytest.mark.parametrize("batched", list(itertools.product((True, False), repeat=3))[:-1], ids=str)
def test_vmap(call, batched):
    shapes = (2, 4, 3, 5), (4, 3, 3, 3), (6,)
    one = [torch.randn(s, dtype=torch.float64) for s in shapes]
    many = [torch.randn(*s, 3, dtype=torch.float64) if m else t for s, t, m in zip(shapes, one, batched, strict=True)]
    dims = tuple(-1 if m else None for m in batched)
    for activation in (None, "tanh"):
        got = torch.vmap(partial(call, activation=activation), dims)(*many)
        expected = [
            call(*(t[..., i] if m else t for t, m in zip(many, batched, strict=True)), activation) for i in range(3)
        ]
        torch.testing.assert_close(got, torch.stack(expected))


def test_vmap_of_the_gradients():
    x, w, _, dy = tensors(ARGUMENTS[0], grad=False)
    for op, args in zip(
        (OPS.conv_transpose2d_input_gradient, OPS.conv_transpose2d_weight_gradient),
        of_gradients(x, w, dy, ARGUMENTS[0]),
        strict=True,
    ):
        for dims in ((0, None), (None, 1), (2, 0)):
            a, b = (t if d is None else torch.stack([t, t * 2, t + 1], d) for t, d in zip(args, dims, strict=False))
            got = torch.vmap(lambda a, b, op=op, r=args[2:]: op(a, b, *r), dims)(a, b)
            for i in range(3):
                pair = [t if d is None else t.select(d, i) for t, d in zip((a, b), dims, strict=True)]
                torch.testing.assert_close(got[i], op(*pair, *args[2:]))
    y = torch.rand(3, *dy.shape, dtype=torch.float64)
    before, bias = torch.vmap(lambda g, y: OPS.conv_epilogue_gradient(g, y, "tanh", 0.0, True), (None, 0))(dy, y)
    torch.testing.assert_close(before, dy * (1 - y * y))
    torch.testing.assert_close(bias, before.sum((1, 3, 4)))


def test_function_transforms():
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((3, 4, 3, 5), (4, 3, 3, 3), (6,)))

    def loss(x, w, b):
        return transform_call(x, w, b, "silu").square().sum()

    def theirs(x, w, b):
        return F.silu(F.conv_transpose2d(x, w, b, 2, 1, 1, 2)).square().sum()

    every = (0, 1, 2)
    for transform in (
        lambda f: torch.func.grad(f, every),
        lambda f: torch.vmap(torch.func.grad(f, every), (0, None, None)),
        lambda f: torch.func.hessian(f, 2),
        lambda f: lambda *p: torch.func.jvp(f, p, tuple(t + 1 for t in p)),
        lambda f: lambda *p: torch.func.jvp(torch.func.grad(f, every), p, tuple(t + 1 for t in p)),
    ):
        torch.testing.assert_close(transform(loss)(x, w, b), transform(theirs)(x, w, b))


# --- compile and export ---


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_whole_graph(dynamic):
    torch._dynamo.reset()
    layers = [aeup.ConvTranspose2d(4, 6, 4, 2, 1, activation=a) for a in ("relu", "gelu")]
    layers[1] = aeup.ConvTranspose2d(6, 3, 3, 2, 1, 1, groups=3, activation=("leaky_relu", 0.2))
    model = torch.nn.Sequential(*layers, aeup.ConvTranspose2d(3, 2, 3, activation="gelu"))
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 4, 5, 6), (1, 4, 8, 4), (3, 4, 9, 7)) if dynamic else ((2, 4, 5, 6),):
        x = torch.randn(shape, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        got, expected = compiled(x), model(z)
        torch.testing.assert_close(got, expected)
        mine = torch.autograd.grad(got.square().sum(), [x, *model.parameters()])
        theirs = torch.autograd.grad(expected.square().sum(), [z, *model.parameters()])
        torch.testing.assert_close(mine, theirs)


def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = aeup.ConvTranspose2d(4, 3, 4, 2, 1, activation="relu")
    fn = torch.compile(lambda x: layer(x + 1) * 3, fullgraph=True)
    for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(fn(x), layer(x + 1) * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x))


def test_export_with_dynamic_sizes():
    model = torch.nn.Sequential(
        aeup.ConvTranspose2d(4, 6, 4, 2, 1, activation="relu"), aeup.ConvTranspose2d(6, 3, 3, 2, 1, 1)
    )
    n, h = (torch.export.Dim(name, min=2, max=64) for name in ("n", "h"))
    program = torch.export.export(model, (torch.randn(2, 4, 8, 9),), dynamic_shapes=({0: n, 2: h},))
    assert sum(node.target is OPS.conv_transpose2d.default for node in program.graph.nodes) == 2
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
        aeup.conv_transpose2d(x, w, activation="relu")
    assert OPS.conv_transpose2d.default in seen

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    for args in ((x.as_subclass(Named), w), (x, w.as_subclass(Named))):
        seen.clear()
        assert isinstance(aeup.conv_transpose2d(*args, stride=2), Named) and aeup.conv_transpose2d in seen
    assert aeup.conv_transpose2d(x.to("meta"), w.to("meta"), stride=2).shape == (1, 2, 6, 6)


# --- PyTorch's own samples ---

OP = next(op for op in op_db if op.name == "nn.functional.conv_transpose2d")


@pytest.mark.parametrize("dtype", sorted(OP.supported_dtypes("cpu"), key=str), ids=str)
def test_opinfo(dtype):
    ran = 0
    differentiable = dtype.is_floating_point or dtype.is_complex
    for s in OP.sample_inputs("cpu", dtype, requires_grad=differentiable):
        expected = OP.op(s.input, *s.args, **s.kwargs)
        got = aeup.conv_transpose2d(s.input, *s.args, **s.kwargs)
        assert got.shape == expected.shape and got.stride() == expected.stride() and got.dtype == dtype
        ran += 1
        if not dtype.is_floating_point:
            torch.testing.assert_close(got, expected)
            continue
        leaves = [t for t in (s.input, *s.args) if isinstance(t, torch.Tensor)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        reference = OP.op(*exact, **s.kwargs)
        results = [(got, leaves), (reference, exact), (expected, leaves)]
        check_budget(got, reference, expected)
        for mine, true, theirs in zip(
            *(torch.autograd.grad(y, of, torch.full_like(y, 0.25)) for y, of in results), strict=True
        ):
            mine, true, theirs = (t.view(1, -1) if t.dim() == 1 else t for t in (mine, true, theirs))
            check_budget(mine, true, theirs)
    assert ran > 5
    for e in OP.error_inputs("cpu") if OP.error_inputs_func else ():
        with pytest.raises(e.error_type, match=e.error_regex):
            aeup.conv_transpose2d(e.sample_input.input, *e.sample_input.args, **e.sample_input.kwargs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_moduleinfo(dtype):
    info = next(m for m in module_db if m.name == "nn.ConvTranspose2d")
    ran = 0
    for training in (True, False):
        for m in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
            build, call = m.constructor_input, m.forward_input
            theirs = torch.nn.ConvTranspose2d(*build.args, **{"dtype": dtype, **build.kwargs})
            ours = aeup.ConvTranspose2d(*build.args, **{"dtype": dtype, **build.kwargs})
            ours.load_state_dict(theirs.state_dict())
            got, expected = ours(*call.args, **call.kwargs), theirs(*call.args, **call.kwargs)
            torch.testing.assert_close(got, expected)
            leaves = [t for t in call.args if isinstance(t, torch.Tensor)]
            mine = torch.autograd.grad(got.square().sum(), [*leaves, *ours.parameters()])
            other = torch.autograd.grad(expected.square().sum(), [*leaves, *theirs.parameters()])
            torch.testing.assert_close(mine, other)
            ran += 1
    assert ran >= 4


# --- the registered operators check what they are given ---


def test_bad_input():
    x, w, b, dy = tensors(ARGUMENTS[0], torch.float32, grad=False)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        OPS.conv_transpose2d(x[:, :3], w, b, *ARGUMENTS[0])
    with pytest.raises(RuntimeError, match="should be the same"):
        OPS.conv_transpose2d(x, w.double(), None, *ARGUMENTS[0])
    with pytest.raises(RuntimeError, match="bias"):
        OPS.conv_transpose2d(x, w, b[:2], *ARGUMENTS[0])
    with pytest.raises(ValueError, match="activation must be None or one of relu.*'swish'"):
        OPS.conv_transpose2d(x, w, b, *ARGUMENTS[0], "swish")
    of_x, of_w = of_gradients(x, w, dy, ARGUMENTS[0])
    with pytest.raises(RuntimeError, match=r"input_gradient: grad_output \[.*does not fit weight"):
        OPS.conv_transpose2d_input_gradient(of_x[0], of_x[1], (9, 9), *of_x[3:])
    with pytest.raises(RuntimeError, match="groups=2 does not fit"):
        OPS.conv_transpose2d_input_gradient(*of_x[:5], 2, of_x[6])
    with pytest.raises(RuntimeError, match="weight_gradient: .*does not fit input"):
        OPS.conv_transpose2d_weight_gradient(of_w[0][:1], *of_w[1:])
    with pytest.raises(RuntimeError, match="one dtype and device"):
        OPS.conv_transpose2d_weight_gradient(of_w[0].double(), *of_w[1:])
    with pytest.raises(RuntimeError, match="4-D"):
        OPS.conv_transpose2d_weight_gradient(of_w[0][0], *of_w[1:])
    with pytest.raises(RuntimeError, match="output must have the shape"):
        OPS.conv_epilogue_gradient(dy, None, "relu", 0.0, True)
    with pytest.raises(ValueError, match="gradient of gelu cannot"):
        OPS.conv_epilogue_gradient(dy, dy, "gelu", 0.0, True)


@pytest.mark.parametrize("activation", (None, "relu", "tanh"))
@pytest.mark.parametrize("needs", ((True, True, True), (False, True, True), (True, False, False)))
def test_gradients_of_the_extension_come_in_one_call(activation, needs, monkeypatch):
    """The compiled operators, played by torch: the arguments that they get and what becomes of their results."""
    from aeup.ops import compiled
    from aeup.ops.epilogue import ACTIVATIONS, activate, activation_gradient

    calls = []

    def forward(x, w, b, sh, sw, ph, pw, oph, opw, groups, dh, dw, number, slope, tf32, family):
        y = F.conv_transpose2d(x, w, b, (sh, sw), (ph, pw), (oph, opw), groups, (dh, dw))
        return activate(y, (None, *ACTIVATIONS)[number], slope)

    def backward(grad, x, w, y, sh, sw, ph, pw, groups, dh, dw, number, slope, tf32, *wanted):
        calls.append(wanted)
        grad = activation_gradient(grad, y, (None, *ACTIVATIONS)[number], slope)
        found = torch.ops.aten.convolution_backward.default(
            grad, x, w, [w.shape[1] * groups], (sh, sw), (ph, pw), (dh, dw), True, (1, 0), groups, wanted
        )
        return tuple(grad.new_empty(0) if t is None else t for t in found)

    played = {"conv_transpose2d": forward, "conv_transpose2d_backward": backward}
    monkeypatch.setattr(compiled, "raw", played.__getitem__)
    monkeypatch.setattr(compiled, "refusal", lambda *args: None)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((2, 6, 5, 4), (6, 4, 4, 3), (8,))]
    args = {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "groups": 2}

    def gradients(fn):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        y = fn(*leaves)
        y.backward(torch.full_like(y, 0.5))
        return y, [t.grad for t in leaves]

    with aeup.backend("cuda"):
        y, got = gradients(lambda *t: aeup.conv_transpose2d(*t, **args, activation=activation))
    expected_y, expected = gradients(lambda *t: activate(F.conv_transpose2d(*t, **args), activation, 0.01))
    assert calls == [needs]
    torch.testing.assert_close(y, expected_y)
    for mine, true, need in zip(got, expected, needs, strict=True):
        assert (mine is None) == (not need)
        if need:
            torch.testing.assert_close(mine, true)
