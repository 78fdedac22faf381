"""Upcycling: a tiny Llama in float32, and the real SmolLM2 on a thousand real tokens."""

import inspect
import textwrap

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mimo_qat.models.upcycle import UpcycleConfig, load_dense, main, upcycle, upcycled_config


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("wrong, said", [
    ({"num_hidden_layers": 9}, "the source has 2"),
    ({"dense_layers": 2}, "leave one or more for experts"),
    ({"dense_layers": -1}, "leave one or more for experts"),
    ({"experts_per_token": 5}, "must lie in 1..4"),
])  # fmt: skip
def test_wishes_that_the_source_cannot_meet(wrong, said):
    with pytest.raises(ValueError, match=said):
        upcycled_config(LlamaConfig(num_hidden_layers=2), UpcycleConfig(output_dir="o", **wrong))


def test_logits_equal_the_dense_source():
    dense = tiny_llama()
    moe = upcycle(dense, UpcycleConfig(output_dir="unused", experts=6, experts_per_token=3))
    ids = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = dense(ids).logits, moe(ids).logits
    assert (got - expected).abs().max() < 1e-4
    assert expected.std() > 0.1
    assert moe.config.moe_layer_freq == [0, 1, 1]
    assert not torch.equal(moe.lm_head.weight, torch.zeros_like(moe.lm_head.weight))


def test_router_spreads_tokens_and_follows_the_seed():
    dense = tiny_llama()
    a, b = (upcycle(dense, UpcycleConfig(output_dir="unused", seed=s)) for s in (0, 1))
    x = torch.randn(500, 96)
    _, weights, chosen = a.model.layers[1].mlp.gate(x)
    assert chosen.unique().numel() == 4
    assert torch.allclose(weights.sum(-1), torch.ones(500))
    assert not torch.equal(a.model.layers[1].mlp.gate.weight, b.model.layers[1].mlp.gate.weight)


def test_refusals(tmp_path):
    dense = tiny_llama()
    with pytest.raises(ValueError, match=r"experts_per_token 5 must lie in 1\.\.4"):
        upcycle(dense, UpcycleConfig(output_dir="unused", experts_per_token=5))
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        main(UpcycleConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.smollm
@pytest.mark.slow
def test_smollm2_argmax_and_logits_on_real_tokens():
    """Argmax identical on 1,000 real tokens and logits within 1e-3, in float32."""
    dense, tokenizer = load_dense("smollm2")
    moe = upcycle(dense, UpcycleConfig(output_dir="unused"))
    ids = tokenizer(inspect.getsource(textwrap), return_tensors="pt").input_ids[:, :1000]
    with torch.no_grad():
        expected, got = dense(ids).logits, moe(ids).logits
    assert ids.numel() == 1000
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert (got - expected).abs().max() <= 1e-3
