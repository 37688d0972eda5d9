"""Several optimizers, several seeds, one network and one budget: run, choose learning rates, summarise.

The runs are paired: a seed fixes initial weights and order of the samples, whatever the optimizer. Each run
has its own folder under the comparison's, named after its settings and the code's fingerprint, so that what
is finished is read back and what was interrupted goes on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddpnopt.experiments.config import (
    OPTIMIZERS,
    DatasetArgument,
    OptimizerName,
    TrainConfig,
    digest,
    resolve,
)
from ddpnopt.experiments.data import ModelName
from ddpnopt.experiments.environment import code
from ddpnopt.experiments.runs import Result
from ddpnopt.experiments.stats import Interval, mean_interval, paired_difference

TUNING_SEEDS = (1000, 1001, 1002, 1003, 1004)  # never among the seeds reported
REFERENCE: OptimizerName = "ddpnopt"


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    dataset: DatasetArgument = ""
    """wine, iris, digits, digits-images, mnist, fashion-mnist, cifar10, svhn or cifar100; see `ddpnopt data list`."""

    optimizers: tuple[OptimizerName, ...] = ("ddpnopt", "sgd", "rmsprop", "adam")
    """Which optimizers."""

    seeds: int = 10
    """Number of seeds reported: 0, 1, 2, ..."""

    tune: bool = True
    """Choose each rival's learning rate among 5 on validation data, by 5 other seeds; never ddpnopt's."""

    lr_ddpnopt: float | None = None
    """Learning rate of ddpnopt. None: its default."""

    lr_sgd: float | None = None
    """Learning rate of sgd (momentum 0.9). None: tuned, or its default with --no-tune."""

    lr_rmsprop: float | None = None
    """Learning rate of rmsprop. None: tuned, or its default with --no-tune."""

    lr_adam: float | None = None
    """Learning rate of adam. None: tuned, or its default with --no-tune."""

    model: ModelName | None = None
    """fcn: the paper's 5 dense layers. cnn: a small convolutional network. None: by dataset."""

    batch_size: int | None = None
    """Samples per step. None: the dataset's default."""

    epochs: int | None = None
    """Passes over the training data. None: the dataset's default."""


@dataclass(frozen=True)
class Trial:
    """One learning rate tried on the tuning seeds.

    Attributes:
        lr: learning rate.
        accuracy: mean validation accuracy, 0 to 1.
        loss: mean train loss; infinite where a run diverged.
    """

    lr: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """The learning rate an optimizer runs with.

    Attributes:
        lr: learning rate.
        how: ``"default"``, ``"given"`` by the user, or ``"tuned"``.
        trials: what it was chosen from; empty unless tuned.
    """

    lr: float
    how: str
    trials: tuple[Trial, ...] = ()

    @property
    def at_edge(self) -> bool:
        """Whether the chosen value ends its grid, so that a better one may lie outside."""
        return self.how == "tuned" and self.lr in (self.trials[0].lr, self.trials[-1].lr)


@dataclass(frozen=True)
class Row:
    """One optimizer's line in the table.

    Attributes:
        optimizer: its name.
        choice: its learning rate and where that came from.
        accuracies: final test accuracy of each seed, 0 to 1.
        accuracy: their mean and 95% t interval.
        loss: mean final train loss with interval; None where a run diverged.
        diverged: number of diverged runs.
        seconds_per_step: mean over the runs.
        difference: accuracy minus the reference optimizer's, paired by seed; None for the reference itself.
        folders: run folder of each seed.
    """

    optimizer: OptimizerName
    choice: Choice
    accuracies: tuple[float, ...]
    accuracy: Interval
    loss: Interval | None
    diverged: int
    seconds_per_step: float
    difference: Interval | None
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Comparison:
    """All that a report needs: the settings, and one row for each optimizer in the order asked for."""

    config: CompareConfig
    reference: OptimizerName
    rows: tuple[Row, ...]


Runner = Callable[[TrainConfig, str], Result]


def check(config: CompareConfig) -> CompareConfig:
    """Refuse settings that make no comparison; returns them with the dataset's name in lower case."""
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, but it is {config.seeds}")
    if not config.optimizers or len(set(config.optimizers)) < len(config.optimizers):
        raise ValueError(f"optimizers must be different names, but they are {' '.join(config.optimizers) or 'none'}")
    for optimizer in config.optimizers:
        resolved = resolve(run_config(config, optimizer, given_lr(config, optimizer), 0))
    return replace(config, dataset=resolved.dataset)


def run_config(config: CompareConfig, optimizer: OptimizerName, lr: float | None, seed: int) -> TrainConfig:
    """Return the settings of one run of the comparison."""
    return TrainConfig(
        dataset=config.dataset,
        model=config.model,
        optimizer=optimizer,
        lr=lr,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=seed,
    )


def folder_name(config: TrainConfig) -> str:
    """Return the name of a run's folder: readable, and different for different settings, code or torch."""
    lr = resolve(config).lr
    return f"{config.optimizer}-lr{lr:g}-seed{config.seed}-{digest(resolve(config), code(), torch.__version__)}"


def given_lr(config: CompareConfig, optimizer: OptimizerName) -> float | None:
    """Return the learning rate the user fixed for an optimizer, or None."""
    fixed: Mapping[OptimizerName, float | None] = {
        "ddpnopt": config.lr_ddpnopt,
        "sgd": config.lr_sgd,
        "rmsprop": config.lr_rmsprop,
        "adam": config.lr_adam,
    }
    return fixed.get(optimizer)


def is_tuned(config: CompareConfig, optimizer: OptimizerName) -> bool:
    """Whether an optimizer's learning rate is to be chosen on validation data."""
    return config.tune and optimizer != REFERENCE and given_lr(config, optimizer) is None


def count_runs(config: CompareConfig) -> int:
    """Return how many runs the comparison consists of; a value both tuned on and reported counts twice."""
    grids = sum(len(OPTIMIZERS[name].grid) for name in config.optimizers if is_tuned(config, name))
    return grids * len(TUNING_SEEDS) + config.seeds * len(config.optimizers)


def compare(config: CompareConfig, folder: Path, run: Runner) -> Comparison:
    """Run everything that is not finished yet, and summarise.

    Args:
        config: checked settings (see :func:`check`).
        folder: of the comparison; each run gets a folder in it.
        run: carries out one run in the folder of the given name, or reads it back, and returns its result.
    """
    choices = {name: _choose(config, name, run) for name in config.optimizers}
    results = {
        name: [_run(config, name, choices[name].lr, seed, run) for seed in range(config.seeds)]
        for name in config.optimizers
    }
    reference = REFERENCE if REFERENCE in results else config.optimizers[0]
    baseline = [result.test_accuracy for result in results[reference]]
    return Comparison(
        config,
        reference,
        tuple(
            _row(
                name,
                choices[name],
                results[name],
                None if name == reference else baseline,
                [folder / folder_name(run_config(config, name, choices[name].lr, s)) for s in range(config.seeds)],
            )
            for name in config.optimizers
        ),
    )


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial of highest validation accuracy; ties go to the lower train loss."""
    return min(trials, key=lambda trial: (-trial.accuracy, trial.loss))


def _choose(config: CompareConfig, optimizer: OptimizerName, run: Runner) -> Choice:
    given = given_lr(config, optimizer)
    if given is not None:
        return Choice(given, "given")
    if not is_tuned(config, optimizer):
        return Choice(OPTIMIZERS[optimizer].lr, "default")
    trials = tuple(
        _trial(lr, [_run(config, optimizer, lr, seed, run) for seed in TUNING_SEEDS])
        for lr in OPTIMIZERS[optimizer].grid
    )
    return Choice(best(trials).lr, "tuned", trials)


def _run(config: CompareConfig, optimizer: OptimizerName, lr: float, seed: int, run: Runner) -> Result:
    settings = run_config(config, optimizer, lr, seed)
    return run(settings, folder_name(settings))


def _trial(lr: float, results: Sequence[Result]) -> Trial:
    accuracies = [result.validation_accuracy for result in results]
    losses = [math.inf if result.train_loss is None else result.train_loss for result in results]
    return Trial(lr, math.fsum(accuracies) / len(results), sum(losses) / len(results))


def _row(
    name: OptimizerName,
    choice: Choice,
    results: Sequence[Result],
    baseline: Sequence[float] | None,
    folders: Sequence[Path],
) -> Row:
    accuracies = tuple(result.test_accuracy for result in results)
    losses = [result.train_loss for result in results if result.status == "finished" and result.train_loss is not None]
    return Row(
        optimizer=name,
        choice=choice,
        accuracies=accuracies,
        accuracy=mean_interval(accuracies),
        loss=mean_interval(losses) if len(losses) == len(results) else None,
        diverged=sum(result.status == "diverged" for result in results),
        seconds_per_step=math.fsum(result.seconds for result in results) / max(1, sum(r.steps for r in results)),
        difference=None if baseline is None else paired_difference(accuracies, baseline),
        folders=tuple(folders),
    )
