"""All or nothing: a step that fails leaves weights as they were, and one that met nan or inf says where."""

from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from .curvature.base import State
from .errors import NonFiniteError, StepError
from .finite import all_finite, first_not_finite
from .passes import Pass
from .sharded import Shards


class Transaction:
    """Context manager: on any exception inside, every parameter gets the values it had on entry.

    Curvature states and momentum are replaced, never written into, so dropping the new ones undoes them.

    Args:
        parameters: by name.
        model, passes, gradients: what the step works on (``None`` and empty for bare parameters). An exception inside
            is the fault of a number that is not finite if it says so itself, or if it is no :class:`StepError` and
            these hold such a number (a factorisation gives up, or the model refuses its input): it leaves as a
            :class:`NonFiniteError` that names the first layer concerned, or the parameter.
        room: where the values on entry are kept from step to step: asking the system for it anew takes longer than
            copying.
        shards: of the model. Pieces of parameters are not written into before the step is known to have gone well.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        model: nn.Module | None,
        passes: Sequence[Pass],
        gradients: Mapping[nn.Parameter, Tensor],
        room: list[Tensor],
        shards: Shards,
    ):
        self._parameters = parameters
        self._model = model
        self._passes = passes
        self._gradients = gradients
        self._before = room
        self._shards = shards
        self._written = [p for p in parameters.values() if p not in shards]

    def __enter__(self) -> "Transaction":
        now: list[Tensor] = list(self._written)
        if len(self._before) == len(now) and all(map(_alike, self._before, now)):
            torch._foreach_copy_(self._before, now) if now else None
        else:
            self._before[:] = [p.detach().clone() for p in now]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with torch.no_grad():
                for parameter, before in zip(self._written, self._before, strict=True):
                    parameter.copy_(before)
        of_numbers = isinstance(error, NonFiniteError)
        if not isinstance(error, Exception) or (isinstance(error, StepError) and not of_numbers):
            return
        where = self._culprit()
        if where is not None or of_numbers:
            said = [str(error)] if of_numbers else []
            raise NonFiniteError(
                f"{': '.join([*said, where] if where else said)} (nan or inf); weights and optimizer state are "
                f"unchanged. Check this batch, or make the optimizer with on_nonfinite='skip' to leave such steps out"
            ) from error

    def _culprit(self) -> str | None:
        if self._model is not None and (where := first_not_finite(self._model, self._passes)) is not None:
            return where
        known = {n: self._gradients[p] for n, p in self._parameters.items() if p in self._gradients}
        spoiled = (n for n, gradient in known.items() if not gradient.is_meta and not all_finite([gradient]))
        return next((f"the gradient of {name} is not finite" for name in spoiled), None)

    def check(self, states: Mapping[nn.Parameter, State], before: Mapping[Tensor, State]) -> None:
        """Raise :class:`NonFiniteError`, naming the parameter, unless weights and what is new in states are finite."""
        held = self._shards.held
        weights = [held.get(p, p) for p in self._parameters.values()]
        new = [t for p, state in states.items() for t in _tensors(state, before.get(p, {}))]
        if all_finite([*weights, *new]):
            return
        for name, parameter in self._parameters.items():
            curvature = _tensors(states.get(parameter, {}), {})
            for what, tensors in (("update", [held.get(parameter, parameter).detach()]), ("curvature", curvature)):
                if not all_finite(tensors):
                    raise NonFiniteError(f"the {what} of {name} is not finite")


def _tensors(state: State, before: State) -> list[Tensor]:
    return [value for name, value in state.items() if isinstance(value, Tensor) and value is not before.get(name)]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
