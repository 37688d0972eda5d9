"""All or nothing: a step that fails leaves weights as they were."""

from collections.abc import Iterable, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from .errors import StepError


class Transaction:
    """Context manager: on any exception inside, every parameter gets the values it had on entry.

    Curvature states and momentum are replaced, never written into, so dropping the new ones undoes them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = parameters
        self._before: list[Tensor] = []

    def __enter__(self) -> "Transaction":
        self._before = [p.detach().clone() for p in self._parameters.values()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with torch.no_grad():
                for parameter, before in zip(self._parameters.values(), self._before, strict=True):
                    parameter.copy_(before)
        self._before = []

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


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # one number per tensor, one transfer for all: a sum is finite only if every entry is, short of overflow
    norms = torch._foreach_norm([t for t in tensors], float("inf"))
    return bool(torch.isfinite(torch.stack([n.float() for n in norms])).all())
