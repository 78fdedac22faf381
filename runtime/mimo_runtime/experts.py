"""Routed experts from files to the packed layout of the kernels, all layers in one stream.

Some experts at a time go as stored, in one piece, to a buffer on the device, and from there to their places by
`mimo_kernels.moe.Packer`. There are a few such buffers, each of which is asked for again as soon as the packing of what
it held is on the device's stream, so the reading threads always have work, also while a layer ends and another begins.
On a GPU nothing here waits for the device but the check of the scale bytes at the end.
"""

from collections import deque
from collections.abc import Callable, Mapping

import torch

from mimo_kernels.moe import Packer
from mimo_qat.checkpoint.reader import Filling
from mimo_runtime.shards import Shards

BUFFERS, BUFFER_BYTES = 6, 2**26  # more than 16 threads can be reading


def fill(shards: Shards, packers: Mapping[int, Packer], loaded: Callable[[int], None]) -> None:
    """Reads this rank's experts of the layers in `packers`; calls `loaded` with each layer when all of its is read.

    ValueError as of `Packer.check`, with the layer. `shards.seconds` gets the caller's time: "plan" what to read,
    "wait" for it, "pack" (asking for it on a GPU), and "drain", the wait for the GPU at the end.
    """
    if not packers:
        return
    record, count = shards.expert_record(), shards.checkpoint.geometry.n_routed_experts
    many = min(count, max(1, BUFFER_BYTES // record.size))
    spare: list[torch.Tensor] = []
    running: deque[tuple[int, range, torch.Tensor, list[Filling]]] = deque()

    def finish() -> None:
        layer, experts, buffer, fillings = running.popleft()
        with shards.timed("wait"):
            for filling in fillings:
                filling.wait()
        with shards.timed("pack"):
            pack(layer, experts, buffer)
        spare.append(buffer)
        if experts.stop == count:
            loaded(layer)

    def pack(layer: int, experts: range, buffer: torch.Tensor) -> None:
        matrices = record.views(buffer[: len(experts) * record.size])
        gate, up, down = (matrices[name] for name in ("gate_proj", "up_proj", "down_proj"))
        packers[layer].put(experts.start, gate, up, down)

    for layer in packers:
        for first in range(0, count, many):
            if len(running) == BUFFERS:
                finish()
            if not spare:
                spare.append(torch.empty(many * record.size, dtype=torch.uint8, device=shards.checkpoint.device))
            experts, buffer = range(first, min(count, first + many)), spare.pop()
            out = buffer[: len(experts) * record.size]
            with shards.timed("plan"):
                fillings = shards.expert_bytes(layer, experts, out)
            running.append((layer, experts, buffer, fillings))
    while running:
        finish()
    with shards.timed("drain"):
        for layer, packer in packers.items():
            try:
                packer.check()
            except ValueError as error:
                raise ValueError(f"model.layers.{layer}.mlp.experts: {error}") from None
