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
    """Masters, originals (the teacher's experts) and gradients of the parameters that are trained.

    `params` are BF16 and become Q(masters) at once. Gradients move into the masters' FP32 `.grad` as soon as autograd
    has finished with a parameter, so the BF16 gradients of a whole model never exist together.
    """

    def __init__(self, params: dict[str, nn.Parameter], rule: mxfp4.Rule = "even"):
        for name, param in params.items():
            if param.dtype != torch.bfloat16:
                raise ValueError(f"{name} is {param.dtype}; load the model in bfloat16, the masters are float32")
        self.params = params
        self.rule = rule
        self.originals = {name: p.detach().clone() for name, p in params.items()}
        self.masters = {name: nn.Parameter(p.detach().float()) for name, p in params.items()}
        for name, param in params.items():
            param.requires_grad_(True)
            param.register_post_accumulate_grad_hook(lambda p, name=name: self._move_gradient(name, p))
        self.snap()

    def _move_gradient(self, name: str, param: torch.Tensor) -> None:
        master = self.masters[name]
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad += param.grad
        param.grad = None

    @torch.no_grad()
    def snap(self) -> int:
        """Rewrites every parameter with Q(master); call after each optimizer step. Returns the changed elements."""
        return sum(mxfp4.snap_(p.data, self.masters[n].data, self.rule, name=n) for n, p in self.params.items())

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside the block the model has its original experts. Nothing is copied; leave the block before backward."""
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
        changed = sum(int((mxfp4.snap(self.originals[n], self.rule) != p).sum()) for n, p in self.params.items())
        return changed / self.numel()

    def numel(self) -> int:
        """Number of trained weights."""
        return sum(p.numel() for p in self.params.values())

    @torch.no_grad()
    def load_masters(self, masters: dict[str, torch.Tensor]) -> None:
        """Continues from saved masters [same names, same shapes] and snaps the parameters."""
        if masters.keys() != self.masters.keys():
            odd = sorted(masters.keys() ^ self.masters.keys())[0]
            raise ValueError(f"master weights do not match the model at {odd}; they belong to another model")
        for name, value in masters.items():
            self.masters[name].copy_(value)
        self.snap()
