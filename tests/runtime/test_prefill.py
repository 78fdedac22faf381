"""Prompts that are padded to one of a few sizes, against those that are not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_runtime import prefill
from mimo_runtime.cache import RingCache, visible
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.load import LoadConfig, load_target
from mimo_runtime.model import attend, attend_window
from mimo_runtime.prefill import padded_sizes


def some_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_padding_takes_no_slot_of_a_window(data):
    """The keys that rows behind the end see are those of a write without padding, bit for bit."""
    window, block = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 9))
    start, rows = data.draw(st.integers(0, 40)), data.draw(st.integers(block + 1, 60))
    end = data.draw(st.integers(start + 1, start + rows))
    padded, exact = (RingCache((2, 3, 4), window + block, window, block=block) for _ in range(2))
    k, v = torch.randn(start + rows, 2, 3), torch.randn(start + rows, 2, 4)
    for cache in (padded, exact):
        cache.write(k[:start], v[:start], 0)
    older = padded.extend(k[start:], v[start:], start, torch.tensor(end))
    expected = exact.extend(k[start:end], v[start:end], start) if end - start > block else None
    if expected is None:
        exact.write(k[start:end], v[start:end], start)
    else:
        for got, want in zip(older, expected, strict=True):
            assert torch.equal(got[:, : want.shape[1]], want)
    seen = exact.slots(torch.arange(max(0, end - window + 1), end))
    for got, want in ((padded.k, exact.k), (padded.v, exact.v)):
        assert torch.equal(got[:, seen], want[:, seen])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_of_a_window_attend_like_all_keys(data):
    """Also where there are no older keys yet, at any length, with and without a sink."""
    window, rows, start = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 12))
    groups, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    q = torch.randn(rows, groups * group, 6, generator=made, dtype=torch.float64)
    keys, values = (torch.randn(groups, window - 1 + rows, n, generator=made, dtype=torch.float64) for n in (6, 4))
    sink = torch.randn(groups * group, generator=made) if data.draw(st.booleans()) else None
    seen = visible(start + torch.arange(rows), torch.arange(start - window + 1, start + rows), window)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    expected = attend(q, keys, values, mask, 0.5, sink)
    torch.testing.assert_close(attend_window(q, keys, values, window, start, 0.5, sink), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 23, 24, 25, 63, 64, 65, 100])
def test_a_padded_prompt_decodes_to_the_same_text(release, monkeypatch, length):
    """With windows that are shorter and longer than it, drafted and plain, after a longer prompt and before one."""
    engine = Engine(release, EngineConfig(device="cpu", dtype="float32", max_len=200))
    sampling = SamplingConfig(max_new_tokens=70)
    prompts = some_ids(90, 3), some_ids(length, 5), some_ids(7, 6)
    expected = [(engine.last_logits(ids), engine.generate(ids, sampling)) for ids in prompts]
    rows = []
    run = engine._padded_prompt
    monkeypatch.setattr(
        engine, "_padded_prompt", lambda drafter, ids, end: rows.append(len(ids)) or run(drafter, ids, end)
    )
    monkeypatch.setattr(engine, "_sizes", [64, 128])
    for ids, (logits, out) in zip(prompts, expected, strict=True):
        torch.testing.assert_close(engine.last_logits(ids), logits, rtol=1e-4, atol=1e-4)
        padded = engine.generate(ids, sampling)
        assert padded.tokens == out.tokens == engine.generate(ids, sampling, speculate=False).tokens
        assert [r.accepted for r in padded.rounds] == [r.accepted for r in out.rounds]
    assert rows == [128] * 3 + [64 if length <= 64 else 128] * 3 + [64] * 3


def test_longer_prompts_are_cut_as_before(release, monkeypatch):
    engine = Engine(release, EngineConfig(device="cpu", dtype="float32", max_len=200, prefill_chunk=32))
    monkeypatch.setattr(engine, "_sizes", [64])
    monkeypatch.setattr(engine, "_padded_prompt", None)
    assert engine.padded(65) is None and engine.padded(64) == 64
    ids = some_ids(100, 1)
    torch.testing.assert_close(engine.last_logits(ids), engine.logits(ids)[-1], rtol=1e-4, atol=1e-4)


class Replayed:
    """A stand-in for a graph: what it returns is overwritten by the next call."""

    def __init__(self, function, inputs, pool=None):
        assert OnDevice.depth > 0
        self.function, self.graph, self.outputs = function, self, function(*inputs).clone()

    def pool(self):
        return None

    def __call__(self, *inputs):
        assert OnDevice.depth > 0
        return self.outputs.copy_(self.function(*inputs))


class OnDevice:
    depth = 0

    def __enter__(self):
        OnDevice.depth += 1

    def __exit__(self, *_):
        OnDevice.depth -= 1


def test_logits_outlive_the_graph_that_made_them(release, monkeypatch):
    """And graphs are made and replayed on the engine's device."""
    engine = Engine(release, EngineConfig(device="cpu", dtype="float32", max_len=200))
    prompts = [some_ids(30, 1), some_ids(50, 2)]
    expected = [engine.last_logits(ids) for ids in prompts]
    monkeypatch.setattr("mimo_runtime.engine.Graph", Replayed)
    monkeypatch.setattr(engine, "_on_device", OnDevice)
    monkeypatch.setattr(engine, "_sizes", [64])
    monkeypatch.setattr(engine, "cfg", replace(engine.cfg, cuda_graphs=True))
    found = [engine.last_logits(ids) for ids in prompts]
    assert len(engine._graphs) == 1
    for got, logits in zip(found, expected, strict=True):
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)


class OnGpu:
    """A target of which the sizes are asked for as if it were on a GPU."""

    def __init__(self, target):
        self.layers, self.embed = target.layers, self
        self.is_cuda = True


def test_sizes(release, monkeypatch):
    """Powers of two that fit the chunk, the caches, the scores and experts that need no host, above a round's rows."""
    packed, plain = (load_target(release, LoadConfig("cpu", experts=experts)) for experts in ("packed", "plain"))
    assert padded_sizes(packed, 2048, 4096, 8) == []
    packed, plain = OnGpu(packed), OnGpu(plain)
    assert padded_sizes(packed, 2048, 4096, 8) == [64, 128, 256, 512, 1024]
    assert padded_sizes(packed, 300, 4096, 8) == padded_sizes(packed, 2048, 300, 8) == [64, 128, 256]
    assert padded_sizes(packed, 2048, 4096, 64) == [128, 256, 512, 1024]
    assert padded_sizes(packed, 2048, 60, 8) == []
    assert padded_sizes(plain, 2048, 4096, 8) == [64, 128]
    monkeypatch.setattr(prefill, "PADDED_SCORES", prefill.most_heads(packed) * 512**2)
    assert padded_sizes(packed, 2048, 4096, 8) == [64, 128, 256, 512]
