"""Small drafters and inputs for their tests."""

import torch

from mimo_qat.distill.blocks import blocks_at
from mimo_qat.distill.start import HEAD_PARTS
from mimo_qat.distill.train import draft_rows
from mimo_qat.models.modeling_dflash import DFlashConfig, DFlashDraftModel

BLOCK, HIDDEN, TAPS = 4, 32, 3
HEAD = {"conv_kernel_size": 2, "selector_rank": 5, "selector_top_k": 4}


def config(**changes):
    values = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "target_layer_ids": [0, 2, 3],
        "num_target_layers": 4,
        "block_size": BLOCK,
        "mask_token_id": 63,
        "is_causal": False,
        "use_sliding_window": True,
        "sliding_window": 6,
        "attention_value_scale": 0.612,
        "attention_sink_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "initializer_range": 0.3,
    }
    return DFlashConfig(**values | changes)


def drafter(seed=0, **changes):
    torch.manual_seed(seed)
    model = DFlashDraftModel(config(**changes)).float().eval()
    with torch.no_grad():
        model.mask_embedding.normal_()
        for layer in model.layers:
            if layer.self_attn.attention_sink_bias is not None:
                layer.self_attn.attention_sink_bias.normal_()
        for name, parameter in model.named_parameters():
            if any(part in name for part in HEAD_PARTS):
                parameter.normal_(std=0.3 if "selector" in name else 0.1)
    return model


def sequence(length=24, seed=1):
    """ids, embedding table, and stand-ins for the target's taps [1, length, TAPS * HIDDEN]."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (1, length), generator=g)
    embed = torch.nn.Embedding(64, HIDDEN)
    embed.weight.data = torch.randn(64, HIDDEN, generator=g)
    return ids, embed, torch.randn(1, length, TAPS * HIDDEN, generator=g)


def training_rows(model, ids, embed, taps, anchors, positions=None):
    length = ids.shape[1]
    batch = {
        "input_ids": ids,
        "loss_mask": torch.ones_like(ids),
        "doc_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(length)[None] if positions is None else positions,
    }
    anchors = torch.tensor([anchors])
    blocks = blocks_at(batch, anchors, torch.ones_like(anchors, dtype=torch.bool), BLOCK)
    with torch.no_grad():
        return draft_rows(model, embed, ids, blocks, taps)[0]
