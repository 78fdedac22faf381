"""From a fused QKV projection to what attention reads: queries, and keys and values in their slots of a cache.

    q, k = queries and keys of qkv [T, (N+G)*K + G*V], each head RMS-normed where the model has head norms, and rotated
    v    = values of qkv * value_scale, rounded
    keys[g, slot(t)], values[g, slot(t)] = k[t, g], v[t, g]   for t < count,   slot(t) = (start + t) % S

A norm rounds as the model's does: (x / sqrt(mean(x**2) + eps) in float32), then times its weight, each to BF16. The
rotation is half-split (NeoX): of the first R elements, i and i + R/2 are a pair; the rest passes. It is in float32 from
its BF16 inputs and rounds once. (Products that round to BF16 one by one, as plain torch has them, differ in the last
bit or two.)

`reference` is the definition, with float32 or float64 between the roundings. `split_heads` is what a runtime calls: one
Triton launch (`heads_triton`) on a GPU of compute capability 9 or more, the reference elsewhere. `start` is on the
device, so a CUDA graph of a call writes at every position. The bits of a row depend on that row alone.

Letters: T rows, N query heads, G key-value heads, K query/key head size, V value head size, R rotated elements,
S slots.
"""

from dataclasses import dataclass

import torch

MAX_ROWS = 16
MAX_HEAD = 256


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of query and key heads before they are rotated."""

    q: torch.Tensor  # bfloat16 [K]
    k: torch.Tensor  # bfloat16 [K]
    eps: float


@torch.no_grad()
def reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sizes: tuple[int, int, int],
    *,
    value_scale: float = 1.0,
    norms: HeadNorms | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, N, K], k [T, G, K] and v [T, G, V] of qkv, `sizes` (G, K, V); in qkv's dtype, to which everything is
    rounded. `dtype` lies between."""
    groups, k_dim, v_dim = sizes
    split = qkv.shape[1] - groups * v_dim
    qk = qkv[:, :split].reshape(len(qkv), -1, k_dim)
    v = (qkv[:, split:].reshape(len(qkv), groups, v_dim).to(dtype) * value_scale).to(qkv.dtype)
    if norms is not None:
        weight = torch.stack([norms.q] * (qk.shape[1] - groups) + [norms.k] * groups)
        y = qk.to(dtype)
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norms.eps)).to(qkv.dtype)
        qk = (y.to(dtype) * weight.to(dtype)).to(qkv.dtype)
    half = cos.shape[1]
    first, second, rest = qk[..., :half].to(dtype), qk[..., half : 2 * half].to(dtype), qk[..., 2 * half :]
    c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
    rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(qkv.dtype)
    q, k = torch.cat((rotated, rest), dim=-1).split((qk.shape[1] - groups, groups), dim=1)
    return q, k, v


@torch.no_grad()
def split_heads(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor | None,
    *,
    count: int | None = None,
    value_scale: float = 1.0,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """BF16 q [T, N, K] of qkv BF16 [T, (N+G)*K + G*V], T <= 16; writes keys BF16 [G, S, K] and values BF16 [G, S, V].

    cos and sin are BF16 or float32 [T, R/2]. Row t < `count` (all rows without it) goes to slot (start + t) % S, where
    `start` int32 or int64 [] is not negative and below 2**31 - 16, or to slot t where `start` is None; later rows are
    not stored. The cache may be views that are contiguous in their last dimension. N follows from the shapes and may be
    0: then q is empty. ValueError for shapes and dtypes, and for heads of more than 256 elements.
    """
    count = len(qkv) if count is None else count
    _check(qkv, cos, sin, keys, values, start, count, norms)
    if qkv.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(qkv.device)[0] >= 9:
        from . import heads_triton

        return heads_triton.split_heads(
            qkv, cos, sin, keys, values, start, count=count, value_scale=value_scale, norms=norms
        )
    sizes = len(keys), keys.shape[2], values.shape[2]
    q, k, v = reference(qkv, cos, sin, sizes, value_scale=value_scale, norms=norms)
    slots = torch.arange(count, device=qkv.device)
    if start is not None:
        slots = (start.reshape(()).long() + slots) % keys.shape[1]
    keys[:, slots], values[:, slots] = k[:count].transpose(0, 1), v[:count].transpose(0, 1)
    return q


def _check(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor | None,
    count: int,
    norms: HeadNorms | None,
) -> None:
    for name, x in (("keys", keys), ("values", values)):
        if x.dtype != torch.bfloat16 or x.ndim != 3 or x.stride(2) != 1:
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)}, strides {list(x.stride())}; "
                "expected torch.bfloat16 with three dimensions, the last contiguous"
            )
    (groups, slots, k_dim), v_dim = keys.shape, values.shape[2]
    if values.shape[:2] != keys.shape[:2] or not (1 <= k_dim <= MAX_HEAD and 1 <= v_dim <= MAX_HEAD):
        raise ValueError(
            f"keys {list(keys.shape)}, values {list(values.shape)}: expected [G, S, K] and [G, S, V] with heads of at "
            f"most {MAX_HEAD} elements"
        )
    if qkv.dtype != torch.bfloat16 or qkv.ndim != 2:
        raise ValueError(f"qkv: {qkv.dtype} {list(qkv.shape)}, expected torch.bfloat16 [rows, columns]")
    rows, columns = qkv.shape
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"qkv: {rows} rows; give 1 to {MAX_ROWS} at a time")
    queries = columns - groups * (k_dim + v_dim)
    if queries < 0 or queries % k_dim:
        raise ValueError(
            f"qkv: {columns} columns are not queries of {k_dim} and {groups} keys and values of {k_dim} and {v_dim}"
        )
    if not 0 <= count <= min(rows, slots):
        raise ValueError(f"count: {count}, expected 0 to {min(rows, slots)} of {rows} rows and {slots} slots")
    half = cos.shape[-1] if cos.ndim else 0
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in (torch.bfloat16, torch.float32) or x.shape != (rows, half) or not 2 <= 2 * half <= k_dim:
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)}, expected torch.bfloat16 or torch.float32 [{rows}, R/2] "
                f"with R from 2 to {k_dim}"
            )
    if start is not None and (start.numel() != 1 or start.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"start: {start.dtype} {list(start.shape)}, expected one int32 or int64")
    if norms is None:
        return
    for name, x in (("norms.q", norms.q), ("norms.k", norms.k)):
        if x.dtype != torch.bfloat16 or x.shape != (k_dim,):
            raise ValueError(f"{name}: {x.dtype} {list(x.shape)}, expected torch.bfloat16 [{k_dim}]")
