"""Networks that the ranks train."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Skips, a loose parameter, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) * self.scale
        h = h + torch.tanh(self.inner(h))
        h = h + torch.tanh(self.inner(h))
        out: Tensor = self.last(h)
        return out


class Words(nn.Module):
    """A table read at different rows by every sample, tied to the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.last = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.last.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.inner(self.table(x).mean(1))))
        return out


class Unread(nn.Module):
    """A layer whose parameters are used without a call of it, so that they have no columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.first(x)), self.last.weight, self.last.bias)


class Heated(nn.Module):
    """A parameter that the loss alone reads, which finds it at the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.heat = nn.Linear(6, 5), nn.Linear(5, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(torch.tanh(self.first(x)))
        z.heat = self.heat  # type: ignore[attr-defined]
        return z


class Heating(nn.CrossEntropyLoss):
    """Cross-entropy of heated logits."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output * output.heat.exp(), target)  # type: ignore[attr-defined]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def narrowed() -> nn.Module:
    """Whose first layer hardly moves the output."""
    model = mlp()
    with torch.no_grad():
        model[4].weight.mul_(1e-3)  # type: ignore[index]
    return model


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Conv1d(4, 3, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(9, 3),
    )  # fmt: skip


def pictures() -> nn.Module:
    """Formed gradients large enough to stay where they are."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 9, 5, padding=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


class Mixed(nn.Module):
    """Blocks with skips inside and around them, one of which uses its input first other than through a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.norm = nn.Linear(6, 5), Own(), nn.LayerNorm(5)
        self.conv, self.last = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + torch.tanh(self.block(h))
        out: Tensor = self.last(torch.relu(self.conv(self.norm(h)[:, None])).flatten(1))
        return out


class Own(nn.Module):
    """A layer and parameters of its own, which no fast rule reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 5), nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(torch.tanh(x)) * self.scale
        return out
