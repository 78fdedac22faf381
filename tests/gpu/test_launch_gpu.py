"""QAD on two GPUs by `accelerate launch` and the recipes: one process, DDP, FSDP2 with both engines, ZeRO-2, ZeRO-3.

One launch a way (tests/qat/launched.py) trains, resumes in a second trainer, and exports the state of the first way.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.qat.conftest import learnable  # noqa: F401
from tests.qat.test_launch import DRIVER, RECIPES, ROOT, config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

# name: (recipe, changes of the configuration); the first gives the state that all export
WAYS = {
    "single": ("single", {"gradient_accumulation_steps": 2}),
    "single-bf16": ("single", {"gradient_accumulation_steps": 2}),
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2-hook": ("fsdp2", {"engine": "hook"}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
}


def launch(folder: Path, name: str) -> dict:
    recipe, changes = WAYS[name]
    configuration = config(folder, name, **{"gradient_accumulation_steps": 1} | changes)
    report, job = folder / f"{name}.report.json", folder / f"{name}.job.json"
    reference = None if name == "single" else str(folder / "single/checkpoints")
    job.write_text(
        json.dumps(
            {
                "config": asdict(configuration),
                "reference": reference,
                "report": str(report),
                "faults": False,
                "rounded": name == "single-bf16",
            }
        )
    )
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "4"}
    # cuBLAS keeps its order of summation only with a workspace of its own.
    environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_VISIBLE_DEVICES": "0" if recipe == "single" else "0,1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{recipe}.yaml")]
    command += [] if recipe == "single" else ["--main_process_port", "0"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(DRIVER), str(job)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{name}: {(done.stdout + done.stderr)[-6000:]}"
    return json.loads(report.read_text()) | {"wall_s": time.monotonic() - began}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def test_every_way_learns_the_same_exports_the_same_bytes_and_resumes(learnable):  # noqa: F811
    ways = [name for name in WAYS if not name.startswith("zero") or importlib.util.find_spec("deepspeed")]
    reports, failures = {}, {}
    print(f"\n{'':12}{'KL 1':>10}{'KL 4':>10}{'norm 4':>10}{'flips 4':>9}{'eval KL':>10}{'same state':>14}"
          f"{'trained':>14}{'resumed':>14}{'peak MB':>9}{'wall s':>8}")  # fmt: skip
    for name in ways:
        try:
            reports[name] = r = launch(learnable, name)
        except (AssertionError, subprocess.TimeoutExpired) as error:  # the table of the others is still wanted
            failures[name] = str(error)
            print(f"{name:12}failed: {failures[name]}", flush=True)
            continue
        same = digest(learnable / ("single" if name == "single" else f"{name}-same"))
        ended, resumed = digest(learnable / name), digest(learnable / f"{name}-resumed")
        r |= {"same": same, "ended": ended, "resumed": resumed}
        first, last = r["steps"][0], r["steps"][3]
        print(f"{name:12}{first['kl']:10.6f}{last['kl']:10.6f}{last['grad_norm']:10.6f}{last['flips']:9d}"
              f"{r['trained']['eval_kl']:10.6f}{same:>14}{ended:>14}{resumed:>14}{r['peak_mb']:9.0f}{r['wall_s']:8.1f}",
              flush=True)  # fmt: skip
    assert not failures, failures.keys()
    for name, way in reports.items():
        one = reports["single-bf16" if name in ("fsdp2", "single-bf16") else "single"]  # FSDP2 sums gradients in BF16
        assert way["processes"] == (1 if name.startswith("single") else 2)
        for a, b in zip(one["steps"][:4], way["steps"][:4], strict=True):
            assert a["tokens"] == b["tokens"] and b["kl"] == pytest.approx(a["kl"], rel=2e-2), name
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=4e-2), name
        assert way["ptq"]["eval_kl"] == pytest.approx(one["ptq"]["eval_kl"], rel=1e-2), name
        assert way["trained"]["eval_kl"] == pytest.approx(one["trained"]["eval_kl"], rel=3e-2), name
        assert way["same"] == one["same"], f"{name} exports the same state as other bytes"
        assert way["resumed"] == way["ended"], f"{name} ends elsewhere when it is resumed"
    if len(ways) < len(WAYS):
        pytest.skip("deepspeed is not installed; DDP and FSDP2 passed, ZeRO-2 and ZeRO-3 did not run")
