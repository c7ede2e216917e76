"""aeup.batch_norm and aeup.BatchNorm2d against torch's batch norm and activation, by the CPU's kernels; the registered
operators; what the CUDA kernels are asked, by a stand-in for them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from torch import nn

import aeup
from aeup.functional import parse_activation
from aeup.ops import batch_norm as norms
from aeup.ops.eager import Plans
from aeup.ops.epilogue import NUMBER, activate
from aeup.train.distributed import SyncBatchNorm, World

ACTIVATIONS = (None, "relu", "leaky_relu", ("leaky_relu", 0.3), "silu", "gelu", "tanh", "sigmoid")
forward, backward = torch.ops.aeup.batch_norm, torch.ops.aeup.batch_norm_backward


def tensors(shape=(3, 4, 5, 2), dtype=torch.float64, layout="nchw", affine=True, of=None):
    """x, running mean and variance, weight and bias."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    of = of or (torch.float64 if dtype is torch.float64 else torch.float32)
    mean, var, weight, bias = (torch.randn(shape[1], generator=g, dtype=torch.float64).to(of) for _ in range(4))
    return x, mean, var.abs() + 0.5, *((weight, bias) if affine else (None, None))


def views(x):
    """Of x [4, 9, 7, 6]: tensors of channels 2 to 8 (or 6 of an offset) that are not dense, or lie at an odd place."""
    return {
        "slice": x[1:3, 2:8, 1:5, ::2],
        "expanded": x[:1, 2:8].expand(3, -1, -1, -1),
        "channels-last slice": x.contiguous(memory_format=torch.channels_last)[:, 2:8],
        "offset": x.flatten()[5 : 5 + 2 * 6 * 3 * 7].view(2, 6, 3, 7),
    }


def by_torch(x, mean, var, weight=None, bias=None, *rest, activation=None, **options):
    return activate(F.batch_norm(x, mean, var, weight, bias, *rest, **options), *parse_activation(activation))


def results(fn, given, **options):
    """Output, gradients of x, weight and bias, and the running statistics afterwards."""
    x, mean, var, *affine = (t if t is None else t.clone(memory_format=torch.preserve_format) for t in given)
    leaves = [t.requires_grad_() for t in (x, *affine) if t is not None]
    y = fn(x, mean, var, *affine, **options)
    return y, *torch.autograd.grad(y.float().sin().sum(), leaves), mean, var


class Native:
    """In the place of the extension's operators: what they compute, on the CPU, and how often they were called."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.numbers = {number: name for name, number in NUMBER.items()}
        bound = lambda name, device, *rest: lambda *tensors: getattr(self, name)(*tensors, *rest)  # noqa: E731
        monkeypatch.setattr(norms.compiled, "bound", bound)
        monkeypatch.setattr(norms.compiled, "refusal", lambda t, name, device: None)
        monkeypatch.setattr(norms, "PLANS", Plans())
        for op in (norms.OP, norms.BACKWARD):
            monkeypatch.setitem(op.order, "cpu", ("cuda", "torch"))

    def batch_norm(self, x, weight, bias, mean, var, counter, training, momentum, eps, number, slope):
        self.calls.append("forward")
        norm = norms.Norm(training, momentum, eps, self.numbers[number], slope)
        return norms.reference(x.detach(), weight, bias, mean, var, counter, norm)

    def batch_norm_backward(self, grad, x, mean, invstd, weight, bias, training, number, slope, *wanted):
        self.calls.append("backward")
        norm = norms.Norm(training, 0.0, 0.0, self.numbers[number], slope)
        found = norms.gradients_by_torch(grad, x, mean, invstd, weight, bias, norm)
        return tuple(t if want else t.new_empty(0) for t, want in zip(found, wanted, strict=True))


@pytest.fixture(params=["cpu", "stand-in for CUDA"])
def native(request, monkeypatch):
    return None if request.param == "cpu" else Native(monkeypatch)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_as_torchs(native, activation):
    for training, layout, affine in itertools.product((True, False), LAYOUTS, (True, False)):
        given = tensors(layout=layout, affine=affine)
        options = dict(training=training, momentum=0.3, eps=1e-3, activation=activation)
        ours, torchs = results(aeup.batch_norm, given, **options), results(by_torch, given, **options)
        for a, b in zip(ours, torchs, strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert native is None or native.calls == ["forward", "backward"] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(native, dtype):
    for layout, affine in itertools.product(LAYOUTS, (True, False)):
        given = tensors(dtype=dtype, layout=layout, affine=affine)
        wide = [None if t is None else t.double() for t in given]
        for training in (True, False):
            options = dict(training=training, activation="silu")
            ours, exact = results(aeup.batch_norm, given, **options), results(by_torch, wide, **options)
            assert ours[0].dtype is ours[1].dtype is dtype and ours[-1].dtype is torch.float32
            for a, b in zip(ours, exact, strict=True):
                torch.testing.assert_close(
                    a.double(), b, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
                )


def test_parameters_of_the_inputs_dtype(monkeypatch):
    """As after model.bfloat16(). Mixtures go to torch."""
    native = Native(monkeypatch)
    given = tensors(dtype=torch.bfloat16, of=torch.bfloat16)
    ours, torchs = (results(f, given, training=True, activation="relu") for f in (aeup.batch_norm, by_torch))
    assert native.calls == ["forward", "backward"] and ours[2].dtype is ours[-1].dtype is torch.bfloat16
    torch.testing.assert_close(ours, torchs, rtol=2**-6, atol=2**-6)
    mixed = [*given[:3], given[3].float(), given[4].float()]
    (choice, *_) = aeup.explain(aeup.batch_norm, *mixed, training=True)
    assert choice.backend == "torch" and choice.others["cuda"] == (
        "weight, bias and running statistics must all be float32 or bfloat16, "
        "got weight float32, bias float32, running_mean bfloat16, running_var bfloat16"
    )


def test_strided_inputs_and_gradients(native):
    x, mean, var, weight, bias = tensors((4, 9, 7, 6), torch.float32)
    for name, view in views(x).items():
        given = view.detach(), *(t[2:8] for t in (mean, var, weight, bias))
        for grad in ("sin", "sum"):
            found = []
            for fn in (aeup.batch_norm, by_torch):
                leaf = given[0].detach().requires_grad_()
                y = fn(leaf, *(t.clone() for t in given[1:]), training=True, activation="relu")
                found.append((y, *torch.autograd.grad(getattr(y, grad)().sum(), leaf)))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5), name


def test_strides_of_what_is_both_layouts():
    for shape, strides in (((2, 1, 3, 4), (12, 1, 4, 1)), ((2, 3, 1, 1), (3, 1, 3, 3)), ((2, 3, 1, 1), (3, 1, 1, 1))):
        x = torch.randn(24).as_strided(shape, strides)
        y, z = (f(x, None, None, training=True) for f in (aeup.batch_norm, by_torch))
        assert y.stride() == z.stride()


def test_without_running_statistics_and_without_gradients(native):
    x, _, _, weight, bias = tensors()
    with torch.no_grad():
        y = aeup.batch_norm(x, None, None, weight, bias, True, activation="gelu")
    torch.testing.assert_close(y, by_torch(x, None, None, weight, bias, True, activation="gelu"))
    frozen = aeup.batch_norm(x, None, None, weight, bias.requires_grad_(), True)
    (of_bias,) = torch.autograd.grad(frozen.sum(), bias)
    torch.testing.assert_close(of_bias, torch.full_like(bias, x.numel() / 4))


@pytest.mark.parametrize("training, activation", [(True, "silu"), (True, "leaky_relu"), (False, "tanh")])
def test_gradients_of_second_order(monkeypatch, training, activation):
    native = Native(monkeypatch)
    x, mean, var, weight, bias = tensors((2, 2, 2, 1))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def call(x, weight, bias):
        return aeup.batch_norm(x, mean.clone(), var.clone(), weight, bias, training, activation=activation)

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    assert {"forward", "backward"} == set(native.calls)


@pytest.mark.parametrize("training, affine, activation", [(True, True, "silu"), (False, False, "tanh")])
def test_registered_operators(training, affine, activation):
    x, mean, var, weight, bias = tensors((2, 2, 2, 1), affine=affine)
    for t in (x, weight, bias):
        t is None or t.requires_grad_()
    rest = training, 0.1, 1e-5, activation, 0.2
    torch.library.opcheck(forward.default, (x, weight, bias, mean, var, *rest))
    _, of_mean, invstd, *_ = forward(x, weight, bias, mean, var, *rest)
    grad = torch.randn_like(x).requires_grad_()
    statistics = [t.detach().requires_grad_() for t in (of_mean, invstd)]
    wanted = [True, affine, affine]
    args = grad, x, *statistics, weight, bias, training, activation, 0.2, wanted
    torch.library.opcheck(backward.default, args)
    leaves = [t for t in args[:6] if t is not None]

    def call(*leaves):
        given = iter(leaves)
        found = backward(*(None if t is None else next(given) for t in args[:6]), *args[6:])
        return tuple(t for t, want in zip(found, wanted, strict=True) if want)

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


def test_registered_operator_is_the_function_and_changes_nothing_in_place():
    x, mean, var, weight, bias = tensors()
    before = mean.clone(), var.clone()
    y, _, _, next_mean, next_var = forward(x, weight, bias, mean, var, True, 0.3, 1e-5, "silu")
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
    expected = by_torch(x, mean, var, weight, bias, True, 0.3, activation="silu")
    torch.testing.assert_close((y, next_mean, next_var), (expected, mean, var))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.testing.assert_close(
        torch.autograd.grad(forward(*leaves, *before, True, 0.3, 1e-5, "silu")[0].sin().sum(), leaves),
        torch.autograd.grad(by_torch(leaves[0], None, None, *leaves[1:], True, activation="silu").sin().sum(), leaves),
    )


def test_operator_of_an_empty_batch():
    x, mean, var, weight, bias = tensors((0, 4, 3, 2))
    y, of_mean, invstd, next_mean, _ = forward(x, weight, bias, mean, var, True, 0.1, 1e-5)
    assert y.shape == x.shape and of_mean.shape == invstd.shape == (4,) and torch.equal(next_mean, mean)
    found = backward(y, x, of_mean, invstd, weight, bias, True, "relu", 0.0, [True, True, True])
    assert found[0].shape == x.shape and not found[1].any() and not found[2].any()


def test_autocast_keeps_the_dtype(native):
    layer = aeup.BatchNorm2d(4, activation="silu")
    other = nn.BatchNorm2d(4)
    for dtype in (torch.bfloat16, torch.float32):
        x = tensors(dtype=dtype)[0]
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype is other(x).dtype is dtype
        y.float().sum().backward()
        assert layer.weight.grad.dtype is torch.float32


# --- the module ---


def pair(training=True, activation="silu", **options):
    """Ours and torch's, in the same state."""
    torch.manual_seed(0)
    other = nn.Sequential(nn.BatchNorm2d(4, **options), nn.SiLU() if activation else nn.Identity())
    for t in (*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())):
        nn.init.uniform_(t, 0.5, 2)
    ours = aeup.BatchNorm2d(4, activation=activation, **options)
    ours.load_state_dict(other[0].state_dict())
    return ours.train(training), other.train(training)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_module(native, tracks, affine, momentum):
    for training in (True, False):
        ours, other = pair(training, affine=affine, momentum=momentum, track_running_stats=tracks)
        for i in range(3):
            x = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(i))
            torch.testing.assert_close(ours(x), other(x), rtol=1e-5, atol=1e-5)
        assert list(ours.state_dict()) == list(other[0].state_dict())
        torch.testing.assert_close(ours.state_dict(), other[0].state_dict())
        other[0].load_state_dict(ours.state_dict())
        if tracks:
            assert ours.num_batches_tracked == 3 * training and ours.num_batches_tracked.dtype is torch.int64


def test_a_counter_of_another_kind_is_torchs():
    ours, other = pair(True)
    x = torch.randn(3, 4, 2, 5)
    ours(x), other(x)  # its plan is not theirs
    for norm in (ours, other[0]):
        norm.num_batches_tracked = torch.tensor(1, dtype=torch.int32)
    torch.testing.assert_close(ours(x), other(x))
    torch.testing.assert_close(ours.state_dict(), other[0].state_dict())
    assert ours.num_batches_tracked == 2 and aeup.explain(ours, x)[0].backend == "torch"


def test_a_counter_on_another_device_is_followed():
    for norm in (aeup.BatchNorm2d(4, momentum=None, device="meta"), nn.BatchNorm2d(4, momentum=None, device="meta")):
        norm.num_batches_tracked = torch.tensor(1)
        assert norm(torch.empty(2, 4, 3, 3, device="meta")).is_meta and norm.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_the_module(training, momentum):
    ours, other = pair(training, momentum=momentum)
    traced = torch.fx.symbolic_trace(ours)
    for i in range(2):
        x = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(traced(x), other(x), rtol=1e-5, atol=1e-5)
    state = other[0].state_dict()
    torch.testing.assert_close(traced.state_dict(), {k: state[k] for k in traced.state_dict()})
    assert ("num_batches_tracked" in traced.state_dict()) == training


def test_module_is_a_batch_norm_that_copies_and_prints():
    ours, _ = pair()
    assert isinstance(ours, nn.BatchNorm2d) and "activation='silu'" in repr(ours)
    again = copy.deepcopy(ours)
    x = torch.randn(2, 4, 3, 3)
    assert again.activation == "silu" and torch.equal(again(x), ours(x))
    assert "activation" not in repr(aeup.BatchNorm2d(3))
    with pytest.raises(ValueError, match="activation must be None, 'relu'"):
        aeup.BatchNorm2d(3, activation="softmax")


def test_average_over_all_batches_is_the_op_too():
    layer = aeup.BatchNorm2d(4, momentum=None)
    assert [c.op for c in aeup.explain(layer, torch.randn(2, 4, 3, 3))] == [
        "aeup.batch_norm",
        "aeup.batch_norm_backward",
    ]


def test_over_many_processes_the_activation_stays():
    ours, other = pair()
    many = SyncBatchNorm(copy.deepcopy(ours), World(torch.device("cpu")))
    x = torch.randn(3, 4, 2, 5)
    torch.testing.assert_close(many(x), other(x))
    torch.testing.assert_close(many.eval()(x), other.eval()(x))


def test_decoder_joins_batch_norm_and_activation_and_keeps_names():
    for activation, joined in (("relu", True), ("leaky_relu", True), ("elu", False), (nn.ReLU, False)):
        decoder = aeup.Decoder((8, 6, 4), latent_dim=3, activation=activation)
        norm, after = decoder.start
        assert type(norm) is aeup.BatchNorm2d and (norm.activation is not None) is joined
        assert isinstance(after, nn.Identity) is joined
        keys = [k for k in decoder.state_dict() if k.endswith("num_batches_tracked")]
        assert keys == [
            "start.0.num_batches_tracked",
            "stages.0.1.num_batches_tracked",
            "stages.1.1.num_batches_tracked",
        ]


# --- transforms, the compiler, explain, errors ---


def test_transforms_go_to_torch(native):
    x, _, _, weight, bias = tensors()

    def loss(fn):
        return lambda x, w: fn(x, None, None, w, bias, True, activation="silu").sin().sum()

    for transform in (torch.func.grad, torch.func.hessian):
        small = x[:1, :, :2, :2], weight
        torch.testing.assert_close(transform(loss(aeup.batch_norm))(*small), transform(loss(by_torch))(*small))
    dual = torch.func.jvp(lambda x: loss(aeup.batch_norm)(x, weight), (x,), (x.sin(),))
    torch.testing.assert_close(dual, torch.func.jvp(lambda x: loss(by_torch)(x, weight), (x,), (x.sin(),)))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_graph_break(training, monkeypatch):
    """On the CPU torch's operators are traced, elsewhere the registered operator."""
    torch._dynamo.reset()
    ours, other = pair(training)
    x = torch.randn(3, 4, 2, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for elsewhere in (False, True):
        if elsewhere:
            torch._dynamo.reset()
            monkeypatch.setattr(norms, "of_the_compiler", lambda x: False)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = compiled(a), other(b)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), a), torch.autograd.grad(z.sin().sum(), b))
    torch.testing.assert_close(ours.state_dict(), other[0].state_dict())
    torch._dynamo.reset()


def test_explain():
    layer = aeup.BatchNorm2d(4, activation="silu")
    first, second = aeup.explain(layer, torch.randn(2, 4, 3, 3))
    assert (first.op, second.op) == ("aeup.batch_norm", "aeup.batch_norm_backward")
    assert first.backend == second.backend == "cpu" and "silu" in first.call and "gradient" in second.call
    assert first.kernel.startswith("statistics, then the output")
    assert first.others["cuda"] == "the tensor is on cpu"
    assert all("Triton kernels need a CUDA tensor" in c.others["triton"] for c in (first, second))
    (rank,) = aeup.explain(aeup.batch_norm, torch.randn(2, 4, 3), None, None, training=True)
    assert "[N, C, H, W]" in rank.others["cuda"]
    x = torch.randn(2, 4, 3, 3)
    for name in ("cuda", "triton"):
        with aeup.backend(name), pytest.raises(aeup.BackendError, match="on cpu"):
            layer(x)


ONES = torch.ones(3)
WRONG = {
    "channels": lambda f: f(torch.randn(2, 4, 3, 3), ONES, ONES),
    "weight": lambda f: f(torch.randn(2, 3, 3, 3), ONES, ONES, torch.ones(4)),
    "one value": lambda f: f(torch.randn(1, 3, 1, 1), ONES, ONES, training=True),
    "rank": lambda f: f(torch.randn(3), ONES, ONES),
    "no statistics": lambda f: f(torch.randn(2, 3, 3, 3), None, None),
    "eps": lambda f: f(torch.randn(2, 3, 3, 3), ONES, ONES, training=True, eps=0.0),
    "eps below": lambda f: f(torch.randn(2, 3, 3, 3), ONES, ONES, eps=-1.0),
    "momentum": lambda f: f(torch.randn(2, 3, 3, 3), ONES, ONES, training=True, momentum=None),
    "training": lambda f: f(torch.randn(2, 3, 3, 3), ONES, ONES, training=0),
    "integers": lambda f: f(torch.ones(2, 3, 3, 3, dtype=torch.int64), ONES, ONES),
    "no tensor": lambda f: f([1.0], ONES, ONES),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_are_torchs(native, what):
    found = []
    aeup.batch_norm(torch.randn(2, 3, 3, 3), ONES, ONES)  # its plan is not what follows
    if native is not None:
        native.calls.clear()
    for fn in (F.batch_norm, aeup.batch_norm):
        with pytest.raises(Exception) as error:
            WRONG[what](fn)
        found.append((type(error.value), str(error.value)))
    assert found[0] == found[1]
    assert native is None or not native.calls


def test_errors_of_ours():
    x = torch.randn(2, 3, 3, 3)
    for activation, message in (("swish", "activation must be None"), (("leaky_relu", -1.0), "slope of leaky_relu")):
        with pytest.raises(ValueError, match=message):
            aeup.batch_norm(x, ONES, ONES, activation=activation)
    for layer in (aeup.BatchNorm2d(3), nn.BatchNorm2d(3)):
        with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
            layer(x[0])
    with pytest.raises(RuntimeError, match="aeup.batch_norm: weight, bias and running statistics"):
        forward(x, torch.ones(4), None, ONES, ONES, False, 0.1, 1e-5)
    with pytest.raises(RuntimeError, match="expected grad and input"):
        backward(x, x, ONES, torch.ones(2), None, None, True, None, 0.0, [True, False, False])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(native, shape):
    x = torch.empty(shape, requires_grad=True)
    layer, other = aeup.BatchNorm2d(3, activation="relu"), nn.BatchNorm2d(3)
    y = layer(x)
    assert y.shape == other(x).shape == shape and torch.equal(layer.running_mean, other.running_mean)
    assert layer.num_batches_tracked == 1 and (native is None or not native.calls)
    y.sum().backward()
    assert x.grad.shape == shape


def test_other_ranks_go_to_torch():
    for shape in ((5, 3), (5, 3, 4), (2, 3, 2, 2, 2)):
        x = torch.randn(shape)
        expected = by_torch(x, ONES, ONES, activation="relu")
        assert torch.equal(aeup.batch_norm(x, ONES, ONES, activation="relu"), expected)
