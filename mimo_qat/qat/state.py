"""Checkpoints of a training state that processes share: every process writes what it holds, any number may read it.

A checkpoint is a folder with state.json and one safetensors file a writing process. A file holds spans: parts of the
flattened masters and Adam moments, each with the place where it begins. Readers look for the spans that overlap what
they hold, so it does not matter whether a row, a rank of FSDP2 or a partition of DeepSpeed wrote them.

Why not torch.distributed.checkpoint or DeepSpeed's files: both unpickle, neither reads the other's, and a span is one
slice of a memory-mapped file.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from mimo_qat.provenance import write_json
from mimo_qat.qat.snap import Span


def save(folder: Path, spans: dict[str, Span], document: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes `folder` whole or not at all; every process calls it, those without `spans` write nothing.

    OSError on every process when one of them could not write: what was there before stays. Older checkpoints beside
    `folder` go after it is there.
    """
    work, rank = folder.with_name(f".{folder.name}.tmp"), accelerator.process_index
    error: OSError | None = None
    if accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        spans = {name: span for name, span in spans.items() if span[0].numel()}
        if spans:
            begins = json.dumps({name: begin for name, (_, begin) in spans.items()})
            tensors = {name: tensor.contiguous() for name, (tensor, _) in spans.items()}
            save_file(tensors, work / f"part-{rank:05d}.safetensors", metadata={"begin": begins})
        if accelerator.is_main_process:
            write_json(work / "state.json", document)
    except Exception as raised:  # a full disk, say. safetensors raises errors of its own
        error = raised if isinstance(raised, OSError) else OSError(str(raised))
    failed = torch.tensor(int(error is not None), device=accelerator.device)
    if int(accelerator.reduce(failed, "sum")):
        if accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        accelerator.wait_for_everyone()
        raise error or OSError(f"{folder}: another process could not write its part; the checkpoint before it stays")
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
        for other in complete(folder.parent):
            if other != folder:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def load(folder: Path, spans: dict[str, Span]) -> None:
    """Fills `spans` from a checkpoint. ValueError where a span is not covered, or a weight is not of this model."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(p, "pt")) for p in sorted(folder.glob("part-*.safetensors"))]
        begins = [json.loads(file.metadata()["begin"]) for file in files]
        odd = {name for known in begins for name in known} ^ spans.keys()
        if odd:
            raise ValueError(f"{folder} does not match the model at {min(odd)}; it belongs to another model or `train`")
        for name, (tensor, begin) in spans.items():
            missing = tensor.numel()
            for part, at in _overlaps(zip(files, begins, strict=True), name, begin, begin + tensor.numel()):
                tensor[at : at + len(part)].copy_(part)
                missing -= len(part)
            if missing:
                raise ValueError(f"{folder} lacks {missing} values of {name}; it belongs to another model")


def _overlaps(files: Any, name: str, begin: int, end: int) -> Iterator[Span]:
    """(values, place in [begin, end) where they belong) of every file that has some."""
    for file, begins in files:
        if name in begins:
            stored, offset = file.get_slice(name), begins[name]
            first, last = max(begin, offset), min(end, offset + stored.get_shape()[0])
            if first < last:
                yield stored[first - offset : last - offset], first - begin
