"""`aeup bench`: is aeup right, and how fast is it beside its peers on the device at hand?"""

from __future__ import annotations

import pathlib
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .cases import DEFAULT_DTYPES, DIRECTIONS, DTYPES, LAYOUTS, QUICK_SHAPES, SETS, SHAPES, WORKLOADS, interpolate_cases
from .harness import Row, Settings, run
from .peers import BACKENDS, available
from .report import Report, environment

ALL_MODES = tuple(dict.fromkeys(m for w in WORKLOADS for m in w.modes))


@click.group()
def bench() -> None:
    """Measure aeup against its peers; every result is checked before it is timed."""


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does; the list then holds its number."""
    caught: list[int] = []

    def stop(number: int, frame: object) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGTERM, previous)


def _many(option: str, values, text: str):
    return click.option(f"--{option}", f"{option}s", multiple=True, type=click.Choice(values), help=text)


@bench.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@_many("set", SETS, "Workloads: main (default) or those of real models. Repeatable, as are the next five.")
@_many("shape", SHAPES, "Only these shapes.")
@_many("mode", ALL_MODES, "Only these modes.")
@_many("dtype", tuple(DTYPES), f"Default: {', '.join(DEFAULT_DTYPES)}.")
@_many("layout", tuple(LAYOUTS), "Only this layout.")
@_many("direction", DIRECTIONS, "Only this direction.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Force aeup's backend.")
@click.option("--compiled/--no-compiled", default=None, help="Also torch.compile; default: on a GPU only (slow).")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's.")
@click.option("--min-time", type=click.FloatRange(min=0, min_open=True), help="Seconds for each peer and row.")
@click.option("--retries", type=click.IntRange(min=0), default=1, show_default=True, help="Of a disturbed CPU row.")
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK_SHAPES)}, few samples: a look, not a result.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Where to write.")
def interpolate(
    device,
    sets,
    shapes,
    modes,
    dtypes,
    layouts,
    directions,
    backend,
    compiled,
    threads,
    min_time,
    retries,
    quick,
    json_path,
) -> None:
    """Measure aeup.interpolate against torch.

    Prints a table, losses first, and writes JSON (default: runs/bench/interpolate-DEVICE.json). Exit code 1 if a
    result of aeup is wrong or nothing was measured, 130 or 143 if stopped (Ctrl-C, SIGTERM); what was measured is kept.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this torch sees no CUDA device", param_hint="--device")
    if quick and not shapes:
        shapes = QUICK_SHAPES
    if shapes and not sets:  # a shape that is named says in which set it is
        sets = tuple(dict.fromkeys(w.set for w in WORKLOADS if w.name in shapes))
    cases = interpolate_cases(
        device, sets or ("main",), shapes, modes, dtypes or DEFAULT_DTYPES, layouts or tuple(LAYOUTS)
    )
    if not cases:
        raise click.UsageError("no row is left: the filters --set, --shape and --mode exclude each other")
    if quick:
        settings = Settings(device, min_time or 0.03, min_rounds=3, retries=retries)
    else:
        settings = Settings(device, min_time or (0.15 if device == "cpu" else 0.05), retries=retries)
    torch.set_num_threads(threads or torch.get_num_threads())
    peers, gaps = available(device, device != "cpu" if compiled is None else compiled, backend)
    path = json_path or pathlib.Path("runs/bench") / f"interpolate-{device}.json"
    options = dict(sets=sets, shapes=shapes, modes=modes, dtypes=dtypes, layouts=layouts, directions=directions)
    options |= dict(backend=backend, retries=retries, compiled=compiled, threads=threads, quick=quick)
    report = Report([], environment(device), gaps, settings, options)
    started = time.monotonic()
    try:  # a path that cannot be written is found out before the work, not after
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}", param_hint="--json") from None

    chosen = [d for d in DIRECTIONS if not directions or d in directions]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        _sigterm_as_interrupt() as caught,
    ):
        task = progress.add_task("", total=len(cases) * len(chosen))

        def before(row: Row) -> None:
            progress.update(task, description=row.id)

        def after(rows: list[Row]) -> None:
            progress.advance(task)
            report.rows = rows
            report.write(path)

        report.rows, stopped = run(cases, chosen, peers, settings, before, after)
    report.stopped_by = (caught or [int(signal.SIGINT)])[0] if stopped else None
    report.write(path)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    report.render(console)
    console.print(f"{time.monotonic() - started:.0f} s, written to {path}", soft_wrap=True, highlight=False)
    raise SystemExit(report.exit_code())


if __name__ == "__main__":
    bench()
