"""What is claimed of DDPNOpt, held against the outcomes: pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .scoring import ratio
from .study import Outcome

OWN, DEFAULT, REFERENCE, EKFAC = "ddpnopt", "ddpnopt-default", "adamw", "ekfac"


@dataclass(frozen=True)
class Claim:
    """A registered claim.

    Attributes:
        words: what is claimed.
        holds: whether the records show it.
        found: the figures in a few words.
    """

    words: str
    holds: bool
    found: str


def judged(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those in which DDPNOpt, tuned and by default, is complete; the reference is wherever there is an outcome."""
    return [outcome for outcome in outcomes if {OWN, DEFAULT} <= outcome.entries.keys()]


def early_ratio(outcome: Outcome, method: str = OWN) -> float:
    """Steps to the early target over the reference's."""
    return ratio(outcome.entries[method].early, outcome.entries[REFERENCE].early)


def final_ratio(outcome: Outcome, method: str = OWN) -> float:
    """Steps to the final target over the reference's."""
    return ratio(outcome.entries[method].final, outcome.entries[REFERENCE].final)


def time_ratio(outcome: Outcome, method: str = OWN) -> float:
    """Time to the final target over the reference's."""
    return ratio(outcome.entries[method].seconds, outcome.entries[REFERENCE].seconds)


def memory_ratio(outcome: Outcome, method: str = OWN) -> float:
    """Peak memory over the reference's; NaN where either is not measured."""
    own, other = outcome.entries[method].megabytes, outcome.entries[REFERENCE].megabytes
    return math.nan if own is None or other is None else own / other


def claims(outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> list[Claim]:
    """The claims, in the order of the registration; a task that was not run counts as not shown.

    Args:
        outcomes: those that are :func:`judged`.
        limits: the registration's.
    """
    tasks = len(outcomes)
    early = sum(early_ratio(o) <= limits["early_ratio"] for o in outcomes)
    final = sum(final_ratio(o) <= limits["final_ratio"] for o in outcomes)
    below = sum(EKFAC in o.entries and o.entries[OWN].final < o.entries[EKFAC].final for o in outcomes)
    faster = sum(time_ratio(o) < 1 for o in outcomes)
    wide = [s.decades for o in outcomes if (s := o.entries[OWN].sensitivity) is not None]
    failed = [s.diverged + s.collapsed for o in outcomes if (s := o.entries[OWN].sensitivity) is not None]
    behind = {o.task.title: -o.lead(DEFAULT, REFERENCE).mean for o in outcomes}
    far = [f"{name} ({gap:.1f})" for name, gap in behind.items() if gap > limits["points"]]
    return [
        Claim(
            f"Steps to the early target at most {limits['early_ratio']:g} of tuned AdamW's on "
            f"{limits['early_tasks']:g} tasks",
            early >= limits["early_tasks"],
            f"on {early} of {tasks}",
        ),
        Claim(
            f"Steps to the final target at most {limits['final_ratio']:g} of tuned AdamW's on "
            f"{limits['final_tasks']:g} tasks",
            final >= limits["final_tasks"],
            f"on {final} of {tasks}",
        ),
        Claim(
            f"Steps to the final target below tuned EKFAC's on {limits['final_tasks']:g} tasks",
            below >= limits["final_tasks"],
            f"on {below} of {tasks}",
        ),
        Claim(
            f"Time to the final target below tuned AdamW's on {limits['time_tasks']:g} tasks",
            faster >= limits["time_tasks"],
            f"on {faster} of {tasks}",
        ),
        Claim(
            f"Within {limits['points']:g} point of its own best over {limits['decades']:g} decades of learning rate on "
            "every task",
            bool(wide) and min(wide) >= limits["decades"],
            f"on {sum(width >= limits['decades'] for width in wide)} of {tasks}",
        ),
        Claim(
            "No run diverged or collapsed at learning rates from 1e-3 to 1e2",
            bool(failed) and not any(failed),
            f"{sum(failed)} runs did",
        ),
        Claim(
            f"The untuned default's test score at most {limits['points']:g} point below tuned AdamW's on every task",
            bool(outcomes) and not far,
            f"further below on {', '.join(far)}" if far else f"on {tasks} of {tasks}",
        ),
    ]
