"""How sure a percentage is: intervals for one accuracy, and whether two differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

_LEVEL = 0.95


def wilson(percent: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson, JASA 1927).

    Args:
        percent: The accuracy, 0 to 100.
        n: On how many examples it was measured.

    Returns:
        Its lower and upper end, in percent.
    """
    from scipy.stats import binomtest

    interval = binomtest(round(percent * n / 100), n).proportion_ci(_LEVEL, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def with_interval(percent: float, n: int) -> dict[str, Any]:
    """An accuracy and its interval, as every report has them: ``accuracy`` and ``ci95``, in percent."""
    return {"accuracy": percent, "ci95": list(wilson(percent, n))}


def accuracies_differ(one: float, n_one: int, other: float, n_other: int) -> bool:
    """Whether two accuracies differ by more than chance allows: Newcombe's 95 % interval (Stat. Med. 1998, method 10).

    It takes the two for independent, which is cautious where both were measured on the same examples.

    Args:
        one: An accuracy, in percent.
        n_one: On how many examples it was measured.
        other: Another, likewise.
        n_other: On how many examples.
    """
    (low, high), (low_other, high_other) = wilson(one, n_one), wilson(other, n_other)
    if one < other:
        one, low, high, other, low_other, high_other = other, low_other, high_other, one, low, high
    return one - other > math.hypot(one - low, high_other - other)


def means_differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two settings differ over their seeds: Welch's t-test at 5 %, for at least two values each."""
    from scipy.stats import ttest_ind

    if statistics.variance(one) == statistics.variance(other) == 0:  # the test would divide by nothing
        return statistics.fmean(one) != statistics.fmean(other)
    return bool(ttest_ind(one, other, equal_var=False).pvalue < 1 - _LEVEL)


def differ_from_zero(differences: Sequence[float]) -> bool:
    """Whether the mean of two or more values is not 0: Student's t-test at 5 %; of paired differences, say."""
    from scipy.stats import ttest_1samp

    if statistics.variance(differences) == 0:  # the test would divide by nothing
        return statistics.fmean(differences) != 0
    return bool(ttest_1samp(differences, 0).pvalue < 1 - _LEVEL)
