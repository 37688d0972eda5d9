"""In which units the loss is: the decrease that a step asks of a sample, where the caller does not say.

A decrease of 1 is much of a log-likelihood, and nothing of a squared error of hundreds or a sum over a picture. The
gradient ``g`` at the output ``z`` tells: that of a cross-entropy at its logits is no longer than ``sqrt(2)``. One that
is longer asks for more in proportion, which moves outputs by about what the cross-entropy's would, and by a part of
their own size where they are large:

    cap = 1 + max(0, |g| / sqrt(2) - 1) (1 + |z| / 20)

``|g|`` is the root of the samples' mean square and ``|z|`` a mean in which every output counts by its ``|g_i|``. A cap
that rose as fast as gradients do in a step that went wrong would hold nothing, and one that fell with every easy batch
would be that of the easiest: it changes by 5 % a step at most.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .passes import Pass, wide
from .terminal import Gradient, Matched, Reduction, Terminal

LONGEST = math.sqrt(2)
"""Length of a cross-entropy's gradient at the logits of a sample that is confidently wrong."""

LARGE = 20.0
"""Size of outputs that are asked to move twice as far as small ones."""

CHANGE = 1.05
"""What a cap may be over that of the last step, or that over it."""


def is_open(terminal: Terminal) -> bool:
    """Whether the terminal leaves it to each step how much to ask."""
    return isinstance(terminal, Gradient | Matched) and terminal.cap == "auto"


def settled(terminal: Terminal, cap: float) -> Terminal:
    """The terminal with this cap, if it leaves it open."""
    if isinstance(terminal, Gradient | Matched) and terminal.cap == "auto":
        return replace(terminal, cap=cap)
    return terminal


def sizes(passes: Sequence[Pass], reduction: Reduction) -> tuple[float, float, float]:
    """``|g|_2^2``, ``|g|_1`` and ``|g z|_1`` at the output, summed over samples.

    ``g`` is of the samples' own losses, but for what the batch's loss was multiplied by before its backward pass.
    """
    square = absolute = moving = 0.0
    per_weight = sum(one.batch for one in passes) if reduction == "mean" else 1.0
    for one in passes:
        for value, cotangent in zip(one.values, one.cotangents, strict=True):
            if cotangent is not None:
                g = wide(cotangent)
                square += float(torch.linalg.vector_norm(g)) ** 2
                absolute += float(torch.linalg.vector_norm(g, 1))
                moving += float(torch.linalg.vector_norm(g * value, 1))
    return square * per_weight**2, absolute * per_weight, moving * per_weight


def natural_cap(sums: Sequence[float], samples: int, loss_scale: float, last: float | None) -> float:
    """The decrease to ask of a sample in this step.

    Args:
        sums: see :func:`sizes`, of all samples.
        samples: their number.
        loss_scale: what the batch's loss was multiplied by.
        last: the cap of the last step; ``None`` before the first.
    """
    square, absolute, moving = sums
    excess = math.sqrt(square / samples) / (loss_scale * LONGEST) - 1 if samples else 0.0
    cap = 1 + excess * (1 + moving / absolute / LARGE) if excess > 0 and absolute > 0 else 1.0
    if not math.isfinite(cap):
        return 1.0 if last is None else last  # the step fails of what is not finite, by its own name
    return cap if last is None else min(max(cap, last / CHANGE), CHANGE * last)
