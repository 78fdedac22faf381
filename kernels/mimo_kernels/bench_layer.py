"""The operator `layer` of `bench`: the kernels of a decoder layer with window attention, as the runtime launches them.

An operator alone shows little of `launch`: what a kernel does ahead is hidden by the one before it, which has to be
another one. So a graph holds `CALLS` layers, each with other weights, experts and caches, and the residual stream goes
through all of them. Experts are those of the operator `moe`: a bias steers the router to them. There is no all-reduce.

The row says whether programmatic dependent launch was on; MIMO_KERNELS_PDL=0 turns it off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import bench, bench_attention
from .moe import PackedExperts
from .router import Router

CONTEXT = 8192  # committed rows: the window is full


def layer_row(g: "bench.Geometry", tp: int, tokens: int, packed: PackedExperts, gpu: bool) -> "bench.Row":
    """One layer of a rank of `tp`, with `tokens` rows and the experts that as many independent rows would choose."""
    distinct = g.distinct(tokens)
    window = next(a for a in g.attention if a.window).local(tp)
    matrices = (("qkv", window.qkv_rows, g.hidden, True), ("o", g.hidden, window.heads * window.v_dim, False))
    parts = [
        *(bench.linear_rows(name, (n, k), fp8, 0, False)[0] for name, n, k, fp8 in matrices),
        *bench_attention.attention_rows(window, CONTEXT, tokens, False, False),
        *bench.router_rows(g, tokens, False, False),
    ]
    size = distinct * packed.bytes_per_expert + sum(part["bytes"] for part in parts)
    row = {"operator": f"layer, {tokens} row{'s' if tokens > 1 else ''}", "experts": distinct, "bytes": size}
    if gpu:
        from . import launch

        step = decoder_layer(_random(g, window, packed, tokens), bench.routings(g, tokens, distinct))
        row |= {"us": bench.graph_microseconds(step), "pdl": launch.switched_on()}
    return row


@dataclass(frozen=True)
class Layers:
    """Random weights and caches of `bench.CALLS` layers, which share the experts, and the rows that enter the first."""

    window: "bench.Heads"
    qkv: list
    o: list
    routers: torch.Tensor  # float32 [layers, experts, H]
    norms: torch.Tensor  # bfloat16 [layers, 2, H]
    keys: torch.Tensor  # [layers, G, slots, K]
    values: torch.Tensor
    experts: PackedExperts
    x: torch.Tensor
    top_k: int


def _random(g: "bench.Geometry", a: "bench.Heads", packed: PackedExperts, tokens: int) -> Layers:
    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda").normal_()

    slots = (a.window or 0) + bench.MAX_TOKENS
    return Layers(
        a,
        [bench.random_weight(a.qkv_rows, g.hidden, True) for _ in range(bench.CALLS)],
        [bench.random_weight(g.hidden, a.heads * a.v_dim, False) for _ in range(bench.CALLS)],
        torch.randn(bench.CALLS, g.experts, g.hidden, device="cuda") / g.hidden**0.5,
        normal(bench.CALLS, 2, g.hidden),
        normal(bench.CALLS, a.kv_heads, slots, a.k_dim),
        normal(bench.CALLS, a.kv_heads, slots, a.v_dim),
        packed,
        normal(tokens, g.hidden),
        g.top_k,
    )


def decoder_layer(layers: Layers, ids: list[torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """layer(c) launches layer c with the experts `ids[c]` on what layer(c - 1) left; layer(0) begins anew."""
    from . import linear, moe, residual, window

    w, tokens = layers.window, len(layers.x)
    cos, sin = torch.randn(2, tokens, w.rotated // 2, device="cuda").bfloat16()
    start, sink = torch.tensor(CONTEXT, device="cuda"), torch.zeros(w.heads, device="cuda")
    rows, experts = torch.arange(tokens, device="cuda"), layers.routers.shape[1]
    steering = [torch.zeros(tokens, experts, device="cuda").scatter_(1, chosen.long(), 2.0) for chosen in ids]
    stream = layers.x, layers.x  # the residual stream, and what the last sublayer adds to it

    def layer(c: int) -> torch.Tensor:
        nonlocal stream
        x, part = (layers.x, layers.x) if c == 0 else stream
        cache = layers.keys[c], layers.values[c]
        x, normed = residual.add_rms_norm(x, part, layers.norms[c, 0], 1e-5)
        qkv = linear.linear(normed, layers.qkv[c])
        kw: dict[str, Any] = {"scale": w.k_dim**-0.5, "window": w.window, "sink": sink, "value_scale": 0.6}
        out = window.attend(qkv, cos, sin, *cache, start, count=tokens, **kw)
        x, normed = residual.add_rms_norm(x, linear.linear(out.flatten(1), layers.o[c]), layers.norms[c, 1], 1e-5)
        router = Router(layers.routers[c], steering[c], layers.top_k, normalise=True)
        part, _, _ = moe.routed(normed, router, layers.experts, rows)
        stream = x, part
        return part

    return layer
