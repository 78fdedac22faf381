"""Prompts to measure on, and how they become token ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """One user message and the domain it is counted under."""

    text: str
    domain: str


def load_prompts(path: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a .jsonl file of {"prompt": ..., "domain": ...} (domain may be absent), or the bundled ones.

    A row {"messages": [...]} counts as its first user message, so files of training rows serve as well. `limit`
    takes that many, evenly spaced, so that every domain stays. ValueError names a line that is not a prompt.
    """
    path = Path(path) if path else BUNDLED
    if not path.is_file():
        raise ValueError(f'{path} does not exist; give a .jsonl file of {{"prompt": ..., "domain": ...}}')
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["prompt"] if "prompt" in row else _question(row["messages"])
            prompts.append(Prompt(text, row.get("domain", "all")))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, StopIteration):
            raise ValueError(f'{path} line {number} is not {{"prompt": ..., "domain": ...}}; correct it') from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts; add at least one line")
    count = min(limit or len(prompts), len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _question(messages: list[dict[str, str]]) -> str:
    return next(m["content"] for m in messages if m["role"] == "user")


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a checkpoint folder; nothing in the folder is executed."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    if not any((Path(folder) / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(
            f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json from the source model"
        )
    from transformers import AutoTokenizer

    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config

    # With the configuration at hand transformers need not guess the model's type, and warn that it cannot.
    config = MiMoV2Config.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def encode(tokenizer: Any, text: str, chat: bool = True) -> list[int]:
    """Token ids of a user message in the chat template, or of the bare text where there is no template."""
    return encode_messages(tokenizer, [{"role": "user", "content": text}], chat)


def encode_messages(tokenizer: Any, messages: list[dict[str, str]], chat: bool = True) -> list[int]:
    """Token ids of a conversation; after a user's message the template's start of an answer follows."""
    if not (chat and tokenizer.chat_template):
        return tokenizer.encode("\n\n".join(m["content"] for m in messages))
    ask = messages[-1]["role"] == "user"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return tokenizer.encode(text, add_special_tokens=False)
