"""The drafter: training forward == cached drafting, no leak, rotary, window, sinks, and its folder."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel
from transformers.cache_utils import DFlashCache, DynamicCache

from mimo_qat.checkpoint.reader import read_drafter
from mimo_qat.distill.blocks import block_sparse_mask, dense_mask, make_blocks
from mimo_qat.models.dflash_files import load_drafter, save_drafter
from mimo_qat.models.modeling_dflash import DFlashConfig, DFlashDraftModel, apply_rotary, attend, rotary_table
from tests.qat.drafters import BLOCK, HEAD, HIDDEN, TAPS, config, drafter, sequence, training_rows


def cached_rows(model, ids, embed, taps, anchors, cache):
    """Drafts at every anchor in turn, feeding the taps of the tokens committed in between and cropping the block."""
    done, rows = 0, []
    for a in anchors:
        noise = embed(torch.cat((ids[:, a : a + 1], torch.full((1, BLOCK - 1), 63)), 1))
        with torch.no_grad():
            out = model(noise, taps[:, done:a], past_key_values=cache).last_hidden_state
        cache.crop(-BLOCK)
        done = a
        assert cache.get_seq_length() == a, "the drafter's cache must hold the committed tokens and no block"
        rows.append(out[0, 1:])
    return torch.stack(rows)


VARIANTS = [
    {},
    {"attn_implementation": "eager"},
    {"is_causal": True},
    {"use_sliding_window": False, "sliding_window": None},
    {"layer_types": ["sliding_attention", "full_attention"], "is_causal": True},
    {"attention_sink_bias": False, "attention_value_scale": 1.0, "partial_rotary_factor": 1.0},
    HEAD,
    HEAD | {"is_causal": True, "conv_group_size": 8},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", [DFlashCache, DynamicCache])
def test_training_forward_equals_cached_drafting(changes, kind):
    model = drafter(**changes)
    ids, embed, taps = sequence()
    anchors = [1, 5, 6, 9, 13, 20]
    cache = kind(config=model.config)
    cache.activate_past_recording()
    trained = training_rows(model, ids, embed, taps, anchors)
    served = cached_rows(model, ids, embed, taps, anchors, cache)
    worst = (trained - served).abs().amax((1, 2))
    assert (worst < 1e-5).all(), dict(zip(anchors, worst.tolist(), strict=True))
    assert trained.std() > 0.1


def by_hand(model, anchor_embed, taps):
    """One block in float64, written from the description of the format with loops over heads and queries.

    The context is `fc` and `hidden_norm` of the taps and nothing else: no input norm, no MLP, no residual.
    """
    c = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()

    def rope(x, position):
        half = int(c.head_dim * c.partial_rotary_factor) // 2
        turn = position * c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[:half], x[half : 2 * half]) * torch.exp(1j * turn)
        return torch.cat((turned.real, turned.imag, x[2 * half :]))

    def conv(x, kernel, side, corrections):
        """Loops over rows and channels; corrections [BLOCK, 2 sides, 2 taps, groups], kernel [2 sides, 2 taps, D]."""
        out, group = torch.zeros_like(x), c.conv_group_size
        for t in range(BLOCK):
            for channel in range(HIDDEN):
                for tap in range(2):
                    weight = kernel[side, tap, channel] + corrections[t, side, tap, channel // group]
                    out[t, channel] += weight * (x[t - tap, channel] if t >= tap else 0.0)
        return out

    def around(sublayer, y, name):
        if c.conv_kernel_size is None:
            return sublayer(y)
        corrections = (y @ w[name + ".kernel_projection.weight"].T).view(BLOCK, 2, 2, -1)
        kernel = w[name + ".base_kernel"]
        return conv(sublayer(conv(y, kernel, 0, corrections)), kernel, 1, corrections)

    past = taps.shape[0]
    context = norm(taps.double() @ w["fc.weight"].T, w["hidden_norm.weight"])
    x = torch.stack([anchor_embed.double()] + [w["mask_embedding"]] * (BLOCK - 1))
    group = c.num_attention_heads // c.num_key_value_heads
    for i in range(c.num_hidden_layers):
        p, a = f"layers.{i}.", f"layers.{i}.self_attn."

        def attention(y, a=a):
            keys = torch.cat((context, y))
            q = (y @ w[a + "q_proj.weight"].T).view(BLOCK, -1, c.head_dim)
            k = (keys @ w[a + "k_proj.weight"].T).view(past + BLOCK, -1, c.head_dim)
            v = 0.612 * (keys @ w[a + "v_proj.weight"].T).view(past + BLOCK, -1, c.head_dim)
            out = torch.zeros(BLOCK, c.num_attention_heads, c.head_dim, dtype=torch.float64)
            for row in range(BLOCK):
                for head in range(c.num_attention_heads):
                    query = rope(norm(q[row, head], w[a + "q_norm.weight"]), past + row)
                    total = torch.exp(w[a + "attention_sink_bias"][head])
                    for j in range(past + BLOCK):
                        if j >= past or j + c.sliding_window > past + row:
                            key = rope(norm(k[j, head // group], w[a + "k_norm.weight"]), j)
                            weight = torch.exp(query @ key / c.head_dim**0.5)
                            total = total + weight
                            out[row, head] += weight * v[j, head // group]
                    out[row, head] /= total
            return out.flatten(1) @ w[a + "o_proj.weight"].T

        def mlp(y, p=p):
            gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
            return (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T

        x = x + around(attention, norm(x, w[p + "input_layernorm.weight"]), p + "attention_conv")
        x = x + around(mlp, norm(x, w[p + "post_attention_layernorm.weight"]), p + "mlp_conv")
    return norm(x, w["norm.weight"])


@pytest.mark.parametrize("changes", [{}, HEAD], ids=["plain", "conv"])
def test_forward_equals_the_format_by_hand(changes):
    model = drafter(seed=4, **changes)
    with torch.no_grad():  # norms that are not one
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    assert (model.candidate_selector is None) == (not changes)
    ids, embed, taps = sequence()
    noise = embed(torch.cat((ids[:, 9:10], torch.full((1, BLOCK - 1), 63)), 1))
    with torch.no_grad():
        got = model(noise, taps[:, :9]).last_hidden_state[0]
        expected = by_hand(model, noise[0, 0], taps[0, :9])
    assert (got - expected).abs().max() < 1e-4 and expected.std() > 0.1


def test_incremental_context_equals_full_recompute():
    model = drafter()
    ids, embed, taps = sequence()
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    steps = cached_rows(model, ids, embed, taps, [3, 4, 8, 12, 19], cache)
    for rows, a in zip(steps, [3, 4, 8, 12, 19], strict=True):
        noise = embed(torch.cat((ids[:, a : a + 1], torch.full((1, BLOCK - 1), 63)), 1))
        with torch.no_grad():
            whole = model(noise, taps[:, :a]).last_hidden_state[0, 1:]
        assert (rows - whole).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{}, HEAD], ids=["plain", "conv"])
def test_no_block_sees_its_anchor_position_its_future_or_another_block(changes):
    model = drafter(use_sliding_window=False, sliding_window=None, **changes)
    ids, embed, taps = sequence()
    anchors, a = [4, 10, 17], 10
    before = training_rows(model, ids, embed, taps, anchors)
    future_taps, future_ids = taps.clone(), ids.clone()
    future_taps[:, a:] += 1.0
    future_ids[:, a + 1 :] = (ids[:, a + 1 :] + 7) % 60  # includes the anchor of the third block
    future_ids[:, 4] = (ids[:, 4] + 7) % 60  # the anchor of the first block
    after = training_rows(model, future_ids, embed, future_taps, anchors)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[2], after[2])
    last_seen = taps.clone()
    last_seen[:, a - 1] += 1.0
    assert not torch.equal(before[1], training_rows(model, ids, embed, last_seen, anchors)[1])
    other_anchor = ids.clone()
    other_anchor[:, a] = (ids[:, a] + 1) % 60
    assert not torch.equal(before[1], training_rows(model, other_anchor, embed, taps, anchors)[1])


def test_window_edge_for_every_query():
    model = drafter(num_hidden_layers=1, sliding_window=6)
    ids, embed, taps = sequence()
    a, reference = 12, training_rows(model, ids, embed, taps, [12])[0]
    for kv in range(24):
        changed = taps.clone()
        changed[:, kv] += 1.0
        rows = training_rows(model, ids, embed, changed, [a])[0]
        moved = [k for k in range(1, BLOCK) if not torch.equal(rows[k - 1], reference[k - 1])]
        assert moved == [k for k in range(1, BLOCK) if kv < a and kv + 6 > a + k], f"context row {kv}"


def test_shifting_all_positions_changes_nothing():
    model = drafter()
    ids, embed, taps = sequence()
    at_zero = training_rows(model, ids, embed, taps, [5, 16])
    shifted = training_rows(model, ids, embed, taps, [5, 16], positions=torch.arange(24)[None] + 500)
    assert (at_zero - shifted).abs().max() < 1e-4
    stretched = training_rows(model, ids, embed, taps, [5, 16], positions=torch.arange(24)[None] * 2)
    assert (at_zero - stretched).abs().max() > 1e-2


def test_partial_rotary_equals_complex_rotation():
    x = torch.randn(1, 2, 5, 16, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 7, 100, 3000]])
    cos, sin = rotary_table(positions, config(), torch.float64)
    out = apply_rotary(x, cos, sin)
    turn = positions[0, :, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)  # 8 of 16 dimensions
    expected = torch.complex(x[..., :4], x[..., 4:8]) * torch.exp(1j * turn)
    assert torch.allclose(out[..., :4], expected.real, atol=1e-4)  # the table is computed in float32
    assert torch.allclose(out[..., 4:8], expected.imag, atol=1e-4)
    assert torch.equal(out[..., 8:], x[..., 8:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_equals_a_float64_oracle_with_a_sink(implementation):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, r, 16, generator=g) for h, r in ((4, 3), (2, 9), (2, 9)))
    mask = torch.rand(2, 1, 3, 9, generator=g) > 0.4
    mask[..., 0] = True
    sink = torch.randn(4, generator=g)
    got = attend(q, k, v, mask, sink, implementation)
    q64, k64, v64 = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    weight = torch.exp(q64 @ k64.mT / 4) * mask
    expected = weight @ v64 / (weight.sum(-1, keepdim=True) + torch.exp(sink.double())[None, :, None, None])
    assert (got - expected).abs().max() < 1e-5
    assert (attend(q, k, v, mask, None, implementation) - got).abs().max() > 1e-2


def test_value_scale_reaches_context_and_block():
    ids, embed, taps = sequence()
    model = drafter(num_hidden_layers=1)
    rows = training_rows(model, ids, embed, taps, [8])
    model.layers[0].self_attn.v_proj.weight.data *= 0.612
    model.config.attention_value_scale = 1.0
    assert (training_rows(model, ids, embed, taps, [8]) - rows).abs().max() < 1e-5


def test_slots_after_the_anchor_always_take_the_trained_vector():
    model = drafter()
    _, embed, taps = sequence()
    first = embed(torch.tensor([[5]]))
    with torch.no_grad():
        rows = [
            model(torch.cat((first, torch.full((1, BLOCK - 1, HIDDEN), fill)), 1), taps[:, :6])[0]
            for fill in (0.0, 9.0)
        ]
    assert torch.equal(*rows)
    before = rows[0]
    model.mask_embedding.data += 1
    with torch.no_grad():
        assert not torch.equal(before, model(first.expand(1, BLOCK, -1), taps[:, :6])[0])


def test_left_padding_changes_nothing():
    model = drafter(use_sliding_window=False, sliding_window=None)
    _, embed, taps = sequence()
    noise = embed(torch.tensor([[5, 63, 63, 63]]))
    padded = torch.cat((torch.randn(1, 3, TAPS * HIDDEN), taps[:, :6]), 1)
    positions = torch.tensor([[0, 0, 0, *range(10)]])
    mask = torch.tensor([[0, 0, 0] + [1] * 10])
    with torch.no_grad():
        got = model(noise, padded, position_ids=positions, attention_mask=mask).last_hidden_state
        assert (got - model(noise, taps[:, :6]).last_hidden_state).abs().max() < 1e-5


def test_folder_round_trip(tmp_path):
    model = drafter()
    save_drafter(model, tmp_path)
    loaded = load_drafter(tmp_path, torch.float32)
    state = model.state_dict()
    assert "mask_embedding" in state and any("attention_sink_bias" in name for name in state)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state.pop(name).bfloat16().float()), name
    assert not state
    with safe_open(tmp_path / "dflash_draft_model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() is None
    assert len(names) == 3 + 2 * 12 and "mask_embedding" not in names  # five layers make the published 63
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].keys() == names
    side = torch.load(tmp_path / "mask_embedding.pt", weights_only=True)
    assert set(side) == {"mask_token_id", "embedding"} and side["mask_token_id"] == 63
    assert side["embedding"].dtype == torch.bfloat16
    values, tensors, row = read_drafter(tmp_path)
    assert set(tensors) == names and torch.equal(row, side["embedding"])
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    again = save_drafter(load_drafter(tmp_path), tmp_path / "again")
    for name in ("dflash_draft_model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (tmp_path / name).read_bytes() == (again / name).read_bytes(), name
    assert values["dflash_config"]["swa_window_size"] == values["sliding_window"] == 6


def test_config_json_is_the_superset_that_engines_read(tmp_path):
    save_drafter(drafter(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    nested = values["dflash_config"]
    for name in ("target_layer_ids", "block_size", "mask_token_id"):
        assert values[name] == nested[name]
    assert values["is_causal"] is nested["causal"] is False
    assert values["use_sliding_window"] is nested["use_swa"] is True
    assert values["layer_types"] == ["sliding_attention"] * 2
    assert values["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.5,
    }
    assert (values["rope_theta"], values["partial_rotary_factor"]) == (10000, 0.5)
    assert nested["attention_value_scale"] == 0.612 and nested["attention_sink_bias"] is True
    assert values["model_type"] == "qwen3" and values["architectures"] == ["DFlashDraftModel"]


def test_remote_code_loads_the_mask_vector_too(tmp_path, remote_code):
    save_drafter(drafter(), tmp_path / "dflash")
    expected = load_drafter(tmp_path / "dflash", torch.float32)
    model = AutoModel.from_pretrained(tmp_path / "dflash", trust_remote_code=True, dtype=torch.float32)
    assert type(model).__name__ == "DFlashDraftModel" and type(model) is not DFlashDraftModel
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_missing_tensor_and_a_foreign_mask_id_are_refused(tmp_path):
    save_drafter(drafter(), tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "config.json").read_text())
            | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3}
        )
    )
    with pytest.raises(ValueError, match=r"layers\.2"):
        load_drafter(tmp_path)
    save_drafter(drafter(), tmp_path)
    torch.save({"mask_token_id": 7, "embedding": torch.zeros(HIDDEN).bfloat16()}, tmp_path / "mask_embedding.pt")
    with pytest.raises(ValueError, match="7"):
        load_drafter(tmp_path)


PUBLISHED = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 5,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "v_head_dim": 128,
    "num_target_layers": 48,
    "vocab_size": 152576,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "rms_norm_eps": 1e-06,
    "block_size": 8,
    "dflash_config": {
        "target_layer_ids": [0, 11, 23, 35, 47],
        "mask_token_id": 151675,
        "num_anchors": 4096,
        "block_size": 8,
        "loss_decay_gamma": 7.0,
        "use_swa": True,
        "swa_window_size": 1024,
        "backbone_rotary_base": 5000000,
        "attention_value_scale": 0.612,
        "attention_sink_bias": True,
    },
}


def test_published_configuration_gives_the_published_63_tensors():
    with torch.device("meta"):
        model = DFlashDraftModel(DFlashConfig(**PUBLISHED))
    tensors = {n: p for n, p in model.named_parameters() if n != "mask_embedding"}
    assert len(tensors) == 63
    assert tensors["fc.weight"].shape == (4096, 20480)
    assert tensors["layers.4.self_attn.attention_sink_bias"].shape == (64,)
    # The published file has 2,936,121,080 bytes; what is left over is its 8-byte length and its header.
    header = 2_936_121_080 - sum(2 * p.numel() for p in tensors.values())
    assert 63 * 80 < header < 63 * 160
    assert model.config.layer_rule(0) == (1024, False)
    assert model.config.partial_rotary_factor == 0.5 and model.config.attention_value_scale == 0.612


def test_the_v26_dialect_reads_the_same():
    values = {k: v for k, v in PUBLISHED.items() if k not in ("partial_rotary_factor", "rope_theta")}
    nested = {"target_layer_ids": [0, 11, 23, 35, 47], "mask_token_id": 151675, "attention_value_scale": 0.612}
    values |= {
        "dflash_config": nested,
        "layer_types": ["sliding_attention"] * 5,
        "use_sliding_window": True,
        "is_causal": False,
        "add_swa_attention_sink_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }
    new, old = DFlashConfig(**values).published(), DFlashConfig(**PUBLISHED).published()
    extra = {"num_anchors", "loss_decay_gamma", "backbone_rotary_base"}
    old["dflash_config"] = {k: v for k, v in old["dflash_config"].items() if k not in extra}
    assert new == old


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_layer_ids": None}, "no target_layer_ids"),
        ({"dflash_config": {"mask_token_id": 5}}, "mask_token_id is 63 at the top and 5 inside"),
        ({"sliding_window": 3}, "smaller than block_size"),
        ({"is_causal": None, "layer_types": ["sliding_attention", "full_attention"]}, "no is_causal"),
        ({"v_head_dim": 8}, "v_head_dim"),
        ({"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ],
)
def test_what_the_drafter_lacks_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention trains on CUDA only")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length, anchors", [(300, 50), (384, 48)], ids=["any size", "whole tiles"])
def test_flex_attention_equals_the_dense_mask(causal, length, anchors):
    """Outputs and all gradients, sinks included, with documents, a window and invalid blocks."""
    torch.manual_seed(0)
    model = DFlashDraftModel(
        config(is_causal=causal, sliding_window=40, hidden_size=128, head_dim=32, block_size=8)
    ).cuda()
    batch = {
        "input_ids": torch.randint(0, 60, (2, length)),
        "loss_mask": torch.randint(0, 4, (2, length)).clamp(max=1),
        "doc_ids": (torch.arange(length) // 110).repeat(2, 1),
        "position_ids": (torch.arange(length) % 110).repeat(2, 1),
    }
    batch["loss_mask"][1, 40:] = 0  # few anchors: invalid blocks follow
    blocks = make_blocks(batch, 8, anchors, torch.Generator().manual_seed(0)).to("cuda")
    assert not blocks.valid.all()
    embeds, taps = torch.randn(2, anchors, 128, device="cuda"), torch.randn(2, length, TAPS * 128, device="cuda")
    weights = torch.randn(int(blocks.valid.sum()), 8, 128, device="cuda")
    results = []
    for build in (dense_mask, block_sparse_mask):
        model.zero_grad()
        masks = {rule: build(blocks, 8, rule) for rule in model.rules()}
        out = model.run_layers(model.block_rows(embeds), model.fuse(taps), blocks.position_ids, masks)
        out = out.unflatten(1, (-1, 8))[blocks.valid]
        (out * weights).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if n != "mask_embedding"}
        results.append({"out": out.detach(), **grads})
    for name, dense in results[0].items():
        difference = (results[1][name] - dense).norm() / dense.norm()
        assert difference < 2e-3, f"{name}: {difference}"
