"""M = diag(sqrt(E[Q_u * Q_u])): the feedback policy around RMSprop."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..columns import Columns
from ..inverse import Inverse, Rotated
from .base import Curvature, State, check_beta, check_damping


@dataclass(frozen=True)
class Adaptive(Curvature):
    """``M = diag(sqrt(v) + eps)`` with ``v <- beta v + (1 - beta) Q_u * Q_u`` (Table 2 of the paper).

    In the batch form, where the terminal's cap is ``"auto"`` and a sample's loss is a mean over ``T`` outputs, ``M``
    counts ``T^(1/2)`` times (:mod:`ddpnopt.units`).

    Args:
        beta: weight of the past in ``v``; default 0.99 (``alpha`` of ``torch.optim.RMSprop``).
        eps: added to the root; default 1e-8.
        damping: added to ``Q_uu`` in the batch form, ``R = M / lr + (damping + gamma) I``; default 0.03.
            Not used by ``coupling="sample"``, which with ``feedback=False`` is ``torch.optim.RMSprop`` bit for bit.

    Raises:
        ValueError: if ``beta`` is outside [0, 1), or ``eps`` or ``damping`` is negative or not finite.

    Example:
        >>> from ddpnopt import Adaptive
        >>> Adaptive(beta=0.9)
        Adaptive(beta=0.9, eps=1e-08, damping=0.03)
    """

    beta: float = 0.99
    eps: float = 1e-8
    damping: float = 0.03

    def __post_init__(self) -> None:
        check_beta("Adaptive", self.beta)
        check_damping("Adaptive", self.damping)
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"Adaptive: eps must be a finite number >= 0, got {self.eps!r}")

    def ridge(self, lr: float, decay: float, *, batch: bool) -> float:
        return lr * (self.damping + decay) if batch else 0.0

    def for_outputs(self, outputs: float) -> tuple[float, Curvature]:
        return math.sqrt(outputs), self

    def advance(self, state: State, columns: Columns | None, gradient: Callable[[], Tensor], ridge: float) -> State:
        g = gradient()
        past = state["square_avg"] if "square_avg" in state else torch.zeros_like(g)
        return {**state, "square_avg": past.mul(self.beta).addcmul_(g, g, value=1 - self.beta)}

    def inverse(self, state: State, ridge: float) -> Inverse:
        diagonal = state["square_avg"].sqrt().add_(self.eps)
        return Rotated(diagonal.add_(ridge) if ridge else diagonal)

    @property
    def needs_columns(self) -> bool:
        return False
