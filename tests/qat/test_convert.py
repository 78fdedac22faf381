"""Conversion: the file holds exactly what was trained, in the published layout, whole or not at all."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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
    changed = ("architectures", "torch_dtype", "attention_chunk_size")
    assert all(config[k] == v for k, v in source.items() if k not in changed)
    assert "attention_chunk_size" not in config  # no layer uses it, some engines act on it
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


SCRIPT = """
import os, signal, sys, time
from mimo_qat import convert
from mimo_qat.checkpoint import layout, writer
layout.experts_per_file = lambda geometry: 2
left, pause, append = int(sys.argv[1]), float(sys.argv[2]), writer.FileWriter.append
def counted(self, name, part):
    global left
    time.sleep(pause)
    append(self, name, part)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
writer.FileWriter.append = counted
if __name__ == "__main__":  # workers import this file too
    convert.main(convert.ConvertConfig(target="bf16", drafter="drafter", out="out", workers=int(sys.argv[3])))
"""
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def scripted(bf16_folder, drafter_folder, tmp_path, monkeypatch):
    """scripted(kill after, pause, workers) starts a conversion in tmp_path; an undisturbed one gave the digests."""
    monkeypatch.setattr(layout, "experts_per_file", lambda geometry: 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIMO_QAT_COMMIT", "0123456789ab")  # of a tree that tests beside this one may write into
    (tmp_path / "job.py").write_text(SCRIPT)
    main(ConvertConfig(target="bf16", drafter="drafter", out="out"))
    undisturbed = digests(Path("out"))
    shutil.rmtree("out")

    def start(kill_after, pause=0.0, workers=1):
        command = [sys.executable, "job.py", str(kill_after), str(pause), str(workers)]
        env = PATHS | {"MIMO_QAT_COMMIT": "0123456789ab"}
        return subprocess.Popen(command, env=env, start_new_session=True)

    return start, undisturbed


def members(session):
    """Living processes of a session."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(path.read_text().rpartition(")")[2].split())
        except OSError:
            continue
    return [s for s in stats if int(s[3]) == session and s[0] != "Z"]


def recorded():
    """{tensor: digest} of every journal."""
    lines = [json.loads(x) for p in Path("out.progress").glob("*.jsonl") for x in p.read_text().splitlines()]
    return {n: d for line in lines for n, d in line.get("tensors", {}).items()}


def test_a_killed_run_goes_on_inside_the_file(scripted):
    """SIGKILL in the middle of the first file, of the third, and in the drafter: then it ends, byte for byte."""
    start, undisturbed = scripted
    before = {}
    for kill_after, whole_files in ((20, 0), (100, 1), (100, 5)):
        assert start(kill_after).wait() == -signal.SIGKILL and not Path("out").exists()
        now, files = recorded(), sorted(Path("out.partial").glob("*.safetensors"))
        assert before.items() < now.items() and len(now) >= len(before) + min(kill_after, 80) * 0.7
        assert len(files) >= whole_files
        before = now
    inodes = {p.name: p.stat().st_ino for p in files}
    main(ConvertConfig(target="bf16", drafter="drafter", out="out"))
    assert inodes == {p.name: p.stat().st_ino for p in Path("out").glob("*.safetensors")}  # kept, not written again
    assert digests(Path("out")) == undisturbed
    assert sorted(p.name for p in Path(".").iterdir()) == ["bf16", "drafter", "job.py", "out"]


def test_what_a_killed_run_left_is_not_believed(scripted):
    """A tensor whose bytes were lost after it was recorded is written again, a half-written record is dropped."""
    start, undisturbed = scripted
    start(30).wait()
    (unfinished,) = Path("out.partial").glob(".*.tmp")
    data = bytearray(unfinished.read_bytes())
    data[3000:] = bytes(len(data) - 3000)
    unfinished.write_bytes(data)
    (journal,) = Path("out.progress").glob("*.jsonl")
    with journal.open("a") as f:
        f.write('{"tensors": {"model.norm.we')
    main(ConvertConfig(target="bf16", drafter="drafter", out="out"))
    assert digests(Path("out")) == undisturbed


def test_workers_give_the_same_bytes_and_end_with_their_parent(scripted):
    """The parent of two workers is killed at once; a run that starts right away waits for them and goes on."""
    start, undisturbed = scripted
    job = start(10**9, pause=0.02, workers=2)
    while not Path("out.progress").exists() or len(recorded()) < 20:
        assert job.poll() is None
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    until = time.monotonic() + 20
    while members(job.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not members(job.pid)  # also the worker that waits for a job
    kept = recorded()
    assert start(10**9, workers=2).wait() == 0 and len(kept) >= 20
    assert digests(Path("out")) == undisturbed


def test_a_killed_worker_is_one_line(scripted):
    start, _ = scripted
    job = start(25, workers=2)
    assert job.wait() == 1 and not Path("out").exists()
    assert Path("out.partial").is_dir() and recorded()


@pytest.mark.slow
def test_kill_at_ten_random_moments(scripted):
    start, undisturbed = scripted
    moments, killed = random.Random(0), 0
    for moment in range(40):
        job = start(10**9, pause=0.01, workers=1 + moment % 2)
        try:
            job.wait(timeout=2 + moments.random() * 2)
        except subprocess.TimeoutExpired:
            (os.killpg if moment % 3 else os.kill)(job.pid, signal.SIGKILL)
            killed += job.wait() == -signal.SIGKILL
        if Path("out").exists():
            assert digests(Path("out")) == undisturbed
            shutil.rmtree("out")
        if killed >= 10:
            break
    assert killed >= 10
    main(ConvertConfig(target="bf16", drafter="drafter", out="out"))
    assert digests(Path("out")) == undisturbed


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        ("pwrite", errno.ENOSPC, r"No space left on device; make room there, and run the same command again"),
        ("preadv", errno.EIO, r"model-0000\d-of-.*Input/output error; repair or fetch it, and run the same"),
    ],
)
def test_a_disk_that_fails(bf16_folder, release, tmp_path, monkeypatch, call, number, message):
    """One line that names the file; an earlier release stays; the same command ends with the same bytes."""
    before, real, calls = digests(release.path), getattr(os, call), []

    def failing(descriptor, *rest):
        calls.append(descriptor)
        if len(calls) == 50:
            raise OSError(number, os.strerror(number))
        return real(descriptor, *rest)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(os, call, failing)
        run(bf16_folder.path, release.path, overwrite=True, drafter=str(release.drafter.path))
    assert digests(release.path) == before
    kept = list((tmp_path / "release.progress").glob("*.jsonl"))
    run(bf16_folder.path, release.path, overwrite=True, drafter=str(release.drafter.path))
    after = digests(release.path)
    assert kept and {n for n in before if before[n] != after[n]} <= {"conversion.json"}


def test_a_source_that_is_cut_off_while_it_is_read(bf16_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ValueError, match=r"ended inside .*; fetch it again"):
        run(bf16_folder.path, tmp_path / "out")


def test_room_is_asked_for_first(bf16_folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs 0\.07 GB more, 0\.00 GB are free"):
        run(bf16_folder.path, tmp_path / "out")
    document = run(bf16_folder.path, tmp_path / "out", dry_run=True)
    assert document["bytes_free"] == 1000 and document["bytes_needed"] > document["bytes"]
    assert not (tmp_path / "out").exists()


def test_two_conversions_of_one_folder(bf16_folder, tmp_path, monkeypatch):
    def second(*_):
        run(bf16_folder.path, tmp_path / "out")

    monkeypatch.setattr(convert, "run_jobs", second)
    with pytest.raises(ValueError, match="another conversion is writing"):
        run(bf16_folder.path, tmp_path / "out")


def test_the_manifest_has_every_tensor(release):
    manifest = json.loads((release.path / "conversion.json").read_text())
    checkpoint = Checkpoint(release.path)
    assert set(manifest["tensor_sha256"]) == set(checkpoint.names)
    for name in checkpoint.names[::7]:
        data = b"".join(bytes(piece) for piece in checkpoint.pieces(name))
        assert manifest["tensor_sha256"][name] == hashlib.sha256(data).hexdigest()
    config = (release.source.path / "config.json").read_bytes()
    assert manifest["source"]["config_sha256"] == hashlib.sha256(config).hexdigest()
    assert manifest["versions"]["torch"] and manifest["command"].startswith("mimo-qat convert --target")


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
