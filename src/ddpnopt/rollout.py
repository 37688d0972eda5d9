"""The second forward pass: every stage answers to how far the stages before it have moved its input."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bellman import StagePolicy
from .linearise import Linearised
from .network import Stage
from .trajectory import Recorder

Apply = Callable[[Stage, Tensor, Tensor | None], None]


def forward_pass(
    recorder: Recorder, linearised: Linearised | None, policies: Mapping[Stage, StagePolicy], apply: Apply
) -> Any:
    """Run the model again, moving each stage's weights just before it runs; returns the model's new output.

    Args:
        recorder: runs the model again.
        linearised: the nominal pass and its columns; ``None``: no second pass, every stage moves open loop.
        policies: of the stages that move.
        apply: called as ``apply(stage, weights [R, B], r [R, B] or None)``; moves the stage's weights.
    """
    left = {stage.module: stage for stage in policies}
    output = None
    if linearised is not None:

        def before_stage(module: nn.Module, inputs: list[Tensor]) -> None:
            if module in left:
                stage = left.pop(module)
                r = linearised.deviation(module, inputs, stage.name)
                apply(stage, policies[stage].policy.weights(r), r)

        output = recorder.replay(linearised.recorded, before_stage)
    with torch.no_grad():
        for stage in left.values():
            apply(stage, policies[stage].policy.weights(None), None)
    return output
