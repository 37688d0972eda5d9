"""Targets, steps to them, profiles, sensitivity, corrected p-values: pure functions of figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, median_low

from .tuning import Result, value


@dataclass(frozen=True)
class Targets:
    """Validation scores, in percent, that a run is to reach."""

    early: float
    final: float


def targets(runs: Sequence[Result], marks: Sequence[int], early: float) -> Targets:
    """From the reference's runs: medians of the score at the last mark up to ``early`` steps, and of the values.

    Of an even number of runs the lower of the two middle values, so that the reference itself reaches it. A run that
    diverged counts as minus infinity.
    """
    place = max((i for i, mark in enumerate(marks) if mark <= early), default=0)
    at_place = [-math.inf if run["diverged"] else run["validation"][place] for run in runs]
    return Targets(median_low(at_place), median_low([value(run) for run in runs]))


def steps_to(run: Result, marks: Sequence[int], target: float) -> float:
    """First mark at which a run's score is at least the target; infinity where none is."""
    reached = (mark for mark, score in zip(marks, run["validation"], strict=False) if score >= target)
    return float(next(reached, math.inf))


def median_steps(runs: Sequence[Result], marks: Sequence[int], target: float) -> float:
    """The median over runs of :func:`steps_to`; infinity where half of them miss."""
    return median(steps_to(run, marks, target) for run in runs)


def ratio(own: float, other: float) -> float:
    """``own / other`` where a miss is infinite; NaN where both miss."""
    if math.isinf(other):
        return math.nan if math.isinf(own) else 0.0
    return own / other


def profile(costs: Sequence[Mapping[str, float]], method: str) -> list[float]:
    """A method's cost over the least of any method, ascending, an entry for each task.

    Args:
        costs: for each task the cost by method; infinite for a miss.
        method: one without an entry in a task was not run there and has missed.
    """
    ratios = []
    for by_method in costs:
        own, least = by_method.get(method, math.inf), min(by_method.values())
        ratios.append(math.inf if math.isinf(own) else own / least)
    return sorted(ratios)


def share_within(ratios: Sequence[float], factor: float) -> float:
    """Share of tasks in which the cost is at most ``factor`` times the least."""
    return sum(found <= factor for found in ratios) / len(ratios)


@dataclass(frozen=True)
class Sensitivity:
    """How a method takes to learning rates it was not tuned for.

    Attributes:
        low, high: ends of the contiguous range within the allowed points of the best one.
        diverged, collapsed: numbers of runs.
        runs: of how many.
    """

    low: float
    high: float
    diverged: int
    collapsed: int
    runs: int

    @property
    def decades(self) -> float:
        """Width of the range."""
        return math.log10(self.high / self.low)


def sensitivity(runs: Mapping[float, Sequence[Result]], floor: float, points: float) -> Sensitivity:
    """Figures over learning rates.

    Args:
        runs: by learning rate, one for each seed.
        floor: last score below which a run has collapsed.
        points: how far below the best mean of the last scores a learning rate's still counts as good.
    """
    rates = sorted(runs)
    last = [[-math.inf if run["diverged"] else run["validation"][-1] for run in runs[rate]] for rate in rates]
    means = [mean(scores) for scores in last]
    top = max(range(len(rates)), key=means.__getitem__)
    first = final = top
    if means[top] == -math.inf:
        top = first = final = 0
        means = [math.nan] * len(rates)  # a rate at which a run diverged is within no points of another
    while first > 0 and means[first - 1] >= means[top] - points:
        first -= 1
    while final < len(rates) - 1 and means[final + 1] >= means[top] - points:
        final += 1
    scores = [score for by_seed in last for score in by_seed]
    diverged, collapsed = scores.count(-math.inf), sum(-math.inf < score < floor for score in scores)
    return Sensitivity(rates[first], rates[final], diverged, collapsed, len(scores))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order; NaN stays NaN and is not counted."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__)
    adjusted, so_far = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted
