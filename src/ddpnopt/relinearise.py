"""A stage's policy at the state that the rollout meets there, instead of the one it was linearised at."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .bellman import StagePolicy, relinearised
from .conditions import Conditions
from .errors import StepError
from .layers import Block, Call
from .linearise import Linearised
from .network import Layer
from .trajectory import Recorder


def met(
    recorder: Recorder,
    linearised: Sequence[Linearised],
    layer: Layer,
    blocks: Sequence[Block],
    nominal: StagePolicy,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> StagePolicy:
    """The policy of a stage of one layer, solved again for the inputs that the layer is about to run on.

    Args:
        recorder: of the model, in the middle of its rollout.
        linearised: the passes, with the columns at the layer's output; these stay.
        layer: the stage's only one. One that ran several times in a pass, or shares a parameter with another layer,
            keeps its nominal policy.
        blocks: of the layer, those that move; their weights have not yet.
        nominal: the policy around the nominal state.
        args, kwargs: the layer's inputs now, the samples of all passes side by side.

    Raises:
        StepError: if the layer's rule fails on the new inputs.
    """
    runs = [[run for run in one.recorded.runs if run.layer is layer.module] for one in linearised]
    if any(len(own) != 1 for own in runs) or not set(blocks) <= set(layer.blocks):
        return nominal
    dims = runs[0][0].dims
    by_output = zip(dims, *(run.cotangents for (run,) in runs), strict=True)
    if dims[0] and layer.rule.positionwise(layer.module):
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.movedim(dims[0], 0), (args, kwargs))
    cotangents = [_side_by_side(linearised, own, dim) for dim, *own in by_output]
    if all(cotangent is None for cotangent in cotangents):
        return nominal  # in some pass the loss does not go through the layer's output
    call = Call(args, kwargs, cotangents)
    # what a rule draws or counts by calling the module is not part of the rollout
    conditions = Conditions.now(recorder.model, linearised[0].recorded.conditions.autocast[0])
    with recorder.paused(), conditions.restored(recorder.model):
        try:
            columns = layer.rule.columns(layer.module, blocks, call)
        except RuntimeError as error:
            name = f"{layer.name}, {type(layer.module).__name__}"
            raise StepError(f"Batch(relinearise=True): {name} fails in the rollout ({error}); use 'batch'") from error
    return relinearised(nominal, columns)


def _side_by_side(linearised: Sequence[Linearised], cotangents: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """Columns ``[R, B, ...]`` of all passes' samples; ``None`` if they do not reach this output in every pass."""
    present = [one.columns(c, dim) for one, c in zip(linearised, cotangents, strict=True) if c is not None]
    return torch.cat(present, 1) if len(present) == len(linearised) else None
