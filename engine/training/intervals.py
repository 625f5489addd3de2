"""Confidence intervals of means over pairs, which are drawn independently.

Tokens of one answer are not independent, so a mean over tokens is treated as a ratio of
two sums over pairs.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


class Estimate(NamedTuple):
    """A mean and the interval around it; None where nothing can be said of it."""

    mean: float
    low: float | None
    high: float | None


def ratio(
    above: Float64[np.ndarray, " pairs"], below: Float64[np.ndarray, " pairs"]
) -> Estimate:
    """sum(above) / sum(below), a mean where `below` are the weights of pairs.

    Its standard error is that of the linearised ratio; the interval is Student's.

    Source: Cochran, Sampling Techniques (1977), section 2.11.
    """
    total = below.sum()
    if total == 0:  # a mean over no tokens is 0, as in the metrics
        return Estimate(0.0, None, None)
    mean = float(above.sum() / total)
    count = int((below > 0).sum())
    if count < 2:
        return Estimate(mean, None, None)
    squares = float(((above - mean * below) ** 2).sum())
    error = math.sqrt(squares * count / (count - 1)) / float(total)
    margin = _student(count - 1) * error
    return Estimate(mean, mean - margin, mean + margin)


def share(
    right: Float64[np.ndarray, " pairs"], weights: Float64[np.ndarray, " pairs"]
) -> Estimate:
    """The weighted share of pairs that are right, with Wilson's interval.

    Pairs of unequal weights count as (sum w)^2 / sum w^2 of equal ones.

    Args:
        right: the weight of a pair that is right, else 0.
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    total = float(weights.sum())
    if total == 0:
        return Estimate(0.0, None, None)
    p = float(right.sum()) / total
    n = total**2 / float((weights**2).sum())
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half))


def _student(freedom: int) -> float:
    """The quantile of Student's t; exact for 1 and 2 degrees, to 1 % from 3 on."""
    if freedom == 1:
        return math.tan(math.pi * CONFIDENCE / 2)
    if freedom == 2:
        return CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    z, n = _Z, freedom
    # Abramowitz and Stegun, 26.7.5.
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
