"""Triton kernels of `head_loss`, which calls them for CUDA tensors: one pass over the logits each.

A program owns a row and walks it in tiles. Every lane keeps its own running maximum and rescaled sum, so the loop has
no reduction across lanes; they meet once, at the end of the row. Sums are float32 in a fixed order.

_L = one value a lane of a tile.
"""

import torch
import triton
import triton.language as tl

_TILE = 2048
_WARPS = 8
# Below every finite logit, and finite: lanes past the end of a row then need no special case (exp gives 0, not NaN).
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _statistics(logits, labels, lse, picked, best, V, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    lane_L = tl.arange(0, TILE)
    top_L = tl.full((TILE,), _LOWEST, tl.float32)
    sum_L = tl.zeros((TILE,), tl.float32)
    where_L = tl.zeros((TILE,), tl.int32)
    for start in range(0, V, TILE):
        index_L = start + lane_L
        x_L = tl.load(logits + index_L, mask=index_L < V, other=_LOWEST).to(tl.float32)
        new_L = tl.maximum(top_L, x_L)
        sum_L = sum_L * tl.exp(top_L - new_L) + tl.exp(x_L - new_L)
        where_L = tl.where(x_L > top_L, index_L, where_L)  # strictly: the first of equals stays
        top_L = new_L
    top = tl.max(top_L, 0)
    total = tl.sum(sum_L * tl.exp(top_L - top), 0)
    tl.store(lse + row, top + tl.log(total))
    tl.store(best + row, tl.min(tl.where(top_L == top, where_L, V), 0).to(tl.int64))
    tl.store(picked + row, tl.load(logits + tl.load(labels + row)).to(tl.float32))


@triton.jit
def _overlap(logits, other, lse, other_lse, both, below, V, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    other += row * V
    q_lse, p_lse = tl.load(lse + row), tl.load(other_lse + row)
    lane_L = tl.arange(0, TILE)
    both_L = tl.zeros((TILE,), tl.float32)
    below_L = tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        index_L = start + lane_L
        q_L = tl.exp(tl.load(logits + index_L, mask=index_L < V, other=_LOWEST).to(tl.float32) - q_lse)
        p_L = tl.exp(tl.load(other + index_L, mask=index_L < V, other=_LOWEST).to(tl.float32) - p_lse)
        both_L += tl.minimum(p_L, q_L)
        below_L += tl.where(q_L < p_L, q_L, 0.0)
    tl.store(both + row, tl.sum(both_L, 0))
    tl.store(below + row, tl.sum(below_L, 0))


@triton.jit
def _divergence(logits, other, kl, lse, other_lse, V, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    other += row * V
    lane_L = tl.arange(0, TILE)
    q_top_L = tl.full((TILE,), _LOWEST, tl.float32)
    p_top_L = tl.full((TILE,), _LOWEST, tl.float32)
    q_sum_L = tl.zeros((TILE,), tl.float32)
    p_sum_L = tl.zeros((TILE,), tl.float32)
    dot_L = tl.zeros((TILE,), tl.float32)  # of p, unnormalised, and the difference of the logits
    for start in range(0, V, TILE):
        index_L = start + lane_L
        x_L = tl.load(logits + index_L, mask=index_L < V, other=_LOWEST).to(tl.float32)
        y_L = tl.load(other + index_L, mask=index_L < V, other=_LOWEST).to(tl.float32)
        q_new_L = tl.maximum(q_top_L, x_L)
        q_sum_L = q_sum_L * tl.exp(q_top_L - q_new_L) + tl.exp(x_L - q_new_L)
        p_new_L = tl.maximum(p_top_L, y_L)
        rescale_L, e_L = tl.exp(p_top_L - p_new_L), tl.exp(y_L - p_new_L)
        p_sum_L = p_sum_L * rescale_L + e_L
        dot_L = dot_L * rescale_L + tl.where(e_L > 0, e_L * (y_L - x_L), 0.0)
        q_top_L, p_top_L = q_new_L, p_new_L
    q_top, p_top = tl.max(q_top_L, 0), tl.max(p_top_L, 0)
    scale_L = tl.exp(p_top_L - p_top)
    q_sum = tl.sum(q_sum_L * tl.exp(q_top_L - q_top), 0)
    p_sum = tl.sum(p_sum_L * scale_L, 0)
    # Maxima and sums apart: the difference of two log-sum-exps near 20 would be off by more than a small KL can bear.
    apart = (p_top - q_top) + tl.log(p_sum / q_sum)
    tl.store(kl + row, tl.sum(dot_L * scale_L, 0) / p_sum - apart)
    tl.store(lse + row, q_top + tl.log(q_sum))
    tl.store(other_lse + row, p_top + tl.log(p_sum))


@triton.jit
def _divergence_gradient(logits, labels, lse, ce_weight, other, other_lse, kl_weight, V, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index_L = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside_L = index_L < V
    weight, label = tl.load(ce_weight + row), tl.load(labels + row)
    at_L = logits + row * V + index_L
    q_L = tl.exp(tl.load(at_L, mask=inside_L, other=_LOWEST).to(tl.float32) - tl.load(lse + row))
    p_L = tl.load(other + row * V + index_L, mask=inside_L, other=_LOWEST).to(tl.float32)
    p_L = tl.exp(p_L - tl.load(other_lse + row))
    grad_L = kl_weight * (q_L - p_L) + weight * (q_L - (index_L == label).to(tl.float32))
    tl.store(at_L, grad_L.to(logits.dtype.element_ty), mask=inside_L)


@triton.jit
def _gradient(
    logits, labels, lse, ce_weight, other, other_lse, below, overlap_weight, V, HAS_OTHER: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index_L = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside_L = index_L < V
    weight, label = tl.load(ce_weight + row), tl.load(labels + row)
    at_L = logits + row * V + index_L
    q_L = tl.exp(tl.load(at_L, mask=inside_L, other=_LOWEST).to(tl.float32) - tl.load(lse + row))
    grad_L = weight * (q_L - (index_L == label).to(tl.float32))
    if HAS_OTHER:
        p_L = tl.load(other + row * V + index_L, mask=inside_L, other=_LOWEST).to(tl.float32)
        p_L = tl.exp(p_L - tl.load(other_lse + row))
        smaller_L = (q_L < p_L).to(tl.float32)
        grad_L += tl.load(overlap_weight + row) * q_L * (smaller_L - tl.load(below + row))
    tl.store(at_L, grad_L.to(logits.dtype.element_ty), mask=inside_L)


def _rows(logits_RV: torch.Tensor) -> tuple[int, int]:
    assert logits_RV.dim() == 2 and logits_RV.is_contiguous(), "the kernels walk contiguous rows"
    return logits_RV.shape[0], logits_RV.shape[1]


def row_statistics(logits_RV: torch.Tensor, labels_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, size = _rows(logits_RV)
    lse, picked = torch.empty(2, rows, dtype=torch.float32, device=logits_RV.device).unbind()
    best = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    _statistics[(rows,)](
        logits_RV, labels_R.contiguous(), lse, picked, best, size, TILE=_TILE, num_warps=_WARPS
    )  # fmt: skip
    return lse, picked, best


def overlap(
    logits_RV: torch.Tensor, other_RV: torch.Tensor, lse_R: torch.Tensor, other_lse_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = _rows(logits_RV)
    assert _rows(other_RV) == (rows, size)
    both, below = torch.empty(2, rows, dtype=torch.float32, device=logits_RV.device).unbind()
    _overlap[(rows,)](logits_RV, other_RV, lse_R, other_lse_R, both, below, size, TILE=_TILE, num_warps=_WARPS)
    return both, below


def divergence(logits_RV: torch.Tensor, other_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, size = _rows(logits_RV)
    assert _rows(other_RV) == (rows, size)
    kl, lse, other_lse = torch.empty(3, rows, dtype=torch.float32, device=logits_RV.device).unbind()
    _divergence[(rows,)](logits_RV, other_RV, kl, lse, other_lse, size, TILE=_TILE, num_warps=_WARPS)
    return kl, lse, other_lse


def divergence_gradient_(
    logits_RV: torch.Tensor,
    labels_R: torch.Tensor,
    lse_R: torch.Tensor,
    ce_weight_R: torch.Tensor,
    other: tuple[torch.Tensor, torch.Tensor, float],
) -> torch.Tensor:
    rows, size = _rows(logits_RV)
    other_RV, other_lse_R, kl_weight = other
    assert _rows(other_RV) == (rows, size)
    vectors = [t.contiguous() for t in (labels_R, lse_R, ce_weight_R)]
    _divergence_gradient[(rows, triton.cdiv(size, _TILE))](
        logits_RV, *vectors, other_RV, other_lse_R.contiguous(), float(kl_weight), size, TILE=_TILE, num_warps=_WARPS
    )
    return logits_RV


def gradient_(
    logits_RV: torch.Tensor,
    labels_R: torch.Tensor,
    lse_R: torch.Tensor,
    ce_weight_R: torch.Tensor,
    other: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    rows, size = _rows(logits_RV)
    second = (logits_RV, lse_R, lse_R, lse_R) if other is None else other  # unread where there is none
    assert second[0].shape == logits_RV.shape and second[0].is_contiguous()
    vectors = [t.contiguous() for t in (labels_R, lse_R, ce_weight_R)]
    _gradient[(rows, triton.cdiv(size, _TILE))](
        logits_RV, *vectors, second[0], *(t.contiguous() for t in second[1:]), size,
        HAS_OTHER=other is not None, TILE=_TILE, num_warps=_WARPS,
    )  # fmt: skip
    return logits_RV
