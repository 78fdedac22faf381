"""Residual add and RMSNorm in one launch. `residual` defines it; `norm_cuda` comes first where it has the shape.

    _add_rms_norm_kernel  one row a program

A row is a few kilobytes, so that time is the launch, one wait for memory and one reduction over the warps: every load
is under way before the first value is used, and a thread has 8 or 16 elements.

Names: h = element of a row.
"""

import torch
import triton
import triton.language as tl

from .launch import dependent, prefetch_span, wait

WARPS = (4, 8, 16)  # what `bench --sweep` tries


def warps_for(columns: int) -> int:
    """8 elements a thread, in one load of 16 bytes, up to rows of 4096. A constant of the shape."""
    return min(16, max(1, triton.next_power_of_2(columns) // 256))


@triton.jit
def _add_rms_norm_kernel(
    SUM, NORMED, X, UPDATE, WEIGHT, part_stride, row_stride, eps,
    H: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """NORMED and, with PARTS > 0, SUM [rows, H] of X [rows, H], UPDATE [PARTS, rows, H], by strides, and WEIGHT [H].

    All but UPDATE are of one dtype, to which results are rounded; BLOCK >= H is a power of two.
    """
    h = tl.arange(0, BLOCK)
    inside = h < H
    at = tl.program_id(0) * H + h
    if PDL:
        prefetch_span(WEIGHT, H)
    wait(PDL)
    weight = tl.load(WEIGHT + h, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(X + at, mask=inside, other=0.0)
    # -0, which adds nothing. Without it the assembler asks for the weight behind the reduction: a second wait.
    nothing = tl.minimum(tl.abs(weight), 0.0) * -1.0  # Triton's unary minus is 0 - x, which is +0
    if PARTS > 0:
        UPDATE += tl.program_id(0) * row_stride + h
        total = tl.load(UPDATE, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            total += tl.load(UPDATE + part * part_stride, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + total.to(X.dtype.element_ty).to(tl.float32)).to(X.dtype.element_ty)
        tl.store(SUM + at, x, mask=inside)
    y = x.to(tl.float32) + nothing
    normed = (y * tl.rsqrt(tl.sum(y * y, 0) / H + eps)).to(X.dtype.element_ty)
    out = (normed.to(tl.float32) * weight).to(X.dtype.element_ty)
    tl.store(NORMED + at, out, mask=inside)


def add_rms_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float, warps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual.add_rms_norm` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    rows, columns = x.shape
    parts = 0 if update is None else len(update) if update.ndim == 3 else 1
    out = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, weight = x.contiguous(), weight.contiguous()
    added = x if update is None else update if update.ndim == 3 else update[None]
    if added.stride(-1) != 1:
        added = added.contiguous()
    part_stride, row_stride = (0, 0) if update is None else added.stride()[:2]
    normed = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add_rms_norm_kernel[(rows,)](
            out, normed, x, added, weight, part_stride, row_stride, eps,
            columns, parts, triton.next_power_of_2(columns), **dependent(x), num_warps=warps or warps_for(columns),
        )  # fmt: skip
    return out, normed
