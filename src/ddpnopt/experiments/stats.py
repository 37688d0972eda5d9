"""Means over seeds with their uncertainty: Student's t intervals, paired where the runs are paired."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """A mean and a symmetric confidence interval about it.

    Attributes:
        mean: of the values.
        half: half the width of the interval; NaN for a single value, which says nothing about spread.
        count: number of values.
    """

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        """Lower end; NaN for a single value."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end; NaN for a single value."""
        return self.mean + self.half

    def scaled(self, factor: float) -> "Interval":
        """The interval in other units, for instance percent."""
        return Interval(self.mean * factor, self.half * abs(factor), self.count)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent values and its t interval of probability ``level`` (default 0.95)."""
    count = len(values)
    if count == 0:
        raise ValueError("no values to take a mean of")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = float(student.ppf(0.5 + level / 2, count - 1))
    return Interval(mean, quantile * math.sqrt(variance / count), count)


def paired_difference(values: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of ``values[i] - baseline[i]`` and its interval; entry i of both belongs to the same seed."""
    if len(values) != len(baseline):
        raise ValueError(f"pairs need as many values as baselines, but there are {len(values)} and {len(baseline)}")
    return mean_interval([a - b for a, b in zip(values, baseline, strict=True)], level)


def paired_p(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Two-sided p-value of the paired t test that ``values`` and ``baseline`` have equal means.

    NaN for fewer than two pairs; 1 where all differences are 0, and 0 where they are equal but not 0.
    """
    difference = paired_difference(values, baseline)
    if difference.count < 2:
        return math.nan
    if difference.half == 0:
        return 0.0 if difference.mean else 1.0
    error = difference.half / float(student.ppf(0.975, difference.count - 1))
    return float(2 * student.sf(abs(difference.mean) / error, difference.count - 1))
