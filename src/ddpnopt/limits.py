"""Control limits: how much of a layer's weights one step may change.

The quadratic model of the loss knows the network to first order in its weights. A layer that changes by a large part of
itself is another layer, of which the model knows nothing. Steps are bounded by what they ask of the outputs and by
``M``, a mean over the past; where gradients have been tiny, on a plateau at the start say, and grow within a few steps,
that mean is far too small, and layers would change several times over.

    |du| <= limit * max(|u|, sqrt(out / 3))

in Frobenius norms, ``u`` a layer's weights ``[out, fan_in]``, its bias among them. ``sqrt(out / 3)`` is the length of
weights as torch draws them, uniform in ``+-1 / sqrt(fan_in)``, so that weights that begin at zero can leave it. The
layers behind one that is held meet its true output in the second forward pass, and answer to that. Adaptive gradient
clipping (Brock et al. 2021, arXiv 2102.06171) bounds gradients by the weights' length alike; this bounds the update.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def held(direction: Tensor, control: Sequence[Tensor], lr: float, limit: float) -> Tensor:
    """The direction, shortened where ``-lr`` times it would change the control by more than its limit.

    Args:
        direction: ``[out, fan_in]``; written into.
        control: the parameters, each as a matrix, ``[out, fan_in]`` side by side.
        lr: what the direction is multiplied by.
        limit: largest length of a change over the control's own; ``math.inf`` for none.
    """
    if limit == math.inf or not lr:
        return direction
    change = lr * torch.linalg.vector_norm(direction)
    drawn = math.sqrt(len(control[0]) / 3)
    on_host = change.device.type == "cpu"  # elsewhere a comparison would wait for the device
    if on_host and change <= limit * drawn:  # nearly always: the control's own length need not be known
        return direction
    ratio = limit * _length(control).clamp(min=drawn).to(change.dtype) / change
    if on_host and ratio >= 1:
        return direction
    return direction.mul_(ratio.clamp(max=1))


def _length(control: Sequence[Tensor]) -> Tensor:
    dtype = torch.promote_types(control[0].dtype, torch.float32)
    parts = [torch.linalg.vector_norm(part, dtype=dtype) for part in control]
    return torch.linalg.vector_norm(torch.stack(parts))  # type: ignore[no-any-return]
