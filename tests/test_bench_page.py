"""The page of `aeup bench`: whole, self-contained, every row in it, losses first, and no speed of a red row."""

import json
import re
from html.parser import HTMLParser

import pytest
from aeup.bench import digest, harness, machine, page, plots, timing
from aeup.bench import upsample_conv2d as up
from aeup.bench.cli import bench
from aeup.bench.report import Report
from aeup.bench.workload import DTYPES
from bench_helpers import ENVIRONMENT
from click.testing import CliRunner

ENVIRONMENT = {**ENVIRONMENT, "commit": "abc", "date": "then"}
STATUSES = ("ok", "ok", "red", "error")
GPU = {**ENVIRONMENT, "device_type": "cuda", "device": "a <GPU>"}


class Reader(HTMLParser):
    """Tags must nest; collects tables (rows of cells), ids, and what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.ids, self.fetched, self.svgs = [], [], [], [], 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.fetched += [
            v for k, v in attributes.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")
        ]
        self.fetched += [tag] if tag in ("link", "img", "iframe", "object") else []
        self.svgs += attributes.get("role") == "img"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def run_of(environment=GPU, kind=up.OPERATOR, complete=True):
    """Green rows of which one loses, a red one, one that raised and, if not complete, a missing one."""
    gpu = environment is GPU
    rows = []
    for i, (mode, status) in enumerate(
        (("nearest", "ok"), ("bilinear", "ok"), ("bicubic", "red"), ("nearest", "error"))
    ):
        c = up.Case(f"s{i}", up.Geometry(1, 8, 4 + i, 4, 8, mode), "bf16", ("NHWC", "NCHW")[i % 2], "this test")
        row = harness.Row(c, ("forward", "backward")[i // 2 % 2], "aeup", floor=1e-7 if gpu else None)
        for name, t in (("torch", 4e-6), ("compiled", 3e-6), ("aeup", 1.25e-6 * (1 + 3 * i))):
            time = timing.Timing(t, t, t, 5)
            row.results[name] = harness.Result("ok", timing=time, eager=time if gpu else None, backend="cuda")
        if status != "ok":
            row.results["aeup"] = harness.Result(status, f"<why> {i}")
        row.ceilings["copy"] = timing.Timing(1e-7, 1e-7, 1e-7, 5)
        rows.append(row)
    if not complete:
        rows.append(harness.Row(up.Case("s9", up.Geometry(1, 8, 4, 4, 8), "bf16", "NHWC", "t"), "forward", "aeup"))
    limits = machine.Machine(3e12, {"bf16": 7e14}) if gpu else None
    settings = timing.Settings("cuda" if gpu else "cpu", eager=gpu)
    stopped = None if complete else 2
    report = Report(kind, rows, environment, {"absent": "not <installed>"}, settings, {}, limits, stopped)
    return json.loads(json.dumps(report.to_json()))


@pytest.mark.parametrize("environment", (GPU, ENVIRONMENT), ids=("gpu", "cpu"))
def test_page_is_whole_and_has_every_row(environment):
    run = run_of(environment, complete=False)
    text = page.make_page([run])
    found = Reader(text)
    assert not found.fetched and "http" not in text and "@import" not in text and "<GPU>" not in text
    assert found.ids == ["upsample_conv2d", "environment"]
    means, lost, every = found.tables
    assert means[1][:3] == ["all rows", "2", "1"]  # rows, losses
    assert [row[0] for row in lost[1:]] == ["s2", "s3", "s1"]  # wrong ones, then losses
    assert [row[0] for row in every[1:]] == ["s0", "s1", "s2", "s3", "s9"]
    assert all(len(row) == len(every[0]) for row in every)
    assert "&lt;why&gt; 2" in text and "1 missing" in text and "interrupted" in text and "not &lt;installed&gt;" in text
    assert found.svgs == (3 if environment is GPU else 2)  # roofline, peers, heat map of the forward: no other is right
    heads = every[0]
    assert ("device \u00b5s" in heads) == ("TFLOP/s" in heads) == (environment is GPU) == ("\u00b5s" in text)
    assert every[1][heads.index("x best")] == "2.40" and every[2][heads.index("x best")] == "0.60"
    if environment is GPU:
        assert every[1][heads.index("eager \u00b5s")] == "1.2" and "TFLOP/s at" in text


def test_wrong_rows_have_no_figures():
    run = run_of()
    heads, *rows = Reader(page.make_page([run])).tables[-1]
    status, first = heads.index("status"), heads.index("backend") + 1
    assert len(heads) > first + 5
    for row in rows:
        assert any(row[first:]) == (row[status] == "ok")
    titles = re.findall(r"<title>(s\d)/", page.make_page([run]))
    assert set(titles) == {"s0", "s1"}


def test_digests_leave_out_what_does_not_count():
    run = run_of()
    run["rows"][1]["contended"] = True
    whole, *groups = digest.digests(run)
    assert (whole.rows, whole.busy, whole.losses) == (1, 1, 0) and whole.best == pytest.approx(2.4)
    assert whole.worst["id"] == run["rows"][0]["id"] and whole.torch == pytest.approx(3.2)
    assert [(d.name, d.rows, d.busy) for d in groups] == [("forward bilinear", 0, 1), ("forward nearest", 1, 0)]
    text = page.make_page([run])
    assert "1 busy" in text and "ok (busy)" in text


def test_runs_of_an_older_version():
    """Fields that rows had not at first may be absent."""
    new = ("flops", "floor_us", "lacking_cpus", "peak_bytes_to_torch", "device_ratio_to_best", "device_ratio_to_torch")
    run = run_of()
    for row in run["rows"]:
        for name in (*new, "contended"):
            row.pop(name, None)
        for result in row["results"].values():
            for name in [n for n in result if n.startswith(("eager", "fraction", "tflop", "peak", "host"))]:
                del result[name]
    heads = Reader(page.make_page([run])).tables[-1][0]
    assert "x best" in heads and "of floor" not in heads


def test_comparison_is_shown():
    run = run_of()
    rows = [
        {"id": "a", "old": 1.0, "new": 1.2, "slower_by": 0.2},
        {"id": "b", "old": 1.0, "new": 0.9, "slower_by": -0.1},
    ]
    run["comparison"] = {"commit": None, "date": "then", "measure": "device time", "limit": 0.05, "rows": rows}
    text = page.make_page([run])
    tables = Reader(text).tables
    assert "Against commit unknown of then" in text and [["a", "+20.0%"], ["b", "-10.0%"]] == tables[2][1:]


def test_every_dtype_has_its_colour():
    assert sorted(page.SERIES) == sorted(DTYPES) and len(page.SERIES) <= plots.SERIES


def test_ticks_hold_their_values():
    for low, high in ((1.0, 10.0), (0.3, 0.31), (7.0, 9e5), (0.02, 0.5), (5.0, 5.0)):
        ticks = plots._ticks(low, high)
        assert ticks[0] <= low * 1.001 and ticks[-1] >= high / 1.001 and len(ticks) > 1 and ticks == sorted(ticks)
        below = plots._doublings(min(low, 0.5), max(2.0, high))
        assert 1.0 in below and below[0] <= min(low, 0.5) and below[-1] >= max(2.0, high) and len(below) < 12


def test_several_runs_and_a_run_with_nothing():
    other = {**run_of(ENVIRONMENT), "kind": "interpolate"}
    nothing = {**run_of(), "rows": [], "kind": "conv_transpose2d"}
    found = Reader(page.make_page([run_of(), other, nothing]))
    assert found.ids == ["upsample_conv2d", "interpolate", "conv_transpose2d", "environment"] and not found.fetched
    heads, *lines = found.tables[0]
    titles = [f"{name} on {where}" for name, where in zip(found.ids, ("a <GPU>", "a CPU", "a <GPU>"), strict=False)]
    assert [line[0] for line in lines] == titles
    rows, lose, wrong, commit = (heads.index(name) for name in ("rows", "lose", "wrong", "commit"))
    shown = [[line[i] for i in (rows, lose, wrong, commit)] for line in lines]
    assert shown == [["2", "1", "2", "abc"], ["2", "1", "2", "abc"], ["0", "0", "0", "abc"]]
    assert lines[0][heads.index("x best")] and not lines[2][heads.index("x best")]


def test_command_writes_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)
    args = "upsample_conv2d --device cpu --shape ae32 --mode bilinear --dtype fp32 --layout NCHW --min-time 0.002"
    path, out = tmp_path / "a.json", tmp_path / "deep" / "all.html"
    CliRunner().invoke(bench, [*args.split(), "--json", str(path)])
    assert len(Reader((tmp_path / "a.html").read_text()).tables[-1]) == 3
    result = CliRunner().invoke(bench, ["page", str(path), str(path), "--out", str(out)])
    assert result.exit_code == 0 and len(re.findall("<h3>All rows", out.read_text())) == 2
    path.write_text("{}")
    result = CliRunner().invoke(bench, ["page", str(path), "--out", str(out)])
    assert result.exit_code == 2 and "is no run of aeup bench" in result.output
    monkeypatch.chdir(tmp_path)
    assert "measure first" in CliRunner().invoke(bench, ["page"]).output
