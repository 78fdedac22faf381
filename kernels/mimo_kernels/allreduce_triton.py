"""The one-shot sum over mapped buffers as Triton kernels, one launch a rank. `allreduce` defines it and its words.

    _sum_kernel           one cell a program: 64 programs of 128 threads for 8 rows of 4096
    _sum_add_norm_kernel  one row a program, with the residual and the norm that follow; `norm_cuda` shares a row
                          between blocks, where it has the shape

A thread sends its packet to all ranks, then polls the packets of all ranks at one place of its own buffer, all loads
under way at once, until every flag is the epoch. The loop is in PTX: Triton's own `while` would reduce over the
program, with barriers, in each round of polling.

Memory order. A flag and the two BF16 that it vouches for are one 64-bit element of a relaxed store at system scope, and
are read by one 64-bit element of a relaxed load: such an element is read whole or not at all, so a flag needs no fence.
Nothing else is ordered, and nothing else has to be: packets may come in any order.

Two halves are enough. A rank sends epoch e of a cell only after its launch of epoch e - 1 has ended, which waited for
everybody's packets of e - 1, and those were sent after their launches of e - 2 had ended. So when the half of e (and of
e - 2) is written again, nobody reads it any more. That holds for each cell alone: launches of different sizes may
follow each other, as long as all ranks launch the same. It needs that a launch sends nothing before the one before it
has ended: with programmatic dependent launch that is what `wait` is for, the first thing that touches memory.

A wait is bounded. When it ends in vain, the words `failed` get 1 + the lowest rank that did not come; a launch that
finds one sends nothing and polls once, so what follows in a graph passes at once, and no other rank takes a wrong sum
for a right one: it comes to the end of its own wait.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from .allreduce import CELL, CLOCK_HZ, PACKET, Channel
from .launch import dependent, prefetch_span, wait

# PTX: $2 four BF16, stored at $1 with the epoch $3 beside each pair, unless $4 says to skip it. $0 is of no use.
SEND = tl.constexpr("""{
    .reg .pred send;
    .reg .b32 low, high;
    .reg .b64 first, second;
    setp.eq.s32 send, $4, 0;
    mov.b64 {low, high}, $2;
    mov.b64 first, {low, $3};
    mov.b64 second, {high, $3};
    @send st.relaxed.sys.global.v2.b64 [$1], {first, second};
    mov.b32 $0, 0;
}""")


@cache
def receive_ptx(ranks: int, stride: int) -> str:
    """PTX: polls one packet of each source, `stride` bytes apart, and adds them in the order of the ranks.

    $0 <- four BF16, $1 <- 1 + the lowest rank that did not come, or 0. $2 address of source 0, $3 epoch, $4 not 0 where
    there is nothing to wait for, $5 cycles of the clock after which to give up.
    """

    def each(line: str, sources: range = range(ranks)) -> str:
        return "\n".join(line.replace("#", str(r)) for r in sources)

    loads = "\n".join(f"ld.relaxed.sys.global.v2.b64 {{a{r}, b{r}}}, [$2 + {r * stride}];" for r in range(ranks))
    flags = each("mov.b64 {w#, f#}, a#; mov.b64 {x#, g#}, b#;")
    waits = each("setp.ne.or.s32 wait, f#, $3, wait; setp.ne.or.s32 wait, g#, $3, wait;")
    missing = "\n".join(
        f"setp.ne.s32 wait, f{r}, $3; setp.ne.or.s32 wait, g{r}, $3, wait; @wait mov.b32 late, {r + 1};"
        for r in reversed(range(ranks))
    )
    widen = "shl.b32 p#, w#, 16; and.b32 q#, w#, 0xFFFF0000; shl.b32 r#, x#, 16; and.b32 s#, x#, 0xFFFF0000;"
    add = "; ".join(f"add.rn.f32 {v}0, {v}0, {v}#" for v in "pqrs") + ";"
    names = ", ".join(f"{v}{r}" for r in range(ranks) for v in "wxfgpqrs")
    pairs = ", ".join(f"a{r}, b{r}" for r in range(ranks))
    return f"""{{
    .reg .pred wait, more;
    .reg .b32 late, {names};
    .reg .b64 now, end, {pairs};
    mov.u64 now, %clock64;
    add.u64 end, now, $5;
    mov.b32 late, 0;
    AGAIN:
    {loads}
    {flags}
    setp.ne.s32 wait, 0, 0;
    {waits}
    setp.eq.and.s32 wait, $4, 0, wait;
    @!wait bra DONE;
    mov.u64 now, %clock64;
    setp.lt.u64 more, now, end;
    @more bra AGAIN;
    {missing}
    DONE:
    {each(widen)}
    {each(add, range(1, ranks))}
    cvt.rn.bf16x2.f32 w0, q0, p0;
    cvt.rn.bf16x2.f32 x0, s0, r0;
    mov.b64 $0, {{w0, x0}};
    mov.b32 $1, late;
}}"""


@triton.jit
def _widen(words):
    """int32 words -> the float32 of their low and of their high BF16."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(low, high, PTX: tl.constexpr):
    """float32 -> int32 words of two BF16, rounded to nearest even."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )
    else:  # the interpreter truncates
        a = low.to(tl.int32, bitcast=True)
        b = high.to(tl.int32, bitcast=True)
        a = (a + 0x7FFF + ((a >> 16) & 1)) >> 16
        b = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        return (a & 0xFFFF) | (b << 16)


@triton.jit
def _split(packets):
    """int64 -> their low and high int32."""
    return packets.to(tl.int32), (packets >> 32).to(tl.int32)


@triton.jit
def _unite(low, high):
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def _send(PEERS, x, slot, epoch, skip, RANKS: tl.constexpr, PTX: tl.constexpr):
    """Stores the packets of x int64 with their epoch at `slot` of the buffer of every rank, but those to skip."""
    for r in tl.static_range(RANKS):
        peer = tl.load(PEERS + r).to(tl.pointer_type(tl.int64)) + slot * 2
        if PTX:
            tl.inline_asm_elementwise(SEND, "=r,l,l,r,r", [peer, x, epoch, skip], tl.int32, is_pure=False, pack=1)
        else:
            low, high = _split(x)
            tl.store(peer, _unite(low, epoch), mask=skip == 0)
            tl.store(peer + 1, _unite(high, epoch), mask=skip == 0)


@triton.jit
def _receive(mine, epoch, skip, cycles, RANKS: tl.constexpr, CAPACITY: tl.constexpr, RECEIVE: tl.constexpr):
    """(sums int64, 1 + a rank that did not come or 0) of the packets at `mine` and at CAPACITY packets further each.

    Without RECEIVE, for the interpreter, whose programs run one after another: looks once instead of waiting.
    """
    if RECEIVE is not None:
        return tl.inline_asm_elementwise(
            RECEIVE, "=l,=r,l,r,r,l", [mine, epoch, skip, cycles], (tl.int64, tl.int32), is_pure=False, pack=1
        )
    else:
        late = skip * 0
        for back in tl.static_range(RANKS):
            r: tl.constexpr = RANKS - 1 - back
            _, flag = _split(tl.load(mine + r * CAPACITY * 2))
            _, again = _split(tl.load(mine + r * CAPACITY * 2 + 1))
            late = tl.where(((flag != epoch) | (again != epoch)) & (skip == 0), r + 1, late)
        word, _ = _split(tl.load(mine))
        a, b = _widen(word)
        word, _ = _split(tl.load(mine + 1))
        c, d = _widen(word)
        for r in tl.static_range(1, RANKS):
            word, _ = _split(tl.load(mine + r * CAPACITY * 2))
            low, high = _widen(word)
            a += low
            b += high
            word, _ = _split(tl.load(mine + r * CAPACITY * 2 + 1))
            low, high = _widen(word)
            c += low
            d += high
        return _unite(_narrow(a, b, False), _narrow(c, d, False)), late


@triton.jit
def _sum_of_parts(X, at, valid, PARTS: tl.constexpr, PER_ROW: tl.constexpr, PTX: tl.constexpr):
    """Packets `at` of the sums over PARTS, in order, of X int64 [rows, PARTS, PER_ROW * 2] of two float32 each."""
    at = (at // PER_ROW * PARTS * PER_ROW + at % PER_ROW) * 2
    first, second = _split(tl.load(X + at, mask=valid, other=0))
    a = first.to(tl.float32, bitcast=True)
    b = second.to(tl.float32, bitcast=True)
    first, second = _split(tl.load(X + at + 1, mask=valid, other=0))
    c = first.to(tl.float32, bitcast=True)
    d = second.to(tl.float32, bitcast=True)
    for part in tl.static_range(1, PARTS):
        first, second = _split(tl.load(X + at + part * PER_ROW * 2, mask=valid, other=0))
        a += first.to(tl.float32, bitcast=True)
        b += second.to(tl.float32, bitcast=True)
        first, second = _split(tl.load(X + at + part * PER_ROW * 2 + 1, mask=valid, other=0))
        c += first.to(tl.float32, bitcast=True)
        d += second.to(tl.float32, bitcast=True)
    return _unite(_narrow(a, b, PTX), _narrow(c, d, PTX))


@triton.jit
def _exchange(
    X, PEERS, EPOCHS, FAILED, FAILED_HOST, rank, cycles, at, valid,
    RANKS: tl.constexpr, CAPACITY: tl.constexpr, SPACE: tl.constexpr, RECEIVE: tl.constexpr, PHASE: tl.constexpr,
    PARTS: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """The sums int64 of the packets `at` of X int64, where `valid`. The program owns the SPACE cells that these are in.

    With PARTS > 0, X is the float32 [rows, PARTS, 4 * PER_ROW] whose sums over PARTS are the packets.

    PHASE 0 does all; 1 only sends and 2 only receives, for ranks that take turns in one thread.
    """
    at = tl.where(valid, at, 0)
    epoch = tl.load(EPOCHS + at // SPACE) + 1
    failed = tl.load(FAILED)
    skip = tl.where(valid & (failed == 0), 0, 1)
    half = (epoch & 1) * RANKS * CAPACITY
    if PHASE != 2:
        if PARTS > 0:
            x = _sum_of_parts(X, at, valid, PARTS, PER_ROW, RECEIVE is not None)
        else:
            x = tl.load(X + at, mask=valid, other=0)
        _send(PEERS, x, half + rank * CAPACITY + at, epoch, skip, RANKS, RECEIVE is not None)
    sums = tl.zeros_like(at).to(tl.int64)
    if PHASE != 1:
        if RECEIVE is not None:
            tl.debug_barrier()  # every thread of the program has its epochs before one of them advances them
        mine = tl.load(PEERS + rank).to(tl.pointer_type(tl.int64)) + (half + at) * 2
        sums, late = _receive(mine, epoch, skip, cycles.to(tl.int64), RANKS, CAPACITY, RECEIVE)
        tl.store(FAILED + at * 0, late, mask=late != 0)
        tl.store(FAILED_HOST + at * 0, late, mask=late != 0)
        tl.store(EPOCHS + at // SPACE, epoch, mask=valid & (at % SPACE == 0))
    return sums


@triton.jit(do_not_specialize=["packets", "rank", "cycles"])
def _sum_kernel(
    OUT, X, PEERS, EPOCHS, FAILED, FAILED_HOST, packets, rank, cycles,
    RANKS: tl.constexpr, CAPACITY: tl.constexpr, SPACE: tl.constexpr, RECEIVE: tl.constexpr, PHASE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """OUT int64 [packets] <- the sum over the ranks of X int64 [packets], four BF16 each; SPACE packets a program."""
    wait(PDL)
    at = tl.program_id(0) * SPACE + tl.arange(0, SPACE)
    sums = _exchange(
        X, PEERS, EPOCHS, FAILED, FAILED_HOST, rank, cycles, at, at < packets, RANKS, CAPACITY, SPACE, RECEIVE, PHASE,
        0, 1,
    )  # fmt: skip
    if PHASE != 1:
        tl.store(OUT + at, sums, mask=at < packets)


@triton.jit(do_not_specialize=["rank", "cycles"])
def _sum_add_norm_kernel(
    OUT, NORMED, X, RESIDUAL, WEIGHT, PEERS, EPOCHS, FAILED, FAILED_HOST, rank, cycles, eps, PER_ROW: tl.constexpr,
    RANKS: tl.constexpr, CAPACITY: tl.constexpr, SPACE: tl.constexpr, RECEIVE: tl.constexpr, PHASE: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT <- RESIDUAL + the sum of X, NORMED <- its RMSNorm times WEIGHT; all int64 of four BF16, PER_ROW a row."""
    o = tl.arange(0, BLOCK)
    valid = o < PER_ROW
    if PDL:
        prefetch_span(WEIGHT, PER_ROW)
    wait(PDL)
    at = tl.program_id(0) * PER_ROW + o
    PTX: tl.constexpr = RECEIVE is not None
    sums = _exchange(
        X, PEERS, EPOCHS, FAILED, FAILED_HOST, rank, cycles, at, valid, RANKS, CAPACITY, SPACE, RECEIVE, PHASE,
        PARTS, PER_ROW,
    )  # fmt: skip
    if PHASE != 1:
        sum_low, sum_high = _split(sums)
        low, high = _split(tl.load(RESIDUAL + at, mask=valid, other=0))
        a, b = _widen(sum_low)
        c, d = _widen(sum_high)
        a1, b1 = _widen(low)
        c1, d1 = _widen(high)
        low = _narrow(a + a1, b + b1, PTX)
        high = _narrow(c + c1, d + d1, PTX)
        tl.store(OUT + at, _unite(low, high), mask=valid)
        a, b = _widen(low)
        c, d = _widen(high)
        squares = tl.where(valid, (a * a + b * b) + (c * c + d * d), 0.0)
        scale = tl.rsqrt(tl.sum(squares, 0) / (PER_ROW * 4) + eps)
        a, b = _widen(_narrow(a * scale, b * scale, PTX))
        c, d = _widen(_narrow(c * scale, d * scale, PTX))
        low, high = _split(tl.load(WEIGHT + o, mask=valid, other=0))
        a1, b1 = _widen(low)
        c1, d1 = _widen(high)
        tl.store(NORMED + at, _unite(_narrow(a * a1, b * b1, PTX), _narrow(c * c1, d * d1, PTX)), mask=valid)


def _arguments(channel: Channel) -> tuple:
    """(pointers, rank and cycles, constants) that both kernels get."""
    packets = channel.elements // PACKET
    pointers = (channel.peers, channel.epochs, channel.failed, channel.failed_host)
    receive = receive_ptx(channel.ranks, packets * 16) if channel.peers.is_cuda else None
    return pointers, (channel.rank, int(channel.seconds * CLOCK_HZ)), (channel.ranks, packets, CELL, receive)


def all_reduce(x: torch.Tensor, channel: Channel, phase: int = 0) -> torch.Tensor:
    """`allreduce.all_reduce` for checked arguments (or, in Triton's interpreter, for CPU ones and in two phases)."""
    pointers, numbers, constants = _arguments(channel)
    packets, out = x.numel() // PACKET, torch.empty_like(x)
    with torch.cuda.device_of(x):
        _sum_kernel[(triton.cdiv(packets, CELL),)](
            out.view(torch.int64), x.view(torch.int64), *pointers, packets, *numbers, *constants, phase,
            **dependent(x), num_warps=4,
        )  # fmt: skip
    return out


def all_reduce_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, channel: Channel, phase: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`allreduce.all_reduce_add_norm`, as `all_reduce`."""
    pointers, numbers, constants = _arguments(channel)
    per_row, out, normed = x.shape[-1] // PACKET, torch.empty_like(residual), torch.empty_like(residual)
    parts = len(x) if x.ndim == 3 else 0
    block = triton.next_power_of_2(per_row)
    x = x.transpose(0, 1) if parts else x
    tensors = (t.view(torch.int64) for t in (out, normed, x, residual, weight))
    with torch.cuda.device_of(x):
        _sum_add_norm_kernel[(len(residual),)](
            *tensors, *pointers, *numbers, eps, per_row, *constants, phase, block, parts,
            **dependent(x), num_warps=min(32, block // 32),
        )  # fmt: skip
    return out, normed
