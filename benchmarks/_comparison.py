"""What the runs of one dataset show: accuracy against learning rate, the tuned rivals, what fails. Pure functions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import _records as records
from _training import TUNING_SEEDS, Run, plan

from ddpnopt.experiments import data
from ddpnopt.experiments.compare import Trial, best
from ddpnopt.experiments.config import OPTIMIZERS, OptimizerName, TrainConfig, resolve
from ddpnopt.experiments.stats import Interval, mean_interval, paired_difference

ALLOWED_DROP = 4.0  # points below the optimizer's own best that a learning rate may cost
COLLAPSED_BELOW = 10.0  # points above one in the number of classes, what guessing gets


@dataclass(frozen=True)
class Method:
    """An optimizer as it is compared: ``own`` ones run untuned, the others are rivals."""

    label: str
    optimizer: OptimizerName
    matched: bool = False

    @property
    def own(self) -> bool:
        """Whether it is DDPNOpt."""
        return self.optimizer == "ddpnopt"


DEFAULT = Method("DDPNOpt", "ddpnopt")
METHODS = (
    DEFAULT,
    Method("DDPNOpt, Matched", "ddpnopt", matched=True),
    Method("SGD", "sgd"),
    Method("RMSprop", "rmsprop"),
    Method("Adam", "adam"),
)


@dataclass(frozen=True)
class Study:
    """What is run on one dataset.

    Attributes:
        dataset: a key of ``DATASETS``.
        lrs: learning rates of DDPNOpt; its default is always among them.
        rival_lrs: learning rates of the rivals.
        seeds: how many are reported: 0, 1, 2, ...
        epochs: passes over the train part; None is the dataset's default.
    """

    dataset: str
    lrs: tuple[float, ...]
    rival_lrs: tuple[float, ...]
    seeds: int
    epochs: int | None = None

    def rates(self, method: Method) -> tuple[float, ...]:
        """Learning rates a method is run with, ascending."""
        return tuple(sorted({*self.lrs, OPTIMIZERS["ddpnopt"].lr} if method.own else set(self.rival_lrs)))

    def run(self, method: Method, lr: float, seed: int) -> Run:
        """One of its runs."""
        return plan(
            TrainConfig(
                dataset=self.dataset,
                model="fcn",
                optimizer=method.optimizer,
                terminal="matched" if method.matched else "gradient",
                lr=lr,
                weight_decay=0.0,
                epochs=self.epochs,
                seed=seed,
            )
        )

    def runs(self) -> list[Run]:
        """All of its runs."""
        return [
            self.run(method, lr, seed)
            for method in METHODS
            for lr in self.rates(method)
            for seed in (*range(self.seeds), *(() if method.own else TUNING_SEEDS))
        ]

    def config(self) -> TrainConfig:
        """Settings that all of its runs share."""
        return resolve(TrainConfig(dataset=self.dataset, model="fcn", epochs=self.epochs))


@dataclass(frozen=True)
class Point:
    """One learning rate of one method, over the reported seeds.

    Attributes:
        lr: learning rate.
        tests: test accuracies in percent, by seed.
        accuracy: their mean and 95% t interval.
        diverged: number of runs with a loss or a step that is not finite.
        collapsed: number of other runs that end hardly better than guessing.
        seconds: of training, mean over the runs.
    """

    lr: float
    tests: tuple[float, ...]
    accuracy: Interval
    diverged: int
    collapsed: int
    seconds: float

    @property
    def failed(self) -> int:
        """Runs that diverged or collapsed."""
        return self.diverged + self.collapsed


@dataclass(frozen=True)
class Curve:
    """One method: a point for each learning rate, ascending, and the learning rate it stands for in the headline."""

    method: Method
    points: tuple[Point, ...]
    chosen: Point
    written: str

    @property
    def best(self) -> Point:
        """The learning rate of highest mean test accuracy."""
        return max(self.points, key=lambda point: point.accuracy.mean)

    def drop(self, point: Point) -> float:
        """Points of accuracy that a learning rate costs against the method's own best."""
        return self.best.accuracy.mean - point.accuracy.mean

    def between(self, low: float, high: float) -> tuple[Point, ...]:
        """The points from one learning rate to another, both included."""
        return tuple(point for point in self.points if low <= point.lr <= high)

    def usable(self) -> tuple[float, float]:
        """Ends of the unbroken range of learning rates about the best one that cost at most ``ALLOWED_DROP``."""
        place = self.points.index(self.best)

        def reach(points: Sequence[Point]) -> float:
            return list(takewhile(lambda point: self.drop(point) <= ALLOWED_DROP, points))[-1].lr

        return reach(self.points[place::-1]), reach(self.points[place:])

    @property
    def at_edge(self) -> bool:
        """Whether a tuned learning rate ends its grid, so that a better one may lie outside."""
        return not self.method.own and self.chosen.lr in (self.points[0].lr, self.points[-1].lr)


@dataclass(frozen=True)
class Comparison:
    """All methods on one dataset.

    Attributes:
        study: what was run.
        curves: by method, in the order of ``METHODS``.
        seconds: computing time of all runs, evaluation included.
        torch: versions the runs were made with.
    """

    study: Study
    curves: tuple[Curve, ...]
    seconds: float
    torch: tuple[str, ...]

    @property
    def own(self) -> Curve:
        """DDPNOpt with default settings."""
        return self.curves[0]

    @property
    def rivals(self) -> tuple[Curve, ...]:
        """The tuned ones."""
        return tuple(curve for curve in self.curves if not curve.method.own)

    def lead(self, curve: Curve) -> Interval:
        """Points by which DDPNOpt's default stands above another method's chosen learning rate, paired by seed."""
        return paired_difference(self.own.chosen.tests, curve.chosen.tests)


def missing(study: Study, known: records.Records) -> int:
    """Number of runs of a study that are not on record."""
    return sum(records.key(run.settings()) not in known for run in study.runs())


def compare(study: Study, known: records.Records) -> Comparison:
    """Summarise a study all of whose runs are on record."""
    runs = {run: known[records.key(run.settings())] for run in study.runs()}
    return Comparison(
        study,
        tuple(_curve(study, method, runs) for method in METHODS),
        math.fsum(result["wall"] for result in runs.values()),
        tuple(sorted({result["torch"] for result in runs.values()})),
    )


def failures(comparison: Comparison) -> Iterator[str]:
    """Name what a comparison does not show: a sentence for each of the claims that fails."""
    name = data.source(comparison.study.dataset).title
    own = comparison.own
    if comparison.study.dataset == "digits":
        for rival in comparison.rivals:
            if not comparison.lead(rival).mean > 0:
                yield f"{name}: DDPNOpt is not above tuned {rival.method.label}"
    for point in own.points:
        if own.drop(point) > ALLOWED_DROP:
            yield f"{name}: lr {point.lr:g} costs DDPNOpt {own.drop(point):.1f} points, more than {ALLOWED_DROP:g}"
    for curve in comparison.curves:
        for point in curve.points:
            if curve.method.own and point.failed:
                yield f"{name}: {point.failed} runs of {curve.method.label} failed at lr {point.lr:g}"


def _curve(study: Study, method: Method, runs: Mapping[Run, records.Result]) -> Curve:
    def results(lr: float, seeds: Sequence[int]) -> list[records.Result]:
        return [runs[study.run(method, lr, seed)] for seed in seeds]

    low = 100 / data.source(study.dataset).classes + COLLAPSED_BELOW
    points = tuple(_point(lr, results(lr, range(study.seeds)), low) for lr in study.rates(method))
    chosen = OPTIMIZERS["ddpnopt"].lr if method.own else _tuned(study.rates(method), results)
    return Curve(
        method,
        points,
        next(point for point in points if point.lr == chosen),
        study.run(method, chosen, 0).settings()["method"],
    )


def _point(lr: float, results: Sequence[records.Result], low: float) -> Point:
    tests = tuple(100 * result["test"][-1] for result in results)
    return Point(
        lr,
        tests,
        mean_interval(tests),
        sum(result["diverged"] for result in results),
        sum(test < low and not result["diverged"] for test, result in zip(tests, results, strict=True)),
        math.fsum(result["seconds"] for result in results) / len(results),
    )


def _tuned(rates: Sequence[float], results: Callable[[float, Sequence[int]], Sequence[records.Result]]) -> float:
    """Learning rate of the highest validation accuracy, by seeds of its own; ties go to the lower train loss."""
    return best([_trial(lr, results(lr, TUNING_SEEDS)) for lr in rates]).lr


def _trial(lr: float, results: Sequence[records.Result]) -> Trial:
    accuracy = math.fsum(result["validation"][-1] for result in results) / len(results)
    losses = [math.inf if result["train_loss"] is None else result["train_loss"] for result in results]
    return Trial(lr, accuracy, sum(losses) / len(losses))
