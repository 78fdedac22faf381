"""Blocks of the DFlash training forward: anchors, labels, positions and the mask rule.

One teacher-forced row of S tokens gives N blocks. The block at anchor a is [x_a, MASK x (b-1)] at positions a..a+b-1,
and slot k = 1..b-1 predicts x_{a+k}. All blocks go through one forward with keys [S context rows | N*b block rows].
At inference the anchor has no target hidden state yet, so a block sees the context STRICTLY before its anchor.

Shape letters: B rows, S tokens, N anchors, b block size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

TILE = 128  # of flex attention, queries and keys
Rule = tuple[int | None, bool]  # (window in keys including the query, causal inside the block)


@dataclass(frozen=True)
class Blocks:
    """One draw of anchors and what they are trained on.

    anchors [B, N] int64, indices into the row, ascending, invalid ones last; starts [B, N] int64, where the anchor's
    document begins; valid [B, N] bool; labels [B, N, b-1] int64 token ids; supervised [B, N, b-1] bool; position_ids
    [B, S + N*b] of the key rows.
    """

    anchors: torch.Tensor
    starts: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor
    supervised: torch.Tensor
    position_ids: torch.Tensor

    @property
    def length(self) -> int:
        """S, the context rows."""
        return self.position_ids.shape[1] - self.anchors.shape[1] * (self.labels.shape[2] + 1)

    def to(self, device: torch.device | str) -> "Blocks":
        return Blocks(**{name: value.to(device) for name, value in vars(self).items()})


def valid_anchors(loss_mask: torch.Tensor, doc_ids: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: the token and its successor are supervised and of one document, so the row's tail counts too."""
    here = loss_mask.bool() & (doc_ids >= 0)
    valid = torch.zeros_like(here)
    valid[:, :-1] = here[:, :-1] & here[:, 1:] & (doc_ids[:, :-1] == doc_ids[:, 1:])
    return valid


def sample_anchors(
    loss_mask: torch.Tensor, doc_ids: torch.Tensor, num_anchors: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform anchors without replacement in each row -> anchors, valid [B, min(num_anchors, S)].

    A row with fewer valid positions than anchors fills up with invalid blocks at position 0. The draw happens on the
    CPU, so that a run gives the same anchors on every device; give CPU tensors, or every call waits for the device.
    """
    candidates = valid_anchors(loss_mask, doc_ids)
    keys = torch.rand(candidates.shape, generator=generator).to(candidates.device)
    keys = keys.masked_fill(~candidates, -1.0)
    score, anchors = keys.topk(min(num_anchors, keys.shape[1]), dim=1)
    valid = score >= 0
    # Ascending anchors keep neighbouring queries on neighbouring keys, which is what block-sparse attention wants.
    order = anchors.masked_fill(~valid, keys.shape[1]).argsort(dim=1)
    valid = valid.gather(1, order)
    return anchors.gather(1, order).masked_fill(~valid, 0), valid


def make_blocks(
    batch: dict[str, torch.Tensor], block_size: int, num_anchors: int, generator: torch.Generator | None = None
) -> Blocks:
    """Draws anchors for a packed batch {input_ids, loss_mask, doc_ids (-1 = padding), position_ids}, each [B, S]."""
    anchors, valid = sample_anchors(batch["loss_mask"], batch["doc_ids"], num_anchors, generator)
    return blocks_at(batch, anchors, valid, block_size)


def blocks_at(batch: dict[str, torch.Tensor], anchors: torch.Tensor, valid: torch.Tensor, block_size: int) -> Blocks:
    """Labels, supervision and positions of blocks at given anchors [B, N].

    Supervision stops at the first label that is unsupervised, past the row, or of another document: a drafter is
    never trained on what follows a token that the target did not write. A document is one stretch of a row.
    """
    length = batch["input_ids"].shape[1]
    offsets = torch.arange(1, block_size, device=anchors.device)
    index = anchors[:, :, None] + offsets  # [B, N, b-1]
    inside = index < length
    index = index.clamp(max=length - 1)

    def pick(values, where):
        return values.gather(1, where.flatten(1)).view(where.shape)

    good = inside & pick(batch["loss_mask"], index).bool()
    good &= pick(batch["doc_ids"], index) == pick(batch["doc_ids"], anchors)[:, :, None]
    supervised = (good & valid[:, :, None]).cumprod(dim=2).bool()
    doc_ids, at = batch["doc_ids"], torch.arange(length, device=anchors.device)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    starts = torch.where(begins, at, 0).cummax(1).values
    block_positions = pick(batch["position_ids"], anchors)[:, :, None] + torch.arange(block_size, device=anchors.device)
    return Blocks(
        anchors=anchors,
        starts=pick(starts, anchors),
        valid=valid,
        labels=pick(batch["input_ids"], index),
        supervised=supervised,
        position_ids=torch.cat((batch["position_ids"], block_positions.flatten(1)), dim=1),
    )


def mask_rule(blocks: Blocks, block_size: int, rule: Rule) -> Callable:
    """The visibility rule as a flex-attention `mask_mod(batch, head, query, key)` on index tensors.

    Query o of block j with anchor a sees context key `kv` iff kv < a, same document, and a + o - kv < window; it sees
    the keys of block j, causal layers only up to o. An invalid block keeps its own keys: no softmax row is empty.
    """
    window, causal = rule
    length = blocks.length
    anchors, starts = blocks.anchors.int(), blocks.starts.int()
    ends = torch.where(blocks.valid, anchors, 0)  # an invalid block has an empty context

    def mask_mod(b, h, q, kv):
        block, offset = q // block_size, q % block_size
        seen = (kv >= starts[b, block]) & (kv < ends[b, block])
        if window is not None:
            seen = seen & (anchors[b, block] + offset - kv < window)
        own = (kv >= length) & ((kv - length) // block_size == block)
        if causal:
            own = own & ((kv - length) % block_size <= offset)
        return seen | own  # kv < anchor < length already excludes block rows from the first term

    return mask_mod


def dense_mask(blocks: Blocks, block_size: int, rule: Rule) -> torch.Tensor:
    """Boolean mask [B, 1, N*b, S + N*b] of the rule, for CPUs and for references."""
    batch, anchors = blocks.anchors.shape
    queries = anchors * block_size
    device = blocks.anchors.device
    b = torch.arange(batch, device=device)[:, None, None]
    q = torch.arange(queries, device=device)[None, :, None]
    kv = torch.arange(blocks.length + queries, device=device)[None, None]
    return mask_rule(blocks, block_size, rule)(b, None, q, kv)[:, None]


@cache
def _compiled_block_mask() -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False)


def block_sparse_mask(blocks: Blocks, block_size: int, rule: Rule) -> Any:
    """The same rule as a flex-attention BlockMask: memory grows with tiles of 128 x 128, not with N*b * (S + N*b).

    Where tiles hold whole blocks (S and N*b multiples of 128, b a divisor), the tiles follow from the anchors in a few
    small operations; else the rule is evaluated at every query and key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, anchors = blocks.anchors.shape
    queries, keys = anchors * block_size, blocks.length + anchors * block_size
    rule_mod = mask_rule(blocks, block_size, rule)
    if blocks.length % TILE or queries % TILE or TILE % block_size:
        return _compiled_block_mask()(rule_mod, rows, None, queries, keys, device=str(blocks.anchors.device))
    partial, full = (_ordered(tiles) for tiles in mask_tiles(blocks, block_size, rule))
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=TILE, mask_mod=rule_mod, seq_lengths=(queries, keys))


def mask_tiles(blocks: Blocks, block_size: int, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """(tiles with some, tiles with only visible pairs), bool [B, N*b / 128, (S + N*b) / 128] each, disjoint.

    The context of block j is one stretch of keys, [max(start, a + o - window + 1), a) for query o.
    """
    window, _ = rule
    anchors, starts = blocks.anchors, blocks.starts
    ends = torch.where(blocks.valid, anchors, 0)
    first, last = starts, starts  # lowest key of the block's first and of its last query
    if window is not None:
        first = torch.maximum(starts, anchors - window + 1)
        last = torch.maximum(starts, anchors + block_size - window)
    tile = torch.arange(0, blocks.length, TILE, device=anchors.device)
    touched = (first < ends)[..., None] & (first[..., None] < tile + TILE) & (ends[..., None] > tile)
    whole = (last[..., None] <= tile) & (ends[..., None] >= tile + TILE)
    some, every = (t.unflatten(1, (-1, TILE // block_size)) for t in (touched, whole))
    full = every.all(2)
    own = torch.eye(full.shape[1], dtype=torch.bool, device=anchors.device).expand(full.shape[0], -1, -1)
    return torch.cat((some.any(2) & ~full, own), -1), torch.cat((full, torch.zeros_like(own)), -1)


def _ordered(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of set tiles, their indices first) int32 [B, 1, Q], [B, 1, Q, K]: how a BlockMask stores them."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None].contiguous()


def attention_masks(blocks: Blocks, block_size: int, rules: set[Rule]) -> dict:
    """The mask of every layer rule: flex attention on CUDA, dense elsewhere."""
    build = block_sparse_mask if blocks.anchors.is_cuda else dense_mask
    return {rule: build(blocks, block_size, rule) for rule in rules}
