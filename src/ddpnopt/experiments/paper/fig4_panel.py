"""Figure 4's numbers: what feedback adds at equal hyper-parameters, cell by cell, and rules that judge it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpnopt.experiments.stats import Interval, mean_interval, paired_difference
from ddpnopt.experiments.study.lab import Params
from ddpnopt.experiments.study.task import Result

READINGS: Mapping[str, str] = {
    "own": "each sample's own loss",
    "share": "each sample's share of the mean loss",
    "batch": "exact batch form",
}
_ADAPTED: Mapping[str, str] = {"sgd": "SGD", "rmsprop": "RMSprop", "ekfac": "EKFAC"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """An optimizer with feedback, and where its grid begins.

    Attributes:
        lowest: the lowest learning rate; the others are multiples of it. The grids of the published forms begin
            where the adapted optimizer works slowly and end where it fails on DIGITS (without feedback, seed 0
            alone, which is among those reported); the batch form's begins at the library's default, and no rate
            was found at which it fails.
        opened: key of the method that is run without feedback. The two readings of the published form are one
            optimizer then, whose runs are made once.
        params: further hyper-parameters.
    """

    lowest: float
    opened: str
    params: Params = field(default_factory=dict)


VARIANTS: Mapping[str, Variant] = {
    "own-sgd": Variant(0.03, "own-sgd"),
    "share-sgd": Variant(0.03, "own-sgd"),
    "own-rmsprop": Variant(0.0003, "own-rmsprop"),
    "share-rmsprop": Variant(0.0003, "own-rmsprop"),
    "own-ekfac": Variant(0.01, "own-ekfac", {"damping": 0.3}),
    "share-ekfac": Variant(0.01, "own-ekfac", {"damping": 0.3}),
    "batch": Variant(0.1, "batch", {"damping": 0.1}),
}
"""By key of the method; the two readings of one optimizer stand side by side."""


@dataclass(frozen=True)
class Runs:
    """One optimizer over a grid, with ``R`` learning rates, ``D`` weight decays and ``S`` seeds.

    Attributes:
        accuracy: on the test part, in percent, ``[R, D, S]``.
        validation: the same on the validation part, by which cells and readings are chosen.
        curve: train loss, a mean every ten batches, ``[R, D, S, points]``. A run whose loss or step was not finite
            counts from there on with its highest loss, or that of guessing if this is higher.
        diverged: number of such runs, ``[R, D]``.
    """

    accuracy: Array
    validation: Array
    curve: Array
    diverged: NDArray[np.int64]

    @property
    def mean(self) -> Array:
        """Mean accuracy over seeds, ``[R, D]``."""
        return np.asarray(self.accuracy.mean(-1))

    @property
    def drop(self) -> Interval:
        """How far the mean over all cells lies below the best cell, in points; the mean over seeds."""
        best = np.unravel_index(self.mean.argmax(), self.mean.shape)
        return mean_interval((self.accuracy[best] - self.accuracy.mean((0, 1))).tolist())


@dataclass(frozen=True)
class Panel:
    """One grid: an optimizer with feedback and the same without, on one problem.

    Attributes:
        problem, variant: names.
        rates, decays: learning rates, ascending, and weight decays.
        params: further hyper-parameters, the same in every cell.
        closed, open: runs with and without feedback; entry by entry they share the seed.
    """

    problem: str
    variant: str
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    params: Params
    closed: Runs
    open: Runs

    @property
    def reading(self) -> str:
        """Key in ``READINGS`` of the variant."""
        return self.variant.partition("-")[0]

    @property
    def adapted(self) -> str:
        """The optimizer without feedback, in a word or two."""
        return _ADAPTED.get(self.variant.partition("-")[2], "DDPNOpt")

    @property
    def title(self) -> str:
        """The optimizer with feedback in a few words."""
        return f"{self.adapted}, {READINGS[self.reading]}"

    @property
    def differences(self) -> list[list[Interval]]:
        """What feedback adds to the test accuracy, in points: an interval for each ``[rate][decay]``."""
        return [
            [paired_difference(with_.tolist(), without.tolist()) for with_, without in zip(*row, strict=True)]
            for row in zip(self.closed.accuracy, self.open.accuracy, strict=True)
        ]

    @property
    def training(self) -> list[int]:
        """Places of the rates at which either optimizer still trains.

        In some cell its mean validation accuracy is half the best of the grid.
        """
        either = np.maximum(self.closed.validation.mean(-1), self.open.validation.mean(-1)).max(1)
        return [place for place, value in enumerate(either) if value >= either.max() / 2]

    @property
    def usual(self) -> tuple[int, int]:
        """The cell of the first weight decay whose mean validation accuracy without feedback is highest."""
        return int(self.open.validation[:, 0].mean(-1).argmax()), 0


@dataclass(frozen=True)
class Tally:
    """A panel in a few figures; only learning rates at which either optimizer trains count.

    Attributes:
        cells, better, worse: number of cells, of those with an interval above zero, of those with one below.
        high, high_better: the same of the cells at the two highest of these rates.
        calmer: cells in which accuracy varies less over seeds with feedback; not judged, for of two equal optimizers
            one varies less by chance in half of the cells.
        trend: slope of the improvement, mean over decays, in points per factor ten of the learning rate, a
            straight line for each seed; NaN for fewer than two rates.
        loss: train loss with feedback less without, mean over training, at the panel's usual cell.
    """

    cells: int
    better: int
    worse: int
    high: int
    high_better: int
    calmer: int
    trend: Interval
    loss: Interval

    @property
    def grows(self) -> bool:
        """More cells better than worse, at least half of the high ones better, and a trend above zero."""
        return self.better > self.worse and 2 * self.high_better >= self.high and self.trend.low > 0

    @property
    def faster(self) -> bool:
        """Lower loss along training at the usual cell."""
        return self.loss.high < 0


def tally(panel: Panel) -> Tally:
    """Count a panel's cells and fit its trend."""
    places, differences = panel.training, panel.differences
    cells = [cell for place in places for cell in differences[place]]
    high = [cell for place in places[-2:] for cell in differences[place]]
    seeds = panel.open.accuracy.shape[-1]
    spread = [runs.accuracy.std(-1)[places] for runs in (panel.closed, panel.open)]
    curves = [runs.curve[panel.usual].mean(-1).tolist() for runs in (panel.closed, panel.open)]
    return Tally(
        cells=len(cells),
        better=sum(cell.low > 0 for cell in cells),
        worse=sum(cell.high < 0 for cell in cells),
        high=len(high),
        high_better=sum(cell.low > 0 for cell in high),
        calmer=int((spread[0] < spread[1]).sum()),
        trend=_trend(panel, places) if len(places) > 1 else Interval(math.nan, math.nan, seeds),
        loss=paired_difference(*curves),
    )


def gather(results: Sequence[Result], shape: tuple[int, int, int], points: int, classes: int) -> Runs:
    """Arrange results of the task ``train``, seeds varying fastest and rates slowest, as ``shape [R, D, S]``.

    Args:
        results: as many as the shape has entries.
        shape: numbers of rates, decays and seeds.
        points: of the curve of a run that comes to its end.
        classes: number of classes; guessing has the loss of its logarithm.
    """
    return Runs(
        accuracy=np.array([100 * one["test"] for one in results]).reshape(shape),
        validation=np.array([100 * one["validation"] for one in results]).reshape(shape),
        curve=np.array([_whole(one["curve"], points, math.log(classes)) for one in results]).reshape(*shape, points),
        diverged=np.array([one["diverged"] is not None for one in results]).reshape(shape).sum(-1),
    )


def _whole(curve: Sequence[float], points: int, guessing: float) -> list[float]:
    return [*curve, *[max([guessing, *curve])] * (points - len(curve))]


def _trend(panel: Panel, places: Sequence[int]) -> Interval:
    improvement = (panel.closed.accuracy - panel.open.accuracy)[places].mean(1)
    slopes: Any = np.polyfit(np.log10([panel.rates[place] for place in places]), improvement, 1)[0]
    return mean_interval(slopes.tolist())
