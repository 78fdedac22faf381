"""Routed experts on a GPU in as few passes over memory as training allows.

transformers' `grouped_mm` spends more time around its products than in them: rows beyond the routed ones are masked
four times a pass, gathers are undone by atomic additions, and every gate, weight and cast is a kernel of its own (one
H100, 65,536 routed rows of 576: 77 ms of products in a step of 584 ms). Here rows are sorted by expert once, each
direction of dispatch and combination is one kernel that reads what it needs through the permutation, and nothing is
added atomically, so the same input gives the same bits.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

NAME = "sorted_mm"


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def _fused(function: Callable, x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
    """One generated kernel on a GPU; the same operations one by one on a CPU, where compiling takes longer."""
    return (_compiled(function) if x.is_cuda else function)(x, *arguments)


def _gathered_sum(rows_PD: torch.Tensor, place_Tk: torch.Tensor) -> torch.Tensor:
    """Sum over k of rows [P, D] at `place` [T, k], in float32, in rows' dtype."""
    return rows_PD[place_Tk].float().sum(1).to(rows_PD.dtype)


def _weighted_sum(rows_PD: torch.Tensor, place_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
    return (rows_PD[place_Tk].float() * weights_Tk.float()[..., None]).sum(1).to(rows_PD.dtype)


def _spread(grad_TD: torch.Tensor, order_P: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
    """Gradient of the rows [P, D]: their token's, times their weight."""
    k = weights_Tk.shape[1]
    return (grad_TD[order_P // k].float() * weights_Tk.flatten()[order_P].float()[:, None]).to(grad_TD.dtype)


def _dots(grad_TD: torch.Tensor, rows_PD: torch.Tensor, place_Tk: torch.Tensor) -> torch.Tensor:
    """Gradient of the weights [T, k] in float32: products of a token's gradient with its rows."""
    return (grad_TD[:, None].float() * rows_PD[place_Tk].float()).sum(-1)


class _Dispatch(torch.autograd.Function):
    """Tokens [T, D] to rows [T*k, D] sorted by expert."""

    @staticmethod
    def forward(ctx, x_TD, order_P, place_Tk):
        ctx.save_for_backward(place_Tk)
        return x_TD.index_select(0, order_P // place_Tk.shape[1])

    @staticmethod
    def backward(ctx, grad_PD):
        (place_Tk,) = ctx.saved_tensors
        return _fused(_gathered_sum, grad_PD, place_Tk), None, None


class _Combine(torch.autograd.Function):
    """Rows [T*k, D] back to tokens [T, D], weighted; sums in float32."""

    @staticmethod
    def forward(ctx, rows_PD, weights_Tk, order_P, place_Tk):
        ctx.save_for_backward(rows_PD, weights_Tk, order_P, place_Tk)
        return _fused(_weighted_sum, rows_PD, place_Tk, weights_Tk)

    @staticmethod
    def backward(ctx, grad_TD):
        rows_PD, weights_Tk, order_P, place_Tk = ctx.saved_tensors
        rows = _fused(_spread, grad_TD, order_P, weights_Tk) if ctx.needs_input_grad[0] else None
        weights = None
        if ctx.needs_input_grad[1]:
            weights = _fused(_dots, grad_TD, rows_PD, place_Tk).to(weights_Tk.dtype)
        return rows, weights, None, None


def sorted_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation of transformers: [T, D], [T, k], [T, k] -> [T, D].

    `self` holds `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I] without biases, see `suits`.
    """
    chosen_P, order_P = top_k_index.flatten().to(torch.int16).sort(stable=True)
    place_Tk = torch.empty_like(order_P)
    place_Tk[order_P] = torch.arange(len(order_P), device=order_P.device)
    place_Tk = place_Tk.view_as(top_k_index)
    after = torch.arange(1, self.num_experts + 1, device=chosen_P.device, dtype=torch.int16)
    ends_E = torch.searchsorted(chosen_P, after, out_int32=True)
    rows = _Dispatch.apply(hidden_states, order_P, place_Tk)
    both = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends_E)
    gate = type(self)._apply_gate  # unbound: the compiled function must not keep the model alive
    inner = (_compiled(gate) if both.is_cuda else gate)(self, both)
    rows = F.grouped_mm(inner, self.down_proj.transpose(1, 2), offs=ends_E)
    return _Combine.apply(rows, top_k_weights, order_P, place_Tk)


def suits(experts: nn.Module) -> bool:
    """Whether `sorted_mm` computes what this experts module means: gated, [E, out, in], nothing besides."""
    others = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    return getattr(experts, "has_gate", False) and not any(getattr(experts, name, False) for name in others)
