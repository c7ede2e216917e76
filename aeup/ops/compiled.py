"""The compiled extension and the Triton kernels, as the convolution ops reach them."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aeup import _native
from aeup.backends import Kernel

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- the extension ---


@lru_cache(None)
def raw(name: str, device: str = "cuda"):
    """A compiled operator, or the reason why there is none."""
    if _native.missing:
        return _native.missing
    if device == "cuda" and not _native.cuda:
        return "the extension was built without CUDA"
    if not hasattr(torch.ops.aeup_native, name):
        return f"the extension has no {name}"
    return getattr(torch.ops.aeup_native, name).default._op  # what OpOverload.__call__ calls


def call(name: str, *args, device: str = "cuda"):
    return bound(name, device)(*args)


def bound(name: str, device: str, *rest) -> Callable:
    """Operator `name` as a function of the tensors: of what comes before the arguments `rest`."""
    operator = raw(name, device)

    def run(*tensors):
        try:
            return operator(*tensors, *rest)
        except RuntimeError as error:
            _native.raise_if_out_of_memory(error, tensors[0].device)
            raise

    return run


def by_number(name: str, device: str, number: int) -> Callable:
    """`bound`, of one tensor and one number: 0.2 us less a call."""
    operator = raw(name, device)

    def run(tensor):
        try:
            return operator(tensor, number)
        except RuntimeError as error:
            _native.raise_if_out_of_memory(error, tensor.device)
            raise

    return run


def planned(name: str, x: Tensor, w: Tensor, *args) -> Callable | None:
    """What operator `name` does for all (x, w, bias) with these sizes, strides, dtype and device, and with `args`; as a
    function of the three. The extension keeps `args` under a number: each argument of a call takes long to pass. None
    where it keeps no more."""
    number = call(f"{name}_plan", x, w, *args)
    return None if number < 0 else bound("conv_planned", "cuda", number)


def refusal(t: Tensor, name: str, device: str = "cuda") -> str | None:
    if t.device.type != device:
        return f"the tensor is on {t.device}"
    operator = raw(name, device)
    if isinstance(operator, str):
        return operator
    return None if t.dtype in FLOATS else f"dtype {t.dtype} is not one of float32, float64, float16, bfloat16"


_cudnn_conv = torch.backends.cudnn.conv  # found slowly


def tf32(t: Tensor) -> bool:
    """Whether torch would let cuDNN multiply in tf32: conv.fp32_precision, which the older allow_tf32 also sets."""
    return t.dtype is torch.float32 and not t.is_cpu and _cudnn_conv.fp32_precision == "tf32"


def capability(device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


def is_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def either_last(a: Tensor, b: Tensor) -> bool:
    return is_last(a) or is_last(b)


def memory_format(a: Tensor, b: Tensor) -> torch.memory_format:
    """torch's rule for a convolution: channels-last if one of its operands is. It goes by the strides, which a tensor
    of torch's older vmap has too."""
    if type(a.shape[0]) is int and a.shape[0] == 0:
        return torch.contiguous_format
    last = torch.channels_last
    return last if last in (suggest_memory_format(a), suggest_memory_format(b)) else torch.contiguous_format


# --- triton ---


@lru_cache(None)
def _triton(predicate: str):
    """The Triton kernels, or the reason why there are none."""
    try:
        from aeup import kernels
    except ImportError as error:
        return f"aeup.kernels cannot be imported: {error}"
    return kernels if hasattr(kernels, predicate) else f"aeup.kernels has no {predicate}"


def triton_kernel(name: str, arguments: Callable, predicate: str, multiplies: bool = True) -> Kernel:
    """The kernel aeup.kernels.`name`, whose refusals aeup.kernels.`predicate` tells. `arguments` turns a kernel's
    arguments into those of that function; `multiplies`: it takes `tf32`."""

    def refuses(*args):
        module = _triton(predicate)
        return module if isinstance(module, str) else getattr(module, predicate)(name, *arguments(*args))

    def run(*args):
        options = {"tf32": tf32(args[0])} if multiplies else {}
        return getattr(_triton(predicate), name)(*arguments(*args), **options)

    def yields(*args):
        return "not measured against torch yet: ask for it by name"

    return Kernel(run, refuses, yields=yields)
