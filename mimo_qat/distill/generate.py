"""mimo-qat generate-data --target TARGET --prompts '[functions, prefixes]' --output_dir answers

Lets the target answer prompts itself. A drafter is trained on what its target would write, so its data are the
target's own answers, under the chat template and the temperatures of serving. QAD takes the same rows as on-policy
text.

The folder holds train-*.jsonl and held_out-*.jsonl. A row has the text (`messages` or, for a plain-text prompt,
`text`), its `domain`, `temperature`, `prompt_id` and `finish`, and the exact token ids of prompt and answer:
re-tokenizing decoded text would change them where an answer was cut. All answers to a prompt are on one side of the
split. A shard is written whole or not at all and depends on (seed, prompts) alone, so a killed run continues to the
same files; under `accelerate launch` or torchrun the processes share the shards, and the one that ends last counts
them in manifest.json. Looping answers are dropped: they inflate acceptance and teach nothing.
"""

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mimo_qat.checkpoint.reader import load_model
from mimo_qat.corpora import CORPORA, digest
from mimo_qat.data import hash_of, is_held_out, load_tokenizer, prompt_of, read_rows, write_rows
from mimo_qat.distill.decoder import Decoded, Decoder, Job
from mimo_qat.drafting import distinct_3
from mimo_qat.provenance import write_json, write_provenance

LOOPING = 0.3  # distinct-3 below which an answer counts as looping
COUNTS = ("answers", "tokens", "stopped", "looping", "repeated", "empty")


@dataclass(kw_only=True)
class GenerateDataConfig:
    """Fields of `mimo-qat generate-data`."""

    target: str
    """checkpoint folder of the target, MiMo-V2"""
    prompts: list[str]
    """sources of prompts: .jsonl files, hub datasets or "functions", "prefixes", "questions", "reasoning", "stdlib";
    the last assistant turn of a chat is replaced, a `text` row is continued"""
    output_dir: str
    """folder to write"""
    limit: int | None = None
    """prompts to take of each source, drawn by `seed`"""
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.7])
    """one answer to every prompt at each of them; 0 is greedy"""
    held_out_temperatures: list[float] | None = None
    """those of held-out prompts, such as [0, 0.7, 1] to measure acceptance at; None takes `temperatures`"""
    max_new_tokens: int = 512
    """longest answer in tokens; longer ones are cut and kept"""
    max_prompt_length: int = 1024
    """prompts with more tokens are left out, and counted"""
    held_out: float = 0.05
    """share of the prompts, chosen by a hash, whose answers are for evaluation"""
    batch_size: int = 64
    """answers decoded at a time; 1,024 and more fill a GPU"""
    shard_prompts: int = 4096
    """prompts a file"""
    seed: int = 0
    """of the order, the split and the sampling"""
    bf16: bool = True
    """compute in bfloat16, else in float32"""

    def __post_init__(self) -> None:
        for side, name in (("train", "temperatures"), ("held_out", "held_out_temperatures")):
            given = self.temperatures_of(side)
            if not given or min(given) < 0 or len(set(given)) < len(given):
                raise ValueError(f"{name} is {given}; give different numbers of 0 or more")
        for name in ("max_new_tokens", "max_prompt_length", "batch_size", "shard_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def temperatures_of(self, shard: str) -> list[float]:
        """The temperatures of a shard, which its file name tells apart."""
        held_out = shard.startswith("held_out") and self.held_out_temperatures is not None
        return (self.held_out_temperatures or []) if held_out else self.temperatures


def question(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a row up to its last assistant turn; ValueError for a row that asks nothing."""
    messages = row.get("messages") or []
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"no prompt in {str(row)[:80]}; give rows with messages that begin with a user turn")
    return messages


def prompt_ids(tokenizer: Any, prompts: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of prompts under the chat template, ready for the assistant's turn."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the model's, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@dataclass(frozen=True)
class Prompt:
    """What is asked: the row without its answer, its token ids, and 16 hex digits of a hash of its text."""

    row: dict[str, Any]
    ids: list[int]
    key: str


def read_prompts(config: GenerateDataConfig, tokenizer: Any) -> tuple[list[Prompt], dict[str, int]]:
    """(prompts in the order of a hash of (seed, text), counts of what was read and left out).

    Prompts that differ in white space or case only are one prompt; of a chat all turns count.
    """
    found: dict[str, dict[str, Any]] = {}
    counts = dict.fromkeys(("read", "repeated_prompts", "too_long"), 0)
    for source in config.prompts:
        of_source: dict[str, dict[str, Any]] = {}
        # A corpus comes in the order of a hash: its first rows are a mixture, and reading all of it takes minutes.
        enough = 2 * config.limit if config.limit and source in CORPORA else None
        for row in read_rows(source, limit=enough):
            counts["read"] += 1
            asked = {"text": row["text"]} if "messages" not in row else {"messages": question(row)}
            text = row["text"] if "text" in asked else " ".join(str(m.get("content")) for m in asked["messages"])
            key = digest(" ".join(text.lower().split()))
            counts["repeated_prompts"] += key in found or key in of_source
            of_source.setdefault(key, {**asked, "domain": row.get("domain", source)})
        order = sorted(of_source.keys() - found.keys(), key=lambda k: digest(f"{config.seed}:{k}"))
        found |= {key: of_source[key] for key in order[: config.limit]}
    keys = sorted(found, key=lambda k: digest(f"{config.seed}:{k}"))
    prompts = []
    for start in range(0, len(keys), 1000):  # the tokenizer uses all cores within one call
        part = [found[key] for key in keys[start : start + 1000]]
        texts = [
            tokenizer.apply_chat_template(r["messages"], tokenize=False, add_generation_prompt=True)
            if "messages" in r
            else r["text"]
            for r in part
        ]
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        prompts += [Prompt(*p) for p in zip(part, ids, keys[start : start + 1000], strict=True)]
    kept = [p for p in prompts if 0 < len(p.ids) <= config.max_prompt_length]
    counts["too_long"] = len(prompts) - len(kept)
    return kept, counts


def shards(config: GenerateDataConfig, prompts: list[Prompt]) -> dict[str, list[Prompt]]:
    """File name -> prompts; a prompt's hash decides its side of the split."""
    out: dict[str, list[Prompt]] = {}
    sides: dict[str, list[Prompt]] = {"train": [], "held_out": []}
    for prompt in prompts:
        order = hash_of(prompt_of(prompt.row), config.seed)  # as `split_rows`, by which QAD holds out its chats
        sides["held_out" if is_held_out(order, config.held_out) else "train"].append(prompt)
    for side, chosen in sides.items():
        for n, start in enumerate(range(0, len(chosen), config.shard_prompts)):
            out[f"{side}-{n:05d}.jsonl"] = chosen[start : start + config.shard_prompts]
    return out


def answer(
    decoder: Decoder, tokenizer: Any, prompts: Sequence[Prompt], temperatures: Sequence[float], seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the answers worth keeping, in the order of (prompt, temperature), and the counts of COUNTS."""
    jobs = [Job(p.ids, t, f"{seed}:{p.key}:{t}") for p in prompts for t in temperatures]
    rows, counts, seen = [], Counter(dict.fromkeys(COUNTS, 0)), set()
    asked = [(p, t) for p in prompts for t in temperatures]
    for (prompt, temperature), decoded in zip(asked, decoder.run(jobs), strict=True):
        text = tokenizer.decode(decoded.tokens[: len(decoded.tokens) - decoded.stopped], skip_special_tokens=True)
        what = "empty" if not text.strip() else "looping" if distinct_3(decoded.tokens) < LOOPING else None
        if what is None and text in seen:
            what = "repeated"
        if what:
            counts[what] += 1
            continue
        seen.add(text)
        counts.update(answers=1, tokens=len(decoded.tokens), stopped=int(decoded.stopped))
        rows.append(_row(prompt, temperature, decoded, text))
    return rows, dict(counts)


def _row(prompt: Prompt, temperature: float, decoded: Decoded, text: str) -> dict[str, Any]:
    if "messages" in prompt.row:
        said = {"messages": [*prompt.row["messages"], {"role": "assistant", "content": text}]}
    else:
        said = {"text": prompt.row["text"] + text}
    return {
        **said,
        "domain": prompt.row["domain"],
        "temperature": temperature,
        "prompt_id": prompt.key,
        "finish": "stop" if decoded.stopped else "length",
        "prompt_ids": prompt.ids,
        "answer_ids": decoded.tokens,
    }


def _claim(out: Path, config: GenerateDataConfig, process: int) -> None:
    """Marks the folder as this configuration's; ValueError where another one's shards are in it."""
    path, free = out / "generation.json", ("output_dir", "batch_size")
    now = {k: v for k, v in asdict(config).items() if k not in free}
    if path.is_file():
        before = json.loads(path.read_text())
        odd = next((k for k in now if before.get(k) != now[k]), None)
        if odd:
            raise ValueError(
                f"{out} was made with {odd} {before.get(odd)!r}, now {now[odd]!r}; choose another output_dir"
            )
    elif process == 0:
        write_json(path, now)


def _processes() -> tuple[int, int]:
    """(number of this process, number of processes) of a launch; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _missing(config: GenerateDataConfig, parts: dict[str, list[Prompt]]) -> Iterator[str]:
    """The shards of this process that are not there yet: every WORLD_SIZE-th of all."""
    process, processes = _processes()
    for n, name in enumerate(parts):
        if n % processes == process and not (Path(config.output_dir) / name).is_file():
            yield name


def write_manifest(config: GenerateDataConfig, parts: dict[str, list[Prompt]], counts: dict[str, int]) -> bool:
    """Counts what the folder holds once every shard is there, and returns whether that is so.

    `asked` less `answers` is what was dropped. One process at a time, so that those that end together write one file.
    """
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        complete = all((out / name).is_file() for name in parts)
        if complete and not (out / "manifest.json").is_file():
            write_json(out / "manifest.json", {"prompts": counts, **count_rows(config, parts)})
        return complete
    finally:
        os.close(folder)  # and with it the lock


def count_rows(config: GenerateDataConfig, parts: dict[str, list[Prompt]]) -> dict[str, Any]:
    """{"answers": a table by side, domain and temperature, "files": counts of each} of the shards on disk."""
    groups: dict[tuple[str, str, float], Counter[str]] = {}
    files = {}
    for name, prompts in parts.items():
        side, answers, tokens = name.rpartition("-")[0], 0, 0
        for prompt in prompts:
            for temperature in config.temperatures_of(name):
                groups.setdefault((side, prompt.row["domain"], temperature), Counter())["asked"] += 1
        for row in read_rows(Path(config.output_dir) / name):
            length, stopped = len(row["answer_ids"]), int(row["finish"] == "stop")
            groups[side, row["domain"], row["temperature"]].update(answers=1, tokens=length, stopped=stopped)
            answers, tokens = answers + 1, tokens + length
        files[name] = {"prompts": len(prompts), "answers": answers, "tokens": tokens}
    table = [
        {"side": side, "domain": domain, "temperature": temperature}
        | {what: counted[what] for what in ("asked", "answers", "tokens", "stopped")}
        for (side, domain, temperature), counted in sorted(groups.items())
    ]
    return {"answers": table, "files": files}


def main(config: GenerateDataConfig) -> dict[str, Any]:
    """Writes the target's own answers to prompts; returns the counts of this process's shards."""
    out, tokenizer = Path(config.output_dir), load_tokenizer(config.target)
    _claim(out, config, _processes()[0])
    prompts, counts = read_prompts(config, tokenizer)
    if not prompts:
        raise ValueError(f"{config.prompts}: no prompt of 1 to {config.max_prompt_length} tokens; give other sources")
    parts = shards(config, prompts)
    todo, began, made = list(_missing(config, parts)), time.perf_counter(), Counter(dict.fromkeys(COUNTS, 0))
    if todo:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model = load_model(config.target, torch.bfloat16 if config.bf16 else torch.float32, device).eval()
        longest = max(len(p.ids) for p in prompts)
        decoder = Decoder(model, config.batch_size, longest, config.max_new_tokens, end_token_ids(model, tokenizer))
        began = time.perf_counter()
        for name in tqdm(todo, desc="answering", unit="shard", disable=None):
            rows, shard_counts = answer(decoder, tokenizer, parts[name], config.temperatures_of(name), config.seed)
            made.update(shard_counts)
            write_rows(out / name, rows)
    seconds = time.perf_counter() - began
    if _processes()[0] == 0:
        write_provenance(out, config)
    complete = write_manifest(config, parts, counts)
    return {
        "ok": complete or _processes()[1] > 1,
        "folder": str(out),
        "prompts": len(prompts),
        **counts,
        "shards": len(parts),
        "shards_made": len(todo),
        **made,
        "tokens_per_s": round(made["tokens"] / seconds, 1) if todo else None,
    }
