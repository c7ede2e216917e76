"""Convolution arithmetic as in Dumoulin & Visin, 2016, "A guide to convolution arithmetic for deep learning", arXiv
1603.07285: the matrix of a convolution, and the guide's relationships between sizes, under their numbers.

A transposed convolution multiplies by the transpose of a convolution's matrix: that is where its name comes from, and
all there is to its mathematics.
"""

import torch
from torch import Tensor

from aeup.ops.conv_shapes import int_pair

__all__ = ["RELATIONSHIPS", "convolution_matrix"]


def convolution_matrix(
    weight: Tensor,
    input_size: tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    sparse: bool = False,
) -> Tensor:
    """The matrix C of a convolution: ``C @ x.flatten()`` is ``conv2d(x, weight, ...).flatten()`` for x [C_in, H, W],
    and ``C.T @ y.flatten()`` is ``conv_transpose2d(y, weight, ...).flatten()``.

    Args:
        weight: [C_out, C_in, kH, kW] of the convolution; the same tensor is [C_in, C_out, kH, kW] to the transposed.
        input_size: (H, W) of the convolution's input, which is the transposed convolution's output.
        stride, padding, dilation: an int, or a pair for (H, W).
        sparse: True for a sparse COO tensor.

    Returns:
        [C_out * oh * ow, C_in * H * W] in the dtype and on the device of `weight`, differentiable with respect to it.

    Raises:
        ValueError: a `weight` that is not 4-D, or arguments that leave no output.
        TypeError: another argument that is neither an int nor a pair of ints.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight must be [C_out, C_in, kH, kW], got shape {list(weight.shape)}")
    channels_out, channels_in, *kernel = weight.shape
    axes = []
    given = {"input_size": input_size, "stride": stride, "padding": padding, "dilation": dilation}
    for (i, s, p, d), k in zip(zip(*(_pair(*item) for item in given.items()), strict=True), kernel, strict=True):
        if min(i, k, s, d) < 1 or p < 0:
            raise ValueError(
                f"sizes, stride and dilation must be at least 1 and padding at least 0, got input_size {input_size}, "
                f"kernel {tuple(kernel)}, stride {stride}, padding {padding}, dilation {dilation}"
            )
        o = (i + 2 * p - d * (k - 1) - 1) // s + 1
        if o < 1:
            raise ValueError(f"no output: input_size {input_size} with padding {padding} is less than the kernel")
        first = s * torch.arange(o, device="cpu").view(-1, 1) - p
        source = first + d * torch.arange(k, device="cpu")  # [o, k]: the input index of each tap
        out, tap = ((source >= 0) & (source < i)).nonzero(as_tuple=True)
        axes.append((i, o, out, tap, source[out, tap]))
    (ih, oh, y, kh, h), (iw, ow, x, kw, w) = axes

    # Every pair of an output and an input channel with every valid (row, row tap) and (column, column tap).
    co = torch.arange(channels_out, device="cpu").view(-1, 1, 1, 1)
    ci = torch.arange(channels_in, device="cpu").view(-1, 1, 1)
    y, kh, h = (t.view(-1, 1) for t in (y, kh, h))
    rows = (co * oh + y) * ow + x
    columns = (ci * ih + h) * iw + w
    shape = torch.broadcast_shapes(rows.shape, columns.shape)
    index = [t.expand(shape).flatten().to(weight.device) for t in (rows, columns)]
    values = weight[co, ci, kh, kw].flatten()
    size = (channels_out * oh * ow, channels_in * ih * iw)
    if sparse:
        return torch.sparse_coo_tensor(
            torch.stack(index), values, size, device=weight.device, check_invariants=False
        ).coalesce()
    return weight.new_zeros(size).index_put(tuple(index), values)


def _pair(name: str, value) -> tuple[int, int]:
    pair = int_pair(value)
    if pair is None:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    return pair


# --- the relationships: sizes along one axis. i and o are a convolution's sizes, i_ and o_ a transposed one's. ---

RELATIONSHIPS = {}


def _relationship(number: int):
    def register(fn):
        RELATIONSHIPS[number] = fn
        return fn

    return register


def _require(holds: bool, condition: str) -> None:
    if not holds:
        raise ValueError(f"the relationship holds for {condition}")


@_relationship(1)
def no_padding_unit_strides(i: int, k: int) -> int:
    """s = 1, p = 0."""
    return (i - k) + 1


@_relationship(2)
def padding_unit_strides(i: int, k: int, p: int) -> int:
    """s = 1."""
    return (i - k) + 2 * p + 1


@_relationship(3)
def half_padding(i: int, k: int) -> int:
    """s = 1, odd k, p = k // 2: the size stays."""
    _require(k % 2 == 1, f"odd k, got {k}")
    return i + 2 * (k // 2) - (k - 1)


@_relationship(4)
def full_padding(i: int, k: int) -> int:
    """s = 1, p = k - 1."""
    return i + 2 * (k - 1) - (k - 1)


@_relationship(5)
def no_padding_strides(i: int, k: int, s: int) -> int:
    """p = 0."""
    return (i - k) // s + 1


@_relationship(6)
def padding_strides(i: int, k: int, s: int, p: int) -> int:
    """Every convolution without dilation."""
    return (i + 2 * p - k) // s + 1


@_relationship(7)
def pooling(i: int, k: int, s: int) -> int:
    """Every pooling; p = 0."""
    return (i - k) // s + 1


@_relationship(8)
def no_padding_unit_strides_transposed(i_: int, k: int) -> int:
    """The transpose of s = 1, p = 0; it convolves with padding k - 1."""
    return i_ + (k - 1)


@_relationship(9)
def padding_unit_strides_transposed(i_: int, k: int, p: int) -> int:
    """The transpose of s = 1; it convolves with padding k - p - 1."""
    return i_ + (k - 1) - 2 * p


@_relationship(10)
def half_padding_transposed(i_: int, k: int) -> int:
    """The transpose of s = 1, odd k, p = k // 2: the size stays."""
    _require(k % 2 == 1, f"odd k, got {k}")
    return i_ + (k - 1) - 2 * (k // 2)


@_relationship(11)
def full_padding_transposed(i_: int, k: int) -> int:
    """The transpose of s = 1, p = k - 1; it convolves without padding."""
    return i_ - (k - 1)


@_relationship(12)
def no_padding_strides_transposed(i_: int, k: int, s: int) -> int:
    """The transpose of p = 0 where i - k is a multiple of s; it convolves an input stretched by s - 1 zeros."""
    return s * (i_ - 1) + k


@_relationship(13)
def padding_strides_transposed(i_: int, k: int, s: int, p: int) -> int:
    """The transpose where i + 2p - k is a multiple of s."""
    return s * (i_ - 1) + k - 2 * p


@_relationship(14)
def padding_strides_transposed_odd(i_: int, k: int, s: int, p: int, a: int) -> int:
    """Every transpose without dilation; a = (i + 2p - k) mod s tells apart the s sizes that convolve to the same one.
    It is torch's output_padding."""
    _require(0 <= a < s, f"0 <= a < s, got a = {a}, s = {s}")
    return s * (i_ - 1) + a + k - 2 * p
