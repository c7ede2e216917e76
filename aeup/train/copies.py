"""bfloat16 copies of the weights of a step under autocast.

Autocast casts each weight by itself on its way into an op, and its gradient on the way back: two kernels for each, a
fifth of all that a small model's step launches. Here one fused kernel writes all copies and another reads all gradients
back. The numbers are autocast's own: there too an op's gradient leaves it in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import aeup

# Autocast casts the parameters of these. Exact types: another forward may do more with them.
CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, aeup.Conv2d, aeup.ConvTranspose2d)


class Copies:
    """Of the float32 parameters that `modules` hand to autocast. A tied parameter has one copy."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.of: dict[Tensor, Tensor] = {}  # parameter -> its copy, a leaf with a gradient of its own
        self.places: list[tuple[dict, str, Tensor]] = []  # the attributes of a module, the parameter's name in them
        for m in modules:
            for name, p in m._parameters.items() if type(m) in CAST else ():
                if p is not None and p.dtype is torch.float32:
                    if p not in self.of:
                        self.of[p] = torch.empty_like(p, dtype=torch.bfloat16).requires_grad_(p.requires_grad)
                    self.places.append((m.__dict__, name, self.of[p]))

    @contextmanager
    def in_use(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Within, the modules' forward reads the copies, those of other parameters than these without gradients. An
        attribute goes before the parameter of its name, which stays where it is, for all that goes by parameters."""
        if self.of:
            with torch.no_grad():
                torch._foreach_copy_(list(self.of.values()), list(self.of))
        own = {id(copy) for copy in self.leaves(parameters)}
        for attributes, name, copy in self.places:
            attributes[name] = copy if id(copy) in own else copy.detach()
        try:
            yield
        finally:
            for attributes, name, _ in self.places:
                del attributes[name]

    def leaves(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What to differentiate by."""
        return [self.of.get(p, p) for p in parameters]

    def give_back(self, parameters: Sequence[Tensor]) -> None:
        """The copies' gradients become those of their parameters, in float32."""
        held = [(p, self.of[p].grad) for p in parameters if p in self.of and self.of[p].grad is not None]
        for p, grad in held:
            p.grad, self.of[p].grad = torch.empty_like(grad, dtype=p.dtype), None
        if held:
            torch._foreach_copy_([p.grad for p, _ in held], [grad for _, grad in held])
