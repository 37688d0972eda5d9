"""What a GradScaler says it has multiplied the loss by before its backward pass."""

import torch
from torch import Tensor

from .errors import StepError


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
