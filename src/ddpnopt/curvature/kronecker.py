"""M = S (x) A, separable, damped inside its factors: K-FAC's curvature and the default here."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..columns import Columns
from ..inverse import Inverse, Separable
from . import factor
from .adaptive import Adaptive
from .base import SQUARE, Curvature, State, check_beta, check_count, check_damping, check_memory, check_refresh

STALE = 1.1
"""Inverses are computed again at once when the ridge has changed by more than this factor since."""

YOUNG = 10
"""Steps by which intervals grow by one: gradients change fastest at first, and so does their second moment."""

GROWTH = 0.75
"""Power of the number of outputs by which ``M`` grows: 1 would suit independent ones, less those wrong together."""


@dataclass(frozen=True)
class Kronecker(Curvature):
    """``M = (S + l1 I) (x) (A + l2 I)``, ``l1 l2 = ridge`` (Martens and Grosse 2015, arXiv 1503.05671, section 6.3).

    ``A`` is the second moment of a layer's inputs (with a 1 for the bias), ``S`` that of the columns at its
    output, both moving averages over steps. For layers without such factors (convolutions, norms, ...) they are
    the moments of the per-sample gradients themselves, scaled to the same trace. A factor wider than eight times
    ``rank`` is kept as its leading directions, and the rest of its trace spread evenly over all others.

    In the batch form, where the terminal's cap is ``"auto"`` and a sample's loss is a mean over ``T`` outputs, tokens
    or pixels, ``M`` counts ``T^(3/4)`` times and ``damping`` is divided by ``T^(1/2)`` (:mod:`ddpnopt.units`). A layer
    that hardly moves the output, as the first of a deep plain network, gets a share of the damping
    (:mod:`ddpnopt.sensitivity`).

    Args:
        damping: ``delta`` in ``l1 l2 = lr * (delta + gamma)`` for the batch form, ``gamma`` the stage cost and ``lr``
            as ``memory`` leaves it, which bounds ``R`` below by ``delta`` at every learning rate; ``l1 l2 = delta`` for
            ``coupling="sample"``. Default 0.1.
        refresh_every: steps between two computations of the inverses in the long run; default 10. The interval
            begins at one step and grows by one every ten. They are also computed when the ridge has changed by
            more than a factor of 1.1 (a scheduler's doing, or that of batches of other sizes).
        beta: weight of the past in the moving averages; default 0.95.
        average_every: steps between two batches that enter the moving averages; default ``None``, as often as the
            inverses are computed.
        rank: leading directions of a wide factor; default 32. ``None`` keeps every factor whole, which costs several
            times as much on layers of 1,000 units.
        memory: in the batch form, how many samples ``M`` counts for at least, beside the batch's own and if it has seen
            as many, however large the learning rate: ``R = M (1 / lr + memory / batch) + damping``. It bounds what a
            single batch can do. Default 1280; 0 leaves ``M / lr``. It begins with 320 samples, the batch's
            ``batch / lr`` included, or ``memory`` if that is less.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> from ddpnopt import Kronecker
        >>> Kronecker(refresh_every=5)
        Kronecker(damping=0.1, refresh_every=5, beta=0.95, average_every=None, rank=32, memory=1280.0)
    """

    damping: float = 0.1
    refresh_every: int = 10
    beta: float = 0.95
    average_every: int | None = None
    rank: int | None = 32
    memory: float = 1280.0

    def __post_init__(self) -> None:
        check_damping("Kronecker", self.damping)
        check_refresh("Kronecker", self.refresh_every)
        check_beta("Kronecker", self.beta)
        check_memory("Kronecker", self.memory)
        check_count("Kronecker", "average_every", self.average_every, "steps")
        check_count("Kronecker", "rank", self.rank, "directions")

    def ridge(self, lr: float, decay: float, *, batch: bool) -> float:
        return lr * (self.damping + decay) if batch else self.damping

    def for_outputs(self, outputs: float) -> tuple[float, Curvature]:
        return outputs**GROWTH, replace(self, damping=self.damping / math.sqrt(outputs))

    def less_damped(self, share: float) -> Curvature:
        return self if share == 1 else replace(self, damping=share * self.damping)

    def advance(self, state: State, columns: Columns | None, gradient: Callable[[], Tensor], ridge: float) -> State:
        assert columns is not None
        past_steps = state.get("step", 0)
        new = {**state, "step": past_steps + 1}
        if past_steps >= state.get("average_at", 0):
            averages = state.get("averages", 0) + 1
            new |= {"averages": averages, "average_at": next_time(past_steps, self.average_every or self.refresh_every)}
            past = min(self.beta, 1 - 1 / averages)
            for name, moment in zip(("S", "A"), columns.moments(), strict=True):
                new |= factor.averaged(state, name, moment, past, self.rank)
            new[SQUARE] = factor.square(new)
        if past_steps >= state.get("refresh_at", 0):
            new["refresh_at"] = next_time(past_steps, self.refresh_every)
        elif _near(ridge, state["ridge"]):
            return new
        return self._refreshed(new, ridge)

    def _refreshed(self, state: State, ridge: float) -> State:
        new = {**state, "ridge": ridge}
        mean_S, mean_A = factor.mean_eigenvalue(state, "S"), factor.mean_eigenvalue(state, "A")
        for name, damping in zip(("S", "A"), factor.split_ridge(mean_S, mean_A, ridge), strict=True):
            inverse, failures = factor.inverted(state, name, damping)
            new |= inverse
            new["failures"] = new.get("failures", 0) + failures
        return new

    def inverse(self, state: State, ridge: float) -> Inverse:
        return Separable(factor.side(state, "S"), factor.side(state, "A"))

    def without_factors(self) -> Curvature:
        # one gradient makes factors of rank one, blind in all other directions: a diagonal serves
        return Adaptive(damping=self.damping)

    @property
    def needs_columns(self) -> bool:
        return True


def _near(ridge: float, used: float) -> bool:
    return used / STALE <= ridge <= used * STALE


def next_time(step: int, every: int) -> int:
    """After ``step``, when to do again what is done ``every`` steps in the long run, and more often at first."""
    return step + min(every, 1 + step // YOUNG)
