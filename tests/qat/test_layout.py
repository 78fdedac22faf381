"""The tensor table against published counts and bytes, and against hand-worked small geometries."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_qat.checkpoint import geometry, layout
from mimo_qat.checkpoint.layout import (
    DraftGeometry,
    Geometry,
    LayoutConfig,
    default_drafter_config,
    drafter_tensors,
    files_of,
    target_tensors,
    totals,
)

ROOT = Path(__file__).parents[2]
PRO = ROOT / "recipes/model/mimo-v2.5-pro.json"
FLASH = ROOT / "recipes/model/mimo-v2.5.json"
# metadata.total_size of published indexes less the 459 multimodal tower tensors, which take 1,979,443,200 B in both
# Flash releases (MiMo-V2.5 and MiMo-V2.6-Flash-RL) and 2,067,523,584 B in MiMo-V2.6-Pro-RL.
TOWERS_FLASH, TOWERS_PRO = 1_979_443_200, 2_067_523_584


def spec(specs, name):
    return specs[name].dtype, specs[name].shape


@pytest.mark.parametrize(
    ("path", "experts", "router", "tensors", "size"),
    [
        # MiMo-V2.6-Pro-RL: 160,040 tensors, total_size 566,027,990,784, towers included.
        (PRO, "mxfp4", "bfloat16", 160_040 - 459, 566_027_990_784 - TOWERS_PRO),
        # MiMo-V2.6-Flash-RL: 73,081 tensors, total_size 172,923,364,096.
        (FLASH, "mxfp4", "bfloat16", 73_081 - 459, 172_923_364_096 - TOWERS_FLASH),
        # MiMo-V2.5 (FP8, router in F32): 73,081 tensors, total_size 315,031,102,208.
        (FLASH, "fp8", "float32", 73_081 - 459, 315_031_102_208 - TOWERS_FLASH),
        # MiMo-V2.5-Pro (FP8, router in F32): 159,581 tensors, 962.40 GiB.
        (PRO, "fp8", "float32", 159_581, 1_033_369_538_304),
        # Not published; they differ from the rows above by the router's bytes alone: layers * experts * hidden * 2.
        (PRO, "mxfp4", None, 159_581, 566_027_990_784 - TOWERS_PRO + 69 * 384 * 6144 * 2),
        (FLASH, "fp8", "bfloat16", 72_622, 315_031_102_208 - TOWERS_FLASH - 47 * 256 * 4096 * 2),
    ],
)
def test_published_counts_and_bytes(path, experts, router, tensors, size):
    config = layout.read_json(path) | {"moe_router_dtype": router}
    assert totals(target_tensors(config, experts=experts)) == (tensors, size)


def test_published_parameter_count():
    # A report on MiMo-V2.5-Pro counts 1,023,244,718,976: true parameters and FP8 block scales together.
    specs = target_tensors(layout.read_json(PRO), experts="fp8")
    scales = sum(math.prod(s.shape) for n, s in specs.items() if n.endswith("weight_scale_inv"))
    assert layout.parameters(specs) + scales == 1_023_244_718_976
    assert layout.parameters(target_tensors(layout.read_json(PRO))) == layout.parameters(specs)


def test_published_shapes():
    pro, flash = (target_tensors(layout.read_json(p)) for p in (PRO, FLASH))
    assert spec(pro, "model.layers.1.self_attn.qkv_proj.weight") == ("F8_E4M3", (27136, 6144))
    assert spec(pro, "model.layers.1.self_attn.qkv_proj.weight_scale_inv") == ("F32", (216, 48))
    assert spec(flash, "model.layers.0.self_attn.qkv_proj.weight_scale_inv") == ("F32", (108, 32))
    assert spec(flash, "model.layers.1.self_attn.qkv_proj.weight") == ("F8_E4M3", (14848, 4096))
    assert spec(flash, "model.mtp.layers.2.self_attn.qkv_proj.weight_scale_inv") == ("F32", (116, 32))
    assert spec(pro, "model.layers.69.mlp.experts.383.down_proj.weight") == ("U8", (6144, 1024))
    assert spec(pro, "model.layers.69.mlp.experts.383.down_proj.weight_scale") == ("U8", (6144, 64))
    assert spec(pro, "model.layers.1.self_attn.o_proj.weight") == ("BF16", (6144, 16384))
    assert spec(pro, "model.layers.3.mlp.gate.weight") == ("F32", (384, 6144))
    assert spec(pro, "model.mtp.layers.0.eh_proj.weight") == ("BF16", (6144, 12288))
    sinks = [n for n in pro if n.endswith("attention_sink_bias") and ".mtp." not in n]
    assert len(sinks) == 60 and "model.layers.7.self_attn.attention_sink_bias" not in sinks
    assert sum(".mtp." in n for n in pro) == sum(".mtp." in n for n in flash) == 48


@pytest.mark.parametrize(("path", "files", "last"), [(PRO, 128, 3), (FLASH, 64, 4)])
def test_expert_files(path, files, last):
    by_file = files_of(target_tensors(layout.read_json(path)))
    assert set(by_file) == {f"model_pp0_ep{i}_shard0.safetensors" for i in range(files)} | {"model_mtp.safetensors"}
    tail = {int(s.name.split(".")[5]) for s in by_file[f"model_pp0_ep{files - 1}_shard0.safetensors"]}
    assert tail == set(range(files * last - last, files * last))
    assert any(s.name == "lm_head.weight" for s in by_file["model_pp0_ep0_shard0.safetensors"])


def test_six_tensors_of_an_expert_are_adjacent():
    names = [s.name for s in files_of(target_tensors(layout.read_json(FLASH)))["model_pp0_ep5_shard0.safetensors"]]
    at = names.index("model.layers.10.mlp.experts.21.down_proj.weight")
    assert [n.split("experts.21.")[1] for n in names[at : at + 6]] == [
        f"{p}_proj.{end}" for p in ("down", "gate", "up") for end in ("weight", "weight_scale")
    ]


def test_drafter_tables():
    flash = drafter_tensors(default_drafter_config(layout.read_json(FLASH)))
    # dflash/model.safetensors.index.json and the file size of MiMo-V2.5-DFlash: the header depends on every name.
    assert totals(flash) == (63, 2_936_114_304)
    header = layout.header_bytes(layout.file_order(flash.values()))
    assert len(header) + totals(flash)[1] == 2_936_121_080
    pro = drafter_tensors(default_drafter_config(layout.read_json(PRO)))
    assert totals(pro) == (63, 5_536_632_576)
    assert len({s.file for s in pro.values()}) == 2 and len({s.file for s in flash.values()}) == 1
    assert spec(pro, "fc.weight") == ("BF16", (6144, 30720))
    assert spec(pro, "layers.4.self_attn.attention_sink_bias") == ("BF16", (128,))


def test_default_drafter_config_taps_published_layers():
    pro, flash = (default_drafter_config(layout.read_json(p)) for p in (PRO, FLASH))
    assert pro["dflash_config"]["target_layer_ids"] == [0, 15, 31, 47, 69]
    assert flash["dflash_config"]["target_layer_ids"] == [0, 11, 23, 35, 47]
    assert (pro["num_attention_heads"], pro["num_key_value_heads"], pro["head_dim"]) == (128, 8, 128)
    g = DraftGeometry.from_config(flash)
    assert (g.rotary_dim, g.sliding_window, g.causal, g.sinks, g.value_scale) == (64, 1024, False, True, 0.612)
    assert (g.block_size, g.rope_theta, g.vocab_size) == (8, 10000.0, 152576)


def test_drafter_taps_of_a_small_model(tiny_config):
    g = Geometry.from_config(tiny_config)
    assert layout.default_drafter_config(tiny_config)["dflash_config"]["target_layer_ids"] == [0, 1, 2, 3]
    assert geometry.default_target_layer_ids(g, taps=2) == [0, 3]
    assert geometry.default_target_layer_ids(g, taps=1) == [2]  # the middle layer


def test_small_geometry_has_ceiled_blocks():
    # SmolLM2-135M as a MiMo-V2: hidden 576 = 4.5 blocks, 3 chunks of (3 + 1 + 1) * 64 = 320 rows = 2.5 blocks.
    config = layout.read_json(FLASH) | {
        "hidden_size": 576, "num_hidden_layers": 2, "vocab_size": 49152, "intermediate_size": 1536,
        "moe_intermediate_size": 1536, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "v_head_dim": 64,
        "swa_num_attention_heads": None, "swa_num_key_value_heads": None, "swa_head_dim": None, "swa_v_head_dim": None,
        "hybrid_layer_pattern": [0, 0], "moe_layer_freq": [0, 1], "partial_rotary_factor": 1.0,
        "tie_word_embeddings": True, "num_nextn_predict_layers": None,
    }  # fmt: skip
    specs = target_tensors(config)
    assert spec(specs, "model.layers.0.self_attn.qkv_proj.weight") == ("F8_E4M3", (960, 576))
    assert spec(specs, "model.layers.0.self_attn.qkv_proj.weight_scale_inv") == ("F32", (9, 5))
    assert spec(specs, "model.layers.0.mlp.down_proj.weight_scale_inv") == ("F32", (5, 12))
    assert spec(specs, "model.layers.1.mlp.experts.3.gate_proj.weight") == ("U8", (1536, 288))
    assert spec(specs, "model.layers.1.mlp.experts.3.gate_proj.weight_scale") == ("U8", (1536, 18))
    assert "lm_head.weight" not in specs and not any(".mtp." in n for n in specs)
    assert set(files_of(specs)) == {"model_pp0_ep0_shard0.safetensors"}
    assert default_drafter_config(config)["head_dim"] == 64


def test_layer_lists_and_dialects(tiny_config):
    config = tiny_config | {"moe_layer_freq": [0, 0, 1, 1], "moe_router_dtype": "bfloat16"}
    bf16 = target_tensors(config, experts="bf16", spine="bf16", mtp_layers=2)
    assert spec(bf16, "model.layers.1.mlp.up_proj.weight") == ("BF16", (160, 96))
    assert spec(bf16, "model.layers.2.mlp.gate.weight") == ("BF16", (8, 96))
    assert spec(bf16, "model.layers.2.mlp.gate.e_score_correction_bias") == ("F32", (8,))
    assert not any("scale" in n for n in bf16)
    assert {s.file for s in bf16.values()} == {"model-00001-of-00001.safetensors"}
    assert layout.detect_format(bf16) == ("bf16", "bf16", 2)
    fp8 = target_tensors(config, experts="fp8", mtp_layers=1)
    assert spec(fp8, "model.layers.2.mlp.experts.0.down_proj.weight_scale_inv") == ("F32", (1, 1))
    assert layout.detect_format(fp8) == ("fp8", "fp8", 1)
    split = target_tensors(config | {"attention_projection_layout": "split"})
    assert spec(split, "model.layers.1.self_attn.k_proj.weight") == ("F8_E4M3", (4 * 48, 96))
    assert spec(split, "model.layers.1.self_attn.v_proj.weight_scale_inv") == ("F32", (1, 1))
    assert layout.detect_format(split) == ("mxfp4", "fp8", 0)


def test_qkv_rows_of_unequal_heads(tiny_config):
    g = Geometry.from_config(tiny_config)
    assert g.qkv_chunks == 2
    assert g.qkv_rows(0) == (2 * 48, 1 * 48, 1 * 32)  # full attention: 4 query and 2 key-value heads
    assert g.qkv_rows(1) == (2 * 48, 2 * 48, 2 * 32)  # sliding window: 4 and 4, in the same two chunks
    specs = target_tensors(tiny_config)
    assert spec(specs, "model.layers.0.self_attn.qkv_proj.weight_scale_inv") == ("F32", (2 * 2, 1))


def test_hf_shards_respect_the_limit(tiny_config):
    specs = layout.hf_shards(target_tensors(tiny_config, experts="bf16", spine="bf16"), 200_000)
    for members in files_of(specs).values():
        assert sum(s.nbytes for s in members) <= 200_000 or len(members) == 1
    last = sorted(files_of(specs))[-1]
    assert last == f"model-{len(files_of(specs)):05d}-of-{len(files_of(specs)):05d}.safetensors"


def test_quantization_config_is_the_published_one():
    for path, entries in ((PRO, 71), (FLASH, 49)):
        config = layout.read_json(path)
        assert config["quantization_config"] == layout.quantization_config(config)
        ignored = config["quantization_config"]["ignored_layers"]
        assert len(ignored) == entries and ignored[-1] == "model.decoder.self_attn.o_proj"
    bf16 = layout.ignored_layers(layout.read_json(PRO), "bf16")
    for name in ("model.layers.69.self_attn.qkv_proj", "model.layers.0.mlp.gate_proj", "model.mtp.layers.2.eh_proj"):
        assert name in bf16 and name not in layout.ignored_layers(layout.read_json(PRO))
    assert len(bf16) == len(set(bf16)) and not any(".experts." in n for n in bf16)


def test_layout_does_not_import_torch():
    code = "import sys, mimo_qat.checkpoint.layout; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layernorm_epsilon": None}, "layernorm_epsilon"),
        ({"hidden_size": "96"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"rope_theta": None}, "rope_theta"),
        ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern"),
        ({"moe_layer_freq": [0, 1, 1, 2]}, "moe_layer_freq"),
        ({"moe_router_dtype": "float16"}, "moe_router_dtype"),
        ({"num_attention_heads": 3}, "3 query heads"),
        ({"partial_rotary_factor": 0.32}, "partial_rotary_factor"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"sliding_window": None}, "sliding_window"),
        ({"swa_window_convention": "vllm"}, "swa_window_convention"),
        ({"moe_intermediate_size": 48}, "multiple of 32"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "fused-QKV"),
    ],
)
def test_impossible_configs_are_named(tiny_config, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        target_tensors(tiny_config | change)
    assert "\n" not in str(caught.value)


def test_window_convention(tiny_config):
    assert Geometry.from_config(tiny_config).sliding_window == 8
    assert Geometry.from_config(tiny_config | {"swa_window_convention": "sglang"}).sliding_window == 9
    full = {"hybrid_layer_pattern": [0] * 4, "sliding_window": None}
    assert Geometry.from_config(tiny_config | full).sliding_window is None


# The drafter config of MiMo-V2.5-Pro-FP4-DFlash as published (keys that say nothing about shapes left out).
V25_PRO_DRAFTER = {
    "architectures": ["DFlashDraftModel"], "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 5,
    "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "v_head_dim": 128, "num_target_layers": 70,
    "vocab_size": 152064, "partial_rotary_factor": 0.5, "rope_theta": 10000, "sliding_window": 1024,
    "rms_norm_eps": 1e-05, "block_size": 8,
    "dflash_config": {"target_layer_ids": [0, 15, 31, 47, 69], "mask_token_id": 151669, "block_size": 8,
                      "use_swa": True, "swa_window_size": 1024, "backbone_rotary_base": 5000000,
                      "attention_value_scale": 0.612, "attention_sink_bias": True},
}  # fmt: skip


def test_published_drafter_configs_are_read():
    old = DraftGeometry.from_config(V25_PRO_DRAFTER)
    assert (old.sliding_window, old.causal, old.rotary_dim, old.mask_token_id) == (1024, False, 64, 151669)
    inner = {k: v for k, v in V25_PRO_DRAFTER["dflash_config"].items() if not k.startswith(("use", "swa", "back"))}
    new = V25_PRO_DRAFTER | {
        "dflash_config": inner,
        "layer_types": ["sliding_attention"] * 5,
        "use_sliding_window": True,
        "is_causal": False,
        "add_swa_attention_sink_bias": True,
    }
    assert DraftGeometry.from_config(new) == old


def test_release_drafter_config_is_a_superset():
    out = geometry.release_drafter_config(V25_PRO_DRAFTER, 152576)
    assert out["vocab_size"] == 152576
    assert out["is_causal"] is False and out["dflash_config"]["causal"] is False
    assert out["layer_types"] == ["sliding_attention"] * 5 and out["use_sliding_window"] is True
    assert out["dflash_config"]["use_swa"] is True and out["dflash_config"]["swa_window_size"] == 1024
    assert out["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}
    assert out["partial_rotary_factor"] == 0.5 and "backbone_rotary_base" not in out["dflash_config"]
    assert geometry.release_drafter_config(out, 152576) == out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True, "dflash_config": {**V25_PRO_DRAFTER["dflash_config"], "causal": False}}, "causal"),
        ({"block_size": 16}, "block_size"),
        ({"dflash_config": None}, "target_layer_ids"),
        ({"dflash_config": [1]}, "objects"),
        ({"rope_parameters": {"rope_theta": 1e7}}, "rope_theta"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "mixes"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_contradicting_drafter_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DraftGeometry.from_config(V25_PRO_DRAFTER | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1,}', "not strict JSON"),
        ("[1]", "not an object"),
        ("[" * 100_000, "not strict JSON"),
        ("", "not strict JSON"),
    ],
)
def test_json_is_read_strictly(text, message):
    with pytest.raises(ValueError, match=message):
        geometry.parse_json(text, "file")


def test_trailing_commas_are_dropped_outside_strings_only():
    assert geometry.drop_trailing_commas('{"a": [1, 2, ], "b": ",}" ,}') == '{"a": [1, 2 ], "b": ",}" }'


def test_report_counts_what_it_lists(capsys):
    doc = layout.main(LayoutConfig(config_json=str(FLASH), drafter=True, list=True, router_dtype="bfloat16"))
    lines = capsys.readouterr().out.splitlines()
    assert doc["tensors"] == 72_622 and doc["drafter"]["tensors"] == 63
    assert len(lines) == 72_622 + 63
    assert "model.layers.1.mlp.gate.weight BF16 [256,4096] model_pp0_ep0_shard0.safetensors" in lines
    assert sum(row["bytes"] for row in doc["by_dtype"].values()) == doc["bytes"]
    assert sum(row["tensors"] for row in doc["by_family"].values()) == doc["tensors"]


def test_report_of_a_drafter_config(tmp_path, tiny_config, capsys):
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps(default_drafter_config(tiny_config)))
    doc = layout.main(LayoutConfig(config_json=str(tmp_path)))
    assert doc["drafter"]["tensors"] == 63 and doc["drafter"]["files"] == 1
