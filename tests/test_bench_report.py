"""The benchmark's report, peers, table and command: nothing that was measured is lost."""

import json
import os
import pathlib
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from aeup.bench import harness, interpolate, machine, peers, timing
from aeup.bench.cli import bench
from aeup.bench.workload import DIRECTIONS
from bench_helpers import FAST, case, made_report, measured, rendered, subject, timed
from click.testing import CliRunner


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """Whether other programs run beside the tests must not decide them."""
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)


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
    found = machine.environment("cpu")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert {"date", "device", "driver", "triton", "cuda", "commit"} <= found.keys()


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
    table = [case(mode) for mode in interpolate.MODES]
    ours = peers.Peer("ours", make, subject=True)
    after = lambda rows: written.append(sum(r.status == "ok" for r in rows))  # noqa: E731
    rows, stopped = harness.run(table, DIRECTIONS, [peers.torch_eager(), ours], FAST, after=after)
    assert stopped and written == [1, 2]
    assert [r.status for r in rows] == ["ok", "ok"] + ["missing"] * 4
    done = made_report(rows, stopped_by=2)
    data = done.to_json()
    assert done.exit_code() == 130 and not data["complete"] and data["stopped_by"] == 2
    assert [r["status"] for r in data["rows"]].count("missing") == 4
    assert "interrupted: 4 of 6 rows" in rendered(rows, stopped_by=2)


# --- peers and cases ---


def test_missing_peers_are_gaps(monkeypatch):
    found, gaps = peers.available(interpolate.OPERATOR, "cpu", compiled=False)
    assert [p.name for p in found] == ["torch", "aeup"] and set(gaps) == {"compiled", "flag_gems"}
    monkeypatch.setattr(interpolate.importlib.util, "find_spec", lambda name: None)
    found, gaps = peers.available(interpolate.OPERATOR, "cuda", compiled=True, backend="triton")
    assert [p.name for p in found] == ["torch", "compiled", "aeup:triton"]
    assert "not installed" in gaps["flag_gems"]


def test_flag_gems_adapter(monkeypatch):
    """Against a stand-in with FlagGems' function names and torch's own kernels."""
    gems = type(sys)("flag_gems")
    gems.upsample_nearest2d = torch.ops.aten.upsample_nearest2d
    gems.upsample_nearest2d_backward = torch.ops.aten.upsample_nearest2d_backward
    gems.upsample_bicubic2d = torch.ops.aten.upsample_bicubic2d
    monkeypatch.setitem(sys.modules, "flag_gems", gems)
    peer = interpolate.flag_gems()
    everyone = [peers.torch_eager(), peer, subject()]
    for mode, direction in (("nearest", "forward"), ("nearest", "backward"), ("bicubic", "forward")):
        row = harness.measure(case(mode), direction, everyone, FAST)
        assert row.results["flag_gems"].status == "ok", row.results["flag_gems"]
    assert "no bilinear" in peer.refuses(case("bilinear"), "forward")
    assert "no bicubic 2-D backward" in peer.refuses(case("bicubic"), "backward")
    assert "NCHW only" in peer.refuses(case("nearest", layout="NHWC"), "forward")


def test_workloads_are_what_they_say():
    assert len(set(interpolate.SHAPES)) == len(interpolate.SHAPES)
    assert sum(w.set == "main" for w in interpolate.WORKLOADS) == 6
    for device in ("cpu", "cuda"):
        table = interpolate.interpolate_cases(device, interpolate.SETS, layouts=("NCHW",))
        for c in table:
            assert F.interpolate(torch.empty(c.geometry.input, device="meta"), **c.kwargs()).shape == c.geometry.output
        assert len({c.id for c in table}) == len(table)
    main = interpolate.interpolate_cases("cuda")
    assert len(main) == 6 * 3 * 2 * 2 and all(c.source for c in main)
    for c in interpolate.interpolate_cases("cpu", interpolate.SETS, dtypes=("fp32",)):
        assert c.bytes("forward") <= 40e6 and (c.set != "main" or c.shape == "small" or c.bytes("forward") >= 5e6), c.id


def test_filters():
    one = interpolate.interpolate_cases(
        "cpu", shapes=("odd",), modes=("bicubic", "nearest"), dtypes=("bf16",), layouts=("NHWC",)
    )
    assert [c.id for c in one] == ["odd/nearest/bf16/NHWC", "odd/bicubic/bf16/NHWC"]
    with pytest.raises(ValueError, match="dtypes: unknown .'int8'."):
        interpolate.interpolate_cases("cpu", dtypes=("int8",))


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
    monkeypatch.setattr("aeup.bench.session.run", lambda *a: pytest.fail("measured before the path was checked"))
    result = invoke(tmp_path / "file" / "out.json")
    assert result.exit_code == 2 and "out.json" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_needs_the_device_that_is_asked_for(tmp_path):
    result = invoke(tmp_path / "out.json", "--device", "cuda")
    assert result.exit_code == 2 and "no CUDA device" in result.output
