"""2-D convolution: torch.ops.aeup.conv2d and its two gradients.

With x [N, CI, h, w], w [CO, CI / groups, kh, kw] and y [N, CO, oh, ow] it is the adjoint of the transposed convolution
by the same w from y to x (Dumoulin & Visin, 2016, "A guide to convolution arithmetic for deep learning", arXiv
1603.07285). So its maps (aeup/ops/maps.py) are those of aeup/ops/conv_transpose2d.py in other roles: Y is X there, with
bias and activation; X is Y; W is W. A geometry is that of the transposed convolution: ci, ih and iw are of y, co, oh
and ow of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aeup.backends import Kernel, Op
from aeup.ops import compiled, conv_cpu, conv_kernels
from aeup.ops.conv_kernels import cuda_refusal, serves
from aeup.ops.conv_shapes import Geometry, W, X, Y, of_convolution, of_convolution_gradient
from aeup.ops.epilogue import NUMBER, activate, activation_gradient, check_activation
from aeup.ops.maps import Forward, Maps

NAMES = {Y: "conv2d", X: "conv2d_input_gradient", W: "conv2d_weight_gradient"}
_AS = {Y: X, X: Y, W: W}  # the transposed convolution's map
_REST = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


def _transposed(kind: int, a, b, *rest) -> tuple:
    """The arguments of the transposed convolution's map."""
    if kind == Y:  # without bias, activation and slope
        return a, b, rest[1]
    return (a, b, None, *rest, None, 0.0) if kind == X else (b, a, *rest)


# --- torch ---


def _torch_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    y = F.conv2d(x, w, bias, g.stride, g.padding, g.dilation, g.groups)
    return activate(y, activation, slope, inplace=True) if activation else y


def _torch_w(grad, x, g: Geometry, w) -> Tensor:
    w = grad.new_empty((g.ci, g.co // g.groups, g.kh, g.kw)) if w is None else w
    return _torch_backward(grad, x, w, None, g, None, 0.0, (False, True, False))[1]


def _torch_backward(grad, x, w, y, g: Geometry, activation, slope, needs) -> tuple:
    """Of an x or w whose gradient is not asked for, only shape and layout are read."""
    if activation:
        grad = activation_gradient(grad, y, activation, slope)
    bias = [g.ci] if needs[2] else None
    return torch.ops.aten.convolution_backward.default(
        grad, x, w, bias, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, needs
    )


# --- cpu: where a composition is faster than torch's convolution, that of the transposed convolution's map ---


def _cpu_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    return activate(conv_cpu.run_x(x, w, g, bias), activation, slope, inplace=True)


# --- cuda ---


def _cuda_args(g: Geometry, x: Tensor, activation, slope) -> tuple:
    return *g.stride, *g.padding, g.groups, *g.dilation, NUMBER[activation], slope, compiled.tf32(x)


def _cuda_y(x, w, bias, g: Geometry, activation, slope) -> Tensor:
    return compiled.call(NAMES[Y], x, w, bias, *_cuda_args(g, x, activation, slope), "")


def _cuda_plan(x, w, bias, g: Geometry, activation, slope):
    return compiled.planned(NAMES[Y], x, w, *_cuda_args(g, x, activation, slope))


def _cuda_backward(grad, x, w, y, g: Geometry, activation, slope, needs) -> tuple:
    """The gradients of x, w and bias that `needs` asks for, else None, in one call of the extension."""
    args = (*_cuda_args(g, grad, activation, slope), *needs)
    found = compiled.call("conv2d_backward", grad, x, w, y if activation else None, *args)
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


def _cuda_refuses_y(x, w, bias, g, activation, slope) -> str | None:
    return cuda_refusal(x, NAMES[Y], g)


# --- triton ---


def _public_y(x, w, bias, g, activation, slope):
    return x, w, bias, g.stride, g.padding, g.groups, g.dilation, activation, slope


# --- the ops ---


def _map_op(kind: int, by_torch) -> Op:
    theirs = conv_kernels.MAPS[_AS[kind]]

    def exchanged(function):
        return lambda *args: function(*_transposed(kind, *args))

    def label(backend: str):
        of_theirs = theirs.kernels[backend].label
        return of_theirs and (lambda device, *args: of_theirs(device, *_transposed(kind, *args)))

    def kernel(backend: str) -> Kernel:
        k = theirs.kernels[backend]
        return Kernel(exchanged(k.run), exchanged(k.refuses), label(backend), k.yields)

    kernels = {name: kernel(name) for name in ("cuda", "triton", "cpu")} | {"torch": Kernel(by_torch, serves)}
    if kind == Y:  # with its epilogue
        kernels["cuda"] = Kernel(_cuda_y, _cuda_refuses_y, label("cuda"), plan=_cuda_plan)
        kernels["triton"] = compiled.triton_kernel(NAMES[Y], _public_y, "refuses_convolution")
        kernels["cpu"] = Kernel(_cpu_y, kernels["cpu"].refuses, label("cpu"))
    return Op(f"aeup.{NAMES[kind]}", kernels, theirs.kind, exchanged(theirs.problem), theirs.features)


MAPS = {
    Y: _map_op(Y, _torch_y),
    X: _map_op(X, lambda *args: conv_kernels.MAPS[Y].kernels["torch"].run(*_transposed(X, *args))),
    W: _map_op(W, _torch_w),
}
_BY_CUDA, _BY_TORCH = ({kind: (None, MAPS[kind].kernels[b]) for kind in (X, W)} for b in ("cuda", "torch"))


class _Conv2d(Forward):
    pass


class _Maps(Maps):
    name = NAMES[Y]
    schemas = {
        Y: f"Tensor input, Tensor weight, Tensor? bias, {_REST}, str? activation=None, float slope=0.01",
        X: f"Tensor grad_output, Tensor weight, SymInt[2] input_size, {_REST}",
        W: f"Tensor grad_output, Tensor input, SymInt[2] kernel_size, {_REST}",
    }
    ops = MAPS
    by_torch = (MAPS[Y].kernels["torch"],)
    function = _Conv2d

    def arguments(self, kind: int, g: Geometry) -> tuple:
        rest = g.stride, g.padding, g.dilation, g.groups
        return rest if kind == Y else ((g.oh, g.ow) if kind == X else (g.kh, g.kw), *rest)

    def checked(self, x, w, bias, stride, padding, dilation, groups, activation=None, slope=0.01) -> tuple:
        g = of_convolution(x.shape, w.shape, *stride, *padding, groups, *dilation)
        kind = bias is None or (bias.shape == w.shape[:1] and bias.dtype == x.dtype)
        if g is None or not kind or w.dtype != x.dtype:
            F.conv2d(x, w, bias, stride, padding, dilation, groups)  # names what is wrong
            raise RuntimeError(f"aeup.conv2d: cannot serve input {list(x.shape)} with weight {list(w.shape)}")
        check_activation(activation, slope)
        return x, w, bias, g, activation, slope

    def of_gradient(self, kind: int, a, b, size, stride, padding, dilation, groups) -> Geometry:
        return of_convolution_gradient(kind, a, b, size, stride, padding, groups, dilation)

    def shape(self, kind: int, g: Geometry, n) -> tuple:
        if kind == W:
            return g.ci, g.co // g.groups, g.kh, g.kw
        return (n, g.co, g.oh, g.ow) if kind == X else (n, g.ci, g.ih, g.iw)

    def call(self, x: Tensor, g: Geometry) -> str:
        return g.described(x, g.ci)

    def joint(self, kernel_x, kernel_w, g):
        if kernel_x in _BY_TORCH[X] and kernel_w in _BY_TORCH[W]:
            return _torch_backward
        return _cuda_backward if kernel_x in _BY_CUDA[X] and kernel_w in _BY_CUDA[W] else None


CONV2D = _Maps()
