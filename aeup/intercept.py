"""aeup for code that calls torch's upsampling functions itself: a torch function mode, for a block of code."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aeup.functional import conv_transpose2d, interpolate
from aeup.ops.eager import scripted
from aeup.ops.interpolate import MODES

__all__ = ["Intercepted", "InterceptedCall", "intercept"]


@dataclass(frozen=True)
class InterceptedCall:
    """Calls of one function with one kind of input. `taken`: aeup's function, or "" where torch ran for `reason`."""

    function: str
    call: str
    count: int
    taken: str
    reason: str = ""

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.function}({self.call}){times} -> " + (self.taken or f"torch: {self.reason}")


class Intercepted(list):
    """A list of :class:`InterceptedCall`; prints as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "no upsampling function of torch was called"


class intercept(TorchFunctionMode):
    """``with aeup.intercept() as mode: ...``: inside the block, in this thread, ``F.interpolate``, ``F.upsample*`` and
    ``F.conv_transpose2d`` (``torch.conv_transpose2d``) run by aeup, called directly or by modules of torch. Nothing is
    patched, and gradients of what was computed inside stay aeup's outside. ``mode.calls`` tells what was taken and what
    was left to torch, as :class:`Intercepted`; :func:`aeup.explain` tells which kernels run.

    The block may be compiled with its contents, or around a compiled function; what is compiled, or traced by
    torch.fx or torch.jit, is not listed.

    An interpolate is not joined to the convolution after it here; :func:`aeup.swap` does that. When the interpolate is
    called it is not known who else will see its result, and no later moment is safe: reference counts cannot tell a
    variable that will be overwritten from one that will be read (and newer Pythons borrow references); a stand-in that
    computes late meets code that never asks torch (extensions, other threads, replayed CUDA graphs), which would find
    its input overwritten or its values missing, and gradients asked for the result would find it outside of the graph.
    A swap reads the code of the forward instead, and joins only what the code proves.

    Source: torch.overrides.TorchFunctionMode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.interpolate:
            out = interpolate(*args, **kwargs)
            self._note(_interpolate_key, out, args, kwargs)
            return out
        if func is F.conv_transpose2d:
            out = conv_transpose2d(*args, **kwargs)
            self._note(_conv_key, out, args, kwargs)
            return out
        return func(*args, **kwargs)

    def _note(self, key: Callable, out, args, kwargs) -> None:
        if isinstance(out, Tensor) and not torch.compiler.is_compiling() and not scripted():
            self._seen[key(*args, **kwargs)] += 1

    @property
    def calls(self) -> Intercepted:
        """What was called so far."""
        return Intercepted(_described(*key, count) for key, count in self._seen.items())


def _interpolate_key(
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    return "F.interpolate", tuple(input.shape), input.dtype, mode


def _conv_key(input, weight, bias=None, *args, **kwargs):
    return "F.conv_transpose2d", tuple(input.shape), input.dtype, tuple(weight.shape)


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _described(function: str, shape: tuple, dtype: torch.dtype, what, count: int) -> InterceptedCall:
    resampling = function == "F.interpolate"
    call = f"{list(shape)}, {what if resampling else f'weight {list(what)}'}, {str(dtype)[6:]}"
    reason = ""
    if resampling and (len(shape) != 4 or what not in MODES):
        reason = f"aeup serves 4-D input in modes {', '.join(MODES)}"
    elif dtype not in _FLOATS and not (resampling and dtype is torch.uint8):
        reason = "aeup serves float32, float64, float16 and bfloat16"
    taken = "" if reason else ("aeup.interpolate" if resampling else "aeup.conv_transpose2d")
    return InterceptedCall(function, call, count, taken, reason)
