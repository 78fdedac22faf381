"""mimo-qat convert --target runs/qat/final --drafter runs/distill/final --out release/

A checkpoint of any size and a drafter's folder become an FP4-DFlash release that vLLM and SGLang load: MXFP4 experts,
FP8 fused QKV and dense MLPs, everything else as it is, the drafter in dflash/. `--dialect` writes compressed-tensors
or snapped BF16 instead. `--dry_run true` prints the plan from headers alone.

Experts that already lie on the MXFP4 grid, as those of our trainer do, keep every bit; the number of elements that
changed is counted and written down. Weights pass through in pieces, so memory does not grow with the model. The
result appears whole: it grows in OUT.partial, where a killed job goes on with the next tensor, and takes its name at
the end. The bytes do not depend on when or how often the job was killed, nor on the number of workers.
"""

import fcntl
import hashlib
import json
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from mimo_qat import models
from mimo_qat.checkpoint.folder import inside
from mimo_qat.checkpoint.geometry import Geometry
from mimo_qat.checkpoint.layout import Spine, files_of, header_bytes, read_json, totals
from mimo_qat.checkpoint.reader import open_drafter
from mimo_qat.checkpoint.writer import MANIFEST_FILE, PT_METADATA, file_sha256, write_drafter, write_index
from mimo_qat.dialects import Dialect, Plan, plan
from mimo_qat.provenance import commit, resident_bytes, versions, write_json
from mimo_qat.sources import Source
from mimo_qat.workers import Job, run_jobs

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
SPARE_BYTES = 2**26  # configuration, index, manifest


@dataclass(kw_only=True)
class ConvertConfig:
    """Target and drafter -> FP4-DFlash release."""

    target: str = ""
    """folder of the source: BF16 as `qat` and `upcycle` write it, an FP8 or MXFP4 release, or another MoE family"""
    out: str = ""
    """release folder to write"""
    drafter: str | None = None
    """folder of the DFlash drafter; unset: the target's own dflash/ where it has one, else a release without drafter"""
    dialect: Dialect = "mimo"
    """the published layout; compressed-tensors (mxfp4-pack-quantized); or bf16, the same values as plain weights"""
    rule: Literal["even", "floor", "rceil", "mse"] = "even"
    """scale rule of the MXFP4 experts; weights that are on the grid come out the same under each of them"""
    spine: Spine = "fp8"
    """storage of the fused QKV and of the dense MLPs in the mimo dialect; the others have BF16"""
    overwrite: bool = False
    """replace `out` where it is not empty; until the new release is complete the old one stays"""
    device: str = "cpu"
    """where experts are quantized: cpu or cuda; the bytes are the same"""
    workers: int | None = None
    """processes, each with a file at a time; unset: up to 4, one a core, and none besides this one for a small model"""
    dry_run: bool = False
    """print tensors, bytes, files and the free space that is needed; nothing is written"""
    bench: bool = False
    """measure the conversion of one Pro MoE layer's experts instead, against a file copy and compressed-tensors"""
    bench_experts: int = 384
    """experts of that layer that the bench makes and converts"""


class _Progress:
    """OUT.progress: the plan of an unfinished run and the journal of every file, beside OUT.partial."""

    def __init__(self, out: Path, fingerprint: str):
        self.work = out.with_name(out.name + ".partial")
        self.folder = out.with_name(out.name + ".progress")
        path, lock = self.folder / "plan.json", self.folder / "lock"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock.open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another conversion is writing {out}; wait for it, or choose another --out") from None
        if path.is_file() and self.work.is_dir() and read_json(path).get("plan") == fingerprint:
            return
        shutil.rmtree(self.work, ignore_errors=True)  # another source or other options: nothing of it can be kept
        for file in self.folder.iterdir():
            if file != lock:
                file.unlink()
        self.work.mkdir(parents=True)
        write_json(path, {"plan": fingerprint})

    def end(self) -> None:
        """Nothing is left to go on with."""
        self._lock.close()
        shutil.rmtree(self.folder)

    def jobs(self, source: Source, target: Plan, cfg: ConvertConfig) -> dict[str, Job]:
        """File -> the job that writes it."""
        made = {}
        for file, (specs, steps) in target.by_file().items():
            names = {n for step in steps for n in source.names(step.source)}
            journal = self.folder / f"{file}.jsonl"
            made[file] = Job(self.work / file, journal, specs, steps, source.narrow(names), cfg.rule, cfg.device)
        return made

    def present(self) -> int:
        """Bytes on the disk that an earlier run left and this one goes on with."""
        return sum(p.stat().st_blocks * 512 for p in self.work.rglob("*") if p.is_file())


def _fingerprint(source: Source, target: Plan, cfg: ConvertConfig) -> str:
    """Changes when the source or an option does, so that files of another plan are never kept."""
    stated = [str(source.folder.resolve()), source.stamps, source.revision(), target.config, target.dialect]
    chosen = [cfg.rule, cfg.spine, torch.__version__, [(s.name, s.file) for s in target.specs.values()]]
    return hashlib.sha256(json.dumps([stated, chosen], sort_keys=True).encode()).hexdigest()


def _copy_side_files(source: Source, work: Path) -> list[str]:
    """Tokenizer, chat template, generation config and audio tokenizer of the source, and the modeling code."""
    folder = source.folder
    patterns = COPIED if source.family == "mimo" else (*COPIED, "*.py")
    copied = sorted({p.name for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    for name in copied:
        shutil.copyfile(inside(folder, name), work / name)
    if source.family == "mimo":
        for name in REMOTE_CODE:
            shutil.copyfile(Path(models.__file__).parent / name, work / name)
    if (folder / "audio_tokenizer").is_dir():
        for path in sorted((folder / "audio_tokenizer").rglob("*")):
            if path.is_file():
                name = str(path.relative_to(folder))
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(inside(folder, name), work / name)
    return copied


def _write_drafter(folder: Path, work: Path, geometry: Geometry) -> dict[str, int]:
    """dflash/ from a drafter's folder; ValueError where it belongs to another target."""
    config, tensors, mask = open_drafter(folder)
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
    # One tensor at a time: a drafter may be larger than the memory that a conversion is allowed.
    specs = write_drafter(work / "dflash", config, {n: partial(tensors.rows, n) for n in tensors.names}, mask)
    tensors.close()
    shutil.copyfile(Path(models.__file__).parent / "modeling_dflash.py", work / "dflash" / "dflash.py")
    return {"tensors": len(specs), "bytes": totals(specs)[1]}


def _drafter_of(source: Source, cfg: ConvertConfig) -> Path | None:
    if source.family != "mimo":
        if cfg.drafter:
            raise ValueError(f"{cfg.drafter}: a DFlash drafter belongs to a MiMo-V2 target; leave --drafter out")
        return None
    return Path(cfg.drafter) if cfg.drafter else source.folder if (source.folder / "dflash").is_dir() else None


def _command(cfg: ConvertConfig) -> str:
    """The command, without what does not change a byte of the result."""
    given = [(f.name, getattr(cfg, f.name)) for f in fields(cfg) if getattr(cfg, f.name) != f.default]
    return "mimo-qat convert " + " ".join(f"--{n} {shlex.quote(str(v))}" for n, v in given if n != "workers")


def _manifest(work: Path, cfg: ConvertConfig, jobs: dict[str, Job], facts: dict[str, Any]) -> None:
    """conversion.json: what was done, the checksum of every file and of every tensor of the target. No dates: the
    same run writes the same bytes."""
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, str] = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = str(path.relative_to(work))
        digest = jobs[name].record().sha256 if name in jobs else file_sha256(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    for job in jobs.values():
        tensors |= job.record().digests
    document = {"command": _command(cfg), "commit": commit(), "versions": versions(), **facts, "files": files}
    write_json(work / MANIFEST_FILE, document | {"tensor_sha256": dict(sorted(tensors.items()))})


def _put_in_place(work: Path, out: Path) -> None:
    """OUT.partial takes the name OUT; an earlier OUT goes only when the new one is complete."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _summary(source: Source, target: Plan, drafter: Path | None) -> dict[str, Any]:
    """Figures of a plan: what will be written, from what, and how."""
    tensors, size = totals(target.specs)
    experts = [n for n in target.specs if ".experts." in n]
    weights = sum(len(header_bytes(m, PT_METADATA)) + sum(s.nbytes for s in m) for m in files_of(target.specs).values())
    beside = 0
    if drafter:
        folder = drafter / "dflash" if (drafter / "dflash" / "config.json").is_file() else drafter
        beside = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    return {
        "source_format": {"experts": source.experts, "spine": source.spine, "mtp_layers": source.mtp_layers},
        "dialect": target.dialect,
        "rule": target.rule,
        "tensors": tensors,
        "bytes": size,
        "weight_files": len(files_of(target.specs)),
        "expert_tensors": len(experts),
        "steps": dict(sorted(Counter(s.kind for s in target.steps).items())),
        "bytes_needed": weights + beside + SPARE_BYTES,
    }


def _free(out: Path) -> int:
    at = out.absolute().parent
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free


def _dry_run(source: Source, target: Plan, drafter: Path | None, cfg: ConvertConfig) -> dict[str, Any]:
    """The plan, from headers alone."""
    facts = _summary(source, target, drafter)
    read, size = totals(source.specs)
    free = _free(Path(cfg.out or "."))
    print(f"{source.folder}: {read:,} tensors, {size:,} B, experts {source.experts}, spine {source.spine}")
    print(f"{target.dialect}: {facts['tensors']:,} tensors, {facts['bytes']:,} B in {facts['weight_files']} files")
    for kind, count in facts["steps"].items():
        print(f"  {kind:<12}{count:>9,}")
    print(f"free space: {facts['bytes_needed'] / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB there")
    sized = {file: sum(s.nbytes for s in members) for file, members in files_of(target.specs).items()}
    return {"ok": True, "dry_run": True, **facts, "bytes_free": free, "source_bytes": size, "files": sized}


@torch.no_grad()
def main(cfg: ConvertConfig) -> dict[str, Any]:
    """Writes the release and returns its figures; ValueError names what in the source does not fit."""
    if cfg.bench:
        from mimo_qat.convert_bench import bench

        return bench(cfg)
    if not cfg.target or not (cfg.out or cfg.dry_run):
        raise ValueError("nothing to convert; give --target FOLDER and --out FOLDER")
    out = Path(cfg.out)
    if not cfg.dry_run and out.exists() and (not out.is_dir() or any(out.iterdir())) and not cfg.overwrite:
        raise ValueError(f"{out} exists and is not empty; choose another --out, or give --overwrite true to replace it")
    source = Source(cfg.target)
    if not cfg.dry_run and out.resolve() == source.folder.resolve():
        raise ValueError(f"{out} is the target itself; choose another --out")
    target = plan(source, cfg.dialect, cfg.rule, cfg.spine)
    drafter = _drafter_of(source, cfg)
    if cfg.dry_run:
        return _dry_run(source, target, drafter, cfg)
    return _convert(source, target, drafter, cfg)


def _convert(source: Source, target: Plan, drafter: Path | None, cfg: ConvertConfig) -> dict[str, Any]:
    out, facts = Path(cfg.out), _summary(source, target, drafter)
    progress = _Progress(out, _fingerprint(source, target, cfg))
    work, needed = progress.work, facts.pop("bytes_needed") - progress.present()
    if needed > _free(out):
        raise ValueError(
            f"{out} needs {needed / 1e9:,.2f} GB more, {_free(out) / 1e9:,.2f} GB are free there; free space or choose "
            "another --out"
        )
    jobs = progress.jobs(source, target, cfg)
    peaks = run_jobs(list(jobs.values()), cfg.workers)
    source.unchanged()
    write_index(work, target.specs, target.metadata)
    write_json(work / "config.json", target.config)
    copied = _copy_side_files(source, work)
    draft = _write_drafter(drafter, work, source.geometry) if drafter else None
    counts = [job.record().changed for job in jobs.values()]
    changed = None if all(c is None for c in counts) and source.experts == "fp8" else sum(c or 0 for c in counts)
    facts |= {"spine": target_spine(target, cfg), "expert_elements_changed": changed, "drafter": draft}
    _manifest(work, cfg, jobs, facts | {"source": source.revision()})
    _put_in_place(work, out)
    progress.end()
    tensors, size = facts["tensors"], facts["bytes"]
    print(
        f"{out}: {tensors:,} tensors, {size / 1e9:.2f} GB; {facts['expert_tensors']:,} of routed experts, {target.rule}"
    )
    if changed is not None:
        print(f"expert elements that the grid changed: {changed:,}")
    peaks.append(resident_bytes(peak=True))
    memory = {"peak_rss_bytes": sum(peaks), "largest_process_bytes": max(peaks)}
    return {"ok": True, "out": str(out), **facts, **memory, "side_files": copied}


def target_spine(target: Plan, cfg: ConvertConfig) -> str:
    """Storage of the spine in the result."""
    return cfg.spine if target.dialect == "mimo" else "bf16"
