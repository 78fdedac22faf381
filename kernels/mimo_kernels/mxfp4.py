"""MXFP4: four-bit floating-point weights with one power-of-two scale per 32. The only FP4 codec of the project.

The format (OCP Microscaling v1.0, E2M1 elements with an E8M0 scale)
    A block is 32 consecutive elements of the last dimension, the one that a matmul contracts over. It stores
    * 32 codes of four bits, `sign << 3 | index`; index 0..7 means 0, 0.5, 1, 1.5, 2, 3, 4, 6. No Inf, no NaN;
    * one byte b, which stands for the scale 2**(b - 127). Byte 255 is NaN.
    value = element * scale, so a weight costs 4.25 bits. Two codes share a byte: element 2j is the low nibble.

    Worked: the block [1.3, -0.4, 5.0, 0, ...] has the largest magnitude 5.0 = 1.25 * 2**2, so the scale is
    2**(2 - 2) = 1 (byte 127). 1.3 is nearest to 1.5 (index 3). -0.4 is nearest to -0.5 (index 1 and the sign: code 9).
    5.0 is a tie between 4 and 6; the even index wins: 4 (index 6). The first two bytes are 0x93 and 0x06, and the block
    reads back as [1.5, -0.5, 4, 0, ...].

Elements round to nearest, ties to the even index (0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4,
5 -> 4); anything beyond 6 becomes 6.

The scale rule is the writer's choice; a reader never sees it. With amax = m * 2**f and 1 <= m < 2, the exponent k of
the scale is
    floor   f - 2                       the OCP text, torchao's default. Values in (6, 8) clip to 6.
    even    f - 2, plus 1 if m >= 1.75  compressed-tensors, Quark. Clips only in (6, 7). Our default.
    rceil   f - 2, plus 1 if m > 1.5    = ceil(log2(amax / 6)). TransformerEngine, ModelOpt. Never clips.
    mse     f - 2 or f - 1              the smaller squared error over the block, in float32; f - 2 on a tie.
On Gaussian weights (sigma 0.02) the relative squared errors are 13.0, 12.6, 14.0 and 12.4 thousandths.

What this writer promises on top of the format
    * k is clamped to [-126, 125]: the scale, its inverse and 6 * scale stay finite normal floats. A block whose amax is
      below 2**-124 therefore loses accuracy. Readers here accept every byte but 255 (253 and 254 can decode to inf).
    * An all-zero block is codes 0 with byte 127, and minus zero (code 8) is never written. Readers accept it.
    * Every value is exact in bfloat16, so a *snapped* BF16 weight is the packed weight: encoding it again, under
      any of the rules, gives the same values (and the same bytes, unless rceil wrote the first ones).
    * `snap` is bit-equal to `decode(*encode(w))`, on the CPU and on a GPU. So a model that trains on snapped weights
      has seen exactly what its file says.

Why not torchao or compressed-tensors: QAT snaps FP32 masters in place after every optimizer step, and the writer must
then produce the same bits. compressed-tensors rounds FP32 to BF16 first on a GPU (two roundings change almost 1 % of
the codes); torchao takes rceil from a float32 logarithm, which misses the bump next to m = 1.5; both write -0, and
neither snaps in place or counts what changed. Given up here: other element formats (MXFP6/8, NVFP4), NaN blocks (a
non-finite weight raises), padding (K must divide by 32), swizzled scales.

`quantize` and `dequantize` are the definition, written to be read. `snap`, `snap_`, `encode` and `decode` are the fast
forms: cache-sized chunks with in-place passes on a CPU, one-pass Triton kernels (`mxfp4_triton`) on CUDA tensors.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch.nn.functional import hardshrink

BLOCK = 32
Rule = Literal["even", "floor", "rceil", "mse"]
RULES: tuple[Rule, ...] = get_args(Rule)
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIN_EXPONENT, MAX_EXPONENT = -126, 125
ZERO_BLOCK_BYTE = 127
NAN_BYTE = 255

# Added to the bits of amax before its exponent is read: carries into the exponent exactly when the rule bumps it.
_CARRY = {"floor": 0, "even": 1 << 21, "rceil": (1 << 22) - 1, "mse": 0}
_CHUNK = 1 << 16  # elements per thread and step of the CPU path: 256 KB of float32, so that every pass stays in cache


# ---- the definition


@torch.no_grad()
def quantize(w: torch.Tensor, rule: Rule = "even", *, name: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8 [..., K], one a byte) and scale bytes (uint8 [..., K/32]) of a float32, bfloat16 or float16 tensor.

    The arithmetic is float32. ValueError for another dtype, K % 32 != 0, an unknown rule, or a NaN or Inf.
    """
    _check_weight(w, rule, name)
    x = w.float().unflatten(-1, (-1, BLOCK))
    amax = x.abs().amax(-1)
    _check_finite(amax, name)
    k = _exponents(amax, rule)
    if rule == "mse":
        up = (k + 1).clamp(max=MAX_EXPONENT)
        y = hardshrink(torch.ldexp(x, -k.unsqueeze(-1)), 0.25)  # both round these to 0: the same error, left out
        ratio = torch.ldexp(torch.ones_like(amax), up - k).unsqueeze(-1)  # 2, or 1 where the clamp leaves no choice
        keep = _block_sum((y - _nearest(y)).square()) <= _block_sum((y - _nearest(y / ratio) * ratio).square())
        k = torch.where(keep, k, up)
    grid = _nearest(torch.ldexp(x, -k.unsqueeze(-1)))
    a = grid.abs()
    index = torch.where(a < 2, a * 2, torch.where(a < 4, a + 2, a / 2 + 4)).to(torch.uint8)
    codes = index | ((grid < 0).to(torch.uint8) << 3)
    return codes.flatten(-2), _scale_bytes(k, amax)


@torch.no_grad()
def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values [..., K] of codes (uint8 [..., K], 0..15) and scale bytes (uint8 [..., K/32], not 255)."""
    _check_codes(codes, scales, codes.shape[-1] if codes.ndim else 0, "codes")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes: the largest is {int(codes.max())}, not 0..15; unpack() a packed tensor first")
    grid = torch.tensor(GRID, device=codes.device)
    v = torch.where(codes > 7, -1.0, 1.0) * grid[(codes & 7).long()]
    return torch.ldexp(v.unflatten(-1, (-1, BLOCK)), (scales.int() - 127).unsqueeze(-1)).flatten(-2).to(dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] codes -> uint8 [..., K/2]; element 2j goes to the low nibble of byte j."""
    if codes.dtype != torch.uint8 or not codes.ndim or codes.shape[-1] % 2:
        raise ValueError(f"codes: {_what(codes)} cannot be packed; give uint8 codes with an even last dimension")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes: the largest is {int(codes.max())}, not 0..15; is the tensor packed already?")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2] -> uint8 codes [..., K]; the inverse of `pack`."""
    if packed.dtype != torch.uint8 or not packed.ndim:
        raise ValueError(f"packed: {_what(packed)} cannot be unpacked; give the uint8 tensor of the file")
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _exponents(amax: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Scale exponents k (int32) of float32 block maxima; the smaller candidate for `mse`."""
    k = ((amax.contiguous().view(torch.int32) + _CARRY[rule]) >> 23) - 127 - 2
    return k.clamp_(MIN_EXPONENT, MAX_EXPONENT)


def _scale_bytes(k: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    return torch.where(amax > 0, k + 127, ZERO_BLOCK_BYTE).to(torch.uint8)


def _nearest(y: torch.Tensor) -> torch.Tensor:
    """The nearest grid value. torch.round goes half to even; a grid value is an even count of steps if its index is."""
    a = y.abs().clamp(max=6.0)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign(torch.round(a / step) * step, y)


def _block_sum(e: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension (32) by halving: a fixed order, so every device picks the same `mse` exponent."""
    while e.shape[-1] > 1:
        half = e.shape[-1] // 2
        e = e[..., :half] + e[..., half:]
    return e[..., 0]


# ---- the fast forms


@torch.no_grad()
def encode(w: torch.Tensor, rule: Rule = "even", *, name: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (uint8 [..., K/2]) and scale bytes (uint8 [..., K/32]): what a checkpoint stores. See `quantize`."""
    _check_weight(w, rule, name)
    if w.is_cuda:
        from . import mxfp4_triton

        return mxfp4_triton.encode(w, rule, name=name)
    packed = torch.empty(*w.shape[:-1], w.shape[-1] // 2, dtype=torch.uint8)
    scales = torch.empty(*w.shape[:-1], w.shape[-1] // BLOCK, dtype=torch.uint8)
    packed_rows, scale_rows = packed.view(-1, BLOCK // 2), scales.view(-1)
    for rows, grid, k, amax in _rounded_chunks(w, rule, name):
        sign = (grid.view(torch.int32) >> 28).bitwise_and_(8)
        a = grid.abs_()
        # 0 and 0.5 move to 0.5 and 0.75; then a float's exponent and top mantissa bit count the grid points in order.
        a = torch.maximum(a, a * 0.5 + 0.5)
        codes = (a.view(torch.int32) >> 22).sub_(252).bitwise_or_(sign)
        pairs = codes.view(torch.int64)  # little endian: the even element is the low half
        packed_rows[rows] = (pairs >> 28).bitwise_or_(pairs).bitwise_and_(0xFF).to(torch.uint8)
        scale_rows[rows] = _scale_bytes(k, amax)
    return packed, scales


@torch.no_grad()
def decode(
    packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16, *, name: str = "weight"
) -> torch.Tensor:
    """Values [..., K] of packed codes (uint8 [..., K/2]) and scales (uint8 [..., K/32]). ValueError for byte 255."""
    _check_codes(packed, scales, 2 * packed.shape[-1] if packed.ndim else 0, name)
    if packed.is_cuda:
        from . import mxfp4_triton

        return mxfp4_triton.decode(packed, scales, dtype)
    out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=dtype)
    table = dequantize(  # float32 [256, 2]: the two values of a byte, read below as one 64-bit word
        unpack(torch.arange(256, dtype=torch.uint8).view(-1, 1).expand(256, BLOCK // 2)),
        torch.full((256, 1), 127, dtype=torch.uint8),
        torch.float32,
    )[:, :2].contiguous()
    table = table.view(torch.int64).view(-1)
    packed_rows, scale_rows, out_rows = packed.reshape(-1, BLOCK // 2), scales.reshape(-1, 1), out.view(-1, BLOCK)
    for rows in _chunks(out_rows.shape[0]):
        v = table.index_select(0, packed_rows[rows].reshape(-1).int()).view(torch.float32).view(-1, BLOCK)
        k = scale_rows[rows].int() - 127
        out_rows[rows] = v.mul_(torch.ldexp(torch.ones_like(k, dtype=torch.float32), k))
    return out


@torch.no_grad()
def snap(w: torch.Tensor, rule: Rule = "even", *, name: str = "weight") -> torch.Tensor:
    """The bfloat16 tensor that a reader of the encoded weight gets: bit-equal to `decode(*encode(w, rule))`."""
    out = torch.empty(w.shape, dtype=torch.bfloat16, device=w.device)
    _snap_into(out, w, rule, name, count=False)
    return out


@torch.no_grad()
def snap_(param_bf16: torch.Tensor, master: torch.Tensor, rule: Rule = "even", *, name: str = "weight") -> int:
    """Write `snap(master)` into `param_bf16` (after every optimizer step). Returns how many elements changed bits.

    Both have the same shape and device. ValueError for a non-finite master: then some blocks may be written already.
    """
    _check_pair(param_bf16, master, name)
    if param_bf16.is_contiguous():
        return _snap_into(param_bf16, master, rule, name, count=True)
    new = snap(master, rule, name=name)
    flips = int(torch.count_nonzero(param_bf16.contiguous().view(torch.int16) != new.view(torch.int16)))
    param_bf16.copy_(new)
    return flips


def _check_pair(param_bf16: torch.Tensor, master: torch.Tensor, name: str) -> None:
    if param_bf16.dtype != torch.bfloat16:
        raise ValueError(f"{name}: the snapped copy is {param_bf16.dtype}; keep it in torch.bfloat16")
    if param_bf16.shape != master.shape or param_bf16.device != master.device:
        raise ValueError(
            f"{name}: the snapped copy is {_what(param_bf16)} and the master {_what(master)}; "
            "give both the same shape on the same device"
        )


def snap_each_(params_bf16: dict[str, torch.Tensor], masters: dict[str, torch.Tensor], rule: Rule = "even") -> int:
    """`snap_` of every parameter; names key both. On a GPU the host waits once for all of them, not once for each."""
    flips, contiguous_cuda = 0, {n: p for n, p in params_bf16.items() if p.is_cuda and p.is_contiguous()}
    for name, param in params_bf16.items():
        if name not in contiguous_cuda:
            flips += snap_(param, masters[name], rule, name=name)
    if contiguous_cuda:
        from . import mxfp4_triton

        for name, param in contiguous_cuda.items():
            _check_pair(param, masters[name], name)
            _check_weight(masters[name], rule, name)
        flips += mxfp4_triton.snap_each_(contiguous_cuda, masters, rule)
    return flips


def _snap_into(out: torch.Tensor, w: torch.Tensor, rule: Rule, name: str, count: bool) -> int:
    _check_weight(w, rule, name)
    if w.is_cuda:
        from . import mxfp4_triton

        return mxfp4_triton.snap_(out, w, rule, name=name, count=count)
    flips = 0
    out_rows = out.view(-1, BLOCK)
    for rows, grid, k, _ in _rounded_chunks(w, rule, name):
        new = grid.mul_(_power_of_two(k).unsqueeze(-1)).to(torch.bfloat16)
        old = out_rows[rows]
        if count:
            flips += int(torch.count_nonzero(old.view(torch.int16) ^ new.view(torch.int16)))
        old.copy_(new)
    return flips


def _chunks(blocks: int) -> Iterator[slice]:
    step = _CHUNK // BLOCK * torch.get_num_threads()
    return (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))


def _rounded_chunks(
    w: torch.Tensor, rule: Rule, name: str
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per chunk of blocks: rows, grid values (float32 [rows, 32], never -0), exponents (int32 [rows]), amax [rows]."""
    blocks = w.reshape(-1, BLOCK)
    for rows in _chunks(blocks.shape[0]):
        x = blocks[rows].float()
        scratch = x.abs()
        amax = scratch.amax(-1)
        _check_finite(amax, name)
        k = _exponents(amax, rule)
        y = torch.mul(x, _power_of_two(-k).unsqueeze(-1))
        if rule == "mse":
            y = hardshrink(y, 0.25)
            up = (k + 1).clamp_(max=MAX_EXPONENT)
            ratio = _power_of_two(up - k).unsqueeze(-1)
            low, high = _round_(y.clone(), scratch), _round_(y / ratio, torch.empty_like(y))
            keep = _block_sum((y - low).square_()) <= _block_sum(y.sub_(high * ratio).square_())
            yield rows, torch.where(keep.unsqueeze(-1), low, high), torch.where(keep, k, up), amax
        else:
            yield rows, _round_(y, scratch), k, amax


def _round_(y: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """`_nearest` in place, in five passes without a branch; the result has no -0. `scratch`: float32 of y's shape.

    With e = max(floor(log2 |y|), 0), floats near 1.5 * 2**(22 + e) are 2**(e - 1) apart, which is the grid step at y.
    So adding that number rounds y to the grid (half to even, in hardware), and subtracting it is exact.
    """
    y.clamp_(-6.0, 6.0)
    torch.bitwise_and(y.view(torch.int32), 0x7F800000, out=scratch.view(torch.int32))
    scratch.clamp_(min=1.0)  # 2**e
    return y.add_(scratch, alpha=1.5 * 2**22).sub_(scratch, alpha=1.5 * 2**22)


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    """float32 2**k of int32 k in [-126, 127], from the bits."""
    return ((k + 127) << 23).view(torch.float32)


# ---- refusals


def _what(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}"


def _check_weight(w: torch.Tensor, rule: str, name: str) -> None:
    if rule not in RULES:
        raise ValueError(f"{name}: unknown scale rule {rule!r}; use one of {', '.join(RULES)}")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: cannot encode {_what(w)}; convert it to float32, bfloat16 or float16")
    if not w.ndim or w.shape[-1] % BLOCK:
        raise ValueError(
            f"{name}: {_what(w)} has no whole blocks of {BLOCK} in its last dimension; "
            "pad it, or leave this tensor out of MXFP4"
        )


def _check_finite(amax: torch.Tensor, name: str) -> None:
    if amax.numel() and not torch.isfinite(amax.max()):  # max propagates NaN
        raise_not_finite(name, int((~torch.isfinite(amax)).sum()))


def raise_not_finite(name: str, blocks: int) -> None:
    raise ValueError(
        f"{name}: NaN or Inf in at least {blocks} block(s) of {BLOCK}; MXFP4 cannot hold it, "
        "so lower the learning rate or repair the source checkpoint"
    )


def _check_codes(codes: torch.Tensor, scales: torch.Tensor, k: int, name: str) -> None:
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(
            f"{name}: codes {_what(codes)}, scales {_what(scales)}; both must be uint8 (use .view(torch.uint8))"
        )
    if not codes.ndim or k % BLOCK or scales.shape != (*codes.shape[:-1], k // BLOCK):
        raise ValueError(
            f"{name}: scales {list(scales.shape)} do not fit codes {list(codes.shape)}; "
            f"expected one byte per {BLOCK} elements of the last dimension, neither swizzled nor transposed"
        )
    if codes.device != scales.device:
        raise ValueError(f"{name}: codes on {codes.device}, scales on {scales.device}; move them to one device")
    if not scales.is_meta and bool((scales == NAN_BYTE).any()):
        raise ValueError(
            f"{name}: scale byte 255 (NaN) in {int((scales == NAN_BYTE).sum())} block(s); "
            "the file is damaged or its scales are not E8M0, convert it again"
        )
