"""Small networks with a batch each: one for every kind of layer or graph that a probe asks about."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

CLASSES = 4


class Criterion(nn.CrossEntropyLoss):
    """Cross-entropy, with something done to it before ``backward``: a GradScaler's factor, a micro-batch's share."""

    def __init__(self, last: Callable[[Tensor], Tensor]):
        super().__init__()
        self.last = last

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.last(super().forward(output.float() if output.dtype == torch.bfloat16 else output, target))


@dataclass(frozen=True)
class Problem:
    """A model with one batch: ``inputs`` go to the model, ``target [B]`` holds class labels."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    last: Callable[[Tensor], Tensor] = field(default=lambda loss: loss)
    autocast: bool = False

    def output(self, *inputs: Tensor) -> Tensor:
        """The model's output ``[B, 4]``."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output: Tensor = self.model(*inputs)
        return output

    def criterion(self) -> Criterion:
        """The loss module of the batch."""
        return Criterion(self.last)

    def loss(self) -> Tensor:
        """The batch's loss, with its graph."""
        value: Tensor = self.criterion()(self.output(*self.inputs), self.target)
        return value

    def value(self) -> float:
        """The batch's loss as a number, in training mode."""
        with torch.no_grad():
            return float(self.loss())

    def rows(self, rows: slice) -> "Problem":
        """The same model with some of the samples."""
        return replace(self, inputs=tuple(x[rows] for x in self.inputs), target=self.target[rows])

    def reversed(self) -> "Problem":
        """The same samples in another order, with a model of its own: another rounding, nothing else."""
        return replace(self.copy(), inputs=tuple(x.flip(0) for x in self.inputs), target=self.target.flip(0))

    def halves(self) -> tuple["Problem", "Problem"]:
        """Two micro-batches whose gradients add up to the batch's."""
        middle = len(self.target) // 2
        halves = self.rows(slice(middle)), self.rows(slice(middle, None))
        return replace(halves[0], last=lambda loss: loss / 2), replace(halves[1], last=lambda loss: loss / 2)

    def copy(self) -> "Problem":
        """The same batch with a model of its own; before any optimizer hooks the model."""
        return replace(self, model=copy.deepcopy(self.model))

    def weights(self) -> Tensor:
        """All parameters in one vector, detached."""
        return torch.cat([p.detach().flatten().double() for p in self.model.parameters()])


def _labels(batch: int) -> Tensor:
    return torch.arange(batch) % CLASSES


def _on_vectors(model: nn.Module, batch: int = 8, width: int = 10) -> Problem:
    return Problem(model, (torch.randn(batch, width),), _labels(batch))


def mlp(batch: int = 8, width: int = 16) -> Problem:
    layers = [nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)]
    return _on_vectors(nn.Sequential(*layers), batch)


def dropout_mlp() -> Problem:
    return _on_vectors(nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, CLASSES)))


def batch_norm_mlp() -> Problem:
    return _on_vectors(
        nn.Sequential(nn.Linear(10, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES))
    )


def inplace_mlp() -> Problem:
    return _on_vectors(nn.Sequential(nn.Linear(10, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)))


def frozen_mlp() -> Problem:
    problem = mlp()
    problem.model.get_submodule("2").requires_grad_(False)
    return problem


def grouped_conv() -> Problem:
    convolutions = [nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2, groups=4)]
    model = nn.Sequential(*convolutions, nn.Tanh(), nn.Flatten(), nn.Linear(32, CLASSES))
    return Problem(model, (torch.randn(8, 4, 6, 6),), _labels(8))


def conv_1d() -> Problem:
    layers = [nn.Conv1d(3, 6, 3, dilation=2), nn.Tanh(), nn.ConvTranspose1d(6, 4, 3, stride=2), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(68, CLASSES))
    return Problem(model, (torch.randn(8, 3, 12),), _labels(8))


class Mean(nn.Module):
    """Mean over the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def positions() -> Problem:
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, CLASSES), Mean())
    return Problem(model, (torch.randn(8, 5, 10),), _labels(8))


class Twice(nn.Module):
    """The same layer two times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(10, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return output


def twice() -> Problem:
    return _on_vectors(Twice())


class Idle(nn.Module):
    """Two layers, one of which the forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.last = nn.Linear(10, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(x)
        return output


def idle() -> Problem:
    return _on_vectors(Idle())


class Attention(nn.Module):
    """Embedding, self-attention, layer norm, mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        output: Tensor = self.last(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))
        return output


def attention() -> Problem:
    return Problem(Attention(), (torch.arange(40).view(8, 5) * 7 % 20,), _labels(8))


class Recurrent(nn.Module):
    """An LSTM read at its last position."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.last = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.recurrent(x)[0][:, -1])
        return output


def recurrent() -> Problem:
    return Problem(Recurrent(), (torch.randn(8, 5, 6),), _labels(8))


class Tied(nn.Module):
    """The embedding's matrix is the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(CLASSES, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, CLASSES, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.last(torch.tanh(self.middle(self.embedding(tokens).mean(1))))
        return output


def tied() -> Problem:
    return Problem(Tied(), (torch.arange(24).view(8, 3) * 5 % CLASSES,), _labels(8))


class Block(nn.Module):
    """A residual block with batch norm and a projection on the skip path."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.skip = nn.Conv2d(outputs, outputs, 3, padding=1), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.second(torch.relu(self.norm(self.first(x))))
        skipped: Tensor = self.skip(x)
        return inner + skipped


def residual() -> Problem:
    layers = [Block(2, 4), nn.ReLU(), Block(4, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)]
    return Problem(nn.Sequential(*layers), (torch.randn(8, 2, 6, 6),), _labels(8))


class Scale(nn.Module):
    """A parameter of the model's own, outside any layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def mixed() -> Problem:
    layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), Scale(), nn.GroupNorm(2, 4)]
    rest = [nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES, bias=False)]
    return Problem(nn.Sequential(*layers, *rest), (torch.randn(8, 2, 4, 4),), _labels(8))
