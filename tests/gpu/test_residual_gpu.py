"""pytest -m gpu tests/gpu/test_residual_gpu.py   (speed: python -m mimo_kernels.bench --only norm)

The compiled residual add and RMSNorm in BF16 against the reference on fresh inputs, and bit for bit.
"""

import os

import pytest
import torch

from mimo_kernels import cuda, norm_cuda, residual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
COLUMNS = (8, 24, 576, 4096, 6144, 8192)


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator("cuda").manual_seed(seed)


def random_case(rows, columns, ranks, g):
    """x whose columns differ by orders of magnitude, an update (none for 0 ranks, one without a rank for 1), weight."""

    def random(*size):
        return torch.randn(*size, generator=g, device="cuda")

    x = random(rows, columns) * torch.exp(2 * random(columns))
    shape = (rows, columns) if ranks == 1 else (ranks, rows, columns)
    return x.bfloat16(), random(*shape).bfloat16() if ranks else None, (1 + random(columns) / 4).bfloat16()


def same_bits(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def near(normed, reference):
    """Whether a norm, whose float32 sum has another order, is a rounding or two off, and that rarely: at most 1 of 50
    elements lies so near a border of BF16 that it falls to the other side."""
    error = (normed.float() - reference.float()).abs()
    few = float((error > 0).float().mean()) < 0.02 + 4 / normed.numel()
    return few and bool((error <= 2**-6 * reference.float().abs()).all())


@pytest.mark.parametrize("ranks", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows(columns, ranks, generator):
    """The sum has the reference's bits."""
    for rows in (1, 3, 8, 16):
        x, update, weight = random_case(rows, columns, ranks, generator)
        total, normed = residual.add_rms_norm(x, update, weight, 1e-5)
        expected, reference = residual.reference(x, update, weight, 1e-5)
        assert same_bits(total, expected)
        assert near(normed, reference)


@pytest.mark.parametrize("cluster", norm_cuda.CLUSTERS)
@pytest.mark.parametrize("columns", [1024, 4096, 6144, 8192])
def test_clusters_beside_triton(columns, cluster, generator):
    """The same sums, of bits that do not depend on how many blocks share a row, and norms as near to the reference; of
    parts as ranks and as experts leave them, and of none."""
    from mimo_kernels import residual_triton

    if not cuda.usable(torch.device("cuda", 0)) or not norm_cuda.fits(columns, cluster):
        pytest.skip("not a shape of the kernel, or not a GPU")
    for rows in (1, 8, 16):
        x, update, weight = random_case(rows, columns, 8, generator)
        experts = update.float().transpose(0, 1).contiguous().transpose(0, 1) * 1.0009765625
        for added in (None, update[0], update, experts):
            total, normed = norm_cuda.add_rms_norm(x, added, weight, 1e-5, cluster)
            other, other_norm = residual_triton.add_rms_norm(x, added, weight, 1e-5)
            expected, reference = residual.reference(x, added, weight, 1e-5)
            assert same_bits(total, other) and same_bits(total, expected)
            assert near(normed, reference) and near(normed, other_norm)


def test_signed_zeros_and_overflow():
    x = torch.zeros(4, 64, device="cuda", dtype=torch.bfloat16)
    x[0], x[1, ::2], x[3] = -0.0, -1.0, 3e38
    update, weight = torch.full((2, 4, 64), -0.0, device="cuda").bfloat16(), torch.ones(64, device="cuda").bfloat16()
    total, normed = residual.add_rms_norm(x, update, weight, 1e-5)
    assert same_bits(total, x) and torch.signbit(normed[0]).all() and not normed[3].any()
    weight[5] = float("inf")  # reaches its own column only
    assert normed[:, 6:].isfinite().all() and residual.add_rms_norm(x, update, weight, 1e-5)[1][1, 6:].isfinite().all()


def test_bits_depend_on_the_row_alone(generator):
    for columns, ranks in ((4096, 0), (4096, 1), (6144, 4)):
        x, update, weight = random_case(16, columns, ranks, generator)
        y = residual.add_rms_norm(x, update, weight, 1e-5)
        for _ in range(50):
            assert all(map(same_bits, residual.add_rms_norm(x, update, weight, 1e-5), y))
        for count in (1, 8):
            part = None if update is None else update[..., :count, :]
            z = residual.add_rms_norm(x[:count], part, weight, 1e-5)
            assert all(same_bits(a, b[:count]) for a, b in zip(z, y, strict=True))


def test_every_number_of_warps(generator):
    """`bench --sweep` compares speed only."""
    from mimo_kernels import residual_triton

    x, update, weight = random_case(8, 4096, 1, generator)
    reference = residual.reference(x, update, weight, 1e-5)[1].float()
    for warps in residual_triton.WARPS:
        normed = residual_triton.add_rms_norm(x, update, weight, 1e-5, warps)[1].float()
        assert bool(((normed - reference).abs() <= 2**-6 * reference.abs()).all()), warps


def test_in_a_graph(generator):
    """A chain of sublayers, each of which reads the sum of the one before."""
    x, update, weight = random_case(8, 4096, 1, generator)

    def chain():
        total = x
        for _ in range(4):
            total, normed = residual.add_rms_norm(total, update, weight, 1e-5)
        return total, normed

    chain()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(3):
        x.copy_(random_case(8, 4096, 1, generator)[0])
        graph.replay()
        assert all(map(same_bits, y, chain()))
