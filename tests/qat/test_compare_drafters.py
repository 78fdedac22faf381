"""scripts/compare_drafters.py: rows by hand, a run on the CPU, and the peers' forwards where they are installed."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimo_qat import data
from mimo_qat.checkpoint.reader import load_model
from mimo_qat.distill.blocks import blocks_at
from mimo_qat.distill.train import draft_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_drafters.py"
ARGUMENTS = {
    "steps": 5,
    "warm_up": 1,
    "batch": 4,
    "single_batch": 6,
    "single_length": 24,
    "anchors": 24,
    "num_taps": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_drafters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_drafters"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compare_drafters"]


@pytest.fixture
def packed(tmp_path):
    """12 training rows and 4 held-out rows of 32 tokens: documents of 18 and 10 tokens, four positions of padding."""
    documents = torch.tensor([0] * 18 + [1] * 10 + [-1] * 4)
    tensors = {}
    for part, rows in (("train", 12), ("held_out", 4)):
        generator = torch.Generator().manual_seed(rows)
        tensors[f"{part}.input_ids"] = torch.randint(0, 500, (rows, 32), generator=generator, dtype=torch.int32)
        tensors[f"{part}.loss_mask"] = (documents >= 0).to(torch.uint8).expand(rows, 32).clone()
        tensors[f"{part}.doc_ids"] = documents.short().expand(rows, 32).clone()
    save_file(tensors, tmp_path / "packed.safetensors")
    return tmp_path / "packed.safetensors"


def compare(script, monkeypatch, folder, packed, *arms):
    """The runs of the script's document at block size 4."""
    out = folder.parent / "compared.json"
    arguments = ["--model", folder, "--data", packed, "--out", out, "--block_sizes", 4, "--arms", *arms]
    arguments += [item for name, value in ARGUMENTS.items() for item in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["compare_drafters.py", *map(str, arguments)])
    script.main()
    return json.loads(out.read_text())["runs"]


def task_of(script, folder, rows, layout="packed", optimizer="adamw"):
    """A task over `rows` in float32 with mask token 511."""
    options = argparse.Namespace(
        **ARGUMENTS, model=str(folder), data="", scratch=str(folder), length=rows["input_ids"].shape[1]
    )
    options.num_draft_layers, options.learning_rate, options.compile, options.cuda_graphs = 2, 1e-3, False, False
    config = script.distill_config(options, 4, layout, optimizer)
    target = load_model(folder, dtype=torch.float32, device="cpu").eval().requires_grad_(False)
    return script.Task(target, rows, script.start_drafter(config, target, 511), config)


def test_single_documents_by_hand(script):
    rows = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 0], [11, 12, 13, 14, 0, 0, 0]]),
        "loss_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0, 0]]),
        "doc_ids": torch.tensor([[0, 0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1, -1]]),
    }
    found = script.single_documents(rows, 3)  # the second row has no two supervised neighbours
    assert found["input_ids"].tolist() == [[5, 6, 7], [9, 10, 0]]
    assert found["loss_mask"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert found["doc_ids"].tolist() == [[0, 0, 0], [0, 0, -1]]
    assert found["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]


def test_our_arms_run_and_an_absent_peer_is_a_result(script, monkeypatch, bf16_folder, packed):
    monkeypatch.setitem(sys.modules, "specforge", None)
    runs = compare(script, monkeypatch, bf16_folder.path, packed, "ours_adamw", "ours_muon", "specforge")
    assert len(runs) == 6
    for layout, tokens, rows in (("packed", 4 * 28, 4), ("single", 6 * 14, 6)):
        adamw, muon = runs[f"b4/{layout}/ours_adamw"], runs[f"b4/{layout}/ours_muon"]
        assert "error" not in adamw and "error" not in muon
        assert adamw["tokens_a_step"] == tokens and adamw["rows"] == rows and adamw["blocks_a_step"] == 24
        assert adamw["tokens_per_s"] == pytest.approx(tokens / adamw["step_seconds"])
        assert adamw["loss"][0] == muon["loss"][0] and adamw["loss"][1:] != muon["loss"][1:]
        assert "ModuleNotFoundError" in runs[f"b4/{layout}/specforge"]["error"]


def test_the_judge_reads_the_trained_weights(script, bf16_folder, packed):
    """On our own arm it says what the trainer that holds them says."""
    rows, _ = data.load_packed(packed)
    task = task_of(script, bf16_folder.path, rows)
    arm = script.Ours(task)
    before = arm.run.teacher_forced()
    for step in range(3):
        arm.step(step)
    fresh = script.start_drafter(task.config, task.target, 511)
    told = script.judge(task.target, fresh, arm.weights(), rows, task.config)
    assert told == arm.run.teacher_forced() != before


def forwards(script, monkeypatch, folder, rows, anchors):
    """(blocks at the same `anchors` in every row, {arm: hidden rows [B, N, b-1, D]}, speculators' supervised slots) of
    all three models with the same weights, float32."""
    pytest.importorskip("specforge")
    pytest.importorskip("speculators")
    from speculators.models.dflash import core

    task = task_of(script, folder, rows)
    batch = task.batch(0)
    count, length = batch["input_ids"].shape
    anchors = torch.tensor(anchors).expand(count, -1)
    blocks = blocks_at(batch, anchors, torch.ones_like(anchors, dtype=torch.bool), 4)
    taps = task.states(batch, task.drafter.config.target_layer_ids)
    hidden = {"ours": draft_rows(task.drafter, task.target.get_input_embeddings(), batch["input_ids"], blocks, taps)}

    theirs = script.SpecForge(task).model
    monkeypatch.setattr(theirs, "_sample_anchor_positions", lambda *_: (blocks.anchors, blocks.valid))
    hidden["specforge"] = theirs._forward_draft_blocks(batch["input_ids"], taps, batch["loss_mask"])[2]

    flat = (blocks.anchors + length * torch.arange(count)[:, None]).flatten()
    monkeypatch.setattr(core, "select_anchors", lambda *_: (flat, blocks.valid.flatten()))
    arm = script.Speculators(task)
    hidden["speculators"], _, _, supervised, _ = arm.model._backbone_forward(**arm.inputs(batch), max_anchors=len(flat))
    for name in ("specforge", "speculators"):
        hidden[name] = hidden[name].view(count, -1, 4, hidden[name].shape[-1])[:, :, 1:]
    return blocks, hidden, supervised.view(count, -1, 4)[..., 1:].bool()


@torch.no_grad()
def test_one_document_a_row_is_the_same_function_in_all_three(script, monkeypatch, bf16_folder, packed):
    rows, _ = data.load_packed(packed)
    single = script.single_documents(rows, 24)
    blocks, hidden, supervised = forwards(script, monkeypatch, bf16_folder.path, single, [0, 1, 5, 7, 8])
    torch.testing.assert_close(hidden["specforge"], hidden["ours"], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(hidden["speculators"], hidden["ours"], atol=2e-5, rtol=2e-5)
    assert torch.equal(supervised, blocks.supervised)


@torch.no_grad()
def test_what_packed_rows_do_to_the_peers(script, monkeypatch, bf16_folder, packed):
    """SpecForge reads across documents. speculators does not, but is trained on tokens of the next document."""
    rows, _ = data.load_packed(packed)
    blocks, hidden, supervised = forwards(script, monkeypatch, bf16_folder.path, rows, [3, 9, 16, 17, 19, 24])
    apart = (hidden["specforge"] - hidden["ours"]).abs().amax(dim=(2, 3))  # [B, N]; document 1 begins at 18
    assert apart[:, :4].max() < 2e-5 and apart[:, 4:].min() > 1e-3
    torch.testing.assert_close(hidden["speculators"], hidden["ours"], atol=2e-5, rtol=2e-5)
    assert blocks.supervised[0].sum(-1).tolist() == [3, 3, 1, 0, 3, 3]
    assert supervised[0].sum(-1).tolist() == [3, 3, 3, 3, 3, 3]
