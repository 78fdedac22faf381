"""Products for a decode step: definition, kernels in Triton's interpreter, and the machine code they become.

The interpreter truncates when it converts to BF16 and multiplies in float32; the compiled kernels have
tests/gpu/test_linear_gpu.py.
"""

import pytest
import torch

from mimo_kernels import fp8, linear
from tests.kernels.triton_tools import (
    compile_for_sm90,
    inside,
    main_loop,
    needs_tools,
    outside,
    pass_in_the_interpreter,
    spills,
)

CODES = torch.arange(256, dtype=torch.uint8)
CODES = CODES[(CODES & 0x7F) != 0x7F]  # all but the two NaN


def random_case(seed, tokens, n, k, chunk_rows=None):
    """x, BF16 weight, FP8 weight of the same shape with scales of several magnitudes, float64 values of that."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g).bfloat16()
    w = torch.randn(n, k, generator=g) * torch.exp(torch.randn(n, k // 64, generator=g)).repeat_interleave(64, 1)
    q, scale = fp8.quantize(w, chunk_rows)
    values = fp8.dequantize(q, scale, chunk_rows, torch.float64)
    return x, w.bfloat16(), linear.pack_fp8(q, scale, chunk_rows) if k % 128 == 0 else None, values


def relative_error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


# ---- the definition


@outside
@pytest.mark.parametrize(("n", "chunk_rows"), [(192, None), (200, None), (640, 320), (128, 64), (384, 192)])
def test_reference_is_the_formula(n, chunk_rows):
    """Chunks restart the grid of scales: 320 rows are two tiles of 128 and one of 64."""
    x, w, packed, values = random_case(n, 5, n, 256, chunk_rows)
    assert packed.shape == (n, 256) and packed.scales.shape == (-(-n // 64), 2)
    # float64 of the float32 product of code and scale, as the codec rounds it
    assert relative_error(linear.reference(x, packed, torch.float64), x.double() @ values.T) < 1e-7
    assert relative_error(linear.unpack_fp8(packed), values) < 3e-3 and linear.unpack_fp8(packed).shape == values.shape
    assert relative_error(linear.linear(x, packed), x.double() @ values.T) < 3e-3
    assert relative_error(linear.linear(x, w), x.double() @ w.double().T) < 3e-3


@outside
def test_a_part_of_a_matrix(assert_same_bits):
    """Heads from two chunks, with a row of scales for every row, as a rank reads them."""
    g = torch.Generator().manual_seed(0)
    q, scale = fp8.quantize(torch.randn(640, 256, generator=g), 320)
    row = torch.cat((torch.arange(64, 192), torch.arange(320, 448)))
    tile = row // 320 * 3 + row % 320 // 128
    packed = linear.pack_fp8(q[row], scale[tile], 1)
    whole = linear.pack_fp8(q, scale, 320)
    assert_same_bits(packed.scales, whole.scales[[1, 2, 5, 6]])
    x = torch.randn(3, 256, generator=g).bfloat16()
    assert_same_bits(linear.reference(x, packed, torch.float64), linear.reference(x, whole, torch.float64)[:, row])


@outside
def test_refusals():
    x, w, packed, _ = random_case(0, 4, 192, 128)
    q, scale = fp8.quantize(torch.randn(192, 128), 96)
    for message, call in {
        "scales change inside a group of 64 rows": lambda: linear.pack_fp8(q, scale, 96),
        "float32 .2, 1. for chunk_rows=None": lambda: linear.pack_fp8(q, scale.repeat(2, 1)),
        "192 columns are no multiple of 128": lambda: linear.pack_fp8(*fp8.quantize(torch.randn(64, 192))),
        "x: torch.float32": lambda: linear.linear(x.float(), packed),
        r"bfloat16 \[tokens, 128\]": lambda: linear.linear(x[:, :64], w),
        "17 tokens; give 1 to 16": lambda: linear.linear(x[:1].expand(17, -1), w),
        "w: torch.float32": lambda: linear.linear(x, w.float()),
        r"w: torch.bfloat16 \[128, 192\], expected contiguous": lambda: linear.linear(
            torch.cat((x, x), 1)[:, :192], w.T
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- the kernels in the interpreter


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, 35)


@pytest.fixture
def kernels():
    from mimo_kernels import linear_triton

    return linear_triton


@inside
@pytest.mark.parametrize("tokens", range(1, 17))
def test_tokens(kernels, tokens):
    x, w, packed, values = random_case(tokens, tokens, 192, 256)
    assert relative_error(kernels.linear(x, packed), x.double() @ values.T) < 5e-3
    assert relative_error(kernels.linear(x, w), x.double() @ w.double().T) < 5e-3


@inside
@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize(("n", "chunk_rows"), [(8, None), (200, None), (640, 320)])
def test_rows_and_slices(kernels, n, chunk_rows, slices):
    """Tails of rows, scales that restart at chunks, and K in slices."""
    x, w, packed, values = random_case(n, 3, n, 512, chunk_rows)
    for tile in (kernels.Tile(64, 128, 4, 4), kernels.Tile(16, 128, 1, 4)):
        config = kernels.Config(tile, slices)
        assert relative_error(kernels.linear(x, packed, config), x.double() @ values.T) < 5e-3
        assert relative_error(kernels.linear(x, w, config), x.double() @ w.double().T) < 5e-3


@inside
def test_a_k_of_64(kernels):
    x, w, *_ = random_case(0, 2, 64, 192)
    assert kernels.config_for(64, 192, False).tile.k == 64
    assert relative_error(kernels.linear(x, w), x.double() @ w.double().T) < 5e-3


def one_code_a_row():
    """254 rows, each with one code beside zeros; a token that picks it, and their exact product with the scale 0.5."""
    codes = torch.zeros(len(CODES), 128, dtype=torch.uint8)
    codes[torch.arange(len(CODES)), torch.arange(len(CODES)) % 128] = CODES
    scale = torch.full((2, 1), 0.5)
    return codes.view(torch.float8_e4m3fn), scale, CODES.view(torch.float8_e4m3fn).float() * 0.5


@inside
@pytest.mark.parametrize(("n", "chunk_rows"), [(8, None), (200, None), (640, 320), (128, 64)])
def test_unpacked_values(kernels, n, chunk_rows):
    """Every code times a power of two exactly; tails of rows, and scales that restart at chunks."""
    *_, packed, values = random_case(n, 1, n, 512, chunk_rows)
    assert relative_error(kernels.unpack_fp8(packed), values) < 5e-3  # which the interpreter truncates
    codes, scale, values = one_code_a_row()
    unpacked = kernels.unpack_fp8(linear.pack_fp8(codes, scale))
    row = torch.arange(len(CODES))
    assert torch.equal(unpacked[row, row % 128], values.bfloat16()) and int((unpacked != 0).sum()) <= len(row)


@inside
def test_every_code_is_exact(kernels):
    """Zeros, subnormals of 2**-9 and the largest, 448, in both signs."""
    q, scale, expected = one_code_a_row()
    y = kernels.linear(torch.ones(1, 128, dtype=torch.bfloat16), linear.pack_fp8(q, scale))
    assert torch.equal(y[0].float(), expected)
    assert expected.abs().max() == 224 and expected[expected > 0].min() == 2.0**-10


@inside
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_scales_of_any_magnitude(kernels, magnitude):
    q, scale = fp8.quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    packed = linear.pack_fp8(q, scale * magnitude)
    assert relative_error(kernels.linear(x, packed), linear.reference(x, packed, torch.float64)) < 5e-3


@inside
def test_bits_depend_on_the_token_alone(kernels, assert_same_bits):
    x, w, packed, _ = random_case(5, 6, 192, 512)
    for weight, slices in ((packed, 1), (packed, 4), (w, 1), (w, 2)):
        config = kernels.Config(kernels.Tile(64, 128, 4, 4), slices)
        y = kernels.linear(x, weight, config)
        assert_same_bits(kernels.linear(x, weight, config), y)
        assert_same_bits(kernels.linear(x[:1], weight, config), y[:1])
        others = torch.full_like(x, 3)
        others[4] = x[4]
        assert_same_bits(kernels.linear(others, weight, config)[4], y[4])


# ---- the machine code


@outside
@needs_tools
@pytest.mark.parametrize(
    ("fp8_weight", "tokens", "bound"), [(True, 8, 3.8), (True, 16, 4.3), (False, 8, 2.0), (False, 16, 2.0)]
)
def test_instructions_a_weight(fp8_weight, tokens, bound):
    """An H200 at full memory speed has time for 7.8 a byte and 15.6 for two."""
    import mimo_kernels.linear_triton as lt

    config = lt.config_for(4096, 4096, fp8_weight)
    tile = config.tile
    constants = {
        "K": 4096, "FP8": fp8_weight, "GROUP": 64, "BM": tile.rows, "BN": tokens, "BK": tile.k,
        "PTX": True, "LINES": 8,
    }  # fmt: skip
    pointers = {"OUT": "*fp32", "W": "*bf16", "SCALES": "*bf16", "X": "*bf16"}
    if fp8_weight:
        pointers |= {"W": "*u8", "SCALES": "*fp32"}
    if tokens == 8:
        constants["tokens"] = 1  # Triton makes a constant of it
    code, registers, shared = compile_for_sm90(lt._linear_kernel, pointers, constants, tile.warps, tile.stages)
    loop = main_loop(code)
    assert len(loop) * tile.warps * 32 / (tile.rows * tile.k) <= bound
    assert not spills(code) and registers <= 128 and shared <= 72 * 1024 + tokens * 1024
    per_thread = tile.rows * tile.k * (1 if fp8_weight else 2) // (tile.warps * 32)
    assert sum(op.startswith("LDGSTS") and op.endswith("128") for op in loop) >= per_thread // 16


@outside
@needs_tools
def test_unpacking_moves_16_bytes_at_a_time():
    lt = pytest.importorskip("mimo_kernels.linear_triton")
    constants = {"K": 4096, "BM": linear.GROUP_ROWS, "BK": fp8.BLOCK, "PTX": True}
    pointers = {"OUT": "*bf16", "W": "*u8", "SCALES": "*fp32"}
    code, registers, _ = compile_for_sm90(lt._unpack_kernel, pointers, constants, 4, 1)
    moved = [op for _, op, _ in code if op.startswith(("LDG", "STG"))]
    assert not spills(code) and registers <= 128
    assert sum(op.endswith("128") for op in moved) >= linear.GROUP_ROWS * fp8.BLOCK * 3 // (4 * 32 * 16), moved


@outside
def test_configurations():
    """Slices fill a GPU for the few thousand rows of QKV; a head needs none."""
    lt = pytest.importorskip("mimo_kernels.linear_triton")
    assert lt.config_for(3392, 4096, True) == lt.Config(lt.FP8_TILES[0], 8)
    assert lt.config_for(4096, 2048, False) == lt.Config(lt.BF16_TILES[0], 4)
    assert lt.config_for(38144, 4096, False).slices == 1
    for n, k in ((3392, 4096), (27136, 6144), (960, 576), (64, 128)):
        config = lt.config_for(n, k, False)
        assert k % (config.tile.k * config.slices) == 0
