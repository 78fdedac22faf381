"""Shared by the codec tests: weights that are awkward for a block format, an assertion that names the difference."""

import pytest
import torch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: more threads only add noise. Restored, because the setting is global."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def assert_same_bits():
    """assert_same_bits(actual, expected): equal dtype, shape and bits (+0 is not -0), else the first coordinate."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        integer = BITS[actual.element_size()]
        different = (actual.contiguous().view(integer) != expected.contiguous().view(integer)).nonzero()
        if len(different):
            at = tuple(different[0].tolist())
            raise AssertionError(
                f"{len(different)} of {actual.numel()} differ, first at {at}: {actual[at].item()!r}, "
                f"expected {expected[at].item()!r}"
            )

    return check


@pytest.fixture
def awkward() -> torch.Tensor:
    """float32 [rows, 96]: rows of every magnitude, ties, maxima beside a rule's threshold, zeros, subnormals."""
    g = torch.Generator().manual_seed(20)
    rows = []
    scales = torch.exp2(torch.randint(-150, 126, (160, 1), generator=g).double())
    rows.append(torch.randn(160, 96, generator=g).double() * scales)
    # Every tie and grid point in both signs, under power-of-two scales; the block maximum 6 or 4 fixes the exponent.
    points = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], dtype=torch.float64)
    ties = torch.cat([points, -points, torch.tensor([6.0, -0.0])]).repeat(3)
    rows.append(ties * torch.exp2(torch.arange(-128, 124, 7, dtype=torch.float64))[:, None])
    # Maxima just below, at and just above each threshold of a scale rule (m = 1, 1.5, 1.75, 2).
    m = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0])
    m = torch.cat([m, torch.nextafter(m, m * 2), torch.nextafter(m, m * 0)]).double()
    block = torch.rand(len(m), 96, generator=g).double() - 0.5
    block[:, ::32] = m[:, None]
    rows += [block * 2.0**e for e in (-140, -126, -124, -60, 0, 60, 126)]
    rows.append(torch.zeros(1, 96).double())
    rows.append(torch.full((1, 96), -0.0).double())
    rows.append(torch.full((1, 96), 2.0**-149).double())  # the smallest subnormal
    rows.append(torch.full((1, 96), torch.finfo(torch.float32).max).double())
    x = torch.cat(rows).clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    return x.float()
