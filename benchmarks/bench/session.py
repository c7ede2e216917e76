"""A run from its first row to its files: progress on the terminal, signals, and what was measured on the disk."""

from __future__ import annotations

import pathlib
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .harness import Row, run
from .machine import measure_machine
from .page import make_page
from .peers import Peer
from .report import Report, write_whole
from .workload import Case

WRITE_SECONDS = 2  # what was measured is on the disk at most so much later
COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


@contextmanager
def sigterm_as_interrupt() -> Iterator[list[int]]:
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


def writable(folder: pathlib.Path, name: pathlib.Path, option: str) -> None:
    """A path that cannot be written is found out before the work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise click.BadParameter(f"{name}: {error.strerror}", param_hint=option) from None


def conduct(
    report: Report,
    cases: Sequence[Case],
    directions: Sequence[str],
    peers: Sequence[Peer],
    path: pathlib.Path,
    until: float | None = None,
) -> None:
    """Measure the cases into `report`, and write it to `path` and, as a page, beside it. `until`: as of `run`."""
    device = report.settings.device
    if device != "cpu" and any(case.flops(d) for case in cases for d in case.directions if d in directions):
        report.machine = measure_machine(device, (case.dtype for case in cases))
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as bar, sigterm_as_interrupt() as caught:
        task = bar.add_task("", total=sum(d in directions for case in cases for d in case.directions))
        written = time.monotonic()

        def before(row: Row) -> None:
            bar.update(task, description=row.id)

        def after(rows: list[Row]) -> None:
            nonlocal written
            bar.advance(task)
            report.rows = rows
            if time.monotonic() - written > WRITE_SECONDS:
                report.write(path)
                written = time.monotonic()

        report.rows, stopped = run(
            cases, directions, peers, report.settings, before, after, report.machine, until=until
        )
    report.stopped_by = (caught or [int(signal.SIGINT)])[0] if stopped else None
    report.write(path)
    write_whole(path.with_suffix(".html"), make_page([report.to_json()]))
