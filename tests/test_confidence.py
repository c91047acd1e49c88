import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from at_smooth.confidence import accuracies_differ, means_differ, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_the_interval_is_the_published_one(right, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    assert wilson(100 * right / n, n) == pytest.approx((low, high), abs=0.005)


@given(st.integers(1, 3000), st.data())
def test_the_interval_is_wilsons_formula(n, data):
    right, z = data.draw(st.integers(0, n)), 1.959963984540054
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = wilson(100 * right / n, n)
    assert (low, high) == pytest.approx((100 * (middle - half), 100 * (middle + half)), abs=1e-6)
    assert -1e-9 <= low <= 100 * share + 1e-9
    assert 100 * share - 1e-9 <= high <= 100 + 1e-9


@pytest.mark.parametrize(
    ("one", "n_one", "other", "n_other", "differ"),
    [
        (56, 70, 48, 80, True),  # +0.0524 to +0.3339
        (9, 10, 3, 10, True),  # +0.1705 to +0.8090
        (6, 7, 2, 7, True),  # +0.0582 to +0.8062
        (5, 56, 0, 29, False),  # -0.0381 to +0.1926
        (0, 10, 0, 20, False),  # -0.1611 to +0.2775
        (10, 10, 0, 20, True),  # +0.6791 to +1.0000
    ],
)
def test_two_accuracies_differ_where_the_published_interval_leaves_out_0(one, n_one, other, n_other, differ):
    """Newcombe, Statistics in Medicine 17 (1998) 873, table II, method 10."""
    first, second = (100 * one / n_one, n_one), (100 * other / n_other, n_other)
    assert accuracies_differ(*first, *second) is differ
    assert accuracies_differ(*second, *first) is differ


def test_an_accuracy_does_not_differ_from_itself():
    assert not accuracies_differ(63.2, 1000, 63.2, 1000)


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ([50.1, 50.3, 50.2], [52.0, 52.2, 52.1], True),
        ([50.0, 53.0, 49.0], [51.0, 52.0, 50.5], False),
        ([50.0, 50.0], [50.0, 50.0], False),
        ([50.0, 50.0], [51.0, 51.0], True),
        ([50.0, 50.0], [50.0, 58.0], False),
    ],
)
def test_two_settings_differ_where_chance_does_not_explain_it(one, other, differ):
    assert means_differ(one, other) is differ
    assert means_differ(other, one) is differ
