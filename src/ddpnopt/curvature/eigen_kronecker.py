"""M diagonal in the eigenbasis of S (x) A: EKFAC's curvature."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .. import linalg
from ..columns import Columns
from ..inverse import Inverse, Rotated
from .adaptive import Adaptive
from .base import SQUARE, Curvature, State, check_beta, check_damping, check_memory, check_refresh
from .factor import averaged, square


@dataclass(frozen=True)
class EigenKronecker(Curvature):
    """``M = Q diag(E + ridge) Q'``: K-FAC's eigenbasis ``Q = Q_S (x) Q_A`` with measured second moments ``E``.

    The paper's Kronecker curvature, after George et al. 2018 (arXiv 1806.03884): ``E`` is the moving average of the
    squared per-sample gradients in the basis. With ``coupling="sample", feedback=False`` this is
    :class:`ddpnopt.baselines.EKFAC`. Means over many outputs, which :class:`Kronecker` counts, it does not. In the
    batch form, where the terminal's cap is ``"auto"``, a layer that hardly moves the output gets a share of the damping
    (:mod:`ddpnopt.sensitivity`).

    Args:
        damping: ``ridge = lr * (damping + gamma)`` for the batch form, ``gamma`` the stage cost and ``lr`` as
            ``memory`` leaves it, ``ridge = damping`` for ``coupling="sample"``; default 0.03.
        refresh_every: steps between two computations of the basis; default 10.
        beta: weight of the past in the moving averages; default 0.95.
        memory: in the batch form, how many samples ``M`` counts for at least, beside the batch's own and if it has seen
            as many, however large the learning rate: ``R = M (1 / lr + memory / batch) + damping``. It bounds what a
            single batch can do. Default 1280; 0 leaves ``M / lr``. It begins with 320 samples, the batch's
            ``batch / lr`` included, or ``memory`` if that is less.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> from ddpnopt import EigenKronecker
        >>> EigenKronecker(damping=0.1)
        EigenKronecker(damping=0.1, refresh_every=10, beta=0.95, memory=1280.0)
    """

    damping: float = 0.03
    refresh_every: int = 10
    beta: float = 0.95
    memory: float = 1280.0

    def __post_init__(self) -> None:
        check_damping("EigenKronecker", self.damping)
        check_refresh("EigenKronecker", self.refresh_every)
        check_beta("EigenKronecker", self.beta)
        check_memory("EigenKronecker", self.memory)

    def ridge(self, lr: float, decay: float, *, batch: bool) -> float:
        return lr * (self.damping + decay) if batch else self.damping

    def less_damped(self, share: float) -> Curvature:
        return self if share == 1 else replace(self, damping=share * self.damping)

    def advance(self, state: State, columns: Columns | None, gradient: Callable[[], Tensor], ridge: float) -> State:
        assert columns is not None
        new = self._averaged(state, columns)
        if (new["step"] - 1) % self.refresh_every == 0:
            new = {**self._refreshed(new), SQUARE: square(new)}
        squares = columns.squares(new.get("S_basis"), new.get("A_basis"))
        past = min(self.beta, 1 - 1 / new["step"])
        return {**new, "E": past * new["E"] + (1 - past) * squares if "E" in new else squares}

    def _averaged(self, state: State, columns: Columns) -> State:
        step = state.get("step", 0) + 1
        past = min(self.beta, 1 - 1 / step)
        new = {**state, "step": step}
        for name, moment in zip(("S", "A"), columns.moments(), strict=True):
            new |= averaged(state, name, moment, past, None)
        return new

    def _refreshed(self, state: State) -> State:
        bases: State = {}
        failures = state.get("failures", 0)
        for name in ("S", "A"):
            if state[name].ndim == 1:
                continue  # a side too wide for a basis keeps its own coordinates
            basis, failed = linalg.eigenbasis(state[name])
            failures += failed
            if basis is not None:
                bases[f"{name}_basis"] = basis
        return {**state, **bases, "failures": failures}

    def inverse(self, state: State, ridge: float) -> Inverse:
        return Rotated(state["E"] + ridge, state.get("S_basis"), state.get("A_basis"))

    def without_factors(self) -> Curvature:
        # one gradient makes factors of rank one, blind in all other directions: a diagonal serves
        return Adaptive(damping=self.damping)

    @property
    def needs_columns(self) -> bool:
        return True
