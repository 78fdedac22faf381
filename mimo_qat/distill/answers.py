"""mimo-qat answer --target TARGET --prompts stdlib --output answers.jsonl --max_new_tokens 128

Lets the target answer prompts itself. A drafter is trained on what its target would write, so its data are the
target's own answers, under the chat template and temperature of serving. Looping answers are dropped: they inflate
acceptance and teach nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from mimo_qat.checkpoint.reader import load_model
from mimo_qat.data import load_tokenizer, read_rows, write_rows
from mimo_qat.distill.evaluate import distinct_3

LOOPING = 0.3


@dataclass(kw_only=True)
class AnswerConfig:
    """Fields of `mimo-qat answer`."""

    target: str
    """checkpoint folder of the target"""
    prompts: str
    """rows with the prompts: a .jsonl file, a dataset on the hub, or "stdlib"; the last assistant turn is replaced"""
    output: str
    """.jsonl file to write"""
    limit: int | None = None
    """answer only so many rows, drawn by `seed`"""
    max_new_tokens: int = 512
    """longest answer in tokens; longer ones are cut and kept"""
    max_prompt_length: int = 2048
    """prompts with more tokens are left out"""
    batch_size: int = 16
    """prompts a batch; similar lengths go together"""
    temperature: float = 0.0
    """0 is greedy"""
    seed: int = 0
    """of the sampling and of the order"""
    bf16: bool = True
    """compute in bfloat16, else in float32"""


def questions(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """The messages of each row up to its last assistant turn; ValueError for a row that asks nothing."""
    prompts = []
    for i, row in enumerate(rows):
        messages = row.get("messages") or []
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ValueError(f"row {i} has no prompt; give rows with messages that begin with a user turn")
        prompts.append(messages)
    return prompts


def prompt_ids(tokenizer: Any, prompts: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of prompts under the chat template, ready for the assistant's turn."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the model's, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Answers every prompt (a list of messages) -> (rows {"messages": [...]} in the order of the prompts, counts).

    Batches are padded on the left. `counts`: prompts, answered, tokens, truncated (hit max_new_tokens, kept), looping
    (distinct-3 below 0.3, dropped), empty (dropped).
    """
    device = next(model.parameters()).device
    ids = prompt_ids(tokenizer, prompts)
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    counts = dict.fromkeys(("prompts", "answered", "tokens", "truncated", "looping", "empty"), 0)
    counts["prompts"] = len(prompts)
    answers: dict[int, str] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(order), batch_size), desc="answering", unit="batch", disable=None):
            chosen = order[start : start + batch_size]
            width = max(len(ids[i]) for i in chosen)
            rows = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in chosen], device=device)
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=device)
            out = model.generate(rows, attention_mask=mask, eos_token_id=ends or None, **options)[:, width:].tolist()
            for i, tokens in zip(chosen, out, strict=True):
                text = _keep(tokens, ends, tokenizer, counts)
                if text is not None:
                    answers[i] = text
    rows_out = [{"messages": [*prompts[i], {"role": "assistant", "content": answers[i]}]} for i in sorted(answers)]
    counts["answered"] = len(rows_out)
    return rows_out, counts


def _keep(tokens: list[int], ends: list[int], tokenizer: Any, counts: dict[str, int]) -> str | None:
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    counts["truncated"] += stop is None
    tokens = tokens[:stop]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if not text.strip():
        counts["empty"] += 1
        return None
    if distinct_3(tokens) < LOOPING:
        counts["looping"] += 1
        return None
    counts["tokens"] += len(tokens)
    return text


def main(config: AnswerConfig) -> dict[str, Any]:
    """Writes the target's own answers to prompts, as rows of messages."""
    rows = read_rows(config.prompts)
    # Not by the hash of `split_rows`: its first rows are the ones that a later split holds out.
    random.Random(config.seed).shuffle(rows)
    tokenizer = load_tokenizer(config.target)
    prompts = questions(rows[: config.limit])
    fits = [len(ids) <= config.max_prompt_length for ids in prompt_ids(tokenizer, prompts)]
    prompts = [p for p, ok in zip(prompts, fits, strict=True) if ok]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config.target, torch.bfloat16 if config.bf16 else torch.float32, device).eval()
    answered, counts = answer_prompts(
        model, tokenizer, prompts, config.max_new_tokens, config.batch_size, config.temperature, config.seed
    )
    write_rows(config.output, answered)
    return {
        "ok": bool(answered),
        "output": config.output,
        "temperature": config.temperature,
        **counts,
        "too_long": fits.count(False),
    }
