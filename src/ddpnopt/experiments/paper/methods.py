"""The optimizers of the paper's tables under one name each, with the values a search tries for each.

Every search tries :data:`BUDGET` combinations, whatever the method: eight learning rates, or four of them and two
values of the method's second hyper-parameter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

import ddpnopt
from ddpnopt.baselines import EKFAC, EMSA

BUDGET = 8

Params = Mapping[str, float]
Family = Literal["standard", "control", "published", "batch"]
_SGD = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_ADAPTIVE = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_KRONECKER = {"lr": (0.01, 0.03, 0.1, 0.3), "damping": (0.03, 0.3)}


@dataclass(frozen=True)
class Setup:
    """What an optimizer is to train.

    Attributes:
        model: the network.
        criterion: the loss module that the training loop calls; mean over the batch.
        batch_size: samples per step.
        weight_decay: for DDPNOpt and its rivals from control the stage cost.
    """

    model: nn.Module
    criterion: nn.Module
    batch_size: int
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Method:
    """An optimizer as it is compared.

    Attributes:
        label: its name in tables.
        family: ``"standard"`` (first and second order, no control), ``"control"`` (the paper's rivals from optimal
            control), ``"published"`` (DDPNOpt as in the paper, a policy per sample) or ``"batch"`` (the joint batch).
        grid: values a search tries, by hyper-parameter.
        build: makes it from hyper-parameters.
        open_loop: name of the method it equals without feedback; None for one that has none.
    """

    label: str
    family: Family
    grid: Mapping[str, tuple[float, ...]]
    build: Callable[[Setup, Params], torch.optim.Optimizer]
    open_loop: str | None = None


def _sgd(setup: Setup, params: Params) -> torch.optim.Optimizer:
    momentum = params.get("momentum", 0.9)
    return torch.optim.SGD(
        setup.model.parameters(), lr=params["lr"], momentum=momentum, weight_decay=setup.weight_decay
    )


def _rmsprop(setup: Setup, params: Params) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(setup.model.parameters(), lr=params["lr"], weight_decay=setup.weight_decay)


def _adam(setup: Setup, params: Params) -> torch.optim.Optimizer:
    return torch.optim.Adam(setup.model.parameters(), lr=params["lr"], weight_decay=setup.weight_decay)


def _ekfac(setup: Setup, params: Params) -> torch.optim.Optimizer:
    return EKFAC(setup.model, params["lr"], damping=params["damping"], weight_decay=setup.weight_decay)


def _emsa(setup: Setup, params: Params) -> torch.optim.Optimizer:
    return EMSA(setup.model, params["lr"], rho=params["rho"], weight_decay=setup.weight_decay)


def _vanilla(setup: Setup, params: Params) -> torch.optim.Optimizer:
    """Vanilla DDP in the joint batch's own coordinates: the step of ``VanillaDDP(damping=0)``, at its exact Q_uu."""
    curvature, terminal = ddpnopt.Identity(damping=params["damping"]), ddpnopt.Exact(setup.criterion)
    return ddpnopt.DDPNOpt(
        setup.model,
        params["lr"],
        curvature=curvature,
        terminal=terminal,
        momentum=0.0,
        weight_decay=setup.weight_decay,
        decoupled_weight_decay=False,
    )


def _batch(setup: Setup, params: Params) -> torch.optim.Optimizer:
    return ddpnopt.DDPNOpt(
        setup.model,
        params["lr"],
        curvature=ddpnopt.Kronecker(damping=params["damping"]),
        feedback=bool(params.get("feedback", 1.0)),
        momentum=0.0,
        weight_decay=setup.weight_decay,
        decoupled_weight_decay=False,
    )


def _published(
    curvature: Callable[..., Any], reduction: Literal["mean", "sum"]
) -> Callable[[Setup, Params], torch.optim.Optimizer]:
    """The paper's Algorithm 3; ``reduction`` says how a sample's own value relates to the loss, which is a mean.

    ``"mean"``: each sample's value function is that of its own loss, and policies are averaged. ``"sum"``: it is
    that of its share, 1/B, of the mean loss, which is what back-propagation of the mean hands to each sample, and
    policies are added up. Without feedback both are the same optimizer: a curvature made of
    squares of the samples' gradients is B^2 times smaller for shares, and so are, here, damping and learning rate.
    """

    def build(setup: Setup, params: Params) -> torch.optim.Optimizer:
        scale = setup.batch_size**2 if curvature is ddpnopt.EigenKronecker and reduction == "sum" else 1
        return ddpnopt.DDPNOpt(
            setup.model,
            params["lr"] / scale,
            curvature=curvature(**{"damping": params["damping"] / scale} if "damping" in params else {}),
            terminal=ddpnopt.Gradient(reduction=reduction),
            coupling="sample",
            feedback=bool(params.get("feedback", 1.0)),
            momentum=params.get("momentum", 0.0),
            weight_decay=setup.weight_decay,
        )

    return build


def _readings() -> Iterator[tuple[str, Method]]:
    curvatures: tuple[tuple[str, str, Callable[..., Any], Mapping[str, tuple[float, ...]]], ...] = (
        ("sgd", "SGD", ddpnopt.Identity, {"lr": _SGD}),
        ("rmsprop", "RMSprop", ddpnopt.Adaptive, {"lr": _ADAPTIVE}),
        ("ekfac", "EKFAC", ddpnopt.EigenKronecker, _KRONECKER),
    )
    for name, words, curvature, grid in curvatures:
        own = f"DDPNOpt as published, M of {words}, each sample's own loss"
        yield f"own-{name}", Method(own, "published", grid, _published(curvature, "mean"), name)
    for name, words, curvature, grid in curvatures:
        share = f"DDPNOpt as published, M of {words}, each sample's share of the mean"
        yield f"share-{name}", Method(share, "published", grid, _published(curvature, "sum"), name)


METHODS: Mapping[str, Method] = {
    "sgd": Method("SGD, momentum 0.9", "standard", {"lr": _SGD}, _sgd),
    "rmsprop": Method("RMSprop", "standard", {"lr": _ADAPTIVE}, _rmsprop),
    "adam": Method("Adam", "standard", {"lr": _ADAPTIVE}, _adam),
    "ekfac": Method("EKFAC", "standard", _KRONECKER, _ekfac),
    "emsa": Method("E-MSA", "control", {"lr": (1.0, 0.3), "rho": (0.1, 1.0, 10.0, 100.0)}, _emsa),
    "vanilla": Method("vanilla DDP", "control", {"lr": (0.01, 0.1, 1.0, 10.0), "damping": (0.03, 1.0)}, _vanilla),
    **dict(_readings()),
    "batch": Method(
        "DDPNOpt, exact batch form", "batch", {"lr": (0.03, 0.1, 0.3, 1.0), "damping": (0.03, 0.1)}, _batch
    ),
}
"""Every method by its name in settings and records."""
