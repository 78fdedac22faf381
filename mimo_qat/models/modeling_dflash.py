"""DFlash drafter as a transformers model: one pass over [anchor, mask x (B-1)] drafts B-1 tokens.

Every layer attends to its own block and to keys and values projected from ONE fused vector a committed token: the
target's residual stream after `target_layer_ids`, through `fc` and `hidden_norm`. Embedding and output head belong
to the target (arXiv 2602.06036). The file is self-contained (torch and transformers only) because a copy travels
inside every release as `dflash.py`.

The optional DFlash2 head adds a two-tap convolution around every sublayer (`BlockConv`) and a selector of a coherent
path through each slot's best candidates (`CandidateSelector`); names and shapes are those of the drafters that z-lab
publishes. Both start as the identity. transformers' own DFlash generation knows no selector: there such a drafter
takes every slot's best token, which stays correct and accepts less.

Shape letters: B batch, C context rows, R block rows, K key rows, D hidden size, N query heads, G key-value heads,
H head size, T taps, k candidates, r selector rank.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import cached_file

MASK_FILE = "mask_embedding.pt"
# The field of an output that holds the cache; transformers 5.24 renamed it, and the argument of `forward` with it.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class DFlashConfig(PreTrainedConfig):
    """Configuration of a DFlash drafter, as published (`model_type` "qwen3", drafting keys in `dflash_config`).

    Either place of a key is read: `target_layer_ids`, `mask_token_id`, `block_size` at the top or in `dflash_config`,
    `partial_rotary_factor` and `rope_theta` at the top or in `rope_parameters`. After construction the top level
    holds them all, and `is_causal`, `use_sliding_window`, `sliding_window`, `layer_types`, `attention_value_scale`
    and `attention_sink_bias` are settled. Absent causality means non-causal, which is what MiMo ships; a hybrid of
    full and sliding layers without the key is refused, because published hybrids disagree. The DFlash2 head is there
    where `conv_kernel_size` or `selector_rank` is; 0 means absent, after construction None.
    """

    model_type = "qwen3"
    has_no_defaults_at_init = True  # a drafter without taps, block and mask token is no drafter

    vocab_size: int = 152576
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 5
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 128
    v_head_dim: int | None = None
    num_target_layers: int | None = None
    target_layer_ids: list[int] | None = None
    block_size: int | None = None
    mask_token_id: int | None = None
    dflash_config: dict | None = None
    is_causal: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_value_scale: float | None = None
    attention_sink_bias: bool | None = None
    conv_kernel_size: int | None = None
    conv_group_size: int | None = None
    selector_rank: int | None = None
    selector_top_k: int | None = None
    partial_rotary_factor: float | None = None
    rope_theta: float | int | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        nested = dict(self.dflash_config or {})
        rope = dict(self.rope_parameters or {})
        sink_key = kwargs.get("add_swa_attention_sink_bias", False)  # the V2.6 name
        self._settle("target_layer_ids", nested)
        self._settle("mask_token_id", nested)
        self._settle("block_size", nested)
        self._settle("is_causal", nested, "causal")
        self._settle("attention_value_scale", nested, default=1.0)
        self._settle("attention_sink_bias", nested, default=bool(sink_key))
        self._settle("rope_theta", rope, default=10000)
        self._settle("partial_rotary_factor", rope, default=1.0)
        self._settle_windows(nested)
        head = self._settle_head(nested)
        self.v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        self._refuse_what_the_model_lacks(rope)
        self.dflash_config = nested | {
            "causal": self.is_causal,
            "use_swa": self.use_sliding_window,
            "block_size": self.block_size,
            "target_layer_ids": list(self.target_layer_ids),
            "mask_token_id": self.mask_token_id,
            "attention_value_scale": self.attention_value_scale,
            "attention_sink_bias": self.attention_sink_bias,
        }
        if self.use_sliding_window:
            self.dflash_config["swa_window_size"] = self.sliding_window
        self.dflash_config |= head
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        super().__post_init__(**kwargs)

    def _settle(self, name: str, nested: dict, nested_name: str | None = None, default=None):
        """Moves a key that two places may hold to the top level; two different values are an error."""
        outer, inner = getattr(self, name), nested.get(nested_name or name)
        if outer is not None and inner is not None and outer != inner:
            raise ValueError(f"drafter config: {name} is {outer} at the top and {inner} inside; keep one value")
        value = outer if outer is not None else inner
        setattr(self, name, default if value is None else value)

    def _settle_windows(self, nested: dict):
        kinds = set(self.layer_types or ())
        self._settle("use_sliding_window", nested, "use_swa", default="sliding_attention" in kinds)
        if self.use_sliding_window:
            self._settle("sliding_window", nested, "swa_window_size")
        if self.layer_types is None:
            kind = "sliding_attention" if self.use_sliding_window else "full_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.is_causal is None:
            if len(kinds) > 1:
                raise ValueError(
                    "drafter config mixes full and sliding layers and has no is_causal; "
                    "set it (true where sliding layers were trained causal)"
                )
            self.is_causal = False

    def _settle_head(self, nested: dict) -> dict:
        """Settles the DFlash2 keys, takes them out of `nested` and returns those that are published there."""
        head = {}
        for first, second, usual in (
            ("conv_kernel_size", "conv_group_size", 16),
            ("selector_rank", "selector_top_k", 16),
        ):
            self._settle(first, nested)
            self._settle(second, nested, default=usual)
            nested.pop(first, None)
            nested.pop(second, None)
            if getattr(self, first):
                head |= {first: getattr(self, first), second: getattr(self, second)}
            else:
                setattr(self, first, None)
                setattr(self, second, None)
        return head

    def _refuse_what_the_model_lacks(self, rope: dict):
        for name in ("target_layer_ids", "block_size", "mask_token_id"):
            if getattr(self, name) is None:
                raise ValueError(f"drafter config has no {name}; set it at the top level or in dflash_config")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers; name each layer"
            )
        if "sliding_attention" in self.layer_types and (self.sliding_window or 0) < self.block_size:
            raise ValueError(
                f"sliding_window {self.sliding_window} is smaller than block_size {self.block_size}; widen it"
            )
        if self.v_head_dim != self.head_dim:
            raise ValueError(f"v_head_dim {self.v_head_dim} differs from head_dim {self.head_dim}; make them equal")
        if self.conv_kernel_size not in (None, 2):
            raise ValueError(
                f"conv_kernel_size {self.conv_kernel_size} is not implemented; set it to 2 or leave it out"
            )
        if self.conv_kernel_size and self.hidden_size % self.conv_group_size:
            raise ValueError(f"conv_group_size {self.conv_group_size} does not divide hidden_size {self.hidden_size}")
        if self.selector_rank and not 1 <= self.selector_top_k <= self.vocab_size:
            raise ValueError(f"selector_top_k {self.selector_top_k} is not in 1..vocab_size {self.vocab_size}")
        if self.attention_bias:
            raise ValueError("attention_bias is true, but the drafter's projections have no bias; set it to false")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f'rope_type {rope["rope_type"]!r} is not implemented; set it to "default"')

    def convert_rope_params_to_dict(self, **kwargs):
        return kwargs  # both forms are settled in __post_init__

    def layer_rule(self, layer: int) -> tuple[int | None, bool]:
        """(window in keys including the query or None, causal inside the block) of `layer`.

        In a hybrid, `is_causal` speaks of the sliding layers; the full ones stay bidirectional.
        """
        sliding = self.layer_types[layer] == "sliding_attention"
        causal = self.is_causal and (sliding or "sliding_attention" not in self.layer_types)
        return self.sliding_window if sliding else None, causal

    def published(self) -> dict:
        """The keys of config.json that our writer emits: a superset that vLLM, SGLang and transformers read."""
        names = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim v_head_dim num_target_layers target_layer_ids block_size mask_token_id dflash_config is_causal "
            "use_sliding_window sliding_window layer_types partial_rotary_factor rope_theta rope_parameters "
            "max_position_embeddings rms_norm_eps hidden_act attention_bias attention_dropout tie_word_embeddings "
            "use_cache bos_token_id eos_token_id"
        ).split()
        head = self.conv_kernel_size or self.selector_rank
        return {
            "architectures": ["DFlash2DraftModel" if head else "DFlashDraftModel"],
            "auto_map": {"AutoConfig": "dflash.DFlashConfig", "AutoModel": "dflash.DFlashDraftModel"},
            "model_type": "qwen3",
            "torch_dtype": "bfloat16",
            **{name: getattr(self, name) for name in names},
        }


def _from_foreign(config: PreTrainedConfig) -> DFlashConfig:
    """AutoConfig reads a published folder as Qwen3Config, which fills in windows that the file does not have."""
    values = config.to_dict()
    if "use_swa" in (values.get("dflash_config") or {}):
        for name in ("use_sliding_window", "sliding_window", "layer_types"):
            values.pop(name, None)
    return DFlashConfig.from_dict(values)


class DFlashRMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast to the input dtype, then the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


def rotary_table(position_ids, config: DFlashConfig, dtype):
    """cos and sin, each [B, 1, K, rotary dims], half-split (NeoX); no buffer, so building on meta is safe."""
    size = int(config.head_dim * config.partial_rotary_factor)
    exponents = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
    angles = position_ids[:, None, :, None].float() * float(config.rope_theta) ** -exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x, cos, sin):
    """Rotates the first `cos.shape[-1]` dimensions of x [B, heads, rows, H] and passes the rest."""
    size = cos.shape[-1]
    rotated, passed = x[..., :size], x[..., size:]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-second, first), dim=-1) * sin, passed), dim=-1)


def attend(q, k, v, mask, sink, implementation: str = "eager"):
    """Softmax attention with an optional learned sink: [B,N,R,H], [B,G,K,H], [B,G,K,H] -> [B,N,R,H].

    `mask` is boolean [B or 1, 1, R, K] (True = visible), None for all keys, or a flex-attention BlockMask. The sink
    is one logit a head in the softmax denominator with no value behind it. Three exact forms of the same sum:
    "eager" appends it to float32 scores, "sdpa" appends a key and a value of zeros whose mask entry is the logit,
    and flex multiplies by sigmoid(logsumexp - sink).
    """
    scale = q.shape[-1] ** -0.5
    if mask is not None and not isinstance(mask, torch.Tensor):
        out, lse = _flex(q, k, v, mask, scale)
        return out if sink is None else out * torch.sigmoid(lse - sink.float()[None, :, None])[..., None].to(out.dtype)
    batch, heads, rows, size = q.shape
    groups = heads // k.shape[1]
    if implementation == "sdpa" and sink is None:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=groups > 1)
    if implementation == "sdpa":
        if mask is None:
            mask = torch.ones(1, 1, rows, k.shape[2], dtype=torch.bool, device=q.device)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
        bias = bias.expand(batch, heads, -1, -1)
        column = sink.to(q.dtype)[None, :, None, None].expand(batch, heads, rows, 1)
        k, v = (F.pad(t, (0, 0, 0, 1)).repeat_interleave(groups, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, torch.cat((bias, column), dim=-1), scale=scale)
    q = q.reshape(batch, k.shape[1], groups * rows, size)
    scores = (q @ k.transpose(2, 3)).float().view(batch, heads, rows, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sink is not None:
        scores = torch.cat((scores, sink.float()[None, :, None, None].expand(batch, heads, rows, 1)), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype).view(batch, k.shape[1], groups * rows, -1)
    return (weights @ v).view(batch, heads, rows, size)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # with symbolic sizes its backward does not lower


def _flex(q, k, v, mask, scale):
    """Flex attention [B, N, R, H] and its logsumexp [B, N, R] (natural logarithm)."""
    from torch.nn.attention.flex_attention import AuxRequest

    options = {
        "enable_gqa": q.shape[1] != k.shape[1],
        "return_aux": AuxRequest(lse=True),
        # Fewer than 128 block rows would go to the decoding kernel, which does not lower for this mask.
        "kernel_options": {"BACKEND": "TRITON"},
    }
    if torch.compiler.is_compiling():  # inside a compiled layer it becomes part of that graph
        from torch.nn.attention.flex_attention import flex_attention as flex
    else:
        flex = _compiled_flex()
    out, aux = flex(q, k, v, block_mask=mask, scale=scale, **options)
    return out, aux.lse


class DFlashAttention(nn.Module):
    """Queries from the block; keys and values from the context and the block through the same projections."""

    def __init__(self, config: DFlashConfig, layer: int):
        super().__init__()
        self.config, self.layer_idx = config, layer
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = DFlashRMSNorm(size, config.rms_norm_eps)
        self.k_norm = DFlashRMSNorm(size, config.rms_norm_eps)
        self.attention_sink_bias = nn.Parameter(torch.zeros(heads)) if config.attention_sink_bias else None

    def forward(self, x_BRD, context_BCD, rotary, mask, past_key_values=None):
        shape = (*x_BRD.shape[:1], -1, self.config.head_dim)
        split = lambda y: y.view(*y.shape[:2], -1, shape[-1])  # noqa: E731
        rows_BKD = torch.cat((context_BCD, x_BRD), dim=1)
        q = self.q_norm(split(self.q_proj(x_BRD))).transpose(1, 2)
        k = self.k_norm(split(self.k_proj(rows_BKD))).transpose(1, 2)
        v = (split(self.v_proj(rows_BKD)) * self.config.attention_value_scale).transpose(1, 2)
        cos, sin = rotary
        q = apply_rotary(q, cos[:, :, -q.shape[2] :], sin[:, :, -q.shape[2] :])
        k = apply_rotary(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if callable(mask):
            mask = mask(k.shape[2])
        out = attend(q, k, v, mask, self.attention_sink_bias, self.config._attn_implementation)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DFlashMLP(nn.Module):
    """Dense SwiGLU MLP."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BlockConv(nn.Module):
    """Two-tap depthwise convolutions before and after one sublayer, over the rows of each block.

    y_t = (b0 + d0_t) x_t + (b1 + d1_t) x_{t-1}, with zeros before a block's first row. The base taps b belong to a
    channel; the corrections d are a projection of the sublayer's normed input, one value for `conv_group_size`
    neighbouring channels. Only block rows pass through it, never context rows.
    """

    def __init__(self, config: DFlashConfig):
        super().__init__()
        taps, size, self.group = config.conv_kernel_size, config.hidden_size, config.conv_group_size
        self.base_kernel = nn.Parameter(torch.empty(2, taps, size))  # (before or after, own or previous row, channel)
        self.kernel_projection = nn.Linear(size, 2 * taps * (size // self.group), bias=False)

    def prepare(self, x_BRD, block: int):
        """(the convolved sublayer input [B, R, D], the corrections that `finish` needs); `block` rows a block."""
        before, after = self.kernel_projection(x_BRD).unflatten(-1, (2, 2, -1)).unbind(-3)
        return self._convolve(x_BRD, before, self.base_kernel[0], block), after

    def finish(self, x_BRD, correction, block: int):
        """The convolved sublayer output [B, R, D]."""
        return self._convolve(x_BRD, correction, self.base_kernel[1], block)

    def _convolve(self, x_BRD, correction, base, block: int):
        x = x_BRD.unflatten(1, (-1, block))
        previous = F.pad(x[:, :, :-1], (0, 0, 1, 0)).flatten(1, 2).unflatten(-1, (-1, self.group))
        x = x_BRD.unflatten(-1, (-1, self.group))
        own, last = base.unflatten(-1, (-1, self.group)).unbind(0)
        own_change, last_change = correction[..., None].unbind(-3)
        return (own * x + last * previous + own_change * x + last_change * previous).flatten(-2)


class CandidateSelector(nn.Module):
    """Scores of a slot's best candidates given the token before it: S(a, b) = U(b) + <A[a] * W h, B[b]>.

    U are the head's logits, h the row that made them, A and B codebooks [V, r], W the hidden projection. The sum is
    taken in float32. With B = 0 the scores are the logits.
    """

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.top_k = config.selector_top_k
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, config.selector_rank))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)

    def scores(self, gate, unary, ids, predecessor):
        """float32 [..., k] of gates [..., r], logits and token ids [..., k] of the candidates, and tokens before [...].

        `gate` is `hidden_projection(h)`.
        """
        left = F.embedding(predecessor, self.predecessor_codebook).float() * gate.float()
        right = F.embedding(ids, self.successor_codebook).float()
        return unary.float() + (right @ left[..., None])[..., 0]

    def chain(self, hidden_BRD, logits_BRV, anchors_B):
        """Greedy drafts [B, R] of slots 1..R: each slot's best candidate after the one before.

        anchors_B holds the tokens before the first slot.
        """
        unary, ids = logits_BRV.topk(self.top_k, dim=-1)
        gates, previous, drafts = self.hidden_projection(hidden_BRD), anchors_B, []
        for slot in range(hidden_BRD.shape[1]):
            scores = self.scores(gates[:, slot], unary[:, slot], ids[:, slot], previous)
            previous = best_candidate(scores, ids[:, slot])
            drafts.append(previous)
        return torch.stack(drafts, dim=1)


def best_candidate(scores, ids):
    """The id [...] with the highest of scores [..., k]; among equals the lowest, as with an arg max over all ids."""
    beaten = scores < scores.amax(-1, keepdim=True)
    return ids.masked_fill(beaten, torch.iinfo(ids.dtype).max).amin(-1)


class DFlashLayer(nn.Module):
    """Pre-norm attention and MLP with residuals; the context is injected as it is, without `input_layernorm`."""

    def __init__(self, config: DFlashConfig, layer: int):
        super().__init__()
        self.input_layernorm = DFlashRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DFlashAttention(config, layer)
        self.post_attention_layernorm = DFlashRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DFlashMLP(config)
        self.block_size = config.block_size
        self.attention_conv = BlockConv(config) if config.conv_kernel_size else None
        self.mlp_conv = BlockConv(config) if config.conv_kernel_size else None

    def forward(self, x_BRD, context_BCD, rotary, mask, past_key_values=None):
        block = min(self.block_size, x_BRD.shape[1])  # one draft may be shorter than the blocks of training
        y_BRD = self.input_layernorm(x_BRD)
        if self.attention_conv is not None:
            y_BRD, correction = self.attention_conv.prepare(y_BRD, block)
        y_BRD = self.self_attn(y_BRD, context_BCD, rotary, mask, past_key_values)
        if self.attention_conv is not None:
            y_BRD = self.attention_conv.finish(y_BRD, correction, block)
        x_BRD = x_BRD + y_BRD
        y_BRD = self.post_attention_layernorm(x_BRD)
        if self.mlp_conv is not None:
            y_BRD, correction = self.mlp_conv.prepare(y_BRD, block)
        y_BRD = self.mlp(y_BRD)
        if self.mlp_conv is not None:
            y_BRD = self.mlp_conv.finish(y_BRD, correction, block)
        return x_BRD + y_BRD


class DFlashDraftModel(PreTrainedModel):
    """The drafter. Parameters carry the published names; `mask_embedding` [D] lives in a file of its own."""

    config_class = DFlashConfig
    config: DFlashConfig
    base_model_prefix = ""
    main_input_name = "noise_embeds"
    _no_split_modules = ["DFlashLayer"]
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keys_to_ignore_on_load_missing = ["mask_embedding"]

    def __init__(self, config: PreTrainedConfig):
        if not isinstance(config, DFlashConfig):
            config = _from_foreign(config)
        super().__init__(config)
        size = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = DFlashRMSNorm(size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DFlashRMSNorm(size, config.rms_norm_eps)
        self.mask_embedding = nn.Parameter(torch.empty(size))
        self.candidate_selector = CandidateSelector(config) if config.selector_rank else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, DFlashRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, DFlashAttention) and module.attention_sink_bias is not None:
            nn.init.zeros_(module.attention_sink_bias)
        elif isinstance(module, BlockConv):  # the identity; children come before their parents
            nn.init.zeros_(module.kernel_projection.weight)
            module.base_kernel.copy_(torch.tensor([1.0, 0.0])[:, None].expand_as(module.base_kernel))
        elif isinstance(module, CandidateSelector):
            nn.init.normal_(module.predecessor_codebook, std=0.02)
            nn.init.zeros_(module.successor_codebook)
        elif isinstance(module, DFlashDraftModel):
            nn.init.normal_(module.mask_embedding, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, and the mask embedding from its own file beside the weights."""
        model = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        where = {k: kwargs[k] for k in ("subfolder", "revision", "token", "cache_dir") if kwargs.get(k) is not None}
        path = cached_file(pretrained_model_name_or_path, MASK_FILE, **where)
        row = _read_mask_embedding(Path(path), model.config)
        with torch.no_grad():
            model.mask_embedding.copy_(row)
        return model

    def block_rows(self, anchor_embeds_BND):
        """Block inputs [B, N*b, D] of N anchors: the anchor's embedding, then the trained mask vector b-1 times."""
        batch, anchors, size = anchor_embeds_BND.shape
        masks = self.mask_embedding.to(anchor_embeds_BND.dtype)
        masks = masks.expand(batch, anchors, self.config.block_size - 1, size)
        return torch.cat((anchor_embeds_BND[:, :, None], masks), dim=2).flatten(1, 2)

    def run_layers(self, x_BRD, context_BCD, position_ids, masks, past_key_values=None, layers=None):
        """Block rows through all layers: training and drafting share this one path.

        context_BCD is the output of `fuse`; position_ids [B, C + R] count context rows, then block rows; `masks` maps
        `config.layer_rule(i)` to what `attend` takes, or to a function of the number of keys that returns it. `layers`
        are compiled forms of the layers to use in their place.
        """
        rotary = rotary_table(position_ids, self.config, x_BRD.dtype)
        for i, layer in enumerate(layers or self.layers):
            x_BRD = layer(x_BRD, context_BCD, rotary, masks[self.config.layer_rule(i)], past_key_values)
        return self.norm(x_BRD)

    def fuse(self, taps_BCTD):
        """Target hidden states [B, C, T*D], in `target_layer_ids` order, to context vectors [B, C, D]."""
        return self.hidden_norm(self.fc(taps_BCTD))

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Drafts one block; the call that transformers' DFlash generation makes.

        noise_embeds [B, b, D]: the target's embeddings of the anchor and of b-1 mask tokens. Only row 0 is used: the
        rows after the anchor always take the trained mask vector, since the target's row for that id is untrained.
        context_hidden_states [B, c, T*D]: taps of the c tokens committed since the last call (c may be 0).
        position_ids [B, c + b]; attention_mask [B, past + c + b], nonzero on real tokens. `past_key_values` receives
        c + b rows; the caller crops the b block rows after the step. Rows 1..b-1 of the result go to the target's head.
        transformers calls it `cache` since 5.24; either name is taken.
        """
        past_key_values = past_key_values if cache is None else cache
        x = torch.cat(
            (noise_embeds[:, :1], self.mask_embedding.to(noise_embeds.dtype).expand_as(noise_embeds[:, 1:])), 1
        )
        context = self.fuse(context_hidden_states)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = past + torch.arange(context.shape[1] + x.shape[1], device=x.device)[None]
        masks = {rule: _DraftMask(rule, x.shape[1], attention_mask, x.device) for rule in self.rules()}
        out = self.run_layers(x, context, position_ids, masks, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=out, **{CACHE: past_key_values})

    def draft_tokens(self, hidden_BRD, logits_BRV, anchors_B):
        """Greedy drafts [B, R] of the rows after the anchors [B]: the selector's chain, or each slot's best token."""
        if self.candidate_selector is None:
            return logits_BRV.argmax(-1)
        return self.candidate_selector.chain(hidden_BRD, logits_BRV, anchors_B)

    def rules(self) -> set[tuple[int | None, bool]]:
        """The distinct (window, causal) rules of the layers."""
        return {self.config.layer_rule(i) for i in range(self.config.num_hidden_layers)}


class _DraftMask:
    """Mask [B or 1, 1, b, K] of one drafted block over K keys that end with the block itself."""

    def __init__(self, rule, rows, padding_mask, device):
        self.rule, self.rows, self.padding_mask, self.device = rule, rows, padding_mask, device

    def __call__(self, keys: int):
        window, causal = self.rule
        k_pos = torch.arange(keys, device=self.device)
        q_pos = torch.arange(keys - self.rows, keys, device=self.device)[:, None]
        mask = k_pos <= q_pos if causal else torch.ones(self.rows, keys, dtype=torch.bool, device=self.device)
        if window is not None:
            mask = mask & (k_pos + window > q_pos)
        mask = mask[None, None]
        if self.padding_mask is not None:
            mask = mask & self.padding_mask[:, None, None, -keys:].bool()
        return mask


def _read_mask_embedding(path: Path, config: DFlashConfig) -> torch.Tensor:
    """The trained row [D] for mask slots, from {"mask_token_id": int, "embedding": [D]}."""
    value = torch.load(path, map_location="cpu", weights_only=True)
    if set(value) != {"mask_token_id", "embedding"}:
        raise ValueError(f"{path} has keys {sorted(value)}; it must have exactly mask_token_id and embedding")
    if value["mask_token_id"] != config.mask_token_id:
        raise ValueError(
            f"{path} is for token {value['mask_token_id']}, config.json says {config.mask_token_id}; they must agree"
        )
    if tuple(value["embedding"].shape) != (config.hidden_size,):
        raise ValueError(
            f"{path} has shape {tuple(value['embedding'].shape)}; one row of hidden_size {config.hidden_size} is needed"
        )
    return value["embedding"]


__all__ = ["DFlashConfig", "DFlashDraftModel"]
