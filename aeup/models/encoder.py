"""The strided convolutional encoder that mirrors `aeup.Decoder`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from aeup.decoder import check_int, check_size, check_widths, make_activation, make_norm


class Encoder(nn.Module):
    """Image ``[N, in_channels, H, W]`` to a vector ``[N, out_features]``.

    Stride-2 convolutions of kernel 3 halve the size, rounded up, through the decoder's hidden widths in reverse
    (``channels[1:]`` reversed), then one hidden linear layer of ``hidden`` units and a linear output.
    """

    def __init__(
        self,
        channels: Sequence[int],
        in_channels: int,
        image_size: int | tuple[int, int],
        out_features: int,
        hidden: int = 128,
        norm: str | None = "batch",
        activation: str = "silu",
    ) -> None:
        super().__init__()
        widths = [check_int("in_channels", in_channels), *reversed(check_widths(channels)[1:])]
        h, w = self.image_size = check_size("image_size", image_size)
        layers: list[nn.Module] = []
        for c_in, c_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=norm is None)]
            layers += [make_norm(norm, c_out), make_activation(activation)]
            h, w = (h + 1) // 2, (w + 1) // 2
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1] * h * w, hidden)
        self.activation = make_activation(activation)
        self.output = nn.Linear(hidden, out_features)
        self.in_channels = in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_channels, *self.image_size):
            h, w = self.image_size
            raise RuntimeError(f"images must be [N, {self.in_channels}, {h}, {w}] for this model, got {list(x.shape)}")
        return self.output(self.activation(self.hidden(self.features(x).flatten(1))))
