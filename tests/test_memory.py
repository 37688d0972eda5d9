"""Samples that the curvature counts for at least: they bound the learning rate, and a schedule scales the whole."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import NETWORKS, Case
from ddpnopt import DDPNOpt, EigenKronecker, Gradient, Kronecker, reference
from ddpnopt.curvature import Curvature
from test_exact_step import blocks, controls, reference_terminal

Trained = tuple[nn.Sequential, DDPNOpt]
Edit = Callable[[nn.Sequential, DDPNOpt], Trained]
WITH_MEMORY: list[Curvature] = [Kronecker(refresh_every=1, memory=7), EigenKronecker(memory=1e3)]


def step(optimizer: DDPNOpt, case: Case, reduction: str = "mean") -> None:
    optimizer.zero_grad()
    nn.CrossEntropyLoss(reduction=reduction)(case.model(case.x), case.y).backward()
    optimizer.step()


@pytest.mark.parametrize("curvature", WITH_MEMORY)
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_schedule_scales_what_the_curvature_counts_for(curvature: Curvature, share: float) -> None:
    """``R = (M (1 / lr + memory / batch)) / share + damping`` with the lr it has had: at its end it stills the step."""
    case, lr = NETWORKS["mlp"](), 2.0
    optimizer = DDPNOpt(case.model, lr, curvature=curvature, momentum=0.0, weight_decay=0.0, max_change=math.inf)
    for _ in range(2):
        step(optimizer, case)
    before, end = controls(optimizer), reference_terminal("gradient", "mlp", case, step=2)
    functions, _ = reference.stages_of(case.model, case.x)
    optimizer.param_groups[0]["lr"] = share * lr
    step(optimizer, case)

    seen = min(curvature.memory / len(case.x), 3)  # in batches
    first = min(curvature.memory, 320) / len(case.x)
    own = share / max(1 / lr + seen, first)
    ridge = curvature.ridge(own, 0.0, batch=True)
    states = [(optimizer.state[block.parameters[0]], block.shape) for block in blocks(optimizer)]
    R = [curvature.inverse(state, ridge).to_dense(*shape) / own for state, shape in states]
    expected = reference.dense_step(functions, before, case.x, end, R=R)
    for new, wanted in zip(controls(optimizer), expected.controls, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


def test_every_group_has_its_own_learning_rate_and_batches_may_differ() -> None:
    """The memory is of samples seen, whatever batches they came in; a step that is left out leaves no trace."""
    case, curvature, rates = NETWORKS["mlp"](), WITH_MEMORY[1], (0.3, 4.0)
    optimizer = DDPNOpt(case.model, curvature=curvature, momentum=0.0, weight_decay=0.0, on_nonfinite="skip")
    (group,) = optimizer.param_groups
    last = list(case.model[-1].parameters())
    group |= {"lr": rates[0], "params": [p for p in group["params"] if all(p is not own for own in last)]}
    optimizer.add_param_group({"params": last, "lr": rates[1]})
    step(optimizer, case)
    group["lr"] = 1e6
    step(optimizer, Case(case.model, case.x * float("nan"), case.y))
    assert optimizer.diagnostics()["skipped_steps"] == 1
    group["lr"] = rates[0]
    few = Case(case.model, case.x[:2], case.y[:2])
    before, end = controls(optimizer), reference_terminal("gradient", "mlp", few, step=1)
    functions, _ = reference.stages_of(few.model, few.x)
    step(optimizer, few)

    seen = (len(case.x) + 2) / 2
    R = []
    for block in blocks(optimizer):
        own = 1 / max(1 / rates[block.parameters[0] is last[0]] + seen, 320 / 2)
        inverse = curvature.inverse(optimizer.state[block.parameters[0]], curvature.ridge(own, 0.0, batch=True))
        R.append(inverse.to_dense(*block.shape) / own)
    expected = reference.dense_step(functions, before, few.x, end, R=R)
    for new, wanted in zip(controls(optimizer), expected.controls, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("highest", "lr"), [(10.0, 10.0), (10.0, 2.0), (0.1, 0.1), (0.1, 0.02)])
def test_decay_follows_the_schedule_of_a_bounded_learning_rate(highest: float, lr: float) -> None:
    def stepped(decay: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        case = NETWORKS["mlp"]()
        optimizer = DDPNOpt(case.model, highest, momentum=0.0, feedback=False, weight_decay=0.0)
        step(optimizer, case)
        optimizer.param_groups[0] |= {"lr": lr, "weight_decay": decay}
        before = torch.nn.utils.parameters_to_vector(case.model.parameters()).detach()
        step(optimizer, case)
        return before, torch.nn.utils.parameters_to_vector(case.model.parameters()).detach()

    (before, plain), (_, decayed) = stepped(0.0), stepped(0.4)
    pull = 0.4 * 0.1 * lr / highest
    torch.testing.assert_close(decayed - plain, -pull / (1 + pull) * before, rtol=1e-9, atol=1e-12)


def moved(steps: int, lr: float, edit: Edit | None = None, **settings: Any) -> list[Tensor]:
    """Weights after some steps, ``edit`` between them."""
    torch.manual_seed(5)
    case = NETWORKS["mlp"]()
    model, reduction = case.model, settings.pop("reduction", "mean")
    optimizer = DDPNOpt(model, lr, terminal=Gradient(reduction), weight_decay=0.0, **settings)
    for _ in range(steps):
        step(optimizer, Case(model, case.x, case.y), reduction)
        model, optimizer = (model, optimizer) if edit is None else edit(model, optimizer)
    return [p.detach() for p in model.parameters()]


def distance(ones: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


def test_large_learning_rates_are_one() -> None:
    assert distance(moved(4, 1e6), moved(4, 1e9)) < 1e-5
    assert distance(moved(4, 0.01), moved(4, 1e9)) > 1e-2
    assert distance(moved(4, 1e9), moved(4, 1e9, curvature=Kronecker(memory=0))) > 1e-2


def test_samples_are_counted_alike_in_a_sum_and_in_a_mean() -> None:
    batch = len(NETWORKS["mlp"]().x)
    means = moved(4, 3.0, curvature=Kronecker(damping=0.1, memory=11))
    sums = moved(4, 3.0 / batch, reduction="sum", curvature=Kronecker(damping=0.1 * batch, memory=11))
    assert distance(means, sums) < 1e-10


def test_what_a_schedule_began_with_is_saved() -> None:
    def lower(model: nn.Sequential, optimizer: DDPNOpt) -> Trained:
        optimizer.param_groups[0]["lr"] *= 0.3
        return model, optimizer

    def reloaded(model: nn.Sequential, optimizer: DDPNOpt) -> Trained:
        state = lower(model, optimizer)[1].state_dict()
        optimizer.close()
        again = DDPNOpt(model, 0.7)
        again.load_state_dict(state)
        return model, again

    def copied(model: nn.Sequential, optimizer: DDPNOpt) -> Trained:
        model, again = copy.deepcopy(lower(model, optimizer))
        return model, again

    expected = moved(4, 1.0, lower)
    assert distance(moved(4, 1.0, reloaded), expected) == 0
    assert distance(moved(4, 1.0, copied), expected) == 0
