"""Routing in two launches. `router` defines it. The first is that of `router_cuda` where its shape fits.

    _logits_kernel  some experts and one slice of H for all rows a program, of one warp: partial logits
    _choose_kernel  one row a program, of one warp: adds the slices in ascending order, sigmoid, the k largest

A router is megabytes of float32, which as many programs as possible ask for at once: each has all its weights on their
way to registers before it multiplies the first. Products are float32 on the plain units, a few for every weight; that
is less than what the bytes take. Few sums leave a lane: a lane adds up its own columns first.

To choose, scores become integers of the same order, because a warp finds the largest integer in one instruction; a
second one finds the lowest id that has it.

Names: e = expert, c = group of 4 columns and i = column in it, t = row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import cuda, router_cuda
from .launch import dependent, prefetch, prefetch_span, wait, wait_first

_GROUP = 8  # rows that share a pass; a program has one pass for 1 to 8 rows and two for 16
_LEAST = tl.constexpr(-(2**31))


@dataclass(frozen=True)
class Config:
    """Experts and columns of a program of the first launch: 64 weights a lane where their product is 2048."""

    experts: int
    columns: int


CONFIGS = (Config(4, 512), Config(2, 512), Config(2, 1024), Config(8, 256), Config(4, 1024))  # `bench --sweep`


@triton.jit(do_not_specialize=["rows"])
def _logits_kernel(
    PARTS, X, W, rows,
    E: tl.constexpr, H: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PARTS float32 [slices, rows, E]: X [rows, H] times W float32 [E, H] transposed, over slices of BH columns.

    x and weights have 4 columns a lane side by side, which is a load of 16 bytes of weights; so neither has to move.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    begin = tl.program_id(1) * BH
    c = tl.arange(0, BH // 4)
    i = tl.arange(0, 4)
    column = begin + c[:, None] * 4 + i[None, :]
    inside = column < H
    if PDL:
        line = tl.minimum(begin + tl.arange(0, BH // 32) * 32, H - 1)  # 32 weights are a cache line
        prefetch(W + tl.minimum(e, E - 1)[:, None] * H + line[None, :])
    wait_first(PDL)
    w_at = W + e[:, None, None] * H + column[None, :, :]
    w = tl.load(w_at, mask=(e < E)[:, None, None] & inside[None, :, :], other=0.0)
    for first in range(0, rows, GROUP):
        for j in tl.static_range(GROUP):
            t = first + j
            x = tl.load(X + t * H + column, mask=column < tl.where(t < rows, H, 0), other=0.0).to(tl.float32)
            part = tl.sum(tl.sum(w * x[None, :, :], 2), 1)
            at = PARTS + (tl.program_id(1) * rows + t) * E + e
            tl.store(at, part, mask=e < tl.where(t < rows, E, 0))


@triton.jit
def _ordered(x):
    """float32 -> int32 of the same order, above -2**31; NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _choose_kernel(
    WEIGHTS, IDS, PARTS, BIAS, POSITIONS, rows, biases, scaling,
    E: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr,
    NORMALISE: tl.constexpr, PLACED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """WEIGHTS float32 and IDS int32 [rows, TOP_K] of PARTS [SLICES, rows, E] and BIAS [E], or [biases, E] if PLACED."""
    if PDL and not PLACED:
        prefetch_span(BIAS, E)
    wait(PDL)
    t = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < E
    logit = tl.load(PARTS + t * E + e, mask=inside, other=0.0)
    for s in tl.static_range(1, SLICES):
        logit += tl.load(PARTS + (s * rows + t) * E + e, mask=inside, other=0.0)
    if PLACED:
        BIAS += tl.load(POSITIONS + t).to(tl.int32) % biases * E
    score = 1.0 / (1.0 + tl.exp(-logit))
    key = _ordered(score + tl.load(BIAS + e, mask=inside, other=0.0))
    key = tl.where(inside, key, _LEAST)
    bits = score.to(tl.int32, bitcast=True)
    k = tl.arange(0, K_BLOCK)
    ids = tl.zeros((K_BLOCK,), tl.int32)
    weights = tl.zeros((K_BLOCK,), tl.float32)
    total = 0.0
    for j in tl.static_range(TOP_K):
        chosen = tl.min(tl.where(key == tl.max(key, 0), e, BLOCK), 0)
        weight = tl.xor_sum(tl.where(e == chosen, bits, 0), 0).to(tl.float32, bitcast=True)
        key = tl.where(e == chosen, _LEAST, key)
        ids = tl.where(k == j, chosen, ids)
        weights = tl.where(k == j, weight, weights)
        total += weight
    if NORMALISE:
        weights = tl.div_rn(weights, tl.zeros_like(weights) + (total + 1e-20))
    at = t * TOP_K + k
    tl.store(IDS + at, ids, mask=k < TOP_K)
    tl.store(WEIGHTS + at, weights * scaling, mask=k < TOP_K)


def route(
    x: torch.Tensor,
    router: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    *,
    normalise: bool,
    scaling: float = 1.0,
    positions: torch.Tensor | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`router.route` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones).

    With `config` both launches are Triton's, whatever runs otherwise.
    """
    (rows, hidden), experts = x.shape, len(router)
    x, bias = x.contiguous(), bias.contiguous()
    few = config is None and cuda.usable(x.device) and router_cuda.fits(hidden)
    config = config or CONFIGS[0]
    slices = 1 if few else triton.cdiv(hidden, config.columns)
    parts = router_cuda.logits(x, router) if few else x.new_empty(slices, rows, experts, dtype=torch.float32)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=x.device)
    placed = bias.ndim == 2
    at = positions.contiguous() if placed and positions is not None else ids  # not read where there is one bias
    with torch.cuda.device_of(x):
        if not few:
            _logits_kernel[(triton.cdiv(experts, config.experts), slices)](
                parts, x, router, rows, experts, hidden, config.experts, config.columns, _GROUP,
                **dependent(x), num_warps=1,
            )  # fmt: skip
        _choose_kernel[(rows,)](
            weights, ids, parts, bias, at, rows, len(bias) if placed else 1, scaling,
            experts, triton.next_power_of_2(experts), slices, top_k, triton.next_power_of_2(top_k), normalise, placed,
            **dependent(x), num_warps=1,
        )  # fmt: skip
    return weights, ids
