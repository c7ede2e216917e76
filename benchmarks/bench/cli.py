"""`aeup bench`: is aeup right, and how fast is it beside its peers on the device at hand?"""

from __future__ import annotations

import pathlib
import signal
import time

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import Progress

from . import conv2d, conv_transpose2d, interpolate, models, readme, upsample_conv2d
from . import tune as tuning
from .compare import against
from .everything import measure_everything
from .harness import Settings
from .machine import environment
from .page import make_page
from .peers import BACKENDS, available
from .report import Report, read_run, write_whole
from .session import COLUMNS, conduct, sigterm_as_interrupt, writable
from .timing import CLOCKS
from .workload import Operator

OPERATORS: tuple[Operator, ...] = (
    interpolate.OPERATOR,
    conv_transpose2d.OPERATOR,
    upsample_conv2d.OPERATOR,
    conv2d.OPERATOR,
    models.OPERATOR,
)
RUNS = pathlib.Path("runs") / "bench"
AXES_HELP = {
    "set": "Workloads: main (default) or those of real models. Repeatable, as are the other filters.",
    "shape": "Only these shapes.",
    "mode": "Only these modes.",
    "dtype": "Only these dtypes; default: those that matter on the device.",
    "layout": "Only this layout.",
    "direction": "Only this direction.",
}


class _Bench(click.Group):
    """`aeup bench --tune` is `aeup bench tune`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["tune", *args[1:]] if args[:1] == ["--tune"] else args)


@click.group(cls=_Bench, invoke_without_command=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=9, show_default=True, help="At most.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's.")
@click.option("--out", type=click.Path(file_okay=False, path_type=pathlib.Path), default=RUNS, show_default=True)
@click.pass_context
def bench(ctx: click.Context, device: str, minutes: float, threads: int | None, out: pathlib.Path) -> None:
    """Measure aeup against its peers; every result is checked before it is timed.

    Without a command: every op and whole models, as many of their shapes as the minutes allow, chosen at random. Prints
    a summary and writes a JSON file for each and one page into the folder --out. Exit code 1 if a result is wrong, 130
    or 143 if stopped (Ctrl-C, SIGTERM); what was measured is kept. The options are for this."""
    if ctx.invoked_subcommand is None:
        torch.set_num_threads(threads or torch.get_num_threads())
        console = Console()
        console = console if console.is_terminal else Console(width=140)
        raise SystemExit(measure_everything(OPERATORS, _device(device), minutes, out, console))
    given = [p.opts[0] for p in ctx.command.params if ctx.get_parameter_source(p.name) is ParameterSource.COMMANDLINE]
    if given:
        raise click.UsageError(f"{', '.join(given)} before {ctx.invoked_subcommand}: put a command's options after it")


class _Percent(click.ParamType):
    """ "5%" or "5" as 0.05."""

    name = "percent"

    def convert(self, value, param, ctx) -> float:
        try:
            found = float(str(value).strip().removesuffix("%")) / 100
        except ValueError:
            found = -1.0
        if not 0 <= found < float("inf"):
            self.fail(f"expected a percentage of at least 0, such as 5%; got {value!r}", param, ctx)
        return found


PERCENT = _Percent()


def _many(option: str, values):
    return click.option(f"--{option}", f"{option}s", multiple=True, type=click.Choice(values), help=AXES_HELP[option])


def _options(operator: Operator):
    """The options that all operators share, and the operator's filters."""
    options = [
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        *(_many(axis, tuple(values)) for axis, values in operator.axes.items()),
        _many("direction", operator.directions),
        click.option(
            "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="aeup's, forced."
        ),
        click.option("--compiled/--no-compiled", default=None, help="Also torch.compile; default: on a GPU (slow)."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's."),
        click.option("--min-time", type=click.FloatRange(0, min_open=True), help="Seconds for each peer and row."),
        click.option(
            "--clock",
            type=click.Choice(tuple(CLOCKS)),
            default="wall",
            show_default=True,
            help="processor: the time of one CPU thread (--threads 1), where other programs keep the CPUs busy.",
        ),
        click.option("--retries", type=click.IntRange(0), default=1, show_default=True, help="Of a disturbed CPU row."),
        click.option(
            "--quick", is_flag=True, help=f"Only {', '.join(operator.quick)}, few samples: a look, not a result."
        ),
        click.option(
            "--compare",
            type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
            help="An earlier run's JSON: show what became slower.",
        ),
        click.option("--fail-if-slower", type=PERCENT, help="With --compare: exit code 1 if a row is; 5% or so."),
        click.option(
            "--json", "json_path", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Where to write."
        ),
    ]

    def decorate(fn):
        for option in reversed(options):
            fn = option(fn)
        return fn

    return decorate


def _command(operator: Operator) -> click.Command:
    @bench.command(
        operator.name,
        help=f"""Measure {operator.what} against torch.

        Prints a table, losses first, and writes JSON (default: runs/bench/{operator.name}-DEVICE.json) and a page with
        plots beside it. Exit code 1 if a result of aeup is wrong, a row slower than --fail-if-slower allows, or nothing
        was measured, 130 or 143 if stopped (Ctrl-C, SIGTERM); what was measured is kept.""",
    )
    @_options(operator)
    def command(**options) -> None:
        raise SystemExit(_measure(operator, **options))

    return command


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this torch sees no CUDA device", param_hint="--device")
    return name


def _measure(
    operator: Operator,
    device,
    directions,
    backend,
    compiled,
    threads,
    min_time,
    clock,
    retries,
    quick,
    compare,
    fail_if_slower,
    json_path,
    **filters,
) -> int:
    device = _device(device)
    if clock != "wall" and (device != "cpu" or threads != 1):
        raise click.BadParameter("the processor's time is measured with --device cpu --threads 1", param_hint="--clock")
    if quick and not filters["shapes"]:
        filters["shapes"] = operator.quick
    try:
        cases = operator.cases(device, **filters)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    chosen = [d for d in operator.directions if not directions or d in directions]
    count = sum(d in chosen for case in cases for d in case.directions)
    if not count:
        filters = ", ".join(map("--{}".format, (*operator.axes, "direction")))
        raise click.UsageError(f"no row is left: the filters {filters} exclude each other")
    min_time = min_time or (0.03 if quick else operator.min_time[device])
    rounds = {"min_rounds": 3} if quick else {}
    settings = Settings(device, min_time, retries=retries, eager=operator.eager, clock=clock, **rounds)
    torch.set_num_threads(threads or torch.get_num_threads())
    peers, gaps = available(operator, device, device != "cpu" if compiled is None else compiled, backend)
    path = json_path or RUNS / f"{operator.name}-{device}.json"
    options = filters | dict(directions=directions, backend=backend, retries=retries)
    options |= dict(compiled=compiled, threads=threads, min_time=min_time, clock=clock, quick=quick)
    report = Report(operator, [], environment(device), gaps, settings, options)
    if fail_if_slower is not None and compare is None:
        raise click.UsageError("--fail-if-slower needs --compare OLD.json")
    if compare:
        try:
            old = read_run(compare)
            report.comparison = against(old, str(compare), operator.name, report.environment, fail_if_slower)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--compare") from None
    started = time.monotonic()
    writable(path.parent, path, "--json")
    conduct(report, cases, chosen, peers, path)
    console = Console()
    if not console.is_terminal:
        console = Console(width=260 if report.eager else 160)
    report.render(console)
    console.print(f"{time.monotonic() - started:.0f} s, written to {path} and .html", soft_wrap=True, highlight=False)
    return report.exit_code()


for _operator in OPERATORS:
    _command(_operator)


@bench.command()
@click.argument("runs", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=pathlib.Path), default=RUNS / "report.html")
def page(runs: tuple[pathlib.Path, ...], out: pathlib.Path) -> None:
    """Write one page of several runs (default: the JSON files in runs/bench)."""
    runs = runs or tuple(sorted(RUNS.glob("*.json")))
    if not runs:
        raise click.UsageError(f"{RUNS} has no JSON file: measure first, or name the files")
    try:
        text = make_page([read_run(path) for path in runs])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="RUNS") from None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
    except OSError as error:
        raise click.BadParameter(f"{out}: {error.strerror}", param_hint="--out") from None
    click.echo(f"written to {out}")


@bench.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--op", "ops", multiple=True, type=click.Choice([o.name for o in tuning.OPERATORS]), help="Only these.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=15, show_default=True, help="At most.")
@click.option("--min-time", type=click.FloatRange(0, min_open=True), help="Seconds for each backend and call.")
@click.option("--fresh", is_flag=True, help="Measure again what an earlier run has measured.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's.")
def tune(device, ops, minutes, min_time, fresh, threads) -> None:
    """Search the fastest backend for each class of calls, and sizes for the Triton kernels, on this device.

    Writes the table that backend "auto" reads: $AEUP_TUNED/DEVICE.json, by default in ~/.cache/aeup/tuned. A second run
    goes on where the first one ended. Exit code 1 if a result is wrong, 130 or 143 if stopped (Ctrl-C, SIGTERM); what
    was measured is kept. The same as: aeup bench --tune."""
    torch.set_num_threads(threads or torch.get_num_threads())
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress, sigterm_as_interrupt() as caught:
        bar = progress.add_task("planning", total=None)

        def step(name: str, done: int, total: int) -> None:
            progress.update(bar, description=name, completed=done, total=total)

        try:
            table, path, left = tuning.tune(_device(device), ops, minutes, min_time, fresh, step)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        except OSError as error:
            raise click.ClickException(f"the tuned table cannot be written: {error}") from None
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    table.render(console)
    console.print(*filter(None, (left and f"{left};", f"written to {path}")), soft_wrap=True, highlight=False)
    stopped = (caught or [int(signal.SIGINT)])[0] if left == "stopped" else 0
    raise SystemExit(128 + stopped if stopped else int(bool(table.wrong())))


bench.add_command(readme.write)

if __name__ == "__main__":
    bench()
