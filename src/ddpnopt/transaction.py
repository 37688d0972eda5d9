"""All or nothing: a step that fails leaves weights as they were."""

from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from .errors import StepError


class Transaction:
    """Context manager: on any exception inside, every parameter gets the values it had on entry.

    Curvature states and momentum are replaced, never written into, so dropping the new ones undoes them. It can be
    entered once per step; the room for the values is kept, since asking the system for it anew takes longer than
    copying.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = parameters
        self._before: list[Tensor] = []

    def __enter__(self) -> "Transaction":
        now = [p.detach() for p in self._parameters.values()]
        if all(_alike(kept, p) for kept, p in zip(self._before, now, strict=False)) and len(self._before) == len(now):
            torch._foreach_copy_(self._before, now) if now else None
        else:
            self._before = [p.clone() for p in now]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with torch.no_grad():
                for parameter, before in zip(self._parameters.values(), self._before, strict=True):
                    parameter.copy_(before)

    def check(self) -> None:
        """Raise :class:`StepError`, naming the parameter, unless every new weight is finite."""
        names, parameters = list(self._parameters), [p.detach() for p in self._parameters.values()]
        if not parameters or _all_finite(parameters):
            return
        bad = next(n for n, p in zip(names, parameters, strict=True) if not _all_finite([p]))
        raise StepError(
            f"the update of {bad} is not finite (nan or inf in the loss, a gradient or the curvature); weights and "
            f"optimizer state are unchanged. Check this batch, or skip it"
        )


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    # one number per tensor, one transfer for all; a sum that is finite has no entry that is not
    sums = torch.stack([t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).double() for t in tensors])
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(t).all()) for t in tensors)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
