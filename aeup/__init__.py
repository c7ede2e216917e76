"""aeup: fast, exact upsampling for PyTorch decoders."""

from aeup.backends import BackendError, backend, explain, get_backend, set_backend
from aeup.decoder import Decoder
from aeup.functional import conv_transpose2d, interpolate
from aeup.nn import ConvTranspose2d, Upsample, UpsamplingBilinear2d, UpsamplingNearest2d

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "ConvTranspose2d",
    "Decoder",
    "Upsample",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
    "backend",
    "conv_transpose2d",
    "explain",
    "get_backend",
    "interpolate",
    "set_backend",
]
