"""The activation of a dense MLP, silu(gate) * up, for the rows of a decode step.

`reference` is the definition, and what torch does in two operations: silu in float32, rounded to BF16, times up in
float32, rounded again. `silu_mul` runs a Triton kernel (`swiglu_triton`) on a GPU of compute capability 9 or more, the
reference elsewhere. The kernel has the bits of torch on that GPU: the same exponential and a rounded division.
"""

import torch
import torch.nn.functional as F

MAX_ROWS = 16


@torch.no_grad()
def reference(gate_up: torch.Tensor) -> torch.Tensor:
    """x's dtype [T, I] of gate_up [T, 2I]; see `silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.no_grad()
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """BF16 [T, I] of gate_up BF16 [T, 2I], T <= 16, whose first I columns are the gate's. ValueError otherwise."""
    if gate_up.dtype != torch.bfloat16 or gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.shape[1]:
        raise ValueError(
            f"gate_up: {gate_up.dtype} {list(gate_up.shape)}, expected torch.bfloat16 [rows, an even number of columns]"
        )
    if not 1 <= len(gate_up) <= MAX_ROWS:
        raise ValueError(f"gate_up: {len(gate_up)} rows; give 1 to {MAX_ROWS} at a time, use torch's silu for more")
    if gate_up.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(gate_up.device)[0] >= 9:
        from . import swiglu_triton

        return swiglu_triton.silu_mul(gate_up)
    return reference(gate_up)
