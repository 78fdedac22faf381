"""Experts for many tokens: decoded values bit for bit, in Triton's interpreter too, and grouped products of them."""

import pytest
import torch

from mimo_kernels import moe, moe_many, mxfp4
from tests.kernels.test_moe import oracle, random_experts, random_tokens, relative_error
from tests.kernels.triton_tools import compile_for_sm90, inside, needs_tools, outside, pass_in_the_interpreter, spills

SHAPES = [(256, 128), (96, 64), (640, 160)]  # whole pages, padded ones, more columns than a program takes


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
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, len(SHAPES))


@inside
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_decodes_the_values(shape, assert_same_bits):
    from mimo_kernels import moe_many_triton

    experts = random_experts(5, *shape, scales=(3, 129))  # below, the interpreter loses BF16 subnormals
    packed = moe.pack_experts(experts)
    assert_decoded(experts, moe_many_triton.decode_experts(packed, 1, 4), 1, 4, assert_same_bits)


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
