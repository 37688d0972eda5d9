"""Small settings, and ways to look into run folders."""

from pathlib import Path
from typing import Any

import torch

from ddpnopt.experiments import files
from ddpnopt.experiments.config import TrainConfig

Lines = list[dict[str, Any]]


def tiny(**changes: Any) -> TrainConfig:
    """Two epochs of IRIS: 14 steps, a line of metrics every 3, a checkpoint every 4."""
    settings: dict[str, Any] = {"dataset": "iris", "epochs": 2, "log_every": 3, "checkpoint_every": 4}
    return TrainConfig(**(settings | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The network in a folder's checkpoint."""
    model: dict[str, torch.Tensor] = files.load_checkpoint(folder / files.CHECKPOINT)["model"]
    return model


def metrics(folder: Path) -> Lines:
    """The lines of a folder's metrics without what the clock wrote."""
    lines = files.read_metrics(folder / files.METRICS)
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def result(folder: Path) -> dict[str, Any]:
    """A folder's result without what the clock wrote."""
    return {key: value for key, value in files.read_json(folder / files.RESULT).items() if key != "seconds"}


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders hold bit-identical weights, and equal metrics and results except for times."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert metrics(one) == metrics(other)
    assert result(one) == result(other)
