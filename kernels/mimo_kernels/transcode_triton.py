"""Block FP8 to MXFP4 in one pass on a GPU: 1.53 bytes of traffic a weight. The arithmetic is that of `transcode`.

At the bandwidth of an H200 a weight may cost about ten instructions, so four weights share each of them: a word is
four E4M3 bytes, and words are compared, counted and packed without being taken apart.
    * With T = a threshold four times side by side (at most 128), d = (word | 0x80808080) - T has no borrow between the
      bytes, and bit 7 of a byte says whether its magnitude reaches the threshold.
    * Thresholds ascend, so of the seven answers d1..d7 a prefix is set, and the index they count is, bit by bit,
      d4, d2 ^ d4 ^ d6 and the parity of all. Bit 7 of `word & d1` is the sign, and 0 where the index is.
    * The largest byte of a group is taken two bytes at a time, by max.u16x2 where there is one (sm_90).
    * A thread has a whole group: two loads of 16 bytes, one store of 16, and no exchange between threads.
Thresholds below the smallest normal E4M3 value take more work, and real weights hardly have them (the group would be a
thousand times smaller than its tile). So a program first assumes that there is none, and starts again if there was.

`_prepare_kernel` turns each scale into the four offsets of its tile. Names: suffix _N = one value a group.
"""

import torch
import triton
import triton.language as tl

from .transcode import HIGHEST_SCALE, LOWEST_SCALE, MU

_MU_D, _MU_C, _MU_A, _MU_B = (tl.constexpr(mu) for mu in MU)
_LOWEST, _HIGHEST = tl.constexpr(LOWEST_SCALE), tl.constexpr(HIGHEST_SCALE)
_SIGNS = tl.constexpr(-0x7F7F7F80)  # 0x80808080
_THREADS, _STEPS = 128, 8  # groups a step of a program, and steps: 0.9 of an H200's copy bandwidth
_SCALES = 128  # scales a program of _prepare_kernel


@triton.jit
def _offset(sigma_N, MU: tl.constexpr):
    """o of one MU, four times side by side."""
    o_N = tl.zeros_like(sigma_N).to(tl.int32)
    for f in tl.static_range(8):
        p_N = sigma_N * (1 + f / 8)
        o_N += (p_N < MU).to(tl.int32) + (p_N < 2 * MU).to(tl.int32)
    return o_N * 0x01010101


@triton.jit
def _prepare_kernel(OFFSETS, SCALE, COUNTS, tiles, N: tl.constexpr):
    """OFFSETS int32 [tiles, 4] <- o of each MU. COUNTS[0] += negative or non-finite scales, [2] += extreme ones."""
    at_N = tl.program_id(0) * N + tl.arange(0, N)
    mask_N = at_N < tiles
    s_N = tl.load(SCALE + at_N, mask=mask_N, other=1.0)
    bits_N = s_N.to(tl.int32, bitcast=True)
    sigma_N = ((bits_N & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    even = tl.join(_offset(sigma_N, _MU_D), _offset(sigma_N, _MU_A))
    odd = tl.join(_offset(sigma_N, _MU_C), _offset(sigma_N, _MU_B))
    offsets = at_N[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(OFFSETS + offsets, tl.join(even, odd).reshape(N, 4), mask=mask_N[:, None])
    bad_N = (s_N < 0) | ((bits_N & 0x7F800000) == 0x7F800000)
    extreme_N = (s_N < _LOWEST) | (s_N > _HIGHEST)
    zero_N = tl.zeros_like(at_N)
    tl.atomic_add(COUNTS + zero_N, 1, mask=mask_N & bad_N, sem="relaxed")
    tl.atomic_add(COUNTS + 2 + zero_N, 1, mask=mask_N & extreme_N, sem="relaxed")


@triton.jit
def _max_bytes(a, b, PTX: tl.constexpr):
    """The larger of two 16-bit lanes, twice."""
    if PTX:
        return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    high = tl.maximum((a >> 16) & 0xFFFF, (b >> 16) & 0xFFFF)
    return (high << 16) | tl.maximum(a & 0xFFFF, b & 0xFFFF)


@triton.jit
def _largest(a, b, c, d, PTX: tl.constexpr):
    """The largest bytes of four words in lanes of 16 bits: of the even bytes, and of the odd ones."""
    even: tl.constexpr = 0x00FF00FF
    x = _max_bytes(_max_bytes(a & even, b & even, PTX), _max_bytes(c & even, d & even, PTX), PTX)
    y = _max_bytes(_max_bytes(a, b, PTX), _max_bytes(c, d, PTX), PTX)  # the upper byte of a lane decides
    return _max_bytes(x, (y >> 8) & even, PTX)


@triton.jit
def _threshold(o_N, octave_N, c: tl.constexpr):
    """The smallest byte at or above the position o + 8 * (octave + c + 6), four times side by side."""
    position_N = (o_N & 0xFF) + 8 * (octave_N + c + 6)
    below_N = tl.minimum(tl.maximum(1 - (position_N >> 3), 0), 4)
    subnormal_N = (8 + (position_N & 7) + (1 << below_N) - 1) >> below_N
    return tl.where(below_N > 0, subnormal_N, tl.minimum(position_N, 127)) * 0x01010101


@triton.jit
def _codes(word, t1, t2, t3, t4, t5, t6, t7):
    """Four E4M3 bytes -> four codes; two of them packed in byte 1, two in byte 3."""
    x = word | _SIGNS
    d1 = x - t1
    d4 = x - t4
    middle = (x - t2) ^ d4 ^ (x - t6)
    last = middle ^ d1 ^ (x - t3) ^ (x - t5) ^ (x - t7)
    code = (((word & d1) >> 4) & 0x08080808) | ((d4 >> 5) & 0x04040404)
    code = code | ((middle >> 6) & 0x02020202) | ((last >> 7) & 0x01010101)
    return code * 0x110


@triton.jit
def _pairs(v, w, t1, t2, t3, t4, t5, t6, t7, PTX: tl.constexpr):
    """Eight E4M3 bytes -> four bytes of packed codes."""
    a = _codes(v, t1, t2, t3, t4, t5, t6, t7)
    b = _codes(w, t1, t2, t3, t4, t5, t6, t7)
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
        )
    return ((a >> 8) & 0xFF) | ((a >> 16) & 0xFF00) | ((b << 8) & 0xFF0000) | (b & -0x1000000)


@triton.jit
def _columns(x, N: tl.constexpr):
    """[N, 4] -> four [N]."""
    even, odd = tl.split(x.reshape(N, 2, 2))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _some_groups(
    PACKED, SCALES, Q, offset_N, mask_N, s_N, oD_N, oC_N, oA_N, oB_N,
    RULE: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr, SUBNORMAL: tl.constexpr,
):  # fmt: skip
    """One group a thread. Returns the largest magnitude bytes [N], and whether some threshold is subnormal [N]."""
    at = Q + (offset_N[:, None] * 8 + tl.arange(0, 4)[None, :])
    w0, w1, w2, w3 = _columns(tl.load(at, mask=mask_N[:, None], other=0), N)
    w4, w5, w6, w7 = _columns(tl.load(at + 4, mask=mask_N[:, None], other=0), N)
    m_N = _max_bytes(
        _largest(w0 | _SIGNS, w1 | _SIGNS, w2 | _SIGNS, w3 | _SIGNS, PTX),
        _largest(w4 | _SIGNS, w5 | _SIGNS, w6 | _SIGNS, w7 | _SIGNS, PTX),
        PTX,
    )
    m_N = tl.maximum((m_N >> 16) & 0x7F, m_N & 0x7F)
    normal_N = ((m_N << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    amax_N = tl.where(m_N < 8, m_N.to(tl.float32) * 0.001953125, normal_N) * s_N
    carry: tl.constexpr = (1 << 21) if RULE == "even" else ((1 << 22) - 1 if RULE == "rceil" else 0)
    byte_N = ((amax_N.to(tl.int32, bitcast=True) + carry) >> 23) - 2
    octave_N = byte_N - (s_N.to(tl.int32, bitcast=True) >> 23)  # k - e
    byte_N = tl.where(m_N > 0, byte_N, 127)
    octave_N = tl.where(m_N > 0, octave_N, 0)
    if SUBNORMAL:
        t1, t2 = _threshold(oD_N, octave_N, -2), _threshold(oC_N, octave_N, -1)
        t3, t4 = _threshold(oA_N, octave_N, 0), _threshold(oB_N, octave_N, 0)
        t5, t6 = _threshold(oA_N, octave_N, 1), _threshold(oB_N, octave_N, 1)
        t7 = _threshold(oA_N, octave_N, 2)
    else:
        base_N = octave_N * 0x08080808
        t1, t2 = oD_N + base_N + 0x20202020, oC_N + base_N + 0x28282828
        t3, t4 = oA_N + base_N + 0x30303030, oB_N + base_N + 0x30303030
        t5, t6 = t3 + 0x08080808, t4 + 0x08080808
        t7 = tl.minimum((oA_N & 0xFF) + 8 * octave_N + 64, 128) * 0x01010101
    out0 = _pairs(w0, w1, t1, t2, t3, t4, t5, t6, t7, PTX)
    out1 = _pairs(w2, w3, t1, t2, t3, t4, t5, t6, t7, PTX)
    out2 = _pairs(w4, w5, t1, t2, t3, t4, t5, t6, t7, PTX)
    out3 = _pairs(w6, w7, t1, t2, t3, t4, t5, t6, t7, PTX)
    out = tl.join(tl.join(out0, out2), tl.join(out1, out3)).reshape(N, 4)
    tl.store(PACKED + (offset_N[:, None] * 4 + tl.arange(0, 4)[None, :]), out, mask=mask_N[:, None])
    tl.store(SCALES + offset_N, byte_N.to(tl.uint8), mask=mask_N)
    return m_N, octave_N < -3


@triton.jit
def _transcode_kernel(
    PACKED, SCALES, Q, SCALE, OFFSETS, COUNTS, rows, groups, tiles,
    RULE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A program: STEPS times R rows (all of one row block of one expert) x C groups of 32. tiles = tiles in a row.

    Q int32 [experts, rows, groups, 8], PACKED int32 [..., 4], SCALES uint8 [experts, rows, groups].
    COUNTS[1] += groups with a NaN code.
    """
    at_N = tl.arange(0, R * C)
    column_N = tl.program_id(0) * C + at_N % C
    row = tl.program_id(1) * (R * STEPS)
    expert = tl.program_id(2).to(tl.int64)
    first = (expert * rows + row) * groups
    tile_N = column_N // 4
    tile = (expert * tl.cdiv(rows, 128) + row // 128) * tiles
    s_N = tl.load(SCALE + tile + tile_N, mask=column_N < groups, other=1.0)
    offsets = tile * 4 + (tile_N[:, None] * 4 + tl.arange(0, 4)[None, :])
    o = tl.load(OFFSETS + offsets, mask=column_N[:, None] < groups, other=0)
    oD_N, oC_N, oA_N, oB_N = _columns(o, R * C)

    largest_N, again_N = tl.zeros_like(at_N), at_N < 0
    for i in range(STEPS):
        row_N = i * R + at_N // C
        mask_N = (row + row_N < rows) & (column_N < groups)
        m_N, subnormal_N = _some_groups(
            PACKED + first * 4, SCALES + first, Q + first * 8, row_N * groups + column_N, mask_N,
            s_N, oD_N, oC_N, oA_N, oB_N, RULE, R * C, PTX, False,
        )  # fmt: skip
        largest_N = tl.maximum(largest_N, m_N)
        again_N = again_N | subnormal_N
    tl.atomic_add(COUNTS + 1 + tl.zeros_like(at_N), 1, mask=largest_N == 127, sem="relaxed")
    if tl.max(again_N.to(tl.int32), axis=0) > 0:
        for i in range(STEPS):
            row_N = i * R + at_N // C
            mask_N = (row + row_N < rows) & (column_N < groups)
            _some_groups(
                PACKED + first * 4, SCALES + first, Q + first * 8, row_N * groups + column_N, mask_N,
                s_N, oD_N, oC_N, oA_N, oB_N, RULE, R * C, PTX, True,
            )  # fmt: skip


def transcode(
    q: torch.Tensor, scale_inv: torch.Tensor, rule: str, packed: torch.Tensor, scales: torch.Tensor
) -> tuple[int, int, int]:
    """Fill `packed` and `scales`; (scales that are refused, groups with a NaN code, scales beyond this method).

    All are contiguous; `rule` is not mse. With a scale beyond the method the outputs are not valid.
    """
    if q.data_ptr() % 16:
        q = q.clone()
    rows, groups = q.shape[-2], q.shape[-1] // 32
    experts = q.shape[0] if q.ndim == 3 else 1
    tiles = scale_inv.numel()
    counts = torch.zeros(3, dtype=torch.int32, device=q.device)
    offsets = torch.empty(tiles, 4, dtype=torch.int32, device=q.device)
    ptx = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] >= 9
    c = next((c for c in (64, 32, 16, 8) if groups % c == 0), 4)
    r = _THREADS // c
    steps = min(_STEPS, 128 // r)  # not beyond the row block
    with torch.cuda.device_of(q):
        _prepare_kernel[(triton.cdiv(tiles, _SCALES),)](offsets, scale_inv, counts, tiles, _SCALES)
        _transcode_kernel[(triton.cdiv(groups, c), triton.cdiv(rows, r * steps), experts)](
            packed.view(torch.int32), scales, q.view(torch.int32), scale_inv, offsets, counts,
            rows, groups, scale_inv.shape[-1], rule, r, c, steps, ptx, num_warps=_THREADS // 32,
        )  # fmt: skip
    bad_scales, bad_groups, extreme = counts.tolist()
    return bad_scales, bad_groups, extreme
