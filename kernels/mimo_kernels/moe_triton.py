"""W4A16 mixture of experts for at most 16 tokens in three or four launches. The weight layout is defined in `moe`.

    _prepare_kernel   the list of distinct routed experts, their combine weights, and x in the order of the words
    _gate_up_kernel   one tile of rows of one listed expert a program; SwiGLU in registers
    _down_kernel      one tile of output rows a program, over the listed experts of a group in ascending id
    _sum_kernel       adds the parts of the down product in ascending order; not launched when there is only one

The product streams weights, and every token goes through every listed expert: weights are the M operand of the MMA, the
tokens are N (8 or 16). A token that an expert is not routed to has combine weight zero, so nothing is gathered, and a
token's bits do not depend on its neighbours. The grid covers min(T * top_k, E) experts; programs beyond the list exit.

The down product has too few rows to fill a GPU, so it is cut twice: into slices of the intermediate dimension, and into
groups of experts, which are fixed ranges of ids. A program sums the experts of a group in ascending id; the parts are
added in ascending order afterwards. No atomics, and the same bits in every run.

Instructions a weight decide the speed: at 4.3 TB/s an H200 can afford about four. Four codes share a 16-bit word from
which an AND after a shift makes two BF16 values a register, each code * 2**-126; one packed BF16 multiply by
2**(scale - 1) makes them exact. The multiply must keep BF16 subnormals (code 0.5 is one), and `mul.bf16x2` does.

The list is int16: a wider load in a loop gets pipeline stages of its own from Triton, at the cost of the weights'.

Names: m = weight rows of a tile, q = words of a row, n = tokens, u = place in the expert list.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .launch import dependent, wait

if TYPE_CHECKING:
    from .moe import PackedExperts

_WARPS = 2048  # about 16 on each of 132 multiprocessors: the fastest down product measured on an H200
_SLOTS = 16  # places in the expert list a program of _prepare_kernel
_COLUMNS = 256  # outputs a program of _sum_kernel


@dataclass(frozen=True)
class Tile:
    """Block sizes of a product: `rows` x `k` weights a step, and how many `warps` and pipeline `stages` work on it."""

    rows: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Tiles of the two products, and in how many ranges of ids the experts of the down product are cut."""

    gate_up: Tile
    down: Tile
    groups: int


TILES = (  # what `bench --sweep` tries
    Tile(64, 256, 4, 4),
    Tile(64, 256, 2, 4),
    Tile(64, 256, 2, 3),
    Tile(32, 256, 1, 4),
    Tile(128, 256, 4, 4),
    Tile(64, 512, 2, 3),
    Tile(64, 512, 4, 3),
    Tile(32, 128, 1, 4),
)
# What runs: of each product the first that divides the shape. Measured on an H200 at 57 experts of 4096 x 512, cold
# cache: gate and up 41 us with four warps, 48 us with two; down 28 us with four warps and four groups.
GATE_UP_TILES = (Tile(64, 256, 4, 4), Tile(32, 128, 1, 4))
DOWN_TILES = (Tile(64, 256, 4, 4), Tile(32, 128, 1, 4))


def config_for(hidden: int, inter: int) -> Config:
    """The configuration that runs for a padded shape. A constant of the shape: another one may give other bits."""
    gate_up = next(t for t in GATE_UP_TILES if hidden % t.k == 0)
    down = next(t for t in DOWN_TILES if inter % t.k == 0)
    warps = hidden // down.rows * (inter // down.k) * down.warps
    return Config(gate_up, down, min(8, triton.next_power_of_2(triton.cdiv(_WARPS, warps))))


@triton.jit
def _unpack(words, PTX: tl.constexpr):
    """int16 words -> the bits of four BF16 tensors, each code * 2**-126. Without PTX: float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            and.b32 $0, $4, 0x81C081C0;
            shl.b32 a, $4, 3;
            and.b32 $1, a, 0x81C081C0;
            shl.b32 a, $4, 6;
            and.b32 $2, a, 0x81C081C0;
            shl.b32 a, $4, 1;
            and.b32 a, a, 0x80008000;
            shr.b32 b, $4, 3;
            and.b32 b, b, 0x01800180;
            shr.b32 c, $4, 7;
            and.b32 c, c, 0x00400040;
            or.b32 a, a, b;
            or.b32 $3, a, c;
            }""",
            "=r,=r,=r,=r,r",
            [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        w = words.to(tl.int32)
        last = ((w << 1) & 0x8000) | ((w >> 3) & 0x0180) | ((w >> 7) & 0x0040)
        return (
            ((w & 0x81C0) << 16).to(tl.float32, bitcast=True),
            (((w << 3) & 0x81C0) << 16).to(tl.float32, bitcast=True),
            (((w << 6) & 0x81C0) << 16).to(tl.float32, bitcast=True),
            (last << 16).to(tl.float32, bitcast=True),
        )


@triton.jit
def _scaled(w, scale, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise("mul.bf16x2 $0, $1, $2;", "=r,r,r", [w, scale], tl.bfloat16, True, 2)
    else:
        return w * scale


@triton.jit
def _tokens(at, PTX: tl.constexpr):
    x = tl.load(at)
    if PTX:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _product(acc, W, S, X, row, k, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr):
    """acc [BM, BN] + weights [row : row + BM, k : k + BK] @ tokens. W, S: one matrix; X [BN]: where tokens begin."""
    m = tl.arange(0, BM)
    q = tl.arange(0, BK // 4)
    g = tl.arange(0, BK // 32)
    words = W + (row // 16 * (4 * K) + k // 128 * 512)
    words = tl.load(words + (m // 16 * (4 * K) + m % 16 * 32)[:, None] + (q // 32 * 512 + q % 32)[None, :])
    scales = S + (row // 16 * (K // 2) + k // 128 * 64)
    scales = tl.load(scales + (m // 16 * (K // 2) + m % 16 * 4)[:, None] + (g // 4 * 64 + g % 4)[None, :])
    if PTX:
        scales = (scales.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    else:
        scales = (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    scales = tl.broadcast_to(scales[:, :, None], (BM, BK // 32, 8)).reshape(BM, BK // 4)
    w0, w1, w2, w3 = _unpack(words, PTX)
    x = X[None, :] + (k + q // 32 * 128 + q % 32)[:, None]
    acc = tl.dot(_scaled(w0, scales, PTX), _tokens(x, PTX), acc)
    acc = tl.dot(_scaled(w1, scales, PTX), _tokens(x + 32, PTX), acc)
    acc = tl.dot(_scaled(w2, scales, PTX), _tokens(x + 64, PTX), acc)
    return tl.dot(_scaled(w3, scales, PTX), _tokens(x + 96, PTX), acc)


@triton.jit
def _swiglu(acc, row, BM: tl.constexpr, BN: tl.constexpr):
    """(silu(gate) * up [BM / 2, BN] of acc [BM, BN], from `row` on, and where each stands in the order of the words).

    An MMA leaves rows r and r + 8 in one thread, so this split moves nothing.
    """
    gate, up = tl.split(acc.reshape(BM // 16, 2, 8, BN).permute(0, 2, 3, 1))
    gate = gate.reshape(BM // 2, BN)
    up = up.reshape(BM // 2, BN)
    i = row // 2 + tl.arange(0, BM // 2)
    return gate / (1 + tl.exp(-gate)) * up, i // 128 * 128 + i % 4 * 32 + i % 128 // 4


@triton.jit
def _gate_up_kernel(
    HIDDEN, W, S, X, LIST,
    K: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HIDDEN bf16 [slots, BN, ROWS / 2] <- silu(gate) * up of X bf16 [BN, K] for every expert in LIST [slots].

    W int16 and S uint8 [experts, pages]: ROWS x K an expert; of 16 rows the first 8 are gates, the others their ups.
    Both X and HIDDEN are in the order of the words.
    """
    wait(PDL)
    u = tl.program_id(1)
    expert = tl.load(LIST + u).to(tl.int64)
    if expert >= 0:
        row = tl.program_id(0) * BM
        W += expert * (ROWS * K // 4)
        S += expert * (ROWS * K // 32)
        acc = tl.zeros((BM, BN), tl.float32)
        tokens = X + tl.arange(0, BN) * K
        for k in range(0, K, BK):
            acc = _product(acc, W, S, tokens, row, k, K, BM, BK, PTX)
        h, at = _swiglu(acc, row, BM, BN)
        n = tl.arange(0, BN)
        tl.store(HIDDEN + u * (BN * ROWS // 2) + n[None, :] * (ROWS // 2) + at[:, None], h.to(tl.bfloat16))


@triton.jit
def _down_kernel(
    OUT, W, S, HIDDEN, LIST, COMBINE, slots, columns, tokens,
    K: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT [groups, slices, tokens, columns] <- sum over a group of COMBINE[u, n] * (W[LIST[u]] @ HIDDEN[u, n]).

    W int16, S uint8 [experts, pages]: ROWS x K an expert. HIDDEN bf16 [slots, BN, K], COMBINE float32 [slots, BN].
    A program has BM rows, a slice of BK of the K products of an expert, and a group of experts.
    """
    wait(PDL)
    row = tl.program_id(0) * BM
    k = tl.program_id(1) * BK
    bounds = LIST + slots + tl.program_id(2)
    n = tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for u in range(tl.load(bounds).to(tl.int32), tl.load(bounds + 1).to(tl.int32)):
        expert = tl.load(LIST + u).to(tl.int64)
        at, scales = W + expert * (ROWS * K // 4), S + expert * (ROWS * K // 32)
        part = tl.zeros((BM, BN), tl.float32)
        part = _product(part, at, scales, HIDDEN + u * (BN * K) + n * K, row, k, K, BM, BK, PTX)
        weight = tl.load(COMBINE + u * BN + n)[None, :]
        acc += tl.where(weight != 0, part * weight, 0.0)  # what is not routed may be inf
    part_id = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    column = row + tl.arange(0, BM)
    at = OUT + part_id * tokens * columns + n[None, :] * columns + column[:, None]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=(n[None, :] < tokens) & (column[:, None] < columns))


@triton.jit
def _list_experts(
    LIST, COMBINE, IDS, WEIGHTS, slots, experts, groups, tokens, maker,
    TOP_K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """SLOTS places of LIST and COMBINE; maker 0 also writes where the groups begin."""
    p = tl.arange(0, P)
    n = tl.arange(0, BN)
    given = p < tokens * TOP_K
    ids = tl.load(IDS + p, mask=given, other=experts).to(tl.int32)
    earlier = p[:, None] < p[None, :]
    first = (tl.sum(((ids[:, None] == ids[None, :]) & earlier).to(tl.int32), axis=0) == 0) & given
    place = tl.sum(((ids[:, None] < ids[None, :]) & first[:, None]).to(tl.int32), axis=0)
    u = maker * SLOTS + tl.arange(0, SLOTS)
    expert = tl.max(tl.where((place[:, None] == u[None, :]) & given[:, None], ids[:, None], -1), axis=0)
    tl.store(LIST + u, expert.to(tl.int16), mask=u < slots)
    if maker == 0:
        g = tl.arange(0, SLOTS)
        before = first[:, None] & (ids[:, None] < (g * experts // groups)[None, :])
        tl.store(LIST + slots + g, tl.sum(before.to(tl.int32), axis=0).to(tl.int16), mask=g <= groups)
    weight = tl.zeros((SLOTS, BN), tl.float32)
    for j in tl.static_range(TOP_K):
        routed = tl.load(IDS + n * TOP_K + j, mask=n < tokens, other=experts).to(tl.int32)
        w = tl.load(WEIGHTS + n * TOP_K + j, mask=n < tokens, other=0.0)
        weight += tl.where(expert[:, None] == routed[None, :], w[None, :], 0.0)
    tl.store(COMBINE + u[:, None] * BN + n[None, :], weight, mask=(u < slots)[:, None])


@triton.jit
def _prepare_kernel(
    LIST, COMBINE, OUT, IDS, WEIGHTS, X, slots, experts, groups, tokens, columns,
    K: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """LIST int16 [slots + groups + 1]: the distinct IDS ascending, then -1; where groups of experts begin and end.

    IDS [tokens, TOP_K], WEIGHTS float32 [tokens, TOP_K], COMBINE float32 [slots, BN]; P >= tokens * TOP_K is a power of
    two, groups < SLOTS. Group g has the ids from g * experts // groups on. A program of the first ones makes SLOTS
    places of the list, each of the others 128 columns of OUT bf16 [BN, K]: X bf16 [tokens, columns] in the order of the
    words, then zeros. Loops are unrolled, so that the loads of a program wait for memory once, not once a step.
    """
    wait(PDL)
    makers = tl.cdiv(slots, SLOTS)
    pid = tl.program_id(0)
    if pid < makers:
        _list_experts(
            LIST, COMBINE, IDS, WEIGHTS, slots, experts, groups, tokens, pid, TOP_K, P, BN, SLOTS,
        )  # fmt: skip
    else:
        n = tl.arange(0, BN)
        at = (pid - makers) * 128 + tl.arange(0, 128)
        column = at // 128 * 128 + at % 32 * 4 + at % 128 // 32
        mask = (n < tokens)[:, None] & (column < columns)[None, :]
        x = tl.load(X + n[:, None] * columns + column[None, :], mask=mask, other=0.0)
        tl.store(OUT + n[:, None] * K + at[None, :], x)


@triton.jit
def _sum_kernel(OUT, PARTS, size, COUNT: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr):
    """OUT bf16 [size] <- PARTS float32 [COUNT, size], summed in ascending order."""
    wait(PDL)
    at = tl.program_id(0) * N + tl.arange(0, N)
    acc = tl.load(PARTS + at, mask=at < size, other=0.0)
    for part in tl.static_range(1, COUNT):
        acc += tl.load(PARTS + part * size + at, mask=at < size, other=0.0)
    tl.store(OUT + at, acc.to(tl.bfloat16), mask=at < size)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` makes for the products."""

    list: torch.Tensor  # int16 [slots + groups + 1]: distinct ids ascending, then -1; where each group begins, the end
    combine: torch.Tensor  # float32 [slots, N]
    x: torch.Tensor  # bfloat16 [N, Hp], in the order of the words


def prepare(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: "PackedExperts", config: Config
) -> Prepared:
    """List of experts, combine weights and permuted activations; all shapes follow from those of the arguments."""
    tokens, top_k = ids.shape
    count, (hidden, _) = len(experts.down), experts.padded
    n = 8 if tokens <= 8 else 16
    slots = min(tokens * top_k, count)
    out = Prepared(
        torch.empty(slots + config.groups + 1, dtype=torch.int16, device=x.device),
        torch.empty(slots, n, dtype=torch.float32, device=x.device),
        torch.empty(n, hidden, dtype=torch.bfloat16, device=x.device),
    )
    assert config.groups < _SLOTS
    p = triton.next_power_of_2(tokens * top_k)
    _prepare_kernel[(triton.cdiv(slots, _SLOTS) + hidden // 128,)](
        out.list, out.combine, out.x, ids.contiguous(), weights.contiguous(), x.contiguous(),
        slots, count, config.groups, tokens, x.shape[1], hidden, top_k, p, n, _SLOTS, **dependent(x),
    )  # fmt: skip
    return out


def gate_up(prepared: Prepared, experts: "PackedExperts", config: Config) -> torch.Tensor:
    """bfloat16 [slots, N, Ip]: silu(gate) * up of every token under each listed expert; other slots are not written."""
    (slots, n), (hidden, inter), t = prepared.combine.shape, experts.padded, config.gate_up
    out = torch.empty(slots, n, inter, dtype=torch.bfloat16, device=prepared.x.device)
    _gate_up_kernel[(2 * inter // t.rows, slots)](
        out, experts.gate_up, experts.gate_up_scales, prepared.x, prepared.list, hidden, 2 * inter,
        t.rows, n, t.k, out.is_cuda, **dependent(out), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


def down(
    hidden_states: torch.Tensor, prepared: Prepared, experts: "PackedExperts", config: Config, tokens: int
) -> torch.Tensor:
    """bfloat16 [tokens, H]: the down product of `gate_up`'s output, combined."""
    (slots, n), (hidden, inter), t = prepared.combine.shape, experts.padded, config.down
    device, slices = prepared.x.device, inter // t.k
    out = torch.empty(tokens, experts.hidden, dtype=torch.bfloat16, device=device)
    count = config.groups * slices
    parts = out if count == 1 else torch.empty(count, *out.shape, dtype=torch.float32, device=device)
    _down_kernel[(hidden // t.rows, slices, config.groups)](
        parts, experts.down, experts.down_scales, hidden_states, prepared.list, prepared.combine,
        slots, experts.hidden, tokens, inter, hidden,
        t.rows, n, t.k, out.is_cuda, **dependent(out), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if count > 1:
        sum_parts(out, parts)
    return out


def sum_parts(out: torch.Tensor, parts: torch.Tensor) -> None:
    """out bfloat16 [...] <- the sum of parts float32 [count, ...] in ascending order, both contiguous."""
    grid = (triton.cdiv(out.numel(), _COLUMNS),)
    _sum_kernel[grid](out, parts, out.numel(), len(parts), _COLUMNS, **dependent(out))


def moe(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: "PackedExperts", config: Config | None = None
) -> torch.Tensor:
    """`moe.moe` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    config = config or config_for(*experts.padded)
    with torch.cuda.device_of(x):
        prepared = prepare(x, ids, weights, experts, config)
        return down(gate_up(prepared, experts, config), prepared, experts, config, len(x))
