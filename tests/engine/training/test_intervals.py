"""Confidence intervals: known values, and how often they hold the truth."""

import math

import numpy as np
import pytest

from engine.training.intervals import Estimate, _student, ratio, share


@pytest.mark.parametrize(
    "freedom, quantile",
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)],
)
def test_students_quantiles(freedom, quantile):
    assert _student(freedom) == pytest.approx(quantile, rel=0.012)


def test_a_mean_of_equal_weights():
    x = np.array([1.0, 2.0, 4.0, 5.0])
    mean, low, high = ratio(x, np.ones(4))
    error = np.std(x, ddof=1) / 2
    assert mean == 3.0 and low is not None and high is not None
    assert high - mean == pytest.approx(3.182 * error, rel=0.012)
    assert mean - low == pytest.approx(high - mean)


def test_wilsons_interval():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    right = np.r_[np.ones(81), np.zeros(182)]
    assert share(right, np.ones(263)) == pytest.approx(
        (81 / 263, 0.2553, 0.3662), abs=5e-5
    )
    assert share(np.zeros(20), np.ones(20)) == pytest.approx((0, 0, 0.1611), abs=5e-5)
    # Weights that are all the same say nothing.
    assert share(3 * right, 3 * np.ones(263)) == pytest.approx(
        share(right, np.ones(263))
    )


def test_nothing_is_said_of_too_few():
    assert ratio(np.array([2.0]), np.array([1.0])) == Estimate(2.0, None, None)
    assert ratio(np.zeros(3), np.zeros(3)) == Estimate(0.0, None, None)
    assert share(np.zeros(0), np.zeros(0)) == Estimate(0.0, None, None)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held, trials, pairs = {"mean": 0, "tokens": 0, "share": 0}, 1000, 60
    for _ in range(trials):
        # Tokens of one answer resemble each other: a mean over them is no mean of
        # independent values.
        lengths = rng.integers(5, 50, pairs).astype(np.float64)
        level = rng.normal(1.0, 1.0, pairs)
        totals = lengths * level + np.sqrt(lengths) * rng.normal(size=pairs)
        weights = rng.choice([0.5, 1.0, 2.0], pairs)
        found = {
            "mean": (ratio(weights * level, weights), 1.0),
            "tokens": (ratio(totals, lengths), 1.0),
            "share": (share((level > 0).astype(np.float64), np.ones(pairs)), 0.841345),
        }
        for name, ((_, low, high), truth) in found.items():
            assert low is not None and high is not None
            held[name] += low <= truth <= high
    # 95 % of 1000, within four standard errors of that count (7 each), and a percent
    # that the approximations cost at 60 pairs.
    for name, count in held.items():
        least = 950 - 4 * math.sqrt(1000 * 0.95 * 0.05) - 10
        assert least <= count <= 980, name
