"""Losses with terms that no layer's output carries: penalties on the weights, and derivatives of the model.

    python benchmarks/penalties.py

Writes docs/results/penalties.md. DDPNOpt at several learning rates beside AdamW at the best of four.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import tyro
from _markdown import command, duration, plural, save_page, table
from _progress import Bar
from _training import RESULTS
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddpnopt import DDPNOpt, Kronecker, StepError
from ddpnopt.experiments.environment import version

BATCH = 64
ADAM = (3e-4, 1e-3, 3e-3, 1e-2)
HELD_OUT = 297
FACTORS = (math.log(1 / 0.95) ** 3 / 6, math.log(1 / 0.05) ** 3 / 6)  # 5 and 95 % of a cube of an exponential number
Weights = Sequence[Tensor]
Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Arguments:
    """Losses with terms that no layer's output carries: penalties on the weights, and derivatives of the model."""

    lrs: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Learning rates of DDPNOpt."""

    seeds: int = 3
    """Initial weights and orders of samples."""

    steps: int = 300
    """Length of a run."""

    out: Path = RESULTS
    """Folder of the page."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        words: on the page.
        network: made from the seed.
        loss: of the model on a batch that it draws; the weights are those it started from.
        score: of the trained model; lower is better.
    """

    words: str
    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Weights], Tensor]
    score: Callable[[nn.Module, Weights], float]


def classifier() -> nn.Module:
    """Of DIGITS."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def squares(model: nn.Module, _: Weights) -> Tensor:
    """Half the squared length of the weights."""
    return torch.stack([p.square().sum() for p in model.parameters()]).sum() / 2


def sizes(model: nn.Module, _: Weights) -> Tensor:
    """Absolute values of the weights."""
    return torch.stack([p.abs().sum() for p in model.parameters()]).sum()


def distance(model: nn.Module, start: Weights) -> Tensor:
    """Half the squared distance from where training began."""
    pairs = zip(model.parameters(), start, strict=True)
    return torch.stack([(p - q).square().sum() for p, q in pairs]).sum() / 2


def consolidation(model: nn.Module, start: Weights) -> Tensor:
    """The same with a factor for every weight, as elastic weight consolidation has: cubes of exponential numbers."""
    drawn = torch.Generator().manual_seed(1)
    pairs = zip(model.parameters(), start, strict=True)
    terms = [(torch.empty_like(q).exponential_(generator=drawn) ** 3 / 6 * (p - q).square()).sum() for p, q in pairs]
    return torch.stack(terms).sum() / 2


def correlations(model: nn.Module, _: Weights) -> Tensor:
    """How far the rows of weights are from orthonormal."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    return torch.stack([(w @ w.mT - torch.eye(len(w))).square().sum() for w in weights]).sum()


def penalised(words: str, weight: float, penalty: Callable[[nn.Module, Weights], Tensor]) -> Task:
    """DIGITS with a penalty on the weights; its score is the objective on held-out samples."""
    x, y = digits()

    def objective(model: nn.Module, start: Weights, own: Tensor | slice) -> Tensor:
        return nn.functional.cross_entropy(model(x[own]), y[own]) + weight * penalty(model, start)

    def loss(model: nn.Module, start: Weights) -> Tensor:
        return objective(model, start, torch.randint(HELD_OUT, len(x), (BATCH,)))

    return Task(words, classifier, loss, lambda model, start: objective(model, start, slice(HELD_OUT)).item())


def slopes(weight: float) -> Task:
    """DIGITS with a penalty on the loss's gradient at the pictures."""
    x, y = digits()

    def objective(model: nn.Module, own: Tensor | slice) -> Tensor:
        inputs = x[own].requires_grad_()
        losses = nn.functional.cross_entropy(model(inputs), y[own], reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        found: Tensor = losses.mean() + weight * slope.square().sum(1).mean()
        return found

    def loss(model: nn.Module, _: Weights) -> Tensor:
        return objective(model, torch.randint(HELD_OUT, len(x), (BATCH,)))

    words = f"DIGITS, {weight:g} of the squared gradient at the picture"
    return Task(words, classifier, loss, lambda model, _: objective(model, slice(HELD_OUT)).item())


def digits() -> tuple[Tensor, Tensor]:
    """Pictures and classes; the first ``HELD_OUT`` are held out."""
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def field(inputs: int) -> nn.Module:
    """A smooth function of a place."""
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def derivative(value: Tensor, at: Tensor) -> Tensor:
    """By every number of ``at``, of functions of one place each."""
    return torch.autograd.grad(value.sum(), at, create_graph=True)[0]


def poisson() -> Task:
    """``u'' = -pi^2 sin(pi x)`` between -1 and 1, where ``u`` is 0."""
    ends = torch.tensor([[-1.0], [1.0]])

    def exact(x: Tensor) -> Tensor:
        return torch.sin(torch.pi * x)

    def loss(model: nn.Module, _: Weights) -> Tensor:
        x = (2 * torch.rand(BATCH, 1) - 1).requires_grad_()
        wrong = derivative(derivative(model(x), x), x) + torch.pi**2 * exact(x)
        found: Tensor = wrong.square().mean() + 10 * model(ends).square().mean()
        return found

    grid = torch.linspace(-1, 1, 200)[:, None]
    words = "Poisson's equation in one dimension, error in %"
    return Task(words, lambda: field(1), loss, lambda model, _: apart(model, grid, exact))


def heat() -> Task:
    """``u_t = u_xx / 10`` on the unit interval, from ``sin(pi x)``, for one unit of time."""

    def exact(place: Tensor) -> Tensor:
        x, t = place.split(1, 1)
        return torch.exp(-(torch.pi**2) * t / 10) * torch.sin(torch.pi * x)

    def loss(model: nn.Module, _: Weights) -> Tensor:
        place = torch.rand(BATCH, 2).requires_grad_()
        slope = derivative(model(place), place)
        wrong = slope[:, 1] - derivative(slope[:, 0], place)[:, 0] / 10
        edge = torch.rand(BATCH, 2)
        edge[: BATCH // 2, 0].round_()
        edge[BATCH // 2 :, 1] = 0
        found: Tensor = wrong.square().mean() + 10 * (model(edge) - exact(edge)).square().mean()
        return found

    grid = torch.cartesian_prod(torch.linspace(0, 1, 30), torch.linspace(0, 1, 30))
    return Task("The heat equation, error in %", lambda: field(2), loss, lambda model, _: apart(model, grid, exact))


def apart(model: nn.Module, grid: Tensor, exact: Callable[[Tensor], Tensor]) -> float:
    """Length of the error over that of the solution, in percent."""
    with torch.no_grad():
        return float(100 * (model(grid) - exact(grid)).norm() / exact(grid).norm())


TASKS: tuple[Callable[[], Task], ...] = (
    lambda: penalised("DIGITS, 0.001 of half the squared weights", 1e-3, squares),
    lambda: penalised("DIGITS, 0.0001 of the absolute weights", 1e-4, sizes),
    lambda: penalised("DIGITS, 0.1 of half the squared distance from the start", 0.1, distance),
    lambda: penalised("DIGITS, the same, a factor for every weight", 0.1, consolidation),
    lambda: penalised("DIGITS, ten times these factors", 1.0, consolidation),
    lambda: penalised("DIGITS, 0.1 of the rows' squared correlations", 0.1, correlations),
    lambda: slopes(0.1),
    poisson,
    heat,
)


def score(task: Task, make: Make, seed: int, steps: int) -> float:
    """Of one run; infinity if a step failed."""
    torch.manual_seed(seed)
    model = task.network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model)
    (lr,) = (group["lr"] for group in optimizer.param_groups)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - t / steps)
        optimizer.zero_grad()
        task.loss(model, start).backward()
        try:
            optimizer.step()
        except StepError:
            return float("inf")
    return task.score(model, start)


def adamw(lr: float) -> Make:
    """AdamW, and torch's defaults but for the learning rate."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr)


def ddpnopt(lr: float, damping: float = 0.1) -> Make:
    """DDPNOpt, and its defaults but for the learning rate and the damping."""
    return lambda model: DDPNOpt(model, lr, curvature=Kronecker(damping=damping))


def row(task: Task, arguments: Arguments, advance: Callable[[], None]) -> list[str]:
    """Its scores, in words."""

    def mean_score(make: Make) -> float:
        found = mean(score(task, make, seed, arguments.steps) for seed in range(arguments.seeds))
        advance()
        return found

    found = [mean_score(ddpnopt(lr)) for lr in arguments.lrs]
    found += [mean_score(ddpnopt(lr, damping=1.0)) for lr in (arguments.lrs[0], arguments.lrs[-1])]
    found.append(min(mean_score(adamw(lr)) for lr in ADAM))
    return [task.words, *("failed" if value == float("inf") else f"{value:.3g}" for value in found)]


def page(arguments: Arguments) -> str:
    """Measure, and lay the figures out."""
    began = time.perf_counter()
    with Bar("penalties", len(TASKS) * (len(arguments.lrs) + 2 + len(ADAM)) - 1) as bar:
        rows = [row(make(), arguments, bar.advance) for make in TASKS]
    damped = [f"damping 1, lr {lr:g}" for lr in (arguments.lrs[0], arguments.lrs[-1])]
    header = ["", *(f"lr {lr:g}" for lr in arguments.lrs), *damped, "AdamW"]
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    return f"""# Penalties on the weights, and losses made of derivatives

Some terms of a loss reach the weights other than through the outputs of their layers, so that no column has them.
DDPNOpt takes them from the gradients, as a stage cost, with one number for the cost's curvature in each layer
([derivations](../derivations.md#a-cost-that-the-loop-puts-on-the-weights)).

Lower is better: the whole objective on {HELD_OUT} held-out pictures of DIGITS, or the length of the error over that of
the solution of a differential equation, whose residual at random places is the loss. After {arguments.steps} steps with
batches of {BATCH}, learning rate falling linearly to 0, mean over {plural(arguments.seeds, "seed")}. First the default
at several learning rates, then `Kronecker(damping=1.0)`; AdamW is the best mean of its learning rates
{", ".join(f"{lr:g}" for lr in ADAM)}, chosen on these very figures.

{table(header, rows)}

The two rows with a factor for every weight are what one number for a layer's curvature is worst at: nine tenths of the
factors lie between {FACTORS[0]:.0e} and {FACTORS[1]:.0f}.

Command: `{command("penalties.py", arguments, ("lrs", "seeds", "steps"))}`
({duration(time.perf_counter() - began)}), {software}.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    arguments = tyro.cli(Arguments, args=words)
    save_page(arguments.out, "penalties", page(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
