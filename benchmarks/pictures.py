"""Losses that are a mean over a picture's pixels, and what a control limit does for them.

    python benchmarks/pictures.py

Autoencoders of CIFAR-10, convolutional and dense, and grey levels of Fashion-MNIST's pictures from blurred ones, a
class for every pixel. DDPNOpt with and without `max_change`, at several learning rates, beside AdamW at the best of
four. Needs both data sets (`ddpnopt data fetch`); writes docs/results/pictures.md.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from _held_out import ADAM, BATCH, HELD_OUT, Make, Task, adamw, ddpnopt, in_words, mean_of, unlimited
from _markdown import command, duration, plural, save_page, table
from _progress import Bar
from _training import RESULTS
from torch import Tensor, nn

from ddpnopt.experiments import data
from ddpnopt.experiments.environment import version

SAMPLES = 4500
LEVELS = 4


@dataclass(frozen=True)
class Arguments:
    """Losses that are a mean over a picture's pixels, and what a control limit does for them."""

    lrs: tuple[float, ...] = (0.01, 0.1, 10.0)
    """Learning rates of DDPNOpt."""

    seeds: int = 2
    """Initial weights and orders of samples."""

    steps: int = 120
    """Length of a run."""

    folder: Path | None = None
    """Folder with the data. None: the cache of `ddpnopt data fetch`."""

    out: Path = RESULTS
    """Folder of the page."""


def convolutional() -> nn.Module:
    """Three convolutions down to 4 x 4 x 8 numbers, three up again."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 8, 3, 2, 1),
        nn.ReLU(), nn.ConvTranspose2d(8, 24, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )  # fmt: skip


def dense() -> nn.Module:
    """3,072 numbers through 128 and 32."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 128), nn.Tanh(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 128), nn.Tanh(),
        nn.Linear(128, 3072), nn.Unflatten(1, (3, 32, 32)),
    )  # fmt: skip


def sharpener() -> nn.Module:
    """Classes of every pixel, from its neighbourhood."""
    layers = [nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, LEVELS, 1)]
    return nn.Sequential(*layers)


def tasks(folder: Path | None) -> list[Task]:
    """All three; the loss that is worth nothing is that of the best constant picture."""
    colour, grey = (data.load(name, folder).train.x[:SAMPLES] for name in ("cifar10", "fashion-mnist"))
    blurred = nn.functional.avg_pool2d(grey, 7, 1, 3)
    levels = ((grey - grey.min()) * ((LEVELS - 1e-3) / (grey.max() - grey.min()))).long().squeeze(1)
    squares = float((colour - colour.mean(0)).square().mean())
    words = "CIFAR-10, autoencoder"
    return [
        Task(f"{words}, convolutional", colour, colour, convolutional, nn.MSELoss(), squares),
        Task(f"{words}, dense", colour, colour, dense, nn.MSELoss(), squares),
        Task("Fashion-MNIST, level of each pixel", blurred, levels, sharpener, nn.CrossEntropyLoss(), _entropy(levels)),
    ]


def _entropy(levels: Tensor) -> float:
    shares = nn.functional.one_hot(levels, LEVELS).double().mean(0)
    return float(torch.special.entr(shares).sum(-1).mean())


def row(task: Task, arguments: Arguments, advance: Callable[[], None]) -> list[str]:
    """Its scores, in words."""

    def mean_score(make: Make) -> float:
        return mean_of(task, make, arguments.seeds, arguments.steps, advance)

    found = [mean_score(way(lr)) for way in (ddpnopt, unlimited) for lr in arguments.lrs]
    found += [mean_score(ddpnopt(0.1, cap=1)), max(mean_score(adamw(lr)) for lr in ADAM)]
    return [task.words, *map(in_words, found)]


def page(arguments: Arguments) -> str:
    """Measure, and lay the figures out."""
    began, found = time.perf_counter(), tasks(arguments.folder)
    with Bar("pictures", len(found) * (2 * len(arguments.lrs) + 1 + len(ADAM))) as bar:
        rows = [row(task, arguments, bar.advance) for task in found]
    rates = [f"lr {lr:g}" for lr in arguments.lrs]
    header = ["", *rates, *(f"{rate}, no limit" for rate in rates), "cap 1", "AdamW"]
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    return f"""# A mean over a picture's pixels

Networks whose loss is a mean over all pixels of a picture, and so has gradients that are tiny, at the start most of
all. By default DDPNOpt counts the pixels, which takes them for independent
([derivations](../derivations.md#a-mean-over-many-outputs)); `cap 1`: at lr 0.1 `Gradient(cap=1)`, which does not.
`no limit`: `max_change=inf`, layers may change by any part of themselves in a step
([derivations](../derivations.md#control-limits)).

Percent of the loss of the best constant picture that is gone on {HELD_OUT} held-out ones after {arguments.steps} steps
with batches of {BATCH}, learning rate falling linearly to 0, mean over {plural(arguments.seeds, "seed")}; higher is
better; failed: a step of one of them met what is not finite. AdamW is the best mean of its learning rates
{", ".join(f"{lr:g}" for lr in ADAM)}, chosen on these very samples.

{table(header, rows)}

Command: `{command("pictures.py", arguments, ("lrs", "seeds", "steps"))}`
({duration(time.perf_counter() - began)}), {software}.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    arguments = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    save_page(arguments.out, "pictures", page(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
