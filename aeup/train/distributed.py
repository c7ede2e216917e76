"""Training on many devices: one process each, started by torchrun.

Every process holds the model and takes its share of each batch. The gradients of the shares are summed, so that the
step is that of one process with the whole batch: the loss is the mean over the whole batch, also where the shares
differ by an image; batch norm takes its statistics over it (Ioffe & Szegedy, arXiv 1502.03167, with the sums taken
over all processes), and so does the mean activation that the sparse autoencoder's penalty is made of; and the noise
of an image is that which one process would draw for it. A last batch with fewer images than processes is left out.

This is more than torch's DistributedDataParallel does: it leaves each process its own batch statistics and noise
(``torch.nn.SyncBatchNorm`` must be asked for, and runs on GPUs only), does not work with ``torch.autograd.grad`` in a
loss, and knows one loss a model. So the gradients are summed here, in one call after the backward.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from aeup.functional import parse_activation
from aeup.models.base import BatchMean
from aeup.ops.epilogue import activate
from aeup.train.config import ConfigError, TrainingError


class PeerError(TrainingError):
    """Another process of the run ended or cannot be reached."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """The one that writes files."""
        return self.rank == 0

    def shard(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch of indices; the parts' sizes differ by at most one."""
        return torch.tensor_split(batch, self.size)[self.rank]

    def offset(self, total: int) -> int:
        """Where the part begins in a batch of ``total`` images."""
        return self.rank * (total // self.size) + min(self.rank, total % self.size)

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place; the same bits on all of them."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum ``grad`` over the processes, all in one flat buffer."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum_(torch.cat([g.reshape(-1) for g in gradients]))
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])

    def from_first(self, value: Any) -> Any:
        """A Python value of the first process, on all."""
        if self.size == 1:
            return value
        box = [value]
        with _peers():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def noise(self, share: int, total: int) -> contextlib.AbstractContextManager:
        """Inside, what is drawn for each of ``share`` images is this process's part of what is drawn for ``total``."""
        return contextlib.nullcontext() if self.size == 1 else GlobalNoise(share, total, self.offset(total))


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise PeerError(" ".join(str(e).split())) from e


@contextlib.contextmanager
def connect(device: torch.device) -> Iterator[World]:
    """The processes of torchrun (its environment variables tell), or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield current(device)
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as e:
        raise PeerError(f"the {size} processes of the run cannot meet ({' '.join(str(e).split())})") from e
    yield current(device)
    gc.collect()  # graphs that hold sums over the processes must go before the group
    dist.destroy_process_group()  # not after an error: it could wait for processes that wait for this one


def current(device: torch.device) -> World:
    if dist.is_available() and dist.is_initialized():
        return World(device, dist.get_rank(), dist.get_world_size())
    return World(device)


LIKE = {torch.randn_like, torch.rand_like, torch.bernoulli, torch.Tensor.bernoulli, torch.dropout, F.dropout}
LIKE |= {F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
FRESH = {torch.randn, torch.rand}
IN_PLACE = {getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "bernoulli_", "exponential_", "random_")}


class GlobalNoise(TorchFunctionMode):
    """Draws noise for the whole batch and keeps the rows of this process.

    All processes hold the same random state, so that together they draw what one process would. It holds for tensors
    whose first dimension is the batch; others are drawn alike in all processes.
    """

    def __init__(self, share: int, total: int, offset: int) -> None:
        super().__init__()
        self.share, self.total, self.rows = share, total, slice(offset, offset + share)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in FRESH:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if len(size) and size[0] == self.share:
                others = {k: v for k, v in kwargs.items() if k != "size"}
                return func((self.total, *size[1:]), **others)[self.rows]
        elif func in LIKE or func in IN_PLACE:
            x = args[0] if args else kwargs.pop("input")
            if x.dim() and len(x) == self.share:
                drawn = func(self._whole(x), *args[1:], **kwargs)[self.rows]
                return x.copy_(drawn) if func in IN_PLACE or kwargs.get("inplace") else drawn
            args = (x, *args[1:])
        return func(*args, **kwargs)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` in its rows of a batch of zeros, in the same memory format."""
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        whole = torch.empty((self.total, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout).zero_()
        whole[self.rows] = x
        return whole


class _Sum(torch.autograd.Function):
    """The sum over the processes; its gradient is the same map."""

    @staticmethod
    def forward(x: torch.Tensor, world: World) -> torch.Tensor:
        return world.sum_(x.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.world = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Sum.apply(grad, ctx.world), None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the shares of all processes, on every device (torch's own runs on GPUs only)."""

    def __init__(self, like: nn.modules.batchnorm._BatchNorm, world: World) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self._parameters, self._buffers, self.training = like._parameters, like._buffers, like.training
        self.activation, self.world = getattr(like, "activation", None), world

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.dim()}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._normalised(x) if self.training else super().forward(x)
        return activate(y, *parse_activation(self.activation))  # of an aeup.BatchNorm2d

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        wide, axes = x.float(), [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        here = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        sums = _Sum.apply(torch.cat([wide.sum(axes), here]), self.world)
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = wide - mean.view(shape)
        var = _Sum.apply(centred.square().sum(axes), self.world) / n
        if self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.detach(), rate)
                self.running_var.lerp_(var.detach() * (n / (n - 1)), rate)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class SyncBatchMean(BatchMean):
    """The mean over the shares of all processes."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        sums = _Sum.apply(torch.cat([x.sum(0).flatten(), x.new_full((1,), len(x))]), self.world)
        return (sums[:-1] / sums[-1]).view(x.shape[1:])


def synchronise(model: nn.Module, world: World) -> None:
    """Batch norms and batch means over all processes, and the first process's weights everywhere. Names in state_dict
    stay."""
    if world.size == 1:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
                setattr(module, name, SyncBatchNorm(child, world))
            elif type(child) is BatchMean:
                setattr(module, name, SyncBatchMean(world))
    with _peers():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
