"""`aeup bench`: every op and whole models in a few minutes. Is aeup right, how fast is it beside each peer, how close
to the machine's limit, where does it lose?"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .digest import counts, digests, lost, ratios, to_best, unmeasured, wrong
from .harness import Settings
from .machine import environment
from .page import make_page
from .peers import available
from .report import Report, write_whole
from .session import conduct, writable
from .workload import Operator

MIN_TIME = {"cpu": 0.04, "cuda": 0.01}  # seconds for a peer and row: more rows, each a little less exact
LOSSES = 10  # rows that are named


def measure_everything(
    operators: Sequence[Operator], device: str, minutes: float, folder: pathlib.Path, console: Console
) -> int:
    """Measure the default rows of each operator that aeup does not leave to torch, for `minutes` in all, and print a
    summary. Each operator has an equal share of the time that is left when its turn comes. Its shapes come in random
    order: those that the time does not reach are a random part of them. Writes a JSON file for each and one page.
    Returns the exit code."""
    writable(folder, folder, "--out")
    theirs = [o.name for o in operators if device in o.by_torch]
    operators = [o for o in operators if device not in o.by_torch]
    end, runs, code = time.monotonic() + 60 * minutes, [], 0
    for i, operator in enumerate(operators):
        now = time.monotonic()
        settings = Settings(device, MIN_TIME[device], min_rounds=3, eager=operator.eager)
        peers, gaps = available(operator, device, compiled=False)
        cases, options = operator.cases(device), {"minutes": minutes, "compiled": False}
        report = Report(operator, [], environment(device), gaps, settings, options)
        path = folder / f"{operator.name}-{device}.json"
        conduct(report, cases, operator.directions, peers, path, now + (end - now) / (len(operators) - i))
        runs.append(report.to_json())
        code = max(code, report.exit_code())
        if report.stopped_by:
            break
    page = folder / "report.html"
    write_whole(page, make_page(runs))
    console.print(_summary(runs), *_notes(runs), sep="\n")
    if theirs:
        console.print(f"not measured: {', '.join(theirs)}: left to torch on this device", highlight=False)
    console.print(f"every row: {page} and the JSON files beside it", soft_wrap=True, highlight=False)
    return code


def _ratio(x: float | None) -> Text:
    return Text("" if x is None else f"{x:.3g}", style="" if x is None else "bold red" if x < 1 else "green")


def _summary(runs: Sequence[dict]) -> Table:
    env = runs[0]["environment"]
    title = f"aeup on {env['device']}, torch {env['torch']}"
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op")
    table.add_column("rows that")
    for name in ("rows", "wrong", "slower", "worst", "x torch", "x best peer", "of the limit"):
        table.add_column(name, justify="right")
    for run in runs:
        bad = len(wrong(run))
        for i, d in enumerate(digests(run)):
            figures = _ratio(to_best(d.worst) if d.worst else None), _ratio(d.torch), _ratio(d.best)
            red = Text(str(bad), style="bold red" if bad else "") if i == 0 else Text("")
            part = "" if d.limit is None else f"{d.limit:.0%}"
            table.add_row(run["kind"] if i == 0 else "", d.name, str(d.rows), red, str(d.losses), *figures, part)
        table.add_section()
    return table


def _notes(runs: Sequence[dict]) -> list[Text]:
    """What is wrong, where it loses most, and what was left out."""
    lines = []
    for run in runs:
        lines += [Text(f"wrong: {run['kind']} {row['id']}: {_reason(row)}", style="bold red") for row in wrong(run)]
    rows = ((run["kind"], row) for run in runs for row in lost(filter(counts, run["rows"])))
    losses = sorted(((to_best(row), kind, row) for kind, row in rows), key=lambda loss: loss[0])
    for ratio, kind, row in losses[:LOSSES]:
        peer = min(ratios(row), key=ratios(row).__getitem__)
        lines.append(Text(f"loses: {kind} {row['id']}: {ratio:.2f} times as fast as {peer}"))
    if len(losses) > LOSSES:
        lines.append(Text(f"loses: {len(losses) - LOSSES} more rows"))
    for run in runs:
        if busy := digests(run)[0].busy:
            lines.append(Text(f"{run['kind']}: busy: other programs took CPUs from {busy} rows, which do not count"))
        if text := unmeasured(run):
            lines.append(Text(f"{run['kind']}: {text}", style="yellow"))
    gaps = dict.fromkeys(f"gap: {name}: {reason}" for run in runs for name, reason in run["gaps"].items())
    return lines + [Text(gap, style="yellow") for gap in gaps]


def _reason(row: dict) -> str:
    return next(r["reason"] for r in row["results"].values() if r["status"] in ("red", "error") and r["reason"])
