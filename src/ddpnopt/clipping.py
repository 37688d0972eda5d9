"""The factor by which gradients were changed after autograd had left them, as ``clip_grad_norm_`` does.

A layer's step is made from its columns, so such a factor has to be told to them: the linear part of the loss's model
is multiplied by it, which makes the whole step as much shorter. A few entries of each gradient are enough to tell.

Loops made for Adam clip most of their steps, which Adam does not notice: a factor that all gradients share drops out of
its steps. Here too it is only a factor below the usual one that shortens a step.
"""

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StepError

ENTRIES = 64
"""Of each gradient, about as many are remembered."""

GOLDEN = 0.618
"""Multiples of it, modulo 1, are spread evenly however many there are."""

NO_SCALE = (
    "after scaler.unscale_(optimizer) the gradients are not those of the backward pass times one factor, so the scale "
    "cannot be told: change all gradients by one factor, as clip_grad_norm_ does, or leave out scaler.unscale_"
)

KEPT = 0.9
"""Weight of the past in the usual factor, a moving average from 1."""

Left = tuple[tuple[int, int], Tensor]
"""Where a gradient was, the version it had, and some of its entries."""


class Witness:
    """Remembers what backward passes leave in ``.grad`` of some parameters, for as long as it lives.

    Args:
        parameters: to watch.
        before: what one has seen of these that watched until now.

    Attributes:
        heard: autograd's numbers of the backward passes that have left anything.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], before: "Witness | None" = None):
        self._parameters = [p for p in parameters if p.requires_grad]
        seen = {} if before is None else dict(zip(before._parameters, before._left, strict=True))
        self._left: list[Left | None] = [seen.get(p) for p in self._parameters]
        self.heard: set[int] = set() if before is None else before.heard
        handles = [
            # the hook holds the list, not the witness, which holds the parameters
            p.register_post_accumulate_grad_hook(partial(_note, self._left, self.heard, i))
            for i, p in enumerate(self._parameters)
        ]
        self.close = weakref.finalize(self, _remove, handles)

    def factor(self) -> float | None:
        """What all gradients were multiplied by since; 1 if nothing is known, ``None`` if there is no such number."""
        known = self._known()
        if all(_place(gradient) == place for gradient, (place, _) in known):
            return 1.0
        return _common([(_entries(gradient), entries) for gradient, (_, entries) in known])

    def unscaled(self) -> tuple[bool, float | None]:
        """Whether enough is known to tell, and the factor, of changes that torch does not count, as a GradScaler's."""
        known = self._known()
        told = any(bool(entries.any()) for _, (_, entries) in known)
        return told, _common([(_entries(gradient), entries) for gradient, (_, entries) in known])

    def _known(self) -> list[tuple[Tensor, Left]]:
        pairs = zip(self._parameters, self._left, strict=True)
        return [(p.grad, left) for p, left in pairs if left is not None and p.grad is not None]

    def forget(self) -> None:
        """The gradients have been used."""
        self._left[:] = [None] * len(self._left)
        self.heard.clear()


class Clips:
    """The clips of one optimizer, from step to step; a copied or pickled one watches nothing.

    Attributes:
        usual: the usual factor.
    """

    def __init__(self) -> None:
        self.usual = 1.0
        self._witness: Witness | None = None

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """From now on watch these parameters' gradients, and no others; what was seen of the same ones stays."""
        witness = Witness(parameters, self._witness)
        self.close()
        self._witness = witness

    @property
    def heard(self) -> set[int] | None:
        """Numbers of the backward passes that have left gradients since the last step; ``None`` if nobody watches."""
        return None if self._witness is None else self._witness.heard

    def factor(self) -> float | None:
        """What all gradients were multiplied by since the backward pass; ``None`` if there is no such number."""
        return 1.0 if self._witness is None else self._witness.factor()

    def scale(self) -> float | None:
        """What the loss was multiplied by, where ``scaler.unscale_`` has divided the gradients by it since.

        A clip that has followed cannot be told from it: by a factor ``c``, and this is the scale over ``c``. ``None``
        if the entries do not tell: all are 0, or of gradients that are sparse.

        Raises:
            StepError: if there is no such number.
        """
        told, found = (False, None) if self._witness is None else self._witness.unscaled()
        if not told:
            return None
        if found is None or found <= 0:
            raise StepError(NO_SCALE)
        return 1 / found

    def shortening(self, factor: float) -> float:
        """What a step is multiplied by: the clip's factor over the usual one, at most 1."""
        return min(1.0, factor / self.usual) if factor > 0 else factor

    def settle(self, factor: float) -> None:
        """A step with this factor has been made."""
        if factor != self.usual:
            self.usual = KEPT * self.usual + (1 - KEPT) * max(factor, 0.0)

    def forget(self) -> None:
        """The gradients have been used."""
        self._witness.forget() if self._witness is not None else None

    def close(self) -> None:
        """Watch nothing any more."""
        self._witness.close() if self._witness is not None else None
        self._witness = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_witness": None}


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


def _note(left: list[Left | None], heard: set[int], i: int, parameter: Tensor) -> None:
    heard.add(torch._C._current_graph_task_id())
    gradient = parameter.grad
    usable = gradient is not None and gradient.layout is torch.strided
    left[i] = (_place(gradient), _entries(gradient)) if gradient is not None and usable else None


def _place(gradient: Tensor) -> tuple[int, int]:
    return gradient.data_ptr(), gradient._version


def _entries(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    every = flat.shape[0] // ENTRIES
    if every > 1 and every >= (width := gradient.shape[-1]):
        # from all columns, the next one a golden section further: a stride of whole rows would see one column
        every += round(GOLDEN * width) - every % width
    return (flat[::every] if every > 1 else flat).clone()


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
