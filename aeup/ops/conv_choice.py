"""Where torch's own kernel (cuDNN) is the faster one, by measurement: the tuned table conv_choice.json.

A rule names a kernel family and, where it matters, the pass, the dtype class (with "tf32" for float32 that may be
multiplied so), the layout, and the most pixels (N * ih * iw) that it holds for; the first that fits decides.
"""

import json
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path

_LEAST = len("NVIDIA H")  # as much of a device's name must agree with an entry's, else the default holds


@lru_cache(None)
def _tables() -> dict:
    return json.loads(Path(__file__).with_name("conv_choice.json").read_text())


@lru_cache(None)
def _rules(device_name: str) -> list[dict]:
    tables = _tables()
    length, nearest = max((len(commonprefix((name, device_name))), name) for name in tables)
    return tables[nearest if length >= _LEAST else "default"]


def why_torch(device_name: str, family: str, which: str, dtype: str, layout: str, pixels: int) -> str | None:
    """The reason to leave a call to torch, or None. `which`: "forward", "input_gradient" or "weight_gradient"."""
    given = {"family": family, "pass": which, "dtype": dtype, "layout": layout}
    for rule in _rules(device_name):
        if all(rule.get(key, value) == value for key, value in given.items()):
            if pixels <= rule.get("most_pixels", pixels):
                return None if rule["backend"] == "cuda" else f"{rule['why']} (tuned table)"
    return None
