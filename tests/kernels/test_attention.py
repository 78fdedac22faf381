"""Decode attention: definition, kernels in Triton's interpreter, and the machine code they become.

In the interpreter the kernels run on float32, so they are held to float32 accuracy; tests/gpu/test_attention_gpu.py has
the BF16 ones. Blocks are smaller there, so that a few dozen keys make many blocks and splits.
"""

import math

import pytest
import torch

from mimo_kernels import attention as att
from mimo_runtime.cache import LinearCache, RingCache, visible
from tests.kernels.triton_tools import (
    compile_for_sm90,
    inside,
    main_loop,
    needs_tools,
    outside,
    pass_in_the_interpreter,
    spills,
)

K, V = 48, 32  # a head of two powers of two, as 192 is


def random_case(seed, tokens, heads, groups, slots, k_dim=K, v_dim=V):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    q, keys, values = random(tokens, heads, k_dim), random(groups, slots, k_dim), random(groups, slots, v_dim)
    return q, keys, values, random(heads)


def random_tree(seed, tokens):
    """Depths and ancestors of a random tree whose parents come before their children."""
    g = torch.Generator().manual_seed(seed)
    depths, ancestors = torch.zeros(tokens, dtype=torch.long), torch.eye(tokens, dtype=torch.bool)
    for t in range(1, tokens):
        parent = int(torch.randint(t, (), generator=g))
        depths[t] = depths[parent] + 1
        ancestors[t] |= ancestors[parent]
    return depths, ancestors


def oracle(q, history, start, scale, window=None, sink=None, tree=None):
    """float64, one row and one head at a time; history: {position: (key [G, K], value [G, V])} and the new rows."""
    older, new = history
    tokens, heads, _ = q.shape
    groups = new[0][0].shape[0]
    depths = tree[0].tolist() if tree else range(tokens)
    out = torch.zeros(tokens, heads, new[0][1].shape[-1], dtype=torch.float64)
    for t in range(tokens):
        at = start + depths[t]
        seen = [kv for p, kv in older.items() if p < start and (window is None or at - p < window)]
        for j in range(tokens):
            among = tree[1][t, j] if tree else j <= t
            if among and (window is None or depths[t] - depths[j] < window):
                seen.append(new[j])
        for n in range(heads):
            g = n // (heads // groups)
            weights = [math.exp(float(q[t, n].double() @ k[g].double()) * scale) for k, _ in seen]
            total = sum(weights) + (0 if sink is None else math.exp(float(sink[n])))
            out[t, n] = sum(w / total * v[g].double() for w, (_, v) in zip(weights, seen, strict=True))
    return out


def filled(cache, start, tokens, seed):
    """Writes start + tokens random rows in rounds with rejected rows, as a runtime does; returns the history."""
    g = torch.Generator().manual_seed(seed)
    heads, _, k_dim = cache.k.shape
    older, at, new = {}, 0, []

    def rows(n):
        k = torch.randn(n, heads, k_dim, generator=g).to(cache.k.dtype)
        return k, torch.randn(n, heads, cache.v.shape[2], generator=g).to(cache.k.dtype)

    while at < start:
        k, v = rows(min(cache.block or 8, start + tokens - at))
        cache.write(k, v, at)
        for i in range(min(max(1, len(k) // 2), start - at)):  # the other rows are rejected
            older[at + i] = (k[i], v[i])
        at = len(older)
    k, v = rows(tokens)
    cache.write(k, v, start)
    new = list(zip(k, v, strict=True))
    return older, new


def largest_error(y, expected):
    """Relative to the largest magnitude of the row of a head."""
    return float(((y.double() - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-30)).max())


# ---- the definition


@outside
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("start", [0, 1, 11, 12, 13, 20, 21, 41])
@pytest.mark.parametrize("kind", ["full", "ring", "full tree", "ring tree"])
def test_reference_is_the_formula(kind, start, tokens):
    """On the caches of the runtime, with a window of 12 that a ring of 20 slots holds beside 8 rows."""
    window = 12 if "ring" in kind else None
    shape = (2, 16, 8)
    cache = (
        RingCache(shape, 20, 12, block=8, dtype=torch.float32)
        if window
        else LinearCache(shape, 64, dtype=torch.float32)
    )
    history = filled(cache, start, tokens, seed=start)
    tree = random_tree(start, tokens) if "tree" in kind else None
    q, *_, sink = random_case(start, tokens, 6, 2, 4, 16, 8)
    at = torch.tensor(start)
    y = att.reference(q, cache.k, cache.v, at, scale=0.3, window=window, sink=sink, tree=tree, dtype=torch.float64)
    assert largest_error(y, oracle(q, history, start, 0.3, window, sink, tree)) < 1e-12
    if tree is None:  # the mask that the runtime makes
        positions = cache.positions(torch.tensor(start + tokens))
        expected = visible(torch.arange(start, start + tokens), positions, window)
        assert torch.equal(att.visible(at, tokens, cache.capacity, window, None), expected)


@outside
def test_bfloat16_on_a_cpu():
    q, keys, values, sink = (x.bfloat16() for x in random_case(0, 4, 8, 2, 64, 192, 128))
    kw = {"scale": 192**-0.5, "window": 32, "sink": sink.float()}
    y = att.attention(q, keys, values, torch.tensor(90), **kw)
    expected = att.reference(q, keys, values, torch.tensor(90), dtype=torch.float64, **kw)
    assert y.dtype == torch.bfloat16 and largest_error(y, expected) < 2**-8


@outside
def test_refusals():
    q, keys, values, sink = (x.bfloat16() for x in random_case(0, 4, 8, 2, 16))
    start, kw = torch.tensor(3), {"scale": 1.0}
    depths, ancestors = random_tree(0, 4)
    for message, call in {
        "q: torch.float32": lambda: att.attention(q.float(), keys, values, start, **kw),
        "N a multiple of G": lambda: att.attention(q[:, :7], keys, values, start, **kw),
        "17 rows; give 1 to 16": lambda: att.attention(q[:1].expand(17, -1, -1), keys, values, start, **kw),
        r"start: torch.float32 \[\]": lambda: att.attention(q, keys, values, start.float(), **kw),
        "16 slots hold less than 4 rows and the window 14": lambda: att.attention(
            q, keys, values, start, window=14, **kw
        ),
        "sink: torch.bfloat16": lambda: att.attention(q, keys, values, start, sink=sink, **kw),
        "ancestors torch.float32": lambda: att.attention(q, keys, values, start, tree=(depths, ancestors * 1.0), **kw),
        "do not fit into a window of 3": lambda: att.attention(
            q, keys, values, start, window=3, tree=(depths, ancestors), **kw
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- the kernels in the interpreter


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, 65)


@pytest.fixture
def kernels():
    from mimo_kernels import attention_triton

    return attention_triton


def both(kernels, case, start, splits, **kw):
    """The kernels' output with blocks of 16 keys, checked against float64."""
    q, keys, values, _ = case
    config = kernels.Config(16, 16, 4, 3, splits)
    kw = {"scale": q.shape[2] ** -0.5, **kw}
    y = kernels.attention(q, keys, values, torch.tensor(start), config=config, **kw)
    expected = att.reference(q, keys, values, torch.tensor(start), dtype=torch.float64, **kw)
    assert largest_error(y, expected) < 2e-6
    return y


@inside
@pytest.mark.parametrize("tokens", range(1, 17))
def test_rows(kernels, tokens):
    """Every number of rows, all query heads of a group; a full cache in splits, and a ring in one launch."""
    case = random_case(tokens, tokens, 6, 2, 80)
    both(kernels, case, 64 - tokens, 4, sink=case[3])
    both(kernels, case, 500 + 7 * tokens, 1, sink=case[3], window=20)


@inside
@pytest.mark.parametrize("end", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 193, 256])
def test_lengths_around_split_borders(kernels, end):
    """Four splits: of 16 keys up to a length of 64, then of 32, 48, 64. Nobody reads what is not stored."""
    tokens = min(end, 3)
    q, keys, values, sink = random_case(end, tokens, 4, 1, 256)
    keys[:, end:], values[:, end:] = float("nan"), float("nan")
    both(kernels, (q, keys, values, sink), end - tokens, 4)


@inside
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 19, 20, 21, 36])
def test_window_edges(kernels, start, splits):
    """A ring of exactly window - 1 + T slots, from empty to wrapped; slots that hold nothing are not zero."""
    q, keys, values, sink = random_case(start, 5, 4, 2, 20)
    if start + 5 < 20:
        keys[:, start + 5 :], values[:, start + 5 :] = 1e9, 1e9
    both(kernels, (q, keys, values, sink), start, splits, window=16)


@inside
@pytest.mark.parametrize(("k_dim", "v_dim"), [(192, 128), (64, 64), (128, 16)])
@pytest.mark.parametrize("window", [None, 24])
def test_trees_and_head_sizes(kernels, k_dim, v_dim, window):
    """Views as well: a cache behind scratch slots, queries beside keys, ancestors as a transposed copy."""
    q, keys, values, sink = random_case(v_dim, 7, 8, 2, 48, k_dim, v_dim)
    depths, ancestors = random_tree(k_dim, 7)
    case = q[:, :4], keys[:, 8:], values[:, 8:], sink[:4]
    for start in (0, 30):
        for splits in (1, 4):
            both(
                kernels,
                case,
                start,
                splits,
                window=window,
                sink=case[3],
                tree=(depths.int(), ancestors.T.contiguous().T),
            )


@inside
def test_sinks_and_depths_of_any_stride(kernels):
    q, keys, values, sink = random_case(3, 7, 4, 2, 48)
    depths, ancestors = random_tree(3, 7)
    strided = torch.stack((depths, depths * 0 + 9), 1)[:, 0], ancestors
    both(kernels, (q, keys, values, sink), 20, 1, sink=torch.stack((sink, sink + 5), 1)[:, 0], tree=strided)


@inside
@pytest.mark.parametrize("splits", [1, 4])
def test_extreme_sinks(kernels, splits):
    """A head whose sink takes everything, one whose sink is nothing, and logits far beyond float32's exponentials."""
    q, keys, values, _ = random_case(1, 3, 4, 2, 64)
    sink = torch.tensor([3e4, -3e4, float("-inf"), 100.0])
    y = both(kernels, (q * 100, keys, values, sink), 40, splits, sink=sink)
    assert not y[:, 0].any() and y[:, 1:3].abs().amax(-1).min() > 0.01


@inside
def test_bits_depend_on_the_row_alone(kernels, assert_same_bits):
    """Twice the same; and the first row alone, or any row among others. (numpy's products depend on a row's place.)"""
    q, keys, values, sink = random_case(4, 6, 4, 2, 64)
    for window, splits in ((None, 4), (30, 1), (30, 4)):
        config = kernels.Config(64, 16, 4, 3, splits)
        kw = {"scale": 0.2, "window": window, "sink": sink, "config": config}
        y = kernels.attention(q, keys, values, torch.tensor(50), **kw)
        assert_same_bits(kernels.attention(q, keys, values, torch.tensor(50), **kw), y)
        assert_same_bits(kernels.attention(q[:1], keys, values, torch.tensor(50), **kw), y[:1])
        for t in range(6):
            others = torch.full_like(q, 7)
            others[t] = q[t]
            assert_same_bits(kernels.attention(others, keys, values, torch.tensor(50), **kw)[t], y[t])


@outside
def test_configurations():
    """Of the published shapes: programs for a whole GPU at long contexts, one launch for a window."""
    at = pytest.importorskip("mimo_kernels.attention_triton")
    assert at.config_for(64, 2, 136) == at.Config(16, 64, 4, 3, 1)
    assert at.config_for(128, 1, 2**18) == at.Config(128, 64, 8, 3, 128)
    for rows, groups, slots in ((128, 1, 512), (128, 8, 2**18), (256, 4, 2**13), (64, 1, 2**17), (16, 1, 1024)):
        config = at.config_for(rows, groups, slots)
        programs = config.splits * groups * -(-rows // config.rows)
        assert programs <= 128 and (programs == 128 or config.splits * 64 >= slots)
    for k_dim, v_dim in ((96, 64), (192, 128), (64, 64)):
        assert sum(at.split_head(k_dim, v_dim)) == k_dim
    for k_dim, v_dim in ((80 + 32, 64), (72, 64), (8, 16), (64, 96)):
        with pytest.raises(ValueError, match="pad the heads"):
            at.split_head(k_dim, v_dim)


@inside
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("tokens", "padded"), [(1, 8), (5, 8), (8, 8), (16, 17)])
def test_padding_repeats_the_last_row(kernels, tokens, padded, splits, assert_same_bits):
    """In one launch as in two; the real rows are those without padding."""
    case = random_case(tokens, tokens, 8, 2, 64)
    alone = both(kernels, case, 37, splits)
    q, keys, values, _ = case
    config = kernels.Config(16, 16, 4, 3, splits)
    kw = {"scale": q.shape[2] ** -0.5, "config": config, "padded": padded}
    y = kernels.attention(q, keys, values, torch.tensor(37), **kw)
    assert_same_bits(y, att.repeated(alone, padded))


# ---- the machine code

POINTERS = dict.fromkeys(("Q", "KEYS", "VALUES"), "*bf16") | {
    "OUT": "*bf16", "STATS": "*bf16", "START": "*i64", "SINK": "*fp32", "DEPTHS": "*i64", "ANCESTORS": "*u8",
}  # fmt: skip


@outside
@needs_tools
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize(
    ("rows", "groups", "group", "slots", "window"),
    [(64, 2, 8, 136, 128), (128, 1, 16, 2**18, 0), (64, 1, 8, 2**18, 0), (16, 1, 16, 2**13, 0)],
    ids=["window, 8 tokens", "full, 8 tokens", "full TP 8, 8 tokens", "full, 1 token"],
)
def test_machine_code(rows, groups, group, slots, window, tree):
    """Of the kernels that run on MiMo-V2.5 at TP 4: WGMMA from 64 rows on, copies of 16 bytes, registers, memory."""
    import mimo_kernels.attention_triton as at

    config = at.config_for(rows, groups, slots)
    constants = {
        "GROUP": group, "HEAD": 128, "TAIL": 64, "V": 128, "WINDOW": window, "TREE": tree, "HAS_SINK": window > 0,
        "MAX_TOKENS": 16, "SPLITS": config.splits, "BM": config.rows, "BN": config.keys,
        "AHEAD": slots if window else 0,
    }  # fmt: skip
    if rows == group:
        constants["tokens"] = 1  # Triton makes a constant of it
    parts = dict.fromkeys(("OUT", "STATS"), "*fp32") if config.splits > 1 else {}
    types = POINTERS | parts | {"scale": "fp32"}
    code, registers, shared = compile_for_sm90(at._attend_kernel, types, constants, config.warps, config.stages)
    loop = main_loop(code)
    assert not spills(code) and registers <= 255 and shared <= 200 * 1024
    assert any("GMMA" in op for op in loop) is (config.rows >= 64)
    assert any(op.startswith("HMMA") for op in loop) is (config.rows < 64)
    per_thread = config.keys * (192 + 128) * 2 // (32 * config.warps)
    assert sum(op.startswith("LDGSTS") and op.endswith("128") for op in loop) == per_thread // 16
    assert not any(op.startswith("LDG.") for op in loop)
    # When 128 programs share 4.3 TB/s, the 40 KB of a block take 1.2 us, where a scheduler issues 2,000 instructions.
    assert len(loop) * config.warps // 4 <= 1600


@outside
@needs_tools
@pytest.mark.parametrize("sink", [False, True])
def test_the_join_compiles(sink):
    import mimo_kernels.attention_triton as at

    constants = {"V": 128, "HAS_SINK": sink, "SPLITS": 128, "BN": 64, "VB": 32}
    pointers = {"OUT": "*bf16", "PARTS": "*fp32", "STATS": "*fp32", "START": "*i64", "SINK": "*fp32"}
    code, registers, _ = compile_for_sm90(at._join_kernel, pointers, constants, 4, 3)
    assert not spills(code) and registers <= 128
    assert sum(op.startswith("LDG.E.128") for _, op, _ in code) >= 8  # the whole tile is under way at once
