"""Head norms, rotation and cache writes in one launch. `heads` defines it.

    _split_heads_kernel  one head of one row a program, of one warp

A head is a few hundred bytes, so that time is the launch and one wait for memory. There are T * (N + 2G) programs, all
resident at once on a GPU up to some thousands, and none of them waits for another.

Names: h = element of a half of what is rotated, r = element behind that, d = element of a value.
"""

import torch
import triton
import triton.language as tl

from .heads import HeadNorms
from .launch import dependent, wait


@triton.jit
def _pass_rest(OUT, ROW, WEIGHT, scale, ROTATED: tl.constexpr, K: tl.constexpr, REST: tl.constexpr, NORM: tl.constexpr):
    """Elements ROTATED..K of a head: normed, not rotated."""
    r = tl.arange(0, REST)
    inside = r < K - ROTATED
    x = tl.load(ROW + ROTATED + r, mask=inside, other=0.0)
    if NORM:
        x = _weighted(x, WEIGHT + ROTATED + r, inside, scale)
    tl.store(OUT + ROTATED + r, x, mask=inside)


@triton.jit
def _weighted(x, at, inside, scale):
    """x * scale * weight, rounded to x's dtype after each product."""
    y = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    return (y * tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)


@triton.jit
def _square_sum(ROW, K: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    x = tl.load(ROW + d, mask=d < K, other=0.0).to(tl.float32)
    return tl.sum(x * x, 0)


@triton.jit
def _query_or_key(
    OUT, ROW, WEIGHT, COS, SIN, eps,
    K: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """OUT [K] <- a head at ROW [K]; COS and SIN [HALF]."""
    h = tl.arange(0, HALF_BLOCK)
    inside = h < HALF
    cos = tl.load(COS + h, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(SIN + h, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(ROW + h, mask=inside, other=0.0)
    second = tl.load(ROW + HALF + h, mask=inside, other=0.0)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(_square_sum(ROW, K, BLOCK) / K + eps)
        first = _weighted(first, WEIGHT + h, inside, scale)
        second = _weighted(second, WEIGHT + HALF + h, inside, scale)
    a, b = first.to(tl.float32), second.to(tl.float32)
    tl.store(OUT + h, (a * cos - b * sin).to(first.dtype), mask=inside)
    tl.store(OUT + HALF + h, (b * cos + a * sin).to(first.dtype), mask=inside)
    if REST > 0:
        _pass_rest(OUT, ROW, WEIGHT, scale, 2 * HALF, K, REST, NORM)


@triton.jit(do_not_specialize=["count"])
def _split_heads_kernel(
    Q, KEYS, VALUES, QKV, COS, SIN, Q_NORM, K_NORM, START,
    count, slots, k_group_stride, k_slot_stride, v_group_stride, v_slot_stride, value_scale, eps,
    N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    NORM: tl.constexpr, RING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Q [rows, N, K], KEYS [G, slots, K] and VALUES [G, slots, V] of QKV [rows, (N + G) * K + G * V], one dtype.

    COS and SIN [rows, HALF]. Without RING, START is not read and row t has slot t.
    """
    wait(PDL)
    head = tl.program_id(0)
    t = tl.program_id(1)
    row = QKV + t * ((N + G) * K + G * V)
    cos, sin = COS + t * HALF, SIN + t * HALF
    if head < N:
        _query_or_key(
            Q + (t * N + head) * K, row + head * K, Q_NORM, cos, sin, eps,
            K, HALF, HALF_BLOCK, REST, K_BLOCK, NORM,
        )  # fmt: skip
    elif t < count:
        slot = t
        if RING:
            slot = (tl.load(START).to(tl.int32) + t) % slots
        g = (head - N) % G
        if head < N + G:
            out = KEYS + g.to(tl.int64) * k_group_stride + slot.to(tl.int64) * k_slot_stride
            _query_or_key(
                out, row + head * K, K_NORM, cos, sin, eps,
                K, HALF, HALF_BLOCK, REST, K_BLOCK, NORM,
            )  # fmt: skip
        else:
            d = tl.arange(0, V_BLOCK)
            x = tl.load(row + (N + G) * K + g * V + d, mask=d < V, other=0.0)
            out = VALUES + g.to(tl.int64) * v_group_stride + slot.to(tl.int64) * v_slot_stride
            tl.store(out + d, (x.to(tl.float32) * value_scale).to(x.dtype), mask=d < V)


def split_heads(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor | None,
    *,
    count: int,
    value_scale: float = 1.0,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """`heads.split_heads` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    (rows, columns), (groups, slots, k_dim), v_dim = qkv.shape, keys.shape, values.shape[2]
    heads = (columns - groups * v_dim) // k_dim - groups
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    half = cos.shape[1]
    rest = k_dim - 2 * half
    q = torch.empty(rows, heads, k_dim, dtype=qkv.dtype, device=qkv.device)
    weights = (cos, cos) if norms is None else (norms.q.contiguous(), norms.k.contiguous())
    with torch.cuda.device_of(qkv):
        _split_heads_kernel[(heads + 2 * groups, rows)](
            q if heads else qkv, keys, values, qkv, cos, sin, *weights, qkv if start is None else start,
            count, slots, *keys.stride()[:2], *values.stride()[:2], value_scale, norms.eps if norms else 0.0,
            heads, groups, k_dim, v_dim, half, triton.next_power_of_2(half),
            triton.next_power_of_2(rest) if rest else 0, triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim),
            norms is not None, start is not None, **dependent(qkv), num_warps=1,
        )  # fmt: skip
    return q
