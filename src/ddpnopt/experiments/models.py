"""The networks: the paper's dense one and a small convolutional one, initialised from a seed."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ddpnopt.experiments.data import Source

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def build(name: str, source: Source, seed: int) -> nn.Module:
    """Build a network for a dataset.

    Args:
        name: a key of ``MODELS``.
        source: the dataset's entry; gives input shape, classes, width and activation.
        seed: of the initial weights; the caller's random state is left as it was.
    """
    check(name, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](source)


def check(name: str, source: Source) -> None:
    """Refuse a network that does not exist or does not fit the dataset's input shape."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of: {', '.join(MODELS)}")
    if name == "cnn" and len(source.shape) != 3:
        raise ValueError(
            f"model 'cnn' needs pictures [N, channels, height, width], but {source.title} has inputs of "
            f"shape {source.shape}; take model 'fcn' or a set of pictures such as digits-images"
        )


def fcn(source: Source, depth: int = 5) -> nn.Sequential:
    """The paper's fully connected network: ``depth`` linear layers, equal hidden widths.

    Input ``[N, *source.shape]`` (pictures are flattened first), output ``[N, classes]`` logits.
    """
    layers: list[nn.Module] = [nn.Flatten()] if len(source.shape) > 1 else []
    inputs = int(torch.Size(source.shape).numel())
    for _ in range(depth - 1):
        layers += [nn.Linear(inputs, source.width), _ACTIVATIONS[source.activation]()]
        inputs = source.width
    return nn.Sequential(*layers, nn.Linear(inputs, source.classes))


def cnn(source: Source, channels: int = 16) -> nn.Sequential:
    """A small convolutional network: two 3x3 convolutions of stride 2, then two linear layers; ReLU.

    Input ``[N, C, H, W]``, output ``[N, classes]`` logits.
    """
    depth, height, width = source.shape
    pixels = -(-height // 4) * -(-width // 4)  # each convolution halves, rounding up
    return nn.Sequential(
        nn.Conv2d(depth, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * pixels, 32),
        nn.ReLU(),
        nn.Linear(32, source.classes),
    )


MODELS: Mapping[str, Callable[[Source], nn.Module]] = {"fcn": fcn, "cnn": cnn}
