"""What the gradients hold beyond the columns: a cost that the loop puts on the weights themselves.

Columns are read off the layers' runs, so a penalty on the weights that a loop adds to its loss passes them by, and so
does what it does to ``.grad`` by hand. Both are in the gradients: less the columns' sum, these are the gradient of the
control problem's stage cost ``l(u)``, beside weight decay's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .columns import Columns
from .curvature.base import State
from .layers import Block
from .linearise import TerminalValue
from .passes import Pass
from .task import Task

COST, COST_AT, COST_SUMS = "cost", "cost_at", "cost_sums"
"""In a block's state, if it had a stage cost when these were last looked for: its gradient, where, and two sums."""

KEPT = 0.5
"""Weight of the past in the sums that the curvature is a quotient of."""

FLOOR = 1e-6
"""Length of what is no cost but rounding, over the longest gradient of a block."""

EVERY = 100
"""Steps between two looks for a stage cost in the long run; the first ones are at steps 0, 1, 2, 4, 8, ..."""


def is_due(step: int) -> bool:
    """Whether to look for stage costs at a step: more often at first, where a penalty may start from zero."""
    return step & (step - 1) == 0 or step % EVERY == 0


def rounding(passes: Sequence[Pass]) -> float:
    """How far columns' sum may be from the gradient that autograd formed, over its length: what is no more is noise."""
    given = [c for p in passes for run in p.runs for c in run.cotangents if c is not None]
    # elsewhere than on a CPU products in float32 may be rounded as in TensorFloat-32
    least = 1e-4 if all(c.device.type == "cpu" for c in given) else 2e-3
    return max([least, *(10 * torch.finfo(c.dtype).eps for c in given)])


def any_known(states: Mapping[Tensor, State]) -> bool:
    """Whether any block had a stage cost when they were last looked for; ``states`` by a block's first parameter."""
    return any(COST in state for state in states.values())


@dataclass(frozen=True)
class StageCosts:
    """Of one step.

    Args:
        gradients: ``l_u [out, fan_in]`` of the blocks that have one beside their decay.
        edited: whether gradients were changed by hand, so that these are no functions of the weights.
    """

    gradients: dict[Block, Tensor] = field(default_factory=dict)
    edited: bool = False


def stage_costs(task: Task, pairs: Iterable[tuple[Block, Columns]], end: TerminalValue, noise: float) -> StageCosts:
    """The stage costs of a step.

    Args:
        task: the step's; its gradients are clipped as ``end`` is.
        pairs: blocks with their columns, of this rank's samples.
        end: the value at the output.
        noise: length of what is no cost but rounding, over the gradient's; only where all are compared.
    """
    found: dict[Block, tuple[Tensor, float]] = {}
    longest = 0.0
    if not (task.looks or any_known(task.state)):
        return StageCosts()
    for block, columns in pairs:
        known = COST in task.state.get(block.parameters[0], {})
        if not (known or task.looks) or (held := task.gradient(block)) is None:
            continue
        summed = columns.weighted(end.weight * end.a)
        length = float(torch.maximum(held.norm(), summed.norm())) if task.looks else 0.0
        rest = summed.neg_().add_(held)
        size = float(rest.norm()) if task.looks else math.inf
        longest = max(longest, length)
        if not size <= noise * length:  # nan is to be found, too
            found[block] = rest, size
    # a gradient that is 0, of a bias before a norm say, has nothing but rounding
    gradients = {block: rest for block, (rest, size) in found.items() if not size <= FLOOR * longest}
    return StageCosts(gradients, task.edited)


def parted(state: State) -> tuple[State, State]:
    """A block's state without what it keeps of a stage cost, and that."""
    own = (COST, COST_AT, COST_SUMS)
    return {k: v for k, v in state.items() if k not in own}, {k: v for k, v in state.items() if k in own}


def with_curvature(control: Tensor, cost: Tensor, past: State, *, edited: bool) -> tuple[float, State]:
    """The curvature of a stage cost, as one number, and what a block's state is to keep of it.

    The first one makes the cost's own step, a gradient over a curvature, as long as the weights: exact for
    ``gamma / 2 |u|^2``, and no more than that for others. Then it is that of the steps made, the longest counting most:
    the sum of ``<l_u - l_u', u - u'>`` over that of ``|u - u'|^2``, in which the noise of a cost that depends on the
    samples cancels as far as the steps are made by something else.

    Args:
        control: ``u [out, fan_in]``.
        cost: ``l_u`` there.
        past: what the state has kept.
        edited: see :class:`StageCosts`.
    """
    product, square = past.get(COST_SUMS, (0.0, 0.0))
    if COST in past and not edited:
        moved = control - past[COST_AT]
        product = KEPT * product + float(((cost - past[COST]) * moved).sum())
        square = KEPT * square + float(moved.square().sum())
    size = float(control.norm())
    curvature = max(product, 0.0) / square if square else float(cost.norm()) / size if size and not edited else 0.0
    return curvature, past if edited else {COST: cost, COST_AT: control.clone(), COST_SUMS: (product, square)}
