"""Every recipe is read by the command that it is for, every model can be built, and what comments claim is the plan."""

import json
import re
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from mimo_qat.checkpoint.layout import parameters, target_tensors
from mimo_qat.cli import VERBS
from mimo_qat.models.experts import expert_parameters, match_report, transposed_experts
from mimo_qat.plan import GIB, PlanConfig, capacity, main, memory, smallest, with_recipe
from mimo_qat.plan_model import meta_model, read_shape, shape_of

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = sorted((RECIPES / "model").glob("*.json"))
LARGE = sorted((RECIPES / "qat").glob("mimo_v2*.yaml"))
# What a recipe says of itself: GPUs, strategy, GiB a GPU, verdict, smallest number of GPUs.
CLAIM = re.compile(r"^# plan: (\d+) GPUs, (\w+): ([\d.]+) GiB a GPU, (fits|does not fit); smallest (\d+|none)$", re.M)


def names(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.name)


@names(sorted(p for kind in ("qat", "distill") for p in (RECIPES / kind).glob("*.yaml")))
def test_recipe_is_read_into_its_configuration(path):
    verb = VERBS[path.parent.name]
    config_class = getattr(import_module(verb.module), verb.config)
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, as_group=False)
    required = [f.name for f in fields(config_class) if f.default is MISSING and f.default_factory is MISSING]
    values = parser.parse_args(["--config", str(path), *(f"--{name}=x" for name in required)])
    config = config_class(**{k: v for k, v in vars(parser.instantiate(values)).items() if k != "config"})
    stated = [line.split(":")[0] for line in path.read_text().splitlines() if re.match(r"[a-z_]+:", line)]
    assert stated and len(stated) == len(set(stated)) and all(hasattr(config, key) for key in stated)


@names(MODELS)
def test_model_is_built_as_planned(path):
    source = json.loads(path.read_text())
    model = meta_model(source)
    assert all(p.is_meta for p in model.parameters())
    shape = shape_of(model, path.stem)
    # The layout, made from the same file by other code, and the model agree on every weight.
    table = target_tensors(source, experts="bf16", spine="bf16", mtp_layers=0)
    buffers = sum(b.numel() for b in model.buffers())
    assert shape.parameters == sum(p.numel() for p in model.parameters()) == parameters(table) - buffers
    found = expert_parameters(model)
    assert len(found) == 2 * sum(source["moe_layer_freq"]) and not transposed_experts(model)
    assert shape.expert_weights == sum(p.numel() for p in found.values())
    assert f"{len(found)} expert parameters matched" in match_report(model)
    assert all(p.dtype == torch.bfloat16 or p.dtype == torch.float32 for p in found.values())


@names(MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_plan_of_a_model_is_positive_and_consistent(path, strategy):
    plan = main(PlanConfig(model=str(path), strategy=strategy, gpus=64))
    sizes = {k: v for k, v in plan["memory"].items() if k not in ("total", "host")}
    assert all(v > 0 for v in sizes.values()) and plan["memory"]["total"] == sum(sizes.values())
    assert plan["fits"] == (plan["memory"]["total"] <= plan["usable"])
    time = plan["time"]
    assert time["step_s"] >= max(time["products_s"], time["communication_s"]) > 0
    assert json.loads(json.dumps(plan)) == plan


def test_the_large_models_have_recipes_for_one_and_eight_nodes():
    assert {p.stem for p in LARGE} == {f"mimo_{m}-{n}gpu" for m in ("v2.5", "v2.5_pro") for n in (8, 64)}


@names(LARGE)
def test_what_a_recipe_claims_is_what_the_plan_says(path, capsys):
    claims = CLAIM.findall(path.read_text())
    assert {strategy for _, strategy, *_ in claims} == {"fsdp2", "zero3"}
    model = str(RECIPES / "model" / (path.stem.rpartition("-")[0].replace("_", "-") + ".json"))
    shape, _ = read_shape(model)
    for gpus, strategy, size, verdict, least in claims:
        assert int(gpus) == int(path.stem.rpartition("-")[2].removesuffix("gpu"))
        config = with_recipe(PlanConfig(model=model, recipe=str(path), gpus=int(gpus), strategy=strategy))
        total = memory(shape, config, config.gpus)["total"]
        assert f"{total / GIB:.0f}" == size
        assert verdict == ("fits" if total <= capacity(config) else "does not fit")
        assert least == str(smallest(shape, config) or "none").lower()
        plan = main(PlanConfig(model=model, recipe=str(path), gpus=int(gpus), strategy=strategy))
        assert plan["time"]["tokens_per_step"] == 2**19
    assert "smallest for" in capsys.readouterr().out
