"""The greedy choice in one launch, acceptance of a chain in another. `choice` defines them.

    _best_kernel    BLOCK columns of one row a program
    _accept_kernel  one program of one warp: what every thread reads of the state comes before what any of them writes

Names: r = row, p = pair of a row.
"""

import torch
import triton
import triton.language as tl

from .choice import Best, Text
from .launch import dependent, wait

_BLOCK = 4096  # columns a program of 4 warps: four loads of 16 bytes of BF16 a thread


@triton.jit
def _best_kernel(
    PAIRS, LOGITS, row_stride, first, limit, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """PAIRS [rows, programs] of LOGITS [rows, COLUMNS], whose columns are tokens first, first + 1, ... below limit."""
    wait(PDL)
    part = tl.program_id(0)
    row = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    # The limit is no part of the mask: with it the load would be one of single values.
    x = tl.load(LOGITS + row.to(tl.int64) * row_stride + column, mask=column < COLUMNS, other=0.0)
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)  # from here on no rule of floating point has a say
    size = bits & 0x7FFFFFFF
    order = tl.where(size > 0x7F800000, 0x7FFFFFFF, tl.where(size == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF)))
    pair = (order.to(tl.int64) << 32) | (0x7FFFFFFF - first - column).to(tl.int64)
    none = tl.full((BLOCK,), 1, tl.int64) << 63
    inside = (column < COLUMNS) & (column < limit - first)
    tl.store(PAIRS + row * tl.num_programs(0) + part, tl.max(tl.where(inside, pair, none), 0))


@triton.jit
def _accept_kernel(
    ANCHOR, POSITION, LEFT, TURN, STOPS, RECORD, RECORDS, SLOT, OWN, DRAFTS, rows, parts, width, slots,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The tensors of a Text, OWN [rows] or with PARTS > 0 pairs [rows, parts], DRAFTS [rows - 1]; width of a record."""
    wait(PDL)
    r = tl.arange(0, ROWS)
    real = r < rows
    if PARTS > 0:
        p = tl.arange(0, PARTS)
        held = real[:, None] & (p < parts)[None, :]
        none = tl.full((ROWS, PARTS), 1, tl.int64) << 63
        pairs = tl.where(held, tl.load(OWN + r[:, None] * parts + p[None, :], mask=held, other=0), none)
        own = 0x7FFFFFFF - (tl.max(pairs, 1) & 0xFFFFFFFF)
    else:
        own = tl.load(OWN + r, mask=real, other=0)
    drafts = tl.load(DRAFTS + r, mask=r < rows - 1, other=0)
    left = tl.load(LEFT)
    position = tl.load(POSITION)
    turn = tl.load(TURN)
    slot = tl.load(SLOT)
    ends = tl.load(STOPS + own, mask=real, other=0) != 0
    accepted = tl.min(tl.where((drafts == own) & (r < rows - 1), rows, r), 0).to(tl.int64)
    stop = tl.min(tl.where(ends & real, r, rows), 0).to(tl.int64)
    kept = tl.minimum(tl.minimum(accepted, stop) + 1, left)
    after = tl.where(stop < kept, 0, left - kept)
    tl.store(ANCHOR, tl.sum(tl.where(r == kept - 1, own, 0), 0), mask=kept > 0)
    tl.store(POSITION, position + kept)
    tl.store(TURN, turn + (kept > 0).to(tl.int64))
    tl.store(LEFT, after)
    tl.store(SLOT, (slot + 1) % slots)
    at = RECORDS + slot * width
    tl.store(RECORD, kept)
    tl.store(RECORD + 1, accepted)
    tl.store(RECORD + 2, after)
    tl.store(RECORD + 3 + r, own, mask=real)
    tl.store(at, kept)
    tl.store(at + 1, accepted)
    tl.store(at + 2, after)
    tl.store(at + 3 + r, own, mask=real)


def best(logits: torch.Tensor, first: int = 0, limit: int | None = None) -> torch.Tensor:
    """`choice.best` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    parts = triton.cdiv(columns, _BLOCK)
    pairs = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    limit = first + columns if limit is None else min(limit, first + columns)
    with torch.cuda.device_of(logits):
        _best_kernel[(parts, rows)](
            pairs, logits, logits.stride(0), first, limit, columns, _BLOCK, **dependent(logits), num_warps=4
        )
    return pairs


def accept(text: Text, drafts: torch.Tensor, own: torch.Tensor | Best) -> None:
    """`choice.accept` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    chosen = (own.pairs if isinstance(own, Best) else own).contiguous()
    rows, parts = len(chosen), chosen.shape[1] if isinstance(own, Best) else 0
    with torch.cuda.device_of(chosen):
        _accept_kernel[(1,)](
            text.anchor, text.position, text.left, text.turn, text.stops.view(torch.uint8), text.record, text.records,
            text.slot, chosen, drafts.contiguous() if rows > 1 else chosen,
            rows, parts, len(text.record), len(text.records),
            triton.next_power_of_2(rows), triton.next_power_of_2(parts) if parts else 0,
            **dependent(chosen), num_warps=1,
        )  # fmt: skip
