"""aeup.swap on modules that call F.interpolate themselves: the same forward but for its calls."""

import copy
import functools
import importlib
import inspect
import linecache
import pickle

import pytest
import torch
import torch.nn.functional as F
from swap_helpers import close, output_and_gradients
from torch import nn

from aeup import explain, intercept, swap, unswap
from aeup.adapters import derive, rewrite

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(function):
    @functools.wraps(function)
    def wrapper(self, x, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        return function(self, x, **kwargs) * 2

    wrapper.plain = function
    return wrapper


def hidden(function):
    call = functools.partial(function)
    return functools.wraps(function)(lambda *args: call(*args))


def marked(function):
    function.mark = "kept"
    return function


class Base(nn.Module):
    def forward(self, x):
        return x * 2


class Derived(Base):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x, *, mode: str = "nearest"):
        """Of the base."""
        x = super().forward(x)
        if mode == "nearest":
            x = F.interpolate(x, scale_factor=FACTOR, mode=mode)
            return self.conv(x)
        return [F.interpolate(y[None], scale_factor=FACTOR, mode=mode) for y in x]


FACTOR = 2


class Several(nn.Module):
    """Results that something else may see."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.convs = nn.ModuleList([self.conv])

    def forward(self, x):
        y = F.interpolate(x, scale_factor=2)
        z = self.conv(y)
        return y + z

    def tried(self, x):
        try:
            x = F.interpolate(x, scale_factor=2)
            x = self.conv(x)
        except RuntimeError:
            x = x * 3
        return x

    def kept(self, x):
        keep = lambda: x  # noqa: E731
        x = F.interpolate(x, scale_factor=2)
        x = self.conv(x)
        return x + keep()

    def twice(self, x):
        x = F.interpolate(x, scale_factor=2)
        x = self.conv(x) + x
        return x

    def used(self, x):
        x = F.interpolate(x, scale_factor=2)
        x = torch.relu(self.conv(torch.neg(x)))
        return x

    def indexed(self, x):
        for i in range(2):
            x = self.convs[-i](F.interpolate(x, scale_factor=2))
        return x

    def local(self, x):
        layer = self.conv
        x = F.interpolate(x, scale_factor=2)
        x = layer(self.conv(x))
        return x


class Others(nn.Module):
    """Calls that take an interpolate's result alone, but not at the lower resolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), torch.tanh

    def forward(self, x):
        x = self.act(F.interpolate(x, scale_factor=2))
        x = self.norm(F.interpolate(x, None, 1.5, "nearest"))
        x = self.conv(F.interpolate(x, (9, 7), None, "bilinear", False, None, True))
        return self.conv(F.interpolate(x, scale_factor=1.3, recompute_scale_factor=True))


class Shadowed(nn.Module):
    def forward(self, x):
        from torch.nn import functional as F

        return F.interpolate(x, scale_factor=2)


class Private(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=self.__factor)

    __factor = 2


class Curious(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=len(locals()))


class Partial(nn.Module):
    @hidden
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)

    @counted
    @torch.no_grad()
    @marked
    def forward(self, x, *, scale: int = 2):
        x = F.interpolate(x, scale_factor=scale)
        x = self.conv(x)
        return F.silu(self.norm(x))


class Helped(nn.Module):
    """Upsamples in methods that its forward calls, some of them by others."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.unused = nn.Conv2d(3, 3, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.decode(x, x) + self.fixed(x)

    def decode(self, x, y):
        return self._add(self._up(x), y)

    @counted
    def _up(self, x):
        x = F.interpolate(x, scale_factor=2)
        x = self.conv(x)
        return F.silu(self.norm(x))

    def _add(self, x, y):
        return x + F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)

    @staticmethod
    def fixed(x):
        return F.interpolate(x, size=(6, 8))

    def export(self, x):
        return self.unused(F.interpolate(x, scale_factor=3))


class Heir(Helped):
    def _add(self, x, y):
        return super()._add(x, y) * 3


class Cached(nn.Module):
    @functools.cache  # noqa: B019
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class Steps(nn.Module):
    def forward(self, x):
        yield F.interpolate(x, scale_factor=2)


class Short(nn.Module):
    forward = lambda self, x: F.interpolate(x, scale_factor=2)  # noqa: E731


def test_a_rewritten_forward_is_the_same_function_but_for_its_calls(monkeypatch):
    found = rewrite(Derived.forward, True)
    assert found.calls == ("F.interpolate", "F.interpolate") and found.pairs == ("conv",)
    new, old = found.forward, Derived.forward
    assert (
        new.__globals__ is old.__globals__ and new.__kwdefaults__ == old.__kwdefaults__ and new.__doc__ == old.__doc__
    )
    assert new.__code__.co_firstlineno == old.__code__.co_firstlineno
    model, x = Derived().double(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    swap(model)
    monkeypatch.setitem(globals(), "FACTOR", 3)  # globals stay those of the module
    close([model(x)], [plain(x)])
    close(model(x, mode="bilinear"), plain(x, mode="bilinear"))
    assert derive(Derived, "pairs") is type(model) and type(model).__name__ == "Derived"


def test_decorators_stay_around_a_rewritten_forward():
    model, x = Decorated().double(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plain, forward = copy.deepcopy(model), Decorated.forward
    report = swap(model)
    assert report.replaced[0].now == "aeup for F.interpolate, aeup for self.norm"
    assert [r.path for r in report.fused] == ["conv", "norm"] and not report.left
    close([model(x), model(x, scale=3)], [plain(x), plain(x, scale=3)])
    assert model.count == plain.count == 2 and not model(x).requires_grad
    ours = type(model).forward
    assert inspect.signature(ours) == inspect.signature(forward) and ours.plain is ours.__wrapped__ is not forward.plain
    assert inspect.unwrap(ours).mark == "kept" and Decorated.forward is forward
    assert [c.op for c in explain(model, x) if "gradient" not in c.call] == ["aeup.upsample_conv2d", "aeup.group_norm"]
    close([copy.deepcopy(model)(x), torch.compile(model, backend="eager")(x)], [plain(x)] * 2)


@pytest.mark.parametrize("make", [Helped, Heir])
def test_methods_that_a_forward_calls(make):
    model, x = make().double(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    report = swap(model)
    name = make.__name__
    own = ("_add", "_up") if make is Helped else ("_up",)
    assert [(r.path, r.was, r.status) for r in report.rows] == [
        ("", f"fixed of {name}", "left"),
        *(("", f"{method} of {name}", "replaced") for method in own),
        ("conv", "interpolate -> Conv2d", "fused"),
        ("norm", "GroupNorm -> F.silu", "fused"),
    ]
    assert report.rows[0].reason == "it is not a Python function; see aeup.intercept"
    for again in (model, pickle.loads(pickle.dumps(model))):
        close(output_and_gradients(again, x), output_and_gradients(plain, x))
        close([again.decode(x, x), again.export(x)], [plain.decode(x, x), plain.export(x)])
    assert type(model.norm) is nn.GroupNorm and not [r for r in swap(model).rows if r.status != "left"]
    ops = [c.op for c in explain(model, x) if "gradient" not in c.call]
    assert ops == ["aeup.upsample_conv2d", "aeup.group_norm"] + ["aeup.interpolate"] * (make is Helped)
    close([unswap(model)(x)], [plain(x)])
    assert swap(make(), fuse=False).replaced and not swap(make(), fuse=False).fused
    model._add = lambda x, y: x
    assert not any(r.was.startswith("_add") for r in swap(model).replaced)
    assert model(x).shape == plain(x).shape


@pytest.mark.parametrize("name", ["forward", "tried", "kept", "twice", "used", "indexed", "local"])
def test_only_what_the_code_proves_is_joined(name):
    cls = type("Several", (Several,), {"forward": getattr(Several, name)})
    model, x = cls().double(), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    before = model(x)
    report = swap(model)
    assert report.replaced[0].now == "aeup for F.interpolate" and not report.fused
    close([model(x)], [before])


class Branching(nn.Module):
    """As in latent diffusion's and VQGAN's decoders."""

    def __init__(self, with_conv):
        super().__init__()
        self.with_conv, self.conv, self.act = with_conv, nn.Conv2d(3, 3, 3, padding=1), nn.SiLU()

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.with_conv:
            x = self.conv(x)
        return x

    def other(self, x):
        y = torch.nn.functional.interpolate(x, scale_factor=2)
        if self.with_conv:
            return y
        else:
            y = self.act(self.conv(y))
        return y + 1

    def reads(self, x):
        x = F.interpolate(x, scale_factor=2)
        if x.mean() > self.with_conv:
            x = self.conv(x)
        return x

    def calls(self, x):
        x = F.interpolate(x, scale_factor=2)
        if self.act(x.sum()):
            x = self.conv(x)
        return x

    def twice(self, x):
        x = F.interpolate(x, scale_factor=2)
        if self.with_conv:
            x = self.conv(x) + x
        return x


@pytest.mark.parametrize("with_conv", [True, False])
@pytest.mark.parametrize("name", ["forward", "other", "reads", "calls", "twice"])
def test_a_branch_after_an_interpolate(name, with_conv):
    cls = type("Branching", (Branching,), {"forward": getattr(Branching, name)})
    model, x = cls(with_conv).double(), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    before = model(x)
    report = swap(model)
    assert report.replaced[0].now.startswith("aeup for ") and "calls" not in report.replaced[0].now
    assert [r.path for r in report.fused] == (["conv"] if name in ("forward", "other") else [])
    close([model(x)], [before])
    if name in ("forward", "other"):
        ops = [c.op for c in explain(model, x) if "gradient" not in c.call]
        assert ops == ["aeup.upsample_conv2d" if with_conv == (name == "forward") else "aeup.interpolate"]


def test_what_takes_no_lower_resolution():
    model, x = Others().double(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    report = swap(model)
    assert [(r.status, r.now) for r in report.rows] == [("replaced", "aeup for F.interpolate (4 calls)")]
    close([model(x)], [plain(x)])


@pytest.mark.parametrize(
    ("edit", "reason"), [("F.interpolate(x, scale_factor=3)", "is not what runs"), ("(", "cannot be read")]
)
def test_a_source_that_is_not_what_runs(tmp_path, monkeypatch, edit, reason):
    text = "from torch import nn\nimport torch.nn.functional as F\nclass Model(nn.Module):\n    def forward(self, x):\n"
    path = tmp_path / f"aeup_edited_model_{len(edit)}.py"
    path.write_text(text + "        return F.interpolate(x, scale_factor=2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module(path.stem).Model()
    path.write_text(text + f"        return {edit}\n")
    linecache.checkcache()
    report = swap(model)
    assert f"its source {reason}" in report.left[0].reason and not report.replaced
    assert model(torch.ones(1, 1, 2, 2)).shape == (1, 1, 4, 4)


def test_made_from_other_code():
    for model in (torch.fx.symbolic_trace(Shadowed()), torch.jit.trace(Shadowed(), torch.randn(1, 3, 4, 4))):
        report = swap(model)
        assert "TorchScript, fx" in report.left[0].reason and not report.replaced


def test_a_class_that_refuses_subclasses():
    class Final(nn.Sequential):
        def __init_subclass__(cls):
            raise TypeError("no subclasses")

    class Calls(nn.Module):
        def __init_subclass__(cls):
            raise TypeError("no subclasses")

        def forward(self, x):
            return F.interpolate(x, scale_factor=2)

    model = nn.ModuleList([Final(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3)), Calls()])
    report = swap(model)
    assert [r.reason.count("no subclasses") for r in report.left] == [1, 1] and len(report.replaced) == 1
    assert type(model[0]) is Final and type(model[1]) is Calls


def test_forwards_that_are_left():
    x = torch.randn(1, 3, 4, 4)
    for cls, reason in (
        (Private, "private to its class"),
        (Curious, "own variables"),
        (Partial, "does not show what it calls"),
        (Cached, "not a Python function"),
        (Steps, "a generator"),
        (Short, "not a plain function"),
    ):
        model = cls()
        report = swap(model)
        assert reason in report.left[0].reason and type(model) is cls and "intercept" in report.left[0].reason
    assert swap(Shadowed()).rows == []
    with intercept() as mode:
        Shadowed()(x), Private()(x), Partial()(x)
    assert len(mode.calls) == 1 and mode.calls[0].count == 3
    space = {"nn": nn, "F": F}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return F.interpolate(x, scale_factor=2)", space)
    assert "source" in swap(space["Typed"]()).left[0].reason
    replaced = Derived()
    replaced.forward = lambda x: x
    assert "set on the instance" in swap(replaced).left[-1].reason and replaced(3) == 3
