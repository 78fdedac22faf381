"""Acceptance over text that the target wrote, without decoding it again.

A greedy drafter's drafts are a function of the true prefix, and speculation with equality acceptance emits the
target's own text at every temperature. So over a known text the rounds of real decoding follow exactly from the drafts
at every anchor: start at the answer's first token, jump by accepted + 1. One training-style forward gives all those
drafts at once, and the chain, the oracle and trees of every budget come from the same pass.

This measures greedy drafts. `mimo_runtime` may let the drafter choose with the target's own position-keyed noise, which
agrees more often above temperature 0. Rounds are counted as `evaluate.speculate` counts them: one that the text's end
cuts short counts up to an end-of-sequence token, and not at all where the text merely stops.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from mimo_qat.distill.blocks import blocks_at, valid_anchors
from mimo_qat.distill.generate import LOOPING
from mimo_qat.distill.taps import Taps
from mimo_qat.distill.train import draft_rows
from mimo_qat.drafting import bootstrap_interval, distinct_3, lookup_rounds, mean_rounds, survival
from mimo_qat.models.draft_tree import (
    TOP_K,
    Candidates,
    greedy_chain,
    grow_tree,
    marginal_candidates,
    top_candidates,
    transition_scores,
)

Batch = dict[str, torch.Tensor]
HEAD_ROWS = 512  # rows whose target logits exist at a time


class Span(NamedTuple):
    """An answer: positions start..end-1 of a packed row; `ended` says that the last one ends a sequence."""

    start: int
    end: int
    ended: bool


@dataclass
class Text:
    """One replayed answer.

    `rounds` maps a way of drafting to the tokens that each of its verifications commits: "chain" (with the selector if
    there is one), "argmax", "oracle" (whichever of the candidates is right) and a tree of each budget. `hits` [2, b-1]
    and `seen` [b-1] count labels that were the best and among the candidates of a slot, over all anchors. `agreed`
    counts tokens that are the target's argmax, `entropy` sums the target's over tokens, in nats.
    """

    prompt: list[int]
    tokens: list[int]
    rounds: dict[str, list[int]]
    hits: torch.Tensor
    seen: torch.Tensor
    agreed: int
    entropy: float


@dataclass(frozen=True)
class Drafts:
    """What the drafter proposes at A anchors (D = b-1 slots), on the CPU.

    anchors [A]; candidates [A, D, ...]; chain, argmax, labels [A, D] token ids; known [A, D] bool: the text has a
    label there.
    """

    anchors: torch.Tensor
    candidates: Candidates
    chain: torch.Tensor
    argmax: torch.Tensor
    labels: torch.Tensor
    known: torch.Tensor

    def accepted(self, right: torch.Tensor) -> torch.Tensor:
        """Slots [A] before the first that is not `right` [A, D] or that the text does not reach."""
        return (right & self.known).long().cumprod(-1).sum(-1)

    def tree_rows(self, at: int, budget: int) -> list[int]:
        """Rows of the true path in the tree of anchor number `at`: a smaller tree is a prefix of a larger one."""
        tree = grow_tree(self.candidates[at], budget)
        truth = [*torch.where(self.known[at], self.labels[at], -1).tolist(), -1]
        return tree.walk([truth[0], *(truth[depth] for depth in tree.depths)])[1:]


def answer_spans(row: Batch, eos_token_ids: Iterable[int] = ()) -> list[Span]:
    """The supervised stretches of one packed row [S], each cut after its first end-of-sequence token.

    A document without a prompt is replayed after its first token, since decoding starts from at least one.
    """
    ends, spans, start = set(eos_token_ids), [], None
    ids, docs = row["input_ids"].tolist(), row["doc_ids"].tolist()
    told = [bool(m) and d >= 0 for m, d in zip(row["loss_mask"].tolist(), docs, strict=True)]
    for at in range(len(ids) + 1):
        if start is not None and (at == len(ids) or not told[at] or docs[at] != docs[start]):
            stop = next((i + 1 for i in range(start, at) if ids[i] in ends), at)
            spans.append(Span(start, stop, ids[stop - 1] in ends))
            start = None
        if start is None and at < len(ids) and told[at]:
            first = at == 0 or docs[at - 1] != docs[at]
            start = at + 1 if first and at + 1 < len(ids) and docs[at + 1] == docs[at] else at
    return [s for s in spans if s.end > s.start]


def walk_rounds(span: Span, accepted: Callable[[int], int]) -> list[int]:
    """Tokens that each verification commits; `accepted(position)` drafts are right at that anchor."""
    rounds, at = [], span.start
    while (left := span.end - 1 - at) > 0:
        right = accepted(at)
        if right >= left and not span.ended:
            break  # the target's own token after these drafts lies beyond the text
        rounds.append(min(right + 1, left))
        at += right + 1
    return rounds


def draft_everywhere(target: Any, drafter: Any, row: Batch, taps: torch.Tensor, chunk_anchors: int) -> Drafts:
    """Drafts at every anchor of one packed row [1, S], `chunk_anchors` blocks at a time; taps [1, S, T*H].

    Every chunk has the same shape (the last is filled up with invalid blocks), so that kernels are compiled once.
    """
    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    device, size = taps.device, drafter.config.block_size
    anchors = valid_anchors(row["loss_mask"], row["doc_ids"])[0].nonzero()[:, 0]
    parts = []
    for chunk in anchors.split(chunk_anchors):
        padded = torch.zeros(1, chunk_anchors, dtype=torch.long)
        padded[0, : len(chunk)] = chunk
        valid = (torch.arange(chunk_anchors) < len(chunk))[None]
        blocks = blocks_at(row, padded, valid, size).to(device)
        hidden = draft_rows(drafter, embed, row["input_ids"].to(device), blocks, taps)[0, : len(chunk)]
        logits = head(hidden).float()
        candidates = candidates_of(drafter, hidden, logits, row["input_ids"][0, chunk].to(device))
        labels, known = blocks.labels[0, : len(chunk)], blocks.supervised[0, : len(chunk)]
        made = (candidates.ids, candidates.log_probs, greedy_chain(candidates), logits.argmax(-1), labels, known)
        parts.append([t.cpu() for t in made])
    ids, log_probs, chain, argmax, labels, known = (torch.cat(p) for p in zip(*parts, strict=True))
    return Drafts(anchors, Candidates(ids, log_probs), chain, argmax, labels, known)


def candidates_of(drafter: Any, hidden: torch.Tensor, logits: torch.Tensor, anchors: torch.Tensor) -> Candidates:
    """Candidates of blocks from hidden [A, D, H], logits [A, D, V] float32 and anchor tokens [A]."""
    selector = drafter.candidate_selector
    if selector is None:
        return marginal_candidates(logits, TOP_K)
    ids, unary = top_candidates(logits, selector.top_k)
    codebooks = selector.predecessor_codebook, selector.successor_codebook
    scores = transition_scores(unary, ids, selector.hidden_projection(hidden), anchors, codebooks)
    return Candidates(ids, scores.log_softmax(-1))


def target_pass(target: Any, drafter: Any, row: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(taps [1, S, T*H]; whether each token of the row is the target's argmax, bool [S]; entropy of the target's
    distribution at each token, float32 [S]); both are 0 for the first token and where nothing is supervised."""
    device = target.get_input_embeddings().weight.device
    with Taps(target, drafter.config.target_layer_ids) as taps:
        out = target.model(
            row["input_ids"].to(device), position_ids=row["position_ids"].to(device), use_cache=False
        ).last_hidden_state[0]
        taken = taps.take()
    told = row["loss_mask"][0].bool()
    told[0] = False
    at = told.nonzero()[:, 0]
    agreed, entropy = torch.zeros(len(told), dtype=torch.bool), torch.zeros(len(told))
    for chunk in at.split(HEAD_ROWS):
        logits = target.get_output_embeddings()(out[(chunk - 1).to(device)]).float()
        log_probs = logits.log_softmax(-1)
        agreed[chunk] = logits.argmax(-1).cpu() == row["input_ids"][0, chunk]
        entropy[chunk] = -(log_probs.exp() * log_probs).sum(-1).cpu()
    return taken.to(drafter.fc.weight.dtype), agreed, entropy


@torch.no_grad()
def replay(
    target: Any,
    drafter: Any,
    batch: Batch,
    eos_token_ids: Iterable[int] = (),
    tree_budgets: Sequence[int] = (),
    chunk_anchors: int = 128,
) -> list[Text]:
    """Replays every answer of packed rows [R, S] (CPU tensors, as `mimo_qat.data.pack` gives them)."""
    texts, ends = [], list(eos_token_ids)
    for r in tqdm(range(len(batch["input_ids"])), desc="replaying", unit="row", disable=None, leave=False):
        row = {name: values[r : r + 1] for name, values in batch.items()}
        spans = [s for s in answer_spans({n: v[0] for n, v in row.items()}, ends) if s.end - s.start > 1]
        if not spans:
            continue
        row["loss_mask"] = torch.zeros_like(row["loss_mask"])
        for span in spans:
            row["loss_mask"][0, span.start : span.end] = 1
        taps, agreed, entropy = target_pass(target, drafter, row)
        drafts = draft_everywhere(target, drafter, row, taps, chunk_anchors)
        texts += [_text(row, span, drafts, tree_budgets, agreed, entropy) for span in spans]
    return texts


def _text(
    row: Batch, span: Span, drafts: Drafts, budgets: Sequence[int], agreed: torch.Tensor, entropy: torch.Tensor
) -> Text:
    inside = drafts.candidates.ids == drafts.labels[..., None]
    ways = {
        "chain": drafts.chain == drafts.labels,
        "argmax": drafts.argmax == drafts.labels,
        "oracle": inside.any(-1),
    }
    index = {a: i for i, a in enumerate(drafts.anchors.tolist()) if span.start <= a < span.end}
    rounds = {}
    for name, right in ways.items():
        accepted = drafts.accepted(right).tolist()
        rounds[name] = walk_rounds(span, lambda at, accepted=accepted: accepted[index[at]])  # type: ignore[misc]
    paths: dict[int, list[int]] = {}

    def in_tree(at: int, budget: int) -> int:
        if at not in paths:
            paths[at] = drafts.tree_rows(index[at], max(budgets))
        return sum(node <= budget for node in paths[at])

    for budget in budgets:
        rounds[f"tree {budget}"] = walk_rounds(span, lambda at, budget=budget: in_tree(at, budget))  # type: ignore[misc]
    chosen = torch.tensor(sorted(index.values()))
    known = drafts.known[chosen]
    docs, ids = row["doc_ids"][0], row["input_ids"][0]
    begin = int((docs[: span.start] == docs[span.start]).nonzero()[0, 0])
    return Text(
        prompt=ids[begin : span.start].tolist(),
        tokens=ids[span.start : span.end].tolist(),
        rounds=rounds,
        hits=torch.stack([(ways[name][chosen] & known).sum(0) for name in ("argmax", "oracle")]),
        seen=known.sum(0),
        agreed=int(agreed[span.start : span.end].sum()),
        entropy=float(entropy[span.start : span.end].sum()),
    )


def summary(texts: Sequence[Text], cap: int, top_k: int = TOP_K) -> dict[str, Any]:
    """Acceptance of replayed texts with what it has to be read beside; `cap` is the block size.

    Lengths are tokens a verification, bonus included; `survival[k-1]` is the share of verifications that accept at
    least k drafts, `hit_rate[k-1]` the share among those that accepted k - 1, `recall_at_*` over all anchors. Texts
    that loop are counted apart.
    """
    looping = [t for t in texts if distinct_3(t.tokens) < LOOPING]
    kept = [t for t in texts if distinct_3(t.tokens) >= LOOPING]
    out: dict[str, Any] = {
        "texts": len(kept),
        "looping": {"texts": len(looping), "acceptance_length": _length(looping, "chain")},
        "cap": cap,
    }
    if not any(t.rounds["chain"] for t in kept):
        return out
    rounds = [t.rounds["chain"] for t in kept]
    means = [sum(r) / len(r) for r in rounds if r]
    shares, hits = survival(rounds, cap)
    seen = torch.stack([t.seen for t in kept]).sum(0).clamp(min=1)
    recall = (torch.stack([t.hits for t in kept]).sum(0) / seen).tolist()
    tokens = sum(len(t.tokens) for t in kept)
    trees = [n for n in kept[0].rounds if n.startswith("tree ")]
    lookup = [lookup_rounds(t.prompt, t.tokens, cap) for t in kept]
    return out | {
        "tokens": tokens,
        "verifications": sum(map(len, rounds)),
        "acceptance_length": _length(kept, "chain"),
        "acceptance_length_ci95": bootstrap_interval(rounds),
        "acceptance_length_mean_over_prompts": round(sum(means) / len(means), 4),
        "survival": [round(s, 4) for s in shares],
        "hit_rate": [None if h is None else round(h, 4) for h in hits],
        "recall_at_1": [round(x, 4) for x in recall[0]],
        f"recall_at_{top_k}": [round(x, 4) for x in recall[1]],
        f"oracle_{top_k}": _length(kept, "oracle"),
        "argmax_acceptance_length": _length(kept, "argmax"),
        "tree": {n.split()[1]: _length(kept, n) for n in trees},
        "tree_ci95": {n.split()[1]: bootstrap_interval([t.rounds[n] for t in kept]) for n in trees},
        "ngram_acceptance_length": round(mean_rounds(lookup), 4),
        "distinct_3": round(sum(distinct_3(t.tokens) for t in kept) / len(kept), 4),
        "target_agreement": round(sum(t.agreed for t in kept) / tokens, 4),
        "target_entropy": round(sum(t.entropy for t in kept) / tokens, 4),
    }


def _length(texts: Sequence[Text], way: str) -> float | None:
    rounds = [t.rounds[way] for t in texts]
    return round(mean_rounds(rounds), 4) if any(rounds) else None


def replayed_acceptance(
    target: Any,
    drafter: Any,
    batch: Batch,
    eos_token_ids: Iterable[int] = (),
    tree_budgets: Sequence[int] = (),
    chunk_anchors: int = 128,
) -> dict[str, Any]:
    """`summary` of `replay`: the acceptance length that real decoding would have, for use during training."""
    training = drafter.training
    drafter.eval()
    texts = replay(target, drafter, batch, eos_token_ids, tree_budgets, chunk_anchors)
    drafter.train(training)
    return summary(texts, drafter.config.block_size, drafter.config.selector_top_k or TOP_K)
