"""Plain networks of many layers, at torch's initial weights: whether they leave the plateau that they begin on.

    python benchmarks/depth.py

DIGITS, layers of equal width without shortcuts or normalisation. DDPNOpt at its defaults and with a small damping under
a control limit, at several learning rates, beside AdamW at the best of four. Writes docs/results/depth.md.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import tyro
from _markdown import command, duration, plural, table
from _progress import Bar
from _training import RESULTS
from sklearn.datasets import load_digits
from torch import nn
from units import ADAM, BATCH, HELD_OUT, Make, Task, adamw, ddpnopt, in_words, score

from ddpnopt import DDPNOpt, Kronecker
from ddpnopt.experiments.environment import version
from ddpnopt.experiments.files import write_atomic

WIDTH = 32
UNITS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Arguments:
    """Plain networks of many layers, at torch's initial weights: whether they leave the plateau that they begin on."""

    layers: tuple[int, ...] = (2, 6, 12, 20)
    """Hidden ones."""

    lrs: tuple[float, ...] = (0.1, 10.0)
    """Learning rates of DDPNOpt."""

    limit: float = 0.03
    """Of a layer's change in a step, `max_change`."""

    damping: float = 0.001
    """With the limit."""

    seeds: int = 2
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

    nothing = float(torch.log(torch.tensor(10.0)))
    return Task(f"{unit}, {layers}", x - x.mean(0), y, network, nn.CrossEntropyLoss(), nothing)


def held(lr: float, arguments: Arguments) -> Make:
    """DDPNOpt with little damping, held by its limit instead."""
    curvature = Kronecker(damping=arguments.damping)
    return lambda model, _: DDPNOpt(model, lr, curvature=curvature, max_change=arguments.limit)


def row(task: Task, arguments: Arguments, advance: Callable[[], None]) -> list[str]:
    """Its scores, in words."""

    def mean_score(make: Make) -> float:
        found = mean(score(task, make, seed, arguments.steps) for seed in range(arguments.seeds))
        advance()
        return found

    found = [mean_score(ddpnopt(lr)) for lr in arguments.lrs]
    found += [mean_score(held(lr, arguments)) for lr in arguments.lrs]
    return [task.words, *map(in_words, [*found, max(mean_score(adamw(lr)) for lr in ADAM)])]


def page(arguments: Arguments) -> str:
    """Measure, and lay the figures out."""
    began = time.perf_counter()
    tasks = [digits(layers, unit) for unit in UNITS for layers in arguments.layers]
    with Bar("depth", len(tasks) * (2 * len(arguments.lrs) + len(ADAM))) as bar:
        rows = [row(task, arguments, bar.advance) for task in tasks]
    rates = [f"lr {lr:g}" for lr in arguments.lrs]
    header = ["units, hidden layers", *rates, *(f"{rate}, held" for rate in rates), "AdamW"]
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    return f"""# Depth without shortcuts

Layers of {WIDTH} units, without shortcuts or normalisation, at torch's initial weights, which make signals and
gradients smaller from layer to layer. Far from the output gradients are then nothing against the default damping of
0.1, and layers stay as they are. With less damping steps are as long as the outputs ask for, which is far too long for
the many layers that make them together, unless they are held. `held`: `Kronecker(damping={arguments.damping:g})` and
`max_change={arguments.limit:g}` ([derivations](../derivations.md#control-limits)).

DIGITS: percent of the loss of equal odds that is gone on {HELD_OUT} held-out samples after {arguments.steps} steps with
batches of {BATCH}, learning rate falling linearly to 0, mean over {plural(arguments.seeds, "seed")}; higher is better;
failed: a step of one of them met what is not finite. AdamW is the best mean of its learning rates
{", ".join(f"{lr:g}" for lr in ADAM)}, chosen on these very samples.

{table(header, rows)}

Command: `{command("depth.py", arguments, ("layers", "lrs", "limit", "damping", "seeds", "steps"))}`
({duration(time.perf_counter() - began)}), {software}.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    arguments = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    text = page(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "depth.md"
    write_atomic(path, text.encode())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
