"""For the tests of aeup.swap: third-party libraries, and how two models are compared."""

from collections.abc import Mapping

import pytest
import torch
from torch.utils._pytree import tree_leaves


def library(name):
    """An optional library. torchvision's wheel for CUDA has no operators beside a torch without CUDA, and cannot be
    imported (nor what imports it) before two of them exist by name."""
    if not hasattr(torch.ops.torchvision, "nms"):
        try:
            import torchvision  # noqa: F401
        except ImportError:
            pass
        except RuntimeError:
            for op in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
    return pytest.importorskip(name)


def classes_of(model):
    return [type(m) for m in model.modules()]


def outputs(model, *args):
    out = model(*args)
    out = list(out.values()) if isinstance(out, Mapping) else out
    return [t for t in tree_leaves(out) if torch.is_tensor(t)]


def output_and_gradients(model, x):
    """Outputs, the gradient of the input and of every parameter, for a fixed random gradient of the outputs."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    g = torch.Generator().manual_seed(1)
    out = outputs(model, x)
    loss = sum((o.double() * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum() for o in out)
    of = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(loss, of, allow_unused=True)
    return [o.detach() for o in out] + [
        torch.zeros_like(t) if d is None else d for t, d in zip(of, gradients, strict=True)
    ]


def close(a, b):
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
