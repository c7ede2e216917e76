"""`aeup bench` without a command: all ops, as many rows as the time allows."""

import dataclasses
import json
import os
import signal
import time
from functools import partial

import pytest
import torch.nn.functional as F
from aeup.bench import cli, digest, everything, harness, peers, timing
from bench_helpers import FAST, case, made_report, subject
from click.testing import CliRunner
from rich.console import Console

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [case(mode, shape=shape) for shape in ("a", "b", "c", "d") for mode in ("nearest", "bilinear")]


def tiny(operator):
    return dataclasses.replace(operator, cases=lambda device: operator.cases(device)[:1] if operator.eager else CASES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)
    monkeypatch.setattr(everything, "MIN_TIME", {"cpu": 1e-3})
    chosen = ("interpolate", "upsample_conv2d", "conv2d")
    monkeypatch.setattr(cli, "OPERATORS", [tiny(o) for o in cli.OPERATORS if o.name in chosen])


def invoke(folder, *more):
    return CliRunner().invoke(cli.bench, ["--device", "cpu", "--out", str(folder), *more])


def test_it_measures_every_op_and_writes_one_page(tmp_path):
    result = invoke(tmp_path / "new")
    assert result.exit_code == 0, result.output
    files = {"interpolate-cpu.json": 16, "upsample_conv2d-cpu.json": 2}
    for name, rows in files.items():
        run = json.loads((tmp_path / "new" / name).read_text())
        assert run["complete"] and [row["status"] for row in run["rows"]] == ["ok"] * rows
    page = (tmp_path / "new" / "report.html").read_text()
    assert all(name.split("-")[0] in page and name.split("-")[0] in result.output for name in files)
    assert "not measured: conv2d" in result.output and not (tmp_path / "new" / "conv2d-cpu.json").exists()
    assert "all rows" in result.output and "gap: compiled" in result.output and "out of time" not in result.output


def test_what_the_time_does_not_reach_is_named(tmp_path, monkeypatch):
    reached = []

    def slow(case, direction, *rest):
        reached.append(f"{case.id}/{direction}")
        time.sleep(0.1)
        return harness.Row(case, direction, "aeup", {"aeup": harness.Result("error", "slow")})

    monkeypatch.setattr(harness, "measure", slow)
    result = invoke(tmp_path, "--minutes", "0.02")
    run = json.loads((tmp_path / "interpolate-cpu.json").read_text())
    left = [row["id"] for row in run["rows"] if row["status"] == "missing"]
    assert 0 < len(left) < 16 and run["stopped_by"] is None and set(left).isdisjoint(reached)
    assert f"interpolate: out of time: {len(left)} of 16 rows were not measured" in result.output
    assert "wrong: interpolate" in result.output and result.exit_code == 1  # those that raised
    ids = [row["id"] for row in run["rows"]]
    assert ids == [f"{c.id}/{d}" for c in CASES for d in ("forward", "backward")] and reached[:2] != ids[:2]


def test_wrong_results_are_named(tmp_path, monkeypatch):
    wrong = [peers.torch_eager(), subject(lambda y: y + 1e-3, "aeup")], {}
    monkeypatch.setattr("aeup.bench.everything.available", lambda *a, **kw: wrong)
    result = invoke(tmp_path)
    assert result.exit_code == 1 and "wrong: interpolate a/nearest/fp32/NCHW/forward: " in result.output


def test_a_signal_keeps_what_was_measured(tmp_path, monkeypatch):
    made = []

    def make(c):
        made.append(c)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return partial(F.interpolate, **c.kwargs())

    ours = [peers.torch_eager(), peers.Peer("aeup", make, subject=True)], {}
    monkeypatch.setattr("aeup.bench.everything.available", lambda *a, **kw: ours)
    result = invoke(tmp_path)
    run = json.loads((tmp_path / "interpolate-cpu.json").read_text())
    assert result.exit_code == 143 and digest.unmeasured(run) == "interrupted: 14 of 16 rows were not measured"
    assert not (tmp_path / "upsample_conv2d-cpu.json").exists() and (tmp_path / "report.html").exists()


def test_the_folder_is_tried_first_and_options_before_a_command_are_no_silent_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("aeup.bench.session.run", lambda *a, **kw: pytest.fail("measured before the path was checked"))
    (tmp_path / "file").write_text("")
    result = invoke(tmp_path / "file" / "sub")
    assert result.exit_code == 2 and "--out" in result.output
    result = invoke(tmp_path, "interpolate")
    assert result.exit_code == 2 and "--device, --out before interpolate" in result.output


def test_the_summary_lists_the_worst_losses_first():
    ours, other = (harness.Result("ok", timing=timing.Timing(t, t, t, 5)) for t in (2.0, 1.0))
    rows = [harness.Row(c, "forward", "aeup", {"torch": other, "aeup": ours}) for c in CASES]
    for i, row in enumerate(rows):
        row.results["torch"] = dataclasses.replace(other, timing=timing.Timing(*[0.1 * (i + 1)] * 3, 5))
    run = made_report(rows, settings=FAST).to_json()
    console = Console(width=140, record=True, file=open(os.devnull, "w"))
    console.print(everything._summary([run]), *everything._notes([run]), sep="\n")
    lines = [line for line in console.export_text().splitlines() if line.startswith("loses")]
    assert len(lines) == 8 and lines[0].startswith(f"loses: interpolate {rows[0].id}: 0.05 times as fast as torch")
