"""M = S (x) A, separable, damped inside its factors: K-FAC's curvature and the default here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import linalg
from ..columns import Columns
from ..inverse import Inverse, Separable
from .adaptive import Adaptive
from .base import Curvature, State, check_beta, check_damping, check_refresh

STALE = 1.1
"""Inverses are computed again at once when the ridge has changed by more than this factor since."""


def averaged(state: State, columns: Columns, beta: float) -> State:
    """Step count and moving averages of the factors ``S`` and ``A``; weight of the past ``min(beta, 1 - 1/t)``."""
    step = state.get("step", 0) + 1
    past = min(beta, 1 - 1 / step)
    factors = zip(("S", "A"), columns.factors(), strict=True)
    moments = {name: past * state[name] + (1 - past) * new if name in state else new for name, new in factors}
    return {**state, "step": step, **moments}


def split_ridge(S: Tensor, A: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``l1, l2`` with ``l1 l2 = ridge`` for ``(S + l1) (x) (A + l2)``, in proportion to the mean eigenvalues."""
    mean_S, mean_A = (m.sum() / len(m) if m.ndim == 1 else m.diagonal().mean() for m in (S, A))
    pi = (mean_A / mean_S).sqrt()
    pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))
    return math.sqrt(ridge) / pi, math.sqrt(ridge) * pi


@dataclass(frozen=True)
class Kronecker(Curvature):
    """``M = (S + l1 I) (x) (A + l2 I)``, ``l1 l2 = ridge`` (Martens and Grosse 2015, arXiv 1503.05671, section 6.3).

    ``A`` is the second moment of a layer's inputs (with a 1 for the bias), ``S`` that of the columns at its
    output, both moving averages over steps. For layers without such factors (convolutions, norms, ...) they are
    the moments of the per-sample gradients themselves, scaled to the same trace.

    Args:
        damping: ``delta`` in ``l1 l2 = lr * (delta + weight_decay)`` for the batch form, which bounds ``R`` below by
            ``delta`` at every learning rate; ``l1 l2 = delta`` for ``coupling="sample"``. Default 0.1.
        refresh_every: steps between two computations of the inverses; default 10. They are also computed when
            the ridge has changed by more than a factor of 1.1 (a scheduler's doing).
        beta: weight of the past in the moving averages; default 0.95.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> from ddpnopt import Kronecker
        >>> Kronecker(refresh_every=5)
        Kronecker(damping=0.1, refresh_every=5, beta=0.95)
    """

    damping: float = 0.1
    refresh_every: int = 10
    beta: float = 0.95

    def __post_init__(self) -> None:
        check_damping("Kronecker", self.damping)
        check_refresh("Kronecker", self.refresh_every)
        check_beta("Kronecker", self.beta)

    def ridge(self, lr: float, decay: float, *, batch: bool) -> float:
        return lr * (self.damping + decay) if batch else self.damping

    def advance(self, state: State, columns: Columns | None, gradient: Callable[[], Tensor], ridge: float) -> State:
        assert columns is not None
        new = averaged(state, columns, self.beta)
        due = (new["step"] - 1) % self.refresh_every == 0 or not _near(ridge, new["ridge"])
        return self._refreshed(new, ridge) if due else new

    def _refreshed(self, state: State, ridge: float) -> State:
        inverses: State = {}
        failures = state.get("failures", 0)
        for name, damping in zip(("S", "A"), split_ridge(state["S"], state["A"], ridge), strict=True):
            factor = state[name]
            if factor.ndim == 1:
                inverses[f"{name}_inverse"] = (factor + damping).reciprocal()
                continue
            damped = factor + damping * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            inverse, failed = linalg.inverse(damped)
            failures += failed
            if inverse is None:
                inverse = state.get(f"{name}_inverse", damped.diagonal().reciprocal())
            inverses[f"{name}_inverse"] = inverse
        return {**state, **inverses, "ridge": ridge, "failures": failures}

    def inverse(self, state: State, ridge: float) -> Inverse:
        return Separable(state["S_inverse"], state["A_inverse"])

    def without_factors(self) -> Curvature:
        # one gradient makes factors of rank one, blind in all other directions: a diagonal serves
        return Adaptive(damping=self.damping)

    @property
    def needs_columns(self) -> bool:
        return True


def _near(ridge: float, used: float) -> bool:
    return used / STALE <= ridge <= used * STALE
