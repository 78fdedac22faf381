"""MXFP4 experts on the many tokens of a prompt, without decoding them first. `moe_many` defines it.

    _gate_up_kernel   one tile of rows of one block of tokens a program; SwiGLU in registers
    _down_kernel      one tile of output rows of one block
    _combine_kernel   adds the outputs of a token, in the order of its ids

The pairs of a token and an expert are sorted by expert; a block is up to N neighbours of one expert. A program reads
weights as those of `moe_triton` do, codes and scales, and the tokens of its block through the sorted order: nothing is
copied together first, and codes are read once a block, the second time from the second-level cache. Decoding a layer
to BF16 for grouped products would move eight times the bytes of its codes. Places, pairs and tokens are multiplied in
int64: the outputs of all pairs may be more than 2**31.
"""

import torch
import triton
import triton.language as tl

from .moe import PAGE_K, PackedExperts
from .moe_triton import Tile, _product, _swiglu

TILES = (Tile(64, 256, 4, 4), Tile(32, 128, 1, 4))  # of these runs the first that divides the shape
_COLUMNS = 512  # outputs a program of _combine_kernel


def tokens_a_block(pairs: int, experts: int) -> int:
    """16, or more where an expert has more pairs on average: a constant of the shape."""
    return min(64, max(16, triton.next_power_of_2(triton.cdiv(pairs, experts))))


@triton.jit
def _block(BLOCKS, b, N: tl.constexpr):
    """(expert, or -1 beyond the last block; places [N] of its pairs in the sorted order; which of them are real)."""
    expert = tl.load(BLOCKS + 3 * b).to(tl.int64)
    place = tl.load(BLOCKS + 3 * b + 1) + tl.arange(0, N)
    return expert, place, place < tl.load(BLOCKS + 3 * b + 2)


@triton.jit
def _gate_up_kernel(
    HIDDEN, W, S, X, BLOCKS, ORDER,
    K: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr,
    BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """HIDDEN bf16 [pairs, ROWS / 2], sorted <- silu(gate) * up of X bf16 [T, K], both in the order of the words.

    W int16 and S uint8 [experts, pages]: ROWS x K an expert; of 16 rows the first 8 are gates, the others their ups.
    """
    expert, place, real = _block(BLOCKS, tl.program_id(1), N)
    if expert >= 0:
        row = tl.program_id(0) * BM
        token = (tl.load(ORDER + place, mask=real, other=0).to(tl.int32) // TOP_K).to(tl.int64)
        acc = tl.zeros((BM, N), tl.float32)
        weights, scales, rows = W + expert * (ROWS * K // 4), S + expert * (ROWS * K // 32), X + token * K
        for k in range(0, K, BK):
            acc = _product(acc, weights, scales, rows, row, k, K, BM, BK, PTX)
        h, at = _swiglu(acc, row, BM, N)
        out = HIDDEN + place.to(tl.int64)[None, :] * (ROWS // 2) + at[:, None]
        tl.store(out, h.to(tl.bfloat16), mask=real[None, :])


@triton.jit
def _down_kernel(
    OUT, W, S, HIDDEN, BLOCKS, ORDER, columns,
    K: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """OUT bf16 [pairs, columns], in the order of the routing <- W x HIDDEN bf16 [pairs, K], sorted."""
    expert, place, real = _block(BLOCKS, tl.program_id(1), N)
    if expert >= 0:
        row = tl.program_id(0) * BM
        pair = tl.load(ORDER + place, mask=real, other=0).to(tl.int64)
        held = tl.where(real, place, tl.load(BLOCKS + 3 * tl.program_id(1) + 1))  # a row that exists
        acc = tl.zeros((BM, N), tl.float32)
        weights, scales = W + expert * (ROWS * K // 4), S + expert * (ROWS * K // 32)
        rows = HIDDEN + held.to(tl.int64) * K
        for k in range(0, K, BK):
            acc = _product(acc, weights, scales, rows, row, k, K, BM, BK, PTX)
        column = row + tl.arange(0, BM)
        out = OUT + pair[None, :] * columns + column[:, None]
        tl.store(out, acc.to(tl.bfloat16), mask=real[None, :] & (column < columns)[:, None])


@triton.jit
def _combine_kernel(OUT, PARTS, WEIGHTS, columns, TOP_K: tl.constexpr, BC: tl.constexpr):
    """OUT bf16 [T, columns] <- the sum over j of WEIGHTS float32 [T, TOP_K] times PARTS bf16 [T, TOP_K, columns]."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    acc = tl.zeros((BC,), tl.float32)
    for j in tl.static_range(TOP_K):
        part = tl.load(PARTS + (t * TOP_K + j) * columns + c, mask=c < columns, other=0.0).to(tl.float32)
        acc += part * tl.load(WEIGHTS + t * TOP_K + j)
    tl.store(OUT + t * columns + c, acc.to(tl.bfloat16), mask=c < columns)


def blocks_of(ids: torch.Tensor, experts: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 [blocks, 3]: expert, first place and end of a block, expert -1 for those beyond the last; int64 [pairs]:
    the pairs sorted by expert). As many blocks as any routing of the shape needs; nothing waits for the device."""
    chosen, order = ids.flatten().sort(stable=True)
    numbers = torch.arange(experts + 1, device=ids.device, dtype=chosen.dtype)
    begins = torch.searchsorted(chosen, numbers)
    first = torch.zeros_like(begins)
    first[1:] = ((begins.diff() + n - 1) // n).cumsum(0)
    block = torch.arange(len(order) // n + min(experts, len(order)), device=ids.device)
    expert = torch.searchsorted(first, block, right=True) - 1
    inside = expert < experts
    e = expert.clamp(max=experts - 1)
    begin = begins[e] + (block - first[e]) * n
    end = torch.minimum(begin + n, begins[e + 1])
    return torch.stack((torch.where(inside, e, -1), begin, end), 1).int(), order


def in_word_order(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x [T, H] padded to `columns`, each 128 of them as the words have them: place 32 i + j holds element 4 j + i."""
    x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    return x.reshape(len(x), -1, PAGE_K // 4, 4).transpose(2, 3).reshape(len(x), columns)


def moe_many(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """`moe_many.moe_many` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    count, (hidden, inter), top_k = len(experts.down), experts.padded, ids.shape[1]
    n = tokens_a_block(ids.numel(), count)
    blocks, order = blocks_of(ids, count, n)
    up, down = (next(t for t in TILES if k % t.k == 0) for k in (hidden, inter))
    rows = in_word_order(x, hidden)
    middle = torch.empty(len(order), inter, dtype=torch.bfloat16, device=x.device)
    parts = torch.empty(len(order), experts.hidden, dtype=torch.bfloat16, device=x.device)
    out = torch.empty(len(x), experts.hidden, dtype=torch.bfloat16, device=x.device)
    with torch.cuda.device_of(x):
        _gate_up_kernel[(2 * inter // up.rows, len(blocks))](
            middle, experts.gate_up, experts.gate_up_scales, rows, blocks, order, hidden, 2 * inter, top_k,
            up.rows, n, up.k, x.is_cuda, num_warps=up.warps, num_stages=up.stages,
        )  # fmt: skip
        _down_kernel[(hidden // down.rows, len(blocks))](
            parts, experts.down, experts.down_scales, middle, blocks, order, experts.hidden, inter, hidden,
            down.rows, n, down.k, x.is_cuda, num_warps=down.warps, num_stages=down.stages,
        )  # fmt: skip
        _combine_kernel[(len(x), triton.cdiv(experts.hidden, _COLUMNS))](
            out, parts, weights.contiguous(), experts.hidden, top_k, _COLUMNS, num_warps=4
        )
    return out
