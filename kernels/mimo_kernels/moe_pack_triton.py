"""MXFP4 experts into the pages of `moe`, in one pass on a GPU: each byte is read once and written once.

Torch's operations, one after the other, move 106 bytes a weight for this; here it is 1.06. Two words of 16 bits, eight
codes, lie side by side in 32 bits, and every shift of a field stays inside of its word, so both are packed at once. A
program packs 16 rows x `P` pages of one expert: half of the rows from one matrix, half from another or from further
down, so gate and up are interleaved on the way. Names: suffix _R = rows of a half, _C = its columns, of 32 bits or of
one scale byte.
"""

import contextlib
import threading

import torch
import triton
import triton.language as tl

from .moe import MAX_SCALE_BYTE, SCALE_BIAS, Matrices, PackedExperts

_PAGES, _WARPS = 8, 4  # pages a program, 16 KB read and written
_HALF = tl.constexpr(8)
_compiled: set[tuple] = set()  # kinds of launches that were made
_compiling = threading.Lock()
_BIAS, _MOST = tl.constexpr(SCALE_BIAS), tl.constexpr(MAX_SCALE_BYTE)


@triton.jit
def _packed(v):
    """Two words of four codes as stored, first code lowest -> two words of the layout; masks undo sign extension."""
    signs = ((v << 12) & -0x7FFF8000) | ((v << 5) & 0x10001000) | ((v >> 2) & 0x02000200) | ((v >> 1) & 0x40004000)
    first = ((v << 6) & 0x01C001C0) | ((v >> 1) & 0x00380038) | ((v >> 8) & 0x00070007)
    return signs | first | ((v >> 3) & 0x0C000C00) | ((v << 1) & 0x20002000)


@triton.jit
def _half(
    WORDS, SCALES, CODES, CODE_SCALES, first, rows, row_stride, page, pages, HALF_AT: tl.constexpr, P: tl.constexpr
):
    """Eight rows from `first` on, to the rows from HALF_AT on of P pages. Returns the largest scale byte."""
    row_R = first + tl.arange(0, _HALF)
    to_R = HALF_AT + tl.arange(0, _HALF)
    column_C = page * 16 + tl.arange(0, 16 * P)
    there = (row_R < rows)[:, None] & (column_C < row_stride)[None, :]
    v = tl.load(CODES + row_R.to(tl.int64)[:, None] * row_stride + column_C[None, :], mask=there, other=0)
    at = to_R[:, None] * 16 + (column_C // 16 * 256 + column_C % 16)[None, :]
    tl.store(WORDS + at, _packed(v), mask=(column_C < pages * 16)[None, :])

    column_C = page * 4 + tl.arange(0, 4 * P)
    there = (row_R < rows)[:, None] & (column_C < row_stride // 4)[None, :]
    scale = tl.load(CODE_SCALES + row_R[:, None] * (row_stride // 4) + column_C[None, :], mask=there, other=0)
    at = to_R[:, None] * 4 + (column_C // 4 * 64 + column_C % 4)[None, :]
    tl.store(SCALES + at, (scale.to(tl.int32) + _BIAS).to(tl.uint8), mask=(column_C < pages * 4)[None, :])
    return tl.max(tl.max(scale.to(tl.int32), axis=1), axis=0)


@triton.jit(do_not_specialize=["to"])
def _pack_kernel(
    WORDS, SCALES, A, A_SCALES, B, B_SCALES, LARGEST, to, rows, row_stride, pages, a_stride, scales_stride,
    PAIRED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Expert program_id(2) of A int32 [n, rows, row_stride] and scales uint8 [n, rows, row_stride / 4], to expert `to`
    on of WORDS int32 [E, blocks, pages, 16, 16] and SCALES uint8 [E, blocks, pages, 16, 4]. PAIRED: rows 8 to 15 of a
    page are B's, of the same strides. LARGEST[0 if PAIRED else 1] <- the largest scale byte that the layout lacks.
    """
    block, page = tl.program_id(0), tl.program_id(1) * P
    e = tl.program_id(2).to(tl.int64)
    place = (to + e) * tl.num_programs(0) + block
    WORDS += place * pages * 256
    SCALES += place * pages * 64
    A += e * a_stride
    A_SCALES += e * scales_stride
    if PAIRED:
        m = _half(WORDS, SCALES, A, A_SCALES, block * 8, rows, row_stride, page, pages, 0, P)
        B += e * a_stride
        B_SCALES += e * scales_stride
        m = tl.maximum(m, _half(WORDS, SCALES, B, B_SCALES, block * 8, rows, row_stride, page, pages, 8, P))
    else:
        m = _half(WORDS, SCALES, A, A_SCALES, block * 16, rows, row_stride, page, pages, 0, P)
        m = tl.maximum(m, _half(WORDS, SCALES, A, A_SCALES, block * 16 + 8, rows, row_stride, page, pages, 8, P))
    if m > _MOST:
        tl.atomic_max(LARGEST + (0 if PAIRED else 1), m, sem="relaxed")


def pack(packed: PackedExperts, to: int, gate: Matrices, up: Matrices, down: Matrices, largest: torch.Tensor) -> None:
    """Fills the experts from `to` on; codes uint8 [n, R, K/2] and scales uint8 [n, R, K/32], each expert's rows side by
    side, `up` with the strides of `gate`. `largest` int32 [2] <- scale bytes above the layout's, of gate_up and down.

    Of several threads one compiles, and the others wait.
    """
    kind = packed.down.device, packed.hidden, packed.inter, gate[0].stride(0), down[0].stride(0)
    known = kind in _compiled
    with torch.cuda.device_of(packed.down), contextlib.nullcontext() if known else _compiling:
        _launch(packed.gate_up, packed.gate_up_scales, to, gate, up, largest)
        _launch(packed.down, packed.down_scales, to, down, None, largest)
    _compiled.add(kind)


def _launch(
    words: torch.Tensor, scales: torch.Tensor, to: int, a: Matrices, b: Matrices | None, largest: torch.Tensor
) -> None:
    codes, (other, other_scales) = a[0].view(torch.int32), a if b is None else b
    count, rows, row_stride = codes.shape
    blocks, pages = words.shape[1:3]
    assert b is None or (other.stride() == a[0].stride() and other_scales.stride() == a[1].stride())
    _pack_kernel[(blocks, triton.cdiv(pages, _PAGES), count)](
        words.view(torch.int32), scales, codes, a[1], other.view(torch.int32), other_scales, largest,
        to, rows, row_stride, pages, codes.stride(0), a[1].stride(0), b is not None, _PAGES, num_warps=_WARPS,
    )  # fmt: skip
