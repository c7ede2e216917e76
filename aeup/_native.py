"""The compiled extension: loaded once; where it is missing, why, and what to do."""

import json
from importlib import import_module
from pathlib import Path

import torch

_INFO = Path(__file__).with_name("_C.json")


def build_info():
    """What the extension was built with: torch, torch_min, cuda (architectures or None), isas, machine. {} if none."""
    try:
        return json.loads(_INFO.read_text())
    except FileNotFoundError:
        return {}


def _load():
    info = build_info()
    built = f"built with torch {info['torch']} for torch >= {info['torch_min']}" if info else "not built"
    try:
        import_module("aeup._C")
    except ImportError as error:  # absent, or a symbol that this torch does not have
        return (
            f"the extension aeup._C cannot be loaded ({built}; torch {torch.__version__} is here): {error}. "
            "Rebuild it against this torch: `pip install --no-build-isolation .` in aeup's source"
        )
    return None


def raise_if_out_of_memory(error: RuntimeError, device: torch.device) -> None:
    """torch.OutOfMemoryError where an operator of the extension failed for lack of memory on `device`. The stable ABI
    loses the type of torch's errors, and in torch 2.11 their text too: only the call that failed is known."""
    text = str(error)
    if "out of memory" in text:
        raise torch.OutOfMemoryError(text) from error
    if "API call failed" in text and ('"aten::empty"' in text or "aoti_torch_empty_strided" in text):
        text = f"aeup: out of memory: torch could not allocate a result or a workspace on {device}"
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            text += f", which has {free / 2**30:.2f} of {total / 2**30:.2f} GiB free"
        raise torch.OutOfMemoryError(text) from error


missing = _load()  # None, or the reason
cuda = missing is None and bool(build_info().get("cuda"))
