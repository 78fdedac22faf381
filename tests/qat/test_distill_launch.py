"""Drafter training in two processes: the same run as in one, also where one of them has nothing to learn from."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from mimo_qat.distill.train import main
from tests.qat.test_distill import HEAD, settings

ROOT = Path(__file__).parents[2]


def launch(config):
    """Runs the training in two processes."""
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump({k: v for k, v in asdict(config).items() if v is not None}))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "mimo_qat.distill.train", "--config", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return outcome(config)


def outcome(config):
    """(lines of the log, checkpoint) of a finished run."""
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return lines, torch.load(Path(config.output_dir) / "checkpoint.pt", weights_only=True)


def test_two_processes_learn_what_one_does(learnable):
    """Half the micro-batches each; the second row of some steps has no supervised token at all."""
    rows = [json.loads(line) for line in (learnable / "rows.jsonl").read_text().splitlines()]
    silent = [{"messages": [{"role": "user", "content": "q" * 60}, {"role": "assistant", "content": ""}]}] * 6
    (learnable / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows[:6] + silent)))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    file = learnable / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    common = {
        "target": str(learnable / "model"), "data": str(learnable / "mixed.jsonl"), "max_length": 64, "max_steps": 6,
        "per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 6, "eval_fraction": 0.0, "loss": "dpace",
        "finish_loss": "tv", "finish_ratio": 0.3, "ema_decay": 0.9, **HEAD,
    }  # fmt: skip
    whole = settings(learnable / "one", gradient_accumulation_steps=2, **common)
    main(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    one = outcome(whole)
    halves = settings(learnable / "two", gradient_accumulation_steps=1, **common)
    two = launch(halves)
    assert [line["step"] for line in two[0]] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one[0], two[0], strict=True):
        for name in ("loss", "grad_norm", "prefix_length", "candidate_recall"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    assert len({round(line["loss"], 3) for line in one[0]}) == 6
    for kind in ("masters", "averages"):
        for name, value in one[1]["optimizer"][kind].items():
            assert (value - two[1]["optimizer"][kind][name]).abs().mean() < 1e-6, name
    (learnable / "two/dflash/config.json").unlink()
    assert launch(halves)[0] == two[0]  # the finished run is read again and exported again
    assert (learnable / "two/dflash/config.json").is_file()
