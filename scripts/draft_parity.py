"""python scripts/draft_parity.py runs/demo/release: transformers and mimo-runtime draft and accept the same.

transformers' own DFlash generation (`speculation_type="dflash"`) is an independent implementation of the loop. Both
decode the bundled prompts greedily in float32 with the release's drafter, which must have no selector (transformers
knows none). Prints the first differing round of a prompt and one JSON document last; exits with 1 if any differs.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from mimo_qat.checkpoint.reader import load_model
from mimo_qat.models.dflash_files import load_drafter
from mimo_qat.provenance import hardware, versions
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.prompts import encode, load_prompts, load_tokenizer

Rounds = list[tuple[list[int], int]]  # (drafts, how many were accepted)


def transformers_rounds(model: Any, drafter: Any, ids: list[int], max_new_tokens: int) -> tuple[list[int], Rounds]:
    """(new tokens, rounds) of transformers' generation; the last round is left out, as the limit may have cut it.

    What the target is called with tells it all: a verification is [anchor, drafts...], and how far the next one starts
    behind it is how many tokens were committed.
    """
    calls: list[tuple[int, list[int]]] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache = kwargs["past_key_values"] if "past_key_values" in kwargs else kwargs["cache"]
        calls.append((cache.get_seq_length(), rows[0].tolist()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    options = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, speculation_type="dflash"
    )
    try:
        out = model.generate(
            torch.tensor([ids], device=model.device), generation_config=options, assistant_model=drafter
        )
    finally:
        hook.remove()
    verifications = [c for c in calls if c[0] >= len(ids)]
    rounds = [(rows[1:], following - start - 1) for (start, rows), (following, _) in pairwise(verifications)]
    return out[0, len(ids) :].tolist(), rounds


def runtime_rounds(engine: Engine, ids: list[int], max_new_tokens: int) -> tuple[list[int], Rounds]:
    """(new tokens, rounds) of mimo-runtime's chain, without a round that the limit cut."""
    drafts: list[list[int]] = []
    draft = engine._draft

    def noted(*args: Any) -> Any:
        tokens = draft(*args)
        drafts.append(tokens.tolist())
        return tokens

    engine._draft = noted  # type: ignore[method-assign]
    try:
        out = engine.generate(ids, SamplingConfig(max_new_tokens=max_new_tokens, stop_token_ids=(-1,)), tree=False)
    finally:
        engine._draft = draft  # type: ignore[method-assign]
    return out.tokens, [(d, r.accepted) for d, r in zip(drafts, out.rounds, strict=True) if not r.cut]


def compare(model: Any, drafter: Any, engine: Engine, ids: list[int], max_new_tokens: int) -> dict[str, Any]:
    """Rounds of both on one prompt: how many, and the first that differs (None where all are equal)."""
    text, theirs = transformers_rounds(model, drafter, ids, max_new_tokens)
    tokens, ours = runtime_rounds(engine, ids, max_new_tokens)
    common = min(len(theirs), len(ours))
    first = next((i for i in range(common) if theirs[i] != ours[i]), None)
    return {
        "rounds": common,
        "accepted": sum(r[1] for r in ours[:common]),
        "same_text": text == tokens[: len(text)],
        "first_difference": first if first is not None or abs(len(theirs) - len(ours)) <= 1 else common,
    }


def main() -> int:
    """Runs every prompt in both; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=6, help="how many of the bundled prompts, evenly spread")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    folder = Path(options.folder)
    engine = Engine(folder, EngineConfig(dtype="float32", max_len=2048, rounds_ahead=1))
    if engine.drafter is None or engine.drafter.selector is not None:
        parser.error(f"{folder} has no drafter without a selector; give a release with a plain dflash/")
    model = load_model(folder, torch.float32, engine.device)
    model.generation_config.eos_token_id = None  # both run to max_new_tokens
    drafter = load_drafter(folder / "dflash", torch.float32, engine.device)
    tokenizer, results = load_tokenizer(folder), []
    for prompt in tqdm(load_prompts(limit=options.prompts), disable=None):
        results.append(compare(model, drafter, engine, encode(tokenizer, prompt.text), options.max_new_tokens))
        if results[-1]["first_difference"] is not None:
            print(f"differs from round {results[-1]['first_difference']}: {prompt.text[:60]!r}")
    same = [r["first_difference"] is None and r["same_text"] for r in results]
    rounds, accepted = (sum(r[k] for r in results) for k in ("rounds", "accepted"))
    document = {
        "ok": all(same),
        "prompts": len(same),
        "identical": sum(same),
        "rounds": rounds,
        "acceptance_length": 1 + accepted / rounds if rounds else None,
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(document))
    return 0 if document["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
