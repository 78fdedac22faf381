"""Reads a DFlash drafter, of a release or of its own folder, as plain tensors beside the target it was trained for."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mimo_qat.checkpoint.layout import DraftGeometry, Geometry, LayerGeometry
from mimo_qat.checkpoint.reader import read_drafter
from mimo_qat.models.draft_tree import TOP_K
from mimo_runtime.load import Attention, Conv, Drafter, Layer, LoadConfig, Mlp, Progress, Selector, Target
from mimo_runtime.parallel import Ranks
from mimo_runtime.shards import check_shares, head_rows, kv_heads, local, part, query_heads
from mimo_runtime.weights import Weight


def load_drafter(folder: str | Path, target: Target, cfg: LoadConfig, tokenizer_size: int | None = None) -> Drafter:
    """The drafter of a release (or in its dflash/ folder), checked against the target it was trained for.

    Ids that are not below `tokenizer_size` are padding rows of the embedding and are never drafted.
    """
    return drafter_of(read_drafter(folder), target, cfg, tokenizer_size)


def drafter_of(
    stored: tuple[dict, Mapping[str, torch.Tensor], torch.Tensor],
    target: Target,
    cfg: LoadConfig,
    tokenizer_size: int | None = None,
) -> Drafter:
    """A rank's drafter of what `read_drafter` gives: (config, tensors under their published names, mask embedding)."""
    config, tensors, mask_embedding = stored
    d = DraftGeometry.from_config(config)
    _check_pair(d, target.geometry)
    sizes = {"intermediate_size": (d.intermediate_size, 1), "hidden_size": (d.hidden_size, 1)}
    check_shares("this drafter", [_draft_geometry(d)], sizes, cfg.ranks.size)
    bar, weights = Progress("loading drafter", 1, cfg), {}
    for name, t in tensors.items():
        base = name.removesuffix(".weight")
        weights[base] = _draft_share(base, t, d, cfg.ranks).to(cfg.device, cfg.dtype, copy=True).contiguous()
    bar.advance(*weights.values())
    return Drafter(
        taps=d.target_layer_ids,
        block=d.block_size,
        causal=d.causal,
        vocab_size=min(d.vocab_size, tokenizer_size or d.vocab_size),
        fc=cfg.weight(weights["fc"]),
        hidden_norm=cfg.norm(weights["hidden_norm"], d.rms_norm_eps),
        layers=tuple(_draft_layer(weights, d, f"layers.{i}.", cfg) for i in range(d.num_hidden_layers)),
        norm=cfg.norm(weights["norm"], d.rms_norm_eps),
        mask_embedding=mask_embedding.to(cfg.device, cfg.dtype),
        ranks=cfg.ranks,
        selector=_selector(weights, config, cfg),
    )


def _selector(weights: dict[str, torch.Tensor], config: dict, cfg: LoadConfig) -> Selector | None:
    """The reader has proved that the tensors are there if and only if the configuration asks for them."""
    at = "candidate_selector."
    if at + "predecessor_codebook" not in weights:
        return None
    inner = config.get("dflash_config") or {}
    return Selector(
        top_k=inner.get("selector_top_k") or config.get("selector_top_k") or TOP_K,
        before=weights[at + "predecessor_codebook"],
        after=weights[at + "successor_codebook"],
        projection=cfg.weight(weights[at + "hidden_projection"]),
    )


def _conv(weights: dict[str, torch.Tensor], at: str, cfg: LoadConfig) -> Conv | None:
    if at + "base_kernel" not in weights:
        return None
    return Conv(weights[at + "base_kernel"], cfg.weight(weights[at + "kernel_projection"]))


def _draft_geometry(d: DraftGeometry) -> LayerGeometry:
    return LayerGeometry(
        swa=d.sliding_window is not None,
        moe=False,
        heads=d.heads,
        kv_heads=d.kv_heads,
        head_dim=d.head_dim,
        v_head_dim=d.head_dim,
        rotary_dim=d.rotary_dim,
        rope_theta=d.rope_theta,
        sink=d.sinks,
    )


def _draft_share(base: str, t: torch.Tensor, d: DraftGeometry, ranks: Ranks) -> torch.Tensor:
    """A rank's share of a drafter's tensor: heads and MLP as in the target, rows of `fc`; convolutions, selector and
    norms are whole."""
    g, kind = _draft_geometry(d), base.rpartition(".")[2]
    heads, kv = head_rows(query_heads(g, ranks), d.head_dim), head_rows(kv_heads(g, ranks), d.head_dim)
    if kind == "attention_sink_bias":
        heads = query_heads(g, ranks)
    rows = {"q_proj": heads, "attention_sink_bias": heads, "k_proj": kv, "v_proj": kv}
    if kind in ("gate_proj", "up_proj", "fc"):
        rows[kind] = part(len(t), ranks.rank, ranks.size)
    if kind in rows:
        return t[rows[kind].start : rows[kind].stop]
    if kind in ("o_proj", "down_proj"):
        columns = part(t.shape[1], ranks.rank, ranks.size)
        return t[:, columns.start : columns.stop]
    return t


def _draft_layer(weights: dict[str, torch.Tensor], d: DraftGeometry, at: str, cfg: LoadConfig) -> Layer:
    def stacked(*names: str) -> Weight:
        return cfg.weight(torch.cat([weights[at + name] for name in names]))

    attention = Attention(
        geometry=local(_draft_geometry(d), cfg.ranks),
        window=d.sliding_window,
        value_scale=d.value_scale,
        eps=d.rms_norm_eps,
        qkv=stacked(*(f"self_attn.{n}_proj" for n in "qkv")),
        o=cfg.weight(weights[at + "self_attn.o_proj"]),
        sink=weights[at + "self_attn.attention_sink_bias"].float() if d.sinks else None,
        q_norm=weights[at + "self_attn.q_norm"],
        k_norm=weights[at + "self_attn.k_norm"],
        kernel=cfg.attends(_draft_geometry(d)),
        fused=cfg.splits(_draft_geometry(d)),
    )
    mlp = Mlp(stacked("mlp.gate_proj", "mlp.up_proj"), cfg.weight(weights[at + "mlp.down_proj"]))
    before, after = (cfg.norm(weights[f"{at}{n}_layernorm"], d.rms_norm_eps) for n in ("input", "post_attention"))
    convs = _conv(weights, at + "attention_conv.", cfg), _conv(weights, at + "mlp_conv.", cfg)
    return Layer(before, attention, after, mlp, *convs)


def _check_pair(d: DraftGeometry, g: Geometry) -> None:
    if d.hidden_size != g.hidden_size:
        raise ValueError(
            f"the drafter's hidden_size is {d.hidden_size}, the target's {g.hidden_size}; they are not a pair"
        )
    if d.vocab_size > g.vocab_size:
        raise ValueError(
            f"the drafter's vocab_size {d.vocab_size} is larger than the target's {g.vocab_size}; they are not a pair"
        )
    if max(d.target_layer_ids) >= g.num_hidden_layers:
        raise ValueError(
            f"the drafter reads target layer {max(d.target_layer_ids)}, the target has {g.num_hidden_layers} layers; "
            "they are not a pair"
        )
    if d.block_size < 2:
        raise ValueError(f"the drafter's block_size is {d.block_size}; a block holds the anchor and at least 1 draft")
