"""The snapped-copy engine: FP32 masters learn, and the model only ever sees values that FP4 can hold.

After every optimizer step each BF16 expert parameter is rewritten with Q(master). A value of E2M1 times a power of two
is a BF16 number, so the copy is exact: forward, recompute, saving and the packed file all hold the same weights, the
gradient with respect to the copy is the straight-through estimate for the master, and one quantization serves a whole
step however many micro-batches it has.

The trainer knows an engine by `backward`, `gradient_norm`, `step` and `snap`, by `teacher` and `changed_against_ptq`,
and by `state`, `restored` and `whole`. Three fill that in:
    SnappedCopy  here: whole parameters, or the rows of them that FSDP2 leaves on this process
    HookEngine   hook.py: FP32 parameters that the optimizer owns, quantized in the forward pass
    ZeroEngine   zero.py: DeepSpeed's partitions
Every process rewrites only what it holds. Blocks never cross a border between processes, so nothing is exchanged for
that, and the bytes do not depend on how many processes there are.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from mimo_kernels import mxfp4

Span = tuple[torch.Tensor, int]
"""a part of a flattened tensor, and where in it the part begins"""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, without a graph; it shares the tensor's memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_element(tensor: torch.Tensor) -> int:
    """Index, in the flattened tensor, of the first element that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0
    assert tuple(tensor.placements) == (Shard(0),), f"{tensor.placements}: blocks stay whole only if rows do"
    rows_each = -(-len(tensor) // tensor.device_mesh.size())  # FSDP2 deals rows as torch.chunk does
    row = tensor.shape[1:].numel()  # not tensor[0], which would gather all rows
    return min(tensor.device_mesh.get_local_rank() * rows_each, len(tensor)) * row


def adamw(weights: list[torch.Tensor]) -> torch.optim.AdamW:
    """The optimizer of every engine; the learning rate is set at each step."""
    return torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


class SnappedCopy:
    """Masters, originals (the teacher's weights), gradients and optimizer of the parameters that are trained.

    `experts` are BF16 and become Q(masters) at once; blocks run along the last axis, or along axis 1 of those named in
    `transposed`. `others` are trained as well but only rounded to their own type (BF16, or FP32 as many routers are),
    and so are the experts where `rule` is None. Gradients move into the masters' `.grad` as soon as autograd has
    finished with a parameter, so the BF16 gradients of a whole model never exist together. `master_dtype` is for
    experiments: BF16 masters lose most small updates.

    Parameters that FSDP2 has sharded are DTensors; masters, originals and gradients are then those of the local rows.
    FSDP2 sums gradients over the processes in float32 and rounds the sum of a micro-batch to BF16.
    """

    param_dtype = torch.bfloat16

    def __init__(
        self,
        experts: dict[str, nn.Parameter],
        rule: mxfp4.Rule | None = "even",
        *,
        transposed: frozenset[str] = frozenset(),
        others: dict[str, nn.Parameter] | None = None,
        master_dtype: torch.dtype = torch.float32,
    ):
        self.experts, self.rule, self.transposed = experts, rule, transposed
        self.params = experts | (others or {})
        for name, param in self.params.items():
            routers_may = name not in experts and param.dtype == torch.float32
            if param.dtype != self.param_dtype and not routers_may:
                raise ValueError(f"{name} is {param.dtype}; load the model in bfloat16, the masters are float32")
        self.sharded = any(isinstance(p, DTensor) for p in self.params.values())
        """whether a process holds only a part of every parameter"""
        self.originals = {name: local(p).clone() for name, p in self.params.items()}
        self.masters = self._make_masters(master_dtype)
        self.optimizer = adamw(list(self.masters.values()))
        # Weakly: the garbage collector cannot look into hooks, and engine and parameters are a cycle.
        for name, param in self.params.items():
            param.requires_grad_(True)
            if not self.sharded and self.masters[name] is not param:
                param.register_post_accumulate_grad_hook(partial(_move, weakref.ref(self), name))
        self.snap()

    def _make_masters(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: nn.Parameter(local(p).to(dtype, copy=True)) for name, p in self.params.items()}

    def shown(self, name: str) -> torch.Tensor:
        """The BF16 values that the forward pass computes with, as far as this process holds them."""
        return local(self.params[name])

    # ---- a step

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's loss to the masters' gradients."""
        loss.backward()
        if self.sharded:  # FSDP2 reduces as the backward pass goes, and shows the sums when it has ended
            for name, param in self.params.items():
                if param.grad is not None:
                    self._move_gradient(name, param)

    def _move_gradient(self, name: str, param: torch.Tensor) -> None:
        master = self.masters[name]
        assert param.grad is not None
        gradient = local(param.grad)
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient
        param.grad = None

    def gradient_norm(self) -> tuple[float, str | None]:
        """(norm of the gradient of the whole step, name of a weight whose gradient is not finite, if there is one).

        Sums the gradients over the processes first, if that has not happened. Every process gets the same answer.
        """
        for master in self.masters.values():
            if master.grad is None:  # no token of any micro-batch reached this layer's experts
                master.grad = torch.zeros_like(master)
            if not self.sharded and dist.is_initialized():
                dist.all_reduce(master.grad)
        gradients = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        self._norm = torch.nn.utils.get_total_norm(gradients.values())
        if self.sharded:
            self._norm = sum_over_processes(self._norm.square()).sqrt()
        return float(self._norm), self._spoiled(gradients, float(self._norm))

    def _spoiled(self, gradients: dict[str, torch.Tensor], norm: float) -> str | None:
        if norm < float("inf"):
            return None
        bad = torch.stack([~torch.isfinite(g).all() for g in gradients.values()]).int()
        bad = sum_over_processes(bad) if self.sharded else bad
        return next((name for name, is_bad in zip(gradients, bad.tolist(), strict=True) if is_bad), "some weight")

    def step(self, rate: float, max_norm: float) -> None:
        """One AdamW step of the masters with the gradient that `gradient_norm` left, clipped to `max_norm` (0: not)."""
        torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm or float("inf"), self._norm)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _blocks_last(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2) if name in self.transposed else tensor

    @torch.no_grad()
    def snap(self) -> int:
        """Rewrites every parameter from its master; call after each optimizer step.

        Returns how many expert weights changed, on all processes. ValueError names a master that is not finite.
        """
        quantized = [name for name in self.experts if self.rule and self.masters[name].numel()]
        for name in self.params.keys() - quantized:
            self.shown(name).copy_(self.masters[name])
        if not self.rule:
            return 0
        shown = {name: self._blocks_last(name, self.shown(name)) for name in quantized}
        masters = {name: self._blocks_last(name, self.masters[name].data) for name in quantized}
        return self._over_all(mxfp4.snap_each_(shown, masters, self.rule))

    # ---- the teacher and its distance

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside the block the model has its original weights; leave the block before backward."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, param in self.params.items():
            if self.sharded:  # FSDP2 gathers from memory of its own, so the contents have to move
                exchange(local(param), self.originals[name])
            else:
                param.data, self.originals[name] = self.originals[name], param.data

    @torch.no_grad()
    def changed_against_ptq(self) -> float:
        """Fraction of expert weights whose value differs from the round-to-nearest quantization of the original."""
        if not self.rule:
            return 0.0
        changed = torch.zeros((), dtype=torch.int64, device=next(iter(self.originals.values())).device)
        for name in self.experts:
            if self.originals[name].numel():
                rounded = mxfp4.snap(self._blocks_last(name, self.originals[name]), self.rule, name=name)
                changed += (rounded != self._blocks_last(name, self.shown(name))).sum()
        return self._over_all(int(changed)) / self.numel()

    def numel(self) -> int:
        """Number of expert weights, on all processes."""
        return sum(p.numel() for p in self.experts.values())

    def _over_all(self, count: int) -> int:
        device = next(iter(self.masters.values())).device
        return int(sum_over_processes(torch.tensor(count, device=device))) if self.sharded else count

    # ---- what a checkpoint holds

    def state(self) -> dict[str, Span]:
        """Masters and Adam's moments as far as this process holds them; writing into the tensors changes the state."""
        spans = {}
        for name, master in self.masters.items():
            moments = self.optimizer.state[master]
            if not moments:
                moments["step"] = torch.zeros((), device=master.device)
                moments |= {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
            begin = first_element(self.params[name])
            spans[f"master.{name}"] = master.detach().view(-1), begin
            spans |= {f"{key}.{name}": (moments[key].view(-1), begin) for key in ("exp_avg", "exp_avg_sq")}
        return spans

    def restored(self, step: int) -> None:
        """Call after the tensors of `state` got the values that they had after `step` steps."""
        for moments in self.optimizer.state.values():
            moments["step"].fill_(step)
        self.snap()

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the model's state dict, gathered, with the values that the forward pass computes with."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _move(engine: "weakref.ref[SnappedCopy]", name: str, param: torch.Tensor) -> None:
    alive = engine()
    assert alive is not None, "backward through the parameters of an engine that is gone"
    alive._move_gradient(name, param)


def exchange(a: torch.Tensor, b: torch.Tensor) -> None:
    """Swaps the contents of two tensors."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, in place, which every process gets."""
    dist.all_reduce(tensor)
    return tensor
