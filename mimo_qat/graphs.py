"""A pass of fixed shapes as one CUDA graph: hundreds of small launches become one."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def _aside(device: int) -> torch.cuda.Stream:
    """Where all graphs of a device warm up: cuBLAS keeps a workspace of some 30 MB for each stream that it has seen."""
    return torch.cuda.Stream(device)


class Graph:
    """`function(*inputs)` captured once on its first inputs; a call copies new values in and replays it.

    The function may write caches, but it must not wait for the device, and what it returns is overwritten by the next
    call. It runs twice before the capture, with the same inputs: its writes have to be idempotent. Graphs may share the
    memory `pool` of one of them where none runs before what another has returned was used.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], pool: Any = None):
        self.inputs = tuple(t.clone() for t in inputs)
        aside = _aside(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate their workspaces on a first call, which no graph may do
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """ValueError for inputs of another shape or dtype, which a copy would repeat or round in silence."""
        for mine, new in zip(self.inputs, inputs, strict=True):
            if new.shape != mine.shape or new.dtype != mine.dtype:
                raise ValueError(
                    f"a graph captured for {mine.dtype} {list(mine.shape)} got {new.dtype} {list(new.shape)}; "
                    "call its function, or capture another"
                )
            mine.copy_(new)
        self.graph.replay()
        return self.outputs
