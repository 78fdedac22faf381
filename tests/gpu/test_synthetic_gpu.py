"""Synthetic models on a GPU: the values of the CPU, the memory that was promised, and phases measured inside graphs."""

import gc
import json
from dataclasses import replace

import pytest
import torch

from mimo_qat.checkpoint.layout import default_drafter_config
from mimo_runtime import trace
from mimo_runtime.bench import ways
from mimo_runtime.breakdown import broken_down, chosen_experts, marked
from mimo_runtime.config import BenchConfig, EngineConfig, SamplingConfig
from mimo_runtime.load import LoadConfig, Moe
from mimo_runtime.synthetic import SyntheticEngine, memory, random_model, random_prompts, tensors_of, uniform
from mimo_runtime.trace import traced
from tests.runtime.conftest import WIDE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("linears", ["plain", "kernel"])
def test_a_gpu_fills_in_the_values_of_the_cpu(tiny_config, linears):
    """Bits of every tensor, and the order of experts of every position."""
    config = tiny_config | WIDE
    draft_config = default_drafter_config(config)
    cpu, gpu = (random_model(config, draft_config, LoadConfig(d, linears=linears)) for d in ("cpu", "cuda"))
    pairs = list(zip(tensors_of(cpu), tensors_of(gpu), strict=True))
    assert len(pairs) > 60 and all(torch.equal(a.float(), b.float().cpu()) for a, b in pairs)
    for a, b in zip(uniform(cpu[0]).layers, uniform(gpu[0]).layers, strict=True):
        assert not isinstance(a.mlp, Moe) or torch.equal(a.mlp.bias, b.mlp.bias.cpu())


@pytest.mark.parametrize("changes", [{}, WIDE], ids=["no FP8", "FP8"])
def test_the_allocator_agrees_with_a_dry_run(tiny_config, changes):
    """To the 512 bytes that each tensor may take more; nothing that was needed on the way stays. A dry run counts codes
    wherever there are any, which a loader keeps only when it is told to."""
    cfg = BenchConfig(synthetic="x")
    config = tiny_config | changes
    draft_config = default_drafter_config(config)
    found = memory(config, draft_config, 1, cfg)
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = random_model(config, draft_config, LoadConfig("cuda", experts="packed", linears="kernel"))
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    promised = found["experts"] + found["spine"] + found["drafter"]
    assert promised <= held <= promised + 512 * len(list(tensors_of(model)))


@pytest.mark.parametrize("graphs", [False, True])
def test_rounds_after_a_synthetic_context(tiny_config, graphs):
    """The caches have the bits of the CPU's, and drafts change no token."""
    draft_config, context, sampling = default_drafter_config(tiny_config), 5000, SamplingConfig(max_new_tokens=40)
    cpu, gpu = (
        SyntheticEngine(
            tiny_config,
            draft_config,
            EngineConfig(device=device, dtype="float32", max_len=5040, cuda_graphs=graphs and device == "cuda"),
            context=context,
        )
        for device in ("cpu", "cuda")
    )
    prompt = random_prompts(512, context, 1, seed=1)[0]
    for engine in (cpu, gpu):
        engine._held(prompt)
    for a, b in zip([*cpu.caches, *cpu.draft_caches], [*gpu.caches, *gpu.draft_caches], strict=True):
        assert torch.equal(a.k, b.k.cpu()) and torch.equal(a.v, b.v.cpu())
    plain = gpu.generate(prompt, sampling, speculate=False).tokens
    for way in ({}, {"forced_acceptance": [5, 0, 7]}):
        assert gpu.generate(prompt, sampling, **way).tokens == plain


@pytest.mark.parametrize("graphs", [False, True])
def test_phases_of_a_round(tiny_config, graphs):
    """Device times are positive, differ from round to round, and leave something for the host."""
    cfg = BenchConfig(synthetic="x", device="cuda", dtype="float32", max_len=128, max_new_tokens=60, cuda_graphs=graphs)
    cfg = replace(cfg, tree_budget=12)
    engine = SyntheticEngine(tiny_config, default_drafter_config(tiny_config), cfg, uniform_routing=True)
    prompt = random_prompts(512, 20, 1, seed=1)[0]
    for name, way in ways(engine, cfg).items():
        timed = engine.generate(prompt, cfg, **way)
        b = broken_down(engine, prompt, cfg, [timed], 3000.0, **way)
        assert b["phases_ms"]["verify"] > 0 and b["phases_ms"]["accept"] > 0 and b["phases_ms"]["rest"] > 0
        assert name == "plain" or b["phases_ms"]["draft"] > 0
        with marked(engine) as marks:
            out = engine.generate(prompt, cfg, on_tokens=marks.read, **way)
        assert out.tokens == timed.tokens and len({r["verify"] for r in marks.rounds}) > 1
        with chosen_experts(engine) as notes:
            engine.generate(prompt, cfg, **way)
        assert all(len(calls) >= len(out.rounds) for calls in notes)
        assert engine.generate(prompt, cfg, **way).tokens == timed.tokens


def test_a_trace_is_of_whole_rounds(tiny_config, tmp_path):
    """As many kernels in each round, and next to no idle time between two, on a file that a browser opens."""
    cfg = BenchConfig(synthetic="x", device="cuda", dtype="float32", max_len=256, max_new_tokens=160, cuda_graphs=True)
    engine = SyntheticEngine(tiny_config, default_drafter_config(tiny_config), cfg, uniform_routing=True)
    prompt = random_prompts(512, 20, 1, seed=1)[0]
    for name, way in ways(engine, cfg).items():
        path = tmp_path / f"{name}.json"
        found = traced(engine, prompt, cfg, path, **way)
        events = json.loads(path.read_text())["traceEvents"]
        kernels = [e for e in events if e.get("cat") == "kernel"]
        assert len(kernels) == found["kernels"] * trace.ROUNDS and found["kernels"] > 20
        assert 0 <= found["host_us"] < found["round_us"]
    with pytest.raises(ValueError, match="more rounds"):
        traced(engine, prompt, replace(cfg, max_new_tokens=5), tmp_path / "short.json", speculate=False)
