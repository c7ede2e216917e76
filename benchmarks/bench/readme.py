"""README's section on speed, made from the runs that docs/bench holds: no figure in it is typed by hand."""

from __future__ import annotations

import json
import pathlib
import re
import textwrap
from collections.abc import Callable, Sequence

import click

from . import plots
from .digest import Digest, counts, digests, is_gpu, ratios, spread, subject, to_best, unmeasured, wrong
from .report import NOISY, read_run, write_whole

BEGIN, END = "<!-- written by aeup bench readme -->", "<!-- end of what aeup bench readme wrote -->"
STORE = pathlib.Path("docs") / "bench"
DIGITS = 5
WRONG = 3  # rows that are named
READING = """A ratio is a peer's time divided by aeup's: above 1 aeup is faster; losses are bold. Means are geometric.
The best peer is found anew for each row. Groups are sorted from the smallest mean. Every run is stored whole in
[docs/bench](docs/bench); `aeup bench page docs/bench/*.json` draws it, row by row."""


def rounded(value):
    """A run with floats of `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def store(run: dict, folder: pathlib.Path) -> pathlib.Path:
    """Write the run compactly into the folder, in place of an earlier one of the same kind and device."""
    device = re.sub(r"[^a-z0-9]+", "-", run["environment"]["device"].lower()).strip("-")
    path = folder / f"{run['kind']}-{device}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(rounded(run), separators=(",", ":"), allow_nan=False) + "\n")
    return path


def command(run: dict) -> str:
    """What measures it again."""
    options, settings = run["options"], run["method"]["settings"]
    if "minutes" in options:
        return f"aeup bench --device {run['environment']['device_type']} --minutes {options['minutes']:g}"
    words = ["aeup bench", run["kind"], "--device", run["environment"]["device_type"]]
    for plural, chosen in options.items():
        if isinstance(chosen, list):
            words += [f"--{plural.removesuffix('s')} {value}" for value in chosen]
    if options.get("backend", "auto") != "auto":
        words.append(f"--backend {options['backend']}")
    if options.get("compiled") is not None:
        words.append("--compiled" if options["compiled"] else "--no-compiled")
    if options.get("threads"):
        words.append(f"--threads {options['threads']}")
    if settings.get("clock", "wall") != "wall":
        words.append(f"--clock {settings['clock']}")
    words.append("--quick" if options.get("quick") else f"--min-time {settings['min_time']:g}")
    return " ".join(words)


def _ratio(x: float | None) -> str:
    return "" if x is None else plots.ratio(x) if x >= 1 else f"**{plots.ratio(x)}**"


def _table(run: dict) -> list[str]:
    columns: dict[str, Callable[[Digest], str]] = {
        "": lambda d: d.name,
        "rows": lambda d: str(d.rows),
        "of these slower": lambda d: f"**{d.losses}**" if d.losses else "0",
        "worst": lambda d: _ratio(to_best(d.worst)) if d.worst else "",
        "worst row": lambda d: f"`{d.worst['id']}`" if d.worst else "",
        "x torch": lambda d: _ratio(d.torch),
        "x best peer": lambda d: _ratio(d.best),
        "the same, device time": lambda d: _ratio(d.device),
        "of the limit": lambda d: "" if d.limit is None else f"{d.limit:.0%}",
    }
    groups = digests(run)
    if len({peer for row in run["rows"] for peer in ratios(row)}) == 1:
        del columns["x best peer"]
    kept = [name for name, cell in columns.items() if any(map(cell, groups))]
    left = [name in ("", "worst row") for name in kept]
    lines = [f"| {' | '.join(kept)} |", f"|{'|'.join('---' if text else '---:' for text in left)}|"]
    return lines + [f"| {' | '.join(columns[name](d) for name in kept)} |" for d in groups]


def _words(run: dict) -> str:
    """Where the figures come from and what they are."""
    env, whole, gpu = run["environment"], digests(run)[0], is_gpu(run)
    versions = [f"torch {env['torch']}", f"Triton {env['triton']}" if env.get("triton") else ""]
    versions += [f"CUDA {env['cuda']}", f"driver {env['driver']}"] if gpu else [f"threads: {env['threads']}"]
    commit = f"commit {env['commit'][:12]}" if env.get("commit") else "commit unknown"
    commit += " with changes" * bool(env.get("dirty")) + (f" ({env['note']})" if env.get("note") else "")
    lines = [f"Measured on {env['date'][:10]} with {', '.join(filter(None, versions))}; {commit}."]
    rows, bad, missing = len(run["rows"]), wrong(run), unmeasured(run)
    lines += [f"**Wrong: `{row['id']}` ({subject(row)['reason']}).**" for row in bad[:WRONG]]
    lines += [f"**Wrong too: {len(bad) - WRONG} more rows.**"] if len(bad) > WRONG else []
    lines += [f"**{missing[0].upper()}{missing[1:]}.**"] if missing else []
    lines += [f"Left out, since other programs took the CPU: {whole.busy} of {rows} rows."] if whole.busy else []
    noisy = sum(1 for row in run["rows"] if counts(row) and (spread(subject(row)) or 0) > NOISY)
    lines += [f"Noisy, with a spread above {NOISY:.0%}: {noisy} of {rows} rows."] if noisy else []
    if any("eager_us" in subject(row) for row in run["rows"]):
        lines.append("Times are those of calls one after another, with the host's.")
    elif gpu:
        lines.append("Times are those on the device.")
    elif run["method"]["settings"].get("clock") == "processor":
        lines.append("Times are the processor's, so that waiting for other programs is not in them.")
    if whole.limit is not None:
        floor = run["machine"] and any(row.get("flops") for row in run["rows"])
        limit = "set by the machine's measured rates" if floor else "the bandwidth of a copy of as many bytes"
        lines.append(f"The limit is {limit}.")
    return " ".join(lines)


def section(runs: Sequence[dict]) -> str:
    """Markdown, GPUs first."""
    devices = list(dict.fromkeys(run["environment"]["device"] for run in sorted(runs, key=lambda r: not is_gpu(r))))
    lines = [READING]
    for device in devices:
        here = [run for run in runs if run["environment"]["device"] == device]
        ratios_only = "" if is_gpu(here[0]) else " (a CPU that other programs use too: ratios only)"
        lines += ["", f"### {device}{ratios_only}"]
        for run in here:
            title = "Whole models" if run["kind"] == "models" else f"`aeup.{run['kind']}`"
            words = textwrap.fill(f"**{title}.** {_words(run)}", 120, break_long_words=False, break_on_hyphens=False)
            lines += ["", words, "", f"`{command(run)}`", "", *_table(run)]
    return "\n".join(lines)


def written(text: str, runs: Sequence[dict]) -> str:
    """The README `text` with its section made anew. Raises ValueError where it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{section(runs)}\n\n{end}{after}"


@click.command("readme")
@click.argument("runs", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
def write(runs: tuple[pathlib.Path, ...]) -> None:
    """Store runs in docs/bench and write README's section on speed anew, from all that are stored there.

    To be called in the repository's root."""
    path = pathlib.Path("README.md")
    try:
        found = [read_run(run) for run in runs]
        text = path.read_text()
        written(text, [])  # before anything is stored
        for run in found:
            store(run, STORE)
        write_whole(path, written(text, [read_run(stored) for stored in sorted(STORE.glob("*.json"))]))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
