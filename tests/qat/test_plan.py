"""The plan against real tensors, against torch's FLOP counter and saved tensors, and against numbers worked by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mimo_qat.checkpoint.layout import default_drafter_config, drafter_tensors, target_tensors
from mimo_qat.cli import VERBS
from mimo_qat.commands import run
from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
from mimo_qat.models.experts import expert_parameters
from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM
from mimo_qat.plan import (
    PlanConfig,
    capacity,
    communication,
    main,
    memory,
    smallest,
    state_bytes,
    step_time,
    training,
    with_recipe,
)
from mimo_qat.plan_model import (
    activation_bytes,
    attention_flops,
    flops_per_token,
    kl_bytes,
    read_shape,
    saved_bytes_per_token,
    shape_of,
)
from mimo_qat.plan_runtime import runtime_bytes
from mimo_qat.qat.snap import SnappedCopy

ROOT = Path(__file__).parents[2]
V25 = str(ROOT / "recipes/model/mimo-v2.5.json")


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def mimo(tiny_config, **changes):
    torch.manual_seed(0)
    return MiMoV2ForCausalLM(MiMoV2Config(**tiny_config | {"moe_router_dtype": "bfloat16"} | changes)).eval()


def qwen():
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, moe_intermediate_size=32, mlp_only_layers=[1])).eval()


def deepseek():
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2}
    mla = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24}
    more = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **mla, **more)).eval()


@pytest.mark.parametrize("family", ["mimo", "qwen3_moe", "deepseek_v3"])
def test_state_is_exact_to_the_byte(family, tiny_config):
    model = {"mimo": lambda: mimo(tiny_config), "qwen3_moe": qwen, "deepseek_v3": deepseek}[family]()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.requires_grad_(False)
    planned = state_bytes(shape_of(model, family))
    engine = SnappedCopy(expert_parameters(model))
    optimizer = torch.optim.AdamW(engine.masters.values(), fused=True)
    hidden = model.model(torch.randint(0, 512, (2, 64)), use_cache=False).last_hidden_state
    hidden.float().square().sum().backward()
    masters = list(engine.masters.values())
    real = {
        "frozen": nbytes(p for n, p in model.named_parameters() if n not in engine.params) + nbytes(model.buffers()),
        "copies": nbytes(engine.params.values()),
        "teacher": nbytes(engine.originals.values()),
        "masters": nbytes(masters),
        "gradients": nbytes(m.grad for m in masters),
    }
    optimizer.step()
    real["adam"] = nbytes(t for state in optimizer.state.values() for t in state.values())
    assert planned == real


def test_state_of_the_trainer_is_exact_to_the_byte(tiny_config, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mimo_qat.models.load import save_trained
    from mimo_qat.qat.train import QatConfig, Trainer

    core = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    save_trained(mimo(tiny_config), PreTrainedTokenizerFast(tokenizer_object=core, pad_token="\x00"), tmp_path / "m")
    rows = [json.dumps({"text": f"{i} the quick brown fox " * 4}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    where = {
        "model": str(tmp_path / "m"),
        "output_dir": str(tmp_path / "o"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
    }
    trainer = Trainer(QatConfig(**where, max_length=64, max_steps=1, per_device_train_batch_size=2, eval_rows=2))
    planned = state_bytes(read_shape(where["model"])[0])
    trainer.train_step()
    engine, model = trainer.engine, trainer.model
    assert nbytes(engine.masters.values()) == planned["masters"]
    assert nbytes(engine.originals.values()) == planned["teacher"]
    assert nbytes(model.parameters()) + nbytes(model.buffers()) == planned["frozen"] + planned["copies"]
    states = trainer.engine.optimizer.state.values()
    assert nbytes(t for state in states for t in state.values() if torch.is_tensor(t)) == planned["adam"]


def test_published_sizes():
    """MiMo-V2.5 is 309 B with 15 B active, V2.5-Pro 1.02 T with 42 B (their cards, embedding included)."""
    shape, _ = read_shape(V25)
    assert shape.expert_weights == 47 * 256 * 3 * 4096 * 2048 and len(shape.trained) == 94
    assert round(shape.parameters / 1e9) == 309
    assert round((shape.active + shape.vocab * shape.hidden) / 1e9) == 15
    assert shape.first_routed == 1
    assert [layer.window for layer in shape.layers[:6]] == [None, 128, 128, 128, 128, None]
    assert [layer.kv_heads for layer in shape.layers[:2]] == [4, 8]
    # routers are stored in float32
    routers = 47 * 256 * 4096
    assert shape.frozen_bytes == 2 * (shape.parameters - shape.expert_weights) + 2 * routers + 47 * 256 * 4
    pro, _ = read_shape(V25.replace("v2.5", "v2.5-pro"))
    assert round(pro.parameters / 1e10) == 102 and round((pro.active + pro.vocab * pro.hidden) / 1e9) == 42


@pytest.mark.parametrize("family", ["mimo", "qwen3_moe"])
def test_flops_equal_what_torch_counts(family, tiny_config):
    """Eager attention multiplies all S x S pairs, so that part is counted by hand here; all else must agree exactly."""
    model = mimo(tiny_config, hybrid_layer_pattern=[0] * 4) if family == "mimo" else qwen()
    model.config._attn_implementation = "eager"
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    for parameter in expert_parameters(model).values():
        parameter.requires_grad_(True)
    shape, row = shape_of(model, family), 48
    planned = flops_per_token(shape, row, True)
    attention = [attention_flops(layer, row) for layer in shape.layers]
    dense = [2 * layer.heads * (layer.qk_dim + layer.v_dim) * row for layer in shape.layers]
    ids, head = torch.randint(0, 512, (1, row)), 2 * shape.vocab * shape.hidden
    with FlopCounterMode(display=False) as forward:
        hidden = model.model(ids, use_cache=False).last_hidden_state
    # transformers 5.17 makes its table of angles with a product
    angles = sum(sum(n.values()) for name, n in forward.get_flop_counts().items() if name.endswith("rotary_emb"))
    assert forward.get_total_flops() - angles == row * (planned["recompute"] - sum(attention) + sum(dense))
    assert planned["teacher_forward"] == planned["recompute"] + head
    with FlopCounterMode(display=False) as backward:
        hidden.square().sum().backward()
    behind = slice(shape.first_routed + 1, None)
    expected = planned["student_backward"] - head - 2 * sum(attention[behind]) + 2 * sum(dense[behind])
    assert backward.get_total_flops() == row * expected


def test_attention_flops_by_hand():
    shape, _ = read_shape(V25)
    full, swa = shape.layers[0], shape.layers[1]
    # one query sees on average (S + 1) / 2 keys; with a window of 128, 128 but for the first 127 queries
    assert attention_flops(full, 8191) == 2 * 64 * 320 * 4096
    seen = sum(min(i + 1, 128) for i in range(8192)) / 8192
    assert attention_flops(swa, 8192) == math.ceil(2 * 64 * 320 * seen)
    assert attention_flops(swa, 100) == math.ceil(2 * 64 * 320 * 50.5)


@pytest.mark.parametrize("sinks", [False, True])
def test_saved_activations_equal_what_autograd_saves(sinks, tiny_config):
    """Bytes of everything that autograd keeps for one student forward pass, against the formula, within 2 %."""
    changes = {"hidden_size": 256, "moe_intermediate_size": 128, "sliding_window": 32, "sliding_window_size": 32}
    # Equal head sizes, so that a CPU has a fused attention kernel.
    changes |= {"v_head_dim": 48, "swa_v_head_dim": 48, "add_swa_attention_sink_bias": sinks}
    model = mimo(tiny_config, **changes).bfloat16().requires_grad_(False)
    for buffer in model.buffers():
        buffer.data = buffer.data.float()
    model.set_experts_implementation("grouped_mm")
    for parameter in expert_parameters(model).values():
        parameter.requires_grad_(True)
    rows, row, shape = 2, 128, shape_of(model, "m")
    constant = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # the tensors, so that no memory is used twice

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in constant:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model.model(torch.randint(0, 512, (rows, row)), use_cache=False)
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    # `activation_bytes` without what is not saved here: gradients, teacher and student states, masks.
    tokens, layers = rows * row, shape.layers
    on_top = max(
        layer.per_token * (12 * shape.hidden + 4 * layer.inner) + (2 * layer.heads * (row + 1) if layer.sink else 0)
        for layer in layers
    )
    masks = len({layer.window for layer in layers}) * row
    planned = activation_bytes(shape, tokens, row, False) - tokens * (on_top + 6 * shape.hidden + masks)
    assert out.last_hidden_state.requires_grad and real == pytest.approx(planned, rel=0.02)
    # With checkpointing the layers' inputs stay, and one whole layer.
    saved = [sum(saved_bytes_per_token(layer, shape.hidden, row)) for layer in layers]
    less = activation_bytes(shape, tokens, row, False) - activation_bytes(shape, tokens, row, True)
    assert less == planned - tokens * (4 * shape.hidden + 4 + 4 * 2 * shape.hidden + max(saved))


def test_strategies_hold_what_they_say(tiny_config):
    shape = shape_of(mimo(tiny_config), "m")
    full = state_bytes(shape)

    def plan(strategy, gpus, **more):
        return memory(shape, PlanConfig(model="m", strategy=strategy, gpus=gpus, max_length=64, **more), gpus)

    single, ddp, zero2, zero3, fsdp2 = (
        plan("single", 1),
        plan("ddp", 8),
        plan("zero2", 8),
        plan("zero3", 8),
        plan("fsdp2", 8),
    )
    assert single == ddp and {k: single[k] for k in full} == full
    assert [zero2[k] for k in ("frozen", "copies", "teacher")] == [full[k] for k in ("frozen", "copies", "teacher")]
    assert all(zero2[k] == math.ceil(full[k] / 8) for k in ("masters", "adam", "gradients"))
    assert all(zero3[k] == fsdp2[k] == math.ceil(full[k] / 8) for k in full)  # 8 experts on 8 GPUs
    # 8 experts over 3 GPUs: the fullest has 3 of them
    assert plan("fsdp2", 3)["masters"] == full["masters"] * 3 // 8 > plan("zero3", 3)["masters"]
    host = plan("fsdp2", 16, teacher="host")
    assert host["host"] == 8 * math.ceil(full["teacher"] / 8) and host["teacher"] == 2 * shape.layers[1].expert_weights
    for found in (single, zero2, fsdp2, host):
        assert found["total"] == sum(v for k, v in found.items() if k not in ("total", "host"))
    assert kl_bytes(shape) == 24 * 512 * (2**26 // 512)


def test_the_smallest_count_is_the_smallest_that_fits():
    shape, _ = read_shape(V25)
    config = PlanConfig(model=V25, strategy="zero3", max_length=4096)
    best = smallest(shape, config)
    assert best and memory(shape, config, best)["total"] <= capacity(config)
    assert memory(shape, config, best - 8)["total"] > capacity(config)
    assert smallest(shape, PlanConfig(model=V25, strategy="ddp")) is None
    assert smallest(shape, PlanConfig(model=V25, strategy="zero2")) is None


def test_time_and_traffic_by_hand(tiny_config):
    shape = shape_of(mimo(tiny_config), "m")
    w, n = shape.expert_weights, 4
    base = {"model": "m", "gpus": n, "max_length": 64, "gradient_accumulation_steps": 2, "link_gb_s": 100.0}
    traffic = {s: communication(shape, PlanConfig(**base, strategy=s)) for s in ("ddp", "zero2", "zero3", "fsdp2")}
    assert traffic["ddp"]["bytes_per_step"] == 8 * w * 3 / 4 and traffic["zero2"]["bytes_per_step"] == 6 * w * 3 / 4
    whole = 2 * (3 * (2 * w + shape.frozen_bytes) + 2 * w) * 3 / 4
    assert traffic["fsdp2"] == traffic["zero3"] == {"bytes_per_step": round(whole), "seconds": whole / 100e9}
    time = step_time(shape, PlanConfig(**base, strategy="zero2", memory_gb_s=100.0, memory_fraction=0.5))
    assert time["snap_s"] == pytest.approx(w / 4 * 8 / 50e9) and time["optimizer_s"] == pytest.approx(
        5 * time["snap_s"]
    )
    assert time["tokens_per_step"] == 64 * 2 * 4
    products = 64 * 2 * time["flops_per_token"]["total"] / (989e12 * 0.3)
    assert time["products_s"] == pytest.approx(products)
    assert time["step_s"] == pytest.approx(max(products, time["communication_s"]) + 6 * time["snap_s"])
    # GPU hours do not depend on how they are counted: tokens / (tokens a second) * GPUs / 3600
    rate = time["tokens_per_step"] / time["step_s"]
    assert time["gpu_hours"]["0.5B"] == pytest.approx(0.5e9 / rate * n / 3600)


def test_runtime_bytes(tiny_config):
    source = json.loads(Path(V25).read_text())
    stored = sum(s.nbytes for s in target_tensors(source, mtp_layers=0).values())
    one, eight = (runtime_bytes(source, tp, [8192, 2**20], 1024) for tp in (1, 8))
    assert one["experts"] + one["spine"] == stored
    assert one["drafter"] == sum(s.nbytes for s in drafter_tensors(default_drafter_config(source)).values())
    assert eight["experts"] == one["experts"] / 8 == 47 * 256 * 3 * 4096 * 2048 * 17 / 32 / 8
    # Nine full layers of four key-value heads, one on each of eight ranks, of 8192 + 8 slots rounded up to 64s; 39
    # sliding ones of 128 + 8 slots; and the drafter's five of 8 heads of 128, window 1024 and a block of 8. Every rank
    # has the cosines and sines of two thetas, 32 each, of 8192 + 8 positions.
    table = 2 * 2 * 32 * 2 * 8200
    by_hand = 9 * 320 * 2 * 8256 + 39 * 320 * 2 * 136 + 5 * 2 * 128 * 2 * 1032
    assert eight["kv"]["8192"] == by_hand + table
    assert one["kv"]["8192"] == 4 * 9 * 320 * 2 * 8256 + 8 * (39 * 320 * 2 * 136 + 5 * 2 * 128 * 2 * 1032) + table
    with pytest.raises(ValueError, match="do not divide by tp 3"):
        runtime_bytes(source, 3, [8192], 1024)
    with pytest.raises(ValueError, match="whole MXFP4 blocks"):
        runtime_bytes(tiny_config, 4, [64], 16)


def test_plan_says_what_does_not_fit(capsys):
    small = main(PlanConfig(model=V25, gpus=8))
    out = capsys.readouterr().out
    assert not small["fits"] and "DOES NOT FIT" in out and f"{small['smallest_gpus']} GPUs hold it" in out
    enough = main(PlanConfig(model=V25, gpus=small["smallest_gpus"], gpu_hour_price=2.0))
    assert enough["fits"] and enough["time"]["price"]["35M"] == 2 * enough["time"]["gpu_hours"]["35M"]
    served = main(PlanConfig(model=V25, runtime=True))
    assert set(served["smallest_tp"]) == {"8192", "262144", "1048576"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "single"], "strategy single with 8 GPUs"),
        (["--mfu", "1.5"], "mfu and memory_fraction are fractions"),
        (["--gpus", "0"], "gpus is 0"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
    ],
)
def test_wrong_wishes_are_one_line(arguments, said, capsys):
    assert run("mimo-qat", "", VERBS, ["plan", V25, *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_what_a_recipe_says_otherwise_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_length: 2048\n")
    with pytest.raises(ValueError, match="max_length is 4096, the recipe's is 2048; leave one of them out"):
        with_recipe(PlanConfig(model="m", recipe=str(recipe), max_length=4096))
    for field in ("train: body", "engine: hook", "master_dtype: bfloat16"):
        recipe.write_text(field)
        with pytest.raises(ValueError, match=f"{field.split(':')[0]} .* not planned"):
            with_recipe(PlanConfig(model="m", recipe=str(recipe)))


def test_recipe_sets_the_batch_and_unknown_fields_are_named(tmp_path):
    (tmp_path / "r.yaml").write_text("max_length: 256\ngradient_accumulation_steps: 3\n")
    config = with_recipe(PlanConfig(model=V25, recipe=str(tmp_path / "r.yaml"), gpus=64))
    assert (config.max_length, config.gradient_accumulation_steps, config.gpus) == (256, 3, 64)
    assert config.per_device_train_batch_size == 4 and not config.gradient_checkpointing  # QatConfig's own defaults
    (tmp_path / "r.yaml").write_text("lenght: 1\n")
    with pytest.raises(ValueError, match="lenght is not a field of QatConfig"):
        training(PlanConfig(model=V25, recipe=str(tmp_path / "r.yaml")))
