"""The paper's problems: a dataset and a network each, and the accuracies the paper reports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ddpnopt.experiments.data import Source
from ddpnopt.experiments.paper import networks


@dataclass(frozen=True)
class Problem:
    """A row of the paper's Table 3.

    Attributes:
        dataset: key of the dataset.
        network: ``"fcn"``: five linear layers; ``"cnn"``: four convolutions and two linear layers.
        width: units in a hidden layer of the fcn; the paper says 10 to 32 by dataset.
        activation: of the fcn.
        batch_size: samples per step; the paper says 8 to 32 for the fcn, 128 for the cnn.
        paper: test accuracy in percent by column of the paper's table, mean of ten seeds; empty where it has no row.
    """

    dataset: str
    network: Literal["fcn", "cnn"]
    width: int
    activation: str
    batch_size: int
    paper: Mapping[str, float]


_COLUMNS = ("sgd", "rmsprop", "adam", "ekfac", "emsa", "vanilla", "published")


def _row(*values: float) -> Mapping[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


def _no_vanilla(*values: float) -> Mapping[str, float]:
    return dict(zip((name for name in _COLUMNS if name != "vanilla"), values, strict=True))


# accuracies: Liu, Chen, Theodorou, ICLR 2021, Table 3
PROBLEMS: Mapping[str, Problem] = {
    "wine-fcn": Problem("wine", "fcn", 16, "tanh", 16, _row(94.35, 98.10, 98.13, 94.60, 93.56, 98.00, 98.18)),
    "iris-fcn": Problem("iris", "fcn", 16, "tanh", 16, {}),
    "digits-fcn": Problem("digits", "fcn", 32, "tanh", 16, _row(95.36, 94.33, 94.98, 95.24, 94.87, 91.68, 95.13)),
    "mnist-fcn": Problem("mnist", "fcn", 32, "relu", 32, _row(92.65, 91.89, 92.54, 92.73, 90.24, 90.42, 93.30)),
    "fashion-mnist-fcn": Problem(
        "fashion-mnist", "fcn", 32, "relu", 32, _row(82.49, 83.87, 84.36, 84.12, 82.04, 81.98, 84.98)
    ),
    "mnist-cnn": Problem("mnist", "cnn", 0, "relu", 128, _no_vanilla(97.94, 98.05, 98.04, 98.02, 96.48, 98.09)),
    "svhn-cnn": Problem("svhn", "cnn", 0, "relu", 128, _no_vanilla(89.00, 88.41, 87.76, 90.63, 79.45, 90.70)),
    "cifar10-cnn": Problem("cifar10", "cnn", 0, "relu", 128, _no_vanilla(71.26, 70.52, 70.04, 71.85, 61.42, 71.92)),
}


def network(problem: Problem, source: Source, seed: int) -> nn.Sequential:
    """Build a problem's network with weights drawn from ``seed``."""
    if problem.network == "cnn":
        return networks.seeded(lambda: networks.cnn(source.shape, source.classes), seed)
    return networks.seeded(lambda: networks.fcn(source.shape, problem.width, source.classes, problem.activation), seed)
