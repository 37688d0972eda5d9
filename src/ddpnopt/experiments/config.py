"""The settings of one run, their defaults, and the checks that they make sense together."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from ddpnopt.coupling import default_numbers
from ddpnopt.experiments import data, models

DatasetArgument = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET", help_behavior_hint="(upper or lower case)")
]
OptimizerName = Literal["ddpnopt", "sgd", "rmsprop", "adam"]
CurvatureName = Literal["identity", "adaptive", "kronecker", "eigen-kronecker"]


@dataclass(frozen=True)
class OptimizerDefaults:
    """What an optimizer uses unless told otherwise.

    Attributes:
        lr: learning rate.
        momentum: momentum, or None for an optimizer that has none.
        grid: learning rates among which a comparison chooses on validation data; half decades.
    """

    lr: float
    momentum: float | None
    grid: tuple[float, ...]


OPTIMIZERS: Mapping[OptimizerName, OptimizerDefaults] = {
    "ddpnopt": OptimizerDefaults(lr=0.1, momentum=0.5, grid=(0.001, 0.01, 0.1, 1.0, 10.0)),
    "sgd": OptimizerDefaults(lr=0.1, momentum=0.9, grid=(0.003, 0.01, 0.03, 0.1, 0.3)),
    "rmsprop": OptimizerDefaults(lr=0.001, momentum=0.0, grid=(0.001, 0.003, 0.01, 0.03, 0.1)),
    "adam": OptimizerDefaults(lr=0.001, momentum=None, grid=(0.001, 0.003, 0.01, 0.03, 0.1)),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers; None stands for a default that depends on other settings."""

    dataset: DatasetArgument = ""
    """wine, iris, digits, digits-images, mnist, fashion-mnist, cifar10, svhn or cifar100; see `ddpnopt data list`."""

    model: data.ModelName | None = None
    """fcn: the paper's 5 dense layers. cnn: a small convolutional network. None: by dataset."""

    optimizer: OptimizerName = "ddpnopt"
    """What trains the network."""

    lr: float | None = None
    """Learning rate. None: ddpnopt 0.1, sgd 0.1, rmsprop 0.001, adam 0.001."""

    momentum: float | None = None
    """Momentum, from 0 to below 1. None: 0.9 for sgd, 0.5 for ddpnopt but with coupling sample, else 0."""

    weight_decay: float | None = None
    """Weight decay; decoupled for ddpnopt but with coupling sample, whose stage cost it is. None: 0.01 where it is
    decoupled, else 0."""

    curvature: CurvatureName = "kronecker"
    """ddpnopt only: the curvature each layer's step is measured in."""

    damping: float | None = None
    """ddpnopt only: damping of the curvature. None: the curvature's own default."""

    coupling: Literal["batch", "relinearised", "sample"] = "batch"
    """ddpnopt only: batch: the exact joint problem. relinearised: each layer solves it again at the state it meets.
    sample: the paper's mean of one policy per sample."""

    terminal: Literal["gradient", "matched", "exact", "sampled"] = "gradient"
    """ddpnopt only: how the loss's own curvature enters at the output."""

    columns: int = 4
    """ddpnopt only: random columns of the terminal 'sampled'."""

    feedback: bool = True
    """ddpnopt only: whether a layer answers to the change of its input during the second forward pass."""

    batch_size: int | None = None
    """Samples per step. None: 16 for wine, iris and digits, else 128."""

    epochs: int | None = None
    """Passes over the training data. None: 20 for wine and iris, 5 for digits, else 1."""

    seed: int = 0
    """Seed of the initial weights and of the order of the samples (the data split is fixed)."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""

    checkpoint_every: int = 200
    """Steps between two checkpoints."""

    threads: int = 1
    """Threads for tensor operations; one is fastest for networks of this size."""


def resolve(config: TrainConfig) -> TrainConfig:
    """Check the settings and replace every None that has a default (``damping`` may stay None)."""
    name = config.dataset.lower()
    if not name:
        raise ValueError(f"name a dataset: one of {', '.join(data.DATASETS)}")
    source = data.source(name)
    for key in ("optimizer", "curvature", "coupling", "terminal"):
        _check_choice(key, getattr(config, key))
    own, numbers = OPTIMIZERS[config.optimizer], _default_numbers(config)
    resolved = replace(
        config,
        dataset=name,
        model=source.model if config.model is None else config.model,
        lr=own.lr if config.lr is None else float(config.lr),
        momentum=numbers["momentum"] if config.momentum is None else float(config.momentum),
        weight_decay=numbers["weight_decay"] if config.weight_decay is None else float(config.weight_decay),
        batch_size=source.batch_size if config.batch_size is None else config.batch_size,
        epochs=source.epochs if config.epochs is None else config.epochs,
    )
    models.check(str(resolved.model), source)
    _check_numbers(resolved)
    if config.momentum and own.momentum is None:
        raise ValueError(f"{config.optimizer} takes no momentum, but it is {config.momentum}; leave it out")
    if config.optimizer != "ddpnopt":
        _check_untouched(config)
    return resolved


def digest(config: TrainConfig, *more: str) -> str:
    """Return 8 hexadecimal digits that change with any setting, and with any of the strings ``more``."""
    text = json.dumps([asdict(config), *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def from_dict(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Rebuild settings that were written with ``asdict``; ``where`` names their file in an error."""
    known = {field.name for field in fields(TrainConfig)}
    if known != set(values):
        odd = ", ".join(sorted(known.symmetric_difference(values)))
        raise ValueError(f"{where} does not hold the settings of a run: {odd} missing or unknown")
    return resolve(TrainConfig(**values))


_DDPNOPT_ONLY = ("curvature", "damping", "coupling", "terminal", "columns", "feedback")


def _default_numbers(config: TrainConfig) -> Mapping[str, float]:
    if config.optimizer == "ddpnopt":
        return default_numbers("sample" if config.coupling == "sample" else "batch")
    return {"momentum": OPTIMIZERS[config.optimizer].momentum or 0.0, "weight_decay": 0.0}


def _check_untouched(config: TrainConfig) -> None:
    defaults = TrainConfig()
    for key in _DDPNOPT_ONLY:
        if getattr(config, key) != getattr(defaults, key):
            raise ValueError(
                f"{key} {getattr(config, key)!r} has no meaning for optimizer {config.optimizer!r}; "
                "leave it out or take optimizer 'ddpnopt'"
            )


def _check_choice(key: str, value: object) -> None:
    options = get_args(get_type_hints(TrainConfig)[key])
    if value not in options:
        raise ValueError(f"unknown {key} {value!r}; choose one of: {', '.join(options)}")


def _check_numbers(config: TrainConfig) -> None:
    rules: tuple[tuple[str, Callable[[float], bool], str], ...] = (
        ("lr", lambda v: v > 0, "above 0"),
        ("momentum", lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ("weight_decay", lambda v: v >= 0, "at least 0"),
        ("damping", lambda v: v >= 0, "at least 0"),
        ("columns", lambda v: v >= 1, "at least 1"),
        ("batch_size", lambda v: v >= 1, "at least 1"),
        ("epochs", lambda v: v >= 1, "at least 1"),
        ("seed", lambda v: 0 <= v < 2**63, "at least 0 and below 2**63"),
        ("log_every", lambda v: v >= 1, "at least 1"),
        ("checkpoint_every", lambda v: v >= 1, "at least 1"),
        ("threads", lambda v: v >= 1, "at least 1"),
    )
    for key, valid, wanted in rules:
        value = getattr(config, key)
        if value is not None and not (math.isfinite(value) and valid(value)):
            raise ValueError(f"{key} must be {wanted}, but it is {value}")
