"""Plots as inline SVG: text, no library, no script. Lines and text take the page's colours, in light and in dark: the
classes c0 ... c5 are the series, `good` and `bad` the two sides of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 6
WIDTH, HEIGHT = 600, 380
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 34, 46


def _svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *body, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from at most `low` to at least `high`; decades alone where they are many."""
    low, high = low * 1.0001, high / 1.0001  # a bound on a tick stays there
    steps = (1, 2, 5) if high / low < 100 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [step * 10.0**k for k in range(first, last + 1) for step in steps]
    start = max(i for i, v in enumerate(every) if v <= low)
    end = min(i for i, v in enumerate(every) if v >= high and i > start)
    return every[start : end + 1]


def _log(ticks: Sequence[float], low: float, high: float) -> Callable[[float], float]:
    """Values to pixels."""
    scale = (high - low) / math.log(ticks[-1] / ticks[0])
    return lambda value: low + math.log(value / ticks[0]) * scale


def ratio(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def short(x: float) -> str:
    """Three digits, from 10000 on thousands; no exponent where it can be avoided."""
    if x >= 1e4:
        return f"{x / 1e3:.0f}k"
    if x >= 100 or x == 0:
        return f"{x:.0f}"
    return f"{x:.3g}" if x >= 1e-3 else f"{x:.0e}".replace("e-0", "e-")


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    series: str
    title: str
    filled: bool


@dataclass(frozen=True)
class Roof:
    """A limit: a line through `points`, of which the first and the last may lie outside the plot, with its label at the
    right end. Where no series of points has its name it has the colour of the text."""

    series: str
    label: str
    points: Sequence[tuple[float, float]]


def scatter(
    points: Sequence[Point],
    roofs: Sequence[Roof],
    colours: Sequence[str],
    x_name: str,
    y_name: str,
    rings: str,
    label: str,
) -> str:
    """Logarithmic in both. `colours`: the series, in the order of the colours that they take, drawn or not; `rings`:
    what the points are that are not filled."""
    series = {name: f"c{i % SERIES}" for i, name in enumerate(colours) if any(p.series == name for p in points)}
    tops = [p.y for p in points] + [y for roof in roofs for _, y in roof.points]
    xs = [p.x for p in points] + [x for roof in roofs for x, _ in roof.points[1:-1]]
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _ticks(min(p.y for p in points), max(tops))
    x, y = _log(x_ticks, LEFT, WIDTH - RIGHT), _log(y_ticks, HEIGHT - BOTTOM, TOP)
    body = []
    for tick in x_ticks:
        body += [_line(x(tick), TOP, x(tick), HEIGHT - BOTTOM)]
        body += [_text(x(tick), HEIGHT - BOTTOM + 16, short(tick), "middle")]
    for tick in y_ticks:
        body += [_line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), _text(LEFT - 6, y(tick) + 4, short(tick), "end")]
    w, h = WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM - TOP
    body.append(f'<svg x="{LEFT}" y="{TOP}" width="{w}" height="{h}" viewBox="{LEFT} {TOP} {w} {h}">')
    for roof in roofs:
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in roof.points)
        body.append(f'<polyline class="roof {series.get(roof.series, "one")}" points="{path}"/>')
    body.append("</svg>")
    for p in points:
        kind = f"{series[p.series]} {'dot' if p.filled else 'ring'}"
        body.append(f'<circle class="{kind}" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="4">')
        body.append(f"<title>{escape(p.title)}</title></circle>")
    for roof in roofs:
        px, py = roof.points[-1]
        kind = f' class="over {series.get(roof.series, "one")}"'
        body.append(_text(min(x(px), WIDTH - RIGHT) - 4, y(py) - 5, roof.label, "end", kind))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_name, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(_text(14, middle, y_name, "middle", f' transform="rotate(-90 14 {middle:g})"'))
    return _svg(WIDTH, HEIGHT, body + _legend(series, points, rings), label)


def _legend(series: Mapping[str, str], points: Iterable[Point], rings: str) -> list[str]:
    """Above the plot: what the colours are, and what filled and hollow."""
    entries = [(name, f"{kind} dot") for name, kind in series.items()]
    if len({p.filled for p in points}) > 1:
        entries += [("forward", "one dot"), (rings, "one ring")]
    out, at = [], LEFT + 6
    for name, kind in entries:
        out += [f'<circle class="{kind}" cx="{at}" cy="14" r="4"/>', _text(at + 9, 18, name)]
        at += 32 + 7 * len(name)
    return out


@dataclass(frozen=True)
class Bar:
    """Ratios to one peer: their geometric mean, smallest and largest, and how many are below 1."""

    name: str
    mean: float
    smallest: float
    largest: float
    rows: int
    below: int


def bars(groups: Mapping[str, Sequence[Bar]], label: str) -> str:
    """Group -> its bars, from 1 to the mean, on a logarithmic scale; a thin line from the smallest to the largest."""
    every = [bar for group in groups.values() for bar in group]
    ticks = _doublings(min(0.5, *(b.smallest for b in every)), max(2.0, *(b.largest for b in every)))
    start = 20 + 7 * max(len(bar.name) for bar in every)
    x = _log(ticks, start, WIDTH - RIGHT - 176)
    body, at = [], TOP - 6
    bottom = at + sum(24 + 24 * len(group) for group in groups.values())
    for tick in ticks:
        body += [_line(x(tick), at - 4, x(tick), bottom, "one" if tick == 1 else "grid")]
        body.append(_text(x(tick), at - 10, short(tick), "middle"))
    for name, group in groups.items():
        at += 24
        body.append(_text(0, at - 8, name, more=' class="strong"'))
        for bar in group:
            left, right = sorted((x(1), x(bar.mean)))
            kind = "bad" if bar.mean < 1 else "good"
            title = f"{bar.name}: geometric mean {ratio(bar.mean)}, {ratio(bar.smallest)} to {ratio(bar.largest)}"
            body.append(f"<g><title>{escape(title)}</title>")
            body.append(_text(start - 8, at + 15, bar.name, "end"))
            shape = f'x="{left:.1f}" y="{at + 3}" width="{max(right - left, 1):.1f}" height="16"'
            body.append(f'<rect class="{kind}" {shape}/>')
            body.append(_line(x(bar.smallest), at + 11, x(bar.largest), at + 11, "range"))
            body += [_line(x(v), at + 7, x(v), at + 15, "range") for v in (bar.smallest, bar.largest)]
            lost = f"{bar.below} of {bar.rows} lose" if bar.below else f"none of {bar.rows} loses"
            body.append(_text(WIDTH - RIGHT - 160, at + 15, ratio(bar.mean), more=' class="strong"'))
            body.append(_text(WIDTH - RIGHT - 116, at + 15, lost, more=' class="bad"' if bar.below else ""))
            body.append("</g>")
            at += 24
    return _svg(WIDTH, at + 8, body, label)


def _doublings(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    step = math.ceil((last - first) / 8)  # all of them are too many where one ratio is 600
    first, last = -step * math.ceil(-first / step), step * math.ceil(last / step)
    return [2.0**k for k in range(first, last + 1, step)]


@dataclass(frozen=True)
class Cell:
    mean: float
    smallest: float
    rows: int


def heat_map(
    groups: Sequence[Sequence[str]], columns: Sequence[str], cells: Mapping[tuple[str, str], Cell], label: str
) -> str:
    """(row, column) -> ratio, coloured by its logarithm around 1; a second line has the smallest of several. `groups`:
    the names of the rows, with a gap between groups. Names of columns are "dtype layout"."""
    start, top, w, h = 14 + 7 * max(len(row) for group in groups for row in group), 40, 68, 34
    body = []
    for i, column in enumerate(columns):
        for line, word in enumerate(column.split()):
            body.append(_text(start + w * (i + 0.5) - 1, 16 + 15 * line, word, "middle"))
    for group in groups:
        for row in group:
            body.append(_text(start - 8, top + h / 2 + 3, row, "end"))
            for j, column in enumerate(columns):
                body += _heat(cells.get((row, column)), f"{row}, {column}", start + w * j, top, w, h)
            top += h
        top += 10
    return _svg(start + w * len(columns) + 2, top, body, label)


def _heat(cell: Cell | None, name: str, x: float, y: float, w: float, h: float) -> list[str]:
    at = f'x="{x}" y="{y}" width="{w - 2}" height="{h - 2}"'
    if cell is None:
        return [f'<rect class="none" {at}><title>{escape(name)}: not measured</title></rect>']
    kind, depth = ("bad" if cell.mean < 1 else "good"), 0.12 + 0.5 * min(abs(math.log2(cell.mean)) / 3, 1)
    text = "" if cell.rows == 1 else f", smallest {ratio(cell.smallest)}, {cell.rows} rows"
    title = f"<title>{escape(f'{name}: {ratio(cell.mean)}{text}')}</title>"
    out = [f'<g><rect class="{kind}" fill-opacity="{depth:.2f}" {at}>{title}</rect>']
    middle = x + w / 2 - 1
    out.append(_text(middle, y + h / 2 + (3 if cell.rows == 1 else -3), ratio(cell.mean), "middle"))
    if cell.rows > 1:
        small = f"small{' bad strong' if cell.smallest < 1 else ''}"
        out.append(_text(middle, y + h - 7, f"min {ratio(cell.smallest)}", "middle", f' class="{small}"'))
    return [*out, "</g>"]
