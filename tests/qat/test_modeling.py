"""The MiMo-V2 model against transformers' `mimo_v2_flash`, itself under caching, and its checkpoint names."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from mimo_qat.models import gpu_experts
from mimo_qat.models.compiled import use_training_kernels
from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
from mimo_qat.models.cpu_experts import use_bucketed_experts
from mimo_qat.models.modeling_mimo_v2 import CACHE, MiMoV2Experts, MiMoV2ForCausalLM, attend, visible_keys


def ids(*shape, seed=1):
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, **kwargs).logits


def flash_twin(model, config):
    """transformers' class with the weights of `model`, whose key-value heads must follow its hard-wired rule."""
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    same = ("vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim v_head_dim attention_value_scale n_routed_experts num_experts_per_tok "
            "tie_word_embeddings").split()  # fmt: skip
    theta = {"full_attention": config["rope_theta"], "sliding_attention": config["swa_rope_theta"]}
    twin = MiMoV2FlashForCausalLM(
        MiMoV2FlashConfig(
            **{k: config[k] for k in same},
            rms_norm_eps=config["layernorm_epsilon"],
            sliding_window=model.config.sliding_window,
            layer_types=model.config.layer_types,
            rope_parameters={
                kind: {"rope_type": "default", "rope_theta": float(t), "partial_rotary_factor": 0.334}
                for kind, t in theta.items()
            },
            attn_implementation="eager",
        )
    ).eval()
    state = {k.replace("attention_sink_bias", "sinks"): v for k, v in model.state_dict().items()}
    twin.load_state_dict(state)  # strict
    return twin


@pytest.mark.parametrize("convention, window", [("hub", 8), ("sglang", 9)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_equal_transformers_mimo_v2_flash(tiny_config, convention, window, implementation):
    config = tiny_config | {"attention_projection_layout": "split", "swa_window_convention": convention}
    torch.manual_seed(3)
    model = MiMoV2ForCausalLM(MiMoV2Config(**config, attn_implementation=implementation)).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "sink" in name or "correction" in name:
            tensor.data.normal_(std=0.3)
    assert model.config.sliding_window == window
    x = ids(2, 40)
    theirs = logits(flash_twin(model, config), x)
    assert (logits(model, x) - theirs).abs().max() < 1e-4
    assert theirs.abs().max() > 0.1  # the comparison is not between zeros


def test_window_switch_changes_the_logits(tiny_config):
    torch.manual_seed(0)
    hub = MiMoV2ForCausalLM(MiMoV2Config(**tiny_config)).eval()
    sglang = MiMoV2ForCausalLM(MiMoV2Config(**tiny_config | {"swa_window_convention": "sglang"})).eval()
    sglang.load_state_dict(hub.state_dict())
    x = ids(1, 12)
    a, b = logits(hub, x), logits(sglang, x)
    assert (a[:, :8] - b[:, :8]).abs().max() < 1e-5  # 8 keys fit both windows
    assert (a[:, 8] - b[:, 8]).abs().max() > 1e-3  # the ninth key is the 129th of the published geometry


def test_fused_projection_equals_split(tiny_model, tiny_config):
    split = MiMoV2ForCausalLM(MiMoV2Config(**tiny_config | {"attention_projection_layout": "split"})).eval()
    state = dict(tiny_model.state_dict())
    for i in range(4):
        heads, kv, qk, v = tiny_model.config.heads(i)
        fused, chunks = state.pop(f"model.layers.{i}.self_attn.qkv_proj.weight"), 2
        rows = [heads // chunks * qk, kv // chunks * qk, kv // chunks * v]
        parts: list[list] = [[], [], []]
        for chunk in fused.split(sum(rows)):
            for part, piece in zip(parts, chunk.split(rows), strict=True):
                part.append(piece)
        for which, part in zip("qkv", parts, strict=True):
            state[f"model.layers.{i}.self_attn.{which}_proj.weight"] = torch.cat(part)
    split.load_state_dict(state)
    x = ids(2, 20)
    assert (logits(tiny_model, x) - logits(split, x)).abs().max() < 1e-5


def test_cached_decoding_equals_one_forward(tiny_model):
    x = ids(2, 30)
    whole = logits(tiny_model, x)
    cache, rows = None, []
    for piece in x.split([5, 1, 9, 1, 1, 13], dim=1):
        with torch.no_grad():
            out = tiny_model(piece, past_key_values=cache, use_cache=True)
        cache = out[CACHE]
        rows.append(out.logits)
    assert (torch.cat(rows, 1) - whole).abs().max() < 1e-5


def test_left_padding_changes_nothing(tiny_model):
    x = ids(1, 20)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), x), dim=1)
    mask = (torch.arange(27) >= 7).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(tiny_model, padded, attention_mask=mask, position_ids=positions)
    assert got.isfinite().all()
    assert (got[:, 7:] - logits(tiny_model, x)).abs().max() < 1e-5


def test_packed_documents_do_not_see_each_other(tiny_model):
    a, b = ids(1, 11, seed=2), ids(1, 17, seed=3)
    positions = torch.cat((torch.arange(11), torch.arange(17)))[None]
    packed = logits(tiny_model, torch.cat((a, b), 1), position_ids=positions)
    assert (packed[:, :11] - logits(tiny_model, a)).abs().max() < 1e-5
    assert (packed[:, 11:] - logits(tiny_model, b)).abs().max() < 1e-5


def test_generate_equals_argmax_by_hand(tiny_model):
    x = ids(1, 9)
    got = tiny_model.generate(x, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for _ in range(12):
        x = torch.cat((x, logits(tiny_model, x)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, x)


def test_experts_implementations_agree(tiny_model):
    x = ids(2, 16)
    tiny_model.set_experts_implementation("eager")
    eager = logits(tiny_model, x)
    tiny_model.set_experts_implementation("grouped_mm")
    assert (logits(tiny_model, x) - eager).abs().max() < 1e-5
    use_bucketed_experts(tiny_model)
    assert (logits(tiny_model, x) - eager).abs().max() < 1e-5


def test_bucketed_experts_have_the_gradients_of_the_eager_ones(tiny_model):
    x = ids(2, 16)

    def gradients():
        tiny_model.zero_grad()
        tiny_model(x, labels=x).loss.backward()
        return {n: p.grad.clone() for n, p in tiny_model.named_parameters() if p.grad is not None}

    tiny_model.set_experts_implementation("eager")
    eager = gradients()
    use_bucketed_experts(tiny_model)
    for name, grad in gradients().items():
        assert torch.allclose(grad, eager[name], atol=1e-6), name


@pytest.mark.parametrize("kernels", ["one by one", pytest.param("generated", marks=pytest.mark.slow)])
def test_sorted_experts_are_the_weighted_sum_of_their_experts(kernels, monkeypatch):
    """Output and every gradient, router weights included, against a loop in float64; an expert without tokens too."""
    if kernels == "generated":  # as on a GPU
        monkeypatch.setattr(gpu_experts, "_fused", lambda function, *x: gpu_experts._compiled(function)(*x))
    config = SimpleNamespace(n_routed_experts=5, moe_intermediate_size=32, hidden_size=64, hidden_act="silu")
    experts = MiMoV2Experts(config)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    for parameter in experts.parameters():
        parameter.data = 0.3 * draw(*parameter.shape)
    chosen = torch.stack([torch.tensor([0, 1, 2, 4])[torch.randperm(4, generator=generator)[:2]] for _ in range(40)])
    x, weights, grad = draw(40, 64), draw(40, 2).sigmoid(), draw(40, 64)

    def run(forward, dtype):
        module = copy.deepcopy(experts).to(dtype)
        inputs = [x.to(dtype, copy=True).requires_grad_(), weights.to(dtype, copy=True).requires_grad_()]
        out = forward(module, inputs[0], chosen, inputs[1])
        out.backward(grad.to(dtype))
        return [out, *(t.grad for t in (*inputs, *module.parameters()))]

    def loop(module, x, chosen, weights):
        out = []
        for row, ids, w in zip(x, chosen, weights, strict=True):
            gate, up = (module.gate_up_proj[ids] @ row).chunk(2, dim=-1)
            out.append((w[:, None] * (module.down_proj[ids] @ (F.silu(gate) * up)[..., None])[..., 0]).sum(0))
        return torch.stack(out)

    for ours, exact in zip(
        run(gpu_experts.sorted_experts_forward, torch.float32), run(loop, torch.float64), strict=True
    ):
        assert (ours - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.slow
def test_training_kernels_change_nothing_but_rounding_and_compile_once_for_all_layers(tiny_model):
    x = ids(2, 16)

    def logits_and_gradients():
        tiny_model.zero_grad()
        out = tiny_model(x, labels=x, use_cache=False)
        out.loss.backward()
        return [out.logits.detach(), *(p.grad.clone() for p in tiny_model.parameters() if p.grad is not None)]

    before = logits_and_gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    use_training_kernels(tiny_model)
    for ours, theirs in zip(logits_and_gradients(), before, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert tiny_model.config._experts_implementation == gpu_experts.NAME
    # one graph for norms of the hidden size and of heads, and one a kind of attention and router
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
    assert not torch._dynamo.utils.counters["graph_break"]


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model):
    x = ids(2, 16)

    def gradients():
        tiny_model.zero_grad()
        tiny_model(x, labels=x).loss.backward()
        return {n: p.grad.clone() for n, p in tiny_model.named_parameters() if p.grad is not None}

    tiny_model.train()
    plain = gradients()
    tiny_model.gradient_checkpointing_enable()
    for name, grad in gradients().items():
        assert torch.allclose(grad, plain[name], atol=1e-6), name
    assert {n.split(".")[-1] for n in plain} >= {"gate_up_proj", "down_proj", "attention_sink_bias"}


def test_router_bias_selects_and_does_not_weigh(tiny_model):
    gate = tiny_model.model.layers[1].mlp.gate
    x = torch.randn(5, 96)
    gate.e_score_correction_bias.zero_()[3] = 100.0
    logit, weight, chosen = gate(x)
    assert (chosen == 3).any(-1).all()
    picked = logit.sigmoid().gather(1, chosen)
    assert torch.allclose(weight, picked / picked.sum(-1, keepdim=True))


def test_hidden_states_are_taken_before_the_final_norm(tiny_model):
    taps = {}
    for i, layer in enumerate(tiny_model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: taps.__setitem__(i, out))
    with torch.no_grad():
        out = tiny_model(ids(1, 6), output_hidden_states=[1, 4])
    assert [h is None for h in out.hidden_states] == [True, False, True, True, False]
    assert torch.equal(out.hidden_states[1], taps[0]) and torch.equal(out.hidden_states[4], taps[3])


def test_save_pretrained_writes_one_matrix_an_expert_and_reloads(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names
    assert not any(name.endswith("gate_up_proj") for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["layernorm_epsilon"] == 1e-5
    again = MiMoV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(logits(tiny_model, ids(1, 9)), logits(again, ids(1, 9)))


def test_sink_by_hand():
    # One query, two keys with equal scores, and a sink with the same logit: the keys share two thirds of the weight.
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)
    v = torch.tensor([[[[3.0], [6.0]]]])
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    for implementation in ("eager", "sdpa"):
        out = attend(q, k, v, mask, 1.0, torch.zeros(1), implementation)
        assert abs(out.item() - 3.0) < 1e-6, implementation


def test_window_counts_the_query_itself():
    seen = visible_keys(6, 6, 3, None, None, "cpu")[0, 0]
    assert seen.sum(-1).tolist() == [1, 2, 3, 3, 3, 3]
    assert seen[5].tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern has 2 entries for 4 layers"),
        ({"scoring_func": "softmax"}, "only sigmoid/noaux_tc"),
        ({"n_group": 2}, "n_group"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"sliding_window": None}, "sliding_window is not set"),
    ],
)
def test_what_the_model_lacks_is_refused(tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        MiMoV2Config(**tiny_config | change)
