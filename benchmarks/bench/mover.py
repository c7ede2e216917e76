"""The byte mover: the true ceiling of a resampling kernel on a GPU. It reads and writes as many bytes as the op, in the
op's proportion and with 16-byte accesses, and computes nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # int32 elements a step: 16 a thread


@triton.jit
def _move(src, dst, n_src, n_dst, blocks_src, blocks_dst, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    seen = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(program * blocks_src // programs, (program + 1) * blocks_src // programs):
        at = i * BLOCK + lane
        seen ^= tl.load(src + at, mask=at < n_src, other=0)
    for i in range(program * blocks_dst // programs, (program + 1) * blocks_dst // programs):
        at = i * BLOCK + lane
        tl.store(dst + at, seen, mask=at < n_dst)


def move(src: Tensor, dst: Tensor) -> None:
    """Read all of `src` and write all of `dst` (int32, 1-D, contiguous)."""
    reads, writes = triton.cdiv(src.numel(), BLOCK), triton.cdiv(dst.numel(), BLOCK)
    _move[(max(reads, writes),)](src, dst, src.numel(), dst.numel(), reads, writes, BLOCK, num_warps=4)


def buffers(read_bytes: int, write_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    def ints(n: int) -> Tensor:  # a multiple of 64 bytes, so that every access is a whole one
        return torch.ones(max(16, n // 64 * 16), dtype=torch.int32, device=device)

    return ints(read_bytes), ints(write_bytes)
