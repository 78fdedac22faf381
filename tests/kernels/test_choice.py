"""Greedy choice and acceptance: definitions, kernels in Triton's interpreter, and the machine code that they become."""

import random

import pytest
import torch

from mimo_kernels import choice
from tests.kernels.triton_tools import compile_for_sm90, inside, needs_tools, outside, pass_in_the_interpreter, spills

INF, NAN = float("inf"), float("nan")
ROWS = {
    "ties": [1.0, 3.0, 3.0, -2.0, 3.0],
    "negative": [-3.0, -1.0, -1.0, -INF, -7.0],
    "zeros": [-1.0, -0.0, 0.0, -0.0, -1.0],
    "infinities": [-INF, INF, 5.0, INF, 3e38],
    "NaN": [INF, -NAN, NAN, 1.0, 2.0],
    "nothing": [-INF] * 5,
    "subnormal": [0.0, -1e-40, 1e-40, 2e-40, 2e-40],
}


def random_logits(rows, columns, dtype=torch.bfloat16):
    """Coarse enough that a row has many maxima."""
    g = torch.Generator().manual_seed(rows * columns)
    return (torch.randn(rows, columns, generator=g) * 4).round().to(dtype)


def text(stops=(), left=20, rows=4, vocabulary=40, slots=3):
    flags = torch.zeros(vocabulary, dtype=torch.bool)
    flags[list(stops)] = True
    numbers = torch.tensor([7]), torch.tensor(30), torch.tensor(left), torch.tensor(2)
    record = torch.full((3 + rows + 1,), -5)
    return choice.Text(*numbers, flags, record, torch.full((slots, len(record)), -5), torch.tensor(slots - 1))


def copy(state):
    return choice.Text(*(t.clone() for t in state))


# ---- the definitions


@outside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_largest_pair_of_all_shares_is_argmax(ranks, dtype):
    """With a limit inside of a share and with one that leaves whole shares out."""
    logits = random_logits(9, 64, dtype)
    logits[3, 40:50], logits[4], logits[5, 3] = NAN, -INF, INF
    for limit in (None, 64, 60, 33, 5):
        shares = logits.chunk(ranks, dim=-1)
        found = [choice.best(share, r * 64 // ranks, limit) for r, share in enumerate(shares)]
        assert torch.equal(choice.tokens(choice.Best(torch.cat(found, dim=-1))), logits[:, :limit].argmax(-1))


@outside
@pytest.mark.parametrize("kind", ROWS)
def test_ties_and_what_is_no_number(kind):
    row = torch.tensor([ROWS[kind]])
    for split in range(1, 5):
        pairs = torch.cat((choice.best(row[:, :split]), choice.best(row[:, split:], split)), dim=-1)
        assert choice.tokens(choice.Best(pairs)).tolist() == row.argmax(-1).tolist()


@outside
def test_refusals():
    state = text()
    drafts, own = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    for message, call in {
        r"logits: torch.float64 \[2, 3\]": lambda: choice.best(torch.zeros(2, 3, dtype=torch.float64)),
        r"logits: torch.float32 \[3\]": lambda: choice.best(torch.zeros(3)),
        r"logits: torch.float32 \[2, 0\]": lambda: choice.best(torch.zeros(2, 0)),
        "first: -1": lambda: choice.best(torch.zeros(2, 3), -1),
        "more than 31 bits": lambda: choice.best(torch.zeros(2, 3), 2**31 - 2),
        r"drafts: torch.int64 \[3\], own: torch.int64 \[3\]": lambda: choice.accept(state, drafts, own[:3]),
        "drafts: torch.int32": lambda: choice.accept(state, drafts.int(), own),
        r"record: \[6\]": lambda: choice.accept(state._replace(record=state.record[:6]), drafts, own),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@outside
def test_acceptance_of_a_chain():
    """Committed, accepted, left; then the number of the next slot, the anchor, position and turns."""
    for stops, left, drafts, expected in (
        ((), 20, [1, 2, 3], [4, 3, 16, 4, 34, 3]),
        ((), 20, [1, 9, 3], [2, 1, 18, 2, 32, 3]),
        ((), 20, [9, 2, 3], [1, 0, 19, 1, 31, 3]),
        ((), 3, [1, 2, 3], [3, 3, 0, 3, 33, 3]),
        ((2,), 20, [1, 2, 3], [2, 3, 0, 2, 32, 3]),
        ((4,), 20, [1, 2, 9], [3, 2, 17, 3, 33, 3]),
        ((1,), 0, [1, 2, 3], [0, 3, 0, 7, 30, 2]),
    ):
        state = text(stops, left)
        choice.accept(state, torch.tensor(drafts), torch.tensor([1, 2, 3, 4]))
        assert [*state.record[:3].tolist(), int(state.anchor), int(state.position), int(state.turn)] == expected
        assert int(state.left) == expected[2] and int(state.slot) == 0
        assert state.records[2].tolist() == state.record.tolist() == [*expected[:3], 1, 2, 3, 4, -5]
        assert (state.records[:2] == -5).all()


# ---- the kernels in the interpreter


@outside
def test_kernels_in_the_interpreter():
    pass_in_the_interpreter(__file__, 22)


@pytest.fixture
def kernels():
    from mimo_kernels import choice_triton

    return choice_triton


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 4096, 4097, 9001])
def test_best(kernels, columns, dtype):
    """The maximum over the parts is the definition's, also of a view and with a limit."""
    logits = random_logits(5, columns, dtype)
    for limit in (None, 100 + columns - 2, 103, 90):
        expected = choice.best_reference(logits, 100, limit)
        assert torch.equal(kernels.best(logits, 100, limit).amax(-1, keepdim=True), expected)
        assert torch.equal(kernels.best(logits[1:3], 100, limit).amax(-1, keepdim=True), expected[1:3])
        assert torch.equal(kernels.best(logits.T.contiguous().T, 100, limit).amax(-1, keepdim=True), expected)


@inside
@pytest.mark.parametrize("kind", ROWS)
def test_pairs_of_ties_and_what_is_no_number(kernels, kind):
    row = torch.tensor([ROWS[kind]] * 2)
    assert torch.equal(kernels.best(row, 3), choice.best_reference(row, 3))


@inside
@pytest.mark.parametrize("seed", range(7))
def test_accept(kernels, seed):
    """Random drafts, stop tokens and budgets, of tokens and of pairs of several parts: every tensor as by torch."""
    rng = random.Random(seed)
    for _ in range(12):
        rows, vocabulary = rng.randint(1, 17), rng.choice((4, 40))
        own = torch.tensor([rng.randrange(vocabulary) for _ in range(rows)])
        drafts = torch.where(torch.rand(rows - 1) < 0.8, own[:-1], own[:-1] + 1)
        state = text(rng.sample(range(vocabulary), rng.randint(0, 2)), rng.randint(0, 20), rows, vocabulary)
        expected, packed = copy(state), copy(state)
        choice.accept_reference(expected, drafts, own)
        kernels.accept(state, drafts, own)
        logits = torch.zeros(rows, vocabulary)
        logits[torch.arange(rows), own] = 1.0
        pairs = torch.cat([choice.best_reference(part, 4 * i) for i, part in enumerate(logits.split(4, dim=-1))], -1)
        kernels.accept(packed, drafts, choice.Best(pairs))
        for name, *values in zip(choice.Text._fields, expected, state, packed, strict=True):
            assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2]), name


# ---- the machine code


@outside
@needs_tools
def test_machine_code_of_the_choice():
    """Loads of 16 bytes, all under way before the first is waited for, and no spills."""
    import mimo_kernels.choice_triton as ct

    code, registers, shared = compile_for_sm90(
        ct._best_kernel, {"PAIRS": "*i64", "LOGITS": "*bf16"}, {"COLUMNS": 38144, "BLOCK": 4096}, 4, 3
    )
    ops = [op for _, op, _ in code]
    assert sum(op.startswith("LDG.E.128") for op in ops) == 4
    assert not spills(code) and registers <= 128 and shared <= 256


@outside
@needs_tools
@pytest.mark.parametrize("parts", [0, 1, 40])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_machine_code_of_acceptance(rows, parts):
    import mimo_kernels.choice_triton as ct

    pointers = dict.fromkeys(
        ("ANCHOR", "POSITION", "LEFT", "TURN", "RECORD", "RECORDS", "SLOT", "OWN", "DRAFTS"), "*i64"
    ) | {"STOPS": "*u8"}
    constants = {"ROWS": rows, "PARTS": 1 << (parts - 1).bit_length() if parts else 0}
    code, registers, shared = compile_for_sm90(ct._accept_kernel, pointers, constants, 1, 3)
    assert not spills(code) and registers <= 255 and shared <= 4096
    ops = [op for _, op, _ in code]
    reads = [i for i, op in enumerate(ops) if op.startswith("LDG")]
    writes = [i for i, op in enumerate(ops) if op.startswith("STG")]
    assert reads[-1] < writes[0]  # the state is read before any of it is written
