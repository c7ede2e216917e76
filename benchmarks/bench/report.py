"""What was measured, as a JSON file and as a table in the terminal."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import aeup

from .gate import FLOOR_ULPS
from .harness import COPY, MOVER, Result, Row, Settings, Timing

SCHEMA = "aeup.bench/1"
NOISY = 0.3  # spread above which a row is called noisy


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _output_of(*command: str, cwd: pathlib.Path | None = None) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this file lies in, and whether it has uncommitted changes."""
    here = pathlib.Path(__file__).resolve().parent
    top = _output_of("git", "rev-parse", "--show-toplevel", cwd=here)
    if top is None or pathlib.Path(top).resolve() / "benchmarks" / "bench" != here:
        return None, None
    commit = _output_of("git", "rev-parse", "--verify", "HEAD", cwd=here)
    return commit, bool(_output_of("git", "status", "--porcelain", cwd=here)) if commit else None


def _cpu_name() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: str) -> dict:
    """Where the figures come from: device, driver, versions, commit, date."""
    commit, dirty = _commit()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = device != "cpu"
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device_type": device,
        "device": torch.cuda.get_device_name() if gpu else _cpu_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "aeup": aeup.__version__,
        "commit": commit,
        "dirty": dirty,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _number(x: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return x if x is not None and math.isfinite(x) else None


def _timing_json(t: Timing, bytes_moved: int) -> dict:
    micro = {"median_us": t.median * 1e6, "q20_us": t.q20 * 1e6, "q80_us": t.q80 * 1e6}
    host = {} if t.host is None else {"host_us": t.host * 1e6}
    return {**micro, "samples": t.samples, "gb_per_s": bytes_moved / t.median / 1e9, **host}


def row_json(row: Row, gpu: bool) -> dict:
    """One row; ratios are peer's median / subject's median, so above 1 means that aeup is faster."""
    results = {}
    for name, result in row.results.items():
        entry: dict = {"status": result.status, "reason": result.reason}
        entry |= {"backend": result.backend, "kernel": result.kernel}
        if result.check:
            check = dataclasses.asdict(result.check)
            entry |= {k: _number(check[k]) for k in ("error", "budget", "border_error", "border_budget")}
        if result.timing:
            entry |= _timing_json(result.timing, row.case.bytes)
            entry["fraction_of_copy"] = row.fraction(COPY, name)
            if gpu:
                entry["fraction_of_mover"] = row.fraction(MOVER, name)
        results[name] = entry
    best = row.best_peer()
    return {
        "id": row.id,
        "set": row.case.set,
        "shape": row.case.shape,
        "source": row.case.source,
        "input": list(row.case.geometry.input),
        "output": list(row.case.geometry.output),
        "by": row.case.by,
        "mode": row.case.mode,
        "align_corners": row.case.align_corners,
        "dtype": row.case.dtype,
        "layout": row.case.layout,
        "direction": row.direction,
        "bytes": row.case.bytes,
        "status": row.status,
        "torch_error": _number(row.torch_error),
        "contended": row.contended,
        "lacking_cpus": row.lacking_cpus,
        "results": results,
        "ceilings": {name: _timing_json(t, row.case.bytes) for name, t in row.ceilings.items()},
        "ratio_to_torch": row.ratio("torch"),
        "best_peer": best,
        "ratio_to_best": row.ratio(best) if best else None,
    }


def _means(rows: Sequence[Row]) -> dict:
    timed = [r for r in rows if r.median(r.subject)]

    def mean(values: Iterable[float | None]) -> float | None:
        return geometric_mean(v for v in values if v)

    return {
        "rows": len(timed),
        "ratio_to_torch": mean(r.ratio("torch") for r in timed),
        "ratio_to_best": mean(r.ratio(b) for r in timed if (b := r.best_peer())),
        "fraction_of_copy": mean(r.fraction(COPY) for r in timed),
        "fraction_of_mover": mean(r.fraction(MOVER) for r in timed),
    }


def summary(rows: Sequence[Row]) -> dict:
    """Counts by status, geometric means per mode and overall, and the row with the smallest ratio to torch. Contended
    rows count as such and nowhere else."""
    contended, all_rows, rows = sum(r.contended for r in rows), rows, [r for r in rows if not r.contended]
    modes = dict.fromkeys(r.case.mode for r in all_rows)
    ratios = [(ratio, r.id) for r in rows if (ratio := r.ratio("torch"))]
    smallest = min(ratios, default=None)
    return {
        "counts": {s: n for s in ("ok", "red", "error", "unsupported", "missing") if (n := _count(all_rows, s))},
        "losses": sum(1 for r in rows if (b := r.best_peer()) and (r.ratio(b) or 1) < 1),
        "contended": contended,
        "noisy": sum(1 for r in rows if (t := r.results.get(r.subject, Result()).timing) and t.spread > NOISY),
        "geometric_mean": {
            "overall": _means(rows),
            **{mode: _means([r for r in rows if r.case.mode == mode]) for mode in modes},
        },
        "smallest_ratio_to_torch": {"ratio": smallest[0], "id": smallest[1]} if smallest else None,
    }


def _count(rows: Sequence[Row], status: str) -> int:
    return sum(r.status == status for r in rows)


@dataclasses.dataclass
class Report:
    """A whole run. `stopped_by` is the number of the signal that ended it early."""

    rows: Sequence[Row]
    environment: dict
    gaps: dict[str, str]
    settings: Settings
    options: dict
    stopped_by: int | None = None

    @property
    def gpu(self) -> bool:
        return self.environment["device_type"] != "cpu"

    def to_json(self) -> dict:
        return {
            "schema": SCHEMA,
            "kind": "interpolate",
            "complete": not _count(self.rows, "missing"),
            "stopped_by": self.stopped_by,
            "environment": self.environment,
            "options": self.options,
            "method": {
                "settings": dataclasses.asdict(self.settings),
                "clock": "CUDA events, L2 flushed, host excluded" if self.gpu else "perf_counter, peers interleaved",
                "backward": "torch.autograd.grad on a kept graph, for every peer",
                "budget": f"2 x torch's error against float64 + {FLOOR_ULPS} ulps; nearest: ulps alone, forward exact",
                "ratio": "peer's median / aeup's median, above 1 aeup is faster",
            },
            "gaps": self.gaps,
            "summary": summary(self.rows),
            "rows": [row_json(row, self.gpu) for row in self.rows],
        }

    def write(self, path: pathlib.Path) -> None:
        """Write the JSON file whole or not at all."""
        handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self.to_json(), file, indent=1, allow_nan=False)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            pathlib.Path(name).unlink(missing_ok=True)
            raise

    def exit_code(self) -> int:
        """128 + the signal if stopped, 1 if a row is red, raised, or nothing at all was measured, else 0."""
        if self.stopped_by:
            return 128 + self.stopped_by
        bad = _count(self.rows, "red") + _count(self.rows, "error")
        return 1 if bad or not _count(self.rows, "ok") else 0

    # --- the table ---

    def _ordered(self) -> list[Row]:
        """Red and failed rows, then losses from the worst, then the rest as in the workload table."""

        def key(at: tuple[int, Row]) -> tuple:
            index, row = at
            best = row.best_peer()
            ratio = row.ratio(best) if best else None
            if row.status in ("red", "error"):
                return 0, 0.0, index
            if ratio is not None and ratio < 1:
                return 1, ratio, index
            return (3 if row.status in ("missing", "unsupported") else 2), 0.0, index

        return [row for _, row in sorted(enumerate(self.rows), key=key)]

    def _peers(self) -> list[str]:
        """Peers that were timed at least once, in order."""
        return list(dict.fromkeys(n for r in self.rows for n in r.results if n != r.subject and r.median(n)))

    def table(self) -> Table:
        env, peers, gpu = self.environment, self._peers(), self.gpu
        title = f"aeup.interpolate on {env['device']}, torch {env['torch']}"
        if not gpu:
            title += f", {env['threads']} threads"
        table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("shape", "mode", "dtype", "layout", "direction", "backend"):
            table.add_column(name, no_wrap=True)
        numbers = ["median µs"] if gpu else []
        numbers += ["spread", "of copy", *(["of mover"] if gpu else []), *(f"x {p}" for p in peers)]
        numbers += ["x best"] if len(peers) > 1 else []
        for name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self._ordered():
            if row.status == "missing":
                continue
            names = [row.case.shape, row.case.mode, row.case.dtype, row.case.layout, row.direction]
            own = row.results[row.subject]
            if own.timing is None:
                table.add_row(*names, Text(own.status, style="bold red"), *[""] * len(numbers))
                continue
            best = row.best_peer()
            ratios = [row.ratio(p) for p in peers] + ([row.ratio(best) if best else None] if len(peers) > 1 else [])
            cells = [f"{own.timing.median * 1e6:.1f}"] if gpu else []
            cells += [("busy, " if row.contended else "") + f"{own.timing.spread:.0%}", _percent(row.fraction(COPY))]
            cells += [_percent(row.fraction(MOVER))] if gpu else []
            table.add_row(*names, own.backend or "", *cells, *map(_ratio, ratios))
        return table

    def means_table(self) -> Table:
        table = Table(
            title="geometric means", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("mode")
        for name in ["rows", "x torch", "x best", "of copy", *(["of mover"] if self.gpu else [])]:
            table.add_column(name, justify="right")
        for mode, m in sorted(summary(self.rows)["geometric_mean"].items(), key=lambda item: item[0] == "overall"):
            cells = [_percent(m["fraction_of_copy"]), *([_percent(m["fraction_of_mover"])] if self.gpu else [])]
            table.add_row(mode, str(m["rows"]), _ratio(m["ratio_to_torch"]), _ratio(m["ratio_to_best"]), *cells)
        return table

    def notes(self) -> list[Text]:
        """Everything that the tables leave out: failures, gaps, missing rows."""
        groups: dict[tuple[str, str], list[str]] = {}  # (style, what happened) -> rows
        for row in self.rows:
            for name, result in row.results.items():
                if result.status == "ok":
                    continue
                own = "" if name == row.subject else f"{name}: "
                style = "bold red" if not own and result.status != "unsupported" else "yellow"
                groups.setdefault((style, f"{own}{result.status}: {result.reason}"), []).append(row.id)
        lines = [Text(f"{what} ({ids[0]}{_more(ids)})", style=style) for (style, what), ids in sorted(groups.items())]
        lines += [Text(f"gap: {name}: {reason}", style="yellow") for name, reason in self.gaps.items()]
        missing = _count(self.rows, "missing")
        if missing:
            lines.append(Text(f"interrupted: {missing} of {len(self.rows)} rows were not measured", style="bold red"))
        digest = summary(self.rows)
        if smallest := digest["smallest_ratio_to_torch"]:
            lines.append(Text(f"smallest ratio to torch: {smallest['ratio']:.2f} ({smallest['id']})"))
        lines.append(Text(f"losses to the best peer: {digest['losses']}; x NAME: how many times as fast as NAME"))
        if digest["contended"]:
            what = f"busy: other programs took CPUs from {digest['contended']} rows, which are left out of the means"
            lines.append(Text(what, style="bold red"))
        if digest["noisy"]:
            what = f"noisy: {digest['noisy']} rows have a spread above {NOISY:.0%}, so their ratios say little"
            lines.append(Text(what, style="yellow"))
        if not self.gpu:
            lines.append(Text("Ratios of one run on this machine; absolute times on a shared CPU are not comparable."))
        return lines

    def render(self, console: Console) -> None:
        console.print(Group(self.table(), self.means_table(), *self.notes()))


def _more(ids: Sequence[str]) -> str:
    return f" and {len(ids) - 1} more" if len(ids) > 1 else ""


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def _ratio(x: float | None) -> Text:
    if x is None:
        return Text("")
    return Text(f"{x:.2f}" if x < 100 else f"{x:.0f}", style="bold red" if x < 1 else "green")
