"""mimo-qat check release/

Proves a checkpoint folder against its own config.json: every tensor exactly once with the right shape and dtype, an
index that tells the truth, values that the formats allow, a drafter that engines will run as it was trained. Each
finding says what it would cause and what to do. Headers are read whole; values are sampled (`--samples`).
"""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.findings import Report, few
from mimo_qat.checkpoint.geometry import Config, DraftGeometry, Geometry, parse_json, read_text
from mimo_qat.checkpoint.layout import (
    DRAFTER_FILE,
    TOWER_PREFIXES,
    differences,
    drafter_tensors,
    quantization_config,
    read_json,
    target_tensors,
    totals,
)
from mimo_qat.checkpoint.reader import (
    MASK_FILE,
    Checkpoint,
    TensorFolder,
    drafter_folder,
    inside,
    read_draft_config,
    read_mask_embedding,
)
from mimo_qat.checkpoint.writer import MANIFEST_FILE, file_sha256

EXECUTABLE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
E2M1 = ("0", "0.5", "1", "1.5", "2", "3", "4", "6")


@dataclass(kw_only=True)
class CheckConfig:
    """Prove a checkpoint folder: layout, index, values, configuration, drafter."""

    folder: str
    """a release, a BF16 folder, or a drafter's folder"""
    samples: int = 16
    """weights of each format whose values are read: 0 reads headers alone, -1 reads every weight, and compares
    every file with the checksums of conversion.json"""


def check_target(folder: Path, samples: int, report: Report) -> Config | None:
    """Findings about a target checkpoint; returns its config where there is one."""
    config = report.attempt(read_json, folder / "config.json")
    geometry = report.attempt(Geometry.from_config, config) if config is not None else None
    report.attempt(_tokenizer, folder, geometry, report)
    checkpoint = report.attempt(Checkpoint, folder) if config is not None else None
    if geometry is None or checkpoint is None or report.attempt(getattr, checkpoint, "format") is None:
        return config
    for step in (_tensors, _index, _claims, _model_keys, _float_values):
        report.attempt(step, checkpoint, report)
    report.attempt(_expert_values, checkpoint, samples, report)
    report.attempt(_fp8_values, checkpoint, samples, report)
    report.attempt(_manifest, folder, samples < 0, report)
    return config


def _tensors(checkpoint: Checkpoint, report: Report) -> None:
    """Names, shapes and dtypes against the layout; nothing else in the folder that a loader could pick up."""
    experts, spine, mtp = checkpoint.format
    count, size = totals(checkpoint.specs)
    report.facts |= {
        "experts": experts,
        "spine": spine,
        "mtp_layers": mtp,
        "tensors": count,
        "bytes": size,
        "expert_tensors": sum(".mlp.experts." in n for n in checkpoint.specs),
        "tower_tensors": sum(n.startswith(TOWER_PREFIXES) for n in checkpoint.specs),
        "files": len({s.file for s in checkpoint.specs.values()}),
    }
    expected = target_tensors(checkpoint.config, experts=experts, spine=spine, mtp_layers=mtp)
    for kind, found in differences(expected, checkpoint.specs).items():
        report.expect(not found, kind, few(found))
    used = {s.file for s in checkpoint.specs.values()}
    stray = sorted(p.name for p in checkpoint.folder.glob("*.safetensors") if p.name not in used)
    report.expect(not stray, "stray-weights", few(stray))
    pickles = sorted(p.name for p in checkpoint.folder.rglob("*") if p.suffix in EXECUTABLE and p.name != MASK_FILE)
    report.expect(not pickles, "pickles", few(pickles))


def _index(checkpoint: Checkpoint, report: Report) -> None:
    """The index's metadata against the tensors; only a release has to have it."""
    experts, spine, _ = checkpoint.format
    if experts == spine == "bf16":
        return
    if not checkpoint.index:
        report.add("index-absent", "quantized weights without model.safetensors.index.json")
        return
    meta, size, chunks = checkpoint.metadata, totals(checkpoint.specs)[1], checkpoint.geometry.qkv_chunks
    stated, tp_size, save_format = meta.get("total_size"), meta.get("tp_size"), meta.get("save_format")
    report.expect(stated == size, "index-total-size", f"total_size is {stated}, the tensors have {size}")
    report.expect(tp_size == chunks, "index-tp-size", f"tp_size is {tp_size}, expected {chunks}")
    report.expect(save_format == experts, "index-save-format", f"{save_format!r}, but the experts are {experts}")
    if experts == "mxfp4":
        report.facts["scale_rule"] = meta.get("scale_rule")


def _claims(checkpoint: Checkpoint, report: Report) -> None:
    """config.json's quantization_config against what is stored."""
    experts, spine, mtp = checkpoint.format
    claimed = checkpoint.config.get("quantization_config")
    if experts == spine == "bf16":
        report.expect(not claimed, "quantization-config", "it is set, but every weight is BF16; remove it")
        return
    if not isinstance(claimed, dict):
        report.add("quantization-config", "config.json has none, but weights are quantized")
        return
    wanted = quantization_config(checkpoint.config, experts, spine, mtp)
    for key in ("quant_method", "fmt", "activation_scheme", "weight_block_size", "store_dtype", "mxfp4_block_size"):
        have, want = claimed.get(key), wanted.get(key)
        report.expect(have == want, "quantization-config", f"{key} is {have!r}, expected {want!r}")
    listed = set(claimed.get("ignored_layers") or ())
    lacking = [name for name in wanted["ignored_layers"] if name not in listed]
    report.expect(not lacking, "ignored-layers-lack", few(lacking))
    extra = sorted(listed - set(wanted["ignored_layers"]))
    report.expect(not extra, "ignored-layers-extra", few(extra))


def _model_keys(checkpoint: Checkpoint, report: Report) -> None:
    """Keys of config.json that change what an engine computes."""
    config = checkpoint.config
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        report.expect(config.get(key) is not None, "layer-list", f"config.json has no {key}")
    act, limit = config.get("hidden_act", "silu"), config.get("swiglu_limit")
    report.expect(act == "silu" and limit is None, "activation", f"hidden_act {act!r}, swiglu_limit {limit!r}")
    stated, held = config.get("num_nextn_predict_layers"), checkpoint.format[2]
    report.expect(stated in (None, held), "mtp-count", f"num_nextn_predict_layers is {stated}, the folder holds {held}")
    omni = [key for key in ("vision_config", "audio_config") if config.get(key)]
    towers = any(n.startswith(TOWER_PREFIXES) for n in checkpoint.specs)
    report.expect(towers or not omni, "towers", f"{' and '.join(omni)} without tower weights")
    for target in (config.get("auto_map") or {}).values():
        name = target.rsplit("--")[-1].split(".")[0] + ".py"
        report.expect((checkpoint.folder / name).is_file(), "remote-code", f"auto_map names {name}, which is absent")


def _manifest(folder: Path, hash_all: bool, report: Report) -> None:
    """The files against the sizes (and checksums) that `mimo-qat convert` wrote down."""
    if not (folder / MANIFEST_FILE).is_file():
        return
    changed = []
    for name, entry in read_json(folder / MANIFEST_FILE)["files"].items():
        path = inside(folder, name)
        if (
            not path.is_file()
            or path.stat().st_size != entry["bytes"]
            or (hash_all and file_sha256(path) != entry["sha256"])
        ):
            changed.append(name)
    report.expect(not changed, "manifest", f"{few(changed)} differ from {MANIFEST_FILE}")


def _sample(names: list[str], samples: int) -> list[str]:
    """At most `samples` names, evenly spread; all of them for -1."""
    if samples < 0 or len(names) <= samples:
        return names
    return [names[i * len(names) // samples] for i in range(samples)]


def _expert_values(checkpoint: Checkpoint, samples: int, report: Report) -> None:
    """MXFP4 codes and scales: legal bytes, no -0, and the histogram that narrows down the scale rule."""
    stored = [n for n, s in checkpoint.specs.items() if s.dtype == "U8" and n.endswith(".weight")]
    bases = [n.removesuffix(".weight") for n in _sample(stored, samples)]
    histogram, negative_zeros, low, high = torch.zeros(8, dtype=torch.long), 0, 255, 0
    for base in bases:
        scales = checkpoint.scale_bytes(base)
        report.expect((scales != 255).all(), "scale-nan", f"{base}.weight_scale holds the byte 255")
        codes = mxfp4.unpack(checkpoint.raw(base + ".weight")).unflatten(-1, (-1, mxfp4.BLOCK))
        negative_zeros += int((codes == 8).sum())
        largest = (codes & 7).amax(-1)
        # A scale at the lower end of its range says nothing about the rule that chose it.
        histogram += torch.bincount(largest[(largest > 0) & (scales > 1)].flatten().long(), minlength=8)
        if (largest > 0).any():
            low, high = min(low, int(scales[largest > 0].min())), max(high, int(scales[largest > 0].max()))
    report.expect(not negative_zeros, "minus-zero", f"{negative_zeros} codes in {len(bases)} sampled weights")
    blocks = int(histogram.sum())
    if not blocks:
        return
    share = {value: round(int(n) / blocks, 4) for value, n in zip(E2M1, histogram, strict=True)}
    small = round(1 - share["4"] - share["6"], 4)
    # "even" and "floor" always leave 4 or 6; their shares of the two depend on the weights, so they tell no more.
    fits = ["rceil", "mse"] if small > 0.01 else ["even", "floor", "mse"]
    report.facts |= {"max_code_share": share, "rules_that_fit": fits, "scale_exponents": [low - 127, high - 127]}
    report.expect(small <= 0.01, "small-max-code", f"{small:.1%} of {blocks:,} blocks have a largest code below 4")
    report.expect(high - low <= 15, "scale-span", f"block scales span {high - low} powers of two in the sample")


def _fp8_values(checkpoint: Checkpoint, samples: int, report: Report) -> None:
    """Every non-zero 128x128 block holds a code of magnitude 448, or its row map is not the one it was written with."""
    names = [n for n, s in checkpoint.specs.items() if s.dtype == "F8_E4M3"]
    report.facts["fp8_weights"] = len(names)
    for kind, end in (("qkv-block-amax", "qkv_proj.weight"), ("fp8-block-amax", "")):
        members = [n for n in names if n.endswith("qkv_proj.weight") == bool(end)]
        for name in _sample(members, samples):
            base = name.removesuffix(".weight")
            codes = checkpoint.raw(name).view(torch.uint8) & 0x7F
            scales = checkpoint.raw(base + ".weight_scale_inv")
            report.expect((codes != 0x7F).all(), "fp8-nan", f"{name} holds NaN codes")
            report.expect((scales.isfinite() & (scales > 0)).all(), "fp8-scale", f"{base}: a scale is <= 0 or NaN")
            tops = block_amax(codes, checkpoint.chunk_rows(base))
            wrong = int(((tops != 0x7E) & (tops != 0)).sum())
            report.expect(not wrong, kind, f"{name}: {wrong} of {tops.numel()} blocks have no code of magnitude 448")


def block_amax(codes: torch.Tensor, chunk_rows: int | None) -> torch.Tensor:
    """Largest code [row blocks, column blocks] of uint8 magnitudes [N, K], the grid restarting at each chunk."""
    blocks = []
    for chunk in codes.split(chunk_rows or codes.shape[0]):
        rows, cols = chunk.shape
        padded = torch.nn.functional.pad(chunk, (0, -cols % fp8.BLOCK, 0, -rows % fp8.BLOCK))
        blocks.append(padded.unflatten(0, (-1, fp8.BLOCK)).unflatten(2, (-1, fp8.BLOCK)).amax((1, 3)))
    return torch.cat(blocks)


def _float_values(checkpoint: Checkpoint, report: Report) -> None:
    """Small unquantised tensors (norms, sinks, routers, block scales) are finite."""
    small = [n for n, s in checkpoint.specs.items() if s.dtype in ("BF16", "F16", "F32") and s.nbytes <= 2**24]
    bad = [n for n in _sample(small, 512) if not checkpoint.raw(n).isfinite().all()]
    report.expect(not bad, "not-finite", few(bad))


def _tokenizer(folder: Path, geometry: Geometry | None, report: Report) -> None:
    """tokenizer.json is there and fits the embedding."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        report.add("tokenizer-absent", "no tokenizer.json")
        return
    tokens = parse_json(read_text(path), str(path))
    vocabulary = (tokens.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    added = {t["content"]: t["id"] for t in tokens.get("added_tokens") or ()}
    size = max([*ids, *added.values()], default=-1) + 1
    report.facts |= {"tokenizer_size": size, "mask_token_in_tokenizer": added.get("<|MASK|>")}
    rows = geometry.vocab_size if geometry else size
    report.expect(size <= rows, "tokenizer-size", f"the tokenizer has {size} ids, the embedding {rows} rows")


def check_drafter(folder: Path, target: Config | None, report: Report) -> None:
    """Findings about a DFlash drafter; with the target's config also whether the two fit."""
    config = report.attempt(_draft_config, folder / "config.json", report)
    geometry = report.attempt(DraftGeometry.from_config, config) if config is not None else None
    if config is None or geometry is None:
        return
    report.attempt(_draft_tensors, folder, config, report)
    report.attempt(_draft_spelling, config, geometry, report)
    report.attempt(_draft_mask, folder, geometry, report)
    if target is not None:
        report.attempt(_draft_fits, config, geometry, target, report)
    report.expect((folder / "dflash.py").is_file(), "drafter-code", "the drafter's folder has no dflash.py")


def _draft_config(path: Path, report: Report) -> Config:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = read_draft_config(path)
    for warning in caught:
        report.add("drafter-json", str(warning.message).split(";")[0])
    return config


def _draft_tensors(folder: Path, config: Config, report: Report) -> None:
    held = TensorFolder(folder, (DRAFTER_FILE, "model.safetensors")).specs
    count, size = totals(held)
    report.facts["drafter"] = {"tensors": count, "bytes": size}
    for kind, found in differences(drafter_tensors(config), held).items():
        report.expect(not found, "drafter-tensors", f"{kind} {few(found)}")


def _draft_spelling(config: Config, g: DraftGeometry, report: Report) -> None:
    """Keys for which engines take another value where their own spelling of them is absent."""
    inner, rope = config.get("dflash_config") or {}, config.get("rope_parameters") or {}
    both = config.get("is_causal") is not None and inner.get("causal") is not None
    report.expect(both, "drafter-causal", "is_causal and dflash_config.causal are not both written")
    both = "partial_rotary_factor" in config and "partial_rotary_factor" in rope
    report.expect(
        both or g.rotary_dim == g.head_dim,
        "drafter-rotary",
        f"partial_rotary_factor ({g.rotary_dim} of {g.head_dim}) is not both at the top and in rope_parameters",
    )
    windows = {"use_sliding_window": config, "layer_types": config, "use_swa": inner}
    absent = [key for key, where in windows.items() if where.get(key) is None]
    report.expect(not absent, "drafter-window", f"not written: {', '.join(absent)}")
    scaled = "attention_value_scale" in inner or "attention_value_scale" in config
    report.expect(scaled, "drafter-value-scale", "no attention_value_scale")
    report.expect(g.sinks, "drafter-sinks", "no attention sinks")
    report.expect("backbone_rotary_base" not in inner, "drafter-rope-base", "backbone_rotary_base is written")


def _draft_mask(folder: Path, g: DraftGeometry, report: Report) -> None:
    """The sidecar's vector and id, and the tokenizer's idea of that id."""
    vector = read_mask_embedding(folder / MASK_FILE, g.hidden_size, g.mask_token_id, g.vocab_size)
    norm = float(vector.float().norm())
    report.facts.setdefault("drafter", {}).update(mask_token_id=g.mask_token_id, mask_norm=round(norm, 4))
    report.expect(norm > 1e-2, "drafter-mask-norm", f"the mask embedding has norm {norm:.1e}")
    token = report.facts.get("mask_token_in_tokenizer")
    report.expect(
        token in (None, g.mask_token_id),
        "drafter-mask-id",
        f"mask_token_id is {g.mask_token_id}, the tokenizer's <|MASK|> is {token}",
    )


def _draft_fits(config: Config, g: DraftGeometry, target: Config, report: Report) -> None:
    t = Geometry.from_config(target)
    report.expect(g.vocab_size == t.vocab_size, "drafter-vocab", f"vocab_size {g.vocab_size}, target {t.vocab_size}")
    for what, have, want in (
        ("hidden_size", g.hidden_size, t.hidden_size),
        ("num_target_layers", config.get("num_target_layers", t.num_hidden_layers), t.num_hidden_layers),
    ):
        report.expect(have == want, "drafter-target", f"{what} {have}, target {want}")
    taps = list(g.target_layer_ids)
    fits = all(0 <= i < t.num_hidden_layers for i in taps)
    report.expect(fits, "drafter-target", f"target_layer_ids {taps} leave 0..{t.num_hidden_layers - 1}")


def _is_drafter(folder: Path) -> bool:
    try:
        config = read_json(folder / "config.json")
    except ValueError:
        return not (folder / "config.json").is_file() and (folder / DRAFTER_FILE).is_file()
    return "DFlashDraftModel" in (config.get("architectures") or ())


@torch.no_grad()
def main(cfg: CheckConfig) -> dict[str, Any]:
    """Prints facts and findings of the folder; returns them, with `ok` false where one is an error."""
    folder, report = Path(cfg.folder), Report()
    if _is_drafter(folder):
        check_drafter(folder, None, report)
    else:
        target = check_target(folder, cfg.samples, report)
        if drafter_folder(folder) != folder:
            check_drafter(drafter_folder(folder), target, report)
    report.print(str(folder))
    errors = report.count("error")
    findings = [asdict(f) for f in report.findings]
    return {"ok": not errors, "folder": str(folder), "errors": errors, **report.facts, "findings": findings}
