"""Losses of DFlash training over a frozen output head, and what to watch while training.

For slot k = 1..b-1 of a block, with q the drafter's distribution, p the target's, a_k = sum_v min(p_k, q_k) = 1 - TV:

"ce"      cross-entropy with the label, weighted exp(-(k-1)/gamma), because a slot is only used when all before it were
          right (arXiv 2602.06036; gamma 7, 5, 4 for blocks of 16, 10, 8).
"dpace"   the same with weights from the drafter's own detached confidence, w_j = sum_{m>=j} prod_{i<=m} s_i with
          s = (1-alpha) exp(-CE) + alpha (arXiv 2605.18810), divided by the number of anchors, not the sum of weights.
"tv"      0.1 CE + 0.9 TV with the weights of "ce": accepted tokens are what counts, not likelihood (DeepSpec's DSpark).
"e2e-tv"  1 - (1/(b-1)) sum_j prod_{i<=j} a_i: the expected share of a block that sampling would accept (AngelSpec).
          Its gradient vanishes where q is flat, so it is for the end of a run.

A selector adds `selector_weight` times the cross-entropy of its scores over each slot's candidates, with the true token
before the slot and the slot's weight, where the truth is among the candidates.

Every function returns SUMS beside the denominator, so that a step divides once, by the total over all micro-batches
and ranks: padding, uneven batches and the number of processes do not change the loss. Nothing here waits for a device.

Shape letters: M blocks, s = b-1 slots a block, D hidden size, V vocabulary, k candidates, r selector rank.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from mimo_kernels.head_loss import gradient_, overlap, row_statistics, top_k
from mimo_qat.models.modeling_dflash import best_candidate

Loss = Literal["ce", "dpace", "tv", "e2e-tv"]
DPACE_ALPHA = 0.5
TV_SHARE = 0.9


@dataclass(frozen=True)
class Objective:
    """What is minimised. `gamma` None takes `default_gamma` of the block."""

    loss: Loss = "ce"
    gamma: float | None = None
    selector_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss {self.loss!r} is unknown; use one of {', '.join(get_args(Loss))}")
        if self.gamma is not None and (not self.gamma > 0 or math.isnan(self.gamma)):
            raise ValueError(f"loss_decay_gamma is {self.gamma}; it must be positive")
        if not self.selector_weight >= 0:
            raise ValueError(f"selector_weight is {self.selector_weight}; it must not be negative")

    @property
    def needs_target(self) -> bool:
        """Whether the target's final hidden states are part of the loss."""
        return self.loss in ("tv", "e2e-tv")

    @property
    def per_anchor(self) -> bool:
        """Whether sums divide by the number of anchors, else by the sum of weights."""
        return self.loss in ("dpace", "e2e-tv")


@dataclass(frozen=True)
class Sums:
    """Sums over supervised slots. `loss` is a differentiable scalar; the rest carries no gradient.

    denominator: sum of weights or number of anchors. correct, counted [b-1]: hits and slots a position. prefix:
    accepted drafts of a teacher-forced greedy check, plain_prefix: without the selector. recalled: slots whose truth
    is among the candidates (without a selector: is the best token). anchors: number of valid anchors.
    """

    loss: torch.Tensor
    denominator: torch.Tensor
    correct: torch.Tensor
    counted: torch.Tensor
    prefix: torch.Tensor
    plain_prefix: torch.Tensor
    recalled: torch.Tensor
    anchors: torch.Tensor

    def vector(self) -> torch.Tensor:
        """All sums as one float64 vector [2 b + 4], to add over micro-batches and ranks; `metrics` reads it."""
        heads = [self.loss.detach(), self.denominator, self.prefix, self.plain_prefix, self.recalled, self.anchors]
        return torch.cat([torch.stack([h.double() for h in heads]), self.correct.double(), self.counted.double()])


def metrics(vector: torch.Tensor) -> dict[str, float | list[float]]:
    """Loss, accuracy a slot, and 1 + mean teacher-forced prefix (an acceptance length with its bonus token).

    Waits for the device.
    """
    loss, denominator, prefix, plain_prefix, recalled, anchors, *rest = vector.tolist()
    correct, counted = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return {
        "loss": loss / max(denominator, 1e-12),
        "prefix_length": 1 + prefix / max(anchors, 1.0),
        "plain_prefix_length": 1 + plain_prefix / max(anchors, 1.0),
        "candidate_recall": recalled / max(sum(counted), 1.0),
        "accuracy": sum(correct) / max(sum(counted), 1.0),
        "accuracy_by_slot": [round(hits / max(slots, 1.0), 4) for hits, slots in zip(correct, counted, strict=True)],
    }


def default_gamma(block_size: int) -> float:
    """Decay constant for a block: 4 at 8, 5 at 10, 7 at 16 (published), linear in between."""
    points = [(2, 2.0), (8, 4.0), (10, 5.0), (16, 7.0)]
    for (x0, y0), (x1, y1) in pairwise(points):
        if block_size <= x1:
            return y0 + (y1 - y0) * (block_size - x0) / (x1 - x0)
    return 7.0


def decay_weights(block_size: int, gamma: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """exp(-(k-1)/gamma) for slots k = 1..b-1, float32 [b-1]."""
    return torch.exp(-torch.arange(block_size - 1, device=device, dtype=torch.float32) / gamma)


def dpace_weights(ce: torch.Tensor, supervised: torch.Tensor, alpha: float = DPACE_ALPHA) -> torch.Tensor:
    """D-PACE weights [M, b-1] from cross-entropies [M, b-1]; a cut slot ends every product and weighs nothing."""
    confidence = ((1 - alpha) * torch.exp(-ce) + alpha) * supervised
    reach = confidence.cumprod(dim=-1)  # probability-like score that the first m slots all hold
    return reach.flip(-1).cumsum(-1).flip(-1) * supervised


def expected_prefix(accept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_j prod_{i<=j} a_i [M], its derivative by every a [M, s]) of acceptance probabilities a [M, s]; 0 cuts.

    Written without a division, so that a probability of 0 is no special case.
    """
    reach = accept.cumprod(-1)
    before = F.pad(reach[:, :-1], (1, 0), value=1.0)
    tail, tails = torch.ones_like(accept[:, 0]), []
    for slot in reversed(range(accept.shape[1])):
        tails.append(tail)
        tail = 1 + accept[:, slot] * tail
    return reach.sum(-1), before * torch.stack(tails[::-1], dim=-1)


def slot_terms(
    objective: Objective, ce: torch.Tensor, accept: torch.Tensor | None, supervised: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss sum, slot weights, weight of d CE, weight of d a or None) from CE and a [M, s].

    The gradient of the loss sum by a slot's logits is ce_weight * d CE + accept_weight * d a.
    """
    slots = ce.shape[-1]
    decay = decay_weights(slots + 1, objective.gamma or default_gamma(slots + 1), ce.device) * supervised
    if objective.loss == "dpace":
        weights = dpace_weights(ce, supervised)
        return (ce * weights).sum(), weights, weights, None
    if objective.loss == "ce":
        return (ce * decay).sum(), decay, decay, None
    assert accept is not None
    if objective.loss == "tv":
        total = (decay * ((1 - TV_SHARE) * ce + TV_SHARE * (1 - accept))).sum()
        return total, decay, (1 - TV_SHARE) * decay, -TV_SHARE * decay
    prefix, slope = expected_prefix(accept * supervised)
    total = supervised[:, 0].sum() - prefix.sum() / slots
    return total, decay, torch.zeros_like(ce), -slope * supervised / slots


@dataclass
class _SelectorPass:
    """The selector's loss and gradients, a chunk of rows at a time; float32 sums for the codebooks and the projection.

    S = u + <left, B[ids]> with left = A[before] * gate and gate = W h, so with g = d loss / d S:
    d u = g,  d B[ids] += g left,  d left = sum_k g B[ids],  d A[before] += d left * gate,  d gate = d left * A[before].
    """

    codebook_a: torch.Tensor
    codebook_b: torch.Tensor
    projection: torch.Tensor
    weight: float

    def __post_init__(self) -> None:
        parts = (self.codebook_a, self.codebook_b, self.projection)
        self.grads = [torch.zeros_like(t, dtype=torch.float32) for t in parts]

    def run(self, hidden, unary, ids, before, labels, weights, want_grad):
        """(loss sum, chosen ids [R], truth among the candidates [R], d unary [R, k], d hidden [R, D]) of rows [R]."""
        row_a, rows_b = self.codebook_a[before].float(), self.codebook_b[ids].float()
        gate = F.linear(hidden, self.projection).float()
        left = row_a * gate
        scores = unary.float() + (rows_b @ left[..., None])[..., 0]
        match = ids == labels[:, None]
        present = match.any(-1)
        weights = self.weight * weights * present
        total = (weights * (scores.logsumexp(-1) - (scores * match).sum(-1))).sum()
        chosen = best_candidate(scores, ids)
        if not want_grad:
            return total, chosen, present, None, None
        slope = weights[:, None] * (scores.softmax(-1) - match.float())
        into_left = (slope[:, None] @ rows_b)[:, 0]
        into_gate = into_left * row_a
        _add_rows(self.grads[0], before, into_left * gate)
        _add_rows(self.grads[1], ids, slope[..., None] * left[:, None])
        into_gate = into_gate.to(hidden.dtype)
        self.grads[2] += into_gate.T @ hidden
        return total, chosen, present, slope, into_gate @ self.projection


def _add_rows(table: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """table[ids] += rows in an order of its own choice, always the same one (index_add_ has none on CUDA).

    `unsafe` leaves out a check of the ids, all of them vocabulary entries, for which the host may have to wait.
    """
    torch._index_put_impl_(table, (ids,), rows, accumulate=True, unsafe=True)


class _HeadLoss(torch.autograd.Function):
    """The whole loss of hidden rows [M, s, D] under a frozen head [V, D], and its gradients, in one sweep.

    A chunk of blocks at a time: its logits exist once and become their own gradient in place, so the backward pass
    needs no second multiplication with the head and [M*s, V] is never whole.
    """

    @staticmethod
    def forward(ctx, hidden, codebook_a, codebook_b, projection, head, rows, objective, k, chunk_blocks):
        want_grad = ctx.needs_input_grad[0]  # false under no_grad, unlike those of the selector's parameters
        selector = None
        if codebook_a is not None:
            selector = _SelectorPass(codebook_a, codebook_b, projection, objective.selector_weight)
        grad = torch.zeros_like(hidden) if want_grad else None
        total = torch.zeros((), device=hidden.device)
        parts = []
        for start in range(0, hidden.shape[0], chunk_blocks):
            at = slice(start, start + chunk_blocks)
            chunk = {name: value[at] for name, value in rows.items() if value is not None}
            loss, into_hidden, *found = _chunk(hidden[at], head, chunk, objective, selector, k, want_grad)
            total += loss
            parts.append(found)
            if grad is not None:
                grad[at] = into_hidden
        weights, hit, plain_hit, recalled = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(grad, *(selector.grads if selector is not None and want_grad else ()))
        ctx.mark_non_differentiable(weights, hit, plain_hit, recalled)
        return total, weights, hit, plain_hit, recalled

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads = [g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, *[None] * (9 - len(grads)))


def _chunk(hidden, head, rows, objective, selector, k, want_grad):
    """(loss sum, d hidden, slot weights, hits, hits without selector, recalled), [m, s] each, of a chunk of blocks."""
    labels, supervised = rows["labels"], rows["supervised"]
    flat, label = hidden.flatten(0, 1), labels.flatten()
    logits = F.linear(flat, head)
    lse, picked, best = row_statistics(logits, label)
    ce, other, accept = lse - picked, None, None
    if "target" in rows:
        other = F.linear(rows["target"].flatten(0, 1), head)
        other_lse, _, _ = row_statistics(other, label)
        accept, below = overlap(logits, other, lse, other_lse)
        accept = accept.view(labels.shape)
    total, weights, ce_weight, accept_weight = slot_terms(objective, ce.view(labels.shape), accept, supervised)
    plain_hit = hit = recalled = best == label
    slope = into_hidden = None
    if selector is not None:
        unary, ids = top_k(logits, k)
        extra, chosen, recalled, slope, into_hidden = selector.run(
            flat, unary, ids, rows["before"].flatten(), label, weights.flatten(), want_grad
        )
        total, hit = total + extra, chosen == label
    if want_grad:
        second = None
        if other is not None and accept_weight is not None:
            second = other, other_lse, below, accept_weight.flatten()
        gradient_(logits, label, lse, ce_weight.flatten(), second)
        if slope is not None:
            logits.scatter_add_(1, ids, slope.to(logits.dtype))
        through_head = logits @ head
        into_hidden = through_head if into_hidden is None else through_head + into_hidden
        into_hidden = into_hidden.view_as(hidden)
    return total, into_hidden, weights, *(t.view(labels.shape) for t in (hit, plain_hit, recalled))


def blocks_a_chunk(head: torch.Tensor, slots: int) -> int:
    """Blocks whose logits exist at once: 256 MiB of them on a GPU, 32 MiB (rather in a cache) on a CPU."""
    size = 2**28 if head.is_cuda else 2**25
    return max(1, size // (head.shape[0] * head.element_size() * slots))


def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    supervised: torch.Tensor,
    objective: Objective,
    *,
    target_hidden: torch.Tensor | None = None,
    selector: Any = None,
    anchor_ids: torch.Tensor | None = None,
    chunk_blocks: int | None = None,
) -> Sums:
    """Loss of draft rows against their labels, and against the target's own distribution where the objective asks.

    hidden [..., b-1, D]: rows 1..b-1 of every block after the drafter's final norm; head [V, D]: the target's frozen
    lm_head; labels, supervised [..., b-1]. target_hidden [..., b-1, D]: the target's final hidden state (normed) one
    position before each label. selector: a `CandidateSelector`, with the anchors' token ids anchor_ids [...].
    """
    slots, size = labels.shape[-1], hidden.shape[-1]
    labels, supervised = labels.reshape(-1, slots), supervised.reshape(-1, slots)
    if objective.needs_target and target_hidden is None:
        raise ValueError(f"loss {objective.loss!r} compares with the target: give its final hidden states")
    rows = {"labels": labels, "supervised": supervised, "target": None, "before": None}
    if objective.needs_target:
        assert target_hidden is not None
        rows["target"] = target_hidden.detach().reshape(-1, slots, size)
    parts = [None, None, None]
    if selector is not None:
        assert anchor_ids is not None
        rows["before"] = torch.cat((anchor_ids.reshape(-1, 1), labels[:, :-1]), dim=1)
        parts = [selector.predecessor_codebook, selector.successor_codebook, selector.hidden_projection.weight]
    chunk_blocks = chunk_blocks or blocks_a_chunk(head, slots)
    k = selector.top_k if selector is not None else 0
    total, weights, hit, plain_hit, recalled = _HeadLoss.apply(
        hidden.reshape(-1, slots, size), *parts, head.detach(), rows, objective, k, chunk_blocks
    )
    hit, plain_hit, anchors = hit & supervised, plain_hit & supervised, supervised[:, 0].sum()
    return Sums(
        loss=total,
        denominator=anchors.float() if objective.per_anchor else weights.sum(),
        correct=hit.sum(0),
        counted=supervised.sum(0),
        prefix=hit.cumprod(-1).sum(),
        plain_prefix=plain_hit.cumprod(-1).sum(),
        recalled=(recalled & supervised).sum(),
        anchors=anchors,
    )
