"""Paired statistics of an evaluation: bootstrap intervals, McNemar's test and the smallest effect a test can see.

Two models are judged on the same windows or items, so their difference has far less spread than either figure. Every
function here takes that pairing; the same resampling weights serve all rows of a table.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

DRAWS = 10_000


def resamples(units: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap weights float64 [draws, units]: how often each unit is drawn when `units` are drawn with replacement.

    ValueError without units. One unit gives intervals of width 0: they say nothing.
    """
    if units < 1:
        raise ValueError("a bootstrap over 0 units; give at least one window or item")
    generator = np.random.default_rng(seed)
    return generator.multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)


def drawn_means(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means [draws] of resampled units that hold `sums` [units] over `counts` [units] tokens: a ratio of sums.

    A draw of nothing but units without tokens has no mean; it is NaN, and `interval` leaves it out.
    """
    total = weights @ np.asarray(counts, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return (weights @ np.asarray(sums, dtype=np.float64)) / total


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """The central `level` of finite bootstrap values, as [low, high]; None where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    tail = (1 - level) / 2
    return [float(q) for q in np.quantile(values, (tail, 1 - tail))]


def p_value(differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value of "no difference": twice the smaller share on one side of 0.

    One imaginary draw is added to both sides, so that no finite number of draws claims certainty.
    """
    differences = differences[np.isfinite(differences)]
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))


def paired_means(a: np.ndarray, b: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """{"difference", "ci95", "p"} of mean(a) - mean(b); `a`, `b` [units] are sums over the same `counts` [units]."""
    drawn = drawn_means(weights, np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), counts)
    difference = (math.fsum(a) - math.fsum(b)) / math.fsum(counts)
    return {"difference": difference, "ci95": interval(drawn), "p": p_value(drawn)}


def gap_closed(row: np.ndarray, noise: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """1 - (row - noise) / (quantized - noise) of KL means, elementwise: 0 is plain quantization, 1 is the noise floor.

    NaN where plain quantization is not above the noise: there is no gap to close.
    """
    row, noise, quantized = (np.asarray(x, dtype=np.float64) for x in (row, noise, quantized))
    gap = quantized - noise
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(gap > 0, 1 - (row - noise) / gap, np.nan)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's test: items that only `a` solves against items that only `b` solves.

    Without a difference each discordant item is a fair coin, so p is twice the binomial tail, at most 1.
    """
    n, few = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, 2 * tail / 2**n)  # a quotient of integers: right for any n


def minimum_detectable_effect(discordance: float, items: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest difference of two accuracies that a paired test over `items` finds with `power`.

    (z_{1 - alpha/2} + z_power) * sqrt(discordance / items), where `discordance` is the fraction of items that exactly
    one of the two models solves.
    """
    if items < 1 or not 0 <= discordance <= 1:
        raise ValueError(f"discordance {discordance} over {items} items; give a fraction and at least one item")
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * math.sqrt(discordance / items)


def compare_correct(a: list[bool], b: list[bool], weights: np.ndarray) -> dict[str, Any]:
    """Accuracy of `a` minus that of `b` on the same items, with interval, McNemar's p and what was detectable."""
    if len(a) != len(b) or weights.shape[1] != len(a):
        raise ValueError(f"{len(a)} and {len(b)} answers, weights for {weights.shape[1]}; compare the same items")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    items = np.ones(len(a))
    paired = paired_means(np.array(a, dtype=np.float64), np.array(b, dtype=np.float64), items, weights)
    flips = (only_a + only_b) / len(a)
    return {
        "difference": paired["difference"],
        "ci95": paired["ci95"],
        "only_first": only_a,
        "only_second": only_b,
        "flips": flips,
        "mcnemar_p": mcnemar(only_a, only_b),
        "minimum_detectable_effect": minimum_detectable_effect(flips, len(a)),
    }
