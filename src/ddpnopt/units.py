"""In which units the loss is: the decrease that a step asks of a sample, where the caller does not say.

A decrease of 1 is much of a log-likelihood, and nothing of a squared error of hundreds or a sum over a picture. The
gradient ``g`` at the output ``z`` tells: that of a cross-entropy at its logits is no longer than ``sqrt(2)``. One that
is longer asks for more in proportion, which moves outputs by about what the cross-entropy's would, and by a part of
their own size where they are large:

    cap = 1 + (length - 1) (2 + |z| / 10),    length = geometric mean over samples of max(1, |g| / sqrt(2))

``|z|`` is a mean over the outputs of the samples with long gradients, each by its ``|g_i|``. The geometric mean is
hardly moved by single samples, such as those whose probability is next to 0. A cap that rose as fast as gradients do in
a step that went wrong would hold nothing, and one that fell with every easy batch would be that of the easiest: it
changes by 5 % a step at most.

All tensors count that the model returns with the batch in front, each with all its gradient, also what it has by way of
another of them. After ``scaler.unscale_`` and a clip it is the clipped loss's gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .passes import Pass, wide
from .terminal import Gradient, Matched, Reduction, Terminal

LONGEST = math.sqrt(2)
"""Length of a cross-entropy's gradient at the logits of a sample that is confidently wrong."""

STEP, SHARE = 2.0, 0.1
"""How far outputs are asked to move, in all and for their size; in units in which a cross-entropy's moves by 1."""

CHANGE = 1.05
"""Largest ratio of two successive caps."""


def is_open(terminal: Terminal) -> bool:
    """Whether the terminal leaves it to each step how much to ask."""
    return isinstance(terminal, Gradient | Matched) and terminal.cap == "auto"


def settled(terminal: Terminal, cap: float) -> Terminal:
    """The terminal with this cap, if it leaves it open."""
    if isinstance(terminal, Gradient | Matched) and terminal.cap == "auto":
        return replace(terminal, cap=cap)
    return terminal


def output_sums(passes: Sequence[Pass], reduction: Reduction, loss_scale: float) -> list[float]:
    """Sums over the samples with ``|g| > sqrt(2)``: of ``log(|g| / sqrt(2))``, of ``|g|_1`` and of ``|g z|_1``.

    Args:
        passes: with the gradients of the batch's loss at the model's output, and the output's values.
        reduction: of the batch's loss; ``g`` are of the samples' own.
        loss_scale: what the batch's loss was multiplied by before its backward pass.
    """
    per_weight = (sum(one.batch for one in passes) if reduction == "mean" else 1.0) / loss_scale
    sums = [0.0, 0.0, 0.0]
    for one in passes:
        found = zip(one.values, one.leaves, one.cotangents, strict=False)
        read = [(x, leaf, g) for x, leaf, g in found if g is not None and g.ndim and len(g) == one.batch]
        if not read:
            continue
        norms = [torch.linalg.vector_norm(wide(g).reshape(len(g), -1), dim=1) for _, _, g in read]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()
        length = norm * (per_weight / LONGEST)
        long = length > 1
        if not bool(long.any()):
            continue
        sums[0] += float(length[long].log().sum())
        for x, leaf, cotangent in read:
            g = wide(cotangent[long])
            sums[1] += per_weight * float(g.abs().sum())
            if x._version == leaf.version:  # else it was written into: not what the gradient belongs to
                # what is masked by an infinite value has no gradient
                sums[2] += per_weight * float(torch.where(g == 0, 0.0, g * x[long]).abs().sum())
    return sums


def natural_cap(sums: Sequence[float], samples: int, last: float | None) -> float:
    """The decrease to ask of a sample in this step.

    Args:
        sums: see :func:`output_sums`, of all samples.
        samples: their number.
        last: the cap of the last step; ``None`` before the first.
    """
    logs, absolute, moving = sums
    if not all(map(math.isfinite, sums)):
        return 1.0 if last is None else last  # the step fails of what is not finite, by its own name
    size = moving / absolute if absolute > 0 else 0.0
    cap = 1 + (math.exp(logs / samples) - 1) * (STEP + SHARE * size) if samples else 1.0
    return cap if last is None else min(max(cap, last / CHANGE), CHANGE * last)
