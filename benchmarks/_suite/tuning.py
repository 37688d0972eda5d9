"""The search that every tuned method gets: the same number of trials, chosen by the same rule. Pure functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .registration import Method, Options

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """A learning rate and options with what they reached."""

    lr: float
    options: Options
    result: Result

    @property
    def merit(self) -> tuple[float, int]:
        """Value of the run, then how early it was reached, for ``max``."""
        return value(self.result), -place(self.result)


def value(result: Result) -> float:
    """Highest validation score of a run; minus infinity if it diverged."""
    return -math.inf if result["diverged"] else max(result["validation"])


def place(result: Result) -> int:
    """Number of the mark at which a run reaches its value."""
    curve = result["validation"]
    return curve.index(max(curve)) if curve else 0


def best(trials: Sequence[Trial]) -> Trial:
    """The highest value; ties go to the earlier mark, then to the earlier trial."""
    return max(trials, key=lambda trial: trial.merit)


def search(method: Method, rates: Sequence[float], run: Callable[[float, Options], Result]) -> list[Trial]:
    """Carry out a method's trials in order.

    Args:
        method: gives the knobs.
        rates: learning rates tried first, with default knobs.
        run: carries out a trial, or finds it on record.
    """
    trials: list[Trial] = []

    def attempt(lr: float, options: Options) -> None:
        trials.append(Trial(lr, options, run(lr, options)))

    for lr in rates:
        attempt(lr, method.options())
    middle = best(trials).lr
    for lr in (middle / 10**0.5, middle * 10**0.5):
        attempt(float(f"{lr:.3g}"), method.options())
    for knob, values in method.knobs.items():
        chosen = best(trials)
        for other in values[1:]:
            attempt(chosen.lr, {**chosen.options, knob: other})
    return trials


def count(method: Method, rates: Sequence[float]) -> int:
    """How many trials a search makes."""
    return len(rates) + 2 + sum(len(values) - 1 for values in method.knobs.values())
