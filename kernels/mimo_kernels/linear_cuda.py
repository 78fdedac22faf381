"""Launches `linear.cu`: products of at most 8 tokens in one launch. `linear` defines what they compute."""

import torch

from . import cuda, launch
from .linear import GROUP_ROWS, Fp8Weight

MAX_TOKENS = 8
MAX_ROWS = 8192  # above, the weights of a thread's first step are a small part, and `linear_triton` streams better
_WARPS, _ROWS = 16, 32  # as in linear.cu


def fits(w: torch.Tensor | Fp8Weight, tokens: int) -> bool:
    """Whether the kernel has this shape: a whole number of loads for each of the warps that share K."""
    n, k = w.shape
    return tokens <= MAX_TOKENS and n <= MAX_ROWS and k % (_WARPS * (64 if isinstance(w, Fp8Weight) else 32)) == 0


def linear(x: torch.Tensor, w: torch.Tensor | Fp8Weight) -> torch.Tensor:
    """`linear.linear` for checked CUDA arguments that `fits`."""
    weight, scales = (w.codes, w.scales) if isinstance(w, Fp8Weight) else (w, w)
    n, k = weight.shape
    shapes = (("K", k), ("FP8", int(isinstance(w, Fp8Weight))), ("GROUP_ROWS", GROUP_ROWS))
    kernel = cuda.Kernel("linear.cu", "linear", shapes, _WARPS * 32)
    x = x.contiguous()
    out = torch.empty(len(x), n, dtype=torch.bfloat16, device=x.device)
    early = launch.dependent(x)["PDL"]
    cuda.launch(kernel, -(-n // _ROWS), (out, weight, scales, x, n, len(x)), dependent=early)
    return out
