"""The runs behind Figure 6: every method tuned with one budget under both losses, then run over paired seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from ddpnopt.experiments.data import source
from ddpnopt.experiments.paper import vanishing
from ddpnopt.experiments.paper.kinds import task
from ddpnopt.experiments.paper.tuning import thinned, tuned
from ddpnopt.experiments.paper.vanishing import LOSSES, RIVALS
from ddpnopt.experiments.report.section import Form
from ddpnopt.experiments.stats import Interval, mean_interval, paired_difference
from ddpnopt.experiments.study.lab import Lab, Params, combinations
from ddpnopt.experiments.study.task import Result, Task

TUNING_SEED = 1000
FIRST_SEED = 10  # seeds 0 and 1000 were looked at while the grids were placed; 0 to 9 are kept out
ESCAPED = 0.9  # of the plateau's loss
_WORST = -1e30


@dataclass(frozen=True)
class Effort:
    """What is spent on each method and loss.

    Attributes:
        steps: of a reported run.
        seeds: number of them reported, from ``FIRST_SEED`` on.
        tuning_steps: of a run of the search.
        combinations: tried, by every method; its grid is cut down to them.
        block: steps per point of the loss curve.
    """

    steps: int
    seeds: int
    tuning_steps: int
    combinations: int
    block: int


FULL = Effort(steps=800, seeds=5, tuning_steps=200, combinations=6, block=20)
QUICK = Effort(steps=100, seeds=3, tuning_steps=80, combinations=3, block=10)


@dataclass(frozen=True)
class Entry:
    """One method under one loss.

    Attributes:
        loss, method: names.
        params: hyper-parameters that its search chose.
        tuned: their score in the search, the validation loss with its sign changed; higher is better.
        results: of the reported seeds.
    """

    loss: str
    method: str
    params: Params
    tuned: float
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return RIVALS[self.method].label

    @property
    def losses(self) -> tuple[float, ...] | None:
        """Final train loss of each seed; None if a run diverged."""
        if any(one["diverged"] is not None or one["loss"] is None for one in self.results):
            return None
        return tuple(one["loss"] for one in self.results)

    @property
    def norms(self) -> list[float]:
        """Median update norm by layer: median over seeds of each seed's median; empty without a step."""
        seeds = [one["norms"] for one in self.results if one["norms"] is not None]
        return [median(layer) for layer in zip(*seeds, strict=True)]

    @property
    def curve(self) -> list[float]:
        """Train loss of every block, mean over seeds, up to where the shortest run ends."""
        points = zip(*(one["curve"] for one in self.results), strict=False)
        return [math.nan if None in point else mean(point) for point in points]


def entries(lab: Lab, effort: Effort) -> list[Entry]:
    """Search, then run: one entry for each loss and method, in the order of ``LOSSES`` and ``RIVALS``.

    Raises:
        ValueError: see :func:`searched`.
    """
    plan = [(loss, method) for loss in LOSSES for method in methods(loss)]

    def values(asked: list[tuple[str, Params]]) -> list[float]:
        tasks = [_task(search, params, effort.tuning_steps, TUNING_SEED, effort.block) for search, params in asked]
        return [_score(result) for result in lab.execute(tasks)]

    cut = searched(effort)
    grids = {f"{loss}/{method}": cut[method] for loss, method in plan}
    chosen, scores = tuned(lab, grids, values)
    seeds = range(FIRST_SEED, FIRST_SEED + effort.seeds)
    tasks = [_task(search, chosen[search], effort.steps, seed, effort.block) for search in grids for seed in seeds]
    results = iter(lab.execute(tasks))
    return [
        Entry(loss, method, chosen[search], scores[search], tuple(next(results) for _ in seeds))
        for search, (loss, method) in zip(grids, plan, strict=True)
    ]


def searched(effort: Effort) -> dict[str, dict[str, tuple[float, ...]]]:
    """Values that a search tries, by method and hyper-parameter, the same for both losses.

    Raises:
        ValueError: a method would try another number of combinations than the others.
    """
    grids = {method: thinned(rival.grid, effort.combinations) for method, rival in RIVALS.items()}
    for method, grid in grids.items():
        if (count := len(combinations(grid))) != effort.combinations:
            raise ValueError(
                f"the search of {method} has {count} combinations, not {effort.combinations} like the others; "
                "change its grid or the effort"
            )
    return grids


def methods(loss: str) -> tuple[str, ...]:
    """Methods run under a loss: all, but full V_xx to first order, a control for the second order, under MMC alone."""
    return tuple(name for name in RIVALS if name != "first" or loss == "mmc")


def difference(entry: Entry, other: Entry) -> Interval | None:
    """Final train loss of one method less another's, paired by seed; None if a run of either diverged."""
    if entry.losses is None or other.losses is None:
        return None
    return paired_difference(entry.losses, other.losses)


def below(entry: Entry, other: Entry) -> bool:
    """Whether a method's final train loss is below another's, by the rule that the text states."""
    points = difference(entry, other)
    return entry.losses is not None if points is None else points.high < 0


def escapes(entry: Entry) -> bool:
    """Whether a method leaves the plateau, by the rule that the text states."""
    return entry.losses is not None and mean_interval(entry.losses).high < ESCAPED * plateau_of(entry.loss)


def representative(own: Sequence[Entry], form: Form) -> Entry:
    """The method that stands for a form: the one with the best score in its search, which the reported seeds lack."""
    candidates = [entry for entry in own if RIVALS[entry.method].family == form]
    return max(candidates, key=lambda entry: entry.tuned)


def plateau_of(loss: str) -> float:
    """Loss of the best constant output on the data."""
    return vanishing.plateau(loss, source(vanishing.DATASET).classes)


def _task(search: str, params: Params, steps: int, seed: int, block: int) -> Task:
    """A run of the method and under the loss that a search is named by."""
    loss, method = search.split("/")
    settings = {"loss": loss, "method": method, "params": dict(params), "steps": steps, "seed": seed, "block": block}
    return task("vanishing", settings)


def _score(result: Result) -> float:
    """Higher is better; a run that diverged is worse than any that did not."""
    if result["diverged"] is not None or result["validation_loss"] is None:
        return _WORST
    return -float(result["validation_loss"])
