"""What the tests of the Triton kernels compute on, and the check of a convolution's three results."""

import torch
from cases import LAYOUTS, check_budget


def random(shape, dtype, layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]) if x.ndim == 4 else x


class ConvCase:
    """Tensors x, w, b and grad of one geometry in ``dtype`` and ``layout``, the results of torch in float64
    (``reference``) and in the type itself (``own``): y, dx, dw. A subclass has linear(x, w, b) by torch, and by the
    kernels forward, input_gradient and weight_gradient."""

    def gradients(self, dtype):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (self.x, self.w))
        return torch.autograd.grad(self.linear(x, w), (x, w), self.grad.to(dtype))

    def results(self, **options):
        return self.forward(**options), self.input_gradient(**options), self.weight_gradient(**options)

    def check(self):
        for name, a, reference, own in zip(("y", "dx", "dw"), self.results(), self.reference, self.own, strict=True):
            assert a.dtype == self.dtype, name
            if min(*self.x.shape[1:], *self.w.shape[1:]) > 1:  # with a size of 1 the layout is ambiguous
                assert a.is_contiguous(memory_format=LAYOUTS[self.layout]), name
            check_budget(a, reference, own, floor_ulps=4)  # the interpreter truncates to bfloat16: 1 ulp

    def check_mixed_layouts(self):
        """One of x and w is channels-last, the other contiguous: torch makes the results channels-last."""
        for a, reference, own in zip((self.forward(), self.input_gradient()), self.reference, self.own, strict=False):
            assert a.is_contiguous(memory_format=torch.channels_last)
            check_budget(a, reference, own, floor_ulps=4)
