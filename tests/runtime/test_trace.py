"""What a trace says about the host, on made-up kernels; that of a GPU is in tests/gpu/test_synthetic_gpu.py."""

import pytest

from mimo_runtime.bench import main
from mimo_runtime.config import BenchConfig
from mimo_runtime.trace import waits_us


def test_waits_are_counted_between_rounds_alone():
    # two rounds of three kernels: 5 us idle within each, 2 between them, after the kernel that ends last
    kernels = [(0, 10), (15, 30), (16, 25), (32, 40), (45, 50), (46, 60)]
    assert waits_us(kernels, 2) == [2]


def test_a_round_that_begins_early_waits_for_nobody():
    assert waits_us([(0, 10), (9, 12), (14, 20)], 3) == [0, 2]


@pytest.mark.parametrize(("kernels", "rounds"), [([(0, 1)] * 5, 2), ([], 2)])
def test_rounds_that_differ_are_refused(kernels, rounds):
    with pytest.raises(ValueError, match="rounds of as many"):
        waits_us(kernels, rounds)


def test_graphs_are_asked_for():
    with pytest.raises(ValueError, match="cuda_graphs"):
        main(BenchConfig(synthetic="flash", trace="trace.json"))
