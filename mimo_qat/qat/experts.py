"""Finds the routed experts of a model, counts them and refuses when the count is not what the configuration says.

A quantizer that looks for `nn.Linear` finds none of them: experts are plain 3-D parameters. That silent no-op is the
most common failure of expert quantization, so the count is proved here and printed by every caller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] of every routed-expert module, in model order.

    The contraction, and with it the 32-element block, runs along the last dimension. Raises ValueError when there are
    none, when their number is not twice that of the MoE layers, and for the transposed layout of gpt-oss.
    """
    found: dict[str, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not {"gate_up_proj", "down_proj"} <= own.keys() or own["down_proj"].dim() != 3:
            continue
        if getattr(module, "is_transposed", False):
            raise ValueError(
                f"{module_name}: transposed experts contract along dimension 1, which is not implemented; "
                "transpose them to [experts, out, in] first"
            )
        found |= {f"{module_name}.{name}": own[name] for name in ("gate_up_proj", "down_proj")}
    if not found:
        raise ValueError(
            "no routed experts matched: no module has 3-D gate_up_proj and down_proj parameters; "
            "load the model in its fused-experts form"
        )
    frequencies = getattr(getattr(model, "config", None), "moe_layer_freq", None)
    if frequencies is not None and len(found) != 2 * sum(frequencies):
        raise ValueError(
            f"{len(found)} expert parameters matched, but moe_layer_freq says {2 * sum(frequencies)}; "
            "the configuration and the weights belong to different models"
        )
    return found


class TokenCounts:
    """Counts the tokens that the routers send to each expert: `counts` [MoE layers, E] int64."""

    def __init__(self, model: nn.Module):
        self.routers: list[Any] = [m.gate for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gate")]
        self.counts = torch.zeros(len(self.routers), max(len(r.weight) for r in self.routers), dtype=torch.int64)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Counts inside the block, whatever calls the model."""

        def record(layer: int, chosen: torch.Tensor) -> None:
            self.counts[layer] += torch.bincount(chosen.flatten().cpu(), minlength=self.counts.shape[1])

        handles = [
            router.register_forward_hook(lambda _m, _a, out, layer=layer: record(layer, out[-1]))
            for layer, router in enumerate(self.routers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> list[list[int]]:
        """The counts so far, and back to zero."""
        taken = self.counts.tolist()
        self.counts.zero_()
        return taken
