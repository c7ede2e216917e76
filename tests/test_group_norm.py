"""aeup.group_norm and aeup.GroupNorm against torch's group norm and activation, by the CPU's kernels; the registered
operators; what the CUDA kernels are asked, by a stand-in for them."""

import copy
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from group_norm_cases import by_torch, results, tensors
from test_batch_norm import ACTIVATIONS, views
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

import aeup
from aeup.ops import group_norm as norms
from aeup.ops.eager import Plans
from aeup.ops.epilogue import NUMBER

SHAPE = (3, 4, 5, 2)
forward, backward = torch.ops.aeup.group_norm, torch.ops.aeup.group_norm_backward


class Native:
    """In the place of the extension's operators: what they compute, on the CPU, and how often they were called."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.names = {number: name for name, number in NUMBER.items()}
        bound = lambda name, device, *rest: lambda *tensors: getattr(self, name)(*tensors, *rest)  # noqa: E731
        monkeypatch.setattr(norms.compiled, "bound", bound)
        monkeypatch.setattr(norms.compiled, "refusal", lambda t, name, device: None)
        monkeypatch.setattr(norms, "PLANS", Plans())
        for op in (norms.OP, norms.BACKWARD):
            monkeypatch.setitem(op.order, "cpu", ("cuda", "torch"))

    def group_norm(self, x, weight, bias, groups, eps, number, slope):
        self.calls.append("forward")
        return norms.reference(x.detach(), weight, bias, norms.Norm(groups, eps, self.names[number], slope))

    def group_norm_backward(self, grad, x, mean, invstd, weight, bias, groups, number, slope, *wanted):
        self.calls.append("backward")
        norm = norms.Norm(groups, 0.0, self.names[number], slope)
        found = list(norms.gradients_by_torch(grad, x, mean, invstd, weight, bias, norm))
        found[0] = found[0].contiguous(memory_format=suggest_memory_format(x))
        return tuple(t if want else t.new_empty(0) for t, want in zip(found, wanted, strict=True))


@pytest.fixture(params=["cpu", "stand-in for CUDA"])
def native(request, monkeypatch):
    if request.param != "cpu":
        yield Native(monkeypatch)
    else:
        with aeup.backend("cpu"):  # "auto" leaves small images to torch
            yield None


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_as_torchs(native, activation):
    for groups, layout, affine in itertools.product((1, 2, 4), LAYOUTS, (True, False)):
        given = tensors(SHAPE, layout=layout, affine=affine)
        grad = torch.randn(SHAPE, dtype=torch.float64)
        options = dict(eps=1e-3, activation=activation)
        ours, torchs = (results(f, given, grad, groups, **options) for f in (aeup.group_norm, by_torch))
        for a, b in zip(ours, torchs, strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert native is None or native.calls == ["forward", "backward"] * 12


def test_torchs_own_samples(native):
    """Every sample of torch's OpInfo, of any rank."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.group_norm")
    count = 0
    for dtype in (torch.float32, torch.float64):
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            y = aeup.group_norm(sample.input, *sample.args, **sample.kwargs)
            z = F.group_norm(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(y, z)
            assert y.stride() == z.stride()
            if y.numel():
                found = (torch.autograd.grad(t.sin().sum(), sample.input)[0] for t in (y, z))
                torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
            count += 1
    assert count >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(native, dtype):
    for layout, affine in itertools.product(LAYOUTS, (True, False)):
        given = tensors(SHAPE, dtype, layout, affine)
        grad = given[0].sin()
        wide = [None if t is None else t.double() for t in given]
        ours = results(aeup.group_norm, given, grad, 2, activation="silu")
        exact = results(by_torch, wide, grad.double(), 2, activation="silu")
        assert ours[0].dtype is ours[1].dtype is dtype and ours[-1].dtype is (torch.float32 if affine else dtype)
        bound = 8 * torch.finfo(dtype).eps
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound)


def test_parameters_of_the_inputs_dtype(monkeypatch):
    """As after model.bfloat16(). Mixtures go to torch."""
    native = Native(monkeypatch)
    given = tensors(SHAPE, torch.bfloat16, of=torch.bfloat16)
    ours, torchs = (results(f, given, given[0], 2, activation="relu") for f in (aeup.group_norm, by_torch))
    assert native.calls == ["forward", "backward"] and ours[2].dtype is ours[3].dtype is torch.bfloat16
    torch.testing.assert_close(ours, torchs, rtol=2**-6, atol=2**-5)
    (choice, *_) = aeup.explain(aeup.group_norm, given[0], 2, given[1], given[2].float())
    assert choice.backend == "torch" and choice.others["cuda"] == (
        "weight and bias must all be float32 or bfloat16, got weight bfloat16, bias float32"
    )


def test_strided_inputs_and_gradients(native):
    x, weight, bias = tensors((4, 9, 7, 6), torch.float32)
    for view in views(x).values():
        for grad in ("sin", "sum"):
            found = []
            for fn in (aeup.group_norm, by_torch):
                leaf = view.detach().requires_grad_()
                y = fn(leaf, 3, weight[2:8], bias[2:8], activation="relu")
                found.append((y, *torch.autograd.grad(getattr(y, grad)().sum(), leaf)))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_strides_of_what_is_both_layouts():
    for shape, strides in (((2, 1, 3, 4), (12, 1, 4, 1)), ((2, 3, 1, 1), (3, 1, 3, 3)), ((2, 3, 1, 1), (3, 1, 1, 1))):
        x = torch.randn(24).as_strided(shape, strides)
        y, z = (f(x, 1) for f in (aeup.group_norm, by_torch))
        assert y.stride() == z.stride()
        torch.testing.assert_close(y, z)


def test_gradients_that_are_not_wanted(native):
    x, weight, bias = tensors(SHAPE)
    with torch.no_grad():
        y = aeup.group_norm(x, 2, weight, bias, activation="gelu")
    torch.testing.assert_close(y, by_torch(x, 2, weight, bias, activation="gelu"))
    frozen = aeup.group_norm(x, 2, weight, bias.requires_grad_())
    (of_bias,) = torch.autograd.grad(frozen.sum(), bias)
    torch.testing.assert_close(of_bias, torch.full_like(bias, x.numel() / 4))
    leaf = x.clone().requires_grad_()
    ours, torchs = (torch.autograd.grad(f(leaf, 2, weight).sin().sum(), leaf) for f in (aeup.group_norm, by_torch))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("groups, activation", [(1, "silu"), (2, "leaky_relu"), (4, "tanh")])
def test_gradients_of_second_order(monkeypatch, groups, activation):
    native = Native(monkeypatch)
    leaves = [t.requires_grad_() for t in tensors((2, 4, 2, 1))]

    def call(x, weight, bias):
        return aeup.group_norm(x, groups, weight, bias, activation=activation)

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    assert {"forward", "backward"} == set(native.calls)


def test_gradients_of_the_cpus_kernels():
    for layout in LAYOUTS:
        leaves = [t.requires_grad_() for t in tensors((2, 4, 2, 3), layout=layout)]
        call = lambda x, w, b: aeup.group_norm(x, 2, w, b, activation="silu")  # noqa: E731
        with aeup.backend("cpu"):
            assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("affine, activation", [(True, "silu"), (False, "tanh")])
def test_registered_operators(affine, activation):
    x, weight, bias = tensors((2, 4, 2, 1), affine=affine)
    for t in (x, weight, bias):
        t is None or t.requires_grad_()
    torch.library.opcheck(forward.default, (x, 2, weight, bias, 1e-5, activation, 0.2))
    _, mean, invstd = forward(x, 2, weight, bias, 1e-5, activation, 0.2)
    grad = torch.randn_like(x).requires_grad_()
    statistics = [t.detach().requires_grad_() for t in (mean, invstd)]
    wanted = [True, affine, affine]
    args = grad, x, *statistics, weight, bias, 2, activation, 0.2, wanted
    torch.library.opcheck(backward.default, args)
    leaves = [t for t in args[:6] if t is not None]

    def call(*leaves):
        given = iter(leaves)
        found = backward(*(None if t is None else next(given) for t in args[:6]), *args[6:])
        return tuple(t for t, want in zip(found, wanted, strict=True) if want)

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


def test_registered_operator_is_the_function():
    x, weight, bias = tensors(SHAPE)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y, mean, invstd = forward(leaves[0], 2, *leaves[1:], 1e-5, "silu")
    expected = by_torch(leaves[0], 2, *leaves[1:], activation="silu")
    torch.testing.assert_close(y, expected)
    _, of_mean, of_invstd = torch.native_group_norm(x, weight, bias, 3, 4, 10, 2, 1e-5)
    torch.testing.assert_close((mean, invstd), (of_mean.flatten(), of_invstd.flatten()))
    found = (torch.autograd.grad(t.sin().sum(), leaves) for t in (y, expected))
    torch.testing.assert_close(*found)


def torch_refuses(shape) -> bool:
    """torch 2.14 refuses an image without pixels."""
    try:
        return F.group_norm(torch.empty(shape), 1) is None
    except RuntimeError:
        return True


def test_operator_of_an_empty_batch():
    for shape in ((0, 4, 3, 2), (2, 4, 0, 2)):
        x, weight, bias = tensors(shape)
        if torch_refuses(shape):
            with pytest.raises(RuntimeError, match="greater than 0"):
                forward(x, 2, weight, bias)
            continue
        y, mean, invstd = forward(x, 2, weight, bias)
        assert y.shape == x.shape and mean.shape == invstd.shape == (shape[0] * 2,)
        found = backward(y, x, mean, invstd, weight, bias, 2, "relu", 0.0, [True, True, True])
        assert found[0].shape == x.shape and not found[1].any() and not found[2].any()


def test_autocast_keeps_the_dtype(native):
    layer = aeup.GroupNorm(2, 4, activation="silu")
    for dtype in (torch.bfloat16, torch.float32):
        x, *_ = tensors(SHAPE, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype is dtype
        y.float().sum().backward()
        assert layer.weight.grad.dtype is torch.float32


# --- the module ---


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"eps": 0.1}], ids=str)
def test_module(native, options):
    if not options.keys() <= inspect.signature(nn.GroupNorm).parameters.keys():
        pytest.skip("this torch has no such argument")
    torch.manual_seed(0)
    other = nn.Sequential(nn.GroupNorm(2, 4, **options), nn.SiLU())
    for t in other.parameters():
        nn.init.uniform_(t, 0.5, 2)
    ours = aeup.GroupNorm(2, 4, activation="silu", **options)
    ours.load_state_dict(other[0].state_dict())
    x = torch.randn(3, 4, 2, 5)
    torch.testing.assert_close(ours(x), other(x))
    assert list(ours.state_dict()) == list(other[0].state_dict())
    assert isinstance(ours, nn.GroupNorm) and "activation='silu'" in repr(ours)
    assert torch.equal(copy.deepcopy(ours)(x), ours(x)) and "activation" not in repr(aeup.GroupNorm(1, 3))


def test_errors_of_the_module():
    with pytest.raises(ValueError, match="activation must be None, 'relu'"):
        aeup.GroupNorm(1, 3, activation="softmax")
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        aeup.GroupNorm(2, 3)


def test_decoder_joins_group_norm_and_activation_and_keeps_names():
    for activation, joined in (("relu", True), ("leaky_relu", True), ("elu", False), (nn.ReLU, False)):
        decoder = aeup.Decoder((8, 6, 4), latent_dim=3, norm="group", activation=activation)
        norm, after = decoder.start
        assert type(norm) is aeup.GroupNorm and (norm.activation is not None) is joined and norm.num_groups == 8
        assert isinstance(after, nn.Identity) is joined
        names = [k for k in decoder.state_dict() if k.startswith("stages.0.") or k.startswith("start")]
        assert {"start.0.weight", "start.0.bias", "stages.0.1.weight", "stages.0.1.bias"} <= set(names)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


# --- transforms, the compiler, explain, errors ---


def test_transforms_go_to_torch(native):
    x, weight, bias = tensors(SHAPE)

    def loss(fn):
        return lambda x, w: fn(x, 2, w, bias, activation="silu").sin().sum()

    for transform in (torch.func.grad, torch.func.hessian):
        small = x[:1, :, :2, :2], weight
        torch.testing.assert_close(transform(loss(aeup.group_norm))(*small), transform(loss(by_torch))(*small))
    dual = torch.func.jvp(lambda x: loss(aeup.group_norm)(x, weight), (x,), (x.sin(),))
    torch.testing.assert_close(dual, torch.func.jvp(lambda x: loss(by_torch)(x, weight), (x,), (x.sin(),)))
    with Watching():  # a mode does not lead to the registered operator
        seen = torch.func.jvp(lambda x: loss(aeup.group_norm)(x, weight), (x,), (x.sin(),))
    torch.testing.assert_close(seen, dual)
    stack = torch.stack([x, x.cos()])
    ours, torchs = (torch.func.vmap(lambda t, f=f: f(t, 2, weight, bias))(stack) for f in (aeup.group_norm, by_torch))
    torch.testing.assert_close(ours, torchs)


def test_compiled_without_a_graph_break(monkeypatch):
    """On the CPU torch's operators are traced, elsewhere the registered operator."""
    torch._dynamo.reset()
    ours, other = aeup.GroupNorm(2, 4, activation="silu"), nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
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
    torch._dynamo.reset()


def test_explain():
    layer = aeup.GroupNorm(2, 4, activation="silu")
    x = torch.randn(2, 4, 16, 32)
    first, second = aeup.explain(layer, x)
    assert (first.op, second.op) == ("aeup.group_norm", "aeup.group_norm_backward")
    assert first.backend == second.backend == "cpu" and "2 groups, silu" in first.call and "gradient" in second.call
    assert first.kernel.startswith("statistics, then the output")
    assert first.others["cuda"] == "the tensor is on cpu"
    assert all(c.others["triton"] == "there is no Triton kernel for group norm" for c in (first, second))
    for given, alone, reason in ((x[:, :, :7], layer, "fewer than 256 pixels"), (x, aeup.GroupNorm(2, 4), "without")):
        choices = aeup.explain(alone, given)
        assert [c.backend for c in choices] == ["torch"] * 2 and all(reason in c.others["cpu"] for c in choices)
        wide = aeup.explain(aeup.group_norm, torch.zeros(1, 256, 8, 8).to(memory_format=torch.channels_last), 8)
        assert [c.backend for c in wide] == ["torch"] * 2 and "from 256 channels on" in wide[0].others["cpu"]
        last = given.contiguous(memory_format=torch.channels_last)
        assert [c.backend for c in aeup.explain(alone, last)] == ["cpu"] * 2
    (rank,) = aeup.explain(layer, torch.randn(2, 4, 3))
    assert rank.backend == "torch" and "[N, C, H, W]" in rank.others["cuda"]
    for name in ("cuda", "triton"):
        with aeup.backend(name), pytest.raises(aeup.BackendError, match="on cpu|no Triton kernel"):
            layer(torch.randn(2, 4, 3, 3))


WRONG = {
    "groups": lambda f: f(torch.randn(2, 4, 3, 3), 3),
    "no groups": lambda f: f(torch.randn(2, 4, 3, 3), 0),
    "groups below": lambda f: f(torch.randn(2, 4, 3, 3), -2),
    "groups of another type": lambda f: f(torch.randn(2, 4, 3, 3), 2.0),
    "weight": lambda f: f(torch.randn(2, 3, 3, 3), 3, torch.ones(4)),
    "bias": lambda f: f(torch.randn(2, 3, 3, 3), 3, None, torch.ones(3, 1)),
    "one value": lambda f: f(torch.randn(1, 3, 1, 1), 3),
    "rank": lambda f: f(torch.randn(3), 1),
    "integers": lambda f: f(torch.ones(2, 3, 3, 3, dtype=torch.int64), 3),
    "eps": lambda f: f(torch.randn(2, 3, 3, 3), 3, eps="small"),
    "no tensor": lambda f: f([1.0], 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_are_torchs(native, what):
    found = []
    for fn in (F.group_norm, aeup.group_norm):
        with pytest.raises(Exception) as error:
            WRONG[what](fn)
        found.append((type(error.value), str(error.value)))
    assert found[0] == found[1]
    assert native is None or not native.calls


def test_errors_of_ours():
    x = torch.randn(2, 3, 3, 3)
    for activation, message in (("swish", "activation must be None"), (("leaky_relu", -1.0), "slope of leaky_relu")):
        with pytest.raises(ValueError, match=message):
            aeup.group_norm(x, 3, activation=activation)
    with pytest.raises(RuntimeError, match="aeup.group_norm: weight and bias must have one element"):
        forward(x, 3, torch.ones(4))
    for given in (x, x[:0]):
        with pytest.raises(RuntimeError, match="num_groups must be an int that divides the channels"):
            forward(given, 2)
    with pytest.raises(RuntimeError, match="expected grad and input"):
        backward(x, x, torch.ones(6), torch.ones(2), None, None, 3, None, 0.0, [True, False, False])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(native, shape):
    x = torch.empty(shape, requires_grad=True)
    if torch_refuses(shape):
        with pytest.raises(RuntimeError, match="greater than 0"):
            aeup.GroupNorm(3, 3, activation="relu")(x)
        return
    y = aeup.GroupNorm(3, 3, activation="relu")(x)
    assert y.shape == nn.GroupNorm(3, 3)(x).shape == shape and (native is None or not native.calls)
    y.sum().backward()
    assert x.grad.shape == shape


def test_a_plan_keeps_apart_what_only_compares_equal(native):
    x = torch.randn(2, 4, 3, 3)
    for groups in (2, 1):
        aeup.group_norm(x, groups)
        with pytest.raises(TypeError, match="'num_groups'"):
            aeup.group_norm(x, float(groups))


@pytest.mark.parametrize("channels", [4, 300])
def test_parameters_alone_are_trained(channels):
    # torch's own gradient ends in a segmentation fault there, in channels-last
    dense = torch.randn(2, channels, 6, 5).contiguous(memory_format=torch.channels_last)
    for x in (dense, dense[..., 1:]):
        layer, other = aeup.GroupNorm(2, channels), nn.GroupNorm(2, channels)
        layer(x.clone().requires_grad_())  # its plan is another
        layer(x).square().sum().backward()
        other(x.contiguous()).square().sum().backward()
        for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_a_negative_eps_is_torchs():
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(aeup.group_norm(x, 2, eps=-0.1), F.group_norm(x, 2, eps=-0.1))


def test_other_ranks_go_to_torch():
    for shape in ((5, 4), (5, 4, 3), (2, 4, 2, 2, 2)):
        x = torch.randn(shape)
        assert torch.equal(aeup.group_norm(x, 2, activation="relu"), by_torch(x, 2, activation="relu"))
