"""What the loss was multiplied by before its backward pass: as a GradScaler says, or read off the gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import StepError
from .reading import read_layer, read_tied, without_strays
from .task import Outcome, Task
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

    ``scaler.unscale_(optimizer)`` divides ``.grad`` by the scale and keeps it to itself, while the recorded columns
    still carry it. If ``.grad`` was then multiplied by a common factor ``c`` (``clip_grad_norm_``), the quotient is
    ``scale / c``: columns divided by it are those of ``c`` times the loss.

    Args:
        task: the step's, with ``loss_scale=1``: its columns as they were recorded.

    Raises:
        StepError: if the layers' gradients were changed by different factors, so that there is no such number.
    """
    if not task.passes:
        return 1.0  # a rank without samples
    pairs: list[tuple[str, Tensor, Tensor]] = []
    linearised, end = task.linearised(Gradient(task.terminal.reduction))
    read = []
    for layer in task.network.layers:
        own = read_layer(task, layer, linearised, Outcome())
        read.append((layer.name, without_strays(task, layer, own, linearised, Outcome())))
    read += [(tied.name, read_tied(task, tied, linearised, Outcome())) for tied in task.network.tied]
    for name, (block, columns) in ((name, pair) for name, found in read for pair in found):
        if (held := task.gradient(block)) is not None:
            pairs.append((name, held.double(), columns.weighted(end.weight * end.a).double()))
    square = sum(float(recorded.square().sum()) for _, _, recorded in pairs)
    quotient = sum(float((held * recorded).sum()) for _, held, recorded in pairs) / square if square > 0 else 1.0
    rounding = max(
        1e-4, *(10 * torch.finfo(c.dtype).eps for p in task.passes for run in p.runs for c in _given(run.cotangents))
    )
    for name, held, recorded in pairs:
        if quotient <= 0 or float((held - quotient * recorded).norm()) > rounding * float(held.norm()):
            raise StepError(
                f"after scaler.unscale_(optimizer) the gradients of {name or 'the model'} are not the recorded ones "
                f"times the factor of the other layers, so the scale cannot be told: change all gradients by one "
                f"factor, as clip_grad_norm_ does, or leave out scaler.unscale_"
            )
    return 1 / quotient


def _given(cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    return [c for c in cotangents if c is not None]
