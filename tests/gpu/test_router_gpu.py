"""pytest -m gpu tests/gpu/test_router_gpu.py   (speed: python -m mimo_kernels.bench --only router)

The compiled routing against float64 on fresh inputs, against exact ties, and bit for bit.
"""

import os

import pytest
import torch

from mimo_kernels import router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
# experts, hidden size, experts a row: MiMo-V2.5, Pro, SmolLM2, and odd ones
SHAPES = [(256, 4096, 8), (384, 6144, 8), (8, 576, 2), (512, 1024, 16), (1, 8, 1), (33, 520, 7)]


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator("cuda").manual_seed(seed)


def random_case(rows, experts, hidden, g):
    def random(*size):
        return torch.randn(*size, generator=g, device="cuda")

    return random(rows, hidden).bfloat16(), random(experts, hidden) * 2 / hidden**0.5, random(experts) / 10


def exact_case(rows, experts, hidden, g):
    """Small integers: logits are exact in any order of summation, and many are equal."""
    x = torch.randint(-2, 3, (rows, hidden), generator=g, device="cuda").bfloat16()
    weight = torch.randint(-1, 2, (experts, hidden), generator=g, device="cuda").float()
    column = torch.arange(hidden, device="cuda")
    weight *= column % (hidden // 7) == 0  # 8 columns: logits of at most 8, whose scores differ
    return x / 2, weight


def check(y, x, weight, bias, *, normalise, scaling, positions=None):
    """Ids are a choice that float64 allows within float32's rounding, in descending order; weights are theirs."""
    weights, ids = y
    top_k = ids.shape[1]
    scores = (x.double() @ weight.double().T).sigmoid()
    biased = scores + (bias if bias.ndim == 1 else bias[positions % len(bias)]).double()
    assert ids.min() >= 0 and ids.max() < len(weight) and all(len(set(row)) == top_k for row in ids.tolist())
    chosen = biased.gather(1, ids.long())
    assert (chosen - biased.sort(dim=-1, descending=True).values[:, :top_k]).abs().max() < 3e-6
    expected = scores.gather(1, ids.long())
    if normalise:
        expected = expected / (expected.sum(-1, keepdim=True) + 1e-20)
    assert ((weights - expected * scaling).abs() <= 3e-6 * expected.amax(-1, keepdim=True) * scaling).all()


def same(a, b):
    return torch.equal(a[0].view(torch.int32), b[0].view(torch.int32)) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(shape, generator):
    """An error of 3e-6 in a score of logits around 2 is what float32 leaves; TF32 would be 100 times worse."""
    experts, hidden, top_k = shape
    for rows in (1, 3, 8, 9, 16):
        x, weight, bias = random_case(rows, experts, hidden, generator)
        kw = {"normalise": rows != 3, "scaling": 1.0 if rows == 8 else 2.5}
        check(router.route(x, weight, bias, top_k, **kw), x, weight, bias, **kw)


def test_a_bias_for_each_position(generator):
    x, weight, _ = random_case(6, 256, 4096, generator)
    bias = torch.randn(5, 256, generator=generator, device="cuda")
    for dtype in (torch.int32, torch.int64):
        positions = torch.tensor([0, 4, 5, 6, 1003, 2**31 - 1], dtype=dtype, device="cuda")
        kw = {"normalise": True, "scaling": 1.0, "positions": positions}
        check(router.route(x, weight, bias, 8, **kw), x, weight, bias, **kw)


def test_every_configuration(generator):
    from mimo_kernels import router_triton

    x, weight, bias = random_case(9, 256, 4096, generator)
    for config in router_triton.CONFIGS:
        y = router_triton.route(x, weight, bias, 8, normalise=True, config=config)
        check(y, x, weight, bias, normalise=True, scaling=1.0)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_ties_go_to_the_lower_id(shape, generator):
    """Exact logits, so that equal ones have equal scores in the kernel and in torch."""
    experts, hidden, top_k = shape
    for rows in (1, 16):
        x, weight = exact_case(rows, experts, hidden, generator)
        _, ids = router.route(x, weight, torch.zeros(experts, device="cuda"), top_k, normalise=False)
        logits = x.double() @ weight.double().T
        assert torch.equal(ids.long(), logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k])
    weights, ids = router.route(x * 0, weight, torch.zeros(experts, device="cuda"), top_k, normalise=True)
    assert torch.equal(ids, torch.arange(top_k, device="cuda").int().expand(16, -1)) and (weights == 1 / top_k).all()


def test_nan_and_extremes_keep_ids_valid(generator):
    x, weight, bias = random_case(4, 256, 4096, generator)
    good = router.route(x, weight, bias, 8, normalise=True)
    broken = x.clone()
    broken[1], broken[2] = float("nan"), -float("nan")
    weights, ids = router.route(broken, weight, bias, 8, normalise=True)
    assert ids[1:3].tolist() == [list(range(8))] * 2 and weights[1:3].isnan().all()
    assert torch.equal(ids[::3], good[1][::3]) and torch.equal(weights[::3], good[0][::3])
    weights, ids = router.route(x * 1e4, weight, bias, 8, normalise=True)
    assert weights.isfinite().all() and all(len(set(row)) == 8 for row in ids.tolist())


def test_bits_depend_on_the_row_alone(generator):
    for experts, hidden, top_k in SHAPES[:3]:
        x, weight, bias = random_case(16, experts, hidden, generator)
        y = router.route(x, weight, bias, top_k, normalise=True)
        for _ in range(50):
            assert same(router.route(x, weight, bias, top_k, normalise=True), y)
        for t in range(16):
            one = router.route(x[t : t + 1], weight, bias, top_k, normalise=True)
            assert same(one, (y[0][t : t + 1], y[1][t : t + 1]))
        eight = router.route(x[8:], weight, bias, top_k, normalise=True)
        assert same(eight, (y[0][8:], y[1][8:]))


def test_in_a_graph_at_any_position(generator):
    x, weight, _ = random_case(8, 256, 4096, generator)
    bias, start = torch.randn(7, 256, generator=generator, device="cuda"), torch.tensor(0, device="cuda")
    row = torch.arange(8, device="cuda")

    def step():
        return router.route(x, weight, bias, 8, normalise=True, positions=start + row)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for position in (0, 3, 12345):
        start.fill_(position)
        x.copy_(random_case(8, 256, 4096, generator)[0])
        graph.replay()
        assert same(y, step())
        check(y, x, weight, bias, normalise=True, scaling=1.0, positions=start + row)
