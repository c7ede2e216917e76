"""Upsampling and the convolution after it, one after the other. The upsampled map is written.

By torch; or by aeup's resampling and, on a GPU, the convolution that the ops of this file's neighbours choose for an
upsampling by 1, which is a convolution alone.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.backends import choose
from aeup.ops.conv_shapes import W, X
from aeup.ops.epilogue import activate, activation_gradient
from aeup.ops.interpolate import Map, Plan, reference, resample
from aeup.ops.maps import plan_key
from aeup.ops.upsample_conv_shapes import UpsampleGeometry

LABEL = "interpolate, then conv2d"
_aten = torch.ops.aten


def _convolution_backward(grad, u, w, g: UpsampleGeometry, needs) -> tuple:
    bias = [g.co] if needs[2] else None
    return _aten.convolution_backward.default(
        grad, u, w, bias, (1, 1), g.padding, (1, 1), False, (0, 0), g.groups, needs
    )


@lru_cache(4096)
def convolution(g: UpsampleGeometry) -> UpsampleGeometry:
    """That of the convolution alone."""
    return g._replace(m=Map(*g.size, *g.size, "nearest", False, False, None, None))


def alone(g: UpsampleGeometry) -> bool:
    """Whether there is nothing but the convolution: nearest by 1, which is not only to the same size."""
    m = g.m
    return m.mode.startswith("nearest") and g.input_size == g.size and m.scale_h in (None, 1) and m.scale_w in (None, 1)


class _Convolution:
    """torch's."""

    def y(self, u, w, bias, g: UpsampleGeometry, activation, slope) -> Tensor:
        y = F.conv2d(u, w, bias, 1, g.padding, 1, g.groups)
        return activate(y, activation, slope, inplace=True) if activation else y

    def x(self, grad, w, g: UpsampleGeometry) -> Tensor:
        return F.conv_transpose2d(grad, w, None, 1, g.padding, 0, g.groups)

    def w(self, grad, u, g: UpsampleGeometry, w) -> Tensor:
        w = grad.new_empty(g.weight_shape) if w is None else w
        return _convolution_backward(grad, u, w, g, [False, True, False])[1]

    def backward(self, grad, u, w, y, g: UpsampleGeometry, activation, slope, needs) -> tuple:
        if activation:
            grad = activation_gradient(grad, y, activation, slope)
        if needs[1]:
            return _convolution_backward(grad, u, w, g, needs)
        return self.x(grad, w, g) if needs[0] else None, None, grad.sum((0, 2, 3)) if needs[2] else None


class _ChosenConvolution:
    """`maps`: aeup.ops.upsample_conv2d.UPSAMPLE_CONV2D, which sets it."""

    maps = None

    def y(self, u, w, bias, g: UpsampleGeometry, activation, slope) -> Tensor:
        key = plan_key(u, w, bias, ("convolution", *g.padding, g.groups, activation, slope))
        plan = self.maps.plans.get(key)
        return plan.run(u, w, bias) if plan else self.maps(key, u, w, bias, convolution(g), activation, slope)

    def x(self, grad, w, g: UpsampleGeometry) -> Tensor:
        args = grad, w, convolution(g)
        return choose(self.maps.ops[X], grad, args, "auto").run(*args)

    def w(self, grad, u, g: UpsampleGeometry, w) -> Tensor:
        args = grad, u, convolution(g), w
        return choose(self.maps.ops[W], grad, args, "auto").run(*args)

    def backward(self, grad, u, w, y, g: UpsampleGeometry, activation, slope, needs) -> tuple:
        args = grad, u, w, y, convolution(g), activation, slope, needs
        return self.maps.backward(*args, "auto")(*args)


class _OneAfterTheOther:
    """`resample` (src, map, backward) -> Tensor and `of` (tensor, geometry) -> convolution, both differentiable."""

    def __init__(self, resample, of) -> None:
        self.resample, self.of = resample, of

    def _upsampled(self, x, g: UpsampleGeometry) -> Tensor:
        return x if alone(g) else self.resample(x, g.m, False)

    def _downsampled(self, du, g: UpsampleGeometry) -> Tensor:
        return du if alone(g) else self.resample(du, g.m, True)

    def y(self, x, w, bias, g: UpsampleGeometry, activation, slope) -> Tensor:
        return self.of(x, g).y(self._upsampled(x, g), w, bias, g, activation, slope)

    def plan(self, x, w, bias, g: UpsampleGeometry, activation, slope) -> Callable | None:
        """What `y` does for such tensors, by a plan of the upsampling."""
        if alone(g):
            return None
        upsampling, of = Plan("auto", x, g.m), self.of(x, g)
        return lambda x, w, bias: of.y(upsampling.run(x), w, bias, g, activation, slope)

    def x(self, grad, w, g: UpsampleGeometry) -> Tensor:
        return self._downsampled(self.of(grad, g).x(grad, w, g), g)

    def w(self, grad, x, g: UpsampleGeometry, w) -> Tensor:
        return self.of(grad, g).w(grad, self._upsampled(x, g), g, w)

    def backward(self, grad, x, w, y, g: UpsampleGeometry, activation, slope, needs) -> tuple:
        # Without the weight's gradient only the upsampled map's size is read.
        u = self._upsampled(x, g) if needs[1] else x.new_empty(()).expand(len(x), g.ci, *g.size)
        du, dw, bias = self.of(grad, g).backward(grad, u, w, y, g, activation, slope, needs)
        return self._downsampled(du, g) if needs[0] else None, dw, bias


_TORCH, CHOSEN = _Convolution(), _ChosenConvolution()
BY_TORCH = _OneAfterTheOther(reference, lambda t, g: _TORCH)
# What is chosen for the convolution alone may be this composition again: then it is torch's.
BY_AEUP = _OneAfterTheOther(partial(resample, backend="auto"), lambda t, g: _TORCH if t.is_cpu or alone(g) else CHOSEN)
