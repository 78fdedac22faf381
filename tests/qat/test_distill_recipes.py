"""The drafters that recipes/distill describes, built without weights and compared with the published files."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from mimo_qat.checkpoint.geometry import DraftGeometry, default_drafter_config
from mimo_qat.checkpoint.layout import drafter_tensors
from mimo_qat.distill.config import DistillConfig
from mimo_qat.distill.start import draft_config
from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
from mimo_qat.models.modeling_dflash import DFlashDraftModel

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name):
    values = yaml.safe_load((RECIPES / "distill" / f"{name}.yaml").read_text())
    return DistillConfig(target="t", data="d", output_dir="o", **values)


def on_meta(config, target, mask_token_id):
    with torch.device("meta"):
        return DFlashDraftModel(draft_config(config, target, mask_token_id))


def tensors_of(drafter):
    return {n: tuple(p.shape) for n, p in drafter.named_parameters() if n != "mask_embedding"}


@pytest.mark.parametrize(
    "name, taps, mask, heads, header",
    [
        # The published file of MiMo-V2.5 has 2,936,121,080 bytes: the weights, the header and its 8-byte length.
        ("mimo_v2.5", [0, 11, 23, 35, 47], 151675, 64, 2_936_121_080),
        ("mimo_v2.5_pro", [0, 15, 31, 47, 69], 151669, 128, None),
    ],
)
def test_a_recipe_for_a_published_model_makes_the_published_drafter(name, taps, mask, heads, header):
    source = json.loads((RECIPES / "model" / (name.replace("_", "-") + ".json")).read_text())
    config = recipe(name)
    drafter = on_meta(config, MiMoV2Config(**source), config.mask_token_id)
    values, tensors = drafter.config.published(), tensors_of(drafter)
    # The layout comes from other code: from the target's config alone, and from what this drafter would write.
    default = default_drafter_config(source, mask_token_id=mask)
    for other in (values, default):
        assert {n: s.shape for n, s in drafter_tensors(other).items()} == tensors
    mine, theirs = (vars(DraftGeometry.from_config(v)) for v in (values, default))
    assert mine == theirs
    assert len(tensors) == 63 and tensors["fc.weight"] == (source["hidden_size"], 5 * source["hidden_size"])
    assert (values["target_layer_ids"], values["mask_token_id"], values["block_size"]) == (taps, mask, 8)
    assert tensors["layers.4.self_attn.attention_sink_bias"] == (heads,)
    size = sum(p.numel() for n, p in drafter.named_parameters() if n != "mask_embedding")
    text = (RECIPES / "distill" / f"{name}.yaml").read_text()
    assert re.search(r"# drafter: (\d+) tensors, (\d+) parameters", text).groups() == ("63", str(size))
    assert f"{2 * size / 1e9:.2f} GB" in text
    assert header is None or 63 * 80 < header - 2 * size < 63 * 160


def test_the_default_recipe_makes_a_small_drafter_with_a_head(tiny_config):
    """For SmolLM2's sizes: hidden 576, nine heads, a vocabulary of 49,152."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    sizes |= {"partial_rotary_factor": 1.0}
    heads = {"head_dim": 64, "v_head_dim": 64, "vocab_size": 49152}
    layers = {"num_hidden_layers": 6, "hybrid_layer_pattern": [0] * 6, "moe_layer_freq": [1] * 6}
    config = recipe("default")
    drafter = on_meta(config, MiMoV2Config(**tiny_config | sizes | heads | layers), 17)
    assert {n: s.shape for n, s in drafter_tensors(drafter.config.published()).items()} == tensors_of(drafter)
    assert drafter.config.published()["architectures"] == ["DFlash2DraftModel"]
    held = sum(p.numel() for n, p in drafter.named_parameters() if n.startswith("layers."))
    assert held == pytest.approx(5 * 3.7e6, rel=0.05)
    assert {config.objective(step).loss for step in (0, config.max_steps - 1)} == {"dpace"}
    # Whole tiles: the block mask follows from the anchors (blocks.block_sparse_mask).
    assert config.max_length % 128 == 0 and config.num_anchors * config.block_size % 128 == 0
