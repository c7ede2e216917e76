"""The benchmark: nothing wrong gets a speed, and nothing that was measured is lost."""

import json
import os
import pathlib
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from aeup.bench import cases, harness, peers, report
from aeup.bench.cli import bench
from aeup.bench.gate import FLOOR_ULPS, Gate, nearest_sources, reference, torch_result
from click.testing import CliRunner
from rich.console import Console

TINY = cases.Geometry(2, 5, 6, 7, 12, 14)
ODD = cases.Geometry(1, 4, 9, 25, 31, 56)
FAST = harness.Settings(min_time=1e-3, min_rounds=2, max_rounds=2)
ENVIRONMENT = {"device_type": "cpu", "device": "a CPU", "torch": "0", "threads": 1}


CPU_SECONDS = harness._cpu_seconds


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """Whether other programs run beside the tests must not decide them."""
    monkeypatch.setattr(harness, "_cpu_seconds", lambda: None)


def case(mode="bilinear", dtype="fp32", layout="NCHW", geometry=TINY, by="scale", align_corners=None, shape="tiny"):
    return cases.Case(shape, geometry, mode, dtype, layout, by, align_corners, "main", "this test")


def subject(change=lambda y: y, name="ours", **kw):
    """A peer that gives torch's result after `change`."""
    return peers.Peer(name, lambda c: lambda x: change(F.interpolate(x, **c.kwargs())), subject=True, **kw)


def measured(peer, c=None, direction="forward"):
    return harness.measure(c or case(), direction, [peers.torch_eager(), peer], FAST)


def judged(change, c, direction="forward"):
    """The gate's verdict on torch's result after `change`."""
    given = c.tensor(direction)
    out = torch_result(c, direction, c.tensor("forward"), given)
    return Gate(c, direction, given, out).check(change(out.clone()), keep_layout=True)


def made_report(rows, **kw):
    return report.Report(rows, ENVIRONMENT, {"absent": "not installed"}, FAST, {}, **kw)


# --- the gate ---

EVERY = [
    case(mode, dtype, layout, geometry, by, align_corners)
    for mode, align_corners in (
        ("nearest", None), ("nearest-exact", None), ("bilinear", None), ("bilinear", True), ("bicubic", None),
    )
    for dtype in cases.DTYPES
    for layout in cases.LAYOUTS
    for geometry, by in ((TINY, "scale"), (ODD, "size"))
]  # fmt: skip


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_torch_itself_passes_the_gate(direction):
    for c in EVERY:
        verdict = judged(lambda y: y, c, direction)
        assert verdict.reason is None, (c, verdict)
        assert verdict.error <= verdict.budget and verdict.border_error <= verdict.border_budget


def spoiled(at, by):
    def change(y):
        y[at] += by
        return y

    return change


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mode", cases.MODES)
def test_gate_catches_one_wrong_element(mode, dtype, direction):
    c = case(mode, dtype)
    eps = torch.finfo(c.torch_dtype).eps
    assert "above the budget" in judged(spoiled((1, 3, 4, 3), 40 * eps), c, direction).reason
    assert "above the budget" in judged(spoiled((1, 3, 4, 3), float("nan")), c, direction).reason


def test_gate_judges_the_border_by_its_own_error():
    c = case(geometry=cases.Geometry(1, 1, 16, 16, 32, 32))
    given = c.tensor("forward")
    given[..., 8, 8] = 1e4  # large in the middle: the budget there hides an error at the edge
    out = torch_result(c, "forward", given, given)
    gate = Gate(c, "forward", given, out)
    out[0, 0, 0, 5] += gate.budget / 2
    verdict = gate.check(out)
    assert verdict.error <= verdict.budget and "on the border" in verdict.reason


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda y: y[:, :, :-1], "shape"),
        (lambda y: y.double(), "dtype"),
        (lambda y: y.contiguous(memory_format=torch.channels_last), "strides"),
    ],
)
def test_gate_checks_shape_dtype_and_strides(change, word):
    assert word in judged(change, case()).reason


def test_nearest_is_judged_by_torchs_own_indices():
    # In float64 output 25 of 72 -> 200 reads row 9, in float32 torch may read another: the reference follows torch.
    for layout in cases.LAYOUTS:
        c = case("nearest", "bf16", layout, cases.Geometry(1, 5, 56, 300, 129, 700), "size")
        x = c.tensor("forward")
        row, col = nearest_sources(c, x.device)
        y = F.interpolate(x, **c.kwargs())
        assert torch.equal(y, x[:, :, row][:, :, :, col])
        assert col.max() == 299 and row.max() == 55
        assert torch.equal(reference(c, "forward", x), y.double())
        assert judged(lambda y: torch.cat([y[:, :, :1], y[:, :, :-1]], 2), c).reason
        g = c.tensor("backward")
        expected = torch.zeros(1, 5, 56, 700, dtype=torch.float64).index_add_(2, row, g.double())
        expected = torch.zeros(1, 5, 56, 300, dtype=torch.float64).index_add_(3, col, expected)
        torch.testing.assert_close(reference(c, "backward", g), expected, rtol=0, atol=1e-13)


def test_wrong_torch_does_not_widen_the_budget_of_nearest():
    c = case("nearest")
    g = c.tensor("backward")
    out = torch_result(c, "backward", c.tensor("forward"), g)
    gate = Gate(c, "backward", g, out + 1)
    ceiling = (FLOOR_ULPS + 2 * 4) * torch.finfo(torch.float32).eps * out.abs().max().item()
    assert gate.budget <= ceiling * 1.01 and gate.check(out).reason is None


# --- measuring ---


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_a_green_row_has_timings(direction):
    row = measured(subject(), case("bicubic", "bf16", "NHWC"), direction)
    assert row.status == "ok" and row.best_peer() == "torch"
    for timing in (row.results["ours"].timing, row.results["torch"].timing, row.ceilings["copy"]):
        assert 0 < timing.q20 <= timing.median <= timing.q80 and timing.samples >= 2
    assert row.ratio("torch") == row.median("torch") / row.median("ours")
    assert row.fraction("copy") == row.ceilings["copy"].median / row.median("ours")


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_a_red_row_is_called_once_and_never_timed(direction):
    calls = []

    def wrong(y):
        calls.append(1)
        return y * 1.001

    row = measured(subject(wrong), direction=direction)
    assert row.status == "red" and len(calls) == 1
    assert all(r.timing is None for r in row.results.values()) and not row.ceilings
    entry = report.row_json(row, gpu=False)
    assert "median_us" not in entry["results"]["ours"] and entry["ratio_to_torch"] is None
    assert entry["results"]["ours"]["error"] > entry["results"]["ours"]["budget"]
    assert made_report([row]).exit_code() == 1


def test_a_red_peer_gets_no_speed_and_does_not_stop_the_subject():
    bad = peers.Peer("bad", lambda c: lambda x: F.interpolate(x, **c.kwargs()) + 1)
    row = harness.measure(case(), "forward", [peers.torch_eager(), bad, subject()], FAST)
    assert row.results["bad"].status == "red" and row.results["bad"].timing is None
    assert row.status == "ok" and row.best_peer() == "torch"
    assert made_report([row]).exit_code() == 0


def test_failures_and_refusals_are_told_apart():
    class Refusal(RuntimeError):
        pass

    def fails(error):
        def change(y):
            raise error

        return change

    row = measured(subject(fails(Refusal("no such kernel")), refusal=(Refusal,)))
    assert (row.status, row.results["ours"].reason) == ("unsupported", "no such kernel")
    assert made_report([row]).exit_code() == 1  # nothing was measured
    row = measured(subject(fails(ValueError("broken"))))
    assert (row.status, row.results["ours"].reason) == ("error", "ValueError: broken")
    assert made_report([row]).exit_code() == 1
    row = measured(subject(refuses=lambda c, d: "none here"))
    assert (row.status, row.results["ours"].reason) == ("unsupported", "none here")
    row = measured(subject(lambda y: y.detach()), direction="backward")
    assert row.status == "error" and "gradient" in row.results["ours"].reason


def test_a_case_that_cannot_be_set_up_is_a_row_not_a_crash(monkeypatch):
    def raises(*a):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(harness, "Gate", raises)
    rows, stopped = harness.run([case()], ["forward"], [peers.torch_eager(), subject()], FAST)
    assert rows[0].status == "error" and not stopped


def test_peers_take_turns_and_inputs_rotate():
    order, seen = [], set()

    def make(name):
        def fn(x):
            order.append(name)
            seen.add(x.data_ptr())
            time.sleep(1e-4)

        return fn

    inputs = [torch.zeros(1) for _ in range(3)]
    calls = {n: harness.Call(make(n), inputs) for n in ("a", "b")}
    timings = harness._time_cpu(calls, harness.Settings(min_time=4e-3, min_rounds=4, max_rounds=4))
    turns = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert len(turns) >= 5 and len(seen) == 3
    assert all(t.median >= 1e-4 for t in timings.values())


def test_contention_is_seen_and_measured_again(monkeypatch):
    others, ran, disturbed = [0.0], [], []
    monkeypatch.setattr(harness, "_cpu_seconds", lambda: (others[0], 0.0))
    monkeypatch.setattr(harness.os, "cpu_count", torch.get_num_threads)

    def fake(calls, s):
        ran.append(1)
        time.sleep(0.01)
        others[0] += 1 if len(ran) <= disturbed[-1] else 0
        return {"ours": harness.Timing(float(len(ran)), 1.0, 1.0, 1)}

    monkeypatch.setattr(harness, "_time_cpu", fake)
    for runs, attempts, contended in ((0, 1, False), (1, 2, False), (9, 3, True)):
        ran.clear()
        disturbed.append(runs)
        timings, lacking = harness._time_undisturbed({}, harness.Settings(retries=2))
        assert len(ran) == attempts and (lacking > harness.CONTENDED_CPUS) == contended
        assert contended or timings["ours"].median == attempts
    row = timed("disturbed", 1.0, 8.0)
    row.lacking_cpus = 0.5
    assert row.contended and "took CPUs from 1 rows" in rendered([row])
    assert report.row_json(row, gpu=False)["contended"]
    digest = report.summary([row, timed("fine", 1.0, 2.0)])
    assert digest["contended"] == 1 and digest["geometric_mean"]["overall"]["ratio_to_torch"] == pytest.approx(2)


def test_own_work_is_no_contention():
    before = CPU_SECONDS()
    if before is None:
        pytest.skip("no /proc/stat")
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = CPU_SECONDS()
    assert after[1] - before[1] >= 0.3
    assert after[0] - before[0] >= after[1] - before[1] - 0.1  # the whole machine's time has ours in it


def test_gpu_timing_excludes_the_host(monkeypatch):
    """The GPU path on a fake device whose work is instant and whose events read a made-up clock."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    spins = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)

    def op(seconds, x):
        clock[0] += seconds
        time.sleep(1e-4)

    calls = {n: harness.Call(partial(op, s), [torch.zeros(1)]) for n, s in (("fast", 2e-6), ("slow", 6e-6))}
    timings = harness._time_gpu(calls, harness.Settings("cpu", min_time=2e-5, min_rounds=3))
    assert timings["fast"].median == pytest.approx(2e-6) and timings["slow"].median == pytest.approx(6e-6)
    assert timings["fast"].host > 1e-4
    assert min(s for s in spins if s) >= 2e9 * 2e-4  # the spin covers twice the host's time


def test_quantiles():
    timing = harness.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (timing.q20, timing.median, timing.q80, timing.samples) == (2.0, 3.5, 5.0, 6)
    assert harness.Timing.of([7.0]).q80 == 7.0


def test_byte_mover_writes_everything():
    pytest.importorskip("triton")
    code = (
        "import torch; from aeup.bench import mover\n"
        "for sizes in (10_000, 80_000), (80_000, 10_000), (64, 64):\n"
        "    src, dst = mover.buffers(*sizes, device=torch.device('cpu')); dst.fill_(-1)\n"
        "    mover.move(src, dst); assert (dst >= 0).all() and dst.max() == 1, dst\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


# --- the report ---


def test_json_is_whole_and_strict(tmp_path):
    rows = [measured(subject()), measured(subject(lambda y: y * float("nan")))]
    made_report(rows).write(tmp_path / "out.json")
    assert os.listdir(tmp_path) == ["out.json"]

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    data = json.loads((tmp_path / "out.json").read_text(), parse_constant=no_constants)
    assert data["schema"] == "aeup.bench/1" and data["complete"] and data["stopped_by"] is None
    assert data["gaps"] == {"absent": "not installed"}
    assert data["summary"]["counts"] == {"ok": 1, "red": 1}
    assert data["summary"]["geometric_mean"]["overall"]["rows"] == 1
    green, red = data["rows"]
    assert green["id"] == "tiny/bilinear/fp32/NCHW/forward"
    assert green["bytes"] == 2 * 5 * (6 * 7 + 12 * 14) * 4
    ours = green["results"]["ours"]
    wanted = {"status", "median_us", "q20_us", "q80_us", "samples", "gb_per_s", "fraction_of_copy", "error", "budget"}
    assert wanted <= ours.keys()
    assert ours["gb_per_s"] == pytest.approx(green["bytes"] / ours["median_us"] * 1e-3)
    assert green["ratio_to_torch"] == pytest.approx(green["results"]["torch"]["median_us"] / ours["median_us"])
    assert data["summary"]["smallest_ratio_to_torch"]["ratio"] == green["ratio_to_torch"]
    assert red["status"] == "red" and red["results"]["ours"]["error"] is None


def test_environment_names_versions():
    found = report.environment("cpu")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert {"date", "device", "driver", "triton", "cuda", "commit"} <= found.keys()


def timed(shape, ours, torchs):
    row = harness.Row(case(shape=shape), "forward", "ours")
    for name, t in (("torch", torchs), ("ours", ours)):
        row.results[name] = harness.Result("ok", timing=harness.Timing(t, t, t, 5))
    row.ceilings["copy"] = harness.Timing(1.0, 1.0, 1.0, 5)
    return row


def rendered(rows, **kw):
    console = Console(width=160, record=True, file=open(os.devnull, "w"))
    made_report(rows, **kw).render(console)
    return console.export_text()


def test_table_puts_losses_first_and_means_last():
    rows = [timed("fine", 1.0, 8.0), timed("loss", 2.0, 1.0), timed("worse", 4.0, 1.0), measured(subject(torch.neg))]
    text = rendered(rows)
    at = [text.index(word) for word in ("red", "worse", "loss", "fine", "geometric means")]
    assert at == sorted(at)
    assert "1.00" in text[at[-1] :]  # geometric mean of 8, 1/2 and 1/4
    assert "smallest ratio to torch: 0.25 (worse/" in text and "losses to the best peer: 2" in text
    assert "gap: absent: not installed" in text and "above the budget" in text
    assert "µs" not in text  # no absolute times on a CPU


def test_interrupted_run_keeps_its_rows(tmp_path):
    made = []

    def make(c):
        made.append(c)
        if len(made) == 3:
            raise KeyboardInterrupt
        return partial(F.interpolate, **c.kwargs())

    written = []
    table = [case(mode) for mode in cases.MODES]
    ours = peers.Peer("ours", make, subject=True)
    after = lambda rows: written.append(sum(r.status == "ok" for r in rows))  # noqa: E731
    rows, stopped = harness.run(table, cases.DIRECTIONS, [peers.torch_eager(), ours], FAST, after=after)
    assert stopped and written == [1, 2]
    assert [r.status for r in rows] == ["ok", "ok"] + ["missing"] * 4
    done = made_report(rows, stopped_by=2)
    data = done.to_json()
    assert done.exit_code() == 130 and not data["complete"] and data["stopped_by"] == 2
    assert [r["status"] for r in data["rows"]].count("missing") == 4
    assert "interrupted: 4 of 6 rows" in rendered(rows, stopped_by=2)


# --- peers and cases ---


def test_missing_peers_are_gaps(monkeypatch):
    found, gaps = peers.available("cpu", compiled=False)
    assert [p.name for p in found] == ["torch", "aeup"] and set(gaps) == {"compiled", "flag_gems"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found, gaps = peers.available("cuda", compiled=True, backend="triton")
    assert [p.name for p in found] == ["torch", "compiled", "aeup:triton"]
    assert "not installed" in gaps["flag_gems"]


def test_flag_gems_adapter(monkeypatch):
    """Against a stand-in with FlagGems' function names and torch's own kernels."""
    gems = type(sys)("flag_gems")
    gems.upsample_nearest2d = torch.ops.aten.upsample_nearest2d
    gems.upsample_nearest2d_backward = torch.ops.aten.upsample_nearest2d_backward
    gems.upsample_bicubic2d = torch.ops.aten.upsample_bicubic2d
    monkeypatch.setitem(sys.modules, "flag_gems", gems)
    peer = peers.flag_gems()
    everyone = [peers.torch_eager(), peer, subject()]
    for mode, direction in (("nearest", "forward"), ("nearest", "backward"), ("bicubic", "forward")):
        row = harness.measure(case(mode), direction, everyone, FAST)
        assert row.results["flag_gems"].status == "ok", row.results["flag_gems"]
    assert "no bilinear" in peer.refuses(case("bilinear"), "forward")
    assert "no bicubic 2-D backward" in peer.refuses(case("bicubic"), "backward")
    assert "NCHW only" in peer.refuses(case("nearest", layout="NHWC"), "forward")


def test_workloads_are_what_they_say():
    assert len(set(cases.SHAPES)) == len(cases.SHAPES)
    assert sum(w.set == "main" for w in cases.WORKLOADS) == 6
    for device in ("cpu", "cuda"):
        table = cases.interpolate_cases(device, cases.SETS, layouts=("NCHW",))
        for c in table:
            assert F.interpolate(torch.empty(c.geometry.input, device="meta"), **c.kwargs()).shape == c.geometry.output
        assert len({c.id for c in table}) == len(table)
    main = cases.interpolate_cases("cuda")
    assert len(main) == 6 * 3 * 2 * 2 and all(c.source for c in main)
    for c in cases.interpolate_cases("cpu", cases.SETS, dtypes=("fp32",)):
        assert c.bytes <= 40e6 and (c.set != "main" or c.shape == "small" or c.bytes >= 5e6), c.id


def test_filters():
    one = cases.interpolate_cases(
        "cpu", shapes=("odd",), modes=("bicubic", "nearest"), dtypes=("bf16",), layouts=("NHWC",)
    )
    assert [c.id for c in one] == ["odd/nearest/bf16/NHWC", "odd/bicubic/bf16/NHWC"]
    with pytest.raises(ValueError, match="dtypes: unknown .'int8'."):
        cases.interpolate_cases("cpu", dtypes=("int8",))


# --- the command ---

ONE_ROW = "interpolate --device cpu --shape small --dtype fp32 --layout NCHW --min-time 0.002".split()


def invoke(path: pathlib.Path, *more):
    return CliRunner().invoke(bench, [*ONE_ROW, "--json", str(path), *more])


def test_command_measures_aeup(tmp_path):
    result = invoke(tmp_path / "sub" / "out.json")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "sub" / "out.json").read_text())
    assert data["complete"] and [r["status"] for r in data["rows"]] == ["ok"] * 6
    assert {r["results"]["aeup"]["backend"] for r in data["rows"]} == {"cpu"}
    assert "geometric means" in result.output and "gap: flag_gems" in result.output


def test_command_fails_on_a_wrong_result(tmp_path, monkeypatch):
    wrong = [peers.torch_eager(), subject(lambda y: y + 1e-3)], {}
    monkeypatch.setattr("aeup.bench.cli.available", lambda *a: wrong)
    result = invoke(tmp_path / "out.json", "--mode", "bilinear", "--direction", "forward")
    assert result.exit_code == 1 and "(small/bilinear/fp32/NCHW/forward)" in result.output
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["status"] == "red" and "median_us" not in row["results"]["torch"]


def test_command_stops_on_sigterm(tmp_path, monkeypatch):
    import signal

    def make(c):
        if c.mode == "bilinear":
            os.kill(os.getpid(), signal.SIGTERM)
        return partial(F.interpolate, **c.kwargs())

    ours = [peers.torch_eager(), peers.Peer("ours", make, subject=True)], {}
    monkeypatch.setattr("aeup.bench.cli.available", lambda *a: ours)
    result = invoke(tmp_path / "out.json")
    assert result.exit_code == 143 and "interrupted: 4 of 6" in result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert not data["complete"] and [r["status"] for r in data["rows"]] == ["ok"] * 2 + ["missing"] * 4


@pytest.mark.parametrize(
    "more, word",
    [
        (["--mode", "lanczos"], "lanczos"),
        (["--set", "models"], "no row is left"),
        (["--shape", "fpn", "--shape", "nowhere"], "nowhere"),
        (["--min-time", "0"], "--min-time"),
    ],
)
def test_command_rejects_wrong_filters(tmp_path, more, word):
    result = invoke(tmp_path / "out.json", *more)
    assert result.exit_code == 2 and word in result.output and not list(tmp_path.iterdir())


def test_command_checks_the_output_path_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("aeup.bench.cli.run", lambda *a: pytest.fail("measured before the path was checked"))
    result = invoke(tmp_path / "file" / "out.json")
    assert result.exit_code == 2 and "out.json" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_needs_the_device_that_is_asked_for(tmp_path):
    result = invoke(tmp_path / "out.json", "--device", "cuda")
    assert result.exit_code == 2 and "no CUDA device" in result.output
