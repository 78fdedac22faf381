"""The kernel that packs experts against the definition, bit for bit: in Triton's interpreter, and its machine code.

Run by hand: TRITON_INTERPRET=1 pytest tests/kernels/test_moe_pack.py (without it the file runs itself with it). The
compiled kernel has tests/gpu/test_moe_pack_gpu.py.
"""

import pytest
import torch

from mimo_kernels import moe
from tests.kernels.test_moe import FIELDS, random_experts
from tests.kernels.triton_tools import (
    compile_for_sm90,
    inside,
    needs_tools,
    outside,
    pass_in_the_interpreter,
    spills,
)


def records(experts, inter, gap=64):
    """(gate, up, down) as views of one buffer with everything of an expert in a row, as staged files have it."""
    gate_up, scales = experts.gate_up, experts.gate_up_scales
    order = [experts.down, experts.down_scales, gate_up[:, :inter], scales[:, :inter], gate_up[:, inter:]]
    order.append(scales[:, inter:])
    flat = torch.cat([*(t.flatten(1) for t in order), scales.new_full((len(scales), gap), 255)], 1)
    views, at = [], 0
    for t in order:
        views.append(flat[:, at : at + t[0].numel()].unflatten(1, t.shape[1:]))
        at += t[0].numel()
    return views[2:4], views[4:6], views[0:2]


@outside
@pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (576, 192), (96, 32)])
def test_some_at_a_time_is_all_at_once(hidden, inter, assert_same_bits):
    experts = random_experts(20, hidden, inter, scales=(0, 129))
    expected, packer = moe.pack_experts(experts), moe.Packer(20, hidden, inter, "cpu")
    gate, up, down = records(experts, inter)
    for some in (slice(19, 20), slice(0, 19)):
        packer.put(some.start, *(tuple(t[some] for t in matrix) for matrix in (gate, up, down)))
    packer.check()
    for name in FIELDS:
        assert_same_bits(getattr(packer.packed, name), getattr(expected, name))


@outside
def test_refusals():
    with pytest.raises(ValueError, match="hidden 100 and intermediate 64 must divide by 32"):
        moe.Packer(2, 100, 64, "cpu")


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, 6)


@inside
@pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (576, 192), (96, 32), (1280, 416)])
def test_equals_the_definition(hidden, inter, assert_same_bits):
    """Every page, pad and place, from records with gaps between them and into the middle of the experts."""
    from mimo_kernels import moe_pack_triton

    experts = random_experts(3, hidden, inter, seed=hidden, scales=(0, 129))
    expected, packer = moe.pack_experts(experts), moe.Packer(5, hidden, inter, "cpu")
    for tensor in (getattr(packer.packed, name) for name in FIELDS):
        tensor.fill_(77)
    largest = torch.zeros(2, dtype=torch.int32)
    moe_pack_triton.pack(packer.packed, 1, *records(experts, inter), largest)
    for name in FIELDS:
        found = getattr(packer.packed, name)
        assert_same_bits(found[1:4], getattr(expected, name))
        assert (found[[0, 4]] == 77).all()  # nothing beside them was written
    assert largest.tolist() == [0, 0]


@inside
@pytest.mark.parametrize("where", [0, 1])
def test_scales_that_the_layout_lacks_are_seen(where):
    from mimo_kernels import moe_pack_triton

    experts = random_experts(2, 128, 160)
    (experts.gate_up_scales if where == 0 else experts.down_scales)[1, 127, 3] = 200
    packer, largest = moe.Packer(2, 128, 160, "cpu"), torch.zeros(2, dtype=torch.int32)
    moe_pack_triton.pack(packer.packed, 0, *records(experts, 160), largest)
    assert largest.tolist() == [200 * (where == 0), 200 * (where == 1)]


@outside
@needs_tools
@pytest.mark.parametrize("paired", [False, True])
def test_machine_code(paired):
    """Codes move 16 bytes at a time, and 64 registers let 32 warps be on a multiprocessor, to keep memory busy."""
    from mimo_kernels import moe_pack_triton as kernels

    pointers = {"WORDS": "*i32", "SCALES": "*u8", "A": "*i32", "A_SCALES": "*u8", "B": "*i32", "B_SCALES": "*u8"}
    code, registers, _ = compile_for_sm90(
        kernels._pack_kernel, pointers | {"LARGEST": "*i32"}, {"PAIRED": paired, "P": kernels._PAGES}, kernels._WARPS, 3
    )
    opcodes = [op for _, op, _ in code]
    assert not spills(code) and registers <= 64
    for moves in ("LDG", "STG"):
        assert sum(op.startswith(moves) and ".128" in op for op in opcodes) == 4
