"""The second forward pass: every stage answers to how far the stages before it have moved its input."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bellman import StagePolicy
from .linearise import Linearised
from .network import Stage
from .trajectory import Recorder

Apply = Callable[[Stage, StagePolicy, Tensor], None]
Meet = Callable[[Stage, tuple[Any, ...], Mapping[str, Any]], StagePolicy]


def forward_pass(
    recorder: Recorder,
    linearised: Linearised | None,
    policies: Mapping[Stage, StagePolicy],
    apply: Apply,
    meet: Meet | None = None,
) -> Any:
    """Run the model again, moving each stage's weights just before it runs; returns the model's new output.

    Args:
        recorder: runs the model again.
        linearised: the nominal pass and its columns; ``None``: no second pass, every stage moves open loop.
        policies: of the stages that move.
        apply: called as ``apply(stage, policy, weights [R, B])``; moves the stage's weights.
        meet: called as ``meet(stage, args, kwargs)`` before a stage whose input has moved; gives the policy to follow
            instead.
    """
    left = {stage.module: stage for stage in policies}
    output = None
    if linearised is not None:
        device = linearised.recorded.conditions.autocast[0]

        def before_stage(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in left:
                stage = left.pop(module)
                policy = policies[stage]
                with torch.autocast(device, enabled=False):  # it is for the model: steps keep their precision
                    r = linearised.deviation(module, recorder.state((args, kwargs)), stage.name)
                    if meet is not None and r is not None:
                        policy = meet(stage, args, kwargs)
                    apply(stage, policy, policy.policy.weights(r))

        output = recorder.replay(linearised.recorded, before_stage)
    with torch.no_grad():
        for stage in left.values():
            apply(stage, policies[stage], policies[stage].policy.weights(None))
    return output
