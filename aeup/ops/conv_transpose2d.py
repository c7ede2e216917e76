"""2-D transposed convolution: torch.ops.aeup.conv_transpose2d and its two gradients.

With x [N, CI, ih, iw], w [CI, CO / groups, kh, kw] and y [N, CO, oh, ow] the maps (aeup/ops/maps.py) are Y, the
transposed convolution; X, a strided convolution of y by w; and W, a sum over pixels.

Along an axis, output o takes kernel index k of input i exactly when o + p = s * i + d * k (Dumoulin & Visin, 2016, "A
guide to convolution arithmetic for deep learning", arXiv 1603.07285, relationship 14).
"""

import torch.nn.functional as F
from torch import Tensor

from aeup.ops.conv_kernels import MAPS, cuda_backward
from aeup.ops.conv_shapes import Geometry, W, X, Y, geometry, of_gradient
from aeup.ops.conv_torch import convolution_backward
from aeup.ops.epilogue import activation_gradient, check_activation
from aeup.ops.maps import Forward, Maps

_PAIRS = "SymInt[2] stride, SymInt[2] padding, SymInt groups, SymInt[2] dilation"


class _ConvTranspose2d(Forward):
    pass


class _Maps(Maps):
    name = "conv_transpose2d"
    schemas = {
        Y: "Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, "
        "SymInt groups, SymInt[2] dilation, str? activation=None, float slope=0.01",
        X: f"Tensor grad_output, Tensor weight, SymInt[2] input_size, {_PAIRS}",
        W: f"Tensor grad_output, Tensor input, SymInt[2] kernel_size, {_PAIRS}",
    }
    ops = MAPS
    by_torch = (MAPS[Y].kernels["torch"],)
    function = _ConvTranspose2d

    def arguments(self, kind: int, g: Geometry) -> tuple:
        if kind == Y:
            return g.stride, g.padding, g.output_padding, g.groups, g.dilation
        return (g.ih, g.iw) if kind == X else (g.kh, g.kw), g.stride, g.padding, g.groups, g.dilation

    def checked(
        self, x, w, bias, stride, padding, output_padding, groups, dilation, activation=None, slope=0.01
    ) -> tuple:
        g = geometry(x.shape, w.shape, *stride, *padding, *output_padding, groups, *dilation)
        kind = bias is None or (bias.shape == (w.shape[1] * groups,) and bias.dtype == x.dtype)
        if g is None or not kind or w.dtype != x.dtype:
            F.conv_transpose2d(x, w, bias, stride, padding, output_padding, groups, dilation)  # names what is wrong
            raise RuntimeError(f"aeup.conv_transpose2d: cannot serve input {list(x.shape)} with weight {list(w.shape)}")
        check_activation(activation, slope)
        return x, w, bias, g, activation, slope

    def of_gradient(self, kind: int, a, b, *rest) -> Geometry:
        return of_gradient(kind, a, b, *rest)

    def shape(self, kind: int, g: Geometry, n) -> tuple:
        if kind == W:
            return g.ci, g.co // g.groups, g.kh, g.kw
        return (n, g.ci, g.ih, g.iw) if kind == X else (n, g.co, g.oh, g.ow)

    def call(self, x: Tensor, g: Geometry) -> str:
        return g.described(x, g.co)

    def joint(self, kernel_x, kernel_w, g):
        if kernel_x in _BY_TORCH[X] and kernel_w in _BY_TORCH[W]:
            return _torch_backward
        return cuda_backward if kernel_x in _BY_CUDA[X] and kernel_w in _BY_CUDA[W] else None


_BY_CUDA, _BY_TORCH = ({kind: (None, MAPS[kind].kernels[b]) for kind in (X, W)} for b in ("cuda", "torch"))


def _torch_backward(grad, x, w, y, g: Geometry, activation, slope, needs) -> tuple:
    if activation:
        grad = activation_gradient(grad, y, activation, slope)
    return convolution_backward(grad, x, w, g, needs)


CONV_TRANSPOSE2D = _Maps()
