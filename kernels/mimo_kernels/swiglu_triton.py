"""silu(gate) * up in one launch. `swiglu` defines it.

_silu_mul_kernel  BLOCK elements of a row a program
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .launch import dependent, wait

_BLOCK = 512  # elements a program of 4 warps: a load of 8 bytes a thread


@triton.jit
def _silu_mul_kernel(OUT, X, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, LIBRARY: tl.constexpr, PDL: tl.constexpr):
    """OUT [rows, COLUMNS] of X [rows, 2 * COLUMNS]; with LIBRARY by the exponential that torch has."""
    wait(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < COLUMNS
    row = tl.program_id(1)
    gate = tl.load(X + row * (2 * COLUMNS) + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + row * (2 * COLUMNS) + COLUMNS + i, mask=inside, other=0.0).to(tl.float32)
    decay = libdevice.exp(-gate) if LIBRARY else tl.exp(-gate)
    silu = tl.div_rn(gate, 1.0 + decay).to(X.dtype.element_ty).to(tl.float32)
    tl.store(OUT + row * COLUMNS + i, (silu * up).to(OUT.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu.silu_mul` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones, also of float32)."""
    gate_up = gate_up.contiguous()
    rows, columns = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, columns, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):
        _silu_mul_kernel[(triton.cdiv(columns, _BLOCK), rows)](
            out, gate_up, columns, _BLOCK, gate_up.is_cuda, **dependent(gate_up), num_warps=4
        )
    return out
