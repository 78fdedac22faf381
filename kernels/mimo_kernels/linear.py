"""y = x W^T for the 1 to 16 tokens of a decode step, W in BF16 or in block FP8 (`fp8`): QKV, output, MLP and head.

`reference` is the definition, in float32 or float64. `linear` is what a runtime calls. On a GPU of compute capability
9 or more it runs
    up to 8 tokens   CUDA C++ (`linear_cuda`), where the GPU and the shapes are its own (`cuda.usable`,
                     `linear_cuda.fits`: up to 8192 rows, K a whole number of loads for 16 warps)
    otherwise        Triton (`linear_triton`)
and the reference elsewhere. An FP8 product adds up some weights of a row that share a scale without it (64 in CUDA, 128
in Triton), which is exact but for float32 rounding, multiplies, and goes on: no weight is rounded. The bits of a token
depend on its own x, on the shapes and on which of the two runs (another is up to 8 tokens, and up to 16), not on its
neighbours, on timing, or on the run.

FP8 weights keep their codes as stored, rows of bytes. Only the scales are rearranged, to one for 64 rows x 128 columns:
heads of 192 and 128 rows begin at multiples of 64, so a fused QKV weight whose chunks restart the tile grid, and any
share of its heads, has this form.

Why not a library's FP8 linear: those quantize x as well. Given up: more than 16 tokens, columns that are no multiple of
128 (FP8) or 64 (BF16), and FP8 rows whose scales change inside a group of 64.
"""

from dataclasses import dataclass

import torch

from . import fp8

MAX_TOKENS = 16
GROUP_ROWS = 64


@dataclass(frozen=True)
class Fp8Weight:
    """A block-FP8 matrix [N, K] with the scales that multiply it."""

    codes: torch.Tensor  # float8_e4m3fn [N, K]
    scales: torch.Tensor  # float32 [ceil(N / 64), K / 128]

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


@torch.no_grad()
def pack_fp8(
    q: torch.Tensor,
    scale_inv: torch.Tensor,
    chunk_rows: int | None = None,
    *,
    name: str = "weight",
    proved: bool = False,
) -> Fp8Weight:
    """What `linear` takes, of a stored matrix: float8_e4m3fn [N, K] and float32 scales as `fp8.quantize` returns them.

    `chunk_rows` 1 means one row of scales for every row of codes, as parts of a matrix have them. ValueError where a
    group of 64 rows has several scales, or K is no multiple of 128. On the meta device, and where the caller has
    `proved` it from shapes, scales are not looked at, which would wait for the device.
    """
    expected = fp8.scale_shape(q, chunk_rows)
    if q.dtype != torch.float8_e4m3fn or scale_inv.dtype != torch.float32 or tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"{name}: codes {q.dtype} {list(q.shape)}, scales {scale_inv.dtype} {list(scale_inv.shape)}; expected "
            f"torch.float8_e4m3fn and torch.float32 {list(expected)} for chunk_rows={chunk_rows}"
        )
    n, k = q.shape
    if k % fp8.BLOCK:
        raise ValueError(f"{name}: {k} columns are no multiple of {fp8.BLOCK}; dequantize this weight to BF16")
    rows = chunk_rows or n
    row = torch.arange(n, device=q.device)
    tile = row // rows * -(-rows // fp8.BLOCK) + row % rows // fp8.BLOCK
    first = row // GROUP_ROWS * GROUP_ROWS
    if not (proved or q.is_meta) and not torch.equal(scale_inv[tile], scale_inv[tile[first]]):
        raise ValueError(
            f"{name}: scales change inside a group of {GROUP_ROWS} rows (chunk_rows={chunk_rows}); "
            "dequantize this weight to BF16"
        )
    return Fp8Weight(q.contiguous(), scale_inv[tile[::GROUP_ROWS]])


@torch.no_grad()
def unpack_fp8(w: Fp8Weight) -> torch.Tensor:
    """BF16 [N, K]: code * scale in float32, rounded once, which is what `fp8.dequantize` makes of the stored form."""
    if w.codes.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(w.codes.device)[0] >= 9:
        from . import linear_triton

        return linear_triton.unpack_fp8(w)
    n, k = w.shape
    scales = w.scales.repeat_interleave(GROUP_ROWS, 0)[:n, :, None]
    codes = w.codes.to(torch.bfloat16).view(n, k // fp8.BLOCK, fp8.BLOCK)  # exact
    # The product rounds into `out`, so that a GPU writes no float32 copy of the matrix.
    return torch.mul(codes, scales, out=torch.empty_like(codes)).view(n, k)


def fits(w: torch.Tensor) -> bool:
    """Whether `linear` takes such a matrix of values: contiguous BF16 [N, K], K a multiple of 64."""
    return w.dtype == torch.bfloat16 and w.ndim == 2 and w.shape[1] % 64 == 0 and w.is_contiguous()


@torch.no_grad()
def reference(x: torch.Tensor, w: torch.Tensor | Fp8Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`dtype` [T, N] of x [T, K] and w [N, K]."""
    if isinstance(w, Fp8Weight):
        scales = w.scales.to(dtype).repeat_interleave(fp8.BLOCK, 1).repeat_interleave(GROUP_ROWS, 0)
        return x.to(dtype) @ (w.codes.to(dtype) * scales[: len(w.codes)]).T
    return x.to(dtype) @ w.to(dtype).T


@torch.no_grad()
def linear(x: torch.Tensor, w: torch.Tensor | Fp8Weight) -> torch.Tensor:
    """BF16 [T, N] of x BF16 [T, K], T <= 16, and w BF16 [N, K] or an Fp8Weight of it. ValueError for anything else."""
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected torch.bfloat16 [tokens, {w.shape[1]}]")
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ValueError(f"x: {len(x)} tokens; give 1 to {MAX_TOKENS} at a time, use torch's linear for more")
    if isinstance(w, torch.Tensor) and not fits(w):
        raise ValueError(f"w: {w.dtype} {list(w.shape)}, expected contiguous torch.bfloat16 [N, multiple of 64]")
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9:
        from . import cuda, linear_cuda, linear_triton

        few = cuda.usable(x.device) and linear_cuda.fits(w, len(x))
        return (linear_cuda if few else linear_triton).linear(x, w)
    return reference(x, w).to(torch.bfloat16)
