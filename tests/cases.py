"""Networks, batches and settings that several test modules share, as data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpnopt import Adaptive, EigenKronecker, Identity, Kronecker
from ddpnopt.curvature import Curvature


@dataclass(frozen=True)
class Case:
    """A model and a batch for it: inputs, class labels."""

    model: nn.Sequential
    x: Tensor
    y: Tensor


def mlp(batch: int = 5) -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return Case(model, torch.randn(batch, 4), torch.randint(3, (batch,)))


def conv_net(batch: int = 4) -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, dilation=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    return Case(model, torch.randn(batch, 2, 6, 6), torch.randint(3, (batch,)))


NETWORKS: dict[str, Callable[..., Case]] = {"mlp": mlp, "conv": conv_net}

CURVATURES: dict[str, Curvature] = {
    "identity": Identity(),
    "adaptive": Adaptive(beta=0.9),
    "kronecker": Kronecker(refresh_every=2, average_every=1),
    "low rank": Kronecker(refresh_every=1, rank=1, memory=7),  # of the convolution network's wide sides
    "eigen": EigenKronecker(refresh_every=2),
}
