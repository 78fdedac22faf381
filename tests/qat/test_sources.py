"""Every family of sources, down to the byte: what must change is recomputed, the rest is copied."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mimo_kernels import fp8, mxfp4
from mimo_qat import workers
from mimo_qat.checkpoint import layout
from mimo_qat.checkpoint.reader import Checkpoint
from mimo_qat.checkpoint.values import block_amax
from mimo_qat.checkpoint.writer import write_bf16_folder, write_index, write_tensors
from mimo_qat.convert import ConvertConfig, main
from mimo_qat.sources import Source


def run(source, out, **options):
    return main(ConvertConfig(target=str(source), out=str(out), **options))


def fp8_folder(path, config, seed=0):
    """A block-FP8 checkpoint of any layout, with the scales that the published ones have."""
    specs = layout.target_tensors(config, experts="fp8", spine="fp8")
    geometry, generator = layout.Geometry.from_config(config), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in specs.items():
        if name in tensors:
            continue
        value = torch.randn(spec.shape, generator=generator) * 0.05
        if spec.dtype == "F8_E4M3":
            rows = None
            if name.endswith("qkv_proj.weight"):
                rows = sum(geometry.qkv_rows(geometry.mtp if ".mtp." in name else int(name.split(".")[2])))
            tensors[name], tensors[name + "_scale_inv"] = fp8.quantize(value, rows)
        else:
            tensors[name] = value.to(torch.bfloat16 if spec.dtype == "BF16" else torch.float32)
    path.mkdir()
    write_tensors(path, specs, tensors)
    write_index(path, specs, {"save_format": "fp8", "tp_size": geometry.qkv_chunks})
    (path / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture
def split_config(config):
    """V2-Flash: split projections. Chunks of sliding-window layers are whole blocks, those of full layers are not."""
    sizes = {"head_dim": 64, "v_head_dim": 64, "swa_head_dim": 64, "swa_v_head_dim": 64, "hidden_size": 160}
    sizes["partial_rotary_factor"] = 0.5
    config = config | sizes | {"model_type": "mimo_v2_flash", "architectures": ["MiMoV2FlashForCausalLM"]}
    return {k: v for k, v in config.items() if k != "attention_projection_layout"}


def same_bytes(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def fused_by_hand(geometry, layer, q, k, v):
    """Chunk c holds query heads c*h/n.. and key-value heads c*kv/n.., head by head."""
    rows = []
    n = geometry.qkv_chunks
    for c in range(n):
        for part, heads, size in (
            (q, layer.heads, layer.head_dim),
            (k, layer.kv_heads, layer.head_dim),
            (v, layer.kv_heads, layer.v_head_dim),
        ):
            for head in range(c * heads // n, (c + 1) * heads // n):
                rows.append(part[head * size : (head + 1) * size])
    return torch.cat(rows)


def test_split_fp8_becomes_fused(split_config, tmp_path):
    """Whole-block layers and MTP keep every code and scale; the others are requantized chunk by chunk."""
    stored = fp8_folder(tmp_path / "in", split_config)
    result = run(tmp_path / "in", tmp_path / "out", rule="floor")
    assert result["steps"]["regroup"] == 3 and result["steps"]["quantize"] == 2
    source, out = Checkpoint(tmp_path / "in"), Checkpoint(tmp_path / "out")
    assert (out.config["model_type"], out.config["architectures"]) == ("mimo_v2", ["MiMoV2ForCausalLM"])
    g = out.geometry
    for prefix, layer, mtp in [(f"model.layers.{i}.", i, False) for i in range(4)] + [("model.mtp.layers.0.", 0, True)]:
        shape = g.mtp if mtp else g.layers[layer]
        values = fused_by_hand(g, shape, *source.qkv(layer, torch.float32, mtp=mtp))
        codes = out.raw(prefix + "self_attn.qkv_proj.weight")
        scales = out.raw(prefix + "self_attn.qkv_proj.weight_scale_inv")
        rows = sum(g.qkv_rows(shape))
        if shape.swa:
            assert torch.equal(out.fused_qkv(layer, torch.float32, mtp=mtp), values), prefix
            by_hand = fused_by_hand(g, shape, *(stored[f"{prefix}self_attn.{w}_proj.weight"] for w in "qkv"))
            assert same_bytes(codes, by_hand)
        else:
            want = fp8.quantize(values, rows)
            assert same_bytes(codes, want[0]) and torch.equal(scales, want[1])
        tops = block_amax(codes.view(torch.uint8) & 0x7F, rows)
        assert (tops == 0x7E).all(), prefix
    for name in out.names:
        if ".mlp.experts." not in name and "qkv_proj" not in name:
            assert same_bytes(out.raw(name), stored[name]), name
        elif name.endswith("_proj.weight") and "experts" in name:
            base = name.removesuffix(".weight")
            want = mxfp4.encode(fp8.dequantize(stored[name], stored[name + "_scale_inv"], dtype=torch.float32), "floor")
            assert torch.equal(out.raw(name), want[0]) and torch.equal(out.raw(base + ".weight_scale"), want[1]), name


def test_fused_fp8_copies_everything_but_experts(config, tmp_path):
    stored = fp8_folder(tmp_path / "in", config)
    result = run(tmp_path / "in", tmp_path / "out")
    assert set(result["steps"]) == {"copy", "encode"} and result["expert_elements_changed"] is None
    out = Checkpoint(tmp_path / "out")
    kept = [n for n in stored if ".mlp.experts." not in n]
    assert all(same_bytes(out.raw(n), stored[n]) for n in kept) and len(kept) > 40


def test_a_bf16_spine_of_an_fp8_source(config, tmp_path):
    """Slab by slab the same values as in one go, fused chunks and tails included."""
    fp8_folder(tmp_path / "in", config)
    run(tmp_path / "in", tmp_path / "out", spine="bf16")
    source, out = Checkpoint(tmp_path / "in"), Checkpoint(tmp_path / "out")
    names = [n.removesuffix(".weight") for n in out.names if n.endswith("_proj.weight") and ".experts." not in n]
    for name in names:
        assert torch.equal(out.raw(name + ".weight"), source.weight(name)), name
    assert len(names) == 5 * 2 + 3 + 3 + 1


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F32"])
def test_packed_experts_pass_through_whatever_their_scales_are_stored_as(release, tmp_path, rewrite, dtype):
    names = [n for n in Checkpoint(release.path).names if n.endswith(".weight_scale")]
    before = {n: Checkpoint(release.path).raw(n).clone() for n in names}
    other = {
        n: b.view(torch.float8_e8m0fnu) if dtype == "F8_E8M0" else torch.exp2(b.float() - 127)
        for n, b in before.items()
    }
    rewrite(release.path, other)
    result = run(release.path, tmp_path / "again")
    assert result["steps"]["scales"] == len(names) and "encode" not in result["steps"]
    assert all(torch.equal(Checkpoint(tmp_path / "again").raw(n), b) for n, b in before.items())


def moe_tensors(spine=torch.bfloat16, stacked=False):
    generator = torch.Generator().manual_seed(0)
    prefix = "model.layers.0.mlp."
    out = {"model.embed_tokens.weight": (8, 64), "lm_head.weight": (8, 64), prefix + "gate.weight": (2, 64)}
    out |= {"model.layers.0.self_attn.q_proj.weight": (130, 64)}
    for e in range(2):
        out |= {f"{prefix}experts.{e}.{w}_proj.weight": (32, 64) for w in ("gate", "up")}
        out[f"{prefix}experts.{e}.down_proj.weight"] = (64, 32)
    made = {n: (torch.randn(s, generator=generator) * 0.1).bfloat16() for n, s in out.items()}
    if spine == torch.float8_e4m3fn:
        for n in [n for n in made if "_proj" in n]:
            made[n], made[n + "_scale_inv"] = fp8.quantize(made[n])
    if stacked:
        made = {n: t for n, t in made.items() if ".experts." not in n}
        made[prefix + "experts.gate_up_proj"] = torch.zeros(2, 64, 64)
    return made


def moe_folder(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": 64}))
    return path


def test_block_fp8_of_another_family(tmp_path):
    tensors = moe_tensors(torch.float8_e4m3fn)
    source = moe_folder(tmp_path / "in", tensors)
    run(source, tmp_path / "ct", dialect="compressed-tensors")
    run(source, tmp_path / "bf16", dialect="bf16")
    ct, plain = Checkpoint(tmp_path / "ct"), Checkpoint(tmp_path / "bf16")
    name = "model.layers.0.self_attn.q_proj.weight"
    want = fp8.dequantize(tensors[name], tensors[name + "_scale_inv"])
    assert torch.equal(ct.raw(name), want) and torch.equal(plain.raw(name), want)
    assert not any(n.endswith("scale_inv") for n in [*ct.names, *plain.names])
    base = "model.layers.0.mlp.experts.1.down_proj"
    exact = fp8.dequantize(tensors[base + ".weight"], tensors[base + ".weight_scale_inv"], dtype=torch.float32)
    assert torch.equal(plain.raw(base + ".weight"), mxfp4.snap(exact))
    assert torch.equal(ct.weight(base), mxfp4.snap(exact))


@pytest.mark.parametrize(
    ("change", "dialect", "message"),
    [
        (lambda t: moe_tensors(stacked=True), "bf16", "experts.gate_up_proj holds the experts of a layer in one"),
        (lambda t: {"model.norm.weight": torch.zeros(4)}, "bf16", "holds no routed experts"),
        (lambda t: {n: v for n, v in moe_tensors(torch.float8_e4m3fn).items() if "scale" not in n}, "bf16", "FP8 with"),
        (lambda t: t, "mimo", "qwen3_moe, which the mimo layout cannot hold; give --dialect"),
        (lambda t: t | {"m.experts.0.w1.weight": torch.zeros(32, 40)}, "compressed-tensors", "not a multiple of 32"),
    ],
)
def test_what_other_families_cannot_be(tmp_path, change, dialect, message):
    moe_folder(tmp_path / "in", change(moe_tensors()))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "in", tmp_path / "out", dialect=dialect)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_source_that_changes_is_an_error(bf16_folder, tmp_path, monkeypatch):
    """Touched half-way: one line that names the file, nothing in place, and the next run starts anew."""
    victim, real, calls = sorted(bf16_folder.path.glob("*.safetensors"))[1], workers.run_step, []

    def touching(step, *rest):
        calls.append(step)
        if len(calls) == 60:
            os.utime(victim, ns=(1, 1))
        yield from real(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{victim.name} changed while it was read"):
        patch.setattr(workers, "run_step", touching)
        run(bf16_folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(bf16_folder.path, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out.progress").exists()


def test_a_narrow_source_reads_the_same(bf16_folder):
    source = Source(bf16_folder.path)
    base = "model.layers.1.self_attn.qkv_proj"
    part = source.narrow(set(source.names(base)))
    assert list(part.specs) == [base + ".weight"] and len(part.stamps) == 1
    whole = torch.cat(list(part.slabs(base, torch.bfloat16)))
    assert torch.equal(whole, bf16_folder.tensors[base + ".weight"])
    assert (
        b"".join(bytes(p) for p in part.checkpoint.pieces(base + ".weight"))
        == whole.view(torch.uint8).numpy().tobytes()
    )
    part.checkpoint.close()


GEOMETRIES = {"pro": (8, 128, 8, [3392, 3392]), "flash": (4, 64, 8, [3392, 3712])}


@pytest.mark.parametrize("size", GEOMETRIES)
def test_the_chunk_map_of_the_published_geometries(tmp_path, tensors_of, size):
    """Head counts and sizes of the published models over a narrow hidden size: a BF16 source is fused in chunks of
    3392 or 3712 rows, each with a block grid of its own. Every block then holds a 448; under a grid that goes over
    all rows, or over one chunk a key-value head, some do not."""
    chunks, heads, swa_kv, chunk_rows = GEOMETRIES[size]
    config = {"model_type": "mimo_v2", "num_attention_heads": heads, "num_key_value_heads": chunks}
    config |= {"swa_num_key_value_heads": swa_kv, "head_dim": 192, "v_head_dim": 128, "hidden_size": 128}
    config |= {"vocab_size": 8, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "n_routed_experts": 2}
    config |= {"num_experts_per_tok": 1, "layernorm_epsilon": 1e-5, "rope_theta": 1e7, "sliding_window": 128}
    specs = layout.target_tensors(config, experts="bf16", spine="bf16")
    write_bf16_folder(tmp_path / "split", config, tensors_of(specs))
    run(tmp_path / "split", tmp_path / "out")
    source, out = Checkpoint(tmp_path / "split"), Checkpoint(tmp_path / "out")
    for layer, rows in enumerate(chunk_rows):
        name = f"model.layers.{layer}.self_attn.qkv_proj"
        codes = out.raw(name + ".weight").view(torch.uint8) & 0x7F
        assert codes.shape[0] == rows * chunks
        assert out.raw(name + ".weight_scale_inv").shape[0] == chunks * -(-rows // 128)
        assert (block_amax(codes, rows) == 0x7E).all()
        for wrong in [rows // 2, *([None] if rows % 128 else [])]:  # 3712 rows are whole blocks: one grid fits too
            assert (block_amax(codes, wrong) != 0x7E).any(), wrong
        for ours, theirs in zip(out.qkv(layer, torch.float32), source.qkv(layer, torch.float32), strict=True):
            assert (ours - theirs).abs().max() <= theirs.abs().max() / 16  # half a step of E4M3 at the top
