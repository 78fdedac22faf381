"""mimo-qat check release/

Proves a checkpoint folder against its own config.json: every tensor exactly once with the right shape and dtype, an
index that tells the truth, values that the formats allow, a drafter that engines will run as it was trained. Each
finding says what it would cause and what to do. Headers are read whole; values are sampled (`--samples`), or read to
the last one (`--deep true`). Checkpoints of other Mixture-of-Experts families are checked as far as formats go.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_qat.checkpoint import values
from mimo_qat.checkpoint.check_drafter import check_drafter
from mimo_qat.checkpoint.findings import Report, few
from mimo_qat.checkpoint.folder import inside
from mimo_qat.checkpoint.geometry import DRAFTER_CLASSES, Config, Geometry, parse_json, read_text
from mimo_qat.checkpoint.layout import (
    DRAFTER_FILE,
    MX_BLOCK,
    TOWER_PREFIXES,
    differences,
    quantization_config,
    read_json,
    target_tensors,
    totals,
    unpacked_linears,
)
from mimo_qat.checkpoint.reader import MASK_FILE, Checkpoint, drafter_folder
from mimo_qat.checkpoint.writer import MANIFEST_FILE, file_sha256

EXECUTABLE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PACKED_FORMAT = "mxfp4-pack-quantized"
# (pattern of the tensor's name, kind of difference, finding): the first that fits, else the kind itself.
_NAMED = (
    (r"\.self_attn\.sinks$|\.mlp\.experts\.(gate_up_proj|down_proj)$", "unknown", "library-names"),
    (r"^(layers\.\d+\.|fc\.|norm\.|hidden_norm\.|candidate_selector\.)", "unknown", "drafter-in-index"),
    (r"\.(input_scale|weight_scale_2|weight_global_scale|weight_zero_point)$", "unknown", "extra-scales"),
    (r"\.experts\..*\.(weight_scale_inv|scale|weight_scales)$", "unknown", "scale-name"),
    (r"\.attention_sink_bias$", "missing unknown", "layer-pattern"),
    (r"\.weight_scale(_inv)?$", "missing", "scale-missing"),
    (r"^model\.mtp\.", "missing unknown", "mtp-tensors"),
    (r"qkv_proj\.weight_scale_inv ", "shape", "qkv-scale-rows"),
    (r"self_attn\.(qkv|q|k|v)_proj\.weight ", "shape", "qkv-rows"),
    (r"\.mlp\.gate\.weight ", "dtype", "router-dtype"),
    (r"\.e_score_correction_bias ", "dtype", "router-bias-dtype"),
    (r"\.weight_scale ", "dtype", "scale-dtype"),
    (r"\.o_proj\.weight ", "dtype", "o-proj-dtype"),
)


@dataclass(kw_only=True)
class CheckConfig:
    """Prove a checkpoint folder: layout, index, values, configuration, drafter."""

    folder: str
    """a release, a BF16 folder, a compressed-tensors folder, or a drafter's folder"""
    samples: int = 16
    """weights of each format whose values are read: 0 reads headers alone, -1 reads every weight, and compares
    every file with the checksums of conversion.json"""
    deep: bool = False
    """read everything: every weight, every checksum, copies of experts"""


def check_target(folder: Path, samples: int, report: Report, deep: bool = False) -> Config | None:
    """Findings about a target checkpoint; returns its config where there is one."""
    config = report.attempt(read_json, folder / "config.json")
    family = str((config or {}).get("model_type") or "mimo_v2")
    mimo = family.startswith("mimo_v2")
    if config is not None and mimo:
        report.attempt(_config_keys, config, report)
    geometry = report.attempt(Geometry.from_config, config) if config is not None and mimo else None
    rows = geometry.vocab_size if geometry else (config or {}).get("vocab_size")
    report.attempt(_tokenizer, folder, rows, report)
    checkpoint = report.attempt(Checkpoint, folder) if config is not None else None
    if checkpoint is None or (mimo and geometry is None):
        return config
    if mimo:
        report.attempt(_library_names, checkpoint, report)
        if report.attempt(getattr, checkpoint, "format") is None:
            return config
    for step in (_tensors, _index, _claims, _model_keys) if mimo else (_other_family, _packed_claims):
        report.attempt(step, checkpoint, report)
    if samples:
        for reading in (values.float_values, values.expert_values, values.fp8_values):
            report.attempt(reading, checkpoint, samples, report)
    if deep:
        report.attempt(values.copies, checkpoint, report)
    report.attempt(_manifest, folder, samples < 0, report)
    checkpoint.close()
    return config


def _library_names(checkpoint: Checkpoint, report: Report) -> None:
    """Without one tensor an expert there is no format to compare with, so this comes first."""
    if not any(re.search(r"\.experts\.\d+\.", n) for n in checkpoint.specs):
        stacked = [n for n in checkpoint.specs if re.search(_NAMED[0][0], n)]
        report.expect(not stacked, "library-names", few(stacked))


def _tensors(checkpoint: Checkpoint, report: Report) -> None:
    """Names, shapes and dtypes against the layout; nothing else in the folder that a loader could pick up."""
    experts, spine, mtp = checkpoint.format
    _facts(checkpoint, experts, spine, report)
    report.facts["mtp_layers"] = mtp
    report.facts["tower_tensors"] = sum(n.startswith(TOWER_PREFIXES) for n in checkpoint.specs)
    expected = target_tensors(checkpoint.config, experts=experts, spine=spine, mtp_layers=mtp)
    named: dict[str, list[str]] = {}
    for kind, found in differences(expected, checkpoint.specs).items():
        for what in found:
            named.setdefault(_name(kind, what), []).append(what)
    for name, found in named.items():
        report.add(name, few(found))
    _strays(checkpoint, report)


def _name(kind: str, what: str) -> str:
    return next((name for pattern, kinds, name in _NAMED if kind in kinds and re.search(pattern, what)), kind)


def _facts(checkpoint: Checkpoint, experts: str, spine: str, report: Report) -> None:
    count, size = totals(checkpoint.specs)
    report.facts |= {"experts": experts, "spine": spine, "tensors": count, "bytes": size}
    report.facts["expert_tensors"] = sum(".experts." in n for n in checkpoint.specs)
    report.facts["files"] = len({s.file for s in checkpoint.specs.values()})
    if experts.startswith("mxfp4"):
        report.facts["scale_rule"] = checkpoint.metadata.get("scale_rule")


def _strays(checkpoint: Checkpoint, report: Report) -> None:
    used = {s.file for s in checkpoint.specs.values()}
    stray = sorted(p.name for p in checkpoint.folder.glob("*.safetensors") if p.name not in used)
    report.expect(not stray, "stray-weights", few(stray))
    pickles = sorted(p.name for p in checkpoint.folder.rglob("*") if p.suffix in EXECUTABLE and p.name != MASK_FILE)
    report.expect(not pickles, "pickles", few(pickles))


def _index(checkpoint: Checkpoint, report: Report) -> None:
    """The index's metadata against the tensors; only a release has to have it."""
    experts, _, _ = checkpoint.format
    meta, size, chunks = checkpoint.metadata, totals(checkpoint.specs)[1], checkpoint.geometry.qkv_chunks
    if experts in ("bf16", "mxfp4-packed"):
        stated = meta.get("total_size", size)
        report.expect(stated == size, "index-total-size", f"total_size is {stated}, the tensors have {size}")
        return
    if not checkpoint.index:
        report.add("index-absent", "quantized weights without model.safetensors.index.json")
        return
    stated, tp_size, save_format = meta.get("total_size"), meta.get("tp_size"), meta.get("save_format")
    report.expect(stated == size, "index-total-size", f"total_size is {stated}, the tensors have {size}")
    report.expect(tp_size == chunks, "index-tp-size", f"tp_size is {tp_size}, expected {chunks}")
    report.expect(save_format == experts, "index-save-format", f"{save_format!r}, but the experts are {experts}")


def _claims(checkpoint: Checkpoint, report: Report) -> None:
    """config.json's quantization_config against what is stored."""
    experts, spine, mtp = checkpoint.format
    claimed = checkpoint.config.get("quantization_config")
    if experts == "mxfp4-packed":
        _packed_claims(checkpoint, report)
        return
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


def _packed_claims(checkpoint: Checkpoint, report: Report) -> None:
    """A compressed-tensors configuration against what is stored; none is wanted where nothing is packed."""
    claimed = checkpoint.config.get("quantization_config")
    if not any(n.endswith(".weight_packed") for n in checkpoint.specs):
        packed = isinstance(claimed, dict) and claimed.get("format") == PACKED_FORMAT
        report.expect(not packed, "quantization-config", f"format is {PACKED_FORMAT!r}, but nothing is packed")
        return
    if not isinstance(claimed, dict):
        report.add("quantization-config", "config.json has none, but experts are packed")
        return
    group: Config = next(iter((claimed.get("config_groups") or {}).values()), {})
    have = {
        "quant_method": claimed.get("quant_method"),
        "format": claimed.get("format"),
        **(group.get("weights") or {}),
    }
    wanted = {"quant_method": "compressed-tensors", "format": PACKED_FORMAT, "num_bits": 4, "type": "float"}
    for key, want in (wanted | {"group_size": MX_BLOCK, "strategy": "group", "symmetric": True}).items():
        report.expect(have.get(key) == want, "quantization-config", f"{key} is {have.get(key)!r}, expected {want!r}")
    listed = set(claimed.get("ignore") or ())
    lacking = sorted(unpacked_linears(checkpoint.specs) - listed)
    covered = any(str(name).startswith("re:") for name in listed)  # patterns are for the reader to resolve
    report.expect(not lacking or covered, "ignored-layers-lack", few(lacking))


def _other_family(checkpoint: Checkpoint, report: Report) -> None:
    """What can be said of a checkpoint whose layout is not known: every packed weight has its scale, and the index."""
    packed = [n for n in checkpoint.specs if n.endswith(".weight_packed")]
    _facts(checkpoint, "mxfp4-packed" if packed else "bf16", "bf16", report)
    for name in packed:
        codes, scale = checkpoint.specs[name], checkpoint.specs.get(name.removesuffix("_packed") + "_scale")
        if scale is None:
            report.add("scale-missing", f"{name} has no weight_scale beside it")
            continue
        want = (*codes.shape[:-1], codes.shape[-1] * 2 // MX_BLOCK)
        report.expect(scale.shape == want, "shape", f"{scale.name} is {list(scale.shape)}, expected {list(want)}")
        report.expect(scale.dtype == "U8", "scale-dtype", f"{scale.name} is {scale.dtype}, expected U8")
    size = totals(checkpoint.specs)[1]
    stated = checkpoint.metadata.get("total_size", size)
    report.expect(stated == size, "index-total-size", f"total_size is {stated}, the tensors have {size}")
    _strays(checkpoint, report)


def _config_keys(config: Config, report: Report) -> None:
    """Keys of config.json alone, before anything is computed from them."""
    epsilon, other = config.get("layernorm_epsilon"), config.get("rms_norm_eps")
    report.expect(epsilon is not None, "norm-epsilon", "config.json has no layernorm_epsilon")
    report.expect(
        other is None or epsilon is None or other == epsilon,
        "norm-epsilon",
        f"rms_norm_eps is {other}, layernorm_epsilon {epsilon}",
    )
    report.expect(config.get("rope_theta") is not None, "rope-theta", "config.json has no rope_theta")
    chunked = config.get("attention_chunk_size")
    report.expect(chunked is None, "attention-chunk", f"attention_chunk_size is {chunked}")
    window, previous = config.get("sliding_window"), config.get("sliding_window_size")
    report.expect(
        window is None or previous is None or window == previous,
        "window-keys",
        f"sliding_window is {window}, sliding_window_size {previous}",
    )
    fused = config.get("attention_projection_layout") == "fused_qkv"
    names = config.get("architectures") or ()
    report.expect(
        not fused or (config.get("model_type", "mimo_v2") == "mimo_v2" and "MiMoV2FlashForCausalLM" not in names),
        "architecture",
        f"{config.get('model_type')!r}, {list(names)} with a fused QKV",
    )


def _model_keys(checkpoint: Checkpoint, report: Report) -> None:
    """Keys of config.json that change what an engine computes."""
    config = checkpoint.config
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        report.expect(config.get(key) is not None, "layer-list", f"config.json has no {key}")
    act, limit = config.get("hidden_act", "silu"), config.get("swiglu_limit")
    report.expect(act == "silu" and limit is None, "activation", f"hidden_act {act!r}, swiglu_limit {limit!r}")
    stated, held = config.get("num_nextn_predict_layers"), checkpoint.format[2]
    report.expect(stated in (None, held), "mtp-count", f"num_nextn_predict_layers is {stated}, the folder holds {held}")
    report.expect(not held or stated is not None, "mtp-unstated", f"{held} MTP blocks, no num_nextn_predict_layers")
    omni = [key for key in ("vision_config", "audio_config") if config.get(key)]
    towers = any(n.startswith(TOWER_PREFIXES) for n in checkpoint.specs)
    report.expect(towers or not omni, "towers", f"{' and '.join(omni)} without tower weights")
    for where in (config, checkpoint.metadata):
        tag = (where.get("conversion_metadata") or where).get("qkv_layout")
        report.expect(tag is None or "global" not in str(tag), "qkv-order", f"qkv_layout is {tag!r}")
    chunks = checkpoint.geometry.qkv_chunks
    plain = [n for n, s in checkpoint.specs.items() if n.endswith("self_attn.qkv_proj.weight") and s.dtype == "BF16"]
    report.expect(chunks == 1 or not plain, "qkv-bf16", f"{chunks} chunks of rows in {few(plain)}")
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
    weights = {name.startswith("dflash/") for name in changed if name.endswith(".safetensors")}
    other = "the drafter" if weights == {True} else "the target"
    report.expect(len(weights) != 1, "drafter-target-weights", f"only weights of {other} are not those of the release")


def _tokenizer(folder: Path, rows: int | None, report: Report) -> None:
    """tokenizer.json is there and fits the embedding of `rows` rows."""
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
    report.expect(
        rows is None or size <= rows, "tokenizer-size", f"the tokenizer has {size} ids, the embedding {rows} rows"
    )


def _is_drafter(folder: Path) -> bool:
    try:
        config = read_json(folder / "config.json")
    except ValueError:
        return not (folder / "config.json").is_file() and (folder / DRAFTER_FILE).is_file()
    names = config.get("architectures")
    return isinstance(names, list) and any(name in names for name in DRAFTER_CLASSES)


@torch.no_grad()
def main(cfg: CheckConfig) -> dict[str, Any]:
    """Prints facts and findings of the folder; returns them, with `ok` false where one is an error."""
    folder, report, samples = Path(cfg.folder), Report(), -1 if cfg.deep else cfg.samples
    if _is_drafter(folder):
        check_drafter(folder, None, report, samples)
    else:
        target = check_target(folder, samples, report, cfg.deep)
        if drafter_folder(folder) != folder:
            check_drafter(drafter_folder(folder), target, report, samples)
    report.print(str(folder))
    errors = report.count("error")
    findings = [asdict(f) for f in report.findings]
    return {"ok": not errors, "folder": str(folder), "errors": errors, **report.facts, "findings": findings}
