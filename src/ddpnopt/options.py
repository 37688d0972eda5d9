"""What the optimizer accepts; each refusal names the value and says what to give instead."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .coupling import Batch, Coupling, relinearises
from .curvature import Curvature
from .dense import Dense, chain_of
from .terminal import Terminal


def check_numbers(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a parameter group's ``lr``, ``momentum`` and ``weight_decay`` are in range."""
    ranges = {"lr": "a step size >= 0 such as 0.1", "momentum": "a number in [0, 1)", "weight_decay": "a number >= 0"}
    for name, wanted in ranges.items():
        given = group[name]
        if not isinstance(given, int | float | Tensor) or (isinstance(given, Tensor) and given.numel() != 1):
            raise ValueError(f"Invalid {name}: {given!r}; give {wanted}")
        value = float(given)
        if not (math.isfinite(value) and value >= 0 and (name != "momentum" or value < 1)):
            raise ValueError(f"Invalid {name}: {given!r}; give {wanted}")


def check_chain(model: object) -> None:
    """Raise ``ValueError`` unless ``Dense`` can take the model."""
    chain_of(model)


def check_stages(coupling: Coupling, stages: object) -> None:
    """Raise ``ValueError`` if ``stages`` are given to a coupling of which every layer is a stage."""
    if stages is not None and (isinstance(coupling, Dense) or relinearises(coupling)):
        raise ValueError(f"stages: coupling={coupling!r} makes every layer a stage; leave stages out, or use 'batch'")


def check_options(curvature: object, terminal: object, coupling: object, feedback: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless each option is a value of its kind."""
    if not isinstance(curvature, Curvature):
        raise TypeError(f"curvature must be Kronecker(), EigenKronecker(), Adaptive() or Identity(), got {curvature!r}")
    if not isinstance(terminal, Terminal):
        raise TypeError(f"terminal must be Gradient(), Matched(...), Exact(...) or Sampled(...), got {terminal!r}")
    if not isinstance(coupling, Batch | Dense) and coupling not in ("batch", "sample"):
        raise ValueError(
            "coupling must be 'batch' (the joint problem), 'sample' (the paper's form), Batch(...) or Dense(...), "
            f"got {coupling!r}"
        )
    if not isinstance(feedback, bool):
        raise TypeError(f"feedback must be True or False, got {feedback!r}")
