"""A stored run, read: what the page and README say about its rows. It takes the JSON that `report` writes, of this
version or an older one, whose rows lack the newer fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .report import geometric_mean

ROW_KEYS = ("shape", "mode", "dtype", "layout", "direction")


def is_gpu(run: dict) -> bool:
    return run["environment"]["device_type"] != "cpu"


def keys(run: dict) -> tuple[str, ...]:
    """What names a row: a part of `ROW_KEYS`."""
    return tuple(key for key in ROW_KEYS if any(key in row for row in run["rows"]))


def values(rows: Iterable[dict], key: str) -> list[str]:
    """The values of a key, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows if key in row))


def subject(row: dict) -> dict:
    """aeup's result, {} where there is none."""
    return next((r for name, r in row["results"].items() if name.split(":")[0] == "aeup"), {})


def seconds(result: dict) -> float | None:
    """What a program waits for a call, in microseconds: eager time where it was measured."""
    return result.get("eager_us") or result.get("median_us")


def spread(result: dict) -> float | None:
    """Of `seconds`: 80 % quantile less 20 % quantile, as a part of the median."""
    kind = "eager_" if result.get("eager_us") else ""
    low, high = result.get(f"{kind}q20_us"), result.get(f"{kind}q80_us")
    return None if low is None or high is None else (high - low) / seconds(result)


def counts(row: dict) -> bool:
    """Right, timed and undisturbed: the row counts in means."""
    return row["status"] == "ok" and not row.get("contended") and bool(seconds(subject(row)))


def ratios(row: dict) -> dict[str, float]:
    """Peer -> its time / aeup's, of a right row."""
    own = seconds(subject(row))
    if row["status"] != "ok" or not own:
        return {}
    times = {name: seconds(r) for name, r in row["results"].items() if name.split(":")[0] != "aeup"}
    return {name: time / own for name, time in times.items() if time}


def to_best(row: dict) -> float | None:
    """The best peer's time / aeup's."""
    return min(ratios(row).values(), default=None)


def limit(row: dict) -> float | None:
    """The part of the machine's limit that aeup reaches: of its floor, or, without products, of a copy's bandwidth."""
    own = subject(row)
    return own.get("fraction_of_floor") if row.get("flops") else own.get("fraction_of_copy")


def wrong(run: dict) -> list[dict]:
    """Rows that are red or raised."""
    return [row for row in run["rows"] if row["status"] in ("red", "error")]


def unmeasured(run: dict) -> str:
    """How many rows have no figure since the run was stopped, or its time was up; empty if none."""
    missing = sum(1 for row in run["rows"] if row["status"] == "missing")
    why = "interrupted" if run["stopped_by"] else "out of time"
    return f"{why}: {missing} of {len(run['rows'])} rows were not measured" if missing else ""


def lost(rows: Iterable[dict]) -> list[dict]:
    """Those that lose to a peer, the worst first."""
    return sorted((row for row in rows if (to_best(row) or 1) < 1), key=to_best)


@dataclass(frozen=True)
class Digest:
    """A group of rows. Means are geometric, over the rows that count; `busy`: how many do not, since other programs
    took the CPU. `device`: ratio to the best peer by device time, where eager time was measured too."""

    name: str
    rows: int
    busy: int
    losses: int
    torch: float | None
    best: float | None
    device: float | None
    limit: float | None
    worst: dict | None

    @staticmethod
    def of(name: str, rows: Sequence[dict]) -> Digest:
        counted = [row for row in rows if counts(row)]

        def mean(figure: Callable[[dict], float | None]) -> float | None:
            return geometric_mean(v for row in counted if (v := figure(row)))

        def device(row: dict) -> float | None:
            return row.get("device_ratio_to_best") if "eager_us" in subject(row) else None

        return Digest(
            name,
            len(counted),
            sum(1 for row in rows if row.get("contended")),
            len(lost(counted)),
            mean(lambda row: ratios(row).get("torch")),
            mean(to_best),
            mean(device),
            mean(limit),
            min((row for row in counted if to_best(row)), key=to_best, default=None),
        )


def digests(run: dict) -> list[Digest]:
    """All rows, then those of each direction and mode, or, where there are no several modes, direction, dtype and
    layout, from the smallest mean. Groups of rows that were not measured are left out."""
    by = ("direction", "mode") if len(values(run["rows"], "mode")) > 1 else ("direction", "dtype", "layout")
    groups: dict[str, list[dict]] = {}
    for row in run["rows"]:
        groups.setdefault(" ".join(row[key] for key in by if key in row), []).append(row)
    made = [Digest.of("all rows", run["rows"]), *(Digest.of(name, rows) for name, rows in groups.items())]
    return [made[0], *(d for d in sorted(made[1:], key=lambda d: d.best or 0) if d.rows or d.busy)]
