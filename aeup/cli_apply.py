"""``aeup sample``, ``reconstruct``, ``encode`` and ``evaluate``: a trained model at work.

RUN is a run's folder (then its ``best.safetensors``) or a ``.safetensors`` file. Images that are not given are the
run's own validation images. Exit codes: 2 wrong usage, 1 failure. No file is overwritten without ``--force``.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import aeup
from aeup.cli import out_of_memory, pick_device
from aeup.data import Batches, DataError, Folder, load
from aeup.data.batches import resample
from aeup.data.read import read_path
from aeup.evaluate import Figure, check_images, evaluate
from aeup.train import CheckpointError, load_model, pictures
from aeup.train.checkpoint import one_line, write_atomic
from aeup.train.latent import encode, interpolations, manifold, need_latents, traversals, write_scatter
from aeup.train.progress import title

PARTS = ("train", "validation", "all")
ROWS = 16  # dimensions that a picture of traversals shows


# --- the run and its images ---


@dataclass
class Run:
    """A trained model and how it was trained (the table "train" of its ``config.json``; empty without that file)."""

    path: Path  # the .safetensors file
    model: nn.Module
    device: torch.device
    train: dict[str, Any]

    @classmethod
    def open(cls, run: Path, device: torch.device) -> Run:
        path = run / "best.safetensors" if run.is_dir() else run
        config = path.parent / "config.json"
        try:
            train = json.loads(config.read_text(encoding="utf-8"))["train"] if config.exists() else {}
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{config}: not the configuration of a run ({type(e).__name__}: {e})") from e
        return cls(path, load_model(path, device), device, train)


@dataclass
class Images:
    """Images in a fixed order, with class labels and file names where there are any."""

    source: str
    part: str
    data: Batches
    labels: Tensor | None
    names: list[str] | None

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, n: int, index: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`n` at a time, all or those of `index`."""
        return self.data((torch.arange(len(self)) if index is None else index).split(n))

    def at(self, *index: int) -> tuple[Tensor, Tensor | None]:
        bad = [i for i in index if not 0 <= i < len(self)]
        if bad:
            raise click.UsageError(f"no image {bad[0]}: {self.source} ({self.part}) has 0 to {len(self) - 1}")
        return next(self.data([torch.tensor(index)]))


def choose(run: Run, data: str | None, part: str | None) -> Images:
    """The images of `data`, or of the run. Of another source than the run's: all, if no part is asked for."""
    given, own = data, run.train.get("data")
    data = data or own
    if data is None:
        raise click.UsageError(f"--data is needed: there is no config.json beside {run.path} that tells the images")
    part = part or ("validation" if given in (None, own) else "all")
    size = run.train.get("image_size")
    size = tuple(size) if size else None
    labels = target = None
    if part == "all" and Path(data).expanduser().exists():  # as they lie there, not split
        images, labels = read_path(data)
        if not isinstance(images, Folder):
            x = torch.from_numpy(np.ascontiguousarray(images)).to(run.device)
            images = resample(x.float() / 255 if x.dtype == torch.uint8 else x.float(), size)
        labels = None if labels is None else torch.from_numpy(labels)
    else:
        settings = {k: run.train[k] for k in ("seed", "validation") if k in run.train}
        whole = load(data, device=run.device, size=size, memory=0, **settings)
        names = ("train", "validation") if part == "all" else (part,)
        images, labels, target = (
            _joined([getattr(whole, name + kind) for name in names]) for kind in ("", "_labels", "_target")
        )
    files = [str(p) for p in images.paths] if isinstance(images, Folder) else None
    batches = Batches(images, target, run.device, size)
    try:
        check_images(run.model, batches.image_shape)
    except ValueError as e:
        raise DataError(f"{data}: {e}") from e
    return Images(data, part, batches, labels, files)


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


# --- options that the commands share ---


def _threads(ctx: click.Context, parameter: click.Parameter, threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _seed(ctx: click.Context, parameter: click.Parameter, seed: int) -> int:
    if seed >= 2**63:
        raise click.BadParameter(f"must be below 2**63, got {seed}")
    return seed


def common(command: Callable) -> Callable:
    for option in (
        click.option("--force", is_flag=True, help="Overwrite what is there."),
        click.option(
            "--seed", type=click.IntRange(0), default=0, show_default=True, callback=_seed, help="Of noise and samples."
        ),
        click.option("--threads", type=click.IntRange(1), expose_value=False, callback=_threads, help="CPU threads."),
        click.option(
            "--device",
            callback=lambda ctx, option, name: pick_device(name),
            help="cpu, cuda, ...  [default: cuda if there is one, else cpu]",
        ),
        click.argument("run", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


def images_from(command: Callable) -> Callable:
    part = "Which of them.  [default: validation; of --data from elsewhere: all]"
    for option in (
        click.option("--part", type=click.Choice(PARTS), help=part),
        click.option("--data", help="As of aeup train.  [default: the run's own]"),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def failures(device: torch.device) -> Iterator[None]:
    """What can go wrong with files, images and models ends with exit code 1 and one line."""
    try:
        with torch.no_grad():
            yield
    except (DataError, CheckpointError, aeup.BackendError, ValueError) as e:
        raise click.ClickException(str(e)) from e
    except OSError as e:
        raise click.ClickException(f"{e.filename}: {e.strerror}" if e.filename else str(e)) from e
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise click.ClickException(f"out of memory on {device} ({one_line(e)})") from e


def _free(path: Path, force: bool) -> Path:
    """`path`, if it may be written; its folder is made."""
    if path.exists() and not force:
        raise click.ClickException(f"{path} exists: choose another --out, or overwrite it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _save_npz(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


# --- the commands ---


@click.command()
@common
@click.option("-n", "--number", type=click.IntRange(1), default=64, show_default=True, help="How many images.")
@click.option("--columns", type=click.IntRange(1), default=8, show_default=True, help="Images in a row of the PNG.")
@click.option("--out", type=click.Path(path_type=Path), help="A .png or an .npz.  [default: RUN/pictures/samples.png]")
def sample(
    run: Path, device: torch.device, seed: int, force: bool, number: int, columns: int, out: Path | None
) -> None:
    """New images from the model in RUN.

    A grid in a .png, or the array "images", float32 [N, C, H, W] in [0, 1], in an .npz.
    """
    if out is not None and out.suffix not in (".png", ".npz"):
        raise click.BadParameter(f"{str(out)!r}: allowed are .png and .npz", param_hint="--out")
    with failures(device):
        opened = Run.open(run, device)
        if not hasattr(opened.model, "sample"):
            raise click.ClickException(f"{opened.path}: the model {opened.model.name!r} cannot make new images")
        out = _free(out or opened.path.parent / "pictures" / "samples.png", force)
        torch.manual_seed(seed)
        images = torch.cat([opened.model.sample(min(512, number - i)).float().cpu() for i in range(0, number, 512)])
        if out.suffix == ".npz":
            _save_npz(out, images=images.numpy())
        else:
            pictures.save_png(out, pictures.grid(images, min(columns, number)))
    click.echo(out)


@click.command()
@common
@images_from
@click.option("-n", "--number", type=click.IntRange(1), default=32, show_default=True, help="How many images.")
@click.option("--interpolate", type=(int, int), multiple=True, metavar="I J", help="From image I to image J.")
@click.option("--traverse", type=int, multiple=True, metavar="I", help="Each latent of image I, the others held.")
@click.option("--manifold", "plane", is_flag=True, help="The plane of a latent space with two dimensions.")
@click.option("--scatter", is_flag=True, help="Latents of the images in the plane, coloured by class.")
@click.option("--steps", type=click.IntRange(2), help="Images in a row of these.  [default: 12; manifold: 20]")
@click.option("--out", type=click.Path(path_type=Path), help="A folder.  [default: RUN/pictures]")
def reconstruct(
    run: Path,
    device: torch.device,
    seed: int,
    force: bool,
    data: str | None,
    part: str | None,
    number: int,
    interpolate: tuple[tuple[int, int], ...],
    traverse: tuple[int, ...],
    plane: bool,
    scatter: bool,
    steps: int | None,
    out: Path | None,
) -> None:
    """Pictures of what the model in RUN makes of images.

    They are .png files in one folder. Without the options for the latent space: originals and reconstructions; of a
    denoiser also clean, corrupted and denoised; of an FCN image, truth and prediction. Images are numbered from 0, in
    the order of the data.
    """
    latents = bool(interpolate or traverse or plane or scatter)
    with failures(device):
        opened = Run.open(run, device)
        model = opened.model
        if latents:
            need_latents(model)
        elif not hasattr(model, "reconstruct") and not hasattr(model, "segment"):
            raise click.ClickException(f"{opened.path}: the model {model.name!r} takes no images; try aeup sample")
        out = out or opened.path.parent / "pictures"
        jobs: dict[str, Callable[[Path], None]] = {}
        images = choose(opened, data, part) if interpolate or traverse or scatter or not latents else None
        torch.manual_seed(seed)

        def grid(picture: Tensor, columns: int) -> Callable[[Path], None]:
            return lambda path: pictures.save_png(path, pictures.grid(picture, columns))

        for i, j in interpolate:
            x, _ = images.at(i, j)
            jobs[f"interpolation-{i}-{j}.png"] = grid(interpolations(model, *x, steps or 12), (steps or 12) + 2)
        if traverse or scatter:
            parts = [encode(model, x) for x, _ in images.batches(512)]
            z = torch.cat([mean for mean, _ in parts])
            prior = parts[0][1] is not None
        for i in traverse:
            images.at(i)
            # Of a VAE three standard deviations of the prior, else where the codes of the images are.
            low, high = (-3.0, 3.0) if prior else z[:10000].cpu().quantile(torch.tensor([0.01, 0.99]), dim=0)
            # The dimensions that tell the images apart: the others change nothing in the picture.
            chosen = z.var(0, correction=0).topk(min(ROWS, z.shape[1])).indices.sort().values.tolist()
            picture = traversals(model, z[i], low, high, steps or 12, chosen)
            jobs[f"traversals-{i}.png"] = grid(picture, steps or 12)
        if plane:
            if not hasattr(model, "sample"):
                raise click.ClickException(
                    f"{opened.path}: the model {model.name!r} has no prior whose plane could be drawn"
                )
            jobs["manifold.png"] = grid(manifold(model, steps or 20), steps or 20)
        if scatter:
            jobs["scatter.png"] = lambda path: write_scatter(path, z, images.labels)
        if not latents:
            x, target = images.at(*range(min(number, len(images))))
            for name, picture in pictures.draw(model, x, target, seed).items():
                if name in ("reconstructions", "denoising", "segmentation"):
                    jobs[f"{name}.png"] = lambda path, picture=picture: pictures.save_png(path, picture)
        paths = {name: _free(out / name, force) for name in jobs}
        for name, job in jobs.items():
            job(paths[name])
            click.echo(paths[name])


@click.command("encode")
@common
@images_from
@click.option("--out", type=click.Path(path_type=Path), help="An .npz.  [default: RUN/latents.npz]")
def encode_command(
    run: Path, device: torch.device, seed: int, force: bool, data: str | None, part: str | None, out: Path | None
) -> None:
    """Latent vectors of images, from the model in RUN.

    Arrays of an .npz: latents [N, D] (of a VAE the means), log_variances [N, D] (of a VAE), labels [N] and names [N]
    (the files of a folder), where there are any. N is in the order of the data.
    """
    if out is not None and out.suffix != ".npz":
        raise click.BadParameter(f"{str(out)!r}: allowed is .npz", param_hint="--out")
    with failures(device):
        opened = Run.open(run, device)
        need_latents(opened.model)
        out = _free(out or opened.path.parent / "latents.npz", force)
        images = choose(opened, data, part)
        torch.manual_seed(seed)
        with bar(len(images)) as progress:
            parts = []
            for x, _ in images.batches(512):
                progress("encoded", sum(len(z) for z, _ in parts))
                parts.append(encode(opened.model, x))
        arrays = {"latents": torch.cat([z for z, _ in parts])}
        if parts[0][1] is not None:
            arrays["log_variances"] = torch.cat([v for _, v in parts])
        if images.labels is not None:
            arrays["labels"] = images.labels
        arrays = {name: value.cpu().numpy() for name, value in arrays.items()}
        if images.names is not None:
            arrays["names"] = np.array(images.names)
        _save_npz(out, **arrays)
    click.echo(f"{out}: " + ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items()))


@click.command("evaluate")
@common
@images_from
@click.option("-n", "--number", type=click.IntRange(1), help="How many images, evenly spaced.  [default: all]")
@click.option(
    "--samples", type=click.IntRange(0), default=100, show_default=True,
    help="K of the importance-weighted log-likelihood; 0 leaves it out.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="A .json.  [default: RUN/evaluate.json]")
def evaluate_command(
    run: Path,
    device: torch.device,
    seed: int,
    force: bool,
    data: str | None,
    part: str | None,
    number: int | None,
    samples: int,
    out: Path | None,
) -> None:
    """Figures of the model in RUN on images.

    Its losses (of a VAE the terms of the ELBO), log p(x) by importance sampling, PSNR and SSIM of reconstructions, mean
    IU and pixel accuracy of segmentations. Printed, with standard errors, and written to a .json.
    """
    with failures(device):
        opened = Run.open(run, device)
        out = _free(out or opened.path.parent / "evaluate.json", force)
        images = choose(opened, data, part)
        n = min(number or len(images), len(images))
        index = torch.arange(n) * len(images) // n
        with bar(n) as progress:
            batches = partial(images.batches, index=index)
            figures = evaluate(opened.model, batches, samples=samples, seed=seed, progress=progress)
        about = {
            "model": opened.model.name,
            "checkpoint": opened.path.name,
            "data": images.source,
            "part": images.part,
            "images": n,
            "samples": samples if "log_likelihood" in figures else None,
            "seed": seed,
            "figures": {name: _json(figure) for name, figure in figures.items()},
        }
        click.echo(f"{opened.model.name}, {n:,} image{'s'[n == 1 :]} of {images.source} ({images.part})")
        click.echo("\n".join(table(figures, samples)))
        write_atomic(out, (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())
    click.echo(out)


def _json(figure: Figure) -> dict[str, Any]:
    value, note = figure.value, figure.note
    if value is not None and not math.isfinite(value):
        value, note = None, str(value)
    error = figure.error if figure.error is not None and math.isfinite(figure.error) else None
    return {"value": value, "error": error, "unit": figure.unit, "note": note}


def table(figures: dict[str, Figure], samples: int) -> list[str]:
    """One line a figure: name, mean, standard error, unit; or why it is missing."""
    titles = {name: title(name) for name in figures}
    titles["log_likelihood"] = f"log p(x), {samples} samples"
    width = max(len(titles[name]) for name in figures)
    lines = []
    for name, f in figures.items():
        value = f"{f.value:>12.4f}" if f.value is not None else f"{'-':>12}"
        error = f"± {f.error:.4f}" if f.error is not None else ""
        lines.append(f"{titles[name]:<{width}}  {value}  {error:<12}  {f.unit or f.note}".rstrip())
    return lines


@contextlib.contextmanager
def bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on stderr, where that is a terminal; the function that it gives takes a name and a count."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda what, done: progress.update(task, description=what, completed=done)
