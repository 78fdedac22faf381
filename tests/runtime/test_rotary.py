"""Rotations from a table: the formula's bits, whatever asks for them."""

from types import SimpleNamespace

import pytest
import torch

from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.engine import Engine
from mimo_runtime.model import Rows
from mimo_runtime.rotary import Rotations, rotation

KINDS = [(5e6, 64), (1e4, 64), (1e4, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_has_the_bits_of_the_formula(dtype):
    """Of one position, of a block of them, in any order; kinds may come twice and have several sizes."""
    length = 3000
    table = Rotations.of(KINDS + KINDS[:1], length, torch.zeros(1, dtype=dtype))
    for positions in ([0], [length - 1], range(1000, 1008), [5, 5, 5, 2, 900, 901]):
        at = torch.tensor(list(positions))
        rows = table.rows(at)
        assert list(rows) and set(rows) == set(KINDS)
        for kind in KINDS:
            for actual, expected in zip(rows[kind], rotation(at, kind, dtype), strict=True):
                assert actual.dtype == dtype and torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
                assert actual.is_contiguous() and actual.shape == (len(at), kind[1] // 2)


def test_the_formula_is_that_of_double_precision():
    """Within the float32 error of an angle of so many radians."""
    at = torch.tensor([0, 1, 77, 2047])
    angles = at[:, None].double() * 1e4 ** (-torch.arange(0, 64, 2).double() / 64)
    for actual, expected in zip(rotation(at, (1e4, 64), torch.float32), (angles.cos(), angles.sin()), strict=True):
        assert (actual - expected).abs().max() < 2047 * 2**-22


def test_an_engine_has_every_position_that_it_asks_for(release):
    """The last round of a text that fills `max_len` has rows behind it."""
    engine = Engine(release, EngineConfig(device="cpu", max_len=40))
    table = engine.target.rotations
    assert table is not None and table is engine.drafter.rotations
    assert len(table.rows(torch.tensor([40 + engine.block - 1]))) >= 2
    out = engine.generate([5, 7, 9], SamplingConfig(max_new_tokens=37))
    assert len(out.tokens) == 37 or out.finish == "stop"


@pytest.mark.parametrize("padded", [3, 8, 40])
def test_rows_are_the_same_with_and_without_a_table(padded):
    """In one launch, in single operations, and by the formula; with a kind of another size there is no one launch."""
    start, x = torch.tensor(20), torch.zeros(1, dtype=torch.bfloat16)
    formula = Rows(start, padded, x, count=3)
    for kinds in (KINDS[:2], KINDS):
        rows = Rows(start, padded, x, count=3, rotations=Rotations.of(kinds, 100, x))
        assert torch.equal(rows.positions, formula.positions)
        assert rows.positions.tolist() == [20, 21] + [22] * (padded - 2)
        for theta, dim in kinds:
            g = SimpleNamespace(rope_theta=theta, rotary_dim=dim)
            assert all(torch.equal(a, b) for a, b in zip(rows.rotation(g), formula.rotation(g), strict=True))
