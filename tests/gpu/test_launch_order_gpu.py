"""pytest -m gpu tests/gpu/test_launch_order_gpu.py   (speed: python -m mimo_kernels.bench --only layer)

Programmatic dependent launch: kernels do begin early, and chains of them give the bits that they give one after the
other, where each reads what the one before wrote, and where one writes into what an earlier one read.
"""

import os
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from mimo_kernels import fp8, linear, moe, residual
from mimo_kernels.router import Router
from mimo_kernels.window import attend

triton = pytest.importorskip("triton")
tl = triton.language
from mimo_kernels import (  # noqa: E402
    launch,
    linear_triton,
    residual_triton,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
DEVICE = "cuda"
REPLAYS = 300
GROUPS, K_DIM, V_DIM, ROTATED = 2, 192, 128, 64  # of a rank of four of MiMo-V2.5 Flash
WINDOWS = (128, None, 128)  # of the layers; full attention takes two launches
SLOTS = {128: 144, None: 4096}


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator(DEVICE).manual_seed(seed)


@dataclass(frozen=True)
class Weights:
    """Of one layer."""

    norms: torch.Tensor
    qkv: linear.Fp8Weight
    o: torch.Tensor
    router: torch.Tensor
    bias: torch.Tensor
    sink: torch.Tensor
    experts: moe.PackedExperts


def random_weights(hidden, inter, heads, experts, g):
    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=g, device=DEVICE) * std

    def code_bytes(*shape, low=0, high=256):
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8, device=DEVICE)

    def words_and_scales(rows, columns):
        return code_bytes(experts, rows, columns // 2), code_bytes(experts, rows, columns // 32, low=118, high=122)

    rows = (heads + GROUPS) * K_DIM + GROUPS * V_DIM
    return Weights(
        (1 + normal(2, hidden, std=0.1)).bfloat16(),
        linear.pack_fp8(*fp8.quantize(normal(rows, hidden, std=hidden**-0.5))),
        normal(hidden, heads * V_DIM, std=hidden**-0.5).bfloat16(),
        normal(experts, hidden, std=hidden**-0.5),
        normal(5, experts, std=0.5),
        normal(heads),
        moe.pack_experts(moe.Experts(*words_and_scales(2 * inter, hidden), *words_and_scales(hidden, inter))),
    )


class Chain:
    """Some decoder layers on `tokens` rows, with inputs and caches of its own; the experts are those of its router."""

    def __init__(self, layers, tokens, hidden, top_k):
        self.layers, self.tokens, self.top_k = layers, tokens, top_k
        self.x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
        self.start = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.rows = torch.arange(tokens, device=DEVICE)
        self.cos, self.sin = torch.zeros(2, tokens, ROTATED // 2, dtype=torch.bfloat16, device=DEVICE)
        self.caches = [
            tuple(torch.zeros(GROUPS, SLOTS[w], d, dtype=torch.bfloat16, device=DEVICE) for d in (K_DIM, V_DIM))
            for w in WINDOWS
        ]

    def set(self, x, start, angles):
        self.x.copy_(x)
        self.start.fill_(start)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def run(self):
        """Everything that the layers leave for others, except the caches."""
        x, part, left = self.x, None, []
        positions = self.start + self.rows  # which row of biases an expert's choice has: read early, made in the pass
        for w, window, cache in zip(self.layers, WINDOWS, self.caches, strict=True):
            x, normed = residual.add_rms_norm(x, part, w.norms[0], 1e-5)
            sink = w.sink if window else None
            kw = {"count": self.tokens, "scale": K_DIM**-0.5, "window": window, "sink": sink}
            qkv = linear.linear(normed, w.qkv)
            out = attend(qkv, self.cos, self.sin, *cache, self.start, **kw)
            x, normed = residual.add_rms_norm(x, linear.linear(out.flatten(1), w.o), w.norms[1], 1e-5)
            router = Router(w.router, w.bias, self.top_k, normalise=True)
            part, _, ids = moe.routed(normed, router, w.experts, positions)
            left += [x, ids, part]
        return left


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.setattr(launch, "switched_on", lambda: True)


def off(monkeypatch):
    monkeypatch.setattr(launch, "switched_on", lambda: False)


def captured(step):
    """(graph, what step() returned)."""
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        left = step()
    return graph, left


def differences(pairs):
    """On the device: how many elements differ in their bits."""
    integer = {2: torch.int16, 4: torch.int32}
    return sum((a.view(integer[a.element_size()]) != b.view(integer[b.element_size()])).sum() for a, b in pairs)


@triton.jit
def _clocked_kernel(TIMES, spin, PDL: tl.constexpr):
    """TIMES int64 [3]: ns at the beginning, after the wait, and `spin` ns later."""
    began = tl.extra.cuda.globaltimer()
    launch.wait(PDL)
    waited = tl.extra.cuda.globaltimer()
    ended = waited
    while ended - waited < spin:
        ended = tl.extra.cuda.globaltimer()
    tl.store(TIMES, began)
    tl.store(TIMES + 1, waited)
    tl.store(TIMES + 2, ended)


@pytest.mark.parametrize("on", [True, False])
def test_a_kernel_begins_before_its_predecessor_ends_and_waits_for_it(on, monkeypatch):
    """In a graph and outside of one. Without this the other tests would say nothing.

    The wait holds always. That a kernel begins early is allowed and not promised, and another process on the GPU may
    keep it from a multiprocessor: some do, and none without the launch attribute.
    """
    if not on:
        off(monkeypatch)
    times = torch.zeros(4, 3, dtype=torch.int64, device=DEVICE)

    def step():
        for row in times:
            _clocked_kernel[(1,)](row, 200_000, **launch.dependent(row), num_warps=1)

    graph, _ = captured(step)
    for run in (graph.replay, step):
        early = 0
        for _ in range(20):
            run()
            rows = times.tolist()
            assert all(after[1] >= before[2] > 0 for before, after in pairwise(rows))
            early += sum(after[0] < before[2] for before, after in pairwise(rows))
        assert (early > 0) is on


def test_what_is_no_kernel_may_stand_between():
    """Copies, fills and events of a graph, as the runtime has them: what follows begins after them."""
    times = torch.zeros(4, 3, dtype=torch.int64, device=DEVICE)
    kept = torch.zeros_like(times)
    event = torch.cuda.Event(enable_timing=True, external=True)

    def step():
        times.zero_()
        for i, between in enumerate((lambda: kept.copy_(times), event.record, lambda: kept[3].zero_(), lambda: None)):
            _clocked_kernel[(1,)](times[i], 50_000, **launch.dependent(times), num_warps=1)
            between()

    graph, _ = captured(step)
    for _ in range(20):
        graph.replay()
        rows = times.tolist()
        assert all(after[1] >= before[2] > 0 for before, after in pairwise(rows))
        assert kept.tolist() == [rows[0], [0] * 3, [0] * 3, [0] * 3]


@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_layers_give_the_same_bits(tokens, generator, monkeypatch):
    """Replays follow each other without a pause, each on new rows, new positions and what the last one left in the
    caches."""
    hidden, experts = 4096, 32
    layers = [random_weights(hidden, 512, 16, experts, generator) for _ in WINDOWS]
    early, late = (Chain(layers, tokens, hidden, 8) for _ in range(2))
    graph, left = captured(early.run)
    with monkeypatch.context() as patch:
        off(patch)
        other, expected = captured(late.run)
    for chain in (early, late):
        for cache in chain.caches:
            for t in cache:
                t.zero_()
    pairs = [*zip(left, expected, strict=True)]
    pairs += [pair for a, b in zip(early.caches, late.caches, strict=True) for pair in zip(a, b, strict=True)]
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    sizes = torch.zeros((), device=DEVICE)
    for i in range(REPLAYS):
        x = torch.randn(early.x.shape, generator=generator, device=DEVICE)
        angles = torch.randn(early.cos.shape, generator=generator, device=DEVICE)
        for chain, replay in ((early, graph.replay), (late, other.replay)):
            chain.set(x, i * tokens % 3000, angles)
            replay()
        wrong += differences(pairs)
        sizes += left[-1].float().norm()
    assert int(wrong) == 0 and sizes.isfinite() and sizes > 0


def test_layers_outside_of_a_graph(generator, monkeypatch):
    hidden = 1024
    layers = [random_weights(hidden, 256, 4, 16, generator) for _ in WINDOWS]
    early, late = (Chain(layers, 8, hidden, 4) for _ in range(2))
    for i in range(20):
        x = torch.randn(early.x.shape, generator=generator, device=DEVICE)
        angles = torch.randn(early.cos.shape, generator=generator, device=DEVICE)
        for chain in (early, late):
            chain.set(x, 8 * i, angles)
        left = early.run()
        with monkeypatch.context() as patch:
            off(patch)
            expected = late.run()
        assert int(differences(zip(left, expected, strict=True))) == 0, i


@pytest.mark.parametrize("norm", [residual.add_rms_norm, residual_triton.add_rms_norm], ids=["public", "Triton"])
def test_nobody_writes_what_an_earlier_kernel_still_reads(norm, generator, monkeypatch):
    """The norm writes into the memory that the product before it read: the allocator handed it on."""
    tokens, size, steps = 8, 4096, 40
    weights = [(torch.randn(size, size, generator=generator, device=DEVICE) / 64).bfloat16() for _ in range(4)]
    scale = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    config = linear_triton.Config(linear_triton.BF16_TILES[0], 1)  # one launch, long after its first loads
    x = torch.zeros(tokens, size, dtype=torch.bfloat16, device=DEVICE)

    def step():
        here, places = x.clone(), []
        for i in range(steps):
            places.append(here.data_ptr())
            product = linear_triton.linear(here, weights[i % 4], config)
            del here
            here = norm(product, None, scale, 1e-5)[1]
            del product
        assert not torch.cuda.is_current_stream_capturing() or len(set(places)) <= 3
        return here

    graph, left = captured(step)
    with monkeypatch.context() as patch:
        off(patch)
        other, expected = captured(step)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPLAYS):
        x.copy_(torch.randn(x.shape, generator=generator, device=DEVICE))
        graph.replay()
        other.replay()
        wrong += differences([(left, expected)])
    assert int(wrong) == 0 and left.float().norm() > 1
