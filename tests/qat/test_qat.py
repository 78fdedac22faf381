"""Expert QAD on a tiny model: the engine, the objective, a learning run, and kill-and-resume."""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from mimo_kernels import mxfp4
from mimo_qat.checkpoint.reader import Checkpoint, load_model
from mimo_qat.models.experts import TokenCounts, expert_parameters
from mimo_qat.models.load import load_for_training, save_trained
from mimo_qat.qat.objective import agreement, forward_kl
from mimo_qat.qat.snap import SnappedCopy
from mimo_qat.qat.train import QatConfig, Trainer, learning_rate, main

ROOT = Path(__file__).parents[2]


def config(folder, **changes):
    settings = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "dataset_name": str(folder / "rows.jsonl"),
        "max_length": 64,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-4,
        "eval_steps": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "compile": False,
    }
    return QatConfig(**settings | changes)


def masters_of(checkpoint):
    """Name -> flattened float32 master of a checkpoint folder, put together from the spans of all its files."""
    found = {}
    for path in sorted(checkpoint.glob("part-*.safetensors")):
        with safe_open(path, "pt") as file:
            begins = json.loads(file.metadata()["begin"])
            for name in file.keys():  # noqa: SIM118
                if name.startswith("master."):
                    found.setdefault(name.removeprefix("master."), {})[begins[name]] = file.get_tensor(name)
    return {name: torch.cat([spans[begin] for begin in sorted(spans)]) for name, spans in found.items()}


def test_forward_kl_and_its_gradient_against_autograd():
    torch.manual_seed(0)
    student, teacher, head = torch.randn(37, 16, requires_grad=True), torch.randn(37, 16), torch.randn(50, 16)
    expected = F.kl_div(F.linear(student, head).log_softmax(-1), F.linear(teacher, head).softmax(-1), reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected, student)
    loss = forward_kl(student, teacher, head)
    (grad,) = torch.autograd.grad(loss * 0.5, student)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(grad, 0.5 * expected_grad, atol=1e-5)


def test_kl_of_equal_states_is_zero_and_they_agree():
    states, head = torch.randn(9, 16), torch.randn(50, 16)
    assert forward_kl(states, states, head).abs() < 1e-4
    assert agreement(states, states, head) == 9
    assert agreement(states, -states, head) < 9


def test_experts_are_all_found_and_a_miss_is_an_error(tiny_model):
    found = expert_parameters(tiny_model)
    assert len(found) == 6 and sum(p.numel() for p in found.values()) == 3 * 8 * 3 * 64 * 96
    tiny_model.config.moe_layer_freq = [0, 1, 1, 0]
    with pytest.raises(ValueError, match="6 expert parameters matched, but moe_layer_freq says 4"):
        expert_parameters(tiny_model)
    with pytest.raises(ValueError, match="no routed experts matched"):
        expert_parameters(nn.Sequential(nn.Linear(4, 4)))


def test_engine_trains_masters_and_shows_the_model_only_grid_values(tiny_model):
    model = tiny_model.to(torch.bfloat16).requires_grad_(False)
    engine = SnappedCopy(expert_parameters(model))
    name, param = next(iter(engine.params.items()))
    before = engine.masters[name].clone()
    ids = torch.randint(0, 512, (2, 16))
    with torch.no_grad(), engine.teacher():
        teacher = model.model(ids).last_hidden_state.flatten(0, 1)
        assert torch.equal(param, engine.originals[name]) is False  # swapped, so `originals` holds the student now
        assert torch.equal(param.float(), before)
    for _ in range(2):  # two micro-batches add up in float32
        forward_kl(model.model(ids).last_hidden_state.flatten(0, 1), teacher, model.lm_head.weight).backward()
    assert param.grad is None and engine.masters[name].grad.dtype == torch.float32
    with torch.no_grad():
        for master in engine.masters.values():
            master -= 0.05 * master.grad / master.grad.norm()
    flips = engine.snap()
    assert 0 < flips < engine.numel()
    assert torch.equal(param, mxfp4.decode(*mxfp4.encode(engine.masters[name].data)))
    assert engine.changed_against_ptq() > 0


def test_an_engine_ends_with_its_model(tiny_model):
    """Studies make many engines in a process; one that lived on would keep masters and moments on the GPU."""
    model = copy.deepcopy(tiny_model).to(torch.bfloat16).requires_grad_(False)
    engine = SnappedCopy(expert_parameters(model))
    model(torch.randint(0, 512, (1, 8))).logits.float().sum().backward()
    kept = [weakref.ref(t) for t in (engine, *engine.masters.values(), *engine.params.values())]
    del model, engine
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_gradients_of_other_parameters_stay_off(tiny_model):
    model = tiny_model.to(torch.bfloat16).requires_grad_(False)
    engine = SnappedCopy(expert_parameters(model))
    model(torch.randint(0, 512, (1, 8))).logits.float().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(m.grad is not None for m in engine.masters.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eval_steps": 0}, "eval_steps is 0; it must be 1 or more"),
        ({"kl_weight": 0.0}, "nothing would be learned"),
        ({"scale_rule": "none"}, "set ce_weight"),
        ({"engine": "hook", "train": "body"}, "trains FP32 experts alone"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **wrong)


def test_checkpointing_recomputes_the_same_step_and_turns_nothing_else_on(learnable):
    steps = []
    for again in (False, True):
        trainer = Trainer(config(learnable, output_dir=str(learnable / f"out-{again}"), gradient_checkpointing=again))
        passes = []
        for layer in trainer.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        steps.append({k: v for k, v in trainer.train_step().items() if k != "tokens_per_s"})
        # Of each micro-batch: the teacher, the student and, where that is asked for, the student once more. Counted at
        # the start of an MLP, because recomputing stops at the last tensor that is needed.
        micro, layers = trainer.config.gradient_accumulation_steps, len(trainer.model.model.layers)
        assert len(passes) == micro * layers * (3 if again else 2)
        training = {type(m).__name__ for m in trainer.model.modules() if m.training}
        assert training <= {"MiMoV2DecoderLayer", "MiMoV2Model"} and bool(training) == again
    assert steps[0] == steps[1]


def test_float32_model_is_refused(tiny_model):
    with pytest.raises(ValueError, match="load the model in bfloat16"):
        SnappedCopy(expert_parameters(tiny_model))


def test_token_counts_equal_the_routers_choices(tiny_model):
    counts = TokenCounts(tiny_model)
    ids = torch.randint(0, 512, (2, 10))
    with torch.no_grad(), counts.recording():
        tiny_model(ids)
    taken = counts.take()
    assert [sum(layer) for layer in taken] == [2 * 10 * 2] * 3
    assert counts.take() == [[0] * 8] * 3


def test_schedule_by_hand():
    c = QatConfig(model="m", output_dir="o", max_steps=100, learning_rate=1.0, warmup_ratio=0.1, min_learning_rate=0.1)
    assert [learning_rate(c, s) for s in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(c, 55) == pytest.approx(0.55)
    assert learning_rate(c, 99) == pytest.approx(0.1, abs=1e-3)


def test_a_run_lowers_the_held_out_kl_and_saves_what_it_trained(learnable):
    report = main(config(learnable, max_steps=30, learning_rate=1e-3, save_steps=30))
    assert report["kl_qad"] < 0.8 * report["kl_rtn"]
    assert (Path(report["folder"]) / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Forward == file: every saved expert is on the FP4 grid, and is what the masters snap to.
    masters = masters_of(learnable / "out/checkpoints/step-000030")
    saved = Checkpoint(learnable / "out")
    for layer in (1, 2, 3):
        for which, tensor in zip(("gate_up_proj", "down_proj"), saved.experts(layer), strict=True):
            assert torch.equal(tensor, mxfp4.snap(tensor))
            master = masters[f"model.layers.{layer}.mlp.experts.{which}"].view_as(tensor)
            assert torch.equal(tensor, mxfp4.snap(master))
    lines = [json.loads(line) for line in (learnable / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert {"loss", "kl", "flips", "codes_changed", "expert_tokens", "eval_kl"} <= lines[-1].keys()
    # Everything that is not an expert is what it was.
    before, after = (load_model(learnable / d, dtype=torch.bfloat16) for d in ("model", "out"))
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b) == (".experts." not in name), name


def run_until_killed(folder, at_step):
    """Starts the module as a program and kills it -9 once `at_step` is in its log."""
    arguments = [f"--{k}={v}" for k, v in vars(config(folder)).items() if v is not None]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "mimo_qat.qat.train", *arguments]
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "out/metrics.jsonl"
    for _ in range(600):
        if log.exists() and f'"step": {at_step},' in log.read_text():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the run never reached the step")


def test_kill_and_resume_ends_with_the_same_bytes(learnable):
    run_until_killed(learnable, at_step=3)
    assert not (learnable / "out/config.json").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = main(config(learnable))
        undisturbed = main(config(learnable, output_dir=str(learnable / "whole")))
    finally:
        torch.set_num_threads(threads)
    for file in ("model.safetensors", "checkpoints/step-000006/part-00000.safetensors"):
        assert (learnable / "out" / file).read_bytes() == (learnable / "whole" / file).read_bytes(), file
    assert resumed | {"folder": ""} == undisturbed | {"folder": ""}
    steps = [json.loads(line)["step"] for line in (learnable / "out/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_resume_refuses_another_configuration(learnable):
    main(config(learnable, max_steps=2))
    with pytest.raises(ValueError, match=r"made with learning_rate 0.0003, now 1.0"):
        main(config(learnable, max_steps=2, learning_rate=1.0))


def test_short_rows_are_read_until_they_fill_the_steps(learnable):
    """Rows far shorter than a packed row: training and evaluation still get what the data has for them."""
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3000))
    (learnable / "rows.jsonl").write_text(rows)
    trainer = Trainer(config(learnable))
    assert len(trainer.train_rows["input_ids"]) >= 6 * trainer.rows_a_step()
    assert len(trainer.eval_rows["input_ids"]) == 8


def test_a_model_in_a_used_folder_replaces_whole_files_and_leaves_others(learnable):
    folder = learnable / "model"
    model, tokenizer = load_for_training(folder, torch.bfloat16)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/mine.txt").write_text("mine")
    before = (folder / "model.safetensors").stat().st_ino
    save_trained(model, tokenizer, folder)
    assert (folder / "model.safetensors").stat().st_ino != before  # renamed into place, not written over
    assert (folder / "checkpoints/mine.txt").read_text() == "mine" and not (learnable / ".model.tmp").exists()


def test_other_files_beside_the_checkpoints_are_left_alone(learnable):
    (learnable / "out/checkpoints").mkdir(parents=True)
    (learnable / "out/checkpoints/step-notes.txt").write_text("mine")
    main(config(learnable, max_steps=2))
    assert (learnable / "out/checkpoints/step-notes.txt").read_text() == "mine"
    assert (learnable / "out/checkpoints/step-000002/state.json").is_file()


def test_too_little_data_is_one_clear_error(learnable):
    with pytest.raises(ValueError, match="give more data or a smaller batch"):
        main(config(learnable, per_device_train_batch_size=500))
