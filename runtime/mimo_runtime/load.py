"""Reads a release folder (or a BF16 folder) into plain tensors on one device, ready for `mimo_runtime.model`.

Weights are dequantised once, exactly: MXFP4 experts and the FP8 spine of a release become the values that the file
means, in float32 or rounded once to bfloat16 (MXFP4 values need no rounding). Where there are kernels for it, experts
stay MXFP4 codes, rearranged once, a quarter of the bytes, and the spine stays FP8 codes, half of them. The same code
reads the unquantised reference, and snaps its experts to MXFP4 on request: the plain post-training quantisation that a
release competes with.
"""

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mimo_kernels import heads, mxfp4, residual, router
from mimo_kernels.attention import fits
from mimo_kernels.linear import pack_fp8
from mimo_kernels.moe import Experts, PackedExperts, Packer, pack_experts
from mimo_qat.checkpoint.layout import Geometry, LayerGeometry
from mimo_qat.checkpoint.reader import Box
from mimo_runtime.experts import Filler, compile_ahead
from mimo_runtime.norms import Norm
from mimo_runtime.parallel import Ranks
from mimo_runtime.rotary import Rotations
from mimo_runtime.shards import Shards, check_target, local, query_heads
from mimo_runtime.staging import StagedCheckpoint
from mimo_runtime.weights import Weight, kernel_weight


@dataclass(frozen=True)
class Attention:
    """`qkv` [(N+G)*K + G*V, H] in global head order, `o` [H, N*V]; `sink` [N] and head norms [K] where the model has
    them; `window` counts the query's own key, None is full attention; `kernel`: few rows are one kernel's work, and
    `fused`: so is all between their projection and it (`mimo_kernels.heads`)."""

    geometry: LayerGeometry
    window: int | None
    value_scale: float
    eps: float
    qkv: Weight
    o: Weight
    sink: torch.Tensor | None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    kernel: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Mlp:
    """Dense SwiGLU: `gate_up` [2I, H] with the gate rows first, `down` [H, I]."""

    gate_up: Weight
    down: Weight


@dataclass(frozen=True)
class PlainExperts:
    """Experts as their values: `gate_up` [E, 2I, H] with the gate rows first, `down` [E, H, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Moe:
    """Routed experts: `router` [E, H] and `bias` [E] in float32, and the experts as values or as packed MXFP4 codes.

    A `bias` [P, E] holds one row for each position modulo P. `chosen` collects the experts [T, k] of every call, for
    measurements outside of CUDA graphs. `fused`: few rows are routed by `mimo_kernels.router`,
    or by the kernel of packed experts.
    """

    router: torch.Tensor
    bias: torch.Tensor
    top_k: int
    normalise: bool
    scaling: float
    experts: PlainExperts | PackedExperts
    chosen: list[torch.Tensor] | None = None
    fused: bool = False

    def weights(self) -> list[torch.Tensor]:
        """The tensors of the experts, each with E as its first dimension."""
        return [t for t in vars(self.experts).values() if isinstance(t, torch.Tensor)]


@dataclass(frozen=True)
class Conv:
    """The DFlash2 convolutions before and after a sublayer: `base` [2, 2, H] (before or after; own or previous row)
    and the projection [2 * 2 * groups, H] that corrects them a row, one value for each group of channels."""

    base: torch.Tensor
    projection: Weight


@dataclass(frozen=True)
class Selector:
    """The DFlash2 selector over the `top_k` candidates of a slot: codebooks of predecessors and successors, both
    [vocabulary, r], and the projection [r, H] of the slot's hidden row."""

    top_k: int
    before: torch.Tensor
    after: torch.Tensor
    projection: Weight


@dataclass(frozen=True)
class Layer:
    """A pre-norm decoder layer, of the target or of the drafter; only a drafter's has convolutions."""

    input_norm: Norm
    attention: Attention
    post_norm: Norm
    mlp: Mlp | Moe
    attention_conv: Conv | None = None
    mlp_conv: Conv | None = None

    def weights(self) -> list[Weight]:
        """The matrices, that is all but a few kilobytes."""
        w = self.mlp
        return [self.attention.qkv, self.attention.o, *(w.weights() if isinstance(w, Moe) else (w.gate_up, w.down))]


@dataclass(frozen=True)
class Target:
    """The model whose tokens are generated: `embed` and `head` [vocabulary, H], of several ranks its share of rows.

    `geometry` is of the whole model; the layers' own are of the share.
    """

    geometry: Geometry
    embed: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Weight
    stop_token_ids: tuple[int, ...]
    ranks: Ranks
    rotations: Rotations | None = None  # of all positions that a pass may ask for; without, each computes its own


@dataclass(frozen=True)
class Drafter:
    """A DFlash drafter: `fc` [H, taps*H], a stack of layers, the embedding [H] of its MASK token; embedding table and
    head are the target's. Ids from `vocab_size` on are never drafted. `block` counts the anchor and its drafts.

    Of several ranks each has its share of the rows of `fc` and of the layers.
    """

    taps: tuple[int, ...]
    block: int
    causal: bool
    vocab_size: int
    fc: Weight
    hidden_norm: Norm
    layers: tuple[Layer, ...]
    norm: Norm
    mask_embedding: torch.Tensor
    ranks: Ranks
    selector: Selector | None = None
    rotations: Rotations | None = None  # as the target's


class Progress:
    """A bar on standard error with bytes and bytes per second; one final line where that is not a terminal.

    Of several ranks the first one shows it, with the bytes of its own share; shapes without values show nothing.
    """

    def __init__(self, what: str, steps: int, cfg: "LoadConfig"):
        self.what, self.steps, self.step, self.bytes, self.began = what, steps, 0, 0, time.perf_counter()
        self.quiet = cfg.ranks.rank > 0 or cfg.device == "meta"

    def advance(self, *tensors: Weight | None) -> None:
        self.step += 1
        self.bytes += sum(t.nbytes for t in tensors if t is not None)
        last = self.step == self.steps
        if self.quiet or not (last or sys.stderr.isatty()):
            return
        seconds = max(time.perf_counter() - self.began, 1e-9)
        bar = "=" * (24 * self.step // self.steps)
        line = f"{self.what} [{bar:24}] {self.step}/{self.steps}  {self.bytes / 1e9:.2f} GB"
        line += f"  {self.bytes / seconds / 1e9:.2f} GB/s"
        print(f"\r{line}" if sys.stderr.isatty() else line, end="\n" if last else "", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class LoadConfig:
    """Where weights go and in which form; `rtn` names the scale rule that snaps BF16 experts to MXFP4; `experts` says
    whether MXFP4 experts stay codes, for the kernels of `mimo_kernels.moe`, `attention` whether few rows
    take those of `mimo_kernels.attention`, `linears` whether FP8 matrices stay codes and few rows are multiplied by
    `mimo_kernels.linear`, `fusions` whether what lies between is a few kernels; `ranks` says whose share is read."""

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    rtn: mxfp4.Rule | None = None
    experts: str = "plain"
    attention: str = "plain"
    linears: str = "plain"
    fusions: str = "plain"
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def fast(self) -> bool:
        """Whether the device runs the decode kernels."""
        device = torch.device(self.device)
        return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9

    def attends(self, g: LayerGeometry) -> bool:
        """Whether the attention of such a layer is a kernel's work; ValueError where it cannot be."""
        possible = self.dtype == torch.bfloat16 and fits(g.head_dim, g.v_head_dim)
        if self.attention == "kernel" and not possible:
            raise ValueError(
                f"attention kernel needs bfloat16 and heads of powers of two; these are {self.dtype} and {g.head_dim}, "
                f"{g.v_head_dim}: use plain"
            )
        return possible and (self.attention == "kernel" or (self.attention == "auto" and self.fast))

    def _runs(self, name: str, choice: str) -> bool:
        if choice == "kernel" and self.dtype != torch.bfloat16:
            raise ValueError(f"{name} kernel needs bfloat16; dtype is {self.dtype}: use plain")
        return choice == "kernel" or (choice == "auto" and self.dtype == torch.bfloat16 and self.fast)

    @property
    def multiplies(self) -> bool:
        """Whether products of few rows are a kernel's work; ValueError where they cannot be."""
        return self._runs("linears", self.linears)

    @property
    def fuses(self) -> bool:
        """Whether norms, heads and routing of few rows are kernels' work; ValueError where they cannot be."""
        return self._runs("fusions", self.fusions)

    def norm(self, weight: torch.Tensor, eps: float) -> Norm:
        """The norm of the residual stream with that weight [H]."""
        return Norm(weight, eps, self.fuses and len(weight) % 8 == 0 and len(weight) <= residual.MAX_COLUMNS)

    def splits(self, g: LayerGeometry) -> bool:
        """Whether heads of that size are a kernel's work."""
        return self.fuses and max(g.head_dim, g.v_head_dim) <= heads.MAX_HEAD

    def routes(self, experts: int, hidden: int, top_k: int) -> bool:
        """Whether routing of that size is a kernel's work."""
        return self.fuses and experts <= router.MAX_EXPERTS and top_k <= router.MAX_TOP_K and hidden % 8 == 0

    def weight(self, values: torch.Tensor) -> Weight:
        """A matrix [N, K] in the form of its products."""
        return kernel_weight(values) if self.multiplies else values

    def packs(self, stored: str) -> bool:
        """Whether experts that are `stored` as "mxfp4" or otherwise are packed; ValueError where they cannot be."""
        possible = self.dtype == torch.bfloat16 and (stored == "mxfp4" or self.rtn is not None)
        if self.experts == "packed" and not possible:
            raise ValueError(
                f"experts packed needs MXFP4 experts and dtype bfloat16; these are {stored} and {self.dtype}: use plain"
            )
        return possible and (self.experts == "packed" or (self.experts == "auto" and self.fast))


def load_target(folder: str | Path, cfg: LoadConfig) -> Target:
    """The target of a release or BF16 folder, its names and shapes proved against its config.json first.

    Multi-token-prediction blocks and multimodal towers are not loaded. ValueError names the first fault.
    """
    shards = open_shards(folder, cfg)
    try:
        return target_of(shards, cfg, stop_tokens(Path(folder), shards.checkpoint.config))
    finally:
        shards.checkpoint.close()


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Keeps Python from looking for cycles while many small objects are made, of which none is in a cycle: each time it
    looks at all objects of the process."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def open_shards(folder: str | Path, cfg: LoadConfig) -> Shards:
    """A rank's share of a folder that is proved first, not read yet; ValueError as `load_target`."""
    device = cfg.device if cfg.rtn is None else "cpu"  # BF16 experts of a layer are more than a GPU has room for
    if cfg.fast and cfg.rtn is None and cfg.dtype == torch.bfloat16 and cfg.experts != "plain":
        compile_ahead(Path(folder), cfg.ranks.size, cfg.device)
    with collection_paused():
        checkpoint = StagedCheckpoint(folder, device)
        checkpoint.verify()
    if cfg.rtn is not None and checkpoint.format[0] != "bf16":
        raise ValueError(
            f"{folder} holds {checkpoint.format[0]} experts; round-to-nearest quantisation starts from BF16 experts, "
            "so give the unquantised folder"
        )
    return Shards(checkpoint, cfg.ranks)


# Of a layer, what every rank holds whole.
_SMALL = ["input_layernorm", "post_attention_layernorm", "self_attn.attention_sink_bias"]
_SMALL += ["mlp.gate", "mlp.gate.e_score_correction_bias"]


def target_of(shards: Shards, cfg: LoadConfig, stop_token_ids: tuple[int, ...]) -> Target:
    """A rank's target of the tensors that `shards` gives."""
    g = shards.checkpoint.geometry
    check_target(g, cfg.ranks.size)
    bar = Progress("loading target", g.num_hidden_layers + 1, cfg)
    filler = _begin_experts(shards, g, cfg)
    began = time.perf_counter()
    shards.ahead(f"model.layers.{i}.{name}" for i in range(g.num_hidden_layers) for name in _SMALL)
    read_embed = _values(shards, [shards.row_box("model.embed_tokens")], cfg)
    read_head = read_embed if g.tie_word_embeddings else _values(shards, [shards.row_box("lm_head")], cfg)
    norm = cfg.norm(_own(shards.whole("model.norm", cfg.dtype), cfg), g.layernorm_epsilon)
    embed = read_embed()
    head = cfg.weight(embed if g.tie_word_embeddings else read_head())
    bar.advance(embed, None if g.tie_word_embeddings else head)
    layers: list[Layer] = []
    for layer in _read_ahead(_target_layer(shards, g, i, cfg, filler.packers) for i in range(g.num_hidden_layers)):
        if len(layers) not in filler.packers:
            bar.advance(*layer.weights())
        layers.append(layer)
    shards.complete()  # or will be, by what is on its way
    shards.seconds["spine"] = time.perf_counter() - began
    filler.finish(lambda i: bar.advance(*layers[i].weights()))
    return Target(g, embed, tuple(layers), norm, head, stop_token_ids, cfg.ranks)


def _begin_experts(shards: Shards, g: Geometry, cfg: LoadConfig) -> Filler:
    """Begins to read what stays MXFP4, all layers' before anything else."""
    filler = Filler(shards)
    if cfg.packs(shards.checkpoint.format[0]) and cfg.rtn is None:
        record = shards.expert_record()
        with collection_paused():
            for i in (i for i, layer in enumerate(g.layers) if layer.moe):
                with shards.timed("memory"):
                    packer = Packer(g.n_routed_experts, record.hidden, record.inter, cfg.device)
                filler.add(i, packer)
    return filler


def _own(tensor: torch.Tensor, cfg: LoadConfig) -> torch.Tensor:
    return tensor.to(cfg.device).contiguous()


def _read_ahead(begun: Iterable[Callable[[], Layer]]) -> Iterator[Layer]:
    """What each of them makes, when what the next one needs is being read."""
    before = None
    for layer in begun:
        if before is not None:
            yield before()
        before = layer
    if before is not None:
        yield before()


def _values(shards: Shards, boxes: Sequence[Box], cfg: LoadConfig) -> Callable[[], torch.Tensor]:
    """Begins to read parts of stored matrices, and gives the function that waits for them, one below the other."""
    read = shards.parts(boxes, cfg.dtype)
    return lambda: _own(read(), cfg)


def _matrix(shards: Shards, boxes: Sequence[Box], cfg: LoadConfig) -> Callable[[], Weight]:
    """`_values` in the form of their products."""
    if cfg.multiplies and shards.stays_fp8(boxes):
        read = shards.fp8_codes(boxes)

        def packed() -> Weight:
            codes, scales = (t.to(cfg.device) for t in read())
            return pack_fp8(codes, scales, 1, name=boxes[0][0], proved=True)

        return packed
    values = _values(shards, boxes, cfg)
    return lambda: cfg.weight(values())


def _target_layer(
    shards: Shards, g: Geometry, i: int, cfg: LoadConfig, packers: Mapping[int, Packer]
) -> Callable[[], Layer]:
    """Begins to read the matrices of layer i, and gives the function that makes the layer of them."""
    at, geometry = f"model.layers.{i}.", g.layers[i]

    def columns(name: str) -> Callable[[], Weight]:
        return _matrix(shards, [shards.column_box(at + name)], cfg)

    def whole(name: str, dtype: torch.dtype = cfg.dtype) -> torch.Tensor:
        return _own(shards.whole(at + name, dtype), cfg)

    qkv, o = _matrix(shards, shards.qkv_boxes(i), cfg), columns("self_attn.o_proj")
    if not geometry.moe:
        gate_up = _matrix(shards, [shards.row_box(f"{at}mlp.{n}_proj") for n in ("gate", "up")], cfg)
        down = columns("mlp.down_proj")

    def made() -> Layer:
        sink = None
        if geometry.sink:  # a few values, of which the share is cut from the whole
            heads = query_heads(geometry, cfg.ranks)
            sink = whole("self_attn.attention_sink_bias", torch.float32)[heads.start : heads.stop]
        attention = Attention(
            geometry=local(geometry, cfg.ranks),
            window=g.sliding_window if geometry.swa else None,
            value_scale=g.attention_value_scale,
            eps=g.layernorm_epsilon,
            qkv=qkv(),
            o=o(),
            sink=sink,
            kernel=cfg.attends(geometry),
            fused=cfg.splits(geometry),
        )
        before, after = (cfg.norm(whole(f"{n}_layernorm"), g.layernorm_epsilon) for n in ("input", "post_attention"))
        if not geometry.moe:
            return Layer(before, attention, after, Mlp(gate_up(), down()))
        mlp = Moe(
            router=whole("mlp.gate", torch.float32),
            bias=whole("mlp.gate.e_score_correction_bias", torch.float32),
            top_k=g.num_experts_per_tok,
            normalise=g.norm_topk_prob,
            scaling=g.routed_scaling_factor,
            experts=_experts(shards, i, cfg, packers),
            fused=cfg.routes(g.n_routed_experts, g.hidden_size, g.num_experts_per_tok),
        )
        return Layer(before, attention, after, mlp)

    return made


def _experts(shards: Shards, i: int, cfg: LoadConfig, packers: Mapping[int, Packer]) -> PlainExperts | PackedExperts:
    """The experts of layer i in the form that `cfg` asks for: those of `packers`, or read here."""
    if i in packers:
        return packers[i].packed
    gate_up, down = shards.experts(i, cfg.dtype if cfg.rtn is None else torch.bfloat16)
    if cfg.rtn is None:
        return PlainExperts(gate_up.to(cfg.device), down.to(cfg.device))
    names = f"model.layers.{i}.mlp.experts.gate_up", f"model.layers.{i}.mlp.experts.down"
    if cfg.packs(shards.checkpoint.format[0]):
        (codes, scales), (down, down_scales) = (
            mxfp4.encode(t.to(cfg.device), cfg.rtn, name=n) for t, n in zip((gate_up, down), names, strict=True)
        )
        return pack_experts(Experts(codes, scales, down, down_scales))
    gate_up, down = (mxfp4.snap(t, cfg.rtn, name=n) for t, n in zip((gate_up, down), names, strict=True))
    return PlainExperts(gate_up.to(cfg.device, cfg.dtype), down.to(cfg.device, cfg.dtype))


def stop_tokens(folder: Path, config: dict) -> tuple[int, ...]:
    """End-of-text ids: those of generation_config.json if it has them, else of config.json."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    ids = generation.get("eos_token_id")
    ids = config.get("eos_token_id") if ids is None else ids
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def tokenizer_size(folder: Path) -> int | None:
    """One more than the largest id that tokenizer.json knows: ids beyond it are padding rows of the embedding."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    largest = max(vocabulary.values()) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return 1 + max([largest, *(token["id"] for token in tokenizer.get("added_tokens", ()))])
