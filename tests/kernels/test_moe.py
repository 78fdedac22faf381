"""The W4A16 mixture of experts: layout, definition, kernels in Triton's interpreter, and the machine code they become.

Run by hand: TRITON_INTERPRET=1 pytest tests/kernels/test_moe.py (without it the file runs itself with it). The
interpreter truncates when it converts to BF16 and multiplies in float32; the compiled kernels have
tests/gpu/test_moe_gpu.py.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from mimo_kernels import moe, mxfp4, router
from tests.kernels.triton_tools import (
    compile_for_sm90,
    inside,
    main_loop,
    needs_tools,
    outside,
    pass_in_the_interpreter,
    spills,
)

FIELDS = ("gate_up", "gate_up_scales", "down", "down_scales")


def random_experts(count, hidden, inter, seed=0, scales=(116, 125)):
    g = torch.Generator().manual_seed(seed)

    def codes(*shape):
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)

    def bytes_(*shape):
        return torch.randint(*scales, shape, generator=g, dtype=torch.uint8)

    return moe.Experts(
        codes(count, 2 * inter, hidden // 2),
        bytes_(count, 2 * inter, hidden // 32),
        codes(count, hidden, inter // 2),
        bytes_(count, hidden, inter // 32),
    )


def random_tokens(tokens, top_k, experts, hidden, seed=0):
    """x, distinct ids, weights that sum to one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g).bfloat16()
    ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k]
    return x, ids, torch.rand(tokens, top_k, generator=g).softmax(-1)


def oracle(x, ids, weights, experts):
    """float64, one token and one routed expert at a time, from the readable decoder."""

    def values(codes, scales):
        return mxfp4.dequantize(mxfp4.unpack(codes), scales, torch.float64)

    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, (row, w) in enumerate(zip(ids.tolist(), weights.double(), strict=True)):
        for e, weight in zip(row, w, strict=True):
            gate, up = (values(experts.gate_up[e], experts.gate_up_scales[e]) @ x[t].double()).chunk(2)
            hidden = gate / (1 + torch.exp(-gate)) * up
            y[t] += weight * (values(experts.down[e], experts.down_scales[e]) @ hidden)
    return y


def relative_error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


# ---- the definition and the layout


@outside
def test_reference_is_the_formula():
    experts = random_experts(5, 64, 96)
    x, ids, weights = random_tokens(7, 3, 5, 64)
    ids[2] = torch.tensor([4, 4, 1])  # a repeated expert counts twice
    expected = oracle(x, ids, weights, experts)
    assert relative_error(moe.reference(x, ids, weights, experts, torch.float64), expected) < 1e-12
    assert relative_error(moe.reference(x, ids, weights, experts), expected) < 1e-6
    y = moe.moe(x, ids.int(), weights, moe.pack_experts(experts))
    assert y.dtype == torch.bfloat16 and relative_error(y, expected) < 3e-3


@outside
def test_every_word():
    codes = torch.tensor(list(itertools.product(range(16), repeat=4)))
    words = moe.pack_words(codes)
    assert words.unique().numel() == 16**4
    assert torch.equal(moe.unpack_words(words).long(), codes)
    # The bit patterns that the kernels make of a word are BF16 numbers: the code times 2**-126.
    w = words.int() & 0xFFFF
    last = ((w << 1) & 0x8000) | ((w >> 3) & 0x0180) | ((w >> 7) & 0x0040)
    bits = torch.stack([w & 0x81C0, (w << 3) & 0x81C0, (w << 6) & 0x81C0, last], -1)
    grid = torch.tensor([*mxfp4.GRID, *(-v for v in mxfp4.GRID)], dtype=torch.float64)
    exact = (bits << 16).view(torch.float32).double() * 2.0**126
    assert torch.equal(exact, grid[codes])
    assert moe.pack_words(torch.tensor([1, 9, 2, 15])).item() == 0x7C4A  # the example of the module


@outside
def test_the_place_of_every_weight():
    """Brute force over the sentence in the module: which code lies where."""
    experts = random_experts(1, 256, 128)
    packed = moe.pack_experts(experts)
    down = mxfp4.unpack(experts.down[0])
    for row, k in itertools.product((0, 7, 8, 15, 16, 255), (0, 3, 4, 77, 127)):
        word = packed.down[0, row // 16, k // 128, row % 16, k % 128 // 4]
        assert moe.unpack_words(word)[k % 4] == down[row, k]
        scale = packed.down_scales[0, row // 16, k // 128, row % 16, k % 128 // 32]
        assert int(scale) == int(experts.down_scales[0, row, k // 32]) + 126
    gate, up = mxfp4.unpack(experts.gate_up[0]).chunk(2)
    for i, k in itertools.product((0, 7, 8, 100), (0, 130, 255)):
        for matrix, row in ((gate, i // 8 * 16 + i % 8), (up, i // 8 * 16 + 8 + i % 8)):
            word = packed.gate_up[0, row // 16, k // 128, row % 16, k % 128 // 4]
            assert moe.unpack_words(word)[k % 4] == matrix[i, k]


@outside
@pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (576, 192), (96, 32), (256, 384)])
def test_round_trip(hidden, inter, assert_same_bits):
    experts = random_experts(3, hidden, inter, seed=hidden, scales=(0, 129))
    packed = moe.pack_experts(experts)
    for name in FIELDS:
        assert_same_bits(getattr(moe.unpack_experts(packed), name), getattr(experts, name))
        some = moe.unpack_experts(packed, torch.tensor([2, 0]))
        assert_same_bits(getattr(some, name), getattr(experts, name)[[2, 0]])
    hp, ip = packed.padded
    assert hp % 128 == ip % 128 == 0 <= hp - hidden < 128 and ip - inter < 128
    assert packed.bytes_per_expert == 3 * hp * ip * 17 // 32


@outside
def test_refusals():
    experts = random_experts(4, 128, 128)
    packed = moe.pack_experts(experts)
    x, ids, weights = random_tokens(4, 2, 4, 128)
    with pytest.raises(ValueError, match=r"ids: 0 to 4, not 0 to 3"):
        moe.reference(x, torch.tensor([[0, 4]] * 4), weights, experts)
    with pytest.raises(ValueError, match="17 tokens; give 1 to 16"):
        moe.moe(x[:1].expand(17, -1), ids[:1].expand(17, -1), weights[:1].expand(17, -1), packed)
    with pytest.raises(ValueError, match=r"x: torch.float32"):
        moe.moe(x.float(), ids, weights, packed)
    with pytest.raises(ValueError, match=r"expected \[T, H\] and twice"):
        moe.moe(x, ids[:2], weights, packed)
    with pytest.raises(ValueError, match=r"weights torch\.bfloat16"):
        moe.moe(x, ids, weights.bfloat16(), packed)
    experts.down_scales[1, 2, 3] = 129
    with pytest.raises(ValueError, match="down_scales: byte 129, above 128"):
        moe.pack_experts(experts)
    with pytest.raises(ValueError, match=r"down: torch.uint8 \[4, 128, 32\], expected"):
        moe.pack_experts(moe.Experts(experts.gate_up, experts.gate_up_scales, experts.down[..., :32], experts.down))


# ---- the kernels in the interpreter


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, 20)


@pytest.fixture(scope="module")
def small():
    experts = random_experts(6, 128, 128)
    return experts, moe.pack_experts(experts)


@pytest.fixture
def kernels():
    from mimo_kernels import moe_triton

    return moe_triton


@inside
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16])
def test_tokens(kernels, small, tokens):
    experts, packed = small
    x, ids, weights = random_tokens(tokens, 2, 6, 128, seed=tokens)
    assert relative_error(kernels.moe(x, ids, weights, packed), oracle(x, ids, weights, experts)) < 1e-2


@inside
def test_the_tiles_of_the_published_geometries(kernels):
    """More than one step of K, slice of the down product, and row tile; padding in both dimensions."""
    experts = random_experts(3, 480, 480, seed=1)
    packed = moe.pack_experts(experts)
    config = kernels.config_for(*packed.padded)
    assert config == kernels.Config(kernels.GATE_UP_TILES[0], kernels.DOWN_TILES[0], 8)
    x, ids, weights = random_tokens(3, 2, 3, 480)
    assert relative_error(kernels.moe(x, ids, weights, packed), oracle(x, ids, weights, experts)) < 1e-2


@inside
@pytest.mark.parametrize("routing", ["one expert", "all but one", "repeated"])
def test_ragged_loads(kernels, small, routing):
    experts, packed = small
    x, ids, weights = random_tokens(5, 2, 6, 128, seed=3)
    if routing == "repeated":
        ids = torch.tensor([[5, 5], [0, 5], [3, 3], [5, 3], [1, 1]])
    else:
        ids = torch.full((5, 1), 4)
        ids[3] = 4 if routing == "one expert" else 0
        weights = weights[:, :1].contiguous()
    assert relative_error(kernels.moe(x, ids, weights, packed), oracle(x, ids, weights, experts)) < 1e-2


@inside
@pytest.mark.parametrize("scale", [0, 64, 128])
def test_extreme_scales(kernels, scale):
    """Every scale of `down` at one end of the range; gate and up are ordinary."""
    experts = random_experts(2, 128, 128, seed=scale)
    experts.down_scales.fill_(scale)
    x, ids, weights = random_tokens(2, 1, 2, 128)
    expected = oracle(x, ids, weights, experts)
    y = kernels.moe(x, ids, weights, moe.pack_experts(experts))
    assert expected.abs().max() > 2.0 ** (scale - 127) and relative_error(y, expected) < 1e-2


@inside
def test_bits_depend_on_the_token_alone(kernels, small, assert_same_bits):
    _, packed = small
    x, ids, weights = random_tokens(6, 2, 6, 128, seed=9)
    y = kernels.moe(x, ids, weights, packed)
    assert_same_bits(kernels.moe(x, ids, weights, packed), y)
    for some in ([4], [5, 0, 3]):
        assert_same_bits(kernels.moe(x[some], ids[some].int(), weights[some], packed), y[some])


@inside
def test_an_expert_that_overflows_for_others_does_no_harm(kernels):
    """Token 0 is huge and its own expert small: under the expert of token 1 its hidden activations are infinite."""
    experts = random_experts(2, 128, 128)
    experts.gate_up_scales[0] -= 100
    x, _, weights = random_tokens(2, 1, 2, 128)
    x[0] *= 2.0**100
    ids = torch.tensor([[0], [1]])
    y = kernels.moe(x, ids, weights, moe.pack_experts(experts))
    assert y.isfinite().all() and relative_error(y, oracle(x, ids, weights, experts)) < 1e-2


@inside
@pytest.mark.parametrize(("tokens", "top_k", "pool"), [(1, 1, 100), (3, 5, 9), (8, 8, 100), (16, 8, 100), (16, 7, 3)])
def test_prepare(kernels, tokens, top_k, pool):
    """The list of experts, its groups, the combine weights and the order of x, against Python sets."""
    pages = torch.empty(100, 1, 1, 16, 32)
    packed = moe.PackedExperts(pages, pages, pages.expand(100, 8, 1, 16, 32), pages, hidden=100, inter=100)
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(100 - pool, 100, (tokens, top_k), generator=g)
    x, _, weights = random_tokens(tokens, top_k, 100, 100)
    config = kernels.Config(kernels.GATE_UP_TILES[-1], kernels.DOWN_TILES[-1], groups=4)
    out = kernels.prepare(x, ids, weights, packed, config)
    slots, distinct = min(tokens * top_k, 100), sorted(set(ids.flatten().tolist()))
    assert out.list[:slots].tolist() == distinct + [-1] * (slots - len(distinct))
    assert out.list[slots:].tolist() == [sum(e < 25 * group for e in distinct) for group in range(5)]
    for combine, e in zip(out.combine, distinct, strict=False):
        torch.testing.assert_close(combine[:tokens], torch.where(ids == e, weights, 0).sum(-1))
        assert not combine[tokens:].any()
    assert not out.combine[len(distinct) :].any()
    padded = torch.zeros(len(out.x), 128, dtype=torch.bfloat16)
    padded[:tokens, :100] = x
    assert torch.equal(out.x.view(-1, 4, 32).transpose(1, 2).flatten(1), padded)


# ---- the machine code, ahead of time and without a GPU


@outside
@needs_tools
@pytest.mark.parametrize(("warps", "product", "tokens", "bound"), [
    (2, "gate_up", 8, 2.75), (2, "down", 8, 2.9), (2, "gate_up", 16, 3.15), (2, "down", 16, 3.45),
    (4, "gate_up", 8, 3.35), (4, "down", 8, 3.6), (4, "gate_up", 16, 3.35), (4, "down", 16, 3.75),
])  # fmt: skip
def test_instructions_a_weight(kernels, warps, product, tokens, bound):
    """Of the tiles that run on MiMo-V2.5 at TP 4, and with two warps, where nothing but the unpacking counts. An H200
    at full memory speed has time for about 4.1.

    Triton 3.9 multiplies 64 rows by four warps with WGMMA; triton 3.6 does so for 16 tokens only and needs up to 0.35
    fewer. Two warps take fewer instructions, and were slower on an H200.
    """
    config = kernels.config_for(4096, 512)
    assert config == kernels.Config(kernels.Tile(64, 256, 4, 4), kernels.Tile(64, 256, 4, 4), 4)
    gate_up, down = (dataclasses.replace(tile, warps=warps) for tile in (config.gate_up, config.down))
    words = {"W": "*i16", "S": "*u8", "LIST": "*i16"}
    if product == "gate_up":
        kernel, tile, shape = kernels._gate_up_kernel, gate_up, {"K": 4096, "ROWS": 1024}
        pointers = words | {"HIDDEN": "*bf16", "X": "*bf16"}
    else:
        kernel, tile, shape = kernels._down_kernel, down, {"K": 512, "ROWS": 4096}
        pointers = words | {"OUT": "*fp32", "HIDDEN": "*bf16", "COMBINE": "*fp32"}
    constants = shape | {"BM": tile.rows, "BN": tokens, "BK": tile.k, "PTX": True}
    code, registers, _ = compile_for_sm90(kernel, pointers, constants, tile.warps, tile.stages)
    loop = main_loop(code)
    assert len(loop) * tile.warps * 32 / (tile.rows * tile.k) <= bound
    assert not spills(code)
    assert registers <= (128 if tokens == 8 else 168)
    # Weights are copied 16 bytes at a time, and a step waits for its own copies only: those of later steps go on.
    per_thread = tile.rows * tile.k // 2 // (tile.warps * 32)
    assert sum(op.startswith("LDGSTS") and op.endswith("BYPASS.128") for op in loop) >= per_thread // 16
    under_way = max(int(rest.split("0x")[1], 16) for _, op, rest in code if op == "DEPBAR.LE")
    assert under_way >= (tile.stages - 2) * loop.count("LDGDEPBAR")


@outside
@needs_tools
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_everything_compiles(kernels, tokens):
    """Also with the arguments that are 1 for one token of a one-expert router: Triton makes constants of them."""
    n, top_k = max(tokens, 8), 1 if tokens == 1 else 8
    ones = dict.fromkeys(("slots", "groups", "tokens"), 1) if tokens == 1 else {}
    tile = kernels.DOWN_TILES[0]
    down = {"K": 512, "ROWS": 4096, "BM": tile.rows, "BN": n, "BK": tile.k, "PTX": True}
    prepare = {"K": 4096, "TOP_K": top_k, "P": tokens * top_k, "BN": n, "SLOTS": 16}
    tables = {"LIST": "*i16", "COMBINE": "*fp32", "OUT": "*bf16"}
    for kernel, pointers, constants in (
        (kernels._prepare_kernel, tables | {"IDS": "*i64", "WEIGHTS": "*fp32", "X": "*bf16"}, prepare | ones),
        (kernels._down_kernel, tables | {"W": "*i16", "S": "*u8", "HIDDEN": "*bf16"}, down),
        (kernels._sum_kernel, {"OUT": "*bf16", "PARTS": "*fp32"}, {"COUNT": 8, "N": 256}),
    ):
        constants = constants | {k: v for k, v in ones.items() if k in kernel.arg_names}
        code, _, _ = compile_for_sm90(kernel, pointers, constants, tile.warps, tile.stages)
        assert not spills(code)


# ---- with a router


@outside
def test_routed_without_a_gpu_is_the_router_and_then_the_experts():
    experts = random_experts(6, 64, 32)
    packed = moe.pack_experts(experts)
    x, positions = torch.randn(3, 64).bfloat16(), torch.tensor([4, 9, 2])
    steering = router.Router(torch.randn(6, 64), torch.randn(5, 6), 2, normalise=True, scaling=1.5)
    found, weights, ids = moe.routed(x, steering, packed, positions)
    expected = router.route(x, steering.weight, steering.bias, 2, normalise=True, scaling=1.5, positions=positions)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    assert torch.equal(found, moe.moe(x, ids, weights, packed))
    with pytest.raises(ValueError, match="positions: missing"):
        moe.routed(x, steering, packed)
    few = router.Router(torch.randn(5, 64), torch.randn(5), 2, normalise=True)
    with pytest.raises(ValueError, match="router: 5 experts, of which 6 are given"):
        moe.routed(x, few, packed)


# ---- the benchmark


@outside
@pytest.mark.skipif(torch.cuda.is_available(), reason="what it prints without a GPU")
def test_bench_without_a_gpu(capsys):
    from mimo_kernels import bench

    config = Path(__file__).parents[2] / "recipes/model/mimo-v2.5.json"
    bench.main([str(config), "--shape", "6144", "2048", "384", "8", "--tp", "4", "8", "--bandwidth", "4000"])
    *text, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert "nothing is measured" in text[0] and not document["measured"] and len(document["rows"]) == 64
    rows = {(r["model"], r["tp"], r["operator"], r.get("experts", r.get("context"))): r for r in document["rows"]}
    flash = rows["mimo-v2.5", 4, "moe", 57]
    assert flash["bytes"] == 57 * 3 * 4096 * 512 * 17 // 32 and flash["floor_us"] == round(flash["bytes"] / 4e6, 2)
    assert rows["6144x2048x384top8", 8, "moe", 60]["bytes"] == 60 * 3 * 6144 * 256 * 17 // 32
    others = 3712 * 4096 + 4 * 58 * 32 + 2 * 135 * 640 + 2 * 4096 * 2048 + 4 * 256 * 4097  # qkv, keys, o, router
    assert rows["mimo-v2.5", 4, "layer, 8 rows", 57]["bytes"] == flash["bytes"] + others
    assert rows["mimo-v2.5", 4, "encode even", 16]["bytes"] == 16 * 1024 * 4096 * 145 // 32
    # 16 query heads on one key-value head, and on two in a window; at TP 8 several ranks hold the same one
    assert rows["mimo-v2.5", 4, "attention full", 8192]["bytes"] == 8200 * 640
    assert rows["mimo-v2.5", 8, "attention full", 512]["bytes"] == 520 * 640
    assert rows["mimo-v2.5", 4, "attention window", 8192]["bytes"] == 2 * 135 * 640
    assert rows["mimo-v2.5", 4, "linear qkv full fp8", None]["bytes"] == 3392 * 4096 + 53 * 32 * 4
    assert rows["mimo-v2.5", 4, "linear qkv window fp8", None]["bytes"] == 3712 * 4096 + 58 * 32 * 4
    assert rows["mimo-v2.5", 8, "linear o bf16", None]["bytes"] == 2 * 4096 * 1024
    assert rows["mimo-v2.5", 4, "linear head bf16", None]["bytes"] == 2 * 38144 * 4096
    # rows, update, weight, and the sum and the norm of it; 18 heads of 192 and two of 128 read and written
    assert rows["mimo-v2.5", 4, "norm of 4 parts", None]["bytes"] == 2 * 4096 * (8 * 7 + 1)
    assert rows["mimo-v2.5", 4, "norm of 8 experts' parts", None]["bytes"] == 2 * 4096 * (8 * (2 * 8 + 3) + 1)
    assert rows["mimo-v2.5", 4, "heads window", None]["bytes"] == 2 * 2 * 8 * 3712
    assert rows["mimo-v2.5", 8, "router", 256]["bytes"] == 4 * 256 * 4097
    for bad in (["--tp", "3"], ["--tokens", "17"], ["--distinct", "65"]):
        with pytest.raises(SystemExit):
            bench.main([str(config), *bad])
    assert "touch 8 to 64 experts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--shape", "6144", "2048", "384", "8", "--only", "linear"])
    assert "give a config.json" in capsys.readouterr().err
