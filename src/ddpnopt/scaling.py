"""What the loss was multiplied by before its backward pass: as a GradScaler says, or read off the gradients."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import StepError
from .linearise import columns_of, linearise
from .network import Network, matrix_of
from .passes import Pass
from .terminal import Gradient, Reduction
from .trajectory import Recorder


def told_scale(optimizer: torch.optim.Optimizer, closure: object) -> float | None:
    """What a GradScaler says it has multiplied the loss by; ``None`` after ``scaler.unscale_``: it does not say.

    Raises:
        StepError: if there is a closure as well: torch's scalers do not scale its loss.
    """
    if not hasattr(optimizer, "found_inf"):
        return 1.0
    if closure is not None:
        raise StepError("with a GradScaler call scaler.step(optimizer) without a closure, after the backward pass")
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return None if scale is None else float(scale)


def found_scale(
    network: Network,
    passes: Sequence[Pass],
    recorder: Recorder,
    gradients: Mapping[nn.Parameter, Tensor],
    reduction: Reduction,
) -> float:
    """The one number by which every layer's recorded gradient exceeds the one its parameters now hold.

    ``scaler.unscale_(optimizer)`` divides ``.grad`` by the scale and keeps it to itself, while the recorded columns
    still carry it. If ``.grad`` was then multiplied by a common factor ``c`` (``clip_grad_norm_``), the quotient is
    ``scale / c``: columns divided by it are those of ``c`` times the loss.

    Raises:
        StepError: if the layers' gradients were changed by different factors, so that there is no such number.
    """
    pairs: list[tuple[str, Tensor, Tensor]] = []
    with recorder.paused():
        linearised, end = linearise(passes, Gradient(reduction), recorder, None, 0)
        for layer in network.layers:
            for block, columns in zip(layer.blocks, columns_of(layer, linearised) or (), strict=False):
                if all(p in gradients for p in block.parameters):
                    held = matrix_of(block, [gradients[p] for p in block.parameters]).double()
                    pairs.append((layer.name, held, columns.weighted(end.weight * end.a).double()))
    square = sum(float(recorded.square().sum()) for _, _, recorded in pairs)
    quotient = sum(float((held * recorded).sum()) for _, held, recorded in pairs) / square if square > 0 else 1.0
    rounding = max(
        1e-4, *(10 * torch.finfo(c.dtype).eps for p in passes for run in p.runs for c in _given(run.cotangents))
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
