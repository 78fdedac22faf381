"""The forward pass of a MiMo-V2 target, as plain functions over plain tensors; its drafter's is `draft_model`.

One sequence, T new rows at absolute positions start..start+T-1. Every call has a fixed shape for a fixed T: lengths
enter as positions and masks only, so the same calls can later be captured once and replayed. Of several ranks each has
the same rows and its share of heads, MLP columns and vocabulary; what a sublayer adds to the rows is summed over ranks.

Letters: T rows, H hidden size, N query heads, G key-value heads, K query/key head size, V value head size, S keys,
E experts, I expert intermediate size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mimo_kernels import attention as attention_kernels
from mimo_kernels import choice as choice_kernels
from mimo_kernels import heads as head_kernels
from mimo_kernels import linear as linear_kernels
from mimo_kernels import moe as moe_kernels
from mimo_kernels import router as router_kernels
from mimo_kernels import rows as row_kernels
from mimo_kernels import swiglu as swiglu_kernels
from mimo_kernels import window as window_kernels
from mimo_kernels.choice import Best
from mimo_kernels.moe import MAX_TOKENS, PackedExperts
from mimo_kernels.moe_many import moe_many
from mimo_kernels.rows import Embedding
from mimo_qat.models.draft_tree import Tree
from mimo_runtime.cache import LinearCache, Position, RingCache, visible
from mimo_runtime.load import Attention, Drafter, Layer, LayerGeometry, Mlp, Moe, PlainExperts, Target
from mimo_runtime.norms import rms_norm
from mimo_runtime.parallel import Ranks
from mimo_runtime.rotary import Rotation, Rotations, rotation
from mimo_runtime.weights import KernelWeight, Weight, rows_from

FEW_ROWS = 32  # up to here a weight matrix costs its bytes, whatever the rows: every expert in use sees all of them

MANY_ROWS = 128  # up to here, on a GPU, all plain experts in one product beat a loop over those in use


def linear(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """x [T, in] @ w [out, in]^T -> [T, out], possibly as a transposed view; the type of `w` says how (`weights`).

    On a CPU in bfloat16 the weight is the left operand: it streams through the matrix units as it lies (measured with
    AMX: 30 GB/s on two cores against 15 for x @ w^T, which repacks the weight at every call), and each row has the
    same bits for every T from 2 to 16.
    """
    if not isinstance(w, torch.Tensor):
        held = w.values if isinstance(w, KernelWeight) else w
        if len(x) <= linear_kernels.MAX_TOKENS:
            return linear_kernels.linear(x, held)
        w = held if isinstance(held, torch.Tensor) else linear_kernels.unpack_fp8(held)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) > 1:
        return torch.mm(w, x.t()).t()
    return F.linear(x, w)


def swiglu(x: torch.Tensor, gate_up: Weight, down: Weight) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)), unclamped; gate_up [2I, H] holds the gate rows first."""
    both = linear(x, gate_up)
    few = not isinstance(gate_up, torch.Tensor) and len(x) <= swiglu_kernels.MAX_ROWS
    return linear(swiglu_kernels.silu_mul(both) if few else swiglu_kernels.reference(both), down)


def route(moe: Moe, x: torch.Tensor, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] at `positions` [T] -> combine weights [T, k] and expert ids [T, k]; float32, the bias steers the
    selection only."""
    if moe.fused and len(x) <= router_kernels.MAX_ROWS:
        weights, chosen = router_kernels.route(
            x, moe.router, moe.bias, moe.top_k, normalise=moe.normalise, scaling=moe.scaling, positions=positions
        )
        if moe.chosen is not None:
            moe.chosen.append(chosen)
        return weights, chosen
    scores = F.linear(x.float(), moe.router).sigmoid()
    bias = moe.bias
    if bias.ndim == 2:
        assert positions is not None
        bias = bias[positions % len(bias)]
    chosen = (scores + bias).topk(moe.top_k, dim=-1).indices
    if moe.chosen is not None:
        moe.chosen.append(chosen)
    weights = scores.gather(1, chosen)
    if moe.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * moe.scaling, chosen


def without_host(moe: Moe, rows: int) -> bool:
    """Whether the experts run so many rows without the host knowing the routing: packed ones do, plain ones where the
    rows touch most experts anyway, and are few enough to compute all of them for every row."""
    if isinstance(moe.experts, PackedExperts):
        return True
    return rows <= MANY_ROWS and len(moe.experts.down) <= 4 * rows * moe.top_k


def every_expert(experts: PlainExperts, x: torch.Tensor, combine: torch.Tensor) -> torch.Tensor:
    """All experts on all rows x [T, H], weighted by combine [T, E] and summed in float32: two matrix products.

    Nothing here depends on the routing's values, so the host never waits for the device.
    """
    gate, up = torch.matmul(x, experts.gate_up.transpose(1, 2)).chunk(2, dim=-1)  # [E, T, I] each
    out = torch.bmm(F.silu(gate) * up, experts.down.transpose(1, 2))
    return (out.float() * combine.t()[..., None]).sum(0)


def packed_experts(
    experts: PackedExperts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same sums: x [T, H], ids and weights [T, k] -> bfloat16 [T, H], or what `moe.parts` leaves of it, by the
    kernels of a decode step for as many rows as they take, else by those of a prompt."""
    run = moe_kernels.parts if len(x) <= MAX_TOKENS else moe_many
    return run(x, chosen, weights, experts)


def moe_mlp(moe: Moe, x: torch.Tensor, ranks: Ranks, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Routed experts, summed in float32 in ascending expert id, so that the order depends on nothing else.

    A GPU computes every expert where it can do so `without_host`: a launch costs more than a few experts' bytes.
    """
    experts = moe.experts
    if moe.fused and isinstance(experts, PackedExperts) and len(x) <= MAX_TOKENS:
        router = router_kernels.Router(moe.router, moe.bias, moe.top_k, moe.normalise, moe.scaling)
        update, weights, chosen = moe_kernels.routed(x, router, experts, positions)
        if moe.chosen is not None:
            moe.chosen.append(chosen)
        ranks.record(chosen)  # a rank that chose other experts would add its stripes of those, and no error would show
        ranks.record(weights)
        return update
    weights, chosen = route(moe, x, positions)
    ranks.record(chosen)
    ranks.record(weights)
    if isinstance(experts, PackedExperts):
        return packed_experts(experts, x, chosen, weights)
    combine = torch.zeros(len(x), len(experts.down), device=x.device).scatter_(1, chosen.long(), weights)
    if x.is_cuda and without_host(moe, len(x)):
        return every_expert(experts, x, combine).to(x.dtype)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in sorted({e for row in chosen.tolist() for e in row}):
        weight = combine[:, e, None]
        if len(x) <= FEW_ROWS:  # rows of other experts carry weight zero, which adds exactly nothing
            out.addcmul_(swiglu(x, experts.gate_up[e], experts.down[e]).float(), weight)
        else:
            rows = weight[:, 0].nonzero()[:, 0]
            out.index_add_(0, rows, swiglu(x[rows], experts.gate_up[e], experts.down[e]).float() * weight[rows])
    return out.to(x.dtype)


def attend(q, keys, values, mask, scale: float, sink: torch.Tensor | None) -> torch.Tensor:
    """q [T,N,K], keys [G,S,K], values [G,S,V], additive mask [T,S], sink [N] -> [T, N*V]; softmax in float32.

    The sink is one more logit in a head's softmax denominator, with no value behind it.
    """
    rows, heads, _ = q.shape
    groups, group = len(keys), heads // len(keys)
    q = q.view(rows, groups, group, -1).permute(1, 2, 0, 3).reshape(groups, group * rows, -1)
    scores = torch.bmm(q, keys.transpose(1, 2)).float().view(groups, group, rows, -1) * scale + mask
    if sink is not None:
        column = sink.view(groups, group, 1, 1).expand(-1, -1, rows, 1)
        scores = torch.cat((scores, column), dim=-1)
    p = scores.softmax(-1)[..., : keys.shape[1]].to(values.dtype)
    out = torch.bmm(p.reshape(groups, group * rows, -1), values)
    return out.view(groups, group, rows, -1).permute(2, 0, 1, 3).reshape(rows, -1)


def attend_window(q, keys, values, window: int, start: int, scale: float, sink: torch.Tensor | None) -> torch.Tensor:
    """`attend` of the queries at positions start.. [T] over the keys [G, window - 1 + T, K] of positions
    start - window + 1.. , where each sees the `window` keys that end with its own.

    A block of `window` queries is multiplied with the two windows of keys that it sees some of, not with all keys.
    """
    rows, heads, _ = q.shape
    groups, group, blocks = len(keys), heads // len(keys), -(-rows // window)
    pad = blocks * window - rows
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).view(blocks, window, groups, group, -1)
    q = q.permute(2, 0, 3, 1, 4).reshape(groups, blocks, group * window, -1)
    keys, values = (F.pad(t, (0, 0, 0, pad + 1)).unfold(1, 2 * window, window) for t in (keys, values))
    scores = torch.matmul(q, keys).float().view(groups, blocks, group, window, 2 * window) * scale
    key, query = torch.arange(2 * window, device=q.device), torch.arange(window, device=q.device)[:, None]
    first = torch.arange(blocks, device=q.device)[:, None, None] * window + start - window + 1  # position of its key 0
    seen = (key >= query) & (key < query + window) & (first + key >= 0)
    scores.masked_fill_(~seen[:, None], float("-inf"))
    if sink is not None:
        column = sink.view(groups, 1, group, 1, 1).expand(-1, blocks, -1, window, 1)
        scores = torch.cat((scores, column), dim=-1)
    p = scores.softmax(-1)[..., : 2 * window].to(values.dtype)
    out = torch.matmul(p.reshape(groups, blocks, group * window, -1), values.transpose(-1, -2))
    out = out.view(groups, blocks, group, window, -1).permute(1, 3, 0, 2, 4)
    return out.reshape(blocks * window, -1)[:rows]


TreeRows = attention_kernels.TreeRows


def tree_rows(tree: Tree, device: torch.device | str = "cpu") -> TreeRows:
    """A tree of T - 1 nodes as `target_forward` takes it."""
    return torch.tensor([0, *tree.depths], device=device), tree.visible().to(device)


class Rows:
    """The rows of one call: where they are, and what all layers of one kind share (rotations and masks).

    Row i stands at position start + i, or at start + depths[i] where the rows are a tree; it is stored at start + i.
    """

    def __init__(
        self,
        start: Position,
        padded: int,
        like: torch.Tensor,
        tree: TreeRows | None = None,
        count: int | None = None,
        rotations: Rotations | None = None,
        embedding: Embedding | None = None,
        end: torch.Tensor | None = None,
    ):
        """`padded` rows of which the first `count` (all without it) are real, or of a prompt those before position
        `end` []; `like` gives device and dtype. What an `embedding` has of them is in `embedded`, where it came with
        the rest in one launch, else None."""
        self.start, self.count, self.dtype, self.tree = start, padded if count is None else count, like.dtype, tree
        self.end = end
        self.ancestors: torch.Tensor | None = None
        self.embedded: torch.Tensor | None = None
        few = tree is None and padded <= row_kernels.MAX_ROWS
        if few and isinstance(start, torch.Tensor) and rotations is not None and len(rotations.groups) == 1:
            ((kinds, table),) = rotations.groups
            self.positions, values, embedded = row_kernels.begin(start, padded, self.count, table, embedding)
            self.embedded = embedded if embedding else None
            self._memo: dict = {kind: (values[i, 0], values[i, 1]) for i, kind in enumerate(kinds)}
            return
        place = torch.arange(padded, device=like.device).clamp_(max=self.count - 1)
        if tree is not None:
            depths, ancestors = tree
            place, self.ancestors = depths[place], ancestors[place]
        self.positions = start + place
        self._memo = {} if rotations is None else dict(rotations.rows(self.positions))

    def rotation(self, g: LayerGeometry) -> Rotation:
        """cos and sin, each [T, dim/2], in the compute dtype."""
        kind = g.rope_theta, g.rotary_dim
        if kind not in self._memo:
            self._memo[kind] = rotation(self.positions, kind, self.dtype)
        return self._memo[kind]

    def mask(self, cache: RingCache) -> torch.Tensor:
        """What these rows see of the keys that `cache.extend` returned for them."""
        if cache.window not in self._memo:
            keys = cache.extended(self.start, self.count)
            seen = visible(self.positions, keys, cache.window)
            if self.ancestors is not None:
                row = (keys - self.start).clamp(0, self.count - 1)
                named = self.ancestors[:, row]
                if cache.window is not None:
                    named = named & (self.positions[:, None] - self.positions[row] < cache.window)
                seen = torch.where(keys >= self.start, named, seen)
            mask = torch.zeros(seen.shape, device=seen.device)
            self._memo[cache.window] = mask.masked_fill_(~seen, float("-inf"))
        return self._memo[cache.window]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split (NeoX) rotary embedding of the first R elements of each head of x [T, heads, K], by cos and sin
    [T, R/2]; the rest passes."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def project(w: Attention, x: torch.Tensor, rows: Rows, queries: bool = True):
    """x [T, H] -> q [T,N,K], k [T,G,K] (normed where the model has head norms, rotated), v [T,G,V] (scaled).

    Without `queries`, q has no heads and its weights are not read.
    """
    g = w.geometry
    heads = g.heads if queries else 0
    qkv = linear(x, w.qkv if queries else rows_from(w.qkv, g.heads * g.head_dim))
    qk, v = qkv.split(((heads + g.kv_heads) * g.head_dim, g.kv_heads * g.v_head_dim), dim=-1)
    qk = qk.reshape(len(x), heads + g.kv_heads, g.head_dim)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = qk.split((heads, g.kv_heads), dim=1)
        qk = torch.cat((rms_norm(q, w.q_norm, w.eps), rms_norm(k, w.k_norm, w.eps)), dim=1)
    q, k = rotate(qk, *rows.rotation(g)).split((heads, g.kv_heads), dim=1)
    return q, k, v.reshape(len(x), g.kv_heads, g.v_head_dim) * w.value_scale


def head_norms(w: Attention) -> head_kernels.HeadNorms | None:
    """Norms of the heads as the kernels take them."""
    if w.q_norm is None or w.k_norm is None:
        return None
    return head_kernels.HeadNorms(w.q_norm, w.k_norm, w.eps)


def stored_heads(
    w: Attention,
    x: torch.Tensor,
    rows: Rows,
    slots: tuple[torch.Tensor, torch.Tensor],
    start: torch.Tensor,
    count: int,
    queries: bool = True,
) -> torch.Tensor:
    """The queries [T, N, K] of x [T, H]; keys and values of its first `count` rows go into `slots` [G, S, K] and
    [G, S, V], at (start + row) % S."""
    if w.fused and len(x) <= head_kernels.MAX_ROWS:
        cos, sin = rows.rotation(w.geometry)
        qkv = linear(x, w.qkv if queries else rows_from(w.qkv, w.geometry.heads * w.geometry.head_dim))
        return head_kernels.split_heads(
            qkv, cos, sin, *slots, start, count=count, value_scale=w.value_scale, norms=head_norms(w)
        )
    q, k, v = project(w, x, rows, queries)
    place = (start + torch.arange(count, device=x.device)) % slots[0].shape[1]
    for cache, new in zip(slots, (k, v), strict=True):
        cache.index_copy_(1, place, new[:count].transpose(0, 1))
    return q


def attention(w: Attention, cache: RingCache, x: torch.Tensor, rows: Rows, ranks: Ranks) -> torch.Tensor:
    """A rank's part of the attention of a layer over its cache, which gets the rows; padding (beyond `rows.count`) is
    computed and never stored."""
    ranks.record(x)
    scale = w.geometry.head_dim**-0.5
    few = rows.count <= attention_kernels.MAX_ROWS and (rows.tree is None or rows.count <= (w.window or rows.count))
    if w.kernel and few and isinstance(rows.start, torch.Tensor):
        kw: dict[str, Any] = {"scale": scale, "window": w.window, "sink": w.sink, "tree": rows.tree}
        if w.fused and len(x) <= head_kernels.MAX_ROWS:
            cos, sin = rows.rotation(w.geometry)
            kw |= {"count": rows.count, "value_scale": w.value_scale, "norms": head_norms(w)}
            out = window_kernels.attend(linear(x, w.qkv), cos, sin, *cache.ring(), rows.start, **kw).flatten(1)
        else:
            q = stored_heads(w, x, rows, cache.ring(), rows.start, rows.count)
            kw["padded"] = len(x)  # padding repeats the last row, so that it asks for no expert of its own
            out = attention_kernels.attention(q[: rows.count], *cache.ring(), rows.start, **kw).flatten(1)
    else:
        q, k, v = project(w, x, rows)
        keys, values = cache.extend(k[: rows.count], v[: rows.count], rows.start, rows.end)
        prompt = rows.tree is None and len(q) == rows.count and not cache.fits(rows.count)
        if w.window is not None and len(q) > 2 * w.window and prompt and isinstance(rows.start, int):
            out = attend_window(q, keys, values, w.window, rows.start, scale, w.sink)
        else:
            out = attend(q, keys, values, rows.mask(cache), scale, w.sink)
    return linear(out, w.o)


def mlp(w: Mlp | Moe, x: torch.Tensor, ranks: Ranks, positions: torch.Tensor | None = None) -> torch.Tensor:
    """A rank's part of the dense or the routed MLP of a layer, [T, H] -> [T, H]."""
    ranks.record(x)
    return moe_mlp(w, x, ranks, positions) if isinstance(w, Moe) else swiglu(x, w.gate_up, w.down)


def embed(target: Target, tokens: torch.Tensor) -> torch.Tensor:
    """Rows [T, H] of the embedding. Each token is in the share of one rank, which adds its row to zeros."""
    ranks = target.ranks
    if ranks.size == 1:
        return target.embed[tokens]
    place = tokens - ranks.rank * len(target.embed)
    mine = (place >= 0) & (place < len(target.embed))
    return ranks.sum(target.embed[place.masked_fill(~mine, 0)].masked_fill(~mine[:, None], 0))


def rows_stand_alone(target: Target) -> bool:
    """Whether a row's bits are the same beside any others: where all of a layer is the work of kernels on a GPU, which
    have one shape for 1 to 8 rows and another for 9 to 16."""

    def alone(layer: Layer) -> bool:
        w, a = layer.mlp, layer.attention
        matrices = (a.qkv, a.o) if isinstance(w, Moe) else (a.qkv, a.o, w.gate_up, w.down)
        mlp = not isinstance(w, Moe) or (w.fused and isinstance(w.experts, PackedExperts))
        norms = layer.input_norm.fused and layer.post_norm.fused
        return mlp and norms and a.kernel and a.fused and not any(isinstance(m, torch.Tensor) for m in matrices)

    head = target.norm.fused and not isinstance(target.head, torch.Tensor)
    return target.embed.is_cuda and head and all(map(alone, target.layers))


def head_logits(target: Target, x: torch.Tensor, count: int) -> torch.Tensor:
    """Float32 logits [count, vocabulary] of the first `count` normed rows x [T, H]."""
    return target.ranks.gather(linear(x, target.head))[:count].float()


def head_choice(target: Target, x: torch.Tensor, count: int, limit: int | None = None) -> Best:
    """The greedy choice of these rows, among tokens below `limit`: each rank has its share of the vocabulary, and only
    what is best in it travels."""
    logits = linear(x, target.head)[:count]
    first = target.ranks.rank * logits.shape[1]
    return Best(target.ranks.gather(choice_kernels.best(logits, first, limit)))


def target_forward(
    target: Target,
    caches: Sequence[RingCache],
    tokens: torch.Tensor,
    start: Position,
    *,
    taps: Sequence[int] = (),
    logits_from: int = 0,
    min_rows: int = 1,
    tree: TreeRows | None = None,
    greedy: bool = False,
    end: torch.Tensor | None = None,
) -> tuple[Any, torch.Tensor]:
    """tokens [T] at positions start.. -> logits [T - logits_from, vocabulary] float32 and taps [T, len(taps)*H].

    A tap i is the residual stream after layer i, before the final norm. Fewer than `min_rows` rows are computed as
    `min_rows`, by repeating the last one (same experts, same bytes), so that a token's bits do not depend on how many
    neighbours it is computed with. With a `tree`, row 0 is its anchor and row i its node i: each sees its ancestors.
    Where `greedy`, the logits are left out for the `Best` of each row. Tokens of a prompt from position `end` [] on are
    padding, and the logits are those of the row before it alone.
    """
    count = len(tokens)
    padded = max(count, min_rows)
    ranks = target.ranks
    share = Embedding(tokens, target.embed, ranks.rank * len(target.embed))
    rows = Rows(start, padded, target.embed, tree, count, target.rotations, share, end)
    if rows.embedded is None:
        x = embed(target, torch.cat((tokens, tokens[-1:].expand(padded - count))) if padded > count else tokens)
    else:
        x = ranks.sum(rows.embedded)
    part, tapped = None, {}  # what the last sublayer adds to the residual stream x when it is normed next
    for i, (layer, cache) in enumerate(zip(target.layers, caches, strict=True)):
        x, normed = ranks.add_norm(x, part, layer.input_norm)
        if i - 1 in taps:
            tapped[i - 1] = x[:count]
        part = attention(layer.attention, cache, normed, rows, ranks)
        x, normed = ranks.add_norm(x, part, layer.post_norm)
        part = mlp(layer.mlp, normed, ranks, rows.positions)
    x, normed = ranks.add_norm(x, part, target.norm)
    tapped[len(target.layers) - 1] = x[:count]
    normed, asked = normed[logits_from:], count - logits_from
    if end is not None:
        normed, asked = normed.index_select(0, (end - start - 1 - logits_from)[None]), 1
    ranks.record(normed)
    found = head_choice(target, normed, asked) if greedy else head_logits(target, normed, asked)
    return found, torch.cat([tapped[i] for i in taps], dim=-1) if taps else x.new_empty(count, 0)


def keep_rows(caches: Sequence[RingCache], path: torch.Tensor, start: Position) -> None:
    """After a tree at `start` was verified: its rows `path` [A] (from the anchor down) become positions start.. .

    All rows after the first A count as rejected, and so may some of the A, each of which stays in its own place.
    """
    own, slots = torch.arange(len(path), device=path.device), {}
    for cache in caches:
        if cache.capacity not in slots:
            slots[cache.capacity] = cache.slots(path + start), cache.slots(own + start)
        cache.keep(*slots[cache.capacity])


def rotations(target: Target, drafter: Drafter | None, length: int) -> Rotations:
    """A table for both of all positions below `length`."""
    layers = (*target.layers, *(drafter.layers if drafter else ()))
    kinds = [(g.rope_theta, g.rotary_dim) for g in (layer.attention.geometry for layer in layers)]
    return Rotations.of(kinds, length, target.embed)


def new_caches(target: Target, max_len: int, block: int) -> list[RingCache]:
    """Caches of one sequence of up to `max_len` positions whose calls verify up to `block` rows."""
    kw = {"dtype": target.embed.dtype, "device": target.embed.device}
    caches: list[RingCache] = []
    for layer in target.layers:
        g = layer.attention.geometry
        shape = (g.kv_heads, g.head_dim, g.v_head_dim)
        window = layer.attention.window
        if window is None:
            caches.append(LinearCache(shape, max_len + block, **kw))
        else:
            caches.append(RingCache(shape, window + block, window, block=block, **kw))
    return caches
