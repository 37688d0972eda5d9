"""On a linear network with squared error one step is the exact solution of an optimal-control problem."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ddpnopt import Batch, DDPNOpt, Exact, Identity, Kronecker


def squared_error(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().sum(1).mean() / 2


def weights_of(layer: nn.Linear) -> torch.Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()


def with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], 1)


@pytest.mark.parametrize("batch", [4, 30])
def test_one_layer_reaches_its_least_squares_minimum(batch: int) -> None:
    layer = nn.Linear(5, 3)
    x, target = torch.randn(batch, 5), torch.randn(batch, 3)
    DDPNOpt(layer, lr=1e9, curvature=Identity(), terminal=Exact(), weight_decay=0.0, max_change=math.inf).step(
        lambda: squared_error(layer(x), target)
    )
    best = with_ones(x) @ torch.linalg.lstsq(with_ones(x), target, driver="gelsd").solution
    torch.testing.assert_close(layer(x), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("batch", [4, 30])
def test_last_layer_reaches_its_least_squares_minimum_given_the_rollout(depth: int, batch: int) -> None:
    """The last layer's new weights W' minimise |W' x + W (x_hat - x) - target|^2.

    W' x + W dx is the output to first order, which is where DDP's dynamics end: W' dx would be second order.
    """
    torch.manual_seed(depth)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(depth - 1)), nn.Linear(5, 3))
    x, target = torch.randn(batch, 5), torch.randn(batch, 3)
    last = model[-1]
    assert isinstance(last, nn.Linear)
    old, nominal = weights_of(last), with_ones(model[:-1](x)).detach()
    optimizer = DDPNOpt(model, lr=1e9, curvature=Identity(), terminal=Exact(), weight_decay=0.0, max_change=math.inf)
    optimizer.step(lambda: squared_error(model(x), target))

    deviation = (with_ones(model[:-1](x)) - nominal).detach()
    assert deviation.norm() > 0.1
    answered = target - deviation @ old.T
    best = nominal @ torch.linalg.lstsq(nominal, answered, driver="gelsd").solution
    torch.testing.assert_close(nominal @ weights_of(last).T, best, rtol=1e-4, atol=1e-4)


def least_squares(model: nn.Sequential, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The least loss that the last layer can reach at its present inputs."""
    states = with_ones(model[:-1](x)).detach()
    return squared_error(states @ torch.linalg.lstsq(states, target, driver="gelsd").solution, target)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_relinearised_the_last_layer_reaches_its_least_squares_minimum_at_the_new_states(depth: int, seed: int) -> None:
    """Literally: the loss after one step is the analytic minimum over the last layer; the default's is above it."""
    excess = {}
    for relinearise in (False, True):
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(depth - 1)), nn.Linear(5, 3))
        x, target = torch.randn(30, 5), torch.randn(30, 3)
        nominal = model[:-1](x).detach()
        coupling = Batch(relinearise=relinearise)
        optimizer = DDPNOpt(
            model,
            lr=1e9,
            curvature=Identity(),
            terminal=Exact(),
            weight_decay=0.0,
            coupling=coupling,
            max_change=math.inf,
        )
        optimizer.step(lambda x=x, target=target, model=model: squared_error(model(x), target))  # type: ignore[misc]
        assert depth == 1 or (model[:-1](x) - nominal).norm() > 0.1
        minimum = least_squares(model, x, target)
        assert minimum > 0.1
        excess[relinearise] = float((squared_error(model(x), target) / minimum - 1).detach())
    assert abs(excess[True]) < 1e-6
    assert depth == 1 or excess[False] > 1e-3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_relinearised_the_last_layer_interpolates_where_it_can(depth: int) -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(depth - 1)), nn.Linear(5, 3))
    x, target = torch.randn(4, 5), torch.randn(4, 3)
    optimizer = DDPNOpt(
        model,
        1e9,
        curvature=Identity(),
        terminal=Exact(),
        weight_decay=0.0,
        coupling=Batch(relinearise=True),
        momentum=0.0,
        max_change=math.inf,
    )
    optimizer.step(lambda: squared_error(model(x), target))
    torch.testing.assert_close(model(x), target, rtol=1e-5, atol=1e-5)


def test_at_small_lr_it_does_not() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    x, target = torch.randn(30, 5), torch.randn(30, 3)
    optimizer = DDPNOpt(model, lr=0.1, curvature=Identity(), terminal=Exact(), weight_decay=0.0, max_change=math.inf)
    optimizer.step(lambda: squared_error(model(x), target))
    states = torch.cat([model[:-1](x), torch.ones(30, 1)], 1)
    best = states @ torch.linalg.lstsq(states, target).solution
    assert (model(x) - best).abs().max() > 0.1


@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e3, 1e6])
def test_no_learning_rate_increases_a_convex_loss(lr: float) -> None:
    layer = nn.Linear(5, 3)
    x, target = torch.randn(8, 5), torch.randn(8, 3)
    optimizer = DDPNOpt(
        layer, lr=lr, curvature=Kronecker(damping=1e-8), terminal=Exact(), weight_decay=0.0, momentum=0.0
    )
    losses = [float(optimizer.step(lambda: squared_error(layer(x), target)).detach()) for _ in range(6)]
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    assert losses[-1] < losses[0]
