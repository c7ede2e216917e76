"""`aeup bench --compare OLD.json --fail-if-slower 5%`."""

import copy
import json

import pytest
import torch
from aeup.bench import compare, timing
from aeup.bench.cli import bench
from aeup.bench.report import read_run
from bench_helpers import ENVIRONMENT, made_report, rendered, timed
from click.testing import CliRunner

GPU = {"device_type": "cuda", "device": "a GPU", "torch": "0", "commit": "abc", "date": "then"}
SAMPLES = {"one": (1.0, 4.0), "two": (2.0, 4.0), "three": (3.0, 4.0)}


def run_of(factor=None, environment=None):
    """A stored run whose rows took `factor` times as long, torch as long as ever."""
    rows = [timed(shape, ours * (factor or {}).get(shape, 1), torchs) for shape, (ours, torchs) in SAMPLES.items()]
    data = json.loads(json.dumps(made_report(rows, environment=environment or GPU).to_json()))
    for row in data["rows"]:
        row["results"] = {name.replace("ours", "aeup"): r for name, r in row["results"].items()}
    return data


def compared(old, limit=0.05, environment=None, factor=None):
    against = compare.Comparison(run_of(old, environment), "old.json", limit)
    return against, run_of(factor, environment)["rows"]


@pytest.mark.parametrize("environment", (GPU, {**ENVIRONMENT, "commit": None, "date": "then"}))
def test_slower_rows_come_first_and_fail(environment):
    against, rows = compared({"one": 0.9, "two": 1.2}, environment=environment)
    changes = against.changes(rows)
    assert [c.id.split("/")[0] for c in changes] == ["one", "three", "two"]
    assert changes[0].slower_by == pytest.approx(1 / 0.9 - 1) and changes[2].slower_by == pytest.approx(1 / 1.2 - 1)
    assert [c.id for c in against.slower(rows)] == [changes[0].id]
    assert not compared({"one": 0.96})[0].slower(rows) and not compared({"one": 0.5}, None)[0].slower(rows)
    data = against.to_json(rows)
    assert data["slower"] == [changes[0].id] and data["limit"] == 0.05 and len(data["rows"]) == 3
    assert data["measure"] == ("device time" if environment is GPU else "time as a part of torch's")


def test_rows_that_cannot_be_compared_are_named():
    against, rows = compared({})
    rows = copy.deepcopy(rows)
    rows[0]["status"], rows[1]["contended"], rows[2]["id"] = "red", True, "another"
    data = against.to_json(rows)
    assert not data["rows"] and set(data["not_compared"]) == {rows[0]["id"], rows[1]["id"], "another"}


def test_report_shows_it_and_fails(monkeypatch):
    monkeypatch.setattr(
        compare, "_figure", lambda row, gpu: row["results"].get("ours", row["results"].get("aeup"))["median_us"]
    )
    rows = [timed(shape, 2 * ours, torchs) for shape, (ours, torchs) in SAMPLES.items()]
    against = compare.Comparison(run_of(), "old.json", 0.05)
    text = rendered(rows, comparison=against)
    assert "against old.json, commit abc, by device time" in text and "+100.0%" in text and "3 rows" in text
    report = made_report(rows, comparison=against)
    assert report.exit_code() == 1 and len(report.to_json()["comparison"]["slower"]) == 3
    assert made_report(rows, comparison=compare.Comparison(run_of(), "old.json")).exit_code() == 0


def test_files_that_are_no_such_run(tmp_path):
    path = tmp_path / "old.json"
    for text in ("", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no run of aeup bench"):
            read_run(path)
    path.write_text(json.dumps(run_of() | {"schema": "other/2"}))
    with pytest.raises(ValueError, match="has schema 'other/2', expected"):
        read_run(path)
    path.write_text(json.dumps(run_of()))
    old = read_run(path)
    assert compare.against(old, "old.json", "interpolate", GPU, None).gpu
    with pytest.raises(ValueError, match="a run of interpolate, expected conv_transpose2d"):
        compare.against(old, "old.json", "conv_transpose2d", GPU, None)
    with pytest.raises(ValueError, match="measured on a GPU, this device is b"):
        compare.against(old, "old.json", "interpolate", {**GPU, "device": "b"}, None)


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    threads = str(torch.get_num_threads())
    args = "interpolate --device cpu --shape small --mode nearest --dtype fp32 --layout NCHW --min-time 0.002".split()

    def invoke(path, *more):
        return CliRunner().invoke(bench, [*args, "--threads", threads, "--json", str(path), *more])

    assert invoke(old).exit_code == 0
    result = invoke(new, "--compare", str(old), "--fail-if-slower", "100000%")
    assert (
        result.exit_code == 0
        and "slower by" in result.output
        and "not in both runs, or not right in one: 0" in result.output
    )
    data = json.loads(old.read_text())
    for row in data["rows"]:
        row["ratio_to_torch"] = 1e9
    old.write_text(json.dumps(data))
    result = invoke(new, "--compare", str(old), "--fail-if-slower", "5")
    assert result.exit_code == 1 and "slower than 5% allows: 2 rows" in result.output
    assert len(json.loads(new.read_text())["comparison"]["slower"]) == 2
    assert invoke(new, "--compare", str(old)).exit_code == 0
    for more, word in (
        (("--fail-if-slower", "5"), "needs --compare"),
        (("--compare", str(old), "--fail-if-slower", "-1"), "at least 0"),
        (("--compare", str(tmp_path / "none.json")), "does not exist"),
        (("--compare", __file__), "is no run of aeup bench"),
    ):
        result = invoke(new, *more)
        assert result.exit_code == 2 and word in result.output.replace("\n", " "), result.output
