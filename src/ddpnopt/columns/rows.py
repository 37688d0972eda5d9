"""Columns of a table of which every sample reads a few rows: an embedding's, whose vocabulary may be large.

Nothing of the table's height is formed per sample. Letters as in :mod:`ddpnopt.columns`, and ``K``: pairs of a row and
a sample that reads it, over all samples; a sample's gradient is zero in every other row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..inverse import Inverse, LowRank, Rotated, Separable, times
from .base import CHUNK, Columns, Diagonal, Moment
from .dense import DenseColumns

DENSER = 16
"""How many products of a matrix multiplication cost as much as one product of gathered pairs."""


@dataclass(frozen=True)
class RowColumns(Columns):
    """``U_rb`` is ``values[r, k]`` in row ``rows[k]`` for each ``k`` with ``samples[k] = b``; from :func:`gathered`.

    Args:
        samples, rows: of each pair, ``[K]``; no pair is there twice, and ``rows`` ascend.
        values: ``[R, K, fan_in]``.
        batch: B.
        height: rows of the table, the block's ``out``.
    """

    samples: Tensor
    rows: Tensor
    values: Tensor
    batch: int
    height: int

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    def dense(self) -> DenseColumns:
        R, _, fan_in = self.values.shape
        dense = self.values.new_zeros(R, self.batch * self.height, fan_in)
        dense[:, self.samples * self.height + self.rows] = self.values
        return DenseColumns(dense.view(R, self.batch, self.height, fan_in))

    def weighted(self, weights: Tensor) -> Tensor:
        sums = torch.einsum("rk,rkd->kd", weights.to(self.values.dtype)[:, self.samples], self.values)
        return self._into_table(sums)

    def directional(self, direction: Tensor) -> Tensor:
        products = torch.einsum("rkd,kd->rk", self.values, direction[self.rows])
        return products.new_zeros(self.count, self.batch).index_add_(1, self.samples, products)

    def gram(self, inverse: Inverse) -> Tensor:
        if (sides := self._sides(inverse)) is None:
            return self.dense().gram(inverse)
        used, place, readers = self.rows.unique_consecutive(return_inverse=True, return_counts=True)
        pairs = int(readers.square().sum())
        if self.batch**2 * len(used) <= DENSER * pairs:
            return self._gram_by_rows(*sides, place, len(used))
        return self._gram_by_pairs(*sides, place, readers, pairs)

    def sample_gram(self, inverse: Inverse) -> Tensor:
        if (sides := self._sides(inverse)) is None:
            return self.dense().sample_gram(inverse)
        products = torch.einsum("rkd,qkd->krq", *sides)
        return products.new_zeros(self.batch, self.count, self.count).index_add_(0, self.samples, products)

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        return inverse.solve(self.weighted(weights))

    def moments(self) -> tuple[Diagonal, Moment]:
        """As :meth:`DenseColumns.moments`, with the diagonal of ``S`` alone, at any height."""
        values = self.values.flatten(0, 1)
        root = (values.square().sum() / self.batch).sqrt()
        scale = torch.where(root == 0, 0.0, 1 / (self.batch * root))
        by_row = self.values.square().sum((0, 2))
        heights = by_row.new_zeros(self.height).index_add_(0, self.rows, by_row)
        return Diagonal(heights * scale), Moment(values, 1, scale)

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        if out is not None and out.ndim == 2:
            return self.dense().squares(out, fan_in)
        values = times(self.values, fan_in)
        if out is not None:
            values = values * out[self.rows, None]
        return self._into_table(values.square().sum(0)) / self.batch

    def combined(self, weights: Tensor) -> "RowColumns":
        weighted = weights.to(self.values.dtype)[:, self.samples, None] * self.values
        return replace(self, values=weighted.sum(0, keepdim=True))

    def multiplied(self, scale: Tensor) -> "RowColumns":
        return replace(self, values=self.values * scale.to(self.values.dtype)[self.samples, None])

    def first(self, count: int) -> "RowColumns":
        return replace(self, values=self.values[:count])

    def absent(self, batch: int) -> "RowColumns":
        return RowColumns(self.samples[:0], self.rows[:0], self.values[:, :0], batch, self.height)

    def added(self, others: Sequence[Columns]) -> "RowColumns | None":
        all_of = [self, *(other for other in others if isinstance(other, RowColumns))]
        return _joined(all_of, [0] * len(all_of), self.batch) if len(all_of) == 1 + len(others) else None

    def beside(self, others: Sequence[Columns]) -> "RowColumns | None":
        all_of = [self, *(other for other in others if isinstance(other, RowColumns))]
        if len(all_of) < 1 + len(others):
            return None
        before = [sum(part.batch for part in all_of[:i]) for i in range(len(all_of))]
        return _joined(all_of, before, sum(part.batch for part in all_of))

    def _into_table(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.height, values.shape[1]).index_add_(0, self.rows, values)

    def _sides(self, inverse: Inverse) -> tuple[Tensor, Tensor] | None:
        """``M^-1`` times the values, and what they are multiplied by, if ``M`` does not mix the rows; else ``None``."""
        assert isinstance(inverse, Separable | Rotated)
        if isinstance(inverse.out, LowRank) or (inverse.out is not None and inverse.out.ndim == 2):
            return None
        if isinstance(inverse, Rotated):
            values = times(self.values, inverse.fan_in)
            if inverse.out is not None:
                values = values * inverse.out[self.rows, None]
            return values / inverse.diagonal[self.rows], values
        solved = times(self.values, inverse.fan_in) * inverse.scale
        return (solved if inverse.out is None else solved * inverse.out[self.rows, None]), self.values

    def _gram_by_rows(self, left: Tensor, right: Tensor, place: Tensor, used: int) -> Tensor:
        """Products of whole samples, a stretch of the used rows at a time."""
        R, _, fan_in = left.shape
        gram = left.new_zeros(R * self.batch, R * self.batch)
        stretch = max(1, CHUNK // (R * self.batch * fan_in))
        for start in range(0, used, stretch):
            lo, hi = torch.searchsorted(place, torch.tensor([start, start + stretch], device=place.device)).tolist()
            at = self.samples[lo:hi] * stretch + place[lo:hi] - start
            u, m = (side.new_zeros(R, self.batch * stretch, fan_in) for side in (left, right))
            u[:, at], m[:, at] = left[:, lo:hi], right[:, lo:hi]
            gram += u.view(len(gram), -1) @ m.view(len(gram), -1).mT
        return gram

    def _gram_by_pairs(self, left: Tensor, right: Tensor, place: Tensor, readers: Tensor, pairs: int) -> Tensor:
        """Products of two samples' values wherever both read the same row."""
        R, K, fan_in = left.shape
        partners = readers[place]
        first = torch.arange(K, device=place.device).repeat_interleave(partners)
        within = torch.arange(pairs, device=place.device) - (partners.cumsum(0) - partners)[first]
        second = (readers.cumsum(0) - readers)[place][first] + within
        into = self.samples[first] * self.batch + self.samples[second]
        gram = left.new_zeros(R, R, self.batch**2)
        stretch = max(1, CHUNK // (R * fan_in))
        for k, m, at in zip(first.split(stretch), second.split(stretch), into.split(stretch), strict=True):
            gram.index_add_(2, at, torch.einsum("rpd,qpd->rqp", left[:, k], right[:, m]))
        return gram.view(R, R, self.batch, self.batch).transpose(1, 2).reshape(R * self.batch, -1)


def gathered(samples: Tensor, rows: Tensor, values: Tensor, batch: int, height: int) -> RowColumns:
    """Columns of any list of pairs; the values ``[R, K, fan_in]`` of a pair that is there several times add up."""
    keys, place = (rows * batch + samples).unique(return_inverse=True)
    sums = values.new_zeros(len(values), len(keys), values.shape[2]).index_add_(1, place, values)
    return RowColumns(keys % batch, keys // batch, sums, batch, height)


def _joined(parts: Sequence[RowColumns], before: Sequence[int], batch: int) -> RowColumns:
    samples = torch.cat([part.samples + shift for part, shift in zip(parts, before, strict=True)])
    values = torch.cat([part.values for part in parts], 1)
    return gathered(samples, torch.cat([part.rows for part in parts]), values, batch, parts[0].height)
