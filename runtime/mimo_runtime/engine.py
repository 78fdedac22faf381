"""One model, one sequence at a time: prefill, then rounds of draft, verify and commit.

    engine = Engine("runs/demo/release")
    print(engine.generate(prompt_ids, SamplingConfig(max_new_tokens=64)).tokens)

The caches are made once for `max_len` positions and serve every prompt after the other without a reset.
"""

import bisect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mimo_kernels.choice import Best, tokens
from mimo_qat.graphs import Graph
from mimo_qat.models.draft_tree import (
    Tree,
    TreeTensors,
    best_prefix,
    greedy_chain,
    grow_tree,
    grow_tree_tensors,
    tree_size,
)
from mimo_runtime.cache import Position
from mimo_runtime.config import KERNELS, EngineConfig, Rule, SamplingConfig
from mimo_runtime.draft_model import draft_context, draft_forward, new_draft_caches
from mimo_runtime.load import Drafter, LoadConfig, Moe, Target, load_target, tokenizer_size
from mimo_runtime.load_drafter import load_drafter
from mimo_runtime.model import (
    keep_rows,
    new_caches,
    rotations,
    rows_stand_alone,
    target_forward,
    tree_rows,
    without_host,
)
from mimo_runtime.parallel import Ranks, connect, place
from mimo_runtime.prefill import CHUNKS, chunks, most_heads, padded_sizes
from mimo_runtime.rounds import SLOTS, Rounds, State, forced_chain, play, play_tree
from mimo_runtime.speculate import (
    Round,
    Sampler,
    candidates_a_slot,
    choose,
    decode,
    draft_candidates,
    forced_drafts,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BLOCK = 8  # rows of a verification where no drafter says otherwise


@dataclass
class Generation:
    """What one call produced. The first token comes from the prefill, every later one from a round."""

    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"
    rounds: list[Round] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0

    @property
    def decode_seconds(self) -> float:
        """Time from the prefill to the last token, what `on_tokens` took in between included."""
        return sum(self.round_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first, by the time after the prefill."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Forced(NamedTuple):
    """Drafts instead of the drafter's: truth[i] is the token at position `first` + i, and round r has
    lengths[r % len(lengths)] true drafts."""

    truth: list[int]
    first: int
    lengths: list[int]


class Job(NamedTuple):
    """What is to be decoded after a prefill that chose `first`, which stands at position `start`: `room` tokens."""

    first: int
    start: int
    room: int
    sampling: SamplingConfig
    forced: Forced | None


class Engine:
    """A target, its drafter if there is one, and their caches; of several ranks, one rank's share of all.

    All ranks are asked for the same and answer the same.
    """

    def __init__(self, folder: str | Path, cfg: EngineConfig | None = None, *, rtn: Rule | None = None):
        """Loads a release or BF16 folder; `rtn` snaps the experts of a BF16 folder to MXFP4 with that scale rule.

        ValueError (one line, with the remedy) where the folder is not complete or the drafter is not the target's.
        """
        cfg = cfg or EngineConfig()
        folder = Path(folder)
        _check_settings(cfg)
        device = place(cfg.device)
        self.ranks = self._connect(device, cfg)
        kernels = {name: getattr(cfg, name) for name in KERNELS}
        load = LoadConfig(device, DTYPES[cfg.dtype], rtn, ranks=self.ranks, **kernels)
        self.folder, self.cfg = folder, cfg
        self.target, self.drafter = self._load(load)
        self.device = self.target.embed.device
        # Called at the begin of a round and after its draft, verify and accept, for measurements.
        self.mark: Callable[[str], None] = lambda point: None
        self.block = self.drafter.block if self.drafter else BLOCK
        # One row is computed as a block of equal rows: the same bytes, the same time, and the bits of verification, so
        # that the drafter changes no token by a rounding (measured: all bits equal on an H200 and on a CPU with AMX).
        # Kernels need that only to be in the same shape. A CPU in float32 computes more slowly than it reads, and its
        # roundings are far below any choice.
        slow = self.device.type == "cpu" and cfg.dtype == "float32"
        shape = 1 if self.block <= 8 else 9
        self.min_rows = 1 if slow else shape if self.block <= 16 and rows_stand_alone(self.target) else self.block
        if cfg.tree_budget < 0 or (cfg.tree_budget and self.drafter is None):
            raise ValueError(f"tree_budget is {cfg.tree_budget}; use 0, or a number of drafts where there is a drafter")
        most_rows = max(self.block, cfg.tree_budget + 1)
        table = rotations(self.target, self.drafter, cfg.max_len + most_rows)
        self.target = replace(self.target, rotations=table)
        self.drafter = self.drafter and replace(self.drafter, rotations=table)
        self.caches = new_caches(self.target, cfg.max_len, most_rows)
        self.draft_caches = new_draft_caches(self.drafter, cfg.max_len) if self.drafter else []
        if cfg.cuda_graphs:
            self._check_graphs(most_rows)
        slots = max(SLOTS, cfg.rounds_ahead)
        self.state = State(self.target.geometry.vocab_size, cfg.max_len, self.block, self.device, slots)
        # A CPU computes when it is asked to, so that rounds ahead would only be late; and ranks compare every round.
        ahead = 1 if self.device.type == "cpu" or cfg.check_ranks else cfg.rounds_ahead
        self.rounds = Rounds(self.state, ahead, cfg.cuda_graphs, self.ranks)
        self._graphs: dict[tuple[str, *tuple[int, ...]], Graph] = {}
        self._chunk = cfg.prefill_chunk or CHUNKS[self.device.type]
        self._sizes = padded_sizes(self.target, self._chunk, cfg.max_len, most_rows)
        with self._on_device():
            self._seconds = self._measure_rounds() if cfg.tree_budget and cfg.tree_adaptive else None

    def _connect(self, device: str, cfg: EngineConfig) -> Ranks:
        return connect(device, cfg.rank_timeout, cfg.check_ranks, cfg.collectives)

    def _load(self, load: LoadConfig) -> tuple[Target, Drafter | None]:
        target = load_target(self.folder, load)
        where = self.folder / "dflash" if self.cfg.drafter == "auto" else self.cfg.drafter and Path(self.cfg.drafter)
        if where and (where.exists() or self.cfg.drafter != "auto"):
            return target, load_drafter(where, target, load, tokenizer_size(self.folder))
        return target, None

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: list[int],
        sampling: SamplingConfig | None = None,
        *,
        speculate: bool = True,
        tree: bool = True,
        forced_acceptance: int | list[int] | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Generation:
        """Generates after `prompt_ids`; `on_tokens` gets the tokens of each round as they are committed.

        `speculate=False` leaves the drafter out, `tree=False` verifies chains in spite of a `tree_budget`; the tokens
        are the same, but that trees in bfloat16 may turn a near tie. `forced_acceptance` replaces the drafter's drafts
        by the model's own next tokens for that many slots a round (a list is cycled through) and by wrong ones after,
        while the drafter still runs: for tests, and for benchmarks that say so. It decodes plainly first.
        """
        sampling = self._resolved(sampling or SamplingConfig())
        self._check(prompt_ids, sampling)
        drafter = self.drafter if speculate else None
        budget = self.cfg.tree_budget if drafter and tree else 0
        forced = None if forced_acceptance is None else self._forced(prompt_ids, sampling, forced_acceptance)
        with self._on_device():
            out, began = Generation(), time.perf_counter()
            logits = self._prefill(prompt_ids, drafter)
            sampler, start = Sampler.of(sampling, self.device), len(prompt_ids)
            first = int(choose(logits, torch.tensor([start], device=self.device), sampler)[0])
            self.ranks.agree("the prefill", [first])
            out.tokens.append(first)
            out.prefill_seconds = time.perf_counter() - began
            if on_tokens:
                on_tokens([first])
            room = 0 if first in sampling.stop_token_ids else sampling.max_new_tokens - 1
            job = Job(first, start, room, sampling, forced)
            began = time.perf_counter()
            for r in self._decoded(job, drafter, budget):
                out.rounds.append(r)
                self.ranks.agree(f"round {len(out.rounds)}", r.tokens)
                out.tokens += r.tokens
                now = time.perf_counter()
                out.round_seconds.append(now - began)
                began = now  # `on_tokens` is part of the next round's time: a GPU goes on with that meanwhile
                if on_tokens:
                    on_tokens(r.tokens)
        out.finish = "stop" if out.tokens[-1] in sampling.stop_token_ids else "length"
        return out

    def _forced(self, prompt_ids: list[int], sampling: SamplingConfig, lengths: int | list[int]) -> Forced:
        """The model's own next tokens, to be drafted."""
        lengths = [lengths] if isinstance(lengths, int) else lengths
        if not lengths or min(lengths) < 0:
            raise ValueError(f"forced_acceptance is {lengths}; give numbers of accepted drafts, 0 to {self.block - 1}")
        return Forced(self.generate(prompt_ids, sampling, speculate=False).tokens, len(prompt_ids), lengths)

    def _decoded(self, job: Job, drafter: Drafter | None, budget: int) -> Iterator[Round]:
        """The rounds of a job; with a `budget`, those of trees."""
        if not drafter or not budget:
            return self._chains(job, drafter)
        on_host = job.forced is not None or self._seconds is not None
        return self._host_trees(job, drafter, budget) if on_host else self._trees(job, drafter, budget)

    def _chains(self, job: Job, drafter: Drafter | None) -> Iterator[Round]:
        """Rounds of the device: chains of the drafter's or of forced drafts; without either, one token a round."""
        forced = job.forced is not None
        if job.forced:
            self.state.force(*job.forced)
        sampler = self.state.begin(job.first, job.start, job.sampling)
        rows = self.block if drafter or forced else 1
        step = partial(self._chain_round, drafter, sampler, forced, rows)
        kind = (drafter is not None, forced, sampler.greedy, sampler.top_k, sampler.nucleus)
        return self.rounds.run(step, kind, job.start, job.room, rows)

    def _chain_round(
        self, drafter: Drafter | None, sampler: Sampler, forced: bool, rows: int, bound: int | None
    ) -> None:
        """One round on `state`, whose anchor is not behind position `bound` (None: anywhere)."""
        self._reach(bound, rows)

        def draft() -> torch.Tensor:
            self.mark("begin")
            drafts = self._draft(drafter, sampler) if drafter else self.state.anchor[:0]
            drafts = forced_chain(self.state, rows - 1) if forced else drafts
            self.mark("draft")
            return drafts

        def verify(ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor | Best:
            found = self._advance(drafter, ids, position, greedy=sampler.greedy)
            self.mark("verify")
            return found

        play(self.state, draft, verify, sampler)
        self.mark("accept")

    def _reach(self, bound: int | None, rows: int) -> None:
        """Says how far a round of `rows` rows may read, whose anchor is not behind position `bound`."""
        for cache in self.caches:
            cache.reach = cache.capacity if bound is None else bound + rows
        for cache in self.draft_caches:  # which hold the block that is drafted as well, behind the anchor
            cache.reach = cache.capacity if bound is None else bound + self.block

    def _draft(self, drafter: Drafter, sampler: Sampler) -> torch.Tensor:
        """The drafter's tokens [block - 1] after the anchor: the best of each slot, or the selector's chain."""
        anchor, start = self.state.anchor, self.state.position
        greedy = sampler.greedy and drafter.selector is None
        hidden, logits = draft_forward(self.target, drafter, self.draft_caches, anchor, start, greedy=greedy)
        if greedy:
            return tokens(logits)
        if drafter.selector is None:
            return choose(logits, start + 1 + torch.arange(len(logits), device=self.device), sampler)
        return greedy_chain(draft_candidates(drafter.selector, hidden, logits, anchor[0], start, sampler))

    def _trees(self, job: Job, drafter: Drafter, budget: int) -> Iterator[Round]:
        """Rounds of the device, of trees of `budget` drafts."""
        sampler = self.state.begin(job.first, job.start, job.sampling)
        vocab_size = min(drafter.vocab_size, self.target.geometry.vocab_size)
        drafted = tree_size(self.block - 1, candidates_a_slot(drafter.selector, vocab_size, sampler), budget)
        step = partial(self._tree_round, drafter, sampler, drafted)
        kind = ("tree", sampler.greedy, sampler.top_k, sampler.nucleus)
        return self.rounds.run(step, kind, job.start, job.room, self.block, drafted)

    def _tree_round(self, drafter: Drafter, sampler: Sampler, drafted: int, bound: int | None) -> None:
        """One round of a tree on `state`, as `_chain_round`."""
        self._reach(bound, drafted + 1)

        def draft() -> TreeTensors:
            self.mark("begin")
            anchor, start = self.state.anchor, self.state.position
            hidden, logits = draft_forward(self.target, drafter, self.draft_caches, anchor, start)
            candidates = draft_candidates(drafter.selector, hidden, logits, anchor[0], start, sampler)
            tree = grow_tree_tensors(candidates, drafted)
            self.mark("draft")
            return tree

        def verify(ids: torch.Tensor, tree: TreeTensors, position: torch.Tensor) -> tuple[Any, torch.Tensor]:
            found = self._verify_tree(ids, position, tree.depths, tree.visible, greedy=sampler.greedy)
            self.mark("verify")
            return found

        def keep(path: torch.Tensor, taps: torch.Tensor, position: torch.Tensor) -> None:
            keep_rows(self.caches, path, position)
            draft_context(drafter, self.draft_caches, taps[path], position)

        play_tree(self.state, draft, verify, keep, self.block - 1, sampler)
        self.mark("accept")

    def _host_trees(self, job: Job, drafter: Drafter, budget: int) -> Iterator[Round]:
        """Rounds of trees that the host grows and walks: of the size that pays, or of forced drafts."""
        sampler = Sampler.of(job.sampling, self.device)
        forced, taps = None, torch.empty(0)
        if job.forced:  # about so many nodes, most of them wrong siblings
            siblings = max(0, budget // (self.block - 1) - 1)
            forced = forced_drafts(*job.forced, self.block, self.target.geometry.vocab_size, siblings)

        def propose(anchor: int, start: int) -> Tree:
            self.mark("begin")
            drafts = self._draft_tree(drafter, anchor, start, sampler, budget)
            drafts = forced(anchor, start) if forced else drafts
            self.mark("draft")
            return drafts

        def verify(rows: list[int], drafts: Tree, start: int) -> torch.Tensor:
            nonlocal taps
            logits, taps = self._pass("tree", self._verify_tree, rows, start, *tree_rows(drafts, self.device))
            self.mark("verify")
            return logits

        def commit(path: list[int], start: int) -> None:
            if path != list(range(len(path))):  # else they are in place
                keep_rows(self.caches, self._tensor(path), start)
            draft_context(drafter, self.draft_caches, taps[path], start)
            self.mark("accept")

        stops = job.sampling.stop_token_ids
        return decode(verify, propose, job.first, job.start, job.room, sampler, stops, commit)

    @torch.inference_mode()
    def last_logits(self, ids: list[int]) -> torch.Tensor:
        """Float32 logits [vocabulary] of the last position."""
        self._check(ids, None)
        with self._on_device():
            return self._prefill(ids, None)[0].clone()  # of a graph's memory

    @torch.inference_mode()
    def logits(self, ids: list[int], chunk: int | None = None) -> torch.Tensor:
        """Float32 logits [len(ids), vocabulary] of every position, computed `chunk` tokens at once; without the rows of
        positions that the caches have anyway (`_held`)."""
        self._check(ids, None)
        parts = chunks(self._held(ids), len(ids), chunk or self._chunk, most_heads(self.target))
        return torch.cat([target_forward(self.target, self.caches, self._tensor(ids[c]), c.start)[0] for c in parts])

    def _prefill(self, ids: list[int], drafter: Drafter | None) -> torch.Tensor:
        """Logits [1, vocabulary] after the prompt; fills the caches."""
        held, size = self._held(ids), self.padded(len(ids))
        if size is not None and not held:
            inputs = self._tensor(ids + ids[-1:] * (size - len(ids))), torch.tensor(len(ids), device=self.device)
            key = "prompt", drafter is not None, size
            return self._replayed(key, partial(self._padded_prompt, drafter), inputs)
        for c in chunks(held, len(ids), self._chunk, most_heads(self.target)):
            logits = self._advance(drafter, self._tensor(ids[c]), c.start, c.stop - c.start - 1)
        return logits

    def padded(self, length: int) -> int | None:
        """The rows that a prompt of so many tokens is padded to, or None where it is not."""
        return next((size for size in self._sizes if size >= length), None)

    def _padded_prompt(self, drafter: Drafter | None, ids: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocabulary] after the first `end` [] tokens; the others are padding."""
        taps_of = drafter.taps if drafter else ()
        logits, taps = target_forward(self.target, self.caches, ids, 0, taps=taps_of, end=end)
        if drafter:
            draft_context(drafter, self.draft_caches, taps, 0, end)
        return logits

    def _held(self, ids: list[int]) -> int:
        """How many of the first positions of a prompt the caches have before its prefill."""
        return 0

    def _pass(self, kind: str, function: Callable, rows: list[int], start: int, *more: torch.Tensor) -> Any:
        """`function(ids, start, *more)`; where the settings say so, as the graph of its kind and number of rows."""
        self._reach(None if self.cfg.cuda_graphs else start, len(rows))
        inputs = self._tensor(rows), torch.tensor(start, device=self.device), *more
        return self._replayed((kind, len(rows)), function, inputs)

    def _replayed(self, key: tuple[str, *tuple[int, ...]], function: Callable, inputs: tuple[torch.Tensor, ...]) -> Any:
        """`function(*inputs)`; where the settings say so, as the graph of that key: its kind and more. What it returns
        is there until the next call of the kind."""
        if not self.cfg.cuda_graphs:
            return function(*inputs)
        self.ranks.begin_pass()
        if key not in self._graphs:
            pool = next((g.graph.pool() for (kind, *_), g in self._graphs.items() if kind == key[0]), None)
            self._graphs[key] = Graph(function, inputs, pool)
        return self._graphs[key](*inputs)

    def _advance(
        self,
        drafter: Drafter | None,
        ids: torch.Tensor,
        start: Position,
        logits_from: int | None = None,
        greedy: bool = False,
    ) -> Any:
        """Target logits of a prefill's rows from `logits_from` on, or without it of all rows of a verification; where
        `greedy`, the `Best` of each row.

        The drafter's context gets all rows; acceptance decides later how many count.
        """
        first, rows = (0, self.min_rows) if logits_from is None else (logits_from, 1)
        taps_of = drafter.taps if drafter else ()
        logits, taps = target_forward(
            self.target, self.caches, ids, start, taps=taps_of, logits_from=first, min_rows=rows, greedy=greedy
        )
        if drafter:
            draft_context(drafter, self.draft_caches, taps, start)
        return logits

    def _verify_tree(
        self,
        ids: torch.Tensor,
        start: Position,
        depths: torch.Tensor,
        ancestors: torch.Tensor,
        greedy: bool = False,
    ) -> tuple[Any, torch.Tensor]:
        """Logits, or where `greedy` the `Best`, and taps of the rows of a tree; the drafter's context waits for the
        walk."""
        assert self.drafter is not None
        taps_of, rows = self.drafter.taps, (depths, ancestors)
        return target_forward(self.target, self.caches, ids, start, taps=taps_of, tree=rows, greedy=greedy)

    def _draft_tree(self, drafter: Drafter, anchor: int, start: int, sampler: Sampler, budget: int) -> Tree:
        """The tree of at most `budget` drafts after `anchor`."""
        run = partial(draft_forward, self.target, drafter, self.draft_caches)
        hidden, logits = self._pass("draft", run, [anchor], start)
        after = torch.tensor(anchor, device=self.device)
        candidates = draft_candidates(drafter.selector, hidden, logits, after, start, sampler).cpu()
        tree = grow_tree(candidates, budget)
        return best_prefix(tree, self._seconds) if self._seconds else tree

    @torch.inference_mode()
    def _measure_rounds(self) -> Callable[[int], float]:
        """Seconds of a round that verifies n drafts: the best of three at 1, 2, 4, ... and `tree_budget`.

        In between the next larger size counts, so that a tree always has one of these sizes. The rows it writes are
        those of a rejected tree at position 0.
        """
        assert self.drafter is not None
        sizes = sorted({self.cfg.tree_budget, *(2**i for i in range(20) if 2**i < self.cfg.tree_budget)})
        seconds, least = [], 0.0
        for size in sizes:
            tree, times = Tree([0] * size, [0] * size, [1] * size, []), []
            for _ in range(4):  # the first one captures or warms up
                began = time.perf_counter()
                self._pass("draft", partial(draft_forward, self.target, self.drafter, self.draft_caches), [0], 0)
                rows = tree_rows(tree, self.device)
                logits, _ = self._pass("tree", self._verify_tree, [0, *tree.tokens], 0, *rows)
                logits.argmax(-1).tolist()
                times.append(time.perf_counter() - began)
            least = max(least, min(times[1:]))
            seconds.append(least)
        # All ranks have to cut their trees alike: by the slowest one's times.
        own = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        seconds = self.ranks.gather(own[:, None]).amax(-1).tolist()
        return lambda n: seconds[bisect.bisect_left(sizes, n)]

    def _on_device(self) -> AbstractContextManager:
        """Graphs, streams and events are made on the current device of the thread, whatever the tensors' is."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, device=self.device)

    def _check_graphs(self, most_rows: int) -> None:
        moes = [layer.mlp for layer in self.target.layers if isinstance(layer.mlp, Moe)]
        if self.device.type != "cuda":
            raise ValueError("cuda_graphs needs a GPU; leave it out on a CPU")
        if any(not without_host(moe, rows) for moe in moes for rows in (self.block, most_rows)):
            raise ValueError(
                f"cuda_graphs: {len(moes[0].experts.down)} plain experts or {most_rows} rows are too many to compute "
                "every expert for every row; leave it out, lower tree_budget, or use packed experts"
            )

    def _resolved(self, sampling: SamplingConfig) -> SamplingConfig:
        if sampling.stop_token_ids:
            return sampling
        return replace(sampling, stop_token_ids=self.target.stop_token_ids)

    def _check(self, ids: list[int], sampling: SamplingConfig | None) -> None:
        new = sampling.max_new_tokens if sampling else 0
        if not ids:
            raise ValueError("the prompt has no tokens; give at least one (a chat template or a BOS token adds some)")
        if len(ids) + new > self.cfg.max_len:
            raise ValueError(
                f"{len(ids)} prompt tokens and {new} new ones do not fit max_len {self.cfg.max_len}; raise max_len"
            )
        bad = next((i for i in ids if not 0 <= i < self.target.geometry.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside of the vocabulary; use the tokenizer of this checkpoint")


def _check_settings(cfg: EngineConfig) -> None:
    """ValueError for what can be seen before a model is read, which may take minutes."""
    if cfg.max_len < 2:
        raise ValueError(f"max_len is {cfg.max_len}; give at least 2, a prompt and a new token")
    if cfg.prefill_chunk is not None and cfg.prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {cfg.prefill_chunk}; give at least 1")
    if cfg.rank_timeout <= 0:
        raise ValueError(f"rank_timeout is {cfg.rank_timeout}; give the seconds after which a rank is late")
    if cfg.rounds_ahead < 1:
        raise ValueError(f"rounds_ahead is {cfg.rounds_ahead}; use 1, or more to keep a GPU busy")
    if cfg.tree_adaptive and not cfg.tree_budget:
        raise ValueError("tree_adaptive cuts trees, and tree_budget is 0; give a tree_budget, or leave it out")
    if cfg.cuda_graphs and cfg.check_ranks:
        raise ValueError("check_ranks looks between the steps of a pass, which cuda_graphs replays; leave one out")
