"""aeup.swap and unswap: what is found, what is left and why, and that nothing else about a model changes."""

import copy
import io
import json
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from swap_helpers import classes_of, close, output_and_gradients, outputs
from torch import nn
from torch.nn.utils import parametrizations

import aeup
from aeup import swap, unswap

pytestmark = pytest.mark.usefixtures("one_thread")


class Generator(nn.Sequential):
    """DCGAN's, small."""

    def __init__(self):
        super().__init__(
            nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 5, 4, 2, 1),
            nn.LeakyReLU(0.2, True),
            nn.ConvTranspose2d(5, 3, 3, 2, 1, output_padding=1),
            nn.Tanh(),
        )


class Resizing(nn.Module):
    """Calls F.interpolate itself: in front of a convolution, and where two things see the result."""

    def __init__(self):
        super().__init__()
        self.up = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Sequential(nn.Conv2d(4, 3, 3, padding="same"), nn.SiLU())
        self.weight = nn.Parameter(torch.randn(3, 2, 2, 2))

    def forward(self, x, size=None):
        x = self.act(self.up(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)))
        x = F.interpolate(x, size=size or (13, 11))
        x = self.head(x)
        low = F.interpolate(x, scale_factor=2, mode="bicubic")
        return F.conv_transpose2d(low, self.weight, stride=2), self.act(low)


def decoder():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.SiLU(),
        nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),
        nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.UpsamplingNearest2d(size=(17, 9)),
        nn.Conv2d(4, 3, (1, 3), padding=(0, 1)),
        nn.UpsamplingBilinear2d(scale_factor=2),
    )


MODELS = {
    "generator": (Generator, (2, 6, 1, 1)),
    "resizing": (Resizing, (2, 3, 5, 6)),
    "decoder": (decoder, (2, 4, 5, 3)),
    "one": (lambda: nn.ConvTranspose2d(4, 3, 3, 2), (2, 4, 5, 3)),
}


def made(name, dtype=torch.float64, layout=torch.contiguous_format):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(dtype).to(memory_format=layout).eval()
    return model, torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_results_gradients_and_keys(name, fuse):
    model, x = made(name)
    parameters, keys, classes = list(model.parameters()), list(model.state_dict()), classes_of(model)
    text, before = repr(model), output_and_gradients(model, x)
    planned = swap(model, fuse=fuse, dry_run=True)
    assert classes_of(model) == classes and planned.dry_run
    report = swap(model, fuse=fuse)
    assert report.rows == planned.rows and report.replaced and bool(report.fused) == (fuse and name != "one")
    assert classes_of(model) != classes and list(model.state_dict()) == keys and repr(model) == text
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    close(output_and_gradients(model, x), before)
    again = swap(model, fuse=fuse)
    assert not again.replaced and not again.fused and all("already" in r.reason for r in again.left)
    assert unswap(model) is model
    assert classes_of(model) == classes and not any("_aeup_original" in m.__dict__ for m in model.modules())
    close(output_and_gradients(model, x), before)


@pytest.mark.parametrize("name", MODELS)
def test_aeup_runs(name):
    model, x = made(name)
    assert not any(c.op for c in aeup.explain(model, x))
    report = swap(model)
    ops = [c.op for c in aeup.explain(model, x) if "gradient" not in c.call]
    used = {"aeup.upsample_conv2d": 0, "aeup.conv_transpose2d": 0, "aeup.interpolate": 0} | {
        op: ops.count(op) for op in ops
    }
    want = {"generator": (0, 3, 0), "resizing": (2, 1, 1), "decoder": (3, 0, 1), "one": (0, 1, 0)}[name]
    assert (used["aeup.upsample_conv2d"], used["aeup.conv_transpose2d"], used["aeup.interpolate"]) == want
    assert len(report.fused) == {"generator": 3, "resizing": 2, "decoder": 4, "one": 0}[name]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODELS)
def test_the_layout_is_kept(name, layout):
    model, x = made(name, torch.float32, layout)
    before = model(x)
    swap(model)
    after = model(x)
    for a, b in zip(*([o] if torch.is_tensor(o) else o for o in (before, after)), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)


def test_moving_and_casting_a_swapped_model():
    model, x = made("decoder")
    swap(model)
    model.to(memory_format=torch.channels_last).bfloat16()
    out = model(x.bfloat16().contiguous(memory_format=torch.channels_last))
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    model.double()
    before = model(x)
    close([unswap(model)(x)], [before])


def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield copy.deepcopy(model)
    yield copy.copy(model)
    yield pickle.loads(pickle.dumps(model))
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_checkpoints(name):
    model, x = made(name)
    before = output_and_gradients(model, x)
    swap(model)
    classes = classes_of(model)
    for other in copies(model):
        assert classes_of(other) == classes
        close(output_and_gradients(other, x), before)
        close(output_and_gradients(unswap(other), x), before)
        swap(model) if classes_of(model) != classes else None  # copy.copy shares the children
    fresh, _ = made(name)
    nn.init.zeros_(next(fresh.parameters()))
    fresh.load_state_dict(model.state_dict())
    close(output_and_gradients(fresh, x), before)
    model.load_state_dict(fresh.state_dict(), strict=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    close(output_and_gradients(average.module, x), before)


@pytest.mark.parametrize("name", ["generator", "resizing", "decoder"])
def test_an_optimizer_goes_on(name):
    models = []
    for when in ("never", "after one step"):
        model, x = made(name)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(3):
            if step == 1 and when != "never":
                swap(model)
            optimizer.zero_grad()
            out = model(x)
            sum(o.square().sum() for o in ([out] if torch.is_tensor(out) else out)).backward()
            optimizer.step()
        models.append(model)
    close(models[1].parameters(), models[0].parameters())


@pytest.mark.parametrize("name", ["generator", "resizing", "decoder"])
def test_hooks_see_what_they_saw(name):
    seen = []

    def watch(model):
        def note(module, args, out):
            seen.append((args[0].detach().clone(), out.detach().clone()))

        return [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]

    model, x = made(name)
    hooks = watch(model)
    model(x)
    before = list(seen)
    for hook in hooks:
        hook.remove()
    swap(model)  # without hooks: pairs
    assert len(aeup.explain(model, x)) > 0
    seen.clear()
    hooks = watch(model)  # after the swap
    model(x)
    after = list(seen)
    unswap(model)
    report = swap(model)  # with them
    assert not report.fused
    assert all("hooks" in r.reason for r in report.left)
    seen.clear()
    model(x)
    for got in (after, seen):
        assert len(got) == len(before)
        for a, b in zip(got, before, strict=True):
            close(a, b)
    seen.clear()
    for hook in hooks:
        hook.remove()
    assert swap(unswap(model)).fused
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        model(x)
        swapped = list(seen)
        seen.clear()
        unswap(model)(x)
    finally:
        handle.remove()
    assert seen == swapped


def test_a_pair_that_changes_after_the_swap_stays_right():
    model, x = made("decoder")
    plain = copy.deepcopy(model)
    swap(model)
    close([model[:2](x), model[1:4](model[0](x))], [plain[:2](x), plain[1:4](plain[0](x))])
    y = x
    for module in model:
        y = module(y)
    close([y], [plain(x)])
    for m in (model, plain):
        torch.manual_seed(1)
        m[2] = nn.Conv2d(6, 5, 3, stride=2, dtype=torch.float64)
    close([model(x)], [plain(x)])
    for m in (model, plain):
        m[7].padding_mode = "reflect"
        m[7]._reversed_padding_repeated_twice = [1, 1, 0, 0]
        del m[3]
    close([model(x)], [plain(x)])
    for m in (model, plain):
        assert type(parametrizations.weight_norm(m[4][0])) is not nn.Conv2d
    close([model(x)], [plain(x)])


def test_a_sequence_that_iterates_otherwise():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(list(self._modules.values()))

    model = Backwards(nn.Conv2d(4, 3, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3), nn.ReLU()).double()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    before = model(x)
    assert not swap(model).fused
    close([model(x)], [before])


def test_a_parametrised_module_of_a_swapped_class():
    model, x = made("resizing")
    swap(model)
    parametrizations.weight_norm(model)
    before = model(x)
    close(copy.deepcopy(model)(x), before)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):  # torch's
        pickle.dumps(model)


def test_a_shared_upsampling_and_aeups_own_modules():
    up = nn.Upsample(scale_factor=2)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(up, nn.Conv2d(3, 4, 3)),
            "b": nn.Sequential(up, nn.ReLU()),
            "c": nn.Sequential(aeup.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3)),
            "d": nn.Sequential(aeup.ConvTranspose2d(3, 2, 2, activation="relu"), nn.ReLU()),
            "e": aeup.UpsampleConv2d(3, 2, 3),
        }
    ).double()
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    before = [m(x) for m in model.values()]
    report = swap(model)
    assert [r.path for r in report.fused] == ["a.0, a.1", "c.0, c.1"]
    close([m(x) for m in model.values()], before)
    unswap(model)
    assert type(up) is nn.Upsample and type(model["c"]) is nn.Sequential
    assert type(model["c"][0]) is aeup.Upsample and type(model["d"][0]) is aeup.ConvTranspose2d


def test_a_swap_that_fails_leaves_the_model():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            return F.interpolate(self.up(x), scale_factor=2)

        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = nn.Sequential(Generator(), Stubborn())
    classes, state = classes_of(model), [dict(m.__dict__) for m in model.modules()]
    with pytest.raises(RuntimeError, match="no"):
        swap(model)
    assert classes_of(model) == classes and [dict(m.__dict__) for m in model.modules()] == state


def test_errors():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        swap(lambda x: x)
    with pytest.raises(TypeError, match="model must be"):
        unswap(None)
    model = Generator()
    classes = classes_of(model)
    with pytest.raises(TypeError, match="benchmark must be a tensor, a tuple or a dict, got int"):
        swap(model, benchmark=3)
    with pytest.raises(RuntimeError):
        swap(model, benchmark=torch.randn(1, 7, 1, 1))
    assert classes_of(model) == classes and model.training
    swap(model)
    parametrizations.weight_norm(model[3])
    with pytest.raises(RuntimeError, match="of 3 was changed to ParametrizedConvTranspose2d"):
        unswap(model)
    assert type(model[0]) is aeup.ConvTranspose2d


def test_the_report():
    model = nn.Sequential(decoder(), nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, stride=2)))
    report = swap(model)
    rows = report.to_list()
    assert json.loads(json.dumps(rows)) == rows
    pair = {"path": "0.1, 0.2, 0.3", "was": "Upsample -> Conv2d -> SiLU", "status": "fused"}
    assert {**pair, "now": "aeup.upsample_conv2d with activation", "reason": ""} in rows
    text = str(report)
    assert "5 replaced, 4 fused, 1 left" in text and "1.0, 1.1" in text and "hook added later" in text
    assert "would be replaced" in str(swap(decoder(), dry_run=True))
    assert "nothing here is what aeup serves" in str(swap(nn.Linear(2, 2)))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_benchmark(form):
    model, x = made("resizing", torch.float32)
    model.train()
    inputs = {"tensor": x, "tuple": (x, (12, 9)), "dict": {"x": x, "size": (12, 9)}}[form]
    state = torch.get_rng_state()
    report = swap(model, benchmark=inputs, dry_run=form == "tuple")
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    assert (type(model) is Resizing) == (form == "tuple")
    found = report.benchmark
    assert found.device == "cpu" and found.ratio > 0 and found.before > 0 and found.after > 0
    assert found.quartiles[0] <= found.ratio <= found.quartiles[1] and found.difference < 1e-5
    assert f"{found.ratio:.2f}x" in str(report) and " ms" not in str(report)  # on a CPU only ratios
    assert found.gained == (found.quartiles[0] > 1) == ("gained" not in str(found) and "slower" not in str(found))


def test_benchmark_sees_into_a_dataclass():
    @dataclass
    class Output:
        sample: torch.Tensor

    class Telling(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            return Output(self.up(x) + (type(self.up) is nn.Upsample))

    assert swap(Telling(), benchmark=torch.zeros(1, 3, 4, 4)).benchmark.difference == 1


def test_benchmark_says_when_nothing_was_gained():
    report = swap(nn.Linear(3, 3), benchmark=torch.randn(2, 3))
    assert report.benchmark.difference == 0
    text = str(type(report.benchmark)("cuda", 2.0, 2.0, 1.0, (0.99, 1.01), 0.0))
    assert text.startswith("nothing was gained: 2.000 ms -> 2.000 ms, 1.00x (quartiles 0.99 to 1.01) on cuda")


# --- torch's machinery around a swapped model ---


@pytest.mark.parametrize("name", ["generator", "resizing", "decoder"])
def test_compile_and_export(name):
    model, x = made(name, torch.float32)
    before = output_and_gradients(model, x)
    swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(output_and_gradients(compiled, x), before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert any("aeup" in str(n.target) for n in program.graph.nodes)
        got, want = program.module()(x), model(x)
        torch.testing.assert_close(got, want)


def test_compiled_before_the_swap():
    model, x = made("decoder", torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(x)
    report = swap(compiled)
    assert report.fused and report.fused[0].path.startswith("_orig_mod.1")
    torch.testing.assert_close(compiled(x), before)


def test_fx_traces_a_swapped_model():
    model, x = made("decoder")
    before = model(x)
    swap(model)
    close([torch.fx.symbolic_trace(model)(x)], [before])


def test_ddp(tmp_path):
    model, x = made("decoder")
    before = output_and_gradients(model, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert swap(wrapped).fused  # after it was wrapped
        close(output_and_gradients(wrapped, x), before)
        again = nn.parallel.DistributedDataParallel(swap(unswap(model)) and model)  # and before
        close(output_and_gradients(again, x), before)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["generator", "resizing", "decoder"])
def test_torchscript(name):
    """What is traced is torch's, and serves other sizes; what cannot be scripted says so."""
    model, x = made(name)
    plain = copy.deepcopy(model)
    swap(model)
    traced = torch.jit.trace(model, x)
    assert "aeup::" not in str(traced.inlined_graph)
    for input in (x, torch.randn(3, x.shape[1], 7, 9, dtype=torch.float64)):
        close(outputs(traced, input), outputs(plain, input))
    classes = classes_of(model)
    with pytest.raises(RuntimeError, match="torch.jit.script does not know aeup"):
        torch.jit.script(model)
    assert classes_of(model) == classes


def test_onnx():
    """What is exported is ONNX's own operators, of any size, by the same weights."""
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    x = torch.randn(2, 8, 5, 6)
    model = nn.Sequential(
        nn.Upsample(scale_factor=2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.GroupNorm(4, 16),
        nn.ReLU(), nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.Tanh(), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(16, 16, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2),
    ).eval()  # fmt: skip
    assert len(swap(model).fused) == 5
    sizes = {at: torch.export.Dim(name) for at, name in ((0, "n"), (2, "h"), (3, "w"))}
    exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=(sizes,)).model_proto
    assert {node.domain for node in exported.graph.node} == {""} and not exported.functions
    for input in (x, torch.randn(3, 8, 7, 4)):
        (got,) = evaluator(exported).run(None, {exported.graph.input[0].name: input.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(input).detach(), rtol=1e-4, atol=1e-4)


def test_func_and_checkpointing():
    model, x = made("decoder")
    before = output_and_gradients(model, x)[0]
    swap(model)
    close([torch.func.functional_call(model, dict(model.named_parameters()), x)], [before])
    out = torch.utils.checkpoint.checkpoint_sequential(model, 3, x.requires_grad_(), use_reentrant=False)
    close([out], [before])
