"""Build the optimizer that a run's settings ask for."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

import ddpnopt
from ddpnopt.experiments.config import CurvatureName, TrainConfig

_Curvature = ddpnopt.Identity | ddpnopt.Adaptive | ddpnopt.Kronecker | ddpnopt.EigenKronecker
_Terminal = ddpnopt.Gradient | ddpnopt.Matched | ddpnopt.Exact | ddpnopt.Sampled

_CURVATURES: Mapping[CurvatureName, Callable[[], _Curvature]] = {
    "identity": ddpnopt.Identity,
    "adaptive": ddpnopt.Adaptive,
    "kronecker": ddpnopt.Kronecker,
    "eigen-kronecker": ddpnopt.EigenKronecker,
}


def build(config: TrainConfig, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer.

    Args:
        config: settings in which every default is filled in (see :func:`ddpnopt.experiments.config.resolve`).
        model: the network to train.
        criterion: the very loss module that the training loop calls.
    """
    if config.optimizer == "ddpnopt":
        return _ddpnopt(config, model, criterion)
    lr, momentum, decay = _filled(config.lr), _filled(config.momentum), _filled(config.weight_decay)
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
        case "rmsprop":
            return torch.optim.RMSprop(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay)


def reads_gradients(config: TrainConfig) -> bool:
    """Whether the optimizer reads ``.grad``, which on several ranks then has to be the whole batch's."""
    adapted = config.coupling == "sample" and not config.feedback and config.curvature in ("identity", "adaptive")
    return config.optimizer != "ddpnopt" or adapted


def _ddpnopt(config: TrainConfig, model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    curvature = _CURVATURES[config.curvature]()
    if config.damping is not None:
        curvature = replace(curvature, damping=config.damping)
    return ddpnopt.DDPNOpt(
        model,
        lr=_filled(config.lr),
        curvature=curvature,
        terminal=_terminal(config, criterion),
        coupling=ddpnopt.Batch(relinearise=True) if config.coupling == "relinearised" else config.coupling,
        feedback=config.feedback,
        momentum=_filled(config.momentum),
        weight_decay=_filled(config.weight_decay),
    )


def _terminal(config: TrainConfig, criterion: nn.Module) -> _Terminal:
    match config.terminal:
        case "gradient":
            return ddpnopt.Gradient()
        case "matched":
            return ddpnopt.Matched(criterion)
        case "exact":
            return ddpnopt.Exact(criterion)
        case "sampled":
            return ddpnopt.Sampled(criterion, columns=config.columns)


def _filled(value: float | None) -> float:
    if value is None:
        raise ValueError("settings with None in them; call resolve first")
    return value
