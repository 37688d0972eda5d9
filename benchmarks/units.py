"""Losses in small and large units: a regression's targets in any, and losses summed over a picture.

    python benchmarks/units.py

Writes docs/results/units.md. DDPNOpt at its defaults, at other learning rates, and asking every sample for a decrease
of 1 whatever the units (`Gradient(cap=1)`), beside AdamW at the best of four learning rates.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from _held_out import ADAM, BATCH, HELD_OUT, Make, Task, adamw, ddpnopt, in_words, mean_of
from _markdown import command, duration, plural, save_page, table
from _progress import Bar
from _training import RESULTS
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn

from ddpnopt import DDPNOpt, Matched
from ddpnopt.experiments.environment import version


@dataclass(frozen=True)
class Arguments:
    """Losses in small and large units: a regression's targets in any, and losses summed over a picture."""

    units: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    """Standard deviations of the regression's targets."""

    lrs: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Learning rates of DDPNOpt."""

    seeds: int = 3
    """Initial weights and orders of samples."""

    steps: int = 300
    """Length of a run."""

    out: Path = RESULTS
    """Folder of the page."""


class OverPixels(nn.Module):
    """Squared errors summed over a picture, mean over pictures."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum() / len(output)


class Bound(nn.Module):
    """Negative evidence lower bound of a variational autoencoder's output, summed over pixels, mean over pictures."""

    def forward(self, output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        logits, centre, log_variance = output
        wrong = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return (wrong + (centre.square() + log_variance.exp() - 1 - log_variance).sum() / 2) / len(target)


class Variational(nn.Module):
    """64 pixels, 8 latent numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.both = nn.Linear(64, 64), nn.Linear(64, 16)
        self.decoder, self.pixels = nn.Linear(8, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centre, log_variance = self.both(torch.relu(self.encoder(x))).chunk(2, 1)
        latent = centre + torch.randn_like(centre) * (log_variance / 2).exp() if self.training else centre
        return self.pixels(torch.relu(self.decoder(latent))), centre, log_variance


def regression(unit: float) -> Task:
    """Friedman's first set, its targets with standard deviation ``unit``."""
    x, y = (torch.tensor(part, dtype=torch.float32) for part in make_friedman1(2000, noise=1.0, random_state=0))
    x, y = (x - x.mean(0)) / x.std(0), unit * (y - y.mean())[:, None] / y.std()

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    words = f"Friedman's set, targets of {unit:g}"
    return Task(words, x, y, network, nn.MSELoss(), float(y.var(correction=0)))


def pictures() -> list[Task]:
    """Autoencoders of DIGITS, with the mean and with the sum over pixels, and a variational one."""
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    spread = x - x.mean(0)

    def network() -> nn.Module:
        widths = (64, 32, 8, 32, 64)
        layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(*layers[:-1])

    squares = spread.square()
    share = x.mean(0).clamp(1e-6, 1 - 1e-6)
    entropy = float(nn.functional.binary_cross_entropy(share.expand_as(x), x, reduction="sum")) / len(x)
    return [
        Task("DIGITS, squared error, mean over pixels", spread, spread, network, nn.MSELoss(), float(squares.mean())),
        Task("DIGITS, squared error, sum", spread, spread, network, OverPixels(), float(squares.sum(1).mean())),
        Task("DIGITS, variational autoencoder, sum", x, x, Variational, Bound(), entropy),
    ]


def matched(model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    """The default but for the terminal."""
    return DDPNOpt(model, terminal=Matched(criterion))


def row(task: Task, arguments: Arguments, advance: Callable[[], None]) -> list[str]:
    """Its scores, in words."""

    def mean_score(make: Make) -> float:
        return mean_of(task, make, arguments.seeds, arguments.steps, advance)

    several = isinstance(task.criterion, Bound)  # of three tensors, of which Matched has no use
    found = [mean_score(ddpnopt(lr)) for lr in arguments.lrs]
    found += [mean_score(ddpnopt(0.1, cap=1)), float("nan") if several else mean_score(matched)]
    found.append(max(mean_score(adamw(lr)) for lr in ADAM))
    return [task.words, *map(in_words, found)]


def page(arguments: Arguments) -> str:
    """Measure, and lay the figures out."""
    began = time.perf_counter()
    tasks = [*(regression(unit) for unit in arguments.units), *pictures()]
    with Bar("units", len(tasks) * (len(arguments.lrs) + 2 + len(ADAM)) - 1) as bar:
        rows = [row(task, arguments, bar.advance) for task in tasks]
    header = ["", *(f"lr {lr:g}" for lr in arguments.lrs), "cap 1", "Matched", "AdamW"]
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    return f"""# Losses in small and large units

By default DDPNOpt asks every sample for a decrease of its loss by 1, and for more where the gradient at the model's
output is longer than a cross-entropy's can be ([derivations](../derivations.md#what-is-asked-of-a-sample)). Here are
losses in other units than a cross-entropy's: a regression whose targets have various standard deviations, and
autoencoders whose loss is a mean or a sum over the picture.

Percent of the loss of a constant output that is gone on {HELD_OUT} held-out samples after {arguments.steps} steps with
batches of {BATCH}, learning rate falling linearly to 0, mean over {plural(arguments.seeds, "seed")}; higher is better.
First the default at several learning rates; then, at lr 0.1, `Gradient(cap=1)` and `Matched(criterion)`;
AdamW is the best mean of its learning rates {", ".join(f"{lr:g}" for lr in ADAM)}, chosen on these very samples.

{table(header, rows)}

Command: `{command("units.py", arguments, ("units", "lrs", "seeds", "steps"))}`
({duration(time.perf_counter() - began)}), {software}.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    arguments = tyro.cli(Arguments, args=words)
    save_page(arguments.out, "units", page(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
