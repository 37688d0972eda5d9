"""M = I: the feedback policy around gradient descent."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..columns import Columns
from ..inverse import Inverse, Separable
from .base import Curvature, State, check_damping


@dataclass(frozen=True)
class Identity(Curvature):
    """``M = I``, the curvature of SGD (Table 2 of the paper).

    Args:
        damping: added to ``Q_uu`` in the batch form, ``R = (1/lr + damping + gamma) I``; default 0.
            Not used by ``coupling="sample"``, which with ``feedback=False`` is ``torch.optim.SGD`` bit for bit.

    Raises:
        ValueError: if ``damping`` is negative or not finite.

    Example:
        >>> from ddpnopt import Identity
        >>> Identity()
        Identity(damping=0.0)
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        check_damping("Identity", self.damping)

    def ridge(self, lr: float, decay: float, *, batch: bool) -> float:
        return lr * (self.damping + decay) if batch else 0.0

    def advance(self, state: State, columns: Columns | None, gradient: Callable[[], Tensor], ridge: float) -> State:
        return state

    def inverse(self, state: State, ridge: float) -> Inverse:
        return Separable(scale=1 / (1 + ridge))

    @property
    def needs_columns(self) -> bool:
        return False
