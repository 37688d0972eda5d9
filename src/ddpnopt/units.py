"""In which units a sample's loss is, and over how many outputs it is a mean, where the caller does not say.

A decrease of 1 is much of a log-likelihood, and nothing of a squared error of hundreds or a sum over a picture. The
gradient ``g`` at the output ``z`` tells: that of a cross-entropy at its logits is no longer than ``sqrt(2)``. One that
is longer asks for more in proportion, which moves outputs by about what the cross-entropy's would, and by a part of
their own size where they are large:

    cap = 1 + (length - 1) (2 + |z| / 10),    length = geometric mean over samples of max(1, |g| / sqrt(2))

``|z|`` is a mean over the outputs of the samples with long gradients, each by its ``|g_i|``. The geometric mean is
hardly moved by single samples, such as those whose probability is next to 0. A cap that rose as fast as gradients do in
a step that went wrong would hold nothing, and one that fell with every easy batch would be that of the easiest: it
changes by 5 % a step at most.

A loss that is a mean over many outputs, a sequence's tokens or a picture's pixels, has gradients whose squares, all
that ``Gradient`` and the curvature ``M`` made of them know of second derivatives, are too small, up to so many times.
With ``g_t`` the gradient of one output, which is a group of classes or half of a number,

    outputs = sum over samples (sum_t |g_t|)^2 / (sum over samples |g|^2) / cap,    from 1 to 128,

is ``T`` where ``T`` outputs are equally wrong, and 1 of a single cross-entropy. A sum over outputs is no mean: its
gradient is long, and so the cap is large. The number changes by 5 % a step at most, too. What a curvature makes of it
says its ``for_outputs``. Of several tensors that the model returns, features beside logits say, that with the fewest
counts.

For the cap all tensors count that the model returns with the batch in front (or the only one, as rows ``[B T, ...]``),
each with all its gradient, also what it has by way of another of them. After ``scaler.unscale_`` and a clip it is the
clipped loss's gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .passes import Pass, wide
from .terminal import Gradient, Matched, Reduction, Terminal

LONGEST = math.sqrt(2)
"""Length of a cross-entropy's gradient at the logits of a sample that is confidently wrong."""

STEP, SHARE = 2.0, 0.1
"""How far outputs are asked to move, in all and for their size; in units in which a cross-entropy's moves by 1."""

CHANGE = 1.05
"""Largest ratio of two successive caps, and of two successive numbers of outputs."""

PAST = 0.95
"""Weight of the past in the mean of squared gradients, as by default in a curvature's moving averages."""

MOST = 128.0
"""Outputs that are counted at most: what more would do has not been tried, and neighbours are often wrong together."""


@dataclass(frozen=True)
class Units:
    """What a step found at the model's output.

    Args:
        cap: decrease of its own loss to ask of a sample.
        outputs: over how many the sample's loss is a mean; ``None`` while no gradient has said.
        square: ``E |g|^2``, a moving average over steps; ``None`` while no gradient has said.
    """

    cap: float
    outputs: float | None = None
    square: float | None = None


def saved_units(units: Units | None) -> dict[str, float | None]:
    """As entries of a state."""
    return dict.fromkeys(own.name for own in fields(Units)) if units is None else asdict(units)


def loaded_units(state: Mapping[str, Any]) -> Units | None:
    """What :func:`saved_units` saved; older states lack entries."""
    cap = state.get("cap")
    return None if cap is None else Units(cap, state.get("outputs"), state.get("square"))


def is_open(terminal: Terminal) -> bool:
    """Whether the terminal leaves it to each step how much to ask."""
    return isinstance(terminal, Gradient | Matched) and terminal.cap == "auto"


def settled(terminal: Terminal, cap: float) -> Terminal:
    """The terminal with this cap, if it leaves it open."""
    if isinstance(terminal, Gradient | Matched) and terminal.cap == "auto":
        return replace(terminal, cap=cap)
    return terminal


def output_sums(passes: Sequence[Pass], reduction: Reduction, loss_scale: float) -> list[float]:
    """Sums over samples, of what :func:`found_units` needs.

    Over those with ``|g| > sqrt(2)``: of ``log(|g| / sqrt(2))``, of ``|g|_1`` and of ``|g z|_1``; over all: of
    ``(sum_t |g_t|)^2`` and of ``|g|_2^2`` in the tensor in which a sample's gradient is spread the least.

    Args:
        passes: with the gradients of the batch's loss at the model's output, and the output's values.
        reduction: of the batch's loss; ``g`` are of the samples' own.
        loss_scale: what the batch's loss was multiplied by before its backward pass.
    """
    per_weight = (sum(one.batch for one in passes) if reduction == "mean" else 1.0) / loss_scale
    sums = [0.0] * 5
    for one in passes:
        found = zip(one.values, one.leaves, one.cotangents, strict=False)
        given = [(x, x._version == leaf.version, g) for x, leaf, g in found if g is not None and g.ndim]
        read = [own for own in given if len(own[2]) == one.batch]
        if not read and len(given) == 1 and _folded(given[0][2], one.batch):
            read = [
                (x.unflatten(0, (one.batch, -1)), unwritten, g.unflatten(0, (one.batch, -1)))
                for x, unwritten, g in given
            ]
        if not read:
            continue
        rows = [wide(g).reshape(len(g), -1) for _, _, g in read]
        norms = [torch.linalg.vector_norm(row, dim=1) for row in rows]
        sizes = [torch.linalg.vector_norm(row, 1, dim=1) for row in rows]
        spreads = [_spread(g, *own) for (_, _, g), *own in zip(read, norms, sizes, strict=True)]
        norm, least, spread = norms[0], norms[0], spreads[0]
        if len(read) > 1:
            several, spread = torch.stack(norms), torch.stack(spreads)
            norm = several.square().sum(0).sqrt()
            chosen = torch.where(several > 0, spread / several, math.inf).argmin(0, keepdim=True)
            least, spread = several.gather(0, chosen)[0], spread.gather(0, chosen)[0]
        sums[3] += per_weight**2 * float(spread.double().square().sum())
        sums[4] += per_weight**2 * float(least.double().square().sum())
        length = norm * (per_weight / LONGEST)
        long = length > 1
        if not bool(long.any()):
            continue
        sums[0] += float(length[long].log().sum())
        sums[1] += per_weight * sum(float(size[long].sum()) for size in sizes)
        for x, unwritten, cotangent in read:
            if unwritten:  # else it is not what the gradient belongs to
                g = wide(cotangent[long])
                # what is masked by an infinite value has no gradient
                sums[2] += per_weight * float(torch.where(g == 0, 0.0, g * x[long]).abs().sum())
    return sums


def _folded(x: Tensor, batch: int) -> bool:
    """Whether a tensor may be rows ``[B T, classes]`` of all samples."""
    return x.ndim > 1 and 1 < batch < len(x) and len(x) % batch == 0


def _spread(g: Tensor, norm: Tensor, size: Tensor) -> Tensor:
    """Of every sample's gradient, the sum of its outputs' lengths.

    An output is a group of classes where their gradients add up to zero, as a softmax's do, along the last dimension or
    the second. Else it is a number, whose ``|g|`` counts half, as that of a class does among all of them.

    Args:
        g: gradients ``[B, ...]``.
        norm: their ``|g|_2``.
        size: their ``|g|_1``.
    """
    found = size / 2
    rounding = max(1e-3, 4 * torch.finfo(g.dtype).eps)
    for axis in {1, g.ndim - 1} if g.ndim > 1 else ():
        left = _over_rest(wide(g).sum(axis).abs())
        groups = norm if g.ndim == 2 else _over_rest(torch.linalg.vector_norm(wide(g), dim=axis))
        found = torch.where(left <= rounding * size, groups, found)
    return found


def _over_rest(x: Tensor) -> Tensor:
    return x if x.ndim == 1 else x.reshape(len(x), -1).sum(1)


def found_units(sums: Sequence[float], samples: int, last: Units | None) -> Units:
    """The decrease to ask of a sample in this step, and the outputs that its loss is a mean over.

    Args:
        sums: see :func:`output_sums`, of all samples.
        samples: their number.
        last: what the last step found; ``None`` before the first.
    """
    logs, absolute, moving, spread, squares = sums
    if not all(map(math.isfinite, sums)):
        return last or Units(1.0)  # the step fails of what is not finite, by its own name
    size = moving / absolute if absolute > 0 else 0.0
    cap = 1 + (math.exp(logs / samples) - 1) * (STEP + SHARE * size) if samples else 1.0
    cap = cap if last is None else _near(cap, last.cap)
    before = None if last is None else last.outputs
    square = None if last is None else last.square
    if samples:
        own = squares / samples
        square = own if square is None else PAST * square + (1 - PAST) * own
    if squares == 0:
        return Units(cap, before, square)
    outputs = min(max(1.0, spread / squares / cap), MOST)
    return Units(cap, outputs if before is None else _near(outputs, before), square)


def _near(value: float, last: float) -> float:
    return min(max(value, last / CHANGE), CHANGE * last)
