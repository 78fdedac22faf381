"""What `mimo-qat convert` writes: three spellings of one checkpoint, and the steps that make their tensors.

    mimo                the published FP4-DFlash layout: MXFP4 experts, FP8 spine, expert-parallel files
    compressed-tensors  `mxfp4-pack-quantized`: weight_packed and weight_scale an expert projection, all else BF16
    bf16                the values that the MXFP4 file would hold ("snapped"), as an ordinary Hugging Face checkpoint

MiMo-V2 sources take all of them, other Mixture-of-Experts families the last two. A plan is made from headers alone:
it names every tensor of the result and the step that makes it. Whatever a dialect leaves as it is, is copied byte for
byte: MTP blocks, multimodal towers, the FP8 spine, experts that are MXFP4 already.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.geometry import Geometry
from mimo_qat.checkpoint.layout import (
    MX_BLOCK,
    SPINE_FILE,
    TOWER_PREFIXES,
    Config,
    Experts,
    Spine,
    TensorSpec,
    files_of,
    hf_shards,
    quantization_config,
    target_tensors,
    unpacked_linears,
)
from mimo_qat.sources import EXPERT, Source

Dialect = Literal["mimo", "compressed-tensors", "bf16"]
Kind = Literal["copy", "scales", "encode", "snap", "decode", "quantize", "regroup", "dequantize", "cast"]
AUTO_MAP = {
    "AutoConfig": "configuration_mimo_v2.MiMoV2Config",
    "AutoModel": "modeling_mimo_v2.MiMoV2Model",
    "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM",
}
DROPPED_KEYS = ("layer_types", "attention_chunk_size", "quantization_config")
SUFFIX = re.compile(r"\.(weight_scale_inv|weight_scale|weight_packed|weight)$")
_EXPERTS: dict[Dialect, Experts] = {"mimo": "mxfp4", "compressed-tensors": "mxfp4-packed", "bf16": "bf16"}

Part = tuple[str, torch.Tensor | memoryview, int | None]


@dataclass(frozen=True, slots=True)
class Step:
    """Makes the tensors `out` from the stored tensor or module `source`."""

    kind: Kind
    source: str
    out: tuple[str, ...]


@dataclass
class Plan:
    """Everything that a conversion will write, from headers alone."""

    dialect: Dialect
    rule: str
    """scale rule of the experts; "unknown" where they were packed before and their index does not say"""
    config: Config
    metadata: dict[str, Any]
    specs: dict[str, TensorSpec]
    steps: list[Step]

    def by_file(self) -> dict[str, tuple[list[TensorSpec], list[Step]]]:
        """File -> its tensors and its steps, both in file order: a disk then sees sequential writes."""
        files = files_of(self.specs)
        place = {s.name: i for members in files.values() for i, s in enumerate(members)}
        steps: dict[str, list[Step]] = {file: [] for file in files}
        for step in self.steps:
            homes = {self.specs[name].file for name in step.out}
            assert len(homes) == 1, f"{step} would write into {homes}"
            steps[homes.pop()].append(step)
        return {f: (files[f], sorted(steps[f], key=lambda s: place[s.out[0]])) for f in files}


# ---- configurations


def release_config(source: Config, mtp_layers: int) -> Config:
    """config.json of a MiMo-V2 result without its quantization: the source's own keys and the fused layout.

    `layer_types` goes: it repeats hybrid_layer_pattern, and engines that find it build their windows from it.
    `attention_chunk_size` goes: no layer uses it, and engines that find it switch to chunked local attention.
    """
    dtype_key = "dtype" if "dtype" in source else "torch_dtype"
    config = {k: v for k, v in source.items() if k not in DROPPED_KEYS}
    config |= {
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "auto_map": AUTO_MAP,
        "attention_projection_layout": "fused_qkv",
        dtype_key: "bfloat16",
    }
    stated = source.get("num_nextn_predict_layers")
    if stated and not mtp_layers:
        config["num_nextn_predict_layers"] = 0  # training drops the MTP blocks; engines must not look for them
    elif stated not in (None, mtp_layers):
        raise ValueError(
            f"num_nextn_predict_layers is {stated}, but the checkpoint holds {mtp_layers} MTP blocks; "
            "correct the source's config.json"
        )
    return config


def compressed_tensors_config(specs: Mapping[str, TensorSpec]) -> Config:
    """The `quantization_config` that compressed-tensors (0.15 and later), transformers, vLLM and SGLang read.

    Every module that is not a routed expert is listed in `ignore` by its full name: readers differ in how they match
    patterns, and fused modules need each of their parts to be listed.
    """
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": MX_BLOCK, "strategy": "group"}
    group = {
        "targets": ["Linear"],
        "weights": weights | {"dynamic": False, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
        "input_activations": None,
        "output_activations": None,
        "format": "mxfp4-pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(unpacked_linears(specs) | {"lm_head"}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# ---- plans


def plan(source: Source, dialect: Dialect, rule: mxfp4.Rule, spine: Spine = "fp8") -> Plan:
    """The plan of one conversion; ValueError where the source cannot be written in that dialect."""
    if source.family == "mimo":
        return _plan_mimo(source, dialect, rule, spine)
    if dialect == "mimo":
        raise ValueError(
            f"{source.folder} is {source.config.get('model_type', 'no MiMo-V2 model')}, which the mimo layout cannot "
            "hold; give --dialect compressed-tensors or bf16"
        )
    return _plan_moe(source, dialect, rule)


def _plan_mimo(source: Source, dialect: Dialect, rule: mxfp4.Rule, spine: Spine) -> Plan:
    config, experts = release_config(source.config, source.mtp_layers), _EXPERTS[dialect]
    spine = spine if dialect == "mimo" else "bf16"
    specs = target_tensors(config, experts=experts, spine=spine, mtp_layers=source.mtp_layers)
    # Towers of a multimodal source ride along byte for byte, in the file beside the spine.
    tower_file = SPINE_FILE.replace("shard0", "shard1")
    for name, spec in source.specs.items():
        if name.startswith(TOWER_PREFIXES):
            specs[name] = spec._replace(file=tower_file)
    packed = source.experts.startswith("mxfp4")
    rule_written = str(source.checkpoint.metadata.get("scale_rule", "unknown")) if packed else rule
    metadata: dict[str, Any] = {"save_format": {"bf16": "bf16"}.get(dialect, "mxfp4"), "scale_rule": rule_written}
    if dialect == "mimo":
        metadata = {"save_format": "mxfp4", "tp_size": Geometry.from_config(config).qkv_chunks} | metadata
        config["quantization_config"] = quantization_config(config, "mxfp4", spine, source.mtp_layers)
    else:
        specs = hf_shards(specs)
    if dialect == "compressed-tensors":
        config["quantization_config"] = compressed_tensors_config(specs)
    modules: dict[str, list[TensorSpec]] = {}
    for spec in specs.values():
        modules.setdefault(SUFFIX.sub("", spec.name), []).append(spec)
    steps = [step for base, members in modules.items() for step in _mimo_steps(source, base, members, dialect)]
    return Plan(dialect, rule_written, config, metadata, specs, steps)


def _mimo_steps(source: Source, base: str, members: list[TensorSpec], dialect: Dialect) -> list[Step]:
    """The steps of one module of a MiMo-V2 result."""
    names = tuple(s.name for s in members)
    if ".mlp.experts." in base:
        return _expert_steps(source, base, names, dialect)
    stored = [source.specs.get(n) for n in names]
    if all(h is not None and (h.dtype, h.shape) == (s.dtype, s.shape) for h, s in zip(stored, members, strict=True)):
        return [Step("copy", name, (name,)) for name in names]
    if len(names) == 2:
        return [Step("regroup" if source.regroups(base) else "quantize", base, names)]
    if len(members[0].shape) == 2 and members[0].dtype == "BF16" and ".mlp.gate." not in names[0]:
        return [Step("dequantize", base, names)]
    return [Step("cast", names[0], names)]


def _expert_steps(source: Source, base: str, names: tuple[str, ...], dialect: Dialect) -> list[Step]:
    """An expert projection: copied where it is MXFP4 already, else encoded, or snapped for BF16."""
    packed = source.packed(base)
    if dialect == "bf16":
        return [Step("decode" if packed else "snap", base, names)]
    if not packed:
        return [Step("encode", base, names)]
    codes, scales = packed
    kind: Kind = "copy" if source.specs[scales].dtype == "U8" else "scales"
    return [Step("copy", codes, names[:1]), Step(kind, scales, names[1:])]


def _plan_moe(source: Source, dialect: Dialect, rule: mxfp4.Rule) -> Plan:
    specs: dict[str, TensorSpec] = {}
    steps: list[Step] = []

    def put(name: str, dtype: str, *shape: int) -> str:
        specs[name] = TensorSpec(name, dtype, shape, "")
        return name

    for name, spec in source.specs.items():
        base, match = name.removesuffix(".weight"), EXPERT.match(name)
        if name.endswith(".weight_scale_inv"):
            continue
        if match and len(spec.shape) == 2:
            rows, columns = spec.shape
            if columns % MX_BLOCK:
                raise ValueError(f"{name} has {columns} columns, not a multiple of {MX_BLOCK}, which MXFP4 needs")
            if dialect == "bf16":
                steps.append(Step("snap", base, (put(name, "BF16", rows, columns),)))
                continue
            codes = put(base + ".weight_packed", "U8", rows, columns // 2)
            steps.append(Step("encode", base, (codes, put(base + ".weight_scale", "U8", rows, columns // MX_BLOCK))))
        elif spec.dtype == "F8_E4M3":
            steps.append(Step("dequantize", base, (put(name, "BF16", *spec.shape),)))
        else:
            steps.append(Step("copy", name, (put(name, spec.dtype, *spec.shape),)))
    specs = hf_shards(specs)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if dialect == "compressed-tensors":
        config["quantization_config"] = compressed_tensors_config(specs)
    return Plan(dialect, rule, config, {"scale_rule": rule}, specs, steps)


# ---- steps


def run_step(step: Step, source: Source, rule: mxfp4.Rule, device: str, dtypes: Mapping[str, str]) -> Iterator[Part]:
    """(name, next rows or bytes, elements that the grid changed) until every tensor of `step.out` is whole.

    `dtypes` are those of the result. FP8 scales are computed on the CPU: a GPU divides by constants otherwise, and
    they move by an ulp.
    """
    name = step.out[0]
    if step.kind == "copy":
        for piece in source.checkpoint.pieces(step.source):
            yield name, piece, None
        if not source.specs[step.source].nbytes:
            yield name, memoryview(b""), None
    elif step.kind == "scales":
        yield name, source.scale_bytes(step.source), None
    elif step.kind in ("encode", "snap", "decode"):
        yield from _run_expert(step, source, rule, device)
    elif step.kind == "quantize":
        for slab in source.slabs(step.source, torch.float32):
            codes, scales = fp8.quantize(slab, name=step.source)
            yield name, codes, None
            yield step.out[1], scales, None
    elif step.kind == "regroup":
        for codes, scales in source.regrouped(step.source):
            yield name, codes, None
            yield step.out[1], scales, None
    elif step.kind == "dequantize":
        for slab in source.slabs(step.source, torch.bfloat16):
            yield name, slab, None
    else:
        yield name, _cast(name, source, dtypes[name]), None


def _run_expert(step: Step, source: Source, rule: mxfp4.Rule, device: str) -> Iterator[Part]:
    changed: int | None = None
    if step.kind == "decode":
        names = source.packed(step.source)
        assert names is not None
        packed, scales = source.checkpoint.rows(names[0]), source.scale_bytes(names[1])
    else:
        packed, scales, changed = source.encode(step.source, rule, device)
    if step.kind == "encode":
        yield step.out[0], packed, changed
        yield step.out[1], scales, None
        return
    yield step.out[0], mxfp4.decode(packed, scales, torch.bfloat16, name=step.source), changed


def _cast(name: str, source: Source, dtype: str) -> torch.Tensor:
    """A small tensor in another float dtype; a router must fit exactly."""
    weight = source.checkpoint.rows(name)
    out = weight.to(torch.bfloat16 if dtype == "BF16" else torch.float32)
    if ".mlp.gate." in name and not torch.equal(out.float(), weight.float()):
        raise ValueError(
            f"{name} is {weight.dtype} and does not fit in {dtype} exactly; set moe_router_dtype to float32, "
            "or train the router in bfloat16"
        )
    return out
