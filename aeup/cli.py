"""The command line: ``aeup train``, ``aeup sample``, ``aeup info``, ``aeup bench`` and others.

Exit codes: 2 wrong usage, 1 failure, 128 + the signal's number for a run that was stopped (130 Ctrl-C, 143 SIGTERM).
"""

from __future__ import annotations

import importlib
import platform

try:
    import click
except ImportError as e:
    raise SystemExit(f'aeup: the command line needs more packages ({e}): pip install "aeup[train]"') from e

import torch

import aeup
from aeup import _native, tuned

# Name -> the module that holds the command, and the extra that the module needs.
LAZY = {
    "train": ("aeup.cli_train", "train"),
    **dict.fromkeys(("sample", "reconstruct", "encode", "evaluate"), ("aeup.cli_apply", "train")),
    "bench": ("aeup.bench.cli", "bench"),
}


class Commands(click.Group):
    """Imports a command only when it is asked for: each needs packages that others do not."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LAZY])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in LAZY:
            return super().get_command(ctx, name)
        module, extra = LAZY[name]
        try:
            found = vars(importlib.import_module(module)).values()
        except ImportError as e:
            return _unavailable(name, f'not available ({e}): pip install "aeup[{extra}]"')
        return next(c for c in found if isinstance(c, click.Command) and c.name == name)


def _unavailable(name: str, reason: str) -> click.Command:
    @click.command(name, short_help=f"({reason})", context_settings={"ignore_unknown_options": True})
    @click.argument("rest", nargs=-1)
    def command(rest: tuple[str, ...]) -> None:
        raise click.ClickException(f"aeup {name} is {reason}")

    return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(aeup.__version__, prog_name="aeup")
def main() -> None:
    """aeup: fast, exact upsampling for PyTorch decoders."""


def pick_device(name: str | None) -> torch.device:
    """The value of ``--device``. Raises `click.BadParameter`."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise click.BadParameter(f"{name!r} is not a device", param_hint="--device") from e
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r}: allowed are cpu and cuda", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise click.BadParameter(f"{name!r}: this torch sees {found} CUDA devices", param_hint="--device")
    return device


def out_of_memory(e: BaseException) -> bool:
    """torch's CPU allocator says it by a plain RuntimeError, numpy by a MemoryError."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(e)


@main.command()
def info() -> None:
    """Versions, the device, and which backends are there or why they are not."""
    click.echo(f"aeup {aeup.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    for package in ("triton", "numpy"):
        click.echo(f"{package}: {_version(package)}")
    click.echo(f"extension: {_native.missing or _built()}")
    click.echo(f"cpu: {tuned.device_name(torch.device('cpu'))}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            click.echo(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        click.echo("cuda: no device")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        path = tuned.path_of(tuned.device_name(torch.device(device)))
        there = path is not None and path.is_file()
        note = path if there else "turned off" if path is None else "none of your own; aeup bench --tune makes it"
        click.echo(f"tuned table of this {device}: {note}")
    for device in devices:
        x = torch.empty(1, 1, 2, 2, device=device)
        click.echo(f"\na nearest x2 upsampling on {device}:")
        click.echo(str(aeup.explain(aeup.interpolate, x, scale_factor=2.0)))


def _built() -> str:
    found = _native.build_info()
    cuda = ", ".join(f"sm_{a.replace('.', '')}" for a in found["cuda"] or ())
    kernels = f"CUDA kernels for {cuda}" if cuda else "no CUDA kernels (nvcc was not found, or AEUP_CUDA=0)"
    return f"built with torch {found['torch']}; {found['machine']} kernels {', '.join(found['isas'])}; {kernels}"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
