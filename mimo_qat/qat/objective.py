"""Forward KL (and cross-entropy) over the full vocabulary, without the logits of more than one chunk."""

import torch
import torch.nn.functional as F

IGNORED = -100


def chunk_rows(head_VD: torch.Tensor) -> int:
    """Tokens whose float32 logits are in memory at once: 256 MiB of them on a GPU, 256 tokens on a CPU."""
    return max(64, 2**26 // len(head_VD)) if head_VD.is_cuda else 256


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient chunk by chunk during the forward pass; the head is frozen and needs none."""

    @staticmethod
    def forward(ctx, student_TD, teacher_TD, labels_T, head_VD, kl_weight, ce_weight):
        kl, ce = torch.zeros(2, device=student_TD.device).unbind()
        grad_TD = torch.empty_like(student_TD) if student_TD.requires_grad else None
        chunk = chunk_rows(head_VD)
        for start in range(0, len(student_TD), chunk):
            rows = slice(start, start + chunk)
            log_q = F.linear(student_TD[rows], head_VD).float().log_softmax(-1)
            grad = torch.zeros_like(log_q)
            if teacher_TD is not None:
                log_p = F.linear(teacher_TD[rows], head_VD).float().log_softmax(-1)
                p = log_p.exp()
                kl += (p * (log_p - log_q)).sum()
                grad += kl_weight * (log_q.exp() - p)  # d KL / d logits = q - p
            if ce_weight:
                labels, known = labels_T[rows].clamp(min=0)[:, None], (labels_T[rows] != IGNORED)[:, None]
                ce -= (log_q.gather(1, labels) * known).sum()
                grad += log_q.exp() * (ce_weight * known)
                grad.scatter_add_(1, labels, -ce_weight * known.float())
            if grad_TD is not None:
                grad_TD[rows] = grad.to(head_VD.dtype) @ head_VD
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
