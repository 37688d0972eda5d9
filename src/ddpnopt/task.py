"""What one step works on, and what it leaves."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .accord import Accord
from .bellman import Settings
from .conditions import every_module
from .coupling import Coupling, is_joint
from .curvature import Curvature
from .curvature.base import SQUARE, State
from .errors import StepError
from .layers import Block, mixes_samples
from .linearise import Linearised, TerminalValue, linearise
from .network import Network, matrix_of
from .passes import Pass, wide
from .sensitivity import damped
from .terminal import Terminal
from .trajectory import Recorder
from .units import Units

VELOCITY, VELOCITY_LR = "velocity", "velocity_lr"

DECAY_LR = 0.1
"""Learning rate up to which decoupled decay grows with it in the joint form, whose steps are bounded as it grows."""

FIRST = 320
"""Samples that an ``M`` with a memory counts for from the first step on, its ``batch / lr`` included."""

PEAK_LR = "peak_lr"
"""Where a group keeps the largest learning rate it has had, which a schedule is relative to."""


def peak(group: Mapping[str, Any]) -> float:
    """The largest learning rate that a group has had, today's included."""
    return max(float(group["lr"]), float(group.get(PEAK_LR, 0.0)))


@dataclass(frozen=True)
class Task:
    """What one step works on.

    Args:
        network: layers, stages and loose parameters.
        groups, group_of: the optimizer's parameter groups, and each parameter's index among them.
        state: of the optimizer, by a block's first parameter; not written into.
        curvature, terminal, coupling, feedback: the optimizer's options.
        recorder: ``None`` for bare parameters.
        passes: recorded forward passes with their cotangents.
        gradients: of the batch's loss, for the parameters that have one.
        loss: with its graph, if the closure left it and the terminal wants it.
        loss_scale: what the loss had been multiplied by before its backward pass; ``gradients`` are without it.
        clip: what the step is to be multiplied by because gradients were clipped after the backward pass.
        number: of the step, from 0.
        seen: samples of all steps before.
        accord: with the other ranks; the passes and gradients are those of this rank's samples.
        units: what was found at the model's output, as far as the joint form is to know.
        looks: whether to compare all gradients with the columns (:mod:`ddpnopt.stage_cost`).
        edited: whether the gradients were changed by hand, and not by one factor; ``looks`` then, too.
        derived: whether the loss may be made of derivatives of the model; ``looks`` then, too.
    """

    network: Network
    groups: Sequence[Mapping[str, Any]]
    group_of: Mapping[nn.Parameter, int]
    state: Mapping[Tensor, State]
    curvature: Curvature
    terminal: Terminal
    coupling: Coupling
    feedback: bool
    recorder: Recorder | None
    passes: Sequence[Pass]
    gradients: Mapping[nn.Parameter, Tensor]
    loss: Tensor | None
    loss_scale: float
    clip: float
    number: int
    seen: int
    accord: Accord
    units: Units | None = None
    looks: bool = False
    edited: bool = False
    derived: bool = False

    def linearised(self, terminal: Terminal) -> tuple[list[Linearised], TerminalValue]:
        """The passes with their columns, and the value at the output, its linear part clipped as the gradients are."""
        assert self.recorder is not None
        before = sum(self.accord.counts[: self.accord.ranks.rank])
        found, end = linearise(self.passes, terminal, self.recorder, self.loss, self.number, before, self.loss_scale)
        return found, end if self.clip == 1.0 else replace(end, a=self.clip * end.a)

    def settings(self, block: Block, state: State, *, alone: bool = False) -> Settings:
        """Those of a block's group, ``state`` being the curvature's before this step.

        ``alone``: of a block whose only column is the whole batch's gradient.
        """
        group = self.groups[self.group_of[block.parameters[0]]]
        lr, gamma, momentum = (float(group[name]) for name in ("lr", "weight_decay", "momentum"))
        joint, highest = is_joint(self.coupling), peak(group)
        own = lr
        if joint:
            growth, _ = self.counted(alone=alone)
            past, least = self.past_weight
            # relative to the highest, or a schedule could not still the steps once the memory outweighs 1 / lr
            own = lr / (growth * max(1 + highest * past, highest * least))
        # a parameter that no rule reads may be of any units, and zero in them
        limit = math.inf if alone else float(group["max_change"])
        share = damped(state.get(SQUARE), None if self.units is None else self.units.square)
        if not group["decoupled_weight_decay"]:
            return Settings(own, gamma, 1.0, momentum, limit, share)
        reach = lr * min(1.0, DECAY_LR / highest) if joint and highest else lr
        return Settings(own, 0.0, 1 / (1 + reach * gamma), momentum, limit, share)

    def counted(self, *, alone: bool = False) -> tuple[float, Curvature]:
        """What ``M`` is multiplied by for the number of outputs, and the curvature; ``alone``: see :meth:`settings`."""
        curvature = self.curvature.without_factors() if alone else self.curvature
        outputs = None if self.units is None else self.units.outputs
        return curvature.for_outputs(outputs or 1.0)

    @property
    def past_weight(self) -> tuple[float, float]:
        """Samples that ``M`` remembers beside the batch's, and with them at least; over the batch's for a mean loss."""
        samples = sum(self.accord.counts)
        if not samples:
            return 0.0, 0.0  # bare parameters
        unit, memory = samples if self.terminal.reduction == "mean" else 1, self.curvature.memory
        return min(memory, self.seen + samples) / unit, min(memory, FIRST) / unit

    def own_state(self, block: Block) -> tuple[State, Tensor | None, float | None]:
        """A block's curvature state, its velocity, and the learning rate that this velocity has moved it by."""
        state = dict(self.state.get(block.parameters[0], {}))
        if state.pop("parameters", len(block.parameters)) != len(block.parameters):
            return {}, None, None  # a bias was frozen, thawed or regrouped since: the block has another shape
        velocity, its_lr = state.pop(VELOCITY, None), state.pop(VELOCITY_LR, None)
        return state, velocity, its_lr

    def gradient(self, block: Block) -> Tensor | None:
        """Gradient of the batch's loss as the block's matrix, at least in float32; ``None`` without one."""
        if not any(p in self.gradients for p in block.parameters):
            return None
        # a derivative of the model may depend on a weight and not on the bias
        gradients = [self.gradients[p] if p in self.gradients else torch.zeros_like(p) for p in block.parameters]
        if self.recorder is not None and self.recorder.shards and any(gradient.is_meta for gradient in gradients):
            raise StepError(
                f"the gradient of a parameter of shape {tuple(block.parameters[0].shape)} was not kept: it is sharded, "
                "and was read off its layer's runs in one micro-batch and not in another"
            )
        return wide(matrix_of(block, gradients))

    def block_gradients(self, read: Collection[nn.Parameter] = frozenset()) -> dict[Block, Tensor]:
        """The same of every block that has one and no parameter in ``read``."""
        unread = [block for block in self.blocks() if not any(p in read for p in block.parameters)]
        return {block: g for block in unread if (g := self.gradient(block)) is not None}

    def coupled(self) -> bool:
        """Whether layers see one another: while samples are mixed, columns are not those of single samples."""
        if not self.feedback or self.recorder is None:
            return self.feedback
        # a rank without samples has no pass, and has to say what the others say
        modules = self.passes[0].conditions.modules if self.passes else every_module(self.recorder.model)
        return not any(map(mixes_samples, modules))

    def blocks(self) -> list[Block]:
        """All there are."""
        return self.network.blocks()


@dataclass
class Outcome:
    """What a step leaves: weights are moved already, everything else is here to be committed.

    Args:
        states: new state by a block's first parameter.
        figures: compute diagnostics by stage, if they are asked for.
        actual_decrease: of the loss on the same batch, where a criterion is known.
        failures: factorisations of the value's curvature that had to be tried again.
        clip: what the gradients were multiplied by after the backward pass.
        units: what was asked of every sample, where the step had to settle it.
        samples: of the step, on all ranks.
        refused: layers whose rule failed or that were not seen to run, with the reason.
    """

    states: dict[nn.Parameter, State] = field(default_factory=dict)
    figures: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)
    actual_decrease: Tensor | None = None
    failures: int = 0
    clip: float = 1.0
    units: Units | None = None
    samples: int = 0
    refused: dict[str, str] = field(default_factory=dict)
