"""Upsampling and the convolution after it, one after the other: by torch, or by aeup's resampling and torch's
convolution. The upsampled map is written."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.ops.epilogue import activate, activation_gradient
from aeup.ops.interpolate import reference, resample
from aeup.ops.upsample_conv_shapes import UpsampleGeometry

LABEL = "interpolate, then conv2d"
_aten = torch.ops.aten


def _convolution_backward(grad, u, w, g: UpsampleGeometry, needs) -> tuple:
    bias = [g.co] if needs[2] else None
    return _aten.convolution_backward.default(
        grad, u, w, bias, (1, 1), g.padding, (1, 1), False, (0, 0), g.groups, needs
    )


class _OneAfterTheOther:
    """`resample` (src, map, backward) -> Tensor, differentiable."""

    def __init__(self, resample) -> None:
        self.resample = resample

    def y(self, x, w, bias, g: UpsampleGeometry, activation, slope) -> Tensor:
        y = F.conv2d(self.resample(x, g.m, False), w, bias, 1, g.padding, 1, g.groups)
        return activate(y, activation, slope, inplace=True) if activation else y

    def x(self, grad, w, g: UpsampleGeometry) -> Tensor:
        return self.resample(F.conv_transpose2d(grad, w, None, 1, g.padding, 0, g.groups), g.m, True)

    def w(self, grad, x, g: UpsampleGeometry, w) -> Tensor:
        w = grad.new_empty(g.weight_shape) if w is None else w
        return _convolution_backward(grad, self.resample(x, g.m, False), w, g, [False, True, False])[1]

    def backward(self, grad, x, w, y, g: UpsampleGeometry, activation, slope, needs) -> tuple:
        if activation:
            grad = activation_gradient(grad, y, activation, slope)
        if not needs[1]:  # the upsampled map is not needed
            return self.x(grad, w, g) if needs[0] else None, None, grad.sum((0, 2, 3)) if needs[2] else None
        du, dw, bias = _convolution_backward(grad, self.resample(x, g.m, False), w, g, needs)
        return self.resample(du, g.m, True) if needs[0] else None, dw, bias


BY_TORCH = _OneAfterTheOther(reference)
BY_AEUP = _OneAfterTheOther(partial(resample, backend="auto"))
