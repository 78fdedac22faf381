"""The compiled loss kernels at the vocabulary sizes that matter, against the torch definitions on the CPU."""

import pytest
import torch

from mimo_kernels import head_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("size", [49_152, 152_576, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_equal_the_definitions(size, dtype):
    g = torch.Generator().manual_seed(size)
    logits, other = ((torch.randn(64, size, generator=g) * 3).to(dtype) for _ in range(2))
    labels = torch.randint(0, size, (64,), generator=g)
    ce_weight, weight = torch.rand(64, generator=g), torch.randn(64, generator=g)
    results = []
    for device in ("cpu", "cuda"):
        x, y, label = (t.to(device) for t in (logits, other, labels))
        lse, picked, best = head_loss.row_statistics(x, label)
        other_lse, _, _ = head_loss.row_statistics(y, label)
        both, below = head_loss.overlap(x, y, lse, other_lse)
        values, _ = head_loss.top_k(x, 16)
        alone = head_loss.gradient_(x.clone(), label, lse, ce_weight.to(device))
        second = (y, other_lse, below, weight.to(device))
        mixed = head_loss.gradient_(x.clone(), label, lse, ce_weight.to(device), second)
        kl, kl_lse, kl_other_lse = head_loss.divergence(x, y)
        pulled = head_loss.divergence_gradient_(x.clone(), label, kl_lse, ce_weight.to(device), (y, kl_other_lse, 0.7))
        found = (lse, picked, best, both, below, values, alone, mixed, kl, pulled)
        results.append([t.cpu().double() for t in found])
    names = ("lse", "picked", "best", "both", "below", "top", "alone", "mixed", "kl", "pulled")
    for name, expected, got in zip(names, *results, strict=True):
        exact = name in ("picked", "best", "top")
        error = (got - expected).norm() / expected.norm()
        assert torch.equal(got, expected) if exact else error < (1e-5 if dtype == torch.float32 else 4e-3), name
