"""Positions, rotations and embeddings of a pass: definition, kernel in the interpreter, and its machine code."""

import pytest
import torch

from mimo_kernels import rows
from tests.kernels.triton_tools import compile_for_sm90, inside, needs_tools, outside, pass_in_the_interpreter, spills


def random_case(padded, count, columns=72, half=6, kinds=2, first=10, dtype=torch.float32):
    """Tokens 0..29 of an embedding that has those from `first` on."""
    g = torch.Generator().manual_seed(100 * padded + count + columns)
    table = torch.randn(kinds, 2, 50, half, generator=g).to(dtype)
    tokens = torch.randint(30, (count,), generator=g)
    embed = torch.randn(15, columns, generator=g).to(dtype)
    return (torch.tensor(17), padded, count, table), rows.Embedding(tokens, embed, first)


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@outside
def test_rows_are_what_the_definition_says():
    case, embedding = random_case(5, 3)
    begun = rows.begin(*case, embedding)
    assert begun.positions.tolist() == [17, 18, 19, 19, 19]
    for t, position in enumerate(begun.positions.tolist()):
        assert torch.equal(begun.rotations[:, :, t], case[3][:, :, position])
        token = int(embedding.tokens[min(t, 2)]) - 10
        expected = embedding.table[token] if 0 <= token < 15 else torch.zeros(72)
        assert torch.equal(begun.rows[t], expected)
    assert same(rows.begin(*case)[:2], begun[:2]) and rows.begin(*case).rows.numel() == 0


@outside
def test_refusals():
    (start, padded, count, table), embedding = random_case(5, 3)
    for message, call in {
        "padded: 2 rows, 3 of them real": lambda: rows.begin(start, 2, 3, table),
        "padded: 33 rows": lambda: rows.begin(start, 33, 3, table),
        "0 of them real": lambda: rows.begin(start, 4, 0, table),
        "start: torch.int32": lambda: rows.begin(start.int(), padded, count, table),
        r"start: torch.int64 \[1\]": lambda: rows.begin(start[None], padded, count, table),
        r"rotations: \[2, 50, 6\]": lambda: rows.begin(start, padded, count, table[0]),
        r"tokens: torch.int64 \[3\], expected torch.int64 \[2\]": lambda: rows.begin(start, 5, 2, table, embedding),
        r"table: \[72, 15\], expected contiguous": lambda: rows.begin(
            start, padded, count, table, embedding._replace(table=embedding.table.T)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@outside
def test_kernel_in_the_interpreter():
    pass_in_the_interpreter(__file__, 12)


@inside
@pytest.mark.parametrize("first", [0, 10, 20])
@pytest.mark.parametrize(("padded", "count"), [(1, 1), (8, 1), (8, 8), (17, 3)])
def test_rows(padded, count, first):
    from mimo_kernels import rows_triton

    for more in ({}, {"columns": 1032, "dtype": torch.bfloat16}, {"half": 32, "kinds": 3}):
        case, embedding = random_case(padded, count, first=first, **more)
        assert same(rows_triton.begin(*case, embedding), rows.reference(*case, embedding))
        assert same(rows_triton.begin(*case), rows.reference(*case))


@outside
@needs_tools
@pytest.mark.parametrize("columns", [0, 4096, 6144])
def test_machine_code(columns):
    """A thread has its 16 bytes of a row; nothing else is of a size that matters."""
    import mimo_kernels.rows_triton as rt

    pointers = dict.fromkeys(("POSITIONS", "START", "TOKENS"), "*i64")
    pointers |= dict.fromkeys(("ROTATED", "ROWS", "TABLE", "EMBED"), "*bf16")
    constants = {"H": columns, "HALF": 32, "COUNT": 4, "HALF_BLOCK": 32, "COUNT_BLOCK": 4, "BLOCK": 1024}
    code, registers, shared = compile_for_sm90(rt._begin_kernel, pointers, constants, 4, 3)
    ops = [op for _, op, _ in code]
    assert not spills(code) and registers <= 64 and not shared and len(code) <= 300
    assert columns == 0 or any(op.startswith("LDG.E.128") for op in ops)
