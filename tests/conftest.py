"""Shared fixtures: a tiny MiMo-V2 geometry that has every feature of the published ones."""

import pytest

TINY = {
    "model_type": "mimo_v2",
    "architectures": ["MiMoV2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "head_dim": 48,
    "v_head_dim": 32,
    "swa_head_dim": 48,
    "swa_v_head_dim": 32,
    "hybrid_layer_pattern": [0, 1, 1, 0],
    "moe_layer_freq": [0, 1, 1, 1],
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "partial_rotary_factor": 0.334,
    "rope_theta": 10000000,
    "swa_rope_theta": 10000,
    "attention_value_scale": 0.612,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_projection_layout": "fused_qkv",
    "n_routed_experts": 8,
    "n_shared_experts": None,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "hidden_act": "silu",
    "layernorm_epsilon": 1e-5,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
}


@pytest.fixture
def tiny_config() -> dict:
    """config.json of the tiny model, as a fresh dictionary."""
    return {k: list(v) if isinstance(v, list) else v for k, v in TINY.items()}


@pytest.fixture
def tiny_model(tiny_config):
    """A random tiny model in float32, evaluation mode, seed 0, with sinks and router bias that matter."""
    import torch

    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
    from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM

    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(MiMoV2Config(**tiny_config)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("attention_sink_bias"):
                tensor.copy_(torch.randn_like(tensor))
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model
