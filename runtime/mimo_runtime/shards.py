"""What one rank reads of a checkpoint: its share of every weight, as stored or dequantised exactly, and no other bytes.

Attention is shared by heads; where there are fewer key-value heads than ranks, several ranks hold the same one. Every
expert is striped over all ranks along its intermediate size, so that all ranks do the same work whatever the routing.
Embedding and head are shared by vocabulary. Norms and routers are small and whole on every rank.

A share of a quantised weight is a rectangle of its stored codes and of the scales over it, so no value is quantised
again, wherever a rank's border falls: MXFP4 stripes begin on whole blocks, FP8 scales are looked up row by row.
What is not in the share is never read. Columns are an exception, because files deliver whole pages: their rows are
read, and on one host the page cache has them for all ranks.
"""

import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mimo_kernels import fp8, mxfp4
from mimo_kernels.linear import GROUP_ROWS
from mimo_kernels.moe import Matrices
from mimo_qat.checkpoint.folder import TORCH_DTYPES
from mimo_qat.checkpoint.layout import MTP_PREFIX, TOWER_PREFIXES, Geometry, LayerGeometry
from mimo_qat.checkpoint.reader import Box, Checkpoint, e8m0_bytes
from mimo_runtime.parallel import Ranks


def check_shares(what: str, layers: Iterable[LayerGeometry], sizes: Mapping[str, tuple[int, int]], ranks: int) -> None:
    """ValueError unless so many ranks can share these heads and `sizes`, {name: (size, unit that stays whole)}."""
    layers = list(layers)

    def fault(n: int) -> str | None:
        for g in layers:
            if g.heads % n:
                return f"{g.heads} query heads do not divide by {n}"
            if g.kv_heads % n and n % g.kv_heads:
                return f"{g.kv_heads} key-value heads and {n} ranks: neither divides the other"
        for name, (size, unit) in sizes.items():
            if size % (n * unit):
                return f"{name} {size} is not a multiple of {n} ranks" + f" times {unit}" * (unit > 1)
        return None

    found = fault(ranks)
    if found:
        fit = ", ".join(str(n) for n in range(1, 2 * ranks) if fault(n) is None)
        raise ValueError(
            f"{ranks} ranks cannot share {what}: {found}; start as many processes as one of {fit or 'none'}"
        )


def check_target(g: Geometry, ranks: int) -> None:
    """ValueError, with the numbers that work, where so many ranks cannot share a target."""
    sizes = {"vocab_size": (g.vocab_size, 1)}
    if any(not layer.moe for layer in g.layers):
        sizes["intermediate_size"] = g.intermediate_size, 1
    if any(layer.moe for layer in g.layers):
        sizes["moe_intermediate_size"] = g.moe_intermediate_size, mxfp4.BLOCK
    check_shares("this model", g.layers, sizes, ranks)


def part(size: int, index: int, of: int) -> range:
    """Part `index` of `of` equal parts of range(size)."""
    assert size % of == 0
    return range(index * size // of, (index + 1) * size // of)


def query_heads(g: LayerGeometry, ranks: Ranks) -> range:
    """The query heads of a rank."""
    return part(g.heads, ranks.rank, ranks.size)


def kv_heads(g: LayerGeometry, ranks: Ranks) -> range:
    """The key-value heads that a rank's query heads read."""
    of = min(g.kv_heads, ranks.size)
    return part(g.kv_heads, ranks.rank * of // ranks.size, of)


def local(g: LayerGeometry, ranks: Ranks) -> LayerGeometry:
    """The geometry of a rank's share of a layer."""
    return replace(g, heads=len(query_heads(g, ranks)), kv_heads=len(kv_heads(g, ranks)))


def head_rows(heads: range, size: int) -> range:
    """The rows of `heads` in a matrix of heads of `size` rows."""
    return range(heads.start * size, heads.stop * size)


def fused_rows(g: Geometry, layer: int, ranks: Ranks) -> Iterator[range]:
    """Where a rank's rows [Q | K | V], heads ascending, lie in a fused projection of chunks [Q_c | K_c | V_c]."""
    shape, rows = g.layers[layer], g.qkv_rows(layer)
    heads = query_heads(shape, ranks), kv_heads(shape, ranks), kv_heads(shape, ranks)
    for i, size in enumerate((shape.head_dim, shape.head_dim, shape.v_head_dim)):
        wanted, first = head_rows(heads[i], size), sum(rows[:i])
        for chunk in range(wanted.start // rows[i], (wanted.stop - 1) // rows[i] + 1):
            begin, end = (min(max(x - chunk * rows[i], 0), rows[i]) for x in (wanted.start, wanted.stop))
            yield range(chunk * sum(rows) + first + begin, chunk * sum(rows) + first + end)


@dataclass(frozen=True)
class ExpertRecord:
    """The codes and scale bytes of an expert of [inter, hidden] one after the other, in the order in which a release
    stores them, so that neighbours in a file stay neighbours."""

    hidden: int
    inter: int
    matrices = ("down_proj", "gate_proj", "up_proj")

    @property
    def size(self) -> int:
        """Bytes."""
        return 3 * self.hidden * self.inter * (mxfp4.BLOCK // 2 + 1) // mxfp4.BLOCK

    def gate_up_down(self, data: torch.Tensor) -> list[Matrices]:
        """(codes [n, rows, columns / 2], scales [n, rows, columns / 32]) of gate, up and down in n records, uint8
        [n * size]."""
        records, at, found = data.view(-1, self.size), 0, {}
        for matrix in self.matrices:
            rows, columns = (self.hidden, self.inter) if matrix == "down_proj" else (self.inter, self.hidden)
            tensors = []
            for width in (columns // 2, columns // mxfp4.BLOCK):
                tensors.append(records[:, at : at + rows * width].unflatten(1, (rows, width)))
                at += rows * width
            found[matrix] = tensors[0], tensors[1]
        return [found[name] for name in ("gate_proj", "up_proj", "down_proj")]


class Shards:
    """The share of `ranks.rank` in a target checkpoint; `boxes` keeps what was read, {name: [(rows, columns)]}, and
    `seconds` what the parts of loading took, {part: seconds}."""

    def __init__(self, checkpoint: Checkpoint, ranks: Ranks):
        self.checkpoint, self.ranks = checkpoint, ranks
        self.boxes: dict[str, list[tuple[range, range]]] = {}
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._grids: dict[tuple, _Grid] = {}  # layers repeat, and for new ones a GPU ends its copies first

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of what is inside to `seconds`; work that a GPU has only been asked for is not in it."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def _raw(self, name: str, rows: range, columns: range) -> torch.Tensor:
        self.boxes.setdefault(name, []).append((rows, columns))
        return self.checkpoint.box(name, rows, columns)

    def ahead(self, bases: Iterable[str]) -> None:
        """Reads what `whole` will be asked for, of these names those that there are, together."""
        names = (base + end for base in bases for end in ("", ".weight"))
        self.checkpoint.ahead(n for n in names if n in self.checkpoint)

    def whole(self, base: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor that every rank holds."""
        names = [base + end for end in ("", ".weight", ".weight_packed", ".weight_scale", ".weight_scale_inv")]
        for name in (n for n in names if n in self.checkpoint):
            shape = self.checkpoint.spec(name).shape
            self.boxes.setdefault(name, []).append((range(shape[0]), range(shape[1] if len(shape) > 1 else 1)))
        return self.checkpoint.weight(base, dtype)

    def rows(self, base: str, dtype: torch.dtype) -> torch.Tensor:
        """A matrix [N, K] -> this rank's rows [N / size, K]."""
        return self.values(self.row_box(base), dtype)

    def columns(self, base: str, dtype: torch.dtype) -> torch.Tensor:
        """A matrix [N, K] -> this rank's columns [N, K / size]."""
        return self.values(self.column_box(base), dtype)

    def row_box(self, base: str) -> Box:
        """This rank's rows of a matrix, named without its ending, as in all boxes that a caller sees."""
        rows, columns = self._shape(base)
        return base, part(rows, self.ranks.rank, self.ranks.size), range(columns)

    def column_box(self, base: str) -> Box:
        """This rank's columns of a matrix."""
        rows, columns = self._shape(base)
        return base, range(rows), part(columns, self.ranks.rank, self.ranks.size)

    def qkv_boxes(self, layer: int) -> list[Box]:
        """The parts that are, one below the other, the rows [Q | K | V] of this rank's heads; either layout."""
        g, prefix = self.checkpoint.geometry, f"model.layers.{layer}.self_attn."
        columns = range(g.hidden_size)
        if prefix + "qkv_proj.weight" in self.checkpoint:
            return [(prefix + "qkv_proj", rows, columns) for rows in fused_rows(g, layer, self.ranks)]
        shape = g.layers[layer]
        kv = kv_heads(shape, self.ranks)
        return [
            (prefix + "q_proj", head_rows(query_heads(shape, self.ranks), shape.head_dim), columns),
            (prefix + "k_proj", head_rows(kv, shape.head_dim), columns),
            (prefix + "v_proj", head_rows(kv, shape.v_head_dim), columns),
        ]

    def stays_fp8(self, boxes: Sequence[Box]) -> bool:
        """Whether these parts, one below the other, are stored as block FP8 with borders of tiles only at multiples of
        64 rows and 128 columns, as `mimo_kernels.linear.pack_fp8` takes them. A matter of shapes: nothing is read."""
        for base, _, columns in boxes:
            stored = base + ".weight_scale_inv" in self.checkpoint
            if not stored or columns.start % fp8.BLOCK or columns.stop % fp8.BLOCK:
                return False
        return self._grid(boxes).stays

    def fp8_codes(self, boxes: Sequence[Box]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Begins to read parts that stay FP8. What it returns waits for them, one below the other: (codes float8_e4m3fn
        [N, K], scales float32 [N, K / 128]: one row of scales for each row of codes)."""
        grid = self._grid(boxes)
        codes = self._below([(self._stored(base), rows, columns) for base, rows, columns in boxes])
        names = (base + ".weight_scale_inv" for base, _, _ in boxes)
        scales = self._below([(name, *box) for name, box in zip(names, grid.boxes, strict=True)])
        return lambda: (codes(), scales()[grid.tile])

    def _grid(self, boxes: Sequence[Box]) -> "_Grid":
        """How FP8 scales lie over these parts."""
        chunks = {base: self._chunk(base) for base in dict.fromkeys(base for base, _, _ in boxes)}
        matrices = list(chunks)
        kind = tuple((matrices.index(base), chunks[base], rows, columns) for base, rows, columns in boxes)
        if kind not in self._grids:
            found = [_scale_box(chunk, rows, columns) for _, chunk, rows, columns in kind]
            starts = itertools.accumulate((len(box[0]) for box, _ in found), initial=0)
            tile = torch.cat([start + tile for start, (_, tile) in zip(starts, found, strict=False)])
            # No tile is part of two matrices.
            stored = torch.cat([(matrix << 32) + _tiles(chunk, rows) for matrix, chunk, rows, _ in kind])
            stays = torch.equal(stored, stored[torch.arange(len(stored)) // GROUP_ROWS * GROUP_ROWS])
            self._grids[kind] = _Grid(stays, [box for box, _ in found], tile.to(self.checkpoint.device))
        return self._grids[kind]

    def _below(self, boxes: list[Box]) -> Callable[[], torch.Tensor]:
        """Begins to read boxes, named in full, of one dtype and of as many columns. What it returns waits for them, one
        below the other, as stored."""
        dtype = TORCH_DTYPES[self.checkpoint.spec(boxes[0][0]).dtype]
        shape = sum(len(rows) for _, rows, _ in boxes), len(boxes[0][2])
        out = torch.empty(shape, dtype=dtype, device=self.checkpoint.device)
        for name, rows, columns in boxes:
            assert TORCH_DTYPES[self.checkpoint.spec(name).dtype] == dtype and len(columns) == shape[1]
            self.boxes.setdefault(name, []).append((rows, columns))
        filling = self.checkpoint.begin(boxes, out.view(torch.uint8).view(-1))

        def read() -> torch.Tensor:
            filling.wait()
            return out

        return read

    def parts(self, boxes: Sequence[Box], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """Begins to read parts where they are stored as `dtype`. What it returns waits for them, or else reads their
        values: one below the other, as `dtype`."""
        stored = [(self._stored(base), rows, columns) for base, rows, columns in boxes]
        if all(TORCH_DTYPES[self.checkpoint.spec(name).dtype] == dtype for name, _, _ in stored):
            return self._below(stored)
        return lambda: torch.cat([self.values(box, dtype) for box in boxes])

    def experts(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up [E, 2I / size, H], gate rows first; down [E, H, I / size]) of one layer's routed experts."""
        g = self.checkpoint.geometry
        inner = g.moe_intermediate_size // self.ranks.size
        device = self.checkpoint.device
        gate_up = torch.empty(g.n_routed_experts, 2 * inner, g.hidden_size, dtype=dtype, device=device)
        down = torch.empty(g.n_routed_experts, g.hidden_size, inner, dtype=dtype, device=device)
        for e in range(g.n_routed_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{e}."
            gate_up[e, :inner] = self.rows(prefix + "gate_proj", dtype)
            gate_up[e, inner:] = self.rows(prefix + "up_proj", dtype)
            down[e] = self.columns(prefix + "down_proj", dtype)
        return gate_up, down

    def expert_record(self) -> "ExpertRecord":
        """How the boxes of `expert_boxes` follow each other."""
        g = self.checkpoint.geometry
        return ExpertRecord(g.hidden_size, g.moe_intermediate_size // self.ranks.size)

    def expert_boxes(self, layer: int, experts: range) -> tuple[list[Box], bool]:
        """(this rank's share of some experts of a layer, whether all is stored as MXFP4 codes and scale bytes)."""
        prefix, record = f"model.layers.{layer}.mlp.experts.", self.expert_record()
        inner = part(self.checkpoint.geometry.moe_intermediate_size, self.ranks.rank, self.ranks.size)
        codes = self._stored(f"{prefix}{experts.start}.down_proj").rpartition(".")[2]  # one dialect, which was proved
        shares = []
        for matrix in record.matrices:
            rows, columns = (range(record.hidden), inner) if matrix == "down_proj" else (inner, range(record.hidden))
            shares.append((f".{matrix}.{codes}", rows, _divided(columns, 2)))
            shares.append((f".{matrix}.weight_scale", rows, _divided(columns, mxfp4.BLOCK)))
        boxes = [(f"{prefix}{e}{end}", rows, columns) for e in experts for end, rows, columns in shares]
        for name, rows, columns in boxes:
            self.boxes.setdefault(name, []).append((rows, columns))
        specs = self.checkpoint.specs
        return boxes, {specs[name].dtype for name, _, _ in boxes} <= {"U8", "F8_E8M0"}

    def expert_bytes(self, boxes: Iterable[Box]) -> torch.Tensor:
        """uint8 [n * `expert_record().size`] of `expert_boxes` where scales are stored as floats."""
        stored = ((name, self.checkpoint.box(name, rows, columns)) for name, rows, columns in boxes)
        return torch.cat([(t if name.endswith("weight") else e8m0_bytes(t, name)).flatten() for name, t in stored])

    def complete(self) -> None:
        """Proves that every tensor of the model gave this rank its share."""
        skip = (MTP_PREFIX, *TOWER_PREFIXES)
        expected = {name for name in self.checkpoint.names if not name.startswith(skip)}
        assert set(self.boxes) == expected, f"read and stored differ: {sorted(set(self.boxes) ^ expected)[:3]}"

    def _stored(self, base: str) -> str:
        return next(base + end for end in (".weight", ".weight_packed") if base + end in self.checkpoint)

    def _shape(self, base: str) -> tuple[int, int]:
        rows, columns = self.checkpoint.spec(self._stored(base)).shape
        return rows, 2 * columns if base + ".weight_scale" in self.checkpoint else columns

    def values(self, box: Box, dtype: torch.dtype) -> torch.Tensor:
        """The values of a part of a matrix, as `Checkpoint.weight` gives the whole."""
        base, rows, columns = box
        if (len(rows), len(columns)) == self._shape(base):
            return self.whole(base, dtype)
        stored = self._stored(base)
        if base + ".weight_scale" in self.checkpoint:
            return mxfp4.decode(*self._codes(base, rows, columns), dtype, name=base)
        values = self._raw(stored, rows, columns)
        if base + ".weight_scale_inv" in self.checkpoint:
            return self._scaled(box, dtype, values)
        if values.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{stored} is {values.dtype} but has no scale beside it; export the checkpoint again")
        return values.to(dtype)

    def _codes(self, base: str, rows: range, columns: range) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes uint8 [N, K/2], scale bytes uint8 [N, K/32]) of a part of an MXFP4 matrix."""
        codes = self._raw(self._stored(base), rows, _divided(columns, 2))
        scales = self._raw(base + ".weight_scale", rows, _divided(columns, mxfp4.BLOCK))
        return codes.contiguous(), e8m0_bytes(scales, base + ".weight_scale").contiguous()

    def _chunk(self, base: str) -> int:
        """Rows after which the FP8 tiles of a matrix restart."""
        return self.checkpoint.chunk_rows(base) or self._shape(base)[0]

    def _scales(self, base: str, rows: range, columns: range) -> torch.Tensor:
        """The FP8 scales over a box, float32 [len(rows), column blocks]."""
        box, tile = _scale_box(self._chunk(base), rows, columns)
        stored = self._raw(base + ".weight_scale_inv", *box)
        return stored[tile.to(stored.device)]

    def _scaled(self, box: Box, dtype: torch.dtype, codes: torch.Tensor) -> torch.Tensor:
        """FP8 codes of a box times their scales, which the codec gets one row each (`chunk_rows` 1).

        Codes that begin inside a tile get zeros before them, up to the tile's border.
        """
        base, rows, columns = box
        scales = self._scales(base, rows, columns)
        left = columns.start % fp8.BLOCK
        padded = torch.nn.functional.pad(codes.view(torch.uint8), (left, 0)).view(torch.float8_e4m3fn)
        return fp8.dequantize(padded, scales, 1, dtype, name=base)[:, left:]


@dataclass(frozen=True)
class _Grid:
    """The FP8 scales over parts of matrices, one below the other: whether the parts stay FP8 (`Shards.stays_fp8`), the
    rows and columns of scales of each part, and of those together the row [N] that belongs to each row of codes."""

    stays: bool
    boxes: list[tuple[range, range]]
    tile: torch.Tensor


def _tiles(chunk: int, rows: range) -> torch.Tensor:
    """The row of FP8 scales that belongs to each of `rows`, of a matrix whose tiles restart after `chunk` rows."""
    row = torch.arange(rows.start, rows.stop)
    return row // chunk * -(-chunk // fp8.BLOCK) + row % chunk // fp8.BLOCK


def _scale_box(chunk: int, rows: range, columns: range) -> tuple[tuple[range, range], torch.Tensor]:
    """The rows and columns of FP8 scales over a box, and which of these rows belongs to each of its rows."""
    tile = _tiles(chunk, rows)
    first, last = int(tile[0]), int(tile[-1])
    across = range(columns.start // fp8.BLOCK, -(-columns.stop // fp8.BLOCK))
    return (range(first, last + 1), across), tile - first


def _divided(columns: range, by: int) -> range:
    assert columns.start % by == 0 and columns.stop % by == 0
    return range(columns.start // by, columns.stop // by)
