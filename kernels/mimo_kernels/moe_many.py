"""The experts of `moe` for more tokens than a decode step has, such as the chunks of a prompt and large trees.

`moe.reference` defines the sums here too. `moe_many` is what a runtime calls: Triton kernels (`moe_many_triton`) that
read the codes themselves on a GPU of compute capability 9 or more, the reference elsewhere, an expert at a time. The
kernels round hidden activations and the experts' outputs to BF16, and add the outputs of a token in float32, in the
order of its `ids`. So the bits of a token depend on its own routing and on the shapes, not on its neighbours, on timing
or on the run. Nothing waits for the host: how many tokens an expert has is known to the device alone.
"""

import torch

from .moe import PackedExperts, _check_routing, reference, unpack_experts


@torch.no_grad()
def moe_many(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """BF16 [T, H] of x BF16 [T, H], T >= 1, ids int32 or int64 [T, top_k] and weights float32 [T, top_k].

    On a GPU ids must lie in [0, E): that is not checked. ValueError for shapes and dtypes.

    Memory in between, on a GPU: T * (top_k * (H + Ip) + Hp) BF16 numbers, Hp and Ip the padded sizes.
    """
    _check_routing(x, ids, weights)
    if x.dtype != torch.bfloat16 or x.shape[1] != experts.hidden or not len(x):
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected torch.bfloat16 [tokens, {experts.hidden}], not empty")
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9:
        from . import moe_many_triton

        return moe_many_triton.moe_many(x, ids, weights, experts)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique():  # one at a time: unpacking takes some bytes a weight
        routed = (ids == e).any(-1)
        combine = torch.where(ids == e, weights, 0.0)[routed].sum(-1, keepdim=True)
        first = torch.zeros(combine.shape, dtype=torch.int64, device=x.device)
        out[routed] += reference(x[routed], first, combine, unpack_experts(experts, e[None]))
    return out.to(x.dtype)
