"""scripts/gpu_check.sh with a stand-in for Python."""

import os
import subprocess
from pathlib import Path

import pytest

from mimo_runtime.cli import main

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_gpu_check_runs_each_step_once_and_tells_what_failed(tmp_path, capsys):
    """A stand-in for Python again; flags of the benches must be ours, and test files must be there."""
    calls, out = tmp_path / "calls", tmp_path / "out"
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"""#!/usr/bin/env bash
printf '%s\\x1f' "$@" >> {calls}; echo >> {calls}
echo "said $2"; case "$*" in *test_linear*) exit 1 ;; esac
"""
    )
    stand_in.chmod(0o755)
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), str(out), "100"]
    environment = os.environ | {"PYTHON": str(stand_in), "GPUS": "8"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert first.returncode == 1 and "failed test-linear: said pytest" in first.stdout, first.stdout + first.stderr
    seen = [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]
    for call in seen:
        files = [word for word in call if word.startswith(("tests/", "scripts/"))]
        assert all((SCRIPTS.parent / file).is_file() for file in files), call
        if "bench" in call and "mimo_runtime" in call:
            with pytest.raises(SystemExit, match="0"):
                main(["bench", *call[call.index("bench") + 1 :], "--print_config"])
    tested = {word for call in seen for word in call}
    assert tested >= {f"tests/gpu/{path.name}" for path in (SCRIPTS.parent / "tests/gpu").glob("test_*.py")}
    printed = capsys.readouterr().out
    assert "uniform_routing: true" in printed and "synthetic: pro" in printed
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1 and len(calls.read_text().splitlines()) == len(seen) + 1  # the failed one alone
