"""What the launch tests start in several processes, once a launch: argv[1] is a file with one JSON document.

{"config": QatConfig fields, "reference": a checkpoints folder or null, "report": file to write, "faults": bool}

One launch trains four steps, continues its own second step in a new trainer, and exports the state of `reference`:
    OUT          what an undisturbed run ends with
    OUT-resumed  what the resumed run ends with
    OUT-same     the export of the reference's state
With "rounded" in it gradients are rounded to BF16, as FSDP2 does. With `faults` it provokes two failures on the last
process instead, and reports what every process said.
"""

import errno
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from mimo_qat.provenance import write_json
from mimo_qat.qat import state
from mimo_qat.qat.config import QatConfig
from mimo_qat.qat.snap import SnappedCopy
from mimo_qat.qat.train import Trainer


def rounded(engine: SnappedCopy) -> SnappedCopy:
    """The engine with its gradients rounded to BF16: FSDP2 sums them in the dtype of the parameters."""
    for master in engine.masters.values():
        if master.grad is not None:
            master.grad = master.grad.bfloat16().float()
    return engine


def copied(trainer: Trainer, source: Path, target: Path) -> None:
    if trainer.accelerator.is_main_process:
        shutil.copytree(source, target)
    trainer.accelerator.wait_for_everyone()


def same_state_and_resume(config: QatConfig, reference: str | None) -> dict[str, Any]:
    began, out = time.monotonic(), Path(config.output_dir)
    trainer = Trainer(config)
    ready = time.monotonic()
    ptq, steps = trainer.evaluate(), []
    for _ in range(2):
        steps.append(trainer.train_step())
    trainer.save_checkpoint()
    copied(trainer, out / "checkpoints", Path(f"{out}-resumed") / "checkpoints")
    for _ in range(2):
        steps.append(trainer.train_step())
    trainer.save_checkpoint()
    trained = trainer.evaluate()
    changed = trainer.engine.changed_against_ptq()
    trainer.save_model()

    trainer = Trainer(replace(config, output_dir=f"{out}-resumed"))
    trainer.resume()
    assert trainer.step == 2
    steps += [trainer.train_step() for _ in range(2)]
    trainer.save_model()

    if reference:
        trainer.out = Path(f"{out}-same")
        copied(trainer, Path(reference), trainer.out / "checkpoints")
        trainer.resume()
        trainer.save_model()
    return {
        "processes": trainer.accelerator.num_processes,
        "steps": steps,
        "ptq": ptq,
        "trained": trained,
        "codes_changed": changed,
        "expert_tokens": trainer.expert_tokens(),
        "start_s": ready - began,
        "seconds": time.monotonic() - began,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None,
    }


def faults(config: QatConfig) -> dict[str, Any]:
    """A full disk at the second checkpoint, then a gradient that is not finite, each on the last process alone."""
    trainer = Trainer(config)
    last = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1
    real, said = state.save_file, []

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.train_step()
    trainer.save_checkpoint()
    trainer.train_step()
    state.save_file = full if last else real
    try:
        trainer.save_checkpoint()
    except OSError as error:
        said.append(str(error))
    state.save_file = real
    poisoned = list(trainer.engine.masters)[3]
    original = trainer.engine.gradient_norm

    def gradient_norm():
        if last:
            trainer.engine.masters[poisoned].grad.view(-1)[0] = float("inf")
        return original()

    if trainer.sharding == "zero":  # DeepSpeed's gradients are not the masters'
        trainer.engine.params[poisoned].register_hook(lambda grad: grad * float("inf") if last else grad)
    else:
        trainer.engine.gradient_norm = gradient_norm
    try:
        trainer.train_step()
    except ValueError as error:
        said.append(str(error))
    return {"said": gather_object([said]), "poisoned": poisoned}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = QatConfig(**job["config"])
    if job.get("rounded"):
        norm = SnappedCopy.gradient_norm
        SnappedCopy.gradient_norm = lambda engine: norm(rounded(engine))  # type: ignore[method-assign]
    report = faults(config) if job["faults"] else same_state_and_resume(config, job["reference"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.5)  # gloo: who leaves first must not close connections that the barrier still reads
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
    else:
        rank = 0
    if rank == 0:
        write_json(job["report"], report)


if __name__ == "__main__":
    main()
