"""The study and its report, end to end on a tiny model: figures come out under their names and agree."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mimo_qat import data

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name):
    if str(SCRIPTS) not in sys.path:  # as where a script is run
        sys.path.append(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_shares_of_a_study_make_one_report(learnable, monkeypatch, capsys):
    packed = learnable / "packed.safetensors"
    source = {"model": str(learnable / "model"), "dataset_name": str(learnable / "rows.jsonl")}
    data.main(data.PackConfig(**source, output=str(packed), max_length=64))
    monkeypatch.setattr(data, "load_packed", data.load_packed)  # the study caches it
    shares = {"a": "^qad short$|rceil", "b": "^ce short$|^qad long"}
    for share, arms in shares.items():
        command = ["qad_study.py", "--teacher", learnable / "model", "--data", packed, "--work", learnable / share]
        command += ["--arms", arms, "--tiny", "--batch", 4, "--max_length", 64, "--eval_rows", 8, "--long_steps", 3]
        monkeypatch.setattr(sys, "argv", [str(c) for c in command])
        with pytest.raises(SystemExit, match="0"):
            script("qad_study").main()
    files = [str(learnable / share / "study.json") for share in shares]
    monkeypatch.setattr(sys, "argv", ["qad_report.py", *files, "--out", str(learnable / "qad")])
    capsys.readouterr()
    script("qad_report").main()
    printed = capsys.readouterr().out
    records = {r["name"]: r for r in json.loads((learnable / "qad.json").read_text())}
    for name in ("qad short", "ce short", "qad long", "exported like ModelOpt", "RTN floor", "FP8 block"):
        assert records[f"kl {name}"]["value"] >= 0 and f"| {name} |" in printed
    assert records["kl reference"]["value"] == 0
    commands = {name: records[name]["command"] for name in ("kl qad short", "kl ce short", "kl qad long")}
    assert all(("'^qad short" in command) == (name == "kl qad short") for name, command in commands.items()), commands
    best = records["kl_gap_closed_best"]
    gaps = {n.removeprefix("kl "): r["conditions"]["gap_closed"] for n, r in records.items() if n.startswith("kl ")}
    trained = {n: gaps[n] for n in ("qad short", "ce short", "qad long", "qad short rceil")}
    assert best["value"] == max(trained.values()) == trained[best["conditions"]["run"]]
    assert gaps["RTN even"] == 0
    assert "Not measured: qad short floor (not run)" in printed
    assert (learnable / "b" / "qad-long/config.json").is_file()
    wrong = json.loads(Path(files[1]).read_text())
    wrong["rows"]["RTN even"]["kl_mean"] *= 2
    Path(files[1]).write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="two teachers"):
        script("qad_report").join(files)
