"""Decode attention in one launch for a short cache, in two for a longer one. `attention` defines it.

    _attend_kernel   one block of the query rows of a key-value head and one split of the slots a program: online
                     softmax, then either the output (one split), or the unnormalised sum and its maximum and weight
    _join_kernel     adds the splits of a row in ascending order, with the sink

The M side of the matrix products is all query rows of all query heads of a group, padded to 64, which is the M of
WGMMA, or to multiples of 128 where there are more: then every key is read from memory once for both halves. Key size
192 is 128 + 64, two products into one accumulator. A masked key has weight zero exactly.

The grid follows from the capacity alone. A split is as few blocks of keys as let `splits` of them cover the rows that
are stored, so that short and long contexts both use the whole GPU; splits beyond exit at once.

Names: m = query row of a block (row t of head h: m = t * GROUP + h), s = slots of a block, d = element of a head.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .attention import MAX_ROWS, TreeRows, fits
from .launch import dependent, prefetch_span, wait

_LOG2_E = 1.4426950408889634
_PROGRAMS = 128  # of a long context, on 132 multiprocessors: 65 to 128 of them have work
_ALONE = 256  # slots that one program walks through in less time than a second launch takes
_COLUMNS = 32  # output elements a program of _join_kernel


@dataclass(frozen=True)
class Config:
    """`rows` x `keys` of a block, `warps` and pipeline `stages` for it, and the most `splits` of the slots."""

    rows: int
    keys: int
    warps: int
    stages: int
    splits: int


BLOCKS = (  # rows, keys, warps, stages: what `bench --sweep` tries
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 4),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 4),
    (16, 64, 4, 3),
    (16, 64, 4, 4),
    (16, 64, 8, 3),
    (16, 32, 4, 5),
)


def config_for(query_rows: int, groups: int, slots: int) -> Config:
    """What runs for T * N / G query rows of each of G heads and S slots. A constant of the shape."""
    if slots <= _ALONE:
        return Config(16, 64, 4, 3, 1)
    rows, warps = (64, 4) if query_rows <= 64 else (128, 8)
    blocks = groups * triton.cdiv(query_rows, rows)
    fill = max(8, triton.next_power_of_2(_PROGRAMS // blocks + 1) // 2)
    return Config(rows, 64, warps, 3, min(fill, triton.next_power_of_2(triton.cdiv(slots, 64))))


@triton.jit
def _split_size(stored, SPLITS: tl.constexpr, BN: tl.constexpr):
    """The smallest multiple of BN of which SPLITS cover `stored` slots."""
    return tl.cdiv(stored, SPLITS * BN) * BN


@triton.jit
def _scores(q, q_tail, at, inside, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[BM, BN] products with the keys of HEAD + TAIL elements at the pointers `at` [BN]; 0 for those not `inside`."""
    keys = tl.load(at[:, None] + tl.arange(0, HEAD)[None, :], mask=inside[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(keys))
    if TAIL > 0:
        tail = tl.load(at[:, None] + HEAD + tl.arange(0, TAIL)[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q_tail, tl.trans(tail), scores)
    return scores


@triton.jit
def _seen(position, query, first, bits, WINDOW: tl.constexpr, TREE: tl.constexpr):
    """[BM, BN]: whether queries at positions `query` [BM] see keys at `position` [BN].

    In a tree, bit j of `bits` [BM] says whether new row j is an ancestor; bit 30 is set and stands for older positions.
    """
    if TREE:
        row = position - first
        seen = (bits[:, None] & tl.where(row >= 0, 1 << tl.maximum(row, 0), 1 << 30)[None, :]) != 0
    else:
        seen = position[None, :] <= query[:, None]
    if WINDOW > 0:  # which holds all new rows, so that it is no matter that their depths are not their places
        seen = seen & (query[:, None] - position[None, :] < WINDOW)
    return seen


@triton.jit
def _attend_kernel(
    OUT, STATS, Q, KEYS, VALUES, START, SINK, DEPTHS, ANCESTORS,
    q_stride, k_stride, v_stride, slots, tokens, padded, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, V: tl.constexpr,
    WINDOW: tl.constexpr, TREE: tl.constexpr, HAS_SINK: tl.constexpr, MAX_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT [padded, N, V] of Q [tokens, N, K], or with SPLITS > 1 float32 parts [SPLITS, tokens, N, V] and STATS.

    STATS float32 [2, SPLITS, tokens, N]: the largest logit in units of ln 2, and the sum of 2**(logit - largest).
    `scale` has the factor log2(e), SINK has not. KEYS and VALUES [G, slots, ...] with the given strides of G; with PDL,
    the first AHEAD slots are asked for early.
    """
    K: tl.constexpr = HEAD + TAIL
    split = tl.program_id(0)
    g = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    t = m // GROUP
    real = t < tokens
    head = g * GROUP + m % GROUP
    if PDL and AHEAD > 0:
        prefetch_span(KEYS + g.to(tl.int64) * k_stride, AHEAD * K)
        prefetch_span(VALUES + g.to(tl.int64) * v_stride, AHEAD * V)
    wait(PDL)
    # Loads that do not wait for START come before it.
    at = Q + t * q_stride + head * K
    q = tl.load(at[:, None] + tl.arange(0, HEAD)[None, :], mask=real[:, None], other=0.0)
    q_tail = q
    if TAIL > 0:
        q_tail = tl.load(at[:, None] + HEAD + tl.arange(0, TAIL)[None, :], mask=real[:, None], other=0.0)
    depth = t
    bits = tl.zeros((BM,), tl.int32)
    if TREE:
        depth = tl.load(DEPTHS + t, mask=real, other=0).to(tl.int32)
        j = tl.arange(0, MAX_TOKENS)
        known = real[:, None] & (j < tokens)[None, :]
        named = tl.load(ANCESTORS + t[:, None] * tokens + j[None, :], mask=known, other=0)
        bits = tl.sum(named.to(tl.int32) << j[None, :], axis=1) | 1 << 30
    first = tl.load(START).to(tl.int32)
    last = first + tokens - 1
    newest = last % slots
    stored = tl.minimum(last + 1, slots)
    # A short ring is read whole, so that its keys are on their way before START arrives.
    begin = 0
    end = slots if WINDOW > 0 else stored
    if SPLITS > 1:
        size = _split_size(stored, SPLITS, BN)
        begin = split * size
        end = tl.minimum(begin + size, stored)
        if begin >= stored:
            return
    query = first + depth
    row = t * heads + head  # of [tokens, N]
    d = tl.arange(0, V)
    slot = begin + tl.arange(0, BN)
    k_at = KEYS + g.to(tl.int64) * k_stride + slot * K
    v_at = VALUES + g.to(tl.int64) * v_stride + slot[:, None] * V + d[None, :]
    top = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, V), tl.float32)
    for block in range(begin, end, BN):
        s = block + tl.arange(0, BN)
        inside = s < end
        position = s
        if WINDOW > 0:
            position = last - newest + s - tl.where(s > newest, slots, 0)
        logits = _scores(q, q_tail, k_at, inside, HEAD, TAIL) * scale
        seen = _seen(position, query, first, bits, WINDOW, TREE) & (inside & (position >= 0))[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        above = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(above == float("-inf"), 0.0, above)  # a row that has seen nothing yet
        p = tl.exp2(logits - finite[:, None])
        decay = tl.exp2(top - finite)
        weight = weight * decay + tl.sum(p, 1)
        values = tl.load(v_at, mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None])
        top = above
        k_at += BN * K  # counted beside `block`: offsets made of it would be of 64 bits, and so the comparisons
        v_at += BN * V
    if SPLITS == 1:
        if HAS_SINK:
            sink = tl.load(SINK + head) * 1.4426950408889634
            above = tl.maximum(top, sink)
            decay = tl.exp2(top - above)
            weight = weight * decay + tl.exp2(sink - above)
            acc = acc * decay[:, None]
        out = acc / weight[:, None]
        tl.store(OUT + row[:, None] * V + d[None, :], out.to(OUT.dtype.element_ty), mask=real[:, None])
        for copy in range(1, padded - tokens + 1):
            below = OUT + (row + copy * heads)[:, None] * V + d[None, :]
            tl.store(below, out.to(OUT.dtype.element_ty), mask=(t == tokens - 1)[:, None])
    else:
        part = split * tokens * heads + row
        tl.store(OUT + part[:, None] * V + d[None, :], acc, mask=real[:, None])
        tl.store(STATS + part, top, mask=real)
        tl.store(STATS + SPLITS * tokens * heads + part, weight, mask=real)


@triton.jit
def _join_kernel(
    OUT, PARTS, STATS, START, SINK, slots, tokens, heads,
    V: tl.constexpr, HAS_SINK: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, VB: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """OUT [rows, heads, V] of what _attend_kernel left, rows beyond `tokens` as the last of these; a program has VB
    elements of a row of a head."""
    wait(PDL)
    to = tl.program_id(0)
    row = tl.where(to < tokens * heads, to, (tokens - 1) * heads + to % heads)
    d = tl.program_id(1) * VB + tl.arange(0, VB)
    stored = tl.minimum(tl.load(START).to(tl.int32) + tokens, slots)
    size = _split_size(stored, SPLITS, BN)
    split = tl.arange(0, SPLITS)
    used = split * size < stored
    part = split * tokens * heads + row
    top = tl.load(STATS + part, mask=used, other=float("-inf"))
    weight = tl.load(STATS + SPLITS * tokens * heads + part, mask=used, other=0.0)
    acc = tl.load(PARTS + part[:, None] * V + d[None, :], mask=used[:, None], other=0.0)
    above = tl.max(top, 0)
    extra = 0.0
    if HAS_SINK:
        sink = tl.load(SINK + row % heads) * 1.4426950408889634
        above = tl.maximum(above, sink)
        extra = tl.exp2(sink - above)
    share = tl.exp2(top - above)
    out = tl.sum(acc * share[:, None], 0) / (tl.sum(weight * share, 0) + extra)
    tl.store(OUT + to * V + d, out.to(OUT.dtype.element_ty))


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    tree: TreeRows | None = None,
    padded: int | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`attention.attention` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones, also of float32)."""
    (tokens, heads, k_dim), (groups, slots, _), v_dim = q.shape, keys.shape, values.shape[2]
    head, tail = split_head(k_dim, v_dim)
    padded = padded or tokens
    config = config or config_for(tokens * heads // groups, groups, slots)
    q, keys, values = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, keys, values))
    depths, ancestors = (
        (start, start) if tree is None else (tree[0].contiguous(), tree[1].contiguous().view(torch.uint8))
    )
    out = torch.empty(padded, heads, v_dim, dtype=q.dtype, device=q.device)
    parts, stats = out, out
    if config.splits > 1:
        parts = torch.empty(config.splits, tokens, heads, v_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(2, config.splits, tokens, heads, dtype=torch.float32, device=q.device)
    sinks = start if sink is None else sink.contiguous()
    with torch.cuda.device_of(q):
        _attend_kernel[(config.splits, groups, triton.cdiv(tokens * heads // groups, config.rows))](
            parts, stats, q, keys, values, start, sinks, depths, ancestors,
            q.stride(0), keys.stride(0), values.stride(0), slots, tokens, padded, scale * _LOG2_E,
            heads // groups, head, tail, v_dim, window or 0, tree is not None, sink is not None, MAX_ROWS,
            config.splits, config.rows, config.keys, slots if window and config.splits == 1 else 0, **dependent(q),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if config.splits > 1:
            columns = min(_COLUMNS, v_dim)
            _join_kernel[(padded * heads, v_dim // columns)](
                out, parts, stats, start, sinks, slots, tokens, heads,
                v_dim, sink is not None, config.splits, config.keys, columns, **dependent(q),
            )  # fmt: skip
    return out


def split_head(k_dim: int, v_dim: int) -> tuple[int, int]:
    """(power of two, power of two or 0) that sum to K. ValueError for head sizes that the kernels do not have."""
    if not fits(k_dim, v_dim):
        raise ValueError(
            f"head sizes {k_dim} and {v_dim}: queries need one or two powers of two from 16, values one; pad the heads"
        )
    head = 1 << (k_dim.bit_length() - 1)
    return head, k_dim - head
