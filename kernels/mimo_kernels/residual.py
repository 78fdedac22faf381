"""The residual stream between two sublayers: x + update and the RMSNorm of the sum, for 1 to 16 rows of a decode step.

    sum    = x + update, rounded to BF16
    normed = sum / sqrt(mean(sum**2) + eps) in float32, rounded to BF16, times weight, rounded to BF16

An update of several parts (of ranks, or of experts) is added in order in float32 and rounded to BF16 before x is added
to it. `reference` is the definition, with float32 or float64 between the roundings. `add_rms_norm` is what a runtime
calls, one launch: of CUDA C++ in which a cluster of blocks shares a row (`norm_cuda`), where the GPU and the shape are
its own (`cuda.usable`, `norm_cuda.fits`), otherwise of Triton with a program a row (`residual_triton`) on a GPU of
compute capability 9 or more, the reference elsewhere. The bits of a row depend on that row alone.

Given up: more than 16 rows, and rows longer than 8192.
"""

import torch

MAX_ROWS = 16
MAX_COLUMNS = 8192
MAX_PARTS = 16


@torch.no_grad()
def reference(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, normed) in x's dtype, to which everything is rounded; see `add_rms_norm`. `dtype` lies between."""
    if update is not None:
        if update.ndim == 3:
            total = update[0].to(dtype)
            for part in update[1:]:
                total = total + part.to(dtype)
            update = total.to(x.dtype)
        x = (x.to(dtype) + update.to(dtype)).to(x.dtype)
    y = x.to(dtype)
    normed = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return x, (normed.to(dtype) * weight.to(dtype)).to(x.dtype)


@torch.no_grad()
def add_rms_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, normed), each BF16 [T, H], of x BF16 [T, H], T <= 16, and weight BF16 [H].

    `update` is BF16 [T, H], or BF16 or float32 [P, T, H] of P <= 16 parts; without one the sum is x itself. H is a
    multiple of 8 up to 8192. ValueError for anything else.
    """
    _check(x, update, weight)
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9:
        from . import cuda, norm_cuda, residual_triton

        own = cuda.usable(x.device) and norm_cuda.fits(x.shape[1])
        return (norm_cuda if own else residual_triton).add_rms_norm(x, update, weight, eps)
    return reference(x, update, weight, eps)


def _check(x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor) -> None:
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected torch.bfloat16 [rows, columns]")
    rows, columns = x.shape
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"x: {rows} rows; give 1 to {MAX_ROWS} at a time, use torch's rms_norm for more")
    if columns % 8 or not 8 <= columns <= MAX_COLUMNS:
        raise ValueError(f"x: {columns} columns; expected a multiple of 8 up to {MAX_COLUMNS}, use torch's rms_norm")
    if weight.dtype != torch.bfloat16 or weight.shape != (columns,):
        raise ValueError(f"weight: {weight.dtype} {list(weight.shape)}, expected torch.bfloat16 [{columns}]")
    if update is None:
        return
    dtypes = (torch.bfloat16, torch.float32) if update.ndim == 3 else (torch.bfloat16,)
    if update.dtype not in dtypes or update.ndim not in (2, 3) or update.shape[-2:] != x.shape:
        raise ValueError(
            f"update: {update.dtype} {list(update.shape)}, expected torch.bfloat16 [{rows}, {columns}], or of that or "
            f"float32 [parts, {rows}, {columns}]"
        )
    if update.ndim == 3 and not 1 <= len(update) <= MAX_PARTS:
        raise ValueError(f"update: {len(update)} parts; add them up before, or give 1 to {MAX_PARTS}")
