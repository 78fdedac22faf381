"""Trees and the DFlash2 head in the engine: at any temperature the tokens are those of plain decoding."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mimo_qat.models.draft_tree import (
    Tree,
    greedy_chain,
    grow_tree,
)
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.draft_model import block_conv, convolved, draft_forward
from mimo_runtime.engine import Engine
from mimo_runtime.load import Conv, LoadConfig, Selector, load_target
from mimo_runtime.model import keep_rows, new_caches, target_forward, tree_rows
from mimo_runtime.rounds import Rounds
from mimo_runtime.speculate import Sampler, choose, decode, draft_candidates, gumbel_noise
from tests.runtime.conftest import EVERY_EXPERT, WIDE, assert_trees_round_alone, release_folder

PROMPT = [5, 17, 300, 2, 44, 91, 7]
# At 2 the noise outweighs the logits, so that a random drafter with the same noise is often right.
SAMPLINGS = {
    "greedy": {},
    "temperature": {"temperature": 1.0, "seed": 3},
    "hot": {"temperature": 2.0, "seed": 4},
    "top-k": {"temperature": 1.5, "top_k": 30, "seed": 5},
    "hot top-p": {"temperature": 2.0, "top_p": 0.7, "seed": 6},
}


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def engine_for(folder, tree_budget: int, head: bool = False) -> Engine:
    """In float32; with `head`, the drafter gets convolutions and a selector that matter."""
    cfg = EngineConfig(dtype="float32", device="cpu", max_len=160, prefill_chunk=16, tree_budget=tree_budget)
    engine = Engine(folder, cfg)
    if head:
        engine.drafter = with_head(engine.drafter)
    return engine


def with_head(drafter):
    h, vocab = len(drafter.norm.weight), drafter.vocab_size
    conv = lambda i: Conv(  # noqa: E731
        torch.tensor([1.0, 0.2])[:, None].expand(2, 2, h) + 0.1 * some(2, 2, h, seed=i),
        0.1 * some(4 * h // 16, h, seed=i),
    )
    layers = tuple(
        replace(layer, attention_conv=conv(2 * i), mlp_conv=conv(2 * i + 1)) for i, layer in enumerate(drafter.layers)
    )
    selector = Selector(16, some(vocab, 8, seed=50), some(vocab, 8, seed=51), 0.02 * some(8, h, seed=52))
    return replace(drafter, layers=layers, selector=selector)


def on_host(engine: Engine) -> None:
    """From here on trees are grown and walked by the host, as those of an adaptive size are."""
    engine._trees = engine._host_trees


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("budget", [0, 20])
@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
def test_no_token_changes(reference, kind, budget, head):
    engine = engine_for(reference, budget, head)
    sampling = SamplingConfig(max_new_tokens=60, **SAMPLINGS[kind])
    plain = engine.generate(PROMPT, sampling, speculate=False)
    drafted = engine.generate(PROMPT, sampling)
    assert drafted.tokens == plain.tokens and len(plain.tokens) == 60
    assert all(r.drafted == (budget or 7) for r in drafted.rounds)
    if kind.startswith("hot"):
        assert len({r.accepted for r in drafted.rounds}) > 2  # the walk goes to several depths


@pytest.mark.parametrize("accept", [0, 7, [7, 0, 3, 1, 5]], ids=str)
@pytest.mark.parametrize("kind", ["greedy", "temperature"])
def test_forced_trees_are_exact_and_lossless(reference, accept, kind):
    """Two wrong siblings before every draft: the true path is never a prefix of the rows, past windows of 8 and 24."""
    engine = engine_for(reference, 21)
    sampling = SamplingConfig(max_new_tokens=90, **SAMPLINGS[kind])
    plain = engine.generate(PROMPT, sampling, speculate=False).tokens
    forced = engine.generate(PROMPT, sampling, forced_acceptance=accept)
    lengths = accept if isinstance(accept, list) else [accept]
    assert forced.tokens == plain and all(r.drafted == 21 for r in forced.rounds)
    full = [r.accepted for r in forced.rounds if not r.cut]
    assert full == [lengths[i % len(lengths)] for i in range(len(full))]


def test_the_tree_accepts_more_than_the_chain(reference):
    engine, sampling = engine_for(reference, 40), SamplingConfig(max_new_tokens=120, temperature=2.0)
    chain, tree = (engine.generate(PROMPT, sampling, tree=tree).rounds for tree in (False, True))
    assert len(tree) < len(chain) and all(r.drafted == 7 for r in chain)


@pytest.mark.parametrize("kind", ["greedy", "hot", "hot top-p"])
@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
def test_one_child_a_node_decodes_as_the_chain(reference, monkeypatch, kind, head):
    engine, sampling = engine_for(reference, 7, head), SamplingConfig(max_new_tokens=50, **SAMPLINGS[kind])
    on_host(engine)
    monkeypatch.setattr("mimo_runtime.engine.grow_tree", lambda c, n: grow_tree(c, n, width=1))
    tree, chain = (engine.generate(PROMPT, sampling, tree=tree).rounds for tree in (True, False))
    assert tree == chain


def rounds_of_prompts(engine: Engine, sampling: SamplingConfig) -> list:
    """Long and short prompts in turn, past every window; each ended by its budget, and by a token within a path where
    one is longer than its anchor."""
    found = []
    for prompt in (PROMPT, [(7 * i) % 512 for i in range(50)], [9]):
        full = engine.generate(prompt, sampling)
        inner = [t for r in full.rounds for t in r.tokens[:-1] if full.tokens.count(t) == 1]
        stopping = replace(sampling, stop_token_ids=(inner[len(inner) // 2] if inner else full.tokens[20],))
        found += [full.rounds, engine.generate(prompt, stopping).rounds]
    return found


@pytest.mark.parametrize("budget", [1, 5, 21])
@pytest.mark.parametrize("kind", ["greedy", "hot", "hot top-p"])
@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
def test_trees_of_the_device_are_those_of_the_host(reference, budget, kind, head):
    """Round by round: tokens, accepted and proposed drafts, cuts; also with rounds enqueued ahead."""
    engine, sampling = engine_for(reference, budget, head), SamplingConfig(max_new_tokens=48, **SAMPLINGS[kind])
    texts = [engine.generate(p, sampling, speculate=False).tokens[1:] for p in (PROMPT, [9])]
    found = rounds_of_prompts(engine, sampling)
    assert [[t for r in found[i] for t in r.tokens] for i in (0, 4)] == texts
    engine.rounds = Rounds(engine.state, 4, False, engine.ranks)
    assert rounds_of_prompts(engine, sampling) == found
    on_host(engine)
    assert rounds_of_prompts(engine, sampling) == found
    assert all(r.drafted == budget for rounds in found for r in rounds)
    if kind.startswith("hot"):
        assert all(rounds[-1].cut for rounds in found[1::2])


@pytest.mark.parametrize("top_k", [1, 2, 20])
@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
def test_few_candidates_make_the_smaller_trees_of_the_host(reference, top_k, head):
    """With one candidate a slot there are 7 prefixes, whatever the budget."""
    engine = engine_for(reference, 21, head)
    sampling = SamplingConfig(max_new_tokens=40, temperature=2.0, top_k=top_k, seed=2)
    found = engine.generate(PROMPT, sampling).rounds
    assert {r.drafted for r in found} == {7 if top_k == 1 else 21}
    on_host(engine)
    assert engine.generate(PROMPT, sampling).rounds == found


def test_nothing_a_round_in_vain_does_is_seen(reference):
    """Rounds after the end, whose paths may be long, leave numbers and all later texts as they are."""
    engine, sampling = engine_for(reference, 21), SamplingConfig(max_new_tokens=40, **SAMPLINGS["hot"])
    expected = [engine.generate(p, sampling).rounds for p in (PROMPT, [9])]
    before = [t.clone() for t in (engine.state.anchor, engine.state.position, engine.state.left, engine.state.turn)]
    with torch.inference_mode():
        sampler = engine.state.begin(int(before[0]), int(before[1]), sampling)
        for _ in range(3):
            engine._tree_round(engine.drafter, sampler, 21, None)
    after = engine.state.anchor, engine.state.position, engine.state.left
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False)) and engine.state.record[0] == 0
    assert [engine.generate(p, sampling).rounds for p in (PROMPT, [9])] == expected


@pytest.mark.parametrize("changes", [{"window": 16}, {"window": None}, {"causal": True, "window": 9}], ids=str)
def test_trees_past_full_and_short_windows_of_a_drafter(tmp_path, reference, tiny_config, write_drafter, changes):
    other = write_drafter(tmp_path / "other", tiny_config, **changes)
    cfg = EngineConfig(dtype="float32", device="cpu", max_len=160, prefill_chunk=16, tree_budget=12, drafter=str(other))
    engine, sampling = Engine(reference, cfg), SamplingConfig(max_new_tokens=110, **SAMPLINGS["hot"])
    found = engine.generate(PROMPT, sampling)
    assert found.tokens == engine.generate(PROMPT, sampling, speculate=False).tokens
    on_host(engine)
    assert engine.generate(PROMPT, sampling).rounds == found.rounds


WRONG_TREES = {
    "all rows": lambda depths, seen: (depths, torch.ones_like(seen)),
    "all earlier rows": lambda depths, seen: (depths, torch.ones_like(seen).tril()),
    "itself alone": lambda depths, seen: (depths, torch.eye(len(seen), dtype=torch.bool)),
    "depths of a chain": lambda depths, seen: (torch.arange(len(depths)), seen),
}


def test_in_bf16_trees_change_tokens_by_rounding_alone(tmp_path, tiny_config, make_model, write_drafter):
    """With the definitions of all kernels. What is no rounding is found: rows that see too much, too little, or stand
    elsewhere. (Hot, since then many drafts are accepted.)"""
    config = tiny_config | WIDE | EVERY_EXPERT
    folder = release_folder(tmp_path / "wide", config, make_model(config))
    write_drafter(folder / "dflash", config)
    device: dict = {"device": "cpu", "max_len": 160, "prefill_chunk": 16}
    kinds: dict = {"experts": "packed", "attention": "kernel", "linears": "kernel"}
    engine = Engine(folder, EngineConfig(tree_budget=15, **kinds, **device))
    exact = Engine(folder, EngineConfig(dtype="float32", drafter=None, **device))
    greedy, hot = (SamplingConfig(max_new_tokens=60, temperature=t, seed=1) for t in (0.0, 2.0))
    assert_trees_round_alone(engine, exact, PROMPT, greedy, [{"forced_acceptance": [7, 2, 0]}])
    assert_trees_round_alone(engine, exact, PROMPT, hot, [{}])
    verify = engine._verify_tree
    for wrong in WRONG_TREES.values():
        engine._verify_tree = lambda ids, start, *tree, wrong=wrong, **how: verify(ids, start, *wrong(*tree), **how)
        with pytest.raises(AssertionError, match="behind the best"):
            assert_trees_round_alone(engine, exact, PROMPT, hot, [{}])


def shuffled(tree: Tree, rng: random.Random) -> Tree:
    """The same tree with its rows in another order that keeps parents before children."""
    order, ready = [], [i for i, p in enumerate(tree.parents) if p == 0]
    while ready:
        node = ready.pop(rng.randrange(len(ready)))
        order.append(node)
        ready += [i for i, p in enumerate(tree.parents) if p == node + 1]
    row = {0: 0} | {node + 1: i + 1 for i, node in enumerate(order)}
    pick = lambda values: [values[node] for node in order]  # noqa: E731
    return Tree(pick(tree.tokens), [row[tree.parents[n]] for n in order], pick(tree.depths), pick(tree.log_probs))


@pytest.mark.parametrize("kind", ["greedy", "hot"])
def test_the_order_of_nodes_does_not_matter(reference, monkeypatch, kind):
    engine, sampling = engine_for(reference, 24), SamplingConfig(max_new_tokens=70, **SAMPLINGS[kind])
    ordered = engine.generate(PROMPT, sampling).rounds
    on_host(engine)
    rng = random.Random(0)
    monkeypatch.setattr("mimo_runtime.engine.grow_tree", lambda c, n: shuffled(grow_tree(c, n), rng))
    assert engine.generate(PROMPT, sampling).rounds == ordered


def random_tree(rng: random.Random, truth: list[int], nodes: int) -> tuple[Tree, list[int]]:
    """A tree with the path `truth` in it among wrong branches, and the rows of that path."""
    tree, path, deepest = Tree([], [], [], []), [0], rng.randint(0, len(truth))
    while len(tree) < nodes or len(path) <= deepest:
        grow = len(path) <= deepest and rng.random() < 0.4
        parent = path[-1] if grow else rng.randint(0, len(tree))
        depth = 1 + (tree.depths[parent - 1] if parent else 0)
        if depth > 7:
            continue
        tree.tokens.append(truth[len(path) - 1] if grow else rng.randrange(512))
        tree.parents.append(parent)
        tree.depths.append(depth)
        if grow:
            path.append(len(tree))
    return tree, path


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_tree_and_what_it_leaves_equal_a_prefill(reference, seed):
    """Random trees, of which a random true path is committed, past several turns of the rings of window 8."""
    rng = random.Random(seed)
    ids = torch.randint(0, 512, (130,), generator=torch.Generator().manual_seed(seed)).tolist()
    target = load_target(reference, LoadConfig("cpu", torch.float32))
    taps = (0, 2, 3)
    expected, tapped = target_forward(target, new_caches(target, 160, 8), torch.tensor(ids), 0, taps=taps)
    caches = new_caches(target, 160, block=25)
    start = rng.randint(1, 30)
    target_forward(target, caches, torch.tensor(ids[:start]), 0)
    moved = 0
    while start + 8 < len(ids):
        tree, path = random_tree(rng, ids[start + 1 : start + 8], rng.randint(1, 17))
        rows = torch.tensor([ids[start], *tree.tokens])
        logits, got = target_forward(
            target, caches, rows, start, taps=taps, tree=tree_rows(tree), min_rows=rng.choice((1, 25))
        )
        true = slice(start, start + len(path))
        torch.testing.assert_close(logits[path], expected[true], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[path], tapped[true], rtol=1e-4, atol=1e-4)
        others = range(len(path), rng.choice((len(path), len(rows))))  # in their own places, as after a walk of tensors
        keep_rows(caches, torch.tensor([*path, *others]), start)
        moved += path != list(range(len(path)))
        start += len(path)
    assert moved > 3


# --- distributions, without a model ---------------------------------------------------------------------------------


def proposer(kind: str, table: torch.Tensor, sampling: SamplingConfig):
    """Trees of 5 nodes (a chain of 2 for "chain") from a poor drafter: the right marginals for the first slot only."""
    vocab = len(table)
    selector = Selector(6, some(vocab, 3, seed=1), some(vocab, 3, seed=2), some(3, vocab, seed=3))

    def propose(anchor: int, start: int) -> Tree:
        logits = 2 * torch.stack((0.7 * table[anchor], table.mean(0)))
        how = SamplingConfig() if kind == "greedy tree" else sampling
        candidates = draft_candidates(
            selector if "selector" in kind else None, logits, logits, torch.tensor(anchor), start, Sampler.of(how)
        )
        return grow_tree(candidates, 2, width=1) if kind == "chain of the selector" else grow_tree(candidates, 5)

    return propose


@pytest.mark.parametrize("kind", ["tree", "greedy tree", "tree of the selector", "chain of the selector"])
def test_two_tokens_have_the_exact_joint_distribution(kind):
    """Chi-square over the pairs that two tokens after the anchor form, 3000 seeds, against exact probabilities."""
    table, runs, temperature = some(8, 8, seed=7), 3000, 1.2
    counts: Counter = Counter()
    depths: Counter = Counter()
    for seed in range(runs):
        sampling = SamplingConfig(temperature=temperature, seed=seed)
        propose = proposer(kind, table, sampling)
        rounds = list(decode(lambda rows, tree, start: table[rows], propose, 3, 11, 2, Sampler.of(sampling)))
        counts[tuple(t for r in rounds for t in r.tokens)] += 1
        depths[rounds[0].accepted] += 1
    p = (table / temperature).softmax(-1)
    expected = runs * p[3][:, None] * p
    observed = torch.tensor([[counts[a, b] for b in range(8)] for a in range(8)])
    large = expected >= 5
    chi = float(((observed - expected) ** 2 / expected)[large].sum())
    rest = expected[~large].sum()
    chi += float((observed[~large].sum() - rest) ** 2 / rest)
    cells = int(large.sum()) + 1
    assert chi < cells - 1 + 3.5 * math.sqrt(2 * (cells - 1)), f"chi-square {chi:.1f} with {cells} cells"
    assert depths[2] > 30 and max(depths.values()) < runs - 300  # several ways through the walk were taken


# --- the DFlash2 head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_candidates_without_a_selector_begin_with_the_choice(kind):
    """The chain of the candidates is what `choose` takes, with filters and noise."""
    sampler, logits = Sampler.of(SamplingConfig(**SAMPLINGS[kind])), 4 * some(9, 300)
    candidates = draft_candidates(None, logits, logits, torch.tensor(1), 40, sampler)
    assert torch.equal(greedy_chain(candidates), choose(logits, torch.arange(41, 50), sampler))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_selector_walks_as_its_formula_says(temperature):
    """One slot and one candidate at a time, in plain Python."""
    logits, hidden, start = some(5, 40), some(5, 12, seed=1), 30
    selector = Selector(6, some(40, 3, seed=2), some(40, 3, seed=3), some(3, 12, seed=4))
    sampler = Sampler.of(SamplingConfig(temperature=temperature, seed=9))
    candidates = draft_candidates(selector, hidden, logits, torch.tensor(17), start, sampler)
    before, chain = 17, []
    for d in range(5):
        noise = gumbel_noise(9, torch.tensor([start + 1 + d]), torch.arange(40)[None])[0]
        perturbed = (logits[d] + temperature * noise).tolist()
        gate = [float(selector.projection[j] @ hidden[d]) for j in range(3)]
        scores = {}
        for b in sorted(range(40), key=lambda i: -perturbed[i])[:6]:
            pair = sum(float(selector.before[before, j]) * gate[j] * float(selector.after[b, j]) for j in range(3))
            scores[b] = perturbed[b] + pair
        before = max(scores, key=scores.__getitem__)
        chain.append(before)
    assert greedy_chain(candidates).tolist() == chain != logits.argmax(-1).tolist()


def test_convolutions_by_hand():
    """Every output channel and row as the sum of its four terms; the identity passes bits through."""
    h, rows, group = 32, 5, 16
    conv, x = Conv(some(2, 2, h), 0.3 * some(4 * h // group, h, seed=1)), some(rows, h, seed=2)
    double = lambda y: 2 * y + 1  # noqa: E731  the sublayer
    change = (x @ conv.projection.T).view(rows, 2, 2, h // group)

    def naive(z: torch.Tensor, p: int) -> torch.Tensor:
        out = torch.zeros_like(z)
        for t in range(rows):
            for c in range(h):
                out[t, c] = (conv.base[p, 0, c] + change[t, p, 0, c // group]) * z[t, c]
                if t:
                    out[t, c] += (conv.base[p, 1, c] + change[t, p, 1, c // group]) * z[t - 1, c]
        return out

    torch.testing.assert_close(convolved(conv, x, double), naive(double(naive(x, 0)), 1), rtol=1e-4, atol=1e-4)
    identity = torch.tensor([1.0, 0.0])[:, None].expand(2, h)
    assert torch.equal(block_conv(x, identity, torch.zeros(rows, 2, 2)), x)


def test_a_head_that_says_nothing_changes_no_draft(reference):
    engine = engine_for(reference, 0)
    plain, h = engine.drafter, len(engine.drafter.norm.weight)
    conv = Conv(torch.tensor([1.0, 0.0])[:, None].expand(2, 2, h), torch.zeros(4 * h // 16, h))
    layers = tuple(replace(layer, attention_conv=conv, mlp_conv=conv) for layer in plain.layers)
    selector = Selector(16, some(plain.vocab_size, 4), torch.zeros(plain.vocab_size, 4), some(4, h))
    engine.generate(PROMPT, SamplingConfig(max_new_tokens=9))
    anchor = torch.tensor([33])
    hidden, logits = draft_forward(engine.target, plain, engine.draft_caches, anchor, 12)
    silent = replace(plain, layers=layers, selector=selector)
    same = draft_forward(engine.target, silent, engine.draft_caches, anchor, 12)
    assert torch.equal(same[0], hidden) and torch.equal(same[1], logits)
    candidates = draft_candidates(selector, hidden, logits, anchor[0], 12, Sampler.of(SamplingConfig()))
    assert torch.equal(greedy_chain(candidates), logits.argmax(-1))


def test_a_tree_needs_a_drafter(reference):
    for bad in ({"tree_budget": 5, "drafter": None}, {"tree_budget": -1}):
        with pytest.raises(ValueError, match="tree_budget is"):
            Engine(reference, EngineConfig(device="cpu", max_len=64, **bad))


# --- passes of fixed shapes -----------------------------------------------------------------------------------------


class Replayed:
    """Stands in for a CUDA graph: the same inputs by reference, the same function, positions as tensors."""

    made = 0

    def __init__(self, function, inputs, pool=None):
        self.function, self.inputs = function, tuple(t.clone() for t in inputs)
        self.graph = self
        Replayed.made += 1

    def pool(self):
        return None

    def __call__(self, *inputs):
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        return self.function(*self.inputs)


@pytest.mark.parametrize("kind", ["greedy", "hot"])
@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
def test_positions_as_tensors_decode_the_same(reference, monkeypatch, kind, head):
    """Both passes of a tree with a fixed shape, over several turns of the rings: rounds as without."""
    monkeypatch.setattr("mimo_runtime.engine.Graph", Replayed)
    monkeypatch.setattr(Engine, "_check_graphs", lambda self, rows: None)
    engine, sampling = engine_for(reference, 20, head), SamplingConfig(max_new_tokens=80, **SAMPLINGS[kind])
    ways = ({}, {"forced_acceptance": [7, 0, 3]})
    eager = [engine.generate(PROMPT, sampling, **how).rounds for how in ways]
    on_host(engine)
    for cache in (*engine.caches, *engine.draft_caches):
        cache.reach = cache.capacity  # as in an engine that was made with graphs
    engine.cfg = replace(engine.cfg, cuda_graphs=True)
    before = Replayed.made
    assert [engine.generate(PROMPT, sampling, **how).rounds for how in ways] == eager
    assert Replayed.made - before == 3  # draft, tree, and the forced tree, which has 14 nodes


class ReplayedRound(Replayed):
    """The same of a whole round: warm-ups that change no number, then the same function over and over."""

    def __init__(self, function, inputs, pool=None):
        super().__init__(function, inputs)
        for _ in range(2):
            function()


@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
def test_a_graph_of_trees_serves_every_prompt_temperature_and_seed(reference, monkeypatch, head):
    monkeypatch.setattr("mimo_runtime.rounds.Graph", ReplayedRound)
    engine = engine_for(reference, 20, head)
    many = [SamplingConfig(max_new_tokens=25, temperature=t, seed=s) for t, s in ((0.0, 0), (1.5, 3), (2.5, 4))]
    expected = [engine.generate(p, s).rounds for s in many for p in (PROMPT, [9])]
    engine.rounds, before = Rounds(engine.state, 3, True, engine.ranks), Replayed.made
    assert [engine.generate(p, s).rounds for s in many for p in (PROMPT, [9])] == expected
    assert Replayed.made - before == 2  # greedy and sampled


def test_graphs_need_a_gpu(reference):
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU"):
        Engine(reference, EngineConfig(device="cpu", max_len=64, cuda_graphs=True))


def test_an_adaptive_tree_has_the_size_that_pays(reference):
    """With times given: 4 drafts where more are ten times as slow, and all of them where they are free."""
    engine, sampling = engine_for(reference, 20), SamplingConfig(max_new_tokens=60, **SAMPLINGS["hot"])
    plain = engine.generate(PROMPT, sampling, speculate=False).tokens
    for seconds, size in ((lambda n: 1.0 if n <= 4 else 10.0, 4), (lambda n: 1.0, 20)):
        engine._seconds = seconds
        out = engine.generate(PROMPT, sampling)
        assert out.tokens == plain and {r.drafted for r in out.rounds} == {size}


def test_times_are_measured_once_and_never_fall(reference):
    cfg = EngineConfig(dtype="float32", device="cpu", max_len=64, tree_budget=20, tree_adaptive=True)
    engine, sampling = Engine(reference, cfg), SamplingConfig(max_new_tokens=30)
    times = [engine._seconds(n) for n in range(1, 21)]
    assert times == sorted(times) and times[0] > 0 and times[4] == times[7] and times[16] == times[19]
    out = engine.generate(PROMPT, sampling)
    assert out.tokens == engine.generate(PROMPT, sampling, speculate=False).tokens
    assert {r.drafted for r in out.rounds} <= {1, 2, 4, 8, 16, 20}
