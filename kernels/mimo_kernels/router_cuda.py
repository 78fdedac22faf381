"""Launches `router.cu`: the logits of at most 16 tokens. `router` defines them; `moe.cu` chooses from them, or
`router_triton`."""

import torch

from . import cuda, launch

_WARPS, _EXPERTS = 8, 2  # as in router.cu: warps of an expert, experts of a block


def fits(hidden: int) -> bool:
    """Whether the kernel has this shape."""
    return hidden % (_WARPS * 32 * 4) == 0


def logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """float32 [T, E] of x bfloat16 [T, H] and router float32 [E, H], contiguous CUDA tensors that `fits`."""
    tokens, experts = len(x), len(router)
    kernel = cuda.Kernel("router.cu", "logits", (("HIDDEN", x.shape[1]),), _EXPERTS * _WARPS * 32)
    out = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    cuda.launch(
        kernel, -(-experts // _EXPERTS), (out, router, x, experts, tokens), dependent=launch.dependent(x)["PDL"]
    )
    return out
