"""The command line: ``aeup train``, ``aeup info``, ``aeup bench``.

Exit codes: 2 wrong usage, 1 failure, 128 + the signal's number for a run that was stopped (130 Ctrl-C, 143 SIGTERM).
"""

from __future__ import annotations

import importlib
import platform
import time
from pathlib import Path

try:
    import click
except ImportError as e:
    raise SystemExit(f'aeup: the command line needs more packages ({e}): pip install "aeup[train]"') from e

import torch

import aeup
from aeup.decoder import UPSAMPLE

MODEL_NAMES = ("ae", "vae")


class Commands(click.Group):
    """Imports ``bench`` only when it is asked for: it needs packages that training does not."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "bench"])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name != "bench":
            return super().get_command(ctx, name)
        try:
            return importlib.import_module("aeup.bench.cli").bench
        except ImportError as e:
            reason = f'not available ({e}): pip install "aeup[bench]"'
            return _unavailable("bench", reason)


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


@main.command()
@click.argument("model", type=click.Choice(MODEL_NAMES))
@click.option("--data", help="mnist5k (default), fashion-mnist, or the path of an IDX file, an .npz or a folder.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images.  [default: 30]")
@click.option("--batch-size", type=click.IntRange(1), help="Images in one step.  [default: 64]")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Adam's peak learning rate.  [default: 0.003]")
@click.option("--latent", type=click.IntRange(1), help="Length of the latent vector.  [default: 20]")
@click.option("--upsample", type=click.Choice(UPSAMPLE), help="How the decoder enlarges.  [default: nearest]")
@click.option("--seed", type=click.IntRange(0), help="Of split, weights, order and noise.  [default: 0]")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/MODEL-DATE-TIME]")
@click.option("--resume", metavar="RUN", type=click.Path(path_type=Path), help="Go on with the run in this folder.")
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one, else cpu]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's choice]")
@click.option("--bf16/--no-bf16", default=None, help="Autocast to bfloat16.  [default: on a GPU only]")
@click.option("--channels-last/--no-channels-last", default=None, help="Memory layout.  [default: on a GPU only]")
@click.pass_context
def train(
    ctx: click.Context,
    model: str,
    epochs: int | None,
    resume: Path | None,
    device: str | None,
    threads: int | None,
    **given: object,
) -> None:
    """Train MODEL (vae, ae) on images: losses, checkpoints and pictures go to one folder.

    A stopped run goes on with: aeup train MODEL --resume RUN
    """
    given = {k: v for k, v in given.items() if v is not None}
    if resume is not None and given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(f"--resume takes the stored configuration; it cannot be combined with {flags}")
    target = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        from aeup.data import DataError
        from aeup.train import CheckpointError, Interrupted, TrainConfig, TrainingError
        from aeup.train import train as run
        from aeup.train.checkpoint import load_state
    except ImportError as e:
        raise click.ClickException(f'training needs more packages ({e}): pip install "aeup[train]"') from e

    out = resume or given.pop("out", None) or Path("runs") / f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if resume is not None:
            stored = load_state(resume / "last.pt")["model"]
            if stored != model:
                raise click.UsageError(f"{resume} holds a run of {stored!r}, not {model!r}")
            rows = run(out=out, resume=True, epochs=epochs, device=target)
        else:
            on_gpu = target.type == "cuda"
            options = {n: given.pop(k) for k, n in (("latent", "latent_dim"), ("upsample", "upsample")) if k in given}
            settings = {"bf16": on_gpu, "channels_last": on_gpu, **given, "options": options}
            if epochs is not None:
                settings["epochs"] = epochs
            rows = run(TrainConfig(model=model, **settings), out, device=target)
    except Interrupted as e:
        click.echo(f"{e}\ncontinue with: aeup train {model} --resume {out}", err=True)
        ctx.exit(128 + e.signum)
    except torch.OutOfMemoryError as e:
        raise click.ClickException(f"out of memory on {target}: try a lower --batch-size ({e})") from e
    except (DataError, CheckpointError, TrainingError, aeup.BackendError) as e:
        raise click.ClickException(str(e)) from e
    except ValueError as e:
        raise click.UsageError(str(e)) from e
    except OSError as e:
        raise click.ClickException(f"{e.filename}: {e.strerror}" if e.filename else str(e)) from e
    last = rows[-1]["validation"]
    click.echo(
        "validation: " + ", ".join(f"{k} {v:.2f}" for k, v in last.items()) + f"; pictures and checkpoints: {out}"
    )


def _device(name: str | None) -> torch.device:
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


@main.command()
def info() -> None:
    """Versions, the device, and which backends are there or why they are not."""
    click.echo(f"aeup {aeup.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    for package in ("triton", "numpy"):
        click.echo(f"{package}: {_version(package)}")
    click.echo(f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            click.echo(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        click.echo("cuda: no device")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        x = torch.empty(1, 1, 2, 2, device=device)
        click.echo(f"\na nearest x2 upsampling on {device}:")
        click.echo(str(aeup.explain(aeup.interpolate, x, scale_factor=2.0)))


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
