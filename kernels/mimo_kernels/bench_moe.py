"""The operators `moe` and `prompt` of `bench`: experts of a decode step and of a prompt's chunk.

`moe` is the public function, with the CUDA kernels where they run; the rows of Triton's stand beside it, whole and in
their parts, and so does `parts`, which leaves the last sum to the norm that follows.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch

from . import bench, cuda, moe, moe_cuda
from .moe import PackedExperts
from .moe_many import moe_many

PROMPT = 256  # tokens of a chunk of a prompt


def measure_moe(packed: PackedExperts, ids: list[torch.Tensor], size: int) -> list["bench.Row"]:
    """The whole operator, then its implementations and their parts; `size` bytes of weights."""
    from . import moe_triton

    config = moe_triton.config_for(*packed.padded)
    x, weights = _activations(packed, ids[0])
    prepared = [moe_triton.prepare(x, i, weights, packed, config) for i in ids]
    hidden = [moe_triton.gate_up(p, packed, config) for p in prepared]
    public: dict[str, tuple[float, Callable[[int], object]]] = {
        "moe": (1, lambda c: moe.moe(x, ids[c], weights, packed))
    }
    triton: dict[str, tuple[float, Callable[[int], object]]] = {
        "moe, Triton": (1, lambda c: moe_triton.moe(x, ids[c], weights, packed, config)),
        "moe, Triton: lists and x": (0, lambda c: moe_triton.prepare(x, ids[c], weights, packed, config)),
        "moe, Triton: gate, up, SwiGLU": (2 / 3, lambda c: moe_triton.gate_up(prepared[c], packed, config)),
        "moe, Triton: down, combine": (
            1 / 3,
            lambda c: moe_triton.down(hidden[c], prepared[c], packed, config, len(x)),
        ),
    }
    if cuda.usable(x.device) and moe_cuda.fits(packed, *ids[0].shape):
        public["moe: parts"] = (1, lambda c: moe.parts(x, ids[c], weights, packed))
    else:
        del triton["moe, Triton"]  # is `moe`
    return [
        {"operator": name, "bytes": round(size * share), "us": bench.graph_microseconds(call)}
        | ({"config": asdict(config)} if name in triton else {})
        for name, (share, call) in (public | triton).items()
    ]


def prompt_row(g: "bench.Geometry", packed: PackedExperts, gpu: bool) -> "bench.Row":
    """The experts of a prompt's chunk, every token with its own."""
    row: bench.Row = {"operator": f"moe of {PROMPT} tokens", "bytes": g.distinct(PROMPT) * packed.bytes_per_expert}
    if gpu:
        ids = torch.rand(PROMPT, g.experts, device="cuda").topk(g.top_k).indices
        x = torch.randn(PROMPT, g.hidden, device="cuda").bfloat16()
        weights = torch.full(ids.shape, 1 / g.top_k, device="cuda")
        row["us"] = bench.microseconds(lambda: moe_many(x, ids, weights, packed))
    return row


def sweep(packed: PackedExperts, ids: list[torch.Tensor], size: int) -> list["bench.Row"]:
    """Both products with every tile that divides the shape, the down product with every number of groups."""
    from . import moe_triton as mt

    default = mt.config_for(*packed.padded)
    x, weights = _activations(packed, ids[0])
    hidden, inter = packed.padded
    rows: list[bench.Row] = []
    prepared = [mt.prepare(x, i, weights, packed, default) for i in ids]
    for t in (t for t in mt.TILES if hidden % t.k == 0):
        config = mt.Config(t, default.down, default.groups)
        us = bench.graph_microseconds(lambda c: mt.gate_up(prepared[c], packed, config))  # noqa: B023
        rows.append({"operator": f"up {t.rows}x{t.k} w{t.warps} s{t.stages}", "bytes": round(size * 2 / 3), "us": us})
    states = [mt.gate_up(p, packed, default) for p in prepared]
    for t in (t for t in mt.TILES if inter % t.k == 0):
        for groups in (1, 2, 4, 8):
            config = mt.Config(default.gate_up, t, groups)
            prepared = [mt.prepare(x, i, weights, packed, config) for i in ids]
            us = bench.graph_microseconds(lambda c: mt.down(states[c], prepared[c], packed, config, len(x)))  # noqa: B023
            name = f"down {t.rows}x{t.k} w{t.warps} s{t.stages} g{groups}"
            rows.append({"operator": name, "bytes": round(size / 3), "us": us})
    return rows


def _activations(packed: PackedExperts, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(len(ids), packed.hidden, device="cuda").bfloat16()
    return x, torch.rand(ids.shape, device="cuda").softmax(-1)
