"""Rows, masks, packing and files."""

import json

import pytest
import torch

from mimo_qat import data
from mimo_qat.provenance import JsonlLog, atomic_write


class CharTokenizer:
    """One id a character, and a chat template in the usual shape."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})()

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


def test_text_rows_are_supervised_whole_and_cut():
    (example,) = data.tokenize_rows([{"text": "abcdef"}], CharTokenizer(), 4)
    assert example == {"input_ids": [97, 98, 99, 100], "loss_mask": [1, 1, 1, 1]}


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
