"""A run beside an earlier one, row by row.

On a GPU by aeup's device time, on the same device. On a CPU, whose absolute times depend on what else runs, by its time
as a part of torch's in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

MEASURES = {"cuda": "device time", "cpu": "time as a part of torch's"}


@dataclass(frozen=True)
class Change:
    """A row's figure then and now; larger is slower."""

    id: str
    old: float
    new: float

    @property
    def slower_by(self) -> float:
        """0.05: 5 % slower; negative: faster."""
        return self.new / self.old - 1


def _figure(row: dict, gpu: bool) -> float | None:
    """None where the row has no right and undisturbed result."""
    if row["status"] != "ok" or row["contended"]:
        return None
    if not gpu:
        return 1 / row["ratio_to_torch"] if row["ratio_to_torch"] else None
    return next(r["median_us"] for name, r in row["results"].items() if name.split(":")[0] == "aeup")


@dataclass(frozen=True)
class Comparison:
    """`old`: the earlier run's JSON. `limit`: the part by which a row may be slower before the run fails, or None."""

    old: dict
    path: str
    limit: float | None = None

    @property
    def gpu(self) -> bool:
        return self.old["environment"]["device_type"] != "cpu"

    def changes(self, rows: Sequence[dict]) -> list[Change]:
        """Of the rows (`report.row_json`) that both runs measured, the slowest first."""
        before = {row["id"]: figure for row in self.old["rows"] if (figure := _figure(row, self.gpu))}
        after = {row["id"]: figure for row in rows if (figure := _figure(row, self.gpu))}
        found = [Change(id, before[id], after[id]) for id in after if id in before]
        return sorted(found, key=lambda change: -change.slower_by)

    def slower(self, rows: Sequence[dict]) -> list[Change]:
        """Those beyond the limit."""
        return [] if self.limit is None else [c for c in self.changes(rows) if c.slower_by > self.limit]

    def to_json(self, rows: Sequence[dict]) -> dict:
        env, changes = self.old["environment"], self.changes(rows)
        return {
            "path": self.path,
            "commit": env["commit"],
            "date": env["date"],
            "measure": MEASURES[env["device_type"]],
            "limit": self.limit,
            "slower": [c.id for c in self.slower(rows)],
            "not_compared": [row["id"] for row in rows if row["id"] not in {c.id for c in changes}],
            "rows": [{"id": c.id, "old": c.old, "new": c.new, "slower_by": c.slower_by} for c in changes],
        }

    def render(self, rows: Sequence[dict], table: Table, most: int = 10) -> list[Table | Text]:
        """`table`, empty, filled with the rows that changed most, and a line on the rest."""
        data, changes = self.to_json(rows), self.changes(rows)
        shown = changes if len(changes) <= 2 * most else changes[:most] + changes[-most:]
        table.title = f"against {self.path}, commit {(data['commit'] or 'unknown')[:12]}, by {data['measure']}"
        table.add_column("row", no_wrap=True)
        table.add_column("slower by", justify="right")
        for change in shown:
            bad = self.limit is not None and change.slower_by > self.limit
            style = "bold red" if bad else "green" if change.slower_by < 0 else ""
            table.add_row(change.id, Text(f"{change.slower_by:+.1%}", style=style))
        line = f"compared: {len(changes)} rows; not in both runs, or not right in one: {len(data['not_compared'])}"
        lines: list[Table | Text] = [table, Text(line)]
        if data["slower"]:
            lines.append(Text(f"slower than {self.limit:.0%} allows: {len(data['slower'])} rows", style="bold red"))
        return lines


def against(old: dict, path: str, kind: str, environment: dict, limit: float | None) -> Comparison:
    """With the run `old`, read from `path`. Raises ValueError where it is of another operator or device."""
    if old["kind"] != kind:
        raise ValueError(f"{path} is a run of {old['kind']}, expected {kind}")
    device = old["environment"]["device"]
    if device != environment["device"]:
        raise ValueError(f"{path} was measured on {device}, this device is {environment['device']}")
    return Comparison(old, path, limit)
