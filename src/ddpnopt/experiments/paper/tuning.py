"""How hyper-parameters are chosen: grids cut to a budget, and what each search chose."""

import math
from collections.abc import Mapping

from ddpnopt.experiments.study.lab import Grid, Lab, Params, Values


def thinned(grid: Grid, trials: int) -> dict[str, tuple[float, ...]]:
    """Cut a grid down to at most ``trials`` combinations: its longest axis thinned, the others at their first value."""
    if math.prod(len(values) for values in grid.values()) <= trials:
        return {name: tuple(values) for name, values in grid.items()}
    longest = max(grid, key=lambda name: len(grid[name]))
    count = min(trials, len(grid[longest]))
    places = [math.floor((place + 0.5) * len(grid[longest]) / count) for place in range(count)]
    return {
        name: tuple(values[place] for place in places) if name == longest else (values[0],)
        for name, values in grid.items()
    }


def tuned(lab: Lab, grids: Mapping[str, Grid], values: Values) -> tuple[dict[str, Params], dict[str, float]]:
    """Return what each search chose, and its score."""
    scores: dict[str, float] = {}

    def noted(asked: list[tuple[str, Params]]) -> list[float]:
        found = values(asked)
        for (search, _), score in zip(asked, found, strict=True):
            scores[search] = max(score, scores.get(search, -math.inf))
        return found

    return lab.search(grids, noted), scores
