"""Triton kernels. Importing this package imports neither Triton nor touches a GPU; the first call does."""

from .batch_norm import batch_norm, batch_norm_backward, refuses_batch_norm
from .convolution import (
    conv2d,
    conv_epilogue_gradient,
    conv_transpose2d,
    conv_transpose2d_input_gradient,
    conv_transpose2d_weight_gradient,
    refuses_convolution,
)
from .interpolate import interpolate, refuses
from .upsample_conv import (
    refuses_upsample_conv2d,
    upsample_conv2d,
    upsample_conv2d_input_gradient,
    upsample_conv2d_weight_gradient,
)

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "conv2d",
    "conv_epilogue_gradient",
    "conv_transpose2d",
    "conv_transpose2d_input_gradient",
    "conv_transpose2d_weight_gradient",
    "interpolate",
    "refuses",
    "refuses_batch_norm",
    "refuses_convolution",
    "refuses_upsample_conv2d",
    "upsample_conv2d",
    "upsample_conv2d_input_gradient",
    "upsample_conv2d_weight_gradient",
]
