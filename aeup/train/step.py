"""The training step: the losses, their gradients, and the optimizers of all players.

On a GPU the whole step is one CUDA graph for each size of batch (an epoch's last batch may be smaller). The first
steps of a size run eagerly, on the stream of the capture: they are steps of the run like any other. Both ways run the
same function on the same buffers; the learning rate and the model's schedules are tensors on the device, written
before the step, and torch's generator counts a replay's random numbers as it would count the eager step's. So the
losses do not depend on the way.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from aeup.models import Model
from aeup.train.config import TrainConfig, TrainingError
from aeup.train.copies import Copies
from aeup.train.distributed import World

EAGER_STEPS = 3  # of each batch size, before its capture: libraries and tuners set themselves up in the first ones


@dataclass
class Slot:
    """What a batch of one size needs; a graph reads and writes these addresses."""

    x: torch.Tensor
    target: torch.Tensor | None
    total: int  # images of the batch over all processes
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    losses: torch.Tensor | None = None


class Step:
    """Called with a batch, takes one step and returns the losses [len(names)] of this process's share.

    Args:
        model: in training mode; its parameters stay where they are.
        config: `graph` and `bf16` must be resolved.
    """

    def __init__(self, model: Model, config: TrainConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        gpu = world.device.type == "cuda"
        self.lr = torch.full((), config.lr, dtype=torch.float32, device=world.device)
        self.parameters = {k: [p for p in v.parameters() if p.requires_grad] for k, v in model.players().items()}
        self.optimizers = {
            player: torch.optim.Adam(parameters, lr=self.lr, betas=config.betas, fused=True, capturable=gpu)
            for player, parameters in self.parameters.items()
        }
        held = config.bf16 and not config.compile and model.plain_weights  # torch.compile fuses the casts itself
        self.copies = Copies(model.modules() if held else ())
        self.average = copy.deepcopy(model).eval().requires_grad_(False) if config.ema else None
        self.loss = torch.compile(model.loss, dynamic=False) if config.compile else model.loss
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.names: list[str] = []  # of the losses, known after the first step
        self.slots: dict[tuple[int, int], Slot] = {}
        self.stream = torch.cuda.Stream(world.device) if config.graph else None
        self.pool = None

    def __call__(self, x: torch.Tensor, target: torch.Tensor | None, total: int, step: int, steps: int) -> torch.Tensor:
        """Step ``step`` of ``steps``, from 0, with this process's share ``x`` of a batch of ``total`` images."""
        slot = self._slot(x, target, total)
        self.lr.fill_(self.config.lr_at(step, steps))
        self.model.set_progress(step, steps)
        slot.runs += 1
        if self.stream is None:
            return self._update(slot)
        if slot.runs <= EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self._update(slot)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses.clone()  # on this stream, so that its memory is not reused while it is read
        if slot.graph is None:
            self._capture(slot)
        slot.graph.replay()
        return slot.losses.clone()

    def _slot(self, x: torch.Tensor, target: torch.Tensor | None, total: int) -> Slot:
        slot = self.slots.get((len(x), total))
        if slot is None:
            buffer = torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=self.memory_format)
            slot = Slot(buffer, None if target is None else torch.empty_like(target), total)
            self.slots[len(x), total] = slot
        slot.x.copy_(x)
        if target is not None:
            slot.target.copy_(target)
        return slot

    def _capture(self, slot: Slot) -> None:
        """Records the step, and runs nothing. The graphs share their memory: each reads what it wrote itself only."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a loader's thread may pin memory, and NCCL's may look at events, during the capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                slot.losses = self._update(slot)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            reason = f"the step of {self.model.name} cannot be one CUDA graph ({' '.join(str(e).split())})"
            raise TrainingError(f"{reason}: train with --no-graph (graph=False)") from e
        slot.graph, self.pool = graph, graph.pool()

    def _update(self, slot: Slot) -> torch.Tensor:
        x, target, config, world = slot.x, slot.target, self.config, self.world
        entries: dict[str, torch.Tensor] = {}
        for player, parameters in self.parameters.items():
            optimizer, copies = self.optimizers[player], self.copies
            optimizer.zero_grad(set_to_none=True)  # the backward writes fresh gradients, in a graph always the same
            autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=config.bf16)
            with autocast, world.noise(len(x), slot.total), copies.in_use(parameters):
                losses = self.loss(x, target, player)
            goal = losses[self.model.minimise[player]]
            if world.size > 1:
                goal = goal * (len(x) / slot.total)
            goal.backward(inputs=copies.leaves(parameters))
            copies.give_back(parameters)
            world.sum_gradients(parameters)
            if config.clip:
                clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            entries.update((key, value.detach().float()) for key, value in losses.items())
        if self.average is not None:
            self._add_to_average()
        self.names = list(entries)
        return torch.stack(list(entries.values()))

    @torch.no_grad()
    def _add_to_average(self) -> None:
        mean, now = list(self.average.parameters()), list(self.model.parameters())
        get_ema_multi_avg_fn(self.config.ema)(mean, now, None)
        for a, b in zip(self.average.buffers(), self.model.buffers(), strict=True):
            a.copy_(b)

    def state(self) -> dict:
        optimizers = {player: optimizer.state_dict() for player, optimizer in self.optimizers.items()}
        return {"optimizers": optimizers, "average": None if self.average is None else self.average.state_dict()}

    def load_state(self, state: dict) -> None:
        """Before the first step: a graph would not see the optimizers' new tensors."""
        if state["optimizers"].keys() != self.optimizers.keys():
            raise ValueError(f"optimizers for {list(state['optimizers'])}, the model has {list(self.optimizers)}")
        for player, optimizer in self.optimizers.items():
            capturable = optimizer.defaults["capturable"]
            saved = copy.deepcopy(state["optimizers"][player])
            for group in saved["param_groups"]:  # of this device, not of the one on which the run began
                group.update(lr=self.lr, fused=True, capturable=capturable, betas=self.config.betas)
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["lr"] = self.lr  # load_state_dict copies it
        if self.average is not None:
            self.average.load_state_dict(state["average"])
