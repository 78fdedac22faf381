"""Forward KL (and cross-entropy) over the full vocabulary, without the logits of more than one chunk."""

import torch
import torch.nn.functional as F

from mimo_kernels import head_loss

IGNORED = -100


def chunk_rows(head_VD: torch.Tensor) -> int:
    """Tokens whose logits are in memory at once: 2^26 logits on a GPU, 128 MiB in bfloat16; 256 tokens on a CPU."""
    return max(64, 2**26 // len(head_VD)) if head_VD.is_cuda else 256


def _chunk(
    logits_RV: torch.Tensor,
    teacher_RV: torch.Tensor | None,
    labels_R: torch.Tensor | None,
    weights: tuple[float, float],
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of KL, sum of CE); overwrites the student's logits with the gradient of the weighted sum if asked to."""
    kl, ce = torch.zeros(2, device=logits_RV.device).unbind()
    label_R = torch.zeros(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    ce_weight_R = torch.zeros(len(logits_RV), device=logits_RV.device)
    if teacher_RV is not None:
        kl_R, lse_R, teacher_lse_R = head_loss.divergence(logits_RV, teacher_RV)
        kl = kl_R.sum()
    if labels_R is not None:
        label_R, known_R = labels_R.clamp(min=0), (labels_R != IGNORED).float()
        lse_R, picked_R, _ = head_loss.row_statistics(logits_RV, label_R)
        ce, ce_weight_R = ((lse_R - picked_R) * known_R).sum(), weights[1] * known_R
    if with_gradient and teacher_RV is not None:
        teacher = teacher_RV, teacher_lse_R, weights[0]
        head_loss.divergence_gradient_(logits_RV, label_R, lse_R, ce_weight_R, teacher)
    elif with_gradient:
        head_loss.gradient_(logits_RV, label_R, lse_R, ce_weight_R)
    return kl, ce


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient chunk by chunk during the forward pass; the head is frozen and needs none."""

    @staticmethod
    def forward(ctx, student_TD, teacher_TD, labels_T, head_VD, kl_weight, ce_weight):
        kl, ce = torch.zeros(2, device=student_TD.device).unbind()
        grad_TD = torch.empty_like(student_TD) if student_TD.requires_grad else None
        chunk = chunk_rows(head_VD)
        for start in range(0, len(student_TD), chunk):
            rows = slice(start, start + chunk)
            logits_RV = F.linear(student_TD[rows], head_VD)
            teacher_RV = None if teacher_TD is None else F.linear(teacher_TD[rows], head_VD)
            labels_R = None if labels_T is None else labels_T[rows]
            sums = _chunk(logits_RV, teacher_RV, labels_R, (kl_weight, ce_weight), grad_TD is not None)
            kl += sums[0]
            ce += sums[1]
            if grad_TD is not None:
                grad_TD[rows] = logits_RV @ head_VD
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
    student) at temperature 1, 0 without a teacher; CE is 0 without labels. Logits are made in the head's dtype and
    everything after them in float32. The gradient reaches `student_TD` only.
    """
    if teacher_TD is None and labels_T is None:
        nothing = torch.zeros((), device=student_TD.device)
        return nothing, nothing, nothing
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
