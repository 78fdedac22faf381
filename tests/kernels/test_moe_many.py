"""Experts for many tokens, by their definition and by the kernels in Triton's interpreter, against float64."""

import pytest
import torch

from mimo_kernels import moe, moe_many
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

CASES = [(5, 4, (96, 64)), (40, 3, (96, 64)), (23, 6, (256, 160)), (70, 2, (640, 128))]  # tokens, experts, shape


@outside
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_sums_of_routed_experts(tokens, dtype):
    """With experts that have no token, and one that a row names twice; the bits of the definition."""
    experts = random_experts(10, 96, 64)
    packed = moe.pack_experts(experts)
    x, ids, weights = random_tokens(tokens, 2, 10, 96)
    for routing in (ids, torch.full_like(ids, 9), ids % 4 + 3):
        found = moe_many.moe_many(x, routing.to(dtype), weights, packed)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, moe.reference(x, routing, weights, experts).to(torch.bfloat16))
        assert relative_error(found, oracle(x, routing, weights, experts)) < 1e-2


@outside
def test_refusals():
    packed = moe.pack_experts(random_experts(4, 96, 64))
    x, ids, weights = random_tokens(20, 2, 4, 96)
    for bad in ((x.float(), ids, weights), (x[:, :64], ids, weights), (x[:0], ids[:0], weights[:0])):
        with pytest.raises(ValueError, match=r"expected torch.bfloat16 \[tokens, 96\], not empty"):
            moe_many.moe_many(*bad, packed)
    with pytest.raises(ValueError, match=r"expected \[T, H\] and twice \[T, k\]"):
        moe_many.moe_many(x, ids[:, :1], weights, packed)
    with pytest.raises(ValueError, match="expected int32 or int64, and float32"):
        moe_many.moe_many(x, ids, weights.double(), packed)


@outside
@pytest.mark.parametrize("n", [16, 32])
def test_blocks_hold_every_pair_once(n):
    """Of one expert each, in sorted order, whatever the routing; those beyond the last are marked."""
    kernels = pytest.importorskip("mimo_kernels.moe_many_triton")
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
    kernels = pytest.importorskip("mimo_kernels.moe_many_triton")
    found = kernels.in_word_order(torch.arange(1.0, 201.0).expand(2, -1), 256)
    for place in (0, 1, 32, 127, 128 + 96, 128 + 17):
        element = place // 128 * 128 + 4 * (place % 32) + place % 128 // 32
        assert found[1, place] == (element + 1 if element < 200 else 0)


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, len(CASES) + 1)


@inside
@pytest.mark.parametrize(("tokens", "experts", "shape"), CASES)
def test_the_kernels_give_the_sums(tokens, experts, shape):
    """Against float64: blocks of several tokens, of one, cut in two, and none; all tokens under one expert."""
    from mimo_kernels import moe_many_triton

    layer = random_experts(experts, *shape, scales=(110, 129))
    packed = moe.pack_experts(layer)
    x, ids, weights = random_tokens(tokens, 2, experts, shape[0])
    for routing in (ids, torch.full_like(ids, experts - 1), ids % 2):
        found = moe_many_triton.moe_many(x, routing, weights, packed)
        assert relative_error(found, oracle(x, routing, weights, layer)) < 1e-2


@inside
def test_other_forms_of_the_arguments():
    """int32 ids, as the router's kernel gives them; tokens and weights that do not lie side by side."""
    from mimo_kernels import moe_many_triton

    layer = random_experts(3, 128, 64, scales=(110, 129))
    packed = moe.pack_experts(layer)
    x, ids, weights = random_tokens(17, 2, 3, 128)
    expected = moe_many_triton.moe_many(x, ids, weights, packed)
    other = x.t().contiguous().t(), ids.int().t().contiguous().t(), weights.t().contiguous().t()
    assert not any(t.is_contiguous() for t in other)
    assert torch.equal(moe_many_triton.moe_many(*other, packed), expected)


@outside
@needs_tools
@pytest.mark.parametrize("tokens", [16, 32, 64])
@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_machine_code_of_the_products(product, tokens):
    """No spills, and what a weight costs in the loop: the products' own part grows with the tokens of a block."""
    from mimo_kernels import moe_many_triton as kernels

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
