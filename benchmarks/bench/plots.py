"""Plots as inline SVG: text, no library, no script. Lines and text take the page's colours, in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: for every kind of sight
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 14, 44


def _svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *body, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid", more: str = "") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{more}/>'


def _log_axis(values: Sequence[float], low: float, high: float) -> tuple[Callable[[float], float], list[float]]:
    """Values to pixels, whole decades, and the decades."""
    first = math.floor(math.log10(min(values)))
    last = max(math.ceil(math.log10(max(values))), first + 1)

    def place(value: float) -> float:
        return low + (math.log10(value) - first) / (last - first) * (high - low)

    return place, [10.0**k for k in range(first, last + 1)]


def _short(x: float) -> str:
    return f"{x:g}" if 1e-3 <= x < 1e4 else f"{x:.0e}".replace("e+0", "e").replace("e-0", "e-")


def _legend(entries: Mapping[str, str]) -> list[str]:
    """name -> colour, right of the plot."""
    out = []
    for i, (name, colour) in enumerate(entries.items()):
        y = TOP + 12 + 18 * i
        out += [f'<circle cx="{WIDTH - RIGHT + 16}" cy="{y - 4}" r="5" fill="{colour}"/>']
        out.append(_text(WIDTH - RIGHT + 26, y, name))
    return out


def scatter(
    points: Sequence[tuple[float, float, str, str, bool]],
    roofs: Mapping[str, tuple[float, float]],
    x_name: str,
    y_name: str,
    label: str,
) -> str:
    """Logarithmic. points: (x, y, class, title, filled); roofs: class -> (slope, ceiling), drawn as min(slope * x,
    ceiling). Classes share their colours."""
    classes = list(dict.fromkeys([*roofs, *(p[2] for p in points)]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(classes)}
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    ys += [ceiling for _, ceiling in roofs.values()]
    x, x_ticks = _log_axis(xs, LEFT, WIDTH - RIGHT)
    y, y_ticks = _log_axis(ys, HEIGHT - BOTTOM, TOP)
    body = []
    for tick in x_ticks:
        body += [_line(x(tick), TOP, x(tick), HEIGHT - BOTTOM), _text(x(tick), HEIGHT - 26, _short(tick), "middle")]
    for tick in y_ticks:
        body += [_line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), _text(LEFT - 6, y(tick) + 4, _short(tick), "end")]
    for name, (slope, ceiling) in roofs.items():
        first = min(max(x_ticks[0], y_ticks[0] / slope), x_ticks[-1])
        ends = sorted({first, x_ticks[-1], min(max(ceiling / slope, first), x_ticks[-1])})
        at = [(x(e), y(max(min(slope * e, ceiling), y_ticks[0]))) for e in ends]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in at)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>')
    for px, py, name, title, filled in points:
        look = f'fill="{colours[name] if filled else "none"}" stroke="{colours[name]}"'
        body.append(f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="4" {look}><title>{escape(title)}</title></circle>')
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_name, "middle"))
    turned = f' transform="rotate(-90 14 {HEIGHT / 2:g})"'
    body.append(_text(14, HEIGHT / 2, y_name, "middle", turned))
    return _svg(WIDTH, HEIGHT, body + _legend(colours), label)


def bars(groups: Mapping[str, Mapping[str, tuple[float, float]]], label: str) -> str:
    """group -> bar -> (value, smallest value), on a logarithmic scale, with a mark at 1."""
    every = [v for group in groups.values() for pair in group.values() for v in pair]
    start, line = 190, 22
    low, high = min(0.5, *every), max(2.0, *every)

    def x(value: float) -> float:
        return start + math.log(value / low) / math.log(high / low) * (WIDTH - start - 70)

    body, at = [], 8
    for name, group in groups.items():
        body.append(_text(0, at + 14, name, more=' class="strong"'))
        at += line
        for bar, (value, smallest) in group.items():
            left, right = sorted((x(1), x(value)))
            kind = "bad" if value < 1 else "good"
            title = f"{bar}: geometric mean {value:.2f}, smallest {smallest:.2f}"
            body.append(_text(start - 8, at + 13, bar, "end"))
            shape = f'x="{left:.1f}" y="{at + 3}" width="{max(right - left, 1):.1f}" height="14"'
            body.append(f'<rect class="{kind}" {shape}><title>{escape(title)}</title></rect>')
            body.append(_line(x(smallest), at + 1, x(smallest), at + 19, "worst"))
            body.append(_text(max(right, x(smallest)) + 6, at + 14, f"{value:.2f}"))
            at += line
    body.append(_line(x(1), 0, x(1), at, "one"))
    return _svg(WIDTH, at + 6, body, label)


def heat_map(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], float], label: str) -> str:
    """(row, column) -> ratio, coloured by its logarithm around 1."""
    start, top, w, h = 190, 34, 84, 26
    body = [_text(start + w * (i + 0.5), 22, name, "middle") for i, name in enumerate(columns)]
    for i, row in enumerate(rows):
        body.append(_text(start - 8, top + h * i + 17, row, "end"))
        for j, column in enumerate(columns):
            value = cells.get((row, column))
            at = f'x="{start + w * j}" y="{top + h * i}" width="{w - 2}" height="{h - 2}"'
            if value is None:
                body.append(f'<rect class="none" {at}/>')
                continue
            kind, depth = ("bad" if value < 1 else "good"), 0.15 + 0.6 * min(abs(math.log2(value)) / 3, 1)
            title = f"{row}, {column}: {value:.2f}"
            body.append(f'<rect class="{kind}" fill-opacity="{depth:.2f}" {at}><title>{escape(title)}</title></rect>')
            body.append(_text(start + w * (j + 0.5) - 1, top + h * i + 17, f"{value:.2f}", "middle"))
    return _svg(start + w * len(columns), top + h * len(rows) + 4, body, label)
