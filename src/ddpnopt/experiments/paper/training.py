"""The task ``train``: one network, one optimizer, one seed."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import ddpnopt
from ddpnopt.experiments import data
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.job import own_random_state
from ddpnopt.experiments.paper.methods import METHODS, Setup
from ddpnopt.experiments.paper.problems import PROBLEMS, Problem, network
from ddpnopt.experiments.study.task import Result
from ddpnopt.experiments.train import evaluate, order

POINT = 10  # batches whose losses make one point of the curve
TRAIN_SAMPLES = 5000  # of the train part on which the final loss is taken


def run(settings: Mapping[str, Any]) -> Result:
    """Train and measure, on one thread.

    Args:
        settings: ``problem``, ``method`` and ``params`` (keys of ``PROBLEMS``, ``METHODS``, hyper-parameters),
            ``weight_decay``, ``steps``, ``seed``. Initial weights and order of the samples depend on the seed alone,
            so that methods are paired. ``device`` (default "cpu"): where, as torch names it.

    Returns:
        ``validation`` and ``test``: accuracy of the last weights, 0 to 1; ``loss``: mean over (the first 5,000 of)
        the train part, None where it is not finite; ``diverged``: the step at which loss or update was not finite, or
        after which the final loss is not, else None; ``curve``: mean loss of every ten batches; ``seconds``: in steps.
    """
    problem, seed = PROBLEMS[settings["problem"]], int(settings["seed"])
    device, steps = str(settings.get("device", "cpu")), int(settings["steps"])
    dataset = loaded(problem.dataset, device)
    with own_random_state(seed, threads=1):
        model, criterion = network(problem, dataset.source, seed).to(device), nn.CrossEntropyLoss()
        setup = Setup(model, criterion, problem.batch_size, settings["weight_decay"])
        optimizer = METHODS[settings["method"]].build(setup, settings["params"])
        losses, seconds = _train(model, criterion, optimizer, dataset, problem, steps, seed)
        few = data.Part(dataset.train.x[:TRAIN_SAMPLES], dataset.train.y[:TRAIN_SAMPLES])
        loss = evaluate(model, criterion, few)[0]
        return {
            "validation": round(evaluate(model, criterion, dataset.validation)[1], 6),
            "test": round(evaluate(model, criterion, dataset.test)[1], 6),
            "loss": float(f"{loss:.6g}") if math.isfinite(loss) else None,
            "diverged": None if len(losses) == steps and math.isfinite(loss) else min(len(losses) + 1, steps),
            "curve": [float(f"{math.fsum(part) / len(part):.5g}") for part in _blocks(losses)],
            "seconds": round(seconds, 4),
        }


@lru_cache(2)
def loaded(name: str, device: str = "cpu") -> Dataset:
    """A dataset on a device, kept for the next task of the same process."""
    dataset = data.load(name)
    parts = (dataset.train, dataset.validation, dataset.test)
    train, validation, test = (data.Part(part.x.to(device), part.y.to(device)) for part in parts)
    return replace(dataset, train=train, validation=validation, test=test)


def batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Sample numbers of batch after batch without end; every epoch in a new order, its last smaller batch dropped."""
    epoch = 0
    while True:
        yield from (rows for rows in torch.split(order(samples, seed, epoch), size) if len(rows) == size)
        epoch += 1


def _train(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    problem: Problem,
    steps: int,
    seed: int,
) -> tuple[list[float], float]:
    """Losses of the steps taken, fewer than asked for if one was not finite, and the seconds they took."""
    losses: list[float] = []
    x, y = dataset.train.x, dataset.train.y
    began = time.perf_counter()
    for _, rows in zip(range(steps), batches(len(y), problem.batch_size, seed), strict=False):
        optimizer.zero_grad()
        loss = criterion(model(x[rows]), y[rows])
        if not math.isfinite(float(loss.detach())):
            break
        loss.backward()
        try:
            optimizer.step()
        except ValueError as error:  # the step is not finite; weights are as before it
            if isinstance(error, ddpnopt.StepError) or "finite" in str(error):
                break
            raise
        losses.append(float(loss.detach()))
    return losses, time.perf_counter() - began


def _blocks(losses: list[float]) -> Iterator[list[float]]:
    yield from (losses[start : start + POINT] for start in range(0, len(losses), POINT))
