"""One drafter in four implementations: transformers' generation, our decoding loop, the runtime, and the replay."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mimo_qat.checkpoint.reader import load_model
from mimo_qat.data import pack
from mimo_qat.distill import evaluate as decode
from mimo_qat.distill.config import DistillConfig
from mimo_qat.distill.replay import replay
from mimo_qat.distill.start import new_drafter
from mimo_qat.distill.train import Distiller
from mimo_qat.models.dflash_files import load_drafter, save_drafter
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine

PROMPTS, NEW, SIZE = [[17, 3, 99, 200, 41, 7], list(range(40, 62)), [8, 8, 8]], 48, 6
HEADS = {"plain": {}, "DFlash2": {"conv_kernel_size": 2, "selector_rank": 8}, "conv": {"conv_kernel_size": 2}}


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts/draft_parity.py"
    spec = importlib.util.spec_from_file_location("draft_parity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(reference, tmp_path, request):
    """A folder whose drafter has half learned what its target writes, read back by every implementation."""
    model = load_model(reference, torch.float32).eval()
    texts = [(p, decode.greedy(model, p, NEW)) for p in PROMPTS]
    rows = pack([{"input_ids": p + t, "loss_mask": [0] * len(p) + [1] * len(t)} for p, t in texts], 192, 0)
    config = DistillConfig(
        target="t", data="d", output_dir=str(tmp_path / "run"), num_draft_layers=1, block_size=SIZE, num_taps=3,
        intermediate_size=128, sliding_window=20, mask_token_id=511, num_anchors=64, max_steps=40, learning_rate=3e-3,
        save_steps=0, logging_steps=100, bf16=False, use_cpu=True, **HEADS[request.param],
    )  # fmt: skip
    run = Distiller(config, model, new_drafter(config, model, 511), rows, {n: v[:0] for n, v in rows.items()})
    run.run()
    if request.param == "DFlash2":
        with torch.no_grad():  # a few steps have hardly moved it from the identity
            run.drafter.candidate_selector.successor_codebook.normal_(std=3.0)
    save_drafter(run.drafter, tmp_path / "drafter")
    cfg = EngineConfig(dtype="float32", device="cpu", max_len=160, drafter=str(tmp_path / "drafter"), tree_budget=20)
    return SimpleNamespace(
        model=model,
        drafter=load_drafter(tmp_path / "drafter", torch.float32),
        engine=Engine(reference, cfg),
        texts=texts,
        rows=rows,
    )


@pytest.mark.parametrize("pair", ["plain", "conv"], indirect=True)
def test_transformers_drafts_and_accepts_as_the_runtime_does(pair, script):
    accepted = set()
    for prompt, text in pair.texts:
        tokens, theirs = script.transformers_rounds(pair.model, pair.drafter, prompt, NEW)
        _, ours = script.runtime_rounds(pair.engine, prompt, NEW)
        assert tokens == text and len(theirs) > 5 and abs(len(theirs) - len(ours)) <= 1
        common = min(len(theirs), len(ours))
        assert theirs[:common] == ours[:common]
        assert all(len(drafts) == SIZE - 1 for drafts, _ in theirs)
        accepted |= {n for _, n in theirs}
        found = script.compare(pair.model, pair.drafter, pair.engine, prompt, NEW)
        assert found["first_difference"] is None and found["same_text"] and found["rounds"] == common
    assert len(accepted) > 2


@pytest.mark.parametrize("pair", ["plain"], indirect=True)
def test_drafts_do_not_depend_on_how_many_slots_are_read(pair, script, monkeypatch):
    """Exactly those that a draft may see, its own block's among them, or all."""
    for prompt, _ in pair.texts:
        found = []
        for bucket in (1, 4096):
            monkeypatch.setattr("mimo_runtime.cache.BUCKET", bucket)
            found.append(script.runtime_rounds(pair.engine, prompt, NEW))
        assert found[0] == found[1]


def test_the_comparison_sees_another_drafter(reference, script, write_drafter, tmp_path, tiny_config):
    """Two random drafters: the text is the same, the rounds are not."""
    model = load_model(reference, torch.float32)
    engine = Engine(reference, EngineConfig(dtype="float32", device="cpu", max_len=160))
    other = load_drafter(write_drafter(tmp_path / "other", tiny_config, seed=9), torch.float32)
    found = script.compare(model, other, engine, PROMPTS[0], 20)
    assert found["same_text"] and found["first_difference"] == 0


@pytest.mark.parametrize("pair", ["plain", "DFlash2"], indirect=True)
def test_replay_and_both_decoding_loops_count_the_same_rounds(pair):
    """Chains in all three; trees in the runtime and in the replay."""
    texts = {tuple(t.prompt): t for t in replay(pair.model, pair.drafter, pair.rows, (), (20,))}
    chains = []
    for prompt, text in pair.texts:
        found = texts[tuple(prompt)].rounds
        loop = decode.speculate(pair.model, pair.drafter, prompt, NEW)
        assert loop.tokens == text and loop.rounds == found["chain"]
        for tree, name in ((False, "chain"), (True, "tree 20")):
            out = pair.engine.generate(prompt, SamplingConfig(max_new_tokens=NEW), tree=tree)
            assert out.tokens == text
            assert [r.accepted + 1 for r in out.rounds if not r.cut] == found[name], name
        chains += found["chain"]
        assert len(found["tree 20"]) <= len(found["chain"])
    assert len(set(chains)) > 2
    if pair.drafter.candidate_selector is not None:
        assert any(t.rounds["argmax"] != t.rounds["chain"] for t in texts.values())
