"""silu(gate) * up: definition, kernel in Triton's interpreter, and the machine code that it becomes.

tests/gpu/test_swiglu_gpu.py compares all bits with torch's on a GPU, for every gate there is.
"""

import pytest
import torch

from mimo_kernels import swiglu
from tests.kernels.triton_tools import compile_for_sm90, inside, needs_tools, outside, pass_in_the_interpreter, spills


def random_case(rows, columns, dtype=torch.float32):
    return 4 * torch.randn(rows, 2 * columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)


@outside
def test_reference_is_the_formula():
    x = random_case(3, 40, torch.float64)
    gate, up = x[:, :40], x[:, 40:]
    torch.testing.assert_close(swiglu.reference(x), gate / (1 + (-gate).exp()) * up, rtol=1e-14, atol=0)


@outside
def test_rounds_twice(assert_same_bits):
    x = random_case(16, 72, torch.bfloat16)
    gate, up = x.float().chunk(2, dim=-1)
    expected = (gate.double().sigmoid() * gate).bfloat16().float() * up
    assert_same_bits(swiglu.silu_mul(x), expected.bfloat16())


@outside
def test_refusals():
    x = random_case(4, 8, torch.bfloat16)
    for message, bad in {
        "torch.float32": x.float(),
        r"\[4, 15\]": x[:, :15],
        r"\[4, 0\]": x[:, :0],
        r"\[16\]": x[0],
        "17 rows; give 1 to 16": x[:1].expand(17, -1),
        "0 rows": x[:0],
    }.items():
        with pytest.raises(ValueError, match=message):
            swiglu.silu_mul(bad)


@outside
def test_kernel_in_the_interpreter():
    pass_in_the_interpreter(__file__, 9)


@pytest.fixture
def kernels():
    from mimo_kernels import swiglu_triton

    return swiglu_triton


@inside
@pytest.mark.parametrize("columns", [1, 8, 512, 600])
@pytest.mark.parametrize("rows", [1, 8])
def test_rows(kernels, rows, columns):
    x = random_case(rows, columns)
    expected = swiglu.reference(x.double())
    assert ((kernels.silu_mul(x) - expected).abs() <= 1e-6 * expected.abs()).all()


@inside
def test_ends_of_the_range(kernels, assert_same_bits):
    """Zeros keep their signs, infinities and NaN are those of torch; views are read by their strides."""
    gate = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 100.0, -87.0, -1000.0, 3e38])
    x = torch.cat((gate, torch.ones(8)))[None]
    y, expected = kernels.silu_mul(x), swiglu.reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-37, equal_nan=True)
    assert torch.signbit(y[0, 1]) and not torch.signbit(y[0, 0])
    assert_same_bits(kernels.silu_mul(x.T.contiguous().T), y)


@outside
@needs_tools
@pytest.mark.parametrize("columns", [2048, 4096])
def test_machine_code(columns):
    """Vector loads, no spills; the division is one that rounds, with its slow path for extreme values."""
    import mimo_kernels.swiglu_triton as st

    constants = {"COLUMNS": columns, "BLOCK": 512, "LIBRARY": True}
    code, registers, shared = compile_for_sm90(st._silu_mul_kernel, {"OUT": "*bf16", "X": "*bf16"}, constants, 4, 1)
    ops = [op for _, op, _ in code]
    assert not spills(code) and registers <= 64 and not shared
    assert [op for op in ops if op.startswith("LDG")] == ["LDG.E.64", "LDG.E.64"]
    assert len(code) <= 400
