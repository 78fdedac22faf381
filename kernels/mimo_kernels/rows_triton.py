"""Positions, rotations and embeddings of the rows of a pass in one launch. `rows` defines it.

_begin_kernel  BLOCK columns of one row of the embedding a program; the last of a row has position and rotations
"""

import torch
import triton
import triton.language as tl

from .launch import dependent, wait_first
from .rows import Begun, Embedding

_BLOCK = 1024  # columns a program of 4 warps: a load of 16 bytes of BF16 a thread


@triton.jit
def _begin_kernel(
    POSITIONS, ROTATED, ROWS, START, TABLE, TOKENS, EMBED, count, length, first, share,
    H: tl.constexpr, HALF: tl.constexpr, COUNT: tl.constexpr, HALF_BLOCK: tl.constexpr, COUNT_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """POSITIONS [rows], ROTATED [COUNT, rows, HALF] of TABLE [COUNT, length, HALF], ROWS [rows, H] of EMBED [share, H]
    at TOKENS [count] less first."""
    wait_first(PDL)
    t = tl.program_id(0)
    chunk = tl.program_id(1)
    source = tl.minimum(t, count - 1)
    if chunk * BLOCK < H:
        token = tl.load(TOKENS + source) - first
        h = chunk * BLOCK + tl.arange(0, BLOCK)
        held = tl.where(token < 0, 0, tl.where(token < share, H, 0))  # columns of this row in the share
        x = tl.load(EMBED + token * H + h, mask=h < held, other=0.0)
        tl.store(ROWS + t * H + h, x, mask=h < H)
    else:
        position = tl.load(START) + source
        tl.store(POSITIONS + t, position)
        i = tl.arange(0, COUNT_BLOCK)[:, None]
        r = tl.arange(0, HALF_BLOCK)[None, :]
        inside = (i < COUNT) & (r < HALF)
        values = tl.load(TABLE + (i * length + position) * HALF + r, mask=inside, other=0.0)
        tl.store(ROTATED + (i * tl.num_programs(0) + t) * HALF + r, values, mask=inside)


def begin(
    start: torch.Tensor, padded: int, count: int, rotations: torch.Tensor, embedding: Embedding | None = None
) -> Begun:
    """`rows.begin` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    kinds, _, length, half = rotations.shape
    positions = torch.empty(padded, dtype=torch.int64, device=start.device)
    rotated = torch.empty(kinds, 2, padded, half, dtype=rotations.dtype, device=start.device)
    tokens, table, first = embedding or (start, rotations, 0)
    columns = table.shape[1] if embedding else 0
    rows = torch.empty((padded, columns) if embedding else 0, dtype=table.dtype, device=start.device)
    with torch.cuda.device_of(start):
        _begin_kernel[(padded, triton.cdiv(columns, _BLOCK) + 1)](
            positions, rotated, rows, start, rotations, tokens.contiguous(), table, count, length, first, len(table),
            columns, half, 2 * kinds, triton.next_power_of_2(half), triton.next_power_of_2(2 * kinds),
            _BLOCK, **dependent(start), num_warps=4,
        )  # fmt: skip
    return Begun(positions, rotated, rows)
