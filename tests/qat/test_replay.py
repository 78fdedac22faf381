"""Replay against real decoding: the rounds are equal one by one, for chains, at temperature 0 and above, and trees."""

import json

import pytest
import torch

from mimo_qat.cli import VERBS
from mimo_qat.commands import run as run_verb
from mimo_qat.data import write_rows
from mimo_qat.distill import evaluate as decode
from mimo_qat.distill.plots import plot_survival
from mimo_qat.distill.replay import Span, answer_spans, replay, replayed_acceptance, walk_rounds
from mimo_qat.distill.train import DistillConfig, Distiller, new_drafter
from mimo_qat.models.dflash_files import save_drafter
from mimo_qat.models.draft_tree import grow_tree, marginal_candidates

SIZE, NEW = 5, 40
PROMPTS = [[17, 3, 99, 200, 41, 7], [5], list(range(40, 62)), [8, 8, 8], [300, 2]]


def packed(texts: list[tuple[list[int], list[int]]], length: int = 160) -> dict[str, torch.Tensor]:
    """Rows of (prompt, answer) pairs, as many as fit one after the other."""
    from mimo_qat.data import pack

    examples = [{"input_ids": p + t, "loss_mask": [0] * len(p) + [1] * len(t)} for p, t in texts]
    return pack(examples, length, 0)


def train(model, folder, texts, **changes):
    """A drafter that has half learned the texts, so that its rounds have every length."""
    values = {
        "target": "t", "data": "d", "output_dir": str(folder), "num_draft_layers": 1, "block_size": SIZE, "num_taps": 3,
        "intermediate_size": 128, "sliding_window": 12, "mask_token_id": 511, "num_anchors": 64, "max_steps": 70,
        "learning_rate": 3e-3, "logging_steps": 100, "save_steps": 0, "bf16": False, "use_cpu": True,
    }  # fmt: skip
    config = DistillConfig(**values | changes)
    rows = packed(texts)
    run = Distiller(config, model, new_drafter(config, model, 511), rows, {n: v[:0] for n, v in rows.items()})
    run.run()
    return run.drafter.eval()


def sample(model, drafter, prompt, seed, temperature=0.7):
    generator = torch.Generator().manual_seed(seed)
    if drafter is not None:
        return decode.speculate(model, drafter, prompt, NEW, (), temperature, generator)
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < NEW:
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1:]
            tokens += decode.pick(logits, temperature, generator).tolist()
    return decode.Decoded(tokens)


def by_prompt(texts) -> dict:
    return {tuple(t.prompt): t for t in texts}


@pytest.mark.parametrize("ends", [(), (7, 30, 61, 100, 222, 350, 401, 480)], ids=["no end", "ends"])
def test_greedy_rounds_are_those_of_decoding(tiny_model, tmp_path, ends):
    texts = [(p, decode.greedy(tiny_model, p, NEW, ends)) for p in PROMPTS]
    drafter = train(tiny_model, tmp_path, texts)
    found = by_prompt(replay(tiny_model, drafter, packed(texts), ends, chunk_anchors=16))
    lengths = set()
    for prompt, tokens in texts:
        real = decode.speculate(tiny_model, drafter, prompt, NEW, ends)
        assert real.tokens == tokens
        if len(tokens) > 1:
            assert found[tuple(prompt)].rounds["chain"] == real.rounds
            assert found[tuple(prompt)].agreed == len(tokens)
        lengths |= set(real.rounds)
    assert {1, SIZE} <= lengths and len(lengths) > 2


def test_sampled_rounds_are_those_of_decoding_with_the_same_text(tiny_model, tmp_path):
    """Decoding with the drafter gives some sampled text and its rounds; the replay of that text gives those rounds."""
    texts = [(p, sample(tiny_model, None, p, i).tokens) for i, p in enumerate(PROMPTS)]
    drafter = train(tiny_model, tmp_path, texts)
    decoded = {tuple(p): sample(tiny_model, drafter, p, 100 + i, 0.3) for i, p in enumerate(PROMPTS)}
    found = by_prompt(replay(tiny_model, drafter, packed([(list(p), d.tokens) for p, d in decoded.items()])))
    assert {p: t.rounds["chain"] for p, t in found.items()} == {p: d.rounds for p, d in decoded.items()}
    assert all(t.agreed < len(t.tokens) for t in found.values())


def blockwise(model, drafter, text, start):
    """Draft logits [SIZE - 1, V] of the block at `start`, from the drafter's inference call and a fresh context."""
    with torch.no_grad():
        states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        taps = torch.cat([states[i + 1] for i in drafter.config.target_layer_ids], -1)[:, :start]
        anchor = model.get_input_embeddings()(torch.tensor([[text[start]]]))
        hidden = drafter(anchor.expand(-1, SIZE, -1), taps).last_hidden_state
        return model.lm_head(hidden[0, 1:])


def test_trees_and_the_oracle_step_by_step(tiny_model, tmp_path):
    """Every round again, alone: candidates from the inference call, the tree grown for it, and a walk by hand."""
    texts = [(p, decode.greedy(tiny_model, p, NEW)) for p in PROMPTS]
    drafter = train(tiny_model, tmp_path, texts, max_steps=35)
    found = by_prompt(replay(tiny_model, drafter, packed(texts), (), (4, 9, 30)))
    totals = dict.fromkeys((4, 9, 30), 0)
    for prompt, tokens in texts[:3]:
        text, first = prompt + tokens, len(prompt)
        for budget in totals:
            at, rounds = first, []
            while at < len(text) - 1:
                candidates = marginal_candidates(blockwise(tiny_model, drafter, text, at))
                tree = grow_tree(candidates, budget)
                reached, node = 0, 0
                while at + reached + 1 < len(text):
                    matches = [
                        i + 1
                        for i, (t, p) in enumerate(zip(tree.tokens, tree.parents, strict=True))
                        if p == node and t == text[at + reached + 1]
                    ]
                    if not matches:
                        break
                    reached, node = reached + 1, matches[0]
                if at + reached + 1 >= len(text):
                    break
                rounds.append(reached + 1)
                at += reached + 1
            assert found[tuple(prompt)].rounds[f"tree {budget}"] == rounds
            totals[budget] += len(rounds)
    assert totals[30] < totals[9] <= totals[4]
    document = replayed_acceptance(tiny_model, drafter, packed(texts), (), (4, 30))
    assert document["acceptance_length"] < document["tree"]["30"] <= document["oracle_16"] <= SIZE
    assert document["recall_at_1"][0] <= document["recall_at_16"][0] <= 1


def test_figures_equal_those_of_the_decoding_evaluation(tiny_model, tmp_path):
    texts = [(p, decode.greedy(tiny_model, p, NEW)) for p in PROMPTS]
    drafter = train(tiny_model, tmp_path, texts)
    real = decode.evaluate(tiny_model, drafter, PROMPTS, NEW)
    drafter.train()
    got = replayed_acceptance(tiny_model, drafter, packed(texts))
    assert drafter.training and got["texts"] + got["looping"]["texts"] == len(PROMPTS)
    if not got["looping"]["texts"]:
        for name in ("acceptance_length", "survival", "ngram_acceptance_length", "distinct_3", "verifications"):
            assert got[name] == pytest.approx(real[name], abs=2e-4), name
    assert got["cap"] == SIZE and got["target_agreement"] == 1.0 and got["target_entropy"] > 0


def test_rounds_by_hand():
    """Text positions 10..15 of which 10 is the first anchor; drafts are right up to `known`."""
    walk = lambda end, ended, right: walk_rounds(Span(10, end, ended), right.get)  # noqa: E731
    assert walk(16, False, {10: 2, 13: 0, 14: 0}) == [3, 1, 1]
    assert walk(16, False, {10: 2, 13: 2}) == [3]  # both drafts right, the token after them is not known
    assert walk(16, True, {10: 2, 13: 2}) == [3, 2]  # the text ends there
    assert walk(16, True, {10: 4}) == [5] == walk(16, False, {10: 4})
    assert walk(11, True, {}) == []


def test_spans_by_hand():
    row = {
        "input_ids": torch.tensor([1, 2, 3, 9, 4, 5, 6, 7, 8, 0]),
        "loss_mask": torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 1, 1]),
        "doc_ids": torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, -1]),
    }
    assert answer_spans(row) == [Span(1, 5, False), Span(6, 7, False), Span(8, 9, False)]
    assert answer_spans(row, [9, 8]) == [Span(1, 4, True), Span(6, 7, False), Span(8, 9, True)]


def test_the_command_reports_by_domain_and_temperature(learnable, tiny_model, tmp_path, capsys):
    """Pooled figures of the groups add up to those of all; a looping text is counted apart."""
    tiny_model.float()  # writing it as BF16 has rounded it
    drafter = train(tiny_model, tmp_path, [(p, decode.greedy(tiny_model, p, NEW)) for p in PROMPTS], max_steps=2)
    save_drafter(drafter, tmp_path / "dflash")
    rows = [
        {"text": f"{i} pack my box with five dozen {'jugs' if i % 2 else 'cups'}", "domain": d, "temperature": t}
        for i, (d, t) in enumerate([("code", 0.0), ("chat", 0.0), ("chat", 1.0), ("code", 1.0), ("chat", 1.0)])
    ]
    rows.append({"text": "abc" * 30, "domain": "chat", "temperature": 0.0})
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {
        "target": learnable / "model", "drafter": tmp_path / "dflash", "data": tmp_path / "texts.jsonl", "bf16": False,
        "max_length": 128, "chunk_anchors": 32, "tree_budgets": [6], "output": tmp_path / "out.json",
        "plot": tmp_path / "survival.png",
    }  # fmt: skip

    def acceptance(**other):
        given = [f"--{k}={v}" for k, v in (flags | other).items()]
        assert run_verb("mimo-qat", "", VERBS, ["acceptance", *given]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    document = acceptance()
    for side, part in (("train", rows[:2]), ("held_out", rows)):
        write_rows(tmp_path / "answers" / f"{side}-00000.jsonl", part)
    assert acceptance(data=tmp_path / "answers")["by_domain"] == document["by_domain"]  # its held-out answers
    assert document["texts"] == 5 and document["looping"]["texts"] == 1 and document["cap"] == SIZE
    assert {k: v["texts"] for k, v in document["by_domain"].items()} == {"chat": 3, "code": 2}
    assert {k: v["texts"] for k, v in document["by_temperature"].items()} == {"0.0": 2, "1.0": 3}
    assert set(document["by_domain_and_temperature"]) == {f"{d} T={t}" for d in ("chat", "code") for t in (0.0, 1.0)}
    for table in ("by_domain", "by_temperature", "by_domain_and_temperature"):
        assert sum(v["verifications"] for v in document[table].values()) == document["verifications"]
        assert sum(v["looping"]["texts"] for v in document[table].values()) == 1
    assert json.loads((tmp_path / "out.json").read_text())["tree"] == document["tree"]
    assert document["acceptance_length"] <= document["tree"]["6"]


def test_survival_plot_needs_curves_and_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="curves"):
        plot_survival({}, tmp_path / "x.png")
    path = plot_survival({"code": [0.9, 0.5], "chat": [0.6, 0.2]}, tmp_path / "x.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
