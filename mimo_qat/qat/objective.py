"""Forward KL between teacher and student over the full vocabulary, without the logits of more than one chunk."""

import torch
import torch.nn.functional as F


class _ChunkedKL(torch.autograd.Function):
    """Computes the gradient chunk by chunk during the forward pass; the head is frozen and needs none."""

    @staticmethod
    def forward(ctx, student_TD, teacher_TD, head_VD, chunk):
        total = torch.zeros((), device=student_TD.device)
        grad_TD = torch.empty_like(student_TD) if student_TD.requires_grad else None
        for start in range(0, len(student_TD), chunk):
            rows = slice(start, start + chunk)
            log_q = F.linear(student_TD[rows], head_VD).float().log_softmax(-1)
            log_p = F.linear(teacher_TD[rows], head_VD).float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            if grad_TD is not None:
                grad_TD[rows] = (log_q.exp_() - p).to(head_VD.dtype) @ head_VD  # d KL / d logits = q - p
        ctx.save_for_backward(grad_TD)
        return total

    @staticmethod
    def backward(ctx, grad):
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grad.to(grad_TD.dtype), None, None, None


def forward_kl(student_TD: torch.Tensor, teacher_TD: torch.Tensor, head_VD: torch.Tensor, chunk: int = 256):
    """Sum over tokens of KL(teacher || student) in nats, temperature 1.

    `student_TD` and `teacher_TD` [tokens, hidden] are final hidden states after the norm, `head_VD` [vocabulary,
    hidden] the frozen language-model head both share. Logits are made in the head's dtype, `chunk` tokens at a time,
    and everything after them in float32. The gradient reaches `student_TD` only.
    """
    return _ChunkedKL.apply(student_TD, teacher_TD, head_VD, chunk)


@torch.no_grad()
def agreement(student_TD: torch.Tensor, teacher_TD: torch.Tensor, head_VD: torch.Tensor, chunk: int = 256) -> int:
    """Number of tokens for which teacher and student have the same most likely next token."""
    same = 0
    for start in range(0, len(student_TD), chunk):
        rows = slice(start, start + chunk)
        top = F.linear(student_TD[rows], head_VD).argmax(-1) == F.linear(teacher_TD[rows], head_VD).argmax(-1)
        same += int(top.sum())
    return same
