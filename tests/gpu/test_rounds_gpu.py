"""Rounds in CUDA graphs, replayed ahead of the host, against the same rounds played eagerly.

pytest -q -s -m gpu tests/gpu/test_rounds_gpu.py      prints host_us_per_round
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_kernels.linear import Fp8Weight
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.rounds import Rounds
from mimo_runtime.weights import KernelWeight
from tests.runtime.conftest import (
    EVERY_EXPERT,
    WIDE,
    assert_trees_round_alone,
    drafter_folder,
    release_folder,
    round_to_bf16,
    storable_model,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [(11 * i) % 512 for i in range(40)], [5, 17, 300], list(range(100, 190))
SAMPLINGS = [
    {},
    {"temperature": 2.0, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {"temperature": 2.0, "top_k": 30, "top_p": 0.8, "seed": 3},
    {"temperature": 2.0, "top_p": 0.8, "seed": 4},
]
needs_kernels = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="the kernels need capability 9"
)
WAYS = ({"speculate": False}, {}, {"forced_acceptance": [7, 2, 0]})


@pytest.fixture
def release(tmp_path, tiny_config, tiny_model) -> Path:
    round_to_bf16(tiny_model)
    return release_folder(tmp_path / "release", tiny_config, tiny_model)


def with_drafter(release: Path, config: dict, head: bool) -> Path:
    sizes = {"conv_kernel_size": 2, "selector_rank": 8} if head else {}
    drafter_folder(release / "dflash", config, **sizes)
    return release


def engine_for(folder: Path, dtype: str, graphs: bool, ahead: int, **more: Any) -> Engine:
    fields = {"device": "cuda", "dtype": dtype, "max_len": 256, "prefill_chunk": 32}
    return Engine(folder, EngineConfig(**fields, cuda_graphs=graphs, rounds_ahead=ahead, **more))


@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_ahead_decode_the_bits_of_eager_rounds(release, tiny_config, monkeypatch, dtype, head):
    """All samplings and ways to draft, prompts in turn, with a stop token that leaves rounds behind, and at the end of
    the caches. Eager attention is made to read whole caches here, as in a graph: then all kernels are the same."""
    folder = with_drafter(release, tiny_config, head)
    eager, graphs = engine_for(folder, dtype, False, 1), engine_for(folder, dtype, True, 4)
    step = eager._chain_round
    monkeypatch.setattr(eager, "_chain_round", lambda *how: step(*how[:-1], None))
    for sampling, how in itertools.product(SAMPLINGS, WAYS):
        for prompt in PROMPTS:
            settings = SamplingConfig(max_new_tokens=256 - len(prompt) if prompt is PROMPTS[0] else 40, **sampling)
            expected = eager.generate(prompt, settings, **how)
            parts: list[list[int]] = []
            found = graphs.generate(prompt, settings, on_tokens=parts.append, **how)
            assert found.rounds == expected.rounds and found.tokens == expected.tokens
            assert [t for part in parts for t in part] == found.tokens
            stopping = SamplingConfig(max_new_tokens=40, stop_token_ids=(expected.tokens[13],), **sampling)
            found = graphs.generate(prompt, stopping, **how)
            assert found.rounds == eager.generate(prompt, stopping, **how).rounds
    assert len(graphs.rounds.graphs) == 4 * len(WAYS)  # two of the samplings differ in temperature and seed only


@pytest.mark.parametrize("head", [False, True], ids=["plain", "DFlash2"])
@pytest.mark.parametrize("budget", [5, 21])
def test_trees_in_graphs_ahead_decode_what_eager_ones_do(release, tiny_config, monkeypatch, head, budget):
    """As above, of trees, in float32; also the tokens of plain decoding, and of trees that the host grows."""
    folder = with_drafter(release, tiny_config, head)
    eager, graphs = (engine_for(folder, "float32", on, 4 if on else 1, tree_budget=budget) for on in (False, True))
    step = eager._tree_round
    monkeypatch.setattr(eager, "_tree_round", lambda *how: step(*how[:-1], None))
    for sampling, prompt in itertools.product(SAMPLINGS, PROMPTS):
        settings = SamplingConfig(max_new_tokens=256 - len(prompt) if prompt is PROMPTS[0] else 40, **sampling)
        expected = eager.generate(prompt, settings)
        found = graphs.generate(prompt, settings)
        assert found.rounds == expected.rounds and found.tokens == expected.tokens
        assert found.tokens == graphs.generate(prompt, settings, speculate=False).tokens
        stopping = SamplingConfig(max_new_tokens=40, stop_token_ids=(expected.tokens[13],), **sampling)
        assert graphs.generate(prompt, stopping).rounds == eager.generate(prompt, stopping).rounds
        with monkeypatch.context() as patch:
            patch.setattr(eager, "_trees", eager._host_trees)
            assert eager.generate(prompt, settings).tokens == expected.tokens
    assert len(graphs.rounds.graphs) == 8  # two of the samplings differ in temperature and seed only; trees and plain


def test_drafts_change_no_token_in_graphs(release, tiny_config):
    graphs = engine_for(with_drafter(release, tiny_config, True), "bfloat16", True, 4)
    for sampling in SAMPLINGS:
        settings = SamplingConfig(max_new_tokens=100, **sampling)
        texts = [graphs.generate(PROMPTS[0], settings, **how).tokens for how in WAYS]
        assert texts == texts[:1] * len(WAYS)


@needs_kernels
@pytest.mark.parametrize("budget", [0, 15], ids=["chain", "tree"])
@pytest.mark.parametrize("block", [8, 16])
def test_graphs_with_kernels_decode_what_eager_rounds_do(tmp_path, tiny_config, monkeypatch, block, budget):
    """Matrices for the kernels, FP8 codes among them, in both shapes of the kernels; chains change no token."""
    config = tiny_config | WIDE
    folder = release_folder(tmp_path / "wide", config, storable_model(config))
    drafter_folder(folder / "dflash", config, block_size=block)
    more = {"linears": "kernel", "tree_budget": budget}
    eager, graphs = (engine_for(folder, "bfloat16", on, 4 if on else 1, **more) for on in (False, True))
    assert isinstance(graphs.target.layers[0].attention.qkv, Fp8Weight)
    assert isinstance(graphs.drafter.fc, KernelWeight)
    assert graphs.min_rows == (1 if block <= 8 else 9)  # a row needs no padding but to be in the same shape
    chain, tree = eager._chain_round, eager._tree_round
    monkeypatch.setattr(eager, "_chain_round", lambda *how: chain(*how[:-1], None))
    monkeypatch.setattr(eager, "_tree_round", lambda *how: tree(*how[:-1], None))
    for sampling in SAMPLINGS[:2]:
        settings = SamplingConfig(max_new_tokens=80, **sampling)
        texts = []
        for how in WAYS:
            texts.append(graphs.generate(PROMPTS[0], settings, **how).tokens)
            assert eager.generate(PROMPTS[0], settings, **how).tokens == texts[-1]
        assert budget or texts == texts[:1] * len(WAYS)


@needs_kernels
@pytest.mark.parametrize("block", [8, 16])
def test_trees_with_kernels_change_tokens_by_rounding_alone(tmp_path, tiny_config, block):
    """A tree's keys lie at other places of the cache than a chain's, so that attention adds other blocks of them, and
    16 rows are another shape of the kernels than 8: in BF16 its texts may part from those of plain decoding, at a near
    tie. tests/runtime/test_tree.py shows that a wrong mask is caught."""
    config = tiny_config | WIDE | EVERY_EXPERT
    folder = release_folder(tmp_path / "wide", config, storable_model(config))
    drafter_folder(folder / "dflash", config, block_size=block)
    graphs = engine_for(folder, "bfloat16", True, 4, linears="kernel", tree_budget=15)
    exact = engine_for(folder, "float32", False, 1, drafter=None)
    for sampling in SAMPLINGS[:2]:
        assert_trees_round_alone(graphs, exact, PROMPTS[0], SamplingConfig(max_new_tokens=80, **sampling), WAYS)


def test_a_reader_may_leave_while_replays_are_under_way(release, tiny_config):
    graphs = engine_for(with_drafter(release, tiny_config, False), "float32", True, 6)
    settings = SamplingConfig(max_new_tokens=60)
    expected = [graphs.generate(p, settings).rounds for p in PROMPTS]

    def leave(tokens: list[int]) -> None:
        raise KeyboardInterrupt

    for prompt, rounds in zip(PROMPTS, expected, strict=True):
        with pytest.raises(KeyboardInterrupt):
            graphs.generate(PROMPTS[2], settings, on_tokens=leave)
        assert graphs.generate(prompt, settings).rounds == rounds


def host_us_per_round(engine: Engine, settings: SamplingConfig, **how) -> tuple[float, float]:
    """(wall time of a round minus its device time, its device time) in us, over the rounds of one text. The device's
    time is from before to after each round on its stream, so that what the host adds shows as a gap between rounds."""
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    enqueue = engine.rounds._enqueue

    def timed(*args) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        enqueue(*args)
        end.record()
        pairs.append((begin, end))

    engine.generate(PROMPTS[1], settings, **how)  # captures
    engine.rounds._enqueue = timed
    try:
        out = engine.generate(PROMPTS[1], settings, **how)
    finally:
        engine.rounds._enqueue = enqueue
    torch.cuda.synchronize()
    device = sum(begin.elapsed_time(end) for begin, end in pairs[: len(out.rounds)]) * 1e3
    return (out.decode_seconds * 1e6 - device) / len(out.rounds), device / len(out.rounds)


@pytest.mark.parametrize("how", ({"speculate": False}, {"tree": False}, {}), ids=str)
def test_the_host_costs_next_to_nothing(release, tiny_config, how):
    """With rounds_ahead 1 the device waits for the host. The bound is loose: other jobs may share the host."""
    graphs = engine_for(with_drafter(release, tiny_config, False), "bfloat16", True, 4, tree_budget=21)
    settings = SamplingConfig(max_new_tokens=200)
    for ahead in (1, 4):
        graphs.rounds = Rounds(graphs.state, ahead, True, graphs.ranks)
        host, device = host_us_per_round(graphs, settings, **how)
        print(f"{how} rounds_ahead {ahead}: host_us_per_round {host:.1f}, device {device:.1f} us")
    assert host < 500
