"""The Bellman recursion in column coordinates: tensors in, policies out; no module, hook or autograd.

Everything the recursion needs lies in the span of the ``N = R B`` pulled-back columns ``P`` (column ``(r, b)`` is
zero outside sample ``b``), so it is algebra on their Gram matrix ``Gram = G' R^-1 G`` (``G``: the columns'
parameter gradients), in float64. A stage's policy maps the state's deviation, seen as ``r = P' dx``, to the weights
``beta`` on the columns' gradients in

    du = -R^-1 [ G beta + Q_u's stage cost ]                 k: beta at r = 0;  K dx: the rest

Columns are of two kinds: the first ``curved`` of each sample span the loss's curvature, a last one may carry the
gradient alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import linalg
from .errors import NonFiniteError, StepError


@dataclass(frozen=True)
class Policy(ABC):
    """``beta(r)`` of one stage."""

    @abstractmethod
    def weights(self, r: Tensor | None) -> Tensor:
        """``beta [R, B]`` for ``r [R, B]``, or the open loop's, those of ``k``, for ``None``."""

    @abstractmethod
    def predicted(self) -> Tensor:
        """``-Q_u' k / 2``, the decrease of the batch's loss that the quadratic model expects of ``k``.

        The stage cost's own decrease is left out.
        """


class Value(ABC):
    """The value function of the steps ahead, in column coordinates."""

    @abstractmethod
    def backward(self, gram: Tensor, d: Tensor | None, *, feedback: bool) -> tuple[Policy, "Value"]:
        """One step of the recursion.

        Args:
            gram: ``G' R^-1 G``; ``[N, N]`` or, per sample, ``[B, R, R]`` (see :attr:`joint`).
            d: ``G' R^-1`` times the stage cost's gradient, ``[R, B]``; ``None`` is zero.
            feedback: ``False`` sets ``Q_ux = 0``: back-propagation of the value (Proposition 2).
        """

    @property
    @abstractmethod
    def joint(self) -> bool:
        """Whether :meth:`backward` wants the whole Gram matrix."""

    @property
    @abstractmethod
    def v_x(self) -> Tensor:
        """``V_x`` of the batch's loss as weights on the columns, ``[R, B]``."""


@dataclass(frozen=True)
class BatchValue(Value):
    """Of the joint state ``X = (x_1, ..., x_B)``: exact for one control that all samples share.

    ``V_XX = P C P'`` and ``V_X = P a``, kept in information form because there the recursion is a sum:

        C^-1 <- C^-1 + Gram           C^-1 a <- C^-1 a - d          beta = a + C r  (after the update)

    Columns without curvature keep their weight: they act on the others as one more stage cost.

    Nothing in the sum needs ``a`` itself, so a stage's matrix is solved with once, when its deviation is known.

    Args:
        find_a: gives ``a [R, B]``.
        precision: ``C^-1 [n, n]`` of the ``n = curved * B`` columns with curvature.
        information: ``C^-1 a``, as ``[curved, B]``.
        straight: ``a`` of the columns without curvature, ``[R - curved, B]``.
    """

    find_a: Callable[[], Tensor]
    precision: Tensor
    information: Tensor
    straight: Tensor

    @staticmethod
    def terminal(a: Tensor, curved: int, weight: float) -> "BatchValue":
        """Of the loss itself: ``V_X = w P a``, ``V_XX = w P P'`` on the curved columns, ``a [R, B]``."""
        a = a.double()
        n = a[:curved].numel()
        precision = torch.eye(n, dtype=torch.float64, device=a.device).div_(weight)
        return BatchValue(lambda: weight * a, precision, a[:curved], weight * a[curved:])

    @property
    def joint(self) -> bool:
        return True

    @property
    def v_x(self) -> Tensor:
        return self.find_a()

    def backward(self, gram: Tensor, d: Tensor | None, *, feedback: bool) -> tuple[Policy, "BatchValue"]:
        n = self.information.numel()
        gram = gram.double()
        d = None if d is None else d.double().flatten()
        precision, information = self.precision + (gram[:n, :n] if len(self.straight) else gram), self.information
        if self.straight.numel():
            information = information - (gram[:n, n:] @ self.straight.flatten()).view_as(information)
        if d is not None:
            information = information - d[:n].view_as(information)
        factor, failures = linalg.cholesky(precision)
        if factor is None and not bool(torch.isfinite(precision).all()):
            raise NonFiniteError("the batch's curvature is not finite")
        if factor is None:
            raise StepError("the batch's curvature could not be factorised: lower lr, or raise the curvature's damping")
        policy = BatchPolicy(factor, information, self.straight, failures, gram, d, self.find_a)
        if not feedback:
            return policy, self
        return policy, BatchValue(lambda: policy.k_weights, precision, information, self.straight)


@dataclass(frozen=True)
class BatchPolicy(Policy):
    """``beta = C (C^-1 a + r)``.

    Args:
        factor: Cholesky factor of ``C^-1``, found after ``failures`` failed attempts.
        information, straight: see :class:`BatchValue`.
        gram, d: what the recursion went back by.
        find_a: gives ``a [R, B]`` after the stage.
    """

    factor: Tensor
    information: Tensor
    straight: Tensor
    failures: int
    gram: Tensor
    d: Tensor | None
    find_a: Callable[[], Tensor]

    @cached_property
    def k_weights(self) -> Tensor:
        """Those of the open-loop gain ``k``, ``[R, B]``."""
        return self.weights(None)

    def weights(self, r: Tensor | None) -> Tensor:
        known = self.information if r is None else self.information + r[: len(self.information)]
        # for one vector torch.cholesky_solve takes three times as long: it copies the factor
        half = torch.linalg.solve_triangular(self.factor, known.reshape(-1, 1), upper=False)
        curved = torch.linalg.solve_triangular(self.factor.mT, half, upper=True).view_as(known)
        return torch.cat([curved, self.straight]) if self.straight.numel() else curved

    def predicted(self) -> Tensor:
        change = self.gram @ self.k_weights.flatten()
        return self.find_a().flatten() @ (change if self.d is None else change + self.d) / 2


@dataclass(frozen=True)
class SampleValue(Value):
    """Of every sample by itself: the paper's Algorithm 3 with outer products (Proposition 3), literal.

    ``V_x = P a`` and ``V_xx = P C P'`` per sample, ``Q_uu = R`` (so ``Q_uu^-1 = lr M^-1``):

        k = -R^-1 (G a + stage cost)     K = -R^-1 G C P'     a <- a - C (Gram a + d)     C <- C - C Gram C

    Args:
        a: ``[R, B]``.
        C: ``[B, R, R]``.
        weight: ``w``: the update is ``w`` times the sum (for a mean loss, the mean) of the samples' policies.
    """

    a: Tensor
    C: Tensor
    weight: float

    @staticmethod
    def terminal(a: Tensor, curved: int, weight: float) -> "SampleValue":
        """Of the loss itself: ``V_x = P a``, ``V_xx = P P'`` on the curved columns, ``a [R, B]``."""
        a = a.double()
        C = torch.diag_embed((torch.arange(len(a), device=a.device) < curved).double()).repeat(a.shape[1], 1, 1)
        return SampleValue(a, C, weight)

    @property
    def joint(self) -> bool:
        return False

    @property
    def v_x(self) -> Tensor:
        return self.weight * self.a

    def backward(self, gram: Tensor, d: Tensor | None, *, feedback: bool) -> tuple[Policy, "SampleValue"]:
        gram = gram.double()
        change = torch.einsum("brq,qb->rb", gram, self.a)
        if d is not None:
            change = change + d.double()
        policy = SamplePolicy(self.v_x, change, self.C, self.weight)
        if not feedback:
            return policy, self
        a = self.a - torch.einsum("brq,qb->rb", self.C, change)
        return policy, SampleValue(a, self.C - self.C @ gram @ self.C, self.weight)


@dataclass(frozen=True)
class SamplePolicy(Policy):
    """``beta = w (a + C r)``; ``change [R, B]``: ``Gram a + d``."""

    v_x: Tensor
    change: Tensor
    C: Tensor
    weight: float

    def weights(self, r: Tensor | None) -> Tensor:
        return self.v_x if r is None else self.v_x + self.weight * torch.einsum("brq,qb->rb", self.C, r.double())

    def predicted(self) -> Tensor:
        return (self.v_x * self.change).sum() / 2


@dataclass(frozen=True)
class DensePolicy(Policy):
    """``beta = w (1, dx)`` on the columns ``(Q_u, Q_ux)`` of full matrices; ``r [n, B]`` is ``dx`` itself.

    ``change [1 + n, B]``: ``Q_u' R^-1 Q_u``, then ``Q_ux' R^-1 Q_u``.
    """

    change: Tensor
    weight: float

    def weights(self, r: Tensor | None) -> Tensor:
        one = torch.ones_like(self.change[:1])
        return self.weight * torch.cat([one, torch.zeros_like(self.change[1:]) if r is None else r.double()])

    def predicted(self) -> Tensor:
        return self.weight * self.change[0].sum() / 2
