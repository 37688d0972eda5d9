"""What a curvature is: settings (a frozen dataclass) and pure functions of a state kept elsewhere.

The curvature ``M`` of a block stands for the part of ``Q_uu`` that the batch does not tell exactly, as the
proximal term ``R``. The optimizer calls, once per step and block, :meth:`Curvature.advance` (new state from the
step's columns) and :meth:`Curvature.inverse`. The *ridge* both receive is what is to be added to ``M``:

* ``coupling="batch"``: ``lr * (damping + gamma)``, so that ``R = M / lr + damping + gamma`` stays bounded below at
  every learning rate; ``gamma`` is the stage cost, and ``1 / lr`` counts the memory in;
* ``coupling="sample"``: ``damping``, as in the optimizers that form adapts, ``R = (M + damping) / lr``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..columns import Columns
from ..inverse import Inverse

State = dict[str, Any]
"""Tensors and numbers of one block, by name; replaced, never written into, so a failed step can drop it."""

SQUARE = "square"
"""Where a state may keep the mean squared length of a sample's gradient by the block's weights, as a float."""


class Curvature(ABC):
    """Base of :class:`Identity`, :class:`Adaptive`, :class:`Kronecker` and :class:`EigenKronecker`.

    Attributes:
        memory: in the batch form, how many samples ``M`` counts for at least, beside the batch's own.
    """

    memory: float = 0.0

    @abstractmethod
    def ridge(self, lr: float, decay: float, *, batch: bool) -> float:
        """What is to be added to ``M`` (see the module's docstring)."""

    def for_outputs(self, outputs: float) -> tuple[float, "Curvature"]:
        """What ``M`` is to be multiplied by, and the curvature to take, where losses are means over so many outputs.

        Of a mean over ``T`` independent outputs, a gradient is ``sqrt(T)`` times shorter than the loss's curvature lets
        one think: an ``M`` made of gradients is too small by a power of it that depends on how it is made.

        Args:
            outputs: ``T >= 1``, see :mod:`ddpnopt.units`; at 1 nothing changes.
        """
        return 1.0, self

    def less_damped(self, share: float) -> "Curvature":
        """The curvature with a share of its damping, for a layer that hardly moves the output.

        Args:
            share: in (0, 1], see :mod:`ddpnopt.sensitivity`; of a block whose state keeps no ``"square"`` 1.
        """
        return self

    @abstractmethod
    def advance(self, state: State, columns: Columns | None, gradient: Callable[[], Tensor], ridge: float) -> State:
        """The state after this step's columns ``U`` and batch gradient ``Q_u [out, fan_in]`` are counted in.

        Args:
            state: of the step before; empty at first. Not written into.
            columns: gradients of each sample's own loss; ``None`` where :attr:`needs_columns` is false.
            gradient: computes the gradient of the whole batch's loss, stage cost included.
            ridge: see :meth:`ridge`.
        """

    @abstractmethod
    def inverse(self, state: State, ridge: float) -> Inverse:
        """``(M + ridge)^-1`` in the curvature's own form of damping."""

    def without_factors(self) -> "Curvature":
        """The curvature for a parameter whose only column is the whole batch's gradient: itself, if it can be one."""
        return self

    @property
    @abstractmethod
    def needs_columns(self) -> bool:
        """Whether :meth:`advance` looks at the columns."""


def check_damping(name: str, damping: float) -> None:
    """Raise ``ValueError`` unless ``damping`` is a finite number >= 0."""
    if not (isinstance(damping, int | float) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"{name}: damping must be a finite number >= 0, got {damping!r}")


def check_memory(name: str, memory: float) -> None:
    """Raise ``ValueError`` unless ``memory`` is a finite number >= 0."""
    if not (isinstance(memory, int | float) and math.isfinite(memory) and memory >= 0):
        raise ValueError(f"{name}: memory must be a finite number of samples >= 0, got {memory!r}")


def check_beta(name: str, beta: float) -> None:
    """Raise ``ValueError`` unless ``0 <= beta < 1``."""
    if not (isinstance(beta, int | float) and 0 <= beta < 1):
        raise ValueError(
            f"{name}: beta, the weight of the past in the moving average, must lie in [0, 1), got {beta!r}"
        )


def check_refresh(name: str, refresh_every: int) -> None:
    """Raise ``ValueError`` unless ``refresh_every`` is an integer >= 1."""
    if not isinstance(refresh_every, int) or refresh_every < 1:
        raise ValueError(f"{name}: refresh_every must be an integer >= 1 (steps), got {refresh_every!r}")


def check_count(name: str, option: str, count: int | None, unit: str) -> None:
    """Raise ``ValueError`` unless ``count`` is ``None`` or an integer >= 1."""
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"{name}: {option} must be an integer >= 1 ({unit}) or None, got {count!r}")
