"""FP8 -> MXFP4 in one pass: a block worked by hand, and bit-equality with the two steps on every byte, scale and rule.

TRITON_INTERPRET=1 pytest tests/kernels/test_transcode.py runs the Triton kernels on the CPU (the file starts itself
so); compiled they run in tests/gpu/test_transcode_gpu.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_kernels import fp8, mxfp4, transcode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_kernels_in_the_interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter process")


def two_steps(q: torch.Tensor, scale: torch.Tensor, rule: mxfp4.Rule) -> tuple[torch.Tensor, torch.Tensor]:
    return mxfp4.encode(fp8.dequantize(q, scale, dtype=torch.float32), rule)


def scales_of(kind: str, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    """float32 scales: powers of two, any mantissa, or mantissas beside the points where a threshold moves."""
    exponent = torch.randint(-40, 21, shape, generator=g).double()
    if kind == "power":
        return torch.exp2(exponent).float()
    if kind == "any":
        return (torch.exp2(exponent) * (1 + torch.rand(shape, generator=g, dtype=torch.float64))).float()
    # mu / (1 + f/8), up to an octave, and the floats around it: there a product falls on a midpoint, or just misses it
    mu = torch.tensor([1.0, 1.25, 1.5, 1.75])[torch.randint(0, 4, shape, generator=g)].double()
    s = (mu / (1 + torch.randint(0, 8, shape, generator=g) / 8.0) * torch.exp2(exponent)).float()
    return (s.view(torch.int32) + torch.randint(-2, 3, shape, generator=g).int()).view(torch.float32)


def codes_of(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    """Random E4M3 bytes; each group of 32 has its own ceiling, so that every maximum and empty groups occur."""
    byte = torch.randint(0, 256, shape, generator=g).unflatten(-1, (-1, 32))
    ceiling = torch.randint(-20, 127, (*byte.shape[:-1], 1), generator=g).clamp(min=0)
    magnitude = torch.minimum(byte & 0x7F, ceiling)
    return (magnitude | (byte & 0x80)).flatten(-2).to(torch.uint8).view(torch.float8_e4m3fn)


# ---- golden


@outside
def test_worked_block_is_these_bytes():
    """Scale 0.75, codes 1.5, -0.5, 6, 0.25, -0, 1.625 -> weights 1.125, -0.375, 4.5, 0.1875, -0, 1.21875.

    even: 4.5 = 1.125 * 2**2, so k = 0 (byte 127). 1.125 -> 1 (2), -0.375 -> -0.5 (9), 4.5 -> 4 (6), 0.1875 -> 0,
    -0 -> 0, 1.21875 -> 1 (2): bytes 0x92 0x06 0x20. Scale 1: 1.5, -0.5, 6, 0.25 (a tie: 0), -0, 1.625 -> 1.5 (3).
    """
    q = torch.zeros(1, 32)
    q[0, :6] = torch.tensor([1.5, -0.5, 6.0, 0.25, -0.0, 1.625])
    q = q.to(torch.float8_e4m3fn)
    packed, scales = transcode.fp8_to_mxfp4(q, torch.tensor([[0.75]]))
    assert (packed[0, :4].tolist(), scales.tolist()) == ([0x92, 0x06, 0x20, 0x00], [[127]])
    packed, scales = transcode.fp8_to_mxfp4(q, torch.tensor([[1.0]]))
    assert (packed[0, :4].tolist(), scales.tolist()) == ([0x93, 0x07, 0x30, 0x00], [[127]])


@outside
def test_threshold_of_the_module_docstring():
    """Scale 1 and amax 6: the smallest E4M3 byte above 1.25 is 0x3B; with amax 12, that above 2.5 (0x43)."""
    table = transcode._tables(torch.ones(1, 1).numpy(), "even")[0]
    largest = torch.tensor([6.0, 12.0]).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    words = [int(table[m]).to_bytes(8, "little") for m in largest]
    assert [(w[2], w[7]) for w in words] == [(0x3B, 127), (0x43, 128)]


# ---- bit-equality with the two steps


@outside
@pytest.mark.parametrize("rule", mxfp4.RULES)
@pytest.mark.parametrize("kind", ["power", "any", "edge"])
@pytest.mark.parametrize("shape", [(128, 128), (300, 352), (5, 32), (129, 160), (2, 4096 + 32)], ids=str)
def test_equals_the_two_steps(assert_same_bits, shape, kind, rule):
    g = torch.Generator().manual_seed(sum(shape))
    q, scale = codes_of(shape, g), scales_of(kind, fp8.scale_shape(torch.empty(shape)), g)
    packed, scales = transcode.fp8_to_mxfp4(q, scale, rule)
    expected_packed, expected_scales = two_steps(q, scale, rule)
    assert_same_bits(scales, expected_scales)
    assert_same_bits(packed, expected_packed)


@outside
@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_every_byte_under_every_maximum(assert_same_bits, rule):
    """All pairs (byte, largest byte of its group) for 64 scales: 31 bytes and the maximum in a group, nine groups."""
    g = torch.Generator().manual_seed(3)
    tile = torch.zeros(127, 9 * 32, dtype=torch.int64)
    for m in range(127):
        bytes_ = torch.arange(9 * 31) % 256
        bytes_ = torch.where((bytes_ & 0x7F) > m, 0, bytes_).view(9, 31)
        tile[m] = torch.cat([bytes_, torch.full((9, 1), m)], 1).flatten()
    q = tile.to(torch.uint8).view(torch.float8_e4m3fn)
    seen = {(int(b), m) for m in range(127) for b in tile[m].tolist()}
    assert len(seen) == sum(2 * (m + 1) for m in range(127))
    for kind in ("power", "any", "edge", "edge"):
        scale = scales_of(kind, (16, 3), g)
        stack = q.view(torch.uint8).expand(16, 127, 288).contiguous().view(torch.float8_e4m3fn)
        packed, scales = transcode.fp8_to_mxfp4(stack, scale.view(16, 1, 3), rule)
        for i in range(16):
            expected_packed, expected_scales = two_steps(q, scale[i : i + 1], rule)
            assert_same_bits(scales[i], expected_scales)
            assert_same_bits(packed[i], expected_packed)


@outside
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(1, 6),
    st.sampled_from(["power", "any", "edge"]),
    st.sampled_from(mxfp4.RULES),
    st.integers(-10, 10),
    st.integers(0, 2**31),
)
def test_any_shape_scale_and_rule(rows, groups, kind, rule, shift, seed):
    g = torch.Generator().manual_seed(seed)
    q = codes_of((rows, 32 * groups), g)
    scale = scales_of(kind, fp8.scale_shape(q), g)
    packed, scales = transcode.fp8_to_mxfp4(q, scale, rule)
    expected = two_steps(q, scale, rule)
    assert torch.equal(scales, expected[1]) and torch.equal(packed, expected[0])
    # A power of two in the scale only moves the exponents, and the sign of a weight only its code.
    other_packed, other_scales = transcode.fp8_to_mxfp4(
        (q.view(torch.uint8) ^ 0x80).view(torch.float8_e4m3fn), scale * 2.0**shift, rule
    )
    empty = (q.float() == 0).unflatten(-1, (-1, 32)).all(-1)
    assert torch.equal(other_scales.int(), torch.where(empty, 127, scales.int() + shift))
    codes, other = mxfp4.unpack(packed), mxfp4.unpack(other_packed)
    assert torch.equal(other, torch.where(codes > 0, codes ^ 8, 0))


@outside
@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_extreme_scales_take_the_two_steps(assert_same_bits, rule):
    """Zero, subnormal and huge scales beside usual ones: products that underflow, exponents that are clamped."""
    g = torch.Generator().manual_seed(5)
    q = codes_of((8 * 128, 96), g)
    scale = torch.tensor([0.0, 2.0**-149, 1e-40, 2.0**-101, 2.0**-100, 2.0**100, 2.0**101, 0.3]).view(8, 1)
    packed, scales = transcode.fp8_to_mxfp4(q, scale, rule)
    expected_packed, expected_scales = two_steps(q, scale, rule)
    assert_same_bits(scales, expected_scales)
    assert_same_bits(packed, expected_packed)


@outside
def test_stack_strides_threads_and_inputs_are_kept(assert_same_bits):
    g = torch.Generator().manual_seed(7)
    q, scale = codes_of((3, 300, 32 * 150), g), scales_of("any", (3, 3, 38), g)
    kept = q.view(torch.uint8).clone(), scale.clone()
    packed, scales = transcode.fp8_to_mxfp4(q, scale)
    for i in range(3):
        expected_packed, expected_scales = two_steps(q[i], scale[i], "even")
        assert_same_bits(packed[i], expected_packed)
        assert_same_bits(scales[i], expected_scales)
    torch.set_num_threads(3)
    assert_same_bits(transcode.fp8_to_mxfp4(q, scale)[0], packed)
    strided = q.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(torch.float8_e4m3fn)
    assert not strided.is_contiguous()
    assert_same_bits(transcode.fp8_to_mxfp4(strided, scale)[0], packed)
    # A tensor in a file may begin at any byte.
    file = torch.cat([torch.zeros(3, dtype=torch.uint8), q[0].view(torch.uint8).flatten()])
    odd = file[3:].view(torch.float8_e4m3fn).view(300, -1)
    assert odd.data_ptr() % 8
    assert_same_bits(transcode.fp8_to_mxfp4(odd, scale[0])[0], packed[0])
    assert torch.equal(q.view(torch.uint8), kept[0]) and torch.equal(scale, kept[1])


@outside
def test_empty():
    q = torch.zeros(0, 64, dtype=torch.float8_e4m3fn)
    packed, scales = transcode.fp8_to_mxfp4(q, torch.zeros(0, 1))
    assert (packed.shape, scales.shape) == ((0, 32), (0, 2))


# ---- refusals


def damaged(shape, *places: tuple[int, ...], byte: int) -> torch.Tensor:
    q = torch.full(shape, 0x38, dtype=torch.uint8)
    for at in places:
        q[at] = byte
    return q.view(torch.float8_e4m3fn)


@outside
@pytest.mark.parametrize("rule", ["even", "mse"])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_codes_are_refused(rule, byte):
    q = damaged((130, 96), (129, 95), (0, 0), byte=byte)
    with pytest.raises(ValueError, match=r"^w7: at least \d NaN code\(s\) \(0x7F, 0xFF\).*download the file again"):
        transcode.fp8_to_mxfp4(q, torch.ones(2, 1), rule, name="w7")


@outside
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -1e-40])
def test_bad_scales_are_refused(value):
    scale = torch.ones(2, 2)
    scale[1, 0] = value
    with pytest.raises(ValueError, match=r"^w7: 1 scale\(s\) are negative, NaN or Inf.*download it again"):
        transcode.fp8_to_mxfp4(damaged((200, 160), byte=0), scale, name="w7")


@outside
def test_a_product_beyond_float32_is_refused():
    with pytest.raises(ValueError, match=r"^w7: NaN or Inf in at least 1 block"):
        transcode.fp8_to_mxfp4(damaged((1, 32), (0, 3), byte=0x7E), torch.full((1, 1), 2.0**120), name="w7")


@outside
@pytest.mark.parametrize(
    ("q", "scale", "rule", "complaint"),
    [
        (torch.zeros(4, 64, dtype=torch.uint8), torch.ones(1, 1), "even", "codes are torch.uint8.*read .weight"),
        (
            damaged((4, 64), byte=0),
            torch.ones(1, 1).bfloat16(),
            "even",
            "codes are .*scales torch.bfloat16; expected",
        ),
        (damaged((4, 48), byte=0), torch.ones(1, 1), "even", r"cannot transcode \[4, 48\].*leave this tensor in FP8"),
        (damaged((64,), byte=0), torch.ones(1), "even", r"cannot transcode \[64\]"),
        (damaged((2, 2, 4, 64), byte=0), torch.ones(2, 2, 1, 1), "even", r"cannot transcode \[2, 2, 4, 64\]"),
        (
            damaged((130, 64), byte=0),
            torch.ones(1, 1),
            "even",
            r"scale_inv is \[1, 1\], but \[130, 64\] needs \[2, 1\]",
        ),
        (damaged((2, 4, 64), byte=0), torch.ones(1, 1), "even", r"scale_inv is \[1, 1\].*needs \[2, 1, 1\]"),
        (damaged((4, 64), byte=0), torch.ones(1, 1), "nearest", "unknown scale rule 'nearest'; use one of even,"),
    ],
)
def test_bad_arguments_are_refused(q, scale, rule, complaint):
    with pytest.raises(ValueError, match=rf"^experts\.5: {complaint}"):
        transcode.fp8_to_mxfp4(q, scale, rule, name="experts.5")


# ---- the Triton kernels, interpreted


@outside
def test_kernels_in_the_interpreter():
    """Triton reads the variable when it is first imported, so the kernels get a process of their own."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "interpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


@inside
@pytest.mark.parametrize(
    ("rule", "shape", "kind"), [("even", (130, 96), "any"), ("floor", (2, 9, 256), "edge"), ("rceil", (7, 64), "edge")]
)
def test_interpreted_kernels_equal_the_cpu_path(assert_same_bits, rule, shape, kind):
    from mimo_kernels import transcode_triton

    g = torch.Generator().manual_seed(len(shape))
    q = codes_of(shape, g)
    scale = scales_of(kind, (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)), g)
    packed = torch.full((*shape[:-1], shape[-1] // 2), 0x77, dtype=torch.uint8)
    scales = torch.full((*shape[:-1], shape[-1] // 32), 0x77, dtype=torch.uint8)
    assert transcode_triton.transcode(q, scale, rule, packed, scales) == (0, 0, 0)
    expected_packed, expected_scales = transcode.fp8_to_mxfp4(q, scale, rule)
    assert_same_bits(scales, expected_scales)
    assert_same_bits(packed, expected_packed)


@inside
def test_interpreted_kernels_count_what_is_refused():
    from mimo_kernels import transcode_triton

    q = damaged((2, 32), (1, 5), byte=0xFF).view(torch.uint8).repeat(1, 5).view(torch.float8_e4m3fn)
    scale = torch.tensor([[-1.0, float("nan")]])
    packed, scales = torch.zeros(2, 80, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.uint8)
    assert transcode_triton.transcode(q, scale, "even", packed, scales)[:2] == (2, 5)
    assert transcode_triton.transcode(q, torch.tensor([[0.0, 2.0**101]]), "even", packed, scales)[2] == 2
