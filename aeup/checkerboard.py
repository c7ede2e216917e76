"""Checkerboard artefacts: how unevenly a layer covers its output, and how much of an image repeats with its stride.

A. Odena, V. Dumoulin and C. Olah, Deconvolution and Checkerboard Artifacts, Distill 2016, doi 10.23915/distill.00003: a
transposed convolution whose kernel is no multiple of its stride reaches some pixels with more taps than others; a
resize-convolution reaches all alike. The spectrum is that of R. Durall, M. Keuper and J. Keuper, Watch your
Up-Convolution, arXiv 2003.01826, section 3.1: power summed over all directions at each radial frequency.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, normalization

__all__ = ["Checkerboard", "checkerboard"]

SIZE = 16  # height and width of the map that a module is tried on
# The sums over channels and space of these layers are what makes the overlap; all else is left out of the count.
COUNTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
LEFT_OUT = tuple(
    getattr(module, name)
    for module in (activation, batchnorm, dropout, instancenorm, normalization)
    for name in module.__all__
    if name != "MultiheadAttention"
)


@dataclass(frozen=True, eq=False, repr=False)
class Checkerboard:
    """What `checkerboard` found. ``print`` it.

    Attributes:
        stride: (sH, sW), the period looked for, in pixels.
        overlap: float64 [H, W]: the taps that reach each output pixel; through several layers, the paths. ``None`` for
            an image, and for a module with weights other than those of convolutions and linear layers.
        cell: float64 [sH, sW]: one period of the overlap, from the middle of the map. All equal: no checkerboard.
        image: float32 [N, C, H, W]: the image, or the module's output without its borders; ``None`` for a kernel size.
        frequency: float64 [B]: radial frequencies from 0 to sqrt(1/2), in cycles per pixel.
        spectrum: float64 [B]: shares of the image's power without its mean, summed over directions; they add up to 1,
            or are all 0 for a constant image. Mean over N and C.
        energy: the share of that power at multiples of 1/stride: what repeats with the stride and is no mean.
        noise: the share that white noise of this size has there.
    """

    stride: tuple[int, int]
    overlap: Tensor | None = None
    image: Tensor | None = None
    frequency: Tensor | None = None
    spectrum: Tensor | None = None
    energy: float | None = None
    noise: float | None = None

    @property
    def cell(self) -> Tensor | None:
        if self.overlap is None:
            return None
        (h, w), (sh, sw) = self.overlap.shape, self.stride
        top, left = h // 2 // sh * sh, w // 2 // sw * sw  # so that row 0 of the cell is phase 0 of the output
        return self.overlap[top : top + sh, left : left + sw]

    def __repr__(self) -> str:
        lines = [f"checkerboard of period {self.stride[0]}x{self.stride[1]} pixels"]
        if self.overlap is not None:
            low, high = self.cell.min().item(), self.cell.max().item()
            even = math.isclose(low, high, rel_tol=1e-9)
            text = "flat" if even else f"uneven, {low:g} to {high:g}"
            rows = " | ".join(" ".join(f"{v:g}" for v in row) for row in self.cell[:6, :6].tolist())
            more = " ..." if max(self.cell.shape) > 6 else ""
            lines.append(f"overlap: {text}; one period: {rows}{more}")
        elif self.image is not None:
            lines.append("overlap: not counted")
        if self.energy is not None:
            lines.append(f"energy at multiples of 1/stride: {self.energy:.3%} (white noise: {self.noise:.3%})")
        return "\n".join(lines)


@torch.no_grad()
def checkerboard(
    module_or_image: nn.Module | Tensor | int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    *,
    input: Tensor | None = None,
) -> Checkerboard:
    """The overlap map of an upsampling layer, and the energy of its output, or of an image, at multiples of 1/stride.

    Args:
        module_or_image: a module that enlarges (``ConvTranspose2d``, ``UpsampleConv2d``, ``nn.Sequential`` of them, a
            decoder): both. An image [H, W], [C, H, W] or [N, C, H, W]: the energy. A kernel size, an int or (kH, kW):
            the overlap of a transposed convolution with this kernel and ``stride``.
        stride: the period in pixels, an int or (sH, sW). By default a module's enlargement.
        input: what the module is run on; by default ones, so that all that is not constant was made by the module
            itself. Needed for modules whose first layer is no convolution and no linear layer.

    A module's output is measured in evaluation mode, and without a quarter at each border, where padding and not the
    stride makes the difference. In the overlap each convolution's weights are ones (divided by the number of channels
    that it sums), without bias, norm and activation modules; functions called in ``forward`` stay.

    Returns:
        `Checkerboard`.

    Raises:
        TypeError: `module_or_image`, `stride` or `input` of another type.
        ValueError: a stride below 1, missing, or too large for the image; an image of another rank; an input that is
            needed and missing.
    """
    if stride is not None:
        stride = _pair("stride", stride)
    if isinstance(module_or_image, nn.Module):
        return _of_module(module_or_image, stride, input)
    if input is not None:
        raise ValueError("input is for a module only")
    if stride is None:
        raise ValueError("stride must be given for an image or a kernel size")
    if isinstance(module_or_image, Tensor):
        return Checkerboard(stride, **_energy(_as_images(module_or_image), stride))
    if isinstance(module_or_image, (int, tuple, list)):
        kernel = _pair("the kernel size", module_or_image)
        size = [max(SIZE, 3 * k) for k in kernel]
        ones = torch.ones(1, 1, *size, dtype=torch.float64, device="cpu")
        return Checkerboard(stride, F.conv_transpose2d(ones, ones.new_ones(1, 1, *kernel), stride=stride)[0, 0])
    raise TypeError(f"module_or_image must be a module, a tensor or a kernel size, got {module_or_image!r}")


def _of_module(module: nn.Module, stride: tuple[int, int] | None, input: Tensor | None) -> Checkerboard:
    if input is None:
        input = _ones(module)
    elif not isinstance(input, Tensor) or not input.is_floating_point():
        raise TypeError(f"input must be a tensor of floats, got {input!r}")
    # In float64, and judged at float32: where channels cancel, what float32 rounds away looks like a pattern.
    y = copy.deepcopy(module).double().eval()(input.double())
    if not isinstance(y, Tensor) or y.dim() != 4:
        raise ValueError(f"the module must give images [N, C, H, W], got {getattr(y, 'shape', type(y))}")
    if stride is None:
        stride = _enlargement(module, input, y)
    size = y.shape[2:]
    # Borders of a quarter, but never so much that less than two periods are left.
    border = [max(0, min(n // 4, (n - 2 * s) // 2)) for n, s in zip(size, stride, strict=True)]
    middle = y[..., border[0] : size[0] - border[0], border[1] : size[1] - border[1]]
    return Checkerboard(stride, _overlap(module, input), **_energy(_as_images(middle), stride, torch.float32))


def _ones(module: nn.Module) -> Tensor:
    """Ones that fit the module's first layer."""
    first = next((m for m in module.modules() if isinstance(m, COUNTED)), None)
    if first is None:
        raise ValueError(f"input must be given: {type(module).__name__} has no convolution and no linear layer")
    if isinstance(first, nn.Linear):
        shape = [1, first.in_features]
    else:
        sizes = getattr(module, "sizes", None)  # of a decoder with a fixed size
        shape = [1, first.in_channels, *(sizes[0] if sizes else (SIZE, SIZE))]
    return torch.ones(shape, dtype=first.weight.dtype, device=first.weight.device)


def _enlargement(module: nn.Module, input: Tensor, output: Tensor) -> tuple[int, int]:
    start = input.shape[2:] if input.dim() == 4 else (getattr(module, "sizes", None) or [()])[0]
    if len(start) != 2:
        raise ValueError("stride must be given: this module's input has no height and width")
    return tuple(max(1, round(o / i)) for o, i in zip(output.shape[2:], start, strict=True))


def _overlap(module: nn.Module, input: Tensor) -> Tensor | None:
    """Paths to each output pixel [H, W] of the first channel, with weights of one on a copy of the module."""
    holder = nn.Sequential(copy.deepcopy(module)).double().eval()
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LEFT_OUT):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, (*COUNTED, conv._ConvNd)):
                if not isinstance(child, COUNTED) or not {n for n, _ in child.named_parameters()} <= {"weight", "bias"}:
                    return None  # a 1-D or 3-D convolution, or a weight that is made of others (spectral norm)
                summed = child.in_features if isinstance(child, nn.Linear) else child.in_channels // child.groups
                nn.init.constant_(child.weight, 1 / summed)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            elif next(child.parameters(recurse=False), None) is not None:
                return None
        if isinstance(getattr(parent, "activation", None), (str, tuple)):
            parent.activation = None
    return holder(torch.ones_like(input, dtype=torch.float64))[0, 0].cpu()


def _energy(images: Tensor, stride: tuple[int, int], exact_to: torch.dtype | None = None) -> dict[str, object]:
    """Spectrum and lattice energy of [N, C, H, W], cut to whole periods so that k/stride are frequencies of the DFT.
    A variation below the rounding of `exact_to` (default: the images' dtype) is none."""
    h, w = (n // s * s for n, s in zip(images.shape[2:], stride, strict=True))
    if min(h // stride[0], w // stride[1]) < 2:
        raise ValueError(
            f"stride {stride} is too large for images of {images.shape[2]}x{images.shape[3]}: give 2 periods"
        )
    images = images[..., :h, :w]
    x = images.double()
    # Rounding of a constant image must not look like a pattern.
    scale = x.abs().amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    power = torch.fft.fft2((x - x.mean((2, 3), keepdim=True)) / scale).abs().square() / (h * w) ** 2
    power[..., 0, 0] = 0
    total = power.sum((2, 3), keepdim=True)
    resolution = 4 * torch.finfo(exact_to or images.dtype).eps
    share = torch.where(total > resolution**2, power / total, 0.0).mean((0, 1)).cpu()
    on_cpu = {"dtype": torch.float64, "device": "cpu"}
    u, v = torch.fft.fftfreq(h, **on_cpu), torch.fft.fftfreq(w, **on_cpu)
    radius = torch.hypot(u[:, None], v)
    size = min(h, w)
    bins = math.ceil(math.sqrt(0.5) * size) + 1
    spectrum = torch.zeros(bins, **on_cpu)
    spectrum.index_add_(0, (radius * size).round().long().flatten(), share.flatten())
    return {
        "image": images.float(),
        "frequency": torch.arange(bins, **on_cpu) / size,
        "spectrum": spectrum,
        "energy": share[:: h // stride[0], :: w // stride[1]].sum().item(),
        "noise": (stride[0] * stride[1] - 1) / (h * w - 1),
    }


def _as_images(image: Tensor) -> Tensor:
    if image.dim() not in (2, 3, 4) or image.numel() == 0:
        raise ValueError(f"an image must be [H, W], [C, H, W] or [N, C, H, W] and not empty, got {list(image.shape)}")
    if image.is_complex():
        raise TypeError(f"an image must be real, got {image.dtype}")
    image = image.detach()
    image = image.reshape((1,) * (4 - image.dim()) + tuple(image.shape))
    return image if image.is_floating_point() else image.float()


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return pair
