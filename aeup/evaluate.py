"""Figures of a trained model on images: losses, log-likelihood, PSNR and SSIM, intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor | None]]]
Progress = Callable[[str, int], None]

BATCH = 250  # images at a time
NATS = ("negative_elbo", "kl", "cross_entropy", "discriminator", "generator")


@dataclass(frozen=True)
class Figure:
    """A mean over the images, in `unit`, and its standard error over them where each image has a value of its own.

    `value` is None where it could not be had; `note` says why.
    """

    value: float | None
    unit: str = ""
    error: float | None = None
    note: str = ""


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, *, samples: int = 0, seed: int = 0, progress: Progress = lambda what, done: None
) -> dict[str, Figure]:
    """Measures what a model can do (see `aeup.models.base.Model`).

    - every entry of ``model.validate``: losses; of a VAE the ELBO's terms; of an FCN mean IU and pixel accuracy;
    - ``log_likelihood``: the importance-weighted estimate of log p(x) with `samples` samples, if the model has one;
    - ``psnr`` and ``ssim`` of ``model.reconstruct``, each image's own and then the mean; of a denoiser also those of
      the corrupted images (``corrupted_psnr``..., clamped to [0, 1]) and of what it makes of them
      (``denoised_psnr``...).

    Args:
        model: in evaluation mode meanwhile.
        batches: ``batches(n)`` gives (images [<= n, C, H, W] in [0, 1], labels or None), on the model's device, and the
            same images each time.
        samples: K of the log-likelihood; 0 leaves it out.
        seed: of the noise; torch's random state is afterwards what it was.
        progress: called with what is measured and the images done.

    Returns:
        name -> `Figure`.

    Raises:
        ValueError: no images, missing labels, images of another shape than the model's, `samples` below 0.
    """
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    training = [m for m in model.modules() if m.training]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.eval()
        try:
            values = model.validate(_counted(_checked(model, batches(BATCH)), "losses", progress))
            figures = {name: Figure(value, unit(model, name)) for name, value in values.items()}
            if samples and hasattr(model, "log_likelihood"):
                what = f"log p(x), {samples} samples"
                parts = [model.log_likelihood(x, samples) for x, _ in _counted(batches(32), what, progress)]
                figures["log_likelihood"] = mean(torch.cat(parts), "nats")
            if hasattr(model, "reconstruct"):
                figures |= _pixels(model, _counted(batches(BATCH), "PSNR, SSIM", progress))
        finally:
            for m in training:
                m.training = True
    return figures


def unit(model: nn.Module, name: str) -> str:
    """Of an entry of the model's loss; "" where it is a sum of unlike things or a share."""
    if name == "reconstruction":
        return "squared grey levels" if getattr(model.config, "loss", None) == "squared" else "nats"
    return "nats" if name in NATS else ""


def check_images(model: nn.Module, shape: Iterable[int]) -> None:
    """Raises ValueError where images [..., C, H, W] do not fit what the model was trained for."""
    c, h, w = list(shape)[-3:]
    size = (h, w) if hasattr(model, "segment") else model.config.image_size  # fully convolutional: any size
    if (c, h, w) != (model.config.in_channels, *size):
        wanted = f"{size[0]}x{size[1]} with {_channels(model.config.in_channels)}"
        raise ValueError(f"this model {model.name!r} is for images of {wanted}, these are {h}x{w} with {_channels(c)}")


def _channels(c: int) -> str:
    return f"{c} channel{'s' if c != 1 else ''}"


def _checked(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for x, target in batches:
        check_images(model, x.shape)
        if model.targets and target is None:
            raise ValueError(f"the model {model.name!r} needs a label for each pixel, and these images have none")
        yield x, target


def _counted(batches: Iterable, what: str, progress: Progress) -> Iterator:
    done = 0
    for batch in batches:
        progress(what, done)
        yield batch
        done += len(batch[0])
    progress(what, done)


def _pixels(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, Figure]:
    measures = {"psnr": psnr, "ssim": ssim}
    values: dict[str, list[Tensor]] = {}
    figures: dict[str, Figure] = {}

    def compare(prefix: str, y: Tensor, x: Tensor) -> None:
        for name, measure in measures.items():
            if prefix + name in figures:
                continue
            try:
                values.setdefault(prefix + name, []).append(measure(y.to(x), x))
            except NotAvailable as e:
                figures[prefix + name] = Figure(None, note=str(e))

    for x, _ in batches:
        compare("", model.reconstruct(x), x)
        if hasattr(model, "corrupt"):
            noisy = model.corrupt(x)
            compare("corrupted_", noisy.clamp(0, 1), x)
            compare("denoised_", model.reconstruct(noisy), x)
    return {k: figures.get(k) or mean(torch.cat(v), "dB" if k.endswith("psnr") else "") for k, v in values.items()}


class NotAvailable(RuntimeError):
    """A figure that cannot be had here; the message says why."""


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image [N, C, H, W] in [0, 1], in dB, [N]; infinite where they are equal."""
    return -10 * (y.double() - x.double()).square().mean((1, 2, 3)).log10()


def ssim(y: Tensor, x: Tensor) -> Tensor:
    """Structural similarity of each image [N, C, H, W] in [0, 1], [N], by scikit-image on the CPU. Wang et al., IEEE
    TIP 13(4), 2004, with the paper's Gaussian window of 11x11 pixels, wherever it lies within the image; the mean over
    the channels. Raises `NotAvailable`."""
    if min(x.shape[2:]) < 11:
        raise NotAvailable("SSIM's window needs images of at least 11x11 pixels")
    try:
        from skimage.metrics import structural_similarity
    except ImportError as e:
        raise NotAvailable(f'scikit-image cannot be imported ({e}): pip install "aeup[train]"') from e
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(y.double().cpu().numpy(), x.double().cpu().numpy(), strict=True)
    values = [structural_similarity(a, b, data_range=1.0, channel_axis=0, **window) for a, b in pairs]
    return torch.tensor(values, dtype=torch.float64)


def mean(values: Tensor, unit: str) -> Figure:
    """The mean of values [N] and its standard error."""
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return Figure(values.mean().item(), unit, error)
