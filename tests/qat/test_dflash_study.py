"""The study of drafters and its report on a tiny target, and the script that runs all studies, with a stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_qat.cli import VERBS
from mimo_qat.commands import run
from mimo_qat.distill.generate import GenerateDataConfig
from mimo_qat.distill.generate import main as generate
from tests.qat.test_qad_study import SCRIPTS, script


@pytest.mark.slow
def test_two_shares_of_a_study_make_one_report(learnable, monkeypatch, capsys):
    prompts = [{"text": f"row {i}: the", "domain": ("code", "chat")[i % 2]} for i in range(80)]
    (learnable / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    answers = {"target": str(learnable / "model"), "prompts": [str(learnable / "prompts.jsonl")], "bf16": False}
    generate(GenerateDataConfig(**answers, output_dir=str(learnable / "answers"), max_new_tokens=24, held_out=0.2))
    for share, arms in {"a": "^plain|adamw", "b": "^best|conv$"}.items():
        command = ["dflash_study.py", "--target", learnable / "model", "--data", learnable / "answers"]
        command += ["--work", learnable / share, "--arms", arms, "--max_length", 64, "--batch", 4, "--anchors", 8]
        command += ["--long_tokens", 4000, "--short_tokens", 800, "--eval_texts", 8]
        monkeypatch.setattr(sys, "argv", [str(c) for c in command])
        with pytest.raises(SystemExit, match="0"):
            script("dflash_study").main()
    files = [str(learnable / share / "study.json") for share in "ab"]
    monkeypatch.setattr(sys, "argv", ["dflash_report.py", *files, "--out", str(learnable / "dflash")])
    capsys.readouterr()
    script("dflash_report").main()
    printed = capsys.readouterr().out
    records = {r["name"]: r for r in json.loads((learnable / "dflash.json").read_text())}
    plain, best, tree = (records[f"al_{n}_code"] for n in ("dflash_b8", "best_chain", "tree"))
    assert "--arms '^plain|adamw'" in plain["command"] and "--arms '^best|conv$'" in best["command"]
    assert 1 <= plain["value"] <= 8 and plain["conditions"]["cap"] == 8
    assert 1 <= best["value"] <= tree["value"] <= 16 and tree["conditions"]["tree_budget"] in (8, 16, 32, 64)
    assert best["conditions"]["tokens"] == plain["conditions"]["tokens"]
    # The same drafter, texts and temperature stand in two tables.
    whole = json.loads(Path(files[0]).read_text())["runs"]["plain b8"]
    assert whole["tables"]["by_domain_and_temperature"]["code T=0.0"]["acceptance_length"] == plain["value"]
    assert "| short b8 adamw |" in printed and "Not measured: short b8 1 layer (not run)" in printed
    assert (learnable / "b" / "best-b16" / "dflash" / "config.json").is_file()


def test_all_studies_run_once_in_two_lanes(tmp_path, capsys):
    """A stand-in for Python writes down its arguments; every command of ours among them must parse."""
    calls, work = tmp_path / "calls", tmp_path / "work"
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"""#!/usr/bin/env bash
printf '%s\\x1f' "$CUDA_VISIBLE_DEVICES" "$@" >> {calls}; echo >> {calls}
case "$*" in *"^qad long"*) mkdir -p {work}/qad-long/qad-long ;; esac
"""
    )
    stand_in.chmod(0o755)
    command = ["bash", str(SCRIPTS / "gpu_study.sh"), str(work), "200"]
    environment = os.environ | {"PYTHON": str(stand_in), "GPUS": "2"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert first.returncode == 0 and "all steps are done" in first.stdout, first.stdout + first.stderr
    seen = [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]
    assert len(seen) == 24 and {call[0] for call in seen} >= {"0", "1"}
    for call in seen:
        if call[1:3] == ["-m", "mimo_qat"]:
            with pytest.raises(SystemExit, match="0"):
                run("mimo-qat", "", VERBS, [*call[3:], "--print_config"])
            assert capsys.readouterr().out, call
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and len(calls.read_text().splitlines()) == 24
    (work / "done" / "peers").unlink()
    stand_in.write_text("#!/usr/bin/env bash\necho out of memory; exit 1\n")
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert failed.returncode == 1 and "not done: peers" in failed.stdout and "out of memory" in failed.stdout
