"""Finds the routed experts of a model, counts them and refuses when the count is not what the configuration says.

A quantizer that looks for `nn.Linear` finds none of them: experts are plain 3-D parameters. That silent no-op is the
most common failure of expert quantization, so the count is proved here and printed by every caller.

What is matched is the fused form that transformers gives every Mixture-of-Experts family, and MiMo-V2 here: a module
with `gate_up_proj` and `down_proj`, each [E, out, in], or [E, in, out] where the class says `is_transposed` (gpt-oss).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mimo_kernels import mxfp4

PROJECTIONS = ("gate_up_proj", "down_proj")
ROUTERS = ("gate", "router")
ALL_LAYERS_ROUTED = ("mixtral", "gpt_oss")  # their configurations have no key that says which layers are routed


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Name -> every module that holds fused 3-D `gate_up_proj` and `down_proj` parameters, in model order."""
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if all(p in own and own[p].dim() == 3 for p in PROJECTIONS):
            found[name] = module
    return found


def contraction_dim(module: nn.Module) -> int:
    """Dimension of both weights of an experts module that its products contract over: 2, or 1 where transposed."""
    return 1 if getattr(module, "is_transposed", False) else 2


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> `gate_up_proj` and `down_proj` of every routed-experts module, in model order.

    Shapes are [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H] for the names in `transposed_experts`. Raises
    ValueError when there are none, when their number is not twice that of the MoE layers, when a layer with a router
    has other experts, and for a contraction that does not divide into MXFP4 blocks.
    """
    modules = experts_modules(model)
    _prove_all_matched(model, modules)
    found: dict[str, nn.Parameter] = {}
    for module_name, module in modules.items():
        for which in PROJECTIONS:
            name = f"{module_name}.{which}".removeprefix(".")
            found[name] = getattr(module, which)
            length = found[name].shape[contraction_dim(module)]
            if length % mxfp4.BLOCK:
                raise ValueError(
                    f"{name} {list(found[name].shape)} contracts over {length} elements, which do not divide into "
                    f"MXFP4 blocks of {mxfp4.BLOCK}; this model cannot be written in MXFP4"
                )
    return found


def transposed_experts(model: nn.Module) -> frozenset[str]:
    """The names of `expert_parameters` whose contraction, and with it the 32-element block, runs along dimension 1."""
    return frozenset(
        f"{name}.{which}".removeprefix(".")
        for name, module in experts_modules(model).items()
        if contraction_dim(module) == 1
        for which in PROJECTIONS
    )


def match_report(model: nn.Module) -> str:
    """One line: what `expert_parameters` matched, and its share of the whole model."""
    found, modules = expert_parameters(model), experts_modules(model)
    weights, total = sum(p.numel() for p in found.values()), sum(p.numel() for p in model.parameters())
    shapes: dict[str, list[str]] = {which: [] for which in PROJECTIONS}
    for name, param in found.items():
        of = shapes[name.rpartition(".")[2]]
        text = str(list(param.shape))
        if text not in of:
            of.append(text)
    widths = sorted({len(m.gate_up_proj) for m in modules.values()})
    return (
        f"{len(found)} expert parameters matched: {len(modules)} layers x {'/'.join(map(str, widths))} experts, "
        + ", ".join(f"{which} {' and '.join(of)}" for which, of in shapes.items())
        + f"; {weights / 1e6:,.1f} M weights, {100 * weights / total:.1f} % of all parameters"
    )


def configured_moe_layers(config: Any) -> tuple[int, str] | None:
    """(number of routed layers, the key that says so) of a configuration, or None where it does not say."""
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    frequencies = getattr(config, "moe_layer_freq", None)
    if isinstance(frequencies, list):
        return sum(map(bool, frequencies)), "moe_layer_freq"
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        return sum(kind == "sparse" for kind in kinds), "mlp_layer_types"
    if layers is None:
        return None
    if getattr(config, "first_k_dense_replace", None) is not None and frequencies in (None, 1):
        return max(0, layers - config.first_k_dense_replace), "first_k_dense_replace"
    if getattr(config, "decoder_sparse_step", None):
        step, dense = config.decoder_sparse_step, set(getattr(config, "mlp_only_layers", None) or ())
        routed = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
        return len(routed), "decoder_sparse_step and mlp_only_layers"
    if getattr(config, "model_type", None) in ALL_LAYERS_ROUTED:
        return layers, "num_hidden_layers"
    return None


def _prove_all_matched(model: nn.Module, modules: dict[str, Any]) -> None:
    """ValueError unless `modules` are the experts of every routed layer that the model or its configuration names."""
    blocks = [n for n, m in model.named_modules() if hasattr(m, "experts") and any(hasattr(m, r) for r in ROUTERS)]
    missed = [block for block in blocks if f"{block}.experts".removeprefix(".") not in modules]
    where = f"; {missed[0]}.experts is a {type(model.get_submodule(missed[0]).experts).__name__}" if missed else ""
    if not modules:
        raise ValueError(
            f"no routed experts matched: no module has 3-D gate_up_proj and down_proj parameters{where}; "
            "load the model in its fused-experts form"
        )
    if missed:
        raise ValueError(
            f"experts of {len(modules)} layers matched, but {len(blocks)} have a router{where} without 3-D "
            "gate_up_proj and down_proj; load the model in its fused-experts form"
        )
    stated = configured_moe_layers(getattr(model, "config", None))
    if stated is not None and len(modules) != stated[0]:
        raise ValueError(
            f"{2 * len(modules)} expert parameters matched, but {stated[1]} says {2 * stated[0]}; "
            "the configuration and the weights belong to different models"
        )


class TokenCounts:
    """Counts the tokens that the routers send to each expert: `counts` [MoE layers, E] int64.

    They are read from the inputs of the experts modules, the one place where all families hand over the same thing,
    and stay on the model's device until `take`: no forward pass waits for the host.
    """

    def __init__(self, model: nn.Module):
        self.modules = list(experts_modules(model).values())
        self.width = max((len(m.gate_up_proj) for m in self.modules), default=0)
        self.counts = torch.zeros(len(self.modules), self.width, dtype=torch.int64)

    @torch.no_grad()
    def _record(self, layer: int, chosen: torch.Tensor) -> None:
        if self.counts.device != chosen.device:
            self.counts = self.counts.to(chosen.device)
        # torch.bincount would read its largest element on the host. Ids beyond E, which expert parallelism uses for
        # "elsewhere", fall off the end.
        edges = torch.arange(self.width + 1, device=chosen.device, dtype=chosen.dtype)
        self.counts[layer] += torch.searchsorted(chosen.flatten().sort().values, edges).diff()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Counts inside the block, whatever calls the model."""

        def hook(layer: int, module: nn.Module) -> Any:
            # (self, hidden_states, top_k_index, top_k_weights), the names differ between families
            signature = inspect.signature(type(module).forward)

            def record(_module, args, kwargs):
                bound = signature.bind(module, *args, **kwargs)
                self._record(layer, list(bound.arguments.values())[2])

            return record

        handles = [
            module.register_forward_pre_hook(hook(layer, module), with_kwargs=True)
            for layer, module in enumerate(self.modules)
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
