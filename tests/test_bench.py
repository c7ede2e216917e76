"""The benchmark's gate and clocks: nothing wrong gets a speed."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from aeup.bench import harness, interpolate, peers, report, timing
from aeup.bench.gate import FLOOR_ULPS, Gate
from aeup.bench.interpolate import nearest_sources, parts, reference, torch_result
from aeup.bench.workload import DIRECTIONS, LAYOUTS
from bench_helpers import FAST, ODD, TINY, FakeDevice, case, made_report, measured, rendered, subject, timed

CPU_SECONDS = timing.cpu_seconds


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """Whether other programs run beside the tests must not decide them."""
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)


def gate_of(c, direction, given, torch_out):
    return Gate(c, direction, parts(c, direction, given), (torch_out,))


def verdict_of(gate, result, **kw):
    (verdict,) = gate.check((result,), **kw).values()
    return verdict


def judged(change, c, direction="forward"):
    """The gate's verdict on torch's result after `change`."""
    given = c.tensor(direction)
    out = torch_result(c, direction, c.tensor("forward"), given)
    return verdict_of(gate_of(c, direction, given, out), change(out.clone()), keep_layout=True)


# --- the gate ---

EVERY = [
    case(mode, dtype, layout, geometry, by, align_corners)
    for mode, align_corners in (
        ("nearest", None), ("nearest-exact", None), ("bilinear", None), ("bilinear", True), ("bicubic", None),
    )
    for dtype in interpolate.AXES["dtype"]
    for layout in LAYOUTS
    for geometry, by in ((TINY, "scale"), (ODD, "size"))
]  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
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


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", interpolate.AXES["dtype"])
@pytest.mark.parametrize("mode", interpolate.MODES)
def test_gate_catches_one_wrong_element(mode, dtype, direction):
    c = case(mode, dtype)
    eps = torch.finfo(c.torch_dtype).eps
    assert "above the budget" in judged(spoiled((1, 3, 4, 3), 40 * eps), c, direction).reason
    assert "above the budget" in judged(spoiled((1, 3, 4, 3), float("nan")), c, direction).reason


def test_gate_judges_the_border_by_its_own_error():
    c = case(geometry=interpolate.Geometry(1, 1, 16, 16, 32, 32))
    given = c.tensor("forward")
    given[..., 8, 8] = 1e4  # large in the middle: the budget there hides an error at the edge
    out = torch_result(c, "forward", given, given)
    gate = gate_of(c, "forward", given, out)
    out[0, 0, 0, 5] += gate.judges[0].budget / 2
    verdict = verdict_of(gate, out)
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
    for layout in LAYOUTS:
        c = case("nearest", "bf16", layout, interpolate.Geometry(1, 5, 56, 300, 129, 700), "size")
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
    gate = gate_of(c, "backward", g, out + 1)
    ceiling = (FLOOR_ULPS + 2 * 4) * torch.finfo(torch.float32).eps * out.abs().max().item()
    assert gate.judges[0].budget <= ceiling * 1.01 and verdict_of(gate, out).reason is None


# --- measuring ---


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_green_row_has_timings(direction):
    row = measured(subject(), case("bicubic", "bf16", "NHWC"), direction)
    assert row.status == "ok" and row.best_peer() == "torch"
    for t in (row.results["ours"].timing, row.results["torch"].timing, row.ceilings["copy"]):
        assert 0 < t.q20 <= t.median <= t.q80 and t.samples >= 2
    assert row.ratio("torch") == row.median("torch") / row.median("ours")
    assert row.fraction("copy") == row.ceilings["copy"].median / row.median("ours")


@pytest.mark.parametrize("direction", DIRECTIONS)
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
    calls = {n: timing.Call(make(n), inputs) for n in ("a", "b")}
    timings = timing.time_cpu(calls, timing.Settings(min_time=4e-3, min_rounds=4, max_rounds=4))
    turns = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert len(turns) >= 5 and len(seen) == 3
    assert all(t.median >= 1e-4 for t in timings.values())


def test_contention_is_seen_and_measured_again(monkeypatch):
    others, ran, disturbed = [0.0], [], []
    monkeypatch.setattr(timing, "cpu_seconds", lambda: (others[0], 0.0))
    monkeypatch.setattr(timing.os, "cpu_count", torch.get_num_threads)

    def fake(calls, s):
        ran.append(1)
        time.sleep(0.01)
        others[0] += 1 if len(ran) <= disturbed[-1] else 0
        return {"ours": timing.Timing(float(len(ran)), 1.0, 1.0, 1)}

    monkeypatch.setattr(timing, "time_cpu", fake)
    for runs, attempts, contended in ((0, 1, False), (1, 2, False), (9, 3, True)):
        ran.clear()
        disturbed.append(runs)
        timings, lacking = timing.time_undisturbed({}, timing.Settings(retries=2))
        assert len(ran) == attempts and (lacking > timing.CONTENDED_CPUS) == contended
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
    device = FakeDevice(monkeypatch, torch)

    def op(seconds, x):
        device.work(seconds)
        time.sleep(1e-4)

    calls = {n: timing.Call(partial(op, s), [torch.zeros(1)]) for n, s in (("fast", 2e-6), ("slow", 6e-6))}
    timings = timing.time_gpu(calls, timing.Settings("cpu", min_time=2e-5, min_rounds=3))
    assert timings["fast"].median == pytest.approx(2e-6) and timings["slow"].median == pytest.approx(6e-6)
    assert timings["fast"].host > 1e-4
    assert min(s for s in device.spins if s) >= 2e9 * 2e-4  # the spin covers twice the host's time


def test_eager_timing_has_the_host_and_the_device(monkeypatch):
    """A device that works on its own: a call costs the host 20 us, and synchronising waits for what is queued."""
    done = [0.0]

    def op(seconds, x):
        time.sleep(20e-6)
        done[0] = max(done[0], time.perf_counter()) + seconds

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(max(0.0, done[0] - time.perf_counter())))
    calls = {n: timing.Call(partial(op, s), [torch.zeros(1)] * 2) for n, s in (("host", 1e-6), ("device", 2e-3))}
    timings = timing.time_eager(calls, timing.Settings("cuda", min_time=0.05))
    assert 20e-6 < timings["host"].median < 2e-3 <= timings["device"].median < 20e-3
    assert timings["host"].samples == timing.EAGER_BATCHES


def test_quantiles():
    t = timing.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (t.q20, t.median, t.q80, t.samples) == (2.0, 3.5, 5.0, 6)
    assert timing.Timing.of([7.0]).q80 == 7.0


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
