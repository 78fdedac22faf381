"""Lossless speculative decoding: the drafter proposes a block, the target verifies it, the longest true prefix stays.

The token at absolute position p is the argmax of the target's (filtered, scaled) logits plus Gumbel noise that depends
on (seed, p, token id) only. So the target's choice at every position is a function of its true prefix, drafts are
compared with it for equality, and the output is the same sequence with and without a drafter, at every temperature.
The drafter chooses with the same noise, which makes it agree more often than its argmax would (Daliri et al. 2024,
arXiv 2408.07978, "drafter-invariant speculative decoding").
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

import torch

from mimo_runtime.config import SamplingConfig

_MASK64 = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15  # the increment and the finaliser of splitmix64 (Steele, Lea, Flood 2014)


def _signed(x: int) -> int:
    """The low 64 bits of x as the int64 that torch can hold."""
    x &= _MASK64
    return x - 2**64 if x >= 2**63 else x


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser on int64 tensors; torch shifts arithmetically, so the copies of the sign are masked."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))


def gumbel_noise(seed: int, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Float32 Gumbel noise [R, n] of token ids [R or 1, n] at absolute positions [R].

    A counter-based hash of (seed, position, id): no state, no order, any subset of the vocabulary alone. It is
    -log(E) with E = -log(1 - u) and u of 53 bits, so that the rare large values keep their resolution.
    """
    key = _mix(positions.long() * _signed(_STEP) + _signed(seed))[:, None]
    bits = (_mix(key + (ids.long() + 1) * _signed(_STEP)) >> 11) & (2**53 - 1)
    u = ((bits.double() + 0.5) * 2.0**-53).float().clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def choose(logits: torch.Tensor, positions: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """The token [R] for each row of logits [R, n], row r standing at position positions[r]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        values, ids = values.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        values, ids = values.sort(dim=-1, descending=True, stable=True)
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device)[None]
    if sampling.top_p < 1:  # a token stays if those before it do not reach top_p yet
        p = values.softmax(-1)
        values = values.masked_fill(p.cumsum(-1) - p >= sampling.top_p, float("-inf"))
    best = (values + gumbel_noise(sampling.seed, positions, ids)).argmax(-1, keepdim=True)
    return ids.expand(values.shape).gather(1, best)[:, 0]


class Round(NamedTuple):
    """One verification: the tokens it commits, of `drafted` drafts the number accepted, and whether it was cut short
    by a stop token or by the budget (a cut round says nothing about acceptance)."""

    tokens: list[int]
    drafted: int
    accepted: int
    cut: bool


Propose = Callable[[int, int], list[int]]  # (anchor, its position) -> the drafts that follow it, possibly none
Verify = Callable[[list[int], int], torch.Tensor]  # (rows, position of the first) -> logits [rows, vocabulary]


def decode(
    verify: Verify, propose: Propose, anchor: int, start: int, budget: int, sampling: SamplingConfig
) -> Iterator[Round]:
    """Yields rounds until a stop token or `budget` tokens; `anchor` is the last committed token, at position `start`.

    A round verifies [anchor, drafts...] in one target call. Row i gives the target's own token at position
    start + i + 1; drafts count while they equal it, and the first that differs is replaced by it.
    """
    stopped = False
    while budget > 0 and not stopped:
        drafts = propose(anchor, start)
        logits = verify([anchor, *drafts], start)
        positions = torch.arange(start + 1, start + 1 + len(logits), device=logits.device)
        own = choose(logits, positions, sampling).tolist()
        accepted = next((i for i, (d, t) in enumerate(zip(drafts, own, strict=False)) if d != t), len(drafts))
        tokens = own[: accepted + 1]
        stop = next((i for i, t in enumerate(tokens) if t in sampling.stop_token_ids), budget)
        kept = tokens[: min(stop + 1, budget)]
        yield Round(kept, len(drafts), accepted, len(kept) < len(tokens))
        start, budget, anchor, stopped = start + len(kept), budget - len(kept), kept[-1], stop < len(kept)


def forced_drafts(truth: list[int], first: int, lengths: list[int], block: int, vocab_size: int) -> Propose:
    """A proposer whose round r has exactly min(lengths[r % len], block - 1) accepted drafts, for tests and labelled
    benchmarks: the target's own tokens `truth` (the token at position `first` + i is truth[i]), then wrong ones.
    """
    if not lengths or min(lengths) < 0:
        raise ValueError(f"forced_acceptance is {lengths}; give numbers of accepted drafts, 0 to {block - 1}")
    rounds = count()

    def propose(anchor: int, start: int) -> list[int]:
        accept = lengths[next(rounds) % len(lengths)]
        ahead = truth[start + 1 - first :][: block - 1]
        ahead += [anchor] * (block - 1 - len(ahead))
        return [t if i < accept else (t + 1) % vocab_size for i, t in enumerate(ahead)]

    return propose
