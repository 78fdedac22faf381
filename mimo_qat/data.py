"""Rows, chat templates and packing: from a dataset's name to tensors.

A row is {"messages": [{"role", "content"}, ...]}; {"conversations"}, {"prompt", "completion"} and {"text"} are read as
well. A dataset is the path of a .jsonl file, a folder of `mimo-qat generate-data`, the name of a dataset on the Hugging
Face hub, or a corpus that needs no download (`mimo_qat.corpora`): for training "stdlib" and "functions", documented
Python functions as chats, and "site-packages", modules as plain text; "prefixes", "questions" and "reasoning" are
prompts without answers.

`mimo-qat pack` tokenizes and packs a dataset once, into a .safetensors file that every training run reads at once.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mimo_qat.corpora import CORPORA, Row

Packed = dict[str, torch.Tensor]


def read_rows(source: str | Path, limit: int | None = None) -> list[Row]:
    """The first `limit` (or all) training rows of a dataset, in the `messages` (or `text`) form.

    With a limit a hub dataset is streamed: nothing after those rows is downloaded. Raises ValueError for a file that is
    not there, a line that is not JSON and a row of no known form.
    """
    if str(source) in CORPORA:
        return list(islice(CORPORA[str(source)](), limit))
    path = Path(source)
    if path.is_dir():
        return list(islice(_shard_rows(path, "train"), limit))
    if path.suffix == ".jsonl" or path.exists():
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give a .jsonl file, a hub dataset's name, or 'stdlib'")
        # Not splitlines(), which also ends a line at characters that JSON strings may hold, such as U+2028.
        lines = ((n, line) for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if line.strip())
        return [_row(line, f"{path}:{n}") for n, line in islice(lines, limit)]
    from datasets import load_dataset

    rows = load_dataset(str(source), split="train", streaming=limit is not None)
    return [_row(row, f"{source}[{n}]") for n, row in enumerate(islice(rows, limit))]


def _shard_rows(folder: Path, side: str) -> Iterator[Row]:
    found = sorted(folder.glob(f"{side}-*.jsonl"))
    if not found:
        remedy = "answer more prompts with a larger --held_out or --limit, or name other rows for evaluation"
        if side == "train" or not any(folder.glob("train-*.jsonl")):
            remedy = "give a folder of mimo-qat generate-data, or a .jsonl file"
        raise ValueError(f"{folder} has no {side}-*.jsonl; {remedy}")
    for path in found:
        yield from read_rows(path)


def is_generated(source: str | Path) -> bool:
    """Whether a dataset is a folder, which `mimo-qat generate-data` divides into training and held-out rows."""
    return str(source) not in CORPORA and Path(source).is_dir()


def read_held_out(source: str | Path, limit: int | None = None) -> list[Row]:
    """The first `limit` (or all) rows to evaluate on: the held-out ones of a generated folder, else those of the
    dataset as `read_rows` gives them."""
    if is_generated(source):
        return list(islice(_shard_rows(Path(source), "held_out"), limit))
    return read_rows(source, limit)


def load_generated(folder: str | Path) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) of a folder that `mimo-qat generate-data` wrote."""
    return list(_shard_rows(Path(folder), "train")), list(_shard_rows(Path(folder), "held_out"))


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
        row = {**row, "messages": [{"role": roles.get(r, r), "content": c} for r, c in turns]}
    elif "prompt" in row and "completion" in row:
        turns = [("user", row["prompt"]), ("assistant", row["completion"])]
        row = {**row, "messages": [{"role": r, "content": c} for r, c in turns]}
    if "messages" in row:
        _check_turns(row["messages"], where)
    elif "text" not in row:
        raise ValueError(f"{where}: has none of messages, conversations, prompt + completion, text")
    elif not isinstance(row["text"], str):
        raise ValueError(f"{where}: text is not a string; correct the row or leave it out")
    return row


def _check_turns(turns: Any, where: str) -> None:
    """ValueError for messages that no chat template could read; content may be parts, or absent beside tool calls."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: messages has no turns; leave the row out")
    for i, turn in enumerate(turns):
        said = isinstance(turn, dict) and (isinstance(turn.get("content"), str | list) or turn.get("tool_calls"))
        if not said or not isinstance(turn.get("role"), str):
            raise ValueError(f"{where}: turn {i} has no text or no role; correct the row or leave it out")


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes rows as .jsonl, atomically."""
    from mimo_qat.provenance import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompt_of(row: Row) -> str:
    """What identifies a row: its first user message, or its `id`, or the beginning of its text."""
    if "messages" not in row:
        return row.get("id") or row["text"][:200]
    return next((m["content"] for m in row["messages"] if m["role"] == "user"), row["messages"][0]["content"])


def hash_of(prompt: str, seed: int = 0) -> str:
    """Hex digits that order prompts and choose their side of a split; the same in every command."""
    return hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()


def is_held_out(digest: str, fraction: float) -> bool:
    """Whether the prompt with this `hash_of` belongs to the held-out `fraction`."""
    return int(digest[:8], 16) < int(fraction * 16**8)


def split_rows(rows: Iterable[Row], held_out: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), shuffled by a hash of the prompt; equal prompts fall on the same side.

    The hash decides for each row alone, so a row keeps its side when others are added.
    """
    keyed = sorted(((hash_of(prompt_of(r), seed), i, r) for i, r in enumerate(rows)), key=lambda k: k[:2])
    kept = [r for digest, _, r in keyed if not is_held_out(digest, held_out)]
    held = [r for digest, _, r in keyed if is_held_out(digest, held_out)]
    return kept, held


def read_split(
    source: str | Path, held_out: float, seed: int = 0, limit: int | None = None
) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) of a dataset: as `split_rows` divides its first `limit` rows.

    A folder of `mimo-qat generate-data` is divided already, by its prompts, and stays so: its answers to one prompt
    begin differently where the prompt is a short text, so that a hash of the rows could put them on both sides. There
    `limit` is of training rows.
    """
    if is_generated(source):
        kept, held = load_generated(source)
        return kept[:limit], held
    return split_rows(read_rows(source, limit), held_out, seed)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a checkpoint folder; nothing in the folder is executed."""
    from transformers import AutoConfig, AutoTokenizer

    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config

    # With the configuration at hand transformers need not guess the type of a MiMo-V2, and warn that it cannot.
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a checkpoint folder")
    kind = json.loads(path.read_text()).get("model_type")
    config = (MiMoV2Config if kind == MiMoV2Config.model_type else AutoConfig).from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def tokenize_rows(rows: Iterable[Row], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Token ids and a loss mask: 1 on what an assistant says, or on all of a `text` row.

    Rows with `prompt_ids` and `answer_ids` (mimo-qat generate-data) are those tokens, and the mask is 1 on the answer.
    A chat is cut at `max_length`; a text goes on in the next example. Each assistant turn is tokenized apart from what
    precedes it, as it is when a server continues a prompt.
    """
    examples, rows = [], iter(rows)
    while batch := list(islice(rows, 1000)):  # the tokenizer uses all cores within one call
        segments = [
            (i, text, flag)
            for i, row in enumerate(batch)
            if "answer_ids" not in row
            for text, flag in _segments(row, tokenizer)
        ]
        pieces = tokenizer([text for _, text, _ in segments], add_special_tokens=False).input_ids if segments else []
        ids: list[list[int]] = [[] for _ in batch]
        masks: list[list[int]] = [[] for _ in batch]
        for (i, _, flag), piece in zip(segments, pieces, strict=True):
            ids[i] += piece
            masks[i] += [flag] * len(piece)
        for row, tokens, mask in zip(batch, ids, masks, strict=True):
            if "answer_ids" in row:
                tokens += row["prompt_ids"] + row["answer_ids"]
                mask += [0] * len(row["prompt_ids"]) + [1] * len(row["answer_ids"])
            whole = "messages" in row or "answer_ids" in row
            starts = range(1) if whole else range(0, len(tokens), max_length)
            for cut in (slice(start, start + max_length) for start in starts):
                if len(tokens[cut]) > 1:
                    examples.append({"input_ids": tokens[cut], "loss_mask": mask[cut]})
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
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room -> rows that have it, lowest number first
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        length = len(example["input_ids"])
        if length > max_length:
            raise ValueError(f"an example of {length} tokens does not fit max_length {max_length}; cut it first")
        room = next((room for room in range(length, max_length + 1) if by_room[room]), None)
        if room is None:
            room, best = max_length, len(rows)
            rows.append([])
        else:
            best = heapq.heappop(by_room[room])
        rows[best].append(example)
        heapq.heappush(by_room[room - length], best)
    shape = (len(rows), max_length)
    out = {
        "input_ids": torch.full(shape, pad_id),
        "loss_mask": torch.zeros(shape, dtype=torch.long),
        "doc_ids": torch.full(shape, -1),
    }
    for r, documents in enumerate(rows):
        lengths = torch.tensor([len(e["input_ids"]) for e in documents])
        end = int(lengths.sum())
        out["input_ids"][r, :end] = torch.tensor([t for e in documents for t in e["input_ids"]])
        out["loss_mask"][r, :end] = torch.tensor([m for e in documents for m in e["loss_mask"]])
        out["doc_ids"][r, :end] = torch.arange(len(documents)).repeat_interleave(lengths)
    return out | {"position_ids": positions(out["doc_ids"])}


def pack_rows(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Packed:
    """`pack` of `tokenize_rows`."""
    return pack(tokenize_rows(rows, tokenizer, max_length), max_length, tokenizer.pad_token_id or 0)


def pack_first(rows: list[Row], tokenizer: Any, max_length: int, count: int, texts: int) -> Packed:
    """`pack_rows` of `texts` rows for each of `count` packed ones, and of more where so many do not fill them."""
    take = texts * count
    while True:
        packed = pack_rows(rows[:take], tokenizer, max_length)
        if len(packed["input_ids"]) >= count or take >= len(rows):
            return packed
        take *= 2


def positions(doc_ids: torch.Tensor) -> torch.Tensor:
    """`position_ids` [rows, length] that restart where `doc_ids` [rows, length] changes."""
    at = torch.arange(doc_ids.shape[1]).expand_as(doc_ids)
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return at - torch.where(starts, at, 0).cummax(1).values


@dataclass(kw_only=True)
class PackConfig:
    """A dataset, tokenized, packed and split once for many runs."""

    model: str
    """folder whose tokenizer and chat template are used"""
    output: str
    """.safetensors file to write"""
    dataset_name: str = "stdlib"
    """rows: a .jsonl file, a folder of mimo-qat generate-data, a hub dataset, "stdlib", "functions" or
    "site-packages"; such a folder keeps its own held-out rows"""
    limit: int | None = None
    """read only the first rows of the dataset"""
    held_out: float = 0.1
    """fraction of rows, chosen by a hash of the prompt, for evaluation"""
    max_length: int = 1024
    """tokens a packed row"""
    seed: int = 0
    """of the split"""


def load_packed(path: str | Path, max_length: int | None = None) -> tuple[Packed, Packed]:
    """(training, held-out) rows of a file that `mimo-qat pack` wrote, as `pack` returns them.

    ValueError where its rows are not of `max_length` tokens.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; write it with mimo-qat pack")
    stored, both = load_file(path), []
    for part in ("train", "held_out"):
        names = ("input_ids", "loss_mask", "doc_ids")
        if any(f"{part}.{name}" not in stored for name in names):
            raise ValueError(f"{path} has no {part} rows; write it with mimo-qat pack")
        rows = {name: stored[f"{part}.{name}"].long() for name in names}
        both.append(rows | {"position_ids": positions(rows["doc_ids"])})
    length = both[0]["input_ids"].shape[1]
    if max_length not in (None, length):
        raise ValueError(f"{path} has rows of {length} tokens, max_length is {max_length}; set it to the file's")
    return both[0], both[1]


def main(config: PackConfig) -> dict[str, Any]:
    """Writes the file and returns its figures; the digest identifies the tokens."""
    from safetensors.torch import save_file

    from mimo_qat.provenance import atomic_write

    tokenizer = load_tokenizer(config.model)
    sides = read_split(config.dataset_name, config.held_out, config.seed, config.limit)
    kept, held = (pack_rows(side, tokenizer, config.max_length) for side in sides)
    narrow = {"input_ids": torch.int32, "loss_mask": torch.uint8, "doc_ids": torch.int16}
    stored = {
        f"{part}.{name}": packed[name].to(dtype).contiguous()
        for part, packed in (("train", kept), ("held_out", held))
        for name, dtype in narrow.items()
    }
    figures = {
        "rows": len(kept["input_ids"]),
        "held_out_rows": len(held["input_ids"]),
        "tokens": int((kept["doc_ids"] >= 0).sum()),
        "held_out_tokens": int((held["doc_ids"] >= 0).sum()),
        "sha256": hashlib.sha256(stored["train.input_ids"].numpy().tobytes()).hexdigest(),
    }
    with atomic_write(config.output) as temporary:
        save_file(stored, temporary, metadata={k: str(v) for k, v in figures.items()})
    return {"file": config.output, **figures}
