"""One training run of a benchmark: settings in, figures out, nothing written."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ddpnopt
from ddpnopt.experiments import data, optimizers
from ddpnopt.experiments.config import TrainConfig, resolve
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.environment import code
from ddpnopt.experiments.job import Job, own_random_state, start
from ddpnopt.experiments.train import batches, evaluate
from ddpnopt.units import settled

REPORTED_SEEDS = 10  # 0, 1, 2, ... unless the user says otherwise
TUNING_SEEDS = tuple(range(1000, 1010))  # never among those reported
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Run:
    """A run to carry out.

    Attributes:
        config: its settings, resolved. Initial weights and order of the samples depend on its seed alone.
        marks: steps after which accuracy is measured, ascending; the run ends at the last. Empty: measured once,
            after the last epoch.
    """

    config: TrainConfig
    marks: tuple[int, ...] = ()

    def settings(self) -> dict[str, Any]:
        """All that decides the run's numbers, as plain values."""
        config = self.config
        return {
            "dataset": config.dataset,
            "model": config.model,
            "method": method(config),
            "lr": config.lr,
            "batch_size": config.batch_size,
            "epochs": None if self.marks else config.epochs,
            "marks": list(self.marks),
            "seed": config.seed,
        }


def plan(config: TrainConfig, marks: Iterable[int] = ()) -> Run:
    """Return the run with these settings; whatever is None in them is filled in."""
    return Run(resolve(config), tuple(marks))


def method(config: TrainConfig) -> str:
    """Write out a resolved configuration's optimizer with every option it is built with, except the learning rate."""
    return _written(replace(config, lr=1.0, seed=0))


def check_seeds(seeds: int) -> None:
    """Refuse a number of reported seeds that is none or would reach those used for tuning."""
    if not 1 <= seeds <= min(TUNING_SEEDS):
        raise ValueError(f"seeds must be from 1 to {min(TUNING_SEEDS)}, but it is {seeds}")


def train(run: Run, folder: Path | None = None) -> dict[str, Any]:
    """Carry out a run on one thread.

    Args:
        run: what to do.
        folder: of a dataset that is not bundled; see ``data.load``.

    Returns:
        ``validation`` and ``test``: accuracies, 0 to 1, at each mark (those of the last weights where the run
        diverged before); ``train_loss``: over the whole train part at the end, or None where it is not finite;
        ``diverged``: whether a loss or a step was not finite; ``steps``; ``seconds`` spent in them; ``wall``:
        seconds in all; ``torch``: its version; ``code``: fingerprint of the library's source.
    """
    began = time.perf_counter()
    config, dataset = run.config, _dataset(run.config.dataset, folder)
    with own_random_state(config.seed, threads=1):
        job = start(config, dataset.source)
        measured = list(_measurements(job, run, dataset))
        loss, _ = evaluate(job.model, job.criterion, dataset.train)
    planned = max(1, len(run.marks))
    diverged = len(measured) < planned or not math.isfinite(loss)
    if len(measured) < planned:
        measured += [_accuracies(job, dataset)] * (planned - len(measured))
    validation, test = zip(*measured, strict=True)
    return {
        "validation": [round(value, 6) for value in validation],
        "test": [round(value, 6) for value in test],
        "train_loss": float(f"{loss:.6g}") if math.isfinite(loss) else None,
        "diverged": diverged,
        "steps": job.step,
        "seconds": round(job.seconds, 3),
        "wall": round(time.perf_counter() - began, 3),
        "torch": torch.__version__,
        "code": code(),
    }


def _measurements(job: Job, run: Run, dataset: Dataset) -> Iterator[tuple[float, float]]:
    """Train; yield validation and test accuracy at each mark. Ends early if the run diverges."""
    x, y = dataset.train.x, dataset.train.y
    steps = islice(batches(run.config, len(y)), run.marks[-1] if run.marks else None)
    for rows in steps:
        if not _step(job, x[rows], y[rows]):
            return
        if job.step in run.marks:
            yield _accuracies(job, dataset)
    if not run.marks:
        yield _accuracies(job, dataset)


def _step(job: Job, x: Tensor, y: Tensor) -> bool:
    """One step in the drop-in form, timed; False where the loss or the step is not finite."""
    began = time.perf_counter()
    job.optimizer.zero_grad()
    loss = job.criterion(job.model(x), y)
    if not math.isfinite(float(loss.detach())):
        return False
    loss.backward()
    try:
        job.optimizer.step()
    except ddpnopt.StepError:
        return False
    job.seconds += time.perf_counter() - began
    job.step += 1
    return True


def _accuracies(job: Job, dataset: Dataset) -> tuple[float, float]:
    validation, test = (evaluate(job.model, job.criterion, part)[1] for part in (dataset.validation, dataset.test))
    return validation, test


@lru_cache
def _dataset(name: str, folder: Path | None) -> Dataset:
    return data.load(name, folder)


@lru_cache
def _written(config: TrainConfig) -> str:
    built = optimizers.build(config, nn.Linear(1, 1), nn.CrossEntropyLoss())
    options = {name: value for name, value in built.defaults.items() if name != "lr" and value and value != math.inf}
    if "weight_decay" not in options:  # of which kind none is makes no other run
        options.pop("decoupled_weight_decay", None)
    if isinstance(built, ddpnopt.DDPNOpt):
        options = {"coupling": built.coupling, "feedback": built.feedback} | options
        # a cross-entropy's samples are asked for 1, whoever settles it
        words = [repr(built.curvature), repr(settled(built.terminal, 1.0))]
    else:
        words = []
    words += [f"{name}={value!r}" for name, value in options.items()]
    return f"{type(built).__name__}({', '.join(words)})"
