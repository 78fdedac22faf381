"""Statistics of accepted drafts: by hand, and the copier against a search of the whole text."""

import pytest
import torch

from mimo_qat.drafting import bootstrap_interval, distinct_3, lookup_rounds, mean_rounds, survival

SIZE = 6


def test_lookup_by_hand():
    # "1 2 3 1 2 3 1 2 3": after the first generated token (1) the lookup knows the rest of the cycle.
    assert lookup_rounds([1, 2, 3], [1, 2, 3, 1, 2, 3], 4) == [4]
    assert lookup_rounds([1, 2, 3], [1, 2, 3, 1, 2, 3], 3) == [3]
    assert lookup_rounds([7], [1, 2, 3], 4) == [1, 1]
    assert lookup_rounds([5, 9], [5, 8, 4], 4) == [1, 1]  # proposes 9 after 5, which is wrong
    # After 7 5 the copier proposes what followed the first 5: 6 6 6, of which two are right.
    assert lookup_rounds([5, 6, 6, 6], [7, 5, 6, 6, 9, 9, 9, 9], 4)[:2] == [1, 3]


def test_lookup_equals_a_search_of_the_whole_text():
    generator = torch.Generator().manual_seed(0)
    prompt, tokens = (torch.randint(0, 4, (n,), generator=generator).tolist() for n in (20, 150))
    text, at, expected = prompt + tokens, 21, []
    while at < len(text):
        proposal: list[int] = []
        for n in (3, 2, 1):
            ends = [e for e in range(n, at) if text[e - n : e] == text[at - n : at]]
            if ends:
                proposal = text[ends[-1] : at][: SIZE - 1]
                break
        right = 0
        while right < len(proposal) and text[at + right : at + right + 1] == [proposal[right]]:
            right += 1
        if at + right < len(text):
            expected.append(right + 1)
        at += right + 1
    assert lookup_rounds(prompt, tokens, SIZE) == expected and max(expected) > 2


def test_pooling_survival_and_repetition_by_hand():
    assert mean_rounds([[1, 1, 1, 1], [4]]) == 8 / 5 and mean_rounds([[]]) == 1.0
    low, high = bootstrap_interval([[1, 1, 1, 1], [4], [2, 2], []])
    assert 1.0 <= low < 12 / 7 < high <= 4.0
    shares, hits = survival([[4, 1], [2, 4, 4], []], 4)  # 5 rounds: 3, 0, 1, 3 and 3 drafts
    assert shares == [0.8, 0.6, 0.6] and hits == [0.8, pytest.approx(0.75), pytest.approx(1.0)]
    assert survival([[1, 1]], 3) == ([0.0, 0.0], [0.0, None])
    assert distinct_3([1, 2, 3, 1, 2, 3, 1]) == 3 / 5 and distinct_3([1]) == 1.0
