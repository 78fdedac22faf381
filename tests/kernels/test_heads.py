"""Heads of a QKV projection: definition, kernel in Triton's interpreter, and the machine code that it becomes.

In the interpreter the kernel runs on float32, where its roundings are none, and is held to float32 accuracy;
tests/gpu/test_heads_gpu.py has the BF16 ones.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mimo_kernels import heads
from mimo_runtime import model
from mimo_runtime.cache import RingCache
from tests.kernels.triton_tools import compile_for_sm90, inside, needs_tools, outside, pass_in_the_interpreter, spills

# query heads, key-value heads, head sizes, rotated elements: MiMo-V2.5 at TP 4 in a window and in full, a drafter,
# SmolLM2, keys and values alone, and sizes that are no powers of two
SHAPES = [
    (16, 2, 192, 128, 64),
    (16, 1, 192, 128, 64),
    (32, 8, 128, 128, 128),
    (9, 3, 64, 64, 64),
    (0, 8, 128, 128, 128),
    (3, 2, 80, 24, 26),
    (1, 1, 7, 5, 2),
    (2, 1, 256, 256, 256),
]


def random_case(seed, rows, shape, slots=40):
    """qkv, cos and sin of positions up to some thousands, a cache that is filled with 7, head norms; float32."""
    n, g, k, v, rotated = shape
    random = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, (n + g) * k + g * v, generator=random) * 3
    angle = torch.randint(5000, (rows, 1), generator=random) * 10000.0 ** (-torch.arange(rotated // 2) / rotated * 2)
    norms = heads.HeadNorms(*(1 + torch.randn(2, k, generator=random) / 4), eps=1e-5)
    return qkv, angle.cos(), angle.sin(), torch.full((g, slots, k), 7.0), torch.full((g, slots, v), 7.0), norms


def oracle(qkv, cos, sin, shape, value_scale, norms):
    """float64, one row, head and pair at a time."""
    n, g, k, v, rotated = shape
    qkv, half = qkv.double(), rotated // 2
    qk = qkv[:, : (n + g) * k].reshape(len(qkv), n + g, k).clone()
    for t in range(len(qkv)):
        for head in range(n + g):
            if norms is not None:
                weight = (norms.q if head < n else norms.k).double()
                qk[t, head] *= weight / (qk[t, head].square().mean() + norms.eps) ** 0.5
            for i in range(half):
                z = complex(qk[t, head, i], qk[t, head, i + half]) * complex(cos[t, i], sin[t, i])
                qk[t, head, i], qk[t, head, i + half] = z.real, z.imag
    return qk[:, :n], qk[:, n:], qkv[:, (n + g) * k :].reshape(len(qkv), g, v) * value_scale


def largest_error(y, expected):
    """Relative to the largest magnitude of a head."""
    if not y.numel():
        return 0.0
    return float(((y.double() - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-30)).max())


# ---- the definition


@outside
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_formula(shape, normed):
    qkv, cos, sin, _, _, norms = random_case(1, 3, shape)
    norms = norms if normed else None
    y = heads.reference(qkv.double(), cos, sin, shape[1:4], value_scale=0.612, norms=norms, dtype=torch.float64)
    for actual, e in zip(y, oracle(qkv, cos, sin, shape, 0.612, norms), strict=True):
        assert largest_error(actual, e) < 1e-12


@outside
@pytest.mark.parametrize("normed", [False, True])
def test_what_the_model_and_its_cache_do(normed, assert_same_bits):
    """Values and norms bit for bit; of the rotation the runtime rounds each product, this the result."""
    shape = 4, 2, 192, 128, 64
    qkv, cos, sin, keys, values, norms = random_case(2, 5, shape)
    qkv, cos, sin, keys, values = (x.bfloat16() for x in (qkv, cos, sin, keys, values))
    norms = replace(norms, q=norms.q.bfloat16(), k=norms.k.bfloat16()) if normed else None
    geometry = SimpleNamespace(heads=4, kv_heads=2, head_dim=192, v_head_dim=128, rope_theta=1e4, rotary_dim=64)
    w = SimpleNamespace(
        geometry=geometry, qkv=torch.eye(qkv.shape[1], dtype=torch.bfloat16), value_scale=0.612, eps=1e-5,
        q_norm=norms and norms.q, k_norm=norms and norms.k,
    )  # fmt: skip
    rows = SimpleNamespace(rotation=lambda geometry: (cos, sin))
    expected_q, expected_k, expected_v = model.project(w, qkv, rows)
    cache = RingCache((2, 192, 128), 40, 32, block=8, dtype=torch.bfloat16)
    cache.k[:], cache.v[:] = keys, values
    start = torch.tensor(77)
    cache.write(expected_k, expected_v, start)
    q = heads.split_heads(qkv, cos, sin, keys, values, start, value_scale=0.612, norms=norms)
    assert_same_bits(values, cache.v)
    assert_same_bits(q[..., 64:], expected_q[..., 64:])
    assert_same_bits(keys[..., 64:], cache.k[..., 64:])
    for actual, e in ((q, expected_q), (keys, cache.k)):
        assert largest_error(actual, e.double()) < 2**-7


@outside
def test_refusals():
    shape = 3, 2, 64, 32, 16
    qkv, cos, sin, keys, values = (x.bfloat16() for x in random_case(0, 4, shape)[:5])
    norms = heads.HeadNorms(qkv[0, :64], qkv[0, :64], 1e-5)
    args = {"qkv": qkv, "cos": cos, "sin": sin, "keys": keys, "values": values, "start": torch.tensor(0)}
    cases = {
        "keys: torch.float32": {"keys": keys.float()},
        "values: .* the last contiguous": {"values": values.transpose(1, 2)},
        r"expected \[G, S, K\] and \[G, S, V\]": {"values": values[:, :9]},
        "at most 256 elements": {"keys": keys.new_zeros(2, 40, 264)},
        "qkv: torch.float32": {"qkv": qkv.float()},
        "17 rows; give 1 to 16": {"qkv": qkv[:1].expand(17, -1)},
        "383 columns are not queries of 64": {"qkv": qkv[:, :383]},
        "128 columns are not": {"qkv": qkv[:, :128]},
        "count: 5, expected 0 to 4": {"count": 5},
        "count: 4, expected 0 to 3 of 4 rows and 3 slots": {"keys": keys[:, :3], "values": values[:, :3]},
        r"cos: torch.bfloat16 \[3, 8\]": {"cos": cos[:3]},
        r"sin: torch.bfloat16 \[4, 7\]": {"sin": sin[:, :7]},
        "cos: torch.float64": {"cos": cos.double()},
        "R from 2 to 64": {"cos": qkv[:, :33], "sin": qkv[:, :33]},
        "start: torch.float32": {"start": torch.tensor(0.0)},
        r"start: torch.int64 \[4\]": {"start": torch.arange(4)},
        r"norms.k: torch.bfloat16 \[32\]": {"norms": replace(norms, k=norms.k[:32])},
        "norms.q: torch.float32": {"norms": replace(norms, q=norms.q.float())},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            heads.split_heads(**(args | change))


# ---- the kernel in the interpreter


@outside
def test_kernel_in_the_interpreter():
    pass_in_the_interpreter(__file__, 78)


@pytest.fixture
def kernels():
    from mimo_kernels import heads_triton

    return heads_triton


def checked(kernels, case, shape, start, count=None, normed=False, value_scale=0.612):
    """Queries and what is in the cache, after a comparison with float64; slots that nobody writes keep their bits."""
    qkv, cos, sin, keys, values, norms = case
    count, norms = len(qkv) if count is None else count, norms if normed else None
    before = keys.clone(), values.clone()
    at = None if start is None else torch.tensor(start)
    q = kernels.split_heads(qkv, cos, sin, keys, values, at, count=count, value_scale=value_scale, norms=norms)
    y = heads.reference(
        qkv.double(), cos, sin, shape[1:4], value_scale=value_scale, norms=norms, dtype=torch.float64
    )  # fmt: skip
    slots = [((start or 0) + t) % keys.shape[1] for t in range(count)]
    others = [s for s in range(keys.shape[1]) if s not in slots]
    assert q.shape == (len(qkv), shape[0], shape[2]) and largest_error(q, y[0]) < 2e-6
    for cache, old, new in ((keys, before[0], y[1]), (values, before[1], y[2])):
        if count:
            assert largest_error(cache[:, slots], new[:count].transpose(0, 1)) < 2e-6
        assert torch.equal(cache[:, others], old[:, others])
    return q


@inside
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernels, shape, rows, normed):
    checked(kernels, random_case(rows, rows, shape), shape, 11 * rows, normed=normed)


@inside
@pytest.mark.parametrize("start", [None, 0, 30, 39, 40, 79, 123456789])
def test_slots(kernels, start):
    """A ring that wraps, a drafter's own block, and rows that are not stored."""
    for count in (0, 1, 5, 8):
        checked(kernels, random_case(count, 8, SHAPES[-2]), SHAPES[-2], start, count)


@inside
def test_an_int32_start(kernels):
    case = random_case(0, 2, SHAPES[-2])
    kernels.split_heads(*case[:5], torch.tensor(38, dtype=torch.int32), count=2)
    assert (case[3] != 7).any(-1).nonzero()[:, 1].unique().tolist() == [38, 39]


@inside
def test_a_ring_of_as_many_slots_as_rows(kernels):
    checked(kernels, random_case(1, 5, SHAPES[-2], slots=5), SHAPES[-2], 13)


@inside
def test_views(kernels):
    """A cache behind scratch slots, the same with other heads between, and every other row of a projection."""
    qkv, cos, sin, keys, values, norms = random_case(2, 6, SHAPES[0], slots=60)
    views = keys.repeat_interleave(2, 0)[::2, 8:48], values.transpose(0, 1).contiguous().transpose(0, 1)[:, 8:48]
    case = qkv[::2], cos[::2], sin.T.contiguous().T[::2], *views, norms
    checked(kernels, case, SHAPES[0], 39, normed=True)


@inside
def test_extreme_values(kernels, assert_same_bits):
    """-0 and infinities pass where nothing is rotated, huge elements do not meet others, tiny ones are not lost."""
    shape = 2, 1, 48, 16, 16
    case = random_case(3, 4, shape)
    qkv = case[0]
    qkv[0], qkv[1], qkv[2] = -0.0, qkv[1] * 1e-20, qkv[2] * 1e30
    qkv[3, 20], qkv[3, 21] = float("inf"), float("-inf")
    q = kernels.split_heads(*case[:5], torch.tensor(4), count=4)
    assert_same_bits(q[..., 16:], qkv[:, :96].view(4, 2, 48)[..., 16:])
    assert torch.signbit(case[4][0, 4]).all()
    expected = heads.reference(qkv[:3].double(), case[1][:3], case[2][:3], (1, 48, 16), dtype=torch.float64)
    assert largest_error(q[:3], expected[0]) < 2e-6
    qkv[2], qkv[3] = qkv[2] * 1e-13, 0
    checked(kernels, case, shape, 9, normed=True)


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotations_of_any_dtype(kernels, dtype):
    qkv, cos, sin, *rest = random_case(4, 3, SHAPES[0])
    checked(kernels, (qkv, cos.to(dtype), sin.to(dtype), *rest), SHAPES[0], 5)


@inside
def test_bits_depend_on_the_row_alone(kernels, assert_same_bits):
    shape = SHAPES[0]
    case = random_case(5, 16, shape)
    q = kernels.split_heads(*case[:5], torch.tensor(7), count=16, norms=case[5])
    for rows in (1, 8):
        other = random_case(5, 16, shape)
        part = (x[:rows] for x in other[:3])
        y = kernels.split_heads(*part, *other[3:5], torch.tensor(7), count=rows, norms=case[5])
        assert_same_bits(y, q[:rows])
        for new, old in zip(other[3:5], case[3:5], strict=True):
            assert_same_bits(new[:, 7 : 7 + rows], old[:, 7 : 7 + rows])


# ---- the machine code


@outside
@needs_tools
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES[:5], (128, 8, 192, 128, 64)], ids=str)
def test_machine_code(shape, normed):
    """A program is one warp and meets no barrier, so that many are resident at once."""
    import mimo_kernels.heads_triton as ht

    n, g, k, v, rotated = shape
    rest = k - rotated
    constants = {
        "N": n, "G": g, "K": k, "V": v, "HALF": rotated // 2, "HALF_BLOCK": rotated // 2,
        "REST": 1 << (rest - 1).bit_length() if rest else 0, "K_BLOCK": 1 << (k - 1).bit_length(), "V_BLOCK": v,
        "NORM": normed, "RING": True,
    }  # fmt: skip
    pointers = dict.fromkeys(("Q", "KEYS", "VALUES", "QKV", "COS", "SIN", "Q_NORM", "K_NORM"), "*bf16")
    types = pointers | {"START": "*i64", "value_scale": "fp32", "eps": "fp32"}
    code, registers, shared = compile_for_sm90(ht._split_heads_kernel, types, constants, 1, 1)
    ops = [op for _, op, _ in code]
    assert not spills(code) and registers <= 40 and shared == 0 and not any(op.startswith("BAR") for op in ops)
    assert len(code) <= (400 if normed else 240)
