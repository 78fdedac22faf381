"""Residual add and RMSNorm: definition, kernel in Triton's interpreter, and the machine code that it becomes.

In the interpreter the kernel runs on float32, where its roundings are none, and is held to float32 accuracy;
tests/gpu/test_residual_gpu.py has the BF16 ones.
"""

import pytest
import torch

from mimo_kernels import residual
from mimo_runtime import model
from tests.kernels.triton_tools import compile_for_sm90, inside, needs_tools, outside, pass_in_the_interpreter, spills

COLUMNS = (8, 72, 576, 1024, 4096, 6144, 8192)


def random_case(seed, rows, columns, ranks=None):
    """x, update and weight in float32; columns of x differ by orders of magnitude, as they do in a trained model."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp(2 * torch.randn(columns, generator=g))
    shape = (rows, columns) if ranks is None else (ranks, rows, columns)
    return x, torch.randn(shape, generator=g), 1 + torch.randn(columns, generator=g) / 4


def errors(y, expected):
    """Of sum and of norm, each relative to the largest magnitude of a row."""
    return [
        float(((a.double() - e).abs().amax(-1) / e.abs().amax(-1).clamp_min(1e-300)).max())
        for a, e in zip(y, expected, strict=True)
    ]


# ---- the definition


@outside
@pytest.mark.parametrize("columns", [8, 576, 4096])
@pytest.mark.parametrize("ranks", [None, 1, 4])
def test_reference_is_what_the_model_does(columns, ranks, assert_same_bits):
    """Bit for bit in BF16: a sum over ranks as `parallel.Group.sum` rounds it, an addition, and the model's norm."""
    x, update, weight = (t.bfloat16() for t in random_case(columns, 5, columns, ranks))
    y = update
    if ranks is not None:
        y = update[0].float()
        for part in update[1:]:
            y = y + part.float()
        y = y.to(torch.bfloat16)
    expected = x + y, model.rms_norm(x + y, weight, 1e-5)
    for actual, e in zip(residual.add_rms_norm(x, update, weight, 1e-5), expected, strict=True):
        assert_same_bits(actual, e)


@outside
def test_without_an_update(assert_same_bits):
    x, _, weight = (t.bfloat16() for t in random_case(0, 3, 64))
    same, normed = residual.add_rms_norm(x, None, weight, 1e-6)
    assert same is x
    assert_same_bits(normed, model.rms_norm(x, weight, 1e-6))


@outside
def test_refusals():
    x, update, weight = (t.bfloat16() for t in random_case(0, 4, 64))
    many = x[:1].expand(17, -1)
    for message, call in {
        "x: torch.float32": lambda: residual.add_rms_norm(x.float(), None, weight, 1e-5),
        "17 rows; give 1 to 16": lambda: residual.add_rms_norm(many, None, weight, 1e-5),
        "0 rows": lambda: residual.add_rms_norm(x[:0], None, weight, 1e-5),
        "60 columns; expected a multiple of 8": lambda: residual.add_rms_norm(x[:, :60], None, weight[:60], 1e-5),
        "8200 columns": lambda: residual.add_rms_norm(x.new_zeros(1, 8200), None, x.new_zeros(8200), 1e-5),
        r"weight: torch.bfloat16 \[56\]": lambda: residual.add_rms_norm(x, None, weight[:56], 1e-5),
        "weight: torch.float32": lambda: residual.add_rms_norm(x, None, weight.float(), 1e-5),
        "update: torch.float32": lambda: residual.add_rms_norm(x, update.float(), weight, 1e-5),
        r"\[3, 64\], expected torch.bfloat16 \[4, 64\], or of that or float32 \[parts, 4, 64\]": lambda: (
            residual.add_rms_norm(x, update[:3], weight, 1e-5)
        ),
        "0 parts": lambda: residual.add_rms_norm(x, update[None][:0], weight, 1e-5),
        "17 parts": lambda: residual.add_rms_norm(x, update.expand(17, -1, -1), weight, 1e-5),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- the kernel in the interpreter


@outside
def test_kernel_in_the_interpreter():
    pass_in_the_interpreter(__file__, 42)


@pytest.fixture
def kernels():
    from mimo_kernels import residual_triton

    return residual_triton


def checked(kernels, x, update, weight, eps=1e-5):
    """The kernel's results, after a comparison with float64."""
    y = kernels.add_rms_norm(x, update, weight, eps)
    exact = x.double(), None if update is None else update.double(), weight.double()
    expected = residual.reference(*exact, eps, torch.float64)
    assert max(errors(y, expected)) < 2e-6
    return y


@inside
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_rows(kernels, rows, columns):
    x, update, weight = random_case(rows, rows, columns)
    checked(kernels, x, update, weight)


@inside
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
def test_ranks(kernels, ranks, assert_same_bits):
    """In rank order: large contributions that cancel leave what that order leaves."""
    x, update, weight = random_case(ranks, 3, 576, ranks)
    checked(kernels, x, update, weight)
    update[0] += 2.0**24
    update[-1] -= 2.0**24
    total = update[0]
    for part in update[1:]:
        total = total + part
    assert_same_bits(kernels.add_rms_norm(x, update, weight, 1e-5)[0], x + total)


@inside
def test_without_an_update_the_sum_is_x(kernels):
    x, _, weight = random_case(1, 5, 576)
    assert checked(kernels, x, None, weight)[0] is x


@inside
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e15, 1e17])
def test_magnitudes(kernels, magnitude):
    """From rows that eps outweighs to those whose sum of squares is near the end of float32."""
    x, update, weight = random_case(2, 3, 576)
    checked(kernels, x / x.abs().max() * magnitude, update * 0, weight)


@inside
def test_zeros_and_overflow(kernels, assert_same_bits):
    """-0 stays -0, a row of zeros is no division by zero, and squares beyond float32 give zero as torch's norm does."""
    x = torch.zeros(4, 64)
    x[0], x[1, ::2], x[3] = -0.0, -1.0, 3e38
    update = torch.full((2, 4, 64), -0.0)
    y = kernels.add_rms_norm(x, update, torch.ones(64), 1e-5)
    for actual, e in zip(y, residual.reference(x, update, torch.ones(64), 1e-5), strict=True):
        assert_same_bits(actual.nan_to_num(7), e.nan_to_num(7))
    assert torch.signbit(y[0][0]).all() and not y[1][3].any()


@inside
def test_views(kernels, assert_same_bits):
    x, update, weight = random_case(3, 6, 72)
    views = x.T.contiguous().T, update[::2], weight.repeat_interleave(2)[::2]
    y = kernels.add_rms_norm(views[0][::2], *views[1:], 1e-5)
    for actual, e in zip(y, kernels.add_rms_norm(x[::2].contiguous(), update[::2], weight, 1e-5), strict=True):
        assert_same_bits(actual, e)


@inside
def test_bits_depend_on_the_row_alone(kernels, assert_same_bits):
    x, update, weight = random_case(4, 16, 576, 4)
    y = kernels.add_rms_norm(x, update, weight, 1e-5)
    for count in (1, 8):
        part = kernels.add_rms_norm(x[:count], update[:, :count], weight, 1e-5)
        for a, b in zip(part, y, strict=True):
            assert_same_bits(a, b[:count])
    others = torch.full_like(x, 7)
    others[9] = x[9]
    assert_same_bits(kernels.add_rms_norm(others, update, weight, 1e-5)[1][9], y[1][9])


# ---- the machine code


@outside
@needs_tools
@pytest.mark.parametrize("ranks", [0, 1, 4, 16])
@pytest.mark.parametrize("columns", [576, 4096, 6144, 8192])
def test_machine_code(columns, ranks):
    """Loads of 16 bytes, all of them before the first value is waited for, and no spills."""
    import mimo_kernels.residual_triton as rt

    warps = rt.warps_for(columns)
    block = 1 << (columns - 1).bit_length()
    constants = {"H": columns, "PARTS": ranks, "BLOCK": block}
    pointers = dict.fromkeys(("SUM", "NORMED", "X", "UPDATE", "WEIGHT"), "*bf16") | {"eps": "fp32"}
    code, registers, shared = compile_for_sm90(rt._add_rms_norm_kernel, pointers, constants, warps, 1)
    ops = [op for _, op, _ in code]
    loads = [i for i, op in enumerate(ops) if op.startswith("LDG")]
    per_thread = block // (warps * 32 * 8)
    assert len(loads) == per_thread * (2 + ranks) and all(ops[i].startswith("LDG.E.128") for i in loads)
    assert not spills(code) and registers <= 128 and shared <= 256
    first_use = next(i for i, op in enumerate(ops) if op.startswith(("FADD", "FFMA", "FMUL", "HADD2", "SHFL", "BAR")))
    assert ranks > 1 or loads[-1] < first_use  # several ranks' parts may wait twice
    assert len(code) <= 160 + 40 * per_thread * (1 + ranks)
