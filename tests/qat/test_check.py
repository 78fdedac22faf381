"""A sound folder is clean; every fault is found, under its name, and none of them is a traceback."""

import json
import struct

import pytest
import torch

from mimo_kernels import mxfp4
from mimo_qat.checkpoint.check import CheckConfig, block_amax, main
from mimo_qat.checkpoint.findings import KINDS
from mimo_qat.checkpoint.reader import Checkpoint

QKV = "model.layers.1.self_attn.qkv_proj"
EXPERT = "model.layers.1.mlp.experts.0.up_proj"


def check(folder, samples=-1):
    document = main(CheckConfig(folder=str(folder), samples=samples))
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
    assert document["ok"] and found == {} and document["experts"] == "bf16"
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


@pytest.mark.parametrize(
    ("damage", "name", "part"),
    [
        (drop_scale_inv, "missing", QKV + ".weight_scale_inv"),
        (wrong_shape, "shape", "model.norm.weight is [95], expected [96]"),
        (wrong_dtype, "dtype", "e_score_correction_bias is BF16, expected F32"),
        (merged_drafter, "unknown", "fc.weight"),
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
        ("config.json", {"moe_router_dtype": "bfloat16"}, "dtype", "mlp.gate.weight is F32, expected BF16"),
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
    assert "manifest" not in check(release.path, samples=4)[1]


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
