"""Draft trees against brute force over all prefixes, chains, and a walk by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_qat.models.draft_tree import (
    Candidates,
    Tree,
    best_prefix,
    greedy_chain,
    grow_tree,
    grow_tree_tensors,
    marginal_candidates,
    top_candidates,
    transition_scores,
    tree_size,
)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def selected(seed: int = 0, slots: int = 3, top_k: int = 4, vocab: int = 12, batch: tuple[int, ...] = ()):
    """Candidates of a selector with codebooks that matter, and what they were made of."""
    logits, gate = some(*batch, slots, vocab, seed=seed), some(*batch, slots, 5, seed=seed + 1)
    codebooks = some(vocab, 5, seed=seed + 2), some(vocab, 5, seed=seed + 3)
    anchors = torch.full(batch, 7)
    ids, unary = top_candidates(logits, top_k)
    scores = transition_scores(unary, ids, gate, anchors, codebooks)
    return Candidates(ids, scores.log_softmax(-1)), (logits, gate, codebooks)


def every_prefix(candidates: Candidates) -> list[tuple[float, tuple[int, ...]]]:
    """(log-probability, tokens) of all prefixes, by enumeration."""
    ids, log_probs = candidates.ids.tolist(), candidates.log_probs.double().tolist()
    found = []
    for depth in range(1, len(ids) + 1):
        for ranks in itertools.product(range(len(ids[0])), repeat=depth):
            total = 0.0
            for d, c in enumerate(ranks):
                row = ranks[d - 1] if d and len(log_probs[d]) > 1 else 0
                total += log_probs[d][row][c]
            found.append((total, tuple(ids[d][c] for d, c in enumerate(ranks))))
    return sorted(found, reverse=True)


def prefixes(tree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["marginal", "selector"])
def test_the_popped_nodes_are_the_most_probable_prefixes(seed, kind):
    candidates = marginal_candidates(some(3, 12, seed=seed), 4) if kind == "marginal" else selected(seed)[0]
    expected = every_prefix(candidates)
    for budget in (1, 2, 7, 30, 84, 200):
        tree = grow_tree(candidates, budget)
        assert len(tree) == min(budget, 84)
        assert prefixes(tree) == [tokens for _, tokens in expected[:budget]]
        assert tree.log_probs == pytest.approx([p for p, _ in expected[:budget]], abs=1e-5)
        assert tree.depths == [len(p) for p in prefixes(tree)]


def test_selector_scores_are_the_formula():
    """S(a, b) one pair at a time; the predecessors of the first slot are the anchor."""
    candidates, (logits, gate, (before, after)) = selected(3)
    for d in range(3):
        for p in range(4):
            a = 7 if d == 0 else int(candidates.ids[d - 1, p])
            scores = [logits[d, b] + (before[a] * gate[d] * after[b]).sum() for b in candidates.ids[d].tolist()]
            torch.testing.assert_close(candidates.log_probs[d, p], torch.stack(scores).log_softmax(0))


def test_a_selector_that_says_nothing_gives_the_marginal_order():
    logits = some(4, 20)
    ids, unary = top_candidates(logits, 5)
    scores = transition_scores(unary, ids, some(4, 3), torch.tensor(1), (some(20, 3), torch.zeros(20, 3)))
    assert greedy_chain(Candidates(ids, scores)).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["marginal", "selector"])
def test_one_child_a_node_is_the_greedy_chain(kind):
    batch = selected(5, slots=6, vocab=30, batch=(9,))[0] if kind == "selector" else None
    batch = batch or marginal_candidates(some(9, 6, 30), 4)
    chains = greedy_chain(batch).tolist()
    for i, chain in enumerate(chains):
        tree = grow_tree(batch[i], 6, width=1)
        assert tree.tokens == chain and tree.parents == list(range(6))
    assert batch.ids.diff(dim=-1).min() > 0


def test_ties_go_to_the_lowest_id():
    logits = torch.zeros(2, 6)
    logits[:, [4, 2]] = 1.0
    candidates = marginal_candidates(logits, 3)
    assert greedy_chain(candidates).tolist() == [2, 2] == logits.argmax(-1).tolist()
    assert grow_tree(candidates, 2).tokens == [2, 4]


def test_walk_and_mask_by_hand():
    """anchor -> 5 -> (8, 9), anchor -> 6 -> 8."""
    tree = grow_tree(marginal_candidates(torch.tensor([[2.0, 1.0]]), 2), 2)
    assert tree.walk([0, 4, 4]) == [0, 1] and tree.walk([1, 4, 4]) == [0, 2] and tree.walk([5, 0, 0]) == [0]
    tree = type(tree)([5, 6, 8, 9, 8], [0, 0, 1, 1, 2], [1, 1, 2, 2, 2], [])
    assert tree.walk([5, 9, 0, 0, 1, 0]) == [0, 1, 4] and tree.walk([6, 9, 8, 0, 1, 0]) == [0, 2, 5]
    assert tree.visible().int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]
    assert torch.equal(Tree([3, 3, 3], [0, 1, 2], [1, 2, 3], []).visible(), torch.ones(4, 4).tril().bool())


INFINITY = float("inf")
# Log-probabilities whose sums tie: equal ones, halves that add up, none at all, and ones too small to change a sum in
# float64 or in float32.
TYING = {
    "equal": st.just(-1.0),
    "few": st.sampled_from([-0.0, -0.5, -1.0, -1.5, -2.0]),
    "filtered": st.sampled_from([-0.25, -3.0, -INFINITY]),
    "lost": st.sampled_from([-1e-20, -2e-20, -1e-6, -2e-6, -64.0]),
    "any": st.floats(-30, 0, width=32),
}


@st.composite
def candidate_tables(draw) -> Candidates:
    slots, top_k, selector = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.booleans())
    values = st.lists(TYING[draw(st.sampled_from(sorted(TYING)))], min_size=top_k, max_size=top_k)
    rows = top_k if selector else 1
    table = draw(st.lists(values, min_size=slots * rows, max_size=slots * rows))
    ids = draw(st.lists(st.sets(st.integers(0, 11), min_size=top_k, max_size=top_k), min_size=slots, max_size=slots))
    return Candidates(torch.tensor([sorted(row) for row in ids]), torch.tensor(table).view(slots, rows, top_k))


def in_order(candidates: Candidates) -> list[tuple[int, ...]]:
    """The tokens of all prefixes, sorted by the rule's own words; parents' places are known once they are sorted."""
    ids, log_probs = candidates.ids.tolist(), candidates.log_probs.tolist()
    levels: list[list[tuple]] = []  # (key of the order, prefix as candidates)
    above: list[tuple] = [((-0.0,), ())]
    for slot in range(len(ids)):
        level = []
        for place, ((negative, *_), prefix) in enumerate(above):
            row = log_probs[slot][prefix[-1] if prefix and len(log_probs[slot]) > 1 else 0]
            level += [((negative - p, slot, place, -p, c), (*prefix, c)) for c, p in enumerate(row)]
        above = sorted(level)
        levels.append(above)
    ordered = sorted(entry for level in levels for entry in level)
    return [tuple(ids[slot][c] for slot, c in enumerate(prefix)) for _, prefix in ordered]


@settings(deadline=None, max_examples=300)
@given(candidate_tables(), st.integers(1, 64), st.data())
def test_both_programs_grow_the_same_tree_also_with_ties(candidates, budget, data):
    tree, found = grow_tree(candidates, budget), grow_tree_tensors(candidates, budget)
    assert len(tree) == tree_size(*candidates.ids.shape, budget)
    assert (found.tokens.tolist(), found.parents.tolist()) == (tree.tokens, tree.parents)
    assert found.depths.tolist() == [0, *tree.depths] and torch.equal(found.visible, tree.visible())
    assert all(parent < row for row, parent in enumerate(tree.parents, 1))
    slots, top_k = candidates.ids.shape
    if top_k**slots <= 1500:
        assert prefixes(tree) == in_order(candidates)[:budget]
    choices = data.draw(st.lists(st.integers(0, 11), min_size=len(tree) + 1, max_size=len(tree) + 1))
    for seed in tree.tokens[:3]:  # choices that go down the tree as well
        path, accepted = found.walk(torch.tensor(choices), slots)
        expected = tree.walk(choices)
        assert path.tolist() == expected + list(range(len(expected), min(slots, len(tree)) + 1))
        assert int(accepted) == len(expected) - 1
        children = [token for token, parent in zip(tree.tokens, tree.parents, strict=True) if parent == expected[-1]]
        choices[expected[-1]] = children[seed % len(children)] if children else 99


def test_the_size_of_a_tree_counts_all_prefixes():
    assert [tree_size(3, 4, budget) for budget in (1, 5, 84, 200)] == [1, 5, 84, 84]
    assert tree_size(15, 16, 32) == 32 and tree_size(7, 1, 32) == 7 and tree_size(15, 16, 10**9) == 10**9


@pytest.mark.parametrize("seed", range(4))
def test_the_best_prefix_is_the_best_of_all(seed):
    tree = grow_tree(selected(seed)[0], 40)
    for seconds in (lambda n: 1 + 0.001 * n, lambda n: 1 + 0.1 * n, lambda n: 1.0 + (n > 8) + 3 * (n > 16)):
        rates = [(1 + sum(math.exp(p) for p in tree.log_probs[:n])) / seconds(n) for n in range(1, len(tree) + 1)]
        assert len(best_prefix(tree, seconds)) == rates.index(max(rates)) + 1
    assert len(best_prefix(tree, lambda n: 1.0)) == 40 and len(best_prefix(tree, lambda n: float(n))) == 1
