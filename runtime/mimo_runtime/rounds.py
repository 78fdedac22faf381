"""A decoding round as one program of the device: draft, verify, accept and advance, without a word from the host.

The drafts are a chain or a tree of a fixed size; the trees that the host grows are in `speculate`.

All that changes from round to round is in the tensors of a `State`. So a round has no argument and no result, a CUDA
graph of it can be replayed any number of times, and the host enqueues rounds ahead of the one whose tokens it reads.
Once a stop token or the budget has set `left` to 0, a further round commits nothing: its rows lie behind the committed
length, where the caches do not look, and no number moves. Plain decoding is the same with a block of one row.

Everything here has fixed shapes and waits for nothing. On a CPU, and where graphs are off, the same functions run
eagerly.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from functools import partial

import torch

from mimo_kernels import choice
from mimo_kernels.choice import Best
from mimo_qat.graphs import Graph
from mimo_qat.models.draft_tree import TreeTensors
from mimo_runtime.config import SamplingConfig
from mimo_runtime.parallel import Ranks
from mimo_runtime.speculate import Round, Sampler, choose

Step = Callable[[int | None], None]  # plays one round whose anchor is not behind that position, or anywhere for None

SLOTS = 16  # records that a state keeps, hence rounds that may be ahead

MOST_GRAPHS = 16  # kinds of rounds that stay captured; requests choose top_k, which is part of the kind


class State:
    """One sequence between two rounds, in tensors at fixed addresses that a round reads and changes. Integers, int64.

    anchor [1]: the last committed token, whose keys and values are not stored yet; position []: where it stands;
    left []: tokens that may still come, 0 when the text has ended; turn []: rounds that committed a token; stops
    [vocabulary] bool: tokens that end the text.
    record [3 + block]: what the last round did: tokens committed, drafts accepted, `left` after it, and the target's
    own token at each row of the chain or of the tree's path, of which the first ones are those committed.
    records [slots, 3 + block], slot []: the same of the last rounds, each in the slot that was next, so that a round
    need not wait until somebody has read what the one before it did.
    truth [max_len + block + 1] and accept [max_len + 1], for forced acceptance: the token at each position (-1 where it
    is not known) and the drafts to accept in each round.
    """

    def __init__(
        self, vocab_size: int, max_len: int, block: int, device: torch.device | str = "cpu", slots: int = SLOTS
    ):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.anchor, self.position, self.left, self.turn = zeros(1), zeros(), zeros(), zeros()
        self.stops, self.record = zeros(vocab_size, dtype=torch.bool), zeros(3 + block)
        self.records, self.slot = zeros(slots, 3 + block), zeros()
        self.truth, self.accept = zeros(max_len + block + 1), zeros(max_len + 1)
        self.temperature, self.top_p = zeros(dtype=torch.float32), zeros(dtype=torch.float32)
        self.seed = zeros()

    def begin(self, anchor: int, position: int, sampling: SamplingConfig) -> Sampler:
        """The state after a prefill whose choice was `anchor`, with nothing left to come yet; the sampler's numbers
        are tensors of this state."""
        device, vocab_size = self.anchor.device, len(self.stops)
        self.anchor.fill_(anchor)
        self.position.fill_(position)
        self.left.zero_()
        self.turn.zero_()
        self.stops.zero_()
        stops = [token for token in sampling.stop_token_ids if 0 <= token < vocab_size]
        self.stops[torch.tensor(stops, dtype=torch.int64, device=device)] = True
        new = Sampler.of(sampling, device)
        self.temperature.copy_(new.temperature)
        self.top_p.copy_(new.top_p)
        self.seed.copy_(new.seed)
        return new._replace(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def text(self) -> choice.Text:
        """What acceptance changes."""
        return choice.Text(
            self.anchor, self.position, self.left, self.turn, self.stops, self.record, self.records, self.slot
        )

    def force(self, truth: list[int], first: int, lengths: list[int]) -> None:
        """Sets what `forced_chain` drafts: truth[i] is the token at position `first` + i, and round r has
        lengths[r % len(lengths)] true drafts."""
        device, rounds = self.accept.device, len(self.accept)
        self.truth.fill_(-1)
        self.truth[first : first + len(truth)] = torch.tensor(truth, device=device)
        self.accept.copy_(torch.tensor(lengths, device=device).repeat(-(-rounds // len(lengths)))[:rounds])


def forced_chain(state: State, count: int) -> torch.Tensor:
    """Drafts [count] of which exactly so many are right as `State.force` asks for; the others are the next ids."""
    slots = torch.arange(count, device=state.anchor.device)
    ahead = state.truth[state.position + 1 + slots]
    ahead = torch.where(ahead < 0, state.anchor, ahead)
    accept = state.accept.gather(0, state.turn[None])
    return torch.where(slots < accept, ahead, (ahead + 1) % len(state.stops))


def play(
    state: State,
    draft: Callable[[], torch.Tensor],
    verify: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | Best],
    sampler: Sampler,
) -> None:
    """One round: `draft()` gives tokens [D] after the anchor, `verify(rows [D + 1], position [])` the target's logits
    [D + 1, vocabulary] after each of [anchor, drafts...], or of a greedy sampler the best of them."""
    drafts = draft()
    rows = torch.cat((state.anchor, drafts)) if len(drafts) else state.anchor
    own = verify(rows, state.position)
    if not isinstance(own, Best):
        own = choose(own, state.position + 1 + torch.arange(len(rows), device=rows.device), sampler)
    choice.accept(state.text(), drafts, own)


def play_tree(
    state: State,
    draft: Callable[[], TreeTensors],
    verify: Callable[[torch.Tensor, TreeTensors, torch.Tensor], tuple[torch.Tensor | Best, torch.Tensor]],
    keep: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    slots: int,
    sampler: Sampler,
) -> None:
    """One round of a tree: `draft()` gives n nodes, at most `slots` deep, `verify(rows [n + 1], tree, position [])` the
    target's logits [n + 1, vocabulary] after each of [anchor, nodes...], or the best of them, and the taps of these.

    `keep(path [A], taps, position [])` makes those rows the ones at position, position + 1, ...; A is fixed, and what
    lies beyond the committed length afterwards counts as rejected. All nodes of a depth share one position, hence one
    noise: the text is that of plain decoding.
    """
    tree = draft()
    rows = torch.cat((state.anchor, tree.tokens))
    logits, taps = verify(rows, tree, state.position)
    own = choose(logits, state.position + 1 + tree.depths, sampler)
    path, accepted = tree.walk(own, slots)
    keep(path, taps, state.position)
    choice.advance(state.text(), accepted, own[path])


class Rounds:
    """Plays rounds on one `state`, `ahead` of them at most before it looks at what the first one did.

    Records come through pinned memory, each with an event: the host waits for the round that it reads and for nothing
    else. A stream of their own copies them, so that the next round begins without them; its slot of the state is
    written again only after the host has read it. Every rank reads the same records, so all enqueue alike.
    """

    def __init__(self, state: State, ahead: int, graphs: bool, ranks: Ranks):
        """ValueError where the state keeps fewer records than are ahead."""
        if ahead > len(state.records):
            raise ValueError(f"{ahead} rounds ahead of a state with {len(state.records)} slots; give it more slots")
        self.state, self.ahead, self.ranks = state, ahead, ranks
        self.graphs: dict[Hashable, Graph] | None = {} if graphs else None
        cuda = state.records.is_cuda
        self.records = torch.zeros(state.records.shape, dtype=torch.int64, pin_memory=cuda)
        self.aside = torch.cuda.Stream(state.records.device) if cuda else None
        self.events = [torch.cuda.Event() for _ in self.records] if cuda else []

    def run(
        self, step: Step, kind: Hashable, start: int, left: int, most: int, drafted: int | None = None
    ) -> Iterator[Round]:
        """Yields rounds until `left` tokens are committed or a stop token is. The state has just begun at `start`.

        `step` plays rounds of `drafted` drafts (most - 1 without it) that commit at most `most` tokens; as a graph it
        is captured once for each `kind`.
        """
        drafted = most - 1 if drafted is None else drafted
        if self.graphs is not None:
            step = self._captured(step, kind)
        self.state.left.fill_(left)
        self.state.slot.zero_()
        waiting: deque[int] = deque()  # slots of rounds that were enqueued and not read
        enqueued = 0
        while left:
            while len(waiting) < min(self.ahead, left):  # each commits a token or ends the text
                slot, enqueued = enqueued % len(self.records), enqueued + 1
                self._enqueue(step, start + len(waiting) * most, slot)
                waiting.append(slot)
            kept, accepted, left, *own = self._read(waiting.popleft())
            start += kept
            yield Round(own[:kept], drafted, accepted, kept < accepted + 1)

    def _enqueue(self, step: Step, bound: int, slot: int) -> None:
        self.ranks.begin_pass()
        step(bound)
        if self.aside is None:
            self.records[slot].copy_(self.state.records[slot])
            return
        self.aside.wait_stream(torch.cuda.current_stream(self.aside.device))
        with torch.cuda.stream(self.aside):
            self.records[slot].copy_(self.state.records[slot], non_blocking=True)
            self.events[slot].record()

    def _read(self, slot: int) -> list[int]:
        if self.events:
            self.events[slot].synchronize()
        return self.records[slot].tolist()

    def _captured(self, step: Step, kind: Hashable) -> Step:
        """The graph of a kind of rounds. Capturing plays it with nothing left to come, which changes no number."""
        assert self.graphs is not None
        if kind not in self.graphs:
            pool = next((g.graph.pool() for g in self.graphs.values()), None)
            self.graphs[kind] = Graph(partial(step, None), (), pool)
            if len(self.graphs) > MOST_GRAPHS:  # the capture has waited for the device: no replay of it is under way
                del self.graphs[next(iter(self.graphs))]
        graph = self.graphs[kind] = self.graphs.pop(kind)  # now the last that would go
        return lambda bound: graph()
