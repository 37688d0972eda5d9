"""The task ``vanishing``: a deep sigmoid network on DIGITS, one loss, one method, one seed (Figure 6 of the paper)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import ddpnopt
from ddpnopt.experiments.data import Dataset, Part
from ddpnopt.experiments.job import own_random_state
from ddpnopt.experiments.paper import networks
from ddpnopt.experiments.paper.losses import MMC
from ddpnopt.experiments.paper.methods import METHODS, Method, Params, Setup
from ddpnopt.experiments.paper.regulariser import regularised
from ddpnopt.experiments.paper.training import batches, loaded
from ddpnopt.experiments.study.task import Result

DATASET, DEPTH, WIDTH, BATCH = "digits", 10, 16, 16
CENTRES = 3.0
"""Norm of the MMC loss's centres. The best constant output then has loss 9, the plateau read off the paper's figure."""
LOSSES = ("mmc", "cross-entropy")

_SGD = {"lr": (0.03, 0.1), "strength": (10.0, 3.0, 1.0)}
_SAMPLE = {"lr": (0.001, 0.01), "damping": (1e-6, 1e-4, 1e-8)}
_DENSE = {"lr": (0.001, 0.003), "damping": (1e-3, 1e-2, 3e-4), "eps": (0.01,)}
_BATCH = {"lr": (0.1, 1.0), "damping": (1e-3, 1e-2, 1e-4)}


def _dense(second_order: bool, setup: Setup, params: Params) -> torch.optim.Optimizer:
    return ddpnopt.DDPNOpt(
        setup.model,
        params["lr"],
        curvature=ddpnopt.EigenKronecker(damping=params["damping"]),
        terminal=ddpnopt.Exact(setup.criterion),
        coupling=ddpnopt.Dense(eps=params["eps"], second_order=second_order),
    )


def _batch_exact(setup: Setup, params: Params) -> torch.optim.Optimizer:
    return ddpnopt.DDPNOpt(
        setup.model,
        params["lr"],
        curvature=ddpnopt.Kronecker(damping=params["damping"]),
        terminal=ddpnopt.Exact(setup.criterion),
        momentum=0.0,
    )


RIVALS: Mapping[str, Method] = {
    "sgd-vgr": Method("SGD-VGR", "standard", _SGD, METHODS["sgd"].build),
    "ekfac": replace(METHODS["ekfac"], grid=_SAMPLE),
    "own": Method("DDPNOpt (own loss)", "published", _SAMPLE, METHODS["own-ekfac"].build, "ekfac"),
    "share": Method("DDPNOpt (share of the mean)", "published", _SAMPLE, METHODS["share-ekfac"].build, "ekfac"),
    "first": Method("DDPNOpt (full V_xx)", "published", _DENSE, partial(_dense, False)),
    "second": Method("DDPNOpt2nd (full V_xx)", "published", _DENSE, partial(_dense, True)),
    "batch": Method("batch form (Gradient)", "batch", _BATCH, METHODS["batch"].build),
    "batch-exact": Method("batch form (Exact)", "batch", _BATCH, _batch_exact),
}
"""The methods compared, with the values a search tries: six combinations each, the same for both losses."""


def plateau(loss: str, classes: int) -> float:
    """Loss of the best constant output, classes being equally frequent: where a network that learns nothing stays."""
    return CENTRES**2 if loss == "mmc" else math.log(classes)


def run(settings: Mapping[str, Any]) -> Result:
    """Train and measure, on one thread.

    Args:
        settings: ``loss`` (of ``LOSSES``), ``method`` (key of ``RIVALS``) and its ``params``; ``steps``; ``seed``,
            on which alone initial weights and order of the samples depend, so that methods are paired; ``block``:
            batches whose losses make one point of the curve.

    Returns:
        ``loss``, ``validation_loss``: mean over the train and the validation part at the end, without the
        regulariser, None where not finite; ``test``: accuracy, 0 to 1; ``norms``: for each layer the median over
        steps of ``|du|``, weight and bias together, None without a step; ``curve``: mean loss of every block;
        ``diverged``: the step at which loss or update was not finite, else None.
    """
    dataset, seed = loaded(DATASET), int(settings["seed"])
    shape, classes = dataset.source.shape, dataset.source.classes
    with own_random_state(seed, threads=1):
        model = networks.seeded(lambda: networks.fcn(shape, WIDTH, classes, "sigmoid", DEPTH), seed)
        criterion = criterion_of(settings["loss"], classes)
        method, params = RIVALS[settings["method"]], settings["params"]
        optimizer = method.build(Setup(model, criterion, BATCH), params)
        losses, norms = _train(
            model, criterion, optimizer, dataset, params.get("strength"), int(settings["steps"]), seed
        )
        loss, _ = evaluate(model, criterion, dataset.train)
        validation_loss, _ = evaluate(model, criterion, dataset.validation)
        return {
            "loss": _strict(loss),
            "validation_loss": _strict(validation_loss),
            "test": round(evaluate(model, criterion, dataset.test)[1], 6),
            "norms": [float(f"{median(layer):.4g}") for layer in zip(*norms, strict=True)] or None,
            "curve": [_strict(math.fsum(part) / len(part)) for part in _blocks(losses, int(settings["block"]))],
            "diverged": None if len(losses) == settings["steps"] else len(losses) + 1,
        }


def criterion_of(loss: str, classes: int) -> nn.Module:
    """The loss module called ``loss``, mean over the batch; ValueError unless it is one of ``LOSSES``."""
    if loss not in LOSSES:
        raise ValueError(f"vanishing: unknown loss {loss!r}; choose one of: {', '.join(LOSSES)}")
    return MMC(classes, C=CENTRES) if loss == "mmc" else nn.CrossEntropyLoss()


def evaluate(model: nn.Module, criterion: nn.Module, part: Part) -> tuple[float, float]:
    """Mean loss and accuracy (0 to 1) over a part, by the loss's own way to predict."""
    with torch.no_grad():
        output = model(part.x)
        predicted = criterion.predict(output) if isinstance(criterion, MMC) else output.argmax(1)
        return float(criterion(output, part.y)), float((predicted == part.y).double().mean())


def stages(model: nn.Sequential) -> list[nn.Sequential]:
    """Each linear layer with what follows it."""
    return [nn.Sequential(*list(model)[start : start + 2]) for start in range(0, len(model), 2)]


def _train(
    model: nn.Sequential,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    strength: float | None,
    steps: int,
    seed: int,
) -> tuple[list[float], list[list[float]]]:
    """Losses and layers' update norms of the steps taken, fewer than asked for if one was not finite."""
    losses: list[float] = []
    norms: list[list[float]] = []
    parts, train = stages(model), dataset.train
    for _, rows in zip(range(steps), batches(len(train), BATCH, seed), strict=False):
        optimizer.zero_grad()
        x, y = train.x[rows], train.y[rows]
        if strength is None:
            objective = loss = criterion(model(x), y)
        else:
            loss, objective = regularised(parts, x, partial(_swapped, criterion, y), strength)
        if not math.isfinite(float(objective.detach())):
            break
        objective.backward()
        before = [[p.detach().clone() for p in part.parameters()] for part in parts]
        try:
            optimizer.step()
        except ValueError as error:  # the step is not finite; weights are as before it
            if isinstance(error, ddpnopt.StepError) or "finite" in str(error):
                break
            raise
        moved = [_distance(old, list(part.parameters())) for old, part in zip(before, parts, strict=True)]
        if not all(map(math.isfinite, moved)):
            break
        losses.append(float(loss.detach()))
        norms.append(moved)
    return losses, norms


def _swapped(criterion: nn.Module, y: Tensor, z: Tensor) -> Tensor:
    loss: Tensor = criterion(z, y)
    return loss


def _distance(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    return math.hypot(*(float((a.detach() - b).norm()) for a, b in zip(new, old, strict=True)))


def _blocks(losses: list[float], size: int) -> Iterator[list[float]]:
    yield from (losses[start : start + size] for start in range(0, len(losses), size))


def _strict(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
