"""MXFP4 on the CPU: bytes worked by hand, properties, a float64 oracle, and the fast forms against the definition."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mimo_kernels import mxfp4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIES = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}  # value -> index of the even neighbour


def block(*values: float) -> torch.Tensor:
    return torch.tensor(values + (0.0,) * (32 - len(values)))


def blocks_of(limit: float):
    elements = st.floats(-limit, limit, width=32) | st.sampled_from([0.0, 0.25, -0.75, 2.5, 5.0, 3.5, -6.0, 6.5, 7.0])
    return hnp.arrays(np.float32, (2, 32), elements=elements).map(torch.from_numpy)


# ---- golden bytes


def test_worked_block_is_these_bytes():
    """[1.3, -0.4, 5, 0.2, -7.9, 2.5, 0, 0, ...]: the largest magnitude is 7.9 = 1.975 * 2**2.

    even: m = 1.975 >= 1.75, so k = 1 (byte 128), x / 2 = [.65, -.2, 2.5, .1, -3.95, 1.25]
          -> [.5, 0, 2 (tie, even), 0, -4, 1 (tie, even)] = codes 1, 0, 4, 0, E, 2 -> bytes 01 04 2E
    floor: k = 0 (byte 127), -> [1.5, -.5, 4 (tie), 0, -6 (clipped), 2 (tie)] = codes 3, 9, 6, 0, F, 4 -> 93 06 4F
    rceil: m > 1.5: as even.    mse: floor is off by 1.9 in -7.9 alone, even by .3 .4 1 .2 .1 .5: as even.
    """
    w = block(1.3, -0.4, 5.0, 0.2, -7.9, 2.5)
    for rule, head, byte in [
        ("even", "01042e", 128),
        ("floor", "93064f", 127),
        ("rceil", "01042e", 128),
        ("mse", "01042e", 128),
    ]:
        packed, scales = mxfp4.encode(w, rule)
        assert bytes(packed.tolist()).hex() == head + "00" * 13, rule
        assert scales.tolist() == [byte], rule
    assert mxfp4.snap(w)[:7].tolist() == [1.0, 0.0, 4.0, 0.0, -8.0, 2.0, 0.0]
    assert mxfp4.snap(w, "floor")[:7].tolist() == [1.5, -0.5, 4.0, 0.0, -6.0, 2.0, 0.0]


def test_block_of_the_module_docstring():
    packed, scales = mxfp4.encode(block(1.3, -0.4, 5.0))
    assert (packed[:2].tolist(), scales.tolist()) == ([0x93, 0x06], [127])
    assert mxfp4.decode(packed, scales)[:4].tolist() == [1.5, -0.5, 4.0, 0.0]


def test_rules_part_at_their_thresholds():
    """Bumps above f - 2 for amax = m * 2**f at both sides of 1.5 and 1.75; f = 2 makes byte 127 the unbumped one."""
    below, above = (lambda m: math.nextafter(m, 0)), (lambda m: m * (1 + 2**-23))
    for m, even, floor, rceil in [
        (1.0, 0, 0, 0),
        (1.5, 0, 0, 0),
        (above(1.5), 0, 0, 1),
        (1.75 - 2**-23, 0, 0, 1),
        (1.75, 1, 0, 1),
        (2 - 2**-23, 1, 0, 1),
        (2.0, 1, 1, 1),
        (below(2.0), 1, 1, 1),  # rounds to 2.0 in float32
    ]:
        w = block(4 * m)
        bytes_ = [int(mxfp4.encode(w, rule)[1]) - 127 for rule in ("even", "floor", "rceil")]
        assert bytes_ == [even, floor, rceil], m


@pytest.mark.parametrize("rule", mxfp4.RULES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_all_seven_ties_go_to_the_even_index(rule, sign):
    w = block(*(sign * t for t in TIES), 4.0)  # 4.0: k = 0 under every rule
    codes, scales = mxfp4.quantize(w, rule)
    negative = 8 if sign < 0 else 0
    expected = [i | negative if i else 0 for i in TIES.values()]
    assert codes[:7].tolist() == expected
    assert scales.tolist() == [127]
    assert mxfp4.unpack(mxfp4.encode(w, rule)[0])[:7].tolist() == expected


def test_mse_takes_the_smaller_exponent_on_a_tie():
    """[4, 1, 1]: exponents 0 and 1 both hold it exactly. [7]: 6 and 8 are both off by one. [7, 5]: 1 + 1 both times.

    No ties: [7, .5] is kept exactly but for the 7 by exponent 0; [7.5] errs by 1.5 against .5, so exponent 1.
    """
    byte = {(4.0, 1.0, 1.0): 127, (7.0,): 127, (7.0, 0.5): 127, (7.0, 5.0): 127, (7.5,): 128}
    for values, expected in byte.items():
        assert mxfp4.encode(block(*values), "mse")[1].tolist() == [expected], values
        assert mxfp4.quantize(block(*values), "mse")[1].tolist() == [expected], values


def test_zero_block_is_byte_127_and_minus_zero_is_never_written():
    w = torch.stack([torch.zeros(32), torch.full((32,), -0.0), block(-0.1, 4.0), block(-1e-42)])
    for rule in mxfp4.RULES:
        packed, scales = mxfp4.encode(w, rule)
        assert scales.tolist() == [[127], [127], [127], [1]], rule
        assert packed[:2].count_nonzero() == 0 and 8 not in mxfp4.unpack(packed).flatten().tolist()
        assert not torch.signbit(mxfp4.snap(w, rule)).any()


def test_exponent_clamps_keep_scales_normal():
    """Largest float32: 6 * 2**125. A block of 2**-126 = 1 * 2**-126: byte 1; 2**-128 is a tie at 0.25 and goes to 0."""
    w = torch.stack([block(torch.finfo(torch.float32).max), block(2.0**-126, 2.0**-128, 2.0**-127)])
    for rule in mxfp4.RULES:
        packed, scales = mxfp4.encode(w, rule)
        assert scales.tolist() == [[252], [1]], rule
        assert mxfp4.unpack(packed)[:, :3].tolist() == [[7, 0, 0], [2, 0, 1]], rule
        assert mxfp4.decode(packed, scales)[0, 0].item() == 6 * 2.0**125


# ---- the fast forms are the definition


@pytest.mark.parametrize("rule", mxfp4.RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_forms_equal_the_definition(awkward, assert_same_bits, rule, dtype):
    w = awkward.to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    codes, scales = mxfp4.quantize(w, rule)
    packed, fast_scales = mxfp4.encode(w, rule)
    assert_same_bits(fast_scales, scales)
    assert_same_bits(mxfp4.unpack(packed), codes)
    assert_same_bits(packed, mxfp4.pack(codes))
    for out in (torch.bfloat16, torch.float32, torch.float16):
        assert_same_bits(mxfp4.decode(packed, scales, out), mxfp4.dequantize(codes, scales, out))
    assert_same_bits(mxfp4.snap(w, rule), mxfp4.decode(packed, scales))
    assert not (codes == 8).any()


@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_chunks_threads_and_strides_do_not_show(monkeypatch, awkward, assert_same_bits, rule):
    expected = mxfp4.decode(*mxfp4.encode(awkward, rule))
    monkeypatch.setattr(mxfp4, "_CHUNK", 7 * 32)
    assert_same_bits(mxfp4.snap(awkward, rule), expected)
    torch.set_num_threads(2)
    assert_same_bits(mxfp4.snap(awkward, rule), expected)
    assert_same_bits(mxfp4.decode(*mxfp4.encode(awkward, rule)), expected)
    strided = torch.empty(96, len(awkward)).t()
    strided.copy_(awkward)
    assert not strided.is_contiguous()
    assert_same_bits(mxfp4.snap(strided, rule), expected)
    assert_same_bits(mxfp4.decode(*mxfp4.encode(strided, rule)), expected)
    assert_same_bits(mxfp4.snap(awkward.view(-1, 3, 32)[:, 1], rule), expected.view(-1, 3, 32)[:, 1])


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 5, 64), (0, 32), (4, 0)])
def test_leading_dimensions(shape, assert_same_bits):
    w = torch.randn(shape)
    packed, scales = mxfp4.encode(w)
    assert packed.shape == (*shape[:-1], shape[-1] // 2) and scales.shape == (*shape[:-1], shape[-1] // 32)
    assert_same_bits(mxfp4.snap(w), mxfp4.decode(packed, scales))
    assert_same_bits(mxfp4.dequantize(*mxfp4.quantize(w)), mxfp4.decode(packed, scales))


def test_snap_in_place_counts_the_elements_whose_bits_changed(assert_same_bits):
    master = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    param = torch.nn.Parameter(torch.zeros(40, 64, dtype=torch.bfloat16))
    expected = mxfp4.snap(master)
    assert mxfp4.snap_(param, master) == int((expected != 0).sum()) > 0
    assert_same_bits(param.data, expected)
    assert mxfp4.snap_(param, master) == 0
    master[3, 5:8] = torch.tensor([0.0, 0.0, 0.0])
    before = param.detach().clone()
    assert mxfp4.snap_(param, master) == int((mxfp4.snap(master) != before).sum()) >= 1
    assert param.requires_grad and param.grad_fn is None
    strided = torch.zeros(64, 40, dtype=torch.bfloat16).t()
    assert mxfp4.snap_(strided, master) == int((mxfp4.snap(master) != 0).sum())
    assert_same_bits(strided, mxfp4.snap(master))
    strided[0, 0] = -0.0
    master[0, :32] = 0.0
    assert mxfp4.snap_(strided, master) >= 1 and not torch.signbit(strided[0, :32]).any()


# ---- independent oracles


def oracle_exponent(amax: float, rule: str) -> int:
    """Scale exponent from the rule's definition, in exact rational steps of float64."""
    m, e = math.frexp(amax)
    m, f = 2 * m, e - 1
    bump = {"floor": False, "even": m >= 1.75, "rceil": m > 1.5}[rule]
    return min(max(f - 2 + bump, -126), 125)


def oracle_codes(x: np.ndarray, k: int) -> np.ndarray:
    """Nearest of the eight magnitudes by float64 distance; among two equally near ones the even index."""
    grid = np.array(mxfp4.GRID) * 2.0**k
    distance = np.abs(np.abs(x)[:, None] - grid)
    near = distance == distance.min(1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    index = even_first[near[:, even_first].argmax(1)]
    return index | np.where((x < 0) & (index > 0), 8, 0)


@pytest.mark.parametrize("rule", ["even", "floor", "rceil"])
def test_codes_are_the_nearest_in_float64(awkward, rule):
    codes, scales = mxfp4.quantize(awkward, rule)
    for x, c, byte in zip(
        awkward.double().view(-1, 32).numpy(), codes.view(-1, 32).numpy(), scales.flatten().tolist(), strict=True
    ):
        amax = np.abs(x).max()
        k = oracle_exponent(amax, rule) if amax else 0
        assert byte - 127 == k, amax
        np.testing.assert_array_equal(c, oracle_codes(x, k))


def test_mse_has_the_smaller_error_in_float64():
    w = torch.randn(400, 32, generator=torch.Generator().manual_seed(2)).mul_(0.02)
    codes, scales = mxfp4.quantize(w, "mse")
    for x, c, byte in zip(w.double().numpy(), codes.numpy(), scales.flatten().tolist(), strict=True):
        f = math.frexp(np.abs(x).max())[1] - 1
        errors = {}
        for k in (f - 2, f - 1):
            value = np.array(mxfp4.GRID)[oracle_codes(x, k) & 7] * 2.0**k
            errors[k] = float(((np.abs(x) - value) ** 2).sum())
        k = byte - 127
        assert errors[k] <= min(errors.values()) * (1 + 1e-6)
        np.testing.assert_array_equal(c, oracle_codes(x, k))
    assert len(set(scales.flatten().tolist())) > 1


def test_rules_rank_by_weight_error():
    """Relative squared error of Gaussian weights of sigma 0.02 (it depends on sigma's place in its binade), in 1e-3."""
    w = torch.randn(16384, 64, generator=torch.Generator().manual_seed(3)) * 0.02
    error = {r: float((mxfp4.snap(w, r).float() - w).square().sum() / w.square().sum()) * 1e3 for r in mxfp4.RULES}
    assert error == pytest.approx({"mse": 12.43, "even": 12.58, "floor": 13.0, "rceil": 14.03}, rel=0.01)
    assert error["mse"] < error["even"] < error["floor"] < error["rceil"]


def test_unpacked_codes_are_float4_e2m1fn_of_ml_dtypes():
    packed = torch.arange(256, dtype=torch.uint8)
    codes = mxfp4.unpack(packed)
    values = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    ours = mxfp4.decode(packed.view(16, 16), torch.full((16, 1), 127, dtype=torch.uint8), torch.float32)
    np.testing.assert_array_equal(ours.flatten().numpy().view(np.int32), values.view(np.int32))
    assert codes[0x93 * 2 : 0x93 * 2 + 2].tolist() == [3, 9]  # low nibble first


def test_every_finite_scale_byte_decodes(assert_same_bits):
    """All 255 bytes times all 16 codes against float64; 2**-128 is a bfloat16 subnormal, byte 254 reaches inf."""
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(255, 32)
    grid = np.array(mxfp4.GRID + tuple(-v for v in mxfp4.GRID))[np.arange(32) % 16]
    with np.errstate(over="ignore"):
        exact = (grid * 2.0 ** (np.arange(255) - 127.0)[:, None]).astype(np.float32)
    for dtype in (torch.bfloat16, torch.float32):
        out = mxfp4.decode(mxfp4.pack(codes), scales, dtype)
        assert_same_bits(out, torch.from_numpy(exact).to(dtype))
        assert_same_bits(out.float(), torch.from_numpy(exact))  # exact in bfloat16
    assert torch.isinf(out[254]).any() and torch.isfinite(out[:253]).all()


# ---- properties


@settings(max_examples=60, deadline=None)
@given(blocks_of(2.0**100), st.sampled_from(mxfp4.RULES))
def test_snap_is_the_decoded_file(w, rule):
    packed, scales = mxfp4.encode(w, rule)
    codes, slow_scales = mxfp4.quantize(w, rule)
    assert torch.equal(mxfp4.unpack(packed), codes) and torch.equal(scales, slow_scales)
    snapped = mxfp4.snap(w, rule)
    assert torch.equal(snapped.view(torch.int16), mxfp4.decode(packed, scales).view(torch.int16))
    assert not torch.signbit(snapped[snapped == 0]).any()


@settings(max_examples=60, deadline=None)
@given(blocks_of(8.0), st.sampled_from(mxfp4.RULES), st.sampled_from(mxfp4.RULES), st.integers(-140, 110))
def test_values_on_the_grid_stay(w, wrote, rereads, n):
    """Values always; bytes unless rceil wrote them (its maximum of 3 is stored one binade lower by every rule)."""
    packed, scales = mxfp4.encode(torch.ldexp(w, torch.tensor(n)), wrote)
    value = mxfp4.decode(packed, scales)
    assert torch.equal(mxfp4.snap(value, rereads), value)
    assert torch.equal(mxfp4.snap(value.float(), rereads), value)
    again, again_scales = mxfp4.encode(value, rereads)
    if wrote != "rceil":
        # A block that rounded to nothing but zeros keeps its byte 1 only in the first file.
        zero = value.view(2, 1, 32).eq(0).all(-1)
        assert torch.equal(again, packed) and torch.equal(again_scales[~zero], scales[~zero])
    assert torch.equal(mxfp4.encode(value, "floor")[1], again_scales)  # canonical: every rule agrees on the grid


@settings(max_examples=40, deadline=None)
@given(blocks_of(8.0), st.sampled_from(mxfp4.RULES), st.integers(-60, 60))
def test_a_power_of_two_only_moves_the_byte(w, rule, n):
    w = torch.where(w.abs() < 2.0**-20, 0.0, w)  # away from float32's lower end
    packed, scales = mxfp4.encode(w, rule)
    shifted, shifted_scales = mxfp4.encode(torch.ldexp(w, torch.tensor(n)), rule)
    zero = w.view(2, 1, 32).eq(0).all(-1)
    assert torch.equal(shifted, packed)
    assert torch.equal(shifted_scales.int(), torch.where(zero, 127, scales.int() + n))


@settings(max_examples=40, deadline=None)
@given(blocks_of(2.0**60), st.sampled_from(mxfp4.RULES))
def test_sign_symmetry(w, rule):
    codes, scales = mxfp4.quantize(w, rule)
    mirrored, mirrored_scales = mxfp4.quantize(-w, rule)
    assert torch.equal(mirrored_scales, scales)
    assert torch.equal(mirrored, torch.where(codes > 0, codes ^ 8, codes))
    assert torch.equal(mxfp4.snap(-w, rule), -mxfp4.snap(w, rule))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.uint8, (3, 64), elements=st.integers(0, 15)).map(torch.from_numpy))
def test_pack_round_trip(codes):
    packed = mxfp4.pack(codes)
    assert packed.shape == (3, 32) and torch.equal(mxfp4.unpack(packed), codes)
    assert packed[0, 0].item() == codes[0, 0].item() + 16 * codes[0, 1].item()


# ---- refusals: each names the tensor and says what to do

WRITERS = [mxfp4.quantize, mxfp4.encode, mxfp4.snap]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("w", "complaint"),
    [
        (torch.zeros(4, 33), r"no whole blocks of 32.*pad it"),
        (torch.zeros(()), r"no whole blocks of 32"),
        (torch.zeros(4, 32, dtype=torch.float64), r"float64\[4, 32\].*convert it to float32"),
        (torch.zeros(4, 32, dtype=torch.uint8), r"uint8\[4, 32\].*convert it to float32"),
        (block(1.0, float("nan")), r"NaN or Inf.*learning rate"),
        (block(1.0, float("inf")), r"NaN or Inf"),
        (torch.stack([block(2.0), block(float("-inf"))]).bfloat16(), r"at least 1 block"),
    ],
)
def test_bad_weights_are_refused(write, w, complaint):
    with pytest.raises(ValueError, match=rf"^experts\.7\.up: .*{complaint}"):
        write(w, name="experts.7.up")


def test_bad_rules_and_copies_are_refused():
    w = torch.zeros(2, 32)
    for write in WRITERS:
        with pytest.raises(ValueError, match=r"w1: unknown scale rule 'ceil'; use one of even, floor, rceil, mse"):
            write(w, "ceil", name="w1")
    with pytest.raises(ValueError, match=r"w1: the snapped copy is torch.float32; keep it in torch.bfloat16"):
        mxfp4.snap_(torch.zeros(2, 32), w, name="w1")
    with pytest.raises(ValueError, match=r"w1: .*same shape"):
        mxfp4.snap_(torch.zeros(1, 64, dtype=torch.bfloat16), w, name="w1")
    with pytest.raises(ValueError, match=r"w1: NaN or Inf"):
        mxfp4.snap_(torch.zeros(2, 32, dtype=torch.bfloat16), w.fill_(float("nan")), name="w1")


@pytest.mark.parametrize(
    ("packed", "scales", "complaint"),
    [
        (torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.uint8), r"int8.*view\(torch.uint8\)"),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1), r"float32.*view\(torch.uint8\)"),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.uint8), r"one byte per 32"),
        (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8), r"one byte per 32"),
        (torch.zeros((), dtype=torch.uint8), torch.zeros((), dtype=torch.uint8), r"one byte per 32"),
        (torch.zeros(1, 16, dtype=torch.uint8), torch.full((1, 1), 255, dtype=torch.uint8), r"byte 255 .* in 1 block"),
    ],
)
def test_bad_files_are_refused(packed, scales, complaint):
    with pytest.raises(ValueError, match=rf"^experts\.0\.down: .*{complaint}"):
        mxfp4.decode(packed, scales, name="experts.0.down")


def test_bad_codes_are_refused():
    one = torch.full((1, 1), 127, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"codes: the largest is 16.*unpack\(\)"):
        mxfp4.dequantize(torch.full((1, 32), 16, dtype=torch.uint8), one)
    with pytest.raises(ValueError, match=r"codes: the largest is 16.*packed already"):
        mxfp4.pack(torch.full((1, 32), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"even last dimension"):
        mxfp4.pack(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"give the uint8 tensor"):
        mxfp4.unpack(torch.zeros(3))
    with pytest.raises(ValueError, match=r"byte 255"):
        mxfp4.dequantize(torch.zeros(1, 32, dtype=torch.uint8), one + 128)
