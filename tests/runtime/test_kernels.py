"""Decode kernels in the model, by their definitions: experts that stay MXFP4 codes, attention over the ring."""

from dataclasses import replace

import pytest
import torch

from mimo_kernels import mxfp4
from mimo_kernels.moe import PackedExperts, unpack_experts
from mimo_qat.checkpoint.reader import Checkpoint
from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.load import LoadConfig, Moe, PlainExperts, load_target
from mimo_runtime.model import new_caches, target_forward
from mimo_runtime.parallel import Ranks

PACKED = LoadConfig("cpu", torch.bfloat16, experts="packed")


def routed(target):
    return [layer.mlp.experts for layer in target.layers if isinstance(layer.mlp, Moe)]


@pytest.mark.parametrize("size", [1, 2])
def test_packed_shares_are_the_stored_codes(release, size):
    """Decoded again, the packed share of each rank is its part of the values that the file means."""
    reader = Checkpoint(release)
    first = next(i for i, layer in enumerate(reader.geometry.layers) if layer.moe)
    gate_up, down = reader.experts(first, torch.float32)
    for rank in range(size):
        target = load_target(release, LoadConfig("cpu", torch.bfloat16, experts="packed", ranks=Ranks(rank, size)))
        codes = unpack_experts(routed(target)[0])
        inner = down.shape[2] // size
        mine = slice(rank * inner, (rank + 1) * inner)
        halves = torch.cat([half[:, mine] for half in gate_up.chunk(2, dim=1)], dim=1)
        assert torch.equal(mxfp4.decode(codes.gate_up, codes.gate_up_scales, torch.float32), halves)
        assert torch.equal(mxfp4.decode(codes.down, codes.down_scales, torch.float32), down[:, :, mine])


def test_rounding_to_nearest_packs_what_it_would_have_shown(reference):
    plain = load_target(reference, LoadConfig("cpu", torch.bfloat16, rtn="even"))
    packed = load_target(reference, LoadConfig("cpu", torch.bfloat16, rtn="even", experts="packed"))
    for values, experts in zip(routed(plain), routed(packed), strict=True):
        codes = unpack_experts(experts)
        assert torch.equal(mxfp4.decode(codes.gate_up, codes.gate_up_scales), values.gate_up)
        assert torch.equal(mxfp4.decode(codes.down, codes.down_scales), values.down)


@pytest.mark.parametrize("rows", [1, 8, 21, 150])
def test_a_forward_pass_with_packed_experts_is_that_with_plain_ones(release, rows):
    """Up to where the two round: more than 16 rows are for the kernels of a prompt. Two rows in a hundred may lie so
    near a tie of the router that rounding gives them other experts."""
    ids = torch.randint(0, 500, (rows,), generator=torch.Generator().manual_seed(rows))
    logits, chosen = {}, {}
    for kind in ("plain", "packed"):
        target = load_target(release, LoadConfig("cpu", torch.bfloat16, experts=kind))
        assert isinstance(routed(target)[0], PackedExperts if kind == "packed" else PlainExperts)
        layers = [replace(layer, mlp=replace(layer.mlp, chosen=[])) for layer in target.layers[1:]]
        target = replace(target, layers=(target.layers[0], *layers))
        logits[kind] = target_forward(target, new_caches(target, 160, 160), ids, 0)[0]
        chosen[kind] = torch.cat([layer.mlp.chosen[0].sort(-1).values for layer in layers], dim=-1)
    alike = (chosen["packed"] == chosen["plain"]).all(-1)
    assert (~alike).sum() <= 0.02 * rows
    error = (logits["packed"] - logits["plain"])[alike].norm() / logits["plain"][alike].norm()
    assert 0 < error < 0.02


def test_drafts_change_no_token_of_packed_experts(release):
    engine = Engine(release, EngineConfig(device="cpu", experts="packed", max_len=128))
    sampling = SamplingConfig(max_new_tokens=24, stop_token_ids=(-1,))
    plain = engine.generate([3, 1, 4, 1, 5], sampling, speculate=False).tokens
    assert engine.generate([3, 1, 4, 1, 5], sampling).tokens == plain
    forced = engine.generate([3, 1, 4, 1, 5], sampling, forced_acceptance=[3, 4])
    assert forced.tokens == plain and any(r.accepted > 2 for r in forced.rounds)


@pytest.mark.parametrize("length", [3, 40])
def test_attention_over_the_ring_is_attention(release, length):
    """After prefills shorter and longer than the window: a block, and a single row that is padded to one."""
    ids = torch.randint(0, 500, (length + 8,), generator=torch.Generator().manual_seed(length))
    found = {}
    for kind in ("plain", "kernel"):
        target = load_target(release, LoadConfig("cpu", torch.bfloat16, attention=kind))
        assert all(layer.attention.kernel == (kind == "kernel") for layer in target.layers)
        caches = new_caches(target, 64, 8)
        target_forward(target, caches, ids[:length], 0)
        start = torch.tensor(length)
        alone = target_forward(target, caches, ids[length : length + 1], start, min_rows=8)[0]
        found[kind] = torch.cat((target_forward(target, caches, ids[length:], start)[0], alone))
    assert (found["kernel"] - found["plain"]).norm() < 0.02 * found["plain"].norm()
    assert torch.equal(found["kernel"][0], found["kernel"][-1])  # the same row, whatever its neighbours


@pytest.mark.parametrize("nodes", [5, 15, 17])
def test_the_rows_of_a_tree_see_what_they_see_in_single_operations(release, nodes):
    """Behind 40 positions, which a window does not hold; 17 nodes are more than the kernel takes."""
    g = torch.Generator().manual_seed(nodes)
    ids = torch.randint(0, 500, (41 + nodes,), generator=g)
    parents = [int(torch.randint(0, i + 1, (), generator=g)) for i in range(nodes)]
    depths = [0]
    visible = torch.eye(nodes + 1, dtype=torch.bool)
    for node, parent in enumerate(parents, 1):
        depths.append(depths[parent] + 1)
        visible[node] |= visible[parent]
    tree = torch.tensor(depths), visible
    found = {}
    for kind in ("plain", "kernel"):
        target = load_target(release, LoadConfig("cpu", torch.bfloat16, attention=kind))
        caches = new_caches(target, 64, nodes + 1)
        target_forward(target, caches, ids[:40], 0)
        found[kind] = target_forward(target, caches, ids[40:], torch.tensor(40), tree=tree)[0]
    assert (found["kernel"] - found["plain"]).norm() < 0.02 * found["plain"].norm()
    assert torch.equal(*found.values()) == (nodes > 15)


def test_drafts_change_no_token_with_kernels(release):
    engine = Engine(release, EngineConfig(device="cpu", experts="packed", attention="kernel", max_len=128))
    sampling = SamplingConfig(max_new_tokens=40, stop_token_ids=(-1,))
    plain = engine.generate([3, 1, 4, 1, 5], sampling, speculate=False).tokens
    for how in ({}, {"forced_acceptance": [3, 4]}):
        assert engine.generate([3, 1, 4, 1, 5], sampling, **how).tokens == plain


def test_what_cannot_be_packed_is_refused_or_left_plain(release, reference):
    for folder, dtype in ((reference, torch.bfloat16), (release, torch.float32)):
        with pytest.raises(ValueError, match="needs MXFP4 experts and dtype bfloat16"):
            load_target(folder, LoadConfig("cpu", dtype, experts="packed"))
        assert isinstance(routed(load_target(folder, LoadConfig("cpu", dtype, experts="auto")))[0], PlainExperts)
    with pytest.raises(ValueError, match="attention kernel needs bfloat16"):
        load_target(release, LoadConfig("cpu", torch.float32, attention="kernel"))
