"""Where the time of a decoding round goes, and what it would take if it did nothing but read: the roofline.

The phases come from a run of its own, one round after the other: draft, verify and accept by the clock of the device,
and the rest, which the host adds before it asks for the next round; in a timed run rounds ahead hide most of the rest.
Experts are counted in a run without CUDA graphs. Bytes are those that a round has to read once, of several ranks the
share of one: what a kernel reads in vain does not count, so a program that computes every expert is measured against
those that were chosen.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from mimo_runtime.config import SamplingConfig
from mimo_runtime.engine import Engine, Generation
from mimo_runtime.load import Drafter, Layer, Mlp, Moe, Target
from mimo_runtime.rounds import Rounds

POINTS = ("begin", "draft", "verify", "accept")
PHASES = (*POINTS[1:], "rest")


class Marks:
    """Takes the time at the begin of each round and after its phases, as `Engine.mark`; `read` is for `on_tokens`.

    A GPU's times are events of its stream, which may be part of a CUDA graph.
    """

    def __init__(self, device: torch.device):
        self.device, self.prefilled = device, False
        self.rounds: list[dict[str, float]] = []
        self.at: dict[str, Any] = {}
        if device.type == "cuda":
            self.at = {point: torch.cuda.Event(enable_timing=True, external=True) for point in POINTS}

    def __call__(self, point: str) -> None:
        if self.device.type == "cuda":
            self.at[point].record(torch.cuda.current_stream(self.device))
        else:
            self.at[point] = time.perf_counter()

    def read(self, tokens: list[int]) -> None:
        """Keeps the milliseconds of the phases of the round that has ended; the first call ends the prefill."""
        if self.prefilled:
            self.rounds.append({b: self._ms(self.at[a], self.at[b]) for a, b in pairwise(POINTS)})
        self.prefilled = True

    def _ms(self, a: Any, b: Any) -> float:
        if self.device.type == "cuda":
            b.synchronize()
            return a.elapsed_time(b)
        return 1e3 * (b - a)


def phases_ms(rounds: list[dict[str, float]], seconds: list[float]) -> dict[str, float]:
    """Milliseconds of each phase and of the rest of the rounds' `seconds`: means, so that they add up to a round."""
    out = {phase: statistics.fmean(r[phase] for r in rounds) for phase in POINTS[1:]}
    return out | {"rest": 1e3 * statistics.fmean(seconds) - sum(out.values())}


@contextmanager
def marked(engine: Engine) -> Iterator[Marks]:
    """Inside, `engine` tells the times of its rounds, which it plays one at a time, as graphs of their own."""
    before, marks = (engine.mark, engine.rounds), Marks(engine.device)
    engine.mark, engine.rounds = marks, Rounds(engine.state, 1, engine.cfg.cuda_graphs, engine.ranks)
    try:
        yield marks
    finally:
        engine.mark, engine.rounds = before


@contextmanager
def chosen_experts(engine: Engine) -> Iterator[list[list[torch.Tensor]]]:
    """Inside, every routed layer of `engine` adds the experts [T, k] of each call to its own list; without graphs."""
    target, cfg, rounds = engine.target, engine.cfg, engine.rounds
    notes: list[list[torch.Tensor]] = []
    layers = []
    for layer in target.layers:
        if isinstance(layer.mlp, Moe):
            notes.append([])
            layer = replace(layer, mlp=replace(layer.mlp, chosen=notes[-1]))
        layers.append(layer)
    engine.target, engine.cfg = replace(target, layers=tuple(layers)), replace(cfg, cuda_graphs=False)
    engine.rounds = Rounds(engine.state, 1, False, engine.ranks)  # one at a time: none in vain
    try:
        yield notes
    finally:
        engine.target, engine.cfg, engine.rounds = target, cfg, rounds


def distinct_experts(notes: list[list[torch.Tensor]], rounds: int) -> list[float]:
    """For each routed layer the number of different experts in a call, mean over the last `rounds` calls."""
    assert all(len(calls) >= rounds for calls in notes), "rounds ran without telling which experts they chose"
    return [statistics.fmean(len(ids.unique()) for ids in calls[-rounds:]) for calls in notes]


def expected_distinct(experts: int, top_k: int, rows: int) -> float:
    """E (1 - (1 - k/E)^T): distinct experts of T rows that choose k of E uniformly."""
    return experts * (1 - (1 - top_k / experts) ** rows)


def _attention_bytes(layer: Layer) -> int:
    return layer.attention.qkv.nbytes + layer.attention.o.nbytes


def _kv_bytes(layers: tuple[Layer, ...], context: float, rows: int, each: int) -> int:
    """Keys and values that `rows` queries after `context` positions see, their own included; `each` bytes a number."""
    total = 0.0
    for layer in layers:
        g, window = layer.attention.geometry, layer.attention.window
        seen = context if window is None else min(context, window - 1)
        total += g.kv_heads * (g.head_dim + g.v_head_dim) * (seen + rows) * each
    return int(total)


def target_bytes(target: Target, distinct: list[float], rows: int, context: float) -> dict[str, int]:
    """Bytes that one call of `rows` rows after `context` positions reads, where the routed layers use `distinct`
    experts each; norms and the rows of the embedding are left out, kilobytes in all."""
    used = iter(distinct)
    out = {"experts": 0.0, "attention": 0, "dense": 0, "head": target.head.nbytes}
    for layer in target.layers:
        out["attention"] += _attention_bytes(layer)
        if isinstance(layer.mlp, Moe):
            out["experts"] += next(used) * sum(t[0].nbytes for t in layer.mlp.weights())
            out["dense"] += layer.mlp.router.nbytes
        else:
            out["dense"] += layer.mlp.gate_up.nbytes + layer.mlp.down.nbytes
    out["kv"] = _kv_bytes(target.layers, context, rows, target.embed.element_size())
    return {name: int(size) for name, size in out.items()}


def drafter_bytes(target: Target, drafter: Drafter, context: float) -> int:
    """Bytes that drafting a block after `context` positions reads: the layers, the target's head, the projection of the
    taps into the context, which reads the key and value rows of each layer once more, and the context.

    Of a selector's codebooks a few rows are read, which are left out.
    """
    total = drafter.fc.nbytes + target.head.nbytes
    for layer in drafter.layers:
        g = layer.attention.geometry
        qkv = layer.attention.qkv
        again = g.kv_heads * (g.head_dim + g.v_head_dim) * qkv.nbytes // qkv.shape[0]
        mlp = layer.mlp
        assert isinstance(mlp, Mlp)
        total += _attention_bytes(layer) + again + mlp.gate_up.nbytes + mlp.down.nbytes
        total += sum(c.projection.nbytes for c in (layer.attention_conv, layer.mlp_conv) if c is not None)
    if drafter.selector is not None:
        total += drafter.selector.projection.nbytes
    return total + _kv_bytes(drafter.layers, context, drafter.block, drafter.mask_embedding.element_size())


def broken_down(
    engine: Engine, ids: list[int], sampling: SamplingConfig, timed: list[Generation], gb_per_s: float, **way: Any
) -> dict[str, Any]:
    """What a round of `engine.generate(ids, sampling, **way)` is made of, beside the roofline at `gb_per_s`.

    {"rounds", "rows", "context" (mean), "round_ms" (median of the runs `timed`), "phases_ms", "distinct_experts",
    "distinct_by_layer", "distinct_if_uniform", "bytes", "bytes_per_round", "roofline_ms", "roofline" (share of
    round_ms)}.
    """
    with marked(engine) as marks:
        generation = engine.generate(ids, sampling, on_tokens=marks.read, **way)
    rounds = len(generation.rounds)
    assert rounds == len(marks.rounds) > 0
    drafter = engine.drafter if way.get("speculate", True) else None
    rows = 1 + max(r.drafted for r in generation.rounds)
    context = len(ids) + statistics.fmean(_starts(generation))
    with chosen_experts(engine) as notes:
        counted = engine.generate(ids, sampling, **way)
    distinct = distinct_experts(notes, len(counted.rounds))
    read = target_bytes(engine.target, distinct, rows, context)
    if drafter is not None:
        read["drafter"] = drafter_bytes(engine.target, drafter, context)
    total = sum(read.values())
    round_ms = 1e3 * statistics.median(s for g in timed for s in g.round_seconds)
    moe = next((layer.mlp for layer in engine.target.layers if isinstance(layer.mlp, Moe)), None)
    return {
        "rounds": rounds,
        "rows": rows,
        "context": context,
        "round_ms": round_ms,
        "phases_ms": phases_ms(marks.rounds, generation.round_seconds),
        "distinct_experts": statistics.fmean(distinct) if distinct else None,
        "distinct_by_layer": distinct,
        "distinct_if_uniform": expected_distinct(len(moe.experts.down), moe.top_k, rows) if moe else None,
        "bytes": read,
        "bytes_per_round": total,
        "roofline_ms": total / gb_per_s / 1e6,
        "roofline": total / gb_per_s / 1e6 / round_ms,
    }


def _starts(generation: Generation) -> list[int]:
    """Tokens before the anchor of each round, without the prompt."""
    starts, at = [], 0
    for r in generation.rounds:
        starts.append(at)
        at += len(r.tokens)
    return starts


def print_breakdown(found: dict[str, dict[str, Any]], ranks: int) -> None:
    """The breakdowns of several ways to decode, a line each for time, bytes and experts."""
    each = " a rank" if ranks > 1 else ""
    for way, b in found.items():
        *phases, rest = b["phases_ms"].items()
        said = " + ".join(f"{name} {ms:.2f}" for name, ms in phases)
        print(f"{way} round: {b['round_ms']:.2f} ms; {said} ms, and {rest[1]:.2f} of the host where rounds wait for it")
        parts = " + ".join(f"{name} {size / 1e6:,.1f}" for name, size in b["bytes"].items())
        print(f"  reads{each} {parts} = {b['bytes_per_round'] / 1e6:,.1f} MB at context {b['context']:.0f}: "
              f"roofline {b['roofline_ms']:.2f} ms, {b['roofline']:.0%} of it reached")  # fmt: skip
        if b["distinct_experts"] is not None:
            print(f"  distinct experts a layer {b['distinct_experts']:.1f}; {b['rows']} rows that choose uniformly "
                  f"have {b['distinct_if_uniform']:.1f}")  # fmt: skip


def plot_breakdown(found: dict[str, dict[str, Any]], title: str, path: str) -> None:
    """A bar for each way to decode, of its phases in ms, with the roofline as a line across it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot needs matplotlib; run: pip install 'mimo-qat[report]'") from None
    figure = Figure(figsize=(7, 1.2 + 0.7 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, b in enumerate(found.values()):
        left = 0.0
        for i, phase in enumerate(PHASES):
            style: dict[str, Any] = {"color": f"C{i}", "label": phase}
            if phase == "rest":
                style = {"facecolor": "none", "edgecolor": "gray", "hatch": "///", "label": "host, where a round waits"}
            axes.barh(place, b["phases_ms"][phase], left=left, height=0.5, **style)
            left += b["phases_ms"][phase]
        ends = [place - 0.35, place + 0.35]
        axes.plot([b["roofline_ms"]] * 2, ends, color="black", linewidth=2, label="roofline")
        axes.plot([b["round_ms"]] * 2, ends, color="black", linewidth=2, linestyle=":", label="a round as timed")
    axes.set_yticks(range(len(found)), [f"{way}\n{b['rows']} row{'s' * (b['rows'] > 1)}" for way, b in found.items()])
    axes.invert_yaxis()
    axes.set(xlabel="ms a round", title=title)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize="small", frameon=False, bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
