"""What the Bellman pass asks of one block of parameters: its columns' gradients ``U``, rarely formed.

Shapes: ``R`` columns per sample, ``B`` samples, ``N = R * B``, ``S`` positions (places of an image or a
sequence, and uses, if a layer runs several times), a block's gradient is ``[out, fan_in]``. Column ``n`` is
``(r, b)`` with ``b`` fastest; its gradient ``U_n`` is that of column ``r`` of sample ``b``'s own loss.

Two forms: :class:`OuterColumns` keeps the factors ``v`` and ``x`` of ``U_n = sum_s v_ns x_bs'``;
:class:`DenseColumns` keeps ``U``. A third, for tables of rows, is in :mod:`ddpnopt.row_columns`;
:class:`ScaledColumns` is any of them, times a number per sample. All answer the same
questions, and a test equates them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .inverse import Inverse, LowRank, Rotated, Separable, sandwich, times

CHUNK = 1 << 18
"""Largest number of per-sample gradient entries formed at once in :meth:`OuterColumns.gram`: they stay in cache."""

ROWS = 128
"""Rows of a Gram matrix computed at once; of each only the part up to the diagonal."""

WIDEST = 4096
"""A side of a Kronecker factor above this keeps its diagonal only (an embedding's vocabulary, say)."""


@dataclass(frozen=True)
class Moment:
    """One Kronecker factor ``scale * rows' rows / count [side, side]``, not multiplied out; ``rows [n, side]``."""

    rows: Tensor
    count: int
    scale: Tensor | float = 1.0

    @property
    def side(self) -> int:
        """How wide the factor is."""
        return self.rows.shape[1]

    def matrix(self) -> Tensor:
        """The factor; only its diagonal, as a vector, if it is wider than ``WIDEST``."""
        wide = self.side > WIDEST
        return (self.rows.square().sum(0) if wide else self.rows.mT @ self.rows) * self.scale / self.count

    def times(self, values: Tensor) -> Tensor:
        """The factor times ``values [side, c]``."""
        return self.rows.mT @ ((self.rows @ values) * (self.scale / self.count))

    def trace(self) -> Tensor:
        """Its trace."""
        return self.rows.square().sum() * self.scale / self.count


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

    def move_(self, control: Sequence[Tensor], inverse: Inverse, weights: Tensor, alpha: float) -> None:
        """``control += alpha * M^-1 U' w``, in place; ``control``: the matrix ``[out, fan_in]``, cut into columns."""
        add_(control, self.solve_weighted(inverse, weights), alpha)

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
    def combined(self, weights: Tensor) -> "Columns":
        """One column per sample: ``sum_r w_rb U_rb`` for weights ``[R, B]``."""

    @abstractmethod
    def multiplied(self, scale: Tensor) -> "Columns":
        """``scale_b U_rb`` for numbers ``[B]``."""

    @abstractmethod
    def first(self, count: int) -> "Columns":
        """The first ``count`` columns of every sample."""

    @abstractmethod
    def absent(self, batch: int) -> "Columns":
        """As many columns of zero per sample, for ``batch`` samples that did not use the block."""

    @abstractmethod
    def dense(self) -> "DenseColumns":
        """The same columns with the gradients formed: ``R * B * out * fan_in`` numbers."""

    def added(self, others: Sequence["Columns"]) -> "Columns | None":
        """The sum with the columns of other uses, ``None`` if it has no better form than the dense one."""
        return None

    def beside(self, others: Sequence["Columns"]) -> "Columns | None":
        """These and then the columns of other batches, ``None`` if that has no better form than the dense one."""
        return None


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
            # two products, one of them thin, and nothing of the gradients' size is written but S^-1 U
            side, rest = inverse.fan_in, Separable(inverse.out, None, inverse.scale)
            thin = self.values @ side.basis
            return _product(self.values, rest.solve(self.values)) * side.rest + _product(
                thin, rest.solve(thin * side.weights)
            )
        return _product(self.values, inverse.solve(self.values))

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


@dataclass(frozen=True)
class OuterColumns(Columns):
    """Factors of the gradients: ``U_rb = sum_s v_rbs x_bs'`` with ``v [R, B, S, out]``, ``x [B, S, fan_in]``."""

    v: Tensor
    x: Tensor
    _solved: dict[int, tuple[Inverse, Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.v.shape[0]

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.v.shape[1]

    @property
    def positions(self) -> int:
        """S."""
        return self.v.shape[2]

    def dense(self) -> DenseColumns:
        return DenseColumns(torch.einsum("rbso,bsi->rboi", self.v, self.x))

    def weighted(self, weights: Tensor) -> Tensor:
        return _outer_sum(self.v, self.x, weights)

    def directional(self, direction: Tensor) -> Tensor:
        return ((self.x @ direction.mT) * self.v).sum((2, 3))

    def gram(self, inverse: Inverse) -> Tensor:
        if isinstance(inverse, Rotated):
            return self._rotated_gram(inverse) if self.positions == 1 else self.dense().gram(inverse)
        assert isinstance(inverse, Separable)
        n, s = self.count * self.batch, self.positions
        out, fan_in = self.v.shape[3], self.x.shape[2]
        if s > 1 and n * s * s * (out + fan_in) > (s + n) * out * fan_in:
            return self.dense().gram(inverse)
        v, x = self.v.flatten(0, 2), self.x.flatten(0, 1)
        v_solved, x_solved = self._solve(inverse)
        inputs = symmetric_product(x, x_solved).view(self.batch, s, self.batch, s)
        outputs = symmetric_product(v, v_solved).view(self.count, self.batch, s, self.count, self.batch, s)
        gram = (outputs * inputs[None, :, :, None]).sum((2, 5)) if s > 1 else _hadamard(outputs, inputs)
        return gram.reshape(n, n) * inverse.scale

    def _solve(self, inverse: Separable) -> tuple[Tensor, Tensor]:
        """``v S^-1 [R B S, out]`` and ``x A^-1 [B S, fan_in]``; the Gram matrix and then the update ask for them."""
        if id(inverse) not in self._solved:
            solved = times(self.v.flatten(0, 2), inverse.out), times(self.x.flatten(0, 1), inverse.fan_in)
            self._solved.clear()
            self._solved[id(inverse)] = (inverse, *solved)
        return self._solved[id(inverse)][1:]

    def _rotated_gram(self, inverse: Rotated) -> Tensor:
        v = times(self.v, inverse.out).flatten(0, 2)
        x = times(self.x, inverse.fan_in).flatten(0, 1).repeat(self.count, 1)
        root = inverse.diagonal.rsqrt()
        gram = v.new_zeros(len(v), len(v))
        rows = max(1, CHUNK // (len(v) * x.shape[1]))
        for start in range(0, v.shape[1], rows):
            u = (v[:, start : start + rows, None] * (x[:, None, :] * root[start : start + rows])).flatten(1)
            gram += symmetric_product(u, u)
        return gram

    def sample_gram(self, inverse: Inverse) -> Tensor:
        if self.positions > 1:
            return self.dense().sample_gram(inverse)
        x = self.x[:, 0]
        if isinstance(inverse, Rotated):
            v = self.v[:, :, 0]
            pairs = times(v, inverse.out)
            products = torch.einsum("rbo,qbo->brqo", pairs, pairs)
            return (products @ inverse.diagonal.reciprocal() * times(x, inverse.fan_in).square()[:, None, None]).sum(-1)
        assert isinstance(inverse, Separable)
        v_solved, x_solved = self._solve(inverse)
        inputs = (x * x_solved).sum(-1) * inverse.scale
        return torch.einsum("rbo,qbo,b->brq", self.v[:, :, 0], v_solved.view_as(self.v)[:, :, 0], inputs)

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        thin = self._thin(inverse, weights)
        return inverse.solve(self.weighted(weights)) if thin is None else thin[0].mT @ thin[1]

    def move_(self, control: Sequence[Tensor], inverse: Inverse, weights: Tensor, alpha: float) -> None:
        thin = self._thin(inverse, weights)
        if thin is None:
            return super().move_(control, inverse, weights, alpha)
        v, x = thin
        if any(part.dtype != v.dtype for part in control):
            return add_(control, v.mT @ x, alpha)
        for part, own in zip(control, x.split([part.shape[1] for part in control], 1), strict=True):
            part.addmm_(v.mT, own, alpha=alpha)

    def _thin(self, inverse: Inverse, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """``v [B S, out]`` and ``x [B S, fan_in]`` with ``M^-1 U' w = v' x``; ``None`` where that is the dearer way."""
        few = self.batch * self.positions < min(self.v.shape[3], self.x.shape[2])
        if not isinstance(inverse, Separable) or not (few or id(inverse) in self._solved):
            return None
        v, x = self._solve(inverse)
        weighted = v.view(self.v.shape) * (weights.to(v.dtype) * inverse.scale)[..., None, None]
        return weighted.sum(0).flatten(0, 1), x

    def moments(self) -> tuple[Moment, Moment]:
        outputs, inputs = self.v.flatten(0, 2), self.x.flatten(0, 1)
        return Moment(outputs, self.batch * self.positions), Moment(inputs, self.batch)

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        v, x = times(self.v, out), times(self.x, fan_in)
        if self.positions > 1:
            return (v.mT @ x).square().sum(0).mean(0)
        return v[:, :, 0].square().sum(0).mT @ x[:, 0].square() / self.batch

    def combined(self, weights: Tensor) -> "OuterColumns":
        return OuterColumns((weights.to(self.v.dtype)[..., None, None] * self.v).sum(0, keepdim=True), self.x)

    def multiplied(self, scale: Tensor) -> "OuterColumns":
        return OuterColumns(self.v * scale.to(self.v.dtype)[:, None, None], self.x)

    def first(self, count: int) -> "OuterColumns":
        return OuterColumns(self.v[:count], self.x)

    def absent(self, batch: int) -> "OuterColumns":
        shape = self.v.shape
        return OuterColumns(self.v.new_zeros(shape[0], batch, *shape[2:]), self.x.new_zeros(batch, *self.x.shape[1:]))


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
        scale = self.scale.repeat(self.count)
        return self.columns.gram(inverse).mul_(scale[:, None] * scale)

    def sample_gram(self, inverse: Inverse) -> Tensor:
        return self.columns.sample_gram(inverse) * self.scale.square()[:, None, None]

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        return self.columns.solve_weighted(inverse, weights * self.scale)

    def move_(self, control: Sequence[Tensor], inverse: Inverse, weights: Tensor, alpha: float) -> None:
        self.columns.move_(control, inverse, weights * self.scale, alpha)

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


def add_(control: Sequence[Tensor], direction: Tensor, alpha: float) -> None:
    """``control += alpha * direction`` for a matrix ``[out, fan_in]``, cut into columns; rounded once, at the end."""
    for part, own in zip(control, direction.split([part.shape[1] for part in control], 1), strict=True):
        if part.dtype == own.dtype:
            part.add_(own, alpha=alpha)
        else:
            part.copy_(part.to(own.dtype).add_(own, alpha=alpha))


def _outer_sum(v: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    v = (weights.to(v.dtype)[..., None, None] * v).sum(0)
    return v.flatten(0, 1).mT @ x.flatten(0, 1)


def _hadamard(outputs: Tensor, inputs: Tensor) -> Tensor:
    return outputs[:, :, 0, :, :, 0] * inputs[None, :, 0, None, :, 0]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``[N, N]`` inner products of gradients ``[R, B, out, fan_in]``, known to be symmetric."""
    return symmetric_product(left.flatten(0, 1).flatten(1), right.flatten(0, 1).flatten(1))


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left right'`` for ``[n, side]`` that is known to be symmetric: for many rows half of it is computed."""
    n = len(left)
    if n <= ROWS:
        return left @ right.mT
    product = left.new_empty(n, n)
    for start in range(0, n, ROWS):
        end = min(start + ROWS, n)
        torch.mm(left[start:end], right[:end].mT, out=product[start:end, :end])
        product[:start, start:end] = product[start:end, :start].mT
    return product


def over_uses(uses: Sequence[Columns]) -> Columns:
    """Columns of a layer that ran several times in one forward pass: gradients add up, uses are positions."""
    if len(uses) == 1:
        return uses[0]
    uses = [use.plain() if isinstance(use, ScaledColumns) else use for use in uses]
    if all(isinstance(use, OuterColumns) for use in uses):
        outer = [use for use in uses if isinstance(use, OuterColumns)]
        return OuterColumns(torch.cat([u.v for u in outer], 2), torch.cat([u.x for u in outer], 1))
    kept = uses[0].added(uses[1:])
    return DenseColumns(torch.stack([use.dense().values for use in uses]).sum(0)) if kept is None else kept


def over_batches(parts: Sequence[Columns]) -> Columns:
    """Columns of several forward passes (accumulated micro-batches) side by side: batches add up."""
    if len(parts) == 1:
        return parts[0]
    parts = [part.plain() if isinstance(part, ScaledColumns) else part for part in parts]
    outer = [part for part in parts if isinstance(part, OuterColumns)]
    if len(outer) == len(parts):
        longest = max(part.positions for part in outer)
        pad = torch.nn.functional.pad
        v = [pad(part.v, (0, 0, 0, longest - part.positions)) for part in outer]
        x = [pad(part.x, (0, 0, 0, longest - part.positions)) for part in outer]
        return OuterColumns(torch.cat(v, 1), torch.cat(x, 0))
    kept = parts[0].beside(parts[1:])
    return DenseColumns(torch.cat([part.dense().values for part in parts], 1)) if kept is None else kept
