"""What the records of one task show: a method's choice, steps, time, memory and scores; the ablation."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _records as records

from ddpnopt.experiments import data
from ddpnopt.experiments.stats import Interval, mean_interval, paired_difference, paired_p

from .carrying import MissingError, Plan, chosen, on_record, trials
from .registration import Method, Options, Registration, Size, Task
from .running import marks
from .scoring import Sensitivity, Targets, median_steps, sensitivity, targets
from .tuning import Result


@dataclass(frozen=True)
class Entry:
    """One method on one task.

    Attributes:
        method: its registration.
        lr, options: those confirmed.
        runs: of the confirmation, by seed.
        early, final: median steps to the targets; infinity is a miss.
        milliseconds: of a step; None where it could not be measured.
        megabytes: at the peak, likewise.
        sensitivity: None where nothing was tuned.
        messages: what runs that diverged said, each once.
    """

    method: Method
    lr: float
    options: Options
    runs: tuple[Result, ...]
    early: float
    final: float
    milliseconds: float | None
    megabytes: float | None
    sensitivity: Sensitivity | None
    messages: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """To the final target: steps times step time; infinity where it misses or has no step time."""
        return float("inf") if self.milliseconds is None else self.final * self.milliseconds / 1000

    @property
    def tests(self) -> tuple[float, ...]:
        """Test scores at the end, by seed; 0 for a run that diverged."""
        return tuple(run["test"] or 0.0 for run in self.runs)

    @property
    def test(self) -> Interval:
        """Mean of the test scores."""
        return mean_interval(self.tests)


@dataclass(frozen=True)
class Outcome:
    """One task, all methods that are complete.

    Attributes:
        task, size: what was run.
        targets: from the reference.
        entries: by method.
        ablation: by variant, its runs by seed; without those that were not run.
        absent: methods registered for the task that are not complete.
        digests: first digits of the registrations that the records were made under.
        seconds: of computing, evaluation included.
        torch: versions.
    """

    task: Task
    size: Size
    targets: Targets
    entries: Mapping[str, Entry]
    ablation: Mapping[str, tuple[Result, ...]]
    absent: tuple[str, ...]
    digests: tuple[str, ...]
    seconds: float
    torch: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What a score is."""
        return "accuracy" if self.task.data in data.DATASETS else "loss explained"

    def lead(self, own: str, other: str) -> Interval:
        """Test score of one method minus another's, paired by seed."""
        return paired_difference(self.entries[own].tests, self.entries[other].tests)

    def p(self, own: str, other: str) -> float:
        """Of the paired t test."""
        return paired_p(self.entries[own].tests, self.entries[other].tests)

    def steps_of(self, variant: str) -> float:
        """Median steps of an ablation's variant to the final target."""
        return median_steps(self.ablation[variant], marks(self.size.steps), self.targets.final)

    def change(self, variant: str, base: str) -> Interval:
        """Test score of a variant minus the base's, paired by seed."""
        own, other = ([run["test"] or 0.0 for run in self.ablation[name]] for name in (variant, base))
        return paired_difference(own, other)


class _Confirmed(NamedTuple):
    """What is on record of a method: its choice, the runs by seed, the trials, and those of its sensitivity by rate."""

    lr: float
    options: Options
    runs: tuple[Result, ...]
    tried: Sequence[Any]
    by_rate: Mapping[float, tuple[Result, ...]]


def outcome(registration: Registration, task: Task, budget: str, path: Path) -> Outcome | None:
    """Summarise a task's records; None where the reference is not complete.

    Args:
        registration: rules.
        task: which.
        budget: "quick" or "full".
        path: its records.
    """
    known = {key: result for key, result in records.read(path).items() if json.loads(key)["budget"] == budget}
    methods = registration.methods_of(task.name)
    plan, find = Plan(registration, task, budget, methods), on_record(known)
    confirmed: dict[str, _Confirmed] = {}
    for method in methods:
        try:
            lr, options = chosen(plan, method, find)
            seeds = range(task.sizes[budget].seeds)
            runs = tuple(find(plan.run(method, lr, options, seed)) for seed in seeds)
            tried = () if method.lr is not None else trials(plan, method, find)
            by_rate: dict[float, tuple[Result, ...]] = {}
            for run in plan.sensitivity(method) if tried else ():
                by_rate[run.lr] = (*by_rate.get(run.lr, ()), find(run))
            confirmed[method.name] = _Confirmed(lr, options, runs, tried, by_rate)
        except MissingError:
            continue
    if registration.reference not in confirmed:
        return None
    size = task.sizes[budget]
    at = marks(size.steps)
    early = registration.protocol["early_share"] * size.steps
    goal = targets(confirmed[registration.reference].runs, at, early)
    measured = _measured(known)

    def entry(method: Method) -> Entry:
        lr, options, runs, tried, by_rate = confirmed[method.name]
        sensitive = sensitivity(by_rate, floor(task), registration.claims["points"]) if by_rate else None
        said = {r["diverged"]: None for r in (*(t.result for t in tried), *runs) if r["diverged"]}
        return Entry(
            method,
            lr,
            options,
            runs,
            median_steps(runs, at, goal.early),
            median_steps(runs, at, goal.final),
            measured["milliseconds"].get(method.name),
            measured["megabytes"].get(method.name),
            sensitive,
            tuple(said),
        )

    return Outcome(
        task,
        size,
        goal,
        {method.name: entry(method) for method in methods if method.name in confirmed},
        _ablation(plan, find),
        tuple(method.name for method in methods if method.name not in confirmed),
        tuple(sorted({str(result["registration"]) for result in known.values()})),
        sum(result.get("wall", 0.0) for result in known.values()),
        tuple(sorted({result["torch"] for result in known.values()})),
    )


def floor(task: Task) -> float:
    """Last validation score below which a run has collapsed."""
    return 100 / data.source(task.data).classes + 10 if task.data in data.DATASETS else 0.0


def _ablation(plan: Plan, find: Any) -> dict[str, tuple[Result, ...]]:
    """Runs by variant, of those that are complete; empty without the base."""
    found: dict[str, tuple[Result, ...]] = {}
    for name in plan.registration.ablation:
        with suppress(MissingError):
            found[name] = tuple(find(run) for own, run in plan.ablations() if own == name)
    return found if plan.registration.base in found else {}


def _measured(known: records.Records) -> dict[str, dict[str, float]]:
    """Step times and memory by method, of all measurements on record: the latest of each method counts."""
    found: dict[str, dict[str, float]] = {"milliseconds": {}, "megabytes": {}}
    for result in known.values():
        if "milliseconds" in result:
            for name, figures in found.items():
                figures |= {method: figure for method, figure in result[name].items() if figure is not None}
    return found
