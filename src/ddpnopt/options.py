"""What the optimizer accepts; each refusal names the value and says what to give instead."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .coupling import Batch, Coupling, is_joint, relinearises
from .curvature import Curvature
from .dense import Dense, chain_of
from .errors import StepError
from .sharded import ALONE, LAYER, Shards, is_piece
from .terminal import Terminal

OnNonfinite = Literal["raise", "skip"]


def check_numbers(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a parameter group's numbers are in range and its decay is decoupled or not."""
    ranges = {"lr": "a step size >= 0 such as 0.1", "momentum": "a number in [0, 1)", "weight_decay": "a number >= 0"}
    limit = group["max_change"]
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit > 0:
        raise ValueError(f"Invalid max_change: {limit!r}; give a part of the weights such as 0.3, or math.inf for none")
    for name, wanted in ranges.items():
        given = group[name]
        if isinstance(given, Tensor) and given.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(given.shape)}; give {wanted}")
        if not isinstance(given, int | float | Tensor):
            raise ValueError(f"Invalid {name}: {given!r}; give {wanted}")
        value = float(given)
        if not (math.isfinite(value) and value >= 0 and (name != "momentum" or value < 1)):
            raise ValueError(f"Invalid {name}: {given!r}; give {wanted}")
    if not isinstance(given := group["decoupled_weight_decay"], bool):
        raise ValueError(f"Invalid decoupled_weight_decay: {given!r}; give True or False")


def check_limit(group: Mapping[str, Any], coupling: Coupling) -> None:
    """Raise ``ValueError`` for a control limit in a form that has none."""
    if group["max_change"] != math.inf and not is_joint(coupling):
        raise ValueError(
            f"max_change={group['max_change']!r}: coupling={coupling!r} has no limit of this kind, since it is to "
            "coincide with published forms; leave it out, or use coupling='batch'"
        )


def check_group(group: Mapping[str, Any], model: nn.Module | None, shards: Shards) -> None:
    """Raise ``ValueError`` where a group asks for what there is not: to maximise, complex or sharded parameters."""
    if group.get("maximize"):
        raise ValueError("maximize: there is no such option; call backward on the negative of the objective")
    for name, parameter in named(group["params"], [group], model).items():
        if is_piece(parameter) and parameter not in shards:
            way = (
                "give the optimizer the module itself"
                if model is None
                else f"shard it by fully_shard alone, or {ALONE}, whose ranks share the batch"
            )
            raise ValueError(f"{name} is sharded over ranks (a DTensor), {LAYER}: {way}")
        if parameter.is_complex() or parameter.layout is not torch.strided:
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)} is "
                f"{parameter.dtype if parameter.is_complex() else parameter.layout}: complex and sparse parameters are "
                f"not supported; train a real, dense one in its place (torch.view_as_complex turns it in the model)"
            )


def named(
    parameters: Iterable[nn.Parameter], groups: Iterable[Mapping[str, Any]], model: nn.Module | None
) -> dict[str, nn.Parameter]:
    """Parameters by name, in their order: the model's, else the one given in their group, else their number."""
    known = {p: n for g in groups for n, p in zip(g.get("param_names", ()), g["params"], strict=False)}
    known |= {p: name for name, p in model.named_parameters()} if model is not None else {}
    names: dict[str, nn.Parameter] = {}
    for i, parameter in enumerate(parameters):
        name = known.get(parameter, f"parameter {i}")
        names[f"parameter {i}" if name in names else name] = parameter  # names that are given may be given twice
    return names


def check_chain(model: object) -> None:
    """Raise ``ValueError`` unless ``Dense`` can take the model."""
    chain_of(model)


def check_stages(coupling: Coupling, stages: object) -> None:
    """Raise ``ValueError`` if ``stages`` are given to a coupling of which every layer is a stage."""
    if stages is not None and (isinstance(coupling, Dense) or relinearises(coupling)):
        raise ValueError(f"stages: coupling={coupling!r} makes every layer a stage; leave stages out, or use 'batch'")


def check_several(ranks: int, coupling: Coupling) -> None:
    """Raise :class:`StepError` for a coupling that does not go over several ranks."""
    if isinstance(coupling, Dense) or relinearises(coupling):
        raise StepError(
            f"this process group has {ranks} ranks, and coupling={coupling!r} works in one process only: use "
            "coupling='batch' or coupling='sample', which are exact over the samples of all ranks"
        )


def check_sharded(*, base: bool, columns: bool) -> None:
    """Raise ``ValueError`` where a sharded model's step would read nothing but ``.grad``."""
    if base and not columns:
        raise ValueError(
            "coupling='sample' with feedback=False and this curvature is torch.optim.SGD or torch.optim.RMSprop: on a "
            "sharded model (fully_shard) use these"
        )


def check_options(
    curvature: object, terminal: object, coupling: object, feedback: object, on_nonfinite: object
) -> None:
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
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(
            f"on_nonfinite must be 'raise' (an error) or 'skip' (leave the step out), got {on_nonfinite!r}"
        )
