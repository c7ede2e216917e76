"""The geometry of a transposed convolution: sizes, checked; errors are torch's."""

from typing import NamedTuple

import torch

X, W, Y = 0, 1, 2  # the tensors, and the maps that give them


class Geometry(NamedTuple):
    """x [N, ci, ih, iw], w [ci, co / groups, kh, kw] and y [N, co, oh, ow]; stride s, padding p, dilation d."""

    ci: int
    co: int
    ih: int
    iw: int
    oh: int
    ow: int
    kh: int
    kw: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int
    groups: int
    stride: tuple  # the same as pairs
    padding: tuple
    output_padding: tuple
    dilation: tuple


def output_size(i, k, s, p, d):
    return (i - 1) * s - 2 * p + d * (k - 1) + 1


def geometry(x_shape, w_shape, sh, sw, ph, pw, oph, opw, groups, dh, dw) -> Geometry | None:
    """The geometry, or None where torch refuses with a message of its own, or gives an output without pixels.

    Raises RuntimeError where torch's message depends on the backend that it would take.
    """
    if len(x_shape) != 4 or len(w_shape) != 4 or not (sh > 0 and sw > 0 and groups > 0):
        return None
    if ph < 0 or pw < 0 or oph < 0 or opw < 0:
        return None
    _, ci, ih, iw = x_shape
    wi, cog, kh, kw = w_shape
    if ci != wi or ci < 1 or ci % groups != 0 or ih < 1 or iw < 1:
        return None
    if kh < 1 or kw < 1:
        raise RuntimeError(f"kernel size should be greater than zero, but got kernel_height: {kh} kernel_width: {kw}")
    if cog < 1:
        raise RuntimeError(f"non-empty 2D or 4D weight tensor expected, but got: {list(w_shape)}")
    if dh < 1 or dw < 1:
        raise RuntimeError(f"dilation should be greater than zero, but got dilation_height: {dh}, dilation_width: {dw}")
    if (oph >= sh and oph >= dh) or (opw >= sw and opw >= dw):
        raise RuntimeError(
            "output padding must be smaller than either stride or dilation, but got output_padding_height: "
            f"{oph} output_padding_width: {opw} stride_height: {sh} stride_width: {sw} dilation_height: {dh} "
            f"dilation_width: {dw}"
        )
    oh, ow = output_size(ih, kh, sh, ph, dh) + oph, output_size(iw, kw, sw, pw, dw) + opw
    if oh < 0 or ow < 0:
        raise RuntimeError(
            f"Given input size per channel: ({ih} x {iw}). Calculated output size per channel: ({oh} x {ow}). Output "
            "size is too small"
        )
    if oh < 1 or ow < 1:
        return None
    pairs = (sh, sw), (ph, pw), (oph, opw), (dh, dw)
    return Geometry(ci, cog * groups, ih, iw, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw, groups, *pairs)


def of_gradient(kind: int, grad, other, size, stride, padding, groups, dilation) -> Geometry:
    """The geometry of a gradient's op: of x (`other` is the weight, `size` the input's) or of w (`other` is the
    input, `size` the kernel's). Raises RuntimeError where the sizes do not belong together."""
    name = f"aeup.conv_transpose2d_{'input' if kind == X else 'weight'}_gradient"
    if grad.dim() != 4 or other.dim() != 4:
        raise RuntimeError(f"{name}: expected 4-D tensors, got shapes {list(grad.shape)} and {list(other.shape)}")
    if grad.dtype != other.dtype or grad.device != other.device:
        raise RuntimeError(
            f"{name}: expected one dtype and device, got {grad.dtype} on {grad.device} and {other.dtype} on "
            f"{other.device}"
        )
    co = grad.shape[1]
    (ci, cog, *kernel), image = (other.shape, size) if kind == X else ((other.shape[1], 0, *size), other.shape[2:])
    if groups < 1 or co % groups != 0 or (kind == X and cog * groups != co):
        raise RuntimeError(f"{name}: groups={groups} does not fit grad_output {list(grad.shape)}")
    shape = (grad.shape[0] if kind == X else other.shape[0], ci, *image)
    plain = [output_size(*v) for v in zip(image, kernel, stride, padding, dilation, strict=True)]
    more = [o - least for o, least in zip(grad.shape[2:], plain, strict=True)]
    fits = shape[0] == grad.shape[0] and more[0] >= 0 and more[1] >= 0
    flat = (*stride, *padding, *more, groups, *dilation)
    found = geometry(shape, (ci, co // groups, *kernel), *flat) if fits else None
    if found is None:
        what = "weight" if kind == X else "input"
        raise RuntimeError(
            f"{name}: grad_output {list(grad.shape)} does not fit {what} {list(other.shape)}, size {list(size)}, "
            f"stride {list(stride)}, padding {list(padding)}, groups {groups}, dilation {list(dilation)}"
        )
    return found


def int_pair(value):
    """An int or a pair of ints as two ints, as torch reads it; None where torch shall refuse it."""
    if isinstance(value, (list, tuple)):
        if len(value) not in (1, 2):
            return None
        value = tuple(_int(v) for v in value)
        value = value * 2 if len(value) == 1 else value
    else:
        value = (_int(value),) * 2
    return None if None in value else value


def _int(value):
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, (bool, float)) or not hasattr(value, "__index__"):
        return None
    return value.__index__()
