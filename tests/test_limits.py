"""No step changes a layer by more than a part of itself, and what is held is still the reference's step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from cases import CURVATURES, NETWORKS
from ddpnopt import DDPNOpt, Kronecker, reference
from test_exact_step import LR, blocks, controls, frozen_R, reference_terminal

criterion = nn.CrossEntropyLoss()


def longest(optimizer: DDPNOpt) -> list[float]:
    """Bounds of the next step's updates."""
    limit = optimizer.param_groups[0]["max_change"]
    own = zip(blocks(optimizer), controls(optimizer), strict=True)
    return [limit * max(float(u.norm()), math.sqrt(block.shape[0] / 3)) for block, u in own]


def step(optimizer: DDPNOpt, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("limit", [0.02, 0.002])
def test_a_step_within_limits_is_the_dense_reference(
    network: str, curvature: str, feedback: bool, limit: float
) -> None:
    """The layers behind one that is held answer to where it really has moved their input."""
    case, M, kept = NETWORKS[network](), CURVATURES[curvature], 1 / (1 + 0.1 * 0.5)
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.5, "feedback": feedback}
    optimizer = DDPNOpt(case.model, LR, curvature=M, max_change=limit, **options)
    step(optimizer, case.model, case.x, case.y)
    before, bounds = controls(optimizer), longest(optimizer)
    end = reference_terminal("gradient", network, case, step=1)
    functions, _ = reference.stages_of(case.model, case.x)
    step(optimizer, case.model, case.x, case.y)

    R = frozen_R(optimizer, M, 0.0, batch=len(case.x))
    arguments = (functions, before, case.x.flatten(1), end)
    shares: dict[str, Any] = {"R": R, "kept": [kept] * len(before), "feedback": feedback}
    free = reference.dense_step(*arguments, **shares)
    found = [float((u - kept * old).norm()) for u, old in zip(free.controls, before, strict=True)]
    assert any(length > bound for length, bound in zip(found, bounds, strict=True))
    expected = reference.dense_step(*arguments, **shares, longest=bounds)
    for new, wanted in zip(controls(optimizer), expected.controls, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


def test_every_group_has_its_own_limit_and_weights_of_zero_can_leave_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for parameter in model[4].parameters():
            parameter.zero_()
    groups: list[dict[str, Any]] = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "max_change": math.inf},
        {"params": list(model[4].parameters()), "max_change": 0.02},
    ]
    optimizer = DDPNOpt(model, 100.0, max_change=0.001, weight_decay=0.0, curvature=Kronecker(memory=0))
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    x, y = 10 * torch.randn(32, 6).double(), torch.randint(3, (32,))
    before = controls(optimizer)
    for _ in range(2):  # the first moves the last layer alone: there is nothing else that a gradient comes to
        step(optimizer, model, x, y)
        lengths = [float((new - old).norm()) for new, old in zip(controls(optimizer), before, strict=True)]
        own = [max(float(u.norm()), math.sqrt(rows / 3)) for u, rows in zip(before, (8, 12, 3), strict=True)]
        assert lengths[2] == pytest.approx(0.02 * own[2])
        before = controls(optimizer)
    assert lengths[0] == pytest.approx(0.001 * own[0])
    assert lengths[1] > 0.01 * own[1]


def test_what_is_carried_on_is_the_step_that_was_made() -> None:
    """Momentum's drift is that of the last update, not of the one that was not made."""
    case = NETWORKS["mlp"]()
    optimizer = DDPNOpt(case.model, LR, max_change=0.01, momentum=0.5, weight_decay=0.0)
    before = controls(optimizer)
    step(optimizer, case.model, case.x, case.y)
    for block, new, old in zip(blocks(optimizer), controls(optimizer), before, strict=True):
        state = optimizer.state[block.parameters[0]]
        torch.testing.assert_close(-state["velocity_lr"] * state["velocity"].flatten(), new - old)


def test_no_limit_binds_what_stays_within_it() -> None:
    case = NETWORKS["mlp"]()
    models = [case.model, copy.deepcopy(case.model)]
    for model, limit in zip(models, (math.inf, 10.0), strict=True):
        optimizer = DDPNOpt(model, LR, max_change=limit)
        for _ in range(3):
            step(optimizer, model, case.x, case.y)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, True, "0.3"])
def test_what_is_no_limit_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid max_change: .*; give a part of the weights"):
        DDPNOpt(nn.Linear(2, 2), max_change=wrong)


def test_the_batch_form_has_one_by_default_and_the_forms_that_others_have_published_none() -> None:
    assert DDPNOpt(nn.Linear(2, 2)).param_groups[0]["max_change"] == 0.3
    assert DDPNOpt(nn.Linear(2, 2), coupling="sample").param_groups[0]["max_change"] == math.inf
    with pytest.raises(ValueError, match=r"max_change=0.3: coupling='sample' has no limit"):
        DDPNOpt(nn.Linear(2, 2), coupling="sample", max_change=0.3)
    optimizer = DDPNOpt([nn.Parameter(torch.zeros(1))], coupling="sample")
    with pytest.raises(ValueError, match=r"max_change=0.3: coupling='sample' has no limit"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "max_change": 0.3})


def test_a_checkpoint_keeps_the_limit_and_an_older_one_has_none() -> None:
    case = NETWORKS["mlp"]()
    saved = DDPNOpt(case.model, max_change=0.2).state_dict()
    optimizer = DDPNOpt(case.model)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["max_change"] == 0.2
    older = copy.deepcopy(saved)
    del older["param_groups"][0]["max_change"]
    optimizer.load_state_dict(older)
    assert optimizer.param_groups[0]["max_change"] == math.inf
    step(optimizer, case.model, case.x, case.y)


def test_parameters_that_no_rule_reads_have_no_limit() -> None:
    """They may be of any units, and zero in them."""
    gate = nn.Parameter(torch.zeros(1, 50).double())
    optimizer = DDPNOpt([gate], 100.0, max_change=1e-3)
    (gate - 1).square().sum().backward()
    optimizer.step()
    assert float(gate.detach().norm()) > 1e-2
