"""What was measured, as a JSON file and as a table in the terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .gate import FLOOR_ULPS, Check
from .harness import COPY, MOVER, Result, Row, Settings, Timing
from .machine import Machine
from .workload import Operator

SCHEMA = "aeup.bench/1"
NOISY = 0.3  # spread above which a row is called noisy


def read_run(path: pathlib.Path) -> dict:
    """A run's JSON. Raises ValueError where the file is none."""
    try:
        run = json.loads(path.read_text())
        schema, _ = run["schema"], (run["kind"], run["rows"], run["environment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no run of aeup bench: {type(error).__name__}: {error}") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, expected {SCHEMA!r}")
    return run


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write the file whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _number(x: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return x if x is not None and math.isfinite(x) else None


def _timing_json(t: Timing, row: Row) -> dict:
    micro = {"median_us": t.median * 1e6, "q20_us": t.q20 * 1e6, "q80_us": t.q80 * 1e6}
    host = {} if t.host is None else {"host_us": t.host * 1e6}
    flops = row.case.flops(row.direction)
    rate = {"tflop_per_s": flops / t.median / 1e12} if flops else {}
    return {
        **micro,
        "samples": t.samples,
        "gb_per_s": row.case.bytes(row.direction) / t.median / 1e9,
        **rate,
        **host,
    }


def _check_json(check: Check) -> dict:
    return {k: _number(getattr(check, k)) for k in ("error", "budget", "border_error", "border_budget")}


def _result_json(row: Row, name: str, gpu: bool) -> dict:
    result = row.results[name]
    entry: dict = {"status": result.status, "reason": result.reason}
    entry |= {"backend": result.backend, "kernel": result.kernel}
    if result.check:
        entry |= _check_json(result.check)
    if len(result.checks) > 1:
        entry["parts"] = {part: _check_json(check) for part, check in result.checks.items()}
    if result.timing:
        entry |= _timing_json(result.timing, row)
        entry["fraction_of_copy"] = row.fraction(COPY, name)
        if gpu:
            entry["fraction_of_mover"] = row.fraction(MOVER, name)
        if row.floor:
            entry["fraction_of_floor"] = row.fraction_of_floor(name)
    if result.eager:
        entry["eager_us"] = result.eager.median * 1e6
        entry |= {"eager_q20_us": result.eager.q20 * 1e6, "eager_q80_us": result.eager.q80 * 1e6}
    if result.peak_bytes is not None:
        entry["peak_bytes"] = result.peak_bytes
    return entry


def row_json(row: Row, gpu: bool) -> dict:
    """One row; ratios are peer's time / subject's time, so above 1 means that aeup is faster."""
    case, direction = row.case, row.direction
    best, best_device = row.best_peer(), row.best_peer(device_only=True)
    own, torchs = (row.results.get(name, Result()).peak_bytes for name in (row.subject, "torch"))
    flops = case.flops(direction)
    return {
        "id": row.id,
        "set": case.set,
        "shape": case.shape,
        "source": case.source,
        **case.describe(),
        "dtype": case.dtype,
        "layout": case.layout,
        "direction": direction,
        "bytes": case.bytes(direction),
        **({"flops": flops} if flops else {}),
        **({"floor_us": row.floor * 1e6} if row.floor else {}),
        "status": row.status,
        "torch_error": _number(row.torch_error),
        "contended": row.contended,
        "lacking_cpus": row.lacking_cpus,
        "results": {name: _result_json(row, name, gpu) for name in row.results},
        "ceilings": {name: _timing_json(t, row) for name, t in row.ceilings.items()},
        "ratio_to_torch": row.ratio("torch"),
        "best_peer": best,
        "ratio_to_best": row.ratio(best),
        "device_ratio_to_torch": row.ratio("torch", device_only=True),
        "device_ratio_to_best": row.ratio(best_device, device_only=True),
        "peak_bytes_to_torch": own / torchs if torchs and own is not None else None,
    }


def _means(rows: Sequence[Row]) -> dict:
    timed = [r for r in rows if r.median(r.subject)]

    def mean(value: Callable[[Row], float | None]) -> float | None:
        return geometric_mean(v for r in timed if (v := value(r)))

    ratios = [v for r in timed if (v := r.ratio(r.best_peer()))]
    return {
        "rows": len(timed),
        "ratio_to_torch": mean(lambda r: r.ratio("torch")),
        "ratio_to_best": mean(lambda r: r.ratio(r.best_peer())),
        "smallest_ratio_to_best": min(ratios, default=None),
        "device_ratio_to_best": mean(lambda r: r.ratio(r.best_peer(True), True)),
        "fraction_of_copy": mean(lambda r: r.fraction(COPY)),
        "fraction_of_mover": mean(lambda r: r.fraction(MOVER)),
        "fraction_of_floor": mean(lambda r: r.fraction_of_floor()),
    }


def summary(rows: Sequence[Row]) -> dict:
    """Counts by status, geometric means per group of cases and overall, and the rows with the smallest ratios.
    Contended rows count as such and nowhere else."""
    contended, all_rows, rows = sum(r.contended for r in rows), rows, [r for r in rows if not r.contended]

    def group(row: Row) -> str:
        return row.case.group(row.direction)

    def smallest(peer: Callable[[Row], str | None]) -> dict | None:
        ratios = [(ratio, r.id) for r in rows if (ratio := r.ratio(peer(r)))]
        return dict(zip(("ratio", "id"), min(ratios), strict=True)) if ratios else None

    return {
        "counts": {s: n for s in ("ok", "red", "error", "unsupported", "missing") if (n := _count(all_rows, s))},
        "losses": sum(1 for r in rows if (r.ratio(r.best_peer()) or 1) < 1),
        "contended": contended,
        "noisy": sum(1 for r in rows if (t := r.results.get(r.subject, Result()).timing) and t.spread > NOISY),
        "geometric_mean": {
            "overall": _means(rows),
            **{name: _means([r for r in rows if group(r) == name]) for name in dict.fromkeys(map(group, all_rows))},
        },
        "smallest_ratio_to_torch": smallest(lambda r: "torch"),
        "smallest_ratio_to_best": smallest(Row.best_peer),
    }


def _count(rows: Sequence[Row], status: str) -> int:
    return sum(r.status == status for r in rows)


@dataclasses.dataclass
class Report:
    """A whole run. `stopped_by` is the number of the signal that ended it early; `comparison`: with an earlier run."""

    operator: Operator
    rows: Sequence[Row]
    environment: dict
    gaps: dict[str, str]
    settings: Settings
    options: dict
    machine: Machine | None = None
    stopped_by: int | None = None
    comparison: Comparison | None = None

    @property
    def gpu(self) -> bool:
        return self.environment["device_type"] != "cpu"

    @property
    def eager(self) -> bool:
        return self.gpu and self.settings.eager

    def to_json(self) -> dict:
        clock = (
            "CUDA events, L2 flushed, host excluded" if self.gpu else f"{self.settings.clock} time, peers interleaved"
        )
        ratio = "peer's median / aeup's median, above 1 aeup is faster"
        rows = self._rows_json()
        return {
            "schema": SCHEMA,
            "kind": self.operator.name,
            "complete": not _count(self.rows, "missing"),
            "stopped_by": self.stopped_by,
            "environment": self.environment,
            "machine": self.machine.to_json() if self.machine else None,
            "options": self.options,
            "method": {
                "settings": dataclasses.asdict(self.settings),
                "clock": clock,
                **({"eager": "wall clock of calls one after another, divided by their number"} if self.eager else {}),
                "backward": "torch.autograd.grad on a kept graph, for every peer",
                "budget": f"2 x torch's error against float64 + {FLOOR_ULPS} ulps; {self.operator.budget}",
                "ratio": f"{ratio}; by eager time, device_ratio by device time" if self.eager else ratio,
                "notes": list(self.operator.notes),
            },
            "gaps": self.gaps,
            "summary": summary(self.rows),
            **({"comparison": self.comparison.to_json(rows)} if self.comparison else {}),
            "rows": rows,
        }

    def _rows_json(self) -> list[dict]:
        return [row_json(row, self.gpu) for row in self.rows]

    def write(self, path: pathlib.Path) -> None:
        write_whole(path, json.dumps(self.to_json(), indent=1, allow_nan=False))

    def exit_code(self) -> int:
        """128 + the signal if stopped, 1 if a row is red, raised, or slower than the comparison allows, or nothing at
        all was measured, else 0."""
        if self.stopped_by:
            return 128 + self.stopped_by
        bad = _count(self.rows, "red") + _count(self.rows, "error")
        bad += len(self.comparison.slower(self._rows_json())) if self.comparison else 0
        return 1 if bad or not _count(self.rows, "ok") else 0

    # --- the table ---

    def _ordered(self) -> list[Row]:
        """Red and failed rows, then losses from the worst, then the rest as in the workload table."""

        def key(at: tuple[int, Row]) -> tuple:
            index, row = at
            best = row.best_peer()
            ratio = row.ratio(best)
            if row.status in ("red", "error"):
                return 0, 0.0, index
            if ratio is not None and ratio < 1:
                return 1, ratio, index
            return (3 if row.status in ("missing", "unsupported") else 2), 0.0, index

        return [row for _, row in sorted(enumerate(self.rows), key=key)]

    def _peers(self) -> list[str]:
        """Peers that were timed at least once, in order."""
        return list(dict.fromkeys(n for r in self.rows for n in r.results if n != r.subject and r.median(n)))

    def _columns(self) -> dict[str, Callable[[Row], str | Text]]:
        """The columns of figures: header -> cell of a timed row. Those for which no row has a figure are left out."""

        def spread(row: Row) -> str:
            return ("busy, " if row.contended else "") + f"{row.results[row.subject].timing.spread:.0%}"

        def rate(row: Row) -> str:
            flops = row.case.flops(row.direction)
            return f"{flops / row.median(row.subject) / 1e12:.3g}" if flops else ""

        def by_device(row: Row) -> Text:
            return _ratio(row.ratio(row.best_peer(True), True))

        def memory(row: Row) -> str:
            return _percent(row_json(row, self.gpu)["peak_bytes_to_torch"])

        peers, gpu, eager = self._peers(), self.gpu, self.eager
        columns: dict[str, Callable[[Row], str | Text]] = {}
        if gpu:
            columns["device µs" if eager else "median µs"] = lambda row: f"{row.median(row.subject) * 1e6:.1f}"
        if eager:
            columns["eager µs"] = lambda row: f"{row.results[row.subject].seconds * 1e6:.1f}"
        columns["spread"] = spread
        columns["of floor"] = lambda row: _percent(row.fraction_of_floor())
        if gpu:
            columns["TFLOP/s"] = rate
        columns["of copy"] = lambda row: _percent(row.fraction(COPY))
        if gpu:
            columns["of mover"] = lambda row: _percent(row.fraction(MOVER))
        columns |= {f"x {peer}": lambda row, peer=peer: _ratio(row.ratio(peer)) for peer in peers}
        if len(peers) > 1:
            columns["x best"] = lambda row: _ratio(row.ratio(row.best_peer()))
        if eager:
            columns["x best, device"] = by_device
            columns["of torch's memory"] = memory
            columns["kernel"] = lambda row: row.results[row.subject].kernel or ""
        timed = [row for row in self.rows if row.results and row.median(row.subject)]
        return {name: cell for name, cell in columns.items() if not timed or any(str(cell(row)) for row in timed)}

    def table(self) -> Table:
        env, columns = self.environment, self._columns()
        title = f"{self.operator.what} on {env['device']}, torch {env['torch']}"
        if not self.gpu:
            title += f", {env['threads']} threads"
        table = _new_table(title)
        for name in (*self.operator.columns, "direction", "backend"):
            table.add_column(name, no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self._ordered():
            if row.status == "missing":
                continue
            names = [*(getattr(row.case, name) for name in self.operator.columns), row.direction]
            own = row.results[row.subject]
            if own.timing is None:
                table.add_row(*names, Text(own.status, style="bold red"), *[""] * len(columns))
            else:
                table.add_row(*names, own.backend or "", *(cell(row) for cell in columns.values()))
        return table

    def means_table(self) -> Table:
        columns = {"x torch": "ratio_to_torch", "x best": "ratio_to_best"}
        if self.eager:
            columns |= {"worst x best": "smallest_ratio_to_best", "x best, device": "device_ratio_to_best"}
        fractions = {"of copy": "fraction_of_copy", "of mover": "fraction_of_mover", "of floor": "fraction_of_floor"}
        means = summary(self.rows)["geometric_mean"]
        fractions = {header: key for header, key in fractions.items() if means["overall"][key] is not None}
        table = _new_table("geometric means")
        table.add_column(self.operator.group)
        for name in ("rows", *columns, *fractions):
            table.add_column(name, justify="right")
        for group, m in sorted(means.items(), key=lambda item: item[0] == "overall"):
            ratios, parts = (
                [_ratio(m[key]) for key in columns.values()],
                [_percent(m[key]) for key in fractions.values()],
            )
            table.add_row(group, str(m["rows"]), *ratios, *parts)
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
        lines += [Text(note) for note in self.operator.notes]
        if self.machine:
            lines.append(Text(self._floor_note()))
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

    def _floor_note(self) -> str:
        """What the floor is made of."""
        copy, matrix = self.machine.to_json().values()
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in matrix.items())
        return f"floor: bytes at {copy:.0f} GB/s (copy) or products at {rates} TFLOP/s (matrix product), as measured"

    def render(self, console: Console) -> None:
        compared = self.comparison.render(self._rows_json(), _new_table("")) if self.comparison else []
        console.print(Group(self.table(), self.means_table(), *compared, *self.notes()))


def _new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _more(ids: Sequence[str]) -> str:
    return f" and {len(ids) - 1} more" if len(ids) > 1 else ""


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def _ratio(x: float | None) -> Text:
    if x is None:
        return Text("")
    return Text(f"{x:.2f}" if x < 100 else f"{x:.0f}", style="bold red" if x < 1 else "green")
