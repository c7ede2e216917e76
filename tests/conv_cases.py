"""The table of transposed convolutions: what every implementation is checked on, and independent oracles."""

import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS  # noqa: F401
from map_cases import ACTIVATIONS, MapCase, activated, run  # noqa: F401


def by_torch(x, w, b, activation=None, **kwargs):
    """torch's own operators, one after the other."""
    return activated(F.conv_transpose2d(x, w, b, **kwargs), activation)


class Case(MapCase):
    """weight: [CI, CO / groups, kH, kW]."""

    by_torch = staticmethod(by_torch)

    def fan_in(self):
        return self.weight[0] // self.kwargs.get("groups", 1)

    def out_channels(self):
        return self.weight[1] * self.kwargs.get("groups", 1)


CASES = (
    Case("k4s2p1", (2, 6, 5, 7), (6, 5, 4, 4), {"stride": 2, "padding": 1}),
    Case("k2s2", (2, 8, 4, 6), (8, 5, 2, 2), {"stride": 2}),
    Case("k3s2p1op1", (2, 5, 6, 5), (5, 7, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    Case("k3s1p1", (1, 4, 7, 5), (4, 6, 3, 3), {"padding": 1}),
    Case("k1s1", (2, 4, 3, 5), (4, 6, 1, 1)),
    Case("k4-from-one-pixel", (3, 20, 1, 1), (20, 9, 4, 4)),
    Case("k16s8p4", (1, 3, 4, 3), (3, 3, 16, 16), {"stride": 8, "padding": 4}),
    Case("taps-for-some-phases-only", (2, 3, 4, 5), (3, 4, 2, 1), {"stride": 3, "output_padding": (2, 1)}),
    Case("each-axis", (2, 4, 5, 3), (4, 3, 5, 2), {"stride": (3, 1), "padding": (2, 0), "output_padding": (1, 0)}),
    Case("crop", (1, 3, 5, 6), (3, 4, 5, 5), {"stride": 2, "padding": 4}),
    Case("one-output-pixel", (2, 3, 1, 1), (3, 4, 3, 3), {"padding": 1}),
    Case("dilation", (2, 4, 5, 4), (4, 3, 3, 3), {"stride": 2, "padding": 1, "dilation": 2, "output_padding": 1}),
    Case("dilation-3-stride-2", (1, 4, 5, 4), (4, 3, 3, 2), {"stride": 2, "padding": (2, 1), "dilation": 3}),
    Case(
        "output-padding-past-the-stride",
        (2, 4, 4, 3),
        (4, 3, 2, 3),
        {"stride": (3, 1), "padding": 1, "dilation": 4, "output_padding": (3, 2)},
    ),
    Case("groups", (2, 6, 5, 4), (6, 4, 4, 4), {"stride": 2, "padding": 1, "groups": 3}),
    Case("groups-of-8", (1, 16, 4, 4), (16, 8, 4, 4), {"stride": 2, "padding": 1, "groups": 2}),
    Case("depthwise", (2, 5, 6, 4), (5, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 5}),
    Case("depthwise-s1", (2, 5, 6, 4), (5, 1, 3, 3), {"padding": 1, "groups": 5}),
    Case("depthwise-dilated", (1, 3, 4, 4), (3, 2, 3, 3), {"stride": 2, "dilation": 2, "groups": 3}),
    Case("rgb", (2, 16, 9, 11), (16, 3, 4, 4), {"stride": 2, "padding": 1}),
    Case("one-channel", (2, 9, 7, 6), (9, 1, 4, 4), {"stride": 2, "padding": 1}),
    Case("few-past-the-end", (1, 64, 48, 44), (64, 2, 4, 4), {"stride": 2, "padding": (1, 0), "output_padding": 1}),
    Case("wide", (2, 72, 5, 6), (72, 40, 4, 4), {"stride": 2, "padding": 1}),
)
LARGE_DEPTHWISE = Case("large-depthwise", (1, 40, 24, 24), (40, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 40})
LARGE_FEW = (  # enough work for the kernels of few output channels
    Case("large-rgb", (2, 64, 32, 33), (64, 3, 4, 4), {"stride": 2, "padding": 1}),
    Case(
        "large-one-channel",
        (2, 64, 33, 32),
        (64, 1, 6, 4),
        {"stride": (2, 4), "padding": (1, 0), "output_padding": (1, 0)},
    ),
)


def naive_matrix(weight, size, stride, padding, dilation):
    """C of a convolution [CO, CI, kh, kw], entry by entry."""
    (ih, iw), (sh, sw), (ph, pw), (dh, dw) = size, stride, padding, dilation
    channels_out, channels_in, kernel_h, kernel_w = weight.shape
    oh, ow = (ih + 2 * ph - dh * (kernel_h - 1) - 1) // sh + 1, (iw + 2 * pw - dw * (kernel_w - 1) - 1) // sw + 1
    c = torch.zeros(channels_out, oh, ow, channels_in, ih, iw, dtype=weight.dtype)
    for co in range(channels_out):
        for ci in range(channels_in):
            for y in range(oh):
                for x in range(ow):
                    for kh in range(kernel_h):
                        for kw in range(kernel_w):
                            h, w = y * sh - ph + kh * dh, x * sw - pw + kw * dw
                            if 0 <= h < ih and 0 <= w < iw:
                                c[co, y, x, ci, h, w] = weight[co, ci, kh, kw]
    return c.flatten(3).flatten(0, 2)


def both(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def transposed_by_matrix(x, w, bias, *, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """The transposed convolution by the transpose of the naive matrix of the convolution, group by group."""
    s, p, d = both(stride), both(padding), both(dilation)
    of = zip(x.shape[2:], w.shape[2:], s, p, d, both(output_padding), strict=True)
    size = [(i - 1) * s_ - 2 * p_ + d_ * (k - 1) + 1 + op for i, k, s_, p_, d_, op in of]
    parts = []
    for xg, wg in zip(x.chunk(groups, 1), w.chunk(groups, 0), strict=True):
        rows = [
            (i + 2 * p_ - d_ * (k - 1) - 1) // s_ + 1
            for i, k, s_, p_, d_ in zip(size, w.shape[2:], s, p, d, strict=True)
        ]
        c = naive_matrix(wg, size, s, p, d).view(wg.shape[0], *rows, -1)
        # Where output_padding reaches the stride, the convolution has outputs that x does not.
        c = c[:, : x.shape[2], : x.shape[3]].flatten(0, 2)
        parts.append((xg.flatten(1) @ c).view(x.shape[0], wg.shape[1], *size))
    y = torch.cat(parts, 1)
    return y if bias is None else y + bias.view(-1, 1, 1)
