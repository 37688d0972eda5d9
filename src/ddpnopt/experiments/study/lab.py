"""Where an experiment's tasks are carried out: what every experiment asks for, and the plainest way to grant it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ddpnopt.experiments.study.task import Kind, Result, Task

Params = dict[str, float]
Grid = Mapping[str, Sequence[float]]
Values = Callable[[list[tuple[str, Params]]], list[float]]
"""Scores (higher is better) of combinations, each given with the name of its search."""


class Lab(Protocol):
    """Carries out tasks and searches."""

    def execute(self, tasks: Sequence[Task]) -> list[Result]:
        """Return the tasks' results in their order; what is finished already is not run again."""

    def search(self, grids: Mapping[str, Grid], values: Values) -> dict[str, Params]:
        """Return, for each search by name, the combination of its grid with the highest value.

        Ties go to the combination that comes first, the last hyper-parameter varying fastest.
        """


class DirectLab:
    """Carries out everything at once in this process and keeps nothing.

    Args:
        kinds: what each kind of task runs.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds

    def execute(self, tasks: Sequence[Task]) -> list[Result]:
        """Run every task, one after the other."""
        return [self._kinds[task.kind].run(task.settings) for task in tasks]

    def search(self, grids: Mapping[str, Grid], values: Values) -> dict[str, Params]:
        """Ask for all values in one call, and choose."""
        asked = [(name, one) for name, grid in grids.items() for one in combinations(grid)]
        return best(asked, values(asked))


def combinations(grid: Grid) -> list[Params]:
    """Every combination of a grid, the last hyper-parameter varying fastest."""
    found: list[Params] = [{}]
    for name, values in grid.items():
        found = [one | {name: value} for one in found for value in values]
    return found


def best(asked: Sequence[tuple[str, Params]], values: Sequence[float]) -> dict[str, Params]:
    """The combination of highest value of each search; the first of equal ones."""
    found: dict[str, tuple[float, Params]] = {}
    for (name, params), value in zip(asked, values, strict=True):
        if name not in found or value > found[name][0]:
            found[name] = (value, params)
    return {name: params for name, (_, params) in found.items()}
