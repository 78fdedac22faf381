"""mimo-qat layout recipes/model/mimo-v2.5-pro.json --drafter true

Every tensor of a MiMo-V2 checkpoint from its config.json alone: name, dtype, shape, file. Standard library only, so
that a 1.02T model is counted in under a second, on any machine, before a byte is downloaded or written.

    mimo-qat layout recipes/model/mimo-v2.5-pro.json --list true > tensors.txt

The names, dtypes, shapes and files are those of the published releases (MiMo-V2.5-Pro-FP4-DFlash and its siblings).
Routed experts are MXFP4 (two U8 tensors), FP8 or BF16; the spine is FP8 (fused QKV and dense MLPs) or BF16.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mimo_qat.checkpoint.geometry import (
    DRAFTER_CLASSES,
    Config,
    DraftGeometry,
    Geometry,
    LayerGeometry,
    default_drafter_config,
    read_json,
)

# "mxfp4-packed": the same bytes as "mxfp4" under the names of compressed-tensors (weight_packed).
Experts = Literal["mxfp4", "mxfp4-packed", "fp8", "bf16"]
Spine = Literal["fp8", "bf16"]

DTYPE_BYTES = {"U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F16": 2, "F32": 4}
# safetensors writes a file's tensors by this rank, highest first, then by name; F32 first keeps every offset aligned.
_DTYPE_RANK = {"U8": 0, "F8_E4M3": 1, "F8_E8M0": 2, "F16": 3, "BF16": 4, "F32": 5}
FP8_BLOCK = 128
MX_BLOCK = 32
SPINE_FILE = "model_pp0_ep0_shard0.safetensors"
MTP_FILE = "model_mtp.safetensors"
DRAFTER_FILE = "dflash_draft_model.safetensors"
ONE_FILE_BYTES = 4 * 2**30
HF_SHARD_BYTES = 5 * 10**9
# Whole-model modules beside the text model in the multimodal releases; carried along, never run here.
TOWER_PREFIXES = ("visual.", "audio_encoder.", "speech_embeddings.")
MTP_PREFIX = "model.mtp."


class TensorSpec(NamedTuple):  # made in a third of the time of a dataclass; a release has up to 200,000
    """One tensor of a checkpoint; `dtype` is the safetensors name, `file` is relative to the checkpoint's folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


class _Table:
    """Collects TensorSpecs in model order; one `linear` call is one weight with whatever scales its format has."""

    def __init__(self) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.file = SPINE_FILE

    def put(self, name: str, dtype: str, *shape: int) -> None:
        self.specs[name] = TensorSpec(name, dtype, shape, self.file)

    def linear(self, name: str, rows: int, cols: int, fmt: str, chunks: int = 1) -> None:
        """A weight [rows, cols]; FP8 block scales restart at each of `chunks` equal row chunks."""
        if fmt in ("mxfp4", "mxfp4-packed"):
            self.put(name + (".weight" if fmt == "mxfp4" else ".weight_packed"), "U8", rows, cols // 2)
            self.put(name + ".weight_scale", "U8", rows, cols // MX_BLOCK)
        elif fmt == "fp8":
            blocks = chunks * math.ceil(rows // chunks / FP8_BLOCK)
            self.put(name + ".weight", "F8_E4M3", rows, cols)
            self.put(name + ".weight_scale_inv", "F32", blocks, math.ceil(cols / FP8_BLOCK))
        else:
            self.put(name + ".weight", "BF16", rows, cols)

    def norm(self, name: str, size: int) -> None:
        self.put(name + ".weight", "BF16", size)

    def attention(self, prefix: str, g: Geometry, layer: LayerGeometry, fmt: str) -> None:
        """QKV (fused in chunks, or split), the output projection, which is BF16 in every release, and the sink."""
        if g.fused_qkv:
            rows = sum(g.qkv_rows(layer)) * g.qkv_chunks
            self.linear(prefix + "qkv_proj", rows, g.hidden_size, fmt, g.qkv_chunks)
        else:
            self.linear(prefix + "q_proj", layer.heads * layer.head_dim, g.hidden_size, fmt)
            self.linear(prefix + "k_proj", layer.kv_heads * layer.head_dim, g.hidden_size, fmt)
            self.linear(prefix + "v_proj", layer.kv_heads * layer.v_head_dim, g.hidden_size, fmt)
        self.linear(prefix + "o_proj", g.hidden_size, layer.heads * layer.v_head_dim, "bf16")
        if layer.sink:
            self.put(prefix + "attention_sink_bias", "BF16", layer.heads)

    def mlp(self, prefix: str, hidden: int, inner: int, fmt: str) -> None:
        """down, gate, up: the name order in which a release stores them side by side."""
        self.linear(prefix + "down_proj", hidden, inner, fmt)
        self.linear(prefix + "gate_proj", inner, hidden, fmt)
        self.linear(prefix + "up_proj", inner, hidden, fmt)

    def mtp(self, g: Geometry, count: int, fmt: str) -> None:
        """Multi-token-prediction blocks: 16 tensors each with an FP8 spine."""
        self.file = MTP_FILE
        for i in range(count):
            prefix = f"{MTP_PREFIX}layers.{i}."
            for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
                self.norm(prefix + name, g.hidden_size)
            self.linear(prefix + "eh_proj", g.hidden_size, 2 * g.hidden_size, "bf16")
            self.attention(prefix + "self_attn.", g, g.mtp, fmt)
            self.mlp(prefix + "mlp.", g.hidden_size, g.intermediate_size, fmt)


def experts_per_file(g: Geometry) -> int:
    """Routed experts in one release file: 3 of 384, 4 of 256 as published; one file where all of them fit in 4 GiB.

    Other sizes take the smallest divisor of the expert count that reaches 4 GiB a file.
    """
    if not g.n_routed_experts:
        return 1
    values = 3 * g.hidden_size * g.moe_intermediate_size * sum(layer.moe for layer in g.layers)
    each = values // 2 + values // MX_BLOCK
    if each * g.n_routed_experts <= ONE_FILE_BYTES:
        return g.n_routed_experts
    if g.n_routed_experts in (384, 256):
        return {384: 3, 256: 4}[g.n_routed_experts]
    divisors = [d for d in range(1, g.n_routed_experts + 1) if g.n_routed_experts % d == 0]
    return next(d for d in divisors if d * each >= ONE_FILE_BYTES or d == g.n_routed_experts)


def target_tensors(
    config: Config, *, experts: Experts = "mxfp4", spine: Spine = "fp8", mtp_layers: int | None = None
) -> dict[str, TensorSpec]:
    """Published name -> TensorSpec of the text model and its MTP blocks, in model order.

    `mtp_layers` defaults to the config's num_nextn_predict_layers, else 0 (the published V2.5-Pro has 3 blocks but
    not the key). BF16 and compressed-tensors checkpoints get Hugging Face shard names, everything else the release's
    expert-parallel ones.
    ValueError where the geometry cannot be stored in the asked format.
    """
    g = Geometry.from_config(config)
    if experts.startswith("mxfp4") and any(layer.moe for layer in g.layers):
        for key, size in (("hidden_size", g.hidden_size), ("moe_intermediate_size", g.moe_intermediate_size)):
            if size % MX_BLOCK:
                raise ValueError(
                    f"{key} {size} is not a multiple of {MX_BLOCK}, which MXFP4 experts need; use fp8 or bf16 experts"
                )
    table, per_file = _Table(), experts_per_file(g)
    table.put("model.embed_tokens.weight", "BF16", g.vocab_size, g.hidden_size)
    if not g.tie_word_embeddings:
        table.put("lm_head.weight", "BF16", g.vocab_size, g.hidden_size)
    table.norm("model.norm", g.hidden_size)
    for i, layer in enumerate(g.layers):
        prefix, table.file = f"model.layers.{i}.", SPINE_FILE
        table.norm(prefix + "input_layernorm", g.hidden_size)
        table.norm(prefix + "post_attention_layernorm", g.hidden_size)
        table.attention(prefix + "self_attn.", g, layer, spine)
        if not layer.moe:
            table.mlp(prefix + "mlp.", g.hidden_size, g.intermediate_size, spine)
            continue
        table.put(prefix + "mlp.gate.weight", g.router_dtype, g.n_routed_experts, g.hidden_size)
        table.put(prefix + "mlp.gate.e_score_correction_bias", "F32", g.n_routed_experts)
        for e in range(g.n_routed_experts):
            table.file = f"model_pp0_ep{e // per_file}_shard0.safetensors"
            table.mlp(f"{prefix}mlp.experts.{e}.", g.hidden_size, g.moe_intermediate_size, experts)
    table.mtp(g, g.mtp_layers if mtp_layers is None else mtp_layers, spine)
    return hf_shards(table.specs) if spine == "bf16" and experts in ("bf16", "mxfp4-packed") else table.specs


def drafter_tensors(draft_config: Config) -> dict[str, TensorSpec]:
    """Published name -> TensorSpec of a DFlash drafter (63 BF16 tensors at five layers), in file order.

    No embedding and no head: both are the target's. The file is DRAFTER_FILE, or parts of it above 5 GB. A DFlash2 head
    has convolutions around each sublayer (four tensors a layer) and a selector with two codebooks (three tensors).
    """
    g = DraftGeometry.from_config(draft_config)
    table = _Table()
    table.linear("fc", g.hidden_size, len(g.target_layer_ids) * g.hidden_size, "bf16")
    table.norm("hidden_norm", g.hidden_size)
    for i in range(g.num_hidden_layers):
        prefix, attn = f"layers.{i}.", f"layers.{i}.self_attn."
        table.norm(prefix + "input_layernorm", g.hidden_size)
        table.mlp(prefix + "mlp.", g.hidden_size, g.intermediate_size, "bf16")
        table.norm(prefix + "post_attention_layernorm", g.hidden_size)
        if g.sinks:
            table.put(attn + "attention_sink_bias", "BF16", g.heads)
        table.norm(attn + "k_norm", g.head_dim)
        table.linear(attn + "k_proj", g.kv_heads * g.head_dim, g.hidden_size, "bf16")
        table.linear(attn + "o_proj", g.hidden_size, g.heads * g.head_dim, "bf16")
        table.norm(attn + "q_norm", g.head_dim)
        table.linear(attn + "q_proj", g.heads * g.head_dim, g.hidden_size, "bf16")
        table.linear(attn + "v_proj", g.kv_heads * g.head_dim, g.hidden_size, "bf16")
        for conv in ("attention_conv.", "mlp_conv.") if g.conv_groups else ():
            table.put(prefix + conv + "base_kernel", "BF16", 2, 2, g.hidden_size)
            table.linear(prefix + conv + "kernel_projection", 4 * g.conv_groups, g.hidden_size, "bf16")
    table.norm("norm", g.hidden_size)
    if g.selector_rank:
        table.linear("candidate_selector.hidden_projection", g.selector_rank, g.hidden_size, "bf16")
        for codebook in ("predecessor_codebook", "successor_codebook"):
            table.put(f"candidate_selector.{codebook}", "BF16", g.vocab_size, g.selector_rank)
    specs = dict(sorted(table.specs.items()))
    if totals(specs)[1] > HF_SHARD_BYTES:
        return hf_shards(specs, stem=DRAFTER_FILE.removesuffix(".safetensors"))
    return {name: spec._replace(file=DRAFTER_FILE) for name, spec in specs.items()}


def hf_shards(
    specs: Mapping[str, TensorSpec], max_bytes: int = HF_SHARD_BYTES, stem: str = "model"
) -> dict[str, TensorSpec]:
    """`specs` in their order, cut into files STEM-00001-of-0000N.safetensors of at most `max_bytes` payload each.

    A scale stays in the file of the codes before it.
    """
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs.values():
        base = spec.name.removesuffix("_inv").removesuffix("_scale").removesuffix("_packed")
        groups.setdefault(base, []).append(spec)
    parts: dict[str, int] = {}
    part, filled = 0, 0
    for members in groups.values():
        size = sum(spec.nbytes for spec in members)
        if filled and filled + size > max_bytes:
            part, filled = part + 1, 0
        parts |= {spec.name: part for spec in members}
        filled += size
    names = [f"{stem}-{i + 1:05d}-of-{part + 1:05d}.safetensors" for i in range(part + 1)]
    return {n: s._replace(file=names[parts[n]]) for n, s in specs.items()}


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of tensors inside a safetensors file, the one its own serialiser takes."""
    return sorted(specs, key=lambda s: (-_DTYPE_RANK[s.dtype], s.name.encode()))


def files_of(specs: Mapping[str, TensorSpec]) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors in file order; files in order of first appearance."""
    files: dict[str, list[TensorSpec]] = {}
    for spec in specs.values():
        files.setdefault(spec.file, []).append(spec)
    return {file: file_order(members) for file, members in files.items()}


def header_bytes(ordered: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The safetensors header of a file: 8 length bytes, then compact JSON, padded to 8 with spaces."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in ordered:
        end = offset + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def totals(specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """(tensors, payload bytes)."""
    return len(specs), sum(spec.nbytes for spec in specs.values())


def parameters(specs: Mapping[str, TensorSpec]) -> int:
    """True parameters: a packed expert byte holds two, scales are not counted."""
    return sum(math.prod(s.shape) * (2 if s.dtype == "U8" else 1) for n, s in specs.items() if "weight_scale" not in n)


def ignored_layers(config: Config, spine: Spine = "fp8", mtp_layers: int | None = None) -> list[str]:
    """`quantization_config.ignored_layers`: every linear that an FP8 loader must leave alone.

    As published for an FP8 spine: each o_proj, and the MTP block's under its training-time name. A BF16 spine adds
    the fused QKV, the dense MLPs and the MTP linears. Embeddings, head, norms and routers are skipped by their class.
    """
    g = Geometry.from_config(config)
    out = [f"model.layers.{i}.self_attn.o_proj" for i in range(g.num_hidden_layers)]
    out.append("model.decoder.self_attn.o_proj")
    if spine == "fp8":
        return out
    specs = target_tensors(config, experts="bf16", spine="bf16", mtp_layers=mtp_layers)
    linears = (n.removesuffix(".weight") for n in specs if n.endswith("_proj.weight") and ".experts." not in n)
    return out + [name for name in linears if name not in set(out)]


def quantization_config(
    config: Config, experts: Experts = "mxfp4", spine: Spine = "fp8", mtp_layers: int | None = None
) -> Config:
    """The `quantization_config` of a release; `store_dtype` is all that tells FP4 experts from FP8 ones."""
    store = {"store_dtype": "mxfp4", "mxfp4_block_size": MX_BLOCK} if experts == "mxfp4" else {}
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        **store,
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "ignored_layers": ignored_layers(config, spine, mtp_layers),
    }


def unpacked_linears(specs: Mapping[str, TensorSpec]) -> set[str]:
    """Modules of a packed checkpoint that are not packed: what its configuration has to tell readers to leave alone."""
    weights = {n.removesuffix(".weight") for n, s in specs.items() if n.endswith(".weight") and len(s.shape) > 1}
    return {name for name in weights if "embed" not in name.rsplit(".", 1)[-1]}


def detect_format(specs: Mapping[str, TensorSpec]) -> tuple[Experts, Spine, int]:
    """(experts, spine, MTP blocks) of a checkpoint from the tensors that it holds, not from what its config claims.

    ValueError where there is no routed expert, or where a dtype belongs to no dialect.
    """
    ends = (".weight", ".weight_packed")
    expert = next((s for n, s in specs.items() if ".mlp.experts." in n and n.endswith(ends)), None)
    if expert is None:
        raise ValueError("no routed expert tensor matched (model.layers.L.mlp.experts.E.gate_proj.weight ...); "
                         "this is not a MiMo-V2 checkpoint, or its names were changed")  # fmt: skip
    spine = next((s for n, s in specs.items() if n.endswith(("self_attn.qkv_proj.weight", "self_attn.q_proj.weight"))),
                 None)  # fmt: skip
    formats = {"U8": "mxfp4", "F8_E4M3": "fp8", "BF16": "bf16", "F16": "bf16", "F32": "bf16"}
    if expert.dtype not in formats or spine is None or formats.get(spine.dtype) not in ("fp8", "bf16"):
        where = expert if expert.dtype not in formats else spine
        fault = f"{where.name} is stored as {where.dtype}" if where else "there is no attention projection"
        raise ValueError(f"{fault}: no known dialect (experts MXFP4, FP8 or BF16; spine FP8 or BF16); export it again")
    mtp = {n.split(".")[3] for n in specs if n.startswith(MTP_PREFIX + "layers.")}
    if expert.name.endswith(ends[1]):
        formats["U8"] = "mxfp4-packed"
    return formats[expert.dtype], formats[spine.dtype], len(mtp)  # type: ignore[return-value]


def differences(
    expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec], *, dtypes: bool = True
) -> dict[str, list[str]]:
    """What keeps `found` from holding every expected tensor exactly once: {"missing", "unknown", "shape", "dtype"}.

    Each list holds one-line descriptions. `dtypes=False` lets BF16, F16 and F32 stand for each other,
    and for U8 in MXFP4 scales, where a reader tells them apart by that dtype.
    """
    floats, scales = {"BF16", "F16", "F32"}, {"U8", "F8_E8M0", "BF16", "F16", "F32"}
    out: dict[str, list[str]] = {"missing": [], "unknown": [], "shape": [], "dtype": []}
    out["missing"] = [name for name in expected if name not in found]
    out["unknown"] = [name for name in found if name not in expected and not name.startswith(TOWER_PREFIXES)]
    for name, want in expected.items():
        have = found.get(name)
        if have is None or (have.dtype == want.dtype and have.shape == want.shape):
            continue
        if have.shape != want.shape:
            out["shape"].append(f"{name} is {list(have.shape)}, expected {list(want.shape)}")
        alike = scales if name.endswith(".weight_scale") else floats
        if have.dtype != want.dtype and (dtypes or not {have.dtype, want.dtype} <= alike):
            out["dtype"].append(f"{name} is {have.dtype}, expected {want.dtype}")
    return out


def family(name: str) -> str:
    """The group that a tensor is counted under in reports."""
    if name.startswith(MTP_PREFIX):
        return "MTP blocks"
    for part, label in ((".mlp.experts.", "routed experts"), (".mlp.gate.", "routers"), (".self_attn.", "attention")):
        if part in name:
            return label
    return "dense MLPs" if ".mlp." in name else "embeddings, head, norms"


@dataclass(kw_only=True)
class LayoutConfig:
    """Count the tensors and bytes of a checkpoint from its config.json."""

    config_json: str
    """A target's config.json, a folder that holds one, or a DFlash drafter's config.json."""
    drafter: bool = False
    """Add the DFlash drafter: dflash/config.json beside the config, else the default drafter of this target."""
    list: bool = False
    """Print one line a tensor, `name dtype [shape] file`, before the totals."""
    experts: Experts = "mxfp4"
    """Storage of the routed experts."""
    spine: Spine = "fp8"
    """Storage of the fused QKV and of the dense MLPs."""
    router_dtype: Literal["bfloat16", "float32"] | None = None
    """Storage of the router weight; unset: the config's moe_router_dtype."""
    mtp_layers: int | None = None
    """Multi-token-prediction blocks; unset: the config's num_nextn_predict_layers, else 0."""


def _count(specs: Mapping[str, TensorSpec], group: Any) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for spec in specs.values():
        row = out.setdefault(group(spec), {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += spec.nbytes
    return out


def _print_table(title: str, rows: dict[str, dict[str, int]], out: Any) -> None:
    print(title, file=out)
    for label, row in rows.items():
        size = row["bytes"]
        print(f"  {label:<26}{row['tensors']:>9,} tensors {size:>21,} B {size / 2**30:>9.2f} GiB", file=out)


def _drafter_report(draft_config: Config, list_them: bool) -> dict[str, Any]:
    specs = drafter_tensors(draft_config)
    if list_them:
        _print_specs(specs, "dflash/")
    tensors, size = totals(specs)
    files = sum(len(header_bytes(m)) + sum(s.nbytes for s in m) for m in files_of(specs).values())
    return {"tensors": tensors, "bytes": size, "file_bytes": files, "files": len(files_of(specs))}


def _print_specs(specs: Mapping[str, TensorSpec], folder: str = "") -> None:
    for s in specs.values():
        print(f"{folder}{s.name} {s.dtype} [{','.join(map(str, s.shape))}] {folder}{s.file}")


def main(cfg: LayoutConfig) -> dict[str, Any]:
    """Prints every tensor class with its count and bytes; returns the totals."""
    path = Path(cfg.config_json)
    path = path / "config.json" if path.is_dir() else path
    config = read_json(path)
    if set(DRAFTER_CLASSES) & set(config.get("architectures") or ()):
        doc: dict[str, Any] = {"drafter": _drafter_report(config, cfg.list)}
        return doc
    if cfg.router_dtype is not None:
        config["moe_router_dtype"] = cfg.router_dtype
    specs = target_tensors(config, experts=cfg.experts, spine=cfg.spine, mtp_layers=cfg.mtp_layers)
    if cfg.list:
        _print_specs(specs)
    tensors, size = totals(specs)
    doc = {"tensors": tensors, "bytes": size, "parameters": parameters(specs), "files": len(files_of(specs))}
    doc["by_dtype"] = _count(specs, lambda s: s.dtype)
    doc["by_family"] = _count(specs, lambda s: family(s.name))
    if cfg.drafter:
        beside = path.parent / "dflash" / "config.json"
        draft = read_json(beside) if beside.is_file() else default_drafter_config(config)
        doc["drafter"] = _drafter_report(draft, cfg.list)
    out = sys.stderr if cfg.list else sys.stdout  # a listing is for a pipe
    _print_table(f"{path}: experts {cfg.experts}, spine {cfg.spine}", doc["by_family"], out)
    _print_table("by dtype", doc["by_dtype"], out)
    _print_table("total", {"target": doc} | ({"drafter": doc["drafter"]} if cfg.drafter else {}), out)
    return doc
