"""How each registered method is made for a model; the loops are those of the conformance table."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from _conformance.methods import GradientMaker, GradientsAndClosure, Plain, Trainer, WithClosure
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpnopt import DDPNOpt, Gradient, Kronecker, Matched, Sampled
from ddpnopt.baselines import EKFAC
from ddpnopt.coupling import default_numbers, is_joint
from ddpnopt.task import FIRST
from ddpnopt.units import settled

from .registration import Method


@dataclass(frozen=True)
class Batch:
    """A batch as the loops take it: the interface of the conformance table's problems."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    module: nn.Module

    def output(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.model(*inputs)
        return output

    def criterion(self) -> nn.Module:
        return self.module

    def loss(self) -> Tensor:
        value: Tensor = self.module(self.model(*self.inputs), self.target)
        return value


class LossOnly(Trainer):
    """``optimizer.step(closure)`` with a closure that only computes the loss: DDPNOpt's cheapest form."""

    def step(self, *batches: Any, **_: Any) -> None:
        (batch,) = batches
        self.zero_grad()
        self.optimizers[0].step(batch.loss)


@dataclass(frozen=True)
class AtWork:
    """A method at work on a model, with the learning rates that its groups began with."""

    trainer: Trainer
    scheduled: bool

    def step(self, x: Tensor, y: Tensor, criterion: nn.Module, share: float) -> None:
        """One step at ``share`` of the initial learning rate."""
        for group in self.groups if self.scheduled else ():
            group["lr"] = group.setdefault("first_lr", group["lr"]) * share
        self.trainer.step(Batch(self.trainer.model, (x,), y, criterion))  # type: ignore[arg-type]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all its optimizers."""
        return [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model with the weights that are to be judged: the averaged ones of a schedule-free method."""
        optimizers = [] if self.scheduled else self.trainer.optimizers
        for optimizer in optimizers:
            optimizer.eval()  # type: ignore[attr-defined]
        yield self.trainer.model
        for optimizer in optimizers:
            optimizer.train()  # type: ignore[attr-defined]


def _betas(options: dict[str, Any], first: float, second: float) -> dict[str, Any]:
    """Options with ``beta1`` and ``beta2`` in one pair, as the packages take them."""
    rest = {name: value for name, value in options.items() if name not in ("beta1", "beta2")}
    return {**rest, "betas": (options.get("beta1", first), options.get("beta2", second))}


@dataclass(frozen=True)
class Place:
    """What a method is made for: a network, its loss module, the samples of a step; and the learning rate."""

    model: nn.Module
    criterion: nn.Module
    batch: int
    lr: float

    def plain(self, build: Callable[..., Optimizer], loop: type[Trainer] = Plain, **options: Any) -> Trainer:
        """An optimizer that takes the parameters alone."""
        return loop(self.model, (build(self.model.parameters(), lr=self.lr, **options),))


def _ddpnopt(
    place: Place,
    damping: float = Kronecker.damping,
    memory: float = Kronecker.memory,
    terminal: str = "gradient",
    columns: int = 2,
    cap: float | None = None,
    **options: Any,
) -> Trainer:
    endings: dict[str, Gradient | Matched | Sampled] = {
        "gradient": Gradient(cap="auto" if cap is None else cap),
        "matched": Matched(place.criterion),
        "sampled": Sampled(place.criterion, columns, cap=1.0 if cap is None else cap),
    }
    curvature = Kronecker(damping=damping, memory=memory)
    return LossOnly(
        place.model, (DDPNOpt(place.model, place.lr, curvature=curvature, terminal=endings[terminal], **options),)
    )


def _sgd(place: Place, **options: Any) -> Trainer:
    return place.plain(torch.optim.SGD, **options)


def _adamw(place: Place, **options: Any) -> Trainer:
    return place.plain(torch.optim.AdamW, **_betas(options, 0.9, 0.999))


def _muon(place: Place, weight_decay: float, **options: Any) -> Trainer:
    embeddings = {m.weight for m in place.model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(place.model.parameters())
    matrices = [p for p in parameters if p.ndim == 2 and p not in embeddings]
    rest = [p for p in parameters if p.ndim != 2 or p in embeddings]
    muon = torch.optim.Muon(matrices, lr=place.lr, weight_decay=weight_decay, **options)
    return Plain(place.model, (muon, torch.optim.AdamW(rest, lr=place.lr, weight_decay=weight_decay)))


def _soap(place: Place, **options: Any) -> Trainer:
    return place.plain(import_module("pytorch_optimizer").SOAP, **_betas(options, 0.95, 0.95))


def _shampoo(place: Place, **options: Any) -> Trainer:
    return place.plain(import_module("pytorch_optimizer").ScalableShampoo, **_betas(options, 0.9, 0.999))


def _asdl_kfac(place: Place, damping: float, momentum: float, interval: int, ema_decay: float) -> Trainer:
    for name in ("asdl.precondition.natural_gradient", "asdl.operations.operation"):  # marks for a CUDA profiler
        import_module(name).nvtx = SimpleNamespace(range=lambda *_: nullcontext())  # type: ignore[attr-defined]
    asdl = import_module("asdl.precondition")
    config = asdl.PreconditioningConfig(
        data_size=place.batch,  # its factors are then means over the batch of each sample's own gradient's
        damping=damping,
        preconditioner_upd_interval=interval,
        curvature_upd_interval=interval,
        ema_decay=ema_decay,
    )
    optimizer = torch.optim.SGD(place.model.parameters(), lr=place.lr, momentum=momentum)
    return GradientMaker(
        place.model, (optimizer,), asdl.KfacGradientMaker(place.model, config, fisher_type="fisher_emp")
    )


def _ekfac(place: Place, **options: Any) -> Trainer:
    return Plain(place.model, (EKFAC(place.model, place.lr, **options),))


def _singd(place: Place, **options: Any) -> Trainer:
    build = import_module("singd.optim.optimizer").SINGD
    return Plain(place.model, (build(place.model, lr=place.lr, warn_unsupported=False, **options),))


def _sam(place: Place, **options: Any) -> Trainer:
    build = import_module("pytorch_optimizer").SAM
    return place.plain(build, GradientsAndClosure, base_optimizer=torch.optim.SGD, **options)


def _schedule_free(place: Place, **options: Any) -> Trainer:
    trainer = place.plain(import_module("schedulefree").AdamWScheduleFree, **_betas(options, 0.9, 0.999))
    trainer.optimizers[0].train()  # type: ignore[attr-defined]
    return trainer


def _lbfgs(place: Place, **options: Any) -> Trainer:
    return place.plain(torch.optim.LBFGS, WithClosure, **options)


BUILDERS: dict[str, Callable[..., Trainer]] = {
    "ddpnopt-default": _ddpnopt,
    "ddpnopt": _ddpnopt,
    "ddpnopt-stagewise": _ddpnopt,
    "ddpnopt-sampled": _ddpnopt,
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": _muon,
    "soap": _soap,
    "shampoo": _shampoo,
    "asdl-kfac": _asdl_kfac,
    "kfac": _ddpnopt,
    "ekfac": _ekfac,
    "singd": _singd,
    "sam": _sam,
    "schedule-free": _schedule_free,
    "lbfgs": _lbfgs,
}


def start(method: Method, place: Place, options: Mapping[str, Any]) -> AtWork:
    """Make a method for a network; ImportError where its package is not installed."""
    return AtWork(BUILDERS[method.name](place, **options), method.scheduled)


def defaults(method: Method, options: Mapping[str, Any], *, single: bool) -> str:
    """What a run leaves to the library, written out: a run with other defaults is another run.

    The batch form alone finds out a loss's units, and nothing new where the loss is a ``single`` cross-entropy.
    """
    if method.package != "ddpnopt":
        return ""
    terminal = settled(Gradient(), 1.0) if single or not method.name.startswith("ddpnopt") else Gradient()
    said = f"{Kronecker()!r}, {terminal!r}"
    if BUILDERS[method.name] is not _ddpnopt:
        return said
    coupling = options.get("coupling", "batch")
    numbers = default_numbers(coupling)
    first = [f"first {FIRST}"] if is_joint(coupling) and options.get("memory", Kronecker.memory) else []
    return ", ".join([said, *first, *(f"{name} {numbers[name]!r}" for name in numbers if name not in options)])


def installed(method: str) -> bool:
    """Whether a method's package is installed."""
    module = {"soap": "pytorch_optimizer", "shampoo": "pytorch_optimizer", "sam": "pytorch_optimizer"}
    module |= {"asdl-kfac": "asdl", "singd": "singd", "schedule-free": "schedulefree"}
    return method not in module or find_spec(module[method]) is not None
