"""The hook engine: the optimizer owns FP32 parameters, and the forward pass sees Q(parameter) in BF16.

Why beside the snapped copy: the parameter that a framework shards, saves and reduces is the master itself, and FSDP2
then sums gradients in float32 from end to end. What it costs: every gather moves 4 bytes a weight instead of 2, each
forward pass and each recompute quantizes again, and autograd keeps the BF16 copies until the backward pass unless
`gradient_checkpointing` is on. With equal masters both engines compute the same bits.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mimo_kernels import mxfp4
from mimo_qat.models.experts import PROJECTIONS, contraction_dim, experts_modules
from mimo_qat.qat.snap import SnappedCopy, local


class _StraightThrough(torch.autograd.Function):
    """Q(w) in BF16; the gradient passes unchanged, in float32."""

    @staticmethod
    def forward(ctx, w, rule, transposed):
        if not transposed:
            return mxfp4.snap(w, rule)
        return mxfp4.snap(w.transpose(1, 2), rule).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.float(), None, None


class HookEngine(SnappedCopy):
    """`SnappedCopy` for FP32 experts that are their own masters; other parameters are not trained.

    While an experts module runs, its instance dictionary shadows the parameters with their quantized values; the names
    in the state dict do not change. `_snapped` holds the BF16 values of the local rows, to count what a step changed.
    """

    param_dtype = torch.float32

    def __init__(
        self,
        model: nn.Module,
        experts: dict[str, nn.Parameter],
        rule: mxfp4.Rule | None = "even",
        *,
        transposed: frozenset[str] = frozenset(),
    ):
        self._snapped = {name: local(p).bfloat16() for name, p in experts.items()}
        self._teaching = False
        super().__init__(experts, rule, transposed=transposed)
        for module in experts_modules(model).values():
            module.register_forward_pre_hook(self._show_quantized)
            module.register_forward_hook(_show_parameters, always_call=True)

    def _make_masters(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # Of a sharded parameter the optimizer gets the local rows, which share its memory.
        return {n: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for n, p in self.params.items()}

    def shown(self, name: str) -> torch.Tensor:
        return self._snapped[name]

    def _show_quantized(self, module: nn.Module, args: Any) -> None:
        for which in PROJECTIONS:
            weight = getattr(module, which)
            if self._teaching or not self.rule:
                module.__dict__[which] = weight.bfloat16()
            else:
                module.__dict__[which] = _StraightThrough.apply(weight, self.rule, contraction_dim(module) == 1)

    def _swap(self) -> None:
        super()._swap()
        self._teaching = not self._teaching

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = super().whole(name, tensor)
        if name not in self.experts:
            return tensor
        if not self.rule:
            return tensor.bfloat16()
        snapped = mxfp4.snap(self._blocks_last(name, tensor), self.rule, name=name)
        return self._blocks_last(name, snapped).contiguous()


def _show_parameters(module: nn.Module, args: Any, output: Any) -> None:
    for which in PROJECTIONS:
        module.__dict__.pop(which, None)
