"""Forward KL (and cross-entropy) over the full vocabulary, without the logits of more than one chunk."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

IGNORED = -100


def chunk_rows(head_VD: torch.Tensor) -> int:
    """Tokens whose float32 logits are in memory at once: 256 MiB of them on a GPU, 256 tokens on a CPU."""
    return max(64, 2**26 // len(head_VD)) if head_VD.is_cuda else 256


def _chunk(
    student_RV: torch.Tensor, teacher_RV: torch.Tensor | None, labels_R: torch.Tensor | None, kl: float, ce: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of KL, sum of CE, gradient [R, V] of kl * KL + ce * CE) of a chunk's logits; sums in float32."""
    log_q = student_RV.float().log_softmax(-1)
    q = log_q.exp()
    grad, kl_sum, ce_sum = torch.zeros_like(q), q.new_zeros(()), q.new_zeros(())
    if teacher_RV is not None:
        log_p = teacher_RV.float().log_softmax(-1)
        p = log_p.exp()
        kl_sum = (p * (log_p - log_q)).sum()
        grad = kl * (q - p)  # d KL / d logits = q - p
    if ce:
        assert labels_R is not None
        known, label = labels_R != IGNORED, labels_R.clamp(min=0)
        ce_sum = -(log_q.gather(1, label[:, None])[:, 0] * known).sum()
        is_label = torch.arange(q.shape[1], device=q.device) == label[:, None]
        grad = grad + (ce * known)[:, None] * (q - is_label.float())
    return kl_sum, ce_sum, grad.to(student_RV.dtype)


@functools.cache
def _compiled_chunk() -> Callable:
    return torch.compile(_chunk)  # two passes over the logits, where the operations one by one make twenty


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient chunk by chunk during the forward pass; the head is frozen and needs none."""

    @staticmethod
    def forward(ctx, student_TD, teacher_TD, labels_T, head_VD, kl_weight, ce_weight):
        kl, ce = torch.zeros(2, device=student_TD.device).unbind()
        grad_TD = torch.empty_like(student_TD) if student_TD.requires_grad else None
        chunk, terms = chunk_rows(head_VD), _compiled_chunk() if head_VD.is_cuda else _chunk
        for start in range(0, len(student_TD), chunk):
            rows = slice(start, start + chunk)
            teacher_RV = None if teacher_TD is None else F.linear(teacher_TD[rows], head_VD)
            labels_R = None if labels_T is None else labels_T[rows]
            student_RV = F.linear(student_TD[rows], head_VD)
            kl_sum, ce_sum, grad_RV = terms(student_RV, teacher_RV, labels_R, kl_weight, ce_weight)
            kl += kl_sum
            ce += ce_sum
            if grad_TD is not None:
                grad_TD[rows] = grad_RV @ head_VD
        ctx.save_for_backward(grad_TD)
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, grad, *_):
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grad.to(grad_TD.dtype), None, None, None, None, None


def chunked_loss(
    student_TD: torch.Tensor,
    teacher_TD: torch.Tensor | None,
    labels_T: torch.Tensor | None,
    head_VD: torch.Tensor,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kl_weight * KL + ce_weight * CE, KL, CE), each a sum over tokens in nats.

    `student_TD` and `teacher_TD` [tokens, hidden] are final hidden states after the norm, `head_VD` [vocabulary,
    hidden] the frozen language-model head both share, `labels_T` [tokens] next tokens or -100. KL is KL(teacher ||
    student) at temperature 1, 0 without a teacher; CE is 0 with ce_weight 0. Logits are made in the head's dtype and
    everything after them in float32. The gradient reaches `student_TD` only.
    """
    return _ChunkedLoss.apply(student_TD, teacher_TD, labels_T, head_VD, kl_weight, ce_weight)


def forward_kl(student_TD: torch.Tensor, teacher_TD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of KL(teacher || student) in nats; see `chunked_loss`."""
    return chunked_loss(student_TD, teacher_TD, None, head_VD)[0]


def hidden_loss(student_TD: torch.Tensor, teacher_TD: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of ||student - teacher||^2 / ||teacher||^2, in float32."""
    difference = (student_TD.float() - teacher_TD.float()).square().sum(-1)
    return (difference / teacher_TD.float().square().sum(-1)).sum()


def next_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels [rows, length] of a packed batch: the next token of the same document, -100 where it is not supervised."""
    ids, documents = batch["input_ids"], batch["doc_ids"]
    labels = torch.full_like(ids, IGNORED)
    known = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0) & (batch["loss_mask"][:, 1:] > 0)
    labels[:, :-1] = torch.where(known, ids[:, 1:], IGNORED)
    return labels


@torch.no_grad()
def agreement(student_TD: torch.Tensor, teacher_TD: torch.Tensor, head_VD: torch.Tensor) -> int:
    """Number of tokens for which teacher and student have the same most likely next token."""
    same = torch.zeros((), dtype=torch.int64, device=head_VD.device)
    for rows in torch.arange(len(student_TD), device=head_VD.device).split(chunk_rows(head_VD)):
        top = F.linear(student_TD[rows], head_VD).argmax(-1) == F.linear(teacher_TD[rows], head_VD).argmax(-1)
        same += top.sum()
    return int(same)
