"""The operators on rows of logits: against float64 autograd, by property, and the Triton kernels in the interpreter.

Run by hand: TRITON_INTERPRET=1 pytest tests/kernels/test_head_loss.py (without it the file runs itself with it).
"""

import os
import subprocess
import sys

import pytest
import torch

from mimo_kernels import head_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_kernels_in_the_interpreter")


def rows(dtype, size=301, seed=0):
    """Draft and target logits with a tie for the maximum, a -inf and a row far from zero; labels."""
    g = torch.Generator().manual_seed(seed)
    logits, other = (torch.randn(6, size, generator=g) * 3 for _ in range(2))
    logits[0, [7, 90]] = 20.0
    logits[1, 5] = float("-inf")
    logits[2] += 500
    other[3] = logits[3]  # equal distributions: an overlap of one
    labels = torch.tensor([7, 5, 0, size - 1, 11, 12])
    labels[1] = 6
    return logits.to(dtype), other.to(dtype), labels


def oracle(logits, other, labels, ce_weight, overlap_weight):
    """(loss, its gradient) in float64 by autograd; the overlap as 1 - |p - q| / 2."""
    logits = logits.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    difference = (logits.softmax(-1) - other.double().softmax(-1)).abs().sum(-1)
    loss = (ce_weight.double() * ce + overlap_weight.double() * (1 - difference / 2)).sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def operators():
    """The torch definitions, and the kernels where they can run."""
    if not INTERPRETED:
        return head_loss
    from mimo_kernels import head_loss_triton

    return head_loss_triton


def check_against_autograd(dtype, size):
    ops = operators()
    logits, other, labels = rows(dtype, size)
    ce_weight, overlap_weight = torch.linspace(0.5, 3, 6), torch.linspace(-2, 1, 6)
    overlap_weight[3] = 0.0  # p = q is the kink of the overlap: no gradient to compare there
    loss, expected = oracle(logits, other, labels, ce_weight, overlap_weight)
    lse, picked, best = ops.row_statistics(logits, labels)
    other_lse, _, _ = ops.row_statistics(other, labels)
    both, below = ops.overlap(logits, other, lse, other_lse)
    got = (ce_weight * (lse - picked) + overlap_weight * both).sum()
    assert abs(got - loss) < 1e-4 * abs(loss)
    assert best[0] == 7 and torch.equal(best, logits.float().argmax(-1))
    assert abs(both[3] - 1) < 1e-5 and (both <= 1 + 1e-5).all() and (below <= both + 1e-5).all()
    grad = logits.clone()
    assert ops.gradient_(grad, labels, lse, ce_weight, (other, other_lse, below, overlap_weight)) is grad
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # float32 logits near 500 have an ulp of 3e-5
    assert (grad.double() - expected).abs().max() < tolerance and expected.abs().max() > 0.3
    assert (grad.double().sum(-1).abs() < 10 * tolerance).all()  # a softmax gradient has no component along ones
    alone = ops.gradient_(logits.clone(), labels, lse, ce_weight)
    _, expected = oracle(logits, other, labels, ce_weight, torch.zeros(6))
    assert (alone.double() - expected).abs().max() < tolerance


def check_divergence(dtype, size):
    """KL, and the gradient of KL and CE, in float64 by autograd; equal distributions have no KL, and a -inf of the
    target counts nothing."""
    ops = operators()
    logits, other, labels = rows(dtype, size)
    logits[1, 5] = 0.0
    other[4, 9] = float("-inf")
    exact = logits.double().requires_grad_()
    p = other.double().softmax(-1)
    log_p = torch.where(p > 0, other.double().log_softmax(-1), 0.0)
    expected = (p * (log_p - exact.log_softmax(-1))).sum(-1)
    kl, lse, other_lse = ops.divergence(logits, other)
    assert torch.allclose(lse.double(), logits.double().logsumexp(-1), rtol=1e-6)
    assert torch.allclose(other_lse.double(), other.double().logsumexp(-1), rtol=1e-6)
    assert (kl.double() - expected).abs().max() < 2e-4 and expected.max() > 3  # float32 logits near 500
    assert abs(kl[3]) < 1e-5
    weights = torch.linspace(0, 1.5, 6)
    ce = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(0.7 * expected.sum() + (weights.double() * ce).sum(), exact)
    got = logits.clone()
    assert ops.divergence_gradient_(got, labels, lse, weights, (other, other_lse, 0.7)) is got
    assert (got.double() - gradient).abs().max() < (2e-4 if dtype == torch.float32 else 2e-2)


def check_small_divergence(size):
    """Two nearly equal distributions with large logits: the rounding of a log-sum-exp would be a tenth of their KL."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(64, size, generator=g) * 2 + 40
    other = logits + 0.01 * torch.randn(64, size, generator=g)
    log_p, log_q = other.double().log_softmax(-1), logits.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    got = operators().divergence(logits, other)[0].double()
    assert 1e-5 < expected.min() < expected.max() < 2e-4
    assert abs(got.mean() / expected.mean() - 1) < 2e-3 and (got / expected - 1).abs().max() < 3e-2


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_definition_against_autograd(dtype):
    check_against_autograd(dtype, 301)
    check_divergence(dtype, 301)
    check_small_divergence(512)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [301, 2048, 5000])
def test_kernels_against_autograd(dtype, size):
    check_against_autograd(dtype, size)
    check_divergence(dtype, size)
    check_small_divergence(size)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter process")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "kernels_against"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "6 passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.parametrize("size", [64 * 70, 64 * 70 + 1, 40])
@pytest.mark.parametrize("where", ["spread", "one tile"])
def test_top_k_is_exact(size, where):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(9, size, generator=g)
    if where == "one tile":
        logits[:, -30:] += 10  # all candidates share a tile
    values, ids = head_loss.top_k(logits, 16)
    expected = logits.sort(-1, descending=True)
    assert torch.equal(values, expected.values[:, :16]) and torch.equal(ids, expected.indices[:, :16])
    assert torch.equal(logits.gather(1, ids), values)
    coarse = (logits * 2).round().bfloat16()  # many ties: the values are still the largest, each id counts once
    values, ids = head_loss.top_k(coarse, 16)
    assert torch.equal(values, coarse.sort(-1, descending=True).values[:, :16])
    assert torch.equal(coarse.gather(1, ids), values) and all(len(set(row)) == 16 for row in ids.tolist())
