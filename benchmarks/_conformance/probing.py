"""What a probe is, what it can come to, and the questions most of them share."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .methods import Method, Trainer
from .problems import Problem

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the way gone
STEPS = 3


class UnmetError(Exception):
    """The method ran, and did not do what the probe asks."""


class SensitiveError(UnmetError):
    """The answer is off, but no further than rounding alone throws it."""


@dataclass(frozen=True)
class Probe:
    """One row of the table.

    Args:
        title: the row's head.
        passes: what passes, in words.
        ask: returns a remark if the method passes, raises :class:`UnmetError` or anything else if it does not.
        dtype: of the networks: float64 where equality up to rounding is asked for, else what people train in.
    """

    title: str
    passes: str
    ask: Callable[[Method], str]
    dtype: torch.dtype

    def __call__(self, method: Method) -> str:
        """Ask a method, from fixed conditions."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if method.widest is torch.float32 else self.dtype)
        torch.manual_seed(0)
        try:
            return self.ask(method)
        finally:
            torch.set_default_dtype(before)


PROBES: dict[str, Probe] = {}
Ask = Callable[[Method], str]


def probe(title: str, dtype: torch.dtype = torch.float32) -> Callable[[Ask], Ask]:
    """Enter a function as a row of the table; its docstring says what passes."""

    def enter(ask: Ask) -> Ask:
        words = " ".join((ask.__doc__ or "").split())
        PROBES[ask.__name__] = Probe(title, words, ask, dtype)
        return ask

    return enter


def demand(holds: bool, otherwise: str) -> None:
    """Raise :class:`UnmetError`, saying what was found instead."""
    if not holds:
        raise UnmetError(otherwise)


def finite(problem: Problem) -> bool:
    """Whether every weight is a number."""
    return bool(torch.isfinite(problem.weights()).all())


def run(trainer: Trainer, problem: Problem, steps: int = STEPS) -> Tensor:
    """Train with the method's own loop; returns the weights."""
    for _ in range(steps):
        trainer.step(problem)
    return problem.weights()


def apart(one: Tensor, other: Tensor, start: Tensor) -> float:
    """How far apart two ways from ``start`` end, over the way gone."""
    way = float((one - start).abs().max())
    demand(math.isfinite(way), "weights are not finite")
    demand(way > 0, "the weights do not move")
    return float((one - other).abs().max()) / way


def same(one: Tensor, other: Tensor, start: Tensor, what: str, reordered: Tensor | None = None) -> None:
    """Demand that two ways from ``start`` end in the same weights, up to rounding.

    Args:
        one, other: where they end.
        start: from where.
        what: the fault, in words.
        reordered: where the first one ends when only the order of the samples is another.

    Raises:
        UnmetError: if they do not; :class:`SensitiveError` if the order of the samples alone does as much.
    """
    if (distance := apart(one, other, start)) <= TOLERANCE[torch.get_default_dtype()]:
        return
    found = f"{what}: weights differ by {distance:.1g} of the way"
    if reordered is not None and (rounding := apart(one, reordered, start)) > 0.1 * distance:
        raise SensitiveError(f"{found}, and by {rounding:.1g} if only the order of the samples is another")
    raise UnmetError(found)


def trains(method: Method, problem: Problem) -> str:
    """Demand that each tensor with a gradient moves, all stay finite, and the batch's loss falls; returns the count."""
    judge = problem.copy()
    judge.loss().backward()
    gradients = {name: p.grad for name, p in judge.model.named_parameters() if p.grad is not None}
    due = [name for name, gradient in gradients.items() if gradient.count_nonzero()]
    before, loss = dict(judge.model.named_parameters()), problem.value()
    run(method.make(problem.model), problem)
    after = dict(problem.model.named_parameters())
    moved = [name for name in due if not torch.equal(before[name].detach(), after[name].detach())]
    left = [name for name in due if name not in moved]
    demand(finite(problem), "weights are not finite")
    demand(not left, f"{len(moved)} of {len(due)} tensors trained, not {', '.join(left[:3])}")
    extra = [n for n in after if n not in gradients and not torch.equal(before[n].detach(), after[n].detach())]
    demand(not extra, f"{', '.join(extra)} moved without a gradient")
    demand((now := problem.value()) < loss, f"loss rose from {loss:.4f} to {now:.4f} in {STEPS} steps")
    return f"{len(moved)} of {len(due)} tensors"
