"""Validation accuracy of Kronecker's cheaper settings beside its dearest, at equal learning rates and paired seeds.

    python benchmarks/amortised.py

Writes docs/results/amortised-TASK.md for each task: what averaging the factors every few steps, and keeping wide ones
by their leading directions, does to the accuracy.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
import tyro
from _markdown import command, duration, table
from _progress import Bar
from _runner import at_hand
from _training import RESULTS
from torch import nn

from ddpnopt import DDPNOpt, Kronecker, StepError
from ddpnopt.experiments import data, models
from ddpnopt.experiments.config import TrainConfig, resolve
from ddpnopt.experiments.data import Source
from ddpnopt.experiments.environment import version
from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.job import own_random_state
from ddpnopt.experiments.train import batches, evaluate

DEAREST = Kronecker(average_every=1, rank=None)
VARIANTS: Mapping[str, Kronecker] = {
    "whole, averaged every step": DEAREST,
    "whole, averaged every 10": Kronecker(average_every=10, rank=None),
    "rank 32, averaged every 10": Kronecker(average_every=10, rank=32),
}


@dataclass(frozen=True)
class Task:
    """A network on a dataset, and for how many steps of which batch it is trained."""

    words: str
    dataset: str
    build: Callable[[Source, int], nn.Module]
    batch: int
    steps: int


def wide(source: Source, seed: int) -> nn.Module:
    """784-512-512-10, ReLU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = math.prod(source.shape)
        layers = [nn.Flatten(), nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(512, source.classes))


def named(name: str) -> Callable[[Source, int], nn.Module]:
    """One of the experiments' networks."""
    return lambda source, seed: models.build(name, source, seed)


TASKS: Mapping[str, Task] = {
    "wine": Task("WINE, the paper's dense network", "wine", named("fcn"), 16, 160),
    "digits": Task("DIGITS, the paper's dense network", "digits", named("fcn"), 16, 395),
    "pictures": Task("DIGITS as pictures, small convolution network", "digits-images", named("cnn"), 32, 200),
    "fashion": Task("Fashion-MNIST, the paper's dense network", "fashion-mnist", named("fcn"), 128, 400),
    "wide": Task("Fashion-MNIST, dense 784-512-512-10", "fashion-mnist", wide, 128, 200),
}


@dataclass(frozen=True)
class Arguments:
    """Validation accuracy of Kronecker's cheaper settings beside its dearest."""

    tasks: tuple[str, ...] = ()
    """wine, digits, pictures, fashion, wide. None: all whose data are at hand."""

    lrs: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Learning rates."""

    seeds: int = 5
    """Paired seeds: initial weights and order of samples depend on nothing else."""

    data: Path | None = None
    """Folder with the files of fashion-mnist. None: DDPNOPT_DATA, then the system's."""

    out: Path = RESULTS
    """Folder of the pages."""


loaded = lru_cache(data.load)


def accuracy(task: Task, curvature: Kronecker, lr: float, seed: int, folder: Path | None) -> float:
    """Validation accuracy in percent after the task's steps; of the last good weights if a step is not finite."""
    dataset = loaded(task.dataset, folder)
    config = resolve(TrainConfig(dataset=task.dataset, batch_size=task.batch, epochs=1000, seed=seed))
    with own_random_state(seed, threads=1):
        model, criterion = task.build(dataset.source, seed), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(model, lr, curvature=curvature, momentum=0.0, weight_decay=0.0)
        for rows in islice(batches(config, len(dataset.train.y)), task.steps):
            x, y = dataset.train.x[rows], dataset.train.y[rows]
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            try:
                optimizer.step()
            except StepError:
                break
        return 100 * evaluate(model, criterion, dataset.validation)[1]


def section(task: Task, arguments: Arguments) -> str:
    """The table of one task: mean accuracy by learning rate, and the difference to the dearest setting."""
    found: dict[str, dict[float, list[float]]] = {name: {lr: [] for lr in arguments.lrs} for name in VARIANTS}
    with Bar(task.words, arguments.seeds * len(arguments.lrs) * len(VARIANTS)) as bar:
        for seed in range(arguments.seeds):
            for lr in arguments.lrs:
                for name, curvature in VARIANTS.items():
                    found[name][lr].append(accuracy(task, curvature, lr, seed, arguments.data))
                    bar.advance()
    first = next(iter(found.values()))
    rows = []
    for name, by_lr in found.items():
        pairs = [own - other for lr in by_lr for own, other in zip(by_lr[lr], first[lr], strict=True)]
        spread = (sum((p - mean(pairs)) ** 2 for p in pairs) / max(1, len(pairs) - 1) / len(pairs)) ** 0.5
        difference = f"{mean(pairs):+.2f} ± {spread:.2f}" if by_lr is not first else ""
        rows.append([name, *(f"{mean(by_lr[lr]):.1f}" for lr in by_lr), difference])
    header = ["factors", *(f"{lr:g}" for lr in arguments.lrs), "mean difference to the first"]
    return f"## {task.words}\n\nBatch {task.batch}, {task.steps} steps.\n\n{table(header, rows)}\n"


def main(words: Sequence[str] | None = None) -> int:
    """Train, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    chosen = arguments.tasks or tuple(name for name in TASKS if at_hand(TASKS[name].dataset, arguments.data))
    if unknown := [name for name in chosen if name not in TASKS]:
        print(f"amortised: unknown task {unknown[0]!r}; choose among {', '.join(TASKS)}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        began, own = time.perf_counter(), replace(arguments, tasks=(name,))
        tables = section(TASKS[name], own)
        path = arguments.out / f"amortised-{name}.md"
        write_atomic(path, page(tables, own, time.perf_counter() - began).encode())
        print(path)
    return 0


def page(tables: str, arguments: Arguments, seconds: float) -> str:
    """What the tables are, and the command that makes them again."""
    return f"""# Kronecker factors, averaged less often and kept by their leading directions

Validation accuracy in percent against the learning rate, means over {arguments.seeds} paired seeds. The difference
is over all learning rates and seeds, run by run, with its standard error. Other settings are `Kronecker()`'s defaults;
a factor up to 8 times the rank wide is kept whole, so on narrow networks the rank changes nothing.

{tables}
Command: `{command("amortised.py", arguments, ("tasks", "lrs", "seeds"))}` ({duration(seconds)}), \
ddpnopt {version("ddpnopt")}, torch {torch.__version__}.
"""


if __name__ == "__main__":
    sys.exit(main())
