"""Packed MXFP4 experts back to BF16 values, in one launch for each of the two matrices. `moe_many` defines it.

A program takes the pages of 16 rows across `BK` columns: it reads words and scales as the products of `moe_triton` do,
and writes the rows where the checkpoint has them. Bound by what it writes: two bytes a weight.
"""

import torch
import triton
import triton.language as tl

from .moe import PAGE_K, PAGE_ROWS, PackedExperts
from .moe_triton import _scaled, _unpack

_COLUMNS = 512


@triton.jit
def _decode_kernel(
    OUT, W, S, rows,
    COLUMNS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """OUT bf16 [n, rows, COLUMNS] <- W int16 and S uint8 [n, pages] of ROWS x K weights a matrix.

    INTERLEAVED: of 16 rows the first 8 are of the upper half of OUT's rows, the others of the lower half.
    """
    e = tl.program_id(2).to(tl.int64)
    page = tl.program_id(1)
    k = tl.program_id(0) * BK
    m = tl.arange(0, 16)
    q = tl.arange(0, BK // 4)
    g = tl.arange(0, BK // 32)
    inside = k + 4 * q < K
    words = W + e * (ROWS * (K // 4)) + page * (4 * K) + k // 128 * 512
    words = tl.load(words + (m * 32)[:, None] + (q // 32 * 512 + q % 32)[None, :], mask=inside[None, :], other=0)
    scales = S + e * (ROWS * (K // 32)) + page * (K // 2) + k // 128 * 64
    scales = tl.load(
        scales + (m * 4)[:, None] + (g // 4 * 64 + g % 4)[None, :], mask=(k + 32 * g < K)[None, :], other=0
    )
    if PTX:
        scales = (scales.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    else:
        scales = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    scales = tl.broadcast_to(scales[:, :, None], (16, BK // 32, 8)).reshape(16, BK // 4)
    w0, w1, w2, w3 = _unpack(words, PTX)
    even = tl.interleave(_scaled(w0, scales, PTX), _scaled(w2, scales, PTX))
    odd = tl.interleave(_scaled(w1, scales, PTX), _scaled(w3, scales, PTX))
    row = page * 16 + m
    valid = row < rows
    if INTERLEAVED:
        index = page * 8 + m % 8
        valid = index < rows // 2
        row = m // 8 * (rows // 2) + index
    column = k + tl.arange(0, BK)
    at = OUT + e * rows * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    values = tl.interleave(even, odd).to(OUT.dtype.element_ty)
    tl.store(at, values, mask=valid[:, None] & (column < COLUMNS)[None, :])


def _decode(words: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, interleaved: bool) -> torch.Tensor:
    n, pages, across = words.shape[:3]
    k = across * PAGE_K
    out = torch.empty(n, rows, columns, dtype=torch.bfloat16, device=words.device)
    grid = (triton.cdiv(k, _COLUMNS), pages, n)
    with torch.cuda.device_of(words):
        _decode_kernel[grid](
            out, words, scales, rows, columns, k, pages * PAGE_ROWS, interleaved, _COLUMNS, words.is_cuda, num_warps=4
        )  # the number of columns is a constant so that stores are wide
    return out


def decode_experts(experts: PackedExperts, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`moe_many.decode_experts` for CUDA tensors (or, in Triton's interpreter, for CPU ones)."""
    gate_up, gate_up_scales, down, down_scales = (
        t[first:last] for t in (experts.gate_up, experts.gate_up_scales, experts.down, experts.down_scales)
    )
    return (
        _decode(gate_up, gate_up_scales, 2 * experts.inter, experts.hidden, True),
        _decode(down, down_scales, experts.hidden, experts.inter, False),
    )
