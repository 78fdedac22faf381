"""Positions, rotations and embeddings of a pass, compiled: the bits of the definition, also replayed as a graph."""

import pytest
import torch

from mimo_kernels import rows
from tests.kernels.test_rows import random_case, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs a CUDA device of compute capability 9",
    ),
]


def on_gpu(case, embedding):
    start, padded, count, table = case
    return (start.cuda(), padded, count, table.cuda()), rows.Embedding(
        embedding.tokens.cuda(), embedding.table.cuda(), embedding.first
    )


@pytest.mark.parametrize("columns", [72, 4096, 6144])
@pytest.mark.parametrize(("padded", "count"), [(1, 1), (8, 1), (8, 8), (16, 3)])
def test_rows(padded, count, columns):
    for first in (0, 10, 20):
        case, embedding = on_gpu(*random_case(padded, count, columns, half=32, first=first, dtype=torch.bfloat16))
        assert same(rows.begin(*case, embedding), rows.reference(*case, embedding))
        assert same(rows.begin(*case), rows.reference(*case))


def test_a_graph_reads_the_position_of_its_replay():
    case, embedding = on_gpu(*random_case(8, 3, 4096, dtype=torch.bfloat16))
    rows.begin(*case, embedding)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        begun = rows.begin(*case, embedding)
    for position in (0, 5, 40):
        case[0].fill_(position)
        embedding.tokens.copy_(torch.tensor([position % 30, 12, 24]))
        graph.replay()
        assert same(begun, rows.reference(*case, embedding))
