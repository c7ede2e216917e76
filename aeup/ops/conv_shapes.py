"""The geometry of a transposed convolution, and of a convolution, its adjoint: sizes, checked; errors are torch's."""

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

    def described(self, x, channels: int) -> str:
        """A call that makes so many channels of `x`."""
        s, p, d = (f"{a}x{b}" if a != b else str(a) for a, b in (self.stride, self.padding, self.dilation))
        return f"{list(x.shape)} -> {channels}, k{self.kh}x{self.kw}, s{s}, p{p}" + (f", d{d}" if d != "1" else "")


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
    name = _name_of_checked("conv_transpose2d", kind, grad, other)
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
    return found or _does_not_fit(name, kind, grad, other, size, stride, padding, groups, dilation)


def of_convolution(x_shape, w_shape, sh, sw, ph, pw, groups, dh, dw) -> Geometry | None:
    """Of the transposed convolution whose adjoint is the convolution of x by w [co, ci / groups, kh, kw]: its input is
    that one's output, its output x. None where torch refuses with a message of its own, or there is nothing to add."""
    if len(x_shape) != 4 or len(w_shape) != 4 or not (sh > 0 and sw > 0 and dh > 0 and dw > 0 and groups > 0):
        return None
    _, ci, h, w = x_shape
    co, cig, kh, kw = w_shape
    if ph < 0 or pw < 0 or cig < 1 or cig * groups != ci or h < 1 or w < 1 or kh < 1 or kw < 1:
        return None
    rest_h, rest_w = h + 2 * ph - dh * (kh - 1) - 1, w + 2 * pw - dw * (kw - 1) - 1
    if rest_h < 0 or rest_w < 0 or co < 1 or co % groups != 0:
        return None
    oh, ow = rest_h // sh + 1, rest_w // sw + 1
    pairs = (sh, sw), (ph, pw), (rest_h % sh, rest_w % sw), (dh, dw)
    return Geometry(co, ci, oh, ow, h, w, kh, kw, sh, sw, ph, pw, dh, dw, groups, *pairs)


def of_convolution_gradient(kind: int, grad, other, size, stride, padding, groups, dilation) -> Geometry:
    """The same from the arguments of the convolution's gradients: of x (`other` is the weight, `size` the input's) or
    of w (`other` is the input, `size` the kernel's). Raises RuntimeError where the sizes do not belong together."""
    name = _name_of_checked("conv2d", kind, grad, other)
    found = None
    if groups > 0:
        n, co = grad.shape[:2]
        w_shape = other.shape if kind == X else (co, other.shape[1] // groups, *size)
        x_shape = (n, other.shape[1] * groups, *size) if kind == X else other.shape
        found = of_convolution(x_shape, w_shape, *stride, *padding, groups, *dilation)
        if found is not None and grad.shape != (x_shape[0], found.ci, found.ih, found.iw):
            found = None
    return found or _does_not_fit(name, kind, grad, other, size, stride, padding, groups, dilation)


def _name_of_checked(op: str, kind: int, grad, other) -> str:
    name = f"aeup.{op}_{'input' if kind == X else 'weight'}_gradient"
    if grad.dim() != 4 or other.dim() != 4:
        raise RuntimeError(f"{name}: expected 4-D tensors, got shapes {list(grad.shape)} and {list(other.shape)}")
    if grad.dtype != other.dtype or grad.device != other.device:
        raise RuntimeError(
            f"{name}: expected one dtype and device, got {grad.dtype} on {grad.device} and {other.dtype} on "
            f"{other.device}"
        )
    return name


def _does_not_fit(name: str, kind: int, grad, other, size, stride, padding, groups, dilation):
    what = "weight" if kind == X else "input"
    raise RuntimeError(
        f"{name}: grad_output {list(grad.shape)} does not fit {what} {list(other.shape)}, size {list(size)}, "
        f"stride {list(stride)}, padding {list(padding)}, groups {groups}, dilation {list(dilation)}"
    )


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


def same_padding(kernel, dilation=(1, 1)) -> tuple[tuple, tuple]:
    """The padding of "same", and the rows and columns that then are too many at the top and left."""
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((s + 1) // 2 for s in spans), tuple(s % 2 for s in spans)


def _int(value):
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, (bool, float)) or not hasattr(value, "__index__"):
        return None
    return value.__index__()


def transposed_of_call(x_shape, w_shape, stride, padding, output_padding, dilation, groups) -> Geometry | None:
    """The geometry of :func:`aeup.conv_transpose2d`; None where torch shall serve it, or raise its error."""
    pairs = [int_pair(a) for a in (stride, padding, output_padding, dilation)]
    both = int_pair(groups)
    if None in pairs or both is None or isinstance(groups, (list, tuple)):
        return None
    (sh, sw), (ph, pw), (oph, opw), (dh, dw) = pairs
    if len(x_shape) == 3:
        x_shape = (1, *x_shape)
    return geometry(x_shape, w_shape, sh, sw, ph, pw, oph, opw, both[0], dh, dw)


def convolution_of_call(x_shape, w_shape, stride, padding, dilation, groups) -> tuple[Geometry | None, tuple]:
    """Those of :func:`aeup.conv2d`, and the rows and columns to leave out at the top and left ("same" with an even
    kernel)."""
    pairs, crop, ones = [int_pair(a) for a in (stride, dilation, groups)], (0, 0), (1, 1)
    if None in pairs or isinstance(groups, (list, tuple)) or len(w_shape) != 4:
        return None, crop
    strides, (dh, dw), (groups, _) = pairs
    if isinstance(padding, str):
        if padding != "valid" and (padding != "same" or strides != ones):
            return None, crop
        pads, crop = same_padding(w_shape[2:], (dh, dw)) if padding == "same" else ((0, 0), crop)
    else:
        pads = int_pair(padding)
    if len(x_shape) == 3:
        x_shape = (1, *x_shape)
    return pads and of_convolution(x_shape, w_shape, *strides, *pads, groups, dh, dw), crop
