"""The second forward pass: every stage answers to how far the stages before it have moved the state at its cut."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .bellman import StagePolicy
from .columns import Columns
from .layers import Block
from .linearise import Linearised
from .network import Stage, matrix_of
from .passes import Pass, Place, fronted, signed_sum
from .state import Boundary
from .trajectory import Recorder
from .trees import floating

Apply = Callable[[Stage, StagePolicy, Tensor], None]
Meet = Callable[[Stage, tuple[Any, ...], Mapping[str, Any]], StagePolicy]
Gather = Callable[[Stage, Tensor | None], Tensor | None]
Later = Mapping[nn.Module, Sequence[tuple[Block, Columns]]]
"""By stage, blocks with the columns of their runs after the stage's cut."""


def restore_overwritten(recorded: Pass, recorder: Recorder) -> None:
    """Bring back nominal values of the state that were written into in place, by one more forward pass.

    Later passes keep copies, so that this happens once.
    """
    live = [x for there in recorded.state.live.values() for x in there] if recorded.state is not None else []
    lost = {x.place for x in live if x.value is not None and x.value._version != x.version}
    if not lost:
        return
    recorder.overwritten |= lost
    values: dict[Place, Tensor] = {}

    def at_boundary(boundary: Boundary, passed: Any) -> None:
        for i, tensor in enumerate(floating(passed)):
            if (place := Place(*boundary, i)) in lost:
                values[place] = tensor.clone()

    recorder.replay(recorded, lambda *_: None, at_boundary)
    for x in live:
        if x.place in values:
            x.value, x.version = values[x.place], values[x.place]._version


def forward_pass(
    recorder: Recorder,
    linearised: Linearised | None,
    blocks: Mapping[Stage, Sequence[Block]],
    policies: Mapping[Stage, StagePolicy],
    apply: Apply,
    later: Mapping[Stage, Later],
    meet: Meet | None = None,
    gather: Gather | None = None,
) -> Any:
    """Run the model again, moving each stage's weights just before it runs; returns the model's new output.

    Args:
        recorder: runs the model again.
        linearised: the nominal pass and its columns; ``None``: no second pass, every stage moves open loop.
        blocks: of the stages that move.
        policies: of the same.
        apply: called as ``apply(stage, policy, weights [R, B])``; moves the stage's weights.
        later: of the stages whose layers run again after other stages' cuts.
        meet: called as ``meet(stage, args, kwargs)`` before a stage whose state has moved; gives the policy to follow
            instead.
        gather: called as ``gather(stage, r)`` before each stage, where ranks move together; gives ``r`` of all samples.
    """
    gather = gather or (lambda _, r: r)
    left = {stage.module: stage for stage in policies}
    output = None
    if linearised is not None:
        deviation = _Deviation(linearised, recorder)
        device = linearised.recorded.conditions.autocast[0]

        def before_stage(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in left:
                stage = left.pop(module)
                policy = policies[stage]
                # autocast is for the model: steps keep their precision
                casting = torch.is_autocast_enabled(device)
                with torch.autocast(device, enabled=False) if casting else nullcontext():
                    inputs = [fronted(x, dim) for x, dim in recorder.state(module, (args, kwargs))]
                    r = gather(stage, deviation.at(stage, inputs))
                    if meet is not None and r is not None:
                        policy = meet(stage, args, kwargs)
                    before = _controls(later.get(stage, {}))
                    apply(stage, policy, policy.policy.weights(r))
                    deviation.moved(blocks[stage], later.get(stage, {}), before)

        output = recorder.replay(linearised.recorded, before_stage, deviation.measure)
    with torch.no_grad():
        for stage in left.values():
            apply(stage, policies[stage], policies[stage].policy.weights(gather(stage, None)))
    return output


class _Deviation:
    """``r = P' dx`` of the stages to come: every tensor of a state adds its part the moment it can be measured."""

    def __init__(self, linearised: Linearised, recorder: Recorder):
        self._linearised, self._recorder = linearised, recorder
        self._state = linearised.recorded.state
        self._r: dict[nn.Module, Tensor] = {}
        self._missing: Counter[nn.Module] = Counter()
        self._moved: set[nn.Parameter] = set()
        for there in self._state.live.values() if self._state is not None else ():
            self._missing.update(stage for live in there for stage in live.stages)

    def measure(self, boundary: Boundary, passed: Any) -> None:
        """Add the parts of the tensors that pass a module's boundary now."""
        if self._state is None or boundary not in self._state.live:
            return
        tensors = floating(passed)
        for live in self._state.live[boundary]:
            index = live.place.index
            if index >= len(tensors) or tensors[index].shape != live.shape:
                continue
            self._missing.subtract(live.stages)
            cotangent = signed_sum(self._state.cotangents, live.terms)
            if cotangent is not None and live.product is not None:
                new = fronted(tensors[index], live.dim)
                r = self._linearised.projected(cotangent, new, live.product, live.dim)
                for stage in live.stages:
                    self._add(stage, r)

    def moved(self, blocks: Sequence[Block], later: Later, before: Mapping[Block, Tensor]) -> None:
        """A stage's blocks have moved: their change is part of the state where they are used again."""
        self._moved.update(p for block in blocks for p in block.parameters)
        for stage, pairs in later.items():
            for block, columns in pairs:
                change = matrix_of(block, block.tensors) - before[block]
                self._add(stage, columns.directional(change))

    def at(self, stage: Stage, inputs: list[Tensor]) -> Tensor | None:
        """``r [R, B]`` at a stage's cut; ``None`` if nothing before it moves. ``inputs``: the stage's own, now."""
        reason = self._untraced(stage.module)
        if self._state is not None and reason is None:
            return self._r.get(stage.module)
        if reason is not None and stage.name not in self._recorder.untraced:
            self._recorder.untraced.add(stage.name)
            kind = type(stage.module).__name__
            warnings.warn(
                f"{stage.name}, {kind}: not all of the state before it could be followed ({reason}), so it answers to "
                "the deviation of its own input only; name the blocks with stages= if that is not enough",
                stacklevel=2,
            )
        return self._linearised.deviation(stage.module, inputs, stage.name)

    def _untraced(self, module: nn.Module) -> str | None:
        if self._state is None:
            return None
        if module in self._state.lost:
            return self._state.lost[module]
        if self._missing[module]:
            return "the second forward pass took another way than the first"
        if not self._moved.isdisjoint(self._state.behind.get(module, ())):
            return "it depends on a layer that has moved through a tensor that no module takes or returns"
        return None

    def _add(self, stage: nn.Module, r: Tensor) -> None:
        self._r[stage] = self._r[stage] + r if stage in self._r else r


def _controls(later: Later) -> dict[Block, Tensor]:
    blocks = {block for pairs in later.values() for block, _ in pairs}
    return {block: matrix_of(block, block.tensors).clone() for block in blocks}
