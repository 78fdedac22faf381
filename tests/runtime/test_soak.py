"""scripts/soak.py on a tiny model: one process, two of them, and what counts as growth."""

import importlib.util
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def soak():
    spec = importlib.util.spec_from_file_location("soak", ROOT / "scripts/soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(tmp_path, config: dict, rounds: int) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(config))
    common = ["--synthetic", str(tmp_path / "config.json"), "--device=cpu", "--dtype=float32", "--max_len=128"]
    return [*common, f"--rounds={rounds}"]


def test_one_process(soak, tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["soak.py", *flags(tmp_path, tiny_config, 60)])
    assert soak.main() == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 60 <= found["rounds"] < 120 and found["checksums_equal"] and found["seconds"] > 0
    assert found["sequences_like_plain"] == found["sequences"] >= 3
    assert set(found["growth_bytes"]) == {"host"} and len(found["samples"]) == 2
    assert 6 <= found["samples"][0][0] < found["samples"][1][0] == found["rounds"]


def test_growth_is_noticed(soak, tiny_config, tmp_path, capsys, monkeypatch):
    """A leak on the host above the allocator's own pages, and any on a GPU."""
    assert soak.grown({"host": 9 << 20, "gpu_allocated": 512, "gpu_reserved": 0}) == ["host", "gpu_allocated"]
    assert soak.grown({"host": 1 << 20, "gpu_allocated": -512, "gpu_reserved": 0}) == []
    kept, measured = [], soak.memory

    def leaky(device):
        pages = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # an allocator might have some left
        pages.write(b"x" * len(pages))
        kept.append(pages)
        return measured(device)

    monkeypatch.setattr(soak, "memory", leaky)
    monkeypatch.setattr("sys.argv", ["soak.py", *flags(tmp_path, tiny_config, 60)])
    assert soak.main() == 1
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert not found["ok"] and found["grown"] == ["host"] and found["growth_bytes"]["host"] > 60 << 20


def test_two_processes_compare_every_round(tiny_config, tmp_path):
    paths = os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "runtime"))
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "scripts/soak.py")]
    environment = kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command += flags(tmp_path, tiny_config, 200)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["ok"] and found["rounds"] >= 200 and found["checksums_equal"]
    assert found["sequences_like_plain"] == found["sequences"] and found["conditions"]["ranks"] == 2


def test_growth_is_measured_between_two_samples(soak, tiny_config, tmp_path, capsys, monkeypatch):
    """Also where the first sequence plays all the rounds that were asked for: one sample says nothing."""
    monkeypatch.setattr("sys.argv", ["soak.py", *flags(tmp_path, tiny_config, 1)])
    assert soak.main() == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["sequences"] == 2 and len(found["samples"]) == 2 and found["rounds"] > found["samples"][0][0] > 0
