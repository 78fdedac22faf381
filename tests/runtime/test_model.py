"""The forward passes against independent oracles: the transformers models, and themselves with other chunking."""

import json
import random
import re

import pytest
import torch

from mimo_qat import plan_runtime
from mimo_qat.checkpoint.reader import load_model, read_drafter
from mimo_runtime import load_drafter as load_drafter_module
from mimo_runtime import prefill
from mimo_runtime.cache import LinearCache, RingCache, visible
from mimo_runtime.draft_model import draft_context, draft_forward, new_draft_caches
from mimo_runtime.engine import Engine, EngineConfig
from mimo_runtime.load import LoadConfig, load_target, stop_tokens
from mimo_runtime.load_drafter import load_drafter
from mimo_runtime.model import Rows, every_expert, moe_mlp, new_caches, route, target_forward
from mimo_runtime.parallel import Ranks

FP32 = LoadConfig("cpu", torch.float32)


def engine_for(folder, dtype="float32", **kw) -> Engine:
    return Engine(folder, EngineConfig(dtype=dtype, device="cpu", max_len=kw.pop("max_len", 160), **kw))


def some_ids(count: int, seed: int = 1, vocab: int = 512) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


VARIANTS = {
    "published": {},
    "split projections": {"attention_projection_layout": "split"},
    "sinks everywhere": {"add_full_attention_sink_bias": True},
    "no sinks": {"add_swa_attention_sink_bias": False},
    "unnormalised, scaled router": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "window counts itself beside sliding_window_size": {"swa_window_convention": "sglang"},
    "no value scale, all experts": {"attention_value_scale": None, "num_experts_per_tok": 8},
    "tied head": {"tie_word_embeddings": True},
    "float32 router": {"moe_router_dtype": "float32"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_transformers_model(variant, tmp_path, tiny_config, make_model, write_reference):
    config = tiny_config | VARIANTS[variant]
    model = make_model(config)
    engine = engine_for(write_reference(tmp_path / "bf16", config, model))
    ids = some_ids(50)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    for chunk in (64, 16, 7, 1):
        torch.testing.assert_close(engine.logits(ids, chunk), expected, rtol=1e-4, atol=1e-4)


def test_a_release_means_what_the_checkpoint_reader_says(release):
    ids = some_ids(40)
    with torch.no_grad():
        expected = load_model(release, torch.float32)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(engine_for(release).logits(ids), expected, rtol=1e-4, atol=1e-4)


def test_quantising_at_load_equals_the_release(reference, release_of_bf16_spine):
    """MXFP4 of the reference's experts is what its release stores (both spines BF16 here): equal to the last bit."""
    ids = some_ids(40)
    rtn = Engine(reference, EngineConfig(dtype="float32", device="cpu", max_len=64), rtn="even")
    assert torch.equal(rtn.logits(ids), engine_for(release_of_bf16_spine).logits(ids))
    assert not torch.equal(rtn.logits(ids), engine_for(reference).logits(ids))


@pytest.mark.parametrize("seed", range(4))
def test_rejected_rows_leave_no_trace(reference, seed):
    """Blocks whose tail is wrong, committed to a random length, past several turns of the ring of window 8."""
    rng, ids = random.Random(seed), some_ids(120, seed)
    target = load_target(reference, FP32)
    caches = new_caches(target, 160, block=8)
    other = new_caches(target, 160, block=8)
    expected, _ = target_forward(target, other, torch.tensor(ids), 0)
    prompt = rng.randint(1, 30)
    target_forward(target, caches, torch.tensor(ids[:prompt]), 0)
    start, worst = prompt, 0.0
    while start + 8 < len(ids):
        commit, width = rng.randint(1, 8), rng.choice((1, 3, 8))
        commit = min(commit, width)
        block = ids[start : start + commit] + some_ids(width - commit, seed=start)
        logits, _ = target_forward(target, caches, torch.tensor(block), start)
        worst = max(worst, float((logits[:commit] - expected[start : start + commit]).abs().max()))
        start += commit
    assert worst < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_padding_rows_change_nothing(reference, dtype):
    """One row computed as eight equal rows: the same logits, the same cache."""
    target = load_target(reference, LoadConfig("cpu", getattr(torch, dtype)))
    ids = torch.tensor(some_ids(30))
    results = []
    for min_rows in (1, 8):
        caches = new_caches(target, 64, block=8)
        target_forward(target, caches, ids[:20], 0)
        rows = [target_forward(target, caches, ids[i : i + 1], i, min_rows=min_rows)[0] for i in range(20, 30)]
        results.append((torch.cat(rows), caches[1].k))
    tolerance = {"bfloat16": 0.05, "float32": 1e-4}[dtype]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)


def test_taps_are_the_residual_stream_before_the_final_norm(reference, tiny_model):
    ids = torch.tensor(some_ids(20))
    target = load_target(reference, FP32)
    _, taps = target_forward(target, new_caches(target, 64, 8), ids, 0, taps=(0, 2, 3))
    with torch.no_grad():
        states = tiny_model(ids[None], output_hidden_states=True).hidden_states
    expected = torch.cat([states[i + 1][0] for i in (0, 2, 3)], dim=-1)
    torch.testing.assert_close(taps, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"window": 12}, {"causal": True}, {"window": None}], ids=str)
def test_drafts_equal_the_transformers_drafter(tmp_path, tiny_config, reference, write_drafter, changes):
    """Context appended over a prefill and two rounds with rejected rows, then the logits of one block."""
    from mimo_qat.models.modeling_dflash import DFlashDraftModel

    folder = write_drafter(tmp_path / "dflash", tiny_config, **changes)
    target = load_target(reference, FP32)
    drafter = load_drafter(folder, target, FP32)
    caches, draft_caches = new_caches(target, 160, 8), new_draft_caches(drafter, 160)
    ids = torch.tensor(some_ids(60))
    _, taps = target_forward(target, caches, ids, 0, taps=drafter.taps)
    draft_context(drafter, draft_caches, taps[:40], 0)
    draft_context(drafter, draft_caches, torch.cat((taps[40:43], torch.randn(5, taps.shape[1]))), 40)
    draft_context(drafter, draft_caches, torch.cat((taps[43:50], torch.randn(1, taps.shape[1]))), 43)
    _, got = draft_forward(target, drafter, draft_caches, ids[50:51], 50)

    oracle = DFlashDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
    noise = oracle.block_rows(target.embed[ids[50]][None, None])
    with torch.no_grad():
        hidden = oracle(noise, taps[None, :50], torch.arange(58)[None]).last_hidden_state[0]
    torch.testing.assert_close(got, (hidden @ target.head.T)[1:], rtol=1e-3, atol=1e-3)
    assert read_drafter(folder)[0]["block_size"] == 8


def test_all_experts_at_once_equal_the_loop(reference):
    """The form that GPUs take, here on the CPU: rows of other experts have weight zero."""
    moe = load_target(reference, FP32).layers[1].mlp
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    weights, chosen = route(moe, x)
    combine = torch.zeros(9, 8).scatter_(1, chosen, weights)
    torch.testing.assert_close(every_expert(moe.experts, x, combine), moe_mlp(moe, x, Ranks()), rtol=1e-4, atol=1e-5)
    assert (combine > 0).sum(1).tolist() == [2] * 9


def test_visible_keys_by_hand():
    see = visible(torch.tensor([5, 6]), torch.tensor([-1, 2, 3, 4, 5, 6]), 3)
    assert see.tolist() == [[False, False, True, True, True, False], [False, False, False, True, True, True]]


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_of_a_drafter_sees_its_context_and_itself(causal):
    """Rows 5 to 7, window 4, a ring of 7 slots: 5, 6 and 0 hold the block, 1 to 4 the end of the context."""
    ring, start = RingCache((1, 1, 1), 7, 4, block=3), torch.tensor(5)
    every = torch.arange(3), torch.ones(3, 3, dtype=torch.bool)
    seen = Rows(start, 3, torch.zeros(3, 1), None if causal else every).mask(ring) == 0
    positions = ring.extended(start, 3).tolist()
    assert positions == [7, 1, 2, 3, 4, 5, 6]
    for q, row in zip((5, 6, 7), seen.tolist(), strict=True):
        context = set(range(q - 3, 5))
        block = {k for k in (5, 6, 7) if not causal or k <= q}
        assert {k for k, s in zip(positions, row, strict=True) if s} == context | block


def test_a_ring_knows_what_its_slots_hold():
    ring = RingCache((1, 1, 1), 5, 3, block=2)
    for start in range(12):
        row = torch.tensor([[[float(start)]], [[-99.0]]])  # the second row is rejected every time
        k, _ = ring.extend(row, row, start)
        held = ring.positions(start + 1)
        seen = (held >= 0) & (held > start - 3)
        assert k[0, : len(held), 0][seen].tolist() == held[seen].tolist()
        assert sorted(held[seen].tolist()) == list(range(max(0, start - 2), start + 1))


def test_a_linear_cache_hands_out_buckets_and_hides_what_is_not_there():
    cache = LinearCache((1, 1, 1), 100)
    k, _ = cache.extend(torch.ones(70, 1, 1), torch.ones(70, 1, 1), 0)
    assert k.shape == (1, 128, 1)
    assert cache.positions(70)[:70].tolist() == list(range(70)) and (cache.positions(70)[70:] < 0).all()


def test_a_bar_counts_the_time_of_its_work(reference, monkeypatch, capsys):
    """Of the drafter as well, whose tensors are read in one step: a second each on this clock."""
    target = load_target(reference, LoadConfig("cpu", torch.float32))
    capsys.readouterr()
    clock, share = [0.0], load_drafter_module._draft_share

    def one_second(*args):
        clock[0] += 1
        return share(*args)

    monkeypatch.setattr(load_drafter_module, "_draft_share", one_second)
    monkeypatch.setattr("mimo_runtime.load.time.perf_counter", lambda: clock[0])
    load_drafter_module.load_drafter(reference / "dflash", target, LoadConfig("cpu", torch.float32))
    size, rate = map(float, re.search(r"([\d.]+) GB +([\d.]+) GB/s", capsys.readouterr().err).groups())
    assert clock[0] > 10 and rate <= max(size, 0.01)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, (7,)), ({}, (7,)), ({"eos_token_id": None}, (7,)), ({"eos_token_id": [3, 5]}, (3, 5))],
)
def test_stop_tokens_are_those_of_the_first_file_that_has_them(tmp_path, generation, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path, {"eos_token_id": 7}) == expected


def test_prompts_are_computed_in_chunks_that_shrink_with_their_keys(reference, monkeypatch):
    """Scores within 2^27, but never fewer than 256 rows for that; and all chunks together give what one gives."""
    assert plan_runtime.prefill_rows(0, 2048, 16) == 2048
    assert plan_runtime.prefill_rows(6000, 2048, 16) == 2**27 // (16 * 8048)
    assert plan_runtime.prefill_rows(10**6, 2048, 16) == 256
    assert plan_runtime.prefill_rows(10**6, 100, 16) == 100
    ids, whole = some_ids(70), engine_for(reference).logits(some_ids(70))
    monkeypatch.setattr(plan_runtime, "PREFILL_SCORES", 8 * 4 * 40)
    monkeypatch.setattr(plan_runtime, "LEAST_CHUNK", 8)
    cut = engine_for(reference, prefill_chunk=30)
    heads = prefill.most_heads(cut.target)
    sizes = [c.stop - c.start for c in prefill.chunks(0, 70, 30, heads)]
    assert sum(sizes) == 70 and sizes[0] == max(8, 8 * 4 * 40 // (heads * 30)) and sorted(sizes, reverse=True) == sizes
    assert (cut.logits(ids) - whole).abs().max() < 1e-4
    assert (cut.last_logits(ids) - whole[-1]).abs().max() < 1e-4
