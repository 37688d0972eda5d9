"""The paper's networks, initialised from a seed.

The paper gives depth, the range of widths and the activation; strides and padding of the convolutions and the width
between the two last layers are not known and chosen here.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def seeded(build: Callable[[], nn.Sequential], seed: int) -> nn.Sequential:
    """Build a network with weights drawn from ``seed``; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def fcn(shape: tuple[int, ...], width: int, classes: int, activation: str, depth: int = 5) -> nn.Sequential:
    """``depth`` linear layers of equal hidden width; input ``[N, *shape]``, output ``[N, classes]``."""
    layers: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 else []
    inputs = int(torch.Size(shape).numel())
    for _ in range(depth - 1):
        layers += [nn.Linear(inputs, width), ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def cnn(shape: tuple[int, ...], classes: int, channels: int = 32, width: int = 128) -> nn.Sequential:
    """Four 3x3 convolutions, the second and fourth of stride 2, and two linear layers; ReLU.

    Input ``[N, C, H, W]``, output ``[N, classes]``.
    """
    depth, height, rows = shape
    layers: list[nn.Module] = []
    for place in range(4):
        stride = 1 + place % 2
        layers += [nn.Conv2d(depth, channels, 3, stride=stride, padding=1), nn.ReLU()]
        depth, height, rows = channels, -(-height // stride), -(-rows // stride)
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels * height * rows, width), nn.ReLU(), nn.Linear(width, classes)
    )
