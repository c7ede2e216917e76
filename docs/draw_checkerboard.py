"""Draws docs/checkerboard.png: a transposed convolution (kernel 3, stride 2) against a resize-convolution, both at
initialisation, after A. Odena, V. Dumoulin and C. Olah, Distill 2016. Needs matplotlib.
"""

import re
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import aeup
from aeup.checkerboard import checkerboard

WIDTHS = (64, 64, 64, 3)
START = 12  # pixels; three layers of stride 2 make 96
COLOURS = ("#c44e52", "#4c72b0")
INK = "#333333"


def transposed(c_in: int, c_out: int) -> nn.Module:
    return aeup.ConvTranspose2d(c_in, c_out, 3, stride=2, padding=1, output_padding=1)


def resized(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(aeup.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c_in, c_out, 3, padding=1))


def network(layer) -> nn.Module:
    """Three layers with the usual initialisation of weights for ReLU."""
    layers = []
    for c_in, c_out in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [layer(c_in, c_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in" if isinstance(module, nn.Conv2d) else "fan_out")
    return model


def as_picture(image: torch.Tensor) -> torch.Tensor:
    """[3, H, W] -> [H, W, 3] in [0, 1]: each channel stretched to the same spread around mid-grey."""
    z = (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True)
    return (0.5 + 0.18 * z).clamp(0, 1).permute(1, 2, 0)


def draw() -> Figure:
    torch.manual_seed(0)
    # Smooth maps: what is rough in the output was made by the layers.
    smooth = aeup.interpolate(torch.randn(64, WIDTHS[0], 4, 4), size=(START, START), mode="bicubic")
    rows = [
        ("Transposed convolution, kernel 3, stride 2", transposed),
        ("Resize-convolution: nearest x2, kernel 3", resized),
    ]
    figure = Figure(figsize=(11, 7.2), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplot_mosaic("ABE;CDE", width_ratios=(1, 1, 1.25))
    for (title, layer), (left, right), colour in zip(rows, ("AB", "CD"), COLOURS, strict=True):
        model = network(layer)
        one, all_three = checkerboard(layer(1, 1), 2), checkerboard(model, 8, input=smooth)
        overlap = one.overlap[9:19, 9:19]
        axis = axes[left]
        axis.imshow(overlap, cmap="Blues", vmin=0, vmax=1.6 * overlap.max().item())
        for i, row in enumerate(overlap.tolist()):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:g}", ha="center", va="center", fontsize=9, color=INK)
        axis.set_title(f"{title}\none layer: taps that reach each pixel", fontsize=10, color=INK)
        axis = axes[right]
        axis.imshow(as_picture(all_three.image[1]), interpolation="nearest")
        axis.set_title("three layers at initialisation,\nsmooth maps in, middle of the output", fontsize=10, color=INK)
        label = f"{re.split('[,:]', title)[0].lower()}:\n{100 * all_three.energy:.2g} % at multiples of 1/8"
        axes["E"].semilogy(all_three.frequency[1:], all_three.spectrum[1:], color=colour, lw=1.8, label=label)
    for name in "ABCD":
        axes[name].set_xticks([]), axes[name].set_yticks([])
    axis = axes["E"]
    for k in range(1, 5):
        axis.axvline(k / 8, color="#999999", lw=0.8, ls=":", zorder=0)
    axis.set_xticks([k / 8 for k in range(6)], ["0", "1/8", "1/4", "3/8", "1/2", "5/8"])
    axis.set_title("share of the power at each frequency\n(all directions, 64 outputs)", fontsize=10, color=INK)
    axis.set_xlabel("cycles per pixel", fontsize=9)
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return figure


if __name__ == "__main__":
    path = Path(__file__).with_name("checkerboard.png")
    FigureCanvasAgg(draw()).print_png(path)
    print(path)
