"""mimo-runtime bench --synthetic flash --layers 12 --uniform_routing true

A published geometry without its weights: the loader fills the same buffers from a folder that is not there. Every value
is a function of (tensor name, row, column), so that the shares of several ranks are cut from one model, which decodes
the same tokens on any number of ranks. Speed is that of the real shapes; what is generated means nothing.

With uniform routing each token's experts are drawn without replacement, by position and layer alone: rows of a trained
router's verification share experts, those of a random router share even more, and this is the case that no luck helps.

A context is synthetic as well: keys and values as large as a prefill's, functions of (layer, head, position), fill the
caches, so that rounds at 256K tokens take no prefill of 256K tokens.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mimo_qat
from mimo_kernels import fp8, mxfp4
from mimo_qat.checkpoint.folder import TORCH_DTYPES
from mimo_qat.checkpoint.layout import (
    DraftGeometry,
    Geometry,
    TensorSpec,
    default_drafter_config,
    drafter_tensors,
    read_json,
    target_tensors,
)
from mimo_qat.checkpoint.reader import Checkpoint, drafter_folder, read_draft_config
from mimo_qat.plan_runtime import workspace_bytes
from mimo_runtime.cache import RingCache
from mimo_runtime.config import BenchConfig, EngineConfig
from mimo_runtime.draft_model import new_draft_caches
from mimo_runtime.engine import BLOCK, DTYPES, Engine
from mimo_runtime.load import Drafter, Layer, LoadConfig, Moe, Target, target_of
from mimo_runtime.load_drafter import drafter_of
from mimo_runtime.model import new_caches, rotations
from mimo_runtime.parallel import Alone, Ranks, world
from mimo_runtime.prefill import CHUNKS
from mimo_runtime.shards import Shards, head_rows, part
from mimo_runtime.speculate import gumbel_noise

PUBLISHED = {"flash": "mimo-v2.5.json", "pro": "mimo-v2.5-pro.json"}
CONTEXTS = (8192, 262144, 1048576)
UNIFORM_PERIOD = 1024  # positions after which uniform routing repeats its choices
_TABLE, _KEYS = 1 << 20, 1 << 18
_FILLED = 1 << 14  # positions of a cache made at once
_PIECE = 1 << 23  # values made at once; the index in between takes four bytes each
_FP8_STD = 64.0  # of FP8 codes: 448, the largest, is seven times as much


def model_config(model: str, layers: int | None) -> dict[str, Any]:
    """config.json of "flash", "pro", a file or a folder; of `layers` the first so many layers alone."""
    path = Path(model)
    if model in PUBLISHED:
        package = Path(mimo_qat.__file__).parent
        root = package if (package / "recipes").is_dir() else package.parent
        path = root / "recipes" / "model" / PUBLISHED[model]
    config = read_json(path / "config.json" if path.is_dir() else path)
    count = Geometry.from_config(config).num_hidden_layers
    if layers is None:
        return config
    if not 1 <= layers <= count:
        raise ValueError(f"layers is {layers}; {model} has {count}, keep 1 to {count} of them")
    lists = {k: config[k][:layers] for k in ("hybrid_layer_pattern", "moe_layer_freq") if config.get(k) is not None}
    return config | lists | {"num_hidden_layers": layers}


def drafter_config(cfg: BenchConfig, config: dict[str, Any]) -> dict[str, Any] | None:
    """config.json of the drafter that `cfg` asks for: the folder's own, the one beside a synthetic model's config.json,
    or the published one for `config`; None for none."""
    if cfg.drafter is None:
        return None
    if cfg.drafter != "auto":
        return read_draft_config(drafter_folder(cfg.drafter) / "config.json")
    model = cfg.synthetic or cfg.folder
    if model not in PUBLISHED and cfg.layers is None:
        assert model is not None
        path = Path(model)
        beside = (path if path.is_dir() else path.parent) / "dflash" / "config.json"
        if beside.is_file():
            return read_draft_config(beside)
    return default_drafter_config(config) if cfg.synthetic else None


class RandomTensors:
    """Values of tensors that exist in no file; on the meta device only their shapes.

    A matrix is T[a(row) + b(column)], of a table T of 2^20 standard normal numbers and two sequences of random keys,
    which start where the tensor's name says: an addition and a look-up a value. The scale is 1 / sqrt(columns), and 1
    for embeddings, sinks and caches. Norms are 1, router biases 0. Quantised matrices are random codes, with one of two
    random scales for each block, so that a scale in the wrong place shows.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        if self.device.type != "meta":
            generator = torch.Generator().manual_seed(0)  # of the CPU, so that no GPU makes other numbers
            self.table = torch.randn(_TABLE, generator=generator).to(self.device)
            self.keys = torch.randint(_TABLE, (_KEYS,), generator=generator, dtype=torch.int32).to(self.device)
        self.tables: dict[tuple[Any, ...], torch.Tensor] = {}

    def box(self, spec: TensorSpec, rows: range, columns: range) -> torch.Tensor:
        """The values [len(rows), len(columns)] of a part of a matrix, in its stored dtype."""
        dtype = TORCH_DTYPES[spec.dtype]
        out = torch.empty(len(rows), len(columns), dtype=dtype, device=self.device)
        if self.device.type == "meta":
            return out
        table, filled = self.table_of(spec), out
        if dtype.itemsize == 1:
            table, filled = table.view(torch.uint8), out.view(torch.uint8)
        down, across = self._keys(spec.name, rows), self._keys("^" + spec.name, columns)
        many = max(1, _PIECE // len(columns))
        for piece, keys in zip(filled.split(many), down.split(many), strict=True):
            index = (keys[:, None] + across).bitwise_and_(_TABLE - 1)
            torch.index_select(table, 0, index.view(-1), out=piece.view(-1))
        return out

    def table_of(self, spec: TensorSpec) -> torch.Tensor:
        """What the values of a tensor are chosen from: numbers of its scale and dtype, code bytes or scale bytes."""
        kind: tuple[Any, ...] = ("values", TORCH_DTYPES[spec.dtype], spec.shape[-1] ** -0.5)
        if "embed" in spec.name or "cache" in spec.name or len(spec.shape) == 1:
            kind = (*kind[:2], 1.0)
        if spec.name.endswith(".weight_scale"):
            kind = ("scales", mxfp4_scale_byte(mxfp4.BLOCK * spec.shape[-1]))
        elif spec.dtype == "U8":
            kind = ("codes",)
        elif spec.dtype == "F8_E4M3":
            kind = ("values", torch.float8_e4m3fn, _FP8_STD)
        elif spec.name.endswith(".weight_scale_inv"):
            # The mean square of the two scales is 2.5 times that of the smaller one.
            kind = ("fp8 scales", 1 / (_FP8_STD * math.sqrt(2.5 * fp8.BLOCK * spec.shape[-1])))
        if kind not in self.tables:
            bits = self.table.view(torch.int32)
            if kind[0] == "values":
                self.tables[kind] = (self.table * kind[2]).to(kind[1])
            elif kind[0] == "fp8 scales":
                self.tables[kind] = kind[1] * (1 + (bits & 1)).float()
            else:
                self.tables[kind] = (bits & 255 if kind[0] == "codes" else kind[1] + (bits & 1)).to(torch.uint8)
        return self.tables[kind]

    def whole(self, spec: TensorSpec) -> torch.Tensor:
        """All values of a tensor of any number of dimensions."""
        constant = len(spec.shape) == 1 and not spec.name.endswith("sink_bias")
        if constant or self.device.type == "meta":
            value = 0.0 if spec.name.endswith("bias") else 1.0
            return torch.full(spec.shape, value, dtype=TORCH_DTYPES[spec.dtype], device=self.device)
        columns = spec.shape[-1] if len(spec.shape) > 1 else 1
        rows = torch.Size(spec.shape).numel() // columns
        return self.box(spec, range(rows), range(columns)).view(spec.shape)

    def _keys(self, name: str, indices: range) -> torch.Tensor:
        places = torch.arange(indices.start, indices.stop, device=self.device) + zlib.crc32(name.encode())
        return self.keys[places % _KEYS]


def mxfp4_scale_byte(columns: int) -> int:
    """The lower E8M0 byte that gives rows of uniform E2M1 codes a norm of about 1: their mean square is 8.56, times
    2.5 because every second scale is twice as large."""
    return 127 + round(-0.5 * math.log2(8.56 * 2.5 * columns))


class OneByOne(Mapping[str, torch.Tensor]):
    """All tensors of a table, each made when it is asked for: a rank cuts its share of one before it has the next."""

    def __init__(self, specs: Mapping[str, TensorSpec], tensors: RandomTensors):
        self.specs, self.tensors = specs, tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors.whole(self.specs[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class RandomCheckpoint(Checkpoint):
    """A release of a configuration alone, for `Shards`: MXFP4 experts, and QKV and dense MLPs in block FP8."""

    def __init__(self, config: dict[str, Any], tensors: RandomTensors):
        self.config, self.device, self.tensors = config, tensors.device, tensors
        self.specs = target_tensors(config, experts="mxfp4", spine="fp8", mtp_layers=0)

    def raw(self, name: str) -> torch.Tensor:
        return self.tensors.whole(self.specs[name])

    def box(self, name: str, rows: range, columns: range) -> torch.Tensor:
        return self.tensors.box(self.specs[name], rows, columns)


def random_model(
    config: dict[str, Any], draft_config: dict[str, Any] | None, load: LoadConfig
) -> tuple[Target, Drafter | None]:
    """A rank's share of a random target and of its drafter, if it has one; on the meta device without values."""
    tensors = RandomTensors(load.device)
    target = target_of(Shards(RandomCheckpoint(config, tensors), load.ranks), load, ())
    if draft_config is None:
        return target, None
    d = DraftGeometry.from_config(draft_config)
    mask = tensors.whole(TensorSpec("mask_embedding", "BF16", (1, d.hidden_size), ""))[0]
    stored = OneByOne(drafter_tensors(draft_config), tensors)
    return target, drafter_of((draft_config, stored, mask), target, load)


def uniform(target: Target) -> Target:
    """`target` with routers that choose by position: any k experts of E are equally likely, each token anew.

    The biases are random orders of the experts, two apart, which no sigmoid score overturns: everything that a router
    computes is still computed. Drafts of a tree that stand at one position choose alike.
    """
    layers = []
    for i, layer in enumerate(target.layers):
        if isinstance(layer.mlp, Moe):
            device = layer.mlp.bias.device
            places, ids = torch.arange(UNIFORM_PERIOD, device=device), torch.arange(len(layer.mlp.bias), device=device)
            order = gumbel_noise(i, places, ids[None]).argsort(dim=-1, stable=True)
            layer = replace(layer, mlp=replace(layer.mlp, bias=2.0 * order))
        layers.append(layer)
    return replace(target, layers=tuple(layers))


def fill(
    caches: list[RingCache], layers: tuple[Layer, ...], kv_heads: list[int], count: int, made: tuple[Any, Ranks, str]
) -> None:
    """Fills the caches of `layers`, which have `kv_heads` heads on all ranks, for positions 0 to `count` - 1.

    `made` is (RandomTensors, ranks, name of the model). Keys are as large as those of a normalised row, values too, but
    for the layer's scale of them; every rank gets those of its own heads.
    """
    tensors, ranks, name = made
    for i, (cache, layer, heads) in enumerate(zip(caches, layers, kv_heads, strict=True)):
        of = min(heads, ranks.size)
        own = part(heads, ranks.rank * of // ranks.size, of)
        dtype = next(n for n, d in TORCH_DTYPES.items() if d == cache.k.dtype)

        def rows(which: str, size: int, at: range, i=i, own=own, dtype=dtype) -> torch.Tensor:
            spec = TensorSpec(f"{name}.cache.{i}.{which}", dtype, (1, size), "")
            return tensors.box(spec, at, head_rows(own, size)).view(len(at), len(own), size)

        for start in range(max(0, count - cache.capacity), count, _FILLED):
            at = range(start, min(start + _FILLED, count))
            k, v = rows("k", cache.k.shape[-1], at), rows("v", cache.v.shape[-1], at)
            cache.write(k, v * layer.attention.value_scale, start)


class SyntheticEngine(Engine):
    """An engine of two configurations, with random weights; it never stops before its budget.

    With a `context` every prompt has so many tokens, of which only the last one is computed: random keys and values
    stand for those of the others.
    """

    def __init__(
        self,
        config: dict[str, Any],
        draft_config: dict[str, Any] | None,
        cfg: EngineConfig,
        *,
        uniform_routing: bool = False,
        ranks: int = 1,
        context: int | None = None,
    ):
        """`ranks` > 1 makes a process that was started alone the first of so many, without the others."""
        self.config, self.draft_config, self.uniform_routing = config, draft_config, uniform_routing
        self.pretended, self.context = ranks, context
        super().__init__("", cfg)
        self.tensors = None if context is None else RandomTensors(self.device)

    def _connect(self, device: str, cfg: EngineConfig) -> Ranks:
        if self.pretended == 1 or world()[1] > 1:
            return super()._connect(device, cfg)
        return Alone(0, self.pretended)

    def _load(self, load: LoadConfig) -> tuple[Target, Drafter | None]:
        target, drafter = random_model(self.config, self.draft_config, load)
        return uniform(target) if self.uniform_routing else target, drafter

    def _held(self, ids: list[int]) -> int:
        if self.context is None:
            return 0
        if len(ids) < self.context:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context {self.context}; give as many tokens")
        held, target = self.context - 1, self.target
        heads = [g.kv_heads for g in target.geometry.layers]
        fill(self.caches, target.layers, heads, held, (self.tensors, self.ranks, "target"))
        if self.drafter is not None:
            assert self.draft_config is not None
            heads = [DraftGeometry.from_config(self.draft_config).kv_heads] * len(self.drafter.layers)
            fill(self.draft_caches, self.drafter.layers, heads, held, (self.tensors, self.ranks, "drafter"))
        return held


def random_prompts(vocab_size: int, length: int, count: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` uniform token ids, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def allocated(thing: Any) -> int:
    """Bytes of the storages under all tensors of `thing` (dataclasses, caches, sequences), each counted once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(thing)}
    return sum(found.values())


def tensors_of(thing: Any) -> Iterator[torch.Tensor]:
    """All tensors of dataclasses, caches and sequences, in their order."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, RingCache):
        yield from (thing.k, thing.v)
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from tensors_of(part)
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from tensors_of(getattr(thing, field.name))


def memory(config: dict[str, Any], draft_config: dict[str, Any] | None, size: int, cfg: EngineConfig) -> dict[str, Any]:
    """Bytes of one of `size` ranks, all alike: {"experts", "spine", "drafter", "workspace", "kv": {context: bytes}}.

    Weights and caches are built by the loader on the meta device, so they are what a run allocates; the table of
    rotations, which is as long as a cache, is counted with them. The workspace is the estimate of `mimo-qat plan
    --runtime`.
    """
    bf16 = cfg.dtype == "bfloat16"  # then auto means codes, as on the GPUs that this is asked for
    experts = "packed" if bf16 and cfg.experts != "plain" else "plain"
    linears = "kernel" if bf16 and cfg.linears != "plain" else "plain"
    load = LoadConfig("meta", DTYPES[cfg.dtype], experts=experts, linears=linears, ranks=Ranks(0, size))
    target, drafter = random_model(config, draft_config, load)
    routed = [layer.mlp.experts for layer in target.layers if isinstance(layer.mlp, Moe)]
    rows = max(drafter.block if drafter else BLOCK, cfg.tree_budget + 1)
    kv = {}
    for context in CONTEXTS:
        draft_caches = new_draft_caches(drafter, context) if drafter else []
        caches = [*new_caches(target, context, rows), *draft_caches]
        kv[str(context)] = allocated([caches, rotations(target, drafter, context + rows)])
    return {
        "experts": allocated(routed),
        "spine": allocated(target) - allocated(routed),
        "drafter": allocated(drafter),
        "workspace": workspace_bytes(target.geometry, rows, size, cfg.prefill_chunk or CHUNKS["cuda"]),
        "kv": kv,
    }


def dry_run(cfg: BenchConfig) -> dict[str, Any]:
    """Prints what each rank would hold, and returns it; nothing is allocated."""
    model = cfg.synthetic or cfg.folder
    assert model is not None
    config = model_config(model, cfg.layers)
    found = memory(config, drafter_config(cfg, config), cfg.ranks, cfg)
    print(f"{described(cfg, model)} on {cfg.ranks} ranks, {cfg.dtype}, bytes a rank, one sequence")
    parts = ("experts", "spine", "drafter", "workspace")
    for name in parts:
        print(f"  {name:<16}{found[name] / 2**30:>10.2f} GiB")
    fixed = sum(found[name] for name in parts)
    totals = {context: fixed + size for context, size in found["kv"].items()}
    for context, size in found["kv"].items():
        print(f"  KV {int(context):>9,}    {size / 2**30:>10.2f} GiB   total {totals[context] / 2**30:>8.2f} GiB")
    return {"model": model, "layers": cfg.layers, "ranks": cfg.ranks, "dtype": cfg.dtype, **found, "totals": totals}


def described(cfg: BenchConfig, model: str) -> str:
    """The model in words: a slice is always called one."""
    count = len(Geometry.from_config(model_config(model, None)).layers)
    kept = cfg.layers or count
    return f"{model}, " + (f"a SLICE: the first {kept} of {count} layers" if kept < count else f"all {count} layers")
