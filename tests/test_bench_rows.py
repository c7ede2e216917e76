"""`pytest benchmarks`: the rows of `aeup bench` under pytest-benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_rows_are_checked_and_timed(tmp_path):
    root, out = Path(__file__).parents[1], tmp_path / "out.json"
    options = ["--benchmark-max-time=0.001", "--benchmark-min-rounds=1", f"--benchmark-json={out}"]
    rows = "conv_transpose2d/mnist_out/fp32/NCHW/forward"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider", "-k", rows]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # it measures nothing under xdist
    ran = subprocess.run([*command, *options], cwd=root, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(out.read_text())["benchmarks"]
    assert [b["params"]["name"] for b in found] == ["torch", "aeup"]
    assert {b["group"] for b in found} == {rows}
    assert found[1]["extra_info"]["backend"] and found[1]["stats"]["median"] > 0
