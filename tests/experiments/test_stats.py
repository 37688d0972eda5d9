import math

import pytest
from scipy.stats import ttest_rel

from ddpnopt.experiments.stats import mean_interval, paired_difference

VALUES = [0.91, 0.94, 0.90, 0.97]
BASELINE = [0.89, 0.95, 0.86, 0.93]


def test_interval_is_students() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)  # t of 2 degrees of freedom
    assert (interval.low, interval.high) == (2 - interval.half, 2 + interval.half)


def test_paired_interval_is_scipys() -> None:
    expected = ttest_rel(VALUES, BASELINE).confidence_interval(0.95)
    found = paired_difference(VALUES, BASELINE)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_single_value_has_no_spread_to_speak_of() -> None:
    assert math.isnan(mean_interval([1.0]).half)


def test_equal_values_have_no_spread() -> None:
    assert mean_interval([0.5] * 4).half == 0


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_scaling_keeps_the_relation() -> None:
    interval = mean_interval(VALUES)
    assert interval.scaled(100).high == pytest.approx(100 * interval.high)
