"""The experts of `moe` for more tokens than a decode step has: decoded to BF16, some at a time, for grouped products.

A prompt's chunk of a few hundred tokens asks for almost every expert, and for each of them more than once. So the codes
are decoded once a chunk (`decode_experts`: a Triton kernel on a GPU of compute capability 9 or more, the definition by
way of `unpack_experts` elsewhere), and torch multiplies the rows of each expert. The values are those of the codes;
hidden activations and the experts' outputs are rounded to BF16, and the outputs of a token are added in float32,
in the order of its `ids`. Nothing waits for the host: how many rows an expert has is known to the device alone.

`grouped=True` gives the same sums by kernels that read the codes themselves (`moe_grouped_triton`). It is not the
default, because no GPU has run it yet; `bench --only prompt` times both.
"""

import torch
import torch.nn.functional as F

from . import mxfp4
from .moe import PackedExperts, unpack_experts

_VALUES = 1 << 27  # decoded at once: 256 MiB, which `mimo_qat.plan_runtime` counts


def _on_hopper(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9


@torch.no_grad()
def decode_experts(experts: PackedExperts, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BF16 (gate_up [n, 2I, H], gate rows first; down [n, H, I]) of the n experts `first`..`last` - 1."""
    words = experts.gate_up
    if _on_hopper(words):
        from . import moe_many_triton

        return moe_many_triton.decode_experts(experts, first, last)
    codes = unpack_experts(experts, torch.arange(first, last, device=words.device))
    return mxfp4.decode(codes.gate_up, codes.gate_up_scales), mxfp4.decode(codes.down, codes.down_scales)


@torch.no_grad()
def moe_many(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts, *, grouped: bool = False
) -> torch.Tensor:
    """BF16 [T, H] of x BF16 [T, H], ids int64 [T, top_k] in [0, E) and weights float32 [T, top_k]; any T."""
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] != experts.hidden or ids.shape != weights.shape:
        raise ValueError(
            f"x {x.dtype} {list(x.shape)}, ids {list(ids.shape)}, weights {list(weights.shape)}: expected "
            f"torch.bfloat16 [T, {experts.hidden}] and twice [T, k]"
        )
    if grouped and _on_hopper(x):
        from . import moe_grouped_triton

        return moe_grouped_triton.moe_grouped(x, ids, weights, experts)
    count, k = len(experts.down), ids.shape[1]
    chosen, order = ids.flatten().sort(stable=True)
    place = torch.empty_like(order)
    row = torch.arange(len(order), device=x.device)
    place[order] = row
    # begins[e] rows belong to experts below e
    begins = torch.searchsorted(chosen, torch.arange(count + 1, device=x.device, dtype=chosen.dtype), out_int32=True)
    out = torch.empty(len(order) + 1, experts.hidden, dtype=x.dtype, device=x.device)  # the last row takes what is none
    step = max(1, _VALUES // (3 * experts.hidden * experts.inter))
    for first in range(0, count, step):
        last = min(first + step, count)
        gate_up, down = decode_experts(experts, first, last)
        # Their rows come first, because groups begin at row 0; what follows the last group has no product.
        at = (row + begins[first]) % len(row)
        offs = begins[first + 1 : last + 1] - begins[first]
        gate, up = F.grouped_mm(x[order[at] // k], gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
        found = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offs)
        out[at.masked_fill(row >= offs[-1], len(row))] = found
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in range(k):
        total.addcmul_(out[place.view_as(ids)[:, slot]].float(), weights[:, slot, None])
    return total.to(x.dtype)
