"""README's section on speed is what `aeup bench readme` makes of the runs in docs/bench."""

import json
import pathlib

import pytest
from aeup.bench import compare, digest, machine, page, readme
from aeup.bench.cli import bench
from aeup.bench.report import read_run
from click.testing import CliRunner

ROOT = pathlib.Path(__file__).parent.parent
STORED = sorted((ROOT / readme.STORE).glob("*.json"))


def gpu_run():
    return next(run for run in map(read_run, STORED) if digest.is_gpu(run) and run["kind"] == "conv_transpose2d")


def test_readme_is_what_the_stored_runs_say():
    text = (ROOT / "README.md").read_text()
    assert readme.written(text, [read_run(path) for path in STORED]) == text


def test_stored_runs_are_whole():
    runs = [read_run(path) for path in STORED]
    assert {run["kind"] for run in runs} >= {"interpolate", "conv_transpose2d", "upsample_conv2d"}
    for path, run in zip(STORED, runs, strict=True):
        env = run["environment"]
        assert env["commit"] and env["date"] and env["device"] and run["complete"], path
        assert readme.rounded(run) == run and path.stat().st_size < 1e6
        found = compare.against(run, str(path), run["kind"], env, 0.05)
        changes = found.changes(run["rows"])
        assert len(changes) == sum(row["status"] == "ok" and not row["contended"] for row in run["rows"]) > 10
        assert not found.slower(run["rows"]) and {c.slower_by for c in changes} == {0.0}
        assert f'id="{run["kind"]}"' in page.make_page([run])


def test_section_agrees_with_the_rows():
    """The figures of one line, by another way: aeup's and the peers' times."""
    run = gpu_run()
    rows = [r for r in run["rows"] if (r["direction"], r["dtype"], r["layout"]) == ("backward", "bf16", "NHWC")]
    found = sorted((min(r["results"][p]["eager_us"] for p in ("torch", "torch-other")), r) for r in rows)
    ratios = {r["id"]: best / r["results"]["aeup"]["eager_us"] for best, r in found}
    product = 1.0
    for ratio in ratios.values():
        product *= ratio
    worst = min(ratios, key=ratios.get)
    lost = sum(ratio < 1 for ratio in ratios.values())
    line = next(x for x in readme.section([run]).splitlines() if x.startswith("| backward bf16 NHWC"))
    cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
    assert cells[1:5] == [str(len(rows)), str(lost), f"{ratios[worst]:.2f}", f"`{worst}`"]
    assert cells[6] == f"{product ** (1 / len(rows)):.2f}"


def test_absolute_times_and_rates_are_those_of_gpus():
    for run in map(read_run, STORED):
        text = readme.section([run])
        assert "µs" not in text and "GB/s" not in text
        assert ("ratios only" in text) != digest.is_gpu(run)


def test_what_is_wrong_or_missing_is_said():
    run = gpu_run()
    for row, status in zip(run["rows"], ["red"] * 4 + ["error", "missing"], strict=False):
        row["status"], row["results"]["aeup"]["reason"] = status, "off by 1"
    run["rows"][6]["contended"] = True
    assert "**Out of time: 1 of 204 rows were not measured.**" in readme.section([run]).replace("\n", " ")
    run["stopped_by"] = 2
    text = readme.section([run]).replace("\n", " ")
    assert f"**Wrong: `{run['rows'][2]['id']}` (off by 1).**" in text and "**Wrong too: 2 more rows.**" in text
    assert "**Interrupted: 1 of 204 rows were not measured.**" in text and "took the CPU: 1 of 204 rows." in text
    assert "| all rows | 197 |" in text


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_command_is_one_that_measures(path, monkeypatch):
    run = read_run(path)
    words = readme.command(run).split()
    assert words[:3] == ["aeup", "bench", run["kind"]]
    given = bench.commands[run["kind"]].make_context(run["kind"], words[3:]).params
    settings = run["method"]["settings"]
    assert (given["device"], given["min_time"]) == (run["environment"]["device_type"], settings["min_time"])
    assert (given["clock"], given["threads"]) == (settings.get("clock", "wall"), run["options"]["threads"])
    assert list(given["dtypes"]) == run["options"]["dtypes"] and given["compiled"] == run["options"]["compiled"]


def test_processor_time_is_that_of_one_thread():
    args = "upsample_conv2d --device cpu --clock processor --shape ae32".split()
    for threads in ([], ["--threads", "2"]):
        failed = CliRunner().invoke(bench, args + threads)
        assert failed.exit_code == 2 and "--threads 1" in failed.output


def test_command_stores_and_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "run.json"
    run = gpu_run()
    run["rows"] = run["rows"][:20]
    given.write_text(json.dumps(run, indent=1))
    failed = CliRunner().invoke(bench, ["readme", str(given)])
    assert failed.exit_code == 1 and "README.md" in failed.output and not (tmp_path / "docs").exists()
    pathlib.Path("README.md").write_text("no place")
    failed = CliRunner().invoke(bench, ["readme", str(given)])
    assert failed.exit_code == 1 and readme.BEGIN in failed.output and not (tmp_path / "docs").exists()
    pathlib.Path("README.md").write_text(f"before\n{readme.BEGIN}\nwhat was there\n{readme.END}\nafter\n")
    assert CliRunner().invoke(bench, ["readme", str(given)]).exit_code == 0
    stored = tmp_path / "docs/bench/conv_transpose2d-nvidia-h100-80gb-hbm3.json"
    text = pathlib.Path("README.md").read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n") and text.endswith(f"{readme.END}\nafter\n")
    assert "| all rows | 20 |" in text and "what was there" not in text and read_run(stored) == run
    assert CliRunner().invoke(bench, ["readme"]).exit_code == 0 and pathlib.Path("README.md").read_text() == text


@pytest.mark.parametrize("told, expected", (("", (None, None)), ("a1", ("a1", False)), ("a1-dirty", ("a1", True))))
def test_commit_without_a_checkout(monkeypatch, told, expected):
    monkeypatch.setenv("AEUP_COMMIT", told)
    monkeypatch.setattr(machine, "_output_of", lambda *command, cwd=None: None)  # no git, or no checkout
    env = machine.environment("cpu")
    assert (env["commit"], env["dirty"]) == expected


def test_commit_of_a_checkout_counts_more(monkeypatch):
    monkeypatch.setenv("AEUP_COMMIT", "a1")
    answers = {"--show-toplevel": str(ROOT), "HEAD": "b2", "--porcelain": ""}
    monkeypatch.setattr(machine, "_output_of", lambda *command, cwd=None: answers.get(command[-1]))
    assert machine._commit() == ("b2", False)
