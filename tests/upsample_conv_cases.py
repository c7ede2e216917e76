"""The table of upsamplings with a convolution after them: what every implementation is checked on."""

from contextlib import contextmanager
from unittest import mock

import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, MODES  # noqa: F401
from map_cases import ACTIVATIONS, MapCase, activated, run  # noqa: F401


@contextmanager
def always_folded():
    """The CPU takes the folded weight wherever it can, however small the call."""
    from aeup import tuned
    from aeup.ops import upsample_conv_cpu as cpu

    try:
        with mock.patch.multiple(
            cpu,
            _LEAST_PIXELS=0,
            _LEAST_PIXELS_LAST=0,
            _LEAST_PRODUCTS=0,
            _LEAST_PRODUCTS_OF_HALF=0,
            _folds=lambda *args: True,
        ):
            tuned.forget()  # choices that were made before
            yield
    finally:
        tuned.forget()


def by_torch(
    x, w, b, activation=None, scale_factor=2, size=None, mode="nearest", align_corners=None, padding=0, groups=1
):
    """torch's own operators, one after the other."""
    u = F.interpolate(x, size, None if size else scale_factor, mode, align_corners)
    return activated(F.conv2d(u, w, b, 1, padding, 1, groups), activation)


class Case(MapCase):
    """weight: [CO, CI / groups, kH, kW]."""

    by_torch = staticmethod(by_torch)

    def fan_in(self):
        return self.weight[1] * self.weight[2] * self.weight[3]

    def out_channels(self):
        return self.weight[0]


SMOOTH = {"padding": 1, "mode": "bilinear"}
CORNERS = {"scale_factor": 3, "padding": 2, "mode": "bicubic", "align_corners": True}
CASES = (
    Case("x2-k3p1", (2, 6, 5, 7), (5, 6, 3, 3), {"padding": 1}),
    Case("x2-k3p1-exact", (2, 3, 5, 6), (4, 3, 3, 3), {"padding": 1, "mode": "nearest-exact"}),
    Case("x2-k3p0", (1, 4, 6, 5), (6, 4, 3, 3)),
    Case("x3-k3p1", (2, 4, 4, 5), (3, 4, 3, 3), {"scale_factor": 3, "padding": 1}),
    Case("x4-k7p3", (1, 3, 3, 4), (4, 3, 7, 7), {"scale_factor": 4, "padding": 3}),
    Case("x2-k2p1", (2, 5, 4, 3), (4, 5, 2, 2), {"padding": 1}),
    Case("x2-k1", (2, 4, 3, 5), (6, 4, 1, 1)),
    Case("x2-k1p2", (1, 4, 3, 5), (3, 4, 1, 1), {"padding": 2}),
    Case("x2-k2p3", (2, 3, 4, 4), (5, 3, 2, 2), {"padding": 3}),
    Case("x3-k4p2", (1, 4, 3, 3), (3, 4, 4, 4), {"scale_factor": 3, "padding": 2}),
    Case("each-axis", (2, 4, 5, 3), (3, 4, 5, 2), {"scale_factor": (3, 2), "padding": (0, 3)}),
    Case("one-axis", (2, 4, 5, 3), (3, 4, 3, 3), {"scale_factor": (1, 2), "padding": 1}),
    Case("from-one-pixel", (3, 8, 1, 1), (4, 8, 3, 3), {"scale_factor": 4, "padding": 1}),
    Case("one-output-pixel", (2, 3, 1, 2), (4, 3, 2, 4)),
    Case("groups", (2, 6, 4, 5), (9, 2, 3, 3), {"padding": 1, "groups": 3}),
    Case("depthwise", (2, 5, 4, 3), (5, 1, 3, 3), {"padding": 1, "groups": 5}),
    Case("rgb", (2, 16, 9, 7), (3, 16, 3, 3), {"padding": 1}),
    Case("large-rgb", (2, 64, 32, 33), (3, 64, 3, 3), {"padding": 1}),
    Case("wide", (1, 40, 6, 5), (36, 40, 3, 3), {"padding": 1}),
    Case("size", (2, 4, 5, 3), (3, 4, 3, 3), {"size": (10, 9), "padding": 1}),
    Case("same-size", (1, 4, 5, 3), (3, 4, 3, 3), {"size": (5, 3), "padding": 1}),
    Case("same", (2, 4, 5, 3), (3, 4, 4, 3), {"padding": "same"}),
    Case("valid", (2, 4, 5, 3), (3, 4, 4, 3), {"padding": "valid"}),
    Case("nearest-odd-size", (2, 4, 8, 7), (5, 4, 3, 3), {"size": (15, 11), "padding": 1}),
    Case("bilinear", (2, 6, 5, 7), (5, 6, 3, 3), {"padding": 1, "mode": "bilinear"}),
    Case("bilinear-corners", (2, 4, 5, 4), (6, 2, 3, 3), {**SMOOTH, "align_corners": True, "groups": 2}),
    Case("bilinear-odd-size", (2, 4, 8, 7), (5, 4, 3, 3), {"size": (15, 11), "padding": 1, "mode": "bilinear"}),
    Case("bilinear-1.7", (1, 4, 6, 5), (3, 4, 2, 5), {**SMOOTH, "scale_factor": (1.7, 2.3), "padding": (1, 3)}),
    Case("bilinear-down", (1, 4, 9, 8), (3, 4, 3, 3), {"scale_factor": 0.6, "mode": "bilinear"}),
    Case("bicubic", (2, 6, 5, 7), (5, 6, 3, 3), {"padding": 1, "mode": "bicubic"}),
    Case("bicubic-x3-corners", (1, 4, 4, 5), (3, 4, 5, 5), CORNERS),
    Case("bilinear-same", (2, 4, 5, 3), (3, 4, 2, 3), {"padding": "same", "mode": "bilinear"}),
)
