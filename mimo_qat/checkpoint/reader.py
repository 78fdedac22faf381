"""A checkpoint folder as named tensors, proved complete before one is read.

Why not transformers' own loader: it skips names that it does not know, cannot decode MXFP4 experts beside an FP8
spine, and finds weights by file name patterns that a release does not follow. Here the index is the only map, every
path must stay inside the folder, every header is bounded and validated, and every tensor is named exactly once.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.folder import TensorFolder
from mimo_qat.checkpoint.geometry import brief, drop_trailing_commas, parse_json, read_text
from mimo_qat.checkpoint.layout import (
    DRAFTER_FILE,
    MTP_PREFIX,
    TOWER_PREFIXES,
    Config,
    DraftGeometry,
    Geometry,
    TensorSpec,
    detect_format,
    differences,
    drafter_tensors,
    read_json,
    target_tensors,
)

Box = tuple[str, range, range]  # a stored matrix, and rows and columns of it
Job = tuple[Sequence[Box], int, Callable[[torch.Tensor], None]]  # boxes, their bytes, what becomes of them

MASK_FILE = "mask_embedding.pt"
MAX_MASK_BYTES = 2**24
_QKV = re.compile(r"model\.(mtp\.)?layers\.(\d+)\.self_attn\.qkv_proj$")


def e8m0_bytes(scale: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 exponents of an MXFP4 scale tensor stored as U8, E8M0 or floats (the powers of two themselves)."""
    if scale.dtype == torch.uint8:
        return scale
    if scale.dtype == torch.float8_e8m0fnu:
        return scale.view(torch.uint8)
    mantissa, exponent = torch.frexp(scale.float())
    if not (mantissa == 0.5).all():
        raise ValueError(f"{name} holds floats that are no powers of two; MXFP4 needs E8M0 scales, export it again")
    return (exponent + 126).to(torch.uint8)


class Filling:
    """Bytes on their way to where they are used."""

    def wait(self) -> None:
        """Returns when whoever follows on the device's stream may use what came of them; raises what reading raised."""


class Checkpoint(TensorFolder):
    """A target checkpoint: a release (MXFP4 or FP8 experts) or a BF16 folder, fused or split QKV.

    Headers and index are read and checked at construction, weights when they are asked for.
    """

    device: str | torch.device = "cpu"  # where stored tensors are
    _handed = torch.empty(0, dtype=torch.uint8)  # the buffer of `hand`

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self.config: Config = read_json(self.folder / "config.json")

    @cached_property
    def geometry(self) -> Geometry:
        """Geometry of the model, from config.json."""
        return Geometry.from_config(self.config)

    @cached_property
    def format(self) -> tuple[Any, Any, int]:
        """(experts, spine, MTP blocks) as stored: ("mxfp4" | "fp8" | "bf16", "fp8" | "bf16", count)."""
        return detect_format(self.specs)

    def verify(self) -> dict[str, TensorSpec]:
        """Proves names and shapes against the layout; returns the expected table. ValueError names the first fault.

        Unquantised tensors may be stored in any float dtype here; `mimo-qat check` is strict about them.
        """
        experts, spine, mtp = self.format
        expected = target_tensors(self.config, experts=experts, spine=spine, mtp_layers=mtp)
        for kind, found in differences(expected, self.specs, dtypes=False).items():
            if found:
                raise ValueError(
                    f"{self.folder}: {len(found)} tensors with fault {kind!r} against its config.json, "
                    f"the first {found[0]}; run `mimo-qat check {self.folder}` for all of them"
                )
        return expected

    def box(self, name: str, rows: range, columns: range) -> torch.Tensor:
        """A rectangle of a stored matrix, as `raw` gives the whole."""
        return self.raw(name)[rows.start : rows.stop, columns.start : columns.stop]

    def ahead(self, names: Iterable[str]) -> None:
        """Says that `raw` will be asked for these tensors, once each and all of them on the device's current stream."""

    def gather(self, boxes: Iterable[Box], out: torch.Tensor) -> None:
        """The bytes of boxes, one after the other, into uint8 [n], for whoever follows on the device's stream."""
        at = 0
        for box in boxes:
            stored = self.box(*box).contiguous().view(torch.uint8).flatten()
            out[at : at + len(stored)].copy_(stored)
            at += len(stored)
        assert at == len(out)

    def begin(self, boxes: Iterable[Box], out: torch.Tensor) -> "Filling":
        """`gather`, of which the caller may be spared the wait until it waits for what this returns."""
        self.gather(boxes, out)
        return Filling()

    def hand(self, jobs: Sequence[Job]) -> "Filling":
        """Each job's bytes, one box after the other in uint8 [size] on the device, go to its function, which may not
        keep them; all is done when what this returns was waited for. Where threads read, they call the functions, in no
        order, on streams of their own that begin after all that this thread's stream was asked for; only that of a job
        without bytes may read the checkpoint itself."""
        most = max((size for _, size, _ in jobs), default=0)
        if len(self._handed) < most:
            self._handed = torch.empty(most, dtype=torch.uint8, device=self.device)
        for boxes, size, use in jobs:
            self.gather(boxes, self._handed[:size])
            use(self._handed[:size])
        return Filling()

    def weight(self, name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The dequantised tensor `name`, with or without its `.weight` suffix, as `dtype`.

        The format comes from the stored dtype and from the scale beside the weight, never from config lists.
        """
        base = name.removesuffix(".weight")
        stored = next((base + end for end in (".weight", ".weight_packed") if base + end in self.specs), name)
        tensor = self.raw(stored)
        if base + ".weight_scale" in self.specs:
            return mxfp4.decode(tensor, self.scale_bytes(base), dtype, name=base)
        if base + ".weight_scale_inv" in self.specs:
            return fp8.dequantize(tensor, self.raw(base + ".weight_scale_inv"), self.chunk_rows(base), dtype, name=base)
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{stored} is {tensor.dtype} but has no scale beside it; export the checkpoint again")
        return tensor.to(dtype)

    def scale_bytes(self, base: str) -> torch.Tensor:
        """E8M0 bytes [N, K/32] of an MXFP4 weight. The stored dtype alone decides how to read them: U8 and E8M0 are
        exponents, floats are the powers of two themselves."""
        name = base + ".weight_scale"
        return e8m0_bytes(self.raw(name), name)

    def chunk_rows(self, name: str) -> int | None:
        """Rows after which the FP8 block grid of `name` restarts; None for anything but a fused QKV."""
        match = _QKV.match(name.removesuffix(".weight"))
        if not match:
            return None
        layer = self.geometry.mtp if match[1] else self.geometry.layers[int(match[2])]
        return sum(self.geometry.qkv_rows(layer))

    def experts(self, layer: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up [E, 2I, H], gate rows first; down [E, H, I]) of one layer's routed experts."""
        g = self.geometry
        inner = g.moe_intermediate_size
        gate_up = torch.empty(g.n_routed_experts, 2 * inner, g.hidden_size, dtype=dtype)
        down = torch.empty(g.n_routed_experts, g.hidden_size, inner, dtype=dtype)
        for e in range(g.n_routed_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{e}."
            gate_up[e, :inner] = self.weight(prefix + "gate_proj", dtype)
            gate_up[e, inner:] = self.weight(prefix + "up_proj", dtype)
            down[e] = self.weight(prefix + "down_proj", dtype)
        return gate_up, down

    def qkv(
        self, layer: int, dtype: torch.dtype = torch.bfloat16, *, mtp: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q, k, v) weights, each [rows, H], heads in global order, whichever layout is stored."""
        prefix = f"model.{'mtp.' if mtp else ''}layers.{layer}.self_attn."
        if prefix + "qkv_proj.weight" not in self.specs:
            q, k, v = (self.weight(prefix + f"{which}_proj", dtype) for which in "qkv")
            return q, k, v
        fused = self.weight(prefix + "qkv_proj", dtype)
        rows = self.geometry.qkv_rows(self.geometry.mtp if mtp else layer)
        chunks = fused.view(self.geometry.qkv_chunks, sum(rows), -1).split(rows, dim=1)
        q, k, v = (part.flatten(0, 1) for part in chunks)
        return q, k, v

    def fused_qkv(self, layer: int, dtype: torch.dtype = torch.bfloat16, *, mtp: bool = False) -> torch.Tensor:
        """One weight [rows, H] of chunks [Q_c | K_c | V_c], whichever layout is stored."""
        rows = self.geometry.qkv_rows(self.geometry.mtp if mtp else layer)
        parts = self.qkv(layer, dtype, mtp=mtp)
        chunked = [p.view(self.geometry.qkv_chunks, r, -1) for p, r in zip(parts, rows, strict=True)]
        return torch.cat(chunked, dim=1).flatten(0, 1)


def read_draft_config(path: Path) -> Config:
    """A drafter's config.json; a trailing comma is accepted with a warning, because one published file has it."""
    text = read_text(path)
    try:
        return parse_json(text, str(path))
    except ValueError:
        config = parse_json(drop_trailing_commas(text), str(path))
        warnings.warn(f"{path} has a trailing comma, which is not JSON; write it again with a serialiser", stacklevel=2)
        return config


def mask_token_of(path: Path) -> Any:
    """The token id that a mask embedding says it is for; None where the file cannot be read."""
    try:
        assert path.stat().st_size <= MAX_MASK_BYTES
        return torch.load(path, map_location="cpu", weights_only=True)["mask_token_id"]
    except Exception:  # whatever is wrong with it, `read_mask_embedding` says so
        return None


def read_mask_embedding(path: Path, hidden_size: int, mask_token_id: int, vocab_size: int) -> torch.Tensor:
    """The BF16 [H] vector that stands in for the embedding row of the mask token; nothing in the file is executed."""
    if not path.is_file() or path.stat().st_size > MAX_MASK_BYTES:
        raise ValueError(f"{path} is missing or is not a mask embedding; drafts are poor without it, fetch or train it")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or cut-off pickle can fail in any way; all of them mean the same to a user
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{path} is not a plain tensor file ({reason}); do not unpickle it, fetch it again") from None
    if not isinstance(saved, dict) or set(saved) != {"mask_token_id", "embedding"}:
        keys = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} holds {keys}; exactly mask_token_id and embedding are known, export it again")
    token, vector = saved["mask_token_id"], saved["embedding"]
    if not isinstance(token, int) or token != mask_token_id or not 0 <= token < vocab_size:
        raise ValueError(
            f"{path} is for mask_token_id {token!r}, the drafter's config says {mask_token_id} of {vocab_size} ids; "
            "take both from the same release"
        )
    if not isinstance(vector, torch.Tensor) or vector.shape != (hidden_size,) or vector.dtype != torch.bfloat16:
        what = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise ValueError(f"{path} holds {what}, expected bfloat16 [{hidden_size}]; take it from the same release")
    if not vector.isfinite().all():
        raise ValueError(f"{path} holds values that are not finite; export the drafter again")
    return vector


def drafter_folder(folder: str | Path) -> Path:
    """`folder`/dflash where a release holds its drafter there, else `folder` itself."""
    folder = Path(folder)
    return folder / "dflash" if (folder / "dflash" / "config.json").is_file() else folder


def read_drafter(folder: str | Path) -> tuple[Config, dict[str, torch.Tensor], torch.Tensor]:
    """(config, {published name: BF16 tensor}, mask embedding BF16 [H]) of a drafter's folder or of a release.

    ValueError where a tensor is missing, unknown or of another shape, or where the sidecar does not fit the config.
    """
    config, tensors, mask = open_drafter(folder)
    return config, {name: tensors.raw(name) for name in tensors.names}, mask


def open_drafter(folder: str | Path) -> tuple[Config, TensorFolder, torch.Tensor]:
    """`read_drafter` with the tensors left in their files until they are asked for."""
    folder = drafter_folder(folder)
    config = read_draft_config(folder / "config.json")
    geometry = DraftGeometry.from_config(config)
    tensors = TensorFolder(folder, (DRAFTER_FILE, "model.safetensors"))
    for kind, found in differences(drafter_tensors(config), tensors.specs).items():
        if found:
            raise ValueError(
                f"{folder}: {len(found)} drafter tensors with fault {kind!r}, the first {found[0]}; export it again"
            )
    layers = config.get("num_target_layers")
    if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool)):
        raise ValueError(f"{folder}: num_target_layers is {brief(layers)}; write the target's number of layers")
    if layers is not None and not all(0 <= i < layers for i in geometry.target_layer_ids):
        raise ValueError(f"{folder}: target_layer_ids {geometry.target_layer_ids} leave 0..{layers - 1}; correct them")
    mask = read_mask_embedding(folder / MASK_FILE, geometry.hidden_size, geometry.mask_token_id, geometry.vocab_size)
    return config, tensors, mask


@dataclass
class LoadReport:
    """What `load_model` did with every tensor of a checkpoint."""

    experts: str
    """storage of the routed experts: mxfp4, fp8 or bf16"""
    expert_tensors: int = 0
    """stored tensors that became routed experts"""
    used: int = 0
    """stored tensors that became parameters, routed experts included"""
    not_run: dict[str, int] = field(default_factory=dict)
    """stored tensors of modules that this model does not run: {"mtp": …, "towers": …}"""

    def __str__(self) -> str:
        rest = "".join(f", {n} {what} tensors not run" for what, n in self.not_run.items())
        return f"{self.used} tensors loaded, {self.expert_tensors} of them {self.experts} routed experts{rest}"


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A MiMoV2ForCausalLM in evaluation mode with every parameter filled exactly once; the report goes to stderr."""
    model, report = load_model_with_report(folder, dtype, device)
    print(f"{folder}: {report}", file=sys.stderr)
    return model


def load_model_with_report(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Any, LoadReport]:
    """(MiMoV2ForCausalLM, LoadReport). Weights become `dtype`; an F32 router and every router bias stay F32.

    ValueError where a tensor is missing, unknown or misshapen, or where no routed expert matched.
    """
    from transformers import GenerationConfig

    from mimo_qat.models.configuration_mimo_v2 import MiMoV2Config
    from mimo_qat.models.cpu_experts import use_bucketed_experts
    from mimo_qat.models.modeling_mimo_v2 import MiMoV2ForCausalLM

    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    skip = ("quantization_config", "auto_map", "torch_dtype", "dtype")  # what is built is not quantised
    config = MiMoV2Config(**{k: v for k, v in checkpoint.config.items() if k not in skip}, dtype=dtype)
    with torch.device("meta"):
        model = MiMoV2ForCausalLM(config)
    report = LoadReport(checkpoint.format[0])
    state = _fill(checkpoint, list(model.state_dict()), dtype, torch.device(device), report)
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, f"not filled: {left[:3]}"
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
        use_bucketed_experts(model)
    return model.eval(), report


def _fill(checkpoint: Checkpoint, slots: list[str], dtype: torch.dtype, device: Any, report: LoadReport) -> dict:
    """{slot: tensor} for every slot of the model; proves that each stored tensor went to exactly one slot."""
    state: dict[str, torch.Tensor] = {}
    used: set[str] = set()

    def take(*bases: str) -> None:
        for base in bases:
            ends = (".weight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
            stored = {base, *(base + end for end in ends)} & set_of_names
            assert stored and not stored & used, f"{base}: used twice or absent"
            used.update(stored)

    set_of_names = set(checkpoint.names)
    for slot in slots:
        if slot in state:
            continue
        if slot == "lm_head.weight" and checkpoint.geometry.tie_word_embeddings:
            state[slot] = state["model.embed_tokens.weight"]
        elif slot.endswith("mlp.experts.gate_up_proj"):
            prefix = slot.removesuffix("gate_up_proj")
            gate_up, down = checkpoint.experts(int(slot.split(".")[2]), dtype)
            state[slot], state[prefix + "down_proj"] = gate_up.to(device), down.to(device)
            before = len(used)
            for e in range(checkpoint.geometry.n_routed_experts):
                take(*(f"{prefix}{e}.{which}_proj" for which in ("down", "gate", "up")))
            report.expert_tensors += len(used) - before
        else:
            base = slot.removesuffix(".weight")
            keep = slot.endswith("e_score_correction_bias") or (
                slot.endswith(".mlp.gate.weight") and checkpoint.spec(slot).dtype == "F32"
            )
            state[slot] = checkpoint.weight(base, torch.float32 if keep else dtype).to(device)
            take(base)
    rest = set_of_names - used
    report.used = len(used)
    report.not_run = {"mtp": sum(n.startswith(MTP_PREFIX) for n in rest),
                      "towers": sum(n.startswith(TOWER_PREFIXES) for n in rest)}  # fmt: skip
    assert sum(report.not_run.values()) == len(rest), f"never used: {sorted(rest)[:3]}"
    report.not_run = {what: n for what, n in report.not_run.items() if n}
    return state
