"""Sums over ranks: definition, protocol under an adversary, kernels in the interpreter, and their machine code.

The interpreter has no inline assembly: there the ranks take turns, all send before one receives. The assembly is run by
tests/kernels/ptx.py, and all of it on GPUs by tests/gpu/test_symmetric_gpu.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_kernels import allreduce
from tests.kernels.ll_simulator import MODULUS, Rules, Simulation, Stuck
from tests.kernels.ptx import Thread
from tests.kernels.triton_tools import (
    compile_for_sm90,
    inside,
    needs_tools,
    outside,
    pass_in_the_interpreter,
    spills,
)


def contributions(seed, ranks, tokens, hidden):
    """Of magnitudes so different that the order of addition shows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(ranks, tokens, hidden, generator=g) * torch.exp2(
        torch.randint(-12, 12, (ranks, tokens, hidden), generator=g).float()
    )
    return x.bfloat16()


# ---- the definition


@outside
def test_reference_adds_in_rank_order(assert_same_bits):
    parts = torch.tensor([[[2.0**30]], [[-(2.0**30)]], [[1.0]]]).bfloat16()
    assert allreduce.reference(parts).item() == 1 and allreduce.reference(parts[[2, 0, 1]]).item() == 0
    zero = torch.tensor([[[-0.0]], [[-0.0]]]).bfloat16()
    assert_same_bits(allreduce.reference(zero), zero[0])
    parts = contributions(0, 4, 3, 64)
    exact = parts.double().sum(0)
    assert ((allreduce.reference(parts).double() - exact).abs() <= parts.double().abs().sum(0) * 2**-8).all()


@outside
def test_reference_with_the_norm():
    parts, x = contributions(1, 2, 3, 64), contributions(2, 1, 3, 64)[0]
    w = torch.randn(64).bfloat16()
    new, normed = allreduce.reference_add_norm(parts, x, w, 1e-5)
    assert torch.equal(new, x + allreduce.reference(parts))
    scale = new.double().square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    torch.testing.assert_close(normed.double(), new.double() * scale * w.double(), rtol=2**-7, atol=0)


def channels(ranks, hidden, seconds=2.0):
    """One on each of `ranks` buffers of this process, and the buffers."""
    elements = allreduce.capacity(hidden)
    buffers = [torch.zeros(allreduce.buffer_words(ranks, elements), dtype=torch.int64) for _ in range(ranks)]
    addresses = [b.data_ptr() for b in buffers]
    return [allreduce.open_channel(r, addresses, elements, seconds, "cpu") for r in range(ranks)], buffers


@outside
def test_refusals():
    (channel, _), _ = channels(2, 512)
    x = torch.zeros(2, 512, dtype=torch.bfloat16)
    for message, call in {
        "rank 0 of 1: give 2 to 8": lambda: allreduce.open_channel(0, [0], 512, 1.0, "cpu"),
        "rank 2 of 2": lambda: allreduce.open_channel(2, [0, 0], 512, 1.0, "cpu"),
        "elements: 100 is no multiple of 512": lambda: allreduce.open_channel(0, [0, 0], 100, 1.0, "cpu"),
        "seconds: 0; a wait": lambda: allreduce.open_channel(0, [0, 0], 512, 0, "cpu"),
        "x: torch.float32": lambda: allreduce.all_reduce(x.float(), channel),
        "multiple of 4": lambda: allreduce.all_reduce(x[:, :6].contiguous(), channel),
        "expected contiguous": lambda: allreduce.all_reduce(x.T, channel),
        "takes 1 to 16 rows": lambda: allreduce.all_reduce(x[:1].expand(17, -1).contiguous(), channel),
        "and 8192 elements": lambda: allreduce.all_reduce(torch.cat([x] * 9, 1), channel),
        "x: on cpu, expected a CUDA device": lambda: allreduce.all_reduce(x, channel),
        "multiple of 512": lambda: allreduce.all_reduce_add_norm(x[:, :256].contiguous(), x, x[0], 1e-5, channel),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- the protocol


@st.composite
def schedules(draw):
    """(sizes of launches in cells, chances of the ranks' steps, seed)"""
    ranks = draw(st.integers(2, 4))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    speeds = draw(st.lists(st.sampled_from([1.0, 0.2, 0.01]), min_size=ranks, max_size=ranks))
    return sizes, speeds, draw(st.integers(0, 2**32))


@outside
@settings(deadline=None, max_examples=60)
@given(schedules(), st.sampled_from([0, 5, MODULUS // 2 - 3, MODULUS - 3]))
def test_every_schedule_ends_with_the_same_sums(schedule, start):
    """No deadlock, no word of another epoch or cell, at any speeds, sizes that change, and where the epoch wraps."""
    simulation = Simulation(Rules(start=start), *schedule)
    simulation.run()
    assert all(len(marks) == len(schedule[0]) for marks in simulation.marks) and not simulation.wrong()
    assert not any(simulation.failed)


@outside
@settings(deadline=None, max_examples=60)
@given(schedules(), st.sampled_from([0.5, 0.05]), st.booleans(), st.integers(0, 7))
def test_giving_up_makes_no_wrong_sum(schedule, gives_up, stops, launch):
    """A rank that stops, or waits that end too early: all come to an end, and who has no error has the right sums."""
    last = len(schedule[1]) - 1
    simulation = Simulation(Rules(gives_up=gives_up, stops=(last, launch) if stops else None), *schedule)
    simulation.run()
    assert not simulation.wrong()
    if stops and launch < len(schedule[0]):
        assert all(simulation.failed[:last]) and all(
            len(marks) == len(schedule[0]) for marks in simulation.marks[:last]
        )
        if gives_up < 0.1 and not simulation.failed[last] and launch == 0:
            assert set(simulation.failed[:last]) <= {1 + r for r in range(last + 1)}


def faults(rules):
    """How many of 50 schedules of a fast and two slow ranks get stuck, and how many are wrong."""
    stuck = wrong = 0
    for seed in range(50):
        simulation = Simulation(rules, [2, 1, 2, 2, 1, 2], [1.0, 0.1, 0.02], seed)
        try:
            simulation.run()
            wrong += bool(simulation.wrong())
        except Stuck:
            stuck += 1
    return stuck, wrong


@outside
def test_the_simulator_finds_what_is_broken():
    """One half: a fast rank overwrites what a slow one waits for. Flags that travel alone: payloads of other epochs."""
    assert faults(Rules()) == (0, 0)
    assert faults(Rules(halves=1))[0] > 20
    assert faults(Rules(torn=True))[1] > 20


# ---- the kernels in the interpreter


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, 14)


@pytest.fixture
def kernels():
    from mimo_kernels import allreduce_triton

    return allreduce_triton


def in_turns(call, parts, ends):
    """Every rank's result of `call(x, channel, phase)`: all send, then all receive."""
    for x, channel in zip(parts, ends, strict=True):
        call(x, channel, 1)
    return [call(x, channel, 2) for x, channel in zip(parts, ends, strict=True)]


@inside
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("hidden", [64, 160])
def test_sums(kernels, assert_same_bits, ranks, hidden):
    """Many epochs of changing sizes over the same buffers, with tails of cells, full to the last row."""
    ends, _ = channels(ranks, hidden)
    for epoch, tokens in enumerate((1, 16, 3, 1, 16, 5)):
        parts = contributions(epoch, ranks, tokens, hidden)
        expected = allreduce.reference(parts)
        for got in in_turns(kernels.all_reduce, parts, ends):
            assert_same_bits(got, expected)
    assert all(int(end.failed) == 0 for end in ends)
    assert int(ends[0].epochs[0]) == 6 and int(ends[0].epochs[-1]) == 2


@inside
@pytest.mark.parametrize(("ranks", "hidden"), [(2, 512), (4, 1536)])
def test_the_fused_form_adds_parts_first(kernels, assert_same_bits, ranks, hidden):
    """float32 parts of experts: their sum in order, rounded, is what travels."""
    ends, _ = channels(ranks, hidden)
    x, w = contributions(7, 2, 5, hidden)[0], contributions(8, 1, 1, hidden)[0, 0]
    parts = torch.randn(ranks, 5, 3, hidden, generator=torch.Generator().manual_seed(ranks))
    sums = (parts[:, :, 0] + parts[:, :, 1] + parts[:, :, 2]).bfloat16()

    def fused(part, channel, phase):
        return kernels.all_reduce_add_norm(part, x, w, 1e-5, channel, phase)

    expected = in_turns(fused, sums, ends)
    for got, other in zip(in_turns(fused, [p.transpose(0, 1) for p in parts], ends), expected, strict=True):
        assert_same_bits(got[0], other[0])
        assert_same_bits(got[1], other[1])


@inside
@pytest.mark.parametrize(("ranks", "hidden"), [(2, 512), (4, 1536)])
def test_the_fused_form(kernels, assert_same_bits, ranks, hidden):
    """Between plain sums over the same buffers, also where a row is no power of two."""
    ends, _ = channels(ranks, hidden)
    w = contributions(9, 1, 1, hidden)[0, 0]
    for epoch, tokens in enumerate((2, 5, 1)):
        parts, x = contributions(epoch, ranks, tokens, hidden), contributions(epoch + 50, 1, tokens, hidden)[0]

        def fused(part, channel, phase, x=x):
            return kernels.all_reduce_add_norm(part, x, w, 1e-5, channel, phase)

        new, normed = allreduce.reference_add_norm(parts, x, w, 1e-5)
        results = in_turns(fused, parts, ends)
        for got_new, got_normed in results:
            assert_same_bits(got_new, new)
            assert_same_bits(got_normed, results[0][1])
            torch.testing.assert_close(got_normed.float(), normed.float(), rtol=2**-6, atol=0)
            assert (got_normed != normed).float().mean() < 0.01
        for got in in_turns(kernels.all_reduce, parts, ends):
            assert_same_bits(got, allreduce.reference(parts))


@inside
@pytest.mark.parametrize("absent", [0, 2])
def test_who_does_not_come_is_named_and_nothing_more_is_sent(kernels, absent):
    ends, buffers = channels(3, 64)
    parts = contributions(0, 3, 4, 64)
    present = [r for r in range(3) if r != absent]
    for r in present:
        kernels.all_reduce(parts[r], ends[r], 1)
    for r in present:
        kernels.all_reduce(parts[r], ends[r], 2)
        assert int(ends[r].failed) == int(ends[r].failed_host) == 1 + absent
    before = [b.clone() for b in buffers]
    for r in present:
        kernels.all_reduce(parts[r], ends[r], 1)
    assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True))


@inside
def test_an_old_flag_is_no_flag(kernels):
    """A buffer full of the packets of the last epoch but one, as it always is."""
    ends, _ = channels(2, 64)
    for epoch in range(4):
        in_turns(kernels.all_reduce, contributions(epoch, 2, 1, 64), ends)
    kernels.all_reduce(contributions(5, 1, 1, 64)[0], ends[0], 2)
    assert int(ends[0].failed) == 1  # not even its own part has been sent


@inside
def test_the_epoch_wraps(kernels, assert_same_bits):
    ends, _ = channels(2, 64)
    for end in ends:
        end.epochs.fill_(2**31 - 3)
    for epoch in range(6):
        parts = contributions(epoch, 2, 2, 64)
        for got in in_turns(kernels.all_reduce, parts, ends):
            assert_same_bits(got, allreduce.reference(parts))
    assert int(ends[0].epochs[0]) == -(2**31) + 3


# ---- the inline assembly, one thread in Python


def words(x):
    return [int(v) & (2**64 - 1) for v in x.contiguous().view(torch.int64).flatten()]


@outside
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_assembly_sends_and_adds(assert_same_bits, ranks):
    """Packets that one thread stores, as another reads them: payload, flags, order of addition, rounding."""
    at = pytest.importorskip("mimo_kernels.allreduce_triton")
    memory, stride = {}, 4096
    for seed, epoch in enumerate((1, 2**31, 2**32 - 1, 0)):
        parts = contributions(seed, ranks, 1, 4)
        if ranks > 2:
            parts[:3, 0, 0] = torch.tensor([2.0**30, -(2.0**30), 1.0])  # 1 and the rest in this order, not in others
        for r in reversed(range(ranks)):
            Thread([9, 64 + stride * r, *words(parts[r]), epoch, 0], None, memory.__setitem__).run(at.SEND.value)
        assert {word >> 32 for word in memory.values()} == {epoch} and len(memory) == 2 * ranks
        got, late, *_ = Thread([0, 9, 64, epoch, 0, 1], memory.__getitem__, None).run(at.receive_ptx(ranks, stride))
        assert got == words(allreduce.reference(parts))[0] and late == 0


@outside
def test_the_assembly_waits_and_gives_up():
    at = pytest.importorskip("mimo_kernels.allreduce_triton")
    one = words(torch.ones(4).bfloat16())[0] & 0xFFFFFFFF
    new, old = one | 7 << 32, one | 5 << 32
    ptx, looks = at.receive_ptx(4, 64), []

    def run(memory, skip=0, cycles=50):
        looks.clear()

        def load(address):
            looks.append(address)
            return memory[address // 64][address % 64 // 8](len(looks))

        return Thread([0, 9, 0, 7, skip, cycles], load, None).run(ptx)[:2]

    here, gone = (lambda look: new), (lambda look: old)
    assert run([[here, here]] * 4)[1] == 0 and len(looks) == 8
    for late in range(4):  # either word of a packet is enough
        for bad in ([here, gone], [gone, here], [gone, gone]):
            memory = [[here, here]] * late + [bad] + [[here, here]] * (3 - late)
            assert run(memory)[1] == late + 1 and len(looks) == 8 * 50
    assert run([[here, here], [here, gone], [here, here], [gone, here]])[1] == 2
    assert run([[gone, gone]] * 4, skip=1)[1] == 0 and len(looks) == 8
    assert run([[gone, gone]] * 4, cycles=0)[1] == 1 and len(looks) == 8
    comes = lambda look: new if look > 100 else old  # noqa: E731
    four = words(torch.full((4,), 4.0).bfloat16())[0]
    assert run([[here, here], [comes, here], [here, here], [here, comes]]) == [four, 0] and 100 < len(looks) < 120


@outside
def test_nothing_is_sent_where_there_is_nothing_to_send():
    at = pytest.importorskip("mimo_kernels.allreduce_triton")
    memory = {}
    Thread([9, 64, 1, 2, 1], None, memory.__setitem__).run(at.SEND.value)
    assert not memory


# ---- the machine code

POINTERS = dict.fromkeys(("OUT", "NORMED", "X", "RESIDUAL", "WEIGHT", "PEERS"), "*i64") | dict.fromkeys(
    ("EPOCHS", "FAILED", "FAILED_HOST"), "*i32"
)


@outside
@needs_tools
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ranks", "hidden"), [(2, 4096), (4, 4096), (8, 4096), (4, 6144), (8, 6144), (8, 8192)])
def test_machine_code(ranks, hidden, fused):
    """Payload and flag in one access of 16 bytes at system scope, all sends before all polls, no fence, no spill."""
    import mimo_kernels.allreduce_triton as at

    kernel = at._sum_add_norm_kernel if fused else at._sum_kernel
    capacity = allreduce.capacity(hidden) // allreduce.PACKET
    warps, packets = (32, -(-hidden // 4096)) if fused else (4, 1)
    constants = {
        "RANKS": ranks, "CAPACITY": capacity, "SPACE": allreduce.CELL, "RECEIVE": at.receive_ptx(ranks, capacity * 16),
        "PHASE": 0,
    } | ({"PER_ROW": hidden // 4, "BLOCK": 1024 * packets, "PARTS": 0} if fused else {})  # fmt: skip
    types = {n: t for n, t in POINTERS.items() if n in kernel.arg_names} | {"cycles": "i64", "eps": "fp32"}
    code, registers, _ = compile_for_sm90(kernel, types, constants, warps, 3)
    opcodes = [op for _, op, _ in code]
    sends = [i for i, op in enumerate(opcodes) if op == "STG.E.128.STRONG.SYS"]
    polls = [i for i, op in enumerate(opcodes) if op == "LDG.E.128.STRONG.SYS"]
    assert len(sends) == len(polls) == ranks * packets and max(sends) < min(polls)
    assert [op for op in opcodes if "STRONG" in op] == [opcodes[i] for i in sends + polls]
    others = [op for op in opcodes if not op.startswith("CCTL.E.PF")]  # a prefetch, not an invalidation
    assert not any(op.startswith(("MEMBAR", "CCTL", "ERRBAR", "ATOM", "RED")) for op in others)
    assert not spills(code) and registers <= (64 if fused else 128)
