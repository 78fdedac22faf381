"""Rows, masks, packing and files."""

import json

import pytest
import torch

from mimo_qat import data
from mimo_qat.provenance import JsonlLog, atomic_write


class CharTokenizer:
    """One id a character, and a chat template in the usual shape."""

    pad_token_id = 0

    def __call__(self, texts, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [[ord(c) for c in text] for text in texts]})()

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        text = "".join(f"<{m['role'][0]}>{m['content']}|" for m in messages)
        return text + ("<a>" if add_generation_prompt else "")


def chat(*turns):
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def test_loss_mask_covers_what_the_assistant_says_and_its_end():
    row = chat(("user", "hi"), ("assistant", "yo"), ("user", "?"), ("assistant", "!"))
    (example,) = data.tokenize_rows([row], CharTokenizer(), 100)
    text = "".join(map(chr, example["input_ids"]))
    assert text == "<u>hi|<a>yo|<u>?|<a>!|"
    assert "".join(c for c, m in zip(text, example["loss_mask"], strict=True) if m) == "yo|!|"


def test_text_rows_are_supervised_whole_and_go_on_in_the_next_example():
    first, second = data.tokenize_rows([{"text": "abcdef"}], CharTokenizer(), 4)
    assert first == {"input_ids": [97, 98, 99, 100], "loss_mask": [1, 1, 1, 1]}
    assert second == {"input_ids": [101, 102], "loss_mask": [1, 1]}


def test_chats_are_cut():
    (example,) = data.tokenize_rows([chat(("user", "hi"), ("assistant", "yo"))], CharTokenizer(), 10)
    assert "".join(map(chr, example["input_ids"])) == "<u>hi|<a>y"


@pytest.mark.parametrize("row, said", [
    ({"messages": []}, "no turns"),
    ({"messages": "hi"}, "no turns"),
    ({"messages": [{"role": "user", "content": None}]}, "turn 0 has no text"),
    ({"messages": [{"role": "user", "content": "hi"}, {"content": "yo"}]}, "turn 1 has no text or no role"),
    ({"conversations": [{"from": "human"}]}, "turn 0 has no text"),
    ({"prompt": "hi", "completion": None}, "turn 1 has no text"),
    ({"text": None}, "text is not a string"),
])  # fmt: skip
def test_a_row_without_text_is_named(row, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{said}"):
        data.read_rows(path)


def test_a_generated_folder_without_held_out_rows_says_how_to_get_some(tmp_path):
    data.write_rows(tmp_path / "train-00000.jsonl", [{"text": "one"}])
    assert len(data.read_rows(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"no held_out-.*larger --held_out or --limit"):
        data.read_split(tmp_path, 0.1)


def test_pack_by_hand():
    lengths = [5, 3, 2, 4]
    examples = [{"input_ids": [i + 1] * n, "loss_mask": [1] * n} for i, n in enumerate(lengths)]
    packed = data.pack(examples, 8, pad_id=9)
    assert packed["input_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [4, 4, 4, 4, 3, 3, 9, 9]]
    assert packed["doc_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, -1, -1]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
    assert packed["loss_mask"].sum() == 14


def test_pack_keeps_every_token_once():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (200,), generator=generator).tolist()
    examples = [{"input_ids": [i] * n, "loss_mask": [1] * n} for i, n in enumerate(lengths)]
    packed = data.pack(examples, 40, pad_id=-1)
    real = packed["input_ids"][packed["doc_ids"] >= 0]
    assert torch.bincount(real, minlength=200).tolist() == lengths
    assert len(packed["input_ids"]) <= 1.1 * sum(lengths) / 40  # the packing wastes little


def test_split_keeps_prompts_apart_and_is_stable():
    rows = [chat(("user", str(i % 50)), ("assistant", str(i))) for i in range(200)]
    kept, held = data.split_rows(rows, 0.3)
    assert len(kept) + len(held) == 200 and 20 < len(held) < 110
    assert not {data.prompt_of(r) for r in kept} & {data.prompt_of(r) for r in held}
    more_kept, more_held = data.split_rows([*rows, chat(("user", "new"), ("assistant", "x"))], 0.3)
    assert [r for r in more_held if data.prompt_of(r) != "new"] == held
    assert [r for r in more_kept if data.prompt_of(r) != "new"] == kept


def test_row_forms_and_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
        + "\n\n"
        + json.dumps({"prompt": "q", "completion": "a"})
        + "\n"
    )
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert [r["messages"] for r in data.read_rows(path)] == [expected, expected]
    path.write_text('{"text": "ok"}\n{broken\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not a JSON object"):
        data.read_rows(path)
    path.write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match="none of messages"):
        data.read_rows(path)
    with pytest.raises(ValueError, match="no such file"):
        data.read_rows(tmp_path / "missing.jsonl")


def slow_pack(lengths, size):
    """Rows of example numbers: the fullest row with room, the first of those, found by looking at all of them."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        best = min(fitting, key=room.__getitem__) if fitting else len(rows)
        if not fitting:
            rows.append([])
            room.append(size)
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def test_pack_is_best_fit():
    lengths = torch.randint(1, 33, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    packed = data.pack([{"input_ids": [i] * n, "loss_mask": [1] * n} for i, n in enumerate(lengths)], 32, pad_id=-1)
    found = [list(dict.fromkeys(t for t in row if t >= 0)) for row in packed["input_ids"].tolist()]
    assert found == slow_pack(lengths, 32)


def test_packed_file_gives_back_what_was_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_tokenizer", lambda folder: CharTokenizer())
    rows = [{"id": str(i), "text": f"text number {i} " * (i % 5 + 1)} for i in range(60)]
    data.write_rows(tmp_path / "rows.jsonl", rows)
    config = data.PackConfig(
        model="m", output=str(tmp_path / "p.safetensors"), dataset_name=str(tmp_path / "rows.jsonl"), max_length=48
    )
    document = data.main(config)
    expected = [data.pack_rows(part, CharTokenizer(), 48) for part in data.split_rows(rows, config.held_out)]
    for ours, theirs in zip(data.load_packed(config.output), expected, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert document["tokens"] + document["held_out_tokens"] == sum(len(r["text"]) for r in rows)
    with pytest.raises(ValueError, match="write it with mimo-qat pack"):
        data.load_packed(tmp_path / "none.safetensors")


def test_a_generated_folder_keeps_its_own_split(tmp_path):
    """Answers to a prompt shorter than what identifies a text would fall on both sides of a split of the rows."""
    answers = {side: [{"text": f"{side} {i % 9} {i}"} for i in range(90)] for side in ("train", "held_out")}
    for side, rows in answers.items():
        data.write_rows(tmp_path / f"{side}-00000.jsonl", rows[:50])
        data.write_rows(tmp_path / f"{side}-00001.jsonl", rows[50:])
    assert data.read_split(tmp_path, held_out=0.5) == (answers["train"], answers["held_out"])
    assert data.read_held_out(tmp_path, limit=70) == answers["held_out"][:70]
    assert data.read_held_out(tmp_path / "train-00000.jsonl") == data.read_rows(tmp_path, limit=50)
    assert data.read_split(tmp_path, held_out=0.5, limit=60) == (answers["train"][:60], answers["held_out"])


def test_a_line_of_json_may_hold_other_ends_of_lines(tmp_path):
    row = {"text": "one\u2028two\x85three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert data.read_rows(tmp_path / "rows.jsonl") == [row]


def test_limit_reads_no_further(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n{broken\n')
    assert [r["text"] for r in data.read_rows(tmp_path / "rows.jsonl", limit=2)] == ["a", "b"]


def test_modules_are_read_once_each():
    rows = data.read_rows("site-packages", limit=40)
    assert len(rows) == 40 and len({r["text"] for r in rows}) == 40 and rows[0]["id"].endswith(".py")


def test_stdlib_rows_are_real_functions():
    rows = data.read_rows("stdlib")
    assert len(rows) > 2000
    assert any("`dedent`" in r["messages"][0]["content"] for r in rows)
    assert all(r["messages"][1]["content"].startswith("```python\n") for r in rows)


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_log_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path)
    for step in (1, 2, 3):
        log.write(step=step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    JsonlLog(path, keep_until=2).write(step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
