"""Rounds after a context that nobody prefilled: what the caches hold, on any number of ranks, and the bench of it."""

import json

import pytest
import torch

from mimo_qat.checkpoint.layout import default_drafter_config
from mimo_runtime.cli import main
from mimo_runtime.config import BenchConfig, EngineConfig, SamplingConfig
from mimo_runtime.parallel import Ranks
from mimo_runtime.synthetic import SyntheticEngine, random_prompts

CONTEXT, NEW = 300, 24
CFG = {"device": "cpu", "dtype": "float32", "max_len": CONTEXT + NEW, "prefill_chunk": 16}


def engine_of(config: dict, context: int | None = CONTEXT, **settings) -> SyntheticEngine:
    return SyntheticEngine(config, default_drafter_config(config), EngineConfig(**CFG | settings), context=context)


def filled(engine: SyntheticEngine) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(positions, keys [G, S, K], values [G, S, V]) of all caches before the last token of the context, in order."""
    engine._held([0] * CONTEXT)
    out = []
    for cache in [*engine.caches, *engine.draft_caches]:
        positions = cache.positions(CONTEXT - 1)
        order = positions.argsort()[-min(len(positions), CONTEXT - 1) :]
        out.append((positions[order], cache.k[:, order], cache.v[:, order]))
    return out


def test_the_caches_hold_what_a_prefill_of_the_context_would_fill(tiny_config):
    """Full layers every position, windows the last ones; of the size of a real prefill's, and no two layers alike."""
    engine = engine_of(tiny_config)
    found = filled(engine)
    assert [len(p) for p, _, _ in found[:4]] == [CONTEXT - 1, 16, 16, CONTEXT - 1]  # a window of 8 and a block of 8
    assert all(p.tolist() == list(range(CONTEXT - 1 - len(p), CONTEXT - 1)) for p, _, _ in found)
    real = SyntheticEngine(tiny_config, default_drafter_config(tiny_config), EngineConfig(**CFG))
    prompt = random_prompts(512, CONTEXT - 1, 1, seed=0)[0]
    real._prefill(prompt, real.drafter)
    for i, (_, k, v) in enumerate(found[:4]):
        for made, cached in ((k, real.caches[i].k), (v, real.caches[i].v)):
            assert 0.5 < made.std() / cached[:, : made.shape[1]].std() < 2
    ends = torch.stack([k[0, -1] for _, k, _ in found[:4]])
    assert (torch.corrcoef(ends) - torch.eye(4)).abs().max() < 0.6
    again = filled(engine)
    assert all(torch.equal(a, b) for x, y in zip(found, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("size", (2, 4))
def test_each_rank_fills_its_own_heads(tiny_config, monkeypatch, size):
    """Two key-value heads of full layers and of four ranks: two ranks hold the same one."""
    config = tiny_config | {"moe_intermediate_size": 128}
    whole = filled(engine_of(config))
    parts = []
    for rank in range(size):
        monkeypatch.setattr("mimo_runtime.engine.connect", lambda *a, rank=rank: Ranks(rank, size))
        parts.append(filled(engine_of(config)))
    for i, one in enumerate(whole):
        copies = max(1, size // len(one[1]))
        for which in (1, 2):
            assert torch.equal(torch.cat([p[i][which] for p in parts[::copies]]), one[which])
            assert torch.equal(torch.cat([p[i][which] for p in parts[copies - 1 :: copies]]), one[which])


def test_drafts_change_no_token_after_a_synthetic_context(tiny_config):
    """Plain, chains, forced ones and trees; the logits of a prefill after the same cache choose the same tokens; and
    another context gives another text."""
    engine = engine_of(tiny_config, tree_budget=12)
    prompt, sampling = random_prompts(512, CONTEXT, 1, seed=3)[0], SamplingConfig(max_new_tokens=NEW)
    plain = engine.generate(prompt, sampling, speculate=False).tokens
    for way in ({}, {"tree": False}, {"forced_acceptance": [5, 0, 7]}):
        assert engine.generate(prompt, sampling, **way).tokens == plain, way
    logits = engine.logits(prompt + plain[:-1])
    assert len(logits) == NEW and logits.argmax(-1).tolist() == plain
    shorter = engine_of(tiny_config, CONTEXT - 7).generate(prompt[7:], sampling, speculate=False).tokens
    assert shorter != plain and len(set(plain)) > 6
    with pytest.raises(ValueError, match="prompt has 5 tokens, the context 300"):
        engine.generate(prompt[:5], sampling)


@pytest.mark.parametrize("ranks", (1, 2))
def test_bench_at_a_context(tiny_config, tmp_path, capsys, ranks):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    flags = ["--device=cpu", "--dtype=float32", "--max_len=360", "--max_new_tokens=48", f"--context={CONTEXT}"]
    flags += ["--uniform_routing=true", "--forced_acceptance=6.3", "--limit=2", f"--ranks={ranks}"]
    assert main(["bench", "--synthetic", str(tmp_path / "config.json"), *flags]) == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC CACHE of 300 tokens" in out and "\nprefill " not in out
    assert "MB at context 323" in out  # the mean of the 47 rounds from 300 on
    doc = json.loads(out.strip().splitlines()[-1])
    assert doc["identical"] and doc["ok"] and doc["synthetic_context"] == CONTEXT
    assert doc["acceptance"]["length"] == pytest.approx(6.3, abs=0.2)
    # Two full layers of 2 heads see 324 keys, two windows of 4 heads 8; 48 + 32 float32 numbers a key and head.
    assert doc["breakdown"]["plain"]["bytes"]["kv"] == 80 * 4 * (2 * 2 * 324 + 2 * 4 * 8) // ranks
    assert not any(r["name"] == "prefill_tokens_per_s" for r in doc["records"])
    record = next(r for r in doc["records"] if r["name"] == "tokens_per_s")
    assert record["conditions"]["context"] == CONTEXT and "prompt_tokens" not in record["conditions"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folder": "x", "context": 10}, "use it with --synthetic"),
        ({"synthetic": "flash", "context": 0}, "context is 0"),
        ({"synthetic": "flash", "context": 4000}, r"do not fit --max_len 4096; give --max_len 4128 or more"),
    ],
)
def test_contexts_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**fields)
