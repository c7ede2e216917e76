"""Runs as one HTML page: no resource from outside, no library; it works from a file. Losses come first.

A page is made of the JSON that `report` writes, so that a stored run can be shown again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from . import plots
from .digest import (
    Digest,
    counts,
    digests,
    is_gpu,
    keys,
    lost,
    ratios,
    seconds,
    spread,
    subject,
    to_best,
    unmeasured,
    values,
    wrong,
)
from .report import geometric_mean

SERIES = ("bf16", "fp32", "tf32", "fp16")  # the same colours and order in every plot
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #f3f4f6; --line: #d5d9de; --good: #0072b2;
  --bad: #c44900; --c0: #0072b2; --c1: #d55e00; --c2: #00805a; --c3: #b0528f; --c4: #a87400; --c5: #2f8fc4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16191d; --soft: #262b32; --line: #3a4048;
  --good: #56b4e9; --bad: #ff9248; --c0: #56b4e9; --c1: #ff8c42; --c2: #2fc796; --c3: #e59cc9; --c4: #f0b93a;
  --c5: #9fd3f2; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 88rem; padding: 0 1rem; }
a { color: var(--good); }
h1 { font-size: 1.5rem; margin-bottom: .3rem; } h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); }
h3 { margin: 2rem 0 .6rem; }
p { max-width: 50rem; } .facts { margin: 0; max-width: none; } nav, .facts + .wide { margin-top: 1rem; }
.wide { overflow: auto; max-height: 34rem; width: fit-content; max-width: 100%; border: 1px solid var(--line); }
table { width: max-content; border-collapse: separate; border-spacing: 0; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; z-index: 1; background: var(--soft); white-space: normal; vertical-align: bottom;
  line-height: 1.3; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th:first-child { z-index: 2; background: var(--soft); }
tbody tr:hover td { background: var(--soft); }
.t { text-align: left; }
th button { display: block; max-width: 4.8rem; margin-left: auto; padding: 0; border: 0; background: none;
  cursor: pointer; font: inherit; font-weight: 600; color: inherit; text-align: inherit; }
th.t button { margin-left: 0; max-width: none; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
input { font: inherit; width: 28rem; max-width: 100%; box-sizing: border-box; margin-bottom: .5rem; }
.bad { color: var(--bad); fill: var(--bad); } .good { color: var(--good); fill: var(--good); }
td.bad { font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; overflow-x: auto; } figcaption { max-width: 600px; font-size: 13px; }
figcaption:first-child { font-weight: 600; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }
@media (max-width: 40rem) { body { margin: 1rem auto; } figure > svg { max-width: none; } }
svg .grid { stroke: var(--line); } svg line.one { stroke: currentColor; }
svg .range { stroke: currentColor; stroke-width: 1.5; }
svg .none { fill: var(--soft); } svg .strong { font-weight: 600; } svg .small { font-size: 10px; }
svg .over { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; font-weight: 600; }
""" + "".join(f"svg .c{i} {{ color: var(--c{i}); fill: var(--c{i}); }}\n" for i in range(plots.SERIES))
STYLE += """svg .dot { fill: currentColor; fill-opacity: .75; }
svg .ring { fill: none; stroke: currentColor; stroke-width: 1.5; }
svg .roof { fill: none; stroke: currentColor; stroke-width: 1.5; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; }
dt { font-weight: 600; max-width: 14rem; } dd { margin: 0; overflow-wrap: anywhere; }
"""
# Sorts a table by the column that was clicked: by number where the cells have one, else by their text; empty cells
# stay last. A filter keeps the rows that contain all of its words.
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
for (const input of document.querySelectorAll("input")) input.addEventListener("input", () => {
  const words = input.value.toLowerCase().split(/\\s+/);
  for (const row of input.nextElementSibling.querySelector("tbody").rows) {
    const text = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
    row.hidden = !words.every((word) => text.includes(word));
  }
});
"""
HELP = {
    "backend": "which of aeup's backends served; torch: left to torch, as aeup.explain says",
    "device \u00b5s": "aeup, median time on the device alone",
    "eager \u00b5s": "aeup, median with the host's time: what a program waits for a call",
    "spread": "80 % quantile less 20 % quantile, as a part of the median",
    "TFLOP/s": "products, by device time",
    "GB/s": "each tensor read or written once, by device time",
    "of floor": "part of the measured limit of the machine: bytes at a copy's rate or products at torch.mm's",
    "of copy": "part of the bandwidth that a copy of the same number of bytes reaches in the same row",
    "x best": "best peer's time / aeup's: above 1, aeup is faster than all of them",
    "x best, device": "the same by time on the device alone",
    "of torch's memory": "peak memory of forward and backward, aeup's / torch's",
    "wrong": "rows whose result is not right, or that raised an error",
    "lose": "rows in which a peer is faster",
    "of limit": "geometric mean: part of the machine's floor where it is known, else of a copy's bandwidth",
}


@dataclass(frozen=True)
class Cell:
    """`value`: what it is sorted by, where that is not its text; `kind`: its class; `title`: shown on hovering;
    `link`: the id of what the text leads to."""

    text: str = ""
    value: float | None = None
    kind: str = ""
    title: str = ""
    link: str = ""

    def html(self) -> str:
        more = "" if self.value is None else f' data-value="{self.value:.6g}"'
        more += f' class="{self.kind}"' if self.kind else ""
        more += f' title="{escape(self.title)}"' if self.title else ""
        text = f'<a href="#{escape(self.link)}">{escape(self.text)}</a>' if self.link else escape(self.text)
        return f"<td{more}>{text}</td>"


# --- plots ---


def _drawn(run: dict) -> list[dict]:
    return [row for row in run["rows"] if counts(row)]


def limits(run: dict) -> tuple[str, str]:
    """A plot beside the machine's limit, and its caption. On a GPU, of an op with products: the roofline. Of one
    without: GB/s by size, and the copy's. On a CPU the part of a copy's bandwidth, which needs no absolute time; there
    the limit of an op with products is not measured."""
    rows, gpu, rings = _drawn(run), is_gpu(run), " or ".join(values(run["rows"], "direction")[1:])
    if any(row.get("flops") for row in rows):
        return _roofline([r for r in rows if r.get("flops")], run["machine"], rings) if run["machine"] else ("", "")
    figure = "gb_per_s" if gpu else "fraction_of_copy"
    name, unit = ("GB/s", "GB/s") if gpu else ("part of a copy's bandwidth", "of a copy")
    points, copied = [], {}
    for row in rows:
        if value := subject(row).get(figure):
            at, text = row["bytes"] / 1e6, f"{row['id']}: {plots.short(value)} {unit}"
            points.append(plots.Point(at, value, row["dtype"], text, row["direction"] == "forward"))
            copied.setdefault(at, []).append(row["ceilings"]["copy"]["gb_per_s"] if gpu else 1.0)
    if not points:
        return "", ""
    line = [(at, geometric_mean(copied[at])) for at in sorted(copied)]
    ends = [(line[0][0] / 1e3, line[0][1]), *line, (line[-1][0] * 1e3, line[-1][1])]
    roof = plots.Roof("copy", "copy", ends)
    svg = plots.scatter(points, [roof], SERIES, "MB that must be moved (logarithmic)", name, rings, "bandwidth by size")
    return svg, "A point is a row; the line is a copy of the same number of bytes, measured in the same rows."


def _roofline(rows: Sequence[dict], machine: dict, rings: str) -> tuple[str, str]:
    points, copy = [], machine["copy_gb_per_s"] / 1e3  # TB/s: TFLOP/s at 1 FLOP a byte
    for row in rows:
        x, y = row["flops"] / row["bytes"], subject(row)["tflop_per_s"]
        title = f"{row['id']}: {plots.short(y)} TFLOP/s at {plots.short(x)} FLOP a byte"
        points.append(plots.Point(x, y, row["dtype"], title, row["direction"] == "forward"))
    roofs = []
    for dtype in values(rows, "dtype"):
        if rate := machine["matrix_tflop_per_s"].get(dtype):
            knee = rate / copy
            line = [(knee / 1e6, rate / 1e6), (knee, rate), (knee * 1e6, rate)]
            roofs.append(plots.Roof(dtype, f"{dtype} {rate:.0f}", line))
    svg = plots.scatter(points, roofs, SERIES, "FLOP a byte (logarithmic)", "TFLOP/s", rings, "roofline")
    slope = f"A point is a row, by time on the device. The slope is a copy's bandwidth, {copy * 1e3:.0f} GB/s; "
    flat = "the flat lines are torch.mm in that dtype, in TFLOP/s: a kernel that uses other instructions may pass them."
    return svg, slope + flat


def peer_bars(run: dict) -> str:
    groups: dict[str, list[plots.Bar]] = {}
    for direction in values(run["rows"], "direction"):
        rows = [ratios(row) for row in _drawn(run) if row["direction"] == direction]
        peers = list(dict.fromkeys(name for found in rows for name in found))
        if len(peers) > 1:
            rows = [{**found, "best of them": min(found.values())} for found in rows if found]
            peers.append("best of them")
        for peer in peers:
            found = [r[peer] for r in rows if peer in r]
            below = sum(1 for ratio in found if ratio < 1)
            bar = plots.Bar(peer, geometric_mean(found), min(found), max(found), len(found), below)
            groups.setdefault(direction, []).append(bar)
    return plots.bars(groups, "how many times as fast as each peer") if groups else ""


def heat_maps(run: dict) -> dict[str, str]:
    """direction -> modes, where there are several, and shapes x dtype and layout: ratio to the best peer."""
    made, by = {}, [*(["mode"] if len(values(run["rows"], "mode")) > 1 else []), "shape"]
    for direction in values(run["rows"], "direction"):
        found: dict[tuple[str, str], list[float]] = {}
        for row in _drawn(run):
            if row["direction"] == direction and to_best(row):
                for key in by:
                    found.setdefault((row[key], f"{row['dtype']} {row['layout']}"), []).append(to_best(row))
        if found:
            groups = [[v for v in values(run["rows"], key) if any(v == at[0] for at in found)] for key in by]
            order = sorted({at[1] for at in found}, key=lambda c: (SERIES.index(c.split()[0]), c))
            cells = {at: plots.Cell(geometric_mean(v), min(v), len(v)) for at, v in found.items()}
            made[direction] = plots.heat_map(groups, order, cells, f"ratio to the best peer, {direction}")
    return made


# --- tables ---


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], filtered: bool = False) -> str:
    head = ""
    for i, name in enumerate(heads):
        title = HELP.get(name, f"{name[2:]}'s time / aeup's" if name.startswith("x ") else "")
        kind = ' class="t"' if rows and rows[0][i].kind.startswith("t") else ""
        title = f' title="{escape(title)}"' if title else ""
        head += f'<th scope="col"{kind}{title}><button type="button">{escape(name)}</button></th>'
    lines = (f"<tr>{''.join(cell.html() for cell in row)}</tr>" for row in rows)
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    hint = "words that a row must have, such as bf16 backward"
    field = f'<input type="search" placeholder="{hint}" aria-label="{hint}">' if filtered else ""
    return f'{field}<div class="wide"><table>\n{inner}\n</table></div>'


def _ratio(x: float | None) -> Cell:
    if x is None:
        return Cell()
    return Cell(plots.ratio(x), x, "bad" if x < 1 else "good")


def _number(x: float | None, form: str) -> Cell:
    return Cell() if x is None else Cell(format(x, form), x)


def _kernel(row: dict) -> Cell:
    """Without what other kernels said, which is in the title."""
    full = subject(row).get("kernel") or ""
    names, depth = "", 0
    for letter in full:
        depth += letter == "("
        names += letter if not depth else ""
        depth -= letter == ")"
    return Cell(" ".join(names.split()), kind="t", title=full if "(" in full else "")


def _columns(run: dict) -> dict[str, Callable[[dict], Cell]]:
    """What is shown of a right row, ratios first. Absolute times only on a GPU."""
    gpu, eager = is_gpu(run), any("eager_us" in subject(row) for row in run["rows"])
    peers = list(dict.fromkeys(name for row in run["rows"] for name in ratios(row)))
    columns: dict[str, Callable[[dict], Cell]] = {}
    if len(peers) > 1:
        columns["x best"] = lambda row: _ratio(to_best(row))
    if eager:
        columns["x best, device"] = lambda row: _ratio(row.get("device_ratio_to_best"))
    for peer in peers:
        columns[f"x {peer}"] = lambda row, peer=peer: _ratio(ratios(row).get(peer))
    columns["spread"] = lambda row: _number(spread(subject(row)), ".0%")
    if gpu:
        columns["device \u00b5s"] = lambda row: _number(subject(row).get("median_us"), ".1f")
        columns["eager \u00b5s"] = lambda row: _number(subject(row).get("eager_us"), ".1f")
        columns["TFLOP/s"] = lambda row: _number(subject(row).get("tflop_per_s"), ".3g")
        columns["GB/s"] = lambda row: _number(subject(row).get("gb_per_s"), ".0f")
        columns["of floor"] = lambda row: _number(subject(row).get("fraction_of_floor"), ".0%")
    columns["of copy"] = lambda row: _number(subject(row).get("fraction_of_copy"), ".0%")
    if gpu:
        columns["of torch's memory"] = lambda row: _number(row.get("peak_bytes_to_torch"), ".0%")
    columns["kernel"] = _kernel
    timed = [row for row in run["rows"] if seconds(subject(row))]
    return {name: cell for name, cell in columns.items() if any(cell(row).text for row in timed)}


def row_table(run: dict, rows: Sequence[dict], filtered: bool = False) -> str:
    columns, names, lines = _columns(run), keys(run), []
    for row in rows:
        own, right = subject(row), row["status"] == "ok"
        status = row["status"] + (" (busy)" if row.get("contended") else "")
        line = [Cell(row.get(name, ""), kind="t", title=row["source"] * (name == "shape")) for name in names]
        line += [Cell(status, kind="t" if right else "t bad"), Cell(own.get("backend") or "", kind="t")]
        lines.append(line + [cell(row) if right else Cell() for cell in columns.values()])
    return _table([*names, "status", "backend", *columns], lines, filtered)


def digest_table(run: dict) -> str:
    """Groups of rows, that with the smallest mean first."""
    found = digests(run)
    return _digests({"geometric means": [Cell(d.name, kind="t") for d in found]}, found)


def overview(runs: Sequence[dict], names: Sequence[str], titles: Sequence[str]) -> str:
    """A line for each run: its means, and where they come from."""
    links = [Cell(title, kind="t", link=name) for name, title in zip(names, titles, strict=True)]
    red = [_count(len(wrong(run))) for run in runs]
    known = [facts(run) for run in runs]
    origin = {
        "commit": [Cell(found["commit"], kind="t") for found in known],
        "measured": [Cell(found.get("measured", "")[:10], kind="t") for found in known],
    }
    return _digests({"geometric means": links}, [digests(run)[0] for run in runs], {"wrong": red, **origin})


def _digests(
    first: Mapping[str, list[Cell]], found: Sequence[Digest], last: Mapping[str, list[Cell]] | None = None
) -> str:
    """Columns: `first`, of the digests the rows, the losses and what has a figure, and `last`."""
    worst = [to_best(d.worst) if d.worst else None for d in found]
    own = {
        "rows": [Cell(str(d.rows), d.rows) for d in found],
        "busy": [Cell(str(d.busy), d.busy) for d in found],
        "lose": [_count(d.losses) for d in found],
        "worst": list(map(_ratio, worst)),
        "worst row": [Cell(d.worst["id"] if d.worst else "", kind="t") for d in found],
        "x torch": [_ratio(d.torch) for d in found],
        "x best": [_ratio(d.best) for d in found],
        "x best, device": [_ratio(d.device) for d in found],
        "of limit": [_number(d.limit, ".0%") for d in found],
    }
    shown = {k: v for k, v in own.items() if k in ("rows", "lose") or any(cell.text not in ("", "0") for cell in v)}
    columns = {**first, **shown, **(last or {})}
    return _table(list(columns), list(zip(*columns.values(), strict=True)))


def _count(bad: int) -> Cell:
    return Cell(str(bad), bad, "bad" if bad else "")


def comparison_table(comparison: dict) -> str:
    lines = []
    for row in comparison["rows"]:
        by, allowed = row["slower_by"], comparison["limit"]
        bad = by > 0 if allowed is None else by > allowed
        lines.append([Cell(row["id"], kind="t"), Cell(f"{by:+.1%}", by, "bad" if bad else "good" if by < 0 else "")])
    return _table(["row", "slower by"], lines)


# --- the page ---


def _list(entries: Mapping[str, object]) -> str:
    lines = (f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items() if v not in (None, ""))
    return f"<dl>{''.join(lines)}</dl>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _headline(run: dict) -> str:
    rows, all_rows = run["rows"], digests(run)[0]
    count = {status: sum(1 for row in rows if row["status"] == status) for status in values(rows, "status")}
    words = [", ".join(f"{n} {status}" for status, n in count.items()), f"{all_rows.losses} losses"]
    for name, mean in (("torch", all_rows.torch), ("the best peer", all_rows.best)):
        if mean:
            words.append(f"{mean:.2f} times as fast as {name}")
    if all_rows.busy:
        words.append(f"{all_rows.busy} busy: other programs took the CPU, so these rows are in no mean and no plot")
    if missing := unmeasured(run):
        words.append(missing)
    return "; ".join(words)


def _reasons(rows: Iterable[dict]) -> list[str]:
    """Why peers and aeup have no figure, once each, with the rows."""
    found: dict[tuple[str, bool], list[str]] = {}
    for row in rows:
        for name, result in row["results"].items():
            if result["status"] != "ok":
                bad = name.split(":")[0] == "aeup" and result["status"] != "unsupported"
                found.setdefault((f"{name}: {result['status']}: {result.get('reason')}", bad), []).append(row["id"])
    lines = []
    for (text, bad), ids in found.items():
        more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        kind = ' class="bad"' if bad else ""
        lines.append(f"<p{kind}>{escape(text)} ({escape(ids[0])}{more})</p>")
    return lines


def _section(run: dict, name: str, title: str) -> str:
    bad = wrong(run) + lost(run["rows"])
    parts = [f'<section id="{escape(name)}">', f"<h2>{escape(title)}</h2>", f"<p>{escape(_headline(run))}</p>"]
    parts.append(digest_table(run) if run["rows"] else "")
    parts.append("<h3>Where aeup is wrong or loses</h3>")
    parts.append(row_table(run, bad) if bad else "<p>Nowhere in this run.</p>")
    parts += _reasons(run["rows"])
    if comparison := run.get("comparison"):
        commit = (comparison["commit"] or "unknown")[:12]
        parts.append(f"<h3>Against commit {escape(commit)} of {escape(comparison['date'])}</h3>")
        parts += [f"<p>By {escape(comparison['measure'])}.</p>", comparison_table(comparison)]
    figures, beside = [], []
    svg, caption = limits(run)
    if svg:
        figures.append(_figure(svg, caption))
        beside.append("the machine's limit")
    if svg := peer_bars(run):
        caption = "Peer's time / aeup's: bar and figure, geometric mean; line, from the smallest to the largest."
        figures.append(_figure(svg, caption))
        beside.append("each peer")
    if figures:
        parts += [f"<h3>Beside {' and '.join(beside)}</h3>", f'<div class="plots">{"".join(figures)}</div>']
    if maps := heat_maps(run):
        parts.append("<h3>Beside the best peer</h3>")
        parts.append("<p>Best peer's time / aeup's: geometric mean, and the smallest of several rows. Blue: aeup is ")
        parts.append("faster; orange: slower; the deepest colour is a factor of 8.</p>")
        drawn = (f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in maps.items())
        parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    parts += ["<h3>All rows</h3>", row_table(run, run["rows"], filtered=True), "<h3>How</h3>"]
    method = {k: v for k, v in run["method"].items() if isinstance(v, str)}
    gaps = {f"missing: {name}": reason for name, reason in run["gaps"].items()}
    parts.append(_list(method | {"notes": "; ".join(run["method"]["notes"])} | gaps))
    return "\n".join([*parts, "</section>"])


def facts(run: dict) -> dict[str, str]:
    """Where a run comes from, in short; what is not known is left out."""
    env = run["environment"]
    commit = (env.get("commit") or "")[:12]
    known = {
        "driver": env.get("driver"),
        "torch": env["torch"],
        "Triton": env.get("triton"),
        "CUDA": env.get("cuda") if is_gpu(run) else None,
        "threads": None if is_gpu(run) else env.get("threads"),
        "aeup": env.get("aeup"),
        "commit": f"{commit}{' with changes' if env.get('dirty') else ''}" if commit else "unknown",
        "measured": env.get("date", "")[:16].replace("T", " "),
    }
    return {name: str(value) for name, value in known.items() if value}


def _places(runs: Sequence[dict]) -> list[str]:
    """Where the runs come from, each place once; of several runs the overview tells the commits and the dates."""
    places = []
    for run in runs:
        known = {k: v for k, v in facts(run).items() if not runs[1:] or k not in ("commit", "measured")}
        words = ", ".join(f"{name} {value}{' UTC' * (name == 'measured')}" for name, value in known.items())
        places.append(f"{run['environment']['device']}: {words}")
    return list(dict.fromkeys(places))


def make_page(runs: Sequence[dict]) -> str:
    """The page of one or several runs (as `Report.to_json` gives them) in the order given."""
    kinds = [run["kind"] for run in runs]
    names = [kind if kinds.count(kind) == 1 else f"{kind}-{i + 1}" for i, kind in enumerate(kinds)]
    devices = list(dict.fromkeys(run["environment"]["device"] for run in runs))
    titles = [f"{run['kind']} on {run['environment']['device']}" if devices[1:] else run["kind"] for run in runs]
    entries = [*([] if runs[1:] else zip(names, titles, strict=True)), ("environment", "Environment")]
    links = " \u00b7 ".join(f'<a href="#{escape(name)}">{escape(text)}</a>' for name, text in entries)
    title = "aeup on " + ", ".join(devices)
    environments = []
    for run, where in zip(runs, titles, strict=True):
        text = f"<h3>{escape(where)}</h3>" if len(runs) > 1 else ""
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
            *(f'<p class="facts">{escape(place)}</p>' for place in _places(runs)),
            overview(runs, names, titles) if runs[1:] else "",
            f"<nav>{links}</nav>",
            *map(_section, runs, names, titles),
            '<section id="environment"><h2>Environment</h2>',
            *environments,
            "</section>",
            f"<script>{SCRIPT}</script>",
            "</body></html>",
            "",
        ]
    )
