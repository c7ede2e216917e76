"""``aeup train``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch

import aeup
from aeup.cli import out_of_memory, pick_device
from aeup.data import DataError
from aeup.decoder import UPSAMPLE
from aeup.models import MODELS
from aeup.train import CheckpointError, ConfigError, Interrupted, TrainingError, connect, make_config
from aeup.train import train as run
from aeup.train.checkpoint import load_last, one_line
from aeup.train.config import CHANGEABLE, SCHEDULES, parse_set
from aeup.train.distributed import World
from aeup.train.progress import describe

MODEL_OPTIONS = {"latent": "latent_dim", "upsample": "upsample"}  # option -> field of the model's configuration


def _options(model: str) -> str:
    fields = vars(MODELS[model].Config())
    return ", ".join(f"{k}={v}" for k, v in fields.items())


@click.command(epilog="Options of each model, for --set, with their defaults:\n\n" + "\n\n".join(
    f"{name}: {_options(name)}" for name in MODELS
))  # fmt: skip
@click.argument("model", type=click.Choice(sorted(MODELS)))
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with [train] and [model], or a config.json.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A field of the model or the run. Repeatable.")
@click.option("--data", help="mnist5k (default), fashion-mnist, scenes, or a path: an IDX file, an .npz or a folder.")
@click.option("--image-size", type=click.IntRange(1), help="Resample the images to this height and width.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images.  [default: 30]")
@click.option("--steps", type=click.IntRange(1), help="Training steps, instead of --epochs.")
@click.option("--batch-size", type=click.IntRange(1), help="Images in one step, over all devices.  [default: 64]")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Adam's peak learning rate.  [default: 0.003]")
@click.option("--warmup", type=click.IntRange(0), help="Steps of linear warm-up.  [default: 100]")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="After the warm-up.  [default: cosine]")
@click.option("--clip", type=click.FloatRange(0, min_open=True), help="Largest norm of the gradient.")
@click.option("--ema", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Decay of averaged weights.")
@click.option("--latent", type=click.IntRange(1), help="Length of the latent vector.  [default: 20]")
@click.option("--upsample", type=click.Choice(UPSAMPLE), help="How the decoder enlarges.  [default: nearest]")
@click.option("--seed", type=click.IntRange(0), help="Of split, weights, order and noise.  [default: 0]")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/MODEL-DATE-TIME]")
@click.option("--resume", metavar="RUN", type=click.Path(path_type=Path), help="Go on with the run in this folder.")
@click.option("--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one, else cpu]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's choice]")
@click.option("--workers", type=click.IntRange(0), help="Processes that load a folder too large for the memory.")
@click.option("--memory", type=click.FloatRange(0), help="GiB up to which a folder is held in memory.  [default: 4.0]")
@click.option("--bf16/--no-bf16", default=None, help="Autocast to bfloat16.  [default: on a GPU only]")
@click.option("--channels-last/--no-channels-last", default=None, help="Memory layout.  [default: channels-last]")
@click.option("--graph/--no-graph", default=None, help="The step is one CUDA graph.  [default: on a GPU only]")
@click.option("--compile/--no-compile", default=None, help="torch.compile of the loss.  [default: no]")
@click.option("--tensorboard/--no-tensorboard", default=None, help="Event files.  [default: if it is installed]")
@click.pass_context
def train(
    ctx: click.Context,
    model: str,
    config: Path | None,
    sets: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    device: str | None,
    threads: int | None,
    **given: Any,
) -> None:
    """Train MODEL on images: losses, checkpoints and pictures go to one folder.

    The defaults are those of the vae; other models have some of their own. What is given here wins over --config.

    A stopped run goes on with: aeup train MODEL --resume RUN

    On many devices: torchrun --nproc-per-node=N -m aeup train MODEL ...
    """
    given = {k: v for k, v in given.items() if v is not None}
    if resume is not None:
        _check_resume({**given, **{k: v for k, v in (("config", config), ("set", sets), ("out", out)) if v}})
    if threads is not None:
        torch.set_num_threads(threads)
    world = World(torch.device("cpu"))
    try:
        with connect(pick_device(device)) as world:
            out = resume or out or Path("runs") / f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"
            out = world.from_first(out)
            if resume is not None:
                stored = load_last(resume)["model"]
                if stored != model:
                    raise click.UsageError(f"{resume} holds a run of {stored!r}, not {model!r}")
                rows = run(out=out, resume=True, device=world.device, **given)
            else:
                rows = run(_make(model, config, sets, given), out, device=world.device)
    except Interrupted as e:
        if world.first:
            start = "aeup" if world.size == 1 else f"torchrun --nproc-per-node={world.size} -m aeup"
            click.echo(f"{e}\ncontinue with: {start} train {model} --resume {out}", err=True)
        ctx.exit(128 + e.signum)
    except (DataError, CheckpointError, TrainingError, aeup.BackendError) as e:
        raise _failure(world, str(e)) from e
    except ConfigError as e:
        raise click.UsageError(str(e)) from e
    except OSError as e:
        raise _failure(world, f"{e.filename}: {e.strerror}" if e.filename else str(e)) from e
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        hint = "try a lower --batch-size or a smaller model"
        raise _failure(world, f"out of memory on {world.device}: {hint} ({one_line(e)})") from e
    if world.first:
        click.echo(f"validation: {describe(rows[-1]['validation'])}; pictures and checkpoints: {out}")


def _make(model: str, config: Path | None, sets: tuple[str, ...], given: dict[str, Any]) -> Any:
    chosen = parse_set(model, sets)
    options = chosen.pop("options")
    options |= {field: given.pop(option) for option, field in MODEL_OPTIONS.items() if option in given}
    if "image_size" in given:
        given["image_size"] = (given["image_size"],) * 2
    return make_config(model, config, **{**chosen, **given}, options=options)


def _check_resume(given: dict[str, Any]) -> None:
    if kept := [name for name in given if name not in CHANGEABLE]:
        flags = ", ".join("--" + name.replace("_", "-") for name in kept)
        raise click.UsageError(f"--resume takes the stored configuration; it cannot be combined with {flags}")


def _failure(world: World, message: str) -> click.ClickException:
    return click.ClickException(message if world.size == 1 else f"process {world.rank} of {world.size}: {message}")
