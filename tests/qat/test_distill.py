"""Distillation: denominators, optimizer, taps, real decoding, resume after a kill. The losses: test_objective.py."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from transformers import GenerationConfig

from mimo_qat.cli import VERBS
from mimo_qat.commands import run as run_verb
from mimo_qat.data import load_generated
from mimo_qat.distill import evaluate as decode
from mimo_qat.distill.config import DistillConfig
from mimo_qat.distill.objective import metrics
from mimo_qat.distill.optim import MasterOptimizer, learning_rate_factor
from mimo_qat.distill.start import new_drafter, tapped_layers
from mimo_qat.distill.taps import Taps
from mimo_qat.distill.train import Distiller, distill
from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
from mimo_qat.models.dflash_files import load_drafter
from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM

SIZE = 4
HEAD = {"conv_kernel_size": 2, "selector_rank": 8, "selector_top_k": 4}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bit-equality across processes needs one order of summation
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next test may want another device


def settings(tmp_path, **changes):
    values = {
        "target": "tiny",
        "output_dir": str(tmp_path),
        "data": "rows",
        "num_draft_layers": 1,
        "block_size": SIZE,
        "num_taps": 3,
        "intermediate_size": 128,
        "sliding_window": 64,
        "mask_token_id": 511,
        "max_length": 32,
        "num_anchors": 8,
        "per_device_train_batch_size": 2,
        "max_steps": 8,
        "logging_steps": 2,
        "save_steps": 0,
        "eval_prompts": 0,
        "bf16": False,
        "use_cpu": True,
    }
    return DistillConfig(**values | changes)


def packed_rows(count=6, length=32, seed=5):
    g = torch.Generator().manual_seed(seed)
    loss_mask = torch.ones(count, length, dtype=torch.long)
    loss_mask[:, :5] = 0
    return {
        "input_ids": torch.randint(0, 500, (count, length), generator=g),
        "loss_mask": loss_mask,
        "doc_ids": torch.zeros(count, length, dtype=torch.long),
        "position_ids": torch.arange(length).repeat(count, 1),
    }


def no_rows():
    return {name: values[:0] for name, values in packed_rows().items()}


# --- denominators ------------------------------------------------------------------------------------------------


def test_padding_and_micro_batches_do_not_change_the_loss_or_the_step(tiny_model, tmp_path):
    rows = packed_rows(2)
    rows["loss_mask"][1, :20] = 0  # the two rows weigh differently
    wide = {name: F.pad(v, (0, 9), value=-1 if name == "doc_ids" else 0) for name, v in rows.items()}
    weights = []
    for data, batch, accumulate in ((rows, 2, 1), (rows, 1, 2), (wide, 2, 1)):
        config = settings(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, num_anchors=64
        )
        run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), data, no_rows())
        run.train_step()  # 64 anchors take every valid position, so the draw does not matter
        moments = run.optimizer.optimizers[0].state_dict()["state"]  # after one step: 0.1 * the divided gradient
        weights.append((metrics(run.window)["loss"], [m["exp_avg"] for m in moments.values()]))
    for loss, gradients in weights[1:]:
        assert math.isclose(loss, weights[0][0], rel_tol=1e-6)
        for got, expected in zip(gradients, weights[0][1], strict=True):
            assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


# --- optimizer ---------------------------------------------------------------------------------------------------


def test_masters_keep_updates_that_bfloat16_would_lose():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = MasterOptimizer(model, "adamw")
    model.bfloat16()
    for _ in range(20):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.accumulate()
        optimizer.step(lr=1e-4, denominator=torch.tensor(1.0))
    assert abs(optimizer.masters["weight"].item() - 0.998) < 1e-5
    assert model.weight.item() == torch.tensor(0.998).bfloat16().item() != 1.0


def test_step_divides_by_the_denominator_then_clips():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = MasterOptimizer(model, "adamw")
    for _ in range(2):
        model.weight.grad = torch.tensor([[30.0, 40.0]])
        optimizer.accumulate()
    assert model.weight.grad is None
    norm = optimizer.step(0.0, denominator=torch.tensor(10.0), max_grad_norm=1.0)
    assert math.isclose(norm.item(), 10.0, rel_tol=1e-6)
    assert torch.allclose(optimizer.optimizers[0].state_dict()["state"][0]["exp_avg"], torch.tensor([[0.06, 0.08]]))
    unclipped = MasterOptimizer(model, "adamw")
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    unclipped.accumulate()
    unclipped.step(0.0, denominator=torch.tensor(10.0), max_grad_norm=0.0)
    assert torch.allclose(unclipped.optimizers[0].state_dict()["state"][0]["exp_avg"], torch.tensor([[0.3, 0.4]]))


def test_muon_takes_matrices_and_leaves_norms_sinks_and_the_mask_vector(tiny_model, tmp_path):
    config = settings(tmp_path, **HEAD)
    optimizer = MasterOptimizer(new_drafter(config, tiny_model, 511), "muon")
    adamw, muon = ([id(p) for g in o.param_groups for p in g["params"]] for o in optimizer.optimizers)
    names = {id(m): n for n, m in optimizer.masters.items()}
    assert {names[i].split(".")[-2] for i in muon} == {
        "fc", *(f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")),
        "kernel_projection", "hidden_projection",
    }  # fmt: skip
    assert {
        "mask_embedding", "layers.0.self_attn.attention_sink_bias", "norm.weight", "layers.0.mlp_conv.base_kernel",
        "candidate_selector.predecessor_codebook", "candidate_selector.successor_codebook",
    } <= {names[i] for i in adamw}  # fmt: skip
    assert len(adamw) + len(muon) == len(names)


def test_schedules_by_hand():
    def rates(kind):
        return [round(learning_rate_factor(kind, s, 10, 0.2, 0.5, 0.1), 4) for s in range(10)]

    assert rates("wsd") == [0.3333, 0.6667, 1.0, 1.0, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28]
    assert rates("constant") == [0.3333, 0.6667] + [1.0] * 8
    assert rates("cosine")[2] == 1.0 and rates("cosine")[6] == 0.55
    with pytest.raises(ValueError, match="linear"):
        learning_rate_factor("linear", 5, 10, 0.0, 0.5, 0.0)  # type: ignore[arg-type]


# --- taps --------------------------------------------------------------------------------------------------------


def test_taps_are_layer_outputs_before_the_final_norm(tiny_model):
    ids = torch.arange(7)[None]
    with torch.no_grad(), Taps(tiny_model, [3, 0]) as taps:
        out = tiny_model(ids, output_hidden_states=True)
        got = taps.take()
    assert torch.equal(got, torch.cat((out.hidden_states[4], out.hidden_states[1]), -1))
    last = got[..., :96]
    assert torch.equal(tiny_model.lm_head(tiny_model.model.norm(last)), out.logits)
    assert not tiny_model.model.layers[3]._forward_hooks
    with pytest.raises(ValueError, match="holds 4"):
        Taps(tiny_model, [4])


def test_taps_are_spread_over_the_full_attention_layers(tiny_model, tmp_path):
    assert tiny_model.config.hybrid_layer_pattern == [0, 1, 1, 0]
    assert tapped_layers(settings(tmp_path, num_taps=2), tiny_model.config) == [0, 3]
    every = tapped_layers(settings(tmp_path, num_taps=4), tiny_model.config)
    assert every == [0, 1, 2, 3]  # fewer full-attention layers than taps
    assert tapped_layers(settings(tmp_path, num_taps=1), tiny_model.config) == [2]
    assert tapped_layers(settings(tmp_path, target_layer_ids=[2, 1]), tiny_model.config) == [2, 1]
    with pytest.raises(ValueError, match="num_taps is 5"):
        tapped_layers(settings(tmp_path, num_taps=5), tiny_model.config)


# --- decoding ----------------------------------------------------------------------------------------------------


def random_drafter(model, tmp_path, **changes):
    return new_drafter(settings(tmp_path, **changes), model, 511).eval()


PROMPT = [17, 3, 99, 200, 41, 7]


@pytest.mark.parametrize("window, head", [(64, {}), (6, {}), (6, HEAD)], ids=str)
def test_a_random_drafter_changes_no_token_and_accepts_nothing(tiny_model, tmp_path, window, head):
    drafter = random_drafter(tiny_model, tmp_path, sliding_window=window, **head)
    prompts = [PROMPT, [5], list(range(40, 70))]  # a prompt of one token, and one longer than the windows
    result = decode.evaluate(tiny_model, drafter, prompts, 24, compare_greedy=True)
    assert result["equal_to_greedy"] == 3
    assert 1.0 <= result["acceptance_length"] < 1.3
    assert result["tokens"] == 72 and result["cap"] == SIZE and len(result["survival"]) == SIZE - 1


@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "head"])
def test_transformers_generates_the_same_tokens_with_the_drafter(tiny_model, tmp_path, head):
    """A selector is not asked there; the drafter still works, as plain DFlash with convolutions."""
    drafter = random_drafter(tiny_model, tmp_path, sliding_window=6, **head)
    ids = torch.tensor([PROMPT])
    plain = tiny_model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    options = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0, speculation_type="dflash")
    assert torch.equal(tiny_model.generate(ids, generation_config=options, assistant_model=drafter), plain)


def test_end_of_sequence_inside_a_block_and_a_limit_inside_a_block(tiny_model, tmp_path):
    drafter = random_drafter(tiny_model, tmp_path)
    tokens = decode.greedy(tiny_model, PROMPT, 12)
    end = tokens[6]
    cut = tokens[: tokens.index(end) + 1]
    assert decode.speculate(tiny_model, drafter, PROMPT, 12, [end]).tokens == cut
    for limit in (1, 2, 5):
        assert decode.speculate(tiny_model, drafter, PROMPT, limit).tokens == tokens[:limit]


class Oracle:
    """Stands in for a drafter: right in the first `hits` slots of a round, wrong after; `hits` cycles."""

    def __init__(self, drafter, model, text, hits):
        self.config, self.text, self.hits, self.draft_tokens = drafter.config, text, hits, drafter.draft_tokens
        self.rows, self.committed, self.rounds = model.lm_head.weight, 0, 0

    def __call__(self, noise_embeds, context, past_key_values):
        for layer in range(self.config.num_hidden_layers):
            kept = torch.zeros(1, 1, context.shape[1] + SIZE, 1)
            past_key_values.update(kept, kept, layer)
        self.committed += context.shape[1]  # the anchor is the token after the committed context
        true = self.text[self.committed + 1 : self.committed + SIZE]
        hits = self.hits[self.rounds % len(self.hits)]
        self.rounds += 1
        ids = torch.tensor([0, *(t if k < hits else (t + 1) % 512 for k, t in enumerate(true))])
        return SimpleNamespace(last_hidden_state=self.rows[ids][None])  # a head row scores highest with itself


@pytest.mark.parametrize("hits", [[0], [1], [2], [3], [3, 0, 2, 1, 1, 3]])
def test_rollback_after_every_number_of_accepted_drafts(tiny_model, tmp_path, hits):
    """With forced acceptance the target's cache, rolling windows included, must continue as if nothing was tried."""
    text = [*PROMPT, *decode.greedy(tiny_model, PROMPT, 40 + SIZE)]
    oracle = Oracle(random_drafter(tiny_model, tmp_path), tiny_model, text, hits)
    out = decode.speculate(tiny_model, oracle, PROMPT, 40)
    assert out.tokens == text[len(PROMPT) : len(PROMPT) + 40]
    assert out.rounds == [hits[i % len(hits)] + 1 for i in range(len(out.rounds))]
    assert sum(out.rounds) >= 39 - SIZE


def test_sampling_with_equality_acceptance_is_the_targets_distribution(tiny_config, tmp_path):
    """Two tokens at temperature 1 from a vocabulary of 6: joint frequencies against exact probabilities."""
    torch.manual_seed(0)
    small = {"vocab_size": 6, "num_hidden_layers": 1, "hybrid_layer_pattern": [0], "moe_layer_freq": [0]}
    model = MiMoV2ForCausalLM(MiMoV2Config(**tiny_config | small)).eval()
    config = settings(tmp_path, num_taps=1, block_size=2, intermediate_size=16)
    drafter = new_drafter(config, model, 5).eval()
    prompt, draws = [1, 2, 3], 1000
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        second = model(torch.tensor([[*prompt, t] for t in range(6)])).logits[:, -1].softmax(-1)
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(6, 6)
    accepted = 0
    for _ in range(draws):
        out = decode.speculate(model, drafter, prompt, 3, temperature=1.0, generator=generator)
        counts[out.tokens[0], out.tokens[1]] += 1
        accepted += out.rounds[0] == 2
    expected = draws * first[:, None] * second
    assert expected.min() > 5
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 35 + 4 * math.sqrt(2 * 35)  # 35 degrees of freedom
    assert 0 < accepted < draws  # both paths were taken


@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "head"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_one_sequence_learned_by_heart_is_accepted_whole(tiny_model, tmp_path, device, head):
    answer = decode.greedy(tiny_model, PROMPT, 25)
    ids = torch.tensor([[*PROMPT, *answer]])
    rows = {
        "input_ids": ids,
        "loss_mask": (torch.arange(ids.shape[1]) >= len(PROMPT)).long()[None],
        "doc_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
    }
    config = settings(
        tmp_path, max_steps=150, learning_rate=3e-3, num_anchors=64, per_device_train_batch_size=1, logging_steps=10,
        eval_prompts=1, eval_max_new_tokens=25, cache_taps=True, use_cpu=device == "cpu", **head,
    )  # fmt: skip
    out = distill(config, tiny_model, new_drafter(config, tiny_model, 511), rows, no_rows(), [PROMPT], [])
    assert out["accuracy"] == 1.0
    assert out["decoding"]["acceptance_length"] == SIZE, out
    assert out["decoding"]["survival"] == [1.0] * (SIZE - 1)


# --- the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_in_bfloat16(tiny_model, tmp_path, optimizer):
    config = settings(tmp_path, bf16=True, optimizer=optimizer, max_steps=30, learning_rate=3e-3, logging_steps=10)
    run = Distiller(config, tiny_model.bfloat16(), new_drafter(config, tiny_model, 511), packed_rows(2), no_rows())
    run.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(p.dtype == torch.bfloat16 for p in run.drafter.parameters())
    for name, parameter in run.drafter.named_parameters():
        assert torch.equal(parameter, run.optimizer.masters[name].bfloat16()), name


def test_an_untrained_drafter_is_unsure_and_not_wrong_with_confidence(tiny_model, tmp_path):
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(20.0)  # logits of a random direction would have a deviation near 10
    config = settings(tmp_path)
    run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), packed_rows(), packed_rows())
    assert abs(run.teacher_forced()["eval_loss"] - math.log(512) - 0.5) < 0.3  # log V + variance / 2


def test_gradients_reach_every_parameter_and_none_of_the_target(tiny_model, tmp_path):
    config = settings(tmp_path)
    run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), packed_rows(), no_rows())
    before = {n: p.clone() for n, p in run.drafter.named_parameters()}
    run.train_step()
    for name, parameter in run.drafter.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in tiny_model.parameters())


def test_a_batch_without_anchors_is_harmless(tiny_model, tmp_path):
    rows = packed_rows(2)
    rows["loss_mask"].zero_()
    config = settings(tmp_path)
    run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), rows, no_rows())
    before = run.drafter.fc.weight.clone()
    assert run.train_step()["grad_norm"] == 0.0 and metrics(run.window)["loss"] == 0.0
    assert torch.equal(run.drafter.fc.weight, before)


def test_batches_are_shuffled_epochs(tiny_model, tmp_path):
    config = settings(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), packed_rows(6), no_rows())
    seen = []
    for run.step in range(3):
        for micro in range(2):
            chosen, batch = run.batch(micro)
            assert torch.equal(batch["input_ids"], run.rows["input_ids"][chosen])
            seen += chosen
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)) and seen[:6] != seen[6:]


def test_cached_taps_are_the_taps(tiny_model, tmp_path):
    config = settings(tmp_path, cache_taps=True)
    run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), packed_rows(), no_rows())
    chosen, batch = run.batch(0)
    (first, _), (again, _) = run.training_states(chosen, batch), run.training_states(chosen, batch)
    assert torch.equal(first, again) and (first - run.target_states(batch)[0]).abs().max() < 1e-5


KILLED_RUN = """
    import json, os, signal, sys, torch
    torch.set_num_threads(1)
    from test_distill import Distiller, settings, packed_rows, no_rows, new_drafter, MiMoV2Config, MiMoV2ForCausalLM
    given = json.loads(sys.argv[1])
    model = MiMoV2ForCausalLM(MiMoV2Config(**given["model"])).eval()
    model.load_state_dict(torch.load(given["weights"], weights_only=True))
    model.bfloat16()
    config = settings(given["out"], save_steps=3, **given["changes"])
    run = Distiller(config, model, new_drafter(config, model, 511), packed_rows(), no_rows())
    step = run.train_step
    def dying():
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return step()
    run.train_step = dying
    run.run()
"""


def test_a_killed_run_resumes_to_the_same_bytes(tiny_model, tiny_config, tmp_path, request):
    changes = {
        "optimizer": "muon", "bf16": True, "gradient_accumulation_steps": 2, "num_draft_layers": 2, "loss": "dpace",
        "finish_loss": "tv", "finish_ratio": 0.25, "ema_decay": 0.9, **HEAD,
    }  # fmt: skip
    torch.save(tiny_model.state_dict(), tmp_path / "weights.pt")
    tiny_model.bfloat16()

    def run(out, **more):
        config = settings(tmp_path / out, save_steps=3, **changes, **more)
        return distill(config, tiny_model, new_drafter(config, tiny_model, 511), packed_rows(), no_rows(), [], [])

    given = {"model": tiny_config, "changes": changes}
    given |= {"weights": str(tmp_path / "weights.pt"), "out": str(tmp_path / "killed")}
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_RUN), json.dumps(given)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(request.path.parent), *sys.path])},
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] == 3
    resumed = run("killed", resume_from_checkpoint=True)
    whole = run("whole")
    for name in ("dflash_draft_model.safetensors", "mask_embedding.pt", "config.json"):
        a, b = (tmp_path / out / "dflash" / name for out in ("killed", "whole"))
        assert a.read_bytes() == b.read_bytes(), name
    states = [torch.load(tmp_path / o / "checkpoint.pt", weights_only=True) for o in ("killed", "whole")]
    for name, master in states[0]["optimizer"]["masters"].items():
        assert torch.equal(master, states[1]["optimizer"]["masters"][name]), name
        average = states[0]["optimizer"]["averages"][name]
        assert torch.equal(average, states[1]["optimizer"]["averages"][name]), name
        assert not torch.equal(average, master), name
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds_per_step", "tokens_per_s")}
            for line in text.splitlines()
        ]
        for text in ((tmp_path / o / "metrics.jsonl").read_text() for o in ("killed", "whole"))
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [2, 4, 6, 8]
    assert resumed["loss"] == whole["loss"]


def test_resuming_with_another_learning_rate_is_refused(tiny_model, tmp_path):
    config = settings(tmp_path, save_steps=4)
    run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), packed_rows(), no_rows())
    run.run()
    other = replace(config, learning_rate=1e-3, resume_from_checkpoint=True, logging_steps=1)
    run = Distiller(other, tiny_model, new_drafter(other, tiny_model, 511), packed_rows(), no_rows())
    with pytest.raises(ValueError, match="learning_rate"):
        run.run()


def test_resuming_with_another_number_of_processes_is_refused(tiny_model, tmp_path):
    """Another number of rows a step would go on in another place of the data, with another batch."""
    config = settings(tmp_path, save_steps=4)
    run = Distiller(config, tiny_model, new_drafter(config, tiny_model, 511), packed_rows(), no_rows())
    run.run()
    state = torch.load(run.checkpoint_path, weights_only=True)
    torch.save(state | {"rows_a_step": 2 * state["rows_a_step"]}, run.checkpoint_path)
    again = replace(config, resume_from_checkpoint=True)
    run = Distiller(again, tiny_model, new_drafter(again, tiny_model, 511), packed_rows(), no_rows())
    with pytest.raises(ValueError, match=r"rows_a_step.* another output_dir"):
        run.run()


# --- data --------------------------------------------------------------------------------------------------------


def ask(text):
    return [{"role": "user", "content": text}]


def test_generate_data_then_distill_from_folders(bf16_folder, tmp_path, capsys):
    """The two commands as a user runs them, from a checkpoint folder to a drafter that loads."""
    pytest.importorskip("jsonargparse")
    words = {**{f"t{i}": i for i in range(500)}, "<|mask|>": 500}
    tokenizer = {
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "Metaspace", "replacement": " ", "prepend_scheme": "never", "split": False},
        "added_tokens": [],
    }
    template = "{% for m in messages %}{{ m['content'] }} t9 {% endfor %}"
    special = {"chat_template": template, "pad_token": "t0", "eos_token": "t9", "unk_token": "t1"}
    (bf16_folder.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (bf16_folder.path / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    prompts = [{"messages": ask(f"t{20 + i} t{30 + i} t{i + 40}")} for i in range(24)]
    prompts_file = tmp_path / "prompts.jsonl"
    prompts_file.write_text("".join(json.dumps(p) + "\n" for p in prompts))

    def command(verb, **flags):
        code = run_verb("mimo-qat", "", VERBS, [verb, *(f"--{k}={v}" for k, v in flags.items())])
        printed = capsys.readouterr().out
        assert code == 0, printed
        return json.loads(printed.splitlines()[-1])

    target, rows = str(bf16_folder.path), str(tmp_path / "answers")
    asked = {"target": target, "prompts": f"[{prompts_file}]", "max_new_tokens": 12, "temperatures": "[0, 1.0]"}
    answered = command("generate-data", **asked, output_dir=rows, held_out=0.3)
    assert answered["ok"] and answered["prompts"] == 24 and answered["answers"] >= 30
    kept, held = load_generated(rows)
    assert kept and held and not {r["prompt_id"] for r in kept} & {r["prompt_id"] for r in held}
    flags = {k: v for k, v in vars(settings(tmp_path / "out")).items() if v is not None}
    flags |= {"target": target, "data": rows, "eval_prompts": 50, "eval_max_new_tokens": 6}
    del flags["mask_token_id"]
    document = command("distill", **flags)
    assert document["steps"] == 8 and "eval_loss" in document
    assert document["decoding"]["prompts"] == len({r["prompt_id"] for r in held}) < len(held)  # each is decoded once
    drafter = load_drafter(tmp_path / "out")
    used = {i for r in (*kept, *held) for i in r["prompt_ids"] + r["answer_ids"]}
    assert drafter.config.mask_token_id >= 500 and drafter.config.mask_token_id not in used  # a random target says all
    assert drafter.config.target_layer_ids == [0, 1, 3]
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["config"]["data"] == rows


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "recipes" / "distill").glob("*.yaml")), ids=str)
def test_recipes_load(recipe, capsys):
    pytest.importorskip("jsonargparse")
    flags = ["--target=t", "--data=d", "--output_dir=o", "--print_config"]
    with pytest.raises(SystemExit) as done:
        run_verb("mimo-qat", "", VERBS, ["distill", f"--config={recipe}", *flags])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(recipe.read_text())
    assert given and {k: printed[k] for k in given} == given
