"""Loss curves of several runs of one optimizer, read from their metrics and averaged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpnopt.experiments import files


@dataclass(frozen=True)
class Curve:
    """Train loss along training: the median over runs, and the quartiles about it.

    Attributes:
        label: name in the legend.
        steps: steps done at each point.
        seconds: training time at each point, mean over runs.
        median, low, high: loss at each point (of a run: the mean over the batches since the point before),
            and its lower and upper quartile.
    """

    label: str
    steps: tuple[float, ...]
    seconds: tuple[float, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def loss_curve(label: str, folders: Sequence[Path]) -> Curve:
    """Read the curve of one optimizer from its runs' folders; ends where the shortest run ends."""
    runs = [
        [line for line in files.read_metrics(folder / files.METRICS) if line["kind"] == "step"] for folder in folders
    ]
    points = list(zip(*runs, strict=False))  # one tuple of lines, a run each, for every point
    losses = [[line["train_loss"] for line in lines] for lines in points]  # none where a run has fewer than 10 steps
    low, median, high = np.quantile(losses, [0.25, 0.5, 0.75], axis=1).tolist() if points else ([], [], [])
    return Curve(
        label,
        steps=tuple(lines[0]["step"] for lines in points),
        seconds=tuple(math.fsum(line["seconds"] for line in lines) / len(lines) for lines in points),
        median=tuple(median),
        low=tuple(low),
        high=tuple(high),
    )
