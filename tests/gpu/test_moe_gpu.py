"""pytest -m gpu tests/gpu/test_moe_gpu.py   (speed: python -m mimo_kernels.bench)

The compiled MoE kernels against the float64 reference on fresh inputs, and bit for bit against themselves.
"""

import os

import pytest
import torch

from mimo_kernels import moe, moe_many, mxfp4, router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
FLASH_TP4 = (4096, 512)
PRO_TP8 = (6144, 256)


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator("cuda").manual_seed(seed)


def random_experts(count, hidden, inter, g, scales=(114, 124)):
    def random(*shape, low=0, high=256):
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8, device="cuda")

    low, high = scales
    return moe.Experts(
        random(count, 2 * inter, hidden // 2),
        random(count, 2 * inter, hidden // 32, low=low, high=high),
        random(count, hidden, inter // 2),
        random(count, hidden, inter // 32, low=low, high=high),
    )


def random_tokens(tokens, top_k, experts, hidden, g):
    x = torch.randn(tokens, hidden, generator=g, device="cuda").bfloat16()
    ids = torch.rand(tokens, experts, generator=g, device="cuda").argsort(-1)[:, :top_k]
    return x, ids.contiguous(), torch.rand(tokens, top_k, generator=g, device="cuda").softmax(-1)


def relative_error(y, x, ids, weights, experts):
    expected = moe.reference(x, ids, weights, experts, torch.float64)
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [FLASH_TP4, PRO_TP8, (4096, 2048), (576, 192), (128, 128)], ids=str)
def test_tokens(shape, generator):
    experts = random_experts(24, *shape, generator)
    packed = moe.pack_experts(experts)
    for tokens in range(1, 17):
        for dtype in (torch.int32, torch.int64):
            x, ids, weights = random_tokens(tokens, 8, 24, shape[0], generator)
            y = moe.moe(x, ids.to(dtype), weights, packed)
            assert relative_error(y, x, ids, weights, experts) < 1e-2, tokens


@pytest.mark.parametrize("shape", [(*FLASH_TP4, 256), (*PRO_TP8, 384), (2048, 128, 40)], ids=str)
def test_experts_that_are_chosen(shape, generator):
    """The choice inside of the kernel of experts is the router's, and what follows has the bits of `parts` of it."""
    hidden, inter, count = shape
    packed = moe.pack_experts(random_experts(count, hidden, inter, generator))
    matrix = torch.randn(count, hidden, generator=generator, device="cuda") / hidden**0.5
    one, several = (torch.randn(*n, count, generator=generator, device="cuda") / 10 for n in ((), (7,)))
    rows = 0
    for tokens in range(1, 17):
        x = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
        positions = torch.randint(0, 1000, (tokens,), generator=generator, device="cuda")
        for bias, normalise in ((one, True), (several, False)):
            steering = router.Router(matrix, bias, 8, normalise, 1.3)
            found, weights, ids = moe.routed(x, steering, packed, positions)
            expected, chosen = router.reference(
                x, matrix, bias, 8, normalise=normalise, scaling=1.3, positions=positions, dtype=torch.float64
            )
            keys = (x.double() @ matrix.double().T).sigmoid() + (bias if bias.ndim == 1 else bias[positions % 7])
            clear = (keys.topk(9).values.diff().abs() > 1e-5).all(-1)  # else a rounding may turn the order
            assert torch.equal(ids[clear], chosen[clear])
            assert ((weights[clear] - expected[clear]).abs() < 1e-5).all()
            rows += int(clear.sum())
            assert torch.equal(found, moe.parts(x, ids, weights, packed))
            alone = moe.routed(x[:1], steering, packed, positions[:1])
            if tokens <= 8:  # more rows are another kernel's
                assert torch.equal(alone[2], ids[:1]) and torch.equal(alone[0][:, 0], found[:, 0])
    assert rows > 2 * 136 * 0.9


@pytest.mark.parametrize("tokens", [8, 16])
def test_every_tile(tokens, generator):
    from mimo_kernels import moe_triton as mt

    hidden, inter = 1024, 512
    experts = random_experts(12, hidden, inter, generator)
    packed = moe.pack_experts(experts)
    x, ids, weights = random_tokens(tokens, 4, 12, hidden, generator)
    for config in (
        *(mt.Config(t, mt.DOWN_TILES[0], 2) for t in mt.TILES),
        *(mt.Config(mt.GATE_UP_TILES[0], t, groups) for t in mt.TILES for groups in (1, 4, 8)),
    ):
        assert relative_error(mt.moe(x, ids, weights, packed, config), x, ids, weights, experts) < 1e-2, config


def test_every_code_is_exact(generator):
    """One weight a row reaches the output. Code 0.5 is a BF16 subnormal until the scale restores it."""
    experts = random_experts(1, 128, 128, generator, scales=(127, 128))
    gate, up = experts.gate_up.chunk(2, dim=1)
    gate.zero_()
    gate[:, :, 0] = 6  # gate = 4 x[0] = 64, where sigmoid is 1 in float32
    up.zero_()
    up[:, 0, 0] = 2  # hidden 0 = 64 * x[0] = 64 * 16, the others 0
    codes = torch.arange(128, device="cuda") % 16
    experts.down.zero_()
    experts.down[0, :, 0] = codes.to(torch.uint8)
    x = torch.zeros(1, 128, device="cuda", dtype=torch.bfloat16)
    x[0, 0] = 16
    one = torch.ones(1, 1, device="cuda")
    y = moe.moe(x, torch.zeros(1, 1, dtype=torch.int32, device="cuda"), one, moe.pack_experts(experts))
    grid = torch.tensor([*mxfp4.GRID, *(-v for v in mxfp4.GRID)], device="cuda")
    assert torch.equal(y[0].float(), 1024 * grid[codes])


@pytest.mark.parametrize("scale", [2, 64, 127, 128])
def test_extreme_scales(scale, generator):
    """Below 2, scaled weights would be BF16 subnormals, which tensor cores need not keep; no checkpoint has them."""
    experts = random_experts(4, *FLASH_TP4, generator)
    experts.down_scales.fill_(scale)
    x, ids, weights = random_tokens(5, 2, 4, FLASH_TP4[0], generator)
    y = moe.moe(x, ids, weights, moe.pack_experts(experts))
    assert relative_error(y, x, ids, weights, experts) < 1e-2


@pytest.mark.parametrize("routing", ["one expert", "all but one", "repeated"])
def test_ragged_loads(routing, generator):
    experts = random_experts(16, *FLASH_TP4, generator)
    x, ids, weights = random_tokens(8, 2, 16, FLASH_TP4[0], generator)
    if routing == "repeated":
        ids[:, 1] = ids[:, 0]
    else:
        ids, weights = torch.full_like(ids[:, :1], 9), weights[:, :1].contiguous()
        ids[3] = 9 if routing == "one expert" else 2
    y = moe.moe(x, ids, weights, moe.pack_experts(experts))
    assert relative_error(y, x, ids, weights, experts) < 1e-2


def test_bits_depend_on_the_token_alone(generator):
    packed = moe.pack_experts(random_experts(64, *FLASH_TP4, generator))
    x, ids, weights = random_tokens(8, 8, 64, FLASH_TP4[0], generator)
    y = moe.moe(x, ids, weights, packed)
    for _ in range(50):
        assert torch.equal(moe.moe(x, ids, weights, packed).view(torch.int16), y.view(torch.int16))
    for t in range(8):
        alone = moe.moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], packed)
        assert torch.equal(alone[0].view(torch.int16), y[t].view(torch.int16))


def test_an_expert_that_overflows_for_others_does_no_harm(generator):
    experts = random_experts(2, 256, 256, generator)
    experts.gate_up_scales[0] -= 100
    x, _, weights = random_tokens(2, 1, 2, 256, generator)
    x[0] *= 2.0**100
    ids = torch.tensor([[0], [1]], device="cuda")
    y = moe.moe(x, ids, weights, moe.pack_experts(experts))
    assert y.isfinite().all() and relative_error(y, x, ids, weights, experts) < 1e-2


def test_in_a_graph_with_new_routing(generator):
    """A replay reads ids, weights and x from device memory: the host takes no part."""
    experts = random_experts(32, *FLASH_TP4, generator)
    packed = moe.pack_experts(experts)
    x, ids, weights = random_tokens(8, 8, 32, FLASH_TP4[0], generator)
    moe.moe(x, ids, weights, packed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe.moe(x, ids, weights, packed)
    for _ in range(3):
        for old, new in zip((x, ids, weights), random_tokens(8, 8, 32, FLASH_TP4[0], generator), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(y.view(torch.int16), moe.moe(x, ids, weights, packed).view(torch.int16))
        assert relative_error(y, x, ids, weights, experts) < 1e-2


def test_packing_is_the_same_on_both_devices(generator):
    experts = random_experts(3, 576, 192, generator)
    on_cpu = moe.pack_experts(moe.Experts(*(getattr(experts, n).cpu() for n in experts.__dataclass_fields__)))
    packed = moe.pack_experts(experts)
    for name in ("gate_up", "gate_up_scales", "down", "down_scales"):
        assert torch.equal(getattr(packed, name).cpu(), getattr(on_cpu, name))
        assert torch.equal(getattr(moe.unpack_experts(packed), name), getattr(experts, name))


@pytest.mark.parametrize("shape", [FLASH_TP4, PRO_TP8, (576, 192)], ids=str)
@pytest.mark.parametrize("tokens", [17, 33, 129, 600, 2048])
def test_many_tokens(tokens, shape, generator):
    """With experts that nobody chose; the bits of two runs."""
    experts = random_experts(24, *shape, generator)
    packed = moe.pack_experts(experts)
    for x, ids, weights in (random_tokens(tokens, 8, pool, shape[0], generator) for pool in (24, 10)):
        y, again = (moe_many.moe_many(x, i, weights, packed) for i in (ids, ids.int()))
        assert relative_error(y, x, ids, weights, experts) < 1e-2
        assert torch.equal(y.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("tokens", [33, 600])
def test_bits_of_many_tokens_depend_on_the_token_alone(tokens, generator):
    """In another order, and with other neighbours: other blocks, and other places in them."""
    packed = moe.pack_experts(random_experts(24, *FLASH_TP4, generator))
    x, ids, weights = random_tokens(tokens, 8, 24, FLASH_TP4[0], generator)
    y = moe_many.moe_many(x, ids, weights, packed)
    order = torch.randperm(tokens, generator=generator, device="cuda")
    moved = moe_many.moe_many(x[order], ids[order], weights[order], packed)
    assert torch.equal(moved.view(torch.int16), y[order].view(torch.int16))
    others = random_tokens(tokens, 8, 24, FLASH_TP4[0], generator)
    for old, new in zip((x, ids, weights), others, strict=True):
        old[1::2] = new[1::2]
    beside = moe_many.moe_many(x, ids, weights, packed)
    assert torch.equal(beside[::2].view(torch.int16), y[::2].view(torch.int16))


def test_many_tokens_in_a_graph_with_new_routing(generator):
    """As a round of a large tree has them."""
    experts = random_experts(32, *FLASH_TP4, generator)
    packed = moe.pack_experts(experts)
    x, ids, weights = random_tokens(33, 8, 32, FLASH_TP4[0], generator)
    moe_many.moe_many(x, ids, weights, packed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe_many.moe_many(x, ids, weights, packed)
    for pool in (32, 8, 20):
        for old, new in zip((x, ids, weights), random_tokens(33, 8, pool, FLASH_TP4[0], generator), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(y.view(torch.int16), moe_many.moe_many(x, ids, weights, packed).view(torch.int16))
        assert relative_error(y, x, ids, weights, experts) < 1e-2


def test_memory_of_a_long_chunk(generator):
    """What the docstring says, and lists of a few bytes a pair; nothing stays."""
    packed = moe.pack_experts(random_experts(24, *FLASH_TP4, generator))
    x, ids, weights = random_tokens(2048, 8, 24, FLASH_TP4[0], generator)
    moe_many.moe_many(x, ids, weights, packed)  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = moe_many.moe_many(x, ids, weights, packed)
    hidden, inter = FLASH_TP4
    between = 2 * 2048 * (8 * (hidden + inter) + hidden)
    assert torch.cuda.max_memory_allocated() - before <= between + y.nbytes + 2**21
    assert torch.cuda.memory_allocated() - before == y.nbytes
