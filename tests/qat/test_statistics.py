"""Paired statistics against closed forms, hand-worked numbers and scipy where it is installed."""

import math

import numpy as np
import pytest

from mimo_qat import statistics


def test_weights_are_draws_with_replacement():
    weights = statistics.resamples(5, draws=4000, seed=1)
    assert weights.shape == (4000, 5) and (weights.sum(1) == 5).all()
    assert weights.mean(0) == pytest.approx(np.ones(5), abs=0.06)
    assert weights.var(0) == pytest.approx(np.full(5, 5 * 0.2 * 0.8), abs=0.08)  # binomial(5, 1/5)
    assert (weights == statistics.resamples(5, draws=4000, seed=1)).all()
    with pytest.raises(ValueError, match="over 0 units"):
        statistics.resamples(0)


def test_interval_of_a_mean_is_the_normal_one():
    """The bootstrap's variance of a mean is sum((x - mean)^2) / n^2; for many units its quantiles are normal."""
    x = np.random.default_rng(0).normal(3, 2, 400)
    drawn = statistics.drawn_means(statistics.resamples(400, seed=2), x, np.ones(400))
    half = 1.959964 * math.sqrt(((x - x.mean()) ** 2).sum()) / 400
    assert statistics.interval(drawn) == pytest.approx([x.mean() - half, x.mean() + half], abs=0.015)


def test_means_weigh_windows_by_their_tokens():
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    drawn = statistics.drawn_means(weights, np.array([6.0, 2.0]), np.array([3.0, 1.0]))
    assert drawn.tolist() == [2.0, 2.0, 2.0]
    assert statistics.drawn_means(weights, np.array([6.0, 5.0]), np.array([3.0, 1.0])).tolist() == [2.75, 2.0, 5.0]


def test_empty_draws_are_left_out():
    drawn = statistics.drawn_means(np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([4.0, 0.0]), np.array([2.0, 0.0]))
    assert drawn[0] == 2 and np.isnan(drawn[1]) and statistics.interval(drawn) == [2.0, 2.0]
    assert statistics.interval(drawn[1:]) is None


def test_p_value_by_hand():
    assert statistics.p_value(np.array([1.0] * 99)) == 2 * 1 / 100
    assert statistics.p_value(np.array([1.0] * 95 + [-1.0] * 4)) == 2 * 5 / 100
    assert statistics.p_value(np.array([0.0] * 9)) == 1


def test_pairing_removes_what_windows_share():
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 100, 50)
    a, b = shared + 1 + generator.normal(0, 0.1, 50), shared
    paired = statistics.paired_means(a, b, np.ones(50), statistics.resamples(50))
    assert 0.9 < paired["ci95"][0] < paired["difference"] < paired["ci95"][1] < 1.1
    assert paired["p"] == 2 / 10_001
    same = statistics.paired_means(a, a, np.ones(50), statistics.resamples(50))
    assert same == {"difference": 0, "ci95": [0, 0], "p": 1}


def test_gap_closed_by_hand():
    found = statistics.gap_closed(np.array([0.5, 0.1, 0.3, 0.7]), np.array([0.1] * 4), np.array([0.5] * 4))
    assert found == pytest.approx([0, 1, 0.5, -0.5])
    assert np.isnan(statistics.gap_closed(np.array([0.1]), np.array([0.5]), np.array([0.5])))[0]


def test_mcnemar_by_hand():
    assert statistics.mcnemar(0, 0) == 1
    assert statistics.mcnemar(5, 5) == 1
    assert statistics.mcnemar(6, 0) == 2 / 64
    assert statistics.mcnemar(2, 8) == statistics.mcnemar(8, 2) == 2 * (1 + 10 + 45) / 1024
    # 5,000 discordant items: a z of (100 - 0.5) / sqrt(1250) in the normal limit
    assert statistics.mcnemar(2400, 2600) == pytest.approx(math.erfc(99.5 / math.sqrt(1250) / math.sqrt(2)), rel=0.01)


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for a, b in ((1, 9), (13, 20), (40, 41), (300, 377), (900, 700)):
        assert statistics.mcnemar(a, b) == pytest.approx(stats.binomtest(a, a + b).pvalue, rel=1e-9)
    x = np.random.default_rng(3).exponential(size=80)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    ours = statistics.interval(statistics.drawn_means(statistics.resamples(80), x, np.ones(80)))
    assert ours == pytest.approx(list(theirs), abs=0.02)
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert statistics.minimum_detectable_effect(0.2, 50) == pytest.approx(z * math.sqrt(0.2 / 50), rel=1e-9)


def test_minimum_detectable_effect():
    """At a discordance of 10 %: 2.4 points with 1,319 items, 0.75 with 14,000."""
    assert statistics.minimum_detectable_effect(0.1, 1319) == pytest.approx(0.0244, abs=5e-5)
    assert statistics.minimum_detectable_effect(0.1, 14_000) == pytest.approx(0.00749, abs=5e-6)
    assert statistics.minimum_detectable_effect(0, 10) == 0
    with pytest.raises(ValueError, match="give a fraction"):
        statistics.minimum_detectable_effect(1.5, 10)


def test_answers_by_hand():
    a, b = [True, True, True, False, False, True], [True, False, False, False, True, True]
    found = statistics.compare_correct(a, b, statistics.resamples(6))
    assert (found["only_first"], found["only_second"], found["flips"]) == (2, 1, 0.5)
    assert found["difference"] == pytest.approx(1 / 6) and found["mcnemar_p"] == 1
    assert found["ci95"][0] < 0 < found["ci95"][1]
    assert found["minimum_detectable_effect"] == pytest.approx(2.8016 * math.sqrt(0.5 / 6), rel=1e-4)
    with pytest.raises(ValueError, match="compare the same items"):
        statistics.compare_correct(a, b[:5], statistics.resamples(6))
