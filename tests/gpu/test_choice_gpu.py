"""Greedy choice and acceptance, compiled: against the definitions, which are exact, also replayed as a graph."""

import pytest
import torch

from mimo_kernels import choice
from tests.kernels.test_choice import ROWS, copy, text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 4097, 38144, 152576])
def test_best_is_argmax(columns, dtype):
    """Of coarse logits, so that most rows have several maxima, in four shares too."""
    g = torch.Generator("cuda").manual_seed(columns)
    for rows in (1, 8, 16):
        logits = (torch.randn(rows, columns, device="cuda", generator=g) * 4).round().to(dtype)
        logits[0, columns // 2] = float("nan")
        assert torch.equal(choice.tokens(choice.Best(choice.best(logits))), logits.argmax(-1))
        shares = logits.tensor_split(4, dim=-1)
        first = [0, *torch.tensor([s.shape[1] for s in shares]).cumsum(0).tolist()]
        for limit in (None, columns - columns // 5):
            pairs = torch.cat([choice.best(s, at, limit) for s, at in zip(shares, first[:4], strict=True)], dim=-1)
            assert torch.equal(choice.tokens(choice.Best(pairs)), logits[:, :limit].argmax(-1))


@pytest.mark.parametrize("kind", ROWS)
def test_ties_and_what_is_no_number(kind):
    row = torch.tensor([ROWS[kind]], device="cuda")
    assert torch.equal(choice.best(row, 3), choice.best_reference(row, 3))


def test_accept_in_a_graph():
    """The same launch over and over, each from what the one before it left, of tokens and of pairs."""
    g = torch.Generator().manual_seed(0)
    for rows in (1, 8, 16):
        own, drafts = (torch.zeros(n, dtype=torch.int64, device="cuda") for n in (rows, rows - 1))
        pairs = choice.best_reference(torch.zeros(rows, 1), 0).repeat(1, 40).cuda()  # token 0, 40 times
        states = [choice.Text(*(t.cuda() for t in text((3,), 500, rows))) for _ in range(3)]
        graph = torch.cuda.CUDAGraph()
        before = [copy(state) for state in states]
        choice.accept(states[1], drafts, own)
        choice.accept(states[2], drafts, choice.Best(pairs))
        with torch.cuda.graph(graph):
            choice.accept(states[1], drafts, own)
            choice.accept(states[2], drafts, choice.Best(pairs))
        for state, old in zip(states, before, strict=True):
            for tensor, value in zip(state, old, strict=True):
                tensor.copy_(value)
        for _ in range(40):
            logits = torch.randn(rows, 40, generator=g).cuda()
            own.copy_(logits.argmax(-1))
            drafts.copy_(torch.where(torch.rand(rows - 1, generator=g).cuda() < 0.8, own[:-1], own[:-1] + 1))
            column = torch.cat([choice.best_reference(logits[:, i : i + 1], i) for i in range(40)], dim=-1)
            pairs.copy_(column)
            choice.accept_reference(states[0], drafts, own)
            graph.replay()
            for name, *values in zip(choice.Text._fields, *states, strict=True):
                assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2]), name
