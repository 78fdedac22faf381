"""Tiny releases on disk, written with the project's own writer."""

import math
from pathlib import Path

import pytest
import torch

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.layout import Geometry, default_drafter_config, drafter_tensors, target_tensors
from mimo_qat.checkpoint.writer import write_bf16_folder, write_index, write_json, write_tensors

# Changes of the tiny geometry that give its matrices the proportions of the published ones: whole FP8 tiles across, and
# heads that begin at multiples of 64 rows, in chunks that do not end with a tile.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 192, "swa_head_dim": 192}
WIDE |= {"v_head_dim": 128, "swa_v_head_dim": 128}
# A router near a tie makes another expert of a rounding, and no bound covers that: all of the eight are in use here.
EVERY_EXPERT = {"num_experts_per_tok": 8}


def published(model, geometry) -> dict[str, torch.Tensor]:
    """The state of a transformers model under per-expert names, every matrix in bfloat16."""
    out = {}
    for name, t in model.state_dict().items():
        t = t.detach()
        if name.endswith("experts.gate_up_proj"):
            base, inner = name.removesuffix("gate_up_proj"), geometry.moe_intermediate_size
            for e in range(len(t)):
                out[f"{base}{e}.gate_proj.weight"], out[f"{base}{e}.up_proj.weight"] = t[e, :inner], t[e, inner:]
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            out |= {f"{base}{e}.down_proj.weight": t[e] for e in range(len(t))}
        else:
            out[name] = t
    return {n: t if n.endswith("correction_bias") else t.bfloat16() for n, t in out.items()}


def round_to_bf16(model) -> None:
    """Makes a float32 model hold values that a BF16 file can hold, so that reading it back is exact."""
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith("correction_bias"):
                t.copy_(t.bfloat16())


def storable_model(config: dict):
    """A random float32 model of a configuration, whose values a BF16 file holds exactly."""
    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
    from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM

    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(MiMoV2Config(**config)).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("attention_sink_bias"):
            tensor.data.normal_()
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.1)
    round_to_bf16(model)
    return model


def reference_folder(folder: Path, config: dict, model) -> Path:
    tensors = published(model, Geometry.from_config(config))
    specs = target_tensors(config, experts="bf16", spine="bf16", mtp_layers=0)
    tensors = {n: tensors[n].float() if s.dtype == "F32" else tensors[n] for n, s in specs.items()}
    write_bf16_folder(folder, config, tensors, mtp_layers=0)
    return folder


def release_folder(folder: Path, config: dict, model, spine: str = "fp8") -> Path:
    """MXFP4 experts in the published layout."""
    g = Geometry.from_config(config)
    specs = target_tensors(config, experts="mxfp4", spine=spine, mtp_layers=0)
    tensors = {}
    for name, t in published(model, g).items():
        base = name.removesuffix(".weight")
        if base + ".weight_scale" in specs:
            tensors[name], tensors[base + ".weight_scale"] = mxfp4.encode(t)
        elif base + ".weight_scale_inv" in specs:
            rows = sum(g.qkv_rows(int(name.split(".")[2]))) if "qkv_proj" in name else None
            tensors[name], tensors[base + ".weight_scale_inv"] = fp8.quantize(t, rows)
        else:
            tensors[name] = t.float() if specs[name].dtype == "F32" else t
    folder.mkdir(parents=True)
    write_tensors(folder, specs, tensors)
    write_index(folder, specs, {"save_format": "mxfp4"})
    write_json(folder / "config.json", config)
    return folder


def drafter_folder(folder: Path, config: dict, *, window: int | None = 24, causal=False, seed=0, **changes) -> Path:
    """A random drafter with sinks and a mask embedding that matter."""
    draft = default_drafter_config(config, num_hidden_layers=2) | {"layer_types": None} | changes
    draft |= {"sliding_window": window, "use_sliding_window": window is not None, "is_causal": causal}
    draft["dflash_config"]["block_size"] = draft["block_size"]
    draft["dflash_config"] |= {"swa_window_size": window, "use_swa": window is not None, "causal": causal}
    torch.manual_seed(seed)
    specs = drafter_tensors(draft)
    tensors = {n: torch.randn(s.shape).mul(0.2).bfloat16() for n, s in specs.items()}
    tensors = {n: 1 + t if n.endswith("norm.weight") else t for n, t in tensors.items()}
    folder.mkdir(parents=True)
    write_tensors(folder, specs, tensors)
    write_index(folder, specs, {})
    write_json(folder / "config.json", draft)
    mask = {
        "mask_token_id": draft["dflash_config"]["mask_token_id"],
        "embedding": torch.randn(draft["hidden_size"]).bfloat16(),
    }
    torch.save(mask, folder / "mask_embedding.pt")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices are slower on many threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model():
    return storable_model


@pytest.fixture
def write_reference():
    return reference_folder


@pytest.fixture
def write_drafter():
    return drafter_folder


@pytest.fixture
def reference(tmp_path, tiny_config, tiny_model) -> Path:
    """A BF16 folder with a drafter; `tiny_model` holds exactly its weights."""
    round_to_bf16(tiny_model)
    folder = reference_folder(tmp_path / "bf16", tiny_config, tiny_model)
    drafter_folder(folder / "dflash", tiny_config)
    return folder


@pytest.fixture
def release(tmp_path, tiny_config, tiny_model) -> Path:
    """A release (MXFP4 experts, FP8 spine) with a drafter, of `tiny_model`."""
    round_to_bf16(tiny_model)
    folder = release_folder(tmp_path / "release", tiny_config, tiny_model)
    drafter_folder(folder / "dflash", tiny_config)
    return folder


@pytest.fixture
def release_of_bf16_spine(tmp_path, tiny_config, tiny_model) -> Path:
    round_to_bf16(tiny_model)
    return release_folder(tmp_path / "bf16-spine", tiny_config, tiny_model, spine="bf16")


@pytest.fixture
def with_tokenizer(release, reference):
    """The release and its reference, both with a byte tokenizer of 261 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    for folder in (release, reference):
        tokenizer.save_pretrained(folder)
    return release, reference


def behind(exact, prompt, tokens, sampling) -> torch.Tensor:
    """How far [len(tokens)] each token's score lies behind the best one by the logits of the engine `exact`, in
    standard deviations of these logits. Above temperature 0 scores are logits with the noise of their position."""
    from mimo_runtime.speculate import Sampler, scored

    ids = [*prompt, *tokens]
    logits = exact.logits(ids)[len(prompt) - 1 : -1]
    scores, sampler = logits, Sampler.of(sampling, logits.device)
    if not sampler.greedy:
        assert not sampler.top_k and not sampler.nucleus  # which tokens they leave is a choice of its own
        positions = torch.arange(len(prompt), len(ids), device=logits.device)
        scores = scored(logits, positions, sampler)[0] * sampler.temperature
    own = scores.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return ((scores.amax(-1) - own) / logits.std()).cpu()


def rounding(layers: int) -> float:
    """The gap between two logits that BF16 may turn, in standard deviations of the logits, where no router decides.

    A rounding to BF16 errs evenly by up to 2**-8 of a value, so by 2**-8 / sqrt(3) in the mean square. Eight of them
    follow each other in a layer (norm, projection, inner values and sum of two sublayers), and two behind the last one.
    Their squares add up; a gap has the errors of two logits; six standard deviations of it are out of reach.
    """
    return 6 * math.sqrt(2 * (8 * layers + 2) / 3) * 2**-8


def assert_trees_round_alone(engine, exact, prompt, sampling, ways) -> None:
    """Every token of every way is, after the tokens before it, the choice of `exact`, or behind it by what rounding
    makes. So two texts are the same, or part where the gap between both candidates is a rounding; and what follows is
    judged as well, where a comparison of texts would end."""
    limit = rounding(len(exact.target.layers))
    for how in ways:
        tokens = engine.generate(prompt, sampling, **how).tokens
        worst = float(behind(exact, prompt, tokens, sampling).max())
        print(how, sampling.temperature, f"{worst:.3f} behind, {limit:.3f} allowed")
        assert worst < limit, f"{how}: {worst:.3f} behind the best, where {limit:.3f} can be rounding"


def assert_own_tokens(engine, plain) -> None:
    """Drafts change no token of `engine`, and every greedy one is that of the engine `plain`, up to a near tie."""
    from mimo_runtime.config import SamplingConfig

    prompt = [3, 1, 4, 1, 5]
    for temperature in (0.0, 1.0):
        sampling = SamplingConfig(max_new_tokens=40, stop_token_ids=(-1,), temperature=temperature)
        tokens = engine.generate(prompt, sampling, speculate=False).tokens
        for how in ({}, {"forced_acceptance": [3, engine.block - 1, 0]}):
            assert engine.generate(prompt, sampling, **how).tokens == tokens
        if temperature == 0:
            gaps = behind(plain, prompt, tokens, sampling)
            assert gaps.max() < 0.1 and (gaps == 0).float().mean() > 0.9
