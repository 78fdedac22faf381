"""Anchors, labels, supervision, positions and the mask rule, against brute force and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_qat.distill.blocks import (
    Blocks,
    block_sparse_mask,
    blocks_at,
    dense_mask,
    make_blocks,
    mask_rule,
    mask_tiles,
    sample_anchors,
    valid_anchors,
)


def packed(lengths, padding=0, supervised=None):
    """One row of documents of the given lengths; token ids are the stream 0, 1, 2, ..."""
    doc_ids = [n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    positions = [i for length in (*lengths, padding) for i in range(length)]
    total = len(doc_ids)
    loss_mask = [1] * (total - padding) + [0] * padding if supervised is None else supervised
    row = {
        "input_ids": list(range(total)),
        "loss_mask": loss_mask,
        "doc_ids": doc_ids,
        "position_ids": positions,
    }
    return {name: torch.tensor([values]) for name, values in row.items()}


def at(batch, anchors, block_size, valid=None):
    anchors = torch.tensor([anchors])
    valid = torch.ones_like(anchors, dtype=torch.bool) if valid is None else torch.tensor([valid])
    return blocks_at(batch, anchors, valid, block_size)


def mask_by_hand(blocks: Blocks, doc_ids, size, window, causal):
    """The rule as four nested loops."""
    rows, count = blocks.anchors.shape
    length = doc_ids.shape[1]
    out = torch.zeros(rows, count * size, length + count * size, dtype=torch.bool)
    for b in range(rows):
        for j in range(count):
            a, doc = int(blocks.anchors[b, j]), doc_ids[b]
            for o in range(size):
                for kv in range(length):
                    in_window = window is None or a + o - kv < window
                    same = bool(doc[kv] == doc[a])
                    out[b, j * size + o, kv] = bool(blocks.valid[b, j]) and kv < a and same and in_window
                for other in range(size):
                    out[b, j * size + o, length + j * size + other] = not causal or other <= o
    return out


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_mask_equals_brute_force(data):
    size = data.draw(st.integers(2, 4), label="block")
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3), label="documents")
    batch = packed(lengths, padding=data.draw(st.integers(0, 3), label="padding"))
    total = batch["input_ids"].shape[1]
    count = data.draw(st.integers(1, 4), label="anchors")
    anchors = data.draw(st.lists(st.integers(0, total - 1), min_size=count, max_size=count))
    valid = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    window = data.draw(st.one_of(st.none(), st.integers(size, 7)), label="window")
    causal = data.draw(st.booleans(), label="causal")
    blocks = at(batch, anchors, size, valid)
    got = dense_mask(blocks, size, (window, causal))[:, 0]
    expected = mask_by_hand(blocks, batch["doc_ids"], size, window, causal)
    different = (got != expected).nonzero()
    assert len(different) == 0, f"first difference at [row, query, key] {different[0].tolist()}"
    assert got.any(-1).all(), "a softmax row is empty"


def test_labels_on_the_stream_of_numbers():
    blocks = at(packed([20]), [3, 11], block_size=5)
    assert blocks.labels.tolist() == [[[4, 5, 6, 7], [12, 13, 14, 15]]]
    assert blocks.supervised.all()


def test_supervision_stops_at_the_row_end_at_a_document_and_at_an_unsupervised_token():
    mask = [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    batch = packed([9, 3], supervised=mask)
    blocks = at(batch, [2, 6, 10], block_size=5)
    assert blocks.supervised.int().tolist() == [
        [
            [1, 0, 0, 0],  # token 4 is unsupervised; 5 and 6 are, but a drafter cannot know 4
            [1, 1, 0, 0],  # token 9 belongs to the second document
            [1, 0, 0, 0],  # the row ends at 11
        ]
    ]


def test_positions_restart_with_the_document():
    blocks = at(packed([4, 5]), [2, 6], block_size=3)
    assert blocks.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, *(2, 3, 4), *(2, 3, 4)]]


def test_valid_anchors_reach_the_last_token_but_one_of_an_answer():
    mask = [0, 0, 1, 1, 1, 0, 1, 0, 1, 1]
    batch = packed([9, 1], supervised=mask)
    valid = valid_anchors(batch["loss_mask"], batch["doc_ids"])
    assert valid[0].nonzero()[:, 0].tolist() == [2, 3]  # 6 has no supervised successor, 8|9 is a document border
    tail = packed([30])
    assert valid_anchors(tail["loss_mask"], tail["doc_ids"])[0].nonzero()[-1].item() == 28


def test_anchors_are_uniform_over_the_valid_and_without_replacement():
    batch = packed([12, 20], padding=8)
    valid = valid_anchors(batch["loss_mask"], batch["doc_ids"])[0]
    hits, draws, n = torch.zeros(40), 3000, 6
    for seed in range(draws):
        anchors, good = sample_anchors(batch["loss_mask"], batch["doc_ids"], n, torch.Generator().manual_seed(seed))
        assert good.all() and anchors.unique().numel() == n and (anchors.diff() > 0).all()
        hits[anchors[0]] += 1
    assert (hits[~valid] == 0).all()
    expected = draws * n / valid.sum()
    spread = (expected * (1 - n / valid.sum())) ** 0.5
    assert ((hits[valid] - expected).abs() < 5 * spread).all()


def test_a_row_with_few_valid_positions_fills_up_with_invalid_blocks():
    batch = packed([10], supervised=[0] * 6 + [1] * 4)
    anchors, valid = sample_anchors(batch["loss_mask"], batch["doc_ids"], 5, torch.Generator().manual_seed(0))
    assert anchors.tolist() == [[6, 7, 8, 0, 0]] and valid.tolist() == [[True, True, True, False, False]]
    nothing = {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}
    blocks = make_blocks(nothing, 4, 5)
    assert not blocks.valid.any() and not blocks.supervised.any()


def test_rows_do_not_share_anchors_and_a_long_row_does_not_starve_a_short_one():
    short, long = packed([30], supervised=[0] * 24 + [1] * 6), packed([30])
    both = {name: torch.cat((short[name], long[name])) for name in short}
    _, valid = sample_anchors(both["loss_mask"], both["doc_ids"], 5, torch.Generator().manual_seed(1))
    assert valid.all()


def test_no_more_anchors_than_tokens():
    assert make_blocks(packed([6]), 4, 100).anchors.shape == (1, 6)


@pytest.mark.parametrize("window, first", [(4, 7), (None, 0)])
def test_the_window_counts_from_the_query_and_not_from_the_anchor(window, first):
    mask = dense_mask(at(packed([20]), [10], 3), 3, (window, False))[0, 0, :, :20]
    for offset in range(3):
        seen = mask[offset].nonzero()[:, 0].tolist()
        assert seen == list(range(first + offset if window else 0, 10))


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_sparse_tiles_are_those_of_the_rule(window, causal):
    """Against torch's own construction, which evaluates the rule at every query and key."""
    from torch.nn.attention.flex_attention import create_block_mask

    size, batch = 16, packed([300, 200, 60], padding=80)
    short = packed([640], supervised=[0] * 600 + [1] * 40)
    batch = {name: torch.cat((batch[name], short[name])) for name in batch}
    blocks = make_blocks(batch, size, 48, torch.Generator().manual_seed(0))
    assert blocks.valid[0].all() and not blocks.valid[1].all()
    rule = (window, causal)
    expected = create_block_mask(mask_rule(blocks, size, rule), 2, None, 48 * size, 640 + 48 * size, device="cpu")
    got = block_sparse_mask(blocks, size, rule)
    dense = dense_mask(blocks, size, rule)[:, 0].unflatten(1, (-1, 128)).unflatten(3, (-1, 128))
    some, every = dense.any(4).any(2), dense.all(4).all(2)
    partial, full = mask_tiles(blocks, size, rule)
    assert torch.equal(partial, some & ~every) and torch.equal(full, every) and full.any() == (window != 40)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        for b in range(2):
            for tile, number in enumerate(getattr(got, f"{name}_num_blocks")[b, 0].tolist()):
                indices = [getattr(m, f"{name}_indices")[b, 0, tile, :number].tolist() for m in (got, expected)]
                assert indices[0] == indices[1], (name, b, tile)
    assert got.seq_lengths == expected.seq_lengths
