"""A release loads where mimo_qat is not: plain transformers (run), and the loaders of vLLM and SGLang (their tables).

The tables say in our own words which stored tensors the loaders look for. Read in vLLM 0.33.0
(`model_executor/models/{mimo_v2,mimo_v2_mtp,qwen3_dflash}.py`, `layers/quantization/{fp8,mxfp4}.py`) and in SGLang
0.5.23 (`srt/models/{mimo_v2,mimo_v2_nextn,dflash}.py`, `srt/speculative/dflash_utils.py`).
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.quantizers import AutoQuantizationConfig

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.check import CheckConfig
from mimo_qat.checkpoint.check import main as check
from mimo_qat.checkpoint.layout import default_drafter_config, drafter_tensors, quantization_config, target_tensors
from mimo_qat.checkpoint.reader import Checkpoint, TensorFolder, load_model
from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
from mimo_qat.models.dflash_files import load_drafter, save_drafter
from mimo_qat.models.modeling_dflash import DFlashConfig
from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM, MiMoV2Model, decode_fp8, decode_mxfp4
from mimo_qat.models.upcycle import save_bf16

ROOT = Path(__file__).parents[2]
GEOMETRIES = {n: json.loads((ROOT / f"recipes/model/{n}.json").read_text()) for n in ("mimo-v2.5", "mimo-v2.5-pro")}

ELSEWHERE = """
import sys, torch
from pathlib import Path
sys.modules.update(dict.fromkeys(("mimo_qat", "mimo_kernels", "mimo_runtime")))  # importing one of them fails
from transformers import AutoModel, AutoModelForCausalLM
release, out = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(release, trust_remote_code=True, dtype=torch.float32)
drafter = AutoModel.from_pretrained(release / "dflash", trust_remote_code=True, dtype=torch.float32)
ids = torch.arange(3, 40)[None]
taps = [i + 1 for i in drafter.config.target_layer_ids]
with torch.no_grad():
    plain = model(ids, output_hidden_states=taps)
    context = torch.cat([plain.hidden_states[i] for i in taps], -1)
    rows = drafter(model.get_input_embeddings()(ids[:, :8]), context).last_hidden_state
how = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
calls = []
drafter.register_forward_hook(lambda *_: calls.append(1))
greedy = model.generate(ids, **how)
assert not calls
drafted = model.generate(ids, assistant_model=drafter, speculation_type="dflash", **how)
found = {"logits": plain.logits, "rows": rows, "greedy": greedy, "drafted": drafted, "calls": len(calls)}
found |= {"class": type(model).__module__, "eos": model.generation_config.eos_token_id}
found["mask"] = drafter.mask_embedding.data
torch.save(found, out)
"""


def run_elsewhere(release, out, **environment):
    """ELSEWHERE in a process that has transformers and the release, and nothing of ours on its path."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(release), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def test_transformers_alone_gives_our_logits_and_drafts(release, tmp_path):
    (release.path / "generation_config.json").write_text('{"eos_token_id": 509}')
    found = run_elsewhere(release.path, tmp_path / "found.pt", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert found["class"].startswith("transformers_modules.") and found["eos"] == 509
    ours, ids = load_model(release.path, torch.float32), torch.arange(3, 40)[None]
    drafter = load_drafter(release.path / "dflash", torch.float32)
    taps = [i + 1 for i in drafter.config.target_layer_ids]
    with torch.no_grad():
        plain = ours(ids, output_hidden_states=taps)
        context = torch.cat([plain.hidden_states[i] for i in taps], -1)
        rows = drafter(ours.get_input_embeddings()(ids[:, :8]), context).last_hidden_state
    assert torch.equal(found["logits"], plain.logits)
    assert torch.equal(found["rows"], rows)
    assert torch.equal(found["mask"], release.drafter.mask.float())
    assert found["calls"] > 3 and torch.equal(found["drafted"], found["greedy"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_is_that_of_our_reader(release, dtype):
    ours = load_model(release.path, dtype).state_dict()
    model, info = MiMoV2ForCausalLM.from_pretrained(release.path, dtype=dtype, output_loading_info=True)
    theirs = model.state_dict()
    assert theirs.keys() == ours.keys() and not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor), name
    assert not hasattr(model.config, "quantization_config") and not model.training
    router = theirs["model.layers.1.mlp.gate.weight"]
    assert router.dtype == torch.float32  # stored in float32, because moe_router_dtype is absent


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "auto"}, {"device_map": "auto"}, {"device_map": "cpu", "torch_dtype": torch.bfloat16}],
    ids=str,
)
def test_loading_options(release, options):
    model = MiMoV2ForCausalLM.from_pretrained(release.path, attn_implementation="eager", **options)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"  # config.json says bfloat16
    assert model.config._attn_implementation == "eager" and model.name_or_path == str(release.path)
    weight = model.model.layers[2].mlp.experts.down_proj
    assert torch.equal(weight, Checkpoint(release.path).experts(2)[1])


def test_the_body_alone_and_a_saved_copy(release, tmp_path):
    whole = MiMoV2ForCausalLM.from_pretrained(release.path, dtype=torch.float32)
    body = MiMoV2Model.from_pretrained(release.path, dtype=torch.float32).state_dict()
    assert body.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(body[n], t) for n, t in whole.model.state_dict().items())
    whole.save_pretrained(tmp_path / "copy")  # plain weights, read by the plain path
    again = MiMoV2ForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32).state_dict()
    assert all(torch.equal(again[n], t) for n, t in whole.state_dict().items())


def test_a_hub_repository_loads_by_its_name(release, tmp_path):
    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    home = cache / "models--org--tiny"
    shutil.copytree(release.path, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    options = {"cache_dir": str(cache), "local_files_only": True, "dtype": torch.float32}
    model = MiMoV2ForCausalLM.from_pretrained("org/tiny", **options)
    local = MiMoV2ForCausalLM.from_pretrained(release.path, dtype=torch.float32)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in local.state_dict().items())
    assert model.name_or_path == "org/tiny"


@pytest.mark.parametrize("form", [dict, AutoQuantizationConfig.from_dict], ids=["dict", "object"])
def test_a_caller_may_hand_the_quantization_config_back(release, form, remote_code):
    """As lm-eval does, in either form; without the release decoding itself, transformers' FP8 quantizer would raise."""
    stated = json.loads((release.path / "config.json").read_text())["quantization_config"]
    ids, ours = torch.arange(3, 40)[None], load_model(release.path, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        release.path, trust_remote_code=True, dtype=torch.float32, quantization_config=form(stated)
    )
    again = MiMoV2ForCausalLM.from_pretrained(release.path, dtype=torch.float32, quantization_config=form(stated))
    with torch.no_grad():
        expected = ours(ids).logits
        assert torch.equal(model(ids).logits, expected) and torch.equal(again(ids).logits, expected)
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "hf_quantizer", None)


def test_trained_folders_load_without_the_package(tiny_model, drafter_folder, tmp_path):
    """What `upcycle` and `qat` write is loaded by transformers alone, as a release is, and passes `check`."""
    words = {f"t{i}": i for i in range(500)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))
    routers = {n: t.clone() for n, t in tiny_model.state_dict().items() if ".mlp.gate." in n}
    save_drafter(load_drafter(drafter_folder.path), tmp_path / "trained/dflash")
    save_bf16(tiny_model, tokenizer, tmp_path / "trained")
    found = run_elsewhere(tmp_path / "trained", tmp_path / "found.pt", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert found["class"].startswith("transformers_modules.")
    held = Checkpoint(tmp_path / "trained")
    for name, tensor in routers.items():  # float32, as config.json says: BF16 would route otherwise than in training
        assert torch.equal(held.raw(name), tensor), name
    with torch.no_grad():
        expected = load_model(tmp_path / "trained", torch.float32)(torch.arange(3, 40)[None]).logits
    assert torch.equal(found["logits"], expected) and torch.equal(found["drafted"], found["greedy"])
    assert check(CheckConfig(folder=str(tmp_path / "trained")))["ok"]


def test_decoders_are_bit_equal_to_the_codecs():
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (64, 256), dtype=torch.uint8, generator=g)
    scales = torch.arange(255, dtype=torch.uint8).repeat(5)[: 64 * 16].view(64, 16)  # every finite byte
    assert scales.unique().numel() == 255 and packed.unique().numel() == 256
    ours = mxfp4.decode(packed, scales, torch.float32)
    assert torch.equal(decode_mxfp4(packed, scales).view(torch.int32), ours.view(torch.int32))
    e8m0 = scales.view(torch.float8_e8m0fnu)
    assert torch.equal(decode_mxfp4(packed, e8m0).view(torch.int32), ours.view(torch.int32))
    for chunks, rows, cols in ((1, 130, 200), (2, 2 * 130, 128), (4, 4 * 37, 300)):
        codes, scale = fp8.quantize(torch.randn(rows, cols, generator=g), rows // chunks)
        assert torch.equal(
            decode_fp8(codes, scale, chunks), fp8.dequantize(codes, scale, rows // chunks, torch.float32)
        )


def load_error(folder):
    with pytest.raises(ValueError, match="again") as error:
        MiMoV2ForCausalLM.from_pretrained(folder)
    return str(error.value)


def test_each_damaged_tensor_is_named(release, rewrite, edit_json):
    norm, expert = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.experts.3.up_proj.weight"
    held = Checkpoint(release.path)
    original = {n: held.raw(n).clone() for n in (norm, expert, expert + "_scale")}
    rewrite(release.path, {norm: None})
    assert norm in load_error(release.path)
    rewrite(release.path, {norm: original[norm], "model.layers.1.bias": torch.ones(2)})
    assert "model.layers.1.bias" in load_error(release.path)
    rewrite(release.path, {"model.layers.1.bias": None, expert: None})
    assert expert + "_scale has no weight beside it" in load_error(release.path)
    rewrite(release.path, {expert: original[expert], expert + "_scale": original[expert + "_scale"][:, :1]})
    assert f"{expert}: codes" in load_error(release.path)
    rewrite(release.path, {expert + "_scale": original[expert + "_scale"]})
    MiMoV2ForCausalLM.from_pretrained(release.path)
    index = json.loads((release.path / "model.safetensors.index.json").read_text())
    edit_json(release.path / "model.safetensors.index.json", {"weight_map": index["weight_map"] | {"ghost": "../x"}})
    assert "../x" in load_error(release.path)


def asked_by(engine, config, mtp_blocks):
    """{stored name: (dtype, shape)} that the engine's loader consumes from a release with an FP8 spine."""
    table, hidden, chunks = {}, config["hidden_size"], config["num_key_value_heads"]

    def block_fp8(name, rows, cols, pieces=1):
        table[name + ".weight"] = ("F8_E4M3", (rows, cols))
        grid = (pieces * math.ceil(rows // pieces / 128), math.ceil(cols / 128))
        table[name + ".weight_scale_inv"] = ("F32", grid)

    def plain(name, *shape, dtype="BF16"):
        table[name] = (dtype, shape)

    def attention(prefix, kind, sink):
        heads, groups = config[kind + "num_attention_heads"], config[kind + "num_key_value_heads"]
        size, v_size = config[kind + "head_dim"], config[kind + "v_head_dim"]
        # Both cut the rows into num_key_value_heads (of full attention) chunks, in every layer.
        assert heads % chunks == 0 and groups % chunks == 0
        block_fp8(prefix + "qkv_proj", heads * size + groups * (size + v_size), hidden, chunks)
        plain(prefix + "o_proj.weight", hidden, heads * v_size)
        if sink:
            plain(prefix + "attention_sink_bias", heads)

    def dense(prefix):
        for which in ("gate", "up"):
            block_fp8(f"{prefix}{which}_proj", config["intermediate_size"], hidden)
        block_fp8(prefix + "down_proj", hidden, config["intermediate_size"])

    def expert(prefix, inner):
        # vLLM: uint8 slices of w13 [E, 2I, H/2] and w2 [E, H, I/2], scales /32. SGLang takes the branch that makes
        # powers of two of the scales only for dtype uint8 and names that end with .weight_scale.
        for which, rows, cols in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            plain(f"{prefix}{which}_proj.weight", rows, cols // 2, dtype="U8")
            plain(f"{prefix}{which}_proj.weight_scale", rows, cols // 32, dtype="U8")

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        plain(name, config["vocab_size"], hidden)
    plain("model.norm.weight", hidden)
    router = {"float32": "F32", "bfloat16": "BF16"}[config.get("moe_router_dtype") or "float32"]
    for i, (swa, moe) in enumerate(zip(config["hybrid_layer_pattern"], config["moe_layer_freq"], strict=True)):
        prefix = f"model.layers.{i}."
        plain(prefix + "input_layernorm.weight", hidden)
        plain(prefix + "post_attention_layernorm.weight", hidden)
        # vLLM builds no sinks in full-attention layers, whatever add_full_attention_sink_bias says.
        full_sink = engine == "sglang" and config["add_full_attention_sink_bias"]
        attention(
            prefix + "self_attn.", "swa_" if swa else "", config["add_swa_attention_sink_bias"] if swa else full_sink
        )
        if not moe:
            dense(prefix + "mlp.")
            continue
        plain(prefix + "mlp.gate.weight", config["n_routed_experts"], hidden, dtype=router)
        plain(prefix + "mlp.gate.e_score_correction_bias", config["n_routed_experts"], dtype="F32")
        for e in range(config["n_routed_experts"]):
            expert(f"{prefix}mlp.experts.{e}.", config["moe_intermediate_size"])
    for i in range(min(mtp_blocks, 1) if engine == "vllm" else mtp_blocks):
        prefix = f"model.mtp.layers.{i}."
        for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            plain(f"{prefix}{name}.weight", hidden)
        plain(prefix + "eh_proj.weight", hidden, 2 * hidden)
        attention(prefix + "self_attn.", "swa_", config["add_swa_attention_sink_bias"])
        dense(prefix + "mlp.")
    return table


def compare(engine, held, config, mtp_blocks):
    """Every tensor asked for is held with that dtype and shape, and none is held that the engine does not know."""
    asked = asked_by(engine, config, mtp_blocks)
    held = {n: (s.dtype, s.shape) for n, s in held.items()}
    skipped = {n for n in held if engine == "vllm" and n.startswith("model.mtp.") and ".layers.0." not in n}
    assert asked.keys() - held.keys() == set()
    assert held.keys() - skipped - asked.keys() == set()
    for name, what in asked.items():
        assert held[name] == what, name
    return len(asked)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_published_geometries_hold_what_the_engines_load(name, engine):
    config = GEOMETRIES[name]
    held = target_tensors(config, experts="mxfp4", spine="fp8", mtp_layers=3)
    assert compare(engine, held, config, 3) == len(held) - (32 if engine == "vllm" else 0)
    full = config["hybrid_layer_pattern"].index(0)
    assert held[f"model.layers.{full}.self_attn.qkv_proj.weight_scale_inv"].shape[0] in (216, 108)  # 8 or 4 times 27


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_converted_release_holds_what_the_engines_load(release, engine):
    config = json.loads((release.path / "config.json").read_text())
    held = TensorFolder(release.path).specs
    assert compare(engine, held, config, 1) == len(held)
    for file in {s.file for s in held.values()}:
        with safe_open(release.path / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_quantization_config_dispatches_as_the_engines_do(name):
    """vLLM compares whole module names with ignored_layers; a fused module needs all or none of its parts in it."""
    config = GEOMETRIES[name]
    for spine in ("fp8", "bf16"):
        quantized = quantization_config(config, "mxfp4", spine, 3)
        assert quantized["quant_method"] == "fp8" and quantized["store_dtype"] == "mxfp4"
        assert quantized["activation_scheme"] == "dynamic" and quantized["weight_block_size"] == [128, 128]
        ignored = set(quantized["ignored_layers"])
        for i in range(config["num_hidden_layers"]):
            assert f"model.layers.{i}.self_attn.o_proj" in ignored
            assert (f"model.layers.{i}.self_attn.qkv_proj" in ignored) is (spine == "bf16")
        parts = [f"model.layers.0.mlp.{which}_proj" in ignored for which in ("gate", "up", "down")]
        assert parts == [spine == "bf16"] * 3
        assert not any("experts" in layer for layer in ignored)


KEYS = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads head_dim v_head_dim swa_num_attention_heads swa_num_key_value_heads swa_head_dim swa_v_head_dim
n_routed_experts num_experts_per_tok n_group topk_group norm_topk_prob attention_bias tie_word_embeddings
max_position_embeddings layernorm_epsilon rope_theta swa_rope_theta partial_rotary_factor sliding_window_size""".split()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_our_configuration_class_shows_engines_the_published_values(name):
    """Engines take the class from the release (trust_remote_code) and read attributes, most of them with no default."""
    published = GEOMETRIES[name]
    config = MiMoV2Config(**published)
    for key in KEYS:
        assert getattr(config, key) == published[key], key
    assert config.hidden_act == "silu" and config.topk_method == "noaux_tc"
    assert config.hybrid_layer_pattern == published["hybrid_layer_pattern"]
    assert config.moe_layer_freq == published["moe_layer_freq"]
    assert not hasattr(config, "attention_chunk_size")  # it would switch vLLM's hybrid cache manager off
    assert not getattr(config, "vision_config", None)
    config.standardize_rope_params()  # as vLLM does; both thetas have to survive
    config.validate_rope()
    assert (config.rope_theta, config.swa_rope_theta) == (published["rope_theta"], published["swa_rope_theta"])
    assert int(config.head_dim * config.partial_rotary_factor) == 64


def test_our_configuration_class_has_no_null_that_engines_cannot_read():
    """Both engines look `getattr(config, "moe_router_dtype", "float32")` up as a type: on null SGLang stops, and vLLM
    rounds a float32 router to the model's type without a word. `sliding_window_size` is compared with -1."""
    config = MiMoV2Config(**{k: v for k, v in GEOMETRIES["mimo-v2.5"].items() if k != "sliding_window_size"})
    assert isinstance(getattr(torch, config.moe_router_dtype), torch.dtype)
    assert config.sliding_window_size == config.sliding_window


def drafter_asked(config, target):
    """{stored name: shape} that both engines' DFlash models fill; all BF16, no prefix, q/k/v and gate/up apart."""
    hidden, size, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    taps = len(config["dflash_config"]["target_layer_ids"])
    table = {"fc.weight": (hidden, taps * target["hidden_size"])}
    table |= {"hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        prefix = f"layers.{i}."
        shapes = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (heads * size, hidden),
            "self_attn.k_proj.weight": (groups * size, hidden),
            "self_attn.v_proj.weight": (groups * size, hidden),
            "self_attn.o_proj.weight": (hidden, heads * size),
            "self_attn.q_norm.weight": (size,),
            "self_attn.k_norm.weight": (size,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if config["dflash_config"]["attention_sink_bias"]:
            shapes["self_attn.attention_sink_bias"] = (heads,)
        table |= {prefix + n: s for n, s in shapes.items()}
    return table


@pytest.mark.parametrize("name", GEOMETRIES)
def test_drafters_hold_what_the_engines_load(name):
    target = GEOMETRIES[name]
    config = default_drafter_config(target)
    held = drafter_tensors(config)
    assert {n: s.shape for n, s in held.items()} == drafter_asked(config, target) and len(held) == 63
    assert {s.dtype for s in held.values()} == {"BF16"}
    engine_view(config, target, window=1024, rotary=64)


def test_the_drafter_of_a_release_is_what_the_engines_load(release):
    target = json.loads((release.path / "config.json").read_text())
    config = json.loads((release.path / "dflash/config.json").read_text())
    held = TensorFolder(release.path / "dflash").specs
    assert {n: s.shape for n, s in held.items()} == drafter_asked(config, target)
    engine_view(config, target, window=1024, rotary=int(config["head_dim"] * 0.5))
    sidecar = torch.load(release.path / "dflash/mask_embedding.pt", weights_only=True)
    assert "per_position" not in sidecar and sidecar["mask_token_id"] == config["dflash_config"]["mask_token_id"]
    assert sidecar["embedding"].shape == (config["hidden_size"],)


def engine_view(published, target, window, rotary):
    """What each engine makes of a drafter's config.json, read through our class and, for SGLang without
    trust_remote_code, as the bare file."""
    ours = DFlashConfig(**published)
    for config in (ours.to_dict() | {n: getattr(ours, n) for n in ("layer_types", "is_causal")}, published):
        inner = config["dflash_config"]
        assert config["is_causal"] is False  # asked first by both
        sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
        assert all(sliding) and len(sliding) == config["num_hidden_layers"]
        assert inner["swa_window_size"] == config["sliding_window"] == window  # vLLM inner, SGLang top (minus one)
        assert inner["attention_sink_bias"] is True and isinstance(inner["attention_value_scale"], float)
        assert isinstance(inner["mask_token_id"], int) and 0 <= inner["mask_token_id"] < target["vocab_size"]
        assert inner["block_size"] == config["block_size"] == 8
        assert max(inner["target_layer_ids"]) < config["num_target_layers"] == target["num_hidden_layers"]
        assert config["vocab_size"] == target["vocab_size"]  # else vLLM builds an id map and a head of its own
        assert config["rope_parameters"]["partial_rotary_factor"] * config["head_dim"] == rotary  # vLLM
        assert "projector_type" not in inner and "mask_token" not in inner
    assert int(ours.partial_rotary_factor * ours.head_dim) == rotary  # SGLang reads the attribute
    ours.standardize_rope_params()
    ours.validate_rope()
    assert ours.rope_parameters["rope_theta"] == ours.rope_theta == published["rope_theta"]
