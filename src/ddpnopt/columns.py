"""What the Bellman pass asks of one block of parameters: its columns' gradients ``U``, rarely formed.

Shapes: ``R`` columns per sample, ``B`` samples, ``N = R * B``, ``S`` positions (places of an image or a
sequence, and uses, if a layer runs several times), a block's gradient is ``[out, fan_in]``. Column ``n`` is
``(r, b)`` with ``b`` fastest; its gradient ``U_n`` is that of column ``r`` of sample ``b``'s own loss.

Two forms: :class:`OuterColumns` keeps the factors ``v`` and ``x`` of ``U_n = sum_s v_ns x_bs'``;
:class:`DenseColumns` keeps ``U``. A third, for tables of rows, is in :mod:`ddpnopt.row_columns`. All answer the same
questions, and a test equates them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .inverse import Inverse, Rotated, Separable, sandwich, times

CHUNK = 1 << 23
"""Largest number of per-sample gradient entries formed at once in :meth:`OuterColumns.gram`."""

WIDEST = 4096
"""A side of a Kronecker factor above this keeps its diagonal only (an embedding's vocabulary, say)."""


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

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Kronecker factors ``S [out, out]``, ``A [fan_in, fan_in]`` with ``S (x) A ~ sum_n U_n U_n' / B``.

        A side wider than ``WIDEST`` is given by its diagonal, as a vector.
        """

    @abstractmethod
    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        """``sum_n (Q_S' U_n Q_A)^2 / B`` elementwise, ``[out, fan_in]``, in the basis ``out = Q_S, fan_in = Q_A``."""

    @abstractmethod
    def combined(self, weights: Tensor) -> "Columns":
        """One column per sample: ``sum_r w_rb U_rb`` for weights ``[R, B]``."""

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
        return self.values.flatten(0, 1).flatten(1) @ inverse.solve(self.values).flatten(0, 1).flatten(1).mT

    def sample_gram(self, inverse: Inverse) -> Tensor:
        return torch.einsum("rboi,qboi->brq", self.values, inverse.solve(self.values))

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        return inverse.solve(self.weighted(weights))

    def factors(self) -> tuple[Tensor, Tensor]:
        # E[g g'] = tr(A) S and E[g' g] = tr(S) A for g g' ~ S (x) A: one division by the root of the trace
        # E|g|^2 = tr(S) tr(A) shares the scale out evenly
        gradients = self.values.flatten(0, 1)
        root = (gradients.square().sum() / self.batch).sqrt()
        scale = torch.where(root == 0, 0.0, 1 / (self.batch * root))
        by_out, by_fan_in = gradients.transpose(0, 1).flatten(1).mT, gradients.flatten(0, 1)
        return second_moment(by_out) * scale, second_moment(by_fan_in) * scale

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        return sandwich(out, self.values, fan_in).square().sum(0).mean(0)

    def combined(self, weights: Tensor) -> "DenseColumns":
        return DenseColumns((weights.to(self.values.dtype)[..., None, None] * self.values).sum(0, keepdim=True))

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
        inputs = (x @ times(x, inverse.fan_in).mT).view(self.batch, s, self.batch, s)
        outputs = (v @ times(v, inverse.out).mT).view(self.count, self.batch, s, self.count, self.batch, s)
        gram = (outputs * inputs[None, :, :, None]).sum((2, 5)) if s > 1 else _hadamard(outputs, inputs)
        return gram.reshape(n, n) * inverse.scale

    def _rotated_gram(self, inverse: Rotated) -> Tensor:
        v = times(self.v, inverse.out).flatten(0, 2)
        x = times(self.x, inverse.fan_in).flatten(0, 1).repeat(self.count, 1)
        gram = v.new_zeros(len(v), len(v))
        rows = max(1, CHUNK // (len(v) * x.shape[1]))
        for start in range(0, v.shape[1], rows):
            u = v[:, start : start + rows, None] * x[:, None, :]
            gram += u.flatten(1) @ (u / inverse.diagonal[start : start + rows]).flatten(1).mT
        return gram

    def sample_gram(self, inverse: Inverse) -> Tensor:
        if self.positions > 1:
            return self.dense().sample_gram(inverse)
        v, x = self.v[:, :, 0], self.x[:, 0]
        if isinstance(inverse, Rotated):
            pairs = times(v, inverse.out)
            products = torch.einsum("rbo,qbo->brqo", pairs, pairs)
            return (products @ inverse.diagonal.reciprocal() * times(x, inverse.fan_in).square()[:, None, None]).sum(-1)
        assert isinstance(inverse, Separable)
        inputs = (x * times(x, inverse.fan_in)).sum(-1) * inverse.scale
        return torch.einsum("rbo,qbo,b->brq", v, times(v, inverse.out), inputs)

    def solve_weighted(self, inverse: Inverse, weights: Tensor) -> Tensor:
        rows = self.batch * self.positions
        out, fan_in = self.v.shape[3], self.x.shape[2]
        if isinstance(inverse, Separable) and rows < min(out, fan_in):
            # solving for the thin factors costs rows * (out^2 + fan_in^2), less than for their product
            v = (weights.to(self.v.dtype)[..., None, None] * self.v).sum(0).flatten(0, 1)
            x = times(self.x.flatten(0, 1), inverse.fan_in)
            return (times(v, inverse.out).mT @ x) * inverse.scale
        return inverse.solve(self.weighted(weights))

    def factors(self) -> tuple[Tensor, Tensor]:
        s = second_moment(self.v.flatten(0, 2)) / (self.batch * self.positions)
        return s, second_moment(self.x.flatten(0, 1)) / self.batch

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        v, x = times(self.v, out), times(self.x, fan_in)
        if self.positions > 1:
            return (v.mT @ x).square().sum(0).mean(0)
        return v[:, :, 0].square().sum(0).mT @ x[:, 0].square() / self.batch

    def combined(self, weights: Tensor) -> "OuterColumns":
        return OuterColumns((weights.to(self.v.dtype)[..., None, None] * self.v).sum(0, keepdim=True), self.x)

    def first(self, count: int) -> "OuterColumns":
        return OuterColumns(self.v[:count], self.x)

    def absent(self, batch: int) -> "OuterColumns":
        shape = self.v.shape
        return OuterColumns(self.v.new_zeros(shape[0], batch, *shape[2:]), self.x.new_zeros(batch, *self.x.shape[1:]))


def _outer_sum(v: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    v = (weights.to(v.dtype)[..., None, None] * v).sum(0)
    return v.flatten(0, 1).mT @ x.flatten(0, 1)


def _hadamard(outputs: Tensor, inputs: Tensor) -> Tensor:
    return outputs[:, :, 0, :, :, 0] * inputs[None, :, 0, None, :, 0]


def second_moment(rows: Tensor) -> Tensor:
    """``rows' rows`` for rows ``[n, side]``; only its diagonal, as a vector, for a side above ``WIDEST``."""
    return rows.square().sum(0) if rows.shape[1] > WIDEST else rows.mT @ rows


def over_uses(uses: Sequence[Columns]) -> Columns:
    """Columns of a layer that ran several times in one forward pass: gradients add up, uses are positions."""
    if len(uses) == 1:
        return uses[0]
    if all(isinstance(use, OuterColumns) for use in uses):
        outer = [use for use in uses if isinstance(use, OuterColumns)]
        return OuterColumns(torch.cat([u.v for u in outer], 2), torch.cat([u.x for u in outer], 1))
    kept = uses[0].added(uses[1:])
    return DenseColumns(torch.stack([use.dense().values for use in uses]).sum(0)) if kept is None else kept


def over_batches(parts: Sequence[Columns]) -> Columns:
    """Columns of several forward passes (accumulated micro-batches) side by side: batches add up."""
    if len(parts) == 1:
        return parts[0]
    outer = [part for part in parts if isinstance(part, OuterColumns)]
    if len(outer) == len(parts):
        longest = max(part.positions for part in outer)
        pad = torch.nn.functional.pad
        v = [pad(part.v, (0, 0, 0, longest - part.positions)) for part in outer]
        x = [pad(part.x, (0, 0, 0, longest - part.positions)) for part in outer]
        return OuterColumns(torch.cat(v, 1), torch.cat(x, 0))
    kept = parts[0].beside(parts[1:])
    return DenseColumns(torch.cat([part.dense().values for part in parts], 1)) if kept is None else kept
