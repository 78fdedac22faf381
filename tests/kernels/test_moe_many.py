"""Experts for many tokens: decoded values bit for bit, in Triton's interpreter too, and grouped products of them."""

import pytest
import torch

from mimo_kernels import moe, moe_many, mxfp4
from tests.kernels.test_moe import oracle, random_experts, random_tokens, relative_error
from tests.kernels.triton_tools import (
    compile_for_sm90,
    inside,
    main_loop,
    needs_tools,
    outside,
    pass_in_the_interpreter,
    spills,
)

SHAPES = [(256, 128), (96, 64), (640, 160)]  # whole pages, padded ones, more columns than a program takes
GROUPED = [(5, 4, (96, 64)), (40, 3, (96, 64)), (23, 6, (256, 160)), (70, 2, (640, 128))]  # tokens, experts, shape


def assert_decoded(experts, found, first, last, assert_same_bits):
    gate_up, down = found
    codes = [t[first:last] for t in vars(experts).values()]
    assert_same_bits(gate_up, mxfp4.decode(codes[0], codes[1]))
    assert_same_bits(down, mxfp4.decode(codes[2], codes[3]))


@outside
@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize("values", [1 << 27, 3 * 64 * 96 * 3], ids=["at once", "three at a time"])
def test_sums_of_routed_experts(monkeypatch, tokens, values):
    """Against float64, with experts that have no token, and one that has all of them."""
    monkeypatch.setattr(moe_many, "_VALUES", values)
    experts = random_experts(10, 96, 64)
    packed = moe.pack_experts(experts)
    x, ids, weights = random_tokens(tokens, 2, 10, 96)
    for routing in (ids, torch.full_like(ids, 9), ids % 4 + 3):
        found = moe_many.moe_many(x, routing, weights, packed)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, oracle(x, routing, weights, experts)) < 1e-2


@outside
def test_refusals():
    packed = moe.pack_experts(random_experts(4, 96, 64))
    x, ids, weights = random_tokens(20, 2, 4, 96)
    for bad in ((x.float(), ids, weights), (x[:, :64], ids, weights), (x, ids[:, :1], weights)):
        with pytest.raises(ValueError, match=r"expected torch.bfloat16 \[T, 96\]"):
            moe_many.moe_many(*bad, packed)


@outside
@pytest.mark.parametrize("n", [16, 32])
def test_blocks_hold_every_pair_once(n):
    """Of one expert each, in sorted order, whatever the routing; those beyond the last are marked."""
    kernels = pytest.importorskip("mimo_kernels.moe_grouped_triton")
    for seed, experts in enumerate((1, 5, 40)):
        ids = torch.randint(0, experts, (37, 3), generator=torch.Generator().manual_seed(seed))
        for routing in (ids, torch.zeros_like(ids), ids.clamp(min=experts - 2)):
            blocks, order = kernels.blocks_of(routing, experts, n)
            real = [b for b in blocks.tolist() if b[0] >= 0]
            assert blocks[len(real) :, 0].eq(-1).all() and all(0 < end - begin <= n for _, begin, end in real)
            places = [p for _, begin, end in real for p in range(begin, end)]
            assert places == list(range(routing.numel())) and order.sort().values.tolist() == places
            for e, begin, end in real:
                assert (routing.flatten()[order[begin:end]] == e).all()
    assert [kernels.tokens_a_block(2048, e) for e in (256, 128, 64, 8)] == [16, 16, 32, 64]


@outside
def test_the_order_of_the_words_by_hand():
    kernels = pytest.importorskip("mimo_kernels.moe_grouped_triton")
    found = kernels.in_word_order(torch.arange(1.0, 201.0).expand(2, -1), 256)
    for place in (0, 1, 32, 127, 128 + 96, 128 + 17):
        element = place // 128 * 128 + 4 * (place % 32) + place % 128 // 32
        assert found[1, place] == (element + 1 if element < 200 else 0)


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, len(SHAPES) + len(GROUPED))


@inside
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_decodes_the_values(shape, assert_same_bits):
    from mimo_kernels import moe_many_triton

    experts = random_experts(5, *shape, scales=(3, 129))  # below, the interpreter loses BF16 subnormals
    packed = moe.pack_experts(experts)
    assert_decoded(experts, moe_many_triton.decode_experts(packed, 1, 4), 1, 4, assert_same_bits)


@inside
@pytest.mark.parametrize(("tokens", "experts", "shape"), GROUPED)
def test_the_kernels_on_codes_give_the_sums(tokens, experts, shape):
    """Against float64: blocks of several tokens, of one, cut in two, and none; all tokens under one expert."""
    from mimo_kernels import moe_grouped_triton

    layer = random_experts(experts, *shape, scales=(110, 129))
    packed = moe.pack_experts(layer)
    x, ids, weights = random_tokens(tokens, 2, experts, shape[0])
    for routing in (ids, torch.full_like(ids, experts - 1), ids % 2):
        found = moe_grouped_triton.moe_grouped(x, routing, weights, packed)
        assert relative_error(found, oracle(x, routing, weights, layer)) < 1e-2


@outside
@needs_tools
@pytest.mark.parametrize("tokens", [16, 32, 64])
@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_machine_code_of_the_products(product, tokens):
    """No spills, and what a weight costs in the loop: the products' own part grows with the tokens of a block."""
    from mimo_kernels import moe_grouped_triton as kernels

    tile = kernels.TILES[0]
    pointers = {"W": "*i16", "S": "*u8", "BLOCKS": "*i32", "ORDER": "*i64", "HIDDEN": "*bf16"}
    if product == "gate_up":
        kernel, shape = kernels._gate_up_kernel, {"K": 4096, "ROWS": 1024, "TOP_K": 8}
        pointers |= {"X": "*bf16"}
    else:
        kernel, shape = kernels._down_kernel, {"K": 512, "ROWS": 4096}
        pointers |= {"OUT": "*bf16"}
    constants = shape | {"BM": tile.rows, "N": tokens, "BK": tile.k, "PTX": True}
    code, registers, shared = compile_for_sm90(kernel, pointers, constants, tile.warps, tile.stages)
    a_weight = len(main_loop(code)) * 32 * tile.warps / (tile.rows * tile.k)
    print(product, tokens, len(code), registers, shared, f"{a_weight:.2f} instructions a weight")
    assert not spills(code) and registers <= 255 and shared <= 227 * 1024
    assert a_weight < 3.6


@outside
@needs_tools
@pytest.mark.parametrize("interleaved", [True, False])
def test_machine_code(interleaved):
    """No spills, and wide stores: two bytes at a time would cost more than everything else."""
    from mimo_kernels import moe_many_triton

    constants = {"COLUMNS": 4096, "K": 4096, "ROWS": 1024, "INTERLEAVED": interleaved, "BK": 512, "PTX": True}
    pointers = {"OUT": "*bf16", "W": "*i16", "S": "*u8"}
    code, registers, _ = compile_for_sm90(moe_many_triton._decode_kernel, pointers, constants, 4, 1)
    stores = [op for _, op, _ in code if op.startswith("STG")]
    print(len(code), registers, stores)
    assert not spills(code) and registers <= 128
    assert stores and all(op.endswith(".128") for op in stores)
