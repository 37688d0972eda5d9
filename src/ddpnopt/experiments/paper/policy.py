"""The task ``policy``: to which state changes the layers of a trained network's policy react, seen in image space.

With the paper's outer product of the gradient (Proposition 3) a sample's gain is ``K = -M^-1 q_u q_x'``, of rank
one: its leading right-singular vector is ``q_x / |q_x|``, and no decomposition is needed. ``q_x`` is the gradient of
the sample's loss by the layer's input, times a scalar of the recursion that does not turn it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpnopt.experiments.data import Dataset, Part
from ddpnopt.experiments.job import own_random_state
from ddpnopt.experiments.paper import networks
from ddpnopt.experiments.paper.methods import METHODS, Setup
from ddpnopt.experiments.paper.training import batches, loaded
from ddpnopt.experiments.study.task import Result

_NOTHING = 1e-6  # beside the largest value of a picture, which is 1


def run(settings: Mapping[str, Any]) -> Result:
    """Train the paper's CNN and look at its policy at a few moments, on one thread.

    Args:
        settings: ``dataset``, ``method`` and ``params`` (keys of ``DATASETS``, ``METHODS``, hyper-parameters),
            ``batch_size``, ``seed``; ``moments``: steps after which to look, ascending; ``layers``: places of the
            convolutions in the network, the first convolution left out, because its input never changes;
            ``shown``: number of test images to return pictures of, each of another class as far as there are
            classes; ``measured``: number of test images, those shown first, whose foreground shares are returned.

    Returns:
        ``images``: ``[shown][H][W]``, mean over channels; ``labels``: of them; ``area``: share of the pixels that
        is foreground, by image; ``moments``: for each, ``step``, ``accuracy`` on the measured images, ``policy``:
        pictures ``[shown][H][W]`` of :func:`image_direction`, largest value 1; ``layers``: by place, as text,
        ``energy``: ``[shown][h][w]``, share of each position in the leading direction's energy,
        ``random``: foreground share of the image of a random direction at the layer, by image;
        ``foreground``: that of the policy's direction, the same for every layer, by image. Numbers have three
        significant digits.

    Raises:
        ValueError: if the dataset holds no pictures, or a place in ``layers`` is no convolution after the first.
    """
    seed, dataset = int(settings["seed"]), loaded(settings["dataset"])
    layers: list[int] = settings["layers"]
    with own_random_state(seed, threads=1):
        if len(dataset.source.shape) != 3:
            raise ValueError(f"policy: dataset {dataset.name!r} holds no pictures; take one that does")
        model = networks.seeded(lambda: networks.cnn(dataset.source.shape, dataset.source.classes), seed)
        _check(model, layers)
        part = chosen(dataset.test, dataset.source.classes, int(settings["measured"]))
        shown = int(settings["shown"])
        moments = [
            {"step": step, **_look(model, part, layers, shown, seed)} for step in _trained(model, dataset, settings)
        ]
        return {
            "images": _rounded(part.x[:shown].mean(1)),
            "labels": part.y[:shown].tolist(),
            "area": _rounded(foreground(part.x).double().mean((1, 2, 3))),
            "moments": moments,
        }


def leading_directions(model: nn.Sequential, layers: Sequence[int], x: Tensor, y: Tensor) -> list[Tensor]:
    """Leading right-singular vector of each sample's gain ``K`` at each layer, ``q_x / |q_x|`` (Proposition 3).

    Args:
        model: the network; a layer's input is the output of all before it.
        layers: places of the layers in it, ascending.
        x, y: samples ``[B, ...]`` and class numbers ``[B]``.

    Returns:
        for each layer ``[B, *shape of its input]``, unit length per sample; zero where the gradient is. The sign
        is that of the gradient, while a singular vector has none.
    """
    states, state, before = [], x.detach().requires_grad_(), 0
    for layer in layers:
        state = model[before:layer](state)
        states.append(state)
        before = layer
    loss = nn.functional.cross_entropy(model[before:](state), y, reduction="sum")
    return [unit(gradient) for gradient in torch.autograd.grad(loss, states)]


def image_direction(model: nn.Sequential, layer: int, x: Tensor, direction: Tensor) -> Tensor:
    """Change of the images ``x [B, C, H, W]`` to which a direction at a layer's input answers most: ``J' v``, unit.

    ``J`` is the Jacobian, at ``x``, of the layers before; a small change ``dx`` of the image moves the state along
    ``v = direction`` by ``v' J dx``, which among all ``dx`` of a length is largest for ``J' v``. For the leading
    direction of the gain that is the gradient of the sample's loss by the image, whatever the layer.
    """
    image = x.detach().requires_grad_()
    (pulled,) = torch.autograd.grad(model[:layer](image), image, direction)
    return unit(pulled)


def foreground(x: Tensor) -> Tensor:
    """Pixels that are brighter than their image's darkest: bool, of the images' shape ``[B, C, H, W]``."""
    return x > x.amin((1, 2, 3), keepdim=True)


def foreground_share(x: Tensor, direction: Tensor) -> Tensor:
    """Share ``[B]`` of the energy, the sum of squares, of directions ``[B, C, H, W]`` that lies on the foreground."""
    energy = direction.double().square()
    return (energy * foreground(x)).sum((1, 2, 3)) / energy.sum((1, 2, 3)).clamp(min=math.ulp(0.0))


def unit(v: Tensor) -> Tensor:
    """Each sample's vector ``[B, ...]`` at length one; zero stays zero."""
    flat = v.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)  # first to size one: squares of a tiny gradient would underflow
    flat = torch.where(largest > 0, flat / largest, 0.0)
    length = flat.norm(dim=1, keepdim=True)
    return torch.where(length > 0, flat / length, 0.0).view_as(v)


def chosen(part: Part, classes: int, count: int) -> Part:
    """The first ``count`` samples when classes take turns, each in its own order."""
    turns = torch.empty(len(part), dtype=torch.long)
    for label in range(classes):
        own = part.y == label
        turns[own] = torch.arange(int(own.sum())) * classes + label
    rows = turns.argsort()[:count]
    return Part(part.x[rows], part.y[rows])


def _trained(model: nn.Sequential, dataset: Dataset, settings: Mapping[str, Any]) -> Iterator[int]:
    """Train, and stop at each moment: yields the number of steps taken."""
    criterion, size = nn.CrossEntropyLoss(), int(settings["batch_size"])
    optimizer = METHODS[settings["method"]].build(Setup(model, criterion, size), settings["params"])
    order, taken = batches(len(dataset.train), size, int(settings["seed"])), 0
    for moment in settings["moments"]:
        while taken < moment:
            rows = next(order)
            optimizer.zero_grad()
            criterion(model(dataset.train.x[rows]), dataset.train.y[rows]).backward()
            optimizer.step()
            taken += 1
        yield taken


def _look(model: nn.Sequential, part: Part, layers: Sequence[int], shown: int, seed: int) -> Result:
    directions = leading_directions(model, layers, part.x, part.y)
    picture = image_direction(model, layers[0], part.x, directions[0])
    noise = torch.Generator().manual_seed(seed)  # the same random directions at every moment
    by_layer = {}
    for layer, direction in zip(layers, directions, strict=True):
        other = image_direction(model, layer, part.x, torch.randn(direction.shape, generator=noise))
        energy = direction[:shown].square().sum(1)
        by_layer[str(layer)] = {"energy": _rounded(energy), "random": _rounded(foreground_share(part.x, other))}
    with torch.no_grad():
        accuracy = (model(part.x).argmax(1) == part.y).double().mean()
    return {
        "accuracy": _rounded(accuracy),
        "policy": _rounded(scaled(picture[:shown].mean(1))),
        "foreground": _rounded(foreground_share(part.x, picture)),
        "layers": by_layer,
    }


def scaled(pictures: Tensor) -> Tensor:
    """Pictures ``[N, H, W]``, each divided by its largest magnitude; one of zeros stays."""
    largest = pictures.abs().amax((1, 2), keepdim=True)
    return torch.where(largest > 0, pictures / largest, 0.0)


def _check(model: nn.Sequential, layers: Sequence[int]) -> None:
    places = [place for place, module in enumerate(model) if isinstance(module, nn.Conv2d)][1:]
    if not layers or list(layers) != [place for place in places if place in layers]:
        raise ValueError(f"policy: layers must be some of {places} in this order, got {list(layers)}")


def _rounded(values: Tensor) -> Any:
    """Nested lists of the values to three significant digits; those that round to nothing beside 1 are zero."""
    if values.ndim:
        return [_rounded(value) for value in values]
    return float(f"{float(values):.3g}") if abs(float(values)) >= _NOTHING else 0.0
