"""The CUDA kernels themselves, run on a processor (`emulator`): against float64, bit for bit between orders of threads
and between ways to cut the same rows into calls, and with several blocks at once, which may not wait for each other
forever. What a GPU adds is its own arithmetic and its memory model; tests/gpu has those.
"""

import pytest
import torch

from mimo_kernels import (
    attention,
    cuda,
    fp8,
    heads,
    linear,
    linear_cuda,
    moe,
    moe_cuda,
    router,
    router_cuda,
    window_cuda,
)
from tests.kernels.emulator import emulated, needs_compiler  # noqa: F401

pytestmark = needs_compiler
WINDOW, K_DIM, V_DIM, HALF = 128, 192, 128, 32


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator).bfloat16()


def relative_error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


def same_bits(a, b):
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


# ---- attention over a window


class Window:
    def __init__(self, sizes, slots, rows, g):
        (self.heads, self.groups), self.slots = sizes, slots
        self.qkv = normal(rows, (self.heads + self.groups) * K_DIM + self.groups * V_DIM, generator=g)
        angles = torch.rand(rows, HALF, generator=g) * 6
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.keys = normal(self.groups, slots, K_DIM, generator=g)
        self.values = normal(self.groups, slots, V_DIM, generator=g)
        self.sink = torch.randn(self.heads, generator=g)

    def run(self, start, rows, count, keys, values, sink=True):
        """The output for the slice `rows`; writes into `keys` and `values`."""
        padded = [t[rows][torch.arange(8).clamp(max=count - 1)].contiguous() for t in (self.qkv, self.cos, self.sin)]
        args = *padded, keys, values, torch.tensor(start)
        assert window_cuda.fits(args[0], args[1], keys, values, count, WINDOW)
        kw = {"scale": 0.06, "sink": self.sink if sink else None, "value_scale": 0.7}
        return window_cuda.attend(*args, count, WINDOW, **kw)

    def expected(self, start, count, sink=True):
        q, k, v = heads.reference(
            self.qkv, self.cos, self.sin, (self.groups, K_DIM, V_DIM), value_scale=0.7, dtype=torch.float64
        )
        place, keys, values = (start + torch.arange(count)) % self.slots, self.keys.clone(), self.values.clone()
        keys[:, place], values[:, place] = k[:count].transpose(0, 1), v[:count].transpose(0, 1)
        kw = {"scale": 0.06, "window": WINDOW, "sink": self.sink if sink else None, "dtype": torch.float64}
        return attention.reference(q[:count], keys, values, torch.tensor(start), **kw), keys, values


@pytest.mark.parametrize("sizes", [(16, 2), (16, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("slots", [136, 144])
def test_window_against_float64(sizes, slots, generator, emulated):  # noqa: F811
    emulated()
    for start, count, sink in ((0, 8, True), (3, 1, False), (127, 8, True), (133, 3, True), (70_001, 8, False)):
        case = Window(sizes, slots, 8, generator)
        keys, values = case.keys.clone(), case.values.clone()
        out = case.run(start, slice(8), count, keys, values, sink)
        expected, k, v = case.expected(start, count, sink)
        assert relative_error(out[:count], expected) < 5e-3, (start, count)
        assert all(torch.equal(row, out[count - 1]) for row in out[count:])
        assert torch.equal(values, v) and (keys.float() - k.float()).abs().max() <= 2**-6  # a rotation's last bit


@pytest.mark.parametrize("start", [0, 130, 4000])
def test_window_rows_do_not_depend_on_the_call(start, generator, emulated):  # noqa: F811
    """Eight rows of one call, one by one, and in calls of 3 and 5; threads in other orders; and with what a rejected
    draft left in the slots."""
    case = Window((16, 2), 136, 8, generator)
    outs, rings = [], []
    for seed, cuts in ((1, [8]), (2, [1] * 8), (3, [3, 5]), (4, [8])):
        emulated(seed)
        keys, values, parts, at = case.keys.clone(), case.values.clone(), [], 0
        if seed == 4:  # as after rounds whose rows were not accepted
            stale = (start + torch.arange(8)) % 136
            keys[:, stale], values[:, stale] = 50.0, -70.0
        for count in cuts:
            parts.append(case.run(start + at, slice(at, at + count), count, keys, values)[:count])
            at += count
        outs.append(torch.cat(parts))
        rings.append((keys, values))
    assert all(same_bits(out, outs[0]) for out in outs)
    assert all(torch.equal(k, rings[0][0]) and torch.equal(v, rings[0][1]) for k, v in rings)


@pytest.mark.parametrize("barrier", ["__syncthreads();", "wait_for_copies<0>();"])
def test_a_missing_wait_shows(barrier, generator, emulated):  # noqa: F811
    case = Window((16, 2), 136, 8, generator)
    expected, *_ = case.expected(1000, 8)
    errors = []
    for seed in range(3):
        emulated(seed, change=(barrier, ""))
        out = case.run(1000, slice(8), 8, case.keys.clone(), case.values.clone())
        errors.append(relative_error(out, expected))
    assert not all(error < 5e-3 for error in errors)


# ---- products


@pytest.mark.parametrize("is_fp8", [False, True], ids=["bf16", "fp8"])
def test_linear(is_fp8, generator, emulated):  # noqa: F811
    for rows, k in ((70, 1024), (32, 3072)):
        w = torch.randn(rows, k, generator=generator)
        weight = linear.pack_fp8(*fp8.quantize(w, None), None) if is_fp8 else w.bfloat16()
        x = normal(8, k, generator=generator)
        assert linear_cuda.fits(weight, 8)
        emulated(1)
        y = linear_cuda.linear(x, weight)
        assert relative_error(y, linear.reference(x, weight, torch.float64)) < 3e-3
        emulated(2)
        assert same_bits(linear_cuda.linear(x[3:5], weight), y[3:5])


def test_router_logits(generator, emulated):  # noqa: F811
    w = torch.randn(7, 1024, generator=generator)
    x = normal(16, 1024, generator=generator)
    emulated(1)
    y = router_cuda.logits(x, w)
    assert relative_error(y, x.double() @ w.double().T) < 1e-6
    emulated(2)
    assert same_bits(router_cuda.logits(x[9:10].contiguous(), w), y[9:10])


# ---- experts


def random_experts(count, hidden, inter, g):
    def codes(*shape, low=0, high=256):
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=g)

    return moe.Experts(
        codes(count, 2 * inter, hidden // 2),
        codes(count, 2 * inter, hidden // 32, low=114, high=124),
        codes(count, hidden, inter // 2),
        codes(count, hidden, inter // 32, low=114, high=124),
    )


@pytest.mark.parametrize("inter", [128, 256, 512])
def test_experts(inter, generator, emulated):  # noqa: F811
    """Several blocks at once, which wait for each other's strips, in several orders; then one block that does it all.
    Rows alone have the bits that they have together, and the counters are zero again."""
    experts = random_experts(6, 2048, inter, generator)
    packed = moe.pack_experts(experts)
    x = normal(3, 2048, generator=generator)
    ids = torch.tensor([[4, 0], [5, 4], [2, 2]], dtype=torch.int32)  # the last token has one expert, twice
    weights = torch.rand(3, 2, generator=generator)
    assert moe_cuda.fits(packed, 3, 2)
    expected = moe.reference(x, ids, weights, experts, torch.float64)
    found = []
    for seed, blocks in ((1, 3), (2, 3), (3, 1)) if inter == 128 else ((1, 2),):
        emulated(seed, together=blocks > 1, multiprocessors=blocks)
        found.append(moe_cuda.moe(x, ids, weights, packed))
        assert not moe_cuda._ready(x.device, packed.down.data_ptr()).any()
    assert relative_error(found[0], expected) < 4e-3
    assert all(same_bits(y, found[0]) for y in found)
    alone = moe_cuda.moe(x[1:2].contiguous(), ids[1:2], weights[1:2], packed)
    assert same_bits(alone[0], found[0][1])


@pytest.mark.parametrize(("count", "top_k"), [(6, 2), (40, 3), (70, 8)])
def test_experts_that_are_chosen(count, top_k, generator, emulated):  # noqa: F811
    """The choice from logits inside of the kernel is the router's, with its ties, and products are bit for bit those
    when this choice is given."""
    packed = moe.pack_experts(random_experts(count, 2048, 128, generator))
    x = normal(3, 2048, generator=generator)
    matrix = torch.randn(count, 2048, generator=generator) / 40
    matrix[3], matrix[count - 1] = matrix[1], matrix[0]  # equal logits: the lower id comes first
    one, several = torch.randn(count, generator=generator) / 10, torch.randn(5, count, generator=generator) / 10
    one[[0, 1, 3, count - 1]] = 0.5
    positions = torch.tensor([3, 4, 1005])
    for bias, normalise in ((one, True), (several, False), (several.round(), True)):
        steering = router.Router(matrix, bias, top_k, normalise, 1.7)
        emulated(1)
        logits = router_cuda.logits(x, matrix)
        emulated(2, together=True, multiprocessors=2)
        found, weights, ids = moe_cuda.routed(x, logits, steering, positions, packed)
        expected, chosen = router.reference(
            x, matrix, bias, top_k, normalise=normalise, scaling=1.7, positions=positions, dtype=torch.float64
        )
        assert torch.equal(ids, chosen) and (weights - expected).abs().max() < 1e-5
        assert same_bits(found, moe_cuda.parts(x, ids, weights, packed))
        alone = moe_cuda.routed(x[1:2].contiguous(), logits[1:2].contiguous(), steering, positions[1:2], packed)
        assert torch.equal(alone[2], ids[1:2]) and same_bits(alone[0], found[:, 1:2])


def test_routed_is_the_logits_and_the_kernel_that_chooses(generator, emulated, monkeypatch):  # noqa: F811
    """Of whatever strides and types; what is read early is made before the logits, behind which nothing else comes."""
    packed = moe.pack_experts(random_experts(6, 2048, 128, generator))
    x, matrix = normal(2, 2048, generator=generator), torch.randn(6, 2048, generator=generator) / 45
    bias, positions = torch.randn(6, 4, generator=generator).T, torch.tensor([5, 0, 7, 0], dtype=torch.int32)[::2]
    emulated(multiprocessors=1)
    monkeypatch.setattr(cuda, "usable", lambda device: True)
    launched, launch = [], cuda.launch
    monkeypatch.setattr(
        cuda, "launch", lambda kernel, *a, **kw: (launched.append(kernel.name), launch(kernel, *a, **kw))
    )
    steering = router.Router(matrix, bias, 2, normalise=True)
    found, weights, ids = moe.routed(x, steering, packed, positions)
    assert launched == ["logits", "experts"]
    expected, chosen = router.reference(x, matrix, bias, 2, normalise=True, positions=positions, dtype=torch.float64)
    assert torch.equal(ids, chosen) and (weights - expected).abs().max() < 1e-5
    assert same_bits(found, moe_cuda.parts(x, ids, weights, packed))


def test_experts_are_chosen_whatever_the_logits(generator, emulated):  # noqa: F811
    """NaN counts as the largest, and ids are distinct and of experts."""
    packed, top_k = moe.pack_experts(random_experts(6, 2048, 128, generator)), 4
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 6, [-inf, inf, nan, -inf, 0, 1], [-inf] * 6]
    logits, x = torch.tensor(rows), normal(3, 2048, generator=generator)
    emulated(multiprocessors=1)
    steering = router.Router(torch.empty(6, 2048), torch.zeros(6), top_k, normalise=False)
    _, weights, ids = moe_cuda.routed(x, logits, steering, None, packed)
    assert ids.tolist() == [[0, 1, 2, 3], [2, 1, 5, 4], [0, 1, 2, 3]]
    assert weights[0].isnan().all() and weights[1, 0].isnan() and not weights[2].any()
    assert weights[1, 1:].tolist() == pytest.approx([1, 0.7310586, 0.5])


def test_experts_without_their_counts_are_wrong(generator, emulated):  # noqa: F811
    """The second product may not begin before the first: blocks that do not look read what is not there yet."""
    experts = random_experts(4, 2048, 128, generator)
    packed = moe.pack_experts(experts)
    x, ids = normal(2, 2048, generator=generator), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    weights = torch.rand(2, 2, generator=generator)
    expected = moe.reference(x, ids, weights, experts, torch.float64)
    # One block after the other, so that the first comes to its second product before the others have begun.
    emulated(multiprocessors=3, change=("flags[i] < INTER / 8", "false"))
    assert not relative_error(moe_cuda.moe(x, ids, weights, packed), expected) < 4e-3
