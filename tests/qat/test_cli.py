"""The command line: YAML == flag == field, one-line errors, exit codes, JSON last."""

import json

import pytest

from mimo_qat.cli import VERBS
from mimo_qat.cli import main as console_script
from mimo_qat.commands import run


def command(*args):
    return run("mimo-qat", "Test.", VERBS, list(map(str, args)))


def test_help_lists_every_verb(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mimo-qat", "--help"])
    assert console_script() == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb}" in printed for verb in VERBS)


def test_every_verb_prints_its_fields_with_help(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            command(verb, "--help")
        assert stop.value.code == 0
        assert "--config" in capsys.readouterr().out


def test_unknown_verb_and_no_verb(capsys):
    assert command("train") == 2
    assert capsys.readouterr().err == f"error: mimo-qat has no verb 'train'; choose from {', '.join(VERBS)}\n"
    assert command() == 2


def test_yaml_key_is_the_flag_and_flags_win(tmp_path, capsys):
    recipe = tmp_path / "qat.yaml"
    recipe.write_text("model: m\noutput_dir: o\nlearning_rate: 1e-6\nmax_steps: 7\n")
    with pytest.raises(SystemExit):
        command("qat", "--config", recipe, "--max_steps", 9, "--print_config")
    printed = capsys.readouterr().out
    assert "learning_rate: 1.0e-06" in printed or "learning_rate: 1e-06" in printed
    assert "max_steps: 9" in printed


def test_unknown_yaml_key_is_one_clear_line(tmp_path, capsys):
    recipe = tmp_path / "qat.yaml"
    recipe.write_text("model: m\noutput_dir: o\nlearnin_rate: 1.0e-6\n")
    with pytest.raises(SystemExit) as stop:
        command("qat", "--config", recipe)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "learnin_rate" in error and "Traceback" not in error


def test_bad_choice_names_the_field(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command("qat", "--model", "m", "--output_dir", "o", "--scale_rule", "ceil")
    assert stop.value.code == 2
    assert "scale_rule" in capsys.readouterr().err


@pytest.mark.parametrize("verb, args", [
    ("qat", ["--model", "MISSING", "--output_dir", "OUT"]),
    ("convert", ["--target", "MISSING", "--out", "OUT"]),
    ("check", ["MISSING"]),
    ("layout", ["MISSING/config.json"]),
    ("distill", ["--target", "MISSING", "--output_dir", "OUT", "--data", "MISSING/rows.jsonl"]),
    ("generate-data", ["--target", "MISSING", "--prompts", "[MISSING/rows.jsonl]", "--output_dir", "OUT"]),
])  # fmt: skip
def test_a_missing_folder_is_one_line_and_a_nonzero_exit(verb, args, tmp_path, capsys):
    args = [a.replace("MISSING", str(tmp_path / "missing")).replace("OUT", str(tmp_path / "out")) for a in args]
    assert command(verb, *args) == 1
    captured = capsys.readouterr()
    lines = [line for line in (captured.err + captured.out).splitlines() if "missing" in line]
    assert lines and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_env_is_one_json_document(capsys):
    assert command("env") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["versions"]["torch"] and document["hardware"]["cores"] >= 1
