"""M^-1 of one block of parameters, in the two forms every curvature here takes.

A block's gradient is a matrix ``g [out, fan_in]`` (a bias is its last column). Either ``M`` is a Kronecker
product, ``M^-1 g = S^-1 g A^-1`` (:class:`Separable`; the identity is a special case), or it is diagonal in
a Kronecker basis, ``M^-1 g = Q_S [(Q_S' g Q_A) / D] Q_A'`` (:class:`Rotated`; plain diagonals have no basis).
A side of a Kronecker product is a matrix, a diagonal, the identity or, where it is wide, :class:`LowRank`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``rest * I + basis diag(weights) basis'``, symmetric ``[n, n]``, at the price of ``r`` of its ``n`` columns.

    Args:
        basis: ``[n, r]``, orthonormal columns.
        weights: ``[r]``; above ``-rest``, so that the matrix is positive definite.
        rest: what it multiplies everything outside the basis by, a tensor of one number.
    """

    basis: Tensor
    weights: Tensor
    rest: Tensor

    def times(self, values: Tensor) -> Tensor:
        """``values [..., n]`` times the matrix."""
        rows = values.reshape(-1, len(self.basis))
        return (rows * self.rest).addmm_((rows @ self.basis) * self.weights, self.basis.mT).view(values.shape)

    def double(self) -> "LowRank":
        """The same in float64."""
        return LowRank(self.basis.double(), self.weights.double(), self.rest.double())


Side = Tensor | LowRank | None
"""One side of a Kronecker product: a matrix, a vector (a diagonal), low rank on a multiple of ``I``, or ``I``."""


def times(values: Tensor, side: Side) -> Tensor:
    """``values [..., n]`` times one side of a Kronecker product."""
    if side is None:
        return values
    if isinstance(side, LowRank):
        return side.times(values)
    return values * side if side.ndim == 1 else values @ side


def sandwich(out: Side, values: Tensor, fan_in: Side) -> Tensor:
    """``out' values fan_in`` for ``values [..., out, fan_in]``."""
    if isinstance(out, LowRank):
        values = out.times(values.mT).mT
    elif out is not None:
        values = out[:, None] * values if out.ndim == 1 else out.mT @ values
    return times(values, fan_in)


class Inverse(ABC):
    """The inverse of a curvature, damping included, without the learning rate: ``lr * M^-1`` is ``R^-1``."""

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """``M^-1 g`` for gradients ``[..., out, fan_in]``."""

    def accumulate_(self, target: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """``target += alpha * M^-1 gradient``, in place, all ``[out, fan_in]``."""
        return target.add_(self.solve(gradient), alpha=alpha)

    def to_dense(self, out: int, fan_in: int) -> Tensor:
        """``M`` itself as ``[out * fan_in, out * fan_in]`` in float64, for tests and small blocks only."""
        eye = torch.eye(out * fan_in, dtype=torch.float64)
        dense: Tensor = torch.linalg.inv(self._in_float64().solve(eye.view(-1, out, fan_in)).flatten(1))
        return dense

    @abstractmethod
    def _in_float64(self) -> "Inverse": ...


@dataclass(frozen=True)
class Separable(Inverse):
    """``M^-1 = scale * out (x) fan_in``."""

    out: Side = None
    fan_in: Side = None
    scale: float = 1.0

    def solve(self, gradient: Tensor) -> Tensor:
        solved = sandwich(self.out, gradient, self.fan_in)
        return solved if self.scale == 1.0 else solved * self.scale

    def _in_float64(self) -> "Separable":
        out, fan_in = (None if side is None else side.double() for side in (self.out, self.fan_in))
        return Separable(out, fan_in, self.scale)


@dataclass(frozen=True)
class Rotated(Inverse):
    """``M = (Q_S (x) Q_A) diag(D) (Q_S (x) Q_A)'`` with ``diagonal D [out, fan_in]``; ``None`` is no rotation."""

    diagonal: Tensor
    out: Tensor | None = None
    fan_in: Tensor | None = None

    def rotate(self, gradient: Tensor) -> Tensor:
        """``Q_S' g Q_A`` for gradients ``[..., out, fan_in]``."""
        return sandwich(self.out, gradient, self.fan_in)

    def solve(self, gradient: Tensor) -> Tensor:
        solved = self.rotate(gradient) / self.diagonal
        back_in, back_out = (None if side is None else side.mT for side in (self.fan_in, self.out))
        return sandwich(back_out, solved, back_in)

    def accumulate_(self, target: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        if self.out is None and self.fan_in is None:
            # torch's RMSprop rounds in this order; coinciding with it bit for bit is a test
            return target.addcdiv_(gradient, self.diagonal, value=alpha)
        return super().accumulate_(target, gradient, alpha)

    def _in_float64(self) -> "Rotated":
        out, fan_in = (None if side is None else side.double() for side in (self.out, self.fan_in))
        return Rotated(self.diagonal.double(), out, fan_in)
