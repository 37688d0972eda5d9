"""DDPNOpt's default and tuned Adam on a convolutional network: what is run, and what it shows. Pure functions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import _records as records
from _training import TUNING_SEEDS, Run, plan

from ddpnopt.experiments import data
from ddpnopt.experiments.compare import Trial, best
from ddpnopt.experiments.config import OPTIMIZERS, OptimizerName, TrainConfig
from ddpnopt.experiments.stats import Interval, mean_interval, paired_difference

_MANY_EPOCHS = 10**6  # the number of steps ends a run, not the number of epochs


@dataclass(frozen=True)
class Study:
    """What is run on one dataset.

    Attributes:
        dataset: pictures; a key of ``DATASETS``.
        marks: numbers of steps after which accuracy is measured, ascending.
        adam_lrs: learning rates of Adam, ascending.
        seeds: how many are reported: 0, 1, 2, ...
    """

    dataset: str
    marks: tuple[int, ...]
    adam_lrs: tuple[float, ...]
    seeds: int

    def run(self, optimizer: OptimizerName, lr: float, seed: int) -> Run:
        """One of its runs."""
        config = TrainConfig(
            dataset=self.dataset,
            model="cnn",
            optimizer=optimizer,
            lr=lr,
            weight_decay=0.0,
            epochs=_MANY_EPOCHS,
            seed=seed,
        )
        return plan(config, self.marks)

    def runs(self) -> list[Run]:
        """All of its runs."""
        own = [self.run("ddpnopt", OPTIMIZERS["ddpnopt"].lr, seed) for seed in range(self.seeds)]
        seeds = (*range(self.seeds), *TUNING_SEEDS)
        return own + [self.run("adam", lr, seed) for lr in self.adam_lrs for seed in seeds]


@dataclass(frozen=True)
class Row:
    """One number of steps.

    Attributes:
        steps: how many.
        own: test accuracy of DDPNOpt in percent, mean over the seeds.
        adam: that of Adam with the learning rate tuned for this number of steps.
        adam_lr: that learning rate.
        lead: own minus adam, paired by seed.
        by_rate: mean test accuracy of Adam with each learning rate.
    """

    steps: int
    own: Interval
    adam: Interval
    adam_lr: float
    lead: Interval
    by_rate: Mapping[float, Interval]


@dataclass(frozen=True)
class Comparison:
    """Both optimizers on one dataset.

    Attributes:
        study: what was run.
        rows: one for each number of steps.
        own_step, adam_step: seconds of a step, mean over the reported runs.
        diverged: number of DDPNOpt's runs with a loss or a step that is not finite.
        methods: both optimizers with all options.
        seconds: computing time of all runs, evaluation included.
        torch: versions the runs were made with.
    """

    study: Study
    rows: tuple[Row, ...]
    own_step: float
    adam_step: float
    diverged: int
    methods: tuple[str, str]
    seconds: float
    torch: tuple[str, ...]


def compare(study: Study, known: records.Records) -> Comparison:
    """Summarise a study all of whose runs are on record."""
    everything = {run: known[records.key(run.settings())] for run in study.runs()}

    def results(optimizer: OptimizerName, lr: float, seeds: Sequence[int]) -> list[records.Result]:
        return [everything[study.run(optimizer, lr, seed)] for seed in seeds]

    lr = OPTIMIZERS["ddpnopt"].lr
    own = results("ddpnopt", lr, range(study.seeds))
    adam = [result for rate in study.adam_lrs for result in results("adam", rate, range(study.seeds))]
    return Comparison(
        study,
        tuple(_row(study, place, own, results) for place in range(len(study.marks))),
        _per_step(own),
        _per_step(adam),
        sum(result["diverged"] for result in own),
        (
            study.run("ddpnopt", lr, 0).settings()["method"],
            study.run("adam", study.adam_lrs[0], 0).settings()["method"],
        ),
        math.fsum(result["wall"] for result in everything.values()),
        tuple(sorted({result["torch"] for result in everything.values()})),
    )


def failures(comparison: Comparison) -> Iterator[str]:
    """Name what a comparison does not show."""
    name = data.source(comparison.study.dataset).title
    for row in comparison.rows:
        if not row.lead.mean > 0:
            yield f"{name}: DDPNOpt is not above tuned Adam after {row.steps} steps"
    if comparison.diverged:
        yield f"{name}: {comparison.diverged} runs of DDPNOpt diverged"


def _row(
    study: Study,
    place: int,
    own: Sequence[records.Result],
    results: Callable[[OptimizerName, float, Sequence[int]], Sequence[records.Result]],
) -> Row:
    def tests(some: Sequence[records.Result]) -> list[float]:
        return [100 * result["test"][place] for result in some]

    tuned = best([_trial(lr, place, results("adam", lr, TUNING_SEEDS)) for lr in study.adam_lrs]).lr
    by_rate = {lr: tests(results("adam", lr, range(study.seeds))) for lr in study.adam_lrs}
    return Row(
        study.marks[place],
        mean_interval(tests(own)),
        mean_interval(by_rate[tuned]),
        tuned,
        paired_difference(tests(own), by_rate[tuned]),
        {lr: mean_interval(values) for lr, values in by_rate.items()},
    )


def _trial(lr: float, place: int, results: Sequence[records.Result]) -> Trial:
    """A learning rate by its validation accuracy at one mark; ties go to the lower train loss at the run's end."""
    losses = [math.inf if result["train_loss"] is None else result["train_loss"] for result in results]
    accuracy = math.fsum(result["validation"][place] for result in results) / len(results)
    return Trial(lr, accuracy, sum(losses) / len(losses))


def _per_step(results: Sequence[records.Result]) -> float:
    steps = sum(int(result["steps"]) for result in results)
    return math.fsum(result["seconds"] for result in results) / max(1, steps)
