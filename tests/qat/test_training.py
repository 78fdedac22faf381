"""Drafter training beyond one loss: stages, averaged weights, the target's rows, packed data, warm starts."""

import json
import time
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from mimo_qat.checkpoint.reader import read_drafter
from mimo_qat.checkpoint.writer import write_drafter
from mimo_qat.data import PackConfig
from mimo_qat.data import main as pack_rows
from mimo_qat.distill.blocks import make_blocks
from mimo_qat.distill.evaluate import greedy
from mimo_qat.distill.objective import Objective, metrics
from mimo_qat.distill.optim import MasterOptimizer
from mimo_qat.distill.start import new_drafter, warm_start
from mimo_qat.distill.train import Distiller, distill, load_data, target_rows, whole
from mimo_qat.models.compiled import use_training_kernels
from mimo_qat.models.dflash_files import load_drafter, save_drafter
from tests.qat.conftest import character_tokenizer
from tests.qat.test_distill import HEAD, PROMPT, SIZE, no_rows, packed_rows, settings


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


def distiller(model, tmp_path, rows=None, held_out=None, **changes):
    config = settings(tmp_path, **changes)
    return Distiller(config, model, new_drafter(config, model, 511), rows or packed_rows(), held_out or no_rows())


# --- stages ------------------------------------------------------------------------------------------------------


def test_the_last_steps_take_the_finishing_loss(tmp_path):
    config = settings(tmp_path, loss="dpace", finish_loss="e2e-tv", finish_ratio=0.25, max_steps=8)
    assert [config.objective(step).loss for step in range(8)] == ["dpace"] * 6 + ["e2e-tv"] * 2
    assert config.needs_target() and not settings(tmp_path, finish_ratio=1.0).needs_target()
    assert settings(tmp_path, selector_weight=0.7).objective(0) == Objective("ce", None, 0.7)
    with pytest.raises(ValueError, match="finish_ratio"):
        settings(tmp_path, finish_ratio=1.5)
    with pytest.raises(ValueError, match="logging_steps is 0"):
        settings(tmp_path, logging_steps=0)
    with pytest.raises(ValueError, match="cache_taps keeps it; choose one"):
        settings(tmp_path, cuda_graphs=True, cache_taps=True)


def test_a_cpu_replays_no_graph(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU"):
        distiller(tiny_model, tmp_path, cuda_graphs=True)


def test_a_graph_has_one_shape_and_the_last_rows_of_an_evaluation_are_launched(tiny_model, tmp_path, monkeypatch):
    """Rows that are no multiple of a batch: their last one alone would be copied into all rows of the graph."""
    made = []

    class Graph:
        def __init__(self, function, inputs):
            self.function, self.shape = function, inputs[0].shape
            made.append(self)

        def __call__(self, *inputs):
            assert inputs[0].shape == self.shape
            return self.function(*inputs)

    monkeypatch.setattr("mimo_qat.distill.train.Graph", Graph)
    run = distiller(tiny_model, tmp_path, packed_rows(5), per_device_train_batch_size=2)
    expected = run.target_states(run.rows)[0]
    run.config = replace(run.config, cuda_graphs=True)
    for start in (4, 0, 2, 4):  # as an evaluation may come first
        some = {name: values[start : start + 2] for name, values in run.rows.items()}
        assert (run.target_states(some)[0] - expected[start : start + 2]).abs().max() < 1e-4
    assert [graph.shape[0] for graph in made] == [2]


@pytest.mark.parametrize("finish", ["tv", "e2e-tv"])
def test_the_finishing_loss_falls(tiny_model, tmp_path, finish):
    run = distiller(
        tiny_model, tmp_path, packed_rows(2), max_steps=60, logging_steps=5, learning_rate=3e-3, loss="ce",
        finish_loss=finish, finish_ratio=0.5, optimizer="muon", **HEAD,
    )  # fmt: skip
    run.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and losses[5] < losses[0] and losses[-1] < losses[6]


def test_target_rows_predict_the_labels(tiny_model, tmp_path):
    """On the target's own greedy text its head says the label on the row of each slot; one row off it does not."""
    answer = greedy(tiny_model, PROMPT, 30)
    ids = torch.tensor([[*PROMPT, *answer], [*PROMPT, *answer]])
    supervised = (torch.arange(ids.shape[1]) >= len(PROMPT)).long().repeat(2, 1)
    batch = {"input_ids": ids, "loss_mask": supervised, "doc_ids": torch.zeros_like(ids)}
    batch["position_ids"] = torch.arange(ids.shape[1]).repeat(2, 1)
    blocks = make_blocks(batch, SIZE, 12, torch.Generator().manual_seed(0))
    run = distiller(tiny_model, tmp_path, loss="tv")
    _, final = run.target_states(batch)
    picks = tiny_model.lm_head(target_rows(final, blocks)).argmax(-1)
    assert blocks.supervised.sum() > 50
    assert torch.equal(picks[blocks.supervised], blocks.labels[blocks.supervised])
    shifted = tiny_model.lm_head(target_rows(final.roll(1, 1), blocks)).argmax(-1)
    assert not torch.equal(shifted[blocks.supervised], blocks.labels[blocks.supervised])


def test_packed_documents_are_apart_for_the_target(tiny_model, tmp_path):
    """The same document alone and behind another: the same taps and the same final states."""
    run = distiller(tiny_model, tmp_path, loss="tv")
    alone = torch.randint(0, 500, (1, 9), generator=torch.Generator().manual_seed(1))
    other = torch.randint(0, 500, (1, 5), generator=torch.Generator().manual_seed(2))
    positions, zeros = torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.long)
    single = run.target_states({"input_ids": alone, "doc_ids": zeros, "position_ids": positions})
    both = {
        "input_ids": torch.cat((other, alone), 1),
        "doc_ids": torch.tensor([[0] * 5 + [1] * 9]),
        "position_ids": torch.cat((positions[:, :5], positions), 1),
    }
    for one, packed in zip(single, run.target_states(both), strict=True):
        assert (one - packed[:, 5:]).abs().max() < 1e-4 and one.std() > 0.01


# --- averaged weights --------------------------------------------------------------------------------------------


def test_averaged_weights_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = MasterOptimizer(model, "adamw", ema_decay=0.5)
    average = 1.0
    for step in range(1, 12):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.accumulate()
        optimizer.step(lr=0.1, denominator=torch.tensor(1.0))
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * model.weight.item()
    own = model.weight.item()
    with optimizer.averaged():
        assert abs(model.weight.item() - average) < 1e-6 and abs(average - own) > 0.05
    assert model.weight.item() == own


def test_the_averaged_weights_are_evaluated_and_exported(tiny_model, tmp_path):
    config = settings(tmp_path, ema_decay=0.9, learning_rate=3e-3, bf16=True)
    tiny_model.bfloat16()
    drafter = new_drafter(config, tiny_model, 511)
    rows = packed_rows(2)
    document = distill(config, tiny_model, drafter, rows, rows, [], [])
    exported = load_drafter(tmp_path)
    assert not torch.equal(exported.fc.weight, drafter.fc.weight)  # the drafter has its own weights back
    run = Distiller(settings(tmp_path / "again", bf16=True), tiny_model, exported.float(), rows, rows)
    assert run.teacher_forced()["eval_loss"] == document["eval_loss"]


# --- batches -----------------------------------------------------------------------------------------------------


def test_rows_of_padding_complete_a_batch_and_count_for_nothing(tiny_model, tmp_path):
    rows = packed_rows(3)
    padded = whole(rows, 5)
    assert all(v.shape[0] == 5 for v in padded.values()) and (padded["doc_ids"][3:] == -1).all()
    run = distiller(tiny_model, tmp_path, num_anchors=64, **HEAD)
    results = []
    for batch in (rows, padded):
        moved, blocks = run.blocks(batch, "x")
        results.append(run.forward(moved, blocks, run.target_states(moved), Objective("ce")).vector())
    assert torch.allclose(*results, rtol=1e-5)


def test_a_packed_file_gives_the_same_rows(tmp_path):
    folder = tmp_path / "model"
    character_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    lines = [{"text": f"document {i} " + "abc " * (i % 5)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    packed = tmp_path / "rows.safetensors"
    source = {"model": str(folder), "dataset_name": str(tmp_path / "rows.jsonl"), "max_length": 32, "held_out": 0.2}
    pack_rows(PackConfig(**source, output=str(packed)))
    common = {"eval_fraction": 0.2, "max_length": 32, "seed": 0}
    loaded = [
        load_data(settings(tmp_path, data=str(data), **common), character_tokenizer())
        for data in (packed, tmp_path / "rows.jsonl")
    ]
    for part in (0, 1):
        assert all(torch.equal(v, loaded[1][part][n]) for n, v in loaded[0][part].items())
    assert loaded[0][2:] == loaded[1][2:]
    with pytest.raises(ValueError, match="rows of 32 tokens, max_length is 64"):
        load_data(settings(tmp_path, data=str(packed), max_length=64), character_tokenizer())
    with pytest.raises(ValueError, match="no prompts to decode"):
        load_data(settings(tmp_path, data=str(packed), eval_prompts=2), character_tokenizer())


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, tmp_path):
    run = distiller(tiny_model, tmp_path, save_steps=2)
    with torch.no_grad():
        run.optimizer.masters["fc.weight"].fill_(float("nan"))
        run.drafter.fc.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        run.run()
    assert not run.checkpoint_path.exists()


def test_log_lines_have_their_timing(tiny_model, tmp_path, monkeypatch):
    """Evaluations and checkpoints between two lines are not part of a step."""
    run = distiller(tiny_model, tmp_path, held_out=packed_rows(2), logging_steps=4, eval_steps=3, save_steps=3)
    evaluate = run.teacher_forced

    spent, clock = [0.0], time.perf_counter

    def slow():
        spent[0] += 1000
        return evaluate()

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + spent[0])
    monkeypatch.setattr(run, "teacher_forced", slow)
    run.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "seconds_per_step" in line]
    assert [line["step"] for line in lines] == [3, 4, 6, 8] and [line["step"] for line in timed] == [4, 8]
    for line in timed:
        assert line["seconds_per_step"] < 100
        tokens = 2 * 32 / line["seconds_per_step"]  # two rows of 32 tokens a step
        assert abs(line["tokens_per_s"] - tokens) < 0.1 * tokens
        assert {"loss", "prefix_length", "candidate_recall", "grad_norm", "learning_rate"} <= line.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_waits_for_the_device(tiny_model, tmp_path, compiled):
    run = distiller(
        tiny_model.bfloat16(), tmp_path, packed_rows(6, 128), use_cpu=False, bf16=True, optimizer="muon", loss="dpace",
        finish_loss="tv", finish_ratio=0.5, ema_decay=0.9, compile=compiled, max_length=128, num_anchors=32,
        sliding_window=100, **HEAD,
    )  # fmt: skip
    for _ in range(2):
        run.train_step()  # compiles, allocates
    run.step = 5
    run.train_step()  # the finishing loss
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run.step in (2, 5):
            run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics(run.window)["loss"] > 0


def test_a_target_decodes_as_before_training(tiny_model, tmp_path):
    ids = torch.tensor([PROMPT])
    before = tiny_model(ids).logits
    run = distiller(tiny_model, tmp_path)
    use_training_kernels(tiny_model)  # compiles where it is called first, which is nowhere here
    assert "forward" in vars(tiny_model.model.norm)
    run.close()
    assert not any("forward" in vars(module) for module in tiny_model.modules())
    assert (tiny_model(ids).logits - before).abs().max() < 1e-5


# --- warm starts -------------------------------------------------------------------------------------------------


def published(model, tmp_path, **changes):
    """A trained drafter's folder for the tiny target; its codebooks are not zero."""
    config = settings(tmp_path, **changes)
    drafter = new_drafter(config, model, 511)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return save_drafter(drafter, tmp_path / "published")


def same_drafts(model, first, second):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        taps = torch.cat([states[i + 1] for i in first.config.target_layer_ids], -1)
        noise = model.get_input_embeddings()(torch.full((1, SIZE), 5))
        rows = [d.eval()(noise, taps).last_hidden_state for d in (first, second)]
        logits = [model.lm_head(r[:, 1:]) for r in rows]
        drafts = [
            d.draft_tokens(r[:, 1:], u, torch.tensor([5]))
            for d, r, u in zip((first, second), rows, logits, strict=True)
        ]
    return torch.equal(*rows) and torch.equal(*drafts)


def test_a_plain_drafter_starts_one_with_a_head_as_it_was(tiny_model, tmp_path):
    folder = published(tiny_model, tmp_path)
    drafter, counts = warm_start(folder, settings(tmp_path, **HEAD), tiny_model)
    assert counts == {"copied": 4 + 12, "extended": 0, "added": 4 + 3}
    assert drafter.candidate_selector.top_k == 4 and drafter.layers[0].mlp_conv is not None
    assert same_drafts(tiny_model, load_drafter(folder, torch.float32), drafter)
    wide, _ = warm_start(folder, settings(tmp_path, block_size=16, **HEAD), tiny_model)
    assert wide.config.block_size == wide.config.published()["dflash_config"]["block_size"] == 16
    run = Distiller(settings(tmp_path, block_size=16, **HEAD), tiny_model, wide, packed_rows(), no_rows())
    run.train_step()
    assert metrics(run.window)["loss"] > 0


def test_a_head_is_kept_and_a_different_one_refused(tiny_model, tmp_path):
    folder = published(tiny_model, tmp_path, **HEAD)
    kept, counts = warm_start(folder, settings(tmp_path), tiny_model)  # the configuration asks for none
    assert counts == {"copied": 4 + 12 + 4 + 3, "extended": 0, "added": 0}
    assert same_drafts(tiny_model, load_drafter(folder, torch.float32), kept)
    with pytest.raises(ValueError, match="selector_rank is 16"):
        warm_start(folder, settings(tmp_path, selector_rank=16, selector_top_k=4), tiny_model)


def test_a_published_folder_with_fewer_rows_and_a_trailing_comma(tiny_model, tmp_path):
    """As one release has it: a vocabulary smaller than the target's, no causality key, and JSON that is none."""
    folder = published(tiny_model, tmp_path, **HEAD)
    values, tensors, mask = read_drafter(folder)
    small = {n: t[:500].clone() if n.endswith("_codebook") else t for n, t in tensors.items()}
    mask_id = {"mask_token_id": 499, "dflash_config": values["dflash_config"] | {"mask_token_id": 499}}
    write_drafter(folder, values | mask_id | {"vocab_size": 500}, small, mask)
    values = json.loads((folder / "config.json").read_text())
    del values["is_causal"], values["dflash_config"]["causal"]
    (folder / "config.json").write_text(json.dumps(values)[:-1] + ",}")
    with pytest.warns(UserWarning, match="trailing comma"):
        drafter, counts = warm_start(folder, settings(tmp_path), tiny_model)
    assert counts["extended"] == 2 and counts["added"] == 0
    assert drafter.config.vocab_size == 512 and drafter.config.is_causal is False
    for name, parameter in drafter.named_parameters():
        if name == "mask_embedding":
            assert torch.equal(parameter, mask.float())
            continue
        assert torch.equal(parameter[: len(small[name])], small[name].float()), name
    assert (drafter.candidate_selector.successor_codebook[500:] == 0).all()
    assert drafter.candidate_selector.predecessor_codebook[500:].std() > 0.01
    plain = {n: t for n, t in small.items() if "conv" not in n and "selector" not in n}
    head = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    inner = {k: v for k, v in values["dflash_config"].items() if k not in head}
    write_drafter(tmp_path / "plain", values | {"dflash_config": inner}, plain, mask)
    _, counts = warm_start(tmp_path / "plain", settings(tmp_path, **HEAD), tiny_model)
    assert counts == {"copied": 16, "extended": 0, "added": 7}


def test_a_tensor_that_does_not_fit_and_another_targets_drafter_are_refused(tiny_model, tmp_path, edit_json):
    folder = published(tiny_model, tmp_path)
    edit_json(folder / "config.json", {"num_target_layers": 5})
    with pytest.raises(ValueError, match="num_target_layers is 5, the target's 4"):
        warm_start(folder, settings(tmp_path), tiny_model)
    edit_json(folder / "config.json", {"num_target_layers": 4})
    weights = folder / "dflash_draft_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"extra.weight": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"extra\.weight|index"):
        warm_start(folder, settings(tmp_path), tiny_model)
