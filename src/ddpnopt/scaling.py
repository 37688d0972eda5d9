"""What the loss was multiplied by before its backward pass: as a GradScaler says, or read off the columns."""

import torch
from torch import Tensor

from .clipping import NO_SCALE
from .errors import StepError
from .reading import read_all
from .stage_cost import rounding
from .task import Task
from .terminal import Gradient


def told_scale(optimizer: torch.optim.Optimizer, closure: object, *, sharded: bool) -> float | None:
    """What a GradScaler says it has multiplied the loss by; ``None`` after ``scaler.unscale_``: it does not say.

    Raises:
        StepError: if there is a closure as well: torch's scalers do not scale its loss. Or if it does not say, and
            the gradients it has changed are pieces (``sharded``), not those that the scale would be read off.
    """
    if not hasattr(optimizer, "found_inf"):
        return 1.0
    if closure is not None:
        raise StepError("with a GradScaler call scaler.step(optimizer) without a closure, after the backward pass")
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None and sharded:
        raise StepError("the model is sharded (fully_shard): leave out scaler.unscale_, so that the scale is told")
    return None if scale is None else float(scale)


def found_scale(task: Task) -> float:
    """The one number by which every layer's recorded gradient exceeds the one its parameters now hold.

    Args:
        task: the step's, with ``loss_scale=1``: its columns as they were recorded, where the loss was scaled.

    Raises:
        StepError: if there is no such number.
    """
    linearised, end = task.linearised(Gradient(task.terminal.reduction))
    pairs = [
        (held.double(), columns.weighted(end.weight * end.a).double())
        for block, columns in read_all(task, linearised)
        if (held := task.gradient(block)) is not None
    ]
    square = sum(float(recorded.square().sum()) for _, recorded in pairs)
    quotient = sum(float((held * recorded).sum()) for held, recorded in pairs) / square if square > 0 else 1.0
    noise = rounding(task.passes)
    apart = (float((held - quotient * recorded).norm()) > noise * float(held.norm()) for held, recorded in pairs)
    if quotient <= 0 or any(apart):
        raise StepError(NO_SCALE)
    return 1 / quotient
