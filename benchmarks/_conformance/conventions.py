"""Probes of torch's conventions: how a loop calls an optimizer, schedules it, scales for it, saves and copies it."""

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .methods import Method, Trainer
from .probing import STEPS, UnmetError, demand, finite, probe, run, same
from .problems import Problem, mlp


@probe("is a `torch.optim.Optimizer` with real groups")
def is_optimizer(method: Method) -> str:
    """Every object that the loop makes is a `torch.optim.Optimizer`; together their groups hold each parameter once,
    with a learning rate.
    """
    problem = mlp()
    trainer = method.make(problem.model)
    for part in trainer.parts:
        demand(isinstance(part, Optimizer), f"{type(part).__name__} is not one")
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    demand(sorted(held) == sorted(id(p) for p in problem.model.parameters()), "groups do not hold the parameters")
    demand(all(float(group["lr"]) > 0 for group in groups), "a group has no learning rate")
    return ""


@probe("`step()` after `backward()`", torch.float64)
def step_after_backward(method: Method) -> str:
    """`zero_grad(); loss.backward(); step()`, three times, ends in the weights of the method's documented loop."""
    problem = mlp()
    own, start = problem.copy(), problem.weights()
    documented = run(method.make(own.model), own)
    trainer = method.make(problem.model)
    for _ in range(STEPS):
        trainer.zero_grad()
        problem.loss().backward()
        for optimizer in trainer.optimizers:
            optimizer.step()
    same(documented, problem.weights(), start, "not the documented loop's result")
    return ""


@probe("`step(closure)` alone", torch.float64)
def closure_alone(method: Method) -> str:
    """`step(closure)` with a closure that calls `backward` and no gradients before it: the closure is first run at the
    weights as they are, with gradients enabled, its loss is returned, and the weights are those of the documented loop.
    """
    problem = mlp()
    own, start = problem.copy(), problem.weights()
    documented = run(method.make(own.model), own)
    trainer = method.make(problem.model)
    calls: list[tuple[bool, float]] = []

    def closure() -> Any:
        trainer.zero_grad()
        loss = problem.loss()
        calls.append((torch.is_grad_enabled(), float(loss.detach())))
        loss.backward()
        return loss

    for _ in range(STEPS):
        calls.clear()
        expected = problem.value()
        trainer.zero_grad()
        first, *others = trainer.optimizers
        returned: Any = first.step(closure)
        for optimizer in others:
            optimizer.step()
        demand(bool(calls), "the closure is not called")
        demand(calls[0][0], "the closure is called with gradients disabled")
        demand(math.isclose(calls[0][1], expected, rel_tol=1e-6), "the closure is first called at other weights")
        demand(returned is not None, "returns None")
        loss = float(torch.as_tensor(returned).detach())
        demand(math.isclose(loss, expected, rel_tol=1e-6), "returns another loss")
    same(documented, problem.weights(), start, "not the documented loop's result")
    return f"{len(calls)} calls a step" if len(calls) > 1 else ""


@probe("LR scheduler drives it", torch.float64)
def scheduler(method: Method) -> str:
    """Under a scheduler that multiplies the learning rate by 0.1 from the start, the weights are those of an optimizer
    made with the tenth of it, and not those without a scheduler.
    """
    scheduled, slow, fast = (problem := mlp()), problem.copy(), problem.copy()
    start = problem.weights()
    trainer = method.make(scheduled.model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda _: 0.1) for o in trainer.optimizers]
    for _ in range(STEPS):
        trainer.step(scheduled)
        for each in schedulers:
            each.step()
    run(free := method.make(fast.model), fast)
    run(method.make(slow.model, lr=0.1 * float(free.optimizers[0].param_groups[0]["lr"])), slow)
    same(slow.weights(), scheduled.weights(), start, "not those of a tenth of the learning rate")
    demand(not torch.equal(scheduled.weights(), fast.weights()), "the scheduler changes nothing")
    return ""


@probe("parameter groups", torch.float64)
def groups(method: Method) -> str:
    """Of two groups, one at learning rate 0: in three steps its parameters stay where they are, all others move."""
    problem = mlp()
    still = list(problem.model.get_submodule("2").parameters())
    before = [p.detach().clone() for p in problem.model.parameters()]
    run(method.make(problem.model, still), problem)
    for (name, now), then in zip(problem.model.named_parameters(), before, strict=True):
        stays = torch.equal(now.detach(), then)
        demand(stays == name.startswith("2."), f"{name} {'does not move' if stays else 'moves at learning rate 0'}")
    return ""


def _resumed(method: Method, weights_only: bool) -> str:
    torn = (whole := mlp()).copy()
    run(method.make(whole.model), whole, 2 * STEPS)
    run(first := method.make(torn.model), torn, STEPS)
    file = io.BytesIO()
    torch.save([torn.model.state_dict(), *(part.state_dict() for part in first.parts)], file)
    file.seek(0)
    weights, *states = torch.load(file, weights_only=weights_only)
    fresh = Problem(mlp().model, torn.inputs, torn.target)
    fresh.model.load_state_dict(weights)
    second = method.make(fresh.model)
    for part, state in zip(second.parts, states, strict=True):
        part.load_state_dict(state)
    run(second, fresh, STEPS)
    apart = float((whole.weights() - fresh.weights()).abs().max())
    demand(apart == 0, f"weights differ by {apart:.1g}")
    return ""


@probe("resume is bit-exact")
def resume(method: Method) -> str:
    """Three steps, `state_dict` saved and loaded into a new optimizer on a new model, three more steps: the weights are
    those of six steps, to the last bit.
    """
    return _resumed(method, weights_only=False)


@probe("resume with `weights_only=True`")
def resume_weights_only(method: Method) -> str:
    """The same, with the file read by `torch.load(..., weights_only=True)`."""
    return _resumed(method, weights_only=True)


def _scaled(method: Method, problem: Problem, advance: Callable[..., Any]) -> Callable[[float], None]:
    """A loop with a GradScaler: call it with a factor on the loss for one step; ``advance(scaler, optimizer)``."""
    trainer = method.make(problem.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor: float) -> None:
        def last(loss: Tensor) -> Tensor:
            value: Tensor = scaler.scale(loss * factor)
            return value

        trainer.step(replace(problem, last=last), advance=partial(advance, scaler))
        scaler.update()

    return step


def _scaler_agrees(method: Method, advance: Callable[..., Any]) -> str:
    problem = mlp()
    own, start = problem.copy(), problem.weights()
    unscaled = run(method.make(own.model), own)
    step = _scaled(method, problem, advance)
    for _ in range(STEPS):
        step(1.0)
    same(unscaled, ended := problem.weights(), start, "not those without a scaler")
    step(float("inf"))
    demand(torch.equal(ended, problem.weights()), "an infinite gradient moved the weights")
    return ""


@probe("GradScaler (CPU) gives the same weights", torch.float64)
def grad_scaler(method: Method) -> str:
    """Loss scaled by 1024 through `torch.amp.GradScaler`: three steps end in the unscaled loop's weights, and a batch
    with an infinite gradient after that leaves them as they are.
    """
    return _scaler_agrees(method, torch.amp.GradScaler.step)


@probe("GradScaler with `unscale_` and clipping", torch.float64)
def grad_scaler_unscaled(method: Method) -> str:
    """The same with `scaler.unscale_(optimizer)` and a `clip_grad_norm_` that is not reached before `scaler.step`."""

    def unscale_and_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, **closure: Callable[[], Tensor]) -> None:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1e3)
        scaler.step(optimizer, **closure)

    return _scaler_agrees(method, unscale_and_step)


def _clipped(trainer: Trainer, problem: Problem, length: float) -> Tensor:
    def clip(model: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), length)

    for _ in range(STEPS):
        trainer.step(problem, edit=clip)
    return problem.weights()


@probe("`clip_grad_norm_` in the loop runs", torch.float64)
def clipping_runs(method: Method) -> str:
    """The method's loop with `clip_grad_norm_(..., 1.0)` before each step runs and moves the weights."""
    problem = mlp()
    start = problem.weights()
    moved = _clipped(method.make(problem.model), problem, 1.0) - start
    demand(finite(problem) and bool(moved.abs().max() > 0), "the weights do not move")
    return ""


@probe("clipped gradients reach the step", torch.float64)
def clipping_reaches(method: Method) -> str:
    """Gradients clipped to a norm of 1e-12 make less than a tenth of the way in three steps."""
    problem = mlp()
    own, start = problem.copy(), problem.weights()
    free = float((run(method.make(own.model), own) - start).norm())
    clipped = float((_clipped(method.make(problem.model), problem, 1e-12) - start).norm())
    demand(clipped < 0.1 * free, f"the way is {clipped / free:.0%} of that without clipping")
    return ""


@probe("2 micro-batches = 1 batch", torch.float64)
def micro_batches(method: Method) -> str:
    """Gradients of two half batches, with half the loss each, accumulated: three steps end in the weights of the whole
    batch to 1e-5 of the way gone; float64, so that rounding is not what is measured.
    """
    problem = mlp()
    own, other, start = problem.copy(), problem.reversed(), problem.weights()
    whole, reordered = run(method.make(own.model), own), run(method.make(other.model), other)
    trainer = method.make(problem.model)
    for _ in range(STEPS):
        trainer.step(*problem.halves())
    same(whole, problem.weights(), start, "not those of the whole batch", reordered)
    return ""


@probe("`copy.deepcopy(optimizer)`")
def deepcopy(method: Method) -> str:
    """Model and optimizer copied together after three steps: the copy's training leaves the original as it is, and both
    go on to the same weights.
    """
    problem = mlp()
    trainer = method.make(problem.model)
    here = run(trainer, problem)
    other: Trainer = copy.deepcopy(trainer)
    double = Problem(other.model, problem.inputs, problem.target)
    ahead = run(other, double)
    demand(torch.equal(here, problem.weights()), "training the copy moved the original")
    demand(not torch.equal(here, ahead), "the copy does not train")
    apart = float((run(trainer, problem) - ahead).abs().max())
    demand(apart == 0, f"copy and original differ by {apart:.1g}")
    return ""


@probe("negative learning rate rejected")
def negative_lr(method: Method) -> str:
    """Construction with `lr=-1.0` raises."""
    try:
        method.make(mlp().model, lr=-1.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise UnmetError("accepted")
