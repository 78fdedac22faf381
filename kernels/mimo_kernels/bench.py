"""python -m mimo_kernels.bench recipes/model/mimo-v2.5.json recipes/model/mimo-v2.5-pro.json --tp 1 2 4 8

Every operator on the shapes of a model at some tensor-parallel degrees: microseconds, the bytes that it has to move,
GB/s, and the share of a device copy measured in the same run. Instead of a file, numbers do: `--shape 4096 2048 256 8`
(hidden size, intermediate size of an expert, experts, experts a token), for the experts alone. `--only moe` leaves the
other operators out; `--sweep` times every tile of the Triton modules instead, and every cluster of the norm's, from
which their defaults are chosen. The last line is one JSON document.

A row is the public function, whatever implementation that runs here. Where it is CUDA C++, a row "..., Triton" beside
it times the other; rows of Triton say their tile in "config". `attention window` has two rows more, from the
projection on: `window.attend`, and the rotation and the attention that it stands for.

How it measures. Medians of CUDA events. An operator runs as a decode step runs it, in a CUDA graph; the graph holds 16
calls, each on other experts, weights or caches, so that nothing a call reads is still in the second-level cache, and
the time is a 16th. Where 16 key-value caches would all fit, every call comes after a pass over other memory, and the
time of those passes alone is subtracted. Launch gaps inside the graph count. Bytes are the weights and scales in use,
or the keys and values that are seen. The codecs work on tensors that are far larger than the cache. Residual norms and
head splits read what the operator before left in the cache, so nothing is flushed for them, and their bytes are all
that they read and write: those rows are the price of a launch. `layer` is described in `bench_layer`.

Without a GPU it prints the bytes and the time that they take at `--bandwidth`, which is the floor of any kernel.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import cuda, fp8, linear, linear_cuda, mxfp4, norm_cuda, router_cuda, transcode
from .moe import MAX_TOKENS, PAGE_K, PackedExperts

H200_COPY = 4280.0  # GB/s read plus written, measured
CALLS = 16  # a graph
REPLAYS = 25
COPY_BYTES = 2**30
CODEC_EXPERTS = 16
MXFP4_BYTES = 17 / 32  # a weight
CONTEXTS = (512, 8192, 131072)  # committed rows, in full attention
L2_BYTES = 2**26  # at least the second-level cache of an H100 or H200
ROTATION = 2**30  # bytes that a graph walks through at most, but for two large weights or caches
OPERATORS = ("moe", "prompt", "attention", "linear", "norm", "heads", "router", "layer", "codec")
Row = dict[str, Any]


@dataclass(frozen=True)
class Heads:
    """One kind of attention layer, not divided; `window` is None where all is seen."""

    window: int | None
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    rotated: int  # elements of a query or key head

    @property
    def name(self) -> str:
        return "window" if self.window else "full"

    def local(self, tp: int) -> "Heads":
        """Of one of `tp` ranks; several hold the same key-value head where there are fewer."""
        return Heads(self.window, self.heads // tp, max(self.kv_heads // tp, 1), self.k_dim, self.v_dim, self.rotated)

    @property
    def qkv_rows(self) -> int:
        return (self.heads + self.kv_heads) * self.k_dim + self.kv_heads * self.v_dim


@dataclass(frozen=True)
class Geometry:
    """Shape of an expert layer, and of attention where a config.json gave it; not divided."""

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    attention: tuple[Heads, ...] = ()
    vocab: int = 0

    @classmethod
    def read(cls, path: Path) -> "Geometry":
        """Of a Hugging Face config.json. ValueError when it does not describe a MiMo-V2 model."""
        config = json.loads(path.read_text())
        keys = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
        swa = ("sliding_window", *("swa_" + key for key in heads))
        missing = [k for k in (*keys, *heads, *swa, "vocab_size") if not isinstance(config.get(k), int)]
        if missing:
            raise ValueError(f"{path}: no {', '.join(missing)}; give the config.json of a MiMo-V2 model, or --shape")
        part = config.get("partial_rotary_factor", 1.0)
        full = Heads(None, *[*(config[k] for k in heads), int(config["head_dim"] * part)])
        window = Heads(*[*(config[k] for k in swa), int(config["swa_head_dim"] * part)])
        hidden, inter, experts, top_k = (config[k] for k in keys)
        return cls(path.stem, hidden, inter, experts, top_k, (full, window), config["vocab_size"])

    def distinct(self, tokens: int) -> int:
        """Expected number of distinct experts when every token draws `top_k` of them independently."""
        return round(self.experts * (1 - (1 - self.top_k / self.experts) ** tokens))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args, geometries = _parse(argv)
    gpu = torch.cuda.is_available()
    document: Row = {"command": "mimo_kernels.bench", "measured": gpu, "torch": torch.__version__}
    if gpu:
        import triton

        bandwidth = copy_bandwidth()
        document |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
        print(f"{document['device']}: device copy {bandwidth:.0f} GB/s, read plus written")
    else:
        bandwidth = args.bandwidth
        print(f"No GPU: nothing is measured. Bytes, and the time they take at {bandwidth:.0f} GB/s:")
    document |= {"copy_GB/s": round(bandwidth, 1), "tokens": args.tokens, "rows": []}
    header = f"{'operator':38s} {'model':18s} TP    size {'MB':>8} {'floor us':>9}"
    print(header + (f" {'us':>9}   GB/s of copy" if gpu else ""))
    for g in geometries:
        for tp in args.tp:
            for row in _rows(g, tp, args, gpu):
                document["rows"].append(_finish(row, bandwidth))
    print(json.dumps(document))


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Geometry]]:
    parser = argparse.ArgumentParser(
        prog="python -m mimo_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="*", type=Path, help="config.json of the models")
    add(
        "--shape",
        nargs=4,
        type=int,
        action="append",
        default=[],
        metavar=("H", "I", "E", "K"),
        help="a model's numbers",
    )
    add("--tp", nargs="+", type=int, default=[1, 2, 4, 8], help="tensor-parallel degrees")
    add("--tokens", type=int, default=8, help="tokens of a decode step, 1 to 16")
    add("--distinct", nargs="+", type=int, help="distinct experts; default: of one token, and expected of all")
    add("--only", choices=OPERATORS, help="one kind of operator")
    add("--sweep", action="store_true", help="time every tile instead of the default ones, and no codec")
    add("--bandwidth", type=float, default=H200_COPY, help="GB/s assumed where there is no GPU")
    args = parser.parse_args(argv)
    if not args.models and not args.shape:
        parser.error("no shape: give a config.json, such as recipes/model/mimo-v2.5.json, or --shape H I E K")
    if not 1 <= args.tokens <= MAX_TOKENS:
        parser.error(f"--tokens {args.tokens}: give 1 to {MAX_TOKENS}")
    try:
        geometries = [Geometry.read(path) for path in args.models]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for h, i, e, k in args.shape:
        geometries.append(Geometry(f"{h}x{i}x{e}top{k}", h, i, e, k))
    if args.shape and args.only in ("attention", "linear", "heads", "layer"):
        parser.error(f"--only {args.only}: --shape does not describe it; give a config.json")
    for g in geometries:
        for tp in args.tp:
            for a in g.attention:
                if a.heads % tp or (a.kv_heads % tp and tp % a.kv_heads) or g.vocab % tp:
                    parser.error(f"--tp {tp}: heads or vocabulary of {g.name} do not divide")
            if g.inter % (tp * mxfp4.BLOCK):
                parser.error(
                    f"--tp {tp}: the intermediate size {g.inter} of {g.name} does not divide into whole blocks"
                )
        most = min(args.tokens * g.top_k, g.experts)
        for distinct in args.distinct or ():
            if not g.top_k <= distinct <= most:
                parser.error(
                    f"--distinct {distinct}: {args.tokens} tokens of {g.name} touch {g.top_k} to {most} experts"
                )
    return args, geometries


def _rows(g: Geometry, tp: int, args: argparse.Namespace, gpu: bool) -> Iterator[Row]:
    """Rows of one geometry at one degree, as they are measured."""
    from . import bench_attention, bench_moe

    wanted = {args.only} if args.only else set(OPERATORS)
    base = {"model": g.name, "tp": tp}
    if "moe" in wanted:
        packed = synthetic_experts(g, tp, "cuda" if gpu else "meta")
        for distinct in args.distinct or sorted({g.top_k, g.distinct(args.tokens)}):
            size = distinct * packed.bytes_per_expert
            rows: Iterable[Row] = [{"operator": "moe", "bytes": size}]
            if gpu:
                rows = (bench_moe.sweep if args.sweep else bench_moe.measure_moe)(
                    packed, routings(g, args.tokens, distinct), size
                )
            yield from (base | {"experts": distinct} | row for row in rows)
        del packed
    if "prompt" in wanted and not args.sweep:
        packed = synthetic_experts(g, tp, "cuda" if gpu else "meta")
        yield base | {"experts": g.distinct(bench_moe.PROMPT)} | bench_moe.prompt_row(g, packed, gpu)
        del packed
    if "attention" in wanted:
        for a in g.attention:
            for context in CONTEXTS if a.window is None else CONTEXTS[1:2]:
                rows = bench_attention.attention_rows(a.local(tp), context, args.tokens, gpu, args.sweep)
                yield from (base | {"context": context} | row for row in rows)
    if "linear" in wanted:
        for name, n, k, is_fp8 in matrices(g, tp):
            rows = linear_rows(name, (n, k), is_fp8, args.tokens if gpu else 0, args.sweep)
            yield from (base | {"rows": n} | row for row in rows)
    if "norm" in wanted:
        yield from (base | {"rows": g.hidden} | row for row in norm_rows(g, tp, args.tokens, gpu, args.sweep))
    if "heads" in wanted:
        for a in (kind.local(tp) for kind in g.attention):
            yield base | {"rows": a.qkv_rows} | bench_attention.heads_row(a, args.tokens, gpu)
    if "router" in wanted:
        yield from (base | {"experts": g.experts} | row for row in router_rows(g, args.tokens, gpu, args.sweep))
    if "layer" in wanted and g.attention and not args.sweep:
        from .bench_layer import layer_row

        packed = synthetic_experts(g, tp, "cuda" if gpu else "meta")
        yield from (base | layer_row(g, tp, tokens, packed, gpu) for tokens in sorted({1, args.tokens}))
        del packed
    if "codec" in wanted and not args.sweep:
        yield from (base | {"experts": CODEC_EXPERTS} | row for row in codec_rows(g, tp, gpu))


def _finish(row: Row, bandwidth: float) -> Row:
    """Adds the derived figures and prints the line."""
    row["floor_us"] = round(row["bytes"] / bandwidth / 1e3, 2)
    size = next(row[key] for key in ("experts", "context", "rows") if key in row)
    line = f"{row['operator']:38s} {row['model']:18s} {row['tp']:2d} {size:7d} {row['bytes'] / 1e6:8.1f}"
    line += f" {row['floor_us']:9.1f}"
    if "us" in row:
        rate = row["bytes"] / row["us"] / 1e3
        row |= {"us": round(row["us"], 2), "GB/s": round(rate, 1), "of_copy": round(rate / bandwidth, 3)}
        line += f" {row['us']:9.1f} {row['GB/s']:6.0f} {row['of_copy']:7.2f}"
    print(line, flush=True)
    return row


# ---- what is measured


def synthetic_experts(g: Geometry, tp: int, device: str) -> PackedExperts:
    """Random packed experts of one rank: any 16 bits are four codes; the scales make weights of about 0.02."""
    hidden, inter = g.hidden, g.inter // tp
    h, i = (-(-n // PAGE_K) for n in (hidden, inter))

    def pages(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (g.experts, rows * PAGE_K // 16, columns, 16)
        words = torch.empty(*shape, 32, dtype=torch.int16, device=device)
        scales = torch.empty(*shape, 4, dtype=torch.uint8, device=device)
        return words.random_(-(2**15), 2**15), scales.random_(244, 248)

    return PackedExperts(*pages(2 * i, h), *pages(h, i), hidden=hidden, inter=inter)


def routings(g: Geometry, tokens: int, distinct: int) -> list[torch.Tensor]:
    """For each call int32 ids [tokens, top_k] with exactly `distinct` experts, others than in the calls before it."""
    order = torch.randperm(g.experts, generator=torch.Generator().manual_seed(0))
    at = torch.arange(tokens * g.top_k) % distinct
    return [order[(call * distinct + at) % g.experts].view(tokens, -1).int().cuda() for call in range(CALLS)]


def matrices(g: Geometry, tp: int) -> list[tuple[str, int, int, bool]]:
    """(name, N, K, whether FP8) of the products of one rank that are not experts."""
    if not g.attention:
        return []
    local = [a.local(tp) for a in g.attention]
    rows = [(f"qkv {a.name}", a.qkv_rows, g.hidden, True) for a in local]
    return [*rows, ("o", g.hidden, local[0].heads * local[0].v_dim, False), ("head", g.vocab // tp, g.hidden, False)]


def linear_rows(name: str, shape: tuple[int, int], is_fp8: bool, tokens: int, every: bool) -> list[Row]:
    """A product with a weight of `shape` [N, K]; without `tokens` only its bytes, with `every` all tiles and slices."""
    n, k = shape
    size = n * k + 4 * -(-n // linear.GROUP_ROWS) * (k // fp8.BLOCK) if is_fp8 else 2 * n * k
    label = f"linear {name} {'fp8' if is_fp8 else 'bf16'}"
    if not tokens:
        return [{"operator": label, "bytes": size}]
    from . import linear_triton as lt

    x = torch.randn(tokens, k, device="cuda").bfloat16()
    weights = [random_weight(n, k, is_fp8) for _ in range(copies(size))]
    rows: list[Row] = []
    if not every:
        us = graph_microseconds(lambda c: linear.linear(x, weights[c % len(weights)]))
        rows.append({"operator": label, "bytes": size, "us": us})
        if not (cuda.usable(x.device) and linear_cuda.fits(weights[0], tokens)):
            return rows
    configs = [lt.config_for(n, k, is_fp8)]
    if every:
        tiles = [t for t in (lt.FP8_TILES if is_fp8 else lt.BF16_TILES) if k % t.k == 0]
        configs = [lt.Config(t, slices) for t in tiles for slices in (1, 2, 4, 8) if k % (t.k * slices) == 0]
    for config in configs:
        us = graph_microseconds(lambda c: lt.linear(x, weights[c % len(weights)], config))  # noqa: B023
        t = config.tile
        tile = f" {t.rows}x{t.k} w{t.warps} s{t.stages} k{config.slices}" if every else ", Triton"
        rows.append({"operator": label + tile, "bytes": size, "us": us, "config": asdict(config)})
    return rows


def random_weight(n: int, k: int, is_fp8: bool) -> torch.Tensor | linear.Fp8Weight:
    """A weight [n, k] on the GPU."""
    if not is_fp8:
        return torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    codes = torch.empty(n, k, dtype=torch.uint8, device="cuda").random_(0, 0x7F).view(torch.float8_e4m3fn)
    return linear.Fp8Weight(codes, torch.rand(-(-n // linear.GROUP_ROWS), k // fp8.BLOCK, device="cuda"))


def norm_rows(g: Geometry, tp: int, tokens: int, gpu: bool, every: bool) -> list[Row]:
    """Residual add and norm of `tokens` rows: the update as one sum, as parts of `tp` ranks, as parts of experts."""
    rows: list[Row] = []
    updates = [(f"norm of {n} part{'s' if n > 1 else ''}", n, torch.bfloat16) for n in sorted({1, tp})]
    for label, parts, dtype in (*updates, (f"norm of {g.top_k} experts' parts", g.top_k, torch.float32)):
        size = g.hidden * (tokens * (parts * dtype.itemsize + 6) + 2)
        if not gpu:
            rows.append({"operator": label, "bytes": size})
            continue
        x, weights = (torch.randn(n, g.hidden, device="cuda").bfloat16() for n in (tokens, CALLS))
        update = torch.randn(tokens, parts, g.hidden, device="cuda").to(dtype).transpose(0, 1)
        for name, config, norm in norm_ways(g.hidden, every):
            us = graph_microseconds(lambda c: norm(x, update, weights[c], 1e-5))  # noqa: B023
            row: Row = {"operator": label + name, "bytes": size, "us": us}
            rows.append(row | ({"config": config} if config else {}))
    return rows


def norm_ways(hidden: int, every: bool) -> list[tuple[str, dict[str, int], Callable]]:
    """(what to add to an operator's name, its choices, a function): the public one, or all clusters and warps."""
    from . import residual, residual_triton

    own = cuda.usable(torch.device("cuda", torch.cuda.current_device())) and norm_cuda.fits(hidden)
    triton, warps = residual_triton.add_rms_norm, residual_triton.warps_for(hidden)
    if not every:
        ways: list[tuple[str, dict[str, int], Callable]] = [("", {}, residual.add_rms_norm)]
        return ways + ([(", Triton", {"warps": warps}, triton)] if own else [])
    clusters = [c for c in norm_cuda.CLUSTERS if own and norm_cuda.fits(hidden, c)]
    return [
        *((f" c{c}", {"cluster": c}, partial(norm_cuda.add_rms_norm, cluster=c)) for c in clusters),
        *((f" w{w}", {"warps": w}, partial(triton, warps=w)) for w in residual_triton.WARPS),
    ]


def router_rows(g: Geometry, tokens: int, gpu: bool, every: bool) -> list[Row]:
    """Routing of `tokens` rows; every rank has the whole router."""
    size = 4 * g.experts * (g.hidden + 1)
    if not gpu:
        return [{"operator": "router", "bytes": size}]
    from . import router_triton as rt

    x = torch.randn(tokens, g.hidden, device="cuda").bfloat16()
    routers = torch.randn(copies(size), g.experts, g.hidden, device="cuda") / g.hidden**0.5
    bias = torch.randn(g.experts, device="cuda") / 10
    configs: list[tuple[str, rt.Config | None]] = [("router", None)]
    if every:
        configs = [(f"router {config.experts}x{config.columns}", config) for config in rt.CONFIGS]
    elif cuda.usable(x.device) and router_cuda.fits(g.hidden):
        configs.append(("router, Triton", rt.CONFIGS[0]))
    rows: list[Row] = []
    for name, config in configs:

        def call(c: int) -> object:
            return rt.route(x, routers[c % len(routers)], bias, g.top_k, normalise=True, config=config)  # noqa: B023

        us = graph_microseconds(call, flush=CALLS * size < L2_BYTES)
        rows.append({"operator": name, "bytes": size, "us": us} | ({"config": asdict(config)} if config else {}))
    return rows


def copies(size: int) -> int:
    """How many tensors of `size` bytes a graph goes through, so that the cache holds none of the next call."""
    return max(2, min(CALLS, ROTATION // size))


def codec_rows(g: Geometry, tp: int, gpu: bool) -> list[Row]:
    """snap, encode and the FP8 transcode of the up/gate weights of some experts of one rank."""
    shape = (CODEC_EXPERTS, 2 * g.inter // tp, g.hidden)
    n = CODEC_EXPERTS * shape[1] * shape[2]
    rows: list[Row] = [
        {"operator": "snap_ even, counted", "bytes": 8 * n},  # master read, copy read and written
        {"operator": "encode even", "bytes": round((4 + MXFP4_BYTES) * n)},
        {"operator": "fp8_to_mxfp4 even", "bytes": round((1 + MXFP4_BYTES) * n)},
    ]
    if gpu:
        master = torch.randn(shape, device="cuda").mul_(0.02)
        param = torch.zeros_like(master, dtype=torch.bfloat16)
        q = torch.empty(shape, dtype=torch.uint8, device="cuda").random_(0, 0x7F).view(torch.float8_e4m3fn)
        tiles = (CODEC_EXPERTS, -(-shape[1] // 128), -(-shape[2] // 128))
        scale = torch.rand(tiles, device="cuda") * 1e-4 + 1e-5
        calls: list[Callable[[], object]] = [
            lambda: mxfp4.snap_(param, master),
            lambda: mxfp4.encode(master),
            lambda: transcode.fp8_to_mxfp4(q, scale),
        ]
        for row, call in zip(rows, calls, strict=True):
            row["us"] = microseconds(call)
    return rows


# ---- clocks


def copy_bandwidth() -> float:
    """GB/s, read plus written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / microseconds(lambda: target.copy_(source)) / 1e3


def graph_microseconds(call: Callable[[int], object], flush: bool = False) -> float:
    """Median time of call(0), ... call(CALLS - 1) in one CUDA graph, a call; with `flush` from a cold cache."""
    if flush:
        other = torch.zeros(2 * L2_BYTES // 4, device="cuda")
        both = graph_microseconds(lambda c: (other.sum(), call(c)))
        return both - graph_microseconds(lambda c: other.sum())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(c) for c in range(CALLS)]
    us = microseconds(graph.replay) / CALLS
    del kept
    return us


def microseconds(step: Callable[[], object]) -> float:
    """Median time of step() on the device, by events, after a warm-up."""
    for _ in range(3):
        step()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


if __name__ == "__main__":
    main()
