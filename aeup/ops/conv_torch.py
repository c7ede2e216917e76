"""The maps of the transposed convolution by torch's own operators; arguments as in aeup/ops/conv_kernels.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.ops.conv_shapes import Geometry
from aeup.ops.epilogue import activate


def torch_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    y = F.conv_transpose2d(x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
    return activate(y, activation, slope, inplace=True) if activation else y


def convolution_backward(grad, x, w, g: Geometry, needs) -> tuple:
    """torch's gradients of x, w and bias. Of an x or w that is not asked for, only shape and layout are read."""
    # With the bias oneDNN takes up to 5 times as long as without, and a sum.
    apart = needs[2] and grad.is_cpu
    dx, dw, bias = torch.ops.aten.convolution_backward.default(
        grad, x, w, [g.co] if needs[2] else None, g.stride, g.padding, g.dilation, True, g.output_padding, g.groups,
        (needs[0], needs[1], needs[2] and not apart),
    )  # fmt: skip
    return dx, dw, grad.sum((0, 2, 3)) if apart else bias


def torch_x(grad, w, g: Geometry, bias=None) -> Tensor:
    x = F.conv2d(grad, w, bias, g.stride, g.padding, g.dilation, g.groups)
    if x.shape[2:] == (g.ih, g.iw):
        return x
    return x[:, :, : g.ih, : g.iw].clone()  # output_padding reaches the stride: outputs that x does not have


def torch_w(grad, x, g: Geometry, w) -> Tensor:
    w = grad.new_empty((g.ci, g.co // g.groups, g.kh, g.kw)) if w is None else w
    return convolution_backward(grad, x, w, g, [False, True, False])[1]
