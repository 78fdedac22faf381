"""Conversion: the file holds exactly what was trained, in the published layout, whole or not at all."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy
import pytest
import torch

from mimo_kernels import fp8, mxfp4
from mimo_qat import convert
from mimo_qat.checkpoint import layout
from mimo_qat.checkpoint.reader import Checkpoint, load_model, read_drafter
from mimo_qat.checkpoint.writer import write_bf16_folder
from mimo_qat.convert import ConvertConfig, main

ROOT = Path(__file__).parents[2]


def run(source, out, **options):
    return main(ConvertConfig(target=str(source), out=str(out), **options))


def experts(names):
    return [n.removesuffix(".weight") for n in names if ".mlp.experts." in n and n.endswith(".weight")]


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def snapped(bf16_folder, tmp_path):
    """The BF16 folder with its experts on the grid, as the trainer leaves them."""
    path = tmp_path / "snapped"
    tensors = {n: mxfp4.snap(t) if ".mlp.experts." in n else t for n, t in bf16_folder.tensors.items()}
    write_bf16_folder(path, bf16_folder.config, tensors)
    return path, tensors


@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_forward_equals_file(snapped, tmp_path, rule):
    """What was trained, what the file holds, and what another library's number types read from it: the same bits."""
    path, trained = snapped
    result = run(path, tmp_path / "out", rule=rule)
    assert result["expert_elements_changed"] == 0 and result["expert_tensors"] == 144
    checkpoint = Checkpoint(tmp_path / "out")
    for base in experts(trained):
        want = trained[base + ".weight"]
        read = checkpoint.weight(base)
        assert torch.equal(read.view(torch.int16), want.view(torch.int16)), base
        packed, scales = checkpoint.raw(base + ".weight"), checkpoint.raw(base + ".weight_scale")
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1).numpy()
        values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(numpy.float32)
        powers = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(numpy.float32)
        assert torch.equal(torch.from_numpy(values * powers.repeat(32, axis=1)), want.float()), base


def test_compressed_tensors_unpacks_the_same_values(snapped, tmp_path):
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    path, trained = snapped
    run(path, tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    for base in experts(trained):
        want = trained[base + ".weight"]
        unpacked = helpers.unpack_fp4_from_uint8(checkpoint.raw(base + ".weight"), *want.shape, dtype=torch.float32)
        powers = torch.exp2(checkpoint.raw(base + ".weight_scale").float() - 127)
        assert torch.equal(unpacked * powers.repeat_interleave(32, 1), want.float()), base


def test_the_model_of_the_file_is_the_model_of_the_source(snapped, tmp_path):
    path, _ = snapped
    run(path, tmp_path / "out", spine="bf16")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(ids).logits, load_model(path)(ids).logits)


def test_off_grid_experts_are_counted(release):
    source = release.source.tensors
    changed = sum(int((mxfp4.snap(source[b + ".weight"]) != source[b + ".weight"]).sum()) for b in experts(source))
    assert release.result["expert_elements_changed"] == changed > 0


def test_everything_else_of_a_release(release):
    checkpoint, source = Checkpoint(release.path), release.source.tensors
    g = checkpoint.geometry
    for name in source:
        base = name.removesuffix(".weight")
        if ".mlp.experts." in name:
            continue
        if name.endswith("qkv_proj.weight"):
            rows = sum(g.qkv_rows(g.mtp if ".mtp." in name else int(name.split(".")[2])))
            codes, scales = fp8.quantize(source[name], rows)
        elif base + ".weight_scale_inv" in checkpoint:
            codes, scales = fp8.quantize(source[name])
        else:
            assert torch.equal(checkpoint.raw(name), source[name]), name
            continue
        assert torch.equal(checkpoint.raw(name).view(torch.uint8), codes.view(torch.uint8)), name
        assert torch.equal(checkpoint.raw(base + ".weight_scale_inv"), scales), name
    quantized = [n for n in checkpoint.names if n.endswith("weight_scale_inv")]
    assert len(quantized) == 4 + 3 + 4  # fused QKV, dense layer 0, the MTP block's QKV and MLP


def test_qkv_scales_restart_at_each_chunk(release):
    # Layer 0: chunks of 176 rows. Each block's scale is the amax of exactly its rows, found by a loop.
    name = "model.layers.0.self_attn.qkv_proj"
    weight = release.source.tensors[name + ".weight"].float()
    scales = Checkpoint(release.path).raw(name + ".weight_scale_inv")
    want = [weight[start:stop].abs().max() / 448 for start, stop in ((0, 128), (128, 176), (176, 304), (304, 352))]
    assert torch.equal(scales[:, 0], torch.stack(want)) and scales.shape == (4, 1)


def test_config_index_and_side_files(release):
    config = json.loads((release.path / "config.json").read_text())
    source = release.source.config
    assert all(config[k] == v for k, v in source.items() if k not in ("architectures", "torch_dtype"))
    assert config["quantization_config"]["store_dtype"] == "mxfp4"
    assert config["quantization_config"]["ignored_layers"][-1] == "model.decoder.self_attn.o_proj"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mimo_v2.MiMoV2ForCausalLM"
    index = json.loads((release.path / "model.safetensors.index.json").read_text())
    specs = layout.target_tensors(config)
    assert index["metadata"] == {
        "save_format": "mxfp4", "tp_size": 2, "scale_rule": "even", "total_size": layout.totals(specs)[1],
    }  # fmt: skip
    assert index["weight_map"] == {n: s.file for n, s in specs.items()}
    assert index["weight_map"]["model.mtp.layers.0.eh_proj.weight"] == "model_mtp.safetensors"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (release.path / name).read_bytes() == (release.source.path / name).read_bytes()
    models = ROOT / "mimo_qat" / "models"
    for name, original in (
        ("modeling_mimo_v2.py", "modeling_mimo_v2.py"),
        ("configuration_mimo_v2.py", "configuration_mimo_v2.py"),
        ("dflash/dflash.py", "modeling_dflash.py"),
    ):
        assert (release.path / name).read_bytes() == (models / original).read_bytes()
    manifest = json.loads((release.path / "conversion.json").read_text())
    found = digests(release.path)
    del found["conversion.json"]
    assert {n: e["sha256"] for n, e in manifest["files"].items()} == found
    assert manifest["rule"] == "even" and "time" not in manifest and "date" not in manifest


def test_bf16_spine_lists_every_bf16_linear(snapped, tmp_path):
    path, trained = snapped
    run(path, tmp_path / "out", spine="bf16")
    checkpoint = Checkpoint(tmp_path / "out")
    ignored = set(checkpoint.config["quantization_config"]["ignored_layers"])
    linears = {n.removesuffix(".weight") for n in trained if n.endswith("_proj.weight") and ".experts." not in n}
    assert linears <= ignored and "model.decoder.self_attn.o_proj" in ignored
    assert all(torch.equal(checkpoint.raw(n + ".weight"), trained[n + ".weight"]) for n in linears)


def test_the_drafter_travels_unchanged(release):
    config, tensors, mask = read_drafter(release.path)
    assert torch.equal(mask, release.drafter.mask)
    assert all(torch.equal(tensors[n], t) for n, t in release.drafter.tensors.items())
    assert config["auto_map"]["AutoModel"] == "dflash.DFlashDraftModel"
    root = json.loads((release.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert not set(root) & set(tensors)


def test_a_release_converts_to_itself(release, tmp_path):
    """Codes, FP8 spine and drafter are copied, so a second conversion changes no weight byte."""
    result = run(release.path, tmp_path / "again", rule="floor")
    assert result["rule"] == "even" and result["expert_elements_changed"] == 0
    first, second = digests(release.path), digests(tmp_path / "again")
    assert {n for n in first if first[n] != second.get(n)} == {"conversion.json"}


def test_an_fp8_release_becomes_fp4(snapped, release, tmp_path, rewrite, edit_json):
    """Only the experts change; the FP8 spine keeps its bytes."""
    path, trained = snapped
    source = tmp_path / "fp8"
    run(path, source)
    changes = {}
    for base in experts(trained):
        codes, scales = fp8.quantize(trained[base + ".weight"])
        changes |= {base + ".weight": codes, base + ".weight_scale_inv": scales, base + ".weight_scale": None}
    rewrite(source, changes)
    config = json.loads((source / "config.json").read_text())
    edit_json(source / "config.json", {"quantization_config": layout.quantization_config(config, "fp8")})
    result = run(source, tmp_path / "out")
    assert result["source_format"] == {"experts": "fp8", "spine": "fp8", "mtp_layers": 1}
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    for name in after.names:
        if ".mlp.experts." not in name:
            assert torch.equal(before.raw(name).view(torch.uint8), after.raw(name).view(torch.uint8)), name
    base = "model.layers.2.mlp.experts.3.gate_proj"
    assert torch.equal(after.weight(base), mxfp4.snap(before.weight(base, torch.float32)))


def test_split_projections_are_fused(bf16_folder, release, tmp_path, rewrite, edit_json):
    fused = Checkpoint(bf16_folder.path)
    changes = {}
    for prefix, parts in [(f"model.layers.{i}.self_attn.", fused.qkv(i)) for i in range(4)] + [
        ("model.mtp.layers.0.self_attn.", fused.qkv(0, mtp=True))
    ]:
        changes[prefix + "qkv_proj.weight"] = None
        changes |= {prefix + f"{w}_proj.weight": p.clone() for w, p in zip("qkv", parts, strict=True)}
    rewrite(bf16_folder.path, changes)
    edit_json(bf16_folder.path / "config.json", {"attention_projection_layout": "split"})
    run(bf16_folder.path, tmp_path / "out")
    for name in ("model_pp0_ep0_shard0.safetensors", "model_mtp.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (release.path / name).read_bytes()
    assert Checkpoint(tmp_path / "out").config == Checkpoint(release.path).config


def test_towers_and_bf16_router_ride_along(tmp_path, config, tensors_of):
    config = config | {"moe_router_dtype": "bfloat16", "num_nextn_predict_layers": None}
    specs = layout.target_tensors(config, experts="bf16", spine="bf16")
    tensors = tensors_of(specs)
    write_bf16_folder(tmp_path / "in", config, tensors)
    from safetensors.torch import save_file

    tower = torch.randn(3, 5)
    save_file({"visual.patch.weight": tower}, tmp_path / "in" / "towers.safetensors")
    index = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.patch.weight"] = "towers.safetensors"
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    run(tmp_path / "in", tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    assert out.spec("visual.patch.weight").file == "model_pp0_ep0_shard1.safetensors"
    assert torch.equal(out.raw("visual.patch.weight"), tower)
    assert out.spec("model.layers.1.mlp.gate.weight").dtype == "BF16"
    assert load_model(tmp_path / "out").config.moe_router_dtype == "bfloat16"


def test_mtp_blocks_are_counted_not_believed(bf16_folder, tmp_path, rewrite, edit_json):
    edit_json(bf16_folder.path / "config.json", {"num_nextn_predict_layers": 2})
    with pytest.raises(ValueError, match="is 2, but the checkpoint holds 1 MTP blocks"):
        run(bf16_folder.path, tmp_path / "out")
    rewrite(bf16_folder.path, {n: None for n in bf16_folder.tensors if ".mtp." in n})
    run(bf16_folder.path, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").config["num_nextn_predict_layers"] == 0
    assert not (tmp_path / "out" / "model_mtp.safetensors").exists()


def test_a_router_is_never_rounded(bf16_folder, tmp_path, edit_json):
    edit_json(bf16_folder.path / "config.json", {"moe_router_dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate.weight .* moe_router_dtype to float32"):
        run(bf16_folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_an_expert_is_named(bf16_folder, tmp_path, rewrite):
    name = "model.layers.3.mlp.experts.2.down_proj"
    rewrite(bf16_folder.path, {name + ".weight": torch.full((96, 64), float("nan"), dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=name):
        run(bf16_folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_release_stays_until_the_new_one_is_whole(release, bf16_folder, tmp_path, rewrite):
    before = digests(release.path)
    with pytest.raises(ValueError, match="--overwrite"):
        run(bf16_folder.path, release.path)
    name = "model.layers.3.mlp.experts.2.down_proj.weight"
    good = bf16_folder.tensors[name]
    rewrite(bf16_folder.path, {name: torch.full_like(good, float("inf"))})
    with pytest.raises(ValueError):
        run(bf16_folder.path, release.path, overwrite=True)
    assert digests(release.path) == before
    rewrite(bf16_folder.path, {name: good})
    run(bf16_folder.path, release.path, overwrite=True, rule="floor")
    assert Checkpoint(release.path).metadata["scale_rule"] == "floor"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16", "drafter", "release"]
    with pytest.raises(ValueError, match="is the target itself"):
        run(release.path, release.path, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_target_layers": 70}, "70 layers"), ({"hidden_size": 64}, "drafter tensors with fault")],
)
def test_a_drafter_of_another_target(bf16_folder, drafter_folder, tmp_path, edit_json, changes, message):
    edit_json(drafter_folder.path / "config.json", changes)
    with pytest.raises(ValueError, match=message):
        run(bf16_folder.path, tmp_path / "out", drafter=str(drafter_folder.path))
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from mimo_qat import convert
from mimo_qat.checkpoint import layout, writer
layout.experts_per_file = lambda geometry: 2
left, write = int(sys.argv[1]), writer.FileWriter.write
def counted(self, name, tensor):
    global left
    write(self, name, tensor)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
writer.FileWriter.write = counted
convert.main(convert.ConvertConfig(target="bf16", drafter="drafter", out=sys.argv[2]))
"""


def test_a_killed_run_ends_with_the_same_bytes(bf16_folder, drafter_folder, tmp_path, monkeypatch):
    """SIGKILL in the middle of the second file, then again in the drafter: the third run finishes, byte for byte."""
    monkeypatch.setattr(layout, "experts_per_file", lambda geometry: 2)
    monkeypatch.chdir(tmp_path)
    path = f"{ROOT}:{ROOT / 'kernels'}"

    def killed(writes):
        command = [sys.executable, "-c", KILLED, str(writes), "out"]
        assert subprocess.run(command, env={"PYTHONPATH": path}).returncode == -signal.SIGKILL
        assert not Path("out").exists()
        return {p.name: p.stat().st_ino for p in Path("out.partial").glob("*.safetensors")}

    first = killed(100)
    assert "model_pp0_ep0_shard0.safetensors" in first and 1 <= len(first) < 5
    second = killed(150)
    assert first.items() <= second.items() and len(second) == 5  # what was finished was kept, not written again
    main(ConvertConfig(target="bf16", drafter="drafter", out="out"))
    kept = {p.name: p.stat().st_ino for p in Path("out").glob("*.safetensors")}
    assert second == kept and sorted(p.name for p in Path(".").iterdir()) == ["bf16", "drafter", "out"]
    resumed = digests(Path("out"))
    Path("out").rename("first")
    main(ConvertConfig(target="bf16", drafter="drafter", out="out"))
    assert digests(Path("out")) == resumed


def test_a_partial_run_of_another_plan_is_not_kept(bf16_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "experts_per_file", lambda geometry: 2)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "_copy_side_files", fail)
        run(bf16_folder.path, tmp_path / "out", rule="floor")
    assert (tmp_path / "out.partial" / "model_mtp.safetensors").is_file()
    run(bf16_folder.path, tmp_path / "out", rule="even")
    run(bf16_folder.path, tmp_path / "fresh", rule="even")
    weights = [n for n in digests(tmp_path / "out") if n.endswith(".safetensors")]
    assert len(weights) == 5
    assert all(digests(tmp_path / "out")[n] == digests(tmp_path / "fresh")[n] for n in weights)


def test_a_cut_off_file_of_a_partial_run_is_written_again(bf16_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "_copy_side_files", fail)
        run(bf16_folder.path, tmp_path / "out")
    victim = tmp_path / "out.partial" / "model_pp0_ep0_shard0.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-100])
    run(bf16_folder.path, tmp_path / "out")
    assert (tmp_path / "out" / victim.name).read_bytes() == whole
