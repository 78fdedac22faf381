"""Bytes a rank of a release that decodes under tensor parallelism, from its geometry alone.

Split over the ranks: experts along I, attention by heads (a key-value head is repeated where there are fewer heads than
ranks), dense MLPs, o_proj, embedding and head. On every rank: norms, routers, sinks. MTP blocks are not loaded.
"""

import math
from typing import Any

from mimo_qat.checkpoint.geometry import DraftGeometry, Geometry
from mimo_qat.checkpoint.layout import MX_BLOCK, Experts, Spine, default_drafter_config, drafter_tensors, target_tensors

_BUCKET = 64  # the runtime's caches of whole contexts have a multiple of so many slots
_REPLICATED = ("norm.weight", "layernorm.weight", "mlp.gate.weight", "e_score_correction_bias", "sink_bias")


def runtime_bytes(
    config: dict[str, Any],
    tp: int,
    contexts: list[int],
    prefill_chunk: int,
    experts: Experts = "mxfp4",
    spine: Spine = "fp8",
) -> dict[str, Any]:
    """{"experts", "spine", "drafter", "workspace", "kv": {context: bytes}, "read_per_token"}, each for one rank.

    `experts` and `spine` say how the rank keeps its weights in memory. KV is BF16 and one sequence; a sliding-window
    layer keeps window + block rows, the others whole contexts and a block; the table of rotations is counted with it,
    as it is as long. ValueError where the geometry does not
    divide by `tp`.
    """
    g = Geometry.from_config(config)
    draft = default_drafter_config(config)
    d = DraftGeometry.from_config(draft)
    for layer in g.layers:
        if layer.heads % tp or max(layer.kv_heads, tp) % min(layer.kv_heads, tp):
            raise ValueError(f"{layer.heads} query and {layer.kv_heads} key-value heads do not divide by tp {tp}")
    if g.moe_intermediate_size % (tp * MX_BLOCK):
        raise ValueError(
            f"moe_intermediate_size {g.moe_intermediate_size} does not divide into {tp} parts of whole MXFP4 blocks"
        )
    routed = rest = 0
    for name, spec in target_tensors(config, experts=experts, spine=spine, mtp_layers=0).items():
        if ".mlp.experts." in name:
            routed += math.ceil(spec.nbytes / tp)
        elif name.endswith(_REPLICATED):
            rest += spec.nbytes
        else:
            rest += math.ceil(spec.nbytes * _share(name, g, tp))
    drafter = sum(
        spec.nbytes if len(spec.shape) < 2 or "norm" in name else math.ceil(spec.nbytes / min(tp, d.heads))
        for name, spec in drafter_tensors(draft).items()
    )
    embedding = math.ceil(2 * g.vocab_size * g.hidden_size / tp)
    return {
        "experts": routed,
        "spine": rest,
        "drafter": drafter,
        "workspace": workspace_bytes(g, d.block_size, tp, prefill_chunk),
        "kv": {str(n): _kv_bytes(g, d, tp, n) for n in contexts},
        # One token alone reads its k experts, the spine without the embedding, and nothing of the drafter.
        "read_per_token": rest - embedding + routed * g.num_experts_per_tok // g.n_routed_experts,
    }


PREFILL_SCORES = 2**27  # of attention: a chunk with more of them has no more rows than LEAST_CHUNK
LEAST_CHUNK = 256
MOST_PADDED = 1024  # rows to which a prompt is padded
PADDED_SCORES = PREFILL_SCORES // 4  # of a padded prompt, whose graph keeps their memory: 600 MB


def prefill_rows(start: int, chunk: int, heads: int) -> int:
    """How many tokens of a prompt are computed at once from position `start` on: `chunk`, or fewer, but for that not
    below LEAST_CHUNK, so that the scores of `heads` heads over all keys stay within PREFILL_SCORES."""
    return min(chunk, max(LEAST_CHUNK, PREFILL_SCORES // (heads * (start + chunk))))


def workspace_bytes(g: Geometry, verified: int, tp: int, prefill_chunk: int) -> int:
    """Bytes for a prefill chunk (residual stream in float32 twice, the experts' input in another order and their sum, k
    rows of hidden activations and of outputs; or scores in BF16 and four times in float32), for the graphs of padded
    prompts, whose memory is their own, and for the logits of `verified` rows: an estimate, exceeded where LEAST_CHUNK
    rows have more scores."""
    k, inner, heads = g.num_experts_per_tok, g.moe_intermediate_size, max(layer.heads for layer in g.layers) // tp

    def of_a_pass(rows: int, scores: int) -> int:
        moved = rows * (12 * g.hidden_size + k * 2 * (g.hidden_size + inner // tp))
        return max(moved, 18 * min(scores, heads * rows**2))

    padded = of_a_pass(min(prefill_chunk, MOST_PADDED), PADDED_SCORES)
    return of_a_pass(prefill_chunk, PREFILL_SCORES) + padded + 4 * verified * g.vocab_size


def _share(name: str, g: Geometry, tp: int) -> float:
    """The part of a split weight that one rank holds; more than 1/tp where key-value heads are repeated."""
    if ".self_attn." not in name or "o_proj" in name:
        return 1 / tp
    layer = g.layers[int(name.split(".")[2])]
    q, kv = layer.heads * layer.head_dim, layer.kv_heads * (layer.head_dim + layer.v_head_dim)
    held = max(layer.kv_heads / tp, 1) / layer.kv_heads
    if "qkv_proj" in name:
        return (q / tp + kv * held) / (q + kv)
    return 1 / tp if "q_proj" in name else held


def _kv_bytes(g: Geometry, d: DraftGeometry, tp: int, context: int) -> int:
    block, total = d.block_size, 0
    whole = -(-(context + block) // _BUCKET) * _BUCKET
    for layer in g.layers:
        slots = g.sliding_window + block if layer.swa and g.sliding_window else whole
        total += 2 * math.ceil(layer.kv_heads / tp) * (layer.head_dim + layer.v_head_dim) * slots
    slots = d.sliding_window + block if d.sliding_window else whole
    total += d.num_hidden_layers * 4 * math.ceil(d.kv_heads / tp) * d.head_dim * slots
    rotations = {(layer.rope_theta, layer.rotary_dim) for layer in g.layers} | {(d.rope_theta, d.rotary_dim)}
    return total + sum(2 * dim * (context + block) for _, dim in rotations)
