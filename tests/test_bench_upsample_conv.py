"""`aeup bench upsample_conv2d`: its table, its references, and that nothing wrong gets a speed. What it shares with the
transposed convolution is tested in test_bench_conv.py."""

import json

import pytest
import torch
import torch.nn.functional as F
from aeup.bench import harness, layer, peers, timing
from aeup.bench import upsample_conv2d as up
from aeup.bench.cli import bench
from aeup.bench.workload import DIRECTIONS, LAYOUTS
from bench_helpers import FAST
from click.testing import CliRunner

import aeup

GEOMETRIES = {
    "nearest": up.Geometry(2, 10, 5, 6, 6),
    "bilinear": up.Geometry(2, 6, 5, 7, 4, "bilinear"),
    "bicubic": up.Geometry(1, 8, 6, 5, 3, "bicubic", k=5, scale=3, padding=0),
}


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)


def case(geometry="nearest", dtype="fp32", layout="NCHW"):
    return up.Case(geometry, GEOMETRIES[geometry], dtype, layout, "this test")


def composed(g, **kw):
    """By torch; `kw` replaces arguments of the interpolation."""

    def fn(x, w, b):
        return F.relu(F.conv2d(F.interpolate(x, **{"scale_factor": g.scale, "mode": g.mode} | kw), w, b, 1, g.padding))

    return fn


def measured(make, c, direction="forward"):
    ours = peers.Peer("ours", lambda c: make(c.geometry), subject=True)
    return harness.measure(c, direction, [peers.torch_eager(), layer.torch_other_layout(), ours], FAST)


def test_the_table_is_what_it_says():
    assert len(up.WORKLOADS) == len(set(up.SHAPES)) and sum(w.set == "main" for w in up.WORKLOADS) == 7
    for device, dtypes in (("cpu", 2), ("cuda", 3)):
        table = up.upsample_conv2d_cases(device)
        assert len(table) == (7 + 2 * 4) * dtypes * 2 == len({c.id for c in table}) and all(c.source for c in table)
        for c in table:
            x, w, b = (
                torch.empty(s, device="meta") for s in (c.geometry.input, c.geometry.weight, c.geometry.weight[:1])
            )
            assert c.torch()(x, w, b).shape == c.geometry.output
            assert device != "cpu" or 5e7 < c.flops("forward") < 1.3e9, c.id
    one = up.upsample_conv2d_cases("cpu", (), ("ae32",), ("bicubic",), ("fp32",), ("NHWC",))
    assert [c.id for c in one] == ["ae32/bicubic/fp32/NHWC"]
    with pytest.raises(ValueError, match="modes: unknown .'area'."):
        up.upsample_conv2d_cases("cpu", modes=("area",))


def test_products_and_bytes():
    sd1 = next(c for c in up.upsample_conv2d_cases("cuda", shapes=("sd1",), dtypes=("bf16",)))
    assert sd1.geometry.output == (1, 512, 128, 128)
    assert sd1.flops("forward") == 2 * 16 * 64 * 64 * 512 * 512 and sd1.flops("backward") == 2 * sd1.flops("forward")
    x, w, y = 512 * 64**2, 512 * 512 * 9, 512 * 128**2
    assert sd1.bytes("forward") == 2 * (x + w + 512 + y)
    assert GEOMETRIES["bilinear"].products == 2 * 6 * 4 * 10 * 14 * 9


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_torch_passes_the_gate_and_another_op_does_not(geometry):
    c = case(geometry)
    for direction in DIRECTIONS:
        for dtype in ("fp32", "bf16"):
            for layout in LAYOUTS:
                row = measured(composed, case(geometry, dtype, layout), direction)
                assert {r.status for r in row.results.values()} == {"ok"}, row
        for change in ({"mode": "nearest" if c.mode != "nearest" else "bilinear"}, {"mode": "area"}):
            if c.mode == "nearest" and change["mode"] == "area":  # which is nearest, for whole scales
                continue
            row = measured(lambda g, kw=change: composed(g, **kw), c, direction)
            assert row.status == "red" and row.results["ours"].timing is None
        row = measured(lambda g: lambda x, w, b: composed(g)(x, w.flip(3), b), c, direction)
        assert row.status == "red"


def test_torch_compiled_in_the_other_layout_is_a_peer_where_compiling_is_on():
    for compiled in (False, True):
        found, gaps = peers.available(up.OPERATOR, "cpu", compiled)
        assert [p.name for p in found if p.subject] == ["aeup"] and "flag_gems" in gaps
        assert ("compiled-other" in {p.name for p in found}) is compiled is ("compiled" not in gaps)


ONE_LAYER = "upsample_conv2d --device cpu --shape ae32 --mode nearest --dtype fp32 --min-time 0.002".split()


def test_command_measures_aeup(tmp_path):
    result = CliRunner().invoke(bench, [*ONE_LAYER, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["complete"] and len(data["rows"]) == 4 and "µs" not in result.output
    assert all(r["status"] == "ok" and r["results"]["aeup"]["backend"] for r in data["rows"])


def test_command_fails_where_aeup_is_wrong(tmp_path, monkeypatch):
    def wrong(x, w, b, scale_factor, mode, padding, activation):
        return F.relu(F.conv2d(F.interpolate(x, scale_factor=scale_factor, mode="bilinear"), w, b, padding=padding))

    monkeypatch.setattr(aeup, "upsample_conv2d", wrong)
    more = ("--direction", "backward", "--layout", "NHWC", "--json", str(tmp_path / "out.json"))
    result = CliRunner().invoke(bench, [*ONE_LAYER, *more])
    assert result.exit_code == 1 and "(ae32/nearest/fp32/NHWC/backward)" in result.output
