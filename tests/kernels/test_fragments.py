"""The arithmetic of the kernels in CUDA C++ on a CPU: which thread holds what, and that the pieces which meet in an MMA
belong to each other.

PTX documents the fragments of mma.m16n8k16 (`mma`). Which columns of K meet in one is free as long as weights and
activations agree, and the kernels use that: a thread loads 16 bytes side by side and never moves them. Each test here
repeats the loads of a kernel in numpy, a thread a row, and compares with the product in float64.
"""

import numpy as np
import pytest
import torch

from mimo_kernels import moe, mxfp4

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # as the kernels call them
TOKENS = 8


def mma(acc, a, b):
    """acc [32, 4] plus the product of the fragments a [32, 4, 2] of 16 x 16 and b [32, 2, 2] of 16 x 8.

    Register i of A has row g + 8 (i % 2), columns 2t + 8 (i // 2) and the next; of B rows 2t + 8 i and the next of
    column g. The sum has rows g (first two) and g + 8, columns 2t and 2t + 1.
    """
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for half in range(2):
        for i in range(4):
            left[G + i % 2 * 8, T * 2 + i // 2 * 8 + half] = a[:, i, half]
        for i in range(2):
            right[T * 2 + i * 8 + half, G] = b[:, i, half]
    out = left @ right
    return acc + np.stack([out[G + i // 2 * 8, T * 2 + i % 2] for i in range(4)], 1)


def of_threads(acc):
    """[16, 8] of a sum."""
    out = np.zeros((16, 8))
    for i in range(4):
        out[G + i // 2 * 8, T * 2 + i % 2] = acc[:, i]
    return out


def bf16_values(bits):
    """float64 of 16 bits each."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def pair_values(registers):
    """[..., 2] of 32 bits each: the low half comes first."""
    registers = np.asarray(registers).astype(np.uint32)
    return np.stack([bf16_values(registers & 0xFFFF), bf16_values(registers >> 16)], -1)


# ---- moe.cu


def unpack(word):
    """[..., 4, 2]: codes c of two 16-bit words, times 2**-126, as `unpack` of moe.cu finds them."""
    w = np.asarray(word).astype(np.uint32)
    out = [w & 0x81C081C0, (w << 3) & 0x81C081C0, (w << 6) & 0x81C081C0]
    out.append(((w << 1) & 0x80008000) | ((w >> 3) & 0x01800180) | ((w >> 7) & 0x00400040))
    return pair_values(np.stack(out, -1))


def slot_of(p, n):
    """Where the 16 bytes of pair p, x[8p .. 8p + 7], of token n are."""
    return (p // 16 * 4 + p % 4) * 32 + n * 4 + p % 16 // 4


def slots_of(x):
    """[slots, 4, 2] of x [8, K], as the kernel stores them: neighbours 0 and 4, 1 and 5, 2 and 6, 3 and 7."""
    out = np.full((x.size // 8, 4, 2), np.nan)
    for n in range(TOKENS):
        for p in range(x.shape[1] // 8):
            out[slot_of(p, n)] = x[n, 8 * p : 8 * p + 8].reshape(2, 4).T
    return out


def page_product(words, scales, slots):
    """[16, 8] of a page, words int16 [16, 32] and scales uint8 [16, 4], and its slots [128, 4, 2], by `Page`."""
    quads = words.reshape(-1).view(np.uint32).reshape(64, 4)  # uint4 at the lane, and 32 further
    scales = scales.reshape(-1)
    low, high = (pair_values(s.astype(np.uint32) * 0x00800080) for s in (scales[LANE], scales[LANE + 32]))
    acc = np.zeros((32, 4))
    for i in range(4):
        p, q = unpack(quads[LANE, i]) * low[:, None], unpack(quads[LANE + 32, i]) * high[:, None]
        v = slots[i * 32 + LANE]
        acc = mma(acc, np.stack([p[:, 0], q[:, 0], p[:, 1], q[:, 1]], 1), v[:, :2])
        acc = mma(acc, np.stack([p[:, 2], q[:, 2], p[:, 3], q[:, 3]], 1), v[:, 2:])
    return of_threads(acc)


@pytest.fixture
def expert():
    """(its pages, gate, up and down in float64) of H = 256 and I = 128, codes and scales at random."""
    g = torch.Generator().manual_seed(5)

    def tensor(*shape, low=0, high=256):
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)

    up = tensor(1, 256, 128), tensor(1, 256, 8, low=118, high=129)
    down = tensor(1, 256, 64), tensor(1, 256, 4, low=118, high=129)
    gate_up, last = (mxfp4.decode(*w, torch.float32, name="w")[0].double().numpy() for w in (up, down))
    return moe.pack_experts(moe.Experts(*up, *down)), *np.split(gate_up, 2), last


@pytest.fixture
def x():
    """BF16 values in float64 [8, 256]."""
    return torch.randn(8, 256, generator=torch.Generator().manual_seed(6)).bfloat16().double().numpy()


def test_slots_are_a_permutation():
    """Every pair of every token has one, a warp reads 32 side by side, and a thread that of its row g of B."""
    places = {slot_of(p, n): (p, n) for p in range(48) for n in range(TOKENS)}
    assert sorted(places) == list(range(48 * TOKENS))
    for page in range(3):
        for i in range(4):
            for lane in LANE:
                assert places[(page * 4 + i) * 32 + lane] == (page * 16 + 4 * T[lane] + i, G[lane])


def test_every_code_unpacks_in_every_place():
    codes = torch.cartesian_prod(*[torch.arange(16)] * 4)  # of the low word; the high one has them backwards
    words = moe.pack_words(codes).numpy().view(np.uint16).astype(np.uint32)
    both = words | words[::-1] << 16
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([magnitudes, -magnitudes])[codes.numpy()]
    assert np.array_equal(unpack(both) * 2.0**126, np.stack([values, values[::-1]], -1))


def test_a_page_of_experts(expert, x):
    """Rows of gate and up in turns of eight, both pages of K, summed in order: exact but for float64 rounding."""
    packed, gate, up, _ = expert
    slots, words, scales = slots_of(x), packed.gate_up[0].numpy(), packed.gate_up_scales[0].numpy()
    for strip in range(words.shape[0]):
        parts = [page_product(words[strip, k], scales[strip, k], slots[k * 128 :][:128]) for k in range(2)]
        rows = slice(strip * 8, strip * 8 + 8)
        expected = np.concatenate([gate[rows], up[rows]]) @ x.T
        np.testing.assert_allclose(sum(parts), expected, rtol=1e-12, atol=1e-12)


def test_hidden_activations_come_in_the_order_of_the_second_product(expert, x):
    """A thread of the first product has gate and up of a row for two tokens, and stores 2 bytes of SwiGLU each."""
    packed, gate, up, down = expert
    between = np.full(128 * 8, np.nan)  # in numbers of 2 bytes
    hidden = (lambda a, b: a / (1 + np.exp(-a)) * b)(gate @ x.T, up @ x.T)  # [I, 8]
    for p in range(128 // 8):
        for g, t in zip(G, T, strict=True):
            n = t * 2
            at = slot_of(p, n) * 8 + g % 4 * 2 + g // 4
            between[at], between[at + 4 * 8] = hidden[p * 8 + g, n], hidden[p * 8 + g, n + 1]
    slots = between.reshape(-1, 4, 2)
    assert np.array_equal(slots, slots_of(hidden.T))
    words, scales = packed.down[0].numpy(), packed.down_scales[0].numpy()
    out = np.concatenate([page_product(words[strip, 0], scales[strip, 0], slots) for strip in range(256 // 16)])
    np.testing.assert_allclose(out, down @ hidden, rtol=1e-9, atol=1e-9)


# ---- linear.cu, and queries and keys of window.cu


def row_pairs(rows, columns):
    """[32, columns / 2, 2]: what each thread loads side by side from rows [8, >= 4 columns] of one row g each."""
    return np.stack([rows[g, t * columns : t * columns + columns].reshape(-1, 2) for g, t in zip(G, T, strict=True)])


def test_16_bytes_of_a_bf16_row(x):
    """A warp's load covers 32 columns; so do the activations, and a query's and a key's 16 bytes in `Head`."""
    weights = np.random.default_rng(1).standard_normal((16, 256))
    acc = np.zeros((32, 4))
    for unit in range(256 // 32):
        columns = slice(unit * 32, unit * 32 + 32)
        p, q, v = (row_pairs(rows[:, columns], 8) for rows in (weights[:8], weights[8:], x))
        acc = mma(acc, np.stack([p[:, 0], q[:, 0], p[:, 1], q[:, 1]], 1), v[:, :2])
        acc = mma(acc, np.stack([p[:, 2], q[:, 2], p[:, 3], q[:, 3]], 1), v[:, 2:])
    np.testing.assert_allclose(of_threads(acc), weights @ x.T, rtol=1e-12, atol=1e-12)


def from_e4m3(codes):
    """[..., 2] of 32 bits with a code in bytes 1 and 3 each: shifted to where BF16 has its exponent, times 2**120."""
    bits = (codes & 0x80008000) | ((codes >> 4) & 0x07F007F0)
    return pair_values(bits) * 2.0**120


def spread(word, first):
    """Bytes `first` and `first` + 1 of 32 bits in places 1 and 3, zeros between: __byte_perm with 0x1404 and 0x3424."""
    return (word >> 8 * first & 0xFF) << 8 | (word >> 8 * (first + 1) & 0xFF) << 24


def test_every_e4m3_code_is_exact():
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], dtype=np.uint32)  # but NaN
    expected = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(from_e4m3(codes << 8 | codes << 24), np.stack([expected, expected], -1))
    assert (pair_values(np.uint32(0x7B807B80)) == 2.0**120).all()


def test_16_bytes_of_an_fp8_row(x):
    """A warp's load covers 64 columns, of which a thread has 16: two loads of activations."""
    g = torch.Generator().manual_seed(7)
    weights = torch.randn(16, 256, generator=g).to(torch.float8_e4m3fn)
    quads = weights.view(torch.uint8).numpy().view(np.uint32).reshape(16, 4, 16)  # [rows, units, 4 bytes]
    acc = np.zeros((32, 4))
    for unit in range(256 // 64):
        v = row_pairs(x[:, unit * 64 :], 16)
        for i in range(4):
            p, q = (quads[G + half * 8, unit, T * 4 + i] for half in range(2))
            fragment = [from_e4m3(spread(row, first)) for first in (0, 2) for row in (p, q)]
            acc = mma(acc, np.stack(fragment, 1), v[:, i * 2 : i * 2 + 2])
    np.testing.assert_allclose(of_threads(acc), weights.double().numpy() @ x.T, rtol=1e-12, atol=1e-12)


# ---- window.cu


@pytest.mark.parametrize("half", [32, 64])
def test_a_rotations_pairs_meet_in_one_thread(half):
    """Elements i and i + half of a head are the same place of `part[j]` and `part[j + half / 32]`."""
    holder = {j * 32 + t * 8 + e: (t, j, e) for j in range(192 // 32) for t in range(4) for e in range(8)}
    for i in range(half):
        (t, j, e), other = holder[i], holder[i + half]
        assert other == (t, j + half // 32, e)


def test_values_transposed_by_ldmatrix():
    """16 keys times 16 dimensions: weights from rows of their own, values from rows of keys, read by columns.

    ldmatrix takes the addresses of the rows of matrix m from lanes 8m .. 8m + 7; transposed, a thread gets from each
    the rows 2t and 2t + 1 of column g.
    """
    rng = np.random.default_rng(2)
    weights, values = rng.standard_normal((16, 16)), rng.standard_normal((16, 16))
    addressed = np.stack([values[lane % 16, lane // 16 * 8 :][:8] for lane in LANE])  # v_at
    b = np.stack([np.stack([m[2 * T, G], m[2 * T + 1, G]], -1) for m in addressed.reshape(4, 8, 8)], 1)
    p = weights.reshape(16, 8, 2)  # pairs
    a = np.stack([p[G, T], p[G + 8, T], p[G, T + 4], p[G + 8, T + 4]], 1)
    out = [of_threads(mma(np.zeros((32, 4)), a, b[:, i : i + 2])) for i in (0, 2)]
    np.testing.assert_allclose(np.concatenate(out, 1), weights @ values, rtol=1e-12, atol=1e-12)


# ---- router.cu


def test_sums_of_a_warp_end_at_their_tokens():
    """Each step of the exchange halves how many tokens a lane stands for: lane l has token l / 4 at the end."""
    start = np.random.default_rng(3).standard_normal((32, TOKENS))
    acc, apart = start.copy(), 16
    for size in (4, 2, 1):
        upper = (LANE & apart != 0)[:, None]
        given = np.where(upper, acc[:, :size], acc[:, size : 2 * size])
        acc = np.where(upper, acc[:, size : 2 * size], acc[:, :size]) + given[LANE ^ apart]
        apart //= 2
    for apart in (2, 1):
        acc = acc + acc[LANE ^ apart]
    np.testing.assert_allclose(acc[:, 0], start.sum(0)[G], rtol=1e-12)
