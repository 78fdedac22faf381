"""What a pass needs before its first layer: the rows' positions, their rotations, their embeddings, in one launch.

Row t of T stands at position start + min(t, count - 1): those beyond `count` are padding, which repeats the last row.
`reference` is the definition, and exact: it moves values and computes none. `begin` runs a Triton kernel
(`rows_triton`) on a GPU of compute capability 9 or more, the reference elsewhere.

Letters: T rows, H hidden size, L positions of a table, R/2 values of a rotation, n rotations.
"""

from typing import NamedTuple

import torch

MAX_ROWS = 32


class Embedding(NamedTuple):
    """Where the rows come from: `tokens` int64 [count], and `table` [V, H] of the tokens first, first + 1, ..."""

    tokens: torch.Tensor
    table: torch.Tensor
    first: int = 0


class Begun(NamedTuple):
    """positions int64 [T]; rotations [n, 2, T, R/2], cosines first; rows [T, H], or empty without an embedding."""

    positions: torch.Tensor
    rotations: torch.Tensor
    rows: torch.Tensor


@torch.no_grad()
def reference(
    start: torch.Tensor, padded: int, count: int, rotations: torch.Tensor, embedding: Embedding | None = None
) -> Begun:
    """See `begin`."""
    place = torch.arange(padded, device=rotations.device).clamp_(max=count - 1)
    positions = start + place
    rows = rotations.new_empty(0)
    if embedding is not None:
        token = embedding.tokens[place] - embedding.first
        mine = (token >= 0) & (token < len(embedding.table))
        rows = embedding.table[token.masked_fill(~mine, 0)].masked_fill(~mine[:, None], 0)
    return Begun(positions, rotations.index_select(2, positions), rows)


@torch.no_grad()
def begin(
    start: torch.Tensor, padded: int, count: int, rotations: torch.Tensor, embedding: Embedding | None = None
) -> Begun:
    """The `padded` <= 32 rows of a pass, of which `count` are real, from position `start` int64 [] on.

    `rotations` [n, 2, L, R/2] is a table of L positions; the last one needed is below L, which is not checked on a GPU,
    where nothing waits for the host. Rows of tokens outside of the embedding's share are zero. ValueError for other
    shapes and dtypes.
    """
    _check(start, padded, count, rotations, embedding)
    if start.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(start.device)[0] >= 9:
        from . import rows_triton

        return rows_triton.begin(start, padded, count, rotations, embedding)
    return reference(start, padded, count, rotations, embedding)


def _check(start: torch.Tensor, padded: int, count: int, rotations: torch.Tensor, embedding: Embedding | None) -> None:
    if not 1 <= count <= padded <= MAX_ROWS:
        raise ValueError(f"padded: {padded} rows, {count} of them real; give 1 to {MAX_ROWS}, some real")
    if start.dtype != torch.int64 or start.ndim:
        raise ValueError(f"start: {start.dtype} {list(start.shape)}, expected torch.int64 []")
    if rotations.ndim != 4 or rotations.shape[1] != 2 or not rotations.is_contiguous():
        raise ValueError(f"rotations: {list(rotations.shape)}, expected contiguous [n, 2, positions, values]")
    if embedding is None:
        return
    tokens, table, _ = embedding
    if tokens.dtype != torch.int64 or tokens.shape != (count,):
        raise ValueError(f"tokens: {tokens.dtype} {list(tokens.shape)}, expected torch.int64 [{count}]")
    if table.ndim != 2 or not table.is_contiguous():
        raise ValueError(f"table: {list(table.shape)}, expected contiguous [tokens, columns]")
