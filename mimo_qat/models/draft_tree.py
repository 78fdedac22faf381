"""Draft trees: what a DFlash block proposes beyond its most likely chain.

One drafting pass gives candidates for every slot. A tree holds the most probable prefixes that they form, so that one
verification by the target covers several continuations. Without a selector the probability of a prefix is the product
of its slots' marginals (DDTree, arXiv 2604.12989); with the DFlash2 selector it is the product of conditionals
p(token | token before it), a proper probability of the draft. Training needs nothing of this.

Rows of a verification: 0 is the anchor (the last committed token), row i the i-th node. A node's parent always has the
smaller row. `grow_tree` is the program of a host, `grow_tree_tensors` that of a device, in fixed shapes and without a
word from the host; both give the same nodes in the same order.

Letters: D slots (block size - 1), k candidates a slot, P predecessors (1 or k), r selector rank, n nodes.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

TOP_K = 16  # candidates a slot where no selector says otherwise


@dataclass(frozen=True)
class Candidates:
    """ids [..., D, k] int64, ascending in each slot; log_probs [..., D, P, k] float32.

    `log_probs[d, p, c]` is of candidate c of slot d + 1 after candidate p of slot d; P = 1 where the predecessor does
    not matter. In the first slot the predecessor is the anchor, whatever p. Ascending ids make every tie go to the
    lowest id, as in an argmax over the vocabulary.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    def cpu(self) -> "Candidates":
        return Candidates(self.ids.cpu(), self.log_probs.cpu())

    def __getitem__(self, index: int) -> "Candidates":
        return Candidates(self.ids[index], self.log_probs[index])


def top_candidates(
    scores: torch.Tensor, top_k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [..., V] of token `ids` [..., V] (0..V-1 without them) -> (ids, scores), both [..., min(top_k, V)], in
    ascending order of ids."""
    values, places = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    ids = places if ids is None else ids.expand_as(scores).gather(-1, places)
    ids, order = ids.sort(dim=-1)
    return ids, values.gather(-1, order)


def marginal_candidates(scores: torch.Tensor, top_k: int = TOP_K, ids: torch.Tensor | None = None) -> Candidates:
    """The most likely tokens of each slot by its own scores [..., D, V] (logits; any constant a row may be added)."""
    ids, values = top_candidates(scores, top_k, ids)
    log_probs = values.float() - scores.float().logsumexp(-1, keepdim=True)
    return Candidates(ids, log_probs[..., None, :])


def transition_scores(
    unary: torch.Tensor,
    ids: torch.Tensor,
    gate: torch.Tensor,
    anchors: torch.Tensor,
    codebooks: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The DFlash2 selector's S(a, b) = unary(b) + sum_j A[a, j] gate[j] B[b, j] for all pairs, [..., D, k, k] float32.

    unary, ids [..., D, k] as `top_candidates` gives them, gate [..., D, r], anchors [...], `codebooks` (A, B), each
    [V, r]. Rows are predecessors: the candidates of the slot before, in the first slot k times the anchor.
    """
    before, after = codebooks
    first = anchors[..., None, None].expand(*ids.shape[:-2], 1, ids.shape[-1])
    predecessors = torch.cat((first, ids[..., :-1, :]), dim=-2)
    left = before[predecessors].float() * gate.float()[..., None, :]
    return unary.float()[..., None, :] + left @ after[ids].float().transpose(-1, -2)


def greedy_chain(candidates: Candidates) -> torch.Tensor:
    """The chain [..., D] that takes the best candidate after the one just taken."""
    ids, log_probs = candidates.ids, candidates.log_probs
    rank = log_probs[..., 0, 0, :].argmax(-1)
    tokens = [ids[..., 0, :].gather(-1, rank[..., None])]
    for d in range(1, ids.shape[-2]):
        row = rank if log_probs.shape[-2] > 1 else torch.zeros_like(rank)
        index = row[..., None, None].expand(*row.shape, 1, ids.shape[-1])
        rank = log_probs[..., d, :, :].gather(-2, index)[..., 0, :].argmax(-1)
        tokens.append(ids[..., d, :].gather(-1, rank[..., None]))
    return torch.cat(tokens, dim=-1)


@dataclass(frozen=True)
class Tree:
    """Nodes in the order of their rows 1..n: token, parent's row, depth (1 = first slot), log-probability of the
    prefix that ends there (empty where the tree was not grown by probability)."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    log_probs: list[float]

    def __len__(self) -> int:
        return len(self.tokens)

    def prefix(self, nodes: int) -> "Tree":
        """The first `nodes` nodes, which are a tree themselves."""
        return Tree(self.tokens[:nodes], self.parents[:nodes], self.depths[:nodes], self.log_probs[:nodes])

    def visible(self) -> torch.Tensor:
        """Boolean [n + 1, n + 1]: row q sees row k iff k is q itself or an ancestor of it."""
        seen = torch.eye(len(self) + 1, dtype=torch.bool)
        for row, parent in enumerate(self.parents, 1):
            seen[row] |= seen[parent]
        return seen

    def walk(self, choices: Sequence[int]) -> list[int]:
        """Rows from the anchor down while a child's token is what the target chose (`choices[row]`) after its parent.

        The text continues with the tokens of these rows and then with `choices[last row]`.
        """
        children = {
            (parent, token): row for row, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True), 1)
        }
        path = [0]
        while (row := children.get((path[-1], choices[path[-1]]))) is not None:
            path.append(row)
        return path


def grow_tree(candidates: Candidates, budget: int, width: int | None = None) -> Tree:
    """The `budget` most probable prefixes (fewer where the candidates have no more), most probable first.

    Equally probable ones (logits in BF16 tie often) come by depth, then by the parent's row, then the more probable
    after that parent, then the lower id: parents stay before children, and no order depends on the program.

    A heap holds each popped node's next sibling and first child, and nothing else can come next, because a prefix is
    never less probable than what continues it. `width` limits the children of a node: 1 gives the greedy chain.
    """
    ids, log_probs = candidates.ids.tolist(), candidates.log_probs.tolist()
    slots, limit = len(ids), width or len(ids[0])
    ordered: dict[tuple[int, int], list[tuple[float, int]]] = {}

    def children(slot: int, predecessor: int) -> list[tuple[float, int]]:
        """(-log p, candidate) of a slot, best first, equal ones by id; sorted when first asked for."""
        key = slot, predecessor if len(log_probs[slot]) > 1 else 0
        if key not in ordered:
            ordered[key] = sorted((-p, c) for c, p in enumerate(log_probs[slot][key[1]]))[:limit]
        return ordered[key]

    tree = Tree([], [], [], [])
    heap: list[tuple[float, int, int, int, int]] = []  # (-log p of the prefix, slot, parent, nth child, predecessor)

    def push(parent: int, predecessor: int, nth: int) -> None:
        slot, above = (tree.depths[parent - 1], tree.log_probs[parent - 1]) if parent else (0, 0.0)
        options = children(slot, predecessor)
        if nth < len(options):
            heapq.heappush(heap, (options[nth][0] - above, slot, parent, nth, predecessor))

    push(0, 0, 0)
    while heap and len(tree) < budget:
        negative, slot, parent, nth, predecessor = heapq.heappop(heap)
        candidate = children(slot, predecessor)[nth][1]
        tree.tokens.append(ids[slot][candidate])
        tree.parents.append(parent)
        tree.depths.append(slot + 1)
        tree.log_probs.append(-negative)
        push(parent, predecessor, nth + 1)
        if slot + 1 < slots:
            push(len(tree), candidate, 0)
    return tree


class TreeTensors(NamedTuple):
    """A tree of n nodes in tensors of a device; children of one node have different tokens.

    tokens [n] and parents [n], int64, as in `Tree`; depths [n + 1] int64 and visible [n + 1, n + 1] bool are of all
    rows, the anchor with depth 0 first: row q sees row k iff k is q itself or an ancestor of it.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor

    def walk(self, choices: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`Tree.walk` by the target's `choices` [n + 1], in a tree of at most `slots` depths: the path's rows
        [min(slots, n) + 1], and how many nodes [] it has. After them each place has its own number as the row."""
        nodes = len(self.tokens)
        length = min(slots, nodes) + 1
        right = self.tokens == choices[self.parents]
        wrong = (self.visible[1:, 1:] & ~right).any(-1)
        rows = torch.arange(max(length, nodes) + 1, device=choices.device)
        place = self.depths[1:].masked_fill(wrong, length)  # a place that is cut off
        return rows[: length + 1].scatter(0, place, rows[1 : nodes + 1])[:length], (~wrong).sum()


def tree_size(slots: int, top_k: int, budget: int) -> int:
    """Nodes of a grown tree: `budget`, or all prefixes of `top_k` candidates in each slot where they are fewer."""
    total, level = 0, 1
    for _ in range(slots):
        level = min(level * top_k, budget)
        total += level
    return min(total, budget)


def grow_tree_tensors(candidates: Candidates, budget: int) -> TreeTensors:
    """`grow_tree` on the device of the candidates (ids [D, k]): the same `tree_size(D, k, budget)` nodes, whose number
    no value changes, so that nothing has to be padded.

    Level by level: a prefix among the best `budget` has its parent among them, hence among the best `budget` of the
    parent's depth. Stable sorts keep the order of ties, because each level lies there by parent and child.
    """
    ids, log_probs = candidates.ids, candidates.log_probs
    slots, top_k = ids.shape
    values, ranks = log_probs.double().sort(dim=-1, descending=True, stable=True)
    # Of the prefixes of a level, best first: log-probability, and the candidate that ends each.
    score, last = values.new_zeros(1), ranks.new_zeros(1)
    scores, ends, cells = [], [], []
    before = 0  # prefixes of the levels above the parents', the anchor among them
    for slot in range(slots):
        parents, row = len(score), last if len(log_probs[slot]) > 1 else slice(None)
        score, cell = (score[:, None] + values[slot, row]).flatten().sort(descending=True, stable=True)
        score, cell = score[:budget], cell[:budget]
        last = ranks[slot, row].expand(parents, -1).flatten()[cell]
        scores.append(score)
        ends.append(last)
        cells.append(cell + before * top_k)
        before += parents
    order = torch.cat(scores).sort(descending=True, stable=True).indices[:budget]
    numbers = torch.arange(1, len(order) + 1, device=ids.device)
    rows = order.new_zeros(before + len(score)).scatter(0, order + 1, numbers)
    parent = rows[torch.cat(cells)[order] // top_k]
    visible = _visible(parent, slots)
    depths = visible.sum(-1) - 1
    return TreeTensors(ids[depths[1:] - 1, torch.cat(ends)[order]], parent, depths, visible)


def _visible(parents: torch.Tensor, slots: int) -> torch.Tensor:
    """`Tree.visible` of parents [n], no node deeper than `slots`: each pass doubles how far up a row sees."""
    up = torch.cat((parents.new_zeros(1), parents))
    seen = torch.eye(len(up), dtype=torch.bool, device=parents.device)
    for _ in range(slots.bit_length()):
        seen = seen | seen[up]
        up = up[up]
    return seen


def best_prefix(tree: Tree, seconds: Callable[[int], float]) -> Tree:
    """The prefix of n >= 1 nodes with most expected tokens a second: (1 + sum of p(node)) / seconds(n).

    `seconds(n)` is the time of a whole round, drafting included, that verifies n nodes (CaDDTree, arXiv 2606.01813).
    All prefixes are compared: measured times have steps, so that the first fall of the quotient may be a false one.
    """
    expected, best, rate = 1.0, 1, 0.0
    for n, log_prob in enumerate(tree.log_probs, 1):
        expected += math.exp(log_prob)
        if expected / seconds(n) > rate:
            best, rate = n, expected / seconds(n)
    return tree.prefix(best)
