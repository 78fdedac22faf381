"""The snapped-copy engine: FP32 masters learn, and the model only ever sees values that FP4 can hold.

After every optimizer step each BF16 expert parameter is rewritten with Q(master). A value of E2M1 times a power of two
is a BF16 number, so the copy is exact: forward, recompute, saving and the packed file all hold the same weights, the
gradient with respect to the copy is the straight-through estimate for the master, and one quantization serves a whole
step however many micro-batches it has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mimo_kernels import mxfp4


class SnappedCopy:
    """Masters, originals (the teacher's weights) and gradients of the parameters that are trained.

    `experts` are BF16 and become Q(masters) at once; blocks run along the last axis, or along axis 1 of those named in
    `transposed`. `others` are trained as well but only rounded to BF16, and so are the experts where `rule` is None.
    Gradients move into the masters' `.grad` as soon as autograd has finished with a parameter, so the BF16 gradients
    of a whole model never exist together. `master_dtype` is for experiments: BF16 masters lose most small updates.
    """

    def __init__(
        self,
        experts: dict[str, nn.Parameter],
        rule: mxfp4.Rule | None = "even",
        *,
        transposed: frozenset[str] = frozenset(),
        others: dict[str, nn.Parameter] | None = None,
        master_dtype: torch.dtype = torch.float32,
    ):
        self.params = experts | (others or {})
        for name, param in self.params.items():
            if param.dtype != torch.bfloat16:
                raise ValueError(f"{name} is {param.dtype}; load the model in bfloat16, the masters are float32")
        self.experts, self.rule, self.transposed = experts, rule, transposed
        self.originals = {name: p.detach().clone() for name, p in self.params.items()}
        self.masters = {name: nn.Parameter(p.detach().to(master_dtype, copy=True)) for name, p in self.params.items()}
        for name, param in self.params.items():
            param.requires_grad_(True)
            param.register_post_accumulate_grad_hook(lambda p, name=name: self._move_gradient(name, p))
        self.snap()

    def _move_gradient(self, name: str, param: torch.Tensor) -> None:
        master = self.masters[name]
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.to(master.dtype)
        else:
            master.grad += param.grad
        param.grad = None

    def _blocks_last(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2) if name in self.transposed else tensor

    @torch.no_grad()
    def snap(self) -> int:
        """Rewrites every parameter from its master; call after each optimizer step.

        Returns how many expert weights changed. ValueError names a master that is not finite.
        """
        quantized = self.experts if self.rule else {}
        for name, param in self.params.items():
            if name not in quantized:
                param.data.copy_(self.masters[name].data)
        if not self.rule:
            return 0
        shown = {name: self._blocks_last(name, p.data) for name, p in quantized.items()}
        return mxfp4.snap_each_(shown, {n: self._blocks_last(n, self.masters[n].data) for n in quantized}, self.rule)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside the block the model has its original weights. Nothing is copied; leave the block before backward."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, param in self.params.items():
            param.data, self.originals[name] = self.originals[name], param.data

    @torch.no_grad()
    def changed_against_ptq(self) -> float:
        """Fraction of expert weights whose value differs from the round-to-nearest quantization of the original."""
        if not self.rule:
            return 0.0
        changed = torch.zeros((), dtype=torch.int64, device=next(iter(self.experts.values())).device)
        for name, param in self.experts.items():
            rounded = mxfp4.snap(self._blocks_last(name, self.originals[name]), self.rule, name=name)
            changed += (rounded != self._blocks_last(name, param)).sum()
        return int(changed) / self.numel()

    def numel(self) -> int:
        """Number of expert weights."""
        return sum(p.numel() for p in self.experts.values())

    @torch.no_grad()
    def load_masters(self, masters: dict[str, torch.Tensor]) -> None:
        """Continues from saved masters [same names, same shapes] and snaps the parameters."""
        if masters.keys() != self.masters.keys():
            odd = sorted(masters.keys() ^ self.masters.keys())[0]
            raise ValueError(f"master weights do not match the model at {odd}; they belong to another model")
        for name, value in masters.items():
            self.masters[name].copy_(value)
        self.snap()
