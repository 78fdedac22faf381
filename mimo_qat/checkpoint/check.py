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

from mimo_qat.checkpoint.findings import Report, few
from mimo_qat.checkpoint.folder import TensorFolder, inside
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
    drafter_folder,
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
