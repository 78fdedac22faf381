"""Fewer and larger kernels for training a fused-experts model on a GPU."""

import torch
from torch import nn

from mimo_qat.models import gpu_experts
from mimo_qat.models.experts import experts_modules

COMPILED = ("MiMoV2Attention", "MiMoV2Router")


def use_training_kernels(model: nn.Module, modules: bool = True) -> None:
    """Switches the experts of a CUDA model to `sorted_mm` and compiles what surrounds its products.

    With `modules` every RMS norm, and MiMo-V2's attention and router, become one generated kernel between two products,
    forward and backward; one compilation serves all layers. Leave it out where a framework exchanges parameters under
    the modules. A family whose experts `sorted_mm` does not cover keeps its own implementation. Values differ from the
    uncompiled model's by rounding, the same for teacher and student.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if all(gpu_experts.suits(module) for module in experts_modules(model).values()):
        ALL_EXPERTS_FUNCTIONS.register(gpu_experts.NAME, gpu_experts.sorted_experts_forward)
        model.set_experts_implementation(gpu_experts.NAME)  # type: ignore[operator]
    for module in model.modules() if modules else ():
        if type(module).__name__.endswith("RMSNorm") or type(module).__name__ in COMPILED:
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
