"""Configuration of MiMo-V2 models (`model_type` "mimo_v2" and "mimo_v2_flash").

Field names, and the defaults that a published file may leave out, are those of the MiMo-V2.5 and V2.6 releases.
The file travels inside every release as remote code, so it needs transformers and nothing else.
"""

from typing import Literal

from transformers import PreTrainedConfig


class MiMoV2Config(PreTrainedConfig):
    """A hybrid (full and sliding-window) attention decoder whose MLPs are routed experts.

    `hybrid_layer_pattern[i]` is 0 for full attention and 1 for sliding-window attention; `moe_layer_freq[i]` is 0
    for a dense MLP and 1 for routed experts. Both are read from the file: no formula gives them for every size.

    `swa_window_convention` settles how many keys a sliding-window query sees, itself included: "hub" takes
    `sliding_window` as it is (128, the published modeling code, vLLM), "sglang" takes `sliding_window_size` + 1
    (129, SGLang and the `mimo_v2_flash` class of transformers). After construction `sliding_window` is that number.
    """

    model_type = "mimo_v2"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "n_routed_experts", "rms_norm_eps": "layernorm_epsilon"}

    vocab_size: int = 152576
    hidden_size: int = 4096
    intermediate_size: int = 16384
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 48
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    swa_num_attention_heads: int | None = None
    swa_num_key_value_heads: int | None = None
    head_dim: int = 192
    v_head_dim: int = 128
    swa_head_dim: int | None = None
    swa_v_head_dim: int | None = None
    hybrid_layer_pattern: list[int] | None = None
    moe_layer_freq: list[int] | None = None
    sliding_window: int | None = 128
    sliding_window_size: int | None = None
    swa_window_convention: Literal["hub", "sglang"] = "hub"
    partial_rotary_factor: float = 0.334
    rope_theta: float | int = 10_000_000
    swa_rope_theta: float | int = 10_000
    attention_value_scale: float | None = None
    add_swa_attention_sink_bias: bool = True
    add_full_attention_sink_bias: bool = False
    attention_projection_layout: Literal["fused_qkv", "split"] = "split"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    n_routed_experts: int | None = 256
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 8
    n_group: int | None = 1
    topk_group: int | None = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float | None = None
    moe_router_dtype: str | None = None
    hidden_act: str = "silu"
    layernorm_epsilon: float = 1e-5
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        # transformers' caches act on this key, which every published file carries and no engine honours.
        kwargs.pop("attention_chunk_size", None)
        layers = self.num_hidden_layers
        if self.hybrid_layer_pattern is None:
            self.hybrid_layer_pattern = [0] * layers
        if self.moe_layer_freq is None:
            self.moe_layer_freq = [0] + [1] * (layers - 1)
        for swa, full in (
            ("swa_num_attention_heads", "num_attention_heads"),
            ("swa_num_key_value_heads", "num_key_value_heads"),
            ("swa_head_dim", "head_dim"),
            ("swa_v_head_dim", "v_head_dim"),
        ):
            if getattr(self, swa) is None:
                setattr(self, swa, getattr(self, full))
        # Engines read these two as they are: None would be no dtype and no number to them.
        self.moe_router_dtype = self.moe_router_dtype or "float32"
        if self.sliding_window_size is None and self.swa_window_convention == "hub":
            self.sliding_window_size = self.sliding_window
        if self.swa_window_convention == "sglang":
            if self.sliding_window_size is None:
                raise ValueError('swa_window_convention "sglang" needs sliding_window_size in the configuration')
            self.sliding_window = self.sliding_window_size + 1
        # transformers' caches read this list to choose a rolling or a growing cache for each layer.
        self.layer_types = ["sliding_attention" if swa else "full_attention" for swa in self.hybrid_layer_pattern]
        self._refuse_what_the_model_lacks()
        super().__post_init__(**kwargs)

    def _refuse_what_the_model_lacks(self):
        for name in ("hybrid_layer_pattern", "moe_layer_freq"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_hidden_layers} layers; "
                    "copy the list from the source configuration"
                )
        if 1 in self.hybrid_layer_pattern and not self.sliding_window:
            raise ValueError("hybrid_layer_pattern has sliding-window layers, but sliding_window is not set")
        if self.scoring_func != "sigmoid" or self.topk_method != "noaux_tc":
            raise ValueError(
                f"router {self.scoring_func}/{self.topk_method} is not MiMo-V2's; only sigmoid/noaux_tc is implemented"
            )
        if self.n_shared_experts:
            raise ValueError("n_shared_experts is set, but MiMo-V2 has no shared experts; set it to null")
        if (self.n_group or 1) != 1 or (self.topk_group or 1) != 1:
            raise ValueError("n_group and topk_group other than 1 are not implemented; MiMo-V2 has one group")
        if self.attention_bias:
            raise ValueError("attention_bias is true, but MiMo-V2 projections have no bias; set it to false")

    def is_swa(self, layer: int) -> bool:
        """Whether `layer` uses sliding-window attention."""
        return bool(self.hybrid_layer_pattern[layer])

    def heads(self, layer: int) -> tuple[int, int, int, int]:
        """(query heads, key-value heads, query/key head size, value head size) of `layer`."""
        if self.is_swa(layer):
            return (
                self.swa_num_attention_heads,
                self.swa_num_key_value_heads,
                self.swa_head_dim,
                self.swa_v_head_dim,
            )
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.v_head_dim

    def has_sink(self, layer: int) -> bool:
        """Whether `layer` has a learned attention sink, one logit a query head."""
        return self.add_swa_attention_sink_bias if self.is_swa(layer) else self.add_full_attention_sink_bias

    def qkv_chunks(self) -> int:
        """Chunks [Q|K|V] of a fused projection, in every layer: `num_key_value_heads` of full attention."""
        return self.num_key_value_heads

    def convert_rope_params_to_dict(self, **kwargs):
        return kwargs  # two thetas, one a layer type: the model reads rope_theta and swa_rope_theta itself


__all__ = ["MiMoV2Config"]
