"""Reading: dequantised values against explicit constructions, and one ValueError for each way a folder can be wrong."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.folder import TensorFolder
from mimo_qat.checkpoint.layout import drafter_tensors
from mimo_qat.checkpoint.reader import Checkpoint, load_model, load_model_with_report, read_drafter

INDEX = "model.safetensors.index.json"
QKV = "model.layers.{}.self_attn.qkv_proj.weight"


def assert_one_line(caught, *parts):
    text = str(caught.value)
    assert "\n" not in text and all(p in text for p in parts), text


def test_fused_qkv_against_a_construction_head_by_head(bf16_folder):
    # Layer 0: 4 query and 2 key-value heads in 2 chunks. Layer 1 (sliding window): 4 and 4, in the same 2 chunks.
    checkpoint = Checkpoint(bf16_folder.path)
    for layer, kv in ((0, 2), (1, 4)):
        rows = list(bf16_folder.tensors[QKV.format(layer)].split(1))
        q, k, v = {}, {}, {}
        for chunk in range(2):
            for head in range(chunk * 2, chunk * 2 + 2):
                q[head] = torch.cat([rows.pop(0) for _ in range(48)])
            for head in range(chunk * kv // 2, (chunk + 1) * kv // 2):
                k[head] = torch.cat([rows.pop(0) for _ in range(48)])
            for head in range(chunk * kv // 2, (chunk + 1) * kv // 2):
                v[head] = torch.cat([rows.pop(0) for _ in range(32)])
        assert not rows
        want = [torch.cat([heads[i] for i in sorted(heads)]) for heads in (q, k, v)]
        assert all(torch.equal(a, b) for a, b in zip(checkpoint.qkv(layer), want, strict=True))
        assert torch.equal(checkpoint.fused_qkv(layer), bf16_folder.tensors[QKV.format(layer)])


def test_split_and_fused_files_read_alike(bf16_folder, rewrite, edit_json):
    fused = Checkpoint(bf16_folder.path)
    want = {i: (fused.fused_qkv(i), fused.qkv(i)) for i in range(4)} | {"mtp": (fused.fused_qkv(0, mtp=True),)}
    changes = {}
    for prefix, parts in [(f"model.layers.{i}.", fused.qkv(i)) for i in range(4)] + [
        ("model.mtp.layers.0.", fused.qkv(0, mtp=True))
    ]:
        changes |= {prefix + "self_attn.qkv_proj.weight": None}
        changes |= {prefix + f"self_attn.{w}_proj.weight": p.clone() for w, p in zip("qkv", parts, strict=True)}
    rewrite(bf16_folder.path, changes)
    edit_json(bf16_folder.path / "config.json", {"attention_projection_layout": "split"})
    split = Checkpoint(bf16_folder.path)
    split.verify()
    for i in range(4):
        assert torch.equal(split.fused_qkv(i), want[i][0])
        assert all(torch.equal(a, b) for a, b in zip(split.qkv(i), want[i][1], strict=True))
    assert torch.equal(split.fused_qkv(0, mtp=True), want["mtp"][0])


def test_weights_are_dequantised_by_their_stored_dtype(release):
    checkpoint = Checkpoint(release.path)
    source = release.source.tensors
    name = "model.layers.2.mlp.experts.5.down_proj"
    assert torch.equal(checkpoint.weight(name), mxfp4.snap(source[name + ".weight"]))
    assert torch.equal(checkpoint.weight(name + ".weight", torch.float32), mxfp4.snap(source[name + ".weight"]).float())
    # Row r of a chunked weight belongs to scale row (r // chunk) * ceil(chunk / 128) + (r % chunk) // 128.
    stored = checkpoint.raw(QKV.format(0)).float()
    scales = checkpoint.raw(QKV.format(0) + "_scale_inv")
    row = torch.arange(352)
    assert checkpoint.chunk_rows(QKV.format(0)) == 176
    want = stored * scales[row // 176 * 2 + row % 176 // 128, 0][:, None]
    assert torch.equal(checkpoint.weight(QKV.format(0), torch.float32), want)
    assert torch.equal(checkpoint.weight("model.norm"), source["model.norm.weight"])
    sink = "model.layers.1.self_attn.attention_sink_bias"
    assert torch.equal(checkpoint.weight(sink), source[sink])


def test_experts_are_stacked_gate_first(release):
    gate_up, down = Checkpoint(release.path).experts(3)
    source = release.source.tensors
    assert gate_up.shape == (8, 128, 96) and down.shape == (8, 96, 64)
    for e in (0, 7):
        prefix = f"model.layers.3.mlp.experts.{e}."
        assert torch.equal(gate_up[e, :64], mxfp4.snap(source[prefix + "gate_proj.weight"]))
        assert torch.equal(gate_up[e, 64:], mxfp4.snap(source[prefix + "up_proj.weight"]))
        assert torch.equal(down[e], mxfp4.snap(source[prefix + "down_proj.weight"]))


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float32, torch.bfloat16])
def test_scales_of_another_dtype_mean_the_same(release, rewrite, dtype):
    base = "model.layers.1.mlp.experts.0.up_proj"
    want = Checkpoint(release.path).weight(base)
    scale = Checkpoint(release.path).raw(base + ".weight_scale").view(torch.float8_e8m0fnu)
    rewrite(release.path, {base + ".weight_scale": scale.clone() if dtype == scale.dtype else scale.to(dtype)})
    read = Checkpoint(release.path)
    assert read.raw(base + ".weight_scale").dtype == dtype
    assert torch.equal(read.weight(base), want)


def test_float_scales_must_be_powers_of_two(release, rewrite):
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale"
    rewrite(release.path, {name: torch.full((64, 3), 0.3)})
    with pytest.raises(ValueError) as caught:
        Checkpoint(release.path).weight("model.layers.1.mlp.experts.0.up_proj")
    assert_one_line(caught, name, "powers of two")


def test_loaded_model_computes_what_the_source_does(tmp_path, tiny_model, tiny_config):
    tiny_model.save_pretrained(tmp_path)  # one model.safetensors in float32, no index
    loaded, report = load_model_with_report(tmp_path)
    ids = torch.arange(40)[None] * 7 % 512
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny_model(ids).logits)
    assert report.expert_tensors == 3 * 8 * 3 and report.not_run == {}
    assert report.used == len(Checkpoint(tmp_path).names)


def test_load_model_equals_from_pretrained(bf16_folder):
    from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM

    ours, report = load_model_with_report(bf16_folder.path)
    theirs = MiMoV2ForCausalLM.from_pretrained(bf16_folder.path, dtype=torch.float32).state_dict()
    assert set(theirs) == set(ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert report.not_run == {"mtp": 12}


def test_load_model_keeps_the_router_in_float32(bf16_folder):
    loaded, _ = load_model_with_report(bf16_folder.path, torch.bfloat16)
    dtypes = {n: t.dtype for n, t in loaded.state_dict().items()}
    assert dtypes["model.layers.1.mlp.gate.weight"] == dtypes["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert dtypes["model.layers.1.mlp.gate.weight"] == torch.float32
    assert dtypes["model.layers.1.mlp.experts.down_proj"] == torch.bfloat16


def test_load_model_of_a_release_uses_the_snapped_experts(release, capsys):
    model = load_model(release.path)
    assert "144 of them mxfp4 routed experts, 16 mtp tensors not run" in capsys.readouterr().err
    source = release.source.tensors
    down = dict(model.named_parameters())["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(down[3].bfloat16(), mxfp4.snap(source["model.layers.1.mlp.experts.3.down_proj.weight"]))
    with torch.no_grad():
        assert model(torch.arange(12)[None]).logits.isfinite().all()
    assert not model.training and not hasattr(model.config, "quantization_config")


def test_tied_head_is_filled_from_the_embedding(tmp_path, config, tensors_of):
    from mimo_qat.checkpoint.layout import target_tensors
    from mimo_qat.checkpoint.writer import write_bf16_folder

    config = config | {"tie_word_embeddings": True}
    tensors = tensors_of(target_tensors(config, experts="bf16", spine="bf16"))
    write_bf16_folder(tmp_path, config, tensors)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"].float())


def test_no_expert_is_an_error(bf16_folder, rewrite):
    rewrite(bf16_folder.path, {n: None for n in bf16_folder.tensors if ".mlp.experts." in n})
    with pytest.raises(ValueError) as caught:
        load_model(bf16_folder.path)
    assert_one_line(caught, "no routed expert tensor matched")


@pytest.mark.parametrize(
    ("name", "tensor", "parts"),
    [
        ("model.layers.1.self_attn.o_proj.weight", None, ("missing", "o_proj")),
        ("model.layers.1.mlp.experts.7.up_proj.weight", None, ("missing", "experts.7.up_proj")),
        ("model.layers.9.input_layernorm.weight", torch.zeros(96), ("unknown", "layers.9")),
        ("layers.0.input_layernorm.weight", torch.zeros(96), ("unknown", "layers.0")),
        ("model.norm.weight", torch.zeros(95), ("shape", "[95], expected [96]")),
    ],
)
def test_load_model_proves_the_table(bf16_folder, rewrite, name, tensor, parts):
    rewrite(bf16_folder.path, {name: tensor})
    with pytest.raises(ValueError) as caught:
        load_model(bf16_folder.path)
    assert_one_line(caught, *parts, "mimo-qat check")


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def write_index(folder, index):
    (folder / INDEX).write_text(json.dumps(index))


def test_a_tensor_in_two_files(bf16_folder):
    index = index_of(bf16_folder.path)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    held = load_file(bf16_folder.path / second) | {"model.embed_tokens.weight": torch.zeros(2)}
    save_file(held, bf16_folder.path / second)
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, "model.embed_tokens.weight", first, second)


def test_a_tensor_that_the_index_does_not_name(bf16_folder):
    index = index_of(bf16_folder.path)
    del index["weight_map"]["model.norm.weight"]
    write_index(bf16_folder.path, index)
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, "model.norm.weight", "does not name")


def test_an_indexed_tensor_that_no_file_holds(bf16_folder):
    index = index_of(bf16_folder.path)
    index["weight_map"]["extra"] = sorted(index["weight_map"].values())[0]
    write_index(bf16_folder.path, index)
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, "extra", "does not hold it")


def test_a_missing_shard(bf16_folder):
    (bf16_folder.path / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    victim = sorted(bf16_folder.path.glob("model-*.safetensors"))[-1]
    victim.unlink()
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, "does not exist")


@pytest.mark.parametrize("keep", [0, 4, 20, 2000, -1])
def test_a_truncated_file(bf16_folder, keep):
    victim = sorted(bf16_folder.path.glob("model-*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, victim.name, "fetch")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,8]}}',  # bytes that no element accounts for
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',  # a hole
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
        b'{"a":{"dtype":"U8","shape":[9223372036854775807,4],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"U8","shape":[8]}}',
        b"[" * 64,
        b"\xff\xfe",
    ],
)
def test_a_hostile_header(tmp_path, header):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError) as caught:
        Checkpoint(tmp_path)
    assert_one_line(caught, "model.safetensors")


SOUND = '"dtype":"U8","shape":[8],"data_offsets":[0,8]'


@pytest.mark.parametrize(
    "header",
    [
        "{}",  # bytes that no tensor accounts for
        '{"a":null}',
        '{"a":{"dtype":"U8","data_offsets":[0,8]}}',
        '{"a":{"dtype":["U8"],"shape":[8],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"U8","shape":8,"data_offsets":[0,8]}}',
        '{"a":{"dtype":"U8","shape":[8.0],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"U8","shape":[true,8],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"U8","shape":["8"],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"U8","shape":[-2,-4],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0.0,8.0]}}',
        '{"a":{"dtype":"U8","shape":[8],"data_offsets":[false,8]}}',
        '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8,8]}}',
        '{"a":{"dtype":"U8","shape":[8],"data_offsets":"08"}}',
        f'{{"a":{{{SOUND}}},"b":{{"dtype":"U8","shape":[-1],"data_offsets":[8,7]}}}}',
        f'{{"a":{{{SOUND}}},"b":{{"dtype":"U8","shape":[{2**62},{2**62},0],"data_offsets":[8,8]}}}}',
        f'{{"a":{{{SOUND}}},"b":{{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}}}',
        f'{{"a":{{{SOUND},"dtype":"U8"}}}}',
        f'{{"\\ud800":{{{SOUND}}}}}',
        f'{{"a":{{{SOUND}}},"__metadata__":[]}}',
        f'{{"a":{{{SOUND}}},"__metadata__":{{"a":1}}}}',
        f'{{"a":{{{SOUND}}},"b":{{"dtype":"F32","shape":[0,{2**64}],"data_offsets":[8,8]}}}}',
        f'{{"a":{{{SOUND}}},"b":{{"dtype":"F32","shape":[0,{10**4000}],"data_offsets":[8,8]}}}}',
        f'{{"a":{{"dtype":"U8","shape":[{10**4000}],"data_offsets":[0,{10**4000}]}}}}',
    ],
)
def test_what_the_library_refuses_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(SafetensorError), safe_open(path, framework="np"):
        pass
    with pytest.raises(ValueError) as caught:
        TensorFolder(tmp_path)
    assert_one_line(caught, "model.safetensors")


@pytest.mark.parametrize(
    "more", ["", ',"b":{"dtype":"F32","shape":[3,0],"data_offsets":[0,0]}', ',"__metadata__":null']
)
def test_headers_that_only_look_odd(tmp_path, more):
    path, header = tmp_path / "model.safetensors", f' {{"a":{{{SOUND},"note":1}}{more}}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(range(8)))
    with safe_open(path, framework="np") as library:
        assert set(TensorFolder(tmp_path).names) == set(library.keys())
    assert TensorFolder(tmp_path).rows("a").tolist() == list(range(8))


def test_a_header_longer_than_any_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(64))
    with pytest.raises(ValueError, match="not a safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors", "a/../../b.safetensors", "", 7, None])
def test_an_index_that_leads_out_of_the_folder(bf16_folder, name):
    index = index_of(bf16_folder.path)
    index["weight_map"]["model.norm.weight"] = name
    write_index(bf16_folder.path, index)
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, "index")


def test_a_link_that_leads_out_of_the_folder(bf16_folder, tmp_path):
    victim = sorted(bf16_folder.path.glob("model-*.safetensors"))[0]
    outside = tmp_path / "outside.safetensors"
    victim.rename(outside)
    victim.symlink_to(outside)
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, victim.name, "leads out")


def test_the_links_of_a_hub_cache_are_followed(bf16_folder, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in bf16_folder.path.iterdir():
        blob = tmp_path / "models--x" / "blobs" / f"sha-{path.name}"
        blob.write_bytes(path.read_bytes())
        os.symlink(f"../../blobs/{blob.name}", snapshot / path.name)
    assert set(Checkpoint(snapshot).names) == set(bf16_folder.tensors)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"weight_map": {}}', '{"weight_map": []}', "{", "[]"])
def test_a_bad_index(bf16_folder, text):
    (bf16_folder.path / INDEX).write_text(text)
    with pytest.raises(ValueError) as caught:
        Checkpoint(bf16_folder.path)
    assert_one_line(caught, INDEX)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither"):
        Checkpoint(tmp_path)


def test_codes_without_their_scale(release, rewrite):
    base = "model.layers.1.mlp.experts.0.up_proj"
    rewrite(release.path, {base + ".weight_scale": None})
    with pytest.raises(ValueError) as caught:
        Checkpoint(release.path).weight(base)
    assert_one_line(caught, base, "no scale beside it")
    with pytest.raises(ValueError, match="holds no tensor nowhere"):
        Checkpoint(release.path).weight("nowhere")


class Payload:
    """Would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_mask_embedding_is_refused(drafter_folder, tmp_path):
    marker = tmp_path / "executed"
    with (drafter_folder.path / "mask_embedding.pt").open("wb") as f:
        pickle.dump({"mask_token_id": 511, "embedding": Payload(marker)}, f, protocol=2)
    with pytest.raises(ValueError) as caught:
        read_drafter(drafter_folder.path)
    assert_one_line(caught, "mask_embedding.pt", "fetch it again")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("saved", "part"),
    [
        ({"mask_token_id": 511}, "exactly mask_token_id and embedding"),
        ({"mask_token_id": 511, "embedding": torch.zeros(96).bfloat16(), "per_position": 1}, "per_position"),
        ({"mask_token_id": 7, "embedding": torch.zeros(96).bfloat16()}, "mask_token_id 7"),
        ({"mask_token_id": "511", "embedding": torch.zeros(96).bfloat16()}, "mask_token_id '511'"),
        ({"mask_token_id": 511, "embedding": torch.zeros(95).bfloat16()}, "[95]"),
        ({"mask_token_id": 511, "embedding": torch.zeros(96)}, "float32"),
        ({"mask_token_id": 511, "embedding": [0.0]}, "list"),
        ({"mask_token_id": 511, "embedding": torch.full((96,), float("inf")).bfloat16()}, "finite"),
        ([1], "list"),
    ],
)
def test_a_mask_embedding_that_does_not_fit(drafter_folder, saved, part):
    torch.save(saved, drafter_folder.path / "mask_embedding.pt")
    with pytest.raises(ValueError) as caught:
        read_drafter(drafter_folder.path)
    assert_one_line(caught, "mask_embedding.pt", part)


def test_a_cut_off_or_absent_mask_embedding(drafter_folder):
    path = drafter_folder.path / "mask_embedding.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a plain tensor file"):
        read_drafter(drafter_folder.path)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        read_drafter(drafter_folder.path)


def test_a_trailing_comma_in_a_drafter_config_is_forgiven(drafter_folder):
    path = drafter_folder.path / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ",}")
    with pytest.warns(UserWarning, match="trailing comma"):
        config, _, _ = read_drafter(drafter_folder.path)
    assert config["vocab_size"] == 512


def test_a_drafter_that_lacks_a_tensor(drafter_folder, rewrite, edit_json):
    rewrite(drafter_folder.path, {"layers.1.self_attn.attention_sink_bias": None})
    with pytest.raises(ValueError) as caught:
        read_drafter(drafter_folder.path)
    assert_one_line(caught, "missing", "layers.1.self_attn.attention_sink_bias")
    edit_json(drafter_folder.path / "config.json", {"num_target_layers": 2})
    assert "layers.1.self_attn.attention_sink_bias" in drafter_tensors(drafter_folder.config)


def test_a_drafter_of_deeper_targets(drafter_folder, edit_json):
    edit_json(drafter_folder.path / "config.json", {"num_target_layers": 2})
    with pytest.raises(ValueError, match="target_layer_ids"):
        read_drafter(drafter_folder.path)


def test_fp8_source_of_a_tail_block_keeps_its_values(release):
    # Dense layer 0: 160 rows are a whole block and one of 32 rows, with a scale of their own.
    name = "model.layers.0.mlp.gate_proj"
    want = fp8.dequantize(*fp8.quantize(release.source.tensors[name + ".weight"]))
    read = Checkpoint(release.path)
    assert torch.equal(read.weight(name), want)
    assert read.spec(name + ".weight_scale_inv").shape == (2, 1)
