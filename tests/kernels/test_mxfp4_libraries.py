"""MXFP4 bytes against compressed-tensors (rule even) and torchao (floor, rceil, even), and where they differ."""

import pytest
import torch

from mimo_kernels import mxfp4


def comparable(w: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
    """The blocks [n, 32] whose largest magnitude lies in [lowest, highest]: where no library clamps its exponent."""
    blocks = w.reshape(-1, 32)
    amax = blocks.float().abs().amax(-1)
    kept = blocks[(amax >= lowest) & (amax <= highest)]
    assert len(kept) > 300
    return kept.contiguous()


def plus_zero(codes: torch.Tensor) -> torch.Tensor:
    """Both libraries may write -0 (code 8); we never do."""
    return torch.where(codes == 8, 0, codes)


@pytest.fixture
def weights(awkward) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    return torch.cat([awkward.view(-1, 32), torch.randn(2000, 32, generator=g) * 0.02])


def test_even_is_compressed_tensors(weights, assert_same_bits):
    """Its own two steps: scales by generate_mx_scales, then quantize_and_pack_fp4. From bfloat16, as it computes."""
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    w = comparable(weights.bfloat16().nan_to_num(posinf=0, neginf=0), 2.0**-120, 2.0**126)
    theirs_scales = generate_mx_scales(w.abs().amax(-1, keepdim=True)).to(torch.uint8)
    scale = torch.exp2(theirs_scales.float() - 127)
    theirs = quantize_and_pack_fp4(w.float(), scale, group_size=32)
    packed, scales = mxfp4.encode(w, "even")
    assert_same_bits(scales, theirs_scales)
    assert_same_bits(mxfp4.unpack(packed), plus_zero(mxfp4.unpack(theirs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_torchao_writes_the_same_bytes(weights, assert_same_bits, rule, dtype):
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    mode = {r: ScaleCalculationMode[r.upper()] for r in ("floor", "rceil", "even")}[rule]
    w = comparable(weights.to(dtype).nan_to_num(posinf=0, neginf=0), 2.0**-122, 2.0**126)
    if rule == "rceil":
        m = torch.frexp(w.abs().amax(-1).float()).mantissa * 2
        w = w[(m <= 1.5) | (m > 1.5 + 2.0**-16)]  # see the next test
    theirs_scales, theirs = to_mx(w, torch.float4_e2m1fn_x2, 32, mode)
    packed, scales = mxfp4.encode(w, rule)
    assert_same_bits(scales, theirs_scales.view(torch.uint8).view(-1, 1))
    assert_same_bits(mxfp4.unpack(packed), plus_zero(mxfp4.unpack(theirs)))


def test_torchao_misses_the_rceil_bump_just_above_its_threshold():
    """ceil(log2(amax / 6)) with a float32 logarithm takes 1.5 + 2**-23 for 1.5, and 6.0000005 clips. We read the bits.

    If this fails, torchao has become exact: drop the filter above.
    """
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    w = torch.zeros(1, 32)
    w[0, 0] = (1.5 + 2.0**-23) * 2.0**-8
    theirs, _ = to_mx(w, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
    assert (theirs.view(torch.uint8).item(), mxfp4.encode(w, "rceil")[1].item()) == (117, 118)
