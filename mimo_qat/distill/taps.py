"""Captures the target's residual stream after chosen layers, before the final norm: what the drafter reads."""

from types import TracebackType
from typing import Any

import torch


class Taps:
    """Context manager with forward hooks on `target.model.layers[i]`.

    A layer id is a 0-based index of a decoder layer; the output of the last layer is taken before `model.norm`
    (`output_hidden_states[-1]` of many models is normed, which is the wrong tensor).
    """

    def __init__(self, target: Any, layer_ids: list[int]):
        layers = target.model.layers
        for i in layer_ids:
            if not 0 <= i < len(layers):
                raise ValueError(f"target_layer_ids holds {i}, the target has layers 0..{len(layers) - 1}; correct it")
        self.layers, self.layer_ids = layers, list(layer_ids)
        self.outputs: dict[int, torch.Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Taps":
        for i in set(self.layer_ids):
            self._hooks.append(self.layers[i].register_forward_hook(self._keeper(i)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.outputs.clear()

    def _keeper(self, i: int):
        def keep(module, args, output):
            self.outputs[i] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> torch.Tensor:
        """The last forward's taps [B, S, taps * hidden], joined in `layer_ids` order."""
        taps = torch.cat([self.outputs[i] for i in self.layer_ids], dim=-1)
        self.outputs.clear()
        return taps
