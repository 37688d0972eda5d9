"""Carry out what a task still lacks: each run that ends is on record at once, and none on record is repeated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _records as records

from . import timing
from .registration import Method, Registration, Task
from .running import Run, train
from .tuning import Result, best, count, search

SENSITIVE_FROM, SENSITIVE_TO = 1e-3, 1e2


class StoppedError(Exception):
    """A signal asked to stop; all finished runs are on record."""


class MissingError(Exception):
    """A run is not on record."""


@dataclass(frozen=True)
class Plan:
    """What is to be run of one task.

    Attributes:
        registration: settings of everything.
        task: which task.
        budget: "quick" or "full".
        methods: those to run, of the task's.
    """

    registration: Registration
    task: Task
    budget: str
    methods: tuple[Method, ...]

    def run(self, method: Method, lr: float, options: Mapping[str, Any], seed: int) -> Run:
        """One of its runs."""
        return Run(self.task, self.budget, method, lr, options, seed)

    def count(self) -> int:
        """Number of its runs, the ablation's included."""
        rates, seeds = self.registration.protocol["rates"], self.task.sizes[self.budget].seeds
        tuned = sum(
            count(method, rates) + len(self.sensitivity(method)) for method in self.methods if method.lr is None
        )
        return tuned + seeds * len(self.methods) + len(self.ablations())

    def sensitivity(self, method: Method) -> list[Run]:
        """The runs that a tuned method's sensitivity to its learning rate is read off; the first seed's are trials."""
        protocol = self.registration.protocol
        first, seeds = protocol["tuning_seed"], protocol["sensitivity_seeds"][self.budget]
        rates = [rate for rate in protocol["rates"] if SENSITIVE_FROM <= rate <= SENSITIVE_TO]
        return [self.run(method, rate, method.options(), first + i) for i in range(seeds) for rate in rates]

    def ablations(self) -> list[tuple[str, Run]]:
        """The ablation's runs, by variant."""
        own = next((method for method in self.methods if method.lr is not None), None)
        if own is None:
            return []
        seeds = range(self.task.sizes[self.budget].ablation)
        return [
            (name, self.run(own, changed.get("lr", own.lr), _without_lr(own.options(**changed)), seed))
            for name, changed in self.registration.ablation.items()
            for seed in seeds
        ]

    def timing(self) -> dict[str, Any]:
        """Settings of the measurement of step times and memory."""
        return {
            "task": self.task.name,
            "budget": self.budget,
            "method": "processor time",
            "methods": [method.name for method in self.methods],
        }


def carry_out(plan: Plan, do: Callable[[Run], Result]) -> None:
    """Tune and confirm every method of a plan and measure its sensitivity, then the ablation.

    ``do`` carries a run out, or finds it on record.
    """
    seeds = range(plan.task.sizes[plan.budget].seeds)
    for method in plan.methods:
        lr, options = chosen(plan, method, do)
        for seed in seeds:
            do(plan.run(method, lr, options, seed))
        for run in plan.sensitivity(method) if method.lr is None else ():
            do(run)
    for _, run in plan.ablations():
        do(run)


def chosen(plan: Plan, method: Method, do: Callable[[Run], Result]) -> tuple[float, Mapping[str, Any]]:
    """Learning rate and options that tuning chooses; those registered where nothing is tuned."""
    if method.lr is not None:
        return method.lr, method.options()
    trial = best(trials(plan, method, do))
    return trial.lr, trial.options


def trials(plan: Plan, method: Method, do: Callable[[Run], Result]) -> Sequence[Any]:
    """A method's trials."""
    seed = plan.registration.protocol["tuning_seed"]
    rates = plan.registration.protocol["rates"]
    return search(method, rates, lambda lr, options: do(plan.run(method, lr, options, seed)))


class Recorder:
    """Carries a run out unless it is on record.

    Args:
        path: file of records.
        digest: of the registration; goes into every new record.
        folder: of the files of sets that are not bundled.
        stop: asked before each run; on True :class:`StoppedError`.
        advance: called after each run, also one found on record.
    """

    def __init__(
        self, path: Path, digest: str, folder: Path | None, stop: Callable[[], bool], advance: Callable[[], None]
    ) -> None:
        self._path, self._digest, self._folder, self._stop, self._advance = path, digest, folder, stop, advance
        self._known = records.read(path)

    def __call__(self, run: Run) -> Result:
        return self._once(run.settings(), lambda: train(run, self._folder))

    def measure(self, plan: Plan) -> Result:
        """Step times and memory of a plan's methods."""
        protocol = plan.registration.protocol
        rounds, steps = protocol["timing_rounds"], protocol["timing_steps"]
        size = plan.task.sizes[plan.budget]
        return self._once(
            plan.timing(), lambda: timing.measure(plan.task, size, plan.methods, rounds, steps, self._folder)
        )

    def _once(self, settings: Mapping[str, Any], make: Callable[[], Result]) -> Result:
        if self._stop():
            raise StoppedError
        key = records.key(settings)
        if key not in self._known:
            result = {**make(), "registration": self._digest[:12]}
            records.append(self._path, settings, result)
            self._known[key] = result
        self._advance()
        return dict(self._known[key])


def on_record(known: records.Records) -> Callable[[Run], Result]:
    """Find runs on record; :class:`MissingError` where there is none."""

    def find(run: Run) -> Result:
        result = known.get(records.key(run.settings()))
        if result is None:
            raise MissingError
        return dict(result)

    return find


def _without_lr(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "lr"}
