"""Columns of all ranks' samples that stay where they are: a rank has its own, and answers are summed or gathered.

For gradients that are formed per sample, which are many numbers. What needs pairs of samples, the Gram matrix, is done
by slices: every rank gets its slice of all samples' gradients, times a root of ``M^-1`` so that slices do not meet,
``(p - 1) / p`` of them in all instead of ``p - 1`` times as many, and the slices' Gram matrices add up. Float32 numbers
are rounded on the way (:mod:`ddpnopt.columns.rounded`), a rank's own too, so that the Gram matrix is one of real rows,
positive semi-definite. Nothing else is made from them: the update and the curvature come from whole numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import linalg
from ..errors import StepError
from ..inverse import Inverse, LowRank, Rotated, Separable, Side, sandwich
from ..ranks import Ranks
from .base import Columns, Diagonal, Moment, Spread, sum_symmetric, symmetric_product
from .dense import DenseColumns
from .rounded import BLOCK, BYTES, packed, unpacked


@dataclass(frozen=True)
class SpreadColumns(Columns):
    """Columns of this rank's samples, standing for those of all.

    Args:
        own: of this rank's.
        ranks: where the others are; all of them ask the same questions in the same order.
        counts: samples of each rank.
        rounded: whether float32 numbers go out rounded for the Gram matrix.
    """

    own: Columns
    ranks: Ranks
    counts: tuple[int, ...]
    rounded: bool = True

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.own.count

    @property
    def batch(self) -> int:  # type: ignore[override]
        return sum(self.counts)

    @property
    def _place(self) -> slice:
        """Where this rank's samples are among all."""
        before = sum(self.counts[: self.ranks.rank])
        return slice(before, before + self.counts[self.ranks.rank])

    def weighted(self, weights: Tensor) -> Tensor:
        return self.ranks.sum(self.own.weighted(weights[:, self._place]))

    def directional(self, direction: Tensor) -> Tensor:
        return self._gathered(self.own.directional(direction).mT).mT

    def gram(self, inverse: Inverse) -> Tensor:
        values = _halved(inverse, self.own.dense().values).flatten(2)
        rounds = self.rounded and values.dtype == torch.float32
        traded = self._traded(packed(values) if rounds else values[..., None])
        rows = (unpacked(traded) if rounds else traded[..., 0]).flatten(0, 1)
        return sum_symmetric(self.ranks, symmetric_product((rows, rows)))

    def sample_gram(self, inverse: Inverse) -> Tensor:
        return self._gathered(self.own.sample_gram(inverse))

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        return inverse.solve(self.weighted(weights))

    def moments(self) -> tuple[Moment | Diagonal, Moment | Diagonal]:
        if isinstance(self.own, DenseColumns):
            return self._formed_moments(self.own.values)
        S, A = (self._shared(moment) for moment in self.own.moments())
        return S, A

    def _formed_moments(self, values: Tensor) -> tuple[Moment, Moment]:
        """As :meth:`DenseColumns.moments`, the root of the trace over all samples."""
        gradients = values.flatten(0, 1)
        root = (self.ranks.sum(gradients.square().sum()[None])[0] / self.batch).sqrt()
        scale = torch.where(root == 0, 0.0, 1 / (self.batch * root))
        by_out, by_fan_in = gradients.transpose(0, 1).flatten(1).mT, gradients.flatten(0, 1)
        out, fan_in = values.shape[2:]
        return Moment(by_out, 1, scale, self._spread(fan_in)), Moment(by_fan_in, 1, scale, self._spread(out))

    def _shared(self, moment: Moment | Diagonal) -> Moment | Diagonal:
        """The mean of the ranks' own moments, weighted by samples."""
        own = self.counts[self.ranks.rank]
        share = own / self.batch
        if isinstance(moment, Diagonal):
            return Diagonal(self.ranks.sum(moment.values * share if own else torch.zeros_like(moment.values)))
        lengths = [int(n) for n in torch.stack(self.ranks.gather(torch.tensor([len(moment.rows)])))]
        before = sum(lengths[: self.ranks.rank])
        places = torch.arange(before, before + len(moment.rows), device=moment.rows.device)
        return Moment(moment.rows, max(moment.count, 1), moment.scale * share, Spread(self.ranks, places, sum(lengths)))

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        own = self.counts[self.ranks.rank]
        squares = self.own.squares(out, fan_in)
        return self.ranks.sum(squares * (own / self.batch) if own else torch.zeros_like(squares))

    def combined(self, weights: Tensor) -> "SpreadColumns":
        return replace(self, own=self.own.combined(weights[:, self._place]))

    def multiplied(self, scale: Tensor) -> "SpreadColumns":
        return replace(self, own=self.own.multiplied(scale[self._place]))

    def first(self, count: int) -> "SpreadColumns":
        return replace(self, own=self.own.first(count))

    def absent(self, batch: int) -> Columns:
        return self.own.absent(batch)

    def dense(self) -> DenseColumns:
        return DenseColumns(self._gathered(self.own.dense().values.transpose(0, 1)).transpose(0, 1))

    def _traded(self, values: Tensor) -> Tensor:
        """A slice ``[R, B, n, each]`` of all ranks' samples from ``values [R, B, P, each]`` of this rank's."""
        sizes = [len(part) for part in torch.arange(values.shape[2]).tensor_split(self.ranks.size)]
        mine, width = sizes[self.ranks.rank], self.count * values.shape[3]
        slices = torch.cat([part.flatten() for part in values.split(sizes, 2)])
        lengths = [width * self.counts[self.ranks.rank] * n for n in sizes]
        parts = self.ranks.trade(slices, lengths, [width * n * mine for n in self.counts])
        shapes = [(self.count, n, mine, values.shape[3]) for n in self.counts]
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], 1)

    def _gathered(self, values: Tensor) -> Tensor:
        """``[B, ...]`` of all ranks' samples from ``[B, ...]`` of this rank's."""
        each = values[0].numel() if len(values) else values.shape[1:].numel()
        parts = self.ranks.gather(values.flatten(), [each * n for n in self.counts])
        return torch.cat([part.view(n, *values.shape[1:]) for part, n in zip(parts, self.counts, strict=True)])

    def _spread(self, each: int) -> Spread:
        """Where this rank's rows are among all, with ``each`` rows to a column."""
        places = torch.arange(self.count * self.batch * each)
        return Spread(self.ranks, places.view(self.count, self.batch, each)[:, self._place].flatten(), len(places))


def spreads(shape: Sequence[int], dtype: torch.dtype, counts: Sequence[int], *, rounded: bool) -> bool:
    """Whether fewer bytes are sent, by the rank that sends most, if these formed gradients stay where they are.

    Args:
        shape: ``[R, B, out, fan_in]`` on some rank.
        dtype: theirs.
        counts: samples of each rank.
        rounded: as in :class:`SpreadColumns`.
    """
    R, _, out, fan_in = shape
    p, own = len(counts), R * max(counts) * out * fan_in
    gathered = (p - 1) * own
    gram, update = (R * sum(counts)) ** 2 / 2, out * fan_in
    sent = BYTES / BLOCK / dtype.itemsize if rounded and dtype == torch.float32 else 1.0
    return (p - 1) / p * (sent * own + 2 * gram + 2 * update) < gathered


def _halved(inverse: Inverse, values: Tensor) -> Tensor:
    """``w [R, B, out, fan_in]`` with ``w_m' w_n = U_m' M^-1 U_n``: numbers that do not meet any more, of like size."""
    if isinstance(inverse, Rotated):
        return inverse.rotate(values) * inverse.diagonal.rsqrt()
    assert isinstance(inverse, Separable)
    halved = sandwich(_root(inverse.out), values, _root(inverse.fan_in))
    return halved if inverse.scale == 1.0 else halved * math.sqrt(inverse.scale)


def _root(side: Side) -> Side:
    """``L`` with ``L L' = side``."""
    if side is None:
        return None
    if isinstance(side, LowRank):
        root = side.rest.sqrt()
        return LowRank(side.basis, (side.weights + side.rest).sqrt() - root, root)
    if side.ndim == 1:
        return side.sqrt()
    factor, _ = linalg.cholesky(side.double())  # in float32 an inverse may be indefinite, and would get a jitter
    if factor is None:
        raise StepError("the inverse of a layer's curvature is not positive definite: raise the curvature's damping")
    return factor.to(side.dtype)
