"""The operators `attention` and `heads` of `bench`: attention of a decode step, alone and from its projection on."""

from dataclasses import asdict
from typing import Any

import torch

from . import bench, cuda, window_cuda

LEAST_SLOTS = 2**15  # of a cache: the grid of a short context is that of a long one


def attention_rows(a: "bench.Heads", context: int, tokens: int, gpu: bool, every: bool) -> list["bench.Row"]:
    """Attention of `tokens` rows after `context` others; with `every` all blocks and numbers of splits."""
    seen = context + tokens if a.window is None else min(context, a.window - 1) + tokens
    size = 2 * a.kv_heads * seen * (a.k_dim + a.v_dim)
    label = f"attention {a.name}"
    if not gpu:
        return [{"operator": label, "bytes": size}]
    from . import attention_triton as at

    slots = a.window + tokens if a.window else max(context + tokens, LEAST_SLOTS)
    q = torch.randn(tokens, a.heads, a.k_dim, device="cuda").bfloat16()
    keys, values = (
        torch.empty(bench.copies(size), a.kv_heads, slots, d, dtype=torch.bfloat16, device="cuda").normal_()
        for d in (a.k_dim, a.v_dim)
    )
    start, sink = torch.tensor(context, device="cuda"), torch.zeros(a.heads, device="cuda") if a.window else None
    configs = [at.config_for(tokens * a.heads // a.kv_heads, a.kv_heads, slots)]
    if every:
        splits = (1, 2) if a.window else (64, 128, 256) if context == bench.CONTEXTS[-1] else (configs[0].splits,)
        configs = [at.Config(*block, n) for block in at.BLOCKS for n in splits]
    rows: list[bench.Row] = []
    for config in configs:

        def call(c: int) -> torch.Tensor:
            here = c % len(keys)
            kw = {"scale": a.k_dim**-0.5, "window": a.window, "sink": sink, "config": config}  # noqa: B023
            return at.attention(q, keys[here], values[here], start, **kw)

        block = f" {config.rows}x{config.keys} w{config.warps} s{config.stages} k{config.splits}" if every else ""
        us = bench.graph_microseconds(call, flush=bench.CALLS * size < bench.L2_BYTES)
        rows.append({"operator": label + block, "bytes": size, "us": us, "config": asdict(config)})
    if a.window and not every:
        rows += projected_rows(a, tokens, (keys, values, start, sink), size)
    return rows


def projected_rows(a: "bench.Heads", tokens: int, cache: tuple, size: int) -> list["bench.Row"]:
    """Attention over a window from the projection on: what runs, and rotation and attention as two launches."""
    from . import attention, heads, window

    keys, values, start, sink = cache
    qkv = torch.randn(tokens, a.qkv_rows, device="cuda").bfloat16()
    cos, sin = torch.randn(2, tokens, a.rotated // 2, device="cuda").bfloat16()
    kw: dict[str, Any] = {"scale": a.k_dim**-0.5, "window": a.window, "sink": sink}

    def one(c: int) -> torch.Tensor:
        here = keys[c % len(keys)], values[c % len(keys)]
        return window.attend(qkv, cos, sin, *here, start, count=tokens, value_scale=0.6, **kw)

    def two(c: int) -> torch.Tensor:
        here = keys[c % len(keys)], values[c % len(keys)]
        q = heads.split_heads(qkv, cos, sin, *here, start, count=tokens, value_scale=0.6)
        return attention.attention(q, *here, start, **kw)

    calls = {"attention window of qkv": one}
    if cuda.usable(qkv.device) and window_cuda.fits(qkv, cos, keys[0], values[0], tokens, a.window or 0):
        calls["attention window of qkv, Triton"] = two
    size += 2 * qkv.numel()
    flush = bench.CALLS * size < bench.L2_BYTES
    return [
        {"operator": name, "bytes": size, "us": bench.graph_microseconds(call, flush=flush)}
        for name, call in calls.items()
    ]


def heads_row(a: "bench.Heads", tokens: int, gpu: bool) -> "bench.Row":
    """Rotation and cache writes of `tokens` rows of one rank."""
    row: bench.Row = {"operator": f"heads {a.name}", "bytes": 4 * tokens * a.qkv_rows}
    if gpu:
        from . import heads_triton

        qkv = torch.randn(tokens, a.qkv_rows, device="cuda").bfloat16()
        cos, sin = torch.randn(2, tokens, a.rotated // 2, device="cuda").bfloat16()
        keys, values = (
            torch.zeros(bench.CALLS, a.kv_heads, 1024, d, dtype=torch.bfloat16, device="cuda")
            for d in (a.k_dim, a.v_dim)
        )
        start = torch.tensor(1020, device="cuda")
        row["us"] = bench.graph_microseconds(
            lambda c: heads_triton.split_heads(qkv, cos, sin, keys[c], values[c], start, count=tokens, value_scale=0.6)
        )
    return row
