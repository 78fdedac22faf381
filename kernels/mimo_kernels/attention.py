"""Attention of the 1 to 16 new rows of one sequence to its key-value cache, during decoding or verification.

    out[t, n] = sum over seen slots s of p[t, n, s] * values[g, s],   g = n // (N / G)
    p = softmax over the seen slots of q[t, n] . keys[g, s] * scale, with exp(sink[n]) added to the denominator

`reference` is the definition, in float32 or float64. `attention` runs Triton kernels (`attention_triton`) on a GPU of
compute capability 9 or more, the reference elsewhere. A runtime calls `window.attend`, which has rotation and cache
writes with it: for up to 8 rows of a window CUDA C++ of its own (`window_cuda`), otherwise `heads` and this. The
committed length is a tensor on the device, so a CUDA graph of a call serves every length up to the capacity of the
cache.

The cache is a ring: the row at position p lies in slot p % S. With `end` = start + T rows stored, slot s holds position
end - 1 - (end - 1 - s) % S; a negative one means that nothing was stored yet. A cache that is never full is a ring too.
Row t stands at position start + t, is already stored, and sees the positions 0 <= p <= start + t, in a window only
those above start + t - window. The rows of a tree stand at start + depths[t] instead (they are stored at start + t):
row t sees the older positions as above, and of the new rows those that `ancestors` names. A window holds all of these.

Bits. A program works on 64 or 128 query rows of one key-value head, and on one split of the slots; splits are joined
in ascending order. Their size is a number of blocks that grows when the length passes a multiple of some thousand
positions. So the bits of a row depend on its own query, position and visible keys, on the shapes, on whether the rows
of a head are at most 64, and on that number; not on its neighbours, on timing, on the multiprocessors, or on the run.

Why not FlashAttention or FlashInfer: this needs a sink, 192/128 heads, a ring, a tree and a length on the device all at
once. Given up: more than 16 rows, several sequences, a paged or a quantised cache.

Letters: T rows, N query heads, G key-value heads, K query/key head size, V value head size, S slots.
"""

import torch

MAX_ROWS = 16
TreeRows = tuple[torch.Tensor, torch.Tensor]  # depths int [T]; bool [T, T]: row t sees row j, its ancestor or itself


@torch.no_grad()
def reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    tree: TreeRows | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`dtype` [T, N, V] of q [T, N, K], keys [G, S, K], values [G, S, V], start [] and sink [N]; see `attention`."""
    (rows, heads, _), (groups, slots, _) = q.shape, keys.shape
    seen = visible(start, rows, slots, window, tree)
    q = q.to(dtype).view(rows, groups, heads // groups, -1)
    used = seen.any(0)[:, None]  # beyond what is stored there may be NaN
    keys, values = (torch.where(used, x, 0).to(dtype) for x in (keys, values))
    logits = torch.einsum("tghk,gsk->tghs", q, keys) * scale
    logits = logits.masked_fill(~seen[:, None, None, :], float("-inf"))
    if sink is not None:
        column = sink.to(dtype).view(groups, -1, 1).expand(rows, -1, -1, -1)
        logits = torch.cat((logits, column), dim=-1)
    p = logits.softmax(-1)[..., :slots]
    return torch.einsum("tghs,gsv->tghv", p, values).flatten(1, 2)


def visible(start: torch.Tensor, rows: int, slots: int, window: int | None, tree: TreeRows | None) -> torch.Tensor:
    """bool [rows, slots]: what each of the rows at start, start + 1, ... sees of a ring that already holds them."""
    slot = torch.arange(slots, device=start.device)
    last = start.reshape(()).long() + rows - 1
    position = last - (last - slot) % slots
    first = last - rows + 1
    query = first + (torch.arange(rows, device=start.device) if tree is None else tree[0].long())
    seen = position <= query[:, None]
    if window is not None:
        seen &= query[:, None] - position < window
    if tree is not None:
        new = position >= first
        seen = torch.where(new, tree[1][:, (position - first).clamp_min(0)], seen)
    return seen & (position >= 0)


@torch.no_grad()
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
) -> torch.Tensor:
    """BF16 [T, N, V] of q BF16 [T, N, K], T <= 16, and a cache of keys BF16 [G, S, K] and values BF16 [G, S, V].

    With `padded` >= T the result is [padded, N, V], and rows from T on repeat row T - 1.

    `start` int32 or int64 [] is the number of committed rows; rows start to start + T - 1 are already in the cache.
    `window` counts the row itself and needs S >= window - 1 + T; without one S >= start + T, which is not checked on a
    GPU, where nothing waits for the host. `sink` float32 [N]. Cache and q may be views whose last two dimensions are
    contiguous. A ring that is not full must be finite all the same: weight zero times NaN is NaN. ValueError for shapes
    and dtypes, and on a GPU for a K that is not one or two powers of two from 16 on, or a V that is not one.
    """
    _check(q, keys, values, start, window, sink, tree)
    if padded is not None and padded < len(q):
        raise ValueError(f"padded: {padded} rows are fewer than the {len(q)} of q; leave it out")
    if q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] >= 9:
        from . import attention_triton

        return attention_triton.attention(
            q, keys, values, start, scale=scale, window=window, sink=sink, tree=tree, padded=padded
        )
    out = reference(q, keys, values, start, scale=scale, window=window, sink=sink, tree=tree).to(torch.bfloat16)
    return repeated(out, padded or len(q))


def repeated(x: torch.Tensor, padded: int) -> torch.Tensor:
    """x [T, ...] with its last row repeated up to `padded` rows."""
    return x if padded == len(x) else torch.cat((x, x[-1:].expand(padded - len(x), *x.shape[1:])))


def fits(k_dim: int, v_dim: int) -> bool:
    """Whether the kernels have such heads: K one or two powers of two from 16 on, V one."""
    tail = k_dim - (1 << (k_dim.bit_length() - 1))
    parts = [k_dim - tail, v_dim, *([tail] if tail else [])]
    return all(part >= 16 and part & (part - 1) == 0 for part in parts)


def _check(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    window: int | None,
    sink: torch.Tensor | None,
    tree: TreeRows | None,
) -> None:
    for name, x in (("q", q), ("keys", keys), ("values", values)):
        if x.dtype != torch.bfloat16 or x.ndim != 3:
            raise ValueError(f"{name}: {x.dtype} {list(x.shape)}, expected torch.bfloat16 with three dimensions")
    (rows, heads, k_dim), (groups, slots, _) = q.shape, keys.shape
    if keys.shape[2] != k_dim or values.shape[:2] != keys.shape[:2] or heads % groups:
        raise ValueError(
            f"q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}: "
            "expected [T, N, K], [G, S, K] and [G, S, V] with N a multiple of G"
        )
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"q: {rows} rows; give 1 to {MAX_ROWS} at a time, use a prefill kernel for more")
    if start.numel() != 1 or start.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"start: {start.dtype} {list(start.shape)}, expected one int32 or int64")
    if slots < rows + (window or 1) - 1:
        raise ValueError(f"keys: {slots} slots hold less than {rows} rows and the window {window} of the first")
    if sink is not None and (sink.dtype != torch.float32 or sink.shape != (heads,)):
        raise ValueError(f"sink: {sink.dtype} {list(sink.shape)}, expected torch.float32 [{heads}]")
    if tree is None:
        return
    depths, ancestors = tree
    if depths.shape != (rows,) or ancestors.shape != (rows, rows) or ancestors.dtype != torch.bool:
        raise ValueError(
            f"tree: depths {list(depths.shape)}, ancestors {ancestors.dtype} {list(ancestors.shape)}; "
            f"expected [{rows}] and torch.bool [{rows}, {rows}]"
        )
    if window is not None and window < rows:
        raise ValueError(f"tree: {rows} rows do not fit into a window of {window}")
