"""pytest -m gpu tests/gpu/test_linear_gpu.py   (speed: python -m mimo_kernels.bench --only linear)

The compiled products of a decode step against the float64 reference on fresh inputs, and bit for bit.
"""

import os

import pytest
import torch

from mimo_kernels import fp8, linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
QKV_FLASH_TP4, O_FLASH_TP4, QKV_PRO_TP8 = (3392, 4096), (4096, 2048), (3392, 6144)


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator("cuda").manual_seed(seed)


def random_x(tokens, k, g):
    return torch.randn(tokens, k, generator=g, device="cuda").bfloat16()


def random_weights(n, k, g, chunk_rows=None):
    w = torch.randn(n, k, generator=g, device="cuda")
    weights = [w.bfloat16()]
    if k % 128 == 0:
        weights.append(linear.pack_fp8(*fp8.quantize(w, chunk_rows), chunk_rows))
    return weights


def relative_error(y, x, w):
    expected = linear.reference(x, w, torch.float64)
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("shape", "chunk_rows"),
    [(s, None) for s in (QKV_FLASH_TP4, O_FLASH_TP4, QKV_PRO_TP8, (200, 576), (8, 128))] + [((640, 512), 320)],
    ids=str,
)
def test_tokens(shape, chunk_rows, generator):
    for w in random_weights(*shape, generator, chunk_rows):
        for tokens in range(1, 17):
            x = random_x(tokens, shape[1], generator)
            assert relative_error(linear.linear(x, w), x, w) < 5e-3, (tokens, type(w))


def test_unpacked_codes_are_the_dequantised_values(generator):
    for shape, chunk_rows in ((QKV_FLASH_TP4, None), ((640, 512), 320)):
        q, scale = fp8.quantize(torch.randn(*shape, generator=generator, device="cuda"), chunk_rows)
        values = fp8.dequantize(q, scale, chunk_rows)
        assert torch.equal(linear.unpack_fp8(linear.pack_fp8(q, scale, chunk_rows)), values)


@pytest.mark.parametrize("tokens", [8, 16])
def test_every_tile(tokens, generator):
    from mimo_kernels import linear_triton as lt

    bf16, packed = random_weights(1000, 2048, generator)
    x = random_x(tokens, 2048, generator)
    for w, tiles in ((packed, lt.FP8_TILES), (bf16, lt.BF16_TILES)):
        for tile in tiles:
            for slices in (1, 4):
                assert relative_error(lt.linear(x, w, lt.Config(tile, slices)), x, w) < 5e-3, (tile, slices)


@pytest.mark.parametrize("tokens", [1, 16])
def test_every_code_is_exact(tokens):
    """One code a row reaches the output: zeros, subnormals (BF16 subnormals on the way) and 448, in both signs."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].cuda()
    rows = torch.arange(len(codes), device="cuda")
    q = torch.zeros(len(codes), 128, dtype=torch.uint8, device="cuda")
    q[rows, rows % 128] = codes
    packed = linear.pack_fp8(q.view(torch.float8_e4m3fn), torch.full((2, 1), 0.5, device="cuda"))
    y = linear.linear(torch.ones(tokens, 128, dtype=torch.bfloat16, device="cuda"), packed)
    assert torch.equal(y.float(), (codes.view(torch.float8_e4m3fn).float() * 0.5).expand(tokens, -1))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e30])
def test_scales_of_any_magnitude(magnitude, generator):
    q, scale = fp8.quantize(torch.randn(256, 1024, generator=generator, device="cuda"))
    packed = linear.pack_fp8(q, scale * magnitude)
    x = random_x(5, 1024, generator)
    assert relative_error(linear.linear(x, packed), x, packed) < 5e-3


def test_bits_depend_on_the_token_alone(generator):
    for shape in (QKV_FLASH_TP4, O_FLASH_TP4):
        for w in random_weights(*shape, generator):
            for tokens in (8, 16):
                x = random_x(tokens, shape[1], generator)
                y = linear.linear(x, w).view(torch.int16)
                for _ in range(30):
                    assert torch.equal(linear.linear(x, w).view(torch.int16), y)
                for t in range(tokens):
                    others = random_x(tokens, shape[1], generator)
                    others[t] = x[t]
                    assert torch.equal(linear.linear(others, w)[t].view(torch.int16), y[t])
                    if tokens == 8:
                        assert torch.equal(linear.linear(x[t : t + 1], w)[0].view(torch.int16), y[t])


def test_in_a_graph(generator):
    weights = random_weights(*QKV_FLASH_TP4, generator)
    x = random_x(8, 4096, generator)
    for w in weights:
        linear.linear(x, w)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear.linear(x, w)
        for _ in range(3):
            x.copy_(random_x(8, 4096, generator))
            graph.replay()
            assert torch.equal(y.view(torch.int16), linear.linear(x, w).view(torch.int16))
            assert relative_error(y, x, w) < 5e-3
