"""Residual add and RMSNorm by clusters of blocks, alone and with the sum over ranks: the CUDA kernels themselves, run
on a processor (`emulator`), where threads, blocks and ranks come in random orders and writes land late.

The sums have to have the bits of the definitions. test_cuda has their machine code, tests/gpu what a GPU adds.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from mimo_kernels import allreduce, norm_cuda, residual
from tests.kernels.emulator import emulated, needs_compiler  # noqa: F401

pytestmark = needs_compiler
CASES = [  # columns, blocks of a row, parts, their dtype
    (4096, 8, None, torch.bfloat16),
    (4096, 8, 8, torch.float32),
    (6144, 8, 4, torch.bfloat16),
    (2048, 8, 1, torch.float32),
    (1536, 4, 3, torch.float32),
    (1024, 2, 16, torch.bfloat16),
    (512, 1, None, torch.bfloat16),
]


def random_case(seed, rows, columns, parts=None, dtype=torch.bfloat16):
    """x whose columns differ by orders of magnitude, an update and the weight; parts so that their order shows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp(2 * torch.randn(columns, generator=g))
    shape = (rows, columns) if parts is None else (parts, rows, columns)
    update = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-12, 12, shape, generator=g).float())
    return x.bfloat16(), update.to(dtype), (1 + torch.randn(columns, generator=g) / 4).bfloat16()


def assert_near(normed, expected):
    """A rounding or two apart, and that rarely: float32 sums of squares have another order."""
    torch.testing.assert_close(normed.float(), expected.float(), rtol=2**-6, atol=0)
    assert (normed != expected).float().mean() < 0.01


# ---- alone


@pytest.mark.parametrize(("columns", "cluster", "parts", "dtype"), CASES)
def test_add_norm(columns, cluster, parts, dtype, emulated, assert_same_bits):  # noqa: F811
    x, update, weight = random_case(columns, 3, columns, parts, dtype)
    emulated(1)
    total, normed = norm_cuda.add_rms_norm(x, update, weight, 1e-5, cluster)
    expected, expected_norm = residual.reference(x, update, weight, 1e-5)
    assert_same_bits(total, expected)
    assert_near(normed, expected_norm)


def test_without_an_update_the_sum_is_x(emulated, assert_same_bits):  # noqa: F811
    x, _, weight = random_case(1, 2, 2048)
    emulated()
    before = x.clone()
    total, normed = norm_cuda.add_rms_norm(x, None, weight, 1e-5)
    assert total is x
    assert_same_bits(x, before)
    assert_near(normed, residual.reference(x, None, weight, 1e-5)[1])


def test_bits_depend_on_the_row_alone(emulated, assert_same_bits):  # noqa: F811
    """Sixteen rows of one call, some of them alone; threads in other orders, blocks one row after the other or all."""
    x, update, weight = random_case(2, 16, 1024, 3, torch.float32)
    emulated(1, together=True)
    y = norm_cuda.add_rms_norm(x, update, weight, 1e-5)
    for seed, rows in ((2, slice(16)), (3, slice(1)), (4, slice(9, 12))):
        emulated(seed)
        z = norm_cuda.add_rms_norm(x[rows], update[:, rows], weight, 1e-5)
        for a, b in zip(z, y, strict=True):
            assert_same_bits(a, b[rows])


def test_views(emulated, assert_same_bits):  # noqa: F811
    """Parts as experts leave them, rows of a wider tensor, and columns that begin where no load of four may."""
    x, update, weight = random_case(3, 4, 1024, 3, torch.float32)
    emulated()
    expected = norm_cuda.add_rms_norm(x, update, weight, 1e-5)
    wide, odd = torch.zeros(3, 4, 1028), torch.zeros(3, 4, 1025)
    wide[..., 4:], odd[..., 1:] = update, update
    for parts in (update.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 4:], odd[..., 1:]):
        for actual, e in zip(norm_cuda.add_rms_norm(x, parts, weight, 1e-5), expected, strict=True):
            assert_same_bits(actual, e)
    shifted = torch.zeros(4 * 1024 + 1, dtype=torch.bfloat16)[1:].view(4, 1024).copy_(x)
    assert_same_bits(norm_cuda.add_rms_norm(shifted, update, weight, 1e-5)[1], expected[1])


def test_zeros_and_overflow(emulated, assert_same_bits):  # noqa: F811
    """-0 stays -0, a row of zeros is no division by zero, and squares beyond float32 give zero as torch's norm does."""
    x, ones = torch.zeros(4, 1024, dtype=torch.bfloat16), torch.ones(1024, dtype=torch.bfloat16)
    x[0], x[1, ::2], x[3] = -0.0, -1.0, 3e38
    update = torch.full((2, 4, 1024), -0.0, dtype=torch.bfloat16)
    emulated()
    y = norm_cuda.add_rms_norm(x, update, ones, 1e-5)
    for actual, e in zip(y, residual.reference(x, update, ones, 1e-5), strict=True):
        assert_same_bits(actual, e)
    assert torch.signbit(y[0][0]).all() and not y[1][3].any()


@pytest.mark.parametrize("wait", ["wait_for_cluster();", "wait_for_pushes(&arrived);"])
def test_a_missing_wait_shows(wait, emulated):  # noqa: F811
    """Blocks that push into memory which is not there, or that end or go on before all has come."""
    x, update, weight = random_case(5, 2, 1024)
    expected = residual.reference(x, update, weight, 1e-5)[1]
    seen = 0
    for seed in range(4):
        emulated(seed, change=(wait, ""))
        try:
            normed = norm_cuda.add_rms_norm(x, update, weight, 1e-5)[1]
            seen += not bool(((normed.float() - expected.float()).abs() <= 2**-6 * expected.float().abs()).all())
        except AssertionError:  # what the emulator says
            seen += 1
    assert seen


# ---- with the sum over ranks


class Ranks:
    """A channel on each of `size` buffers of this process. Ranks call from threads of their own."""

    def __init__(self, size, hidden, seconds=60.0):
        elements = allreduce.capacity(hidden)
        self.buffers = [torch.zeros(allreduce.buffer_words(size, elements), dtype=torch.int64) for _ in range(size)]
        addresses = [b.data_ptr() for b in self.buffers]
        self.ends = [allreduce.open_channel(r, addresses, elements, seconds, "cpu") for r in range(size)]

    def sum(self, parts, x, weight, cluster, present=None):
        """What each of the ranks that are present gets for its parts[r]."""
        present = range(len(self.ends)) if present is None else present
        with ThreadPoolExecutor(len(self.ends)) as pool:
            calls = [
                pool.submit(norm_cuda.all_reduce_add_norm, parts[r], x, weight, 1e-5, self.ends[r], cluster)
                for r in present
            ]
            return [call.result() for call in calls]

    @property
    def failed(self):
        return [(int(end.failed), int(end.failed_host)) for end in self.ends]


def contributions(seed, ranks, rows, columns, parts=None):
    """BF16 [rows, columns] of each rank, or float32 [parts, rows, columns] as experts leave them; x and weight."""
    dtype = torch.bfloat16 if parts is None else torch.float32
    cases = [random_case(seed * 10 + r, rows, columns, parts, dtype) for r in range(ranks)]
    updates = [u if parts is None else u.transpose(0, 1).contiguous().transpose(0, 1) for _, u, _ in cases]
    return updates, cases[0][0], cases[0][2]


def expected_sum(updates, x, weight):
    """The definition, of parts that were added up and rounded."""
    rounded = []
    for update in updates:
        total = update if update.ndim == 2 else update[0]
        for part in update[1:] if update.ndim == 3 else ():
            total = total + part
        rounded.append(total.bfloat16())
    return allreduce.reference_add_norm(torch.stack(rounded), x, weight, 1e-5)


@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize(
    ("ranks", "columns", "cluster"), [(2, 1024, 8), (2, 1536, 4), (3, 1024, 2), (4, 1024, 4), (8, 512, 2)]
)
def test_sum_add_norm(ranks, columns, cluster, parts, emulated, assert_same_bits):  # noqa: F811
    """Several epochs of changing sizes over the same buffers; cells of one block and of two."""
    group = Ranks(ranks, columns)
    for epoch, rows in enumerate((2, 1, 2) if ranks < 4 else (1, 2, 1)):
        updates, x, weight = contributions(epoch, ranks, rows, columns, parts)
        emulated(epoch, together=epoch == 1)
        new, normed = expected_sum(updates, x, weight)
        results = group.sum(updates, x, weight, cluster)
        for got, got_normed in results:
            assert_same_bits(got, new)
            assert_same_bits(got_normed, results[0][1])
            assert_near(got_normed, normed)
    assert group.failed == [(0, 0)] * ranks
    cells = columns // (allreduce.PACKET * allreduce.CELL)
    expected = torch.zeros_like(group.ends[0].epochs)
    expected[: 2 * cells] = 2 if ranks < 4 else 1
    expected[:cells] = 3
    assert all(torch.equal(end.epochs, expected) for end in group.ends)


def test_real_rows(emulated, assert_same_bits):  # noqa: F811
    """Of MiMo-V2.5 with the parts of eight experts."""
    group = Ranks(2, 4096)
    updates, x, weight = contributions(7, 2, 1, 4096, 8)
    emulated()
    new, _ = expected_sum(updates, x, weight)
    for got, _ in group.sum(updates, x, weight, norm_cuda.CLUSTER):
        assert_same_bits(got, new)


def test_rows_of_a_sum_do_not_depend_on_the_call(emulated, assert_same_bits):  # noqa: F811
    group = Ranks(2, 1024)
    updates, x, weight = contributions(1, 2, 3, 1024)
    emulated(1)
    together = group.sum(updates, x, weight, 4)[0]
    for row in range(3):
        emulated(row)
        alone = group.sum([u[row : row + 1].contiguous() for u in updates], x[row : row + 1], weight, 4)[1]
        for a, b in zip(alone, together, strict=True):
            assert_same_bits(a[0], b[row])


def test_the_epoch_wraps(emulated, assert_same_bits):  # noqa: F811
    group = Ranks(2, 512)
    for end in group.ends:
        end.epochs.fill_(2**31 - 2)
    for epoch in range(4):
        updates, x, weight = contributions(epoch, 2, 1, 512)
        emulated(epoch)
        for got, _ in group.sum(updates, x, weight, 2):
            assert_same_bits(got, expected_sum(updates, x, weight)[0])
    assert int(group.ends[0].epochs[0]) == -(2**31) + 2


@pytest.mark.parametrize("absent", [0, 2])
def test_who_does_not_come_is_named_and_nothing_more_is_sent(absent, emulated):  # noqa: F811
    group, present = Ranks(3, 512, 0.2), [r for r in range(3) if r != absent]
    updates, x, weight = contributions(0, 3, 2, 512)
    emulated()
    group.sum(updates, x, weight, 2, present)
    assert all(group.failed[r] == (1 + absent, 1 + absent) for r in present)
    before = [b.clone() for b in group.buffers]
    group.ends = [replace(end, seconds=1e6) for end in group.ends]  # nobody waits any more
    group.sum(updates, x, weight, 2, present)
    assert all(torch.equal(a, b) for a, b in zip(before, group.buffers, strict=True))
    assert all(group.failed[r] == (1 + absent, 1 + absent) and int(group.ends[r].epochs[0]) == 2 for r in present)


@pytest.mark.parametrize(
    "change",
    [
        ("missing |= got[r].y != epoch || got[r].w != epoch;", "missing |= got[r].y != epoch;"),
        # Beside its use, and not after everybody has read it.
        ("+ 1u;", "+ 1u; if (at % CELL == 0) epochs[at / CELL] = epoch;"),
    ],
    ids=["one flag", "an early epoch"],
)
def test_the_emulator_finds_what_is_broken(change, emulated):  # noqa: F811
    seen = 0
    for seed in range(4):
        group = Ranks(2, 1024, 0.5)
        updates, x, weight = contributions(seed, 2, 1, 1024)
        emulated(seed, change=change)
        new, _ = expected_sum(updates, x, weight)
        seen += any(not torch.equal(got, new) for got, _ in group.sum(updates, x, weight, 2))
        seen += group.failed != [(0, 0)] * 2
    assert seen
