"""Routed experts from files to the packed layout of the kernels, beside all other work of loading.

Some experts are one job: threads of the checkpoint read their bytes as stored and copy them to the device, a buffer at
a time and in any order, and whoever brings the last of them has all packed to their places by one call of
`mimo_kernels.moe.Packer`. The caller plans the jobs, reads the small tensors meanwhile, and waits; nothing waits for
the device but the check of the scale bytes.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from mimo_kernels.moe import Packer
from mimo_qat.checkpoint.layout import Geometry, read_json
from mimo_qat.checkpoint.reader import Filling, Job
from mimo_runtime.shards import ExpertRecord, Shards

JOB_BYTES = 2**28  # on the device until they are packed, of a few jobs at a time


def at_once(record: ExpertRecord) -> int:
    """Experts of a job."""
    return max(1, JOB_BYTES // record.size)


def compile_ahead(folder: Path, ranks: int, device: str) -> None:
    """Packs experts of zeros on a thread, so that a GPU's kernel is compiled while headers are read. Who opens the
    folder tells what is wrong with it."""
    where = torch.empty(0, device=device).device  # a thread has another current device

    @torch.inference_mode()
    def work() -> None:
        with contextlib.suppress(ValueError, OSError):
            g = Geometry.from_config(read_json(folder / "config.json"))
            record = ExpertRecord(g.hidden_size, g.moe_intermediate_size // ranks)
            many = min(2, at_once(record))  # views of one record have other strides than those of several
            data = torch.zeros(many * record.size, dtype=torch.uint8, device=where)
            Packer(many, record.hidden, record.inter, where).put(0, *record.gate_up_down(data))

    threading.Thread(target=work, name="compile").start()


class Filler:
    """Fills the `packers` of layers, which `add` brings in one by one, with this rank's experts.

    `shards.seconds` gets the caller's time: "plan" what to read and have it begun, "wait" for it, and "drain", the wait
    for the GPU at the end.
    """

    def __init__(self, shards: Shards):
        self.shards = shards
        self.packers: dict[int, Packer] = {}
        self._running: dict[int, Filling] = {}

    def add(self, layer: int, packer: Packer) -> None:
        """Begins to fill `packer`."""
        self.packers[layer] = packer
        with self.shards.timed("plan"):
            count = len(packer.packed.down)
            parts = -(-count // at_once(self.shards.expert_record()))
            groups = [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
            self._running[layer] = self.shards.checkpoint.hand([self._job(layer, experts) for experts in groups])

    def _job(self, layer: int, experts: range) -> Job:
        boxes, as_bytes = self.shards.expert_boxes(layer, experts)
        packer, record = self.packers[layer], self.shards.expert_record()

        def put(data: torch.Tensor) -> None:
            packer.put(experts.start, *record.gate_up_down(data))

        def convert(_: torch.Tensor) -> None:
            packer.put(experts.start, *record.gate_up_down(self.shards.expert_bytes(boxes)))

        return (boxes, len(experts) * record.size, put) if as_bytes else ((), 0, convert)

    def finish(self, loaded: Callable[[int], None]) -> None:
        """Waits, and calls `loaded` with each layer when all of its is read. ValueError as of `Packer.check`, with the
        layer."""
        for layer, filling in self._running.items():
            with self.shards.timed("wait"):
                filling.wait()
            loaded(layer)
        with self.shards.timed("drain"):
            for layer, packer in self.packers.items():
                try:
                    packer.check()
                except ValueError as error:
                    raise ValueError(f"model.layers.{layer}.mlp.experts: {error}") from None
