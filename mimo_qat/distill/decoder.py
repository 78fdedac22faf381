"""Batched decoding for making data: many answers of one target at once, whose speed is the device's and not Python's.

transformers' `generate` joins tensors at every step, waits for the device at every step and keeps finished rows to the
end of a batch. Here a batch is a table of slots over one preallocated cache: a slot is refilled as soon as its answer
is found to be finished, a step neither allocates nor waits, and in bfloat16 on a GPU it is one CUDA graph. It serves
this project's own MiMo-V2 class only, and it decodes plainly: no beams, no drafts, no top-k or top-p.

A token is drawn by inverting the cumulative distribution at one uniform number, which depends on the job's key and
the position in the answer alone. So an answer does not depend on its neighbours, as far as floating point allows.

Shape letters: R slots in use, N query heads, G key-value heads, C columns of the cache, H head size, V vocabulary.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimo_qat.models.modeling_mimo_v2 import apply_rotary, rotary_table

CHECK_EVERY = 16  # steps between looks at what is finished, each of which waits for the device
COLUMN_STEP = 128  # attention runs over a multiple of so many columns: few shapes, few CUDA graphs
PREFILL_TOKENS = 2**15  # of one prefill, padding included; bounds its memory
FEWEST_SLOTS = 32  # the batch does not shrink below
# cuDNN would compile a plan for every shape, and its place in the order of preference differs between versions.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Job:
    """One answer to decode: `key` names its random numbers, temperature 0 is greedy."""

    prompt: Sequence[int]
    temperature: float
    key: str


@dataclass(frozen=True)
class Decoded:
    """The tokens that were decoded, the end token included if it `stopped` there."""

    tokens: list[int]
    stopped: bool


def uniforms(key: str, count: int) -> torch.Tensor:
    """float32 [count] in [0, 1) that depend on `key` alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def choose(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token ids [R] for logits [R, V]: the arg max where `temperature` [R] is 0, else where the cumulative
    distribution of softmax(logits / temperature) passes `uniform` [R].

    One number a row instead of Gumbel noise for every token: the noise would cost more than the head. 24-bit
    uniforms below 1 times the total stay below the total in float32, so the index is always a token.
    """
    scale = torch.where(temperature > 0, temperature, 1.0)
    total = (logits.float() / scale[:, None]).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)[:, 0]
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


class _Prefill:
    """What the model takes for an empty cache during prefill: it writes to the slots' columns and hands back what it
    was given, so that attention is plainly causal."""

    def __init__(self, decoder: "Decoder", slots: torch.Tensor):
        self.decoder, self.slots = decoder, slots

    def get_seq_length(self) -> int:
        return 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        columns = slice(1, 1 + keys.shape[2])
        self.decoder.keys[layer][self.slots, :, columns] = keys
        self.decoder.values[layer][self.slots, :, columns] = values
        return keys, values


class Decoder:
    """Decodes jobs with a MiMoV2ForCausalLM in `slots` rows at a time.

    Position p of a slot lies in column p + 1. Column 0 holds zeros: where a layer has a sink, its logit is the bias of
    that column. Columns behind a slot's position hold padding or an earlier answer, and are masked.
    """

    def __init__(
        self,
        model: Any,
        slots: int,
        max_prompt_length: int,
        max_new_tokens: int,
        end_token_ids: Sequence[int] = (),
        cuda_graph: bool = True,
    ):
        self.model, self.slots, self.max_new_tokens = model, slots, max_new_tokens
        self.max_prompt_length = max_prompt_length
        embedding = model.get_input_embeddings().weight
        self.device = device = embedding.device
        self.capacity = -(-(1 + max_prompt_length + max_new_tokens) // COLUMN_STEP) * COLUMN_STEP
        self.attentions = [layer.self_attn for layer in model.model.layers]

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        room = [(slots, a.kv_heads, self.capacity) for a in self.attentions]
        self.keys = [zeros(*r, a.head_dim, dtype=embedding.dtype) for r, a in zip(room, self.attentions, strict=True)]
        self.values = [
            zeros(*r, a.v_head_dim, dtype=embedding.dtype) for r, a in zip(room, self.attentions, strict=True)
        ]
        self.tokens = zeros(slots, dtype=torch.long)  # the last token, whose keys and values are not stored yet
        self.positions = zeros(slots, dtype=torch.long)  # of that token
        self.counts = zeros(slots, dtype=torch.long)  # tokens decoded
        self.live = zeros(slots, dtype=torch.bool)
        self.temperature = zeros(slots, dtype=torch.float32)
        # One more column than there are tokens: slots that are done write there or behind their end.
        self.uniform = zeros(slots, max_new_tokens + 1, dtype=torch.float32)
        self.out = zeros(slots, max_new_tokens + 1, dtype=torch.long)
        self.ends = torch.tensor(list(end_token_ids), dtype=torch.long, device=device)
        # In other dtypes F.grouped_mm is a loop over groups whose bounds come to the host, which no capture may do.
        self.cuda_graph = cuda_graph and device.type == "cuda" and embedding.dtype == torch.bfloat16
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    # ---- jobs and slots

    @torch.no_grad()
    def run(self, jobs: Sequence[Job]) -> list[Decoded]:
        """Decodes every job; the answers are in the order of the jobs.

        Long prompts come first, so that those prefilled together have similar lengths. When no job is left to start,
        the batch shrinks with the answers that are still going on.
        """
        for job in jobs:
            if not 0 < len(job.prompt) <= self.max_prompt_length:
                raise ValueError(f"prompt {job.key} has {len(job.prompt)} tokens; give 1 to {self.max_prompt_length}")
        # A graph is captured, and a Triton kernel launched, on the current device, whatever the tensors' is.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self._run(jobs)

    def _run(self, jobs: Sequence[Job]) -> list[Decoded]:
        waiting = deque(sorted(range(len(jobs)), key=lambda i: (-len(jobs[i].prompt), i)))
        done: dict[int, Decoded] = {}
        owners: list[int | None] = [None] * self.slots
        rows = self.slots
        while len(done) < len(jobs):
            free = [slot for slot, owner in enumerate(owners) if owner is None]
            started = [(slot, waiting.popleft()) for slot in free[: len(waiting)]]
            for slot, index in started:
                owners[slot] = index
            self._start([(slot, jobs[index]) for slot, index in started])
            if not waiting:
                owners, rows = self._shrink(owners, rows)
            reached = max(len(jobs[i].prompt) for i in owners if i is not None)
            longest = max(reached, self._last_position(rows) + 1)
            columns = min(self.capacity, -(-(1 + longest + CHECK_EVERY) // COLUMN_STEP) * COLUMN_STEP)
            for _ in range(CHECK_EVERY):
                self.step(rows, columns)
            self._collect(owners, done)
        return [done[i] for i in range(len(jobs))]

    def _last_position(self, rows: int) -> int:
        return int((self.positions[:rows] * self.live[:rows]).max())

    def _start(self, started: list[tuple[int, Job]]) -> None:
        """Fills slots: states, and the cache of all prompt tokens but the last, which the first step reads."""
        if not started:
            return
        at = torch.tensor([slot for slot, _ in started], device=self.device)
        lengths = [len(job.prompt) for _, job in started]
        self.tokens[at] = torch.tensor([job.prompt[-1] for _, job in started], device=self.device)
        self.positions[at] = torch.tensor(lengths, device=self.device) - 1
        self.counts[at] = 0
        self.live[at] = True
        self.temperature[at] = torch.tensor([job.temperature for _, job in started], device=self.device)
        noise = torch.stack([uniforms(job.key, self.max_new_tokens + 1) for _, job in started])
        self.uniform[at] = noise.to(self.device)
        first = 0
        while first < len(started) and lengths[first] > 1:
            group = started[first : first + max(1, PREFILL_TOKENS // lengths[first])]  # the first is the longest
            width = lengths[first] - 1
            # Padding on the right: nothing real comes after it, so that plain causal attention never sees it.
            ids = torch.tensor([[*job.prompt[:-1], *[0] * (width + 1 - len(job.prompt))] for _, job in group])
            cache = _Prefill(self, at[first : first + len(group)])
            self.model.model(ids.to(self.device), past_key_values=cache, use_cache=True)
            first += len(group)

    def _collect(self, owners: list[int | None], done: dict[int, Decoded]) -> None:
        """Takes the answers that are finished out of their slots."""
        live, counts = self.live.tolist(), self.counts.tolist()
        slots = [slot for slot, owner in enumerate(owners) if owner is not None and not live[slot]]
        ends = set(self.ends.tolist())
        for slot, tokens in zip(slots, self.out[slots].tolist(), strict=True):
            owner = owners[slot]
            assert owner is not None
            tokens = tokens[: counts[slot]]
            done[owner] = Decoded(tokens, tokens[-1] in ends)
            owners[slot] = None

    def _shrink(self, owners: list[int | None], rows: int) -> tuple[list[int | None], int]:
        """Halves the rows of the batch as often as its answers allow, and moves them to the front."""
        busy = [slot for slot, owner in enumerate(owners) if owner is not None]
        fewer = rows
        while len(busy) <= fewer // 2 and fewer // 2 >= FEWEST_SLOTS:
            fewer //= 2
        if fewer == rows:
            return owners, rows
        state = [self.tokens, self.positions, self.counts, self.live, self.temperature, self.uniform, self.out]
        at = torch.tensor(busy, device=self.device)
        for table in [*state, *self.keys, *self.values]:
            table[: len(busy)] = table[at]  # the right side is a copy
        self.live[len(busy) :] = False
        return [*(owners[slot] for slot in busy), *[None] * (len(owners) - len(busy))], fewer

    # ---- one step

    def step(self, rows: int, columns: int) -> None:
        """One more token for the first `rows` slots, attending to the first `columns` columns.

        The first step of a shape runs as it is, which also loads its kernels; the second is captured as a CUDA graph.
        """
        if not self.cuda_graph:
            return self._step(rows, columns)
        shape = (rows, columns)
        if shape not in self.graphs:
            self.graphs[shape] = None
            return self._step(rows, columns)
        graph = self.graphs[shape]
        if graph is None:
            pool = next((g.pool() for g in self.graphs.values() if g is not None), None)  # they never run at once
            self.graphs[shape] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(rows, columns)
        return graph.replay()

    def _step(self, rows: int, columns: int) -> None:
        token = choose(self._logits(rows, columns), self.temperature[:rows], self._uniform(rows))
        counts, live = self.counts[:rows], self.live[:rows]
        self.out[:rows].scatter_(1, counts[:, None], token[:, None])
        counts += live
        self.positions[:rows] += live
        self.tokens[:rows] = torch.where(live, token, self.tokens[:rows])
        live &= (token[:, None] != self.ends).all(1) & (counts < self.max_new_tokens)

    def _uniform(self, rows: int) -> torch.Tensor:
        return self.uniform[:rows].gather(1, self.counts[:rows, None])[:, 0]

    def _logits(self, rows: int, columns: int) -> torch.Tensor:
        """[R, V] of the slots' last tokens, whose keys and values it stores."""
        body, positions = self.model.model, self.positions[:rows]
        x = body.embed_tokens(self.tokens[:rows, None])
        slots, biases = torch.arange(rows, device=self.device), {}
        kinds = {(a.rope_theta, a.rotary_dim) for a in self.attentions}
        rotary = {kind: rotary_table(positions[:, None], kind[1], kind[0], x.dtype) for kind in kinds}
        for window in {a.window for a in self.attentions}:
            biases[window] = visible_bias(positions, columns, window, x.dtype)
        for layer, keys, values in zip(body.layers, self.keys, self.values, strict=True):
            attention = layer.self_attn
            q, k, v = attention.project(layer.input_layernorm(x))
            cos, sin = rotary[attention.rope_theta, attention.rotary_dim]
            keys[slots, :, positions + 1] = apply_rotary(k, cos, sin)[:, :, 0]
            values[slots, :, positions + 1] = v[:, :, 0]
            mixed = attend_slots(
                apply_rotary(q, cos, sin)[:, :, 0],
                keys[:rows, :, :columns],
                values[:rows, :, :columns],
                biases[attention.window],
                attention.head_dim**-0.5,
                attention.attention_sink_bias,
            )
            x = x + attention.o_proj(mixed.flatten(1)[:, None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(body.norm(x)[:, 0])


def visible_bias(positions: torch.Tensor, columns: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[R, 1, 1, C]: 0 where a slot at `positions` [R] sees a column, else -inf. A window counts the slot itself."""
    at = torch.arange(columns, device=positions.device) - 1
    seen = (at >= 0) & (at <= positions[:, None])
    if window is not None:
        seen = seen & (positions[:, None] - at < window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None, None]


def attend_slots(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one query a slot: q [R, N, H], keys [R, G, C, H], values [R, G, C, H'] -> [R, N, H'].

    The query heads of a group stand in for query positions, since they all see the same: keys and values are read
    once and never repeated. `sink` [N] is the bias of column 0, whose key and value are zero.
    """
    q = q.unflatten(1, (keys.shape[1], -1))
    if sink is not None:
        bias = bias.repeat(1, *q.shape[1:3], 1)
        bias[..., 0] = sink.to(bias.dtype).view(q.shape[1:3])
    with sdpa_kernel(KERNELS):
        return F.scaled_dot_product_attention(q, keys, values, bias, scale=scale).flatten(1, 2)
