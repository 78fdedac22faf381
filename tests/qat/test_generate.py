"""Answers of the target: the batched decoder against one token at a time, and the folder that holds what it wrote."""

import ast
import json
import math
from collections import Counter
from itertools import islice

import pytest
import torch

from mimo_qat import corpora, data
from mimo_qat.distill import decoder as decoding
from mimo_qat.distill.decoder import Decoder, Job, choose, uniforms
from mimo_qat.distill.evaluate import greedy
from mimo_qat.distill.generate import GenerateDataConfig, Prompt, answer, main, question, read_prompts, shards
from tests.qat.conftest import character_tokenizer

PROMPTS = [[17, 3, 99, 200, 41, 7], [5], [60, 61, 62], list(range(100, 133)), [9, 8]]


def jobs(temperature=0.0):
    return [Job(prompt, temperature, str(i)) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_greedy_answers_equal_answers_alone(tiny_model, slots, monkeypatch):
    """Also in refilled slots, over windows, after the batch shrank, and with an end token that some answers meet."""
    monkeypatch.setattr(decoding, "CHECK_EVERY", 3)
    monkeypatch.setattr(decoding, "FEWEST_SLOTS", 1)
    alone = [greedy(tiny_model, p, 20) for p in PROMPTS]
    end = alone[0][7]
    expected = [greedy(tiny_model, p, 20, [end]) for p in PROMPTS]
    assert any(len(e) < 20 for e in expected) and any(len(e) == 20 for e in expected)
    decoded = Decoder(tiny_model, slots, 40, 20, [end]).run(jobs())
    assert [d.tokens for d in decoded] == expected
    assert [d.stopped for d in decoded] == [end in e for e in expected]


def test_sampled_answers_depend_on_their_key_alone(tiny_model):
    one = [d.tokens for d in Decoder(tiny_model, 1, 40, 12).run(jobs(1.0))]
    many = [d.tokens for d in Decoder(tiny_model, 8, 40, 12).run(jobs(1.0))]
    assert one == many
    other = Decoder(tiny_model, 8, 40, 12).run([Job(PROMPTS[0], 1.0, "another")])[0].tokens
    assert other != one[0]


def test_choice_follows_the_distribution():
    """Chi-square of 20,000 choices among six tokens, at a temperature; the critical value is that of p = 1e-4."""
    logits, temperature, count = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0, 0.5]), 0.7, 20_000
    uniform = uniforms("chi-square", count)
    picked = choose(logits.expand(count, -1), torch.full((count,), temperature), uniform)
    expected = (logits.double() / temperature).softmax(-1) * count
    seen = torch.bincount(picked, minlength=6).double()
    assert seen[4] == 0
    keep = [0, 1, 2, 3, 5]
    assert ((seen - expected)[keep] ** 2 / expected[keep]).sum() < 23.5
    assert choose(logits[None], torch.zeros(1), torch.tensor([0.999])).item() == 0


def test_a_prompt_too_long_for_the_cache_is_refused(tiny_model):
    with pytest.raises(ValueError, match="prompt x has 9 tokens; give 1 to 8"):
        Decoder(tiny_model, 1, 8, 4).run([Job(list(range(9)), 0.0, "x")])


def test_questions_end_before_the_last_answer():
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    assert question({"messages": turns}) == turns[:3]
    with pytest.raises(ValueError, match=r"no prompt in .*prose"):
        question({"text": "prose"})


class Scripted:
    """A decoder that says what the test wants."""

    def __init__(self, said):
        self.said = said

    def run(self, asked):
        return [decoding.Decoded(list(tokens), stopped) for tokens, stopped in self.said[: len(asked)]]


def test_answers_that_teach_nothing_are_dropped_and_counted():
    fine, loop, end = [65, 66, 67, 68, 69], [65, 66] * 20, [65, 66, 67, 0]
    said = [(fine, False), (loop, False), (fine, False), ([32, 32], False), (end, True)]
    asked = [Prompt({"text": "p", "domain": "code"}, [80, 81], str(i)) for i in range(5)]
    rows, counts = answer(Scripted(said), character_tokenizer(), asked, [0.0])
    assert counts == {"answers": 2, "tokens": 9, "stopped": 1, "looping": 1, "repeated": 1, "empty": 1}
    assert [(r["prompt_id"], r["finish"]) for r in rows] == [("0", "length"), ("4", "stop")]
    assert rows[0]["text"] == "pA B C D E" or rows[0]["text"] == "pABCDE"
    assert rows[1]["answer_ids"] == end and rows[1]["prompt_ids"] == [80, 81] and rows[1]["domain"] == "code"


def test_stored_ids_are_what_is_trained_on():
    row = {"text": "not read", "prompt_ids": [1, 2, 3], "answer_ids": [4, 5]}
    example = data.tokenize_rows([row, {"text": "ab"}], character_tokenizer(), 64)
    assert example[0] == {"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 0, 0, 1, 1]}
    assert data.tokenize_rows([row], character_tokenizer(), 4)[0]["input_ids"] == [1, 2, 3, 4]


@pytest.fixture
def settings(learnable):
    (learnable / "more.jsonl").write_text(
        "".join(json.dumps({"text": f"{'row' if i else 'ROW'} {i}:", "domain": "chat"}) + "\n" for i in range(30))
        + json.dumps({"text": "row   0:", "domain": "chat"})
        + "\n"
    )
    return {
        "target": str(learnable / "model"),
        "prompts": [str(learnable / "more.jsonl")],
        "output_dir": str(learnable / "out"),
        "max_new_tokens": 10,
        "shard_prompts": 8,
        "held_out": 0.3,
        "bf16": False,
        "temperatures": [0.0, 1.0],
    }


def test_definitions_are_those_of_a_walk_over_all_nodes():
    kinds, seen = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, 0
    for _, text in islice(corpora._modules("stdlib"), 120):
        tree = ast.parse(text)
        found = list(corpora._definitions(tree))
        assert found == [node for node in ast.walk(tree) if isinstance(node, kinds)]
        seen += len(found)
    assert seen > 1000


def test_prompts_are_unique_and_split_once(settings):
    config = GenerateDataConfig(**settings)
    prompts, counts = read_prompts(config, character_tokenizer())
    assert len(prompts) == 30 and counts == {"read": 31, "repeated_prompts": 1, "too_long": 0}
    parts = shards(config, prompts)
    held = {p.key for name, part in parts.items() for p in part if name.startswith("held_out")}
    train = {p.key for name, part in parts.items() for p in part if name.startswith("train")}
    assert held and train and not held & train and len(held | train) == 30
    # A subset keeps its sides, so that more prompts later never move one from training to evaluation.
    for p in prompts[:10]:
        (name,) = shards(config, [p])
        assert name.startswith("held_out") == (p.key in held)
    fewer, _ = read_prompts(GenerateDataConfig(**settings | {"limit": 7}), character_tokenizer())
    assert {p.key for p in fewer} < {p.key for p in prompts} and len(fewer) == 7


def test_chats_that_begin_alike_are_different_prompts_of_one_side(settings, learnable):
    chats = [[("user", "Hello"), ("assistant", "Hi"), ("user", f"Question {i}")] for i in range(6)]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    data.write_rows(learnable / "chats.jsonl", [*rows, {"messages": rows[0]["messages"][:1]}])
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = GenerateDataConfig(**settings | {"prompts": [str(learnable / "chats.jsonl")]})
    prompts, counts = read_prompts(config, tokenizer)
    assert len(prompts) == 7 and counts["repeated_prompts"] == 0
    assert len({name.split("-")[0] for name in shards(config, prompts)}) == 1


def test_a_continued_run_and_two_processes_write_the_same_files(settings, learnable, monkeypatch):
    document = main(GenerateDataConfig(**settings))
    files = {f.name: f.read_bytes() for f in (learnable / "out").glob("*.jsonl")}
    assert document["ok"] and document["shards"] == len(files) >= 4 and document["answers"] > 30
    (learnable / "out" / "train-00001.jsonl").unlink()
    again = main(GenerateDataConfig(**settings | {"batch_size": 3}))
    assert again["shards_made"] == 1
    assert {f.name: f.read_bytes() for f in (learnable / "out").glob("*.jsonl")} == files
    with pytest.raises(ValueError, match="made with seed 0, now 1"):
        main(GenerateDataConfig(**settings | {"seed": 1}))
    made = Counter()
    for rank in ("0", "1"):
        assert not (learnable / "two" / "manifest.json").exists()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        made[rank] = main(GenerateDataConfig(**settings | {"output_dir": str(learnable / "two")}))["shards_made"]
    assert sum(made.values()) == len(files) and min(made.values()) >= math.floor(len(files) / 2)
    assert {f.name: f.read_bytes() for f in (learnable / "two").glob("*.jsonl")} == files
    manifests = [(learnable / folder / "manifest.json").read_bytes() for folder in ("out", "two")]
    assert manifests[0] == manifests[1]
    train, held = data.load_generated(learnable / "out")
    assert data.read_rows(learnable / "out") == train and {r["temperature"] for r in held} == {0.0, 1.0}


def test_held_out_temperatures_and_the_manifest_count_the_rows(settings, learnable):
    """The manifest against the lines of the files; a prompt asked of both sides would be counted twice."""
    document = main(GenerateDataConfig(**settings | {"held_out_temperatures": [0.0, 0.5, 1.5]}))
    train, held = data.load_generated(learnable / "out")
    assert {r["temperature"] for r in train} == {0.0, 1.0} and {r["temperature"] for r in held} == {0.0, 0.5, 1.5}
    manifest = json.loads((learnable / "out" / "manifest.json").read_text())
    for entry in manifest["answers"]:
        rows = train if entry["side"] == "train" else held
        rows = [r for r in rows if r["temperature"] == entry["temperature"] and r["domain"] == entry["domain"]]
        assert entry["answers"] == len(rows) <= entry["asked"]
        assert entry["tokens"] == sum(len(r["answer_ids"]) for r in rows)
        assert entry["stopped"] == sum(r["finish"] == "stop" for r in rows)
    asked = Counter({e["side"]: e["asked"] for e in manifest["answers"]})
    assert len(manifest["answers"]) == 5 and asked["train"] + asked["held_out"] == 30
    assert sum(f["answers"] for f in manifest["files"].values()) == document["answers"] == len(train) + len(held)
    assert manifest["prompts"] == {"read": 31, "repeated_prompts": 1, "too_long": 0}


def test_ids_of_a_row_are_the_text_of_a_row(settings, learnable):
    main(GenerateDataConfig(**settings))
    tokenizer = character_tokenizer()
    for row in data.read_rows(learnable / "out", limit=12):
        assert row["text"].replace(" ", "") == tokenizer.decode(row["prompt_ids"] + row["answer_ids"]).replace(" ", "")


def test_wrong_settings_are_refused():
    base = {"target": "x", "prompts": ["stdlib"], "output_dir": "y"}
    with pytest.raises(ValueError, match="temperatures"):
        GenerateDataConfig(**base, temperatures=[])
    with pytest.raises(ValueError, match=r"held_out_temperatures is \[\]"):
        GenerateDataConfig(**base, held_out_temperatures=[])
    with pytest.raises(ValueError, match="batch_size is 0"):
        GenerateDataConfig(**base, batch_size=0)
