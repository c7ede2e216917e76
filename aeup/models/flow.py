"""Inverse autoregressive flow over masked autoencoders.

D. P. Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, arXiv 1606.04934, section 3,
equation 10; M. Germain et al., MADE: Masked Autoencoder for Distribution Estimation, arXiv 1502.03509.

One block takes z to

    z' = exp(s) * z + m,    (m, s) = MADE(z, context),

where m_i and s_i depend only on the components of z before i in the block's order. So dz'/dz is triangular with exp(s)
on the diagonal, and log |det dz'/dz| = sum_i s_i. Every second block has the order reversed. The last layer of each
MADE starts at zero, so that the flow starts as the identity. (The paper's gated form, g * z + (1 - g) * m, starts by
shrinking z and with little gradient for m; on digits that lost latent dimensions for good.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aeup.decoder import check_int

LARGEST = 3.0  # |s| stays below: no exp overflows


class MaskedLinear(nn.Linear):
    """Linear layer with fixed zeros: output i sees input j only where ``mask[i, j]``."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """z [N, dim], context [N, context] -> m and s, each [N, dim]; m_i and s_i see the z_j before i and the context.

    Input i has degree i + 1 (dim - i if `reverse`), hidden units have degrees 0 ... dim - 1. A hidden unit sees inputs
    of at most its own degree, an output sees hidden units of a lower degree than its own; those of degree 0 see the
    context alone.
    """

    def __init__(self, dim: int, hidden: int, context: int, reverse: bool = False) -> None:
        super().__init__()
        order = torch.arange(1, dim + 1)
        order = order.flip(0) if reverse else order
        degree = torch.arange(hidden) * dim // hidden
        self.input = MaskedLinear(degree[:, None] >= order)
        self.context = nn.Linear(context, hidden, bias=False)
        self.hidden = MaskedLinear(degree[:, None] >= degree)
        self.output = MaskedLinear((order[:, None] > degree).repeat(2, 1))

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        h = F.elu(self.input(z) + self.context(context))
        return self.output(F.elu(self.hidden(h))).chunk(2, dim=1)


class InverseAutoregressiveFlow(nn.Module):
    """z [N, dim], context [N, context] -> z' [N, dim] and log |det dz'/dz|, [N].

    Args:
        dim, context: lengths of z and of the context.
        blocks: how many MADEs, one after the other.
        hidden: units of each of their two hidden layers, at least one.
    """

    def __init__(self, dim: int, context: int, blocks: int = 2, hidden: int = 256) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("context", context), ("blocks", blocks), ("hidden", hidden)):
            check_int(name, value)
        self.blocks = nn.ModuleList(MADE(dim, hidden, context, reverse=i % 2 == 1) for i in range(blocks))
        for block in self.blocks:
            nn.init.zeros_(block.output.weight), nn.init.zeros_(block.output.bias)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(z.shape[0])
        for block in self.blocks:
            m, s = (t.to(z.dtype) for t in block(z, context))
            s = LARGEST * torch.tanh(s / LARGEST)
            z = torch.exp(s) * z + m
            log_det = log_det + s.sum(1)
        return z, log_det
