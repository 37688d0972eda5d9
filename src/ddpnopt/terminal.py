"""From the loss to the columns at the model's output: ``V_x = Z a``, ``V_xx = Z Z'`` of each sample's own loss.

Shapes: ``B`` samples, output flattened to ``d`` numbers per sample, ``R`` columns. The loss of a batch is
``J = w sum_i phi_i`` with ``w = 1/B`` for a mean and 1 for a sum; gradients ``g`` and Hessians ``H`` here are those
of ``phi_i``, one sample's own loss, at its output.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .output_loss import OutputLoss, hessian_root

Reduction = Literal["mean", "sum"]
Cap = float | Literal["auto"]
"""A decrease of the loss; ``"auto"``: by the loss's units, see :mod:`ddpnopt.units`."""


class Terminal(ABC):
    """Base of :class:`Gradient`, :class:`Matched`, :class:`Exact` and :class:`Sampled`."""

    criterion: nn.Module | None
    reduction: Reduction

    @property
    @abstractmethod
    def needs_loss(self) -> bool:
        """Whether the loss's Hessian at the output is used, so that a criterion (or a closure's loss) is needed."""


class RankOne(Terminal):
    """One column per sample, a multiple of its gradient: the ordinary backward pass carries it."""

    @abstractmethod
    def scale(self, loss: OutputLoss) -> Tensor:
        """``c [B]`` with ``Z = c g``."""


class Factored(Terminal):
    """``R`` columns per sample, to be pulled back one by one, beside the gradient."""

    cap: float | None

    @abstractmethod
    def factor(self, loss: OutputLoss, step: int, before: int = 0) -> Tensor:
        """``Z [R, B, d]``; ``before``: samples of the batch that stand before these, on other ranks."""


@dataclass(frozen=True)
class Gradient(RankOne):
    """``Z = g / sqrt(cap)``: the loss's curvature is the outer product of its gradient (Proposition 3 of the paper).

    Asks every sample for a loss decrease of ``cap`` per step. Needs nothing but the backward pass.

    Args:
        reduction: whether the batch's loss is the ``"mean"`` (default) or the ``"sum"`` of the samples' losses.
        cap: decrease of its own loss asked of a sample in one step. ``"auto"`` (default): 1, which suits
            log-likelihoods at their logits and all losses whose gradient at the model's output is as short; in the
            batch form more where it is longer (:mod:`ddpnopt.units`), so that targets in the hundreds and losses summed
            over many outputs train too; and outputs are counted there, for losses that are means over many. They are
            counted where the model's output leads with the batch, ``[B, T, classes]`` say, or is nothing but rows of
            all samples, ``[B T, classes]``. 1 is the paper's, and counts none.

    Raises:
        ValueError: if ``reduction`` is neither, or ``cap`` is not a positive number.

    Example:
        >>> from ddpnopt import Gradient
        >>> Gradient()
        Gradient(reduction='mean', cap='auto')
    """

    reduction: Reduction = "mean"
    cap: Cap = "auto"
    criterion = None

    def __post_init__(self) -> None:
        _check_reduction("Gradient", self.reduction)
        _check_cap("Gradient", self.cap)

    @property
    def needs_loss(self) -> bool:
        return False

    def scale(self, loss: OutputLoss) -> Tensor:
        return self.constant(loss.output, loss.batch)

    def constant(self, like: Tensor, batch: int) -> Tensor:
        """``c [B]``, for which no loss is needed."""
        return like.new_full((batch,), 1 / math.sqrt(_number(self.cap)))


@dataclass(frozen=True)
class Matched(RankOne):
    """``Z = c g`` with ``c^2 = max(1/cap, g'Hg / (g'g)^2)``: exact along the gradient, no decrease above ``cap`` asked.

    Args:
        criterion: the loss module the training loop calls on the model's output. ``None`` only for
            ``step(closure)`` with a closure that returns the loss without calling ``backward``.
        cap: largest decrease of its own loss asked of a sample in one step; default ``"auto"``, see
            :class:`Gradient`.
        reduction: of the loss, where the criterion does not say; default ``"mean"``.

    Raises:
        TypeError: if ``criterion`` is not a module.
        ValueError: if ``cap`` is not a positive number, or the criterion's reduction is neither mean nor sum.

    Example:
        >>> import torch
        >>> from ddpnopt import Matched
        >>> Matched(torch.nn.CrossEntropyLoss())
        Matched(criterion=CrossEntropyLoss(), cap='auto', reduction='mean')
    """

    criterion: nn.Module | None = None
    cap: Cap = "auto"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduction", _reduction_of("Matched", self.criterion, self.reduction))
        _check_cap("Matched", self.cap)

    @property
    def needs_loss(self) -> bool:
        return True

    def scale(self, loss: OutputLoss) -> Tensor:
        g = loss.gradient
        curvature = (g * loss.product(g)).sum(1)
        square = g.square().sum(1).square()
        # with w g for g and w H for H, what is left over of the weights is one w
        matched = torch.where(square > 0, loss.weight * curvature / square, torch.zeros_like(square))
        return matched.clamp_min(1 / _number(self.cap)).sqrt()


@dataclass(frozen=True)
class Exact(Factored):
    """``Z Z' = H``, every column of the loss's own Hessian at the output: ``d`` columns per sample.

    The Hessian is that of the loss as a function of the output (for convex losses the generalised Gauss-Newton
    curvature); its negative eigenvalues count as zero. Costs ``d`` backward passes and ``(B (d + 1))^2`` memory.

    Args:
        criterion: see :class:`Matched`.
        reduction: see :class:`Matched`.
        cap: ``None`` (default) is ``H`` alone, which asks a sample that is confidently wrong for a step without
            bound. A number adds ``g g' / cap``, so that no sample is asked for a decrease above ``cap``; 1 is sturdy.

    Raises:
        TypeError: if ``criterion`` is not a module.
        ValueError: if ``cap`` is not a positive number, or the criterion's reduction is neither mean nor sum.

    Example:
        >>> import torch
        >>> from ddpnopt import Exact
        >>> Exact(torch.nn.MSELoss(reduction="sum"))
        Exact(criterion=MSELoss(), reduction='sum', cap=None)
    """

    criterion: nn.Module | None = None
    reduction: Reduction = "mean"
    cap: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduction", _reduction_of("Exact", self.criterion, self.reduction))
        _check_cap("Exact", self.cap)

    @property
    def needs_loss(self) -> bool:
        return True

    def factor(self, loss: OutputLoss, step: int, before: int = 0) -> Tensor:
        d = loss.output.numel() // loss.batch
        every = torch.eye(d).to(loss.gradient).expand(loss.batch, d, d)
        return hessian_root(loss)(every).to(loss.output.dtype).permute(2, 0, 1)


@dataclass(frozen=True)
class Sampled(Factored):
    """``columns`` random columns with ``E[Z Z'] = H``: random signs times the factor of :class:`Exact`.

    Costs ``columns`` backward passes and ``(B (columns + 1))^2`` memory. Squared errors, cross-entropies and other
    losses that couple nothing, or the classes of one position, need no more for any number of outputs; others need the
    whole ``H``, ``d`` derivatives of the loss and ``B d^2`` memory (:mod:`ddpnopt.output_loss`).

    Where the loss is a mean over many outputs of a sample, a sequence's tokens or a picture's pixels, these columns
    have the curvature at each, and ``Gradient``'s has that along their mean alone, and their number. There begin with
    ``Sampled(criterion, columns=2, cap=1.0)`` and ``Kronecker(damping=0.01, memory=160)``: such a sample is many
    observations, and takes less damping and a shorter memory (``docs/results/sequences.md``). With the curvature's
    defaults it is worse than ``Gradient``.

    Args:
        criterion: see :class:`Matched`.
        columns: number of random columns ``R`` per sample; default 4.
        reduction: see :class:`Matched`.
        seed: of the signs, which depend on it and the step's number alone; default 0.
        cap: see :class:`Exact`.

    Raises:
        TypeError: if ``criterion`` is not a module.
        ValueError: if ``columns`` is not an integer >= 1, ``cap`` is not a positive number, or the criterion's
            reduction is neither mean nor sum.

    Example:
        >>> import torch
        >>> from ddpnopt import Sampled
        >>> Sampled(torch.nn.CrossEntropyLoss(), columns=2).columns
        2
    """

    criterion: nn.Module | None = None
    columns: int = 4
    reduction: Reduction = "mean"
    seed: int = 0
    cap: float | None = None

    def __post_init__(self) -> None:
        _check_cap("Sampled", self.cap)
        object.__setattr__(self, "reduction", _reduction_of("Sampled", self.criterion, self.reduction))
        if not isinstance(self.columns, int) or self.columns < 1:
            raise ValueError(f"Sampled: columns must be an integer >= 1, got {self.columns!r}")

    @property
    def needs_loss(self) -> bool:
        return True

    def factor(self, loss: OutputLoss, step: int, before: int = 0) -> Tensor:
        d = loss.output.numel() // loss.batch
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        size = before + loss.batch, d, self.columns
        signs = torch.randint(0, 2, size, generator=generator, dtype=torch.int8, device="cpu")[before:] * 2 - 1
        noise = signs.to(loss.gradient) / math.sqrt(self.columns)
        return hessian_root(loss)(noise).to(loss.output.dtype).permute(2, 0, 1)


def _number(cap: Cap) -> float:
    """The cap; 1 where nobody has settled it."""
    return 1.0 if cap == "auto" else float(cap)


def _check_cap(name: str, cap: Cap | None) -> None:
    other = "auto" if name in ("Gradient", "Matched") else None
    if cap == other or (isinstance(cap, int | float) and math.isfinite(cap) and cap > 0):
        return
    raise ValueError(f"{name}: cap must be a positive number (a decrease of the loss) or {other!r}, got {cap!r}")


def _check_reduction(name: str, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'mean' or 'sum' (over the batch), got {reduction!r}")


def _reduction_of(name: str, criterion: nn.Module | None, reduction: Reduction) -> Reduction:
    if criterion is not None and not isinstance(criterion, nn.Module):
        raise TypeError(
            f"{name}: the criterion must be a loss module such as torch.nn.CrossEntropyLoss(), the very one the "
            f"training loop calls, got {criterion!r}"
        )
    said: Reduction = getattr(criterion, "reduction", reduction)
    _check_reduction(name, said)
    return said
