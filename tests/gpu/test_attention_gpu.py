"""pytest -m gpu tests/gpu/test_attention_gpu.py   (speed: python -m mimo_kernels.bench --only attention)

The compiled attention kernels in BF16 against the float64 reference on fresh inputs, and bit for bit.
"""

import os

import pytest
import torch

from mimo_kernels import attention as att

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
# query heads, key-value heads, head sizes: MiMo-V2.5 at TP 4 in a window and in full, Pro in full at TP 1, small ones
SHAPES = [(16, 2, 192, 128), (16, 1, 192, 128), (128, 8, 192, 128), (9, 3, 64, 64), (8, 2, 128, 128)]


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator("cuda").manual_seed(seed)


def random_case(tokens, shape, slots, g):
    heads, groups, k_dim, v_dim = shape

    def random(*size):
        return torch.randn(*size, generator=g, device="cuda")

    q, keys, values = random(tokens, heads, k_dim), random(groups, slots, k_dim), random(groups, slots, v_dim)
    return q.bfloat16(), keys.bfloat16(), values.bfloat16(), random(heads)


def random_tree(tokens, g):
    """Depths and ancestors of a random tree whose parents come before their children."""
    depths = torch.zeros(tokens, dtype=torch.long)
    ancestors = torch.eye(tokens, dtype=torch.bool)
    for t in range(1, tokens):
        parent = int(torch.randint(t, (), generator=g, device="cuda"))
        depths[t] = depths[parent] + 1
        ancestors[t] |= ancestors[parent]
    return depths.cuda(), ancestors.cuda()


def at(start):
    return torch.tensor(start, device="cuda")


def checked(q, keys, values, start, **kw):
    """The kernels' output; its error is a few BF16 roundings, relative to a row of a head."""
    kw = {"scale": q.shape[2] ** -0.5, **kw}
    y = att.attention(q, keys, values, at(start), **kw)
    expected = att.reference(q, keys, values, at(start), dtype=torch.float64, **kw)
    error = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    assert float(error.max()) < 1.5e-2
    return y


def same_bits(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(shape, generator):
    for tokens in range(1, 17):
        q, keys, values, sink = random_case(tokens, shape, 144, generator)
        checked(q, keys, values, 1000 + 37 * tokens, window=128, sink=sink)
        q, keys, values, sink = random_case(tokens, shape, 2048, generator)
        checked(q, keys, values, 2048 - 64 * tokens, sink=sink)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_lengths(shape, generator):
    """Around the borders of blocks, and where the split size grows; nobody reads what is not stored."""
    slots = 2**16
    q, keys, values, _ = random_case(8, shape, slots, generator)
    for end in (8, 9, 63, 64, 65, 128, 129, 4095, 4096, 4097, 8191, 8192, 8193, 16385, 32769, 65535, 65536):
        k, v = keys.clone(), values.clone()
        k[:, end:], v[:, end:] = float("nan"), float("nan")
        checked(q, k, v, end - 8)


def test_every_block(generator):
    from mimo_kernels import attention_triton as at_

    for shape, slots, start, window in ((SHAPES[0], 136, 500, 128), (SHAPES[1], 8192, 5000, None)):
        q, keys, values, sink = random_case(8, shape, slots, generator)
        kw = {"scale": 0.07, "window": window, "sink": sink}
        expected = att.reference(q, keys, values, at(start), dtype=torch.float64, **kw)
        for block in at_.BLOCKS:
            for splits in (1, 2, 64):
                y = at_.attention(q, keys, values, at(start), config=at_.Config(*block, splits), **kw)
                assert float((y.double() - expected).norm() / expected.norm()) < 1e-2, (block, splits)


@pytest.mark.parametrize("slots", [135, 136, 192, 300])
def test_window_edges(slots, generator):
    q, keys, values, sink = random_case(8, SHAPES[0], slots, generator)
    for start in (0, 1, 119, 120, 121, 127, 128, 129, slots - 8, slots, slots + 1, 3 * slots - 3, 10**6 + 7):
        k, v = keys.clone(), values.clone()
        k[:, start + 8 :], v[:, start + 8 :] = 1e9, 1e9
        checked(q, k, v, start, window=128, sink=sink)


@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trees(shape, tokens, generator):
    """Also on views: a cache behind scratch slots, queries beside keys."""
    heads, groups, *sizes = shape
    q, keys, values, sink = random_case(tokens, (heads + 2, groups, *sizes), 200, generator)
    q, keys, values, sink = q[:, :heads], keys[:, 8:], values[:, 8:], sink[:heads]
    for start in (0, 100, 170):
        tree = random_tree(tokens, generator)
        checked(q, keys, values, start, tree=tree)
        checked(q, keys, values, 20 * start, tree=tree, window=128, sink=sink)


@pytest.mark.parametrize("slots", [136, 4096])
def test_extreme_sinks(slots, generator):
    q, keys, values, sink = random_case(8, SHAPES[1], slots, generator)
    sink[:4] = torch.tensor([3e4, -3e4, float("-inf"), 200.0], device="cuda")
    y = checked(q * 20, keys, values, slots - 8, sink=sink)
    assert not y[:, 0].any()


@pytest.mark.parametrize(("shape", "tokens"), [(SHAPES[0], 8), (SHAPES[1], 4), (SHAPES[1], 8)], ids=str)
def test_bits_depend_on_the_row_alone(shape, tokens, generator):
    """In every run the same; a row alone (while a head has at most 64 rows), and among other neighbours."""
    for slots, start, kw in ((136, 777, {"window": 128}), (16384, 8000, {}), (16384, 300, {})):
        q, keys, values, sink = random_case(tokens, shape, slots, generator)
        kw |= {"scale": 0.08, "sink": sink}
        y = att.attention(q, keys, values, at(start), **kw)
        for _ in range(50):
            assert same_bits(att.attention(q, keys, values, at(start), **kw), y)
        for t in range(tokens):
            others = torch.randn_like(q)
            others[t] = q[t]
            assert same_bits(att.attention(others, keys, values, at(start), **kw)[t], y[t])
            if tokens * shape[0] // shape[1] <= 64 and slots > 136:
                assert same_bits(att.attention(q[t : t + 1], keys, values, at(start + t), **kw)[0], y[t])


def test_in_a_graph_at_any_length(generator):
    """A replay reads the committed length from device memory: the host takes no part."""
    q, keys, values, sink = random_case(8, SHAPES[1], 2**15, generator)
    start = at(5)
    kw = {"scale": 0.08, "sink": sink}
    att.attention(q, keys, values, start, **kw)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = att.attention(q, keys, values, start, **kw)
    for length in (0, 100, 20000, 2**15 - 8):
        start.fill_(length)
        graph.replay()
        assert same_bits(y, checked(q, keys, values, length, **kw))


@pytest.mark.parametrize("k_dim", [72, 56, 8])
def test_head_sizes_that_the_kernels_lack(k_dim, generator):
    q, keys, values, _ = random_case(1, (2, 1, k_dim, 64), 64, generator)
    with pytest.raises(ValueError, match=f"head sizes {k_dim} and"):
        att.attention(q, keys, values, at(3), scale=1.0)
