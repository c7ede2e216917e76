"""`aeup bench --tune`: what is measured, which rules follow from it, and the table that "auto" then reads. The clock is
a stand-in but for one row."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from aeup.bench import cli, tune
from aeup.bench import conv_transpose2d as conv
from aeup.bench import upsample_conv2d as upsample
from aeup.bench.layer import Case as Layer
from aeup.bench.timing import Timing
from bench_helpers import FAST, case
from click.testing import CliRunner

import aeup
from aeup import tuned
from aeup.backends import Kernel

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def fixed(**seconds):
    """A clock by which each backend takes so long, 10 % more or less, whatever it does; others 1 s."""

    def clock(timed, s):
        found = {name: seconds.get(name, 1.0) for name in timed}
        return {name: Timing(t, 0.9 * t, 1.1 * t, 9) for name, t in found.items()}, 0.0

    return clock


@pytest.fixture
def operators(monkeypatch):
    """Two cases of each operator."""
    layer = Layer("tiny", conv.Geometry(2, 8, 5, 6, 3, 4, 2, 1, 0), "bf16", "NHWC", "this test")
    fused = upsample.Case("tiny", upsample.Geometry(1, 32, 20, 20, 32), "fp32", "NCHW", "this test")
    cases = [case(), case("nearest", "bf16", "NHWC")], [layer, replace(layer, dtype="fp32")], [fused]
    made = [replace(o, cases=lambda device, of=of: of) for o, of in zip(tune.OPERATORS, cases, strict=True)]
    monkeypatch.setattr(tune, "OPERATORS", tuple(made))
    return tuple(made)


# --- what is measured ---


def test_tasks_are_the_calls_and_their_gradients(operators):
    todo = {task.id: task for task in tune.tasks("cpu", operators)}
    assert len(todo) == 2 * 2 + 2 * 3 + 3
    task = todo["conv_transpose2d_weight_gradient/tiny/bf16/NHWC/weight_gradient"]
    features = {"op": "conv_transpose2d", "pass": "weight_gradient", "dtype": "bfloat16", "layout": "NHWC"}
    assert features.items() <= task.features().items() and task.features()["pixels"] == 2 * 5 * 6
    forward = todo["interpolate/tiny/nearest/bf16/NHWC/forward"]
    assert forward.serving() == ["cpu", "torch"] and forward.default() == "cpu"
    fused = todo["upsample_conv2d/tiny/nearest/fp32/NCHW/forward"]
    assert {"composed", "torch"} <= set(fused.serving())
    assert list(todo) == [task.id for task in tune.tasks("cpu", operators)]  # the same order every time


def test_every_backend_of_every_task_is_right_and_timed(operators):
    for task in tune.tasks("cpu", operators):
        row = tune.measure(task, FAST)
        if len(task.serving()) == 1:
            assert row is None
            continue
        assert row["wrong"] == {} and set(row["seconds"]) == set(task.serving())
        assert all(0 < q20 <= median <= q80 for median, q20, q80 in row["seconds"].values())


@pytest.mark.parametrize(
    "spoil", (lambda y: y + 0.01, lambda y: y.mul_(float("nan")), lambda y: y[1:], lambda y: 1 / 0)
)
def test_a_wrong_result_has_no_time(operators, monkeypatch, spoil):
    task = next(t for t in tune.tasks("cpu", operators) if t.id == "interpolate/tiny/bilinear/fp32/NCHW/forward")
    real = task.op.kernels["torch"]
    spoiled = Kernel(lambda *args: spoil(real.run(*args)), real.refuses)
    monkeypatch.setitem(task.op.kernels, "cpu", spoiled)
    row = tune.measure(task, FAST, fixed(cpu=0.1))
    assert row["wrong"].keys() == {"cpu"} and row["seconds"] == {} and tune.rules_of([row]) == []


def test_data_have_the_strides_of_the_call(operators):
    for task in tune.tasks("cpu", operators):
        with task.case.context():
            given = [t for t in tune.Trial(task).args if torch.is_tensor(t)]
        wanted = [t for t in task.args if torch.is_tensor(t)]
        assert [(t.shape, t.stride(), t.dtype) for t in given] == [(t.shape, t.stride(), t.dtype) for t in wanted]
        assert all(t.float().std() > 0.1 for t in given if t.numel() > 9)


def test_a_win_must_happen_twice(operators):
    task = next(t for t in tune.tasks("cpu", operators) if t.id == "interpolate/tiny/bilinear/fp32/NCHW/forward")
    for times, found in (((0.5, 0.6), ["torch"]), ((0.5, 1.0), []), ((1.0,), [])):
        left = list(times)
        row = tune.measure(task, FAST, lambda timed, s, left=left: fixed(torch=left.pop(0))(timed, s))
        assert [rule["backend"] for rule in tune.rules_of([row])] == found and left == []


# --- what follows from it ---


def row(pixels=100, default="cpu", wrong=(), op="interpolate", **seconds):
    features = {"op": op, "pass": "forward", "dtype": "float32", "layout": "NCHW", "mode": "nearest", "family": ""}
    found = {name: t if isinstance(t, list) else [t, 0.9 * t, 1.1 * t] for name, t in seconds.items()}
    return features | {"pixels": pixels, "default": default, "seconds": found, "wrong": dict.fromkeys(wrong, "red")}


def taken(*rows):
    return [(r["backend"], r["least_pixels"], r["most_pixels"]) for r in tune.rules_of(rows)]


def test_a_rule_needs_more_than_the_spread():
    assert taken(row(cpu=2.0, torch=1.0)) == [("torch", 65, 128)]
    assert taken(row(cpu=1.0, torch=2.0)) == []
    assert taken(row(cpu=[1.0, 0.6, 1.4], torch=[0.7, 0.5, 0.9])) == []  # noise
    assert taken(row(cpu=[1.0, 0.999, 1.001], torch=[0.98, 0.979, 0.981])) == []  # too little to matter
    assert taken(row(cpu=2.0, torch=1.0, wrong=["torch"])) == []
    assert taken(row(default="torch", cpu=2.0, torch=1.0)) == []


def test_the_calls_of_a_class_must_not_disagree():
    faster, slower, same = row(cpu=2.0, torch=1.0), row(cpu=1.0, torch=2.0), row(cpu=1.0, torch=1.01)
    assert taken(faster, faster, same) == [("torch", 65, 128)]
    assert taken(faster, slower) == taken(faster, faster, slower) == []
    assert taken(faster, same, same) == []
    assert taken(faster, slower | {"dtype": "bfloat16"}) == [("torch", 65, 128)]
    assert taken(faster, row(cpu=1.0, torch=2.0, op="conv_transpose2d")) == [("torch", 65, 128)]
    assert taken(faster, row(cpu=1.0, torch=1.0, wrong=["torch"])) == []


def test_neighbouring_sizes_share_a_rule():
    fast = {"cpu": 2.0, "torch": 1.0}
    assert taken(row(100, **fast), row(5000, **fast)) == [("torch", 65, 8192)]
    middle = row(1000, cpu=1.0, torch=2.0)
    assert taken(row(100, **fast), middle, row(5000, **fast)) == [("torch", 65, 128), ("torch", 4097, 8192)]
    assert taken(row(1, **fast)) == [("torch", 0, 1)] and taken(row(2, **fast)) == [("torch", 2, 2)]
    other = row(5000, cpu=2.0, torch=1.5, composed=1.0)
    assert taken(row(100, **fast), other) == [("torch", 65, 128), ("composed", 4097, 8192)]
    for pixels in (1, 2, 3, 64, 65, 1 << 20, (1 << 20) + 1):
        ((_, least, most),) = taken(row(pixels, **fast))
        assert least <= pixels <= most


def test_a_rule_says_what_was_measured():
    (rule,) = tune.rules_of([row(cpu=2.0, torch=1.0), row(cpu=2.0, torch=1.0)])
    assert rule["why"] == "torch took 50 % of the time of cpu in 2 measured calls"
    assert "mode" not in tune.rules_of([row(cpu=2.0, torch=1.0) | {"mode": ""}])[0]


# --- the table ---


def no_step(*args):
    pass


def test_auto_follows_what_was_measured(user_tables, operators, monkeypatch):
    monkeypatch.setattr(tune.tune_choices, "__defaults__", (fixed(torch=0.5),))
    x = torch.randn(2, 5, 6, 7)

    def backends():
        return [c.backend for c in aeup.explain(aeup.interpolate, x, scale_factor=2, mode="bilinear")]

    assert backends() == ["cpu", "cpu"]
    table, path, left = tune.tune("cpu", (), 1.0, None, False, no_step)
    assert left is None and path == tuned.path_of(tuned.device_name(CPU)) and list(user_tables.iterdir()) == [path]
    assert backends() == ["torch", "torch"]
    choice = aeup.explain(aeup.interpolate, x, scale_factor=2, mode="bilinear")[0]
    assert "torch took 50 % of the time of cpu in 1 measured call (your tuned table, 2" in choice.others["cpu"]
    assert torch.__version__ in choice.others["cpu"]

    w, layer = torch.randn(8, 3, 4, 4), torch.randn(2, 8, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    layer_choices = aeup.explain(aeup.conv_transpose2d, layer, w.bfloat16(), stride=2, padding=1)
    assert all(c.backend == "torch" for c in layer_choices)
    written = json.loads(path.read_text())
    assert written["measured"]["torch"] == torch.__version__ and written["schema"] == tuned.SCHEMA
    assert len(written["rows"]) == len(table.rows) > 4


def test_a_second_run_goes_on_and_fresh_starts_again(user_tables, operators, monkeypatch):
    seen = []

    def clock(timed, s):
        seen.append(1)
        return fixed()(timed, s)

    monkeypatch.setattr(tune.tune_choices, "__defaults__", (clock,))
    _, path, left = tune.tune("cpu", ("interpolate",), 1e-9, None, False, no_step)
    assert left == "the time was up: 4 of 4 calls left out" and path.exists() and not seen
    steps = []
    tune.tune("cpu", ("interpolate",), 1.0, None, False, lambda *step: steps.append(step))
    assert len(seen) == 4 and [step[1:] for step in steps] == [(i, 4) for i in (1, 2, 3, 4)]
    tune.tune("cpu", ("interpolate",), 1.0, None, False, no_step)
    assert len(seen) == 4
    tune.tune("cpu", ("interpolate",), 1.0, None, True, no_step)
    assert len(seen) == 8
    old = json.loads(path.read_text())
    old["measured"]["torch"] = "1.0"
    path.write_text(json.dumps(old))
    tuned.forget()
    tune.tune("cpu", ("interpolate",), 1.0, None, False, no_step)
    assert len(seen) == 12  # another torch: nothing is taken over


def test_what_was_measured_before_an_interrupt_is_kept(user_tables, operators, monkeypatch):
    readings = iter(range(4))  # two of each call that torch wins

    def clock(timed, s):
        if next(readings, None) is None:
            raise KeyboardInterrupt
        return fixed(torch=0.5)(timed, s)

    monkeypatch.setattr(tune.tune_choices, "__defaults__", (clock,))
    table, path, left = tune.tune("cpu", ("interpolate",), 1.0, None, False, no_step)
    assert left == "stopped" and len(table.rows) == 2
    tuned.check(json.loads(path.read_text()))
    assert len(tuned.rules(CPU)) == 2


def test_a_table_that_cannot_be_written_leaves_the_old_one(user_tables, operators, monkeypatch):
    path = tuned.path_of(tuned.device_name(CPU))
    path.write_text("the old one")
    table = tune.Table(CPU, rows={"x": row(cpu=2.0, torch=1.0) | {"contended": False, "default": object()}})
    with pytest.raises(TypeError):
        table.write(path)
    assert path.read_text() == "the old one" and list(user_tables.iterdir()) == [path]


# --- the command ---


def invoke(*args):
    return CliRunner().invoke(cli.bench, args, catch_exceptions=False)


def test_command(user_tables, operators):
    done = invoke("--tune", "--op", "interpolate", "--min-time", "0.001")
    assert done.exit_code == 0 and "4 calls measured" in done.output and str(user_tables) in done.output
    again = invoke("tune", "--op", "interpolate", "--minutes", "1")
    assert again.exit_code == 0 and "4 calls measured" in again.output


def test_command_says_what_it_found(user_tables, operators, monkeypatch):
    monkeypatch.setattr(tune.tune_choices, "__defaults__", (fixed(torch=0.25),))
    done = invoke("tune", "--op", "interpolate")
    assert "torch took 25 % of the time of cpu" in " ".join(done.output.split()) and "rules" in done.output


def test_command_fails_on_a_wrong_result_and_tells_of_a_stop(user_tables, operators, monkeypatch):
    op = aeup.ops.interpolate.OP
    real = op.kernels["cpu"]
    with monkeypatch.context() as patch:
        patch.setitem(op.kernels, "cpu", Kernel(lambda *args: real.run(*args).neg(), real.refuses, real.label))
        done = invoke("tune", "--op", "interpolate", "--min-time", "0.001")
    assert done.exit_code == 1 and "above the budget" in done.output

    def stop(timed, s):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(tune.tune_choices, "__defaults__", (stop,))
    done = invoke("tune", "--op", "interpolate", "--fresh")
    assert done.exit_code == 143 and "stopped; written to" in done.output


def test_bad_usage(user_tables, monkeypatch):
    assert "--minutes" in invoke("--tune", "--minutes", "0").output
    monkeypatch.setenv("AEUP_TUNED", "")
    done = invoke("tune", "--op", "interpolate")
    assert done.exit_code == 2 and "must name a folder" in done.output
    (user_tables / "file").write_text("")
    monkeypatch.setenv("AEUP_TUNED", str(user_tables / "file" / "in"))
    done = invoke("tune", "--op", "interpolate")
    assert done.exit_code == 1 and "cannot be written" in done.output
