"""One checkpoint, three spellings: other libraries read the same values from each of them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mimo_kernels import mxfp4
from mimo_qat.checkpoint import layout
from mimo_qat.checkpoint.reader import Checkpoint, load_model
from mimo_qat.checkpoint.writer import PT_METADATA, write_index
from mimo_qat.convert import ConvertConfig, main

ROOT = Path(__file__).parents[2]
DIALECTS = ("mimo", "compressed-tensors", "bf16")


def run(source, out, **options):
    return main(ConvertConfig(target=str(source), out=str(out), **options))


@pytest.fixture
def written(bf16_folder, drafter_folder, tmp_path):
    """{dialect: folder} of one BF16 source."""
    out = {d: tmp_path / f"out-{d}" for d in DIALECTS}
    for dialect, path in out.items():
        run(bf16_folder.path, path, dialect=dialect, spine="bf16", drafter=str(drafter_folder.path))
    return out


def test_every_dialect_is_the_same_model(written):
    ids = torch.arange(30)[None]
    with torch.no_grad():
        mimo, packed, plain = (load_model(written[d])(ids).logits for d in DIALECTS)
    assert torch.equal(mimo, packed) and torch.equal(mimo, plain)


def test_names_and_files_of_each_dialect(written):
    table = {d: Checkpoint(p) for d, p in written.items()}
    base = "model.layers.1.mlp.experts.0.down_proj"
    assert table["mimo"].spec(base + ".weight").file == "model_pp0_ep0_shard0.safetensors"
    assert table["compressed-tensors"].spec(base + ".weight_packed").file == "model-00001-of-00001.safetensors"
    for end, other in ((".weight", ".weight_packed"), (".weight_scale", ".weight_scale")):
        assert torch.equal(table["mimo"].raw(base + end), table["compressed-tensors"].raw(base + other))
    assert table["bf16"].spec(base + ".weight").dtype == "BF16"
    assert "quantization_config" not in table["bf16"].config
    assert all((p / "dflash" / "mask_embedding.pt").is_file() for p in written.values())


def test_compressed_tensors_itself_reads_its_dialect(written, bf16_folder):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    checkpoint = Checkpoint(written["compressed-tensors"])
    config = quantization.QuantizationConfig.model_validate(checkpoint.config["quantization_config"])
    assert config.format == "mxfp4-pack-quantized" and config.quantization_status.value == "compressed"
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    bases = [n.removesuffix(".weight_packed") for n in checkpoint.names if n.endswith(".weight_packed")]
    assert len(bases) == 3 * 8 * 3
    for base in bases:
        state = {end: checkpoint.raw(f"{base}.{end}") for end in ("weight_packed", "weight_scale")}
        read = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(read.float(), mxfp4.snap(bf16_folder.tensors[base + ".weight"]).float()), base
    linears = {n.removesuffix(".weight") for n, s in checkpoint.specs.items() if n.endswith("_proj.weight")}
    assert linears <= set(config.ignore) and "lm_head" in config.ignore
    assert "model.layers.1.mlp.gate" in config.ignore


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dequantized_and_encoded_again_gives_the_same_bytes(release, tmp_path, dialect):
    """release -> dialect -> release: every expert byte is back."""
    run(release.path, tmp_path / "other", dialect=dialect)
    result = run(tmp_path / "other", tmp_path / "back")
    assert result["expert_elements_changed"] == 0
    first, last = Checkpoint(release.path), Checkpoint(tmp_path / "back")
    for name in first.names:
        if ".mlp.experts." in name or (first.spec(name).dtype in ("F32", "BF16") and "scale_inv" not in name):
            assert torch.equal(first.raw(name), last.raw(name)), name


FAMILIES = {
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_load_in_transformers(tmp_path, family):
    """transformers decompresses one dialect and plainly loads the other: the same logits, not those of the source."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **common, **heads, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "in")
    with torch.no_grad():
        for tensor in (t for n, t in model.named_parameters() if ".experts." in n):
            tensor.copy_(mxfp4.snap(tensor))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want = model(ids).logits
        for dialect in DIALECTS[1:]:
            result = run(tmp_path / "in", tmp_path / dialect, dialect=dialect)
            assert result["expert_elements_changed"] > 0
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / dialect, dtype=torch.bfloat16)
            assert torch.equal(loaded(ids).logits, want), dialect
    names = Checkpoint(tmp_path / "compressed-tensors").names
    end = "mlp.experts.3.down_proj" if family == "qwen3_moe" else "block_sparse_moe.experts.3.w2"
    assert f"model.layers.1.{end}.weight_packed" in names


def sparse_checkpoint(folder, config, **options):
    """Headers of a checkpoint over files that hold no data; returns its specs."""
    specs = layout.target_tensors(config, **options)
    folder.mkdir()
    for file, members in layout.files_of(specs).items():
        header = layout.header_bytes(members, PT_METADATA)
        with (folder / file).open("wb") as f:
            f.write(header)
            f.truncate(len(header) + sum(s.nbytes for s in members))
    write_index(folder, specs, {"save_format": "fp8", "tp_size": config["num_key_value_heads"]})
    (folder / "config.json").write_text(json.dumps(config))
    return specs


def test_a_dry_run_of_a_trillion_parameters(tmp_path):
    """160k tensors, 962.4 GiB of them, from headers alone; the published numbers come out."""
    config = json.loads((ROOT / "recipes/model/mimo-v2.5-pro.json").read_text())
    specs = sparse_checkpoint(tmp_path / "pro", config, experts="fp8", spine="fp8", mtp_layers=3)
    assert layout.totals(specs) == (159_581, 1_033_369_538_304)
    code = "import re, sys; from mimo_qat.cli import main; status = main(); "
    # Not ru_maxrss, which begins with the size of the process that started this one.
    code += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(status)"
    command = [sys.executable, "-c", code, "convert", "--target", str(tmp_path / "pro"), "--dry_run", "true"]
    began = time.perf_counter()
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    *_, document, peak = done.stdout.strip().splitlines()
    document = json.loads(document)
    assert (document["tensors"], document["bytes"], document["weight_files"]) == (159_581, 564_286_050_048, 129)
    assert document["steps"] == {"copy": 159_581 - 2 * 3 * 384 * 69, "encode": 3 * 384 * 69}
    assert document["bytes_needed"] > document["bytes"] and len(document["files"]) == 129
    assert seconds < 60 and int(peak) * 1024 < 1e9, (seconds, peak)
