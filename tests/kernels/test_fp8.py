"""Block FP8: bytes worked by hand, the restart of the grid at chunk borders, tails, an ml_dtypes oracle, refusals."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_kernels import fp8


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random, with magnitudes that differ from row to row, so that a tile at the wrong place shows."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * torch.exp2(torch.randint(-12, 4, (rows, 1), generator=g))


def tiles(rows: int, columns: int, chunk_rows: int | None) -> list[tuple[slice, slice]]:
    """Every tile's slices in storage order, written as loops: chunks, then row blocks; column blocks inside."""
    chunk = chunk_rows or rows
    return [
        (slice(r, min(r + 128, start + chunk)), slice(c, min(c + 128, columns)))
        for start in range(0, rows, chunk)
        for r in range(start, start + chunk, 128)
        for c in range(0, columns, 128)
    ]


LAYOUTS = [(128, 128, None), (1, 1, None), (130, 200, None), (2 * 192, 96, 192), (4 * 424, 260, 424), (6, 300, 2)]


def test_worked_tile_is_these_bytes():
    """amax 896 -> scale 2. 896/2 = 448 = 0x7E; -1/2 = -.5 = 0xB0; 17/2 = 8.5 is a tie of 8 (0x50) and 9 (0x51):
    even, 8; 19/2 = 9.5, a tie of 9 and 10 (0x52): even, 10; 0 is 0x00. The next tile is zero: scale 1.
    """
    w = torch.zeros(1, 129)
    w[0, :5] = torch.tensor([896.0, -1.0, 17.0, 19.0, 0.0])
    codes, scale = fp8.quantize(w)
    assert codes.view(torch.uint8)[0, :5].tolist() == [0x7E, 0xB0, 0x50, 0x52, 0x00]
    assert scale.tolist() == [[2.0, 1.0]] and scale.dtype == torch.float32
    assert fp8.dequantize(codes, scale)[0, :6].tolist() == [896.0, -1.0, 16.0, 20.0, 0.0, 0.0]


@pytest.mark.parametrize(("rows", "columns", "chunk_rows"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiles_match_a_loop_with_ml_dtypes(rows, columns, chunk_rows, dtype):
    w = weight(rows, columns).to(dtype)
    kept = w.clone()
    codes, scale = fp8.quantize(w, chunk_rows)
    assert torch.equal(w, kept)  # float32 input is not scaled in place
    grid = tiles(rows, columns, chunk_rows)
    assert scale.numel() == len(grid) and scale.shape == fp8.scale_shape(w, chunk_rows)
    values = fp8.dequantize(codes, scale, chunk_rows, torch.float32).numpy()
    for (r, c), s in zip(grid, scale.flatten().numpy(), strict=True):
        tile = w[r, c].float().numpy()
        assert s == np.abs(tile).max() / np.float32(448)
        expected = np.clip(tile / s, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(codes[r, c].view(torch.uint8).numpy(), expected.view(np.uint8))
        assert (codes[r, c].view(torch.uint8) & 0x7F).max() == 0x7E  # the test that identifies a row layout
        np.testing.assert_array_equal(values[r, c], expected.astype(np.float32) * s)


def test_grid_restarts_at_chunks_like_the_published_fused_qkv():
    """A quarter of it: 8 chunks of 848 = 6 * 128 + 80 rows have 8 * 7 scale rows, not ceil(6784 / 128) = 53."""
    w = weight(8 * 848, 64)
    codes, scale = fp8.quantize(w, 848)
    assert scale.shape == (56, 1)
    chunk = [fp8.quantize(part) for part in w.split(848)]
    assert torch.equal(codes.view(torch.uint8), torch.cat([q for q, _ in chunk]).view(torch.uint8))
    assert torch.equal(scale, torch.cat([s for _, s in chunk]))
    assert fp8.scale_shape(torch.empty(27136, 6144, device="meta"), 3392) == (216, 48)
    assert fp8.scale_shape(torch.empty(13568, 4096, device="meta"), 3392) == (108, 32)
    assert fp8.scale_shape(torch.empty(14848, 4096, device="meta"), 3712) == (116, 32)
    # Read without the chunks, some tile has no code 448.
    grid = [codes[r, c].view(torch.uint8) & 0x7F for r, c in tiles(8 * 848, 64, None)]
    assert min(int(t.max()) for t in grid) < 0x7E


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 150), st.integers(-100, 100), st.integers(0, 99))
def test_error_bound_and_fixed_point(chunks, chunk_rows, columns, n, seed):
    """Relative error <= 2**-4 above the tile's subnormals, else half a step of 2**-9; a second pass changes no code."""
    w = weight(chunks * chunk_rows, columns, seed) * 2.0**n
    codes, scale = fp8.quantize(w, chunk_rows)
    value = fp8.dequantize(codes, scale, chunk_rows, torch.float32)
    step = scale.repeat_interleave(128, 1)[:, :columns]
    blocks = -(-chunk_rows // 128)
    step = torch.cat(
        [step[i * blocks : (i + 1) * blocks].repeat_interleave(128, 0)[:chunk_rows] for i in range(chunks)]
    )
    bound = torch.maximum(w.abs() * 2.0**-4, step * 2.0**-10) * (1 + 1e-6)
    assert ((value - w).abs() <= bound).all()
    again, again_scale = fp8.quantize(value, chunk_rows)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert ((again_scale / scale - 1).abs() <= 2.0**-23).all()


def test_extremes_stay_finite():
    """The largest float32, subnormals, and a tile whose scale underflows: no NaN code (0x7F), no division by zero."""
    for top in (torch.finfo(torch.float32).max, 1e-38, 1e-40, 2.0**-149, 0.0):
        w = torch.tensor([[top, -top, top / 3]])
        codes, scale = fp8.quantize(w)
        assert (codes.view(torch.uint8) & 0x7F).max() <= 0x7E and scale.item() > 0
        value = fp8.dequantize(codes, scale, dtype=torch.float32)
        assert torch.isfinite(value).all()
        if top > 1e-37:
            assert torch.allclose(value, w, rtol=2.0**-4)


def test_strided_input_and_output_dtype():
    w = weight(200, 130).t()
    codes, scale = fp8.quantize(w)
    straight, straight_scale = fp8.quantize(w.contiguous())
    assert torch.equal(codes.view(torch.uint8), straight.view(torch.uint8)) and torch.equal(scale, straight_scale)
    assert codes.is_contiguous()
    exact = fp8.dequantize(codes, scale, dtype=torch.float32)
    assert torch.equal(fp8.dequantize(codes, scale), exact.bfloat16())  # one rounding, after the float32 product


@pytest.mark.parametrize(
    ("w", "chunk_rows", "complaint"),
    [
        (torch.zeros(4, 4, dtype=torch.int8), None, r"torch.int8; convert it"),
        (torch.zeros(4, 4, dtype=torch.float64), None, r"torch.float64; convert it"),
        (torch.zeros(4), None, r"2-D weight, got \[4\]; give one matrix"),
        (torch.zeros(2, 4, 4), None, r"2-D weight, got \[2, 4, 4\]"),
        (torch.zeros(0, 4), None, r"empty; leave it out"),
        (torch.zeros(6, 4), 4, r"chunk_rows=4 does not divide 6 rows"),
        (torch.zeros(6, 4), 0, r"chunk_rows=0 does not divide"),
        (torch.tensor([[1.0, float("nan")]]), None, r"NaN or Inf in 1 tile"),
        (torch.tensor([[float("inf")]]).half(), None, r"NaN or Inf in 1 tile"),
    ],
)
def test_bad_weights_are_refused(w, chunk_rows, complaint):
    with pytest.raises(ValueError, match=rf"^layers\.0\.qkv: .*{complaint}"):
        fp8.quantize(w, chunk_rows, name="layers.0.qkv")


def test_bad_files_are_refused():
    codes, scale = fp8.quantize(weight(2 * 192, 100), 192)
    for q, s, chunk_rows, complaint in [
        (codes.view(torch.uint8), scale, 192, r"codes are torch.uint8.*expected float8_e4m3fn"),
        (codes, scale.bfloat16(), 192, r"scales torch.bfloat16.*expected float8_e4m3fn and float32"),
        (codes, scale, None, r"scale_inv is \[4, 1\].*needs \[3, 1\]; pass the chunk_rows"),
        (codes, scale.t(), 192, r"scale_inv is \[1, 4\].*needs \[4, 1\]"),
        (codes, scale, 100, r"chunk_rows=100 does not divide 384 rows"),
        (codes[0], scale, None, r"2-D weight"),
    ]:
        with pytest.raises(ValueError, match=rf"^w5: .*{complaint}"):
            fp8.dequantize(q, s, chunk_rows, name="w5")
