"""aeup.swap: a batch norm and the activation after it, in training and outside, against the same model without aeup."""

import copy
import itertools
import pickle

import pytest
import torch
from swap_helpers import classes_of, close, output_and_gradients
from torch import nn

import aeup
from aeup import swap, unswap

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.3, "eps": 1e-2},
    "average": {"momentum": None},
    "not affine": {"affine": False},
    "not tracking": {"track_running_stats": False},
    "average, not tracking": {"momentum": None, "track_running_stats": False},
}
ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def made(make=nn.BatchNorm2d, activation="relu", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), make(5, **options), ACTIVATIONS[activation]()).double()
    for t in (*model[1].parameters(), *(b for b in model[1].buffers() if b.is_floating_point())):
        nn.init.uniform_(t, 0.5, 1.5)
    return model, torch.randn(4, 3, 6, 5, dtype=torch.float64)


def state(model):
    return [t.clone() for t in model.state_dict().values()]


def check_as(model, plain, x):
    """Outputs, gradients and buffers over training steps, then outside training."""
    for step in range(3):
        close(output_and_gradients(model, x + step), output_and_gradients(plain, x + step))
        close(state(model), state(plain))
    close(output_and_gradients(model.eval(), x), output_and_gradients(plain.eval(), x))
    close(state(model), state(plain))


@pytest.mark.parametrize("options", OPTIONS)
def test_training_and_evaluation(options):
    for activation, layout in itertools.product(ACTIVATIONS, (torch.contiguous_format, torch.channels_last)):
        model, x = made(activation=activation, **OPTIONS[options])
        plain, x = copy.deepcopy(model), x.contiguous(memory_format=layout)
        keys, classes, text = list(model.state_dict()), classes_of(model), repr(model)
        planned = swap(model, dry_run=True)
        assert classes_of(model) == classes
        report = swap(model)
        assert report.rows == planned.rows
        assert [(r.path, r.status, r.now) for r in report.rows] == [
            ("1, 2", "fused", "aeup.BatchNorm2d with activation")
        ]
        assert list(model.state_dict()) == keys and repr(model) == text and type(model[1]) is nn.BatchNorm2d
        norms = [c for c in aeup.explain(model, x) if c.op == "aeup.batch_norm"]
        assert len(norms) == 1 and activation in norms[0].call
        close(state(model), state(plain))  # explaining computes nothing
        assert model(x).stride() == plain(x).stride()
        check_as(model, plain, x)
        check_as(unswap(model).train(), plain.train(), x)
        assert classes_of(model) == classes


def test_statistics_that_are_tracked_no_more_or_only_now():
    for momentum, first, then in itertools.product((0.1, None), (True, False), (True, False)):
        model, x = made(momentum=momentum, track_running_stats=first)
        model[1].track_running_stats = then
        plain = copy.deepcopy(model)
        swap(model)
        check_as(model, plain, x)


def test_aeups_own_norm():
    model, x = made(aeup.BatchNorm2d)
    plain = copy.deepcopy(model)
    assert len(swap(model).fused) == 1
    check_as(model, plain, x)
    own, x = made(aeup.BatchNorm2d)
    own[1].activation = "silu"
    plain = copy.deepcopy(own)
    assert "the norm has an activation already" in str(swap(own))
    check_as(own, plain, x)


def hooked(module):
    module.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize(
    "modules, reason",
    [
        ((nn.SyncBatchNorm(3), nn.ReLU()), "SyncBatchNorm normalises with the statistics of all processes"),
        ((type("Mine", (nn.BatchNorm2d,), {})(3), nn.ReLU()), "Mine is a subclass: exact types only"),
        ((nn.LazyBatchNorm2d(), nn.ReLU()), "LazyBatchNorm2d is lazy: run the model once, then swap"),
        ((hooked(nn.BatchNorm2d(3)), nn.ReLU()), "the norm has hooks"),
        ((nn.BatchNorm2d(3), hooked(nn.ReLU())), "the activation has hooks"),
        ((nn.BatchNorm2d(3), nn.GELU("tanh")), "GELU(approximate='tanh') is not one of aeup's activations"),
        ((nn.BatchNorm2d(3), nn.LeakyReLU(-0.5)), "LeakyReLU(negative_slope=-0.5) is not one of aeup's activations"),
        ((nn.BatchNorm2d(3), nn.Hardswish(), nn.BatchNorm2d(3)), None),
    ],
)
def test_what_is_left_has_a_reason(modules, reason):
    model = nn.Sequential(*modules)
    report = swap(model)
    assert [r.status for r in report.rows] == ["left"] * (reason is not None)
    assert all(r.reason.startswith(f"not fused: {reason}") for r in report.rows), str(report)
    assert type(model) is nn.Sequential


def test_what_changes_after_the_swap_runs_one_by_one():
    model, x = made()
    swap(model)
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    out = model(x)
    handle.remove()
    close([seen[0].relu()], [out])
    assert (seen[0] < 0).any()  # before the activation
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    plain = nn.Sequential(*copy.deepcopy(synchronised).eval())
    assert type(synchronised[1]) is nn.SyncBatchNorm
    close([synchronised.eval()(x)], [plain(x)])
    model, x = made()
    plain = copy.deepcopy(model)
    swap(model)
    for m in (model, plain):
        torch.manual_seed(1)
        m[1] = nn.InstanceNorm2d(5, affine=True).double()
    check_as(model, plain, x)


def test_copies_and_machinery():
    for training in (True, False):
        model, x = made(momentum=None)
        plain = copy.deepcopy(model).train(training)
        swap(model.train(training))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert classes_of(other) == classes_of(model)
            check_as(other.train(training), copy.deepcopy(plain), x)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        check_as(compiled, copy.deepcopy(plain), x)
        program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        exported, copied = program.module(), copy.deepcopy(plain)
        close([exported(x[:3])], [copied(x[:3])])
        close(exported.state_dict().values(), copied.state_dict().values())
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
        close([traced(x)], [copy.deepcopy(plain)(x)])
        recomputed, copied = copy.deepcopy(model), copy.deepcopy(plain)
        out, want = (torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False) for m in (recomputed, copied))
        close([out], [want])
        for m in (model, plain):
            m.to(memory_format=torch.channels_last).bfloat16()
        low = x.bfloat16().contiguous(memory_format=torch.channels_last)
        want = plain(low)
        torch.testing.assert_close(model(low), want, rtol=2**-7, atol=2**-7 * want.abs().max().item())


def test_transforms():
    model, x = made()
    plain = copy.deepcopy(model).eval()
    swap(model.eval())
    stack = torch.randn(2, *x.shape, dtype=torch.float64)
    for transform in (
        lambda m: torch.func.vmap(m)(stack),
        lambda m: torch.func.jvp(m, (x,), (x.sin(),))[1],
        lambda m: torch.func.grad(lambda t: torch.func.grad(lambda u: m(u).sin().sum())(t).square().sum())(x),
        lambda m: torch.func.functional_call(m, {n: p * 2 for n, p in m.named_parameters()}, x),
    ):
        close([transform(model)], [transform(plain)])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_norm_in_two_places(momentum):
    """Fused in one and alone in the other: its statistics are updated while a graph holds them."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, momentum=momentum)
    model = nn.Sequential(norm, norm, nn.ReLU(), nn.Sequential(norm, nn.Tanh())).double()
    plain, x = copy.deepcopy(model), torch.randn(4, 5, 3, 2, dtype=torch.float64)
    assert len(swap(model).fused) == 2
    check_as(model, plain, x)
    y = model.eval()(x)  # outside training, then in it, then backward
    model.train()(x)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Change(nn.Module):
    def forward(self, x):
        return x.add_(1)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, aeup.BatchNorm2d])
def test_results_may_be_changed_in_place(make):
    """Where torch's gradient does not need them: of an activation that does not work in place itself."""
    for activation in ("leaky_relu", "gelu"):
        model, x = made(make, activation)
        plain = copy.deepcopy(model)
        swap(model)
        for m in (model, plain):
            m.append(Change())
        check_as(model, plain, x)


def test_errors_are_torchs():
    model, x = made()
    plain = copy.deepcopy(model)
    swap(model)
    for bad in (x[0], x.long(), x[:, :2], x[:1, :, :3, :3], "x"):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as theirs:
            plain(bad)
        with pytest.raises(theirs.type) as ours:
            model(bad)
        assert str(ours.value) == str(theirs.value)
    close([model(x[:0])], [plain(x[:0])])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_gpu(options, layout):
    model, x = made(activation="silu", **OPTIONS[options])
    model, x = model.cuda(), x.cuda().contiguous(memory_format=layout)
    plain = copy.deepcopy(model)
    swap(model)
    (choice,) = (c for c in aeup.explain(model, x) if c.op == "aeup.batch_norm")
    assert choice.backend == "cuda"
    for training in (True, True, True, False):
        for m in (model, plain):
            m.train(training).zero_grad()
            m(x).cos().sum().backward()
        with torch.no_grad():
            pairs = [(model(x), plain(x)), *zip(state(model), state(plain), strict=True)]
        pairs += [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
        for ours, torchs in pairs:
            torch.testing.assert_close(ours, torchs, rtol=1e-8, atol=1e-8)
