"""The registered operators of the convolutions, transposed, after an upsampling and alone: opcheck, gradients,
transforms, compile, export, autocast, once for the table of map_ops; then what the transposed convolution alone has."""

import copy
import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, check_budget
from map_cases import ACTIVATIONS, Log, Named, gradients_where
from map_ops import CONV, CONV_TRANSPOSE, OPS
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from upsample_conv_cases import always_folded

import aeup
from aeup.ops import compiled
from aeup.ops.epilogue import ACTIVATIONS as NAMES
from aeup.ops.epilogue import activate, activation_gradient

pytestmark = pytest.mark.usefixtures("one_thread")
FUSED = (None, "relu", "leaky_relu", "tanh", "sigmoid")
every_op = pytest.mark.parametrize("op", OPS, ids=str)
epilogue_gradient = torch.ops.aeup.conv_epilogue_gradient


def rows(of):
    """One test for each op and each of its arguments that `of` gives."""
    return pytest.mark.parametrize(("op", "arguments"), [(op, a) for op in OPS for a in of(op)], ids=str)


every_call = rows(lambda op: op.arguments)
few_calls = rows(lambda op: op.few)
transformed_calls = rows(lambda op: op.transformed)


@pytest.fixture(autouse=True)
def folded():
    with always_folded():
        yield


@every_call
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(op, arguments, layout):
    x, w, b, dy = op.tensors(arguments, torch.float32, layout)
    for bias, activation in ((b, None), (None, "relu")):
        torch.library.opcheck(op.forward.default, (x, w, bias, *arguments, activation))
    for gradient, args in zip(op.gradients, op.of_gradients(x, w, dy, arguments), strict=True):
        torch.library.opcheck(gradient.default, args)


@few_calls
def test_opcheck_activations_and_empty_batch(op, arguments):
    x, w, b, _ = op.tensors(arguments, torch.float32)
    for activation in ("leaky_relu", "silu", "gelu", "tanh", "sigmoid"):
        torch.library.opcheck(op.forward.default, (x, w, b, *arguments, activation, 0.2))
    torch.library.opcheck(op.forward.default, (x.detach()[:0], w, b, *arguments))


@every_call
def test_gradients_of_first_and_second_order(op, arguments):
    x, w, b, dy = op.tensors(arguments, batch=1)
    fast = partial(torch.autograd.gradgradcheck, fast_mode=True)
    call = partial(op.function, **op.keywords(arguments))
    torch.testing.assert_close(call(x, w, b), op.by_torch(x, w, b, **op.keywords(arguments)))
    assert torch.autograd.gradcheck(call, (x, w, b), check_forward_ad=True, check_batched_grad=True)
    assert fast(call, (x, w, b), check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(lambda x, w, b: op.forward(x, w, b, *arguments), (x, w, b))
    assert fast(lambda x, w, b: op.forward(x, w, b, *arguments), (x, w, b))
    for gradient, args in zip(op.gradients, op.of_gradients(x, w, dy, arguments), strict=True):
        assert torch.autograd.gradcheck(lambda a, b, fn=gradient, r=args[2:]: fn(a, b, *r), args[:2])
        assert fast(lambda a, b, fn=gradient, r=args[2:]: fn(a, b, *r), args[:2])


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
@few_calls
def test_gradients_with_activation(op, arguments, activation):
    x, w, b, _ = op.tensors(arguments, batch=1)
    name, slope = activation if isinstance(activation, tuple) else (activation, 0.01)
    first, second = (
        partial(check, fast_mode=op.fast_mode) for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
    )
    call = partial(op.function, **op.keywords(arguments), activation=activation)
    assert first(call, (x, w, b), check_forward_ad=True)
    assert second(call, (x, w, b))

    def registered(x, w, b):
        return op.forward(x, w, b, *arguments, name, slope)

    assert first(registered, (x, w, b))
    assert second(registered, (x, w, b))
    torch.testing.assert_close(registered(x, w, b), op.by_torch(x, w, b, activation, **op.keywords(arguments)))


@every_call
def test_adjoints(op, arguments):
    """<dy, T(x, w)> = <x, X(dy, w)> = <w, W(dy, x)>."""
    x, w, _, dy = op.tensors(arguments, grad=False)
    forward = (op.forward(x, w, None, *arguments) * dy).sum()
    for gradient, args, of in zip(op.gradients, op.of_gradients(x, w, dy, arguments), (x, w), strict=True):
        torch.testing.assert_close((gradient(*args) * of).sum(), forward)


# --- transforms ---


@pytest.mark.parametrize("registered", (False, True))
@pytest.mark.parametrize("batched", list(itertools.product((True, False), repeat=3))[:-1], ids=str)
@transformed_calls
def test_vmap(op, arguments, batched, registered):
    def call(x, w, b, activation):
        if registered:
            return op.forward(x, w, b, *arguments, activation)
        return op.function(x, w, b, **op.keywords(arguments), activation=activation)

    one = op.leaves(arguments, (2, 4, 3, 5), (3, 3))
    many = [torch.randn(*t.shape, 3, dtype=t.dtype) if m else t for t, m in zip(one, batched, strict=True)]
    dims = tuple(-1 if m else None for m in batched)
    for activation in (None, "tanh"):
        got = torch.vmap(partial(call, activation=activation), dims)(*many)
        expected = [
            call(*(t[..., i] if m else t for t, m in zip(many, batched, strict=True)), activation) for i in range(3)
        ]
        torch.testing.assert_close(got, torch.stack(expected))


@every_op
def test_vmap_of_the_gradients(op):
    x, w, _, dy = op.tensors(op.arguments[0], grad=False)
    for gradient, args in zip(op.gradients, op.of_gradients(x, w, dy, op.arguments[0]), strict=True):
        for dims in ((0, None), (None, 1), (2, 0)):
            a, b = (t if d is None else torch.stack([t, t * 2, t + 1], d) for t, d in zip(args, dims, strict=False))
            got = torch.vmap(lambda a, b, fn=gradient, r=args[2:]: fn(a, b, *r), dims)(a, b)
            for i in range(3):
                pair = [t if d is None else t.select(d, i) for t, d in zip((a, b), dims, strict=True)]
                torch.testing.assert_close(got[i], gradient(*pair, *args[2:]))


@transformed_calls
def test_function_transforms(op, arguments):
    x, w, b = op.leaves(arguments, (3, 4, 3, 5), (3, 3))

    def loss(fn, x, w, b):
        return fn(x, w, b, **op.keywords(arguments), activation="silu").square().sum()

    def of_one(f):
        return f if op.takes_unbatched else lambda x, w, b: f(x.unsqueeze(0), w, b)

    every = (0, 1, 2)
    for transform in (
        lambda f: torch.func.grad(f, every),
        lambda f: torch.vmap(torch.func.grad(of_one(f), every), (0, None, None)),
        lambda f: torch.func.hessian(f, 2),
        lambda f: lambda *p: torch.func.jvp(f, p, tuple(t + 1 for t in p)),
        lambda f: lambda *p: torch.func.jvp(torch.func.grad(f, every), p, tuple(t + 1 for t in p)),
    ):
        ours, theirs = (transform(partial(loss, fn))(x, w, b) for fn in (op.function, op.by_torch))
        torch.testing.assert_close(ours, theirs)


# --- compile and export ---


def results(model, x):
    """The output, and the gradients of the input and of each parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])


def largest_error(got, reference):
    """Of any tensor, relative to its largest element."""
    assert all(torch.isfinite(t).all() for t in got)
    return max((a - b).abs().max() / b.abs().max() for a, b in zip(got, reference, strict=True)).item()


@every_op
@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_whole_graph(op, dynamic):
    """Within the error budget, not bit by bit: the two sum the gradient of a bias in another order, as torch's do."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(*op.layers())
    compiled_model = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 4, 5, 6), (1, 4, 8, 4), (3, 4, 9, 7)) if dynamic else ((2, 4, 5, 6),):
        x = torch.randn(shape)
        with aeup.backend("torch"):
            reference, torchs = results(copy.deepcopy(model).double(), x.double()), results(model, x)
        allowed = 2 * largest_error(torchs, reference) + 4 * torch.finfo(x.dtype).eps
        assert largest_error(results(compiled_model, x), reference) <= allowed
        assert largest_error(results(model, x), reference) <= allowed


@every_op
def test_compile_with_inductor_and_autocast(op, inductor):
    layer = op.layers()[0]
    fn = torch.compile(lambda x: layer(x + 1) * 3, fullgraph=True)
    for x in (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(fn(x), layer(x + 1) * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x))


@every_op
def test_export_with_dynamic_sizes(op):
    model = torch.nn.Sequential(*op.layers())
    n, h = (torch.export.Dim(name, min=least, max=64) for name, least in (("n", 2), ("h", op.least_height)))
    program = torch.export.export(model, (torch.randn(2, 4, 8, 9),), dynamic_shapes=({0: n, 2: h},))
    assert sum(node.target is op.forward.default for node in program.graph.nodes) == len(model)
    x = torch.randn(5, 4, 11, 9)
    torch.testing.assert_close(program.module()(x), model(x))


@every_op
def test_modes_and_subclasses_see_the_operator(op):
    kwargs = op.keywords(op.transformed[0])
    x, w, b = op.leaves(op.transformed[0], (1, 4, 3, 5), (3, 3))
    with Log() as log:
        op.function(x, w, b, **kwargs, activation="relu")
    assert op.forward.default in log.seen
    for args in ((x.as_subclass(Named), w), (x, w.as_subclass(Named))):
        Named.seen.clear()
        assert isinstance(op.function(*args, **kwargs), Named) and op.function in Named.seen
    y = op.function(x.to("meta"), w.to("meta"), **kwargs)
    assert y.shape == op.by_torch(x, w, b, **kwargs).shape == ((1, 6, 2, 3) if op is CONV else (1, 6, 6, 10))


# --- autocast ---


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@every_call
def test_autocast_as_torch(op, arguments, dtype):
    x, w, b, dy = op.tensors(arguments, torch.float32, grad=False)
    call = partial(op.function, **op.keywords(arguments))
    with torch.autocast("cpu", dtype=dtype):
        for kind in (torch.float32, torch.bfloat16, torch.float64):
            given = [t.to(kind) for t in (x, w, b)]
            assert call(*given).dtype == op.by_torch(*given, **op.keywords(arguments)).dtype
            assert op.forward(*given, *arguments).dtype == (torch.float64 if kind is torch.float64 else dtype)
        leaves = [t.requires_grad_() for t in (x, w, b)]
        y = call(*leaves, activation="relu")
    assert y.dtype == dtype
    assert [t.dtype for t in torch.autograd.grad(y, leaves, dy.to(dtype))] == [torch.float32] * 3
    with torch.autocast("cpu", dtype=dtype, enabled=False):
        assert call(x, w).dtype == torch.float32
    with torch.autocast("cuda", dtype=dtype) if torch.cuda.is_available() else nullcontext():
        assert call(x, w).dtype == torch.float32


# --- the registered operators check what they are given ---


@every_op
def test_bad_input(op):
    arguments = op.arguments[0]
    x, w, b, dy = op.tensors(arguments, torch.float32, grad=False)
    for args, error, says in (
        ((x[:, :3], w, b, *arguments), RuntimeError, "to have 4 channels, but got 3"),
        ((x, w.double(), None, *arguments), RuntimeError, "should be the same|one dtype and device"),
        ((x, w, b[:2], *arguments), RuntimeError, "bias"),
        ((x, w, b, *arguments, "swish"), ValueError, "activation must be None or one of relu.*'swish'"),
    ):
        with pytest.raises(error, match=says):
            op.forward(*args)
    input_gradient, weight_gradient = op.gradients
    of_x, of_w = op.of_gradients(x, w, dy, arguments)
    with pytest.raises(RuntimeError, match=r"input_gradient: grad_output \[.*does not fit weight"):
        input_gradient(of_x[0][:, :, 2:], *of_x[1:])
    with pytest.raises(RuntimeError, match="weight_gradient: .*does not fit input"):
        weight_gradient(of_w[0][:1], *of_w[1:])
    with pytest.raises(RuntimeError, match="one dtype and device"):
        weight_gradient(of_w[0].double(), *of_w[1:])
    with pytest.raises(RuntimeError, match="4-D"):
        weight_gradient(of_w[0][0], *of_w[1:])


# --- the transposed convolution alone ---


def test_bad_input_of_the_transposed_convolution():
    op, arguments = CONV_TRANSPOSE, CONV_TRANSPOSE.arguments[0]
    x, w, _, dy = op.tensors(arguments, torch.float32, grad=False)
    input_gradient, _ = op.gradients
    of_x, _ = op.of_gradients(x, w, dy, arguments)
    with pytest.raises(RuntimeError, match=r"input_gradient: grad_output \[.*does not fit weight"):
        input_gradient(of_x[0], of_x[1], (9, 9), *of_x[3:])
    with pytest.raises(RuntimeError, match="groups=2 does not fit"):
        input_gradient(*of_x[:5], 2, of_x[6])
    with pytest.raises(RuntimeError, match="output must have the shape"):
        epilogue_gradient(dy, None, "relu", 0.0, True)
    with pytest.raises(ValueError, match="gradient of gelu cannot"):
        epilogue_gradient(dy, dy, "gelu", 0.0, True)


def in_nan(*shape):
    """A channels-last tensor with NaN around it."""
    n, c, h, w = shape
    memory = torch.full((8192 + n * c * h * w,), torch.nan, dtype=torch.bfloat16)
    return memory[96 : 96 + n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2).normal_()


def test_an_output_narrower_than_the_stride_is_not_read_past_its_end():
    """As oneDNN does: this very conv2d in bfloat16 gives NaN for the gradient of the input."""
    torch.manual_seed(0)
    dy, x, w = in_nan(3, 4, 4, 1), in_nan(3, 16, 5, 1), torch.randn(16, 1, 4, 4).bfloat16()
    shared = (1, 2), (2, 2), 4, (1, 1)
    for gradient, args in zip(CONV_TRANSPOSE.gradients, ((dy, w, (5, 1)), (dy, x, (4, 4))), strict=True):
        exact = gradient(*(t.double() for t in args[:2]), args[2], *shared)
        torch.testing.assert_close(gradient(*args, *shared).double(), exact, rtol=0.02, atol=0.02)


def of_epilogue():
    return CONV_TRANSPOSE.tensors(CONV_TRANSPOSE.arguments[0])[3]


@pytest.mark.parametrize("activation", FUSED)
def test_opcheck_epilogue(activation):
    dy = of_epilogue().detach().float().requires_grad_()
    y = torch.rand_like(dy.detach()).requires_grad_() if activation else None
    torch.library.opcheck(epilogue_gradient.default, (dy, y, activation, 0.2, activation != "tanh"))


@pytest.mark.parametrize("activation", FUSED[1:])
def test_gradients_of_the_epilogue(activation):
    dy = of_epilogue()
    y = torch.rand(dy.shape, dtype=torch.float64).requires_grad_()

    def epilogue(dy, y):
        return epilogue_gradient(dy, y, activation, 0.2, True)

    assert torch.autograd.gradcheck(epilogue, (dy, y)) and torch.autograd.gradgradcheck(epilogue, (dy, y))


def test_vmap_of_the_epilogue():
    dy = of_epilogue().detach()
    y = torch.rand(3, *dy.shape, dtype=torch.float64)
    before, bias = torch.vmap(lambda g, y: epilogue_gradient(g, y, "tanh", 0.0, True), (None, 0))(dy, y)
    torch.testing.assert_close(before, dy * (1 - y * y))
    torch.testing.assert_close(bias, before.sum((1, 3, 4)))


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
        before, bias = epilogue_gradient(grad, y, name, 0.2, True)
        torch.testing.assert_close(before, grad * by)
        torch.testing.assert_close(bias, (grad * by).sum((0, 2, 3)))
        assert epilogue_gradient(grad, y, name, 0.2, False)[1].numel() == 0


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


@pytest.mark.parametrize("activation", (None, "relu", "tanh"))
@pytest.mark.parametrize("needs", ((True, True, True), (False, True, True), (True, False, False)))
def test_gradients_of_the_extension_come_in_one_call(activation, needs, monkeypatch):
    """The compiled operators, played by torch: the arguments that they get and what becomes of their results."""
    calls, kept = [], []

    def plan(x, w, *args):
        kept.append(args)
        return len(kept) - 1

    def planned(x, w, b, number):
        sh, sw, ph, pw, oph, opw, groups, dh, dw, number, slope, tf32 = kept[number]
        y = F.conv_transpose2d(x, w, b, (sh, sw), (ph, pw), (oph, opw), groups, (dh, dw))
        return activate(y, (None, *NAMES)[number], slope)

    def backward(grad, x, w, y, sh, sw, ph, pw, groups, dh, dw, number, slope, tf32, *wanted):
        calls.append(wanted)
        grad = activation_gradient(grad, y, (None, *NAMES)[number], slope)
        found = torch.ops.aten.convolution_backward.default(
            grad, x, w, [w.shape[1] * groups], (sh, sw), (ph, pw), (dh, dw), True, (1, 0), groups, wanted
        )
        return tuple(grad.new_empty(0) if t is None else t for t in found)

    played = {"conv_transpose2d_plan": plan, "conv_planned": planned, "conv_transpose2d_backward": backward}
    monkeypatch.setattr(compiled, "raw", lambda name, *_: played[name])
    monkeypatch.setattr(compiled, "refusal", lambda *args: None)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((2, 6, 5, 4), (6, 4, 4, 3), (8,))]
    args = {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "groups": 2}

    with aeup.backend("cuda"):
        got = gradients_where(needs, partial(aeup.conv_transpose2d, **args, activation=activation), tensors)
    expected = gradients_where(needs, lambda *t: activate(F.conv_transpose2d(*t, **args), activation, 0.01), tensors)
    assert calls == [needs]
    torch.testing.assert_close(got, expected)
