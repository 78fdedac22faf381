"""RMSNorms of the residual stream, alone and together with the addition before them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mimo_kernels import moe, residual


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over H: `weight` [H]; `fused`: up to 16 rows are added to and normed by `mimo_kernels.residual`."""

    weight: torch.Tensor
    eps: float
    fused: bool = False

    def fuses(self, x: torch.Tensor) -> bool:
        """Whether the rows x [T, H] are the kernel's work."""
        return self.fused and len(x) <= residual.MAX_ROWS


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension in float32, casts to x's dtype, then multiplies by the weight."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def add_norm(x: torch.Tensor, update: torch.Tensor | None, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + update, its norm), each [T, H], of the residual stream x and what a sublayer adds to it: [T, H], parts as
    `moe.parts` leaves them, or None for nothing."""
    if norm.fuses(x):
        return residual.add_rms_norm(x, update, norm.weight, norm.eps)
    if update is not None:
        x = x + moe.combine(update)
    return x, rms_norm(x, norm.weight, norm.eps)
