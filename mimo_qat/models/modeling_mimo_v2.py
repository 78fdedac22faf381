"""MiMo-V2 as a transformers model: hybrid attention with sinks, and routed SwiGLU experts as fused 3-D parameters.

The file is self-contained (torch and transformers only) because a copy travels inside every release as remote code.
It covers `model_type` "mimo_v2" (fused, chunk-ordered QKV) and "mimo_v2_flash" (split projections). transformers has
its own class for the second; that one hard-wires the key-value heads and the window, and knows no fused projection.

Shape letters: B batch, S new positions, K key positions, T = B*S tokens, D hidden size, N query heads, G key-value
heads, H query/key head size, V value head size, E experts, I expert intermediate size.

A release stores FP8 blocks and MXFP4 experts, which transformers' own FP8 reader would take for something else:
`from_pretrained` here decodes them to plain weights while they are loaded.
"""

import copy
import functools
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import cached_file, logging

from .configuration_mimo_v2 import MiMoV2Config

logger = logging.get_logger(__name__)

INDEX_FILE = "model.safetensors.index.json"
# Parts of a release that this class does not run: multi-token prediction, and the towers of multimodal releases.
NOT_RUN = ("model.mtp.", "visual.", "audio_encoder.", "speech_embeddings.")
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# The field of an output that holds the cache; transformers 5.24 renamed it, and the argument of `forward` with it.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode_mxfp4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of E2M1 codes uint8 [N, K/2] (low nibble first) and E8M0 scales uint8 [N, K/32]."""
    scales = scales.view(torch.uint8)
    if packed.dtype != torch.uint8 or scales.shape != (packed.shape[0], packed.shape[1] // 16) or (scales == 255).any():
        raise ValueError(f"codes {packed.dtype} {list(packed.shape)} and scales {list(scales.shape)} are not MXFP4")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    return (torch.tensor(E2M1)[codes].unflatten(1, (-1, 32)) * powers[:, :, None]).flatten(1)


def decode_fp8(codes: torch.Tensor, scales: torch.Tensor, chunks: int = 1) -> torch.Tensor:
    """float32 [N, K] of E4M3 codes [N, K] and float32 scales of 128x128 blocks, which restart at each row chunk."""
    (rows, cols), each = codes.shape, codes.shape[0] // chunks
    blocks = -(-each // 128)
    if codes.dtype != torch.float8_e4m3fn or scales.shape != (chunks * blocks, -(-cols // 128)):
        raise ValueError(
            f"codes {codes.dtype} {list(codes.shape)} and scales {list(scales.shape)} are not {chunks} x FP8"
        )
    row = torch.arange(rows)
    block = row // each * blocks + row % each // 128
    return codes.float() * scales[block].repeat_interleave(128, dim=1)[:, :cols]


class StoredWeight:
    """A tensor of a release, read and decoded when transformers slices it: memory holds what is being placed."""

    def __init__(self, name: str, files: dict, chunks: int):
        self.name, self.files, self.chunks = name, files, chunks

    def __getitem__(self, key) -> torch.Tensor:
        base = self.name.removesuffix(".weight")
        scales = [base + end for end in (".weight_scale", ".weight_scale_inv") if base + end in self.files]
        weight, *scale = (self.files[name].get_tensor(name) for name in (self.name, *scales))
        if not scales:
            return weight[key]
        try:
            packed = scales[0].endswith("scale")
            return (decode_mxfp4(weight, *scale) if packed else decode_fp8(weight, *scale, self.chunks))[key]
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.name}: {error}; fetch or convert the release again") from None


def release_state(folder: Path, config: MiMoV2Config) -> dict[str, StoredWeight]:
    """{parameter name: weight decoded on demand} of a release, without the parts that are not run.

    ValueError where the index and the files do not hold the same tensors, each once, or where a tensor has no use.
    """
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    files: dict = {}
    for file in dict.fromkeys(weight_map.values()):
        if Path(file).name != file:
            raise ValueError(f"{folder}: the index names {file!r}; only files beside it are read; fetch it again")
        handle = safe_open(folder / file, framework="pt")
        for name in handle.keys():  # noqa: SIM118 - not a dict
            if name in files or weight_map.get(name) != file:
                raise ValueError(f"{folder}: {name} in {file} is not what the index says; fetch the folder again")
            files[name] = handle
    absent = sorted(weight_map.keys() - files.keys())
    if absent:
        raise ValueError(f"{folder}: {absent[0]} is in no file (and {len(absent) - 1} more); fetch the folder again")
    weights = [name for name in files if not name.endswith((".weight_scale", ".weight_scale_inv"))]
    used = {base + end for base in weights for end in ("", "_scale", "_scale_inv")}
    orphans = sorted(files.keys() - used)
    if orphans:
        raise ValueError(f"{folder}: {orphans[0]} has no weight beside it; fetch or convert the release again")
    run = [name for name in weights if not name.startswith(NOT_RUN)]
    if len(run) < len(weights):
        logger.info(f"{folder}: {len(weights) - len(run)} weights of MTP blocks or towers are not run by this class")
    fused = "self_attn.qkv_proj.weight"
    return {n: StoredWeight(n, files, config.qkv_chunks() if n.endswith(fused) else 1) for n in run}


def release_folder(name_or_path: str | os.PathLike, **hub) -> Path:
    """The local folder of a release that is a folder or a hub repository; fetches what its index names."""
    index = Path(cached_file(name_or_path, INDEX_FILE, **hub))
    if not Path(name_or_path).is_dir():
        sub = hub.pop("subfolder", "") or "."
        files = set(json.loads(index.read_text())["weight_map"].values()) | {"generation_config.json"}
        snapshot_download(str(name_or_path), allow_patterns=[os.path.normpath(f"{sub}/{f}") for f in files], **hub)
    return index.parent


class MiMoV2RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast to the input dtype, then the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_table(position_ids: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype):
    """cos and sin, each [B, 1, S, rotary_dim], of the half-split (NeoX) rotary embedding.

    Computed from the configuration at every call: a model that was built on the meta device has no stale buffer.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=torch.float32) / rotary_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BNSH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `cos.shape[-1]` of the H dimensions and passes the rest."""
    rotary_dim = cos.shape[-1]
    rotated, passed = x_BNSH[..., :rotary_dim], x_BNSH[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1)


def visible_keys(q_len: int, k_len: int, window: int | None, padding_mask, document_ids, device):
    """Boolean attention mask [B or 1, 1, S, K], or None where plain causal attention over all keys is meant.

    The K keys end with the S queries, which holds for growing and for rolling caches. `window` counts the query's
    own position. `padding_mask` [B, >=K] is nonzero on real tokens; `document_ids` [B, S] separates packed documents
    and needs a call without a cache.
    """
    if window is not None and k_len <= window:
        window = None
    if padding_mask is None and document_ids is None and window is None and q_len in (1, k_len):
        return None
    k_pos = torch.arange(k_len, device=device)
    q_pos = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    mask = k_pos <= q_pos
    if window is not None:
        mask = mask & (q_pos - k_pos < window)
    mask = mask[None, None]
    if padding_mask is not None:
        # A query row that is itself padding keeps its own key, so that no softmax runs over nothing.
        mask = mask & padding_mask[:, None, None, -k_len:].bool() | (k_pos == q_pos)
    if document_ids is not None:
        assert q_len == k_len, "packed documents and a cache exclude each other"
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask


def attend(q, k, v, mask, scale, sink, implementation: str):
    """Softmax attention in float32, optionally with a learned sink: [B,N,S,H], [B,G,K,H], [B,G,K,V] -> [B,N,S,V].

    The sink is one logit a head in the softmax denominator with no value behind it. "sdpa" expresses it as an extra
    key of zeros whose additive mask is the sink logit, and an extra value of zeros, which is the same sum.
    """
    groups = q.shape[1] // k.shape[1]
    if implementation == "sdpa" and sink is None:
        if q.is_cuda and mask is not None and groups > 1:
            # Of the kernels that take a mask, only the unfused one groups heads; it writes all S x K scores.
            k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    if implementation == "sdpa":
        bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
        column = sink.to(q.dtype)[None, :, None, None].expand(*bias.shape[:-1], 1)
        bias = torch.cat((bias, column), dim=-1)
        return F.scaled_dot_product_attention(q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), bias, scale=scale)
    scores = (q @ k.transpose(2, 3)).float() * scale + bias.float()
    if sink is not None:
        scores = torch.cat((scores, sink.float()[None, :, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


class MiMoV2Attention(nn.Module):
    """Grouped-query attention with separate query/key and value head sizes, and a value scale."""

    def __init__(self, config: MiMoV2Config, layer: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.heads, self.kv_heads, self.head_dim, self.v_head_dim = config.heads(layer)
        self.window = config.sliding_window if config.is_swa(layer) else None
        self.rope_theta = config.swa_rope_theta if config.is_swa(layer) else config.rope_theta
        self.rotary_dim = int(self.head_dim * config.partial_rotary_factor)
        self.value_scale = config.attention_value_scale
        rows = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.v_head_dim)
        self.fused = config.attention_projection_layout == "fused_qkv"
        if self.fused:
            self.chunks = config.qkv_chunks()
            if any(heads % self.chunks for heads in (self.heads, self.kv_heads)):
                raise ValueError(
                    f"layer {layer}: {self.heads} query and {self.kv_heads} key-value heads do not divide into the "
                    f"{self.chunks} chunks of fused_qkv; use attention_projection_layout 'split'"
                )
            self.chunk_rows = [r // self.chunks for r in rows]
            self.qkv_proj = nn.Linear(config.hidden_size, sum(rows), bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, rows[0], bias=False)
            self.k_proj = nn.Linear(config.hidden_size, rows[1], bias=False)
            self.v_proj = nn.Linear(config.hidden_size, rows[2], bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_head_dim, config.hidden_size, bias=False)
        self.attention_sink_bias = nn.Parameter(torch.zeros(self.heads)) if config.has_sink(layer) else None

    def project(self, x_BSD):
        """-> q [B,N,S,H], k [B,G,S,H], v [B,G,S,V], heads in global order."""
        lead = x_BSD.shape[:2]
        if self.fused:
            # Rows are [Q_c | K_c | V_c] a chunk, so joining the chunks gives the global head order.
            q, k, v = self.qkv_proj(x_BSD).view(*lead, self.chunks, -1).split(self.chunk_rows, dim=-1)
        else:
            q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        q = q.reshape(*lead, self.heads, self.head_dim).transpose(1, 2)
        k = k.reshape(*lead, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(*lead, self.kv_heads, self.v_head_dim).transpose(1, 2)
        return q, k, v if self.value_scale is None else v * self.value_scale

    def forward(self, x_BSD, rotary, masks, past_key_values=None):
        q, k, v = self.project(x_BSD)
        cos, sin = rotary[self.rope_theta, self.rotary_dim]
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if past_key_values is None:
            mask = masks[self.window]
        else:
            k, v = past_key_values.update(k, v, self.layer_idx)
            mask = masks(k.shape[2], self.window)
        out = attend(q, k, v, mask, self.head_dim**-0.5, self.attention_sink_bias, self.config._attn_implementation)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MiMoV2MLP(nn.Module):
    """Dense SwiGLU MLP, no bias, no clamp."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MiMoV2Router(nn.Module):
    """Sigmoid `noaux_tc` router in float32; the correction bias steers the selection and never the weights."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.scaling = 1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_TD):
        """-> router logits [T, E] and combine weights [T, k] in float32, expert ids [T, k]."""
        logits = F.linear(x_TD.float(), self.weight.float())
        scores = logits.sigmoid()
        chosen = (scores + self.e_score_correction_bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scaling, chosen


@use_experts_implementation
class MiMoV2Experts(nn.Module):
    """Routed SwiGLU experts: `gate_up_proj` [E, 2I, D] (gate rows first) and `down_proj` [E, D, I].

    This forward is the eager reference; `config._experts_implementation` picks `grouped_mm` and others.
    """

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        inner = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_TD, chosen_Tk, weights_Tk):
        out = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in chosen_Tk.unique().tolist():
            token, slot = (chosen_Tk == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x_TD[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out = out.index_add(0, token, y.float() * weights_Tk[token, slot, None])
        return out.to(x_TD.dtype)


class MiMoV2MoE(nn.Module):
    """Router and experts; there is no shared expert."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.gate = MiMoV2Router(config)
        self.experts = MiMoV2Experts(config)

    def forward(self, x_BSD):
        x_TD = x_BSD.flatten(0, 1)
        _, weights, chosen = self.gate(x_TD)
        return self.experts(x_TD, chosen, weights).view_as(x_BSD)


class MiMoV2DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP with residuals; returns the residual stream [B, S, D]."""

    def __init__(self, config: MiMoV2Config, layer: int):
        super().__init__()
        self.input_layernorm = MiMoV2RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attn = MiMoV2Attention(config, layer)
        self.post_attention_layernorm = MiMoV2RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MiMoV2MoE(config) if config.moe_layer_freq[layer] else MiMoV2MLP(config)

    def forward(self, x_BSD, rotary, masks, past_key_values=None):
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, masks, past_key_values)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class MiMoV2PreTrainedModel(PreTrainedModel):
    """What the body and the language model share: initialisation, and how a checkpoint's names map to the modules."""

    config_class = MiMoV2Config
    config: MiMoV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiMoV2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # Multi-token-prediction blocks ride along in releases; decoding with them is the business of other engines.
    _keys_to_ignore_on_load_unexpected = [r"^model\.mtp\."]

    def __init__(self, config: MiMoV2Config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.moe_router_dtype not in ("bfloat16", "bf16"):  # then it is stored, and has to stay, in float32
            self._keep_in_fp32_modules_strict = [*type(self)._keep_in_fp32_modules_strict, "mlp.gate.weight"]

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, MiMoV2Router)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, MiMoV2RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MiMoV2Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, MiMoV2Attention) and module.attention_sink_bias is not None:
            nn.init.normal_(module.attention_sink_bias, std=std)
        if isinstance(module, MiMoV2Router):
            nn.init.zeros_(module.e_score_correction_bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As in transformers (folder or hub id, `dtype`, `device_map`, ...); a release is decoded while it is loaded.

        Of a release every tensor is used exactly once and every parameter is filled, or ValueError names one.
        """
        _map_expert_names()
        path, hub = pretrained_model_name_or_path, {k: kwargs[k] for k in HUB_KEYS if kwargs.get(k) is not None}
        stored = config
        if path is not None and not isinstance(config, PreTrainedConfig):
            stored = cls.config_class.from_pretrained(config or path, **hub)
        quantized = getattr(stored, "quantization_config", None)
        if path is None or not isinstance(quantized, dict) or quantized.get("quant_method") != "fp8":
            return super().from_pretrained(path, *args, config=config, **kwargs)
        asked = kwargs.get("quantization_config")
        method = asked.get("quant_method") if isinstance(asked, dict) else getattr(asked, "quant_method", None)
        if asked is None or method == "fp8":
            kwargs.pop("quantization_config", None)  # callers hand the config's own back, and it is honoured already
        if not isinstance(config, PreTrainedConfig):
            dtypes = {k: kwargs.pop(k) for k in ("dtype", "torch_dtype") if k in kwargs}
            config, kwargs = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
            kwargs |= dtypes
        kwargs = {k: v for k, v in kwargs.items() if k not in HUB_KEYS}
        folder = release_folder(path, **hub)
        config = copy.deepcopy(config)
        del config.quantization_config  # what is built is not quantized
        if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in (None, "auto"):
            kwargs["dtype"] = config.dtype or torch.bfloat16
        if cls.can_generate() and (folder / "generation_config.json").is_file():
            kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
        state = release_state(folder, config)
        if not cls.can_generate():
            state.pop("lm_head.weight", None)
        report = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            None, *args, config=config, state_dict=state, output_loading_info=True, **kwargs
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                raise ValueError(f"{path}: {kind} {sorted(info[kind])[:3]}; fetch or convert the release again")
        model.name_or_path = model.config.name_or_path = str(path)
        return (model, info) if report else model

    def save_pretrained(self, *args, **kwargs):
        _map_expert_names()
        return super().save_pretrained(*args, **kwargs)


def _map_expert_names():
    """Tells transformers that files hold one matrix an expert where the modules hold fused 3-D parameters."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    experts = "mlp.experts.*."
    mapping = [
        WeightConverter(
            source_patterns=[experts + "gate_proj.weight", experts + "up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=experts + "down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping("mimo_v2", mapping, overwrite=True)


class MiMoV2Model(MiMoV2PreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiMoV2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MiMoV2RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        cache: Cache | None = None,
        document_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """`attention_mask` [B, past + S] is nonzero on real tokens. `position_ids` [B, S] that restart inside a row
        mark packed documents, which then do not see each other (calls without a cache only). `document_ids` [B, S] says
        so outright, and spares the question whether there is a restart, for which the host waits. `cache` is what
        transformers calls `past_key_values` since 5.24; either name is taken.

        `output_hidden_states` may be a list of indices. Entry 0 is the embedding, entry i + 1 the residual stream
        after layer i, all of them BEFORE the final norm, as DFlash taps want them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        past_key_values = past_key_values if cache is None else cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        continues = past_key_values is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        documents = document_ids
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        elif not continues and attention_mask is None and documents is None:
            restarts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) <= 0
            documents = restarts.cumsum(1) if restarts.any() else None
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions; give [batch, positions]")
        padding = attention_mask if attention_mask is not None and not attention_mask.all() else None

        @functools.cache
        def mask_of(k_len, window):
            return visible_keys(x.shape[1], k_len, window, padding, documents, x.device)

        # A cache knows how many keys a layer has only once it is updated. Without one they are the new positions, and
        # tensors in the place of a function leave attention a graph that can be compiled.
        masks = mask_of
        if past_key_values is None:
            masks = {
                window: mask_of(x.shape[1], window) for window in {layer.self_attn.window for layer in self.layers}
            }
        kinds = {(layer.self_attn.rope_theta, layer.self_attn.rotary_dim) for layer in self.layers}
        rotary = {kind: rotary_table(position_ids, kind[1], kind[0], x.dtype) for kind in kinds}
        wanted = range(len(self.layers) + 1) if output_hidden_states is True else output_hidden_states or ()
        states: list = [None] * (len(self.layers) + 1)
        for i, layer in enumerate(self.layers):
            states[i] = x if i in wanted else None
            x = layer(x, rotary, masks, past_key_values)
        states[-1] = x if len(self.layers) in wanted else None
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x),
            hidden_states=tuple(states) if wanted else None,
            **{CACHE: past_key_values if use_cache else None},
        )


class MiMoV2ForCausalLM(MiMoV2PreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        self.model = MiMoV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, S, vocab_size], or of the last `logits_to_keep` positions; `labels` [B, S] add a mean loss."""
        kwargs.pop("return_dict", None)
        past_key_values = past_key_values if cache is None else cache
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)}
        )


__all__ = ["MiMoV2ForCausalLM", "MiMoV2Model", "MiMoV2PreTrainedModel"]
