"""QAD in several processes: two processes, failures in the middle, and what they leave behind."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mimo_qat.qat import train
from mimo_qat.qat.config import QatConfig
from tests.qat.test_qat import config as six_steps

ROOT = Path(__file__).parents[2]


def config(folder: Path, out: str, **changes) -> QatConfig:
    return six_steps(folder, **{"output_dir": str(folder / out), "max_steps": 4, "eval_steps": 4} | changes)


def launch(configuration: QatConfig, processes: int) -> None:
    file = Path(configuration.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(asdict(configuration)))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    # What `accelerate launch` starts: it hands several processes of one machine to torchrun.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "mimo_qat.qat.train", "--config", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_does(learnable):
    """Half the micro-batches each: the same global batches, gradients that are summed in another order."""
    launch(config(learnable, "one"), 1)
    launch(config(learnable, "two", gradient_accumulation_steps=1), 2)
    one, two = (curve(learnable / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert b["kl"] == pytest.approx(a["kl"], rel=5e-3) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)
    assert one[-1]["eval_kl"] == pytest.approx(two[-1]["eval_kl"], rel=1e-2)
    masters = [load_file(learnable / n / "checkpoints/step-000004/masters.safetensors") for n in ("one", "two")]
    for name, master in masters[0].items():
        # Adam's first steps move every weight by about the rate; a gradient near zero may flip its sign.
        assert (master - masters[1][name]).abs().max() < 4 * 2 * 3e-4, name
        assert (master - masters[1][name]).abs().mean() < 3e-5, name


def test_the_same_state_is_the_same_file_from_one_and_from_two(learnable):
    """A finished run is resumed and exported again, by one process and by two."""
    launch(config(learnable, "run"), 1)
    first = (learnable / "run/model.safetensors").read_bytes()
    (learnable / "run/model.safetensors").unlink()
    state = learnable / "run/checkpoints/step-000004/state.json"
    launch(config(learnable, "run"), 1)
    assert (learnable / "run/model.safetensors").read_bytes() == first
    state.write_text(state.read_text().replace('"gradient_accumulation_steps": 2', '"gradient_accumulation_steps": 1'))
    launch(config(learnable, "run", gradient_accumulation_steps=1), 2)
    assert (learnable / "run/model.safetensors").read_bytes() == first


def test_a_gradient_that_is_not_finite_names_step_and_tensor(learnable, monkeypatch):
    trainer = train.Trainer(config(learnable, "nan"))
    engine = trainer.engine
    original, poisoned = engine.gradient_norm, list(engine.masters)[3]

    def gradient_norm():
        if trainer.step == 2:
            engine.masters[poisoned].grad[0, 0, 0] = float("nan")
        return original()

    monkeypatch.setattr(engine, "gradient_norm", gradient_norm)
    with pytest.raises(ValueError, match=f"step 3: the gradient of {poisoned} is not finite"):
        train.run(trainer)
    saved = masters_of(learnable / "nan/checkpoints/step-000002")
    assert len(saved) == 6 and all(torch.isfinite(m).all() for m in saved.values())


def test_a_full_disk_keeps_the_previous_checkpoint(learnable, monkeypatch):
    real = state.save_file

    def save(tensors, path, metadata):
        if "step-000004" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(state, "save_file", save)
    with pytest.raises(OSError, match="No space left"):
        train.main(config(learnable, "full"))
    folder = learnable / "full/checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    report = train.main(config(learnable, "full"))
    assert report["steps"] == 4 and len(masters_of(folder / "step-000004")) == 6
