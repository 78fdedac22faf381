"""What `mimo-qat plan` knows of a model: shapes and bytes, read from the model itself on the meta device.

Letters: H hidden size, V vocabulary, E experts, k experts a token, I expert size, S tokens a row, T tokens a
micro-batch, W expert weights, N GPUs.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_qat.checkpoint.geometry import read_json
from mimo_qat.models.experts import expert_parameters

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. `linear` counts the weights that multiply every token: attention, dense or shared MLP, router.

    `inner` is I of a routed expert, or the size of the dense MLP; `experts` and `per_token` are 0 in a dense layer.
    """

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int | None
    sink: bool
    linear: int
    inner: int
    experts: int
    per_token: int
    expert_weights: int


@dataclass(frozen=True)
class ModelShape:
    """A causal language model as the plan sees it; `frozen_bytes` are all parameters and buffers but the experts."""

    name: str
    hidden: int
    vocab: int
    layers: tuple[LayerShape, ...]
    parameters: int
    frozen_bytes: int
    embedding_and_head: int
    trained: tuple[int, ...]
    """elements of each trained parameter"""

    @property
    def expert_weights(self) -> int:
        """W: the weights that QAD trains."""
        return sum(self.trained)

    @property
    def experts(self) -> int:
        """E of the routed layers."""
        return max(layer.experts for layer in self.layers)

    @property
    def active(self) -> int:
        """Weights that multiply one token, the head included and the embedding not."""
        routed = sum(ly.expert_weights // ly.experts * ly.per_token for ly in self.layers if ly.experts)
        return sum(ly.linear for ly in self.layers) + routed + self.vocab * self.hidden

    @property
    def first_routed(self) -> int:
        """The first routed layer; nothing before its experts has a gradient."""
        return next(i for i, layer in enumerate(self.layers) if layer.experts)

    @property
    def largest_layer_bytes(self) -> int:
        """BF16 bytes of the largest decoder layer."""
        return 2 * max(layer.linear + layer.expert_weights for layer in self.layers)


def meta_model(config: dict[str, Any]) -> Any:
    """The BF16 model of a parsed config.json without a byte of weights; nothing is executed from a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
    from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM

    skip = ("quantization_config", "auto_map", "torch_dtype", "dtype", "model_type")
    values = {k: v for k, v in config.items() if k not in skip}
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError("the configuration has no model_type; give a config.json of a causal language model")
    with torch.device("meta"):
        if kind.startswith("mimo_v2"):
            return MiMoV2ForCausalLM(MiMoV2Config(**values, dtype=torch.bfloat16))
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=torch.bfloat16)
        except (ValueError, KeyError) as error:
            raise ValueError(f"model_type {kind!r} cannot be built ({str(error).splitlines()[0][:100]})") from None


def read_shape(model: str) -> tuple[ModelShape, dict[str, Any]]:
    """(shape, parsed configuration) of a config JSON or of a folder that holds one."""
    path = Path(model)
    config = read_json(path / "config.json" if path.is_dir() else path)
    name = path.stem if path.suffix == ".json" and path.stem != "config" else path.resolve().name
    return shape_of(meta_model(config), name), config


def shape_of(model: Any, name: str) -> ModelShape:
    """The shape of a model, on the meta device or not."""
    config = model.config
    trained = expert_parameters(model)
    layers: list[dict[str, int]] = [{"linear": 0, "experts": 0, "weights": 0} for _ in range(config.num_hidden_layers)]
    frozen = parameters = outside = 0
    float32_router = config.model_type.startswith("mimo_v2") and config.moe_router_dtype not in ("bfloat16", "bf16")
    for param_name, param in model.named_parameters():
        parameters += param.numel()
        found = _LAYER.search(param_name)
        if param_name in trained:
            assert found is not None, param_name
            layers[int(found[1])]["weights"] += param.numel()
            layers[int(found[1])]["experts"] = param.shape[0]
            continue
        # The loader keeps a router that is stored in float32; everything else becomes BF16.
        frozen += (4 if float32_router and param_name.endswith(".mlp.gate.weight") else 2) * param.numel()
        if found is None:
            outside += param.numel() if param.dim() == 2 else 0
        elif param.dim() == 2:
            layers[int(found[1])]["linear"] += param.numel()
    frozen += sum(b.numel() * b.element_size() for b in model.buffers())
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        layers=tuple(_layer(config, i, counts) for i, counts in enumerate(layers)),
        parameters=parameters,
        frozen_bytes=frozen,
        embedding_and_head=outside,
        trained=tuple(p.numel() for p in trained.values()),
    )


def _layer(config: Any, i: int, counts: dict[str, int]) -> LayerShape:
    heads, kv_heads, qk_dim, v_dim = _attention(config, i)
    experts = counts["experts"]
    if experts:
        inner = counts["weights"] // (experts * 3 * config.hidden_size)
    else:
        inner = config.intermediate_size
    return LayerShape(
        heads=heads,
        kv_heads=kv_heads,
        qk_dim=qk_dim,
        v_dim=v_dim,
        window=_window(config, i),
        sink=config.has_sink(i) if hasattr(config, "has_sink") else config.model_type == "gpt_oss",
        linear=counts["linear"],
        inner=inner,
        experts=experts,
        per_token=config.num_experts_per_tok if experts else 0,
        expert_weights=counts["weights"],
    )


def _attention(config: Any, i: int) -> tuple[int, int, int, int]:
    """(query heads, key-value heads, query/key size, value size) as the attention product sees them."""
    if hasattr(config, "has_sink"):  # MiMo-V2
        return config.heads(i)
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # latent attention, expanded to all heads in training
        return heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size, size


def _window(config: Any, i: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types:
        return window if types[i] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None


def saved_bytes_per_token(layer: LayerShape, hidden: int, row: int) -> tuple[int, int]:
    """(attention's, MLP's) bytes a token that one layer keeps for its backward pass, BF16, weights not counted.

    Frozen linear layers keep nothing. What is kept:
    norm       its float32 input and one statistic                                             4 H + 4
    attention  q, k, v, output in BF16 and the float32 log-sum; keys and values once a query   2 (n q + g q + g v + n v)
               head where there is a sink, and then the BF16 bias of one row too               + 4 n (+ 2 n (S + 1))
    experts    for each of k choices: input, gate and up, silu(gate), their product, output;   k (4 H + 8 I)
               four index arrays of int64 and the float32 weight; two float32 score rows       + 36 k + 8 E
    dense MLP  gate, up and silu(gate)                                                         6 I
    """
    n, g, q, v = layer.heads, layer.heads if layer.sink else layer.kv_heads, layer.qk_dim, layer.v_dim
    norm = 4 * hidden + 4
    attention = norm + 2 * (n * q + g * q + g * v + n * v) + 4 * n + (2 * n * (row + 1) if layer.sink else 0)
    if not layer.experts:
        return attention, norm + 6 * layer.inner
    k = layer.per_token
    return attention, norm + k * (4 * hidden + 8 * layer.inner) + 36 * k + 8 * layer.experts


def activation_bytes(shape: ModelShape, tokens: int, row: int, checkpointing: bool) -> int:
    """Peak bytes of activations of one student micro-batch of `tokens` in rows of `row`.

    kept between forward and backward + what the backward pass of the widest layer makes on top + states and masks:
    kept       with checkpointing the BF16 input of every layer, and one layer recomputed; without, every layer behind
               the first routed experts (`saved_bytes_per_token`)
               (of that one its choices only: k (2 H + 8 I) + 12 k)
    on top     the float32 output of the k choices twice, gradients of input, output and gate_up: k (12 H + 4 I), and
               in a layer with a sink one more copy of its bias, aligned for the kernel
    states     final norm, student, teacher and gradient in BF16: 4 H + 4 + 6 H; one byte a key and kind of mask
    """
    saved = [saved_bytes_per_token(layer, shape.hidden, row) for layer in shape.layers]
    if checkpointing:
        kept = 2 * shape.hidden * len(shape.layers) + max(sum(s) for s in saved)
    else:
        first = shape.first_routed
        k, inner = shape.layers[first].per_token, shape.layers[first].inner
        kept = k * (2 * shape.hidden + 8 * inner) + 12 * k + sum(sum(s) for s in saved[first + 1 :])
    on_top = max(
        layer.per_token * (12 * shape.hidden + 4 * layer.inner) + (2 * layer.heads * (row + 1) if layer.sink else 0)
        for layer in shape.layers
    )
    kinds = len({layer.window for layer in shape.layers})
    return tokens * (kept + on_top + 10 * shape.hidden + 4 + kinds * row)


def kl_bytes(shape: ModelShape) -> int:
    """Peak bytes of the chunked KL: six float32 [chunk, V] at a time, in chunks as `mimo_qat.qat.objective` cuts."""
    return 24 * max(64, 2**26 // shape.vocab) * shape.vocab


def attention_flops(layer: LayerShape, row: int) -> int:
    """Forward FLOPs a token of QK^T and PV when a row of `row` tokens is one document (a shorter one needs less)."""
    seen = layer.window if layer.window and layer.window < row else None
    # sum over queries of min(i + 1, window), divided by the row
    keys = (row + 1) / 2 if seen is None else (seen * (seen + 1) / 2 + (row - seen) * seen) / row
    return math.ceil(2 * layer.heads * (layer.qk_dim + layer.v_dim) * keys)


def flops_per_token(shape: ModelShape, row: int, checkpointing: bool) -> dict[str, int]:
    """FLOPs a trained token: teacher, student forward, student backward, and what checkpointing computes again.

    Backward: input gradients (2 a weight) behind the first routed experts, weight gradients (2 a weight) of the routed
    experts alone, twice the forward of attention, and the head's input gradient, which is made in the forward pass.
    """
    head = 2 * shape.vocab * shape.hidden
    linear = [2 * layer.linear for layer in shape.layers]
    routed = [2 * ly.expert_weights // ly.experts * ly.per_token if ly.experts else 0 for ly in shape.layers]
    attention = [attention_flops(layer, row) for layer in shape.layers]
    body = sum(linear) + sum(routed) + sum(attention)
    behind = slice(shape.first_routed + 1, None)
    # The first routed layer's input has no gradient: its experts need weight gradients and the input gradient of
    # down_proj, which is a third of their weights.
    first = routed[shape.first_routed] // 3
    backward = head + sum(linear[behind]) + 2 * sum(attention[behind]) + sum(routed[behind]) + first + sum(routed)
    return {
        "teacher_forward": body + head,
        "student_forward": body + head,
        "student_backward": backward,
        "recompute": body if checkpointing else 0,
    }
