"""Norms, heads and routing by the kernels of a decode step, by their definition."""

from dataclasses import replace

import pytest
import torch

from mimo_runtime.config import EngineConfig
from mimo_runtime.draft_model import draft_context, draft_forward, new_draft_caches
from mimo_runtime.engine import Engine
from mimo_runtime.load import LoadConfig, Moe, load_target
from mimo_runtime.load_drafter import load_drafter
from mimo_runtime.model import new_caches, target_forward
from tests.runtime.conftest import assert_own_tokens, drafter_folder

KINDS = "plain", "kernel"
EVERY = {"experts": "packed", "attention": "kernel", "linears": "kernel", "fusions": "kernel"}


def models(folder, fusions, **more):
    cfg = LoadConfig("cpu", torch.bfloat16, fusions=fusions, **more)
    target = load_target(folder, cfg)
    return target, load_drafter(folder / "dflash", target, cfg)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("rows", [1, 8, 16, 21])
def test_a_forward_pass_is_that_of_single_operations(release, rows, attention):
    """Logits, taps and caches. Norms and routing round alike; heads that go straight into the cache rotate with one
    rounding instead of three. 21 rows are more than the kernels take."""
    ids = torch.randint(0, 500, (30 + rows,), generator=torch.Generator().manual_seed(rows))
    found = {}
    for kind in KINDS:
        target, _ = models(release, kind, attention=attention)
        caches = new_caches(target, 96, 32)
        target_forward(target, caches, ids[:30], 0)
        start = torch.tensor(30)
        logits, taps = target_forward(target, caches, ids[30:], start, taps=(0, 3, 1), min_rows=8)
        found[kind] = [logits, taps, *(t.float() for cache in caches for t in cache.ring())]
    same = rows > 16 or attention == "plain"
    for plain, kernel in zip(*found.values(), strict=True):
        error = (kernel - plain).norm() / plain.norm()
        assert error == 0 if same else error < 0.02
    assert torch.equal(found["plain"][0], found["kernel"][0]) == same


def test_a_drafter_is_that_of_single_operations(release):
    found = {}
    g = torch.Generator().manual_seed(0)
    taps = torch.randn(11, models(release, "plain")[1].fc.shape[1], generator=g)
    for kind in KINDS:
        target, drafter = models(release, kind)
        caches = new_draft_caches(drafter, 96)
        draft_context(drafter, caches, taps.bfloat16(), torch.tensor(5))
        hidden, logits = draft_forward(target, drafter, caches, torch.tensor([7]), torch.tensor(16))
        found[kind] = [hidden.float(), logits, *(t.float() for c in caches for t in (c.k, c.v))]
    for plain, kernel in zip(*found.values(), strict=True):
        assert (kernel - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("budget", [0, 15], ids=["chain", "tree"])
@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("head", [{}, {"conv_kernel_size": 2, "selector_rank": 8}], ids=["plain", "DFlash2"])
def test_drafts_change_no_token(release, tmp_path, tiny_config, block, head, budget):
    """With all kernels of a step; every token is the plain model's own, up to a near tie."""
    drafter_folder(tmp_path / "drafter", tiny_config, block_size=block, **head)
    cfg = EngineConfig(device="cpu", max_len=128, drafter=str(tmp_path / "drafter"), tree_budget=budget, **EVERY)
    engine, plain = Engine(release, cfg), Engine(release, replace(cfg, **dict.fromkeys(EVERY, "plain")))
    assert_own_tokens(engine, plain)


def test_what_cannot_be_fused_is_refused_or_left_plain(release):
    with pytest.raises(ValueError, match="fusions kernel needs bfloat16"):
        load_target(release, LoadConfig("cpu", torch.float32, fusions="kernel"))
    target, drafter = models(release, "auto")  # a CPU runs no decode kernels unless it is told to
    for layer in (*target.layers, *drafter.layers):
        assert not (layer.input_norm.fused or layer.attention.fused)
    target, drafter = models(release, "kernel")
    assert all(layer.mlp.fused for layer in target.layers if isinstance(layer.mlp, Moe))
    assert drafter.norm.fused and drafter.layers[0].attention.fused and target.norm.fused
