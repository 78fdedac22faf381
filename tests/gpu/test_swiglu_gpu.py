"""silu(gate) * up, compiled: the bits of torch's two operations for every BF16 gate."""

import pytest
import torch

from mimo_kernels import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]


def test_every_gate_has_the_bits_of_torch():
    gates = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(torch.bfloat16).view(16, -1)
    for seed in range(4):
        g = torch.Generator("cuda").manual_seed(seed)
        up = torch.randn(gates.shape, device="cuda", generator=g).bfloat16() if seed else torch.ones_like(gates)
        x = torch.cat((gates, up), dim=1)
        y, expected = swiglu.silu_mul(x), swiglu.reference(x)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))
