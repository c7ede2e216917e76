"""The check of a backend's batch normalisation, forward and backward, against float64 and torch's own kernels."""

import torch
from cases import LAYOUTS
from test_batch_norm import by_torch, tensors

import aeup


def results(fn, given, grad, **options):
    """Output, running statistics afterwards, gradients of x, weight and bias."""
    x, mean, var, *affine = (t if t is None else t.clone(memory_format=torch.preserve_format) for t in given)
    leaves = [t.requires_grad_() for t in (x, *affine) if t is not None]
    y = fn(x, mean, var, *affine, **options)
    return y, mean, var, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def unfused(*args, **options):
    """torch's own kernels: outside deterministic mode, which would take other ones or raise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return results(by_torch, *args, **options)
    finally:
        torch.use_deterministic_algorithms(before)


def check(
    shape, dtype, layout, activation, training=True, affine=True, backend="cuda", device="cuda", away=0.0, narrow=False
):
    """Each result's largest error against float64 is at most twice torch's, plus a few units in the last place. `away`:
    the mean of the channels, in deviations; `narrow`: parameters and running statistics are of `dtype` too."""
    given = tensors(shape, dtype, layout, affine, dtype if narrow else None)
    given = [t if t is None else t.to(device) for t in given]
    given[0] += away
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(given[0])
    grad = grad.contiguous(memory_format=LAYOUTS[layout])
    options = dict(training=training, momentum=0.3, eps=1e-3, activation=activation)
    wide = [t if t is None else t.double() for t in given]
    # Where the activation's derivative jumps, rounding decides on which side an element is: no gradient comes there.
    copies = (t if t is None else t.clone() for t in wide)  # running statistics are updated in place
    before = by_torch(*copies, **options | {"activation": None}).abs()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * max(away, 1)
    grad[before <= 64 * eps * before.max()] = 0
    with aeup.backend(backend):
        got = results(aeup.batch_norm, given, grad, **options)
    exact, other = unfused(wide, grad.double(), **options), unfused(given, grad, **options)
    assert got[0].dtype is dtype and got[0].stride() == given[0].stride() == got[3].stride()
    for name, a, b, c in zip(("y", "mean", "var", "dx", "dweight", "dbias"), got, exact, other, strict=False):
        assert torch.isfinite(a).all(), name
        size, ulps = b.abs().max().item(), 4
        if dtype is torch.float64:  # torch is the reference: its long sums carry the rounding of a random walk
            walk = (got[0].numel() / shape[1]) ** 0.5
            size, ulps = max(size, walk if name[1:] in ("weight", "bias") else 0), max(16, walk)
        floor = ulps * torch.finfo(a.dtype).eps * size
        if name.startswith("d"):  # sums over the channel, of products rounded to `a.dtype` where torch's are not
            floor *= 2
        error, allowed = (a.double() - b).abs().max().item(), 2 * (c.double() - b).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
