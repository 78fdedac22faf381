"""Rotary embeddings: the cosines and sines of positions, by their formula or from a table of an engine."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

Kind = tuple[float, int]  # (theta, how many elements of a head are rotated)
Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [T, dim / 2]


def rotation(positions: torch.Tensor, kind: Kind, dtype: torch.dtype) -> Rotation:
    """cos and sin of `positions` [T]: angles in float32, then `dtype`."""
    theta, dim = kind
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions[:, None].float() * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass(frozen=True)
class Rotations:
    """`rotation` of all positions below a length, for the kinds that the layers of a model and of its drafter have.

    groups: for each dim its kinds and their values [kinds, 2, length, dim / 2], cosines first. A pass gathers its rows
    in one operation for each dim, all thetas together, where the formula takes a dozen for each theta; the values are
    the same bits. Memory: length * dim values a theta, 32 MB for 262,144 positions and a dim of 64 in bfloat16.
    """

    groups: tuple[tuple[tuple[Kind, ...], torch.Tensor], ...]

    @classmethod
    def of(cls, kinds: Iterable[Kind], length: int, like: torch.Tensor) -> "Rotations":
        """The table of positions 0..length-1; `like` gives device and dtype."""
        positions = torch.arange(length, device=like.device)
        by_dim: dict[int, list[Kind]] = {}
        for kind in dict.fromkeys(kinds):
            by_dim.setdefault(kind[1], []).append(kind)
        groups = []
        for dim, mine in by_dim.items():
            table = torch.empty(len(mine), 2, length, dim // 2, dtype=like.dtype, device=like.device)
            for parts, kind in zip(table, mine, strict=True):
                for part, values in zip(parts, rotation(positions, kind, like.dtype), strict=True):
                    part.copy_(values)
            groups.append((tuple(mine), table))
        return cls(tuple(groups))

    def rows(self, positions: torch.Tensor) -> dict[Kind, Rotation]:
        """`rotation` of `positions` [T], each below the length, for every kind."""
        found: dict[Kind, Rotation] = {}
        for kinds, table in self.groups:
            values = table.index_select(2, positions)
            found |= {kind: (values[i, 0], values[i, 1]) for i, kind in enumerate(kinds)}
        return found
