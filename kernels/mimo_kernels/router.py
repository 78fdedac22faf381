"""Routing of 1 to 16 rows to their experts: logits, sigmoid, top-k, combine weights.

    scores  = sigmoid(x @ router^T)                       float32, of a float32 router: no TF32
    ids     = the k largest of scores + bias, in descending order; of equals the lower id first
    weights = scores[ids], divided by their sum + 1e-20 where `normalise`, times scaling

The bias steers the selection only. With a bias per position, row t has that of positions[t] % P.

`reference` is the definition, in float32 or float64. `route` is two launches (`router_triton`) on a GPU of compute
capability 9 or more, the reference elsewhere. The second, the choice, is Triton's; the first, the logits, is CUDA C++
(`router_cuda`) where the GPU is its own (`cuda.usable`) and H a multiple of 1024, for all row counts, else Triton's
too. A runtime calls `moe.routed`, where the kernel of the experts makes the choice, in each of its blocks. The bits of
a row depend on its own x, on the shapes of router and bias and on which of them runs, not on its neighbours, on their
number, on timing, or on the run. Two experts whose logits lie within a rounding of each other may change places between
the reference and the kernels, and between two of these.

Ids are always those of experts, and distinct, whatever x holds: NaN counts as the largest score, as in torch.topk.

Letters: T rows, H hidden size, E experts, P positions with a bias of their own, k experts a row.
"""

from dataclasses import dataclass

import torch

MAX_ROWS = 16
MAX_EXPERTS = 512
MAX_TOP_K = 16


@dataclass(frozen=True)
class Router:
    """The arguments of `route` that are of a layer: `weight` float32 [E, H], `bias` float32 [E] or [P, E]."""

    weight: torch.Tensor
    bias: torch.Tensor
    top_k: int
    normalise: bool
    scaling: float = 1.0

    def route(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`route` of x."""
        own = self.weight, self.bias, self.top_k
        return route(x, *own, normalise=self.normalise, scaling=self.scaling, positions=positions)

    def check(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """ValueError where `route` would raise it."""
        _check(x, self.weight, self.bias, self.top_k, positions)


@torch.no_grad()
def reference(
    x: torch.Tensor,
    router: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    *,
    normalise: bool,
    scaling: float = 1.0,
    positions: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights `dtype` [T, k], ids int32 [T, k]); see `route`."""
    scores = (x.to(dtype) @ router.to(dtype).T).sigmoid()
    if bias.ndim == 2:
        assert positions is not None
        bias = bias[positions.long() % len(bias)]
    ids = (scores + bias.to(dtype)).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, ids.int()


@torch.no_grad()
def route(
    x: torch.Tensor,
    router: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    *,
    normalise: bool,
    scaling: float = 1.0,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32 [T, k], ids int32 [T, k]) of x BF16 [T, H], T <= 16, and router float32 [E, H].

    `bias` is float32 [E], or [P, E] with `positions` int32 or int64 [T], none of them negative. H is a multiple of 8,
    E at most 512, k at most 16. ValueError for anything else.
    """
    _check(x, router, bias, top_k, positions)
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9:
        from . import router_triton

        return router_triton.route(x, router, bias, top_k, normalise=normalise, scaling=scaling, positions=positions)
    return reference(x, router, bias, top_k, normalise=normalise, scaling=scaling, positions=positions)


def _check(
    x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor, top_k: int, positions: torch.Tensor | None
) -> None:
    if router.dtype != torch.float32 or router.ndim != 2 or not router.is_contiguous():
        raise ValueError(f"router: {router.dtype} {list(router.shape)}, expected contiguous torch.float32 [E, H]")
    experts, hidden = router.shape
    if not 1 <= experts <= MAX_EXPERTS or hidden % 8 or not hidden:
        raise ValueError(
            f"router: {list(router.shape)}; expected at most {MAX_EXPERTS} experts and a multiple of 8 columns"
        )
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected torch.bfloat16 [rows, {hidden}]")
    if not 1 <= len(x) <= MAX_ROWS:
        raise ValueError(f"x: {len(x)} rows; give 1 to {MAX_ROWS} at a time")
    if bias.dtype != torch.float32 or bias.ndim not in (1, 2) or bias.shape[-1] != experts or not bias.numel():
        raise ValueError(f"bias: {bias.dtype} {list(bias.shape)}, expected torch.float32 [{experts}] or [P, {experts}]")
    if not 1 <= top_k <= min(MAX_TOP_K, experts):
        raise ValueError(f"top_k: {top_k}, expected 1 to {min(MAX_TOP_K, experts)} of {experts} experts")
    if bias.ndim == 1:
        return
    if positions is None:
        raise ValueError(f"positions: missing, and bias {list(bias.shape)} depends on them; give one a row")
    if positions.shape != (len(x),) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions: {positions.dtype} {list(positions.shape)}, expected torch.int32 or torch.int64 [{len(x)}]"
        )
