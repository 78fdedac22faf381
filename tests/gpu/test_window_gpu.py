"""pytest -m gpu tests/gpu/test_window_gpu.py

Attention over a window from its projection in one launch, against the float64 definition and the two launches that it
stands for, and bit for bit against itself.
"""

import os

import pytest
import torch

from mimo_kernels import attention, heads, window, window_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]
WINDOW, K_DIM, V_DIM, HALF = 128, 192, 128, 32
SIZES = [
    (16, 2),
    (16, 1),
    (64, 8),
    (8, 1),
]  # heads of Flash at TP 4, Pro at TP 8, Flash at TP 1 and 8
STARTS = (0, 1, 5, 127, 128, 135, 136, 1000, 70_001)


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # pytest shows it when the test fails
    return torch.Generator("cuda").manual_seed(seed)


class Case:
    def __init__(self, sizes, rows, slots, g):
        (self.heads, groups), self.rows = sizes, rows

        def normal(*shape):
            return torch.randn(*shape, generator=g, device="cuda").bfloat16()

        self.qkv = normal(rows, (self.heads + groups) * K_DIM + groups * V_DIM)
        angles = torch.rand(rows, HALF, generator=g, device="cuda") * 6
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.keys, self.values = normal(groups, slots, K_DIM), normal(groups, slots, V_DIM)
        self.sink = torch.randn(self.heads, generator=g, device="cuda")

    def expected(self, start, count, sink=True):
        """(output float64, keys, values) by the definitions."""
        groups, slots, _ = self.keys.shape
        kw = {"value_scale": 0.7, "dtype": torch.float64}
        q, k, v = heads.reference(self.qkv, self.cos, self.sin, (groups, K_DIM, V_DIM), **kw)
        place = (start + torch.arange(count, device="cuda")) % slots
        keys, values = self.keys.clone(), self.values.clone()
        keys[:, place], values[:, place] = k[:count].transpose(0, 1), v[:count].transpose(0, 1)
        kw = {"scale": 0.06, "window": WINDOW, "sink": self.sink if sink else None, "dtype": torch.float64}
        return attention.reference(q[:count], keys, values, torch.tensor(start, device="cuda"), **kw), keys, values

    def run(self, start, count, sink=True):
        """(output, keys, values) by the kernel; the caches of this case stay as they are."""
        keys, values, place = self.keys.clone(), self.values.clone(), torch.tensor(start, device="cuda")
        assert window_cuda.fits(self.qkv, self.cos, keys, values, count, WINDOW)
        kw = {"scale": 0.06, "window": WINDOW, "sink": self.sink if sink else None, "value_scale": 0.7}
        return window.attend(self.qkv, self.cos, self.sin, keys, values, place, count=count, **kw), keys, values


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("slots", [136, 144])
def test_against_float64(sizes, slots, generator):
    for start in STARTS:
        for count in (1, 3, 8):
            for sink in (True, False):
                case = Case(sizes, 8, slots, generator)
                out, keys, values = case.run(start, count, sink)
                expected, k, v = case.expected(start, count, sink)
                assert all(torch.equal(row, out[count - 1]) for row in out[count:])
                error = (out[:count].double() - expected).norm() / expected.norm()
                assert error < 1e-2, (start, count, sink, float(error))
                assert torch.equal(values, v), (start, count)
                assert (keys.float() - k.float()).abs().max() <= 2**-6, (start, count)  # a rotation's last bit


def test_keys_and_values_are_those_of_two_launches(generator):
    case = Case(SIZES[0], 8, 136, generator)
    for start in STARTS:
        _, keys, values = case.run(start, 8)
        k, v = case.keys.clone(), case.values.clone()
        place = torch.tensor(start, device="cuda")
        heads.split_heads(case.qkv, case.cos, case.sin, k, v, place, count=8, value_scale=0.7)
        assert torch.equal(keys, k) and torch.equal(values, v)


def test_bits_depend_on_the_row_alone(generator):
    """Not on its neighbours, on how many rows there are, or on what the slots hold that no row sees."""
    case = Case(SIZES[0], 8, 136, generator)
    for start in STARTS:
        out, *_ = case.run(start, 8)
        for _ in range(20):
            assert torch.equal(case.run(start, 8)[0].view(torch.int16), out.view(torch.int16))
        assert torch.equal(case.run(start, 1)[0][:1].view(torch.int16), out[:1].view(torch.int16))
        before = case.keys.clone(), case.values.clone()
        slot = torch.arange(136, device="cuda")
        position = start - 1 - (start - 1 - slot) % 136
        unseen = (position < 0) | (position <= start - WINDOW)
        case.keys[:, unseen], case.values[:, unseen] = 3.0, -5.0
        assert torch.equal(case.run(start, 8)[0].view(torch.int16), out.view(torch.int16))
        case.keys, case.values = before
