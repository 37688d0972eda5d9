"""The tables that scikit-learn ships, and the fixed split of sets that have none of their own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpnopt.experiments.data.entry import Arrays

SPLIT_SEED = 20210503  # of the fixed stratified split; never the seed of a run


def split(y: NDArray[Any], seed: int = SPLIT_SEED) -> tuple[NDArray[np.int64], ...]:
    """Split rows 70/10/20 within each class.

    Args:
        y: class numbers ``[N]``.
        seed: of the shuffle; the frozen ``RandomState`` stream, hence the same on every machine.

    Returns:
        Row numbers of train, validation and test, each ascending.
    """
    random = np.random.RandomState(seed)
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label in np.unique(y):
        rows = random.permutation(np.flatnonzero(y == label))
        test, validation = round(0.2 * len(rows)), round(0.1 * len(rows))
        for part, chosen in zip(parts, np.split(rows, [len(rows) - test - validation, len(rows) - test]), strict=True):
            part.append(chosen)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


@dataclass(frozen=True)
class Bundled:
    """A table that scikit-learn ships, split 70/10/20.

    Attributes:
        name: what stands after ``load_`` in the name of scikit-learn's function.
    """

    name: str

    def __call__(self, _folder: Path | None) -> Arrays:
        """Load and split it; no folder is needed."""
        from sklearn import datasets  # slow to import, and not needed for the other sets

        x, y = getattr(datasets, f"load_{self.name}")(return_X_y=True)
        train, validation, test = split(y)
        return Arrays((x[train], y[train]), (x[validation], y[validation]), (x[test], y[test]))
