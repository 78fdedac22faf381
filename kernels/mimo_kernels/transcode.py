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
    E = b >> 3 and f = b & 7, hence the weight is p[f] * 2**(E - 7 + e), where p[f] = fl((1 + f/8) * sigma) is in [1, 4).
    For a midpoint mu * 2**c with 1 <= mu < 2 let o = #{f: p[f] < 2 mu} + #{f: p[f] < mu}. The smallest byte with
    p[f] * 2**(E - 7 + e) >= mu * 2**(k + c) is o + 8 * (k + c - e + 6), or, where this is below 8, the corresponding
    E4M3 subnormal, rounded up. Ties go to the even index: 0.25, 1.25, 2.5 and 5 are not reached by an equal weight,
    so for them mu is the next float32; 0.75, 1.75 and 3.5 are. As 2.5 = 2 * 1.25 and so on, a tile has only four o.

    Worked: s = 1, so p = 1, 1.125, ... 1.875. mu = 1.25 (exclusive): p < 2.5 eight times, p < 1.25+ three times, o = 11,
    the position of 1.375 one octave up. With amax = 6, k = 0: byte 11 + 8 * (0 + 0 - 0 + 6) = 59 = 0x3B, and
    0x3B is E = 7, f = 3: 1.375, the smallest E4M3 value above the midpoint 1.25.

That needs products that are normal floats. Row blocks with a scale outside [2**-100, 2**100] (also 0), and the `mse`
rule, which needs the errors themselves, take the two steps instead, a row block at a time.

On a CPU the passes run in numpy: its byte compares are a third faster than torch's, and its calls cheaper. CUDA
tensors go to `transcode_triton`. Given up: fused QKV chunks (`chunk_rows`; they stay FP8 in a release), bfloat16 scales.
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
_ONES = 0x0101010101010101
_LOWEST, _OCTAVES = -11, 20  # k - e of a group: amax is in [2**-9, 448 * 2) * 2**e, so f - 2 from -11 to 7, and the bump


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
    if q.is_cuda and rule != "mse":
        from . import transcode_triton

        bad_scales, bad_codes, odd_scales = transcode_triton.transcode(q, scale_inv, rule, packed, scales)
        _refuse(name, bad_scales, bad_codes)
        if not odd_scales:
            return packed, scales
    elif not torch.isfinite(scale_inv).all() or bool((scale_inv < 0).any()):
        _refuse(name, int((~torch.isfinite(scale_inv) | (scale_inv < 0)).sum()), 0)
    if q.is_cuda:
        for part in _row_blocks(q, scale_inv, packed, scales):
            _two_steps(*part, rule, name)
    else:
        _on_cpu(list(_row_blocks(q, scale_inv, packed, scales)), rule, name)
    return packed, scales


# ---- one row block of tiles after the other

_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _row_blocks(*tensors: torch.Tensor) -> Iterator[_Part]:
    """(q, scale_inv, packed, scales) of runs of whole row blocks: views of at most a few million weights."""
    q = tensors[0]
    blocks = max(1, (1 << 22) // (fp8.BLOCK * q.shape[-1]))
    for stack in zip(*(t if t.ndim == 3 else (t,) for t in tensors), strict=True):
        for b in range(0, stack[1].shape[0], blocks):
            rows = slice(b * fp8.BLOCK, (b + blocks) * fp8.BLOCK)
            yield stack[0][rows], stack[1][b : b + blocks], stack[2][rows], stack[3][rows]


def _two_steps(
    q: torch.Tensor, scale_inv: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, rule: Rule, name: str
) -> None:
    bad = int(((q.view(torch.uint8) & 0x7F) == NAN_MAGNITUDE).sum())
    _refuse(name, 0, bad)
    new_packed, new_scales = mxfp4.encode(fp8.dequantize(q, scale_inv, dtype=torch.float32, name=name), rule, name=name)
    packed.copy_(new_packed)
    scales.copy_(new_scales)


def _on_cpu(parts: list[_Part], rule: Rule, name: str) -> None:
    """numpy lets other threads run during an operation, so the row blocks are shared among torch's thread count."""
    workers = min(torch.get_num_threads(), len(parts))

    def work(worker: int) -> None:
        scratch = _Scratch()
        for part in parts[worker::workers]:
            low, high = part[1].aminmax()
            if rule == "mse" or low < LOWEST_SCALE or high > HIGHEST_SCALE:
                _two_steps(*part, rule, name)
            else:
                _transcode(*part, rule, name, scratch)

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
    """uint8: the smallest byte at or above the position o + 8 * (k + c - e + 6), for positions from 8 * (_LOWEST + 4)."""
    position = np.arange(8 * (_LOWEST + 4), 200)
    octaves = np.clip(1 - (position >> 3), 0, 4)  # below the smallest normal value; 4: no code lies that low but 0
    subnormal = (8 + (position & 7) + (1 << octaves) - 1) >> octaves
    return np.where(octaves > 0, subnormal, np.minimum(position, NAN_MAGNITUDE)).astype(np.uint8)


# ---- the passes


class _Scratch:
    """The buffers of `_transcode` for g groups, kept from one call to the next."""

    def __init__(self) -> None:
        self.groups = 0

    def resize(self, groups: int) -> None:
        if groups != self.groups:
            self.groups = groups
            self.words, self.magnitudes, self.codes, self.flags = (np.empty((4, groups), np.uint64) for _ in range(4))
            self.group, self.other = np.empty(groups, np.uint64), np.empty(groups, np.uint64)
            self.index = np.empty(groups, np.int64)
            self.thresholds = np.empty((7, groups), np.uint64)
            self.bytes = np.empty((4, 4 * groups), np.uint8)


def _transcode(
    q: torch.Tensor,
    scale_inv: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    rule: Rule,
    name: str,
    scratch: _Scratch,
) -> None:
    """A run of row blocks: q [rows, K], scale_inv [row blocks, tiles a row], and the two outputs, filled here."""
    codes, out, out_scales = (t.view(torch.uint8).numpy() for t in (q, packed, scales))
    rows, columns = codes.shape
    table = _tables(scale_inv.numpy(), rule).reshape(scale_inv.shape[0], -1)
    base = np.arange(columns // mxfp4.BLOCK) // (fp8.BLOCK // mxfp4.BLOCK) * 128  # where a group's tile begins
    step = fp8.BLOCK
    while step > 1 and step * columns > _CHUNK:
        step //= 2
    for b in range(table.shape[0]):
        end = min(rows, (b + 1) * fp8.BLOCK)
        for r in range(b * fp8.BLOCK, end, step):
            part = slice(r, min(r + step, end))
            _chunk(codes[part], table[b], base, out[part], out_scales[part], name, scratch)


def _chunk(
    codes: np.ndarray,
    table: np.ndarray,
    base: np.ndarray,
    out: np.ndarray,
    out_scales: np.ndarray,
    name: str,
    x: _Scratch,
) -> None:
    """Some rows of one row block. Everything is [4, groups] words of 8 weights, so that every loop is long and its
    per-group operand contiguous; the two transposed copies at the ends are cheaper than one broadcast."""
    groups = codes.size // mxfp4.BLOCK
    x.resize(groups)
    np.copyto(x.words, codes.view(np.uint64).reshape(groups, 4).T)
    np.bitwise_and(x.words, np.uint64(0x7F * _ONES), out=x.magnitudes)
    magnitudes, flags = x.magnitudes.view(np.uint8), x.flags.view(np.uint8)
    np.maximum(magnitudes[:2], magnitudes[2:], out=flags[:2])
    np.maximum(flags[0], flags[1], out=x.group.view(np.uint8))
    for shift in (32, 16, 8):
        np.right_shift(x.group, np.uint64(shift), out=x.other)
        np.maximum(x.group.view(np.uint8), x.other.view(np.uint8), out=x.group.view(np.uint8))
    np.bitwise_and(x.group, np.uint64(0x7F), out=x.group)
    if x.group.max() == NAN_MAGNITUDE:
        _refuse(name, 0, int((magnitudes == NAN_MAGNITUDE).sum()))
    np.add(x.group.view(np.int64).reshape(-1, len(base)), base, out=x.index.reshape(-1, len(base)))
    np.take(table, x.index, out=x.group, mode="clip")
    np.copyto(out_scales.reshape(-1), x.group.view(np.uint8)[7::8])

    # A threshold, a byte of the table's word, eight times side by side.
    np.copyto(x.thresholds, x.group.view(np.uint8).reshape(groups, 8)[:, :7].T)
    np.multiply(x.thresholds, np.uint64(_ONES), out=x.thresholds)
    thresholds, bools, found = x.thresholds.view(np.uint8), flags.view(np.bool_), x.codes.view(np.uint8)
    np.greater_equal(magnitudes, thresholds[0], out=found.view(np.bool_))
    for j in range(1, 7):
        np.greater_equal(magnitudes, thresholds[j], out=bools)
        np.add(found, flags, out=found)
    np.bitwise_or(thresholds[0], 0x80, out=thresholds[0])
    np.greater_equal(x.words.view(np.uint8), thresholds[0], out=bools)  # negative and not rounded to 0
    np.left_shift(x.flags, np.uint64(3), out=x.flags)
    np.bitwise_or(x.codes, x.flags, out=x.codes)
    np.right_shift(x.codes, np.uint64(4), out=x.flags)  # the odd element's code, above the even one's
    np.bitwise_or(x.codes, x.flags, out=x.codes)
    np.copyto(x.bytes, x.codes.view(np.uint16), casting="unsafe")  # little endian: the lower byte
    packed = out.view(np.uint32).reshape(groups, 4)
    for i, word in enumerate(x.bytes.view(np.uint32)):
        packed[:, i] = word


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
