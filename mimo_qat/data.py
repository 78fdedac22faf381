"""Rows, chat templates and packing: from a dataset's name to tensors.

A row is {"messages": [{"role", "content"}, ...]}; {"conversations"}, {"prompt", "completion"} and {"text"} are read as
well. A dataset is the path of a .jsonl file, the name of a dataset on the Hugging Face hub, or "stdlib": documented
functions of this machine's Python standard library, a small real corpus that needs no download.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def read_rows(source: str | Path, split: str = "train") -> list[Row]:
    """All rows of a dataset, in the `messages` (or `text`) form.

    Raises ValueError for a file that is not there, a line that is not JSON and a row of no known form.
    """
    if str(source) == "stdlib":
        return list(stdlib_rows())
    path = Path(source)
    if path.suffix == ".jsonl" or path.exists():
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give a .jsonl file, a hub dataset's name, or 'stdlib'")
        return [_row(line, f"{path}:{n}") for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    from datasets import load_dataset

    return [_row(row, f"{source}[{n}]") for n, row in enumerate(load_dataset(str(source), split=split))]


def _row(row: str | Row, where: str) -> Row:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a JSON object ({error}); write one row a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object; write one row a line")
    if "conversations" in row:
        roles = {"human": "user", "gpt": "assistant"}
        turns = [(t.get("role", t.get("from")), t.get("content", t.get("value"))) for t in row["conversations"]]
        return {**row, "messages": [{"role": roles.get(r, r), "content": c} for r, c in turns]}
    if "prompt" in row and "completion" in row:
        turns = [("user", row["prompt"]), ("assistant", row["completion"])]
        return {**row, "messages": [{"role": r, "content": c} for r, c in turns]}
    if "messages" not in row and "text" not in row:
        raise ValueError(f"{where}: has none of messages, conversations, prompt + completion, text")
    return row


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes rows as .jsonl, atomically."""
    from mimo_qat.provenance import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stdlib_rows(max_lines: int = 60) -> Iterator[Row]:
    """One chat row for every documented function of 4 to `max_lines` lines in the standard library (PSF licence)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files exist to be broken
        lines = text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            summary = (ast.get_docstring(node) or "").strip().partition("\n")[0]
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if not summary or not 4 <= length <= max_lines:
                continue
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            yield {
                "messages": [
                    {"role": "user", "content": f"Write the Python function `{node.name}`: {summary}"},
                    {"role": "assistant", "content": f"```python\n{source}\n```"},
                ]
            }


def prompt_of(row: Row) -> str:
    """What identifies a row: its first user message, or the beginning of its text."""
    if "messages" not in row:
        return row["text"][:200]
    return next((m["content"] for m in row["messages"] if m["role"] == "user"), row["messages"][0]["content"])


def split_rows(rows: Iterable[Row], held_out: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), shuffled by a hash of the prompt; equal prompts fall on the same side.

    The hash decides for each row alone, so a row keeps its side when others are added.
    """
    keyed = sorted((hashlib.sha256(f"{seed}:{prompt_of(r)}".encode()).hexdigest(), i, r) for i, r in _numbered(rows))
    border = int(held_out * 16**8)
    kept = [r for digest, _, r in keyed if int(digest[:8], 16) >= border]
    held = [r for digest, _, r in keyed if int(digest[:8], 16) < border]
    return kept, held


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    return iter(enumerate(rows))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a MiMo-V2 checkpoint folder; nothing in the folder is executed."""
    from transformers import AutoTokenizer

    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config

    # With the configuration at hand transformers need not guess the model's type, and warn that it cannot.
    config = MiMoV2Config.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def tokenize_rows(rows: Iterable[Row], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Token ids and a loss mask (1 on what an assistant says, or on all of a `text` row), cut at `max_length`.

    Each assistant turn is tokenized apart from what precedes it, as it is when a server continues a prompt.
    """
    examples = []
    for row in rows:
        ids: list[int] = []
        mask: list[int] = []
        for text, supervised in _segments(row, tokenizer):
            piece = tokenizer(text, add_special_tokens=False).input_ids
            ids += piece
            mask += [supervised] * len(piece)
        if len(ids) > 1:
            examples.append({"input_ids": ids[:max_length], "loss_mask": mask[:max_length]})
    return examples


def _segments(row: Row, tokenizer: Any) -> Iterator[tuple[str, int]]:
    if "messages" not in row:
        yield row["text"], 1
        return
    done = ""
    for i, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(row["messages"][:i], tokenize=False, add_generation_prompt=True)
        answer = tokenizer.apply_chat_template(row["messages"][: i + 1], tokenize=False)
        if not (prompt.startswith(done) and answer.startswith(prompt)):
            raise ValueError(
                "the chat template rewrites earlier turns when a turn is added; give one assistant turn a row"
            )
        yield prompt[len(done) :], 0
        yield answer[len(prompt) :], 1
        done = answer


def pack(examples: list[dict[str, list[int]]], max_length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Packs examples into rows of `max_length`, longest first into the fullest row that still has room.

    Returns int64 tensors [rows, max_length]: `input_ids`, `loss_mask`, `doc_ids` (number of the document inside the
    row, -1 on padding) and `position_ids` (restart at every document; padding counts as a document of its own).
    """
    rows: list[list[dict[str, list[int]]]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        length = len(example["input_ids"])
        if length > max_length:
            raise ValueError(f"an example of {length} tokens does not fit max_length {max_length}; cut it first")
        fitting = [i for i, free in enumerate(room) if free >= length]
        if fitting:
            best = min(fitting, key=room.__getitem__)
        else:
            best = len(rows)
            rows.append([])
            room.append(max_length)
        rows[best].append(example)
        room[best] -= length
    shape = (len(rows), max_length)
    out = {
        "input_ids": torch.full(shape, pad_id),
        "loss_mask": torch.zeros(shape, dtype=torch.long),
        "doc_ids": torch.full(shape, -1),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for r, documents in enumerate(rows):
        at = 0
        for number, example in enumerate(documents):
            end = at + len(example["input_ids"])
            out["input_ids"][r, at:end] = torch.tensor(example["input_ids"])
            out["loss_mask"][r, at:end] = torch.tensor(example["loss_mask"])
            out["doc_ids"][r, at:end] = number
            out["position_ids"][r, at:end] = torch.arange(end - at)
            at = end
        out["position_ids"][r, at:] = torch.arange(max_length - at)
    return out
