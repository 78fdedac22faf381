"""pytest -m gpu -s tests/gpu/test_transcode_gpu.py   (prints GB/s, read plus written, beside those of a device copy)

The compiled FP8 -> MXFP4 kernels against the CPU path and the two steps, bit for bit, on fresh inputs in every run.
"""

import json
import os

import pytest
import torch

from mimo_kernels import fp8, mxfp4, transcode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BYTES_A_WEIGHT = 1 + 0.5 + 1 / 32


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], context: str) -> None:
    for part, a, e in zip(("packed", "scales"), actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        different = (a.cpu() != e.cpu()).nonzero()
        assert not len(different), f"{context}: {len(different)} {part} differ, first at {different[0].tolist()}"


def fresh(shape: tuple[int, ...], seed: int, low: float = -40, high: float = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes under a random ceiling a group; scales 2**low to 2**high: any mantissa, powers of two, edges."""
    g = torch.Generator().manual_seed(seed)
    byte = torch.randint(0, 256, shape, generator=g).unflatten(-1, (-1, 32))
    ceiling = torch.randint(-20, 127, (*byte.shape[:-1], 1), generator=g).clamp(min=0)
    q = (torch.minimum(byte & 0x7F, ceiling) | (byte & 0x80)).flatten(-2).to(torch.uint8).view(torch.float8_e4m3fn)
    tiles = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    exponent = torch.rand(tiles, generator=g, dtype=torch.float64) * (high - low) + low
    scale = torch.exp2(exponent).float()
    mu = torch.tensor([1.0, 1.25, 1.5, 1.75])[torch.randint(0, 4, tiles, generator=g)].double()
    edge = (mu / (1 + torch.randint(0, 8, tiles, generator=g) / 8.0) * torch.exp2(exponent.floor())).float()
    edge = (edge.view(torch.int32) + torch.randint(-2, 3, tiles, generator=g).int()).view(torch.float32)
    kind = torch.randint(0, 3, tiles, generator=g)
    return q, torch.where(kind == 0, scale, torch.where(kind == 1, edge, torch.exp2(exponent.floor()).float()))


@pytest.mark.parametrize("rule", mxfp4.RULES)
@pytest.mark.parametrize(
    "shape", [(128, 128), (300, 352), (5, 32), (3, 257, 160), (2, 384, 2048), (1030, 6144), (2, 130, 256)], ids=str
)
def test_cuda_equals_cpu_and_the_two_steps(rule, shape):
    seed = int.from_bytes(os.urandom(4))
    for low, high in ((-40, 20), (-99, 99)):
        q, scale = fresh(shape, seed, low, high)
        context = f"rule {rule}, {list(shape)}, scales 2**[{low}, {high}], seed {seed}"
        actual = transcode.fp8_to_mxfp4(q.cuda(), scale.cuda(), rule)
        assert_same(actual, transcode.fp8_to_mxfp4(q, scale, rule), context)
        if q.ndim == 2:
            value = fp8.dequantize(q.cuda(), scale.cuda(), dtype=torch.float32)
            assert_same(actual, mxfp4.encode(value, rule), context)


@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_extreme_scales_and_any_alignment(rule):
    q, _ = fresh((8 * 128, 96), int.from_bytes(os.urandom(4)))
    scale = torch.tensor([0.0, 2.0**-149, 1e-40, 2.0**-101, 2.0**-100, 2.0**100, 2.0**101, 0.3]).view(8, 1)
    expected = transcode.fp8_to_mxfp4(q, scale, rule)
    assert_same(transcode.fp8_to_mxfp4(q.cuda(), scale.cuda(), rule), expected, rule)
    file = torch.cat([torch.zeros(5, dtype=torch.uint8), q.view(torch.uint8).flatten()]).cuda()
    odd = file[5:].view(torch.float8_e4m3fn).view(q.shape)
    assert odd.data_ptr() % 16
    assert_same(transcode.fp8_to_mxfp4(odd, scale.cuda(), rule), expected, f"{rule}, unaligned")


def test_refusals():
    q, scale = fresh((256, 128), 1, -3, 3)
    bad = q.view(torch.uint8).clone()
    bad[255, 127] = 0xFF
    with pytest.raises(ValueError, match=r"^w7: at least 1 NaN code\(s\)"):
        transcode.fp8_to_mxfp4(bad.view(torch.float8_e4m3fn).cuda(), scale.cuda(), name="w7")
    for value in (float("nan"), float("inf"), -1.0):
        scale[1, 0] = value
        with pytest.raises(ValueError, match=r"^w7: 1 scale\(s\) are negative, NaN or Inf"):
            transcode.fp8_to_mxfp4(q.cuda(), scale.cuda(), name="w7")


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


def test_bandwidth(capsys):
    """96 experts, gate (2048 x 6144): 1.2 G weights. One expert beside it shows what the launch and its checks cost."""
    g = torch.Generator(device="cuda").manual_seed(0)
    q = torch.empty(96, 2048, 6144, dtype=torch.float8_e4m3fn, device="cuda")
    for expert in q:
        expert.copy_((torch.randn(2048, 6144, generator=g, device="cuda") * 100).clamp(-448, 448))
    scale = torch.rand(96, 16, 48, generator=g, device="cuda") * 1e-4 + 1e-5
    source = torch.empty(2**29, dtype=torch.float32, device="cuda").normal_(generator=g)
    target = torch.empty_like(source)
    copy = 8 * 2**29 / milliseconds(lambda: target.copy_(source)) / 1e6
    rows = []
    cases = [(rule, q, scale) for rule in ("even", "floor", "rceil")]
    for name, w, s in [*cases, ("even, one expert", q[0], scale[0])]:
        ms = milliseconds(lambda: transcode.fp8_to_mxfp4(w, s, name.split(",")[0]))  # noqa: B023
        rate = BYTES_A_WEIGHT * w.numel() / ms / 1e6
        rows.append({"name": name, "ms": round(ms, 3), "GB/s": round(rate), "of_copy": round(rate / copy, 3)})
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, FP8 -> MXFP4, {q.numel() / 1e6:.0f}M weights, copy {copy:.0f} GB/s")
        for r in rows:
            print(f"  {r['name']:18s} {r['ms']:7.3f} ms  {r['GB/s']:5d} GB/s  {r['of_copy']:.2f} of the copy")
        print(json.dumps({"copy_GB/s": round(copy), "rows": rows}))
    last = transcode.fp8_to_mxfp4(q[95].cpu(), scale[95].cpu())
    assert_same(tuple(t[95] for t in transcode.fp8_to_mxfp4(q, scale)), last, "the last expert")
    assert rows[0]["of_copy"] > 0.4, rows
