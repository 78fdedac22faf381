"""pytest -m gpu -s tests/gpu/test_mxfp4_gpu.py   (prints the bandwidth of snap beside that of a device copy)

The compiled Triton kernels against the torch path on the CPU, bit for bit, on inputs that are fresh in every run.
"""

import json
import os

import pytest
import torch

from mimo_kernels import mxfp4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, context: str) -> None:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    actual = actual.cpu()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    different = (actual.contiguous().view(integer) != expected.contiguous().view(integer)).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise AssertionError(
            f"{context}: {len(different)} differ, first at {at}: {actual[at]}, expected {expected[at]}"
        )


def fresh_weights(seed: int) -> torch.Tensor:
    """float32 [rows, 96]: random bits (every exponent, subnormals), usual weights, ties and their neighbours, zeros."""
    g = torch.Generator().manual_seed(seed)
    anything = torch.randint(-(2**31), 2**31, (3000, 96), generator=g).int().view(torch.float32)
    anything = anything.nan_to_num(0.0, 1.0, -1.0)
    # One random exponent a block, so that the elements of a block matter together.
    bits = (torch.randint(0, 254, (6000, 1), generator=g) << 23).int().view(torch.float32)
    spread = bits * (torch.rand(6000, 96, generator=g) * 3.999 - 2)
    usual = torch.randn(3000, 96, generator=g) * 0.02
    points = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7])
    ties = (
        points[torch.randint(0, 16, (3000, 96), generator=g)]
        * torch.exp2(torch.arange(-130.0, 120.0).repeat(12))[:, None]
    )
    ties = torch.nextafter(ties, ties + ties * torch.randint(-1, 2, ties.shape, generator=g))
    edge = torch.full((4, 96), 2.0**-149)
    edge[1], edge[2], edge[3] = 0.0, -0.0, torch.finfo(torch.float32).max
    return torch.cat([anything, spread, usual, ties, edge]).nan_to_num(0.0, 1.0, -1.0)


@pytest.mark.parametrize("rule", mxfp4.RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_equals_cpu(rule, dtype):
    seed = int.from_bytes(os.urandom(4))
    w = fresh_weights(seed).to(dtype).nan_to_num(0.0, 1.0, -1.0)
    context = f"rule {rule}, {dtype}, seed {seed}"
    packed, scales = mxfp4.encode(w, rule)
    gpu_packed, gpu_scales = mxfp4.encode(w.cuda(), rule)
    assert_same_bits(gpu_scales, scales, context)
    assert_same_bits(gpu_packed, packed, context)
    snapped = mxfp4.snap(w, rule)
    assert_same_bits(mxfp4.snap(w.cuda(), rule), snapped, context)
    param = torch.zeros_like(snapped)
    param[::2] = snapped[::2]
    flips = int((param.view(torch.int16) != snapped.view(torch.int16)).sum())
    param = param.cuda()
    assert mxfp4.snap_(param, w.cuda(), rule) == flips > 0, context
    assert_same_bits(param, snapped, context)
    assert mxfp4.snap_(param, w.cuda(), rule) == 0, context
    # The definition, evaluated on the device, agrees as well.
    assert_same_bits(mxfp4.dequantize(*mxfp4.quantize(w.cuda(), rule)), snapped, context)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_decode_of_every_byte(dtype):
    packed = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).expand(255, 16, 1).contiguous()
    assert_same_bits(mxfp4.decode(packed.cuda(), scales.cuda(), dtype), mxfp4.decode(packed, scales, dtype), str(dtype))


def test_strides():
    w = torch.randn(3, 64, 5, 32).transpose(1, 2)
    assert not w.cuda().is_contiguous()
    assert_same_bits(mxfp4.snap(w.cuda()), mxfp4.snap(w), "strided master")
    param, master = torch.zeros(64, 5, dtype=torch.bfloat16, device="cuda").t(), torch.randn(5, 64)
    assert mxfp4.snap_(param, master.cuda()) == int((mxfp4.snap(master) != 0).sum())
    assert_same_bits(param, mxfp4.snap(master), "strided copy")


def test_non_finite_is_refused_and_its_block_is_left_alone():
    w = torch.ones(5, 32, device="cuda")
    w[1, 3] = float("nan")
    out = torch.zeros(5, 32, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="w9: NaN or Inf in at least 1 block"):
        mxfp4.snap_(out, w, name="w9")
    assert out.amax(-1).tolist() == [1, 0, 1, 1, 1]


def milliseconds(step, repeats: int = 20) -> float:
    """Median time of step() on the device, by events, after a warm-up."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def test_bandwidth_of_snap(capsys):
    """318M weights, the expert matrices of about one layer: bytes moved a second against a plain copy of the master."""
    n = 318 * 2**20
    master = torch.randn(n // 1024, 1024, device="cuda") * 0.02
    param, other = torch.zeros_like(master, dtype=torch.bfloat16), torch.empty_like(master)
    copy = 8 * n / milliseconds(lambda: other.copy_(master)) / 1e6
    rows = []
    for rule in mxfp4.RULES:
        ms = milliseconds(lambda: mxfp4.snap_(param, master, rule))  # noqa: B023
        rows.append(
            {
                "name": f"snap_ {rule}",
                "ms": round(ms, 3),
                "GB/s": round(8 * n / ms / 1e6),
                "of_copy": 8 * n / ms / 1e6 / copy,
            }
        )
    packed = mxfp4.encode(master)
    for name, step, size in [
        ("encode even", lambda: mxfp4.encode(master), 4.53125),
        ("decode bf16", lambda: mxfp4.decode(*packed), 2.53125),
    ]:
        ms = milliseconds(step)
        rows.append(
            {
                "name": name,
                "ms": round(ms, 3),
                "GB/s": round(size * n / ms / 1e6),
                "of_copy": size * n / ms / 1e6 / copy,
            }
        )
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, {n / 1e6:.0f}M float32 weights, device copy {copy:.0f} GB/s")
        for r in rows:
            print(f"  {r['name']:12s} {r['ms']:7.3f} ms  {r['GB/s']:5d} GB/s  {r['of_copy']:.2f} of the copy")
        print(json.dumps({"copy_GB/s": round(copy), "rows": rows}))
    assert mxfp4.snap_(param, master, "even") >= 0
    assert all(r["of_copy"] > 0.3 for r in rows[:3]), rows
