"""Columns whose per-sample gradients are formed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..inverse import Inverse, LowRank, Separable, sandwich
from .base import Columns, Moment, symmetric_product


@dataclass(frozen=True)
class DenseColumns(Columns):
    """Per-sample gradients themselves: ``values [R, B, out, fan_in]``."""

    values: Tensor

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    def weighted(self, weights: Tensor) -> Tensor:
        return torch.einsum("rb,rboi->oi", weights.to(self.values.dtype), self.values)

    def directional(self, direction: Tensor) -> Tensor:
        return torch.einsum("rboi,oi->rb", self.values, direction)

    def gram(self, inverse: Inverse) -> Tensor:
        if isinstance(inverse, Separable) and isinstance(inverse.fan_in, LowRank):
            # two products, one of them thin, and nothing of the gradients' size is written
            side, rest = inverse.fan_in, Separable(inverse.out, None, inverse.scale)
            thin = self.values @ side.basis
            weighted = Separable(inverse.out, side.weights, inverse.scale)
            return _product(self.values, rest).mul_(side.rest).add_(_product(thin, weighted))
        return _product(self.values, inverse)

    def sample_gram(self, inverse: Inverse) -> Tensor:
        return torch.einsum("rboi,qboi->brq", self.values, inverse.solve(self.values))

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        return inverse.solve(self.weighted(weights))

    def moments(self) -> tuple[Moment, Moment]:
        # E[g g'] = tr(A) S and E[g' g] = tr(S) A for g g' ~ S (x) A: one division by the root of the trace
        # E|g|^2 = tr(S) tr(A) shares the scale out evenly
        gradients = self.values.flatten(0, 1)
        root = (gradients.square().sum() / self.batch).sqrt()
        scale = torch.where(root == 0, 0.0, 1 / (self.batch * root))
        by_out, by_fan_in = gradients.transpose(0, 1).flatten(1).mT, gradients.flatten(0, 1)
        return Moment(by_out, 1, scale), Moment(by_fan_in, 1, scale)

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        return sandwich(out, self.values, fan_in).square().sum(0).mean(0)

    def combined(self, weights: Tensor) -> "DenseColumns":
        return DenseColumns((weights.to(self.values.dtype)[..., None, None] * self.values).sum(0, keepdim=True))

    def multiplied(self, scale: Tensor) -> "DenseColumns":
        return DenseColumns(self.values * scale.to(self.values.dtype)[:, None, None])

    def first(self, count: int) -> "DenseColumns":
        return DenseColumns(self.values[:count])

    def absent(self, batch: int) -> "DenseColumns":
        return DenseColumns(self.values.new_zeros(self.count, batch, *self.values.shape[2:]))

    def dense(self) -> "DenseColumns":
        return self


def _product(values: Tensor, inverse: Inverse) -> Tensor:
    """``U M^-1 U'``, ``[N, N]``, of gradients ``[R, B, out, fan_in]``."""
    rows = values.flatten(0, 1).flatten(1)
    return symmetric_product(
        (rows, rows), solve=lambda some: inverse.solve(some.view(len(some), *values.shape[2:])).flatten(1)
    )
