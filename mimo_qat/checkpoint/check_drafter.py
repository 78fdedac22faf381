"""Findings about a DFlash drafter, alone and beside its target."""

import warnings
from pathlib import Path

from mimo_qat.checkpoint.findings import Report, few
from mimo_qat.checkpoint.folder import TensorFolder
from mimo_qat.checkpoint.geometry import (
    DRAFTER_CLASSES,
    Config,
    DraftGeometry,
    Geometry,
    default_target_layer_ids,
)
from mimo_qat.checkpoint.layout import DRAFTER_FILE, differences, drafter_tensors, totals
from mimo_qat.checkpoint.reader import MASK_FILE, mask_token_of, read_draft_config, read_mask_embedding
from mimo_qat.checkpoint.values import finite

PUBLISHED_VALUE_SCALE = 0.612


def check_drafter(folder: Path, target: Config | None, report: Report, samples: int = 16) -> None:
    """Findings about a DFlash drafter; with the target's config also whether the two fit."""
    config = report.attempt(_draft_config, folder / "config.json", report)
    if config is not None and not _states_layer_ids(config):
        report.add("drafter-layer-ids", "no target_layer_ids")
    geometry = report.attempt(DraftGeometry.from_config, config) if config is not None else None
    if config is None or geometry is None:
        return
    report.attempt(_draft_tensors, folder, config, report)
    if samples:
        report.attempt(_draft_values, folder, report)
    report.attempt(_draft_spelling, config, geometry, report)
    report.attempt(_draft_semantics, config, geometry, report)
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


def _draft_values(folder: Path, report: Report) -> None:
    held = TensorFolder(folder, (DRAFTER_FILE, "model.safetensors"))
    bad = [n for n, s in held.specs.items() if s.dtype in ("BF16", "F16", "F32") and not finite(held, n)]
    held.close()
    report.expect(not bad, "not-finite", few(bad))


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
    names = config.get("architectures") or []
    expected = DRAFTER_CLASSES[bool(g.conv_groups or g.selector_rank)]
    report.expect(expected in names, "drafter-class", f"architectures are {names}, the tensors those of {expected}")
    report.expect("backbone_rotary_base" not in inner, "drafter-rope-base", "backbone_rotary_base is written")


def _states_layer_ids(config: Config) -> bool:
    inner = config.get("dflash_config")
    return "target_layer_ids" in config or (isinstance(inner, dict) and "target_layer_ids" in inner)


def _draft_semantics(config: Config, g: DraftGeometry, report: Report) -> None:
    """Keys that are there, and say something else than every published drafter."""
    report.expect(not g.causal, "drafter-is-causal", "is_causal is true")
    neox = config.get("is_neox_style", (config.get("rope_parameters") or {}).get("is_neox_style"))
    report.expect(neox in (None, True), "drafter-neox", f"is_neox_style is {neox!r}")
    drafts = config.get("num_speculative_tokens", (config.get("dflash_config") or {}).get("num_speculative_tokens"))
    report.expect(
        drafts is None or drafts < g.block_size,
        "drafter-draft-length",
        f"num_speculative_tokens {drafts}, block_size {g.block_size}",
    )


def _draft_mask(folder: Path, g: DraftGeometry, report: Report) -> None:
    """The sidecar's vector and id, and the tokenizer's idea of that id."""
    if not (folder / MASK_FILE).is_file():
        report.add("drafter-mask-absent", f"no {MASK_FILE}")
        return
    stated = mask_token_of(folder / MASK_FILE)
    if isinstance(stated, int) and stated != g.mask_token_id:
        report.add("drafter-mask-id", f"{MASK_FILE} is for id {stated}, the config says {g.mask_token_id}")
        return
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
    theta = float(target.get("rope_theta") or 0)
    report.expect(
        g.rope_theta != theta or theta == float(target.get("swa_rope_theta") or 10_000),
        "drafter-rope-theta",
        f"rope_theta {g.rope_theta:g} is that of the target's full-attention layers",
    )
    copied = g.value_scale == t.attention_value_scale != PUBLISHED_VALUE_SCALE
    report.expect(not copied, "drafter-value-scale", f"attention_value_scale {g.value_scale} is the target's own")
    taps = list(g.target_layer_ids)
    fits = all(0 <= i < t.num_hidden_layers for i in taps)
    report.expect(fits, "drafter-target", f"target_layer_ids {taps} leave 0..{t.num_hidden_layers - 1}")
    formula, n = taps == generic_layer_ids(t.num_hidden_layers, len(taps)), t.num_hidden_layers
    report.expect(
        not formula or taps == default_target_layer_ids(t, len(taps)),
        "drafter-layer-ids",
        f"target_layer_ids {taps} are those of a generic formula for {n} layers, not the full-attention ones",
    )


def generic_layer_ids(layers: int, taps: int) -> list[int]:
    """What generic DFlash trainers tap when nobody says otherwise: evenly from layer 1 to layer n - 3."""
    if taps < 2:
        return [layers // 2]
    return [round(1 + i * (layers - 4) / (taps - 1)) for i in range(taps)]
