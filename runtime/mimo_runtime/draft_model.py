"""The forward passes of a DFlash drafter, as plain functions over plain tensors: of its context, which is made of the
target's taps, and of a block of drafts. Layers, shapes and letters are those of `model`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mimo_kernels import moe as moe_kernels
from mimo_kernels.choice import Best
from mimo_runtime.cache import LinearCache, Position, RingCache
from mimo_runtime.load import Attention, Conv, Drafter, Mlp, Moe, Target
from mimo_runtime.model import (
    Rows,
    attention,
    embed,
    head_choice,
    head_logits,
    linear,
    mlp,
    project,
    stored_heads,
)
from mimo_runtime.norms import add_norm


def draft_context(
    drafter: Drafter,
    caches: Sequence[RingCache],
    taps: torch.Tensor,
    start: Position,
    end: torch.Tensor | None = None,
) -> None:
    """Stores the drafter's context keys and values of positions start.. from the target's taps [T, len(ids)*H].

    Rows of rejected tokens may be among them: they are hidden by the committed length until they are overwritten. Rows
    from position `end` on are padding, as in `RingCache.write`.
    """
    _, context = add_norm(drafter.ranks.gather(linear(taps, drafter.fc)), None, drafter.hidden_norm)
    rows = Rows(start, len(taps), taps, rotations=drafter.rotations)
    for layer, cache in zip(drafter.layers, caches, strict=True):
        if isinstance(start, torch.Tensor):
            stored_heads(layer.attention, context, rows, cache.ring(), start, len(taps), queries=False)
        else:
            _, k, v = project(layer.attention, context, rows, queries=False)
            cache.write(k, v, start, end)


def block_conv(x: torch.Tensor, base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Two taps over the rows of a block x [B, H], zero before the first: own row, then the row before.

    base [2, H]; change [B, 2, groups] is added to it, each value for H / groups neighbouring channels. The terms are
    added in the order of the DFlash2 contract, in x's dtype.
    """
    before = F.pad(x[:-1], (0, 0, 1, 0))
    own, last = change.repeat_interleave(x.shape[-1] // change.shape[-1], dim=-1).unbind(1)
    return base[0] * x + base[1] * before + own * x + last * before


def convolved(conv: Conv | None, x: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`sublayer` of the normed rows x [B, H] between its two convolutions, which one projection of x corrects."""
    if conv is None:
        return sublayer(x)
    before, after = linear(x, conv.projection).unflatten(-1, (2, 2, -1)).unbind(1)
    return block_conv(sublayer(block_conv(x, conv.base[0], before)), conv.base[1], after)


def draft_forward(
    target: Target,
    drafter: Drafter,
    caches: Sequence[RingCache],
    anchor: torch.Tensor,
    start: Position,
    *,
    greedy: bool = False,
) -> tuple[torch.Tensor, Any]:
    """(hidden rows [B-1, H], logits [B-1, vocabulary] float32) of the B-1 tokens after `anchor` [1] at `start`; where
    `greedy`, the `Best` of each row in place of logits.

    The block is [anchor, MASK x (B-1)]; it sees the committed context (positions < start, inside the window that each
    query counts from itself) and itself: a tree in which every row is everybody's ancestor. What it leaves in the
    caches is behind the committed length, and overwritten by the context of the tokens that are accepted.
    """
    block, ranks = drafter.block, drafter.ranks
    x = torch.cat((embed(target, anchor), drafter.mask_embedding.expand(block - 1, -1)))
    every = torch.arange(block, device=x.device), torch.ones(block, block, dtype=torch.bool, device=x.device)
    rows = Rows(start, block, x, None if drafter.causal else every, rotations=drafter.rotations)
    convolves = any(layer.attention_conv or layer.mlp_conv for layer in drafter.layers)  # what all ranks give together
    join = add_norm if convolves else ranks.add_norm

    def given(part: torch.Tensor) -> torch.Tensor:
        return ranks.sum(moe_kernels.combine(part)) if convolves else part

    update = None
    for layer, cache in zip(drafter.layers, caches, strict=True):

        def attend(x: torch.Tensor, w: Attention = layer.attention, cache: RingCache = cache) -> torch.Tensor:
            return given(attention(w, cache, x, rows, ranks))

        def feed(x: torch.Tensor, w: Mlp | Moe = layer.mlp) -> torch.Tensor:
            return given(mlp(w, x, ranks))

        x, normed = join(x, update, layer.input_norm)
        x, normed = join(x, convolved(layer.attention_conv, normed, attend), layer.post_norm)
        update = convolved(layer.mlp_conv, normed, feed)
    x, hidden = join(x, update, drafter.norm)
    ranks.record(hidden)
    if greedy:
        return hidden[1:], Best(head_choice(target, hidden, block, drafter.vocab_size).pairs[1:])
    logits = head_logits(target, hidden, block)[1:]
    return hidden[1:], logits[:, : drafter.vocab_size] if drafter.vocab_size < logits.shape[-1] else logits


def new_draft_caches(drafter: Drafter, max_len: int) -> list[RingCache]:
    """Caches of the drafter's context, with room for one block behind it."""
    like = drafter.mask_embedding
    kw = {"dtype": like.dtype, "device": like.device}
    caches: list[RingCache] = []
    for layer in drafter.layers:
        g, window = layer.attention.geometry, layer.attention.window
        shape = (g.kv_heads, g.head_dim, g.v_head_dim)
        if window is None:
            caches.append(LinearCache(shape, max_len + drafter.block, **kw))
        else:
            caches.append(RingCache(shape, window + drafter.block, window, block=drafter.block, **kw))
    return caches
