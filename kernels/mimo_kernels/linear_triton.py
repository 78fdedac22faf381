"""W8A16 and W16A16 products for at most 16 tokens, in one launch or two. `linear` defines them.

    _linear_kernel        one tile of rows and one slice of K a program
    moe_triton.sum_parts  adds the slices in ascending order; not launched when there is only one
    _unpack_kernel        the values of an FP8 weight, for products of more tokens

As in `moe_triton`, weights stream from memory and are the M operand of the MMA, the tokens are N (8 or 16). A matrix
of a few thousand rows has too few tiles for a GPU, so K is cut as well, at the price of the second launch.

An E4M3 byte becomes BF16 by moving its sign to bit 15 and its other seven bits to 10..4, which is code * 2**-120, and a
packed multiply by 2**120: five instructions for two weights, and exact, E4M3 subnormals included. (Those are BF16
subnormals on the way; `mul.bf16x2` keeps them.) NaN codes become 480: no weight file has them.

Names: m = weight rows of a tile, n = tokens, k = position in a step of K.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .fp8 import BLOCK
from .launch import LINE_BYTES, dependent, prefetch, prefetch_rows, prefetched_lines, wait
from .linear import GROUP_ROWS, Fp8Weight
from .moe_triton import Tile, sum_parts

_WARPS = 2048  # about 16 on each of 132 multiprocessors, as in the down product of `moe_triton`


@dataclass(frozen=True)
class Config:
    """The tile of the product, and in how many slices K is cut."""

    tile: Tile
    slices: int


FP8_TILES = (  # what `bench --sweep` tries; the first runs. A step of K has one scale a row: 128.
    Tile(64, 128, 2, 4),  # four warps may get WGMMA, for which Triton copies and unpacks bytes in smaller pieces
    Tile(64, 128, 2, 6),
    Tile(64, 128, 4, 4),
    Tile(32, 128, 2, 4),
    Tile(32, 128, 2, 6),
    Tile(32, 128, 1, 6),
    Tile(16, 128, 1, 8),
)
BF16_TILES = (  # of these runs the first that divides K
    Tile(64, 128, 4, 4),
    Tile(64, 64, 4, 6),
    Tile(64, 256, 4, 3),
    Tile(32, 256, 2, 4),
    Tile(32, 128, 2, 5),
    Tile(16, 256, 1, 4),
)


def config_for(n: int, k: int, fp8: bool) -> Config:
    """What runs for a weight [n, k]: slices of at least `stages` steps. A constant of the shape."""
    tile = next(t for t in (FP8_TILES if fp8 else BF16_TILES) if k % t.k == 0)
    slices = 1
    while (
        triton.cdiv(n, tile.rows) * tile.warps * slices * 2 <= _WARPS
        and k % (tile.k * slices * 2) == 0
        and k // (slices * 2) >= tile.k * tile.stages
    ):
        slices *= 2
    return Config(tile, slices)


@triton.jit
def _from_e4m3(codes, PTX: tl.constexpr):
    """uint8 codes -> their values in BF16, exactly. Without PTX: float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, s;
            mov.b32 s, 0x7B807B80;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.b32 c, a, 4;
            and.b32 a, a, 0x80008000;
            and.b32 c, c, 0x07F007F0;
            or.b32 a, a, c;
            mul.bf16x2 $0, a, s;
            shr.b32 d, b, 4;
            and.b32 b, b, 0x80008000;
            and.b32 d, d, 0x07F007F0;
            or.b32 b, b, d;
            mul.bf16x2 $1, b, s;
            }""",
            "=r,=r,r",
            [codes],
            tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        c = codes.to(tl.int32)
        bits = ((c & 0x80) << 24) | ((c & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def _linear_kernel(
    OUT, W, SCALES, X, rows, tokens, steps,
    K: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT [slices, tokens, rows] <- X bf16 [tokens, K] times W [rows, K] transposed, a slice of BK * steps a program.

    W is bf16, or uint8 with SCALES float32 [ceil(rows / GROUP), K / BK]; BM divides GROUP.
    With PDL, a program asks early for the first LINES cache lines of its part of each row.
    """
    row = tl.program_id(0) * BM
    begin = tl.program_id(1) * steps * BK
    m = tl.minimum(row + tl.arange(0, BM), rows - 1)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)
    w_at = W + m[:, None] * K + begin + k[None, :]
    x_at = X + n[None, :] * K + begin + k[:, None]
    scale_at = SCALES + row // GROUP * (K // BK) + tl.program_id(1) * steps
    if PDL:
        prefetch_rows(W + m * K + begin, LINES, LINE_BYTES * 8 // W.dtype.element_ty.primitive_bitwidth)
        if FP8:
            prefetch(scale_at)
    wait(PDL)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(steps):  # not a constant: the compiler would unroll it
        w = tl.load(w_at + step * BK)
        x = tl.load(x_at + step * BK, mask=(n < tokens)[None, :], other=0.0)
        if not PTX:
            x = x.to(tl.float32)
        if FP8:
            scale = tl.load(scale_at + step)
            acc += tl.dot(_from_e4m3(w, PTX), x) * scale
        elif PTX:
            acc = tl.dot(w, x, acc)
        else:
            acc = tl.dot(w.to(tl.float32), x, acc)
    column = row + tl.arange(0, BM)
    at = OUT + (tl.program_id(1) * tokens + n[None, :]) * rows + column[:, None]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=(n < tokens)[None, :] & (column < rows)[:, None])


@triton.jit
def _unpack_kernel(OUT, W, SCALES, rows, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr):
    """OUT bf16 [rows, K] <- W uint8 [rows, K] times SCALES float32 [ceil(rows / BM), K / BK], rounded once."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    at = row.to(tl.int64)[:, None] * K + tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    scale = tl.load(SCALES + tl.program_id(0) * (K // BK) + tl.program_id(1))
    codes = tl.load(W + at, mask=(row < rows)[:, None], other=0)
    tl.store(OUT + at, (_from_e4m3(codes, PTX).to(tl.float32) * scale).to(tl.bfloat16), mask=(row < rows)[:, None])


def unpack_fp8(w: Fp8Weight) -> torch.Tensor:
    """`linear.unpack_fp8` for CUDA (or, in Triton's interpreter, for CPU) weights."""
    n, k = w.shape
    out = torch.empty(n, k, dtype=torch.bfloat16, device=w.codes.device)
    with torch.cuda.device_of(out):
        _unpack_kernel[(triton.cdiv(n, GROUP_ROWS), k // BLOCK)](
            out, w.codes.view(torch.uint8), w.scales, n, k, GROUP_ROWS, BLOCK, out.is_cuda
        )
    return out


def linear(x: torch.Tensor, w: torch.Tensor | Fp8Weight, config: Config | None = None) -> torch.Tensor:
    """`linear.linear` for checked CUDA arguments (or, in Triton's interpreter, for CPU ones)."""
    fp8 = isinstance(w, Fp8Weight)
    weight, scales = (w.codes.view(torch.uint8), w.scales) if isinstance(w, Fp8Weight) else (w, w)
    n, k = weight.shape
    config = config or config_for(n, k, fp8)
    tile, slices = config.tile, config.slices
    assert k % (tile.k * slices) == 0 and weight.numel() < 2**31
    assert not fp8 or (tile.k == BLOCK and GROUP_ROWS % tile.rows == 0)
    x = x.contiguous()
    out = torch.empty(len(x), n, dtype=torch.bfloat16, device=x.device)
    parts = out if slices == 1 else torch.empty(slices, *out.shape, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _linear_kernel[(triton.cdiv(n, tile.rows), slices)](
            parts, weight, scales, x, n, len(x), k // (tile.k * slices), k, fp8, GROUP_ROWS,
            tile.rows, 8 if len(x) <= 8 else 16, tile.k, x.is_cuda,
            prefetched_lines(tile.rows, k // slices * weight.element_size()), **dependent(x),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if slices > 1:
            sum_parts(out, parts)
    return out
