"""A `grouped_mm` for CPUs that sees few distinct shapes.

oneDNN compiles a BF16 product for every new number of rows, which takes four times as long as the product itself
(5 to 10 ms against 2 ms for 500 x 576 x 3072). Routing gives every expert another number of tokens in every layer and
step, so plain `grouped_mm` spends its time compiling. Here each expert's rows are padded with zeros to a multiple of
32, and a handful of compiled products serves the whole run.
"""

import torch
import torch.nn.functional as F
from torch import nn

NAME = "bucketed_mm"
BUCKET = 32  # rows


def bucketed_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation of transformers: [tokens, hidden], [tokens, k], [tokens, k] -> [tokens, hidden].

    `self` holds `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]. The combination over k is summed in float32.
    """
    tokens, k = top_k_index.shape
    chosen = top_k_index.flatten()
    counts = torch.bincount(chosen, minlength=self.num_experts)
    padded = (counts + BUCKET - 1) // BUCKET * BUCKET
    ends = padded.cumsum(0)
    order = chosen.argsort(stable=True)
    place = torch.arange(len(chosen)) + (ends - padded - counts.cumsum(0) + counts)[chosen[order]]
    slot = torch.empty_like(order).scatter_(0, order, place)
    rows = hidden_states.new_zeros(int(ends[-1]), hidden_states.shape[1])
    rows = rows.index_copy(0, slot, hidden_states.repeat_interleave(k, dim=0))
    offsets = ends.to(torch.int32)
    inner = self._apply_gate(F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=offsets))
    out = F.grouped_mm(inner, self.down_proj.transpose(1, 2), offs=offsets).index_select(0, slot)
    combined = (out.float() * top_k_weights.reshape(-1, 1)).view(tokens, k, -1).sum(1)
    return combined.to(hidden_states.dtype)


def use_bucketed_experts(model: nn.Module) -> None:
    """Switches a transformers model on a CPU to `bucketed_mm`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, bucketed_experts_forward)
    model.set_experts_implementation(NAME)
