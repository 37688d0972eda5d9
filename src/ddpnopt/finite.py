"""Numbers that are not finite: whether there are any, and, once a step has failed of them, where they came from."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .passes import Pass
from .trees import floating


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every entry is finite: one pass over the tensors, one transfer per device for all of them."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            by_device.setdefault(tensor.device, []).append(tensor)
    return all(_finite_norms(here) or all(bool(torch.isfinite(t).all()) for t in here) for here in by_device.values())


def _finite_norms(tensors: list[Tensor]) -> bool:
    """Whether the sum of all Euclidean norms is: then all entries are; squares of large ones may overflow."""
    # torch's maximum norm takes far longer on a CPU
    norms = torch._foreach_norm(tensors)
    alike = all(norm.dtype == norms[0].dtype for norm in norms)
    return math.isfinite(float(torch.stack(norms if alike else [norm.double() for norm in norms]).sum()))


def first_not_finite(model: nn.Module, passes: Sequence[Pass]) -> str | None:
    """Name the first layer, in running order, whose input is not finite, else whose output's gradient is not.

    ``None`` if all that was recorded of the passes is finite. Inputs come first, since what is not finite in the
    forward pass spoils every gradient after it.
    """
    names = {module: name for name, module in model.named_modules()}

    def said(layer: nn.Module, what: str) -> str:
        return f"{what} of layer {names.get(layer, '')!r} ({type(layer).__name__}) is not finite"

    for one in passes:
        for run in one.runs:
            if not _finite((run.args, run.kwargs)):
                return said(run.layer, "the input")
    for one in passes:
        for run in one.runs:
            if not _finite(run.cotangents):
                at_end = (
                    "" if _finite(one.cotangents) else ", nor is the gradient that the loss sends back to the model"
                )
                return said(run.layer, "the gradient at the output") + at_end
    return None


def _finite(tree: Any) -> bool:
    return all_finite(floating(tree))
