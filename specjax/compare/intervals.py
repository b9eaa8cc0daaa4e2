"""The confidence interval of a mean over several seeds: Student's."""

import math
import statistics
from collections.abc import Sequence

# Student's t, two-sided 95 %, for 1 to 19 degrees of freedom (any table; a test holds them against scipy's).
T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930),
)
MOST = len(T) + 1  # seeds


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high) with 95 % confidence, assuming normal values; low and high are None for a single value.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    >>> interval([1.5])
    (1.5, None, None)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
