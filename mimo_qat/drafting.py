"""How many drafts a target accepts, and what would flatter the figure: statistics that trainer and runtime share.

A round is the number of tokens that one verification commits, the target's own after the drafts included. A round that
ends with the text's last token counts up to it; one that a budget of tokens cuts is left out, because its length says
nothing about the drafter. Acceptance length is pooled, all tokens by all rounds: it is what speed follows.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch


def mean_rounds(rounds: Sequence[Sequence[int]]) -> float:
    """Pooled acceptance length of texts, one list of rounds each (1.0 without any)."""
    count = sum(len(r) for r in rounds)
    return sum(sum(r) for r in rounds) / count if count else 1.0


def bootstrap_interval(rounds: Sequence[Sequence[int]], draws: int = 1000) -> list[float]:
    """95 % interval of the pooled acceptance length, resampling whole texts; those without a round are left out."""
    sums = torch.tensor([[sum(r), len(r)] for r in rounds if r] or [[1, 1]], dtype=torch.float64)
    picks = torch.randint(len(sums), (draws, len(sums)), generator=torch.Generator().manual_seed(0))
    pooled = sums[picks].sum(1)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return [round(q, 3) for q in torch.quantile(pooled[:, 0] / pooled[:, 1], quantiles).tolist()]


def survival(rounds: Sequence[Sequence[int]], block: int) -> tuple[list[float], list[float | None]]:
    """(share of rounds that accept at least k drafts, share of those that do among those that accept k - 1), for k = 1
    to block - 1; None where no round got so far."""
    flat = [r for one in rounds for r in one]
    reached = [sum(r > k for r in flat) for k in range(block)]
    shares = [n / max(1, len(flat)) for n in reached[1:]]
    return shares, [n / before if before else None for before, n in pairwise(reached)]


def lookup_rounds(prompt: Sequence[int], tokens: Sequence[int], block: int, longest: int = 3) -> list[int]:
    """Rounds that prompt lookup would have needed for the same text: a drafter without weights, which one with weights
    has to beat.

    It proposes what followed the latest earlier occurrence of the last 3, 2 or 1 tokens. Speculation never changes the
    text, so a replay over the known tokens is exact. A repetitive text scores high here as well.
    """
    text, at, rounds = [*prompt, *tokens], len(prompt) + 1, []
    latest: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence that ends before `at` ends
    indexed = 0
    while at < len(text):
        for end in range(indexed + 1, at):
            latest |= {tuple(text[end - n : end]): end for n in range(1, longest + 1) if end >= n}
        indexed = at - 1
        tails = (tuple(text[at - n : at]) for n in range(min(longest, at - 1), 0, -1))
        found = next((latest[tail] for tail in tails if tail in latest), None)
        proposal = text[found : min(found + block - 1, at)] if found is not None else []
        accepted = 0
        while accepted < len(proposal) and at + accepted < len(text) and proposal[accepted] == text[at + accepted]:
            accepted += 1
        if at + accepted + 1 <= len(text):
            rounds.append(accepted + 1)
        at += accepted + 1
    return rounds


def distinct_3(tokens: Sequence[int]) -> float:
    """Share of different trigrams; below 0.3 a text is looping. 1.0 for fewer than three tokens."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
