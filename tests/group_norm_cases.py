"""Cases of group normalisation, and the check of a backend, forward and backward, against float64 and torch's own
kernels."""

import torch
import torch.nn.functional as F
from cases import LAYOUTS

import aeup
from aeup.functional import parse_activation
from aeup.ops.epilogue import activate

# (shape, groups). Pixels that fill no register or vector, or one; one pixel; one channel, one a group, one group;
# channels that divide no register, few and many; groups of which a block has parts of two; more samples than blocks;
# planes of more than a piece.
SHAPES = (
    ((2, 6, 5, 7), 3),
    ((3, 16, 4, 4), 8),
    ((2, 20, 7, 7), 20),
    ((5, 12, 1, 1), 3),
    ((3, 1, 9, 11), 1),
    ((2, 513, 3, 2), 27),
    ((60, 4, 3, 37), 2),
    ((1, 6, 101, 103), 2),
    ((2, 40, 6, 4), 1),
    ((1, 64, 24, 24), 32),
)


def tensors(shape, dtype=torch.float64, layout="nchw", affine=True, of=None, away=0.0):
    """x, weight and bias. `of`: the dtype of the last two; `away`: the mean of x, in deviations."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64) + away
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    of = of or (torch.float64 if dtype is torch.float64 else torch.float32)
    weight, bias = (torch.randn(shape[1], generator=g, dtype=torch.float64).to(of) for _ in range(2))
    return x, *((weight, bias) if affine else (None, None))


def by_torch(x, groups, weight=None, bias=None, eps=1e-5, *, activation=None):
    return activate(F.group_norm(x, groups, weight, bias, eps), *parse_activation(activation))


def results(fn, given, grad, groups, **options):
    """Output, gradients of x, weight and bias."""
    x, *affine = (t if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in given)
    leaves = [t.requires_grad_() for t in (x, *affine) if t is not None]
    y = fn(x, groups, *affine, **options)
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def check(shape, groups, dtype, layout, activation, affine=True, backend="cuda", device="cuda", away=0.0, narrow=False):
    """Each result's largest error against float64 is at most twice torch's, plus a few units in the last place.
    `narrow`: the parameters are of `dtype` too."""
    given = tensors(shape, dtype, layout, affine, dtype if narrow else None, away)
    given = [t if t is None else t.to(device) for t in given]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(given[0])
    grad = grad.contiguous(memory_format=LAYOUTS[layout])
    options = dict(eps=1e-3, activation=activation)
    wide = [t if t is None else t.double() for t in given]
    # Where the activation's derivative jumps, rounding decides on which side an element is: no gradient comes there.
    before = by_torch(wide[0], groups, *wide[1:], eps=1e-3).abs()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * max(away, 1)
    grad[before <= 64 * eps * before.max()] = 0
    with aeup.backend(backend):
        got = results(aeup.group_norm, given, grad, groups, **options)
    exact = results(by_torch, wide, grad.double(), groups, **options)
    # torch's kernels for a GPU take parameters of the input's dtype only.
    like = [t if t is None else t.to(dtype) for t in given] if device == "cuda" else given
    other = results(by_torch, like, grad, groups, **options)
    assert got[0].dtype is dtype and got[0].stride() == given[0].stride() == got[1].stride()
    for name, a, b, c in zip(("y", "dx", "dweight", "dbias"), got, exact, other, strict=False):
        assert torch.isfinite(a).all(), name
        size, ulps = b.abs().max().item(), 4
        if dtype is torch.float64:  # torch is the reference: its long sums carry the rounding of a random walk
            walk = (got[0].numel() / shape[1]) ** 0.5
            size, ulps = max(size, walk if name in ("dweight", "dbias") else 0), max(16, walk)
        floor = ulps * torch.finfo(a.dtype).eps * size
        if name.startswith("d"):  # sums of products rounded to `a.dtype` where torch's are not
            floor *= 2
        error, allowed = (a.double() - b).abs().max().item(), 2 * (c.double() - b).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
