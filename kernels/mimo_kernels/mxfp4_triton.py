"""One-pass Triton kernels for MXFP4: snap, encode, decode. Bit-identical to `mxfp4`, which calls them for CUDA tensors.

Values are rounded on their integer bits, never with float arithmetic: a power-of-two scale only moves the exponent
field, so no kernel depends on how a device treats subnormals, fuses a multiply into an add or evaluates exp2. The one
exception is the error that the `mse` rule compares; it sums in the fixed order of `mxfp4._block_sum`, with fusion off,
and only over elements that are far from underflow.

Blocks never cross a row, so the kernels see a weight of any rank as [blocks, 32]; a program handles N of them.
Names: suffix _N = one value a block; mag = float32 bits of |x|; k = the exponent of the scale.
"""

import torch
import triton
import triton.language as tl

from . import mxfp4

_TILE = 128  # blocks a program


@triton.jit
def _exponents(amax_N, RULE: tl.constexpr):
    """k of integer amax bits; the smaller candidate for mse."""
    carry: tl.constexpr = (1 << 21) if RULE == "even" else ((1 << 22) - 1 if RULE == "rceil" else 0)
    k_N = ((amax_N + carry) >> 23) - 129
    return tl.minimum(tl.maximum(k_N, -126), 125)


@triton.jit
def _scaled_bits(mag, k):
    """Float32 bits of |x| / 2**k. Exact from 0.25 up; anything that sorts below 0.25 otherwise (negative, too)."""
    # A subnormal |x| = mag * 2**-149 is normalised by the conversion. Where it is not tiny, k is far below 0.
    subnormal = mag.to(tl.float32).to(tl.int32, bitcast=True) - ((tl.minimum(k, 0) + 149) << 23)
    return tl.where(mag < 0x00800000, subnormal, mag - (k << 23))


@triton.jit
def _index(y):
    """Grid index 0..7 of float32 bits y >= 0: round to nearest, ties to even, saturate."""
    from_one = ((y + 0x1FFFFF + ((y >> 22) & 1)) >> 22) - 252  # keep one mantissa bit; 1.0 is index 2
    below_one = (y > 0x3E800000).to(tl.int32) + (y >= 0x3F400000).to(tl.int32)  # 0.25 ties down to 0, 0.75 ties up to 1
    return tl.where(y >= 0x3F800000, tl.minimum(from_one, 7), below_one)


@triton.jit
def _value(index):
    """float32 grid value of an index."""
    normal = (((index >> 1) + 126) << 23) | ((index & 1) << 22)
    return tl.where(index < 2, index.to(tl.float32) * 0.5, normal.to(tl.float32, bitcast=True))


@triton.jit
def _block_sum(e, N: tl.constexpr):
    """[N, 32] -> [N], first half + second half, five times: the order of mxfp4._block_sum."""
    for half in tl.static_range(5):
        e = e.reshape(N, 2, 16 >> half).permute(0, 2, 1)
        low, high = tl.split(e)
        e = low + high
    return e.reshape(N)


@triton.jit
def _better_exponents(mag, k_N, N: tl.constexpr):
    """The mse rule: k or k + 1, whichever has the smaller squared error; k on a tie."""
    up_N = tl.minimum(k_N + 1, 125)
    y = _scaled_bits(mag, k_N[:, None])
    y = tl.where(y > 0x3E800000, y, 0)  # both round these to 0: the same error, left out
    v = y.to(tl.float32, bitcast=True)
    ratio = tl.where(up_N > k_N, 2.0, 1.0)[:, None]
    low = v - _value(_index(y))
    high = v - _value(_index(tl.maximum(y - ((up_N - k_N) << 23)[:, None], 0))) * ratio
    return tl.where(_block_sum(low * low, N) <= _block_sum(high * high, N), k_N, up_N)


@triton.jit
def _quantize(W, rows_N, mask_N, RULE: tl.constexpr, N: tl.constexpr):
    """(index [N, 32], negative [N, 32], k [N], amax bits [N], finite [N]) of weights W: bits of float32 or bfloat16."""
    offsets = rows_N[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(W + offsets, mask=mask_N[:, None], other=0).to(tl.int32)
    if W.dtype.element_ty == tl.int16:
        x = x << 16
    mag = x & 0x7FFFFFFF
    amax_N = tl.max(mag, axis=1)
    finite_N = amax_N < 0x7F800000
    k_N = _exponents(tl.where(finite_N, amax_N, 0), RULE)
    if RULE == "mse":
        k_N = _better_exponents(tl.where(finite_N[:, None], mag, 0), k_N, N)
    index = _index(_scaled_bits(mag, k_N[:, None]))
    return index, (x < 0) & (index > 0), k_N, amax_N, finite_N


@triton.jit
def _bf16_bits(index, k):
    """Bits of the bfloat16 |value| = grid[index] * 2**k, k in [-127, 127]; inf beyond the largest bfloat16."""
    e = k + 126 + (index >> 1)  # biased exponent; index 1 is 1.0 * 2**(k - 1), so the formula holds for it, too
    significand = 0x80 | tl.where(index > 1, (index & 1) << 6, 0)
    normal = tl.where(e < 255, (e << 7) | (significand & 0x7F), 0x7F80)
    subnormal = significand >> tl.maximum(1 - e, 0)
    return tl.where(index == 0, 0, tl.where(e > 0, normal, subnormal))


@triton.jit
def _snap_kernel(OUT, W, COUNTS, blocks, RULE: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr):
    """OUT int16 [blocks, 32] (bfloat16 bits) <- snapped W. COUNTS int64 [2] += changed elements, non-finite blocks."""
    rows_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask_N = rows_N < blocks
    index, negative, k_N, _, finite_N = _quantize(W, rows_N, mask_N, RULE, N)
    new = (_bf16_bits(index, k_N[:, None]) | tl.where(negative, 0x8000, 0)).to(tl.int16)
    offsets = rows_N[:, None] * 32 + tl.arange(0, 32)[None, :]
    mask = (mask_N & finite_N)[:, None]
    if COUNT:
        changed = (tl.load(OUT + offsets, mask=mask, other=0) != new) & mask
        tl.atomic_add(COUNTS, tl.sum(tl.sum(changed.to(tl.int32), axis=1), axis=0).to(tl.int64))
    bad = tl.sum((finite_N == 0).to(tl.int32), axis=0)
    tl.atomic_add(COUNTS + 1, bad.to(tl.int64), mask=bad > 0)
    tl.store(OUT + offsets, new, mask=mask)


@triton.jit
def _encode_kernel(PACKED, SCALES, W, COUNTS, blocks, RULE: tl.constexpr, N: tl.constexpr):
    """PACKED uint8 [blocks, 16], SCALES uint8 [blocks] <- W. COUNTS[1] += non-finite blocks."""
    rows_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask_N = rows_N < blocks
    index, negative, k_N, amax_N, finite_N = _quantize(W, rows_N, mask_N, RULE, N)
    codes = index | tl.where(negative, 8, 0)
    low, high = tl.split(codes.reshape(N, 16, 2))
    offsets = rows_N[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(PACKED + offsets, (low | (high << 4)).to(tl.uint8), mask=mask_N[:, None])
    tl.store(SCALES + rows_N, tl.where(amax_N > 0, k_N + 127, 127).to(tl.uint8), mask=mask_N)
    bad = tl.sum((finite_N == 0).to(tl.int32), axis=0)
    tl.atomic_add(COUNTS + 1, bad.to(tl.int64), mask=bad > 0)


@triton.jit
def _decode_kernel(OUT, PACKED, SCALES, blocks, WIDE: tl.constexpr, N: tl.constexpr):
    """OUT [blocks, 32] <- values as bfloat16 bits (int16) or, if WIDE, float32 bits (int32)."""
    rows_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask_N = rows_N < blocks
    offsets = rows_N[:, None] * 16 + tl.arange(0, 16)[None, :]
    byte = tl.load(PACKED + offsets, mask=mask_N[:, None], other=0).to(tl.int32)
    codes = tl.join(byte & 15, byte >> 4).reshape(N, 32)
    k_N = tl.load(SCALES + rows_N, mask=mask_N, other=127).to(tl.int32) - 127
    bits = _bf16_bits(codes & 7, k_N[:, None]) | ((codes & 8) << 12)
    out = rows_N[:, None] * 32 + tl.arange(0, 32)[None, :]
    if WIDE:
        tl.store(OUT + out, bits << 16, mask=mask_N[:, None])
    else:
        tl.store(OUT + out, bits.to(tl.int16), mask=mask_N[:, None])


def _bits(w: torch.Tensor) -> torch.Tensor:
    """The contiguous bits of w, as the kernels read it: bfloat16 as int16, anything else as float32 in int32."""
    return w.contiguous().view(torch.int16) if w.dtype == torch.bfloat16 else w.float().contiguous().view(torch.int32)


def snap_(out: torch.Tensor, w: torch.Tensor, rule: str, *, name: str, count: bool = True) -> int:
    """Write the snapped w into the contiguous bfloat16 `out`; the number of changed elements (0 without `count`).

    ValueError for a non-finite w; its finite blocks are written, the others keep their old values.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=w.device)
    _launch_snap(out, w, counts, rule, count)
    flips, bad = counts.tolist()
    if bad:
        mxfp4.raise_not_finite(name, bad)
    return flips


def snap_each_(params: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], rule: str) -> int:
    """`snap_` of every contiguous `params[name]` from `weights[name]`, with one wait for all; the changed elements.

    ValueError for the first non-finite weight; all the others are written by then.
    """
    device = next(iter(params.values())).device
    counts = torch.zeros(len(params), 2, dtype=torch.int64, device=device)
    for (name, out), pair in zip(params.items(), counts, strict=True):
        _launch_snap(out, weights[name], pair, rule, True)
    found = counts.tolist()
    for name, (_, bad) in zip(params, found, strict=True):
        if bad:
            mxfp4.raise_not_finite(name, bad)
    return sum(flips for flips, _ in found)


def _launch_snap(out: torch.Tensor, w: torch.Tensor, counts: torch.Tensor, rule: str, count: bool) -> None:
    blocks = w.numel() // mxfp4.BLOCK
    if blocks:
        with torch.cuda.device_of(w):
            _snap_kernel[(triton.cdiv(blocks, _TILE),)](
                out.view(torch.int16), _bits(w), counts, blocks, rule, count, _TILE, enable_fp_fusion=False
            )


def encode(w: torch.Tensor, rule: str, *, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [..., K/2], scale bytes uint8 [..., K/32]); ValueError for a non-finite w."""
    *lead, k = w.shape
    packed = torch.empty(*lead, k // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(*lead, k // mxfp4.BLOCK, dtype=torch.uint8, device=w.device)
    blocks, counts = w.numel() // mxfp4.BLOCK, torch.zeros(2, dtype=torch.int64, device=w.device)
    if blocks:
        with torch.cuda.device_of(w):
            _encode_kernel[(triton.cdiv(blocks, _TILE),)](
                packed, scales, _bits(w), counts, blocks, rule, _TILE, enable_fp_fusion=False
            )
    bad = counts.tolist()[1]
    if bad:
        mxfp4.raise_not_finite(name, bad)
    return packed, scales


def decode(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., K]; another dtype than bfloat16 is made from float32, in which every value is exact."""
    wide = dtype != torch.bfloat16
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    out = torch.empty(shape, dtype=torch.float32 if wide else torch.bfloat16, device=packed.device)
    if scales.numel():
        with torch.cuda.device_of(packed):
            _decode_kernel[(triton.cdiv(scales.numel(), _TILE),)](
                out.view(torch.int32 if wide else torch.int16),
                packed.contiguous(),
                scales.contiguous(),
                scales.numel(),
                wide,
                _TILE,
                enable_fp_fusion=False,
            )
    return out.to(dtype)
