"""pytest -m gpu tests/gpu/test_heads_gpu.py   (speed: python -m mimo_kernels.bench --only heads)

The compiled norm, rotation and cache writes in BF16 against the reference on fresh inputs, and bit for bit.
"""

import os

import pytest
import torch

from mimo_kernels import heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
# query heads, key-value heads, head sizes, rotated elements: MiMo-V2.5 at TP 4 in a window and at TP 1 in full, a
# drafter, SmolLM2, keys and values alone, and sizes that are no powers of two
SHAPES = [
    (16, 2, 192, 128, 64),
    (64, 4, 192, 128, 64),
    (32, 8, 128, 128, 128),
    (9, 3, 64, 64, 64),
    (0, 8, 128, 128, 128),
    (3, 2, 80, 24, 26),
    (1, 1, 7, 5, 2),
]


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator("cuda").manual_seed(seed)


def at(start):
    return torch.tensor(start, device="cuda")


def random_case(rows, shape, g, slots=136):
    """qkv, cos and sin, a cache that is filled with 7, and head norms."""
    n, groups, k, v, rotated = shape

    def random(*size):
        return torch.randn(*size, generator=g, device="cuda")

    qkv = (random(rows, (n + groups) * k + groups * v) * 3).bfloat16()
    angle = random(rows, rotated // 2) * 100
    norms = heads.HeadNorms(*(1 + random(2, k) / 4).bfloat16(), eps=1e-5)
    keys, values = (torch.full((groups, slots, d), 7.0, device="cuda").bfloat16() for d in (k, v))
    return qkv, angle.cos().bfloat16(), angle.sin().bfloat16(), keys, values, norms


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def close(y, expected):
    """A BF16 rounding to the other side, or two where a norm rounds first; relative to a head."""
    if not y.numel():
        return True
    error = (y.float() - expected.float()).abs().amax(-1)
    return bool((error <= 2**-6 * expected.float().abs().amax(-1)).all())


def checked(case, start, count=None, normed=False):
    """Queries; values and untouched slots have the reference's bits, what is rotated is close to it."""
    qkv, cos, sin, keys, values, norms = case
    norms, rows, slots = norms if normed else None, len(qkv), keys.shape[1]
    before = keys.clone(), values.clone()
    where = None if start is None else at(start)
    q = heads.split_heads(qkv, cos, sin, keys, values, where, count=count, value_scale=0.612, norms=norms)
    sizes = len(keys), keys.shape[2], values.shape[2]
    expected = heads.reference(qkv, cos, sin, sizes, value_scale=0.612, norms=norms)
    count = rows if count is None else count
    taken = [((start or 0) + t) % slots for t in range(count)]
    others = [s for s in range(slots) if s not in taken]
    assert q.shape == expected[0].shape and close(q, expected[0])
    assert close(keys[:, taken], expected[1][:count].transpose(0, 1))
    assert same_bits(values[:, taken], expected[2][:count].transpose(0, 1))
    if not normed:
        rotated = 2 * cos.shape[1]
        assert same_bits(q[..., rotated:], expected[0][..., rotated:])
        assert same_bits(keys[:, taken, rotated:], expected[1][:count, :, rotated:].transpose(0, 1))
    assert same_bits(keys[:, others], before[0][:, others]) and same_bits(values[:, others], before[1][:, others])
    return q


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, normed, generator):
    for rows in (1, 3, 8, 16):
        checked(random_case(rows, shape, generator), 130 + rows, normed=normed)


@pytest.mark.parametrize("start", [None, 0, 128, 135, 136, 1000, 2**31 - 17])
def test_slots(start, generator):
    for count in (0, 1, 5, 8):
        checked(random_case(8, SHAPES[0], generator), start, count)


def test_views(generator):
    """A cache behind scratch slots, one layer of a cache with heads between, every other row, float32 rotations."""
    qkv, cos, sin, keys, values, norms = random_case(8, SHAPES[0], generator)
    views = keys.repeat_interleave(2, 0)[::2, 8:], values.transpose(0, 1).contiguous().transpose(0, 1)[:, 8:]
    checked((qkv[::2], cos[::2], sin[::2], *views, norms), 126)
    checked((qkv, cos.float(), sin.float(), *views, norms), 126, normed=True)


def test_a_cache_beyond_two_gigabytes(generator):
    """Element offsets of the last head do not fit into 32 bits."""
    qkv, cos, sin, *_ = random_case(8, (0, 2, 192, 128, 64), generator)
    keys = torch.zeros(2, 11_300_000, 192, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros(2, 11_300_000, 128, dtype=torch.bfloat16, device="cuda")
    heads.split_heads(qkv, cos, sin, keys, values, at(11_299_990))
    _, k, v = heads.reference(qkv, cos, sin, (2, 192, 128))
    assert close(keys[:, 11_299_990:11_299_998], k.transpose(0, 1))
    assert same_bits(values[:, 11_299_990:11_299_998], v.transpose(0, 1))


def test_bits_depend_on_the_row_alone(generator):
    for shape in SHAPES[:4]:
        case = random_case(16, shape, generator)
        y = checked(case, 77, normed=True)
        kept = case[3][:, 77:93].clone()
        for _ in range(50):
            assert same_bits(checked(case, 77, normed=True), y) and same_bits(case[3][:, 77:93], kept)
        for t in (0, 5, 15):
            one = *(x[t : t + 1] for x in case[:3]), *case[3:]
            case[3].fill_(7)
            assert same_bits(checked(one, 77 + t, normed=True)[0], y[t])
            assert same_bits(case[3][:, 77 + t], kept[:, t])


def test_in_a_graph_at_any_position(generator):
    """A replay reads the committed length from device memory: the host takes no part."""
    qkv, cos, sin, keys, values, _ = random_case(8, SHAPES[0], generator)
    start = at(5)
    heads.split_heads(qkv, cos, sin, keys, values, start)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = heads.split_heads(qkv, cos, sin, keys, values, start)
    for length in (0, 100, 131, 135, 12345):
        start.fill_(length)
        other = keys.fill_(7).clone(), values.fill_(7).clone()
        graph.replay()
        assert same_bits(q, heads.split_heads(qkv, cos, sin, *other, start))
        assert same_bits(keys, other[0]) and same_bits(values, other[1])
        assert int((keys[0, :, 0] != 7).sum()) == 8
