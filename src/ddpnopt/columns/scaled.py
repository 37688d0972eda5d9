"""Columns times a number per sample."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..inverse import Inverse
from .base import Columns, Diagonal, Moment
from .dense import DenseColumns


@dataclass(frozen=True)
class ScaledColumns(Columns):
    """``scale_b U_rb`` for numbers ``scale [B]``, without touching what is as large as the gradients."""

    columns: Columns
    scale: Tensor

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.columns.count

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.columns.batch

    def weighted(self, weights: Tensor) -> Tensor:
        return self.columns.weighted(weights * self.scale)

    def directional(self, direction: Tensor) -> Tensor:
        return self.columns.directional(direction) * self.scale

    def gram(self, inverse: Inverse) -> Tensor:
        scale = self.scale if self.count == 1 else self.scale.repeat(self.count)
        return self.columns.gram(inverse).mul_(scale[:, None]).mul_(scale)

    def sample_gram(self, inverse: Inverse) -> Tensor:
        return self.columns.sample_gram(inverse) * self.scale.square()[:, None, None]

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        return self.columns.solve_weighted(inverse, weights * self.scale)

    def solve_weighted_and(self, inverse: Inverse, weights: Tensor, other: Tensor, share: float) -> Tensor:
        return self.columns.solve_weighted_and(inverse, weights * self.scale, other, share)

    def move_(self, control: Sequence[Tensor], inverse: Inverse, weights: Tensor, alpha: float, kept: float) -> None:
        self.columns.move_(control, inverse, weights * self.scale, alpha, kept)

    def moments(self) -> tuple[Moment | Diagonal, Moment | Diagonal]:
        return self.plain().moments()

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        return self.plain().squares(out, fan_in)

    def combined(self, weights: Tensor) -> Columns:
        return self.columns.combined(weights * self.scale)

    def multiplied(self, scale: Tensor) -> "ScaledColumns":
        return ScaledColumns(self.columns, self.scale * scale)

    def first(self, count: int) -> "ScaledColumns":
        return ScaledColumns(self.columns.first(count), self.scale)

    def absent(self, batch: int) -> Columns:
        return self.columns.absent(batch)

    def dense(self) -> DenseColumns:
        return self.columns.dense().multiplied(self.scale)

    def plain(self) -> Columns:
        """The same with the numbers multiplied in."""
        return self.columns.multiplied(self.scale)
