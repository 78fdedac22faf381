"""A pass of fixed shapes as one CUDA graph: hundreds of small launches become one."""

from collections.abc import Callable
from typing import Any

import torch


class Graph:
    """`function(*inputs)` captured once on its first inputs; a call copies new values in and replays it.

    The function may write caches, but it must not wait for the device, and what it returns is overwritten by the next
    call. It runs twice before the capture, with the same inputs: its writes have to be idempotent. Graphs that return
    nothing and never run at once may share the memory `pool` of one of them.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], pool: Any = None):
        self.inputs = tuple(t.clone() for t in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate their workspaces on a first call, which no graph may do
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.outputs
