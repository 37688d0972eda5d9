"""A task at work: its samples, its network from a seed, its loss, the score of a model."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddpnopt.experiments import data

from .networks import NETWORKS
from .registration import Size, Task

LETTERS = 32  # that the transformer sees, where the name of its data says nothing else
NOISE = 1.0  # of Friedman's set, the usual one
EVALUATED_AT_ONCE = 1000
Pair = tuple[Tensor, Tensor]
Triple = tuple[Pair, Pair, Pair]


class TokenLoss(nn.CrossEntropyLoss):
    """Mean over all letters of scores ``[B, T, letters]`` and targets ``[B, T]``."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Samples:
    """Inputs and targets of each part.

    Attributes:
        outputs: what the network's last axis counts.
        criterion: the loss module; mean over the batch.
        constant: loss of the best constant output; None where the score is the accuracy.
    """

    train: Pair
    validation: Pair
    test: Pair
    outputs: int
    criterion: nn.Module
    constant: float | None = None


@lru_cache(maxsize=2)
def load(source: str, size: Size, folder: Path | None = None) -> Samples:
    """Load a task's samples, by the name of its data; ValueError where the files are not at hand."""
    name = source if source in _READERS else source.partition("-")[0]  # "shakespeare-128": windows of 128 letters
    return _READERS.get(name, _classes)(source, size, folder)


def single(source: str) -> bool:
    """Whether a sample's loss is one cross-entropy: neither a squared error nor a mean over letters."""
    return source in data.DATASETS


def build(task: Task, size: Size, samples: Samples, seed: int) -> nn.Module:
    """The network with initial weights of a seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[task.network](samples.train[0].shape[1:], samples.outputs, size.width)


def batches(samples: Samples, batch: int, seed: int) -> Iterator[Pair]:
    """Batches without end: a new order in each epoch, the incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    x, y = samples.train
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - batch + 1, batch):
            rows = order[start : start + batch]
            yield x[rows], y[rows]


@torch.no_grad()
def score(model: nn.Module, samples: Samples, part: Pair) -> tuple[float, float]:
    """Score in percent and loss; the score is NaN where the loss is not finite."""
    was_training = model.training
    model.eval()
    right, loss = 0.0, 0.0
    for x, y in zip(part[0].split(EVALUATED_AT_ONCE), part[1].split(EVALUATED_AT_ONCE), strict=True):
        output = model(x)
        loss += float(samples.criterion(output, y)) * len(x) / len(part[0])
        if samples.constant is None:
            right += float((output.argmax(1) == y).sum()) / len(part[0])
    model.train(was_training)
    if not math.isfinite(loss):
        return math.nan, loss
    return 100 * (right if samples.constant is None else 1 - loss / samples.constant), loss


def _cut(parts: Triple, size: Size) -> Triple:
    wanted = (size.train, size.validation, size.test)
    for (x, _), count, name in zip(parts, wanted, ("train", "validation", "test"), strict=True):
        if len(x) < count:
            raise ValueError(f"the {name} part has {len(x)} samples, but {count} are registered")
    train, validation, test = ((x[:n].clone(), y[:n].clone()) for (x, y), n in zip(parts, wanted, strict=True))
    return train, validation, test


def _classes(source: str, size: Size, folder: Path | None) -> Samples:
    loaded = data.load(source, folder)
    train, validation, test = ((part.x, part.y) for part in (loaded.train, loaded.validation, loaded.test))
    parts = _cut((train, validation, test), size)
    return Samples(*parts, loaded.source.classes, nn.CrossEntropyLoss())


def _pictures_themselves(source: str, size: Size, folder: Path | None) -> Samples:
    loaded = data.load(source.removesuffix("-itself"), folder)
    train, validation, test = (part.x.flatten(1) for part in (loaded.train, loaded.validation, loaded.test))
    return _regression(_cut(((train, train), (validation, validation), (test, test)), size))


def _friedman(_: str, size: Size, __: Path | None) -> Samples:
    from sklearn.datasets import make_friedman1  # slow to import, and not needed for the other sets

    total = size.train + size.validation + size.test
    x, y = make_friedman1(total, noise=NOISE, random_state=data.SPLIT_SEED)
    columns = np.column_stack([x, y])
    own = columns[: size.train]
    columns = (columns - own.mean(0)) / own.std(0)
    x, y = (torch.tensor(part, dtype=torch.float32) for part in (columns[:, :-1], columns[:, -1:]))
    cuts = (size.train, size.validation, size.test)
    train, validation, test = zip(x.split(cuts), y.split(cuts), strict=True)
    return _regression((train, validation, test))


def _regression(parts: Triple) -> Samples:
    y = parts[0][1]
    constant = float((y - y.mean(0)).square().mean())
    return Samples(*parts, y.shape[1], nn.MSELoss(), constant)


def _shakespeare(source: str, size: Size, folder: Path | None) -> Samples:
    places = [folder / "shakespeare.txt", folder / "shakespeare" / "shakespeare.txt"] if folder else []
    places.append(data.cache() / "shakespeare" / "shakespeare.txt")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"{places[-1]} is not there: run `ddpnopt data fetch shakespeare`")
    text = path.read_text(encoding="utf-8")
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([letters[letter] for letter in text])
    ninth, last = len(codes) * 9 // 10, len(codes) * 19 // 20
    context = int(source.partition("-")[2] or LETTERS)
    train, validation, test = (_windows(part, context) for part in (codes[:ninth], codes[ninth:last], codes[last:]))
    parts = _cut((train, validation, test), size)
    share = torch.bincount(parts[0][1].flatten(), minlength=len(letters)) / parts[0][1].numel()
    return Samples(*parts, len(letters), TokenLoss(), float(torch.special.entr(share).sum()))


def _windows(codes: Tensor, context: int) -> Pair:
    """Consecutive windows, in an order that mixes the works: ``[N, context]`` and the same one letter on."""
    rows = codes[: len(codes) // (context + 1) * (context + 1)].view(-1, context + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(data.SPLIT_SEED))]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


_READERS: dict[str, Callable[[str, Size, Path | None], Samples]] = {
    "mnist-itself": _pictures_themselves,
    "friedman": _friedman,
    "shakespeare": _shakespeare,
}
