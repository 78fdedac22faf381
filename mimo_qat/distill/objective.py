"""Losses of DFlash training over a frozen output head, and what to watch while training.

"ce": cross-entropy with the label weighted exp(-(k-1)/gamma) in slot k = 1..b-1, because a slot is only used when all
before it were right (arXiv 2602.06036; gamma 7, 5, 4 for blocks of 16, 10, 8). "dpace": weights from the drafter's
own detached confidence, w_j = sum_{m>=j} prod_{i<=m} s_i with s = (1-alpha) exp(-CE) + alpha (arXiv 2605.18810),
divided by the number of anchors and not by the sum of weights.

Every function returns SUMS beside the denominator, so that a step divides once, by the total over all micro-batches
and ranks: padding, uneven batches and the number of processes do not change the loss.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F

Loss = Literal["ce", "dpace"]
DPACE_ALPHA = 0.5


@dataclass(frozen=True)
class Sums:
    """Sums over supervised slots. `loss` is a differentiable scalar; the rest carries no gradient.

    denominator: sum of weights (ce) or number of anchors (dpace). correct, counted [b-1]: hits and slots a position.
    prefix: accepted drafts of a teacher-forced greedy check, anchors: number of valid anchors.
    """

    loss: torch.Tensor
    denominator: torch.Tensor
    correct: torch.Tensor
    counted: torch.Tensor
    prefix: torch.Tensor
    anchors: torch.Tensor

    def vector(self) -> torch.Tensor:
        """All sums as one float64 vector, to add over micro-batches and ranks; `metrics` reads it."""
        heads = [self.loss.detach(), self.denominator, self.prefix, self.anchors]
        return torch.cat([torch.stack([h.double() for h in heads]), self.correct.double(), self.counted.double()])


def metrics(vector: torch.Tensor) -> dict[str, float | list[float]]:
    """Loss, accuracy a slot, and 1 + mean teacher-forced prefix (an acceptance length with its bonus token)."""
    loss, denominator, prefix, anchors = vector[:4].tolist()
    correct, counted = vector[4:].chunk(2)
    anchors = max(anchors, 1.0)
    return {
        "loss": loss / max(denominator, 1e-12),
        "prefix_length": 1 + prefix / anchors,
        "accuracy": correct.sum().item() / max(counted.sum().item(), 1.0),
        "accuracy_by_slot": [round(a, 4) for a in (correct / counted.clamp(min=1)).tolist()],
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


class _HeadLoss(torch.autograd.Function):
    """Weighted cross-entropy sum of hidden rows [M, b-1, D] under a frozen head, and its gradient, in one sweep.

    A chunk of blocks at a time: its logits exist once, in float32, and become their own gradient in place, so the
    backward pass needs no second multiplication with the head and [M*(b-1), V] is never whole.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, supervised, slot_weights, chunk_blocks):
        grad = torch.empty_like(hidden) if hidden.requires_grad else None
        ce = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        hit = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
        weights = torch.empty_like(ce)
        for start in range(0, labels.shape[0], chunk_blocks):
            rows = slice(start, start + chunk_blocks)
            label = labels[rows].flatten()
            logits = F.linear(hidden[rows].flatten(0, 1), head)
            hit[rows] = (logits.max(-1).indices == label).view(labels[rows].shape)
            logp = logits.log_softmax(-1, dtype=torch.float32)
            ce[rows] = -logp.gather(1, label[:, None]).view(labels[rows].shape)
            if slot_weights is None:
                weights[rows] = dpace_weights(ce[rows], supervised[rows])
            else:
                weights[rows] = slot_weights * supervised[rows]
            if grad is None:
                continue
            probability = logp.exp_()
            probability[torch.arange(len(label), device=label.device), label] -= 1
            probability *= weights[rows].view(-1, 1)
            grad[rows] = (probability.to(head.dtype) @ head).view_as(hidden[rows])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(hit, weights)
        return (ce * weights).sum(), hit, weights

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None, None


def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    supervised: torch.Tensor,
    *,
    loss: Loss = "ce",
    gamma: float | None = None,
    chunk_blocks: int = 128,
) -> Sums:
    """Loss of draft rows against their labels.

    hidden [..., b-1, D]: rows 1..b-1 of every block after the drafter's final norm; head [V, D]: the target's frozen
    lm_head; labels, supervised [..., b-1]. `gamma` None takes `default_gamma`.
    """
    slots = labels.shape[-1]
    hidden = hidden.reshape(-1, slots, hidden.shape[-1])
    labels, supervised = labels.reshape(-1, slots), supervised.reshape(-1, slots)
    if loss not in ("ce", "dpace"):
        raise ValueError(f'loss {loss!r} is unknown; use "ce" or "dpace"')
    slot_weights = None
    if loss == "ce":
        gamma = default_gamma(slots + 1) if gamma is None else gamma
        if not gamma > 0 or math.isnan(gamma):
            raise ValueError(f"loss_decay_gamma is {gamma}; it must be positive")
        slot_weights = decay_weights(slots + 1, gamma, hidden.device)
    total, hit, weights = _HeadLoss.apply(hidden, head.detach(), labels, supervised, slot_weights, chunk_blocks)
    hit = hit & supervised
    anchors = supervised[:, 0].sum()
    return Sums(
        loss=total,
        denominator=anchors.float() if loss == "dpace" else weights.sum(),
        correct=hit.sum(0),
        counted=supervised.sum(0),
        prefix=hit.cumprod(-1).sum(),
        anchors=anchors,
    )
