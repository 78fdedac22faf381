"""Experts of every family are found, counted and oriented; models of every family load, separate documents and save."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mimo_qat.models.experts import (
    TokenCounts,
    configured_moe_layers,
    expert_parameters,
    experts_modules,
    match_report,
    transposed_experts,
)
from mimo_qat.models.load import (
    NEED_MASKS,
    body_and_head,
    final_hidden,
    load_for_training,
    prove_documents_are_separate,
    save_trained,
)

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
# name -> (model, configuration, its own keys, routed layers, E, k, gate_up shape, down shape)
FAMILIES = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
        (2, 8, 2, [8, 64, 64], [8, 64, 32]),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        (3, 4, 2, [4, 192, 64], [4, 64, 96]),
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        MLA
        | {
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
        (2, 8, 3, [8, 64, 64], [8, 64, 32]),
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        (3, 4, 2, [4, 64, 192], [4, 96, 64]),
    ),
}
EACH = pytest.mark.parametrize("family", FAMILIES)


def build(family, attention=None, **changes):
    model_class, config_class, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**COMMON | own | changes)
    if attention:
        config._attn_implementation = attention
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate.weight" in name or "router.weight" in name:
                parameter.normal_(std=0.2)  # so that routing differs between tokens
    return model


def tokenizer():
    core = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="\x00", unk_token="?")


@EACH
def test_every_expert_is_matched_once_and_oriented(family):
    model = build(family)
    layers, _, _, gate_up, down = FAMILIES[family][3]
    found = expert_parameters(model)
    assert len(found) == 2 * layers
    assert [list(p.shape) for p in found.values()] == [gate_up, down] * layers
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in found.items())
    # No parameter of an experts module but biases is left out.
    named = {n for n in parameters if ".experts." in n and "shared" not in n and not n.endswith("_bias")}
    assert named == found.keys()
    assert transposed_experts(model) == (frozenset(found) if family == "gpt_oss" else frozenset())
    weights, total = sum(p.numel() for p in found.values()), sum(p.numel() for p in parameters.values())
    line = match_report(model)
    assert "\n" not in line and f"{2 * layers} expert parameters matched: {layers} layers" in line
    assert str(gate_up) in line and f"{100 * weights / total:.1f} % of all" in line


@pytest.mark.parametrize("transposed", [False, True])
def test_contraction_is_the_dimension_that_the_product_sums_over(transposed):
    """A change along the contraction of one output must not move the others: proved on the model's own forward."""
    model = build("gpt_oss" if transposed else "qwen3_moe")
    module = next(iter(experts_modules(model).values()))
    x, chosen, weights = torch.randn(1, 64), torch.tensor([[1]]), torch.ones(1, 1)
    with torch.no_grad():
        before = module(x, chosen, weights)
        line = module.down_proj[1][:, 5] if transposed else module.down_proj[1][5]  # all inputs of output 5
        line += 1.0
        moved = (module(x, chosen, weights) != before).nonzero()[:, 1].unique().tolist()
    assert moved == [5]


def test_mimo_is_matched(tiny_model):
    assert len(expert_parameters(tiny_model)) == 6 and not transposed_experts(tiny_model)
    assert configured_moe_layers(tiny_model.config) == (3, "moe_layer_freq")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3_moe", {"mlp_only_layers": []}, "decoder_sparse_step and mlp_only_layers says 6"),
        ("qwen3_moe", {"decoder_sparse_step": 3}, "decoder_sparse_step and mlp_only_layers says 2"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "first_k_dense_replace says 2"),
        ("mixtral", {"num_hidden_layers": 4}, "num_hidden_layers says 8"),
        ("gpt_oss", {"num_hidden_layers": 2}, "num_hidden_layers says 4"),
    ],
)
def test_configuration_of_another_model_is_an_error(family, changes, said):
    model = build(family)
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(ValueError, match=f"expert parameters matched, but {said}"):
        expert_parameters(model)


def test_a_layer_whose_experts_are_linears_is_named():
    model = build("qwen3_moe")
    model.model.layers[2].mlp.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
    with pytest.raises(ValueError, match=r"1 layers matched, but 2 have a router; model\.layers\.2\.mlp\.experts is"):
        expert_parameters(model)
    model.model.layers[0].mlp.experts = nn.ModuleList()
    with pytest.raises(ValueError, match=r"no routed experts matched: .*layers\.0\.mlp\.experts is a ModuleList"):
        expert_parameters(model)
    with pytest.raises(ValueError, match="no routed experts matched"):
        match_report(nn.Linear(4, 4))


@pytest.mark.parametrize(("family", "name"), [("mixtral", "down_proj"), ("gpt_oss", "down_proj")])
def test_contraction_that_holds_no_whole_blocks_is_named(family, name):
    model = build(family, intermediate_size=48)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts\.{name} .* contracts over 48 elements"):
        expert_parameters(model)


@EACH
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_token_counts_equal_an_independent_routing(family, implementation):
    model = build(family)
    model.set_experts_implementation(implementation)
    layers, experts, k, *_ = FAMILIES[family][3]
    expected, handles = [], []
    for block in model.modules():
        if hasattr(block, "experts") and hasattr(block, "gate" if family != "gpt_oss" else "router"):
            handles.append(block.register_forward_pre_hook(lambda b, args: expected.append(route(family, b, args[0]))))
    counts = TokenCounts(model)
    ids = torch.randint(0, 256, (2, 30))
    with torch.no_grad(), counts.recording():
        model(ids)
        model(ids[:1])
    for handle in handles:
        handle.remove()
    taken = counts.take()
    summed = [(torch.stack(expected[i::layers])).sum(0).tolist() for i in range(layers)]
    assert taken == summed
    assert [sum(layer) for layer in taken] == [90 * k] * layers and len(taken[0]) == experts
    with torch.no_grad():
        model(ids)  # outside of the block nothing counts
    assert counts.take() == [[0] * experts] * layers


def route(family, block, x):
    """Tokens an expert [E] from the router's weight alone, in float64, by sorting instead of top-k."""
    router = block.router if family == "gpt_oss" else block.gate
    logits = x.flatten(0, -2).double() @ router.weight.double().T
    if family == "gpt_oss":
        logits = logits + router.bias.double()
    if family == "deepseek_v3":  # topk_group == n_group: groups do not restrict
        logits = logits.sigmoid() + router.e_score_correction_bias.double()
    k = FAMILIES[family][3][2]
    chosen = logits.argsort(dim=-1, descending=True)[:, :k]
    return torch.stack([(chosen == e).sum() for e in range(logits.shape[1])])


def test_ids_of_experts_that_live_elsewhere_are_not_counted():
    model = build("qwen3_moe")
    counts = TokenCounts(model)
    counts._record(1, torch.tensor([[0, 7], [8, 7], [8, 8]]))
    assert counts.take() == [[0] * 8, [1, 0, 0, 0, 0, 0, 0, 2]]


@EACH
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_see_neither_values_nor_gradients_of_each_other(family, attention):
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("gpt-oss has no sdpa attention: its sinks need eager or flash attention")
    model = build(family, attention)
    body, head = body_and_head(model)
    assert head is model.lm_head.weight
    lengths = ((11, 7, 1, 5), (24,))  # the second row is one document
    ids = torch.randint(1, 256, (2, 24))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    out = final_hidden(model, None, positions, inputs_embeds=embedded)
    (grad,) = torch.autograd.grad(out[0, 11:18].square().sum(), embedded)
    reached = grad.abs().sum(-1) > 0
    assert reached[0].tolist() == [11 <= i < 18 for i in range(24)] and not reached[1].any()
    with torch.no_grad():
        start = 0
        for n in lengths[0]:
            alone = body(ids[:1, start : start + n], use_cache=False).last_hidden_state
            assert torch.allclose(out[:1, start : start + n], alone, atol=2e-5), (start, n)
            start += n


def test_a_family_whose_documents_leak_is_refused(monkeypatch):
    model = build("gpt_oss")
    prove_documents_are_separate(model)
    monkeypatch.setattr("mimo_qat.models.load.NEED_MASKS", ())
    with pytest.raises(ValueError, match="GptOssForCausalLM: documents of a packed row see each other"):
        prove_documents_are_separate(model)
    assert "gpt_oss" in NEED_MASKS


@EACH
def test_load_and_save_keep_every_bit(family, tmp_path):
    model = build(family).bfloat16()
    save_trained(model, tokenizer(), tmp_path / "first")
    loaded, _ = load_for_training(tmp_path / "first", torch.bfloat16, "cpu")
    with torch.no_grad():
        for parameter in expert_parameters(loaded).values():
            parameter += 0.25  # in place, as the engine writes
    save_trained(loaded, tokenizer(), tmp_path / "second")
    again, tokens = load_for_training(tmp_path / "second", torch.bfloat16)
    before = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        expected = before[name] + 0.25 if name in expert_parameters(again) else before[name]
        assert torch.equal(parameter, expected.to(parameter.dtype)), name
    assert tokens("abc").input_ids == [97, 98, 99]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_lacks_or_adds_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_trained(build("mixtral").bfloat16(), tokenizer(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    taken = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    save_file(taken, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, the first model\.norm\.weight"):
        load_for_training(tmp_path / "m", torch.bfloat16)
    save_file(tensors | {"model.extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected keys, the first model\.extra\.weight"):
        load_for_training(tmp_path / "m", torch.bfloat16)


def test_quantized_folders_and_other_heads_are_refused(tmp_path):
    save_trained(build("gpt_oss").bfloat16(), tokenizer(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ValueError, match=r"is quantized \(mxfp4\)"):
        load_for_training(tmp_path / "m", torch.bfloat16)
    model = build("mixtral")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="changes its logits by final_logit_softcapping"):
        body_and_head(model)
    with pytest.raises(ValueError, match="has no `model`"):
        body_and_head(nn.Linear(2, 2))


def test_mimo_loads_through_its_own_reader(tiny_model, tmp_path):
    save_trained(tiny_model, tokenizer(), tmp_path / "m")
    model, _ = load_for_training(tmp_path / "m", torch.bfloat16)
    assert type(model).__name__ == "MiMoV2ForCausalLM" and body_and_head(model)[0] is model.model
    assert len(expert_parameters(model)) == 6
