"""Acceptance length by really decoding: draft, verify with the target, commit, roll back.

The output is the target's own at any temperature: drafts are greedy, the target picks (or samples) every position, and
a draft is accepted when it equals that pick. Acceptance length = committed tokens a verification, the target's own
("bonus") token included, so it lies in [1, block size].
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache

from mimo_qat.distill.taps import Taps
from mimo_qat.drafting import bootstrap_interval, distinct_3, lookup_rounds, mean_rounds, survival


@dataclass
class Decoded:
    """Tokens of one prompt, and the number of tokens every verification committed.

    A round that `max_new_tokens` cut is not in `rounds`: its length says nothing about the drafter. A round that ends
    with an end-of-sequence token counts up to that token.
    """

    tokens: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)


def pick(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """Token ids of logits [rows, V]: arg max, or a sample of softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def speculate(
    target: Any,
    drafter: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Decodes one prompt (token ids) with the drafter.

    The drafter's context after every round is exactly the committed tokens before the new anchor: its cache gets the
    taps of the rows just verified and accepted, and its own block rows are cropped after every draft.
    """
    device = target.get_input_embeddings().weight.device
    size, mask_id = drafter.config.block_size, drafter.config.mask_token_id
    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    cache, draft_cache = DynamicCache(config=target.config), DynamicCache(config=drafter.config)
    cache.activate_past_recording()
    draft_cache.activate_past_recording()
    ids = torch.tensor([list(prompt)], device=device)
    ends, done = set(eos_token_ids), Decoded()
    with Taps(target, drafter.config.target_layer_ids) as taps:
        logits = target(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        anchor = pick(logits[0], temperature, generator)
        context = taps.take()
        done.tokens.append(int(anchor))
        while len(done.tokens) < max_new_tokens and done.tokens[-1] not in ends:
            block = torch.cat((anchor, anchor.new_full((size - 1,), mask_id)))[None]
            hidden = drafter(embed(block), context, past_key_values=draft_cache).last_hidden_state
            draft_cache.crop(-size)
            rows = hidden[:, 1:]
            drafts = drafter.draft_tokens(rows, head(rows), anchor)[0]
            candidates = torch.cat((anchor, drafts))[None]
            logits = target(candidates, past_key_values=cache, use_cache=True).logits
            picks = pick(logits[0], temperature, generator)
            accepted = int((drafts == picks[:-1]).cumprod(0).sum())
            cache.crop(accepted + 1 - size)
            context = taps.take()[:, : accepted + 1]
            anchor = picks[accepted : accepted + 1]
            _commit(done, picks[: accepted + 1].tolist(), ends, max_new_tokens)
    return done


def _commit(done: Decoded, new: list[int], ends: set[int], max_new_tokens: int) -> None:
    stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    room = max_new_tokens - len(done.tokens)
    if stop <= room:
        done.rounds.append(stop)
    done.tokens += new[: min(stop, room)]


@torch.no_grad()
def greedy(target: Any, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Iterable[int] = ()) -> list[int]:
    """Plain greedy decoding, the reference that speculation must equal."""
    device = target.get_input_embeddings().weight.device
    cache, ends = DynamicCache(config=target.config), set(eos_token_ids)
    ids = torch.tensor([list(prompt)], device=device)
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
        ids = target(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        tokens.append(int(ids))
    return tokens


def evaluate(
    target: Any,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    compare_greedy: bool = False,
) -> dict[str, Any]:
    """Decodes every prompt at batch size 1 and reports acceptance with what it has to be read beside.

    `survival[k-1]` is the share of rounds that accepted at least k drafts. `compare_greedy` decodes again without
    the drafter and counts the prompts whose tokens are the same (temperature 0).
    """
    if not prompts:
        raise ValueError("no prompts to evaluate on; give eval_data or raise eval_fraction")
    ends = list(eos_token_ids)
    drafter.eval()
    device = target.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    start, decoded, same = time.perf_counter(), [], 0
    for prompt in tqdm(prompts, desc="decoding", disable=None):
        one = speculate(target, drafter, prompt, max_new_tokens, ends, temperature, generator)
        decoded.append(one)
        if compare_greedy:
            same += one.tokens == greedy(target, prompt, max_new_tokens, ends)
    rounds, size = [d.rounds for d in decoded], drafter.config.block_size
    lookup = [lookup_rounds(p, d.tokens, size) for p, d in zip(prompts, decoded, strict=True)]
    per_prompt = [sum(r) / len(r) for r in rounds if r]
    return {
        "acceptance_length": round(mean_rounds(rounds), 4),
        "acceptance_length_ci95": bootstrap_interval(rounds),
        "acceptance_length_mean_over_prompts": round(sum(per_prompt) / max(1, len(per_prompt)), 4),
        "acceptance_length_by_prompt": [round(a, 3) for a in per_prompt],
        "cap": size,
        "survival": [round(s, 4) for s in survival(rounds, size)[0]],
        "ngram_acceptance_length": round(mean_rounds(lookup), 4),
        "distinct_3": round(sum(distinct_3(d.tokens) for d in decoded) / len(decoded), 4),
        "prompts": len(prompts),
        "tokens": sum(len(d.tokens) for d in decoded),
        "verifications": sum(map(len, rounds)),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seconds": round(time.perf_counter() - start, 2),
        **({"equal_to_greedy": same} if compare_greedy else {}),
    }
