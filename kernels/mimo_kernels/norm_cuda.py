"""Launches `norm.cu`: residual add and RMSNorm of at most 16 rows, with the sum over ranks or without, in one launch.

`residual` and `allreduce` define what they compute; `residual_triton` and `allreduce_triton` have the other shapes.
"""

import torch

from . import cuda, launch
from .allreduce import CELL, CLOCK_HZ, PACKET, Channel

CLUSTER = 8  # blocks that share a row
CLUSTERS = (1, 2, 4, 8)  # what `bench --sweep` tries; 8 is the most that every GPU promises
_MAX_THREADS = 1024
_FOUR = 4  # columns of a thread, and the unit of strides, as in norm.cu


def fits(columns: int, cluster: int = CLUSTER) -> bool:
    """Whether the kernels have rows of this shape: whole warps for every block."""
    return columns % (cluster * 32 * _FOUR) == 0 and 0 < columns <= cluster * _MAX_THREADS * _FOUR


def add_rms_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float, cluster: int = CLUSTER
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual.add_rms_norm` for checked CUDA arguments whose rows `fits`."""
    rows = len(x)
    out = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, weight = (_aligned(t.contiguous()) for t in (x, weight))
    added = x[None] if update is None else _aligned(update if update.ndim == 3 else update[None])
    normed = torch.empty_like(x)
    kernel = _kernel("add_norm", 0 if update is None else len(added), added, cluster)
    strides = (added.stride(0) // _FOUR, added.stride(1) // _FOUR)
    args = (out, normed, x, added, weight, *strides, float(eps))
    cuda.launch(kernel, rows * cluster, args, dependent=launch.dependent(x)["PDL"])
    return out, normed


def all_reduce_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, channel: Channel, cluster: int = CLUSTER
) -> tuple[torch.Tensor, torch.Tensor]:
    """`allreduce.all_reduce_add_norm` for checked CUDA arguments whose rows `fits`."""
    rows = len(residual)
    added, residual, weight = (_aligned(t) for t in (x if x.ndim == 3 else x[None], residual, weight))
    out, normed = torch.empty_like(residual), torch.empty_like(residual)
    shapes = (("RANKS", channel.ranks), ("CELL", CELL), ("CAPACITY", channel.elements // PACKET))
    kernel = _kernel("sum_add_norm", len(added), added, cluster, shapes)
    tensors = (out, normed, added, residual, weight, channel.peers, channel.epochs, channel.failed, channel.failed_host)
    strides = (added.stride(0) // _FOUR, added.stride(1) // _FOUR)
    args = (*tensors, *strides, channel.rank, channel.seconds * CLOCK_HZ, float(eps))
    cuda.launch(kernel, rows * cluster, args, dependent=launch.dependent(residual)["PDL"])
    return out, normed


def _kernel(
    name: str, parts: int, added: torch.Tensor, cluster: int, shapes: tuple[tuple[str, int], ...] = ()
) -> cuda.Kernel:
    columns, wide = added.shape[-1], int(added.dtype == torch.float32)
    common = (("COLUMNS", columns), ("CLUSTER", cluster), ("PARTS", parts), ("WIDE", wide))
    return cuda.Kernel("norm.cu", name, (*common, *shapes), columns // _FOUR // cluster)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it in which a thread's four columns are one load."""
    strides = x.stride()
    whole = strides[-1] == 1 and all(s % _FOUR == 0 and s < 2**31 for s in strides[:-1])
    if whole and x.data_ptr() % (_FOUR * x.element_size()) == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
