"""Lossless speculative decoding: the drafter proposes a block, the target verifies it, the longest true prefix stays.

The token at absolute position p is the argmax of the target's (filtered, scaled) logits plus Gumbel noise that depends
on (seed, p, token id) only. So the target's choice at every position is a function of its true prefix, drafts are
compared with it for equality, and the output is the same sequence with and without a drafter, at every temperature.
The drafter chooses with the same noise, which makes it agree more often than its argmax would (Daliri et al. 2024,
arXiv 2408.07978, "drafter-invariant speculative decoding").
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch

from mimo_kernels.choice import Best, tokens
from mimo_qat.models.draft_tree import (
    TOP_K,
    Candidates,
    Tree,
    marginal_candidates,
    top_candidates,
    transition_scores,
)
from mimo_runtime.cache import Position
from mimo_runtime.config import SamplingConfig
from mimo_runtime.load import Selector
from mimo_runtime.model import linear

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


class Sampler(NamedTuple):
    """A `SamplingConfig` on a device: what decides which kernels run as Python values, every other number as a tensor,
    so that one CUDA graph serves all temperatures and seeds."""

    greedy: bool
    top_k: int  # 0 is all
    nucleus: bool  # whether top_p filters
    temperature: torch.Tensor  # [] float32
    top_p: torch.Tensor  # [] float32
    seed: torch.Tensor  # [] int64

    @classmethod
    def of(cls, sampling: SamplingConfig, device: torch.device | str = "cpu") -> "Sampler":
        """The sampler of these settings."""
        temperature, top_p = (torch.tensor(x, device=device) for x in (float(sampling.temperature), sampling.top_p))
        seed = torch.tensor(_signed(sampling.seed), device=device)
        if sampling.temperature == 0:
            return cls(True, 0, False, temperature, top_p, seed)
        return cls(False, sampling.top_k, sampling.top_p < 1, temperature, top_p, seed)


def gumbel_noise(seed: int | torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Float32 Gumbel noise [R, n] for a `seed` of int64, of token ids [R or 1, n] at absolute positions [R].

    A counter-based hash of (seed, position, id): no state, no order, any subset of the vocabulary alone. It is
    -log(E) with E = -log(1 - u) and u of 53 bits, so that the rare large values keep their resolution.
    """
    key = _mix(positions.long() * _signed(_STEP) + seed)[:, None]
    bits = (_mix(key + (ids.long() + 1) * _signed(_STEP)) >> 11) & (2**53 - 1)
    u = ((bits.double() + 0.5) * 2.0**-53).float().clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def scored(logits: torch.Tensor, positions: torch.Tensor, sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [R, m], token ids [R or 1, m]) above temperature 0: the highest score is the choice at a position."""
    values = logits.float() / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        values, ids = values.topk(sampler.top_k, dim=-1)
    elif sampler.nucleus:
        values, ids = values.sort(dim=-1, descending=True, stable=True)
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device)[None]
    if sampler.nucleus:  # a token stays if those before it do not reach top_p yet
        p = values.softmax(-1)
        values = values.masked_fill(p.cumsum(-1) - p >= sampler.top_p, float("-inf"))
    return values + gumbel_noise(sampler.seed, positions, ids), ids


def choose(logits: torch.Tensor | Best, positions: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """The token [R] for each row of logits [R, n], row r standing at position positions[r]; of a greedy sampler the
    best of each row will do."""
    if isinstance(logits, Best):
        assert sampler.greedy
        return tokens(logits)
    if sampler.greedy:
        return logits.argmax(-1)
    values, ids = scored(logits, positions, sampler)
    return ids.expand(values.shape).gather(1, values.argmax(-1, keepdim=True))[:, 0]


def candidates_a_slot(selector: Selector | None, vocab_size: int, sampler: Sampler) -> int:
    """How many candidates `draft_candidates` gives a slot, of logits [D, vocab_size]."""
    most = TOP_K if selector is None else selector.top_k
    return min(most, sampler.top_k or vocab_size, vocab_size)


def draft_candidates(
    selector: Selector | None,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    anchor: torch.Tensor,
    start: Position,
    sampler: Sampler,
) -> Candidates:
    """Candidates of the slots after `anchor` [] at position `start`, from hidden [D, H] and logits [D, V].

    Above temperature 0 the scores are perturbed logits, U + T * noise, with the noise that the target's choice will
    have there: the best candidate is what `choose` takes. They are in units of logits at every T, because what is
    uncertain about the choice, once its noise is known, is how far the target's logits are from the drafter's.
    """
    scores, ids = logits, None
    if not sampler.greedy:
        positions = start + 1 + torch.arange(len(logits), device=logits.device)
        scores, ids = scored(logits, positions, sampler)
        scores = scores * sampler.temperature
    if selector is None:
        return marginal_candidates(scores, ids=ids)
    ids, unary = top_candidates(scores, selector.top_k, ids)
    gate = linear(hidden, selector.projection)
    pairs = transition_scores(unary, ids, gate, anchor, (selector.before, selector.after))
    return Candidates(ids, pairs.log_softmax(-1))


class Round(NamedTuple):
    """One verification: the tokens it commits, of `drafted` drafts (all nodes of a tree) the number accepted, and
    whether it was cut short by a stop token or by the budget (a cut round says nothing about acceptance)."""

    tokens: list[int]
    drafted: int
    accepted: int
    cut: bool


Propose = Callable[[int, int], Tree]  # (anchor, its position) -> the drafts that follow it, possibly none
Verify = Callable[[list[int], Tree, int], torch.Tensor]  # (tokens of the rows, tree, anchor's position) -> their logits
Commit = Callable[[list[int], int], None]  # (rows of the true path, anchor's position)


def decode(
    verify: Verify,
    propose: Propose,
    anchor: int,
    start: int,
    budget: int,
    sampler: Sampler,
    stop_token_ids: Sequence[int] = (),
    commit: Commit = lambda path, start: None,
) -> Iterator[Round]:
    """Yields rounds of trees until a stop token or `budget` tokens; `anchor` is the last committed token, at `start`.

    The host grows trees and walks them, where their size or their drafts are its business; all else is left to the
    device, see `rounds`. A round verifies [anchor, drafts...] in one target call. A row at depth d gives the target's
    own token at position start + d + 1 after the row's prefix; the walk goes down while a child is that token, and the
    first that no child is ends it. All nodes of a depth share one position, hence one noise: the text is that of plain
    decoding.
    """
    stopped = False
    while budget > 0 and not stopped:
        tree = propose(anchor, start)
        logits = verify([anchor, *tree.tokens], tree, start)
        positions = torch.tensor([start + 1 + depth for depth in (0, *tree.depths)], device=logits.device)
        own = choose(logits, positions, sampler).tolist()
        path = tree.walk(own)
        commit(path, start)
        tokens = [own[row] for row in path]
        stop = next((i for i, t in enumerate(tokens) if t in stop_token_ids), budget)
        kept = tokens[: min(stop + 1, budget)]
        yield Round(kept, len(tree), len(path) - 1, len(kept) < len(tokens))
        start, budget, anchor, stopped = start + len(kept), budget - len(kept), kept[-1], stop < len(kept)


def forced_drafts(
    truth: list[int], first: int, lengths: list[int], block: int, vocab_size: int, siblings: int = 0
) -> Propose:
    """A proposer of trees whose round r has exactly min(lengths[r % len], block - 1) accepted drafts, for tests and
    labelled benchmarks: the target's own tokens `truth` (that at position `first` + i is truth[i]), then wrong ones.

    With `siblings`, each draft comes after so many wrong ones of the same parent: the true path is no prefix of the
    rows then.
    """
    rounds = count()

    def propose(anchor: int, start: int) -> Tree:
        accept = lengths[next(rounds) % len(lengths)]
        ahead = truth[start + 1 - first :][: block - 1]
        ahead += [anchor] * (block - 1 - len(ahead))
        tree, parent = Tree([], [], [], []), 0
        for depth, token in enumerate(ahead, 1):
            right = token if depth <= accept else (token + 1) % vocab_size
            tree.tokens.extend([(token + 2 + i) % vocab_size for i in range(siblings)] + [right])
            tree.parents.extend([parent] * (siblings + 1))
            tree.depths.extend([depth] * (siblings + 1))
            parent = len(tree)
        return tree

    return propose
