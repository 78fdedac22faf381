"""What a target's and a drafter's config.json say about shapes; standard library only.

Key names, and the values that stand in for keys which published files leave out, are those of the MiMo-V2.5 and
V2.6 releases. Nothing is derived where the releases disagree with every formula: layer lists are read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]

MAX_JSON_BYTES = 100 * 2**20  # an index of a 1.02T model is 20 MB
MAX_SIZE = 2**31  # of any dimension, so that nothing is made of a damaged number
MAX_LAYERS, MAX_EXPERTS = 2048, 16384
ROUTER_DTYPES = {None: "F32", "float32": "F32", "bfloat16": "BF16"}
_STRING_OR_TRAILING_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])')


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; a repeated key would silently drop its first value."""
    out = dict(pairs)
    if len(out) < len(pairs):  # the headers of a release are 100,000 objects, so the usual case is quick
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for i, k in enumerate(keys) if k in keys[:i])!r} occurs twice")
    return out


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`, without duplicate keys or NaN; ValueError names the file, `where`, and the fault."""
    try:
        out = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not strict JSON ({error}); write it again with a JSON serialiser") from None
    if not isinstance(out, dict):
        raise ValueError(f"{where} holds a JSON {type(out).__name__}, not an object; write it again from its source")
    return out


def drop_trailing_commas(text: str) -> str:
    """`text` without commas before a closing bracket, strings untouched (one published drafter ships such a file)."""
    return _STRING_OR_TRAILING_COMMA.sub(lambda m: m.group() if m.group()[0] == '"' else "", text)


def read_text(path: Path) -> str:
    """The text of a small file, its size checked before it is read."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder that holds it, or fetch the file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; it is not a configuration or an index")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); fetch the file again") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file as a dict, read strictly; ValueError names the file and the fault."""
    path = Path(path)
    return parse_json(read_text(path), str(path))


def need(config: Config, key: str) -> Any:
    """config[key], or a ValueError that names the key. A null counts as absent."""
    if config.get(key) is None:
        raise ValueError(f"the configuration lacks {key!r}; copy it from the source model's config.json")
    return config[key]


def positive(config: Config, key: str, default: int | None = None) -> int:
    """config[key] as a positive int; a null or absent key takes `default`."""
    value = default if default is not None and config.get(key) is None else need(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIZE:
        raise ValueError(f"configuration key {key!r} is {brief(value)}; it must be a positive integer")
    return value


def number(value: Any, key: str) -> float:
    """`value` as a finite float; ValueError names the key it belongs to."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e30:
        raise ValueError(f"configuration key {key!r} is {brief(value)}; it must be a number")
    return float(value)


def brief(value: Any) -> str:
    """`value` in at most 60 characters."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**50 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def _layer_list(config: Config, key: str, default: list[int]) -> list[int]:
    values = config.get(key)
    values = default if values is None else values
    if not isinstance(values, list) or len(values) != len(default) or any(v not in (0, 1) for v in values):
        raise ValueError(f"{key} must hold {len(default)} entries of 0 or 1; copy the list from the source config.json")
    return values


def rotary_dim(head_dim: int, factor: float) -> int:
    """Rotated elements of a head: int(head_dim * factor), which must be even (192 * 0.334 -> 64)."""
    dim = int(head_dim * number(factor, "partial_rotary_factor"))
    if dim % 2 or not 0 < dim <= head_dim:
        raise ValueError(f"partial_rotary_factor {factor} rotates {dim} of {head_dim} elements; it must be even")
    return dim


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer: its attention kind (`swa`), whether its MLP is routed (`moe`), head counts and sizes."""

    swa: bool
    moe: bool
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int
    rope_theta: float
    sink: bool


@dataclass(frozen=True)
class Geometry:
    """What every part of the project needs to know about a target, read once from its config.json.

    `sliding_window` counts keys, the query's own included: `sliding_window` as it stands, or `sliding_window_size`
    + 1 where `swa_window_convention` is "sglang". `mtp` is the attention geometry of the multi-token-prediction
    blocks, which is the sliding-window one; `mtp_layers` is 0 where the config does not state a number.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    layernorm_epsilon: float
    attention_value_scale: float
    sliding_window: int | None
    max_position_embeddings: int
    router_dtype: str
    fused_qkv: bool
    tie_word_embeddings: bool
    qkv_chunks: int
    layers: tuple[LayerGeometry, ...]
    mtp: LayerGeometry
    mtp_layers: int

    @classmethod
    def from_config(cls, config: Config) -> "Geometry":
        """Geometry of a target from its parsed config.json; ValueError names a missing or impossible key."""
        count = positive(config, "num_hidden_layers")
        if count > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {count}, more than {MAX_LAYERS}; correct the configuration")
        swa = _layer_list(config, "hybrid_layer_pattern", [0] * count)
        moe = _layer_list(config, "moe_layer_freq", [0] + [1] * (count - 1))
        layers = tuple(_layer(config, bool(s), bool(m)) for s, m in zip(swa, moe, strict=True))
        experts = positive(config, "n_routed_experts") if any(moe) else 0
        per_token = positive(config, "num_experts_per_tok") if any(moe) else 0
        if experts > MAX_EXPERTS:
            raise ValueError(f"n_routed_experts is {experts}, more than {MAX_EXPERTS}; correct the configuration")
        if per_token > experts:
            raise ValueError(f"num_experts_per_tok {per_token} is more than n_routed_experts {experts}; lower it")
        router = config.get("moe_router_dtype")
        if not isinstance(router, str | None) or router not in ROUTER_DTYPES:
            raise ValueError(f"moe_router_dtype {brief(router)} is unknown; use bfloat16, float32 or null")
        blocks = config.get("num_nextn_predict_layers") or 0
        if not isinstance(blocks, int) or not 0 <= blocks <= MAX_LAYERS:
            raise ValueError(f"num_nextn_predict_layers is {brief(blocks)}; write the number of MTP blocks")
        scaling, value_scale = config.get("routed_scaling_factor"), config.get("attention_value_scale")
        return cls(
            hidden_size=positive(config, "hidden_size"),
            num_hidden_layers=count,
            vocab_size=positive(config, "vocab_size"),
            intermediate_size=positive(config, "intermediate_size"),
            moe_intermediate_size=positive(config, "moe_intermediate_size") if any(moe) else 0,
            n_routed_experts=experts,
            num_experts_per_tok=per_token,
            norm_topk_prob=bool(config.get("norm_topk_prob", True)),
            routed_scaling_factor=1.0 if scaling is None else number(scaling, "routed_scaling_factor"),
            layernorm_epsilon=number(need(config, "layernorm_epsilon"), "layernorm_epsilon"),
            attention_value_scale=1.0 if value_scale is None else number(value_scale, "attention_value_scale"),
            sliding_window=_window(config, any(swa)),
            max_position_embeddings=positive(config, "max_position_embeddings", 1048576),
            router_dtype=ROUTER_DTYPES[router],
            fused_qkv=config.get("attention_projection_layout") == "fused_qkv",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_chunks=positive(config, "num_key_value_heads"),
            layers=layers,
            mtp=_layer(config, True, False),
            mtp_layers=blocks,
        )

    def qkv_rows(self, layer: int | LayerGeometry) -> tuple[int, int, int]:
        """(q, k, v) rows of one chunk [Q_c | K_c | V_c] of a fused projection.

        Every layer has `qkv_chunks` chunks: num_key_value_heads of the FULL-attention layers, in sliding-window
        layers and MTP blocks too (published checkpoints are pre-sharded by that number).
        """
        g = self.layers[layer] if isinstance(layer, int) else layer
        if g.heads % self.qkv_chunks or g.kv_heads % self.qkv_chunks:
            raise ValueError(
                f"{g.heads} query and {g.kv_heads} key-value heads do not divide into {self.qkv_chunks} fused-QKV "
                'chunks (num_key_value_heads); use attention_projection_layout "split" or other head counts'
            )
        q, kv = g.heads // self.qkv_chunks, g.kv_heads // self.qkv_chunks
        return q * g.head_dim, kv * g.head_dim, kv * g.v_head_dim

    @property
    def full_attention_layers(self) -> list[int]:
        """Indices of the layers that attend to the whole context."""
        return [i for i, layer in enumerate(self.layers) if not layer.swa]


def _layer(config: Config, swa: bool, moe: bool) -> LayerGeometry:
    def dim(key: str) -> int:
        full = positive(config, key)
        return positive(config, "swa_" + key, full) if swa else full

    heads, kv_heads, head_dim = dim("num_attention_heads"), dim("num_key_value_heads"), dim("head_dim")
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads do not divide into {kv_heads} key-value heads; correct the configuration"
        )
    return LayerGeometry(
        swa=swa,
        moe=moe,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=dim("v_head_dim"),
        rotary_dim=rotary_dim(head_dim, config.get("partial_rotary_factor", 0.334)),
        rope_theta=number(config.get("swa_rope_theta", 10_000), "swa_rope_theta")
        if swa
        else number(need(config, "rope_theta"), "rope_theta"),
        sink=bool(
            config.get("add_swa_attention_sink_bias", True)
            if swa
            else config.get("add_full_attention_sink_bias", False)
        ),
    )


def _window(config: Config, any_swa: bool) -> int | None:
    if not any_swa:
        return None
    convention = config.get("swa_window_convention", "hub")
    if convention == "sglang":
        return positive(config, "sliding_window_size") + 1
    if convention != "hub":
        raise ValueError(f'swa_window_convention {convention!r} is unknown; use "hub" or "sglang"')
    return positive(config, "sliding_window")


# `architectures` of a drafter without and with a DFlash2 head.
DRAFTER_CLASSES = ("DFlashDraftModel", "DFlash2DraftModel")


@dataclass(frozen=True)
class DraftGeometry:
    """A DFlash drafter as its config.json describes it, with the spellings of every published release accepted.

    `sliding_window` counts keys, the query's own included, and is None for full attention. `target_layer_ids` are
    0-based decoder layers whose output residual stream is a feature. The DFlash2 head: `conv_groups` is 0 without
    convolutions, `selector_rank` 0 without a selector.
    """

    hidden_size: int
    num_hidden_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    sliding_window: int | None
    block_size: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    value_scale: float
    sinks: bool
    causal: bool
    vocab_size: int
    conv_groups: int = 0
    selector_rank: int = 0

    @classmethod
    def from_config(cls, draft_config: Config) -> "DraftGeometry":
        """Geometry of a drafter from its parsed config.json; a key stated twice with two values is a ValueError."""
        inner, rope = draft_config.get("dflash_config") or {}, draft_config.get("rope_parameters") or {}
        if not isinstance(inner, dict) or not isinstance(rope, dict):
            raise ValueError("the drafter's dflash_config and rope_parameters must be objects; copy them")

        def agreed(name: str, *values: Any, default: Any = None) -> Any:
            stated = [v for v in values if v is not None]
            if any(v != stated[0] for v in stated):
                raise ValueError(f"the drafter's configuration states {name} as {stated}; make its spellings agree")
            if not stated and default is None:
                raise ValueError(f"the drafter's configuration lacks {name}; copy it from the drafter's source")
            return stated[0] if stated else default

        def either(key: str, default: Any = None) -> Any:
            return agreed(key, draft_config.get(key), inner.get(key), default=default)

        head_dim = positive(draft_config, "head_dim")
        factor = agreed(
            "partial_rotary_factor",
            draft_config.get("partial_rotary_factor"),
            rope.get("partial_rotary_factor"),
            default=1.0,
        )
        stated_types = draft_config.get("layer_types") or []
        if not isinstance(stated_types, list) or not all(isinstance(t, str) for t in stated_types):
            raise ValueError(f"the drafter's layer_types are {brief(stated_types)}; write a list of names")
        types = set(stated_types)
        if len(types) > 1:
            raise ValueError(f"the drafter mixes {sorted(types)} layers; give all of them one attention kind")
        slides = inner.get("use_swa") or draft_config.get("use_sliding_window") or types == {"sliding_attention"}
        window = agreed(
            "sliding_window", draft_config.get("sliding_window"), inner.get("swa_window_size"), default=False
        )
        if window is not False:
            window = positive({"sliding_window": window}, "sliding_window")
        taps, mask = either("target_layer_ids"), either("mask_token_id")
        if not isinstance(taps, list | tuple) or not all(isinstance(i, int) for i in taps) or len(taps) > MAX_LAYERS:
            raise ValueError(f"the drafter's target_layer_ids are {brief(taps)}; write a list of layer numbers")
        if not isinstance(mask, int) or not 0 <= mask <= MAX_SIZE:
            raise ValueError(f"the drafter's mask_token_id is {brief(mask)}; write the id of the mask token")
        layers = positive(draft_config, "num_hidden_layers")
        if layers > MAX_LAYERS:
            raise ValueError(f"the drafter's num_hidden_layers is {layers}, more than {MAX_LAYERS}; correct it")
        hidden = positive(draft_config, "hidden_size")
        usual = {"conv_kernel_size": 0, "conv_group_size": 16, "selector_rank": 0}
        conv_groups, selector_rank = _head_sizes(hidden, {key: either(key, value) for key, value in usual.items()})
        return cls(
            hidden_size=hidden,
            num_hidden_layers=layers,
            heads=positive(draft_config, "num_attention_heads"),
            kv_heads=positive(draft_config, "num_key_value_heads"),
            head_dim=head_dim,
            intermediate_size=positive(draft_config, "intermediate_size"),
            rms_norm_eps=number(need(draft_config, "rms_norm_eps"), "rms_norm_eps"),
            rope_theta=number(
                agreed("rope_theta", draft_config.get("rope_theta"), rope.get("rope_theta")), "rope_theta"
            ),
            rotary_dim=rotary_dim(head_dim, factor),
            sliding_window=(window or None) if slides else None,
            block_size=positive({"block_size": either("block_size")}, "block_size"),
            target_layer_ids=tuple(taps),
            mask_token_id=mask,
            value_scale=number(either("attention_value_scale", 1.0), "attention_value_scale"),
            sinks=agreed(
                "attention_sink_bias",
                draft_config.get("attention_sink_bias"),
                inner.get("attention_sink_bias"),
                draft_config.get("add_swa_attention_sink_bias"),
                default=False,
            ),
            causal=agreed("causal", draft_config.get("is_causal"), inner.get("causal"), default=False),
            vocab_size=positive(draft_config, "vocab_size"),
            conv_groups=conv_groups,
            selector_rank=selector_rank,
        )


def _head_sizes(hidden_size: int, head: Config) -> tuple[int, int]:
    """(groups of a DFlash2 head's convolutions, rank of its selector), each 0 where there is none."""
    taps, group = head["conv_kernel_size"], positive(head, "conv_group_size")
    if taps not in (0, 2):
        raise ValueError(f"the drafter's conv_kernel_size is {brief(taps)}; only 2 is known, export it again")
    if taps and hidden_size % group:
        raise ValueError(f"the drafter's conv_group_size {group} does not divide hidden_size {hidden_size}; correct it")
    return hidden_size // group if taps else 0, positive(head, "selector_rank") if head["selector_rank"] else 0


def default_target_layer_ids(geometry: Geometry, taps: int = 5) -> list[int]:
    """The layers a drafter reads: full-attention layers floor(i * (n - 1) / (taps - 1)), i = 0..taps-1, of n.

    Gives [0, 15, 31, 47, 69] for MiMo-V2.5-Pro and [0, 11, 23, 35, 47] for MiMo-V2.5, as published. A model with
    fewer full-attention layers than taps is tapped over all its layers, each at most once; one tap is the middle layer.
    """
    if taps == 1:
        return [geometry.num_hidden_layers // 2]
    layers = geometry.full_attention_layers
    if len(layers) < taps:
        layers = list(range(geometry.num_hidden_layers))
    return sorted({layers[i * (len(layers) - 1) // (taps - 1)] for i in range(taps)})


def default_drafter_config(config: Config, *, num_hidden_layers: int = 5, mask_token_id: int | None = None) -> Config:
    """The config.json of a DFlash drafter for a target, in the spelling that vLLM and SGLang both read.

    Sizes follow the published drafters: the target's hidden and dense MLP size, its sliding-window head counts and
    its value head size (128 x 128 and 8 x 128 for Pro). The value scale is 0.612 in every size, not the target's.
    Both forms of each flag are written, because engines fall back to other values when theirs is absent (causal
    attention, full windows, 128 rotated elements). `mask_token_id` defaults to the published one for the published
    vocabulary, else to the last id.
    """
    g = Geometry.from_config(config)
    if mask_token_id is None:
        mask_token_id = 151675 if g.vocab_size == 152576 else g.vocab_size - 1
    out: Config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "hidden_size": g.hidden_size,
        "target_hidden_size": g.hidden_size,
        "intermediate_size": g.intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_target_layers": g.num_hidden_layers,
        "num_attention_heads": g.mtp.heads,
        "num_key_value_heads": g.mtp.kv_heads,
        "head_dim": g.mtp.v_head_dim,
        "v_head_dim": g.mtp.v_head_dim,
        "max_position_embeddings": g.max_position_embeddings,
        "rms_norm_eps": g.layernorm_epsilon,
        "rope_theta": 10000,
        "partial_rotary_factor": 0.5,
        "sliding_window": 1024,
        "block_size": 8,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dflash_config": {
            "target_layer_ids": default_target_layer_ids(g),
            "mask_token_id": mask_token_id,
            "attention_value_scale": 0.612,
            "attention_sink_bias": True,
            "use_swa": True,
        },
    }
    out |= {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    return release_drafter_config(out, g.vocab_size)


def release_drafter_config(draft_config: Config, vocab_size: int) -> Config:
    """`draft_config` with every spelling that an engine looks for, all of them equal, and the target's vocabulary.

    `backbone_rotary_base` is left out: it is training metadata that two readers mistook for the rotary base.
    """
    g = DraftGeometry.from_config(draft_config | {"vocab_size": vocab_size})
    factor = g.rotary_dim / g.head_dim
    window = {"use_swa": g.sliding_window is not None, "causal": g.causal, "block_size": g.block_size}
    if g.sliding_window is not None:
        window["swa_window_size"] = g.sliding_window
    inner = {k: v for k, v in draft_config["dflash_config"].items() if k != "backbone_rotary_base"}
    theta = int(g.rope_theta) if g.rope_theta == int(g.rope_theta) else g.rope_theta
    return draft_config | {
        "auto_map": {"AutoConfig": "dflash.DFlashConfig", "AutoModel": "dflash.DFlashDraftModel"},
        "vocab_size": vocab_size,
        "rope_theta": theta,
        "partial_rotary_factor": factor,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor},
        "is_causal": g.causal,
        "use_sliding_window": g.sliding_window is not None,
        "sliding_window": g.sliding_window,
        "add_swa_attention_sink_bias": g.sinks,
        "block_size": g.block_size,
        "layer_types": ["full_attention" if g.sliding_window is None else "sliding_attention"] * g.num_hidden_layers,
        "dflash_config": inner | window | {"attention_sink_bias": g.sinks},
    }
