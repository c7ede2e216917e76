"""The page of `aeup bench`: whole, self-contained, every row in it, losses first, and no speed of a red row."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from aeup.bench import harness, machine, page, timing
from aeup.bench import upsample_conv2d as up
from aeup.bench.cli import bench
from aeup.bench.report import Report
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
        self.svgs += tag == "svg"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag != "meta":
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
    report = Report(kind, rows, environment, {"absent": "not <installed>"}, settings, {}, limits)
    return json.loads(json.dumps(report.to_json()))


@pytest.mark.parametrize("environment", (GPU, ENVIRONMENT), ids=("gpu", "cpu"))
def test_page_is_whole_and_has_every_row(environment):
    run = run_of(environment, complete=False)
    text = page.make_page([run])
    found = Reader(text)
    assert not found.fetched and "http" not in text and "@import" not in text and "<GPU>" not in text
    assert found.ids == ["upsample_conv2d", "environment"]
    lost, every = found.tables
    assert [row[0] for row in lost[1:]] == ["s2", "s3", "s1"]  # wrong ones, then losses
    assert [row[0] for row in every[1:]] == ["s0", "s1", "s2", "s3", "s9"]
    assert all(len(row) == len(every[0]) for row in every)
    assert "&lt;why&gt; 2" in text and "1 missing" in text and "interrupted" in text and "not &lt;installed&gt;" in text
    assert found.svgs == 3  # limit, peers, heat map of the forward: no backward row is right
    heads = every[0]
    assert ("device \u00b5s" in heads) == ("TFLOP/s" in heads) == (environment is GPU) == ("\u00b5s" in text)
    assert every[1][heads.index("x best")] == "2.40" and every[2][heads.index("x best")] == "0.60"
    if environment is GPU:
        assert every[1][heads.index("eager \u00b5s")] == "1.2" and "TFLOP/s at" in text


def test_wrong_rows_have_no_figures():
    run = run_of()
    heads, *rows = Reader(page.make_page([run])).tables[1]
    first = heads.index("backend") + 1
    assert len(heads) > first + 5
    for row in rows:
        assert any(row[first:]) == (row[first - 2] == "ok")
    titles = re.findall(r"<title>(s\d)/", page.make_page([run]))
    assert set(titles) == {"s0", "s1"}


def test_several_runs_and_a_run_with_nothing():
    other = {**run_of(ENVIRONMENT), "kind": "interpolate"}
    nothing = {**run_of(), "rows": [], "kind": "conv_transpose2d"}
    found = Reader(page.make_page([run_of(), other, nothing]))
    assert found.ids == ["upsample_conv2d", "interpolate", "conv_transpose2d", "environment"]


def test_command_writes_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)
    args = "upsample_conv2d --device cpu --shape ae32 --mode bilinear --dtype fp32 --layout NCHW --min-time 0.002"
    path, out = tmp_path / "a.json", tmp_path / "deep" / "all.html"
    CliRunner().invoke(bench, [*args.split(), "--json", str(path)])
    assert [len(t) for t in Reader((tmp_path / "a.html").read_text()).tables][-1] == 3
    result = CliRunner().invoke(bench, ["page", str(path), str(path), "--out", str(out)])
    assert result.exit_code == 0 and len(re.findall("<h3>All rows", out.read_text())) == 2
    path.write_text("{}")
    result = CliRunner().invoke(bench, ["page", str(path), "--out", str(out)])
    assert result.exit_code == 2 and "is no run of aeup bench" in result.output
    monkeypatch.chdir(tmp_path)
    assert "measure first" in CliRunner().invoke(bench, ["page"]).output


def test_columns_sort_in_a_browser(tmp_path):
    """Clicks every head, x best last, and reads the order of the rows: empty cells come last."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium here")
    click = """<script>
    const table = [...document.querySelectorAll("table")].at(-1), heads = [...table.tHead.rows[0].cells];
    const head = heads.find((h) => h.textContent === "x best");
    for (const h of [...heads.filter((h) => h !== head), head]) h.firstChild.click();
    document.title = [...table.tBodies[0].rows].map((r) => r.cells[0].textContent).join(" ") + head.ariaSort;
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page.make_page([run_of()]).replace("</body>", click))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>s1 s0 s2 s3ascending</title>" in made
