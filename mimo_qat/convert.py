"""mimo-qat convert --target runs/qat/final --drafter runs/distill/final --out release/

A BF16 folder (or an FP8 release) and a drafter's folder become an FP4-DFlash release that vLLM and SGLang load:
MXFP4 experts, FP8 fused QKV and dense MLPs, everything else as it is, the drafter in dflash/.

Experts that already lie on the MXFP4 grid, as those of our trainer do, keep every bit; the number of elements that
changed is counted and written down. The release appears whole: it grows in OUT.partial, where a killed job goes on
with the next file, and takes its name at the end. The bytes do not depend on when or how often the job was killed.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from mimo_kernels import fp8, mxfp4
from mimo_qat import models
from mimo_qat.checkpoint.geometry import Geometry
from mimo_qat.checkpoint.layout import (
    SPINE_FILE,
    TOWER_PREFIXES,
    Config,
    Spine,
    TensorSpec,
    files_of,
    quantization_config,
    read_json,
    target_tensors,
    totals,
)
from mimo_qat.checkpoint.reader import Checkpoint, inside, read_drafter
from mimo_qat.checkpoint.writer import MANIFEST_FILE, FileWriter, file_sha256, write_drafter, write_index
from mimo_qat.provenance import commit, versions, write_json

COPIED = (
    "tokenizer*",
    "chat_template*",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "LICENSE*",
)
REMOTE_CODE = ("configuration_mimo_v2.py", "modeling_mimo_v2.py")
AUTO_MAP = {
    "AutoConfig": "configuration_mimo_v2.MiMoV2Config",
    "AutoModel": "modeling_mimo_v2.MiMoV2Model",
    "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM",
}
_SUFFIX = re.compile(r"\.(weight_scale_inv|weight_scale|weight)$")
_QKV = re.compile(r"model\.(mtp\.)?layers\.(\d+)\.self_attn\.qkv_proj$")


@dataclass(kw_only=True)
class ConvertConfig:
    """Target and drafter -> FP4-DFlash release."""

    target: str
    """folder of the target: BF16 as `qat` and `upcycle` write it, or an FP8 or MXFP4 release"""
    out: str
    """release folder to write"""
    drafter: str | None = None
    """folder of the DFlash drafter; unset: the target's own dflash/ where it has one, else a release without drafter"""
    rule: Literal["even", "floor", "rceil", "mse"] = "even"
    """scale rule of the MXFP4 experts; weights that are on the grid come out the same under each of them"""
    spine: Spine = "fp8"
    """storage of the fused QKV and of the dense MLPs"""
    overwrite: bool = False
    """replace `out` where it is not empty; until the new release is complete the old one stays"""
    device: str = "cpu"
    """where experts are quantized: cpu or cuda; the bytes are the same"""


def release_config(source: Config, spine: Spine, mtp_layers: int) -> Config:
    """config.json of the release: the source's own keys, the fused layout, and how the weights are stored.

    `layer_types` goes: it repeats hybrid_layer_pattern, and engines that find it build their windows from it.
    """
    dtype_key = "dtype" if "dtype" in source else "torch_dtype"
    config = {k: v for k, v in source.items() if k not in ("layer_types", "quantization_config")}
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
    config["quantization_config"] = quantization_config(config, "mxfp4", spine, mtp_layers)
    return config


class Conversion:
    """Makes the stored tensors of a release, one module at a time, from a source checkpoint."""

    def __init__(self, source: Checkpoint, cfg: ConvertConfig):
        source.verify()
        self.source, self.cfg = source, cfg
        experts, _, mtp = source.format
        self.copies_experts = experts == "mxfp4"
        self.config = release_config(source.config, cfg.spine, mtp)
        self.geometry = Geometry.from_config(self.config)
        self.specs = target_tensors(self.config, experts="mxfp4", spine=cfg.spine, mtp_layers=mtp)
        # Towers of a multimodal source ride along byte for byte, in the file beside the spine.
        tower_file = SPINE_FILE.replace("shard0", "shard1")
        for name, spec in source.specs.items():
            if name.startswith(TOWER_PREFIXES):
                self.specs[name] = TensorSpec(name, spec.dtype, spec.shape, tower_file)

    def file(self, specs: list[TensorSpec]) -> Iterator[tuple[str, torch.Tensor, int]]:
        """(name, stored tensor, changed expert elements) of every tensor of one file, module by module."""
        modules: dict[str, list[TensorSpec]] = {}
        for spec in specs:
            modules.setdefault(_SUFFIX.sub("", spec.name), []).append(spec)
        for base, members in modules.items():
            tensors, changed = self.module(base, {s.name: s for s in members})
            for name, tensor in tensors.items():
                yield name, tensor, changed
                changed = 0  # counted once a module

    def module(self, base: str, specs: dict[str, TensorSpec]) -> tuple[dict[str, torch.Tensor], int]:
        """({name: stored tensor}, elements of an expert that the MXFP4 grid changed) of one module."""
        stored = {n: self.source.specs.get(n) for n in specs}
        same = all(s is not None and (s.dtype, s.shape) == (specs[n].dtype, specs[n].shape) for n, s in stored.items())
        if same:
            return {name: self.source.raw(name) for name in specs}, 0
        if ".mlp.experts." in base:
            return self._expert(base)
        if base + ".weight_scale_inv" in specs:
            codes, scales = fp8.quantize(self._spine(base, torch.float32), self._chunk_rows(base), name=base)
            return {base + ".weight": codes, base + ".weight_scale_inv": scales}, 0
        (name, spec), *rest = specs.items()
        assert not rest, f"{base}: unexpected {rest}"
        if spec.dtype == "BF16" and ".mlp.gate." not in name:
            return {name: self._spine(base, torch.bfloat16)}, 0
        return {name: self._router(name, spec.dtype)}, 0

    def _expert(self, base: str) -> tuple[dict[str, torch.Tensor], int]:
        stored = self.source.spec(base + ".weight").dtype
        weight = self.source.weight(base, torch.bfloat16 if stored == "BF16" else torch.float32).to(self.cfg.device)
        packed, scales = mxfp4.encode(weight, self.cfg.rule, name=base)
        changed = int((mxfp4.decode(packed, scales, weight.dtype, name=base) != weight).sum())
        return {base + ".weight": packed.cpu(), base + ".weight_scale": scales.cpu()}, changed

    def _spine(self, base: str, dtype: torch.dtype) -> torch.Tensor:
        """A weight of the spine, on the CPU: a GPU divides by constants otherwise, and FP8 scales move by an ulp."""
        match = _QKV.match(base)
        if match:
            return self.source.fused_qkv(int(match[2]), dtype, mtp=bool(match[1]))
        return self.source.weight(base, dtype)

    def _chunk_rows(self, base: str) -> int | None:
        match = _QKV.match(base)
        if not match:
            return None
        return sum(self.geometry.qkv_rows(self.geometry.mtp if match[1] else int(match[2])))

    def _router(self, name: str, dtype: str) -> torch.Tensor:
        weight = self.source.raw(name)
        out = weight.to(torch.bfloat16 if dtype == "BF16" else torch.float32)
        if not torch.equal(out.float(), weight.float()):
            raise ValueError(
                f"{name} is {weight.dtype} and does not fit in {dtype} exactly; set moe_router_dtype to float32, "
                "or train the router in bfloat16"
            )
        return out


class _State:
    """What a killed run leaves behind beside its work folder: its plan, and the record of each finished file."""

    def __init__(self, work: Path, plan: str):
        self.path = work.with_name(work.name + ".json")
        self.plan = plan
        self.files: dict[str, dict[str, Any]] = {}
        if self.path.is_file() and work.is_dir():
            found = read_json(self.path)
            if found.get("plan") == plan:
                self.files = found["files"]
                return
        shutil.rmtree(work, ignore_errors=True)  # another source or other options: nothing of it can be kept
        work.mkdir(parents=True)
        self._save()

    def record(self, file: str, entry: dict[str, Any]) -> None:
        self.files[file] = entry
        self._save()

    def _save(self) -> None:
        write_json(self.path, {"plan": self.plan, "files": self.files})


def _fingerprint(conversion: Conversion) -> str:
    """Changes when the source or an option does, so that files of another plan are never kept."""
    source, cfg = conversion.source, conversion.cfg
    files = sorted({s.file for s in source.specs.values()})
    stats = [(f, (source.folder / f).stat().st_size, (source.folder / f).stat().st_mtime_ns) for f in files]
    plan = [str(source.folder.resolve()), stats, conversion.config, cfg.rule, cfg.spine, torch.__version__]
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _write_target(work: Path, conversion: Conversion, state: _State) -> dict[str, dict[str, Any]]:
    """Every weight file of the target; those that an earlier run finished are kept. Returns their records."""
    files = files_of(conversion.specs)
    progress = tqdm(
        total=totals(conversion.specs)[1], unit="B", unit_scale=True, desc="convert", disable=None, smoothing=0
    )
    with progress:
        for file, specs in files.items():
            size = sum(s.nbytes for s in specs)
            writer = FileWriter(work / file, specs)
            if file in state.files and writer.is_complete():
                progress.update(size)
                continue
            changed = 0
            with writer:
                for name, tensor, count in conversion.file(specs):
                    writer.write(name, tensor)
                    changed += count
                    progress.update(conversion.specs[name].nbytes)
            state.record(file, {"sha256": file_sha256(work / file), "changed": changed})
    return {file: state.files[file] for file in files}


def _copy_side_files(source: Path, work: Path) -> list[str]:
    """Tokenizer, chat template, generation config and audio tokenizer of the source, and our modeling code."""
    copied = sorted({p.name for pattern in COPIED for p in source.glob(pattern) if p.is_file()})
    for name in copied:
        shutil.copyfile(inside(source, name), work / name)
    code = Path(models.__file__).parent
    for name in REMOTE_CODE:
        shutil.copyfile(code / name, work / name)
    if (source / "audio_tokenizer").is_dir():
        for path in sorted((source / "audio_tokenizer").rglob("*")):
            if path.is_file():
                name = str(path.relative_to(source))
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(inside(source, name), work / name)
    return copied


def _write_drafter(folder: Path, work: Path, geometry: Geometry) -> dict[str, int]:
    """dflash/ from a drafter's folder; ValueError where it belongs to another target."""
    config, tensors, mask = read_drafter(folder)
    if config["hidden_size"] != geometry.hidden_size:
        raise ValueError(
            f"{folder}: hidden_size {config['hidden_size']} is not the target's {geometry.hidden_size}; "
            "train a drafter for this target"
        )
    layers = geometry.num_hidden_layers
    config |= {"vocab_size": geometry.vocab_size, "num_target_layers": config.get("num_target_layers", layers)}
    if config["num_target_layers"] != layers:
        raise ValueError(
            f"{folder}: trained for {config['num_target_layers']} layers, the target has {layers}; retrain it"
        )
    specs = write_drafter(work / "dflash", config, tensors, mask)
    shutil.copyfile(Path(models.__file__).parent / "modeling_dflash.py", work / "dflash" / "dflash.py")
    return {"tensors": len(specs), "bytes": totals(specs)[1]}


def _command(cfg: ConvertConfig) -> str:
    given = [(f.name, getattr(cfg, f.name)) for f in fields(cfg) if getattr(cfg, f.name) != f.default]
    return "mimo-qat convert " + " ".join(f"--{name} {value}" for name, value in given)


def _manifest(work: Path, cfg: ConvertConfig, records: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """conversion.json: what was done and the checksum of every file. No dates: the same run writes the same bytes."""
    files = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = str(path.relative_to(work))
        digest = records[name]["sha256"] if name in records else file_sha256(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    document = {"command": _command(cfg), "commit": commit(), "versions": versions(), **facts, "files": files}
    write_json(work / MANIFEST_FILE, document)


def _put_in_place(work: Path, out: Path) -> None:
    """OUT.partial takes the name OUT; an earlier OUT goes only when the new one is complete."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def main(cfg: ConvertConfig) -> dict[str, Any]:
    """Writes the release and returns its figures; ValueError names what in the source does not fit."""
    out = Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not cfg.overwrite:
        raise ValueError(f"{out} exists and is not empty; choose another --out, or give --overwrite true to replace it")
    source = Checkpoint(cfg.target)
    if out.resolve() == source.folder.resolve():
        raise ValueError(f"{out} is the target itself; choose another --out")
    conversion = Conversion(source, cfg)
    work = out.with_name(out.name + ".partial")
    state = _State(work, _fingerprint(conversion))
    records = _write_target(work, conversion, state)
    rule = source.metadata.get("scale_rule", "unknown") if conversion.copies_experts else cfg.rule
    metadata = {"save_format": "mxfp4", "tp_size": conversion.geometry.qkv_chunks, "scale_rule": rule}
    write_index(work, conversion.specs, metadata)
    write_json(work / "config.json", conversion.config)
    copied = _copy_side_files(source.folder, work)
    drafter = cfg.drafter or (cfg.target if (source.folder / "dflash").is_dir() else None)
    draft = _write_drafter(Path(drafter), work, conversion.geometry) if drafter else None
    tensors, size = totals(conversion.specs)
    experts = [n for n in conversion.specs if ".mlp.experts." in n]
    facts = {
        "source_format": dict(zip(("experts", "spine", "mtp_layers"), source.format, strict=True)),
        "rule": rule,
        "spine": cfg.spine,
        "tensors": tensors,
        "bytes": size,
        "expert_tensors": len(experts),
        "expert_elements_changed": sum(r["changed"] for r in records.values()),
        "drafter": draft,
    }
    _manifest(work, cfg, records, facts)
    _put_in_place(work, out)
    state.path.unlink()
    print(f"{out}: {tensors:,} tensors, {size / 1e9:.2f} GB; {len(experts):,} of them MXFP4 experts ({rule})")
    print(f"expert elements that the grid changed: {facts['expert_elements_changed']:,}")
    return {"ok": True, "out": str(out), **facts, "side_files": copied}
