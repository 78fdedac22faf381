"""The round as a program of the device: against the host's loop, against brute force, ahead and captured."""

import math
import random
import time
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimo_qat.models.draft_tree import Tree, TreeTensors, grow_tree, grow_tree_tensors
from mimo_runtime import model
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.load import Selector
from mimo_runtime.parallel import Ranks
from mimo_runtime.rounds import MOST_GRAPHS, Rounds, State, forced_chain, play, play_tree
from mimo_runtime.speculate import Sampler, choose, decode, draft_candidates

PROMPT = [5, 17, 300, 2, 44, 91, 7]
SAMPLINGS = {
    "greedy": {},
    "temperature": {"temperature": 2.0, "seed": 2**63 + 3},
    "top-k and top-p": {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "seed": 6},
    "top-p": {"temperature": 2.0, "top_p": 0.7, "seed": 5},
}
WAYS = ({"speculate": False}, {}, {"forced_acceptance": [7, 0, 3]})


def chain(vocab: int) -> torch.Tensor:
    """Logits [vocab, vocab] of a Markov chain: the toy target's row for token t predicts its successor."""
    return torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(7))


def drafts_of(table: torch.Tensor, count: int, sampling: SamplingConfig, anchor: int, start: int) -> list[int]:
    """What a drafter with the logits `table` says after `anchor`, one token after the other."""
    drafts = []
    for i in range(count):
        anchor = int(choose(table[[anchor]], torch.tensor([start + 1 + i]), Sampler.of(sampling))[0])
        drafts.append(anchor)
    return drafts


def chain_tree(tokens: list[int]) -> Tree:
    return Tree(tokens, list(range(len(tokens))), list(range(1, len(tokens) + 1)), [])


class Toy:
    """Rounds of a Markov chain whose drafts are `propose(anchor, start)`."""

    def __init__(self, table: torch.Tensor, propose, sampling: SamplingConfig, rows: int, ahead: int = 1):
        self.table, self.propose, self.rows, self.ahead = table, propose, rows, ahead
        self.budget: int | None = None
        self.state, self.sampling = State(len(table), 200, rows), sampling

    def step(self, bound: int | None = None) -> None:
        state = self.state
        assert bound is None or int(state.position) <= bound

        def draft() -> torch.Tensor:
            drafts = self.propose(int(state.anchor), int(state.position))
            return torch.tensor(drafts, dtype=torch.int64)

        play(state, draft, lambda rows, position: self.table[rows], self.sampler)

    def run(self, anchor: int, start: int, left: int) -> list:
        self.sampler, rounds = (
            self.state.begin(anchor, start, self.sampling),
            Rounds(self.state, self.ahead, False, Ranks()),
        )
        return list(rounds.run(self.step, None, start, left, self.rows, self.budget))


def numbers(state: State) -> list[int]:
    return [int(t) for t in (state.anchor, state.position, state.left, state.turn)]


@pytest.mark.parametrize("seed", range(12))
def test_rounds_are_those_of_the_loop_on_the_host(seed):
    """Random chains, drafters, budgets, stop tokens and rounds ahead; what is played after the end changes nothing."""
    rng, table = random.Random(seed), chain(12)
    ends = Counter()
    for _ in range(12):
        rows, left, start = rng.randint(1, 6), rng.randint(1, 30), rng.randint(1, 90)
        kind = rng.choice(list(SAMPLINGS.values()))
        sampling = SamplingConfig(**kind, stop_token_ids=tuple(rng.sample(range(-2, 14), rng.randint(0, 2))))
        own = rng.random() * torch.randn(12, 12, generator=torch.Generator().manual_seed(seed))
        propose = partial(drafts_of, table + own, rows - 1, sampling)
        toy = Toy(table, propose, sampling, rows, ahead=rng.randint(1, 5))
        expected = decode(
            lambda tokens, tree, at: table[tokens],
            lambda anchor, at, propose=propose: chain_tree(propose(anchor, at)),
            3, start, left, Sampler.of(sampling), sampling.stop_token_ids,
        )  # fmt: skip
        rounds = toy.run(3, start, left)
        assert rounds == list(expected)
        tokens = [t for r in rounds for t in r.tokens]
        end = [tokens[-1], start + len(tokens), 0, len(rounds)]
        assert numbers(toy.state) == end
        toy.step()
        assert numbers(toy.state) == end and toy.state.record[0] == 0
        ends[tokens[-1] in sampling.stop_token_ids] += 1
    assert len(ends) == 2


class ToyTrees(Toy):
    """Rounds of a Markov chain whose drafts are trees of `budget` nodes of `candidates(anchor, start)`."""

    def __init__(self, table: torch.Tensor, candidates, sampling: SamplingConfig, shape: tuple[int, int], ahead: int):
        super().__init__(table, None, sampling, shape[0] + 1, ahead)
        self.candidates, self.budget = candidates, shape[1]

    def step(self, bound: int | None = None) -> None:
        state, kept = self.state, []
        assert bound is None or int(state.position) <= bound

        def draft() -> TreeTensors:
            return grow_tree_tensors(self.candidates(int(state.anchor), int(state.position)), self.budget)

        def verify(rows: torch.Tensor, tree: TreeTensors, position: torch.Tensor):
            assert len(rows) == self.budget + 1 and position is state.position
            return self.table[rows], rows

        def keep(path: torch.Tensor, taps: torch.Tensor, position: torch.Tensor) -> None:
            kept.append(taps[path])

        play_tree(state, draft, verify, keep, self.rows - 1, self.sampler)
        committed, accepted = state.record[:2].tolist()
        own = state.record[3:].tolist()
        assert kept[0][1 : accepted + 1].tolist() == own[:accepted] and committed <= accepted + 1


@pytest.mark.parametrize("seed", range(8))
def test_rounds_of_trees_are_those_of_the_loop_on_the_host(seed):
    """Random trees, budgets, stop tokens and rounds ahead; what is played after the end changes nothing."""
    rng, table = random.Random(seed), chain(12)
    ends, depths = Counter(), Counter()
    for _ in range(12):
        slots, budget, left, start = rng.randint(1, 5), rng.randint(1, 12), rng.randint(1, 30), rng.randint(1, 90)
        kind = rng.choice(list(SAMPLINGS.values()))
        sampling = SamplingConfig(**kind, stop_token_ids=tuple(rng.sample(range(-2, 14), rng.randint(0, 2))))
        poor = table + rng.random() * torch.randn(12, 12, generator=torch.Generator().manual_seed(seed))
        selector = Selector(12, poor, torch.eye(12), torch.ones(12, 1)) if rng.random() < 0.7 else None

        def candidates(anchor, at, slots=slots, poor=poor, selector=selector, sampling=sampling):
            logits, hidden = (
                torch.zeros(slots, 12) if selector else poor[anchor].expand(slots, -1),
                torch.ones(slots, 1),
            )
            return draft_candidates(selector, hidden, logits, torch.tensor(anchor), at, Sampler.of(sampling))

        budget = min(budget, len(grow_tree(candidates(3, start), 12)))
        toy = ToyTrees(table, candidates, sampling, (slots, budget), ahead=rng.randint(1, 5))
        expected = decode(
            lambda tokens, tree, at: table[tokens],
            lambda anchor, at, propose=candidates, budget=budget: grow_tree(propose(anchor, at), budget),
            3, start, left, Sampler.of(sampling), sampling.stop_token_ids,
        )  # fmt: skip
        rounds = toy.run(3, start, left)
        assert rounds == list(expected)
        tokens = [t for r in rounds for t in r.tokens]
        end = [tokens[-1], start + len(tokens), 0, len(rounds)]
        assert numbers(toy.state) == end
        toy.step()
        assert numbers(toy.state) == end and toy.state.record[0] == 0
        ends[tokens[-1] in sampling.stop_token_ids] += 1
        depths.update(r.accepted for r in rounds)
    assert len(ends) == 2 and len(depths) > 3


@pytest.mark.parametrize("extra", [{}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("drafter", ["argmax", "shared noise", "none"])
def test_two_tokens_have_the_exact_joint_distribution(extra, drafter):
    """Chi-square over the pairs that two tokens after the anchor form, 3000 seeds, against exact probabilities."""
    table, runs = chain(8), 3000
    counts: Counter = Counter()
    accepted = 0
    for seed in range(runs):
        sampling = SamplingConfig(temperature=1.2, seed=seed, **extra)
        how = sampling if drafter == "shared noise" else SamplingConfig()
        count = 0 if drafter == "none" else 2
        rounds = Toy(table, partial(drafts_of, table * 0.7, count, how), sampling, count + 1).run(3, 11, 2)
        counts[tuple(t for r in rounds for t in r.tokens)] += 1
        accepted += rounds[0].accepted
    first = filtered(table[3], SamplingConfig(temperature=1.2, **extra))
    chi, cells, rest = 0.0, 0, [0.0, 0]
    for a in range(8):
        second = filtered(table[a], SamplingConfig(temperature=1.2, **extra))
        for b in range(8):
            expected = runs * first[a] * second[b]
            assert expected > 0 or not counts[a, b]
            if expected < 5:
                rest[0] += expected
                rest[1] += counts[a, b]
            else:
                chi, cells = chi + (counts[a, b] - expected) ** 2 / expected, cells + 1
    if rest[0] > 5:
        chi, cells = chi + (rest[1] - rest[0]) ** 2 / rest[0], cells + 1
    assert chi < cells - 1 + 3.5 * math.sqrt(2 * (cells - 1)), f"chi-square {chi:.1f} with {cells} cells"
    assert (accepted > 0) == (drafter != "none")


def filtered(logits: torch.Tensor, sampling: SamplingConfig) -> list[float]:
    """Exact probabilities after temperature, top-k, top-p, by sorting in plain Python."""
    weights = [math.exp(x / sampling.temperature) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: sampling.top_k or None]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass >= sampling.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


def test_a_perfect_drafter_is_always_right_at_any_temperature():
    table, sampling = chain(50), SamplingConfig(temperature=1.5, seed=8)
    rounds = Toy(table, partial(drafts_of, table, 7, sampling), sampling, 8).run(3, 11, 80)
    assert [r.accepted for r in rounds] == [7] * 10 and not any(r.cut for r in rounds)


def test_a_record_stays_in_its_slot_until_the_slots_are_through():
    """Whoever copies it on another stream may be late by as many rounds as there are slots, less one."""
    table = torch.eye(40).roll(1, 1)
    toy = Toy(table, lambda anchor, start: forced_chain(toy.state, 3).tolist(), SamplingConfig(), 4)
    toy.state = State(40, 200, 4, slots=5)
    toy.state.force(list(range(4, 40)), 11, [2])
    rounds = Rounds(toy.state, 5, False, Ranks())
    toy.sampler = toy.state.begin(3, 10, toy.sampling)
    toy.state.left.fill_(40)
    for played in range(1, 9):
        toy.step()
        assert int(toy.state.slot) == played % 5
        for r in range(max(0, played - 5), played):
            expected = [3, 2, 40 - 3 * (r + 1), *range(3 * r + 4, 3 * r + 7)]
            assert toy.state.records[r % 5][:6].tolist() == expected
    with pytest.raises(ValueError, match="6 rounds ahead of a state with 5 slots"):
        Rounds(toy.state, 6, False, Ranks())
    assert rounds.records.shape == toy.state.records.shape


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_round_that_is_cut_says_so(ahead):
    """A target that counts upwards; forced drafts, of which one in two rounds none is right."""
    table = torch.eye(40).roll(1, 1)
    toy = Toy(table, lambda anchor, start: forced_chain(toy.state, 7).tolist(), SamplingConfig(), 8, ahead)
    toy.state.force(list(range(4, 40)), 11, [3, 0])
    rounds = toy.run(3, 10, 7)
    assert [r.tokens for r in rounds] == [[4, 5, 6, 7], [8], [9, 10]]
    assert [r.cut for r in rounds] == [False, False, True] and [r.accepted for r in rounds] == [3, 0, 3]


# --- in the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(reference) -> Engine:
    return Engine(reference, EngineConfig(dtype="float32", device="cpu", max_len=192, prefill_chunk=16))


def looks_ahead(engine: Engine, ahead: int, graphs: bool = False) -> None:
    """As on a GPU, where a round that was enqueued has not been played yet."""
    engine.rounds = Rounds(engine.state, ahead, graphs, engine.ranks)


def with_selector(engine: Engine) -> None:
    """Gives the drafter a selector that matters."""
    drafter, noise = engine.drafter, torch.Generator().manual_seed(1)
    sizes = (drafter.vocab_size, 8), (drafter.vocab_size, 8), (8, len(drafter.norm.weight))
    before, after, projection = (torch.randn(*size, generator=noise) for size in sizes)
    engine.drafter = replace(drafter, selector=Selector(16, before, after, 0.02 * projection))


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_plain_rounds_are_brute_force(engine, kind):
    """Each token from a prefill of all before it."""
    sampling = SamplingConfig(max_new_tokens=24, **SAMPLINGS[kind])
    ids = list(PROMPT)
    for _ in range(24):
        ids.append(int(choose(engine.logits(ids)[-1:], torch.tensor([len(ids)]), Sampler.of(sampling))[0]))
    assert engine.generate(PROMPT, sampling, speculate=False).tokens == ids[len(PROMPT) :]


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("selector", [False, True], ids=["plain", "selector"])
def test_rounds_ahead_change_nothing(engine, kind, selector):
    """Long and short prompts in turn, past every window; stop tokens leave rounds behind that were played in vain."""
    if selector:
        with_selector(engine)
    accepted = set()
    for prompt in (PROMPT, [(7 * i) % 512 for i in range(70)], [9]):
        for how in WAYS:
            sampling = SamplingConfig(max_new_tokens=45, **SAMPLINGS[kind])
            full = engine.generate(prompt, sampling, **how)
            stopping = replace(sampling, stop_token_ids=(full.tokens[21],))
            expected = [full.rounds, engine.generate(prompt, stopping, **how).rounds]
            looks_ahead(engine, 4)
            assert [engine.generate(prompt, s, **how).rounds for s in (sampling, stopping)] == expected
            looks_ahead(engine, 1)
            accepted |= {r.accepted for r in full.rounds}
    assert len(accepted) > (2 if kind == "greedy" else 3)  # a random drafter is never right by itself


def test_a_reader_may_leave_while_rounds_are_ahead(engine):
    """As the server does when a client goes; the next prompt is decoded as if nothing had been."""
    sampling = SamplingConfig(max_new_tokens=40)
    expected = engine.generate([9], sampling).tokens
    looks_ahead(engine, 4)
    seen: list[int] = []

    def leave(tokens: list[int]) -> None:
        seen.extend(tokens)
        if len(seen) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, sampling, on_tokens=leave)
    assert seen == engine.generate(PROMPT, sampling).tokens[: len(seen)]
    assert engine.generate([9], sampling).tokens == expected


def test_the_time_of_a_text_is_the_time_on_the_wall(engine):
    """What a reader takes counts, because a GPU decodes meanwhile and would seem to need no time at all."""
    looks_ahead(engine, 4)
    began = time.perf_counter()
    out = engine.generate(
        PROMPT, SamplingConfig(max_new_tokens=9), speculate=False, on_tokens=lambda _: time.sleep(0.02)
    )
    wall = time.perf_counter() - began
    assert len(out.rounds) == 8 and 0.02 * 7 < out.decode_seconds < wall - 0.02 * 2


def test_attention_reads_no_more_than_the_sequence(engine):
    """Keys that a bounded round leaves out are those that nobody sees; a bound too low would hide some."""
    sampling = SamplingConfig(max_new_tokens=90)
    bounded = [engine.generate(PROMPT, sampling, **how).rounds for how in WAYS]
    used = {cache.used(engine.state.position) for cache in engine.caches if cache.window is None}
    assert used == {128} and engine.caches[0].capacity == 256  # 97 positions of 192, in steps of 64
    step = engine._chain_round
    engine._chain_round = lambda *how: step(*how[:-1], None)
    assert [engine.generate(PROMPT, sampling, **how).rounds for how in WAYS] == bounded
    engine._chain_round = lambda *how: step(*how[:-1], 8)
    assert engine.generate(PROMPT, sampling, **WAYS[0]).rounds != bounded[0]


class Replayed:
    """Stands in for a CUDA graph: warm-ups that change no number, then the same function over and over."""

    made: list["Replayed"] = []

    def __init__(self, function, inputs, pool=None):
        assert inputs == ()
        self.function, self.graph = function, self
        Replayed.made.append(self)
        for _ in range(2):
            function()

    def pool(self):
        return None

    def __call__(self):
        self.function()


def test_a_graph_serves_every_prompt_temperature_and_seed(engine, monkeypatch):
    monkeypatch.setattr("mimo_runtime.rounds.Graph", Replayed)
    Replayed.made.clear()
    many = [
        SamplingConfig(max_new_tokens=20, temperature=t, seed=s, top_p=p)
        for t, s, p in ((0.0, 0, 1.0), (1.5, 3, 1.0), (2.5, 4, 1.0), (2.0, 4, 0.9), (1.0, 9, 0.5))
    ]
    prompts = (PROMPT, [9])
    expected = [engine.generate(p, s, **how).rounds for s in many for p in prompts for how in WAYS]
    looks_ahead(engine, 3, graphs=True)
    assert [engine.generate(p, s, **how).rounds for s in many for p in prompts for how in WAYS] == expected
    assert len(Replayed.made) == 9  # greedy, sampled, nucleus; plain, chain, forced
    for top_k in range(1, 30):
        engine.generate([9], SamplingConfig(max_new_tokens=2, temperature=1.0, top_k=top_k))
    assert len(engine.rounds.graphs) == MOST_GRAPHS


class NothingOfTheHost(TorchDispatchMode):
    """Fails at an operator that gives a value to the host, or in which a tensor of the host takes part."""

    seen = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.is_meta for t in tensors), operator
        self.seen += 1
        return out


def on_meta(x):
    if isinstance(x, torch.Tensor):
        return x.to("meta")
    if type(x) is tuple:
        return tuple(map(on_meta, x))
    return replace(x, **{f.name: on_meta(getattr(x, f.name)) for f in fields(x)}) if is_dataclass(x) else x


@pytest.mark.parametrize("selector", [False, True], ids=["plain", "selector"])
def test_a_round_never_comes_to_the_host(engine, monkeypatch, selector):
    """On tensors without values, which say no number to anyone: a capture would break where this does."""

    def experts(moe, x, ranks, positions):  # what a GPU does; a CPU looks which experts are in use
        weights, chosen = model.route(moe, x, positions)
        combine = torch.zeros(len(x), len(moe.experts.down), device=x.device).scatter_(1, chosen, weights)
        return model.every_expert(moe.experts, x, combine).to(x.dtype)

    if selector:
        with_selector(engine)
    drafter, state = on_meta(engine.drafter), engine.state
    engine.target, engine.device = on_meta(engine.target), torch.device("meta")
    for thing in (state, *engine.caches, *engine.draft_caches):
        for name, value in vars(thing).items():
            setattr(thing, name, on_meta(value))
    with monkeypatch.context() as patch, NothingOfTheHost() as mode, torch.inference_mode():
        patch.setattr(model, "moe_mlp", experts)
        for greedy, top_k, nucleus in ((True, 0, False), (False, 0, False), (False, 20, True), (False, 0, True)):
            sampler = Sampler(greedy, top_k, nucleus, state.temperature, state.top_p, state.seed)
            engine._chain_round(None, sampler, False, 1, None)
            for forced in (False, True):
                engine._chain_round(drafter, sampler, forced, engine.block, None)
            engine._tree_round(drafter, sampler, 5, None)
        assert mode.seen > 1000
        with pytest.raises((RuntimeError, AssertionError)):
            state.left.item()
        with pytest.raises((RuntimeError, AssertionError)):
            state.position + torch.tensor([1])


def test_rounds_ahead_must_be_one_or_more(reference):
    with pytest.raises(ValueError, match="rounds_ahead is 0; use 1"):
        Engine(reference, EngineConfig(device="cpu", max_len=64, rounds_ahead=0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_len": 0}, "max_len is 0; give at least 2"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0; give at least 1"),
        ({"prefill_chunk": -8}, "prefill_chunk is -8"),
        ({"rank_timeout": 0.0}, "rank_timeout is 0.0"),
        ({"tree_adaptive": True}, "tree_adaptive cuts trees, and tree_budget is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_byte_is_read(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        Engine(tmp_path / "nothing", EngineConfig(device="cpu", **fields))


def test_the_graph_that_was_used_last_is_kept(engine, monkeypatch):
    """A kind that every request replays is not captured again because others came after it."""
    monkeypatch.setattr("mimo_runtime.rounds.Graph", Replayed)
    looks_ahead(engine, 1, graphs=True)
    greedy = SamplingConfig(max_new_tokens=2)
    engine.generate([9], greedy, speculate=False)
    Replayed.made.clear()
    for top_k in range(1, MOST_GRAPHS + 9):
        engine.generate([9], SamplingConfig(max_new_tokens=2, temperature=1.0, top_k=top_k))
        engine.generate([9], greedy, speculate=False)
    assert len(Replayed.made) == MOST_GRAPHS + 8
