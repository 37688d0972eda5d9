"""The factor by which gradients were changed after autograd had left them, as ``clip_grad_norm_`` does.

A layer's step is made from its columns, so such a factor has to be told to them: the linear part of the loss's model
is multiplied by it, which makes the whole step as much shorter. A few entries of each gradient are enough to tell.

Loops made for Adam clip most of their steps, which Adam does not notice: a factor that all gradients share drops out of
its steps. Here too it is only a factor below the usual one that shortens a step.
"""

import weakref
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

ENTRIES = 64
"""Of each gradient, about as many are remembered."""

NO_FACTOR = (
    "gradients were changed after the backward pass, and not all by one factor. The layers' steps come from their "
    "samples' columns, which a common factor (clip_grad_norm_ of all parameters) reaches and other changes do not"
)

KEPT = 0.9
"""Weight of the past in the usual factor, a moving average from 1."""

Left = tuple[tuple[int, int], Tensor]
"""Where a gradient was, the version it had, and some of its entries."""


class Witness:
    """Remembers what backward passes leave in ``.grad`` of some parameters, for as long as it lives."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = [p for p in parameters if p.requires_grad]
        self._left: list[Left | None] = [None] * len(self._parameters)
        handles = [
            # the hook holds the list, not the witness, which holds the parameters
            p.register_post_accumulate_grad_hook(partial(_note, self._left, i))
            for i, p in enumerate(self._parameters)
        ]
        self.close = weakref.finalize(self, _remove, handles)

    def factor(self) -> float | None:
        """What all gradients were multiplied by since; 1 if nothing is known, ``None`` if there is no such number."""
        known = [
            (p.grad, left) for p, left in zip(self._parameters, self._left, strict=True) if left and p.grad is not None
        ]
        if all(_place(gradient) == place for gradient, (place, _) in known):
            return 1.0
        return _common([(_entries(gradient), entries) for gradient, (_, entries) in known])

    def forget(self) -> None:
        """The gradients have been used."""
        self._left[:] = [None] * len(self._left)


def shortening(factor: float, usual: float) -> float:
    """What a step is multiplied by: the clip's factor over the usual one, at most 1."""
    return min(1.0, factor / usual) if factor > 0 else factor


def usual_after(usual: float, factor: float) -> float:
    """The usual factor, one step later."""
    return usual if usual == factor else KEPT * usual + (1 - KEPT) * max(factor, 0.0)


def _common(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """The number ``c`` with ``held = c left`` for all pairs, up to rounding."""
    square = sum(float(left.double().square().sum()) for _, left in pairs)
    product = sum(float((held.double() * left.double()).sum()) for held, left in pairs)
    c = product / square if square > 0 else 1.0
    for held, left in pairs:
        rounding = max(1e-4, 10 * torch.finfo(held.dtype).eps)
        if float((held.double() - c * left.double()).norm()) > rounding * abs(c) * float(left.double().norm()):
            return None
    return c


def _note(left: list[Left | None], i: int, parameter: Tensor) -> None:
    gradient = parameter.grad
    usable = gradient is not None and gradient.layout is torch.strided
    left[i] = (_place(gradient), _entries(gradient)) if gradient is not None and usable else None


def _place(gradient: Tensor) -> tuple[int, int]:
    return gradient.data_ptr(), gradient._version


def _entries(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    every = flat.shape[0] // ENTRIES
    return (flat[::every] if every > 1 else flat).clone()


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
