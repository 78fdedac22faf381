"""TRITON_INTERPRET=1 pytest tests/kernels/test_mxfp4_triton.py   (without the variable the file runs itself with it)

The Triton kernels, interpreted on the CPU, against the torch path, bit for bit. On a GPU: tests/gpu/test_mxfp4_gpu.py.
"""

import os
import subprocess
import sys

import pytest
import torch

from mimo_kernels import mxfp4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the interpreter process of test_kernels_in_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter process")
def test_kernels_in_the_interpreter():
    """Triton reads the variable when it is first imported, so the kernels get a process of their own."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "7 passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.fixture
def kernels():
    from mimo_kernels import mxfp4_triton

    return mxfp4_triton


@inside
@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_snap_and_encode(kernels, awkward, assert_same_bits, rule):
    for w in (awkward, awkward.bfloat16().nan_to_num(posinf=1.0), awkward.half().nan_to_num(posinf=1.0, neginf=0.0)):
        expected_packed, expected_scales = mxfp4.encode(w, rule)
        packed, scales = kernels.encode(w, rule, name="w")
        assert_same_bits(scales, expected_scales)
        assert_same_bits(packed, expected_packed)
        expected = mxfp4.snap(w, rule)
        param = torch.zeros(w.shape, dtype=torch.bfloat16)
        param[::2] = expected[::2]
        flips = int((param.view(torch.int16) != expected.view(torch.int16)).sum())
        assert kernels.snap_(param, w, rule, name="w") == flips > 0
        assert_same_bits(param, expected)
        assert kernels.snap_(param, w, rule, name="w", count=False) == 0
        assert_same_bits(param, expected)


@inside
def test_decode_of_every_scale_byte(kernels, assert_same_bits):
    packed = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).expand(255, 16, 1).contiguous()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert_same_bits(kernels.decode(packed, scales, dtype), mxfp4.decode(packed, scales, dtype))


@inside
def test_tail_tile_and_empty(kernels, assert_same_bits):
    for blocks in (0, 1, 127, 129):
        w = torch.randn(blocks, 32, generator=torch.Generator().manual_seed(blocks))
        guarded = torch.full((blocks + 1, 32), 9.0, dtype=torch.bfloat16)
        kernels.snap_(guarded[:blocks], w, "even", name="w")
        assert_same_bits(guarded[:blocks], mxfp4.snap(w))
        assert guarded[blocks:].eq(9.0).all()
        assert_same_bits(kernels.decode(*kernels.encode(w, "even", name="w"), torch.bfloat16), mxfp4.snap(w))


@inside
def test_non_finite_is_refused_and_its_blocks_are_left_alone(kernels):
    w = torch.ones(5, 32)
    w[1, 3], w[4, 0] = float("nan"), float("-inf")
    param = torch.zeros(5, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^w9: NaN or Inf in at least 2 block"):
        kernels.snap_(param, w, "mse", name="w9")
    assert param.amax(-1).tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"^w9: NaN or Inf"):
        kernels.encode(w, "even", name="w9")
