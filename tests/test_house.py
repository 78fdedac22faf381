"""The shape of the house: what may import what, which folders are packages, and both ways to run without surprises."""

import ast
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FLOOR = {"mimo_kernels": 1, "mimo_qat": 2, "mimo_runtime": 3}
SOURCES = [p for d in ("kernels/mimo_kernels", "mimo_qat", "runtime/mimo_runtime") for p in (ROOT / d).rglob("*.py")]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_root_folders_are_not_packages():
    """A root package called `kernels` would break `import transformers` where Hugging Face's `kernels` is installed."""
    for folder in ("kernels", "runtime", "recipes", "scripts", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_imports_point_down():
    assert len(SOURCES) > 20
    for path in SOURCES:
        mine = FLOOR[next(part for part in path.parts if part in FLOOR)]
        for name in imports(path):
            assert FLOOR.get(name.split(".")[0], 0) <= mine, f"{path} imports {name}"
        if mine == 3:
            training = ("mimo_qat.qat", "mimo_qat.distill", "mimo_qat.models.modeling", "mimo_qat.data")
            assert not any(name.startswith(training) for name in imports(path)), path


def test_models_are_self_contained():
    """The modeling files travel inside releases, so they may need torch and transformers only."""
    for name in ("configuration_mimo_v2", "modeling_mimo_v2", "modeling_dflash"):
        roots = {i.split(".")[0] for i in imports(ROOT / f"mimo_qat/models/{name}.py")}
        allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | sys.stdlib_module_names
        assert roots <= allowed, (name, roots - allowed)


def run(*command, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment, cwd=ROOT)


@pytest.mark.parametrize("module", ["mimo_qat", "mimo_runtime"])
def test_help_starts_at_once_without_an_install(module):
    began = time.perf_counter()
    done = run(sys.executable, "-S", "-m", module, "--help", PYTHONPATH=".:kernels:runtime")
    assert done.returncode == 0 and "verbs:" in done.stdout, done.stderr  # -S: not even site-packages is needed
    assert time.perf_counter() - began < 2  # about 0.1 s on a quiet machine


def test_transformers_imports_from_the_root_with_hugging_face_kernels_installed(tmp_path):
    """A stand-in for the real package: transformers asks for names that our folder `kernels` does not have."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("REAL = True\n")
    code = "import transformers, kernels; assert kernels.REAL"
    done = run(sys.executable, "-c", code, PYTHONPATH=f".:{tmp_path}")
    assert done.returncode == 0, done.stderr


def test_every_recipe_loads_into_its_configuration():
    from jsonargparse import ArgumentParser

    from mimo_qat.distill.train import DistillConfig
    from mimo_qat.qat.train import QatConfig

    recipes = [*(ROOT / "recipes/qat").glob("*.yaml"), *(ROOT / "recipes/distill").glob("*.yaml")]
    assert len(recipes) >= 4
    for recipe in recipes:
        config = QatConfig if recipe.parent.name == "qat" else DistillConfig
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(config, as_group=False)
        required = {"model": "m", "target": "t", "output_dir": "o", "data": "d"}
        given = [f"--{k}={v}" for k, v in required.items() if k in config.__dataclass_fields__]
        values = parser.parse_args([f"--config={recipe}", *given])
        for key, value in yaml.safe_load(recipe.read_text()).items():
            assert values[key] == value, (recipe, key)


@pytest.mark.slow
def test_the_wheel_works_without_the_source_tree(tmp_path):
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = set(archive.namelist())
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(FLOOR)
    assert "mimo_qat/recipes/qat/demo.yaml" in names
    sources = {f"mimo_kernels/{path.name}" for path in (ROOT / "kernels/mimo_kernels").glob("*.cu")}
    assert sources and sources <= names
    recipe = site / "mimo_qat/recipes/model/mimo-v2.5-pro.json"
    code = "import mimo_kernels.mxfp4, mimo_runtime, mimo_qat; print(mimo_qat.__file__)"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, cwd=tmp_path)
    assert str(site) in done.stdout, done.stderr
    layout = [sys.executable, "-m", "mimo_qat", "layout", str(recipe)]
    done = subprocess.run(layout, capture_output=True, text=True, env=clean, cwd=tmp_path)
    assert '"tensors": 159581' in done.stdout, done.stderr
