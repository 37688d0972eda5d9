"""DDPNOpt and its rivals: where each comes from, how it is made for a model, and the loop its documentation shows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpnopt import DDPNOpt

from .problems import Problem

Edit = Callable[[nn.Module], object]
Advance = Callable[..., Any]


def advance(optimizer: Optimizer, **closure: Any) -> Any:
    """Plain ``optimizer.step()``; a GradScaler's ``step`` takes its place where one is used."""
    return optimizer.step(**closure)


def no_edit(model: nn.Module) -> None:
    """Leave the gradients as they are."""


@dataclass
class Trainer(ABC):
    """A method at work on one model: all objects whose state a checkpoint must hold, and a step of its own loop."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]

    @property
    def parts(self) -> tuple[Any, ...]:
        """Everything that the user makes and steps."""
        return self.optimizers

    @abstractmethod
    def step(self, *batches: Problem, edit: Edit = no_edit, advance: Advance = advance) -> None:
        """One update as the method's documentation has it, on batches whose gradients add up.

        Args:
            batches: the batch, or its micro-batches.
            edit: what the loop does to the gradients before the step.
            advance: how the loop calls ``step``.
        """

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def gradients(self, batches: Sequence[Problem], edit: Edit) -> Tensor:
        """Fresh gradients of the batches' loss, edited; returns the loss."""
        self.zero_grad()
        losses = []
        for batch in batches:
            loss = batch.loss()
            loss.backward()
            losses.append(loss.detach())
        edit(self.model)
        return torch.stack(losses).sum()


class Plain(Trainer):
    """``loss.backward(); optimizer.step()``."""

    def step(self, *batches: Problem, edit: Edit = no_edit, advance: Advance = advance) -> None:
        self.gradients(batches, edit)
        for optimizer in self.optimizers:
            advance(optimizer)


class WithClosure(Trainer):
    """``optimizer.step(closure)``."""

    def step(self, *batches: Problem, edit: Edit = no_edit, advance: Advance = advance) -> None:
        advance(self.optimizers[0], closure=lambda: self.gradients(batches, edit))


class GradientsAndClosure(Trainer):
    """``closure(); optimizer.step(closure)``."""

    def step(self, *batches: Problem, edit: Edit = no_edit, advance: Advance = advance) -> None:
        def closure() -> Tensor:
            return self.gradients(batches, edit)

        closure()
        advance(self.optimizers[0], closure=closure)


@dataclass
class GradientMaker(Trainer):
    """``maker.forward_and_backward(); optimizer.step()``."""

    maker: Any

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.maker, *self.optimizers)

    def step(self, *batches: Problem, edit: Edit = no_edit, advance: Advance = advance) -> None:
        self.zero_grad()
        for batch in batches:
            output = self.maker.setup_model_call(batch.output, *batch.inputs)
            self.maker.setup_loss_call(batch.criterion(), output, batch.target)
            self.maker.forward_and_backward()
        edit(self.model)
        for optimizer in self.optimizers:
            advance(optimizer)


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Args:
        name: its title.
        package: where it comes from, as ``pip install`` takes it.
        make: ``make(model, still=(), **settings)``, with settings such as ``lr``; the parameters ``still`` go to a
            group of their own at learning rate 0.
        words: settings and loop, for the page.
        widest: the most precise type of network that it takes.
    """

    name: str
    package: str
    make: Callable[..., Trainer]
    words: str
    widest: torch.dtype = torch.float64

    @property
    def distribution(self) -> str:
        """Name of the installed package whose version counts."""
        return self.package.split(">")[0].split("=")[0]


def grouped(parameters: Sequence[nn.Parameter], still: Sequence[nn.Parameter]) -> list[Any]:
    """One group, or two of which the second does not learn."""
    if not still:
        return list(parameters)
    kept = [p for p in parameters if all(p is not other for other in still)]
    return [{"params": kept}, {"params": list(still), "lr": 0.0}]


def _plain(build: Callable[..., Optimizer], loop: type[Trainer] = Plain) -> Callable[..., Trainer]:
    """Make a method out of an optimizer that takes parameters or groups."""

    def make(model: nn.Module, still: Sequence[nn.Parameter] = (), **settings: Any) -> Trainer:
        return loop(model, (build(grouped(list(model.parameters()), still), **settings),))

    return make


def _ddpnopt(**options: Any) -> Callable[..., Trainer]:
    def make(model: nn.Module, still: Sequence[nn.Parameter] = (), **settings: Any) -> Trainer:
        optimizer = DDPNOpt(model, **options, **settings)
        if still:
            kept, slow = grouped(optimizer.param_groups[0]["params"], still)
            optimizer.param_groups[0]["params"] = kept["params"]
            optimizer.add_param_group(slow)
        return Plain(model, (optimizer,))

    return make


def _muon(model: nn.Module, still: Sequence[nn.Parameter] = (), **settings: Any) -> Trainer:
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2 and all(p is not e for e in embeddings)]
    rest = [p for p in parameters if all(p is not m for m in matrices)]

    def within(some: Sequence[nn.Parameter]) -> list[Any]:
        return grouped(some, [p for p in still if any(p is other for other in some)])

    optimizers: list[Optimizer] = [torch.optim.Muon(within(matrices), **settings)] if matrices else []
    return Plain(model, (*optimizers, *([torch.optim.AdamW(within(rest), **settings)] if rest else ())))


def _schedule_free(model: nn.Module, still: Sequence[nn.Parameter] = (), **settings: Any) -> Trainer:
    optimizer = import_module("schedulefree").AdamWScheduleFree(
        grouped(list(model.parameters()), still), **{"lr": 0.0025, **settings}
    )
    optimizer.train()
    return Plain(model, (optimizer,))


def _heavyball_soap(parameters: Any, **settings: Any) -> Optimizer:
    heavyball = import_module("heavyball")
    heavyball.utils.compile_mode = None  # compiling is for accelerators; the mathematics is the same
    optimizer: Optimizer = heavyball.SOAP(parameters, **settings)
    return optimizer


def _sam(parameters: Any, **settings: Any) -> Optimizer:
    build = import_module("pytorch_optimizer").SAM
    optimizer: Optimizer = build(parameters, torch.optim.SGD, **{"lr": 0.1, **settings})
    return optimizer


def _from(module: str, name: str) -> Callable[..., Optimizer]:
    def build(parameters: Any, **settings: Any) -> Optimizer:
        optimizer: Optimizer = getattr(import_module(module), name)(parameters, **settings)
        return optimizer

    return build


def _singd(model: nn.Module, still: Sequence[nn.Parameter] = (), **settings: Any) -> Trainer:
    groups = grouped(list(model.parameters()), still) if still else None
    return Plain(model, (import_module("singd.optim.optimizer").SINGD(model, groups, **settings),))


def _asdl_kfac(model: nn.Module, still: Sequence[nn.Parameter] = (), **settings: Any) -> Trainer:
    asdl = import_module("asdl.precondition")
    optimizer = torch.optim.SGD(grouped(list(model.parameters()), still), **{"lr": 0.1, **settings})
    config = asdl.PreconditioningConfig(data_size=8, damping=0.01)
    return GradientMaker(model, (optimizer,), asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp"))


def _sgd(parameters: Any, **settings: Any) -> Optimizer:
    return torch.optim.SGD(parameters, **{"lr": 0.1, "momentum": 0.9, **settings})


BACKWARD_STEP = "`loss.backward(); step()`"
METHODS: dict[str, Method] = {
    "ddpnopt": Method("DDPNOpt", "ddpnopt", _ddpnopt(), f"`DDPNOpt(model)`; {BACKWARD_STEP}"),
    "ddpnopt-sample": Method(
        "DDPNOpt, paper's form", "ddpnopt", _ddpnopt(coupling="sample"),
        f'`DDPNOpt(model, coupling="sample")`; {BACKWARD_STEP}',
    ),
    "sgd": Method("SGD", "torch", _plain(_sgd), f"lr 0.1, momentum 0.9; {BACKWARD_STEP}"),
    "adamw": Method("AdamW", "torch", _plain(torch.optim.AdamW), BACKWARD_STEP),
    "lbfgs": Method("LBFGS", "torch", _plain(torch.optim.LBFGS, WithClosure), "`step(closure)`"),
    "muon": Method(
        "Muon + AdamW", "torch>=2.9", _muon,
        f"Muon for matrices, AdamW for embeddings and the rest: two optimizers, both stepped; {BACKWARD_STEP}",
    ),
    "sam": Method(
        "SAM", "pytorch-optimizer", _plain(_sam, GradientsAndClosure),
        "around SGD, lr 0.1; `closure(); step(closure)`",
    ),
    "soap": Method("SOAP", "pytorch-optimizer", _plain(_from("pytorch_optimizer", "SOAP")), BACKWARD_STEP),
    "shampoo": Method("Shampoo", "pytorch-optimizer", _plain(_from("pytorch_optimizer", "Shampoo")), BACKWARD_STEP),
    "heavyball-soap": Method(
        "HeavyBall SOAP", "heavyball", _plain(_heavyball_soap),
        f"`compile_mode = None`; float32 throughout, as it does not take float64; {BACKWARD_STEP}", torch.float32,
    ),
    "schedule-free": Method(
        "Schedule-free AdamW", "schedulefree", _schedule_free, f"`optimizer.train()` first; {BACKWARD_STEP}"
    ),
    "singd": Method(
        "SINGD", "singd", _singd, f"`SINGD(model)`; {BACKWARD_STEP}; for `unscale_` it documents a call of its own"
    ),
    "asdl-kfac": Method(
        "ASDL K-FAC", "asdfghjkl>=0.1a5", _asdl_kfac,
        "empirical Fisher, damping 0.01, before SGD with lr 0.1; `maker.forward_and_backward(); step()`",
    ),
}  # fmt: skip
