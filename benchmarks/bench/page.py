"""Runs as one HTML page: no resource from outside, no library; it works from a file. Losses come first.

A page is made of the JSON that `report` writes, so that a stored run can be shown again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from . import plots
from .workload import DIRECTIONS

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #f3f4f6; --line: #d5d9de; --good: #0072b2;
  --bad: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16191d; --soft: #22262c; --line: #3a4048;
  --good: #56b4e9; --bad: #ff8c42; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; } h3 { margin-top: 1.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { position: sticky; top: 0; background: var(--soft); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.bad { color: var(--bad); fill: var(--bad); } .good { color: var(--good); fill: var(--good); }
td.bad { font-weight: 600; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }
svg .grid { stroke: var(--line); } svg .one, svg .worst { stroke: currentColor; } svg .worst { stroke-width: 2; }
svg .none { fill: var(--soft); } svg .strong { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; } dd { margin: 0; }
"""
# Sorts a table by the column that was clicked: by number where the cells have one, else by their text.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => row.cells[at].dataset.value ?? row.cells[at].textContent;
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
    const d = x - y;
    return (Number.isNaN(d) ? x.localeCompare(y) : d) * (up ? 1 : -1);
  };
  body.append(...[...body.rows].sort(order));
});
"""
Cell = tuple[str, float | None, str]  # text, what it is sorted by, class


def subject(row: dict) -> dict:
    """aeup's result, {} where there is none."""
    return next((r for name, r in row["results"].items() if name.split(":")[0] == "aeup"), {})


def _ratios(row: dict) -> dict[str, float]:
    """Peer -> its time / aeup's, of a right row."""
    own = _time(subject(row))
    if row["status"] != "ok" or not own:
        return {}
    times = {name: _time(r) for name, r in row["results"].items() if name.split(":")[0] != "aeup"}
    return {name: time / own for name, time in times.items() if time}


def _time(result: dict) -> float | None:
    return result.get("eager_us") or result.get("median_us")


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def _names(row: dict) -> list[str]:
    return [row["shape"], *([row["mode"]] if "mode" in row else []), row["dtype"], row["layout"], row["direction"]]


# --- plots ---


def roofline(run: dict) -> str:
    """On a GPU, of an op with products: TFLOP/s by arithmetic intensity. Else bytes moved as a part of what a copy
    reaches in the same row, which needs no absolute time."""
    machine, points = run["machine"], []
    for row in run["rows"]:
        own = subject(row)
        if row["status"] != "ok" or row["contended"] or not own.get("median_us"):
            continue
        forward = row["direction"] == "forward"
        if machine and row.get("flops"):
            at = row["flops"] / row["bytes"], own["tflop_per_s"]
            title = f"{row['id']}: {at[1]:.3g} TFLOP/s at {at[0]:.3g} FLOP a byte"
        elif not machine and own.get("fraction_of_copy"):
            at = row["bytes"] / 1e6, own["fraction_of_copy"]
            title = f"{row['id']}: {at[1]:.0%} of a copy"
        else:
            continue
        points.append((*at, row["dtype"], title, forward))
    if not points:
        return ""
    if not machine:
        return plots.scatter(
            points, {"copy": (math.inf, 1.0)}, "MB moved", "part of a copy's bandwidth", "bandwidth by size"
        )
    copy = machine["copy_gb_per_s"] / 1e3  # TB/s: TFLOP/s at 1 FLOP a byte
    roofs = {dtype: (copy, rate) for dtype, rate in machine["matrix_tflop_per_s"].items()}
    return plots.scatter(points, roofs, "FLOP a byte", "TFLOP/s", "roofline")


def peer_bars(run: dict) -> str:
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for direction in DIRECTIONS:
        rows = [_ratios(r) for r in run["rows"] if r["direction"] == direction and not r["contended"]]
        for peer in dict.fromkeys(name for ratios in rows for name in ratios):
            found = [ratios[peer] for ratios in rows if peer in ratios]
            groups.setdefault(direction, {})[f"{peer} ({len(found)} rows)"] = _mean(found), min(found)
    return plots.bars(groups, "how many times as fast as each peer") if groups else ""


def heat_maps(run: dict) -> dict[str, str]:
    """direction -> mode (where the op has none, shape) x dtype and layout, ratio to the best peer."""
    made = {}
    for direction in DIRECTIONS:
        cells: dict[tuple[str, str], list[float]] = {}
        for row in run["rows"]:
            if (
                row["direction"] == direction
                and row["status"] == "ok"
                and not row["contended"]
                and row["ratio_to_best"]
            ):
                at = row.get("mode", row["shape"]), f"{row['dtype']} {row['layout']}"
                cells.setdefault(at, []).append(row["ratio_to_best"])
        if cells:
            rows, columns = (list(dict.fromkeys(at[i] for at in cells)) for i in range(2))
            means = {at: _mean(values) for at, values in cells.items()}
            made[direction] = plots.heat_map(rows, sorted(columns), means, f"ratio to the best peer, {direction}")
    return made


# --- tables ---


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in heads)
    lines = []
    for row in rows:
        cells = []
        for text, value, kind in row:
            more = (f' data-value="{value:.6g}"' if value is not None else "") + (f' class="{kind}"' if kind else "")
            cells.append(f"<td{more}>{escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return f'<div class="wide"><table>\n{inner}\n</table></div>'


def _ratio(x: float | None) -> Cell:
    return ("", None, "") if x is None else (f"{x:.2f}", x, "bad" if x < 1 else "good")


def _number(x: float | None, form: str) -> Cell:
    return ("", None, "") if x is None else (format(x, form), x, "")


def _columns(run: dict) -> dict[str, Callable[[dict], Cell]]:
    """The figures of a right row. Absolute times only on a GPU."""
    gpu = run["environment"]["device_type"] != "cpu"
    columns: dict[str, Callable[[dict], Cell]] = {}
    if gpu:
        columns["device \u00b5s"] = lambda row: _number(subject(row).get("median_us"), ".1f")
        columns["eager \u00b5s"] = lambda row: _number(subject(row).get("eager_us"), ".1f")
        columns["TFLOP/s"] = lambda row: _number(subject(row).get("tflop_per_s"), ".3g")
        columns["GB/s"] = lambda row: _number(subject(row).get("gb_per_s"), ".0f")
        columns["of floor"] = lambda row: _number(subject(row).get("fraction_of_floor"), ".0%")
    columns["of copy"] = lambda row: _number(subject(row).get("fraction_of_copy"), ".0%")
    for peer in dict.fromkeys(name for row in run["rows"] for name in _ratios(row)):
        columns[f"x {peer}"] = lambda row, peer=peer: _ratio(_ratios(row).get(peer))
    columns["x best"] = lambda row: _ratio(row["ratio_to_best"])
    if gpu:
        columns["of torch's memory"] = lambda row: _number(row["peak_bytes_to_torch"], ".0%")
    timed = [row for row in run["rows"] if _time(subject(row))]
    return {name: cell for name, cell in columns.items() if any(cell(row)[0] for row in timed)}


def row_table(run: dict, rows: Sequence[dict]) -> str:
    columns = _columns(run)
    names = ["shape", *(["mode"] if any("mode" in r for r in run["rows"]) else []), "dtype", "layout", "direction"]
    lines: list[list[Cell]] = []
    for row in rows:
        line: list[Cell] = [(name, None, "") for name in _names(row)]
        own, right = subject(row), row["status"] == "ok"
        status = row["status"] + (" (busy)" if row["contended"] else "")
        line += [(status, None, "" if right else "bad"), (own.get("backend") or "", None, "")]
        lines.append(line + [cell(row) if right else ("", None, "") for cell in columns.values()])
    return _table([*names, "status", "backend", *columns], lines)


def wrong_and_lost(run: dict) -> list[dict]:
    """Rows that are red or raised, then those that lose to a peer, the worst first."""
    bad = [row for row in run["rows"] if row["status"] in ("red", "error")]
    lost = [row for row in run["rows"] if row["status"] == "ok" and (row["ratio_to_best"] or 1) < 1]
    return bad + sorted(lost, key=lambda row: row["ratio_to_best"])


# --- the page ---


def _list(entries: Mapping[str, object]) -> str:
    lines = (f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items() if v not in (None, ""))
    return f"<dl>{''.join(lines)}</dl>"


def _headline(run: dict) -> str:
    counts, means = run["summary"]["counts"], run["summary"]["geometric_mean"]["overall"]
    words = [", ".join(f"{n} {status}" for status, n in counts.items()), f"{run['summary']['losses']} losses"]
    for name, key in (("torch", "ratio_to_torch"), ("the best peer", "ratio_to_best")):
        if means[key]:
            words.append(f"{means[key]:.2f} times as fast as {name}")
    if not run["complete"]:
        words.append("interrupted: the rows called missing were not measured")
    return "; ".join(words)


def _section(run: dict) -> str:
    kind, bad = escape(run["kind"]), wrong_and_lost(run)
    parts = [f'<section id="{kind}">', f"<h2>{kind}</h2>", f"<p>{escape(_headline(run))}</p>"]
    parts.append("<h3>Where aeup is wrong or loses</h3>")
    parts.append(row_table(run, bad) if bad else "<p>Nowhere in this run.</p>")
    for row in bad:
        if reason := subject(row).get("reason"):
            parts.append(f'<p class="bad">{escape(row["id"])}: {escape(reason)}</p>')
    if plot := roofline(run):
        parts += ["<h3>Beside the machine's limit</h3>", plot, "<p>Filled: forward; hollow: backward.</p>"]
    if plot := peer_bars(run):
        parts += ["<h3>Beside each peer</h3>", plot]
        parts.append("<p>Peer's time / aeup's: geometric mean, and a mark at the smallest.</p>")
    for direction, plot in heat_maps(run).items():
        parts += [f"<h3>Beside the best peer, {direction}</h3>", plot]
    parts += ["<h3>All rows</h3>", row_table(run, run["rows"]), "<h3>How</h3>"]
    method = {k: v for k, v in run["method"].items() if isinstance(v, str)}
    gaps = {f"missing: {name}": reason for name, reason in run["gaps"].items()}
    parts.append(_list(method | {"notes": "; ".join(run["method"]["notes"])} | gaps))
    return "\n".join([*parts, "</section>"])


def make_page(runs: Sequence[dict]) -> str:
    """The page of one or several runs (as `Report.to_json` gives them) in the order given."""
    links = " · ".join(f'<a href="#{escape(run["kind"])}">{escape(run["kind"])}</a>' for run in runs)
    places = {json.dumps(run["environment"]["device"]): run for run in runs}
    title = "aeup on " + ", ".join(run["environment"]["device"] for run in places.values())
    environments = []
    for run in runs:
        text = f"<h3>{escape(run['kind'])}</h3>" if len(runs) > 1 else ""
        machine = {}
        if run["machine"]:
            rates = ", ".join(f"{k} {v:.0f}" for k, v in run["machine"]["matrix_tflop_per_s"].items())
            machine = {"copy": f"{run['machine']['copy_gb_per_s']:.0f} GB/s", "matrix product": f"{rates} TFLOP/s"}
        environments.append(text + _list(run["environment"] | machine))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f"<nav>{links}</nav>",
            *map(_section, runs),
            '<section id="environment"><h2>Environment</h2>',
            *environments,
            "</section>",
            f"<script>{SCRIPT}</script>",
            "</body></html>",
            "",
        ]
    )
