"""Launches `window.cu`: attention over a window for at most 8 rows in one launch. `window` defines it."""

import torch

from . import cuda, launch

MAX_ROWS = 8
_WARPS, _ROWS = 8, 16  # as in window.cu
_LOG2_E = 1.4426950408889634


def fits(
    qkv: torch.Tensor, cos: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, count: int, window: int
) -> bool:
    """Whether the kernel has these shapes. Arguments that no kernel has are left to those who name them."""
    if not (qkv.ndim == 2 and cos.ndim == 2 and keys.ndim == values.ndim == 3 and keys.shape[:2] == values.shape[:2]):
        return False
    (groups, slots, k_dim), v_dim, half = keys.shape, values.shape[2], cos.shape[1]
    heads, rest = divmod(qkv.shape[1] - groups * v_dim, k_dim)
    group = (heads - groups) // groups
    return (
        all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in (qkv, keys, values))
        and rest == 0
        and (heads - groups) % groups == 0
        and group > 0
        and _ROWS % group == 0
        and 1 <= count <= len(qkv) <= MAX_ROWS  # not `count` alone: one row and its verification have to take one way
        and v_dim == 16 * _WARPS
        and k_dim % 32 == 0
        and half % 32 == 0
        and 2 * half <= k_dim <= 256
        and window + count - 1 <= slots <= 256
    )


def attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    count: int,
    window: int,
    *,
    scale: float,
    sink: torch.Tensor | None,
    value_scale: float,
) -> torch.Tensor:
    """`window.attend` for checked CUDA arguments that `fits`."""
    (groups, slots, k_dim), v_dim = keys.shape, values.shape[2]
    heads = (qkv.shape[1] - groups * v_dim) // k_dim - groups
    group = heads // groups
    shapes = {
        "K": k_dim,
        "V": v_dim,
        "HALF": cos.shape[1],
        "GROUP": group,
        "SLOTS": slots,
        "SINK": int(sink is not None),
    }
    key_rows = -(-slots // 16) * 16
    kernel = cuda.Kernel("window.cu", "attend", tuple(shapes.items()), _WARPS * 32, key_rows * (v_dim + 8) * 2)
    out = torch.empty(len(qkv), heads, v_dim, dtype=torch.bfloat16, device=qkv.device)
    sinks = out if sink is None else sink
    tensors = (out, qkv, cos.contiguous(), sin.contiguous(), keys, values, start.long(), sinks)
    numbers = (groups, len(qkv), count, window, scale * _LOG2_E, value_scale)
    blocks = groups * -(-len(qkv) // (_ROWS // group))
    cuda.launch(kernel, blocks, (*tensors, *numbers), dependent=launch.dependent(qkv)["PDL"])
    return out
