"""Models without weights: one model on any number of ranks, bytes by hand and as allocated, routing statistics."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mimo_kernels.linear import Fp8Weight, unpack_fp8
from mimo_qat.checkpoint.layout import TensorSpec, default_drafter_config, drafter_tensors, parameters, read_json
from mimo_qat.plan_runtime import runtime_bytes
from mimo_runtime.bench import ways
from mimo_runtime.breakdown import (
    POINTS,
    Marks,
    broken_down,
    chosen_experts,
    distinct_experts,
    drafter_bytes,
    expected_distinct,
    phases_ms,
    target_bytes,
)
from mimo_runtime.cli import main
from mimo_runtime.config import BenchConfig, EngineConfig, SamplingConfig
from mimo_runtime.load import LoadConfig, Moe
from mimo_runtime.model import route
from mimo_runtime.parallel import Ranks
from mimo_runtime.synthetic import (
    CONTEXTS,
    RandomTensors,
    SyntheticEngine,
    allocated,
    drafter_config,
    memory,
    model_config,
    random_model,
    random_prompts,
)
from tests.runtime.conftest import WIDE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = EngineConfig(device="cpu", dtype="float32", max_len=96, prefill_chunk=16)


def made(config: dict, rank: int = 0, size: int = 1, dtype=torch.float32, **kw):
    load = LoadConfig("cpu", dtype, ranks=Ranks(rank, size), **kw)
    return random_model(config, default_drafter_config(config), load)


def engine_of(config: dict, cfg: EngineConfig = TINY, **kw) -> SyntheticEngine:
    return SyntheticEngine(config, default_drafter_config(config) if cfg.drafter else None, cfg, **kw)


def matrices(layer):
    return layer.mlp.experts if isinstance(layer.mlp, Moe) else layer.mlp


def test_a_drafter_is_never_there_whole(tiny_config, monkeypatch):
    """Of several ranks each makes a tensor of the drafter, keeps its share, and only then makes the next one."""
    made_whole, alive, most = RandomTensors.whole, set(), [0]

    def noted(self, spec):
        tensor = made_whole(self, spec)
        if len(spec.shape) > 1 and not spec.name.startswith(("model.", "mask")):
            alive.add(spec.name)
            weakref.finalize(tensor, alive.discard, spec.name)
            most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(RandomTensors, "whole", noted)
    made(tiny_config, 0, 2)
    assert most[0] == 2  # the one before is given up when the next one is there


# --- one model, whatever the ranks ------------------------------------------------------------------------------------


def test_shares_are_cut_from_one_model(tiny_config):
    """Stripes of two ranks, put together, are the tensors of one; whole tensors are equal."""
    whole, draft = made(tiny_config)
    (left, left_draft), (right, right_draft) = made(tiny_config, 0, 2), made(tiny_config, 1, 2)
    assert torch.equal(torch.cat((left.head, right.head)), whole.head)
    assert torch.equal(torch.cat((left_draft.fc, right_draft.fc)), draft.fc)
    for a, b, one in zip(left.layers, right.layers, whole.layers, strict=True):
        assert torch.equal(torch.cat((matrices(a).down, matrices(b).down), -1), matrices(one).down)
        assert torch.equal(torch.cat((a.attention.o, b.attention.o), -1), one.attention.o)
        if isinstance(one.mlp, Moe):
            assert torch.equal(a.mlp.router, one.mlp.router) and torch.equal(b.mlp.router, one.mlp.router)


def test_values_are_random_and_scaled(tiny_config):
    """The scale that keeps activations of one size; no two experts or layers alike; norms 1, biases 0."""
    target, drafter = made(tiny_config)
    moe = target.layers[2].mlp
    gate_up = moe.experts.gate_up
    assert 0.7 < gate_up.std() * 96**0.5 < 1.42 and abs(gate_up.mean()) < 2e-3  # scales are powers of two
    assert target.embed.std() == pytest.approx(1, rel=0.02)
    rows = torch.stack([gate_up[e, 0] for e in range(8)] + [target.layers[1].mlp.experts.gate_up[0, 0]])
    assert (torch.corrcoef(rows) - torch.eye(9)).abs().max() < 0.45  # 1/sqrt(96) is 0.10
    assert (target.norm.weight == 1).all() and (moe.bias == 0).all() and (drafter.layers[0].attention.q_norm == 1).all()
    assert drafter.mask_embedding.std() > 0.05 and target.layers[1].attention.sink.std() > 0


def test_a_value_does_not_depend_on_the_pieces(tiny_config, monkeypatch):
    """Large matrices are made in pieces of rows; the borders leave no trace."""
    whole = made(tiny_config)[0]
    monkeypatch.setattr("mimo_runtime.synthetic._PIECE", 300)
    pieces = made(tiny_config)[0]
    assert torch.equal(whole.embed, pieces.embed)
    assert torch.equal(whole.layers[1].attention.qkv, pieces.layers[1].attention.qkv)


def processes(size: int, job: dict) -> list[dict]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "runtime"))
    shared = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "ranked_synthetic.py"), json.dumps(job)]
    running = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=-1)
        for r in range(size)
    ]
    try:
        said = [p.communicate(timeout=120)[1].decode() for p in running]
    finally:
        for p in running:
            p.kill()
    assert [p.returncode for p in running] == [0] * size, "".join(said)
    return [json.loads(Path(f"{job['report']}-{r}.json").read_text()) for r in range(size)]


def test_ranks_decode_the_tokens_of_one_process(tmp_path, tiny_config):
    """Two gloo processes, greedy and sampled, plain, drafted and forced, with uniform routing; bits are compared."""
    spec = importlib.util.spec_from_file_location("ranked_synthetic", HERE / "ranked_synthetic.py")
    ranked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranked)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config))
    alone = ranked.decoded(model_config(str(path), None), True, {})
    found = processes(2, {"config": str(path), "uniform": True, "report": str(tmp_path / "out"), "settings": {}})
    assert found == [json.loads(json.dumps(alone))] * 2
    assert len({tuple(t) for t in alone["tokens"]}) == 2  # one text for each temperature
    assert len(set(alone["tokens"][0])) > 12  # not a loop


def test_ranks_with_codes_decode_the_tokens_of_plain_matrices(tmp_path, tiny_config):
    """Two processes of FP8 codes and BF16 kernels, all ways to draft; greedy tokens are those of one process with plain
    matrices, up to a near tie."""
    config, path = tiny_config | WIDE, tmp_path / "config.json"
    path.write_text(json.dumps(config))
    settings = {"dtype": "bfloat16", "linears": "kernel"}
    left, right = processes(
        2, {"config": str(path), "uniform": True, "report": str(tmp_path / "out"), "settings": settings}
    )
    assert left == right and len({tuple(t) for t in left["tokens"]}) == 2  # one text for each temperature
    prompt, tokens = random_prompts(512, 20, 1, seed=3)[0], left["tokens"][0]
    plain = engine_of(config, replace(TINY, dtype="bfloat16", linears="plain"), uniform_routing=True)
    logits = plain.logits(prompt + tokens)[len(prompt) - 1 : -1]
    behind = logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert behind.max() < 0.1 * logits.std() and (behind == 0).float().mean() > 0.9


# --- slices and refusals ----------------------------------------------------------------------------------------------


def test_a_slice_is_the_first_layers(tiny_config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config))
    whole, cut = made(model_config(str(path), None))[0], made(model_config(str(tmp_path), 2))[0]
    assert len(cut.layers) == 2 and torch.equal(cut.head, whole.head)
    for a, b in zip(cut.layers, whole.layers, strict=False):
        assert a.attention.geometry == b.attention.geometry and torch.equal(matrices(a).gate_up, matrices(b).gate_up)
    with pytest.raises(ValueError, match=r"layers is 5; .* has 4, keep 1 to 4"):
        model_config(str(path), 5)


@pytest.mark.parametrize(("name", "recipe"), [("flash", "mimo_v2.5"), ("pro", "mimo_v2.5_pro")])
def test_the_published_geometries(name, recipe):
    """The drafter has as many parameters as its training recipe says, and the layers those of recipes/model."""
    config = model_config(name, None)
    assert config["num_hidden_layers"] == {"flash": 48, "pro": 70}[name]
    text = (ROOT / f"recipes/distill/{recipe}.yaml").read_text()
    assert f"{parameters(drafter_tensors(default_drafter_config(config)))} parameters" in text
    assert f"target_layer_ids: {default_drafter_config(config)['dflash_config']['target_layer_ids']}" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either a folder or --synthetic"),
        ({"folder": "x", "synthetic": "flash"}, "either a folder or --synthetic"),
        ({"folder": "x", "layers": 2}, "for --synthetic models"),
        ({"folder": "x", "uniform_routing": True}, "for --synthetic models"),
        ({"synthetic": "flash", "ranks": 0}, "ranks is 0"),
    ],
)
def test_settings_that_contradict_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**fields)


def test_which_drafter_a_model_gets(tiny_config, tmp_path):
    """None on request, the one beside its config.json, a named one, else the published one; a folder has its own."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))

    def of(**fields):
        found = drafter_config(BenchConfig(**fields), tiny_config)
        return found and found["num_hidden_layers"]

    named = str(tmp_path / "config.json")
    assert of(synthetic=named) == 5 and of(synthetic=named, drafter=None) is None and of(folder=str(tmp_path)) is None
    (tmp_path / "dflash").mkdir()
    beside = default_drafter_config(tiny_config, num_hidden_layers=2)
    (tmp_path / "dflash" / "config.json").write_text(json.dumps(beside))
    assert of(synthetic=named) == of(synthetic=str(tmp_path)) == of(folder=str(tmp_path)) == 2
    assert of(synthetic="flash", drafter=str(tmp_path)) == 2 and of(synthetic="flash") == 5
    assert of(synthetic=named, layers=2) == 5  # its taps may lie beyond the slice


# --- uniform routing --------------------------------------------------------------------------------------------------


def test_uniform_routing_has_its_distribution(tiny_config):
    """Chi-square of single experts and of pairs; layers independent; repeated positions choose alike."""
    engine = engine_of(tiny_config, uniform_routing=True)
    moes = [layer.mlp for layer in engine.target.layers if isinstance(layer.mlp, Moe)]
    places = torch.arange(1024)
    x = torch.randn(1024, 96, generator=torch.Generator().manual_seed(0))
    chosen = [route(moe, x, places)[1].sort(-1).values for moe in moes]
    for ids in chosen:
        assert (ids[:, 0] < ids[:, 1]).all()  # without replacement
        singles = torch.bincount(ids.flatten(), minlength=8).double()
        assert ((singles - 256) ** 2 / 256).sum() < 24.3  # 99.9 % of chi-square with 7 degrees of freedom
        pairs = Counter(map(tuple, ids.tolist()))
        assert len(pairs) == 28
        assert sum((n - 1024 / 28) ** 2 for n in pairs.values()) / (1024 / 28) < 55.5  # the same with 27
    same = [(a == b).all(-1).float().mean() for a, b in pairwise(chosen)]
    assert all(s < 0.08 for s in same)  # 1/28 by chance
    again = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(route(moes[0], again, places[5:13])[1].sort(-1).values, chosen[0][5:13])
    assert torch.equal(route(moes[0], again, places[5:13] + 1024)[1].sort(-1).values, chosen[0][5:13])


def test_uniform_routing_keeps_the_routers_weights(tiny_config):
    """The order only selects: combine weights are the scores of the chosen experts, normalised."""
    moe = engine_of(tiny_config, uniform_routing=True).target.layers[1].mlp
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    weights, chosen = route(moe, x, torch.arange(8))
    scores = (x @ moe.router.T).sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_distinct_experts_of_a_run(tiny_config):
    """32 experts, 8 rows: the mean over many rounds and layers meets the expectation; a random router stays below."""
    config = tiny_config | {"n_routed_experts": 32}
    expected = expected_distinct(32, 2, 8)
    assert expected == pytest.approx(32 * (1 - (30 / 32) ** 8)) and expected_distinct(8, 2, 1) == 2
    found = {}
    for uniform in (True, False):
        engine = engine_of(config, replace(TINY, max_len=300), uniform_routing=uniform)
        prompt = random_prompts(512, 20, 1, seed=0)[0]
        with chosen_experts(engine) as notes:
            out = engine.generate(prompt, SamplingConfig(max_new_tokens=120))
        found[uniform] = distinct_experts(notes, len(out.rounds))
        assert engine.target.layers[1].mlp.chosen is None and all(calls[-1].shape == (8, 2) for calls in notes)
    assert sum(found[True]) / 3 == pytest.approx(expected, abs=0.35)
    assert sum(found[False]) / 3 < expected


# --- memory -----------------------------------------------------------------------------------------------------------


def test_fp8_matrices_are_codes_and_scales(tiny_config):
    """Shares of two ranks are parts of the same codes, with the same scales; their values have the scale of all."""
    config = tiny_config | WIDE
    ways = {"dtype": torch.bfloat16, "linears": "kernel"}
    whole, values = made(config, **ways)[0].layers[0], made(config, dtype=torch.bfloat16)[0].layers[0]
    parts = [made(config, rank, 2, **ways)[0].layers[0] for rank in range(2)]
    assert torch.equal(unpack_fp8(whole.attention.qkv), values.attention.qkv)
    assert float(values.attention.qkv.float().std()) == pytest.approx(256**-0.5, rel=0.1)
    down = [part.mlp.down for part in parts]
    assert torch.equal(torch.cat([w.codes.view(torch.uint8) for w in down], 1), whole.mlp.down.codes.view(torch.uint8))
    assert torch.equal(torch.cat([w.scales for w in down], 1), whole.mlp.down.scales)
    assert torch.equal(torch.cat([unpack_fp8(w) for w in down], 1), values.mlp.down)
    assert len(whole.mlp.gate_up.scales.unique()) == 2


@pytest.mark.parametrize(
    ("size", "dtype", "drafter"), [(1, "float32", "auto"), (2, "bfloat16", "auto"), (2, "float32", None)]
)
def test_a_dry_run_says_what_is_allocated(tiny_config, monkeypatch, size, dtype, drafter):
    """Each rank of a real filling, caches of the engine included, against the meta device."""
    monkeypatch.setattr("mimo_runtime.synthetic.CONTEXTS", (96,))
    packed = dtype == "bfloat16"
    kinds = {"experts": "packed", "linears": "kernel"} if packed else {"experts": "plain", "linears": "plain"}
    cfg = replace(TINY, dtype=dtype, drafter=drafter, **kinds)
    config = tiny_config | WIDE if packed else tiny_config
    weights = 3 * 8 * 3 * (256 * 128 if packed else 96 * 64 // size)  # pages pad both sizes to 128
    found = memory(config, default_drafter_config(config) if drafter else None, size, cfg)
    for rank in range(size):
        monkeypatch.setattr("mimo_runtime.engine.connect", lambda *a, rank=rank: Ranks(rank, size))
        engine = engine_of(config, cfg)
        assert isinstance(engine.target.layers[0].attention.qkv, Fp8Weight) == packed
        experts = [layer.mlp.experts for layer in engine.target.layers if isinstance(layer.mlp, Moe)]
        table = engine.target.rotations
        target, draft = (model and replace(model, rotations=None) for model in (engine.target, engine.drafter))
        assert allocated(target) == found["experts"] + found["spine"]
        assert allocated(experts) == found["experts"] == weights * (17 / 32 if packed else 4)
        assert allocated(draft) == found["drafter"]
        assert allocated([*engine.caches, *engine.draft_caches, table]) == found["kv"]["96"]


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("size", (1, 4, 8))
def test_the_planner_agrees(name, size):
    """`mimo-qat plan --runtime` counts without torch; with a spine kept in BF16 it has to count the same.

    But for a few kilobytes: in memory sinks are float32 instead of BF16, and the drafter has a mask embedding. A spine
    of FP8 codes is half of that, and its scales, one for 64 rows and 128 columns.
    """
    config = model_config(name, None)
    found = memory(config, default_drafter_config(config), size, EngineConfig(linears="plain"))
    plan = runtime_bytes(config, size, list(CONTEXTS), 2048, experts="mxfp4", spine="bf16")
    assert found["experts"] == plan["experts"] and found["workspace"] == plan["workspace"] > 0
    heads, sliding = (64, 39) if name == "flash" else (128, 60)
    assert found["spine"] == plan["spine"] + 2 * heads * sliding
    # A rank keeps its own heads' sinks of a drafter in float32; the plan counts all of them in BF16.
    sinks = 5 * (4 * heads // size - 2 * heads)
    assert found["drafter"] == plan["drafter"] + 2 * config["hidden_size"] + sinks
    assert found["kv"] == plan["kv"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    matrices = [(2 * inner // size, hidden), (hidden, inner // size)]
    for swa in config["hybrid_layer_pattern"]:
        kv = config["swa_num_key_value_heads" if swa else "num_key_value_heads"]
        matrices.append((heads // size * 192 + max(kv // size, 1) * (192 + 128), hidden))
    saved = sum(n * k - n // 64 * (k // 128) * 4 for n, k in matrices)
    codes = memory(config, default_drafter_config(config), size, EngineConfig())
    assert codes == found | {"spine": found["spine"] - saved}


def test_dry_run_command(tiny_config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    wish = ["bench", "--synthetic", str(tmp_path / "config.json"), "--dry_run=true", "--dtype=float32"]
    assert main([*wish, "--ranks=2", "--layers=3"]) == 0
    out = capsys.readouterr()
    assert "a SLICE: the first 3 of 4 layers on 2 ranks" in out.out and "loading" not in out.err
    doc = json.loads(out.out.strip().splitlines()[-1])
    assert doc["experts"] == 2 * 8 * 3 * 96 * 64 * 4 // 2 and list(doc["totals"]) == [str(c) for c in CONTEXTS]
    assert main([*wish, "--ranks=3"]) == 1
    assert "3 ranks cannot share this model" in capsys.readouterr().err
    assert main(["bench", str(tmp_path), "--dry_run=true", "--dtype=float32"]) == 0  # a folder's config.json
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["experts"] == 3 * 8 * 3 * 96 * 64 * 4


# --- what a round reads and takes -------------------------------------------------------------------------------------


def test_bytes_of_a_round_by_hand(tiny_config):
    """Context 50, 8 rows, 5 distinct experts in three layers. K/V heads are 2, 4, 4, 2 of 48 + 32 numbers; the two
    full layers see 58 keys, the two windows of 8 see 7 + 8."""
    target, drafter = made(tiny_config, dtype=torch.bfloat16)
    expert = 3 * 96 * 64
    by_hand = {
        "experts": 3 * 5 * expert * 2,
        "attention": sum((4 + kv) * 48 * 96 + kv * 32 * 96 + 4 * 32 * 96 for kv in (2, 4, 4, 2)) * 2,
        "dense": 3 * 160 * 96 * 2 + 3 * 8 * 96 * 4,
        "head": 512 * 96 * 2,
        "kv": (2 * 2 * 80 * 58 + 2 * 4 * 80 * 15) * 2,
    }
    assert target_bytes(target, [5.0] * 3, 8, 50) == by_hand
    # The drafter: 4 taps, 5 layers of 4 heads and 4 key-value heads of 32, MLP 160, window 1024.
    layer = (3 * 4 * 32 * 96 + 96 * 4 * 32) + 3 * 160 * 96 + 2 * 4 * 32 * 96
    keys = 5 * 4 * 64 * (50 + 8)
    assert drafter_bytes(target, drafter, 50) == 2 * (4 * 96 * 96 + 512 * 96 + 5 * layer + keys)
    half = [made(tiny_config, rank, 2, torch.bfloat16)[0] for rank in range(2)]
    parts = [target_bytes(t, [5.0] * 3, 8, 50) for t in half]
    router = 3 * 8 * 96 * 4
    assert all(parts[0][k] + parts[1][k] == by_hand[k] + router * (k == "dense") for k in by_hand)


def test_bytes_of_fp8_codes_by_hand(tiny_config):
    """Codes take a byte, and every 64 rows and 128 columns have four bytes of scale; o_proj and head stay BF16."""
    target, drafter = made(tiny_config | WIDE, dtype=torch.bfloat16, linears="kernel")
    read = target_bytes(target, [5.0] * 3, 8, 50)
    qkv = [4 * 192 + kv * (192 + 128) for kv in (2, 4, 4, 2)]
    codes = 256 + 4 * 2 / 64  # of a row of QKV, with its part of the scales
    assert read["attention"] == sum(codes * n + 2 * 4 * 128 * 256 for n in qkv)
    assert read["dense"] == 3 * (512 * 256 + 8 * 4 * 2) + 3 * 8 * 256 * 4 and read["head"] == 512 * 256 * 2
    plain = made(tiny_config | WIDE, dtype=torch.bfloat16)
    assert drafter_bytes(target, drafter, 50) == drafter_bytes(*plain, 50)


def test_phases_by_hand(monkeypatch):
    """The clock is a list; the first tokens are the prefill's, and what no phase took is the rest."""
    times = iter([9.0, 9, 9, 9, 10, 12, 15, 19, 20, 21, 23, 24])
    monkeypatch.setattr("mimo_runtime.breakdown.time.perf_counter", lambda: next(times))
    marks = Marks(torch.device("cpu"))
    for point in POINTS:  # of a generation before, whose rounds nobody read
        marks(point)
    marks.read([1])
    for _ in range(2):
        for point in POINTS:
            marks(point)
        marks.read([2, 3])
    assert marks.rounds == [
        {"draft": 2000, "verify": 3000, "accept": 4000},
        {"draft": 1000, "verify": 2000, "accept": 1000},
    ]
    assert phases_ms(marks.rounds, [10, 5]) == {"draft": 1500, "verify": 2500, "accept": 2500, "rest": 1000}


def test_breakdown_of_a_run(tiny_config):
    """Chains and trees: as many laps as rounds, rows and contexts as decoded, and the parts add up."""
    cfg = BenchConfig(synthetic="x", device="cpu", dtype="float32", max_len=96, max_new_tokens=20, tree_budget=12)
    engine = engine_of(tiny_config, cfg)
    prompt = random_prompts(512, 20, 1, seed=1)[0]
    for name, way in ways(engine, cfg).items():
        timed = engine.generate(prompt, cfg, **way)
        b = broken_down(engine, prompt, cfg, [timed], 10.0, **way)
        assert b["rows"] == {"plain": 1, "drafted": 8, "tree": 13}[name]
        assert b["rounds"] == len(timed.rounds) and 20 <= b["context"] < 40
        assert all(ms >= 0 for ms in b["phases_ms"].values()) and b["phases_ms"]["verify"] > 0
        assert ("drafter" in b["bytes"]) == (name != "plain")
        assert b["bytes_per_round"] == sum(b["bytes"].values())
        assert b["roofline_ms"] == pytest.approx(b["bytes_per_round"] / 10e9 * 1e3)
        assert b["distinct_experts"] == 2.0 if name == "plain" else 2 < b["distinct_experts"] <= 8
    starts = [20 + i for i in range(19)]
    plain = broken_down(engine, prompt, cfg, [engine.generate(prompt, cfg, speculate=False)], 10.0, speculate=False)
    assert plain["context"] == sum(starts) / 19


def test_bench_command(tiny_config, tmp_path, capsys):
    """The whole command: labels that cannot be overlooked, the document, its records and a chart."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    flags = ["--device=cpu", "--dtype=float32", "--max_len=128", "--max_new_tokens=64", "--prompt_tokens=24"]
    flags += ["--layers=3", "--uniform_routing=true", "--forced_acceptance=6.3", "--limit=2"]
    pytest.importorskip("matplotlib")
    flags += [f"--output={tmp_path / 'out.json'}", f"--plot={tmp_path / 'out.png'}"]
    assert main(["bench", "--synthetic", str(tmp_path / "config.json"), *flags]) == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC" in out and "a SLICE: the first 3 of 4 layers" in out and "FORCED acceptance length 6.3" in out
    doc = json.loads(out.strip().splitlines()[-1])
    assert doc == read_json(tmp_path / "out.json") and doc["identical"] and doc["forced_acceptance"] == 6.3
    assert doc["acceptance"]["length"] == pytest.approx(6.3, abs=0.1)
    assert set(doc["breakdown"]) == {"plain", "drafted"} and doc["prefill_tokens_per_second"] > 0
    assert "SLICE" in doc["synthetic"]
    record = next(r for r in doc["records"] if r["name"] == "tokens_per_s")
    assert record["conditions"]["layers"] == 3 and record["conditions"]["forced_acceptance"] == 6.3
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_one_rank_alone_does_its_share(tiny_config, tmp_path, capsys):
    """The weights of rank 0 of 2, tokens of its own part of the vocabulary, and a label; a folder is refused."""
    engine = SyntheticEngine(tiny_config, default_drafter_config(tiny_config), TINY, ranks=2)
    share, draft_share = made(tiny_config, 0, 2)
    models = (replace(model, rotations=None) for model in (engine.target, engine.drafter))
    assert [allocated(model) for model in models] == [allocated(share), allocated(draft_share)]
    assert torch.equal(engine.target.layers[1].attention.qkv, share.layers[1].attention.qkv)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    flags = [
        "--device=cpu",
        "--dtype=float32",
        "--max_len=96",
        "--max_new_tokens=24",
        "--prompt_tokens=24",
        "--ranks=2",
    ]
    assert main(["bench", "--synthetic", str(tmp_path / "config.json"), *flags]) == 0
    out = capsys.readouterr().out
    assert "ONE RANK of 2" in out
    record = next(r for r in json.loads(out.strip().splitlines()[-1])["records"] if r["name"] == "tokens_per_s")
    assert record["conditions"]["one_rank"] and record["conditions"]["ranks"] == 2
    assert main(["bench", str(tmp_path), *flags]) != 0
    assert "start a real model's ranks with torchrun" in capsys.readouterr().err


def test_random_tensors_of_any_shape():
    """Three dimensions and one, for the convolutions and sinks of a drafter."""
    tensors = RandomTensors("cpu")
    cube = tensors.whole(TensorSpec("layers.0.attention_conv.base_kernel", "BF16", (2, 2, 96), ""))
    assert cube.shape == (2, 2, 96) and cube.dtype == torch.bfloat16 and cube.float().std() > 0.05
    sink = tensors.whole(TensorSpec("layers.0.self_attn.attention_sink_bias", "BF16", (64,), ""))
    assert sink.shape == (64,) and sink.float().std() > 0.5
