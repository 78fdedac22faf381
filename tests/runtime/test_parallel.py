"""Tensor parallelism: shares of a checkpoint against the whole one, and gloo processes against one process."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimo_kernels import residual
from mimo_qat.checkpoint.layout import Geometry, read_json
from mimo_qat.checkpoint.reader import Checkpoint
from mimo_runtime.cli import main
from mimo_runtime.engine import Engine
from mimo_runtime.load import LoadConfig, Moe, load_target
from mimo_runtime.load_drafter import load_drafter
from mimo_runtime.norms import Norm
from mimo_runtime.parallel import Group, Ranks, checksum, connect, place
from mimo_runtime.shards import Shards, check_target, fused_rows
from tests.runtime.conftest import release_folder, storable_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIZES = (1, 2, 4)


def worker_module():
    spec = importlib.util.spec_from_file_location("ranked", HERE / "ranked.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_config(tiny_config) -> dict:
    """Borders of four ranks inside FP8 tiles and inside fused chunks, and fewer key-value heads than ranks."""
    sizes = {"num_attention_heads": 8, "head_dim": 96, "v_head_dim": 64, "swa_num_attention_heads": 8}
    sizes |= {"swa_head_dim": 96, "swa_v_head_dim": 64, "intermediate_size": 320, "moe_intermediate_size": 128}
    return tiny_config | sizes


# --- what a rank reads ------------------------------------------------------------------------------------------------


def shares(folder, size: int, **kw) -> list:
    return [load_target(folder, LoadConfig("cpu", torch.float32, ranks=Ranks(r, size), **kw)) for r in range(size)]


def assert_shares_are_the_model(parts, whole) -> None:
    """Cut from the loaded whole by the definition of a share; bits."""
    size = len(parts)

    def along(dim: int, pick) -> None:
        assert torch.equal(torch.cat([pick(p) for p in parts], dim), pick(whole))

    along(0, lambda t: t.embed)
    along(0, lambda t: t.head)
    for i, layer in enumerate(whole.layers):
        a, g = layer.attention, layer.attention.geometry
        along(1, lambda t, i=i: t.layers[i].attention.o)
        q, k, v = a.qkv.split((g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.v_head_dim))
        for r, p in enumerate(parts):
            mine = p.layers[i].attention
            heads = range(r * g.heads // size, (r + 1) * g.heads // size)
            groups = sorted({h * g.kv_heads // g.heads for h in heads})
            rows = [q.view(g.heads, g.head_dim, -1)[list(heads)], k.view(g.kv_heads, g.head_dim, -1)[groups]]
            rows.append(v.view(g.kv_heads, g.v_head_dim, -1)[groups])
            assert torch.equal(mine.qkv, torch.cat([x.flatten(0, 1) for x in rows]))
            assert (mine.geometry.heads, mine.geometry.kv_heads) == (len(heads), len(groups))
            assert a.sink is None or torch.equal(mine.sink, a.sink[list(heads)])
            assert torch.equal(p.layers[i].input_norm.weight, layer.input_norm.weight)
        routed = isinstance(layer.mlp, Moe)
        if routed:
            assert all(torch.equal(p.layers[i].mlp.router, layer.mlp.router) for p in parts)

        def matrices(t, i=i, routed=routed):
            return t.layers[i].mlp.experts if routed else t.layers[i].mlp

        along(1 + routed, lambda t, of=matrices: of(t).down)
        for half in range(2):
            along(int(routed), lambda t, of=matrices, d=int(routed), half=half: of(t).gate_up.chunk(2, d)[half])


@pytest.mark.parametrize("size", SIZES)
def test_shares_of_a_release_are_cut_from_what_it_means(release, size):
    """FP8 and MXFP4, dequantised share by share, against the reader's whole tensors."""
    parts = shares(release, size)
    whole = shares(release, 1)[0]
    assert_shares_are_the_model(parts, whole)
    reader = Checkpoint(release)
    for i in range(4):
        assert torch.equal(whole.layers[i].attention.qkv, torch.cat(reader.qkv(i, torch.float32)))
    assert torch.equal(whole.layers[2].mlp.experts.gate_up, reader.experts(2, torch.float32)[0])
    assert torch.equal(whole.layers[0].mlp.down, reader.weight("model.layers.0.mlp.down_proj", torch.float32))


@pytest.mark.parametrize(
    "changes", [{}, {"attention_projection_layout": "split"}, {"tie_word_embeddings": True}], ids=str
)
def test_shares_of_a_bf16_folder_quantised_at_load(tmp_path, tiny_config, make_model, write_reference, changes):
    config = tiny_config | changes
    folder = write_reference(tmp_path / "bf16", config, make_model(config))
    assert_shares_are_the_model(shares(folder, 4, rtn="even"), shares(folder, 1, rtn="even")[0])


@pytest.mark.parametrize("size", (2, 4))
def test_every_byte_is_read_once_or_replicated_on_purpose(release, size, monkeypatch):
    """Paints what all ranks read. K and V rows of full-attention layers (2 heads) belong to size / 2 ranks each."""
    seen = []
    monkeypatch.setattr(Shards, "complete", lambda self: seen.append(self))
    shares(release, size)
    checkpoint, g = Checkpoint(release), Geometry.from_config(read_json(release / "config.json"))
    counts = {}
    for shard in seen:
        assert set(shard.boxes) == set(checkpoint.names)
        for name, boxes in shard.boxes.items():
            shape = checkpoint.spec(name).shape
            painted = counts.setdefault(name, torch.zeros(shape if len(shape) > 1 else (shape[0], 1), dtype=torch.int))
            for rows, columns in boxes:
                painted[rows.start : rows.stop, columns.start : columns.stop] += 1
    replicated = ("norm.weight", "mlp.gate.weight", "correction_bias", "sink_bias")
    for name, painted in counts.items():
        if name.endswith(replicated):
            assert (painted == size).all(), name
        elif name.endswith("qkv_proj.weight"):
            layer = int(name.split(".")[2])
            q, k, v = g.qkv_rows(layer)
            chunks = painted.view(g.qkv_chunks, q + k + v, -1)
            assert (chunks[:, :q] == 1).all() and (chunks[:, q:] == max(1, size // g.layers[layer].kv_heads)).all()
        elif name.endswith("scale_inv"):  # a tile across the border of two ranks has one scale for both
            assert (painted >= 1).all(), name
        else:
            assert (painted == 1).all(), name


def test_a_tensor_that_no_rank_asks_for_is_noticed(release, monkeypatch):
    monkeypatch.setattr(Shards, "experts", lambda self, i, dtype: (torch.zeros(8, 64, 96), torch.zeros(8, 96, 32)))
    with pytest.raises(AssertionError, match="read and stored differ"):
        shares(release, 4)


@pytest.mark.parametrize("model", ["mimo-v2.5", "mimo-v2.5-pro"])
@pytest.mark.parametrize("size", (1, 2, 4, 8))
def test_heads_of_the_published_geometries(model, size):
    """Rows of the fused projection labelled (kind, head) by the layout's definition, then picked rank by rank."""
    g = Geometry.from_config(read_json(ROOT / f"recipes/model/{model}.json"))
    check_target(g, size)
    for layer in (0, 1):
        shape, rows = g.layers[layer], g.qkv_rows(layer)
        sizes = {"q": shape.head_dim, "k": shape.head_dim, "v": shape.v_head_dim}
        labels = [
            (kind, (chunk * count + row) // sizes[kind])
            for chunk in range(g.qkv_chunks)
            for kind, count in zip("qkv", rows, strict=True)
            for row in range(count)
        ]
        group = shape.heads // shape.kv_heads
        for r in range(size):
            got = [labels[i] for part in fused_rows(g, layer, Ranks(r, size)) for i in part]
            heads = list(range(r * shape.heads // size, (r + 1) * shape.heads // size))
            groups = sorted({h // group for h in heads})
            assert got == [
                (kind, h) for kind in "qkv" for h in (heads if kind == "q" else groups) for _ in range(sizes[kind])
            ]


@pytest.mark.parametrize("size", (2, 4))
def test_memory_of_a_rank(release, size):
    """The shared matrices take 1 / size exactly, but for key-value heads that several ranks hold."""
    whole, parts = shares(release, 1)[0], shares(release, size)

    def held(t) -> int:
        matrices = [w for layer in t.layers for w in layer.weights()]
        return sum(w.nbytes for w in (t.embed, t.head, *matrices))

    extra = 0
    for layer in whole.layers:
        g = layer.attention.geometry
        copies = max(1, size // g.kv_heads) - 1
        extra += copies * g.kv_heads * (g.head_dim + g.v_head_dim) * 96 * 4
    assert [held(p) for p in parts] == [(held(whole) + extra) // size] * size
    drafters = [load_drafter(release / "dflash", p, LoadConfig("cpu", torch.float32, ranks=p.ranks)) for p in parts]
    one = load_drafter(release / "dflash", whole, LoadConfig("cpu", torch.float32))
    assert sum(sum(w.nbytes for w in d.layers[1].weights()) for d in drafters) == sum(
        w.nbytes for w in one.layers[1].weights()
    )
    assert torch.equal(torch.cat([d.fc for d in drafters]), one.fc)


def test_refusals_name_the_sizes_that_work(release):
    g = Geometry.from_config(read_json(release / "config.json"))
    with pytest.raises(ValueError, match=r"8 query heads do not divide by 3; .* one of 1, 2, 4$"):
        check_target(g, 3)
    with pytest.raises(ValueError, match=r"moe_intermediate_size 128 is not a multiple of 8 ranks times 32"):
        check_target(g, 8)
    with pytest.raises(ValueError, match=r"vocab_size 510 is not a multiple of 4 ranks"):
        check_target(replace(g, vocab_size=510), 4)
    with pytest.raises(ValueError, match=r"intermediate_size 322 is not a multiple of 4 ranks"):
        check_target(replace(g, intermediate_size=322), 4)
    odd = replace(g, layers=tuple(replace(layer, heads=12, kv_heads=6) for layer in g.layers))
    with pytest.raises(ValueError, match=r"6 key-value heads and 4 ranks: neither divides the other"):
        check_target(odd, 4)


def test_launchers_that_cannot_work_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="device is cuda:1 for all 2 processes; use cuda"):
        place("cuda:1")
    with pytest.raises(ValueError, match="start the processes with torchrun"):
        connect("cpu", 20.0, False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert place("cuda") == "cuda:1" and place("cpu") == "cpu"


@pytest.mark.parametrize("size", [2, 16, 17, 32])
def test_more_ranks_than_the_kernel_adds_are_summed_before(monkeypatch, size):
    """`residual.add_rms_norm` takes the parts of up to 16 ranks; the sum in rank order is the same."""
    g = torch.Generator().manual_seed(size)
    x, parts = torch.randn(3, 64, generator=g).bfloat16(), torch.randn(size, 3, 64, generator=g).bfloat16()
    norm = Norm(torch.randn(64, generator=g).bfloat16(), 1e-5, fused=True)
    monkeypatch.setattr(Group, "_all", lambda self, part: parts)
    found = Group(0, size, None, False).add_norm(x, parts[0], norm)
    for ours, theirs in zip(found, residual.reference(x, parts, norm.weight, norm.eps), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checksum_sees_one_bit_and_an_exchange():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    changed = x.clone()
    changed.view(torch.int16)[40] ^= 1
    exchanged = x[torch.tensor([1, 0, *range(2, 64)])]
    assert len({int(checksum(t)) for t in (x, changed, exchanged)}) == 3
    data = x.view(torch.uint8).tolist()
    assert int(checksum(x)) == sum(b * (2 * i + 1) for i, b in enumerate(data))


# --- processes --------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "runtime"))
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def launch(size: int, job: dict) -> tuple[list[int], str, float]:
    """Starts `ranked.py` as a launcher without an agent does; (exit codes, standard error of all, seconds)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "ranked.py"), json.dumps(job)]
    began = time.monotonic()
    running = [
        subprocess.Popen(command, env=environment(RANK=str(r), LOCAL_RANK=str(r), **shared), stderr=subprocess.PIPE)
        for r in range(size)
    ]
    try:
        said = [p.communicate(timeout=120)[1].decode() for p in running]
    finally:
        for p in running:
            p.kill()
    return [p.returncode for p in running], "".join(said), time.monotonic() - began


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def reports(path: Path, size: int) -> list[dict]:
    return [json.loads(Path(f"{path}-{r}.json").read_text()) for r in range(size)]


@pytest.mark.parametrize(
    ("size", "then", "head"),
    [
        (2, "differs", {"conv_kernel_size": 2, "selector_rank": 8}),
        (4, "dies", {}),
        pytest.param(8, "differs", {"conv_kernel_size": 2, "selector_rank": 8}, marks=pytest.mark.slow),
    ],
)
def test_ranks_decode_the_tokens_of_one_process(release, tmp_path, tiny_config, write_drafter, size, then, head):
    """Plain, chains, trees, forced acceptance, greedy and sampled, checked after every round; then one goes wrong."""
    if size == 8:  # an expert has to be eight stripes of whole blocks
        tiny_config = tiny_config | {"moe_intermediate_size": 256}
        release = release_folder(tmp_path / "wider", tiny_config, storable_model(tiny_config))
    ranked, drafter = worker_module(), write_drafter(tmp_path / "dflash", tiny_config, **head)
    engine = Engine(release, ranked.settings(drafter=str(drafter)))
    assert (engine.drafter.selector is not None) == bool(head)
    expected = ranked.everything(engine)
    assert len(set(map(tuple, expected))) == len(ranked.SAMPLINGS)
    job = {"folder": str(release), "drafter": str(drafter), "report": str(tmp_path / "out")}
    codes, said, _ = launch(size, job | {"decode": True, "then": then})
    assert "Traceback" not in said, said
    found = reports(tmp_path / "out", size)
    assert [f["tokens"] for f in found] == [expected] * size, said
    assert [f["ahead"] for f in found] == [f["padded"] for f in found] == [[expected[0]] * 2] * size
    assert len(found[0]["bfloat16"]) == 20 and all(f["bfloat16"] == found[0]["bfloat16"] for f in found)
    if then == "differs":
        assert codes == [0] * size, said
        assert {f["said"] for f in found} == {
            f"ranks differ, first in round 4: rank {size - 1} has other bits than rank 0; "
            "compare their GPUs, drivers and weights"
        }
    else:
        assert codes[:3] == [1, 1, 1] and codes[3] == -9, said
        assert len(errors(said)) == 1 and "rank 3 of 4 stopped the run: no sign of life" in errors(said)[0], said


@pytest.mark.parametrize(
    ("then", "message"),
    [("hangs", "rank 1 of 2 stopped the run: it is alive but late"), ("ends", "rank 1 of 2 stopped the run: it ended")],
)
def test_a_rank_that_does_not_come_is_named(release, tmp_path, then, message):
    job = {"folder": str(release), "drafter": "auto", "report": str(tmp_path / "out"), "decode": False, "then": then}
    codes, said, seconds = launch(2, job)
    assert codes == [1, 1] and len(errors(said)) == 1 and message in errors(said)[0], said
    assert seconds < 40  # its sleep is 60 s


@pytest.mark.slow
def test_torchrun_generates_and_measures(with_tokenizer, capsys, tmp_path):
    """Rank 0 alone prints: the text of one process, and one JSON document."""
    release, _ = with_tokenizer
    common = [str(release), "--dtype=float32", "--device=cpu", "--max_len=256"]
    generate = [*common, "--prompt=def add(a, b):", "--temperature=1", "--max_new_tokens=24", "--check_ranks=true"]
    assert main(["generate", *generate]) == 0
    alone = capsys.readouterr().out

    def torchrun(*arguments: str):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "mimo_runtime"]
        return subprocess.run([*command, *arguments], capture_output=True, env=environment(), timeout=120)

    together = torchrun("generate", *generate)
    assert together.returncode == 0 and together.stdout.decode() == alone, together.stderr.decode()
    assert Counter(together.stderr.decode().split())["tokens/s,"] == 1
    output = tmp_path / "bench.json"
    done = torchrun("bench", *common, "--limit=1", "--max_new_tokens=12", f"--output={output}")
    document = json.loads(done.stdout.decode().strip().splitlines()[-1])
    assert document["ok"] and document["identical"] and json.loads(output.read_text()) == document
    assert document["conditions"]["ranks"] == 2 and math.isfinite(document["plain_tokens_per_second"])
    refused = torchrun("quality", str(release), "--reference=none")
    assert refused.returncode != 0 and "quality runs in one process" in refused.stderr.decode()
