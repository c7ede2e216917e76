"""`aeup bench conv_transpose2d`: its table, its references, and that nothing wrong gets a speed."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from aeup.bench import conv2d, harness, layer, machine, peers, report, timing
from aeup.bench import conv_transpose2d as conv
from aeup.bench.cli import bench
from aeup.bench.gate import SECOND_TORCH, Gate
from aeup.bench.workload import DIRECTIONS, LAYOUTS, precision
from bench_helpers import FAST, FakeDevice, made_report, rendered
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

import aeup

GEOMETRIES = {
    "k4": conv.Geometry(3, 10, 5, 6, 6, 4, 2, 1, 0),
    "k2": conv.Geometry(2, 8, 7, 4, 5, 2, 2, 0, 0),
    "k3op": conv.Geometry(2, 6, 5, 5, 4, 3, 2, 1, 1),
    "point": conv.Geometry(6, 12, 1, 1, 7, 4, 1, 0, 0),
    "wide": conv.Geometry(1, 3, 4, 5, 3, 16, 8, 4, 0),
    "one": conv.Geometry(4, 9, 6, 6, 1, 4, 2, 1, 0),
}
GRADIENTS = ("input gradient", "weight gradient", "bias gradient")


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)


def case(geometry="k4", dtype="fp32", layout="NCHW"):
    return layer.Case(geometry, GEOMETRIES[geometry], dtype, layout, "this test")


def composed(c):
    return lambda x, w, b: F.relu(F.conv_transpose2d(x, w, b, *c.geometry.arguments()))


def subject(make=composed, name="ours", **kw):
    return peers.Peer(name, make, subject=True, **kw)


def everyone(ours):
    return [peers.torch_eager(), layer.torch_other_layout(), ours]


def measured(ours, c=None, direction="forward", s=FAST):
    return harness.measure(c or case(), direction, everyone(ours), s)


def by_hand(g, x, w, b):
    """Every input pixel with every tap, in float64: the value before the activation."""
    _, _, oh, ow = g.output
    y = torch.zeros(g.output, dtype=torch.float64)
    for ky in range(g.k):
        for kx in range(g.k):
            product = torch.einsum("nchw,cd->ndhw", x, w[:, :, ky, kx])
            for i in range(g.h):
                for j in range(g.w):
                    oy, ox = i * g.stride - g.padding + ky, j * g.stride - g.padding + kx
                    if 0 <= oy < oh and 0 <= ox < ow:
                        y[:, :, oy, ox] += product[:, :, i, j]
    return y + b[:, None, None]


# --- the table ---


def test_the_table_is_what_it_says():
    assert len(conv.WORKLOADS) == len(set(conv.SHAPES)) and sum(w.set == "main" for w in conv.WORKLOADS) == 17
    for device, dtypes in (("cpu", 2), ("cuda", 3)):
        table = conv.conv_transpose2d_cases(device)
        assert len(table) == 17 * dtypes * 2 == len({c.id for c in table}) and all(c.source for c in table)
        for c in table:
            g = c.geometry
            x, w = torch.empty(g.input, device="meta"), torch.empty(g.weight, device="meta")
            assert F.conv_transpose2d(x, w, None, *g.arguments()).shape == g.output
            assert device != "cpu" or 3e6 < c.flops("forward") < 1.1e9, c.id


def test_bytes_and_flops():
    c = next(c for c in conv.conv_transpose2d_cases("cuda", shapes=("pose3",), dtypes=("bf16",)))
    assert c.geometry.output == (32, 256, 64, 48)
    x, w, y = 32 * 256 * 32 * 24, 256 * 256 * 16, 32 * 256 * 64 * 48
    assert c.bytes("forward") == 2 * (x + w + 256 + y)
    assert c.bytes("backward") == 2 * (2 * y + 2 * x + 2 * w + 256)
    leaves = [torch.empty(s, device="meta", requires_grad=True) for s in (c.geometry.input, c.geometry.weight)]
    with FlopCounterMode(display=False) as counter:
        out = F.conv_transpose2d(*leaves, None, *c.geometry.arguments())
    assert c.flops("forward") == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert c.flops("backward") == counter.get_total_flops()


def test_the_table_of_convolutions():
    for device, dtypes in (("cpu", 2), ("cuda", 3)):
        table = conv2d.conv2d_cases(device)
        assert len(table) == len(conv2d.WORKLOADS) * dtypes * 2 == len({c.id for c in table})
        for c in table:
            g = c.geometry
            leaves = [torch.empty(s, device="meta", requires_grad=True) for s in (g.input, g.weight)]
            with FlopCounterMode(display=False) as counter:
                assert F.conv2d(*leaves, None, g.stride, g.padding).shape == g.output
            assert c.flops("forward") == counter.get_total_flops()
            assert device != "cpu" or 3e6 < c.flops("forward") < 1.1e9, c.id
    (c,) = conv2d.conv2d_cases("cpu", ("vae1",), ("fp32",), ("NCHW",))
    for direction in DIRECTIONS:
        assert measured(subject(lambda c: c.aeup()), c, direction).status == "ok"


def test_filters():
    found = conv.conv_transpose2d_cases("cuda", shapes=("mnist", "dcgan1"), dtypes=("tf32", "bf16"), layouts=("NCHW",))
    assert [c.id for c in found] == [f"{s}/{d}/NCHW" for s in ("dcgan1", "mnist") for d in ("bf16", "tf32")]
    with pytest.raises(ValueError, match="tf32 is a number format of GPUs"):
        conv.conv_transpose2d_cases("cpu", dtypes=("tf32",))
    with pytest.raises(ValueError, match="shapes: unknown .'odd'."):
        conv.conv_transpose2d_cases("cpu", shapes=("odd",))


# --- what is right ---


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_references_are_the_sum_over_taps_and_its_adjoints(geometry):
    c = case(geometry, "bf16", "NHWC")
    problem, g = c.problem("cpu", 0), c.geometry
    x, w, b = (t.double().requires_grad_() for t in problem.inputs)
    before = by_hand(g, x, w, b)
    close = dict(rtol=0, atol=1e-10)
    torch.testing.assert_close(problem.parts("forward")[0].reference, before.detach().relu(), **close)
    inner = problem.grad.double() * (before > 0)
    parts = problem.parts("backward")
    assert tuple(part.name for part in parts) == GRADIENTS
    for part, expected in zip(parts, torch.autograd.grad(before, (x, w, b), inner), strict=True):
        torch.testing.assert_close(part.reference, expected, **close)


def test_data_is_shared_and_scaled():
    problems = [case(dtype=d, layout=lo).problem("cpu", 0) for d in ("fp32", "tf32") for lo in LAYOUTS]
    assert len({id(p.oracle) for p in problems}) == 1
    for p in problems:
        assert all(t.is_contiguous(memory_format=p.case.memory_format) for t in (*p.inputs[:2], p.grad))
    oracle = case("wide").problem("cpu", 1).oracle
    before = by_hand(GEOMETRIES["wide"], *(t.double() for t in oracle.inputs))
    assert 0.5 < before.std() < 2
    cut = before.abs() < layer.MARGIN * before.std(correction=0)
    assert 0.005 < cut.double().mean() < 0.06 and ((oracle.grad == 0) == cut).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_torch_itself_passes_the_gate(geometry, direction):
    for dtype in ("fp32", "bf16", "fp16"):
        for layout in LAYOUTS:
            row = measured(subject(), case(geometry, dtype, layout), direction)
            assert {r.status for r in row.results.values()} == {"ok"}, row
            names = GRADIENTS if direction == "backward" else ("output",)
            assert tuple(row.results["ours"].checks) == names


def test_a_sign_that_rounding_decides_does_not_decide_the_gate():
    def shifted(c):
        """As a kernel would that is off by half the margin before the activation."""
        return lambda x, w, b: F.relu(F.conv_transpose2d(x, w, b, *c.geometry.arguments()) + 0.4 * layer.MARGIN)

    row = measured(subject(shifted), case("wide"), "backward")
    assert row.status == "ok", row.results["ours"].reason
    assert measured(subject(shifted), case("wide"), "forward").status == "red"


def wrong(change, at):
    """torch, with one of its gradients (or its output, at None) changed."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return change(g.clone())

    def make(c):
        def fn(*inputs):
            if at is None:
                return change(composed(c)(*inputs))
            return composed(c)(*(Spoil.apply(t) if i == at else t for i, t in enumerate(inputs)))

        return fn

    return subject(make)


def one_element(value):
    def change(t):
        t = t.clone()
        t.view(-1)[-1] += value
        return t

    return change


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("value", (0.2, math.nan))
@pytest.mark.parametrize("at", (None, 0, 1, 2))
def test_gate_catches_one_wrong_element_of_any_result(at, value, dtype):
    c = case("k3op", dtype)
    value *= 1 if at is None else c.problem("cpu", 0).oracle.gradients[at].abs().max().item()
    row = measured(wrong(one_element(value), at), c, "forward" if at is None else "backward")
    assert row.status == "red" and "above the budget" in row.results["ours"].reason
    assert at is None or row.results["ours"].reason.startswith(GRADIENTS[at])
    assert all(r.timing is None and r.eager is None for r in row.results.values()) and not row.ceilings


@pytest.mark.parametrize(
    "make",
    [
        lambda c: lambda x, w, b: F.conv_transpose2d(x, w, b, *c.geometry.arguments()),
        lambda c: lambda x, w, b: F.relu(F.conv_transpose2d(x, w, 0 * b, *c.geometry.arguments())),
        lambda c: lambda x, w, b: F.relu(F.conv_transpose2d(x, w.flip(2), b, *c.geometry.arguments())),
        lambda c: lambda x, w, b: F.gelu(F.conv_transpose2d(x, w, b, *c.geometry.arguments())),
    ],
    ids=["no relu", "no bias", "flipped", "gelu"],
)
def test_gate_catches_a_wrong_op(make):
    for direction in DIRECTIONS:
        assert measured(subject(make), direction=direction).status == "red"


def test_layouts_are_kept():
    def make(c):
        return lambda x, w, b: composed(c)(x, w, b).contiguous(memory_format=LAYOUTS[layer.OTHER_LAYOUT[c.layout]])

    for layout in LAYOUTS:
        row = measured(subject(make), case(layout=layout))
        assert row.status == "red" and "strides" in row.results["ours"].reason
        assert measured(subject(make), case("one", layout=layout)).status == "ok"  # one channel: there is no difference


def test_torch_in_the_other_layout_sets_the_budget_too_within_bounds():
    c = case()
    problem = c.problem("cpu", 0)
    parts = problem.parts("forward")
    exact, out = parts[0].reference, composed(c)(*problem.inputs)
    gate = Gate(c, "forward", parts, (out,))
    own, budget = gate.torch_error, gate.judges[0].budget
    gate.widen((exact.float(),))
    assert gate.torch_error == own
    gate.widen(((exact + 2 * own).float(),))
    assert 1.5 * own < gate.torch_error < 3 * own and gate.judges[0].budget > budget
    gate.widen((exact.float() + 1,))
    assert gate.torch_error == SECOND_TORCH * own
    gate.widen((exact.float() * math.nan,))
    assert gate.torch_error <= SECOND_TORCH * own


# --- measuring ---


def test_the_other_layout_is_converted_outside_of_the_call():
    seen = []

    def make(c):
        def fn(x, w, b):
            seen.append((x.stride(), w.stride()))
            return composed(c)(x, w, b)

        return fn

    other = layer.torch_other_layout()
    spy = peers.Peer("spy", make, adapt=other.adapt)
    row = harness.measure(case(layout="NHWC"), "forward", [peers.torch_eager(), spy, subject()], FAST)
    assert row.results["spy"].status == "ok" and row.results["spy"].timing
    assert set(seen) == {((300, 30, 6, 1), (96, 16, 4, 1))}


def test_precision_is_the_dtype_classes():
    seen, cudnn = [], torch.backends.cudnn

    def make(c):
        seen.append((c.dtype, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark))
        return composed(c)

    with cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        for dtype in ("fp32", "tf32"):
            assert measured(subject(make), case(dtype=dtype)).status == "ok"
        assert seen == [("fp32", False, False, True), ("tf32", True, True, True)]
        assert cudnn.allow_tf32 and not cudnn.benchmark
        with pytest.raises(KeyError), precision("fp32"):
            raise KeyError
        assert cudnn.allow_tf32


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_gpu_row_has_device_time_eager_time_and_memory(monkeypatch, direction):
    """The way of a GPU, on a CPU that pretends: each mark on its clock takes 1 ms."""
    FakeDevice(monkeypatch, torch, tick=1e-3)
    allocated = iter(range(100, 1000, 100))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 + next(allocated))
    s = timing.Settings("cpu:0", min_time=1e-3, min_rounds=2, eager=True)
    limits = machine.Machine(copy=1e9, matrix={"bf16": 1e9})
    c = case("wide", "bf16", "NHWC")
    row = harness.measure(c, direction, everyone(subject()), s, limits)
    assert row.status == "ok"
    for name in ("torch", "torch-other", "ours"):
        result = row.results[name]
        assert result.timing.median == pytest.approx(1e-3) and result.eager.median > 0 and result.timing.host
        assert (result.peak_bytes is None) == (direction == "forward")
    assert set(row.ceilings) == {"copy"}
    assert row.floor == c.flops(direction) / 1e9 and row.fraction_of_floor() == pytest.approx(row.floor / 1e-3)
    entry = report.row_json(row, gpu=True)
    ours = entry["results"]["ours"]
    assert ours["eager_us"] == pytest.approx(row.results["ours"].eager.median * 1e6)
    assert ours["tflop_per_s"] == pytest.approx(c.flops(direction) / 1e9) and ours["fraction_of_copy"] == 1
    assert entry["ratio_to_torch"] == pytest.approx(entry["results"]["torch"]["eager_us"] / ours["eager_us"])
    assert entry["device_ratio_to_torch"] == pytest.approx(1)
    if direction == "backward":
        assert set(ours["parts"]) == set(GRADIENTS)
        assert ours["peak_bytes"] == 300 and entry["peak_bytes_to_torch"] == pytest.approx(3)


def test_floor_is_the_nearer_limit():
    c = case("k4", "bf16")
    for copy, rate in ((1e6, 1e12), (1e12, 1e6)):
        floor = machine.Machine(copy, {"bf16": rate}).floor(c, "forward")
        assert floor == max(c.bytes("forward") / copy, c.flops("forward") / rate)


def test_machine_is_measured(monkeypatch):
    FakeDevice(monkeypatch, torch, tick=1e-3)
    found = machine.measure_machine("cpu", ("fp32", "bf16", "fp32"), side=8, copied=4096)
    assert found.copy == pytest.approx(2 * 4096 / 1e-3)
    assert found.matrix == {"fp32": pytest.approx(2 * 8**3 / 1e-3), "bf16": pytest.approx(2 * 8**3 / 1e-3)}


# --- the report ---


def timed(geometry, ours, torchs, other, eager=(9e-6, 9e-6, 9e-6)):
    row = harness.Row(case(geometry, "bf16", "NHWC"), "backward", "ours", floor=0.5e-6)
    for name, t, e in zip(("ours", "torch", "torch-other"), (ours, torchs, other), eager, strict=True):
        result = harness.Result("ok", timing=timing.Timing(t, t, t, 5), eager=timing.Timing(e, e, e, 5))
        result.peak_bytes = {"ours": 50, "torch": 100}.get(name)
        row.results[name] = result
    row.ceilings["copy"] = timing.Timing(1e-6, 1e-6, 1e-6, 5)
    return row


def test_eager_time_decides_and_device_time_is_beside_it():
    row = timed("k4", 1e-6, 2e-6, 3e-6, eager=(10e-6, 8e-6, 5e-6))
    assert row.best_peer() == "torch-other" and row.ratio("torch") == pytest.approx(0.8)
    assert row.best_peer(device_only=True) == "torch" and row.ratio("torch", device_only=True) == pytest.approx(2)
    assert report.summary([row])["losses"] == 1
    settings = timing.Settings("cuda", eager=True)
    gpu = {"device_type": "cuda", "device": "a GPU", "torch": "0"}
    limits = machine.Machine(3e12, {"bf16": 7e14})
    kw = dict(operator=conv.OPERATOR, settings=settings, environment=gpu, machine=limits)
    text = rendered([timed("k2", 1e-6, 2e-6, 4e-6, (1e-6, 4e-6, 3e-6)), row], **kw)
    for word in ("device µs", "eager µs", "of floor", "TFLOP/s", "x torch-other", "x best", "x best, device", "memory"):
        assert word in text
    assert text.index("k4") < text.index("k2") and "backward bf16 NHWC" in text and "of mover" not in text
    (line,) = (line for line in text.splitlines() if line.lstrip().startswith("k4"))
    assert line.split()[4:] == ["1.0", "10.0", "0%", "50%", f"{row.case.flops('backward') / 1e6:.3g}", "100%"] + [
        "0.80", "0.50", "0.50", "2.00", "50%",
    ]  # fmt: skip
    assert "bytes at 3000 GB/s (copy) or products at bf16 700 TFLOP/s" in text
    data = made_report([row], **kw).to_json()
    assert data["kind"] == "conv_transpose2d" and data["machine"]["copy_gb_per_s"] == 3000
    mean = data["summary"]["geometric_mean"]["backward bf16 NHWC"]
    assert mean["ratio_to_best"] == pytest.approx(0.5) and mean["device_ratio_to_best"] == pytest.approx(2)
    assert mean["smallest_ratio_to_best"] == pytest.approx(0.5) and mean["fraction_of_floor"] == pytest.approx(0.5)


# --- the command ---

ONE_LAYER = "conv_transpose2d --device cpu --shape mnist_out --dtype fp32 --min-time 0.002".split()


def invoke(path, *more):
    return CliRunner().invoke(bench, [*ONE_LAYER, "--json", str(path), *more])


def stand_in(x, w, b=None, *args, activation=None):
    y = F.conv_transpose2d(x, w, b, *args)
    return F.relu(y) if activation == "relu" else y


def test_command_measures_what_aeup_has(tmp_path, monkeypatch):
    monkeypatch.setattr(aeup, "conv_transpose2d", stand_in, raising=False)
    result = invoke(tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["complete"] and [r["status"] for r in data["rows"]] == ["ok"] * 4
    assert {r["direction"] for r in data["rows"]} == set(DIRECTIONS)
    assert "geometric means" in result.output and "x torch-other" in result.output and "µs" not in result.output


def test_command_fails_where_aeup_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(aeup, "conv_transpose2d", lambda *a, activation=None: stand_in(*a), raising=False)
    result = invoke(tmp_path / "out.json", "--direction", "backward", "--layout", "NHWC")
    assert result.exit_code == 1 and "(mnist_out/fp32/NHWC/backward)" in result.output


def test_command_measures_aeup(tmp_path):
    result = invoke(tmp_path / "out.json", "--layout", "NCHW")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert all(r["results"]["aeup"]["backend"] for r in rows)


def test_command_rejects_what_a_cpu_has_not(tmp_path):
    result = invoke(tmp_path / "out.json", "--dtype", "tf32")
    assert result.exit_code == 2 and "tf32 is a number format of GPUs" in result.output and not list(tmp_path.iterdir())
