"""Block FP8: E4M3 codes with one float32 scale per 128x128 tile, as in the dense part of MiMo-V2 and DeepSeek-V3 files.

The format
    weight            float8_e4m3fn [N, K]: 448 is the largest magnitude, there is no Inf
    weight_scale_inv  float32 [row blocks, ceil(K / 128)]: in spite of the name it *multiplies*, w = code * scale
    scale = amax / 448 of the tile in float32, and 1.0 for an all-zero tile; codes round to nearest even. So every
    non-zero tile has a code of magnitude 448 (byte 0x7E): a reader can verify a guessed row layout with that alone.

Chunks. A fused QKV weight is stored as equal chunks of rows [Q_c | K_c | V_c], and the tile grid restarts at every
chunk. A chunk of 3392 rows is 26 whole tiles and one of 64 rows, so eight chunks have 8 * 27 = 216 scale rows, not
ceil(27136 / 128) = 212. `chunk_rows` gives the rows of a chunk; None is one chunk, which is every other weight. Tails
are legal in both dimensions.

Why not a library's FP8 linear: those quantize for their own matmul (per tensor, per row, or with power-of-two scales);
this one follows the published files. Given up: any other tile, activation scales, and weights that are not 2-D.
"""

import torch

BLOCK = 128
MAX = 448.0


@torch.no_grad()
def quantize(
    w: torch.Tensor, chunk_rows: int | None = None, *, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [N, K], float32 scale [N / chunk_rows * ceil(chunk_rows / 128), ceil(K / 128)]) of w [N, K].

    w is float32, bfloat16 or float16; the arithmetic is float32. ValueError for another dtype or rank, a NaN or Inf,
    an empty tensor, or a `chunk_rows` that does not divide N.
    """
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: cannot quantize {w.dtype}; convert it to float32, bfloat16 or float16")
    _check_rows(w, chunk_rows, name)
    if not w.numel():
        raise ValueError(f"{name}: {list(w.shape)} is empty; leave it out of the checkpoint")
    amax = _tiles(w.float().abs(), chunk_rows).amax((1, 3))
    if not torch.isfinite(amax).all():
        raise ValueError(
            f"{name}: NaN or Inf in {int((~torch.isfinite(amax)).sum())} tile(s) of 128x128; repair the source weights"
        )
    # Divided by a tensor: CUDA turns a division by a Python number into a product with its rounded reciprocal.
    scale = amax / torch.full_like(amax, MAX)  # may underflow to 0: such a tile is stored as zeros
    scale = torch.where(scale > 0, scale, 1.0)
    # The clamp is for amax / scale that rounds above 448 (and for subnormal scales): past 464 the cast would give NaN.
    x = w.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for part, s in _by_tile(x, scale, chunk_rows):
        part.div_(s)
    return x.clamp_(-MAX, MAX).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def dequantize(
    q: torch.Tensor,
    scale_inv: torch.Tensor,
    chunk_rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    name: str = "weight",
) -> torch.Tensor:
    """code * scale in float32, then `dtype`; q float8_e4m3fn [N, K], scale_inv float32 as `quantize` returns it."""
    if q.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32:
        raise ValueError(
            f"{name}: codes are {q.dtype} and scales {scale_inv.dtype}; "
            "expected float8_e4m3fn and float32, read .weight and .weight_scale_inv"
        )
    _check_rows(q, chunk_rows, name)
    expected = scale_shape(q, chunk_rows)
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"{name}: scale_inv is {list(scale_inv.shape)}, but {list(q.shape)} with chunk_rows={chunk_rows} needs "
            f"{list(expected)}; pass the chunk_rows that the weight was written with"
        )
    x = q.float()
    for part, s in _by_tile(x, scale_inv, chunk_rows):
        part.mul_(s)
    return x.to(dtype)


def scale_shape(w: torch.Tensor, chunk_rows: int | None = None) -> tuple[int, int]:
    """Shape of weight_scale_inv for a weight [N, K]."""
    n, k = w.shape
    rows = chunk_rows or n
    return (n // rows if rows else 0) * -(-rows // BLOCK), -(-k // BLOCK)


def _check_rows(w: torch.Tensor, chunk_rows: int | None, name: str) -> None:
    if w.ndim != 2:
        raise ValueError(f"{name}: block FP8 needs a 2-D weight, got {list(w.shape)}; give one matrix at a time")
    if chunk_rows is not None and (chunk_rows <= 0 or w.shape[0] % chunk_rows):
        raise ValueError(
            f"{name}: chunk_rows={chunk_rows} does not divide {w.shape[0]} rows; use rows / number of chunks"
        )


def _tiles(x: torch.Tensor, chunk_rows: int | None) -> torch.Tensor:
    """Zero-padded view [row blocks, 128, column blocks, 128] of [N, K]; a chunk's tail block is padded on its own."""
    n, k = x.shape
    rows = chunk_rows or n
    x = x.reshape(n // rows, rows, k)
    x = torch.nn.functional.pad(x, (0, -k % BLOCK, 0, -rows % BLOCK))
    return x.reshape(-1, BLOCK, x.shape[-1] // BLOCK, BLOCK)


def _by_tile(x: torch.Tensor, scale: torch.Tensor, chunk_rows: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views that cover x [N, K] (whole column blocks, then the tail), each with the scales that broadcast over it."""
    n, k = x.shape
    rows = chunk_rows or max(n, 1)
    row = torch.arange(n, device=x.device)
    s = scale[row // rows * -(-rows // BLOCK) + row % rows // BLOCK]
    whole = k // BLOCK
    return [
        (x[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), s[:, :whole, None]),
        (x[:, whole * BLOCK :], s[:, whole:]),
    ]
