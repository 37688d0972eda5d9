"""What a float32 step over several ranks loses, with per-sample gradients sent rounded and whole.

    python benchmarks/distributed_rounding.py

Writes docs/results/distributed_rounding.md. Needs Fashion-MNIST (``ddpnopt data fetch fashion-mnist``).
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from _markdown import command, duration, save_page, table
from _training import RESULTS
from distributed_bytes import BATCH, on_ranks
from torch import Tensor, nn

from ddpnopt import Batch, DDPNOpt
from ddpnopt.experiments.data import load
from ddpnopt.experiments.environment import version
from ddpnopt.experiments.paper.networks import cnn, seeded

Samples = tuple[Tensor, Tensor]

NETWORKS: dict[str, tuple[str, Callable[[], nn.Sequential]]] = {
    "conv net, 16 channels, DIGITS": ("digits-images", lambda: cnn((1, 8, 8), 10, channels=16, width=32)),
    "the paper's CNN, Fashion-MNIST": ("fashion-mnist", lambda: cnn((1, 28, 28), 10)),
}


@dataclass(frozen=True)
class Arguments:
    """Errors of one float32 step over several ranks, with rounded and with whole messages."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """Which."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of processes."""

    lrs: tuple[float, ...] = (0.1, 10.0)
    """Learning rates, of the training and of the step."""

    after: tuple[int, ...] = (0, 5, 20, 65)
    """Steps of training after which a step is measured."""

    batches: int = 3
    """How many such steps, from one state, each on its own batch."""

    out: Path = RESULTS
    """Folder of the page."""


@dataclass(frozen=True)
class Place:
    """Where a run has come to, and the batches from there."""

    weights: dict[str, Tensor]
    state: dict[str, Any]
    batches: list[Samples]


@dataclass(frozen=True)
class Errors:
    """Of one step, over the length of the float64 step: ``apart`` is between the other two."""

    whole: float
    rounded: float
    apart: float


def places(network: str, lr: float, size: int, after: Sequence[int], batches: int) -> list[Place]:
    """A run of one process in float32, at some of its steps."""
    name, make = NETWORKS[network]
    data = load(name).train
    x, y = torch.as_tensor(data.x).float(), torch.as_tensor(data.y)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Samples:
        picked = torch.randint(len(x), (BATCH * size,), generator=generator)
        return x[picked], y[picked]

    model = seeded(make, 0)
    optimizer, found = DDPNOpt(model, lr, momentum=0.0), []
    for step in range(max(after) + 1):
        if step in after:
            held = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            found.append(Place(*held, [batch() for _ in range(batches)]))
        _step(model, optimizer, batch())
    return found


def updates(
    network: str, lr: float, there: Sequence[Place], dtype: torch.dtype, coupling: Batch, rank: int = 0, size: int = 1
) -> list[Tensor]:
    """One step from each place on each batch, of which this rank has its part; in float64."""
    found = []
    for place in there:
        for x, y in place.batches:
            model = NETWORKS[network][1]()
            model.load_state_dict(place.weights)
            optimizer = DDPNOpt(model.to(dtype), lr, coupling=coupling, momentum=0.0)
            optimizer.load_state_dict(_in(dtype, place.state))
            before = nn.utils.parameters_to_vector(model.parameters()).detach().double()
            _step(model, optimizer, (x.to(dtype).tensor_split(size)[rank], y.tensor_split(size)[rank]))
            found.append(nn.utils.parameters_to_vector(model.parameters()).detach().double() - before)
    return found


def _on_a_rank(rank: int, size: int, network: str, lr: float, there: Sequence[Place], rounded: bool) -> list[Tensor]:
    return updates(network, lr, there, torch.float32, Batch(rounded=rounded), rank, size)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples) -> None:
    x, y = samples
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def _in(dtype: torch.dtype, state: Any) -> Any:
    """A state dict with its numbers in another precision."""
    if isinstance(state, dict):
        return {key: _in(dtype, value) for key, value in state.items()}
    if isinstance(state, Tensor) and state.is_floating_point():
        return state.to(dtype)
    return copy.deepcopy(state)


def measure(network: str, lr: float, size: int, after: Sequence[int], batches: int) -> list[Errors]:
    """One for each step that was measured."""
    there = places(network, lr, size, after, batches)
    exact = updates(network, lr, there, torch.float64, Batch())
    rounded, whole = (on_ranks(size, _on_a_rank, network, lr, there, form)[0] for form in (True, False))
    found = []
    for e, r, w in zip(exact, rounded, whole, strict=True):
        lengths = [float((one - other).norm() / e.norm()) for one, other in ((w, e), (r, e), (r, w))]
        found.append(Errors(*lengths))
    return found


def rows(given: Arguments) -> tuple[list[list[str]], list[Errors]]:
    """A row per network, number of ranks and learning rate; and all that is behind them."""
    shown, of_all = [], []
    for network in given.networks:
        for size in given.ranks:
            for lr in given.lrs:
                found = measure(network, lr, size, given.after, given.batches)
                columns = [[getattr(one, part) for one in found] for part in ("whole", "rounded", "apart")]
                cells = [f"{median(column):.1e} ({max(column):.1e})" for column in columns]
                worst = max(one.rounded / one.whole for one in found)
                shown.append([network, str(size), f"{lr:g}", *cells, f"{worst:.2f}"])
                of_all += found
    return shown, of_all


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write the page; returns the exit code."""
    given = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    began = time.perf_counter()
    shown, found = rows(given)
    header = ["network", "ranks", "lr", "whole against float64", "rounded against float64", "rounded against whole"]
    against = [one.rounded / one.whole for one in found]
    page = f"""# What rounded messages cost

A float32 step over several ranks forms Gram matrices of convolutions' per-sample gradients that are sent in 18 bits
(`coupling=Batch(rounded=False)`: in 32). Three distances between updates of all weights, over the length of the update
that one process makes in float64 from the same weights, state and samples: of the float32 step with whole messages from
it, of that with rounded messages from it, and of these two from each other. {BATCH} samples per rank, default
curvature; medians of {len(given.after) * given.batches} steps, in brackets the largest: {given.batches} batches after
{_listed(given.after)} steps of training. *Worst* is the largest quotient of the rounded step's error and the
whole one's, step by step.

{table([*header, "worst"], shown)}

Over all {len(found)} steps the rounded one's error is {median(against):.2f} times the whole one's in the median, from
{min(against):.2f} to {max(against):.2f}. A float32 step with whole messages differs from float64 by the rounding of
activations, gradients, products and weights, and where it renews the curvature's inverses (one in ten) of these, too.

Command: `{command("distributed_rounding.py", given, ("networks", "ranks", "lrs", "after", "batches"))}`
({duration(time.perf_counter() - began)}), ddpnopt {version("ddpnopt")}, torch {torch.__version__}.
"""
    save_page(given.out, "distributed_rounding", page)
    return 0


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


if __name__ == "__main__":
    sys.exit(main())
