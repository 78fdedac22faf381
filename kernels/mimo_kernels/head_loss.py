"""Rows of vocabulary logits: log-sum-exp, arg max, overlap of two distributions, top-k, and a loss gradient in place.

What training over a large vocabulary does to logits, in as few passes as it can be done. For logits l (draft) and
l' (target) of one row, q = softmax(l), p = softmax(l'):

    CE = lse(l) - l[label]                          d CE / dl    = q - onehot(label)
    KL = sum_v p_v (l'_v - l_v) - lse(l') + lse(l)  d KL / dl    = q - p
    overlap = sum_v min(p_v, q_v) = 1 - TV(p, q)    d overlap/dl = q * ([q < p] - below),  below = sum_v q_v [q_v < p_v]

The gradients are linear in weights that may depend on a whole block of rows, so a caller takes the sums of all rows
first and writes the gradient over the logits afterwards: read, read, write. Sums are float32 for every logit dtype.

The torch forms here are the definition; CUDA tensors take one-pass Triton kernels (`head_loss_triton`). Why not a
fused linear cross-entropy (Liger, cut-cross-entropy): those need the loss weights before the logits, and give neither
the overlap with a second distribution nor the candidates of a selector. Given up: the logits of a chunk of rows exist.

R rows, V vocabulary.
"""

import torch


def row_statistics(logits_RV: torch.Tensor, labels_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-sum-exp float32 [R], the label's logit float32 [R], first arg max int64 [R])."""
    if logits_RV.is_cuda:
        from . import head_loss_triton

        return head_loss_triton.row_statistics(logits_RV, labels_R)
    picked = logits_RV.gather(1, labels_R[:, None])[:, 0].float()
    return logits_RV.float().logsumexp(-1), picked, logits_RV.argmax(-1)


def overlap(
    logits_RV: torch.Tensor, other_RV: torch.Tensor, lse_R: torch.Tensor, other_lse_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of min(p, q), sum of q where q < p), float32 [R] each; q of `logits_RV`, p of `other_RV`."""
    if logits_RV.is_cuda:
        from . import head_loss_triton

        return head_loss_triton.overlap(logits_RV, other_RV, lse_R, other_lse_R)
    q = (logits_RV.float() - lse_R[:, None]).exp()
    p = (other_RV.float() - other_lse_R[:, None]).exp()
    return torch.minimum(p, q).sum(-1), (q * (q < p)).sum(-1)


def divergence(logits_RV: torch.Tensor, other_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL(p || q), log-sum-exp of `logits_RV`, log-sum-exp of `other_RV`), float32 [R] each; q of the first, p of the
    second."""
    if logits_RV.is_cuda:
        from . import head_loss_triton

        return head_loss_triton.divergence(logits_RV, other_RV)
    # Not logits - lse: both are large, and a small KL would be what their rounding leaves.
    log_q, log_p = logits_RV.float().log_softmax(-1), other_RV.float().log_softmax(-1)
    p = log_p.exp()
    kl_R = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return kl_R, logits_RV.float().logsumexp(-1), other_RV.float().logsumexp(-1)


def divergence_gradient_(
    logits_RV: torch.Tensor,
    labels_R: torch.Tensor,
    lse_R: torch.Tensor,
    ce_weight_R: torch.Tensor,
    other: tuple[torch.Tensor, torch.Tensor, float],
) -> torch.Tensor:
    """Overwrites logits [R, V] with the gradient of sum(kl_weight * KL + ce_weight * CE); returns them.

    `other` is (other_RV, other_lse_R, kl_weight).
    """
    if logits_RV.is_cuda:
        from . import head_loss_triton

        return head_loss_triton.divergence_gradient_(logits_RV, labels_R, lse_R, ce_weight_R, other)
    other_RV, _, kl_weight = other  # what the sums of `divergence` save the kernels is not worth its rounding here
    q, p = logits_RV.float().log_softmax(-1).exp(), other_RV.float().log_softmax(-1).exp()
    grad = (kl_weight + ce_weight_R)[:, None] * q - kl_weight * p
    return logits_RV.copy_(grad.scatter_add_(1, labels_R[:, None], -ce_weight_R[:, None]))


def gradient_(
    logits_RV: torch.Tensor,
    labels_R: torch.Tensor,
    lse_R: torch.Tensor,
    ce_weight_R: torch.Tensor,
    other: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Overwrites logits [R, V] with the gradient of sum(ce_weight * CE + overlap_weight * overlap); returns them.

    `other` is (other_RV, other_lse_R, below_R, overlap_weight_R), or None for cross-entropy alone.
    """
    if logits_RV.is_cuda:
        from . import head_loss_triton

        return head_loss_triton.gradient_(logits_RV, labels_R, lse_R, ce_weight_R, other)
    q = (logits_RV.float() - lse_R[:, None]).exp()
    grad = ce_weight_R[:, None] * q
    grad.scatter_add_(1, labels_R[:, None], -ce_weight_R[:, None])
    if other is not None:
        other_RV, other_lse_R, below_R, weight_R = other
        smaller = q < (other_RV.float() - other_lse_R[:, None]).exp()
        grad += weight_R[:, None] * q * (smaller.float() - below_R[:, None])
    return logits_RV.copy_(grad)


def top_k(logits_RV: torch.Tensor, k: int, tile: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, int64 ids), [R, k] each, descending: exact, and one pass over the logits where torch.topk makes several.

    The k largest elements lie in the k tiles with the largest maxima: a tile outside has k maxima above all it holds.
    Which of equal logits is taken at the k-th place is not defined, as in torch.topk.
    """
    if logits_RV.shape[1] % tile or logits_RV.shape[1] // tile < 4 * k:
        return logits_RV.topk(k, dim=-1)
    tiles = logits_RV.unflatten(-1, (-1, tile))
    chosen = tiles.amax(-1).topk(k, dim=-1).indices
    near = tiles.gather(1, chosen[..., None].expand(-1, -1, tile)).flatten(1)
    values, at = near.topk(k, dim=-1)
    return values, chosen.gather(1, at // tile) * tile + at % tile
