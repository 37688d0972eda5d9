"""Columns kept as factors: nothing is formed per sample where positions are few."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..inverse import Inverse, Rotated, Separable, times
from . import base
from .base import Columns, Moment, add_, symmetric_product
from .dense import DenseColumns


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

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """``v [R B S, out]`` and ``x [B S, fan_in]``."""
        return self.v.flatten(0, 2), self.x.flatten(0, 1)

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
            return self._gram_by_rows(inverse) if s < out + fan_in else self.dense().gram(inverse)
        v, x = self._rows
        v_solved, x_solved = self._solve(inverse)
        if n == v.shape[0] == x.shape[0]:
            gram = symmetric_product((v, v_solved), (x, x_solved))
            return gram.mul_(inverse.scale) if inverse.scale != 1.0 else gram
        inputs = symmetric_product((x, x_solved)).view(self.batch, s, self.batch, s)
        outputs = symmetric_product((v, v_solved)).view(self.count, self.batch, s, self.count, self.batch, s)
        gram = (outputs * inputs[None, :, :, None]).sum((2, 5)) if s > 1 else _hadamard(outputs, inputs)
        return gram.reshape(n, n).mul_(inverse.scale) if inverse.scale != 1.0 else gram.reshape(n, n)

    def _solve(self, inverse: Separable) -> tuple[Tensor, Tensor]:
        """``v S^-1 [R B S, out]`` and ``x A^-1 [B S, fan_in]``; the Gram matrix and then the update ask for them."""
        if id(inverse) not in self._solved:
            v, x = self._rows
            solved = times(v, inverse.out), times(x, inverse.fan_in)
            self._solved.clear()
            self._solved[id(inverse)] = (inverse, *solved)
        return self._solved[id(inverse)][1:]

    def _gram_by_rows(self, inverse: Separable) -> Tensor:
        """Products of gradients and of their solves, some rows of both at a time: neither is formed as a whole."""
        v_solved, x_solved = (
            solved.view_as(own) for solved, own in zip(self._solve(inverse), (self.v, self.x), strict=True)
        )
        n = self.count * self.batch
        gram, rows = self.v.new_zeros(n, n), max(1, base.CHUNK // (n * self.x.shape[2]))
        for start in range(0, self.v.shape[3], rows):
            part = slice(start, start + rows)
            u, m = self.v[..., part].mT @ self.x, v_solved[..., part].mT @ x_solved
            gram += symmetric_product((u.view(n, -1), m.view(n, -1)))
        return gram * inverse.scale

    def _rotated_gram(self, inverse: Rotated) -> Tensor:
        v = times(self.v, inverse.out).flatten(0, 2)
        x = times(self.x, inverse.fan_in).flatten(0, 1).repeat(self.count, 1)
        root = inverse.diagonal.rsqrt()
        gram = v.new_zeros(len(v), len(v))
        rows = max(1, base.CHUNK // (len(v) * x.shape[1]))
        for start in range(0, v.shape[1], rows):
            u = (v[:, start : start + rows, None] * (x[:, None, :] * root[start : start + rows])).flatten(1)
            gram += symmetric_product((u, u))
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

    def solve_weighted_and(self, inverse: Inverse, weights: Tensor, other: Tensor, share: float) -> Tensor:
        thin = self._thin(inverse, weights)
        if thin is None or other.dtype != thin[0].dtype:
            return super().solve_weighted_and(inverse, weights, other, share)
        return torch.addmm(other, thin[0].mT, thin[1], beta=share)

    def move_(self, control: Sequence[Tensor], inverse: Inverse, weights: Tensor, alpha: float, kept: float) -> None:
        thin = self._thin(inverse, weights)
        if thin is None:
            return super().move_(control, inverse, weights, alpha, kept)
        v, x = thin
        if any(part.dtype != v.dtype for part in control):
            return add_(control, v.mT @ x, alpha, kept)
        for part, own in zip(control, x.split([part.shape[1] for part in control], 1), strict=True):
            part.addmm_(v.mT, own, alpha=alpha, beta=kept)

    def _thin(self, inverse: Inverse, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """``v [B S, out]`` and ``x [B S, fan_in]`` with ``M^-1 U' w = v' x``; ``None`` where that is the dearer way."""
        few = self.batch * self.positions < min(self.v.shape[3], self.x.shape[2])
        if not isinstance(inverse, Separable) or not (few or id(inverse) in self._solved):
            return None
        v, x = self._solve(inverse)
        weights = weights if inverse.scale == 1.0 else weights * inverse.scale
        if self.count == self.positions == 1:
            return v * weights.to(v.dtype).view(-1, 1), x
        return _combined(v.view(self.v.shape), weights).flatten(0, 1), x

    def moments(self) -> tuple[Moment, Moment]:
        outputs, inputs = self._rows
        return Moment(outputs, self.batch * self.positions), Moment(inputs, self.batch)

    def squares(self, out: Tensor | None, fan_in: Tensor | None) -> Tensor:
        v, x = times(self.v, out), times(self.x, fan_in)
        if self.positions > 1:
            return (v.mT @ x).square().sum(0).mean(0)
        return v[:, :, 0].square().sum(0).mT @ x[:, 0].square() / self.batch

    def combined(self, weights: Tensor) -> "OuterColumns":
        return OuterColumns(_combined(self.v, weights)[None], self.x)

    def multiplied(self, scale: Tensor) -> "OuterColumns":
        return OuterColumns(self.v * scale.to(self.v.dtype)[:, None, None], self.x)

    def first(self, count: int) -> "OuterColumns":
        return OuterColumns(self.v[:count], self.x)

    def absent(self, batch: int) -> "OuterColumns":
        shape = self.v.shape
        return OuterColumns(self.v.new_zeros(shape[0], batch, *shape[2:]), self.x.new_zeros(batch, *self.x.shape[1:]))


def _outer_sum(v: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    return _combined(v, weights).flatten(0, 1).mT @ x.flatten(0, 1)


def _combined(v: Tensor, weights: Tensor) -> Tensor:
    """``sum_r w_rb v_rb``, ``[B, S, out]``."""
    weighted = v * weights.to(v.dtype)[..., None, None]
    return weighted[0] if len(weighted) == 1 else weighted.sum(0)


def _hadamard(outputs: Tensor, inputs: Tensor) -> Tensor:
    return outputs[:, :, 0, :, :, 0] * inputs[None, :, 0, None, :, 0]
