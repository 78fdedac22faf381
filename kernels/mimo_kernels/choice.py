"""The greedy choice over a vocabulary that ranks share, and what a round makes of the tokens chosen.

`best` finds (logit, token) of the largest logit in a rank's share, packed into one integer; the largest of these
integers, of whatever parts and ranks, names the token that `torch.argmax` of all logits would: the first among equals,
zeros of both signs being equal, and the first NaN if there is one. So ranks gather some integers a row, not logits.

`accept` compares a chain's drafts with the tokens chosen and advances the state of the text.

`best_reference`, `tokens` and `accept_reference` are the definitions, exact ones: integers and comparisons. `best` and
`accept` run Triton kernels (`choice_triton`) on a GPU of compute capability 9 or more, the definitions elsewhere.

Packed: bits 32..63 are the logit in float32, mapped to a signed integer of the same order; bits 0..31 are 2**31 - 1 -
token.

Letters: T rows, V columns of a share, P pairs a row.
"""

from typing import NamedTuple

import torch

LAST = 2**31 - 1  # minus the token; and the order of a NaN, above infinity


class Best(NamedTuple):
    """The greedy choice of T rows in P parts: `pairs` int64 [T, P], packed."""

    pairs: torch.Tensor


class Text(NamedTuple):
    """The state of a text between two rounds, which `accept` changes in place. All int64 but `stops`, contiguous.

    anchor [1], position [], left [], turn []: the last token and its place, tokens that may come, rounds that committed
    one. stops bool [vocabulary]. record [3 + D + 1 or more] and records [slots, as many], of which slot [] is next.
    """

    anchor: torch.Tensor
    position: torch.Tensor
    left: torch.Tensor
    turn: torch.Tensor
    stops: torch.Tensor
    record: torch.Tensor
    records: torch.Tensor
    slot: torch.Tensor


@torch.no_grad()
def best_reference(logits: torch.Tensor, first: int = 0, limit: int | None = None) -> torch.Tensor:
    """int64 [T, 1]; see `best`."""
    known = logits if limit is None else logits[:, : max(limit - first, 0)]
    if known.shape[1] == 0:  # a share beyond the limit: below whatever another has
        return torch.full((len(logits), 1), -(2**63), dtype=torch.int64, device=logits.device)
    column = known.argmax(-1, keepdim=True)
    value = known.gather(1, column).float()
    bits = torch.where(value == 0, 0, value.view(torch.int32))
    order = torch.where(value.isnan(), LAST, bits ^ ((bits >> 31) & LAST)).long()
    return (order << 32) | (LAST - first - column)


@torch.no_grad()
def best(logits: torch.Tensor, first: int = 0, limit: int | None = None) -> torch.Tensor:
    """Packed pairs int64 [T, P] of logits BF16 or float32 [T, V], whose columns are tokens `first`, first + 1, ...

    Tokens from `limit` on are not chosen; another share has to have some below it. ValueError for other shapes and
    dtypes, or tokens of more than 31 bits.
    """
    if logits.dtype not in (torch.bfloat16, torch.float32) or logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(
            f"logits: {logits.dtype} {list(logits.shape)}, expected torch.bfloat16 or torch.float32 [rows, tokens]"
        )
    if not 0 <= first <= LAST - logits.shape[1]:
        raise ValueError(f"first: {first} and {logits.shape[1]} tokens from there need more than 31 bits")
    if _on_kernels(logits):
        from . import choice_triton

        return choice_triton.best(logits, first, limit)
    return best_reference(logits, first, limit)


@torch.no_grad()
def tokens(found: Best) -> torch.Tensor:
    """The tokens int64 [T] chosen."""
    return LAST - (found.pairs.amax(-1) & (2**32 - 1))


@torch.no_grad()
def advance(text: Text, accepted: torch.Tensor, own: torch.Tensor) -> None:
    """Advances `text` by `accepted` [] drafts, which are the target's own tokens, and by the one after them.

    `own[i]` of [D + 1] is the target's token after the anchor and i drafts, whatever it is after more than were
    accepted. A stop token or the budget may end the round earlier.
    """
    rows = torch.arange(len(own), device=own.device)
    stop = rows.masked_fill(~text.stops[own], len(own)).amin()
    kept = torch.minimum(torch.minimum(accepted, stop) + 1, text.left)
    text.left.copy_((text.left - kept).masked_fill(stop < kept, 0))
    last = own.gather(0, (kept - 1).clamp(min=0)[None])
    text.anchor.copy_(torch.where(kept > 0, last, text.anchor))
    text.position.add_(kept)
    text.turn.add_(kept > 0)
    text.record[: 3 + len(own)] = torch.cat((torch.stack((kept, accepted, text.left)), own))
    text.records.index_copy_(0, text.slot[None], text.record[None])
    text.slot.add_(1).remainder_(len(text.records))


@torch.no_grad()
def accept_reference(text: Text, drafts: torch.Tensor, own: torch.Tensor) -> None:
    """`accept` of tokens."""
    advance(text, (drafts == own[:-1]).long().cumprod(0).sum(), own)


@torch.no_grad()
def accept(text: Text, drafts: torch.Tensor, own: torch.Tensor | Best) -> None:
    """Advances `text` by those of the drafts int64 [D] that are the target's own tokens before the first that is not,
    and by the target's own token there; `own` is int64 [D + 1], or what `best` found of as many rows.

    A record is the tokens committed, the drafts accepted, `left` after both, and the D + 1 own tokens. ValueError for
    other shapes and dtypes.
    """
    chosen = own.pairs if isinstance(own, Best) else own
    if chosen.dtype != torch.int64 or drafts.dtype != torch.int64 or drafts.shape != (len(chosen) - 1,):
        raise ValueError(
            f"drafts: {drafts.dtype} {list(drafts.shape)}, own: {chosen.dtype} {list(chosen.shape)}; "
            "expected torch.int64 [D], and of D + 1 rows"
        )
    if len(text.record) < 3 + len(chosen) or text.records.shape[1:] != text.record.shape:
        raise ValueError(
            f"record: {list(text.record.shape)}, records: {list(text.records.shape)}; "
            f"expected {3 + len(chosen)} values or more, in both"
        )
    if _on_kernels(chosen):
        from . import choice_triton

        choice_triton.accept(text, drafts, own)
    else:
        accept_reference(text, drafts, tokens(own) if isinstance(own, Best) else own)


def _on_kernels(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9
