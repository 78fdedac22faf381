import shlex
import subprocess
import sys
from types import ModuleType

from mimo_qat.provenance import command_line, with_earlier, write_json


def test_a_recorded_command_can_be_run_again(monkeypatch, tmp_path):
    given = ["generate", "my release", "--prompt", "two words", "--tree_budgets", "[8, 16]"]
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # a console script, not python -m
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mimo-runtime", *given])
    assert shlex.split(command_line()) == ["mimo-runtime", *given]
    (tmp_path / "package").mkdir()
    code = "from mimo_qat.provenance import command_line; print(command_line())"
    for name in ("__main__", "train"):
        (tmp_path / "package" / f"{name}.py").write_text(code)
    for module, said in (("package", "python -m package a"), ("package.train", "python -m package.train a")):
        path = {"PYTHONPATH": f"{tmp_path}:{':'.join(p for p in sys.path if p)}"}
        done = subprocess.run([sys.executable, "-m", module, "a"], capture_output=True, text=True, env=path)
        assert done.stdout.strip() == said, done.stderr


def test_rows_of_an_earlier_commit_stay_and_figures_are_replaced(tmp_path):
    def record(name: str, commit: str) -> dict:
        return {"name": name, "commit": commit}

    old = [record("speed", "a"), record("memory", "a"), record("kl even", "a"), record("kl even", "b")]
    write_json(tmp_path / "old.json", old)
    new = [record("speed", "b"), record("kl even", "b")]
    assert with_earlier(new, str(tmp_path / "old.json"), "kl ") == [*new, old[1], old[2]]
    assert with_earlier(new, None, "kl ") == new
