"""`mimo_qat.graphs` without a GPU: its streams and graphs are stand-ins that play the function at once."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from mimo_qat import graphs


@pytest.fixture
def streams(monkeypatch):
    """The streams that were made; a graph that is replayed calls nothing."""
    made = []

    class Stream:
        def __init__(self, device=None):
            made.append(self)

        def wait_stream(self, other):
            pass

    main = Stream()
    made.clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())
    return made


def test_all_graphs_warm_up_on_one_stream(streams):
    """Libraries keep a workspace of some 30 MB for each stream that they have seen: a server that captures again and
    again must not use up a stream each time."""
    for _ in range(5):
        graphs.Graph(lambda: None, ())
    assert len(streams) <= 1


def test_inputs_of_another_shape_are_refused(streams):
    """One row would be copied into all of the captured ones, and nobody would notice."""
    graph = graphs.Graph(lambda x: x + 1, (torch.zeros(4, 8),))
    graph(torch.ones(4, 8))
    assert torch.equal(graph.inputs[0], torch.ones(4, 8))
    for other in (torch.ones(1, 8), torch.ones(8), torch.ones(4, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"captured for torch.float32 \[4, 8\]"):
            graph(other)
