"""Launches `moe.cu`: W4A16 experts for at most 8 tokens in two launches. `moe` defines what they compute, and `router`
the choice that the first may begin with."""

from functools import cache

import torch

from . import cuda, launch
from .moe import PackedExperts
from .router import Router

MAX_TOKENS = 8
_WARPS, _MAX_TOP_K = 16, 8  # as in moe.cu
_AHEAD, _STAGES = 4, 2  # pages in flight a warp; stages of the ring of hidden activations
_TUNED = (("AHEAD", _AHEAD), ("STAGES", _STAGES))


def fits(experts: PackedExperts, tokens: int, top_k: int) -> bool:
    """Whether the kernels have this shape."""
    hidden, inter = experts.padded
    pages = inter // 128
    return (
        tokens <= MAX_TOKENS
        and top_k <= _MAX_TOP_K
        and hidden % 2048 == 0  # whole chunks of AHEAD pages of a quarter of K
        and hidden <= 12288  # activations in shared memory
        and experts.hidden % 8 == 0
        and (pages % _AHEAD == 0 or _AHEAD % pages == 0)
    )


def moe(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """`moe.moe` for checked CUDA arguments that `fits`."""
    return combine(parts(x, ids, weights, experts))


def parts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """`moe.parts` for checked CUDA arguments that `fits`: float32 [k, T, H], a view of [T, k, H]."""
    return _launch(x, ids.int().contiguous(), weights.contiguous(), experts)


def routed(
    x: torch.Tensor, logits: torch.Tensor, router: Router, positions: torch.Tensor | None, experts: PackedExperts
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moe.routed` of the router's logits float32 [T, E], for checked CUDA arguments that `fits`; all contiguous, and
    `positions` int64 where there are several rows of biases."""
    ids = torch.empty(len(x), router.top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(len(x), router.top_k, dtype=torch.float32, device=x.device)
    at, rows = ids if positions is None else positions, len(router.bias) if router.bias.ndim == 2 else 1
    choice = (logits, router.bias, at, rows, int(router.normalise), float(router.scaling))
    return _launch(x, ids, weights, experts, choice), weights, ids


def _launch(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, choice: tuple = ()
) -> torch.Tensor:
    (tokens, top_k), columns = ids.shape, experts.hidden
    hidden, inter = experts.padded
    shapes = (("HIDDEN", hidden), ("INTER", inter), ("EXPERTS", len(experts.down)), ("TOP_K", top_k))
    ring = _STAGES * max(inter, 128 * _AHEAD) * MAX_TOKENS * 2
    kernel = cuda.Kernel(
        "moe.cu",
        "experts",
        (*shapes, *_TUNED, ("CHOOSE", int(bool(choice)))),
        _WARPS * 32,
        hidden * MAX_TOKENS * 2 + 2 * _WARPS * 32 * 16 + ring,
    )
    dependent = launch.dependent(x)["PDL"] and x.is_contiguous()  # x is read early, when a copy might not be there
    x = x.contiguous()
    slots = min(tokens * top_k, len(experts.down))
    between = torch.empty(slots * MAX_TOKENS * inter, dtype=torch.bfloat16, device=x.device)
    out = torch.empty(tokens, top_k, columns, dtype=torch.float32, device=x.device)
    ready, w = _ready(x.device, experts.down.data_ptr()), experts
    matrices = (w.gate_up, w.gate_up_scales, w.down, w.down_scales)
    args = (out, between, ready, *matrices, x, ids, weights, tokens, columns, *choice)
    cuda.launch(kernel, cuda.multiprocessors(x.device), args, dependent=dependent)
    return out.transpose(0, 1)


def combine(parts: torch.Tensor) -> torch.Tensor:
    """`moe.combine` for parts as `parts` gives them."""
    top_k, tokens, columns = parts.shape
    shapes = (("HIDDEN", 2048), ("INTER", 128), ("EXPERTS", top_k), ("TOP_K", top_k))  # of `experts`: any
    kernel = cuda.Kernel("moe.cu", "combine", (*shapes, *_TUNED, ("CHOOSE", 0)), 256)
    out = torch.empty(tokens, columns, dtype=torch.bfloat16, device=parts.device)
    args = (out, parts.transpose(0, 1), tokens, columns)
    cuda.launch(kernel, -(-tokens * columns // 4 // 256), args, dependent=launch.dependent(parts)["PDL"])
    return out


@cache
def _ready(device: torch.device, experts: int) -> torch.Tensor:
    """Counters of the experts at an address, which two launches at a time must not share. Zero between launches."""
    return torch.zeros(MAX_TOKENS * _MAX_TOP_K + 1, dtype=torch.int32, device=device)
