"""Which rows of a prompt are computed at once.

A pass of many rows is some thousand launches, for which a host takes 140 ms and more, however few the rows are. So a
short prompt is padded to one of a few sizes, whose pass can be a CUDA graph; a long one is cut into chunks, which keep
a GPU busy for about as long as its host.
"""

from collections.abc import Iterator

from mimo_qat.plan_runtime import MOST_PADDED, PADDED_SCORES, prefill_rows
from mimo_runtime.load import Moe, Target
from mimo_runtime.model import without_host

CHUNKS = {"cuda": 2048, "cpu": 256}
LEAST_PADDED = 64


def most_heads(target: Target) -> int:
    """Query heads of the layer of this rank that has most."""
    return max(layer.attention.geometry.heads for layer in target.layers)


def chunks(start: int, end: int, chunk: int, heads: int) -> Iterator[slice]:
    """Positions start..end-1 in parts of up to `chunk`, which `heads` heads attend from."""
    while start < end:
        stop = min(end, start + prefill_rows(start, chunk, heads))
        yield slice(start, stop)
        start = stop


def padded_sizes(target: Target, chunk: int, max_len: int, verified: int) -> list[int]:
    """Rows, ascending, to which a GPU pads prompts: powers of two that fit a chunk and the caches, that have more rows
    than the `verified` ones of a round, and that are computed without the host."""
    if not target.embed.is_cuda:
        return []
    moes = [layer.mlp for layer in target.layers if isinstance(layer.mlp, Moe)]
    heads, most = most_heads(target), min(MOST_PADDED, chunk, max_len)
    sizes = [n for n in (2**i for i in range(32)) if max(LEAST_PADDED, verified + 1) <= n <= most]
    return [n for n in sizes if heads * n * n <= PADDED_SCORES and all(without_host(moe, n) for moe in moes)]
