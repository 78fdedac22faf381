"""Block FP8 to MXFP4 in one pass: what the conversion of a whole FP8 checkpoint spends its time in.

`fp8_to_mxfp4(q, scale)` has the bytes of `mxfp4.encode(fp8.dequantize(q, scale, dtype=torch.float32))`. The float32
product is what the FP8 file means; going through bfloat16 would round twice. No float weight is ever made.

How it works
    A group of 32 lies inside one 128x128 tile, so its weights are E4M3 codes times one scale s, and
    * a larger magnitude byte (code & 0x7F) is a larger weight: the group's largest byte m gives amax = fl(E4M3[m] * s)
      and from that the MXFP4 exponent k;
    * the index 0..7 of a weight is the number of grid midpoints (0.25, 0.75, ... 5, times 2**k) at or below it. In
      terms of the byte these are seven integer thresholds, and all of them follow from (s, k). So a weight costs
      seven byte compares, and every question of rounding, ties included, is settled once a threshold.

    The thresholds. Write s = sigma * 2**e with 1 <= sigma < 2. A byte b >= 8 is worth (1 + f/8) * 2**(E - 7) with
    E = b >> 3 and f = b & 7, so the weight is p[f] * 2**(E - 7 + e), where p[f] = fl((1 + f/8) * sigma) is in [1, 4).
    For a midpoint mu * 2**c with 1 <= mu < 2 let o = #{f: p[f] < 2 mu} + #{f: p[f] < mu}. The smallest byte with
    p[f] * 2**(E - 7 + e) >= mu * 2**(k + c) is o + 8 * (k + c - e + 6), or, where this is below 8, the corresponding
    E4M3 subnormal, rounded up. Ties go to the even index: 0.25, 1.25, 2.5 and 5 are not reached by an equal weight,
    so for them mu is the next float32; 0.75, 1.75 and 3.5 are. As 2.5 = 2 * 1.25 and so on, a tile has only four o.

    Worked: s = 1, so p = 1, 1.125, ... 1.875. Not above mu = 1.25 are three of them, and not above 2 mu all eight:
    o = 11. With amax = 6, k = 0: the byte is 11 + 8 * (0 + 0 - 0 + 6) = 59 = 0x3B, which is E = 7 and f = 3: 1.375,
    the smallest E4M3 value above the midpoint 1.25.

That needs products that are normal floats. Row blocks with a scale outside [2**-100, 2**100] (also 0), and the `mse`
rule, which needs the errors themselves, take the two steps instead, a row block at a time.

On a CPU the passes run in numpy: its calls cost less than torch's, and so do its byte operations on one thread. CUDA
tensors go to `transcode_triton`. Given up: fused QKV chunks (`chunk_rows`; a release keeps them in FP8).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from . import fp8, mxfp4
from .mxfp4 import RULES, Rule

LOWEST_SCALE, HIGHEST_SCALE = 2.0**-100, 2.0**100
# mu of the four kinds of midpoint; the seven midpoints as (index into MU, c): 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.
MU = (1 + 2.0**-23, 1.5, 1.25 + 2.0**-23, 1.75)
MIDPOINTS = ((0, -2), (1, -1), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2))
NAN_MAGNITUDE = 127

_CHUNK = 1 << 18  # weights a step of the CPU path: its four buffers of 256 KB stay in the second-level cache
_ONES = np.uint64(0x0101010101010101)
_SIGN, _MAGNITUDE, _MAGNITUDE_BYTE = (np.uint64(x) for x in (0x8080808080808080, 0x7F7F7F7F7F7F7F7F, 0x7F))
_THREE, _FOUR, *_HALVES = (np.uint64(x) for x in (3, 4, 32, 16, 8))
# k - e of a group: amax is in [2**-9, 448 * 2) * 2**e, which makes -11 to 7, and a rule's bump.
_LOWEST, _OCTAVES = -11, 20


@torch.no_grad()
def fp8_to_mxfp4(
    q: torch.Tensor, scale_inv: torch.Tensor, rule: Rule = "even", *, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [..., N, K/2], scale bytes uint8 [..., N, K/32]) of an FP8 weight, or of a stack of experts.

    q: float8_e4m3fn [N, K] or [E, N, K], K % 32 == 0; N and K need not divide by 128.
    scale_inv: float32 [ceil(N/128), ceil(K/128)] or [E, ceil(N/128), ceil(K/128)]; it multiplies, as in `fp8`.
    The bytes are those of `mxfp4.encode(fp8.dequantize(q, scale_inv, dtype=torch.float32), rule)`.
    ValueError for other dtypes or shapes, an unknown rule, the NaN codes 0x7F and 0xFF, a negative or non-finite scale.
    """
    _check(q, scale_inv, rule, name)
    packed = torch.empty(*q.shape[:-1], q.shape[-1] // 2, dtype=torch.uint8, device=q.device)
    scales = torch.empty(*q.shape[:-1], q.shape[-1] // mxfp4.BLOCK, dtype=torch.uint8, device=q.device)
    if not q.numel():
        return packed, scales
    q, scale_inv = q.contiguous(), scale_inv.contiguous()
    if not q.is_cuda:
        _refuse(name, int((~torch.isfinite(scale_inv) | (scale_inv < 0)).sum()), 0)
        _on_cpu(list(_parts(1 << 22, q, scale_inv, packed, scales)), rule, name)
        return packed, scales
    odd = 1
    if rule != "mse":
        from . import transcode_triton

        bad_scales, bad_codes, odd = transcode_triton.transcode(q, scale_inv, rule, packed, scales)
        _refuse(name, bad_scales, bad_codes)
    if odd:
        for part in _parts(1 << 26, q, scale_inv, packed, scales):
            if rule == "mse" or _is_odd(part[1]):
                _two_steps(part, rule, name)
    return packed, scales


# ---- some row blocks of tiles after the others

_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # q, scale_inv, packed, scales: 2-D views


def _parts(weights: int, *tensors: torch.Tensor) -> Iterator[_Part]:
    """Whole row blocks of one expert, about that many weights at a time."""
    blocks = max(1, weights // (fp8.BLOCK * tensors[0].shape[-1]))
    for q, scale_inv, packed, scales in zip(*(t if t.ndim == 3 else (t,) for t in tensors), strict=True):
        for b in range(0, scale_inv.shape[0], blocks):
            rows = slice(b * fp8.BLOCK, (b + blocks) * fp8.BLOCK)
            yield q[rows], scale_inv[b : b + blocks], packed[rows], scales[rows]


def _is_odd(scale_inv: torch.Tensor) -> bool:
    low, high = scale_inv.aminmax()
    return bool(low < LOWEST_SCALE or high > HIGHEST_SCALE)


def _two_steps(part: _Part, rule: Rule, name: str) -> None:
    q, scale_inv, packed, scales = part
    _refuse(name, int((~torch.isfinite(scale_inv) | (scale_inv < 0)).sum()), _nan_codes(q))
    new_packed, new_scales = mxfp4.encode(fp8.dequantize(q, scale_inv, dtype=torch.float32, name=name), rule, name=name)
    packed.copy_(new_packed)
    scales.copy_(new_scales)


def _nan_codes(q: torch.Tensor) -> int:
    return int(((q.view(torch.uint8) & 0x7F) == NAN_MAGNITUDE).sum())


def _on_cpu(parts: list[_Part], rule: Rule, name: str) -> None:
    """numpy lets other threads run during an operation, so the parts are shared among as many threads as torch's."""
    workers = min(torch.get_num_threads(), len(parts))

    def work(worker: int) -> None:
        scratch: dict[int, _Scratch] = {}
        for part in parts[worker::workers]:
            if rule == "mse" or _is_odd(part[1]):
                _two_steps(part, rule, name)
            else:
                _transcode(part, rule, name, scratch)

    if workers == 1:
        work(0)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))  # raises the first worker's ValueError


# ---- the tables


def _tables(scale_inv: np.ndarray, rule: Rule) -> np.ndarray:
    """uint64 [tiles, 128], by the largest magnitude byte of a group: bytes 0..6 thresholds, byte 7 the scale byte."""
    s = scale_inv.reshape(-1, 1)
    e = (s.view(np.int32) >> 23) - 127
    sigma = ((s.view(np.int32) & 0x007FFFFF) | 0x3F800000).view(np.float32)
    p = sigma * np.linspace(1, 1.875, 8, dtype=np.float32)
    below = np.concatenate([p, p / 2], 1)[:, None] < np.array(MU, np.float32)[:, None]
    offset = np.count_nonzero(below, axis=-1)
    kind, shift = np.array(MIDPOINTS).T
    octave = np.arange(_OCTAVES)[:, None]
    words = np.empty((len(s), _OCTAVES, 8), np.uint8)
    words[..., :7] = _byte_of_position().take(offset[:, None, kind] + 8 * (octave + shift + 2), mode="clip")
    values = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values[NAN_MAGNITUDE] = 448  # such a group is refused
    k = mxfp4._exponents(torch.from_numpy(s) * values, rule).numpy()
    row = k - (e + _LOWEST)
    row[:, 0] = 0  # an all-zero group: any thresholds, they are positive
    row += (np.arange(len(s)) * _OCTAVES)[:, None].astype(np.int32)
    scale_bytes = (k + 127).astype(np.uint8)
    scale_bytes[:, 0] = mxfp4.ZERO_BLOCK_BYTE
    table = words.view(np.uint64).take(row)
    table.view(np.uint8)[:, 7::8] = scale_bytes
    return table


def _byte_of_position() -> np.ndarray:
    """uint8: the smallest byte at or above a position o + 8 * (k + c - e + 6), from position 8 * (_LOWEST + 4) on."""
    position = np.arange(8 * (_LOWEST + 4), 200)
    octaves = np.clip(1 - (position >> 3), 0, 4)  # below the smallest normal value; 4: no code lies that low but 0
    subnormal = (8 + (position & 7) + (1 << octaves) - 1) >> octaves
    return np.where(octaves > 0, subnormal, np.minimum(position, NAN_MAGNITUDE)).astype(np.uint8)


# ---- the passes


class _Scratch:
    """Buffers for g groups of 32, and the views of them that the passes use: to make a view costs as much as a pass
    over some thousand bytes. A group is a column of [4, g] words, 8 weights each. Then every loop is long, and what a
    group's weights are compared with lies in order, too. Names: x8 = the bytes of the words x.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.words, self.magnitudes, self.codes, self.flags = (np.empty((4, groups), np.uint64) for _ in range(4))
        self.words8, self.magnitudes8, self.codes8, self.flags8 = (
            x.view(np.uint8) for x in (self.words, self.magnitudes, self.codes, self.flags)
        )
        self.codes_bool, self.flags_bool = self.codes.view(np.bool_), self.flags.view(np.bool_)
        self.group, self.other = np.empty(groups, np.uint64), np.empty(groups, np.uint64)
        self.group8, self.other8 = self.group.view(np.uint8), self.other.view(np.uint8)
        self.thresholds = np.empty((7, groups), np.uint64)
        self.thresholds8 = self.thresholds.view(np.uint8)
        self.bytes = np.empty((4, 4 * groups), np.uint8)


def _transcode(part: _Part, rule: Rule, name: str, scratch: dict[int, _Scratch]) -> None:
    """A run of row blocks: q [rows, K], scale_inv [row blocks, tiles a row], and the two outputs, filled here."""
    codes, out, out_scales = (t.view(torch.uint8).numpy() for t in (part[0], part[2], part[3]))
    rows, columns = codes.shape
    table = _tables(part[1].numpy(), rule).reshape(part[1].shape[0], -1)
    base = np.arange(columns // mxfp4.BLOCK) // (fp8.BLOCK // mxfp4.BLOCK) * 128  # a group's tile in the table
    step = fp8.BLOCK
    while step > 1 and step * columns > _CHUNK:
        step //= 2
    for r in range(0, rows, step):
        some = slice(r, min(r + step, rows))
        groups = (some.stop - r) * len(base)
        if groups not in scratch:
            scratch[groups] = _Scratch(groups)
        x = scratch[groups]
        np.copyto(x.words, codes[some].view(np.uint64).reshape(groups, 4).T)
        _largest_bytes(x)
        if x.group.max() == NAN_MAGNITUDE:
            _refuse(name, 0, _nan_codes(part[0]))
        index = (x.group.view(np.int64).reshape(-1, len(base)) + base).reshape(-1)
        np.take(table[r // fp8.BLOCK], index, out=x.group, mode="clip")
        np.copyto(out_scales[some].reshape(-1), x.group8[7::8])
        _codes(x)
        packed = out[some].view(np.uint32).reshape(groups, 4)
        for i, word in enumerate(x.bytes.view(np.uint32)):
            packed[:, i] = word


def _largest_bytes(x: _Scratch) -> None:
    """words -> magnitudes, and the largest of the 32 magnitude bytes of a group in `group`."""
    np.bitwise_and(x.words, _MAGNITUDE, out=x.magnitudes)
    np.maximum(x.magnitudes8[:2], x.magnitudes8[2:], out=x.flags8[:2])
    np.maximum(x.flags8[0], x.flags8[1], out=x.group8)
    for shift in _HALVES:
        np.right_shift(x.group, shift, out=x.other)
        np.maximum(x.group8, x.other8, out=x.group8)
    np.bitwise_and(x.group, _MAGNITUDE_BYTE, out=x.group)


def _codes(x: _Scratch) -> None:
    """words, magnitudes and table words in `group` -> packed codes in `bytes`."""
    np.copyto(x.thresholds, x.group8.reshape(-1, 8)[:, :7].T)
    np.multiply(x.thresholds, _ONES, out=x.thresholds)  # a byte eight times side by side
    np.greater_equal(x.magnitudes8, x.thresholds8[0], out=x.codes_bool)
    for threshold in x.thresholds8[1:]:
        np.greater_equal(x.magnitudes8, threshold, out=x.flags_bool)
        np.add(x.codes8, x.flags8, out=x.codes8)
    np.bitwise_or(x.thresholds[0], _SIGN, out=x.thresholds[0])
    np.greater_equal(x.words8, x.thresholds8[0], out=x.flags_bool)  # negative and not rounded to 0
    np.left_shift(x.flags, _THREE, out=x.flags)
    np.bitwise_or(x.codes, x.flags, out=x.codes)
    np.right_shift(x.codes, _FOUR, out=x.flags)  # the odd element's code, above the even one's
    np.bitwise_or(x.codes, x.flags, out=x.codes)
    np.copyto(x.bytes, x.codes.view(np.uint16), casting="unsafe")  # keeps the lower byte of the two (little endian)


# ---- refusals


def _check(q: torch.Tensor, scale_inv: torch.Tensor, rule: str, name: str) -> None:
    if rule not in RULES:
        raise ValueError(f"{name}: unknown scale rule {rule!r}; use one of {', '.join(RULES)}")
    if q.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32:
        raise ValueError(
            f"{name}: codes are {q.dtype} and scales {scale_inv.dtype}; "
            "expected float8_e4m3fn and float32, read .weight and .weight_scale_inv"
        )
    if q.ndim not in (2, 3) or q.shape[-1] % mxfp4.BLOCK:
        raise ValueError(
            f"{name}: cannot transcode {list(q.shape)}; give [N, K] or [experts, N, K] with K a multiple of "
            f"{mxfp4.BLOCK}, or leave this tensor in FP8"
        )
    expected = [*q.shape[:-2], *(-(-n // fp8.BLOCK) for n in q.shape[-2:])]
    if list(scale_inv.shape) != expected:
        raise ValueError(
            f"{name}: scale_inv is {list(scale_inv.shape)}, but {list(q.shape)} needs {expected}, one a 128x128 tile; "
            "is it the scale of another tensor?"
        )
    if q.device != scale_inv.device:
        raise ValueError(f"{name}: codes on {q.device}, scales on {scale_inv.device}; move them to one device")


def _refuse(name: str, bad_scales: int, bad_codes: int) -> None:
    if bad_scales:
        raise ValueError(
            f"{name}: {bad_scales} scale(s) are negative, NaN or Inf; the file is damaged or its scales are not "
            "block-FP8 weight_scale_inv, download it again"
        )
    if bad_codes:
        raise ValueError(
            f"{name}: at least {bad_codes} NaN code(s) (0x7F, 0xFF); MXFP4 cannot hold NaN, "
            "so download the file again or repair the source checkpoint"
        )
