"""What all columns answer, and the Kronecker factors they give, not multiplied out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..inverse import Inverse
from ..ranks import Ranks

if TYPE_CHECKING:
    from .dense import DenseColumns

CHUNK = 1 << 18
"""How many numbers are worked on at once where more would leave the processor's cache."""

ROWS = 64
"""Rows of a Gram matrix computed at once; of each only the part up to the diagonal."""

WIDEST = 4096
"""A side of a Kronecker factor above this keeps its diagonal only (an embedding's vocabulary, say)."""


@dataclass(frozen=True)
class Spread:
    """Rows of which other ranks have more.

    Args:
        ranks: who has them.
        places: of this rank's rows among all, ascending.
        total: how many there are.

    ``scale`` and ``count`` of a moment are then the share of this rank's rows in it.
    """

    ranks: Ranks
    places: Tensor
    total: int


@dataclass(frozen=True)
class Moment:
    """One Kronecker factor ``scale * rows' rows / count [side, side]``, not multiplied out; ``rows [n, side]``.

    ``spread``: where the rows are some of those that several ranks have; all of them count.
    """

    rows: Tensor
    count: int
    scale: Tensor | float = 1.0
    spread: Spread | None = None

    @property
    def side(self) -> int:
        """How wide the factor is."""
        return self.rows.shape[1]

    def matrix(self) -> Tensor:
        """The factor; only its diagonal, as a vector, if it is wider than ``WIDEST``."""
        wide = self.side > WIDEST
        own = self.rows.square().sum(0) if wide else self.rows.mT @ self.rows
        own = own * self.scale / self.count
        return self._summed(own) if wide or self.spread is None else sum_symmetric(self.spread.ranks, own)

    def times(self, values: Tensor) -> Tensor:
        """The factor times ``values [side, c]``."""
        return self._summed(self.rows.mT @ ((self.rows @ values) * (self.scale / self.count)))

    def form(self, values: Tensor) -> Tensor:
        """``values' factor values [c, c]`` for ``values [side, c]``: of the factor, few numbers are summed."""
        products = self.rows @ values
        own = products.mT @ products * (self.scale / self.count)
        return own if self.spread is None else sum_symmetric(self.spread.ranks, own)

    def trace(self) -> Tensor:
        """Its trace."""
        return self._summed((self.rows.square().sum() * self.scale / self.count)[None])[0]

    def samples(self, wanted: int) -> Tensor:
        """Some of the rows, evenly among all, at most ``wanted``."""
        total = len(self.rows) if self.spread is None else self.spread.total
        chosen = torch.arange(0, total, max(1, total // wanted))[:wanted]
        if self.spread is None:
            return self.rows[chosen.to(self.rows.device)]
        places = self.spread.places
        at = torch.searchsorted(places, chosen).clamp_max(max(len(places) - 1, 0))
        own = self.rows.new_zeros(len(chosen), self.side)
        if len(places):
            here = places[at] == chosen
            own[here] = self.rows[at[here]]
        return self.spread.ranks.sum(own)

    def _summed(self, own: Tensor) -> Tensor:
        return own if self.spread is None else self.spread.ranks.sum(own)


@dataclass(frozen=True)
class Diagonal:
    """A Kronecker factor of which only the diagonal ``values [side]`` is kept."""

    values: Tensor

    def matrix(self) -> Tensor:
        """The diagonal."""
        return self.values


class Columns(ABC):
    """Parameter gradients ``U`` of the columns of one block. ``count``: R; ``batch``: B."""

    count: int
    batch: int

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """``U' w = sum_n w_n U_n``, ``[out, fan_in]``, for weights ``[R, B]``."""

    @abstractmethod
    def directional(self, direction: Tensor) -> Tensor:
        """``U g``: the inner products ``<U_n, g>``, ``[R, B]``, with a direction ``[out, fan_in]``."""

    @abstractmethod
    def gram(self, inverse: Inverse) -> Tensor:
        """``U M^-1 U'``, ``[N, N]``."""

    @abstractmethod
    def sample_gram(self, inverse: Inverse) -> Tensor:
        """The diagonal blocks of :meth:`gram`, one per sample: ``[B, R, R]``."""

    @abstractmethod
    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        """``M^-1 U' w``, ``[out, fan_in]``."""

    def solve_weighted_and(self, inverse: Inverse, weights: Tensor, other: Tensor, share: float) -> Tensor:
        """``M^-1 U' w + share * other`` for another ``[out, fan_in]``."""
        return self.solve_weighted(inverse, weights).add(other, alpha=share)

    def move_(self, control: Sequence[Tensor], inverse: Inverse, weights: Tensor, alpha: float, kept: float) -> None:
        """``control <- kept * control + alpha * M^-1 U' w``; ``control``: ``[out, fan_in]``, cut into columns."""
        add_(control, self.solve_weighted(inverse, weights), alpha, kept)

    @abstractmethod
    def moments(self) -> tuple[Moment | Diagonal, Moment | Diagonal]:
        """Kronecker factors ``S [out, out]``, ``A [fan_in, fan_in]`` with ``S (x) A ~ sum_n U_n U_n' / B``."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """:meth:`moments` multiplied out; a side wider than ``WIDEST`` by its diagonal, as a vector."""
        S, A = self.moments()
        return S.matrix(), A.matrix()

    @abstractmethod
    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        """``sum_n (Q_S' U_n Q_A)^2 / B`` elementwise, ``[out, fan_in]``, in the basis ``out = Q_S, fan_in = Q_A``."""

    @abstractmethod
    def combined(self, weights: Tensor) -> Columns:
        """One column per sample: ``sum_r w_rb U_rb`` for weights ``[R, B]``."""

    @abstractmethod
    def multiplied(self, scale: Tensor) -> Columns:
        """``scale_b U_rb`` for numbers ``[B]``."""

    @abstractmethod
    def first(self, count: int) -> Columns:
        """The first ``count`` columns of every sample."""

    @abstractmethod
    def absent(self, batch: int) -> Columns:
        """As many columns of zero per sample, for ``batch`` samples that did not use the block."""

    @abstractmethod
    def dense(self) -> DenseColumns:
        """The same columns with the gradients formed: ``R * B * out * fan_in`` numbers."""

    def added(self, others: Sequence[Columns]) -> Columns | None:
        """The sum with the columns of other uses, ``None`` if it has no better form than the dense one."""
        return None

    def beside(self, others: Sequence[Columns]) -> Columns | None:
        """These and then the columns of other batches, ``None`` if that has no better form than the dense one."""
        return None


def sum_symmetric(ranks: Ranks, matrix: Tensor) -> Tensor:
    """The sum over ranks of symmetric matrices, of which only half is sent."""
    rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
    half = ranks.sum(matrix[rows, columns])
    whole = matrix.new_empty(matrix.shape)
    whole[rows, columns] = half
    whole[columns, rows] = half
    return whole


def add_(control: Sequence[Tensor], direction: Tensor, alpha: float, kept: float) -> None:
    """``control <- kept * control + alpha * direction``, a matrix cut into columns; rounded once, at the end."""
    for part, own in zip(control, direction.split([part.shape[1] for part in control], 1), strict=True):
        exact = part if part.dtype == own.dtype else part.to(own.dtype)
        if kept != 1.0:
            exact.mul_(kept)
        exact.add_(own, alpha=alpha)
        if exact is not part:
            part.copy_(exact)


def symmetric_product(*pairs: tuple[Tensor, Tensor], solve: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """``solve(left) right'`` for ``[n, side]`` that is known to be symmetric: for many rows half of it is computed.

    Of several pairs ``(left, right)``, without ``solve``, the elementwise product. ``solve`` gets some rows at a time,
    so that what it makes of them stays in the processor's cache; default: ``left`` as it is.
    """
    (left, right), *others = pairs
    n = left.shape[0]
    if solve is None and n <= 2 * ROWS:
        product = left @ right.mT
        for more, against in others:
            product.mul_(more @ against.mT)
        return product
    product = left.new_empty(n, n)
    for start in range(0, n, ROWS):
        end = min(start + ROWS, n)
        rows = left[start:end] if solve is None else solve(left[start:end])
        part = torch.mm(rows, right[:end].mT, out=product[start:end, :end])
        for more, against in others:
            part.mul_(more[start:end] @ against[:end].mT)
        product[:start, start:end] = part[:, :start].mT
    return product
