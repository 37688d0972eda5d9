"""DDPNOpt and AdamW on a task's held-out samples: what units.py, pictures.py and depth.py measure alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt, Gradient, StepError

BATCH = 64
ADAM = (3e-4, 1e-3, 3e-3, 1e-2)
HELD_OUT = 500
Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Task:
    """Inputs, targets, network and loss.

    Attributes:
        words: on the page.
        nothing: loss of the best constant output, or of what else is worth nothing.
    """

    words: str
    x: Tensor
    y: Tensor
    network: Callable[[], nn.Module]
    criterion: nn.Module
    nothing: float


def score(task: Task, make: Make, seed: int, steps: int) -> float:
    """Percent of ``nothing`` that is gone on held-out samples; -inf if a step failed."""
    torch.manual_seed(seed)
    model = task.network()
    optimizer = make(model, task.criterion)
    (lr,) = (group["lr"] for group in optimizer.param_groups)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - t / steps)
        own = torch.randint(HELD_OUT, len(task.x), (BATCH,))
        optimizer.zero_grad()
        task.criterion(model(task.x[own]), task.y[own]).backward()
        try:
            optimizer.step()
        except StepError:
            return -float("inf")
    with torch.no_grad():
        loss = float(task.criterion(model.eval()(task.x[:HELD_OUT]), task.y[:HELD_OUT]))
    return 100 * (1 - loss / task.nothing)


def mean_of(task: Task, make: Make, seeds: int, steps: int, advance: Callable[[], None]) -> float:
    """Mean score over seeds from 0 on; ``advance`` is called when it is known."""
    found = mean(score(task, make, seed, steps) for seed in range(seeds))
    advance()
    return found


def adamw(lr: float) -> Make:
    """AdamW, and torch's defaults but for the learning rate."""
    return lambda model, _: torch.optim.AdamW(model.parameters(), lr)


def ddpnopt(lr: float, cap: float | None = None) -> Make:
    """DDPNOpt; with a cap of the decrease asked of a sample, or the default."""
    return lambda model, _: DDPNOpt(model, lr, terminal=Gradient() if cap is None else Gradient(cap=cap))


def unlimited(lr: float) -> Make:
    """DDPNOpt whose layers may change by any part of themselves in a step."""
    return lambda model, _: DDPNOpt(model, lr, max_change=math.inf)


def in_words(value: float) -> str:
    """A score, or that there is none worth the name."""
    if value != value:
        return ""
    return "failed" if value == -float("inf") else "< -100" if value < -100 else f"{value:.1f}"
