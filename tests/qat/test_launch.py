"""QAD in several processes on a CPU: DDP, FSDP2 and both engines, failures in the middle, and what they leave behind.

DeepSpeed and CUDA are in tests/gpu/test_launch_gpu.py.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from mimo_kernels import mxfp4
from mimo_qat.models.experts import expert_parameters
from mimo_qat.models.load import save_trained
from mimo_qat.qat import state, train
from mimo_qat.qat.config import QatConfig
from mimo_qat.qat.hook import HookEngine
from mimo_qat.qat.objective import forward_kl
from mimo_qat.qat.snap import SnappedCopy
from tests.qat.conftest import character_tokenizer
from tests.qat.launched import rounded
from tests.qat.test_experts import build
from tests.qat.test_qat import config as six_steps
from tests.qat.test_qat import masters_of

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("launched.py")
RECIPES = ROOT / "recipes/accelerate"


def config(folder: Path, out: str, **changes) -> QatConfig:
    return six_steps(folder, **{"output_dir": str(folder / out), "max_steps": 4, "eval_steps": 4} | changes)


def start(processes: int, *program: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    # What `accelerate launch` starts: it hands several processes of one machine to torchrun.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    log = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *program], env=environment, **log)


def finish(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]


def drive(configuration: QatConfig, processes: int, reference: Path | None = None, faults: bool = False) -> dict:
    """Runs tests/qat/launched.py; its report."""
    report = Path(configuration.output_dir + ".report.json")
    job = {"config": asdict(configuration), "report": str(report), "faults": faults}
    job["reference"] = str(reference) if reference else None
    file = report.with_suffix(".job")
    file.write_text(json.dumps(job))
    finish(start(processes, str(DRIVER), str(file)))
    return json.loads(report.read_text())


def train_module(configuration: QatConfig, processes: int) -> subprocess.Popen:
    file = Path(configuration.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(asdict(configuration)))
    return start(processes, "-m", "mimo_qat.qat.train", "--config", str(file))


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


FSDP2, HOOK, AGAIN = {"sharding": "fsdp2"}, {"engine": "hook"}, {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="ddp"),
        pytest.param(FSDP2, id="fsdp2"),
        pytest.param(FSDP2 | HOOK, id="fsdp2-hook"),
        pytest.param(FSDP2 | AGAIN, id="fsdp2-checkpointing", marks=pytest.mark.slow),
        pytest.param(FSDP2 | HOOK | AGAIN, id="fsdp2-hook-checkpointing", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_does_and_export_the_same_bytes(learnable, monkeypatch, changes):
    """Half the micro-batches each: the same global batches, gradients that are summed in another order.

    FSDP2 rounds the sum to BF16 where the parameters are BF16, and so does then the process that it is compared with.
    """
    if changes.get("sharding") == "fsdp2" and changes.get("engine") != "hook":
        norm = SnappedCopy.gradient_norm
        monkeypatch.setattr(SnappedCopy, "gradient_norm", lambda engine: norm(rounded(engine)))
    train.main(config(learnable, "one", save_steps=4, eval_steps=1))
    one, reference = curve(learnable / "one"), learnable / "one/checkpoints"
    two = drive(config(learnable, "two", gradient_accumulation_steps=1, **changes), 2, reference)
    assert two["processes"] == 2
    for a, b in zip(one, two["steps"][:4], strict=True):
        assert a["tokens"] == b["tokens"] and b["kl"] == pytest.approx(a["kl"], rel=5e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)
        assert b["flips"] == pytest.approx(a["flips"], rel=2e-2)
    assert two["trained"]["eval_kl"] == pytest.approx(one[-1]["eval_kl"], rel=1e-2)
    assert two["codes_changed"] == pytest.approx(one[-1]["codes_changed"], rel=1e-2)
    masters, theirs = (masters_of(learnable / name / "checkpoints/step-000004") for name in ("one", "two"))
    assert theirs.keys() == masters.keys()
    for name, master in masters.items():
        # Adam's first steps move every weight by about the rate; a gradient near zero may flip its sign.
        assert (master - theirs[name]).abs().max() < 4 * 2 * 3e-4, name
        assert (master - theirs[name]).abs().mean() < 3e-5, name
    # The same state is the same file, and a run that was interrupted ends as one that was not.
    for file in ("model.safetensors", "config.json"):
        assert (learnable / "two-same" / file).read_bytes() == (learnable / "one" / file).read_bytes()
        assert (learnable / "two-resumed" / file).read_bytes() == (learnable / "two" / file).read_bytes()
    assert two["steps"][2]["kl"] == two["steps"][4]["kl"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["snapped", "hook"])
def test_shards_of_transposed_experts_with_a_tied_head_are_written_as_by_one(learnable, engine):
    """gpt-oss: blocks run along dimension 1 of every local row, and the head is the embedding."""
    model = build("gpt_oss", tie_word_embeddings=True).to(torch.bfloat16)
    model.tie_weights()
    save_trained(model, character_tokenizer(), learnable / "oss")
    oss = {"model": str(learnable / "oss"), "engine": engine}
    train.main(config(learnable, "one", **oss))
    two = config(learnable, "two", sharding="fsdp2", gradient_accumulation_steps=1, **oss)
    report = drive(two, 2, learnable / "one/checkpoints")
    assert report["steps"][3]["kl"] == pytest.approx(curve(learnable / "one")[3]["kl"], rel=2e-2)
    for file in ("model.safetensors", "config.json"):
        assert (learnable / "two-same" / file).read_bytes() == (learnable / "one" / file).read_bytes()


@pytest.mark.slow
def test_routers_train_in_shards_and_one_process_goes_on_where_two_ended(learnable):
    """Everything but the ends of the model, with balancing: other_parameters, biases and rounding without rule none."""
    settings = {"train": "body", "balance_rate": 1e-3, "ce_weight": 0.5, "save_steps": 4}
    finish(train_module(config(learnable, "two", gradient_accumulation_steps=1, sharding="fsdp2", **settings), 2))
    train.main(config(learnable, "one", **settings))
    one, two = curve(learnable / "one"), curve(learnable / "two")
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-3) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=2e-2
        )
        tokens = [torch.tensor(line["expert_tokens"]) for line in (a, b)]
        assert (tokens[0] - tokens[1]).abs().max() <= 20 and tokens[0].sum() == tokens[1].sum() > 0
    (learnable / "two/model.safetensors").rename(learnable / "two.safetensors")
    train.main(config(learnable, "two", **settings))
    assert (learnable / "two/model.safetensors").read_bytes() == (learnable / "two.safetensors").read_bytes()


@pytest.mark.slow
def test_kill_and_resume_of_shards_ends_with_the_same_bytes(learnable):
    sharded = {"sharding": "fsdp2", "gradient_accumulation_steps": 1, "max_steps": 12, "save_steps": 2}
    process = train_module(config(learnable, "out", **sharded), 2)
    log, deadline = learnable / "out/metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and '"step": 3,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
    for victim in (process, *psutil.Process(process.pid).children(recursive=True)):  # the launcher and both processes
        os.kill(victim.pid, signal.SIGKILL)
    process.communicate()
    assert not (learnable / "out/config.json").exists()
    finish(train_module(config(learnable, "out", **sharded), 2))
    finish(train_module(config(learnable, "whole", **sharded), 2))
    parts = [f"checkpoints/step-000012/part-0000{rank}.safetensors" for rank in (0, 1)]
    for file in ("model.safetensors", *parts):
        assert (learnable / "out" / file).read_bytes() == (learnable / "whole" / file).read_bytes(), file
    assert [line["step"] for line in curve(learnable / "out")] == list(range(1, 13))


def test_a_failure_of_one_process_is_told_by_all_and_keeps_the_checkpoint(learnable):
    report = drive(config(learnable, "faults", gradient_accumulation_steps=1, sharding="fsdp2"), 2, faults=True)
    first, second = report["said"]
    assert "another process could not write its part" in first[0] and "No space left" in second[0]
    for said in report["said"]:
        assert f"step 3: the gradient of {report['poisoned']} is not finite" in said[1]
    folder = learnable / "faults/checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000001"]
    saved = masters_of(folder / "step-000001")
    assert len(saved) == 6 and all(torch.isfinite(m).all() for m in saved.values())


def test_a_gradient_that_is_not_finite_names_step_and_tensor(learnable, monkeypatch):
    trainer = train.Trainer(config(learnable, "nan"))
    engine = trainer.engine
    original, poisoned = engine.gradient_norm, list(engine.masters)[3]

    def gradient_norm():
        if trainer.step == 2:
            engine.masters[poisoned].grad[0, 0, 0] = float("nan")
        return original()

    monkeypatch.setattr(engine, "gradient_norm", gradient_norm)
    with pytest.raises(ValueError, match=f"step 3: the gradient of {poisoned} is not finite"):
        train.run(trainer)
    saved = masters_of(learnable / "nan/checkpoints/step-000002")
    assert len(saved) == 6 and all(torch.isfinite(m).all() for m in saved.values())


def test_a_full_disk_keeps_the_previous_checkpoint(learnable, monkeypatch):
    real = state.save_file

    def save(tensors, path, metadata):
        if "step-000004" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(state, "save_file", save)
    with pytest.raises(OSError, match="No space left"):
        train.main(config(learnable, "full"))
    folder = learnable / "full/checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    report = train.main(config(learnable, "full"))
    assert report["steps"] == 4 and len(masters_of(folder / "step-000004")) == 6


def test_spans_are_read_across_any_borders_and_gaps_are_refused(tmp_path):
    from safetensors.torch import save_file

    values, borders = torch.arange(100.0), [0, 32, 33, 77, 100]
    for i, (begin, end) in enumerate(pairwise(borders)):
        document = json.dumps({"master.w": begin})
        save_file({"master.w": values[begin:end].clone()}, tmp_path / f"part-{i}.safetensors", {"begin": document})
    for begin, end in ((0, 100), (31, 34), (40, 40), (90, 100), (33, 77)):
        read = torch.full((end - begin,), -1.0)
        state.load(tmp_path, {"master.w": (read, begin)})
        assert torch.equal(read, values[begin:end])
    with pytest.raises(ValueError, match=r"does not match the model at master.v"):
        state.load(tmp_path, {"master.w": (read, 0), "master.v": (read, 0)})
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 values of master.w"):
        state.load(tmp_path, {"master.w": (torch.zeros(100), 0)})


@pytest.mark.parametrize("rule", ["even", "mse", None])
def test_the_hook_engine_computes_what_the_snapped_copy_does(tiny_model, rule):
    """Bit for bit, with masters off the grid: student, teacher, and the gradient of the master."""
    import copy

    models = [copy.deepcopy(tiny_model).to(torch.bfloat16).requires_grad_(False) for _ in range(2)]
    for name, param in expert_parameters(models[1]).items():
        param.data = param.data.float()
        assert name in dict(models[1].named_parameters())
    snapped = SnappedCopy(expert_parameters(models[0]), rule)
    hooked = HookEngine(models[1], expert_parameters(models[1]), rule)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (2, 16), generator=generator)
    with torch.no_grad():
        for name in snapped.masters:  # values that BF16 cannot hold, so that quantizing the cast would show
            noise = torch.randn(snapped.masters[name].shape, generator=generator) * 0.01
            snapped.masters[name] += noise
            hooked.masters[name] += noise
    assert snapped.snap() == hooked.snap()
    states, teachers = [], []
    for model, engine in zip(models, (snapped, hooked), strict=True):
        with torch.no_grad(), engine.teacher():
            teachers.append(model.model(ids).last_hidden_state)
        states.append(model.model(ids).last_hidden_state)
        engine.backward(forward_kl(states[-1].flatten(0, 1), teachers[-1].flatten(0, 1), model.lm_head.weight))
    assert torch.equal(*states) and torch.equal(*teachers) and not torch.equal(states[0], teachers[0])
    assert snapped.gradient_norm() == hooked.gradient_norm()
    for name, master in snapped.masters.items():
        assert torch.equal(master.grad, hooked.masters[name].grad), name
        # A BF16 cast before quantizing would give other codes somewhere.
        if rule:
            assert not torch.equal(mxfp4.snap(master.detach(), rule), mxfp4.snap(master.detach().bfloat16(), rule))
    for engine in (snapped, hooked):
        engine.step(1e-3, 1.0)
    assert snapped.snap() == hooked.snap() and snapped.changed_against_ptq() == hooked.changed_against_ptq()
    parameters = dict(models[1].named_parameters())
    for name in snapped.masters:
        assert torch.equal(snapped.whole(name, models[0].state_dict()[name]), hooked.whole(name, parameters[name]))


def test_settings_that_no_engine_follows_are_refused(learnable):
    for changes, words in (
        ({"engine": "hook", "train": "body"}, "hook engine trains FP32 experts alone"),
        ({"engine": "hook", "master_dtype": "bfloat16"}, "hook engine trains FP32 experts alone"),
        ({"sharding": "fsdp2"}, "fsdp2 shards over processes and there is one"),
    ):
        with pytest.raises(ValueError, match=words):
            train.Trainer(config(learnable, "refused", **changes))
    train.main(config(learnable, "rows"))
    with pytest.raises(ValueError, match="made with rows_a_step 8, now 12"):
        train.main(config(learnable, "rows", gradient_accumulation_steps=3))


def test_partitions_of_deepspeed_that_cut_blocks_are_refused():
    zero = pytest.importorskip("mimo_qat.qat.zero", reason="needs deepspeed")
    weights = {"a": torch.nn.Parameter(torch.empty(3, 64)), "b": torch.nn.Parameter(torch.empty(5, 64))}
    zero._refuse_cut_blocks(3, weights, 2)
    zero._refuse_cut_blocks(2, weights, 4)  # 512 weights in one row, 128 each
    with pytest.raises(ValueError, match=r"192/4 weights of a, which cuts MXFP4 blocks of 32; use the FSDP2 recipe"):
        zero._refuse_cut_blocks(3, weights, 4)
    with pytest.raises(ValueError, match="512/3 weights of the experts together"):
        zero._refuse_cut_blocks(2, weights, 3)


@pytest.mark.parametrize("recipe", sorted(p.name for p in RECIPES.glob("*.yaml")))
def test_accelerate_understands_every_recipe(recipe, monkeypatch):
    """The environment that `accelerate launch` would give the processes, made by its own functions."""
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    monkeypatch.setattr(launch, "is_bf16_available", lambda *a, **k: True, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True, raising=False)
    line = ["--config_file", str(RECIPES / recipe), "-m", "mimo_qat.qat.train", "--config", "recipes/qat/demo.yaml"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(line))
    assert args.module and args.training_script == "mimo_qat.qat.train" and args.mixed_precision in (None, "no")
    kind = recipe.removesuffix(".yaml")
    if kind.startswith("zero"):
        args.deepspeed_fields_from_accelerate_config = ""  # launch_command itself adds it
        _, environment = environments.prepare_deepspeed_cmd_env(args)
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == kind[-1]
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    elif kind == "single":
        assert not (args.multi_gpu or args.use_fsdp or args.use_deepspeed)
    else:
        environment = environments.prepare_multi_gpu_env(args)
        assert args.num_processes == 2 and (environment.get("ACCELERATE_USE_FSDP") == "true") == (kind == "fsdp2")
        if kind == "fsdp2":
            assert environment["FSDP_VERSION"] == "2" and environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
            assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
