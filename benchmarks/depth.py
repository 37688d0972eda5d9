"""Plain networks that begin on a plateau, deep ones or of small weights: whether they leave it.

    python benchmarks/depth.py

DIGITS, layers of equal width without shortcuts or normalisation, dense or convolutions. DDPNOpt at its defaults,
without control limits, and with the same damping for all layers, at several learning rates, beside AdamW at the best of
four. Writes docs/results/depth.md.
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

WIDTH, CONVOLUTIONS, CHANNELS, SMALL = 32, 10, 8, 0.02
UNITS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Arguments:
    """Plain networks that begin on a plateau, deep ones or of small weights: whether they leave it."""

    layers: tuple[int, ...] = (2, 6, 12, 20)
    """Hidden ones, of dense networks at torch's initial weights."""

    lrs: tuple[float, ...] = (0.1, 10.0)
    """Learning rates of DDPNOpt."""

    seeds: int = 3
    """Initial weights and orders of samples."""

    steps: int = 300
    """Length of a run."""

    out: Path = RESULTS
    """Folder of the page."""


def digits(words: str, network: Callable[[], nn.Module]) -> Task:
    """What is worth nothing is the entropy of ten equal classes, nearly DIGITS'."""
    samples = load_digits()
    x, y = torch.tensor(samples.data / 16, dtype=torch.float32), torch.tensor(samples.target)
    return Task(words, x - x.mean(0), y, network, nn.CrossEntropyLoss(), math.log(10))


def dense(layers: int, unit: type[nn.Module]) -> nn.Module:
    """A chain of so many hidden layers."""
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(WIDTH, WIDTH), unit())]
    return nn.Sequential(nn.Linear(64, WIDTH), unit(), *hidden, nn.Linear(WIDTH, 10))


def convolutions() -> nn.Module:
    """Of as many channels each, on pictures of full size."""
    hidden = [m for i in range(CONVOLUTIONS) for m in (nn.Conv2d(CHANNELS if i else 1, CHANNELS, 3, 1, 1), nn.ReLU())]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *hidden, nn.Flatten(), nn.Linear(64 * CHANNELS, 10))


def small() -> nn.Module:
    """Four layers that begin as language models' do."""
    network = dense(4, nn.GELU)
    for parameter in network.parameters():
        _ = nn.init.normal_(parameter, 0, SMALL) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return network


def tasks(layers: Sequence[int]) -> list[Task]:
    """All networks."""
    deep = [digits(f"{name}, {n}", partial(dense, n, unit)) for name, unit in UNITS.items() for n in layers]
    words = f"{CONVOLUTIONS} convolutions, ReLU"
    return [*deep, digits(words, convolutions), digits(f"GELU, 4, weights of {SMALL:g}", small)]


def row(task: Task, arguments: Arguments, advance: Callable[[], None]) -> list[str]:
    """Its scores, in words."""

    def mean_score(make: Make) -> float:
        return mean_of(task, make, arguments.seeds, arguments.steps, advance)

    found = [mean_score(way(lr)) for way in (ddpnopt, unlimited, partial(ddpnopt, cap=1)) for lr in arguments.lrs]
    return [task.words, *map(in_words, [*found, max(mean_score(adamw(lr)) for lr in ADAM)])]


def page(arguments: Arguments) -> str:
    """Measure, and lay the figures out."""
    began = time.perf_counter()
    found = tasks(arguments.layers)
    with Bar("depth", len(found) * (3 * len(arguments.lrs) + len(ADAM))) as bar:
        rows = [row(task, arguments, bar.advance) for task in found]
    rates = [f"lr {lr:g}" for lr in arguments.lrs]
    header = [
        "hidden layers",
        *rates,
        *(f"{rate}, {way}" for way in ("no limit", "even damping") for rate in rates),
        "AdamW",
    ]
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    return f"""# Depth without shortcuts

Networks without shortcuts or normalisation, whose initial weights make signals and gradients smaller from layer to
layer: dense ones with layers of {WIDTH} units, {CONVOLUTIONS} convolutions of {CHANNELS} channels, at torch's initial
weights, and four dense layers with weights of standard deviation {SMALL:g} instead. `no limit`: `max_change=inf`
([derivations](../derivations.md#control-limits)); `even damping`: `Gradient(cap=1)`, with which all layers get the same
damping, however little they move the output ([derivations](../derivations.md#damping-and-sensitivity)). How a layer's
damping falls was chosen on some of these networks, with these seeds.

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
