"""aeup: fast, exact upsampling for PyTorch decoders."""

from aeup.backends import BackendError, backend, explain, get_backend, set_backend
from aeup.checkerboard import checkerboard
from aeup.decoder import Decoder
from aeup.functional import batch_norm, conv2d, conv_transpose2d, group_norm, interpolate, upsample_conv2d
from aeup.intercept import intercept
from aeup.nn import (
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    GroupNorm,
    Upsample,
    UpsampleConv2d,
    UpsamplingBilinear2d,
    UpsamplingNearest2d,
    icnr_,
    to_conv_transpose,
)
from aeup.swap import swap, unswap

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "Decoder",
    "GroupNorm",
    "Upsample",
    "UpsampleConv2d",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
    "backend",
    "batch_norm",
    "checkerboard",
    "conv2d",
    "conv_transpose2d",
    "explain",
    "get_backend",
    "group_norm",
    "icnr_",
    "intercept",
    "interpolate",
    "set_backend",
    "swap",
    "to_conv_transpose",
    "unswap",
    "upsample_conv2d",
]
