"""The table of convolutions with a stride or a dilation: what every implementation is checked on."""

import torch.nn.functional as F
from cases import DTYPES, LAYOUTS  # noqa: F401
from map_cases import ACTIVATIONS, MapCase, activated, run  # noqa: F401


def by_torch(x, w, b, activation=None, **kwargs):
    """torch's own operators, one after the other."""
    return activated(F.conv2d(x, w, b, **kwargs), activation)


class Case(MapCase):
    """weight: [CO, CI / groups, kH, kW]."""

    by_torch = staticmethod(by_torch)

    def fan_in(self):
        return self.weight[1] * self.weight[2] * self.weight[3]

    def out_channels(self):
        return self.weight[0]


CASES = (
    Case("k4s2p1", (2, 6, 10, 14), (5, 6, 4, 4), {"stride": 2, "padding": 1}),
    Case("k4s2p1-rest", (2, 6, 11, 13), (5, 6, 4, 4), {"stride": 2, "padding": 1}),
    Case("k3s2p1", (2, 5, 12, 9), (7, 5, 3, 3), {"stride": 2, "padding": 1}),
    Case("rgb", (2, 3, 18, 21), (16, 3, 4, 4), {"stride": 2, "padding": 1}),
    Case("one-channel", (2, 1, 14, 13), (9, 1, 3, 3), {"stride": 2, "padding": 1}),
    Case("stem", (1, 3, 15, 17), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    Case("shortcut", (2, 8, 7, 6), (5, 8, 1, 1), {"stride": 2}),
    Case("holes", (1, 4, 11, 9), (3, 4, 2, 2), {"stride": (4, 3)}),
    Case("patches", (2, 3, 12, 16), (10, 3, 4, 4), {"stride": 4}),
    Case("each-axis", (2, 4, 13, 5), (3, 4, 5, 2), {"stride": (3, 1), "padding": (2, 0)}),
    Case("padding-past-the-kernel", (1, 3, 5, 4), (4, 3, 3, 2), {"stride": 2, "padding": (4, 3)}),
    Case("dilation", (2, 4, 9, 8), (3, 4, 3, 3), {"padding": 2, "dilation": 2}),
    Case("dilation-of-a-stride", (2, 4, 12, 11), (3, 4, 3, 2), {"stride": 2, "padding": (2, 1), "dilation": (2, 3)}),
    Case("same", (2, 4, 9, 8), (3, 4, 3, 2), {"padding": "same", "dilation": (2, 3)}),
    Case("groups", (2, 6, 9, 8), (12, 2, 4, 4), {"stride": 2, "padding": 1, "groups": 3}),
    Case("depthwise", (2, 5, 9, 7), (5, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 5}),
    Case("depthwise-more", (1, 3, 8, 9), (6, 1, 3, 3), {"stride": 2, "dilation": 2, "groups": 3}),
    Case("one-pixel", (3, 9, 4, 4), (20, 9, 4, 4), {"stride": 4}),
    Case("wide", (2, 40, 10, 13), (72, 40, 4, 4), {"stride": 2, "padding": 1}),
    Case("few-images-long-sum", (1, 96, 6, 6), (20, 96, 3, 3), {"stride": 2, "padding": 1}),
)
