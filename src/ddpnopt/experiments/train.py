"""Train one network with one optimizer, in a folder that can be continued bit-exactly after any stop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ddpnopt
from ddpnopt.experiments import files, optimizers, runs
from ddpnopt.experiments.config import TrainConfig, resolve
from ddpnopt.experiments.data import Dataset, Part
from ddpnopt.experiments.interrupt import StoppedError
from ddpnopt.experiments.job import Job, own_random_state, restore, save, start
from ddpnopt.experiments.progress import Reporter, Silent
from ddpnopt.experiments.runs import Result
from ddpnopt.experiments.team import ALONE, Team

_EVALUATION_BATCH = 2048


def train(
    config: TrainConfig,
    folder: Path,
    dataset: Dataset,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
) -> Result:
    """Run, or continue, a training run to its end; a finished run is read back and not repeated.

    Args:
        config: settings; Nones are resolved.
        folder: run folder; made where it does not exist. Settings found there must be the same.
        dataset: the loaded dataset that ``config`` names.
        reporter: is told of every step and epoch; default nobody.
        stop: asked after each step; on True the run is checkpointed and :class:`StoppedError` raised.
        team: the processes that share each batch, every one of which calls this; default this one alone. The folder is
            rank 0's, and so is the reporter that is told anything worth telling.
    """
    config, reporter = resolve(config), reporter or Silent()
    note, done = team.from_first(lambda: (runs.prepare(config, folder, team.size), runs.finished(folder)))
    if done is not None:
        return done
    if note:
        reporter.line(note)
    with own_random_state(config.seed, config.threads):
        with team.together():
            job = start(config, dataset.source)
        kept = restore(job, config, folder, team)
        with _metrics(folder, kept, team) as metrics:
            reason = _loop(job, config, dataset, metrics, folder, reporter, stop, team)
        return team.from_first(lambda: _finish(job, dataset, reason, folder))


def total_steps(config: TrainConfig, samples: int) -> int:
    """Steps of a whole run over ``samples`` training samples; the last batch of an epoch may be smaller."""
    resolved = resolve(config)
    return int(resolved.epochs or 0) * _steps_per_epoch(resolved, samples)


def batches(config: TrainConfig, samples: int, first: int = 0) -> Iterator[Tensor]:
    """Yield the sample numbers of each batch, from step ``first`` (default 0) to the end of the run.

    The order is a pure function of seed and epoch, so a run can be continued anywhere.
    """
    per_epoch, size = _steps_per_epoch(config, samples), int(config.batch_size or 0)
    for epoch in range(first // per_epoch, int(config.epochs or 0)):
        shuffled = order(samples, config.seed, epoch)
        yield from torch.split(shuffled, size)[max(0, first - epoch * per_epoch) :]


def order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the numbers 0 to ``samples - 1`` in the order of an epoch, a pure function of seed and epoch."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    return torch.randperm(samples, generator=torch.Generator().manual_seed(mixed >> 1))


def evaluate(model: nn.Module, criterion: nn.Module, part: Part) -> tuple[float, float]:
    """Mean loss and accuracy (0 to 1) over a part; the model is left in training mode."""
    model.eval()
    loss = correct = 0.0
    with torch.no_grad():
        for x, y in zip(torch.split(part.x, _EVALUATION_BATCH), torch.split(part.y, _EVALUATION_BATCH), strict=True):
            logits = model(x)
            loss += float(criterion(logits, y)) * len(y)
            correct += int((logits.argmax(1) == y).sum())
    model.train()
    return loss / len(part), correct / len(part)


class _DivergedError(Exception):
    """The loss or the step is not finite."""


def _steps_per_epoch(config: TrainConfig, samples: int) -> int:
    return math.ceil(samples / int(config.batch_size or 1))


@contextmanager
def _metrics(folder: Path, kept: int, team: Team) -> Iterator[files.Metrics | None]:
    """The file of metrics, which rank 0 alone writes."""
    if not team.leads:
        yield None
        return
    with team.together():
        opened = files.Metrics(folder / files.METRICS, kept)
    with closing(opened):
        yield opened


def _loop(
    job: Job,
    config: TrainConfig,
    dataset: Dataset,
    metrics: files.Metrics | None,
    folder: Path,
    reporter: Reporter,
    stop: Callable[[], bool],
    team: Team,
) -> str | None:
    """Take the remaining steps; returns why the run diverged, or None."""
    samples = len(dataset.train)
    total = total_steps(config, samples)
    reads = optimizers.reads_gradients(config)
    for rows in batches(config, samples, job.step):
        reason, own = None, team.own(rows)
        share = len(own) / len(rows)
        if reads and not share:
            own = rows[:1]  # of no weight: an optimizer that does not know of the others would refuse no samples
        with team.together():
            try:
                loss = _step(job, dataset.train.x[own], dataset.train.y[own], share, team, reads)
                reporter.step(job.step, total, loss)
                if metrics is not None:
                    _log(job, config, dataset, metrics, reporter)
            except _DivergedError as error:
                reason = f"step {job.step + 1}: {error}"
        words = team.agree(2.0 if reason is not None else float(stop()))
        if (words == 2).any():
            return reason or f"step {job.step}: refused by rank {int(words.argmax())}"
        stopped = bool(words.any()) and job.step < total
        with team.together():
            due = stopped or job.step % config.checkpoint_every == 0 or job.step == total
            if due and metrics is not None:
                save(job, config, folder, metrics)
        if stopped:
            team.agree()  # that the checkpoint is written
            raise StoppedError(folder, job.step, total)
    return None


def _step(job: Job, x: Tensor, y: Tensor, share: float, team: Team, reads_gradients: bool) -> float:
    """One training step on this rank's share of the batch, timed; returns the whole batch's loss before it."""
    began = time.perf_counter()
    job.optimizer.zero_grad()
    loss = job.criterion(job.model(x), y)
    loss.backward()
    value = team.mean(float(loss.detach()), share)
    if not math.isfinite(value):
        raise _DivergedError(f"the loss is {value}")
    if reads_gradients:
        team.average_gradients(job.model, share)
    try:
        job.optimizer.step()
    except ddpnopt.StepError as error:
        raise _DivergedError(str(error)) from error
    job.seconds += time.perf_counter() - began
    job.step += 1
    job.pending.append(value)
    return value


def _log(job: Job, config: TrainConfig, dataset: Dataset, metrics: files.Metrics, reporter: Reporter) -> None:
    """Write the lines of metrics that are due after this step."""
    per_epoch = _steps_per_epoch(config, len(dataset.train))
    epoch = math.ceil(job.step / per_epoch)  # counted from 1
    seconds = round(job.seconds, 6)
    if job.step % config.log_every == 0:
        mean = math.fsum(job.pending) / len(job.pending)
        metrics.append(kind="step", step=job.step, epoch=epoch, train_loss=mean, seconds=seconds)
        job.pending.clear()
    if job.step % per_epoch == 0:
        loss, accuracy = evaluate(job.model, job.criterion, dataset.train)
        _, validation = evaluate(job.model, job.criterion, dataset.validation)
        metrics.append(
            kind="epoch",
            step=job.step,
            epoch=epoch,
            train_loss=_finite(loss),
            train_accuracy=accuracy,
            validation_accuracy=validation,
            seconds=seconds,
        )
        reporter.line(
            f"epoch {epoch}/{config.epochs}  step {job.step}  train loss {loss:.4g}  "
            f"validation accuracy {validation:.1%}  {seconds:.1f} s"
        )


def _finish(job: Job, dataset: Dataset, reason: str | None, folder: Path) -> Result:
    """Measure the last weights and record how the run ended."""
    loss, train_accuracy = evaluate(job.model, job.criterion, dataset.train)
    if reason is None and not math.isfinite(loss):
        reason = f"the loss over the training data is {loss} at the end"
    result = Result(
        status="finished" if reason is None else "diverged",
        reason=reason,
        steps=job.step,
        train_loss=_finite(loss),
        train_accuracy=train_accuracy,
        validation_accuracy=evaluate(job.model, job.criterion, dataset.validation)[1],
        test_accuracy=evaluate(job.model, job.criterion, dataset.test)[1],
        seconds=job.seconds,
    )
    runs.finish(folder, result)
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
