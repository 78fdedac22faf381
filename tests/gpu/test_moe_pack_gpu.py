"""pytest -m gpu -s tests/gpu/test_moe_pack_gpu.py   (prints GB/s, read plus written, of packing published experts)

The compiled kernel that packs experts against the definition on the CPU, bit for bit.
"""

import os

import pytest
import torch

from mimo_kernels import moe
from tests.kernels.test_moe import FIELDS, random_experts
from tests.kernels.test_moe_pack import records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (576, 192), (96, 32), (4096, 512), (1280, 416)])
def test_cuda_equals_the_definition(hidden, inter):
    experts = random_experts(5, hidden, inter, seed=int.from_bytes(os.urandom(4)), scales=(0, 129))
    expected, packer = moe.pack_experts(experts), moe.Packer(5, hidden, inter, "cuda")
    on_gpu = moe.Experts(*(getattr(experts, name).cuda() for name in FIELDS))
    whole = moe.pack_experts(on_gpu)
    gate, up, down = records(on_gpu, inter)
    for some in (slice(3, 5), slice(0, 3)):
        packer.put(some.start, *(tuple(t[some] for t in matrix) for matrix in (gate, up, down)))
    packer.check()
    for name in FIELDS:
        assert torch.equal(getattr(whole, name).cpu(), getattr(expected, name)), name
        assert torch.equal(getattr(packer.packed, name).cpu(), getattr(expected, name)), name


def test_refusal():
    experts = random_experts(2, 128, 128)
    experts.down_scales[1, 2, 3] = 129
    with pytest.raises(ValueError, match="down_scales: byte 129, above 128"):
        moe.pack_experts(moe.Experts(*(getattr(experts, name).cuda() for name in FIELDS)))


def test_speed():
    experts = moe.Experts(*(getattr(random_experts(16, 4096, 2048), name).cuda() for name in FIELDS))
    gate, up, down = records(experts, 2048)
    packer = moe.Packer(16, 4096, 2048, "cuda")
    packer.put(0, gate, up, down)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        packer.put(0, gate, up, down)
    end.record()
    end.synchronize()
    moved = 20 * 2 * 16 * packer.packed.bytes_per_expert
    rate = moved / begin.elapsed_time(end) / 1e6
    print(f"\npacking moves {rate:.0f} GB/s")
    assert rate > 400  # several times what files arrive at
