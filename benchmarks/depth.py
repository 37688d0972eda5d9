"""Plain networks of many layers, at torch's initial weights: whether they leave the plateau that they begin on.

    python benchmarks/depth.py

DIGITS, layers of equal width without shortcuts or normalisation. DDPNOpt at its defaults, without control limits, and
with the same damping for all layers, at several learning rates, beside AdamW at the best of four. Writes
docs/results/depth.md.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from _held_out import ADAM, BATCH, HELD_OUT, Make, Task, adamw, ddpnopt, in_words, mean_of, unlimited
from _markdown import command, duration, plural, save_page, table
from _progress import Bar
from _training import RESULTS
from sklearn.datasets import load_digits
from torch import nn

from ddpnopt.experiments.environment import version

WIDTH = 32
UNITS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Arguments:
    """Plain networks of many layers, at torch's initial weights: whether they leave the plateau that they begin on."""

    layers: tuple[int, ...] = (2, 6, 12, 20)
    """Hidden ones."""

    lrs: tuple[float, ...] = (0.1, 10.0)
    """Learning rates of DDPNOpt."""

    seeds: int = 3
    """Initial weights and orders of samples."""

    steps: int = 300
    """Length of a run."""

    out: Path = RESULTS
    """Folder of the page."""


def digits(layers: int, unit: str) -> Task:
    """A chain of so many hidden layers; what is worth nothing is the entropy of ten equal classes, nearly DIGITS'."""
    samples = load_digits()
    x, y = torch.tensor(samples.data / 16, dtype=torch.float32), torch.tensor(samples.target)

    def network() -> nn.Module:
        hidden = [m for _ in range(layers - 1) for m in (nn.Linear(WIDTH, WIDTH), UNITS[unit]())]
        return nn.Sequential(nn.Linear(64, WIDTH), UNITS[unit](), *hidden, nn.Linear(WIDTH, 10))

    nothing = math.log(10)
    return Task(f"{unit}, {layers}", x - x.mean(0), y, network, nn.CrossEntropyLoss(), nothing)


def row(task: Task, arguments: Arguments, advance: Callable[[], None]) -> list[str]:
    """Its scores, in words."""

    def mean_score(make: Make) -> float:
        return mean_of(task, make, arguments.seeds, arguments.steps, advance)

    found = [mean_score(way(lr)) for way in (ddpnopt, unlimited, partial(ddpnopt, cap=1)) for lr in arguments.lrs]
    return [task.words, *map(in_words, [*found, max(mean_score(adamw(lr)) for lr in ADAM)])]


def page(arguments: Arguments) -> str:
    """Measure, and lay the figures out."""
    began = time.perf_counter()
    tasks = [digits(layers, unit) for unit in UNITS for layers in arguments.layers]
    with Bar("depth", len(tasks) * (3 * len(arguments.lrs) + len(ADAM))) as bar:
        rows = [row(task, arguments, bar.advance) for task in tasks]
    rates = [f"lr {lr:g}" for lr in arguments.lrs]
    header = [
        "units, hidden layers",
        *rates,
        *(f"{rate}, {way}" for way in ("no limit", "even damping") for rate in rates),
        "AdamW",
    ]
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    return f"""# Depth without shortcuts

Layers of {WIDTH} units, without shortcuts or normalisation, at torch's initial weights, which make signals and
gradients smaller from layer to layer. `no limit`: `max_change=inf`
([derivations](../derivations.md#control-limits)); `even damping`: `Gradient(cap=1)`, with which all layers get the same
damping, however little they move the output ([derivations](../derivations.md#damping-and-sensitivity)).

DIGITS: percent of the loss of equal odds that is gone on {HELD_OUT} held-out samples after {arguments.steps} steps with
batches of {BATCH}, learning rate falling linearly to 0, mean over {plural(arguments.seeds, "seed")}; higher is better;
failed: a step of one of them met what is not finite. AdamW is the best mean of its learning rates
{", ".join(f"{lr:g}" for lr in ADAM)}, chosen on these very samples.

{table(header, rows)}

Command: `{command("depth.py", arguments, ("layers", "lrs", "seeds", "steps"))}`
({duration(time.perf_counter() - began)}), {software}.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    arguments = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    save_page(arguments.out, "depth", page(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
