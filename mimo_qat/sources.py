"""What `mimo-qat convert` reads: the families of checkpoints, and their weights a few rows at a time.

Two families, told apart by the tensors that they hold, never by what a config claims:
    mimo   MiMo-V2: FP8 with a fused QKV (V2.5, V2.5-Pro, V2.6), FP8 with split projections (V2-Flash of December 2025),
           BF16 (what `upcycle` and `qat` write), or a release whose experts are MXFP4 already
    moe    other Mixture-of-Experts checkpoints with one tensor an expert projection, BF16 or block FP8, as Qwen3-MoE
           and Mixtral have them on the hub

A source is read with plain reads into memory that is given back, so that a checkpoint of any size passes through.
Its files are stamped when it is opened; one that changes before the end is an error, not a mixture of two checkpoints.
"""

import copy
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.folder import INDEX_FILE
from mimo_qat.checkpoint.geometry import Geometry
from mimo_qat.checkpoint.layout import Config
from mimo_qat.checkpoint.reader import Checkpoint, e8m0_bytes

Family = Literal["mimo", "moe"]
# One projection of one routed expert: Qwen3-MoE, DeepSeek, GLM (gate_proj ...), Mixtral (w1 ...).
EXPERT = re.compile(r"(?P<base>.*\.experts\.\d+\.(?:(?:gate|up|down)_proj|w[123]))\.weight$")
_STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj|gate_proj|up_proj)(\.weight|_blocks)?$")
QKV = re.compile(r"(model\.(?:mtp\.)?layers\.\d+\.self_attn\.)qkv_proj$")
_FLOATS = ("BF16", "F16", "F32")
SLAB_ELEMENTS = 1 << 22


class Source:
    """A checkpoint to convert: its family, its storage, and its weights by rows."""

    def __init__(self, folder: str | Path):
        self.checkpoint = Checkpoint(folder)
        self.folder, self.specs = self.checkpoint.folder, self.checkpoint.specs
        self.config: Config = self.checkpoint.config
        files = sorted({s.file for s in self.specs.values()})
        self.stamps = {file: self._stamp(file) for file in files}
        self.family: Family = "mimo"
        self.experts, self.spine, self.mtp_layers = "", "", 0
        if str(self.config.get("model_type", "")).startswith("mimo_v2"):
            self.experts, self.spine, self.mtp_layers = self.checkpoint.format
            self.checkpoint.verify()
            return
        self.family, self.experts, self.spine = "moe", *self._moe_format()

    def _stamp(self, file: str) -> tuple[int, int]:
        status = (self.folder / file).stat()
        return status.st_size, status.st_mtime_ns

    def unchanged(self, files: set[str] | None = None) -> None:
        """ValueError where a file (one of `files`) is not the one that was opened."""
        for file in sorted(self.stamps if files is None else files):
            if not (self.folder / file).is_file() or self._stamp(file) != self.stamps[file]:
                raise ValueError(
                    f"{self.folder / file} changed while it was read; let nothing write there, and run the same "
                    "command again: it starts anew from the changed source"
                )

    def revision(self) -> dict[str, str]:
        """SHA-256 of config.json and of the index: what this source says it is."""
        found = {}
        for key, name in (("config_sha256", "config.json"), ("index_sha256", INDEX_FILE)):
            path = self.folder / name
            if path.is_file():
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def _moe_format(self) -> tuple[str, str]:
        """(experts, spine) of a checkpoint of another family; ValueError where it has no expert that can be packed."""
        expert = next((s for n, s in self.specs.items() if EXPERT.match(n)), None)
        if expert is None:
            stacked = next((n for n in self.specs if _STACKED.search(n)), None)
            if stacked:
                raise ValueError(
                    f"{self.folder}: {stacked} holds the experts of a layer in one tensor; export it with one tensor "
                    "an expert projection, as the family has it on the hub"
                )
            raise ValueError(
                f"{self.folder} holds no routed experts (model.layers.L.mlp.experts.E.gate_proj.weight, or "
                "block_sparse_moe.experts.E.w1.weight); convert a Mixture-of-Experts checkpoint"
            )
        if expert.dtype not in (*_FLOATS, "F8_E4M3"):
            raise ValueError(f"{expert.name} is stored as {expert.dtype}; give a BF16 or block-FP8 checkpoint")
        for name, spec in self.specs.items():
            if spec.dtype == "F8_E4M3" and name.removesuffix(".weight") + ".weight_scale_inv" not in self.specs:
                raise ValueError(f"{name} is FP8 without a weight_scale_inv beside it; give a BF16 or block-FP8 source")
        return ("fp8" if expert.dtype == "F8_E4M3" else "bf16"), (
            "fp8" if any(s.dtype == "F8_E4M3" for n, s in self.specs.items() if not EXPERT.match(n)) else "bf16"
        )

    @property
    def geometry(self) -> Geometry:
        """Geometry of a MiMo-V2 source."""
        return self.checkpoint.geometry

    # ---- experts

    def names(self, base: str) -> list[str]:
        """Stored tensors that a step on the tensor or module `base` reads."""
        match = QKV.match(base)
        bases = [base, *(match[1] + f"{w}_proj" for w in "qkv")] if match else [base]
        ends = ("", ".weight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
        return [b + e for b in bases for e in ends if b + e in self.specs]

    def narrow(self, names: set[str]) -> "Source":
        """This source with those tensors alone: small enough to send to another process."""
        part = copy.copy(self)
        part.checkpoint = self.checkpoint.narrow(names)
        part.specs = part.checkpoint.specs
        part.stamps = {file: self.stamps[file] for file in sorted({s.file for s in part.specs.values()})}
        return part

    def packed(self, base: str) -> tuple[str, str] | None:
        """Names of the stored MXFP4 codes and scales of an expert projection, or None."""
        for end in (".weight", ".weight_packed"):
            if base + end in self.specs and self.specs[base + end].dtype == "U8":
                return base + end, base + ".weight_scale"
        return None

    def scale_bytes(self, name: str) -> torch.Tensor:
        """E8M0 bytes of a stored scale tensor, whatever dtype it has."""
        return e8m0_bytes(self.checkpoint.rows(name), name)

    def encode(self, base: str, rule: mxfp4.Rule, device: str) -> tuple[torch.Tensor, torch.Tensor, int | None]:
        """(packed, scales, elements that the grid changed) of an expert projection, on the CPU.

        The count is None for FP8, which lies on no MXFP4 grid: there nothing was trained to survive.
        """
        weight = self.checkpoint.rows(base + ".weight").to(device)
        if weight.dtype == torch.float8_e4m3fn:
            scale = self.checkpoint.rows(base + ".weight_scale_inv").to(device)
            packed, scales = transcode(weight, scale, rule, base)
            return packed.cpu(), scales.cpu(), None
        packed, scales = mxfp4.encode(weight, rule, name=base)
        changed = int((mxfp4.decode(packed, scales, weight.dtype, name=base) != weight).sum())
        return packed.cpu(), scales.cpu(), changed

    # ---- everything else

    def slabs(self, base: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The dequantised weight `base` by rows, top to bottom: whole FP8 row blocks, or a QKV chunk at a time.

        A fused QKV is put together from split projections where the source has those.
        """
        match = QKV.match(base)
        if not match:
            rows, columns = self.specs[base + ".weight"].shape
            step = max(1, SLAB_ELEMENTS // columns // fp8.BLOCK) * fp8.BLOCK
            for start in range(0, rows, step):
                yield self._rows(base, start, min(start + step, rows), dtype)
            return
        parts = self._qkv_rows(base)
        fused = base + ".weight" in self.specs
        for chunk in range(self.geometry.qkv_chunks):
            if fused:
                yield self._rows(base, chunk * sum(parts), (chunk + 1) * sum(parts), dtype, sum(parts))
                continue
            yield torch.cat(
                [
                    self._rows(match[1] + f"{which}_proj", chunk * n, (chunk + 1) * n, dtype)
                    for which, n in zip("qkv", parts, strict=True)
                ]
            )

    def _qkv_rows(self, base: str) -> tuple[int, int, int]:
        return self.geometry.qkv_rows(self.geometry.mtp if ".mtp." in base else int(base.split(".")[2]))

    def _rows(
        self, base: str, start: int, stop: int, dtype: torch.dtype, chunk_rows: int | None = None
    ) -> torch.Tensor:
        """Rows of one stored weight as `dtype`; the FP8 grid restarts each `chunk_rows`, which they do not cross."""
        name = base + ".weight"
        if base + ".weight_scale_inv" not in self.specs:
            if self.specs[name].dtype not in _FLOATS:
                raise ValueError(f"{name} is {self.specs[name].dtype} but has no scale beside it; export it again")
            return self.checkpoint.rows(name, start, stop).to(dtype)
        chunk = start // chunk_rows if chunk_rows else 0
        first = chunk * (chunk_rows or 0)
        begin = first + (start - first) // fp8.BLOCK * fp8.BLOCK
        blocks = chunk * -(-(chunk_rows or 0) // fp8.BLOCK)
        scale = self.checkpoint.rows(
            base + ".weight_scale_inv",
            blocks + (begin - first) // fp8.BLOCK,
            blocks + -(-(stop - first) // fp8.BLOCK),
        )
        codes = self.checkpoint.rows(name, begin, stop)
        return fp8.dequantize(codes, scale, dtype=dtype, name=base)[start - begin :]

    def regroups(self, base: str) -> bool:
        """Whether split FP8 projections become chunks of the fused one without touching a code or a scale: every
        part of a chunk, but the last, must consist of whole 128-row blocks."""
        match = QKV.match(base)
        if not match or any(match[1] + f"{w}_proj.weight_scale_inv" not in self.specs for w in "qkv"):
            return False
        q, k, v = self._qkv_rows(base)
        return q % fp8.BLOCK == 0 and k % fp8.BLOCK == 0 and (v % fp8.BLOCK == 0 or self.geometry.qkv_chunks == 1)

    def regrouped(self, base: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(codes, scales) of each chunk [Q_c | K_c | V_c], the stored bytes in another order."""
        prefix, parts = QKV.match(base)[1], self._qkv_rows(base)  # type: ignore[index]
        for chunk in range(self.geometry.qkv_chunks):
            codes, scales = [], []
            for which, n in zip("qkv", parts, strict=True):
                name, blocks = prefix + f"{which}_proj", -(-n // fp8.BLOCK)
                codes.append(self.checkpoint.rows(name + ".weight", chunk * n, (chunk + 1) * n).view(torch.uint8))
                scales.append(self.checkpoint.rows(name + ".weight_scale_inv", chunk * blocks, (chunk + 1) * blocks))
            yield torch.cat(codes).view(torch.float8_e4m3fn), torch.cat(scales)


def transcode(
    codes: torch.Tensor, scale_inv: torch.Tensor, rule: mxfp4.Rule, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 (packed, scales) of a block-FP8 weight; the bytes of encoding its float32 values."""
    from mimo_kernels.transcode import fp8_to_mxfp4

    return fp8_to_mxfp4(codes, scale_inv, rule, name=name)
