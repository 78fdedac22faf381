"""A sound folder is clean; every fault is found, under its name, and none of them is a traceback."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimo_kernels import mxfp4
from mimo_qat.checkpoint import layout
from mimo_qat.checkpoint.check import CheckConfig, main
from mimo_qat.checkpoint.findings import KINDS
from mimo_qat.checkpoint.reader import Checkpoint
from mimo_qat.checkpoint.values import block_amax
from mimo_qat.checkpoint.writer import write_bf16_folder, write_index
from mimo_qat.convert import ConvertConfig
from mimo_qat.convert import main as convert

QKV = "model.layers.1.self_attn.qkv_proj"
EXPERT = "model.layers.1.mlp.experts.0.up_proj"


def check(folder, samples=-1, deep=True):
    document = main(CheckConfig(folder=str(folder), samples=samples, deep=deep))
    json.dumps(document)  # it is the command's last line
    return document, {f["name"]: f for f in document["findings"]}


def test_a_release_is_clean(release, capsys):
    document, found = check(release.path)
    assert found == {} and document["ok"] and document["errors"] == 0
    assert (document["experts"], document["spine"], document["mtp_layers"]) == ("mxfp4", "fp8", 1)
    assert document["expert_tensors"] == 3 * 8 * 6 and document["tensors"] == 197
    assert document["scale_rule"] == "even" and document["rules_that_fit"] == ["even", "floor", "mse"]
    assert document["max_code_share"]["4"] + document["max_code_share"]["6"] == 1
    assert document["tokenizer_size"] == 500
    assert document["drafter"]["tensors"] == 27 and document["drafter"]["mask_token_id"] == 511
    assert "0 errors, 0 warnings, 0 notes" in capsys.readouterr().out


def test_sources_are_clean(bf16_folder, drafter_folder):
    document, found = check(bf16_folder.path)
    assert document["ok"] and set(found) == {"attention-chunk", "qkv-bf16"} and document["experts"] == "bf16"
    assert {f["severity"] for f in found.values()} == {"note"}  # every published config has the chunk's key
    document, found = check(drafter_folder.path)
    assert document["ok"] and set(found) == {"drafter-code"}


def flipped(folder, name):
    return Checkpoint(folder).raw(name).clone()


def drop_scale_inv(folder):
    return {QKV + ".weight_scale_inv": None}


def wrong_shape(folder):
    return {"model.norm.weight": torch.zeros(95, dtype=torch.bfloat16)}


def wrong_dtype(folder):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    return {name: flipped(folder, name).bfloat16()}


def merged_drafter(folder):
    return {"fc.weight": torch.zeros(2)}


def nan_scale(folder):
    scale = flipped(folder, EXPERT + ".weight_scale")
    scale[3, 1] = 255
    return {EXPERT + ".weight_scale": scale}


def minus_zero(folder):
    packed = flipped(folder, EXPERT + ".weight")
    packed[0, 0] = 0x88
    return {EXPERT + ".weight": packed}


def global_order(folder):
    """The fused rows as [Q | K | V] instead of chunk by chunk: what a re-export that loses the order would hold."""
    rows = flipped(folder, QKV + ".weight").view(torch.uint8).view(2, 256, 96)
    return {QKV + ".weight": torch.cat((rows[:, 128:], rows[:, :128]), 1).flatten(0, 1).view(torch.float8_e4m3fn) * 1}


def short_blocks(folder):
    codes = flipped(folder, QKV + ".weight").view(torch.uint8)
    codes[(codes & 0x7F) == 0x7E] -= 1
    return {QKV + ".weight": codes.view(torch.float8_e4m3fn)}


def short_dense_blocks(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    codes = flipped(folder, name).view(torch.uint8)
    codes[(codes & 0x7F) == 0x7E] -= 1
    return {name: codes.view(torch.float8_e4m3fn)}


def nan_codes(folder):
    codes = flipped(folder, QKV + ".weight").view(torch.uint8)
    codes[0, 0] = 0x7F
    return {QKV + ".weight": codes.view(torch.float8_e4m3fn)}


def negative_scale(folder):
    scale = flipped(folder, QKV + ".weight_scale_inv")
    return {QKV + ".weight_scale_inv": -scale}


def infinite_norm(folder):
    return {"model.norm.weight": torch.full((96,), float("inf"), dtype=torch.bfloat16)}


def lost_norm(folder):
    return {"model.norm.weight": None}


def extra_tensor(folder):
    return {"model.layers.1.mlp.shared.weight": torch.zeros(2)}


def float_norm(folder):
    return {"model.norm.weight": flipped(folder, "model.norm.weight").float()}


def float_scale(folder):
    return {EXPERT + ".weight_scale": torch.exp2(flipped(folder, EXPERT + ".weight_scale").float() - 127)}


def renamed_scale(folder):
    scale = flipped(folder, EXPERT + ".weight_scale")
    return {EXPERT + ".weight_scale": None, EXPERT + ".weight_scale_inv": scale}


def tensor_scale(folder):
    return {EXPERT + ".input_scale": torch.ones(1)}


def doubled_kv_heads(folder):
    """The rows of 2x the key-value heads on a full-attention layer, as a library's formula has them."""
    name = "model.layers.0.self_attn.qkv_proj.weight"
    codes = flipped(folder, name).view(torch.uint8)
    return {name: torch.cat((codes, codes[:160])).view(torch.float8_e4m3fn)}


def scale_rows_of_one_grid(folder):
    """3 = ceil(352 / 128) rows instead of 2 chunks x 2."""
    name = "model.layers.0.self_attn.qkv_proj.weight_scale_inv"
    return {name: flipped(folder, name)[:3].clone()}


def quantized_o_proj(folder):
    name = "model.layers.1.self_attn.o_proj.weight"
    return {name: flipped(folder, name).to(torch.float8_e4m3fn)}


def sink_on_a_full_layer(folder):
    return {"model.layers.0.self_attn.attention_sink_bias": torch.zeros(4, dtype=torch.bfloat16)}


def renamed_mtp_norm(folder):
    prefix = "model.mtp.layers.0."
    norm = flipped(folder, prefix + "pre_mlp_layernorm.weight")
    return {prefix + "pre_mlp_layernorm.weight": None, prefix + "post_attention_layernorm.weight": norm}


def library_sinks(folder):
    name = "model.layers.1.self_attn."
    return {name + "attention_sink_bias": None, name + "sinks": torch.zeros(4, dtype=torch.bfloat16)}


def stacked_experts(folder):
    names = [n for n in Checkpoint(folder).names if ".mlp.experts." in n]
    return dict.fromkeys(names) | {"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 96, 64).bfloat16()}


def same_expert_twice(folder):
    ends = (".weight", ".weight_scale")
    return {EXPERT.replace("s.0.", "s.5.") + end: flipped(folder, EXPERT + end) for end in ends}


def dead_expert(folder):
    return {EXPERT + ".weight": torch.zeros_like(flipped(folder, EXPERT + ".weight"))}


def dead_rows(folder):
    codes = flipped(folder, EXPERT + ".weight")
    codes[1:] = 0
    return {EXPERT + ".weight": codes}


def wide_scales(folder):
    scale = flipped(folder, EXPERT + ".weight_scale")
    scale[0, 0] -= 20
    return {EXPERT + ".weight_scale": scale}


@pytest.mark.parametrize(
    ("damage", "name", "part"),
    [
        (wide_scales, "scale-span", "powers of two"),
        (lost_norm, "missing", "model.norm.weight"),
        (extra_tensor, "unknown", "shared.weight"),
        (float_norm, "dtype", "model.norm.weight is F32, expected BF16"),
        (float_scale, "scale-dtype", EXPERT),
        (renamed_scale, "scale-name", EXPERT + ".weight_scale_inv"),
        (renamed_scale, "scale-missing", EXPERT + ".weight_scale"),
        (tensor_scale, "extra-scales", "input_scale"),
        (doubled_kv_heads, "qkv-rows", "[512, 96], expected [352, 96]"),
        (scale_rows_of_one_grid, "qkv-scale-rows", "[3, 1], expected [4, 1]"),
        (quantized_o_proj, "o-proj-dtype", "o_proj.weight is F8_E4M3, expected BF16"),
        (sink_on_a_full_layer, "layer-pattern", "layers.0.self_attn.attention_sink_bias"),
        (renamed_mtp_norm, "mtp-tensors", "pre_mlp_layernorm"),
        (library_sinks, "library-names", "self_attn.sinks"),
        (stacked_experts, "library-names", "mlp.experts.down_proj"),
        (same_expert_twice, "duplicate-experts", f"{EXPERT.replace('s.0.', 's.5.')}.weight = {EXPERT}.weight"),
        (dead_expert, "dead-experts", EXPERT),
        (dead_rows, "dead-blocks", "blocks are all zero"),
        (drop_scale_inv, "scale-missing", QKV + ".weight_scale_inv"),
        (wrong_shape, "shape", "model.norm.weight is [95], expected [96]"),
        (wrong_dtype, "router-bias-dtype", "e_score_correction_bias is BF16, expected F32"),
        (merged_drafter, "drafter-in-index", "fc.weight"),
        (nan_scale, "scale-nan", EXPERT),
        (minus_zero, "minus-zero", "2 codes"),
        (short_blocks, "qkv-block-amax", QKV),
        (short_dense_blocks, "fp8-block-amax", "mlp.up_proj"),
        (nan_codes, "fp8-nan", QKV),
        (negative_scale, "fp8-scale", QKV),
        (infinite_norm, "not-finite", "model.norm.weight"),
    ],
)
def test_damaged_tensors_are_found(release, rewrite, damage, name, part):
    rewrite(release.path, damage(release.path))
    document, found = check(release.path)
    assert part in found[name]["what"]
    assert document["ok"] is (found[name]["severity"] != "error" and document["errors"] == 0)
    assert found[name]["causes"] and found[name]["remedy"]


def test_block_amax_detects_a_wrong_row_map():
    # Two chunks of 192 rows: with the grid over all 384 rows, the block of rows 128..255 would mix both chunks.
    codes = torch.zeros(384, 128, dtype=torch.uint8)
    codes[[5, 130, 200, 330], 7] = 0x7E
    assert block_amax(codes, 192).tolist() == [[0x7E]] * 4
    codes[200, 7] = 0x7D
    assert (block_amax(codes, 192) == 0x7E).sum() == 3


@pytest.mark.parametrize(
    ("file", "changes", "name", "part"),
    [
        ("config.json", {"layernorm_epsilon": None, "rms_norm_eps": 1e-5}, "norm-epsilon", "no layernorm_epsilon"),
        ("config.json", {"rms_norm_eps": 1e-6}, "norm-epsilon", "rms_norm_eps is 1e-06, layernorm_epsilon 1e-05"),
        ("config.json", {"rope_theta": None}, "rope-theta", "no rope_theta"),
        ("config.json", {"attention_chunk_size": 128}, "attention-chunk", "is 128"),
        ("config.json", {"sliding_window_size": 9}, "window-keys", "is 8, sliding_window_size 9"),
        ("config.json", {"model_type": "mimo_v2_flash"}, "architecture", "'mimo_v2_flash'"),
        ("config.json", {"conversion_metadata": {"qkv_layout": "global_q_k_v"}}, "qkv-order", "global_q_k_v"),
        ("config.json", {"num_nextn_predict_layers": None}, "mtp-unstated", "1 MTP blocks"),
        ("config.json", {"quantization_config": {"ignored_layers": ["lm_head"]}}, "ignored-layers-extra", "lm_head"),
        ("config.json", {"hybrid_layer_pattern": [1, 0, 0, 1]}, "layer-pattern", "attention_sink_bias"),
        ("config.json", {"swa_num_key_value_heads": 2}, "qkv-rows", "self_attn.qkv_proj.weight is"),
        ("model.safetensors.index.json", {"metadata": {"scale_rule": "rceil"}}, "scale-rule", "'rceil'"),
        ("dflash/config.json", {"is_neox_style": False}, "drafter-neox", "False"),
        ("dflash/config.json", {"architectures": ["DFlash2DraftModel"]}, "drafter-class", "those of DFlashDraftModel"),
        ("dflash/config.json", {"num_speculative_tokens": 8}, "drafter-draft-length", "8, block_size 8"),
        ("dflash/config.json", {"rope_theta": 1e7, "rope_parameters": None}, "drafter-rope-theta", "1e+07"),
        ("config.json", {"quantization_config": None}, "quantization-config", "has none"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantization-config", "store_dtype is None"),
        ("config.json", {"quantization_config": {"ignored_layers": []}}, "ignored-layers-lack", "5: model.layers.0"),
        ("config.json", {"num_nextn_predict_layers": 3}, "mtp-count", "is 3, the folder holds 1"),
        ("config.json", {"hybrid_layer_pattern": None}, "layer-list", "hybrid_layer_pattern"),
        ("config.json", {"swiglu_limit": 7.0}, "activation", "swiglu_limit 7.0"),
        ("config.json", {"hidden_act": "gelu"}, "activation", "gelu"),
        ("config.json", {"vision_config": {"depth": 1}}, "towers", "vision_config"),
        ("config.json", {"auto_map": {"AutoModel": "absent.Class"}}, "remote-code", "absent.py"),
        ("config.json", {"auto_map": 3}, "unreadable", "model_keys"),
        ("config.json", {"moe_router_dtype": "bfloat16"}, "router-dtype", "mlp.gate.weight is F32, expected BF16"),
        ("config.json", {"layernorm_epsilon": None}, "unreadable", "layernorm_epsilon"),
        ("config.json", {"vocab_size": 400}, "tokenizer-size", "500 ids"),
        ("config.json", {"num_key_value_heads": "2"}, "unreadable", "num_key_value_heads"),
        ("model.safetensors.index.json", {"metadata": {}}, "index-tp-size", "None, expected 2"),
        ("model.safetensors.index.json", {"metadata": {"total_size": 5}}, "index-total-size", "is 5"),
        ("model.safetensors.index.json", {"metadata": {"save_format": "fp8"}}, "index-save-format", "'fp8'"),
        ("model.safetensors.index.json", {"metadata": [1]}, "index-total-size", "None"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../b"}}, "unreadable", "../b"),
        ("tokenizer.json", {"model": [1]}, "unreadable", "tokenizer"),
        ("tokenizer.json", {"added_tokens": [{"content": "<|MASK|>", "id": 600}]}, "drafter-mask-id", "is 600"),
        ("dflash/config.json", {"vocab_size": 520}, "drafter-vocab", "vocab_size 520, target 512"),
        ("dflash/config.json", {"is_causal": None}, "drafter-causal", "is_causal"),
        ("dflash/config.json", {"rope_parameters": None}, "drafter-rotary", "16 of 32"),
        ("dflash/config.json", {"layer_types": None}, "drafter-window", "layer_types"),
        ("dflash/config.json", {"num_target_layers": 70}, "drafter-target", "num_target_layers 70"),
        ("dflash/config.json", {"hidden_size": 64}, "drafter-target", "hidden_size 64"),
        ("dflash/config.json", {"num_hidden_layers": 3}, "drafter-tensors", "missing 12: layers.2"),
        ("dflash/config.json", {"block_size": 9}, "unreadable", "block_size"),
        ("dflash/config.json", {"head_dim": None}, "unreadable", "head_dim"),
        ("conversion.json", {"files": {"config.json": {"bytes": 1}}}, "manifest", "config.json"),
    ],
)
def test_wrong_configurations_are_found(release, edit_json, file, changes, name, part):
    edit_json(release.path / file, changes)
    document, _ = check(release.path)
    assert part in " ".join(f["what"] for f in document["findings"] if f["name"] == name)
    assert document["ok"] == (not any(f["severity"] == "error" for f in document["findings"]))


def test_checksums_are_compared_when_everything_is_read(release):
    path = release.path / "modeling_mimo_v2.py"
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    assert "manifest" in check(release.path)[1]
    assert "manifest" not in check(release.path, samples=4, deep=False)[1]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"hidden_size": 96, "hidden_size": 96}'),
        ("model.safetensors.index.json", "[]"),
        ("model_pp0_ep0_shard0.safetensors", struct.pack("<Q", 2**40).decode("latin1")),
        ("dflash/config.json", "nothing"),
        ("dflash/mask_embedding.pt", "nothing"),
        ("dflash/dflash_draft_model.safetensors", ""),
        ("dflash/model.safetensors.index.json", '{"weight_map": {"norm.weight": 3}}'),
        ("tokenizer.json", "\\"),
    ],
)
def test_broken_files_are_findings(release, file, text):
    (release.path / file).write_bytes(text.encode("latin1"))
    document, found = check(release.path)
    assert not document["ok"] and found["unreadable"]["severity"] == "error"
    assert file.split("/")[-1] in " ".join(f["what"] for f in document["findings"])
    assert all("\n" not in f["what"] for f in document["findings"])


def test_files_that_should_not_be_there(release):
    (release.path / "model-00001-of-00001.safetensors").write_bytes(b"")
    (release.path / "optimizer.pt").write_bytes(b"")
    found = check(release.path)[1]
    assert {"stray-weights", "pickles"} <= set(found)
    (release.path / "tokenizer.json").unlink()
    assert "tokenizer-absent" in check(release.path)[1]


def test_a_lone_file_is_no_release(release):
    (release.path / "model.safetensors.index.json").unlink()
    (release.path / "model_pp0_ep0_shard0.safetensors").rename(release.path / "model.safetensors")
    assert "index-absent" in check(release.path)[1]


def test_no_folder_and_an_empty_folder(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        document, found = check(folder)
        assert not document["ok"] and "config.json" in found["unreadable"]["what"]


def test_drafter_of_a_published_release_gets_its_warnings(drafter_folder):
    # The spelling of the V2.5-Pro drafter, with the trailing comma of the V2.6-Flash one.
    config = json.loads((drafter_folder.path / "config.json").read_text())
    for key in ("is_causal", "layer_types", "use_sliding_window", "rope_parameters"):
        del config[key]
    del config["dflash_config"]["causal"]
    config["dflash_config"]["backbone_rotary_base"] = 5000000
    (drafter_folder.path / "config.json").write_text(json.dumps(config)[:-1] + ",}")
    (drafter_folder.path / "dflash.py").write_text("")
    torch.save(
        {"mask_token_id": 511, "embedding": torch.full((96,), 1e-6).bfloat16()},
        drafter_folder.path / "mask_embedding.pt",
    )
    folder = drafter_folder.path.rename(drafter_folder.path.parent / "dflash")
    (folder.parent / "config.json").write_text("{}")
    document = main(CheckConfig(folder=str(folder.parent)))
    names = {f["name"] for f in document["findings"]}
    expected = {"drafter-json", "drafter-causal", "drafter-window", "drafter-rotary", "drafter-rope-base"}
    assert expected | {"drafter-mask-norm"} <= names


def nested(folder, key, **changes):
    path = folder / "dflash" / "config.json"
    config = json.loads(path.read_text())
    config[key] = {k: v for k, v in (config[key] | changes).items() if v is not None}
    path.write_text(json.dumps(config))


def saved_mask(folder, token, value=1.0):
    torch.save({"mask_token_id": token, "embedding": torch.full((96,), value).bfloat16()}, folder / "mask_embedding.pt")


def causal(folder):
    nested(folder, "dflash_config", causal=True)
    path = folder / "dflash/config.json"
    path.write_text(path.read_text().replace('"is_causal": false', '"is_causal": true'))


def no_layer_ids(folder):
    nested(folder, "dflash_config", target_layer_ids=None)


def formula_layer_ids(folder):
    """A deep target whose drafter taps what generic trainers do."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 70, "hybrid_layer_pattern": None, "moe_layer_freq": None}
    (folder / "config.json").write_text(json.dumps(config))
    nested(folder, "dflash_config", target_layer_ids=[1, 18, 34, 50, 67])


def value_scale(folder, scale):
    config = json.loads((folder / "config.json").read_text()) | {"attention_value_scale": 0.707}
    (folder / "config.json").write_text(json.dumps(config))
    nested(folder, "dflash_config", attention_value_scale=scale)


def sinkless(folder):
    nested(folder, "dflash_config", attention_sink_bias=False)
    path = folder / "dflash/config.json"
    path.write_text(
        path.read_text().replace('"add_swa_attention_sink_bias": true', '"add_swa_attention_sink_bias": false')
    )


def other_drafter_weights(folder):
    path = folder / "dflash/dflash_draft_model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")


@pytest.mark.parametrize(
    ("damage", "name", "part"),
    [
        (causal, "drafter-is-causal", "true"),
        (no_layer_ids, "drafter-layer-ids", "no target_layer_ids"),
        (formula_layer_ids, "drafter-layer-ids", "[1, 18, 34, 50, 67] are those of a generic formula"),
        (lambda f: value_scale(f, None), "drafter-value-scale", "no attention_value_scale"),
        (lambda f: value_scale(f, 0.707), "drafter-value-scale", "is the target's own"),
        (lambda f: nested(f, "dflash_config", backbone_rotary_base=5e6), "drafter-rope-base", "backbone"),
        (sinkless, "drafter-sinks", "no attention sinks"),
        (sinkless, "drafter-tensors", "attention_sink_bias"),
        (lambda f: (f / "dflash/mask_embedding.pt").unlink(), "drafter-mask-absent", "no mask_embedding.pt"),
        (lambda f: saved_mask(f / "dflash", 7), "drafter-mask-id", "is for id 7, the config says 511"),
        (lambda f: saved_mask(f / "dflash", 511, 1e-6), "drafter-mask-norm", "norm 9.8e-06"),
        (lambda f: (f / "dflash/dflash.py").unlink(), "drafter-code", "no dflash.py"),
        (other_drafter_weights, "drafter-target-weights", "only weights of the drafter"),
        (lambda f: (f / "dflash/config.json").write_text((f / "dflash/config.json").read_text().rstrip()[:-1] + ",}"),
         "drafter-json", "trailing comma"),
    ],
)  # fmt: skip
def test_drafter_pitfalls_are_found(release, damage, name, part):
    damage(release.path)
    document, _ = check(release.path)
    assert part in " ".join(f["what"] for f in document["findings"] if f["name"] == name)
    assert document["ok"] == (not any(f["severity"] == "error" for f in document["findings"]))


@pytest.mark.parametrize("dialect", ["mimo", "compressed-tensors", "bf16"])
def test_every_dialect_is_clean(release, tmp_path, dialect):
    convert(ConvertConfig(target=str(release.path), out=str(tmp_path / "out"), dialect=dialect))
    document, found = check(tmp_path / "out")
    assert document["ok"] and set(found) == (set() if dialect == "mimo" else {"qkv-bf16"})
    assert document["experts"] == {"mimo": "mxfp4", "bf16": "bf16"}.get(dialect, "mxfp4-packed")


@pytest.mark.parametrize(("spine", "chunks", "noted"), [("fp8", 2, False), ("bf16", 2, True), ("bf16", 1, False)])
def test_chunks_that_vllm_does_not_see_are_noted(config, tensors_of, tmp_path, spine, chunks, noted):
    """A fused BF16 QKV of several chunks is read in another order; one chunk is [Q | K | V] already."""
    config |= {"num_key_value_heads": chunks}
    tensors = tensors_of(layout.target_tensors(config, experts="bf16", spine="bf16"))
    write_bf16_folder(tmp_path / "source", config, tensors)
    convert(ConvertConfig(target=str(tmp_path / "source"), out=str(tmp_path / "out"), spine=spine))
    document, found = check(tmp_path / "out")
    assert document["ok"] and ("qkv-bf16" in found) is noted
    if noted:
        finding = found["qkv-bf16"]
        assert finding["severity"] == "note" and "--spine fp8" in finding["remedy"]
        assert finding["what"].startswith("2 chunks of rows in 5: model.layers.0.self_attn.qkv_proj.weight")


@pytest.fixture
def packed_qwen(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": (8, 64), "lm_head.weight": (8, 64), "model.norm.weight": (64,)}
    tensors["model.layers.0.self_attn.q_proj.weight"] = (64, 64)
    tensors |= {f"model.layers.0.mlp.experts.{e}.up_proj.weight": (32, 64) for e in range(4)}
    source = tmp_path / "qwen"
    source.mkdir()
    save_file(
        {n: torch.randn(s, generator=generator).bfloat16() for n, s in tensors.items()}, source / "model.safetensors"
    )
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "vocab_size": 8}))
    write_tokenizer(source, 8)
    for dialect in ("compressed-tensors", "bf16"):
        convert(ConvertConfig(target=str(source), out=str(tmp_path / dialect), dialect=dialect))
    return tmp_path


def write_tokenizer(folder, size):
    document = {"model": {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(size)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def test_other_families_are_checked_too(packed_qwen):
    for dialect in ("compressed-tensors", "bf16"):
        document, found = check(packed_qwen / dialect)
        assert document["ok"] and found == {} and document["expert_tensors"] == {"bf16": 4}.get(dialect, 8)
    assert check(packed_qwen / "compressed-tensors")[0]["rules_that_fit"] == ["even", "floor", "mse"]


@pytest.mark.parametrize(
    ("change", "name", "part"),
    [
        ({"quantization_config": None}, "quantization-config", "has none, but experts are packed"),
        ({"quantization_config": {"format": "nvfp4-pack-quantized"}}, "quantization-config", "'nvfp4-pack-quantized'"),
        ({"quantization_config": {"ignore": ["lm_head"]}}, "ignored-layers-lack", "1: model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_wrong_compressed_tensors_config(packed_qwen, edit_json, change, name, part):
    edit_json(packed_qwen / "compressed-tensors" / "config.json", change)
    document, _ = check(packed_qwen / "compressed-tensors")
    assert part in " ".join(f["what"] for f in document["findings"] if f["name"] == name)


def test_a_packed_weight_without_its_scale(packed_qwen, rewrite):
    base = "model.layers.0.mlp.experts.2.up_proj"
    rewrite(packed_qwen / "compressed-tensors", {base + ".weight_scale": None})
    assert "scale-missing" in check(packed_qwen / "compressed-tensors")[1]


def test_published_headers_are_checked_without_data(tmp_path):
    """A release of 1.02 trillion parameters as sparse files: the layout is proved from headers alone."""
    config = json.loads((Path(__file__).parents[2] / "recipes/model/mimo-v2.5-pro.json").read_text())
    specs = layout.target_tensors(config, mtp_layers=3)
    config["quantization_config"] = layout.quantization_config(config, mtp_layers=3)
    for file, members in layout.files_of(specs).items():
        header = layout.header_bytes(members)
        with (tmp_path / file).open("wb") as f:
            f.write(header)
            f.truncate(len(header) + sum(s.nbytes for s in members))
    write_index(tmp_path, specs, {"save_format": "mxfp4", "tp_size": 8})
    (tmp_path / "config.json").write_text(json.dumps(config))
    document, found = check(tmp_path, samples=0, deep=False)
    assert document["ok"] and (document["tensors"], document["bytes"]) == (159_581, 564_286_050_048)
    assert {f["severity"] for f in found.values() if f["name"] not in ("tokenizer-absent", "remote-code")} <= {"note"}


@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_the_histogram_narrows_down_the_rule(release, rewrite, rule):
    generator = torch.Generator().manual_seed(0)
    octave = torch.exp2(torch.rand(64, 96, generator=generator) * 4)  # log-uniform magnitudes
    sign = torch.randint(0, 2, (64, 96), generator=generator) * 2 - 1
    packed, scales = mxfp4.encode(octave * sign * torch.exp2(torch.rand(64, 1, generator=generator)), rule)
    names = [n for n in Checkpoint(release.path).names if ".experts." in n and "down_proj" not in n]
    rewrite(release.path, {n: (scales if n.endswith("scale") else packed).clone() for n in names})
    names = [n for n in Checkpoint(release.path).names if ".experts." in n and "down_proj" in n]
    down = dict(zip((".weight", ".weight_scale"), mxfp4.encode(octave.T[:, :64].contiguous(), rule), strict=True))
    rewrite(release.path, {n: down[n[n.rindex(".") :]].clone() for n in names})
    document, found = check(release.path)
    assert rule in document["rules_that_fit"]
    assert ("small-max-code" in found) == (rule == "rceil")


def test_every_kind_says_what_it_causes():
    assert all(severity in ("error", "warning", "note") and causes for severity, causes, _ in KINDS.values())
    assert all("\n" not in causes + remedy for _, causes, remedy in KINDS.values())


def test_every_kind_has_a_corrupted_fixture():
    """Each name appears beside the damage that makes it appear."""
    quoted = set(re.findall(r'"([a-z0-9-]+)"', Path(__file__).read_text()))
    assert set(KINDS) <= quoted, set(KINDS) - quoted
