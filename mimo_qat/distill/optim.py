"""Optimizer of the drafter: float32 masters behind compute weights, AdamW or Muon, and the learning-rate schedules.

The model computes with weights of its own dtype (bfloat16 as a rule, which is also what the file will hold); the
optimizer moves float32 masters and every step writes them back, rounded. So small updates are not lost to rounding,
and the last training forward used the released weights. An exponential moving average of the masters, where wanted, is
what is evaluated and released instead. A step never waits for the device.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["wsd", "cosine", "constant"]


def learning_rate_factor(
    schedule: Schedule, step: int, max_steps: int, warmup_ratio: float, decay_ratio: float, floor: float
) -> float:
    """Multiplier of the peak learning rate in step 0..max_steps-1, a function of the step alone.

    Linear warm-up over warmup_ratio; then "cosine" to `floor`, "wsd" (warm-up, stable, decay: flat, then linear to
    `floor` over the last decay_ratio) or "constant".
    """
    warmup = round(warmup_ratio * max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = (step - warmup) / max(1, max_steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        decay = max(1, round(decay_ratio * max_steps))
        remaining = (max_steps - step) / decay
        return floor + (1 - floor) * min(1.0, remaining)
    raise ValueError(f'schedule {schedule!r} is unknown; use "wsd", "cosine" or "constant"')


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon may orthogonalise it: the hidden matrices, and not norms, sinks, the mask vector, convolution taps,
    nor a selector's codebooks, which are embeddings."""
    return parameter.dim() == 2 and not name.endswith("_codebook")


class MasterOptimizer:
    """Owns the float32 masters of a model and steps them with AdamW, or with Muon for matrices and AdamW for the rest.

    accumulate() adds the model's gradients to the masters' and clears them; step() divides by the denominator, clips,
    steps and writes the masters back. Gradients are sums until step(), so micro-batches weigh what they should.
    `ema_decay` 0 keeps no average; within averaged() the model has the averaged weights.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Optimizer = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        ema_decay: float = 0.0,
    ):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}; it must be in [0, 1)")
        self.ema_decay, self.steps = ema_decay, 0
        self.averages = {n: m.clone() for n, m in self.masters.items()} if ema_decay else {}
        self._grads = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        for name, master in self.masters.items():
            master.grad = self._grads[name]
        if kind not in ("adamw", "muon"):
            raise ValueError(f'optimizer {kind!r} is unknown; use "adamw" or "muon"')
        matrices = [m for n, m in self.masters.items() if kind == "muon" and is_matrix(n, m)]
        chosen = {id(m) for m in matrices}
        rest = [m for m in self.masters.values() if id(m) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, betas=betas, weight_decay=weight_decay, foreach=True)
        ]
        if matrices:
            # match_rms_adamw scales the orthogonal update to AdamW's size, so one learning rate serves both.
            self.optimizers.append(
                torch.optim.Muon(matrices, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    @torch.no_grad()
    def accumulate(self) -> None:
        """Moves the gradients of the model into the masters' float32 sums."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._grads[name].add_(parameter.grad)
                parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """The float32 gradient sums, in a fixed order, for a reduction over ranks."""
        return list(self._grads.values())

    @torch.no_grad()
    def step(self, lr: float, denominator: torch.Tensor, max_grad_norm: float | None = None) -> torch.Tensor:
        """One update with gradients divided by `denominator` (a scalar); returns their norm before clipping.

        `max_grad_norm` 0 does not clip, as None.
        """
        grads = self.gradients()
        torch._foreach_div_(grads, denominator.float().clamp(min=1e-12))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if max_grad_norm:
            torch._foreach_mul_(grads, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        torch._foreach_zero_(grads)
        self.steps += 1
        if self.averages:
            # Until the average has seen 1 / (1 - decay) steps it would hold mostly the initial weights.
            decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(list(self.averages.values()), list(self.masters.values()), 1 - decay)
        self._write(self.masters)
        return norm

    def _write(self, values: dict[str, torch.Tensor]) -> None:
        torch._foreach_copy_(list(self.parameters.values()), [values[n] for n in self.parameters])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights inside; without `ema_decay` nothing changes."""
        with torch.no_grad():
            self._write(self.averages or self.masters)
        try:
            yield
        finally:
            with torch.no_grad():
                self._write(self.masters)

    def state_dict(self) -> dict:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"steps": self.steps, "masters": self.masters, "averages": self.averages, "optimizers": states}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        if state["masters"].keys() != self.masters.keys():
            odd = sorted(state["masters"].keys() ^ self.masters.keys())[0]
            raise ValueError(f"the checkpoint and the drafter disagree on {odd}; resume with the same configuration")
        assert state["averages"].keys() == self.averages.keys(), "ema_decay is part of the configuration"
        self.steps = state["steps"]
        for kept, saved in ((self.masters, state["masters"]), (self.averages, state["averages"])):
            for name, value in kept.items():
                value.copy_(saved[name])
        self._write(self.masters)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
