"""E-MSA against closed forms of its inner problem, and its manners as an optimizer."""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddpnopt.baselines import EMSA
from ddpnopt.baselines.chain import cast
from ddpnopt.baselines.emsa import hamiltonian, objective


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)
    )


def with_everything() -> nn.Sequential:
    """Convolution, batch statistics, in-place activation, dropout, pooling."""
    torch.manual_seed(1)
    first = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ELU(inplace=True), nn.Dropout(0.5), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*first, nn.Linear(12, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 3))


def linear_chain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, *(shape or (6,)), generator=generator), torch.randint(3, (8,), generator=generator)


def backward(model: nn.Module, x: Tensor, y: Tensor, **how: Any) -> list[Tensor]:
    torch.autograd.backward(cross_entropy(model(x), y, **how))
    return [p.grad for p in model.parameters() if p.grad is not None]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("net", "shape"), [(mlp, (6,)), (with_everything, (1, 5, 5))])
def test_the_first_inner_direction_is_back_propagation(net: Any, shape: tuple[int, ...], reduction: Any) -> None:
    """At the current weights the penalties and their gradients vanish, with dropout and batch statistics too."""
    model = net()
    x, y = batch(*shape)
    chain = EMSA(model, rho=1.0)._chain
    backward(model, x, y, reduction=reduction)
    start, gradient = chain.take()
    visits, x_next = chain.sweep(start, torch.float64)
    p_next = -gradient * (len(x) if reduction == "mean" else 1)
    for visit in reversed(visits):
        H, p = hamiltonian(visit, {}, p_next, wanted=True)[1:]
        theta = {name: cast(w, torch.float64).requires_grad_() for name, w in visit.trained.items()}
        value = objective(visit, p_next, x_next, p, 7.0, dict.fromkeys(theta, 0.5), theta)
        squares = sum(t.square().sum() for t in theta.values())
        torch.testing.assert_close(value, -H / 8 + 0.25 * squares)
        times = 1 if reduction == "mean" else 1 / 8
        expected = [times * w.grad + 0.5 * w.detach() for w in visit.trained.values() if w.grad is not None]
        torch.testing.assert_close(list(torch.autograd.grad(value, list(theta.values()))), expected)
        assert p is not None
        x_next, p_next = visit.x, p.detach()


def test_one_inner_iteration_moves_along_the_gradient() -> None:
    model = mlp()
    before, optimizer = weights(model), EMSA(model, rho=0.5, inner_iterations=1, weight_decay=0.1)
    gradients = backward(model, *batch())
    optimizer.step()
    moves = [p - q for p, q in zip(weights(model), before, strict=True)]
    for i in (0, 2, 4):  # weight and bias of each stage
        move = torch.cat([m.flatten() for m in moves[i : i + 2]])
        d = torch.cat([(g + 0.1 * w).flatten() for g, w in zip(gradients[i : i + 2], before[i : i + 2], strict=True)])
        torch.testing.assert_close(-move / move.norm(), d / d.norm())


def test_plain_msa_reaches_its_closed_form() -> None:
    """rho = 0, Linear stages: -p.(W x + b) + decay/2 |theta|^2 is least at -gradient / decay; lr goes some way."""
    model = linear_chain()
    before, optimizer = weights(model), EMSA(model, 0.25, rho=0.0, weight_decay=0.2, inner_iterations=30)
    gradients = backward(model, *batch())
    optimizer.step()
    expected = [0.75 * w - 0.25 * g / 0.2 for w, g in zip(before, gradients, strict=True)]
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-6)


def test_extended_msa_reaches_its_closed_form() -> None:
    """rho > 0, Linear stages: a quadratic, solved here from its normal equations; theta = [W b] and x~ = (x, 1)."""
    model, (x, y), rho, decay = linear_chain(), batch(), 0.3, 0.1
    states: list[Tensor] = [x]
    for layer in model:
        states += [layer(states[-1])]
    costates = [-8 * g for g in torch.autograd.grad(cross_entropy(states[-1], y), states[1:])]
    expected = []
    for i, (layer, p_next) in enumerate(zip(model, costates, strict=True)):
        x_n, x_next, W = states[i].detach(), states[i + 1].detach(), torch.as_tensor(layer.weight).detach()
        tilde = torch.cat([x_n, torch.ones(8, 1)], 1) if i != 1 else x_n  # the second has no bias
        select = torch.eye(W.shape[1], tilde.shape[1])  # W = theta select'
        A, S = tilde.T @ tilde / 8, p_next.T @ p_next / 8
        left = torch.kron(torch.eye(len(W)), rho * A + decay * torch.eye(len(A)))
        left = left + rho * torch.kron(S, select.T @ select)
        right = (p_next.T @ tilde + rho * x_next.T @ tilde) / 8 + rho * S @ W @ select
        theta = torch.linalg.solve(left, right.flatten()).reshape(right.shape)
        expected += [theta[:, : W.shape[1]]] + ([theta[:, -1]] if i != 1 else [])
    optimizer = EMSA(model, rho=rho, weight_decay=decay, inner_iterations=200)
    backward(model, x, y)
    optimizer.step()
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rho_does_not_scale_with_the_batch(reduction: Any) -> None:
    """A batch of copies of one sample is stepped on like the sample itself."""
    copies, single, (x, y) = mlp(), mlp(), batch()
    a, b = EMSA(copies, rho=0.5, reduction=reduction), EMSA(single, rho=0.5)
    backward(copies, x[:1].expand(4, -1), y[:1].expand(4), reduction=reduction)
    backward(single, x[:1], y[:1])
    a.step()
    b.step()
    torch.testing.assert_close(weights(copies), weights(single))


def test_it_learns() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(64, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = EMSA(model, 0.5, rho=1.0)
    for _ in range(40):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
    assert (model(x).argmax(1) == y).double().mean() > 0.95


# --- Manners ---------------------------------------------------------------------------------------------------------


def test_batch_statistics_are_counted_once_and_random_numbers_left_alone() -> None:
    model = with_everything()
    twin = deepcopy(model)
    optimizer = EMSA(model, rho=1.0)
    x, y = batch(1, 5, 5)
    backward(model, x, y)
    random = torch.get_rng_state()
    optimizer.step()
    assert_same(torch.get_rng_state(), random)
    twin(x)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_integer_inputs_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[1].requires_grad_(False)
    before, optimizer = weights(model), EMSA(model, rho=1.0)
    backward(model, torch.randint(7, (8,)), batch()[1])
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(weights(model), before, strict=True)]
    assert moved == [True, False, False, True, True]


def test_in_place_activations_make_no_difference() -> None:
    models = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace), nn.Linear(5, 3)) for inplace in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = EMSA(model, rho=0.1)
        backward(model, *batch())
        optimizer.step()
    assert_same(*map(weights, models))


def test_resumes_bit_for_bit_and_obeys_a_scheduler() -> None:
    def train(model: nn.Module, optimizer: EMSA, epochs: int) -> None:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(epochs):
            optimizer.zero_grad()
            assert optimizer.step(lambda: float(len(backward(model, *batch())))) == 6
            schedule.step()

    model, twin = mlp(), mlp()
    optimizer, resumed = EMSA(model, rho=0.5, weight_decay=0.1), EMSA(twin, 0.9, rho=3.0)
    train(model, optimizer, 2)
    assert optimizer.param_groups[0]["lr"] == 0.25
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights_of, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights_of)
    resumed.load_state_dict(state)
    train(model, optimizer, 2)
    train(twin, resumed, 2)
    assert_same(weights(model), weights(twin))


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = mlp()
    before, optimizer = weights(model), EMSA(model, rho=0.5)
    x, y = batch()
    backward(model, x * torch.inf, y)
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.step()
    assert_same(weights(model), before)
    backward(model, x, y)
    optimizer.step()


def test_only_the_backward_pass_that_is_stepped_on_counts() -> None:
    model, twin = mlp(), mlp()
    a, b = EMSA(model, rho=0.5), EMSA(twin, rho=0.5)
    x, y = batch()
    backward(model, x + 1, y)
    a.zero_grad()  # discards it
    model(x + 2)  # has no backward pass
    loss = cross_entropy(model(x), y) / 2
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(loss)  # a retained graph adds up
    with torch.no_grad():
        model(x + 3)
    backward(twin, x, y)
    a.step()
    b.step()
    torch.testing.assert_close(weights(model), weights(twin))


def test_close_leaves_nothing_on_the_model() -> None:
    model = mlp()
    optimizer = EMSA(model, rho=0.5)
    backward(model, *batch())
    optimizer.step()
    optimizer.close()
    for module, fresh in zip(model.modules(), mlp().modules(), strict=True):
        assert vars(module).keys() == vars(fresh).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with pytest.raises(ValueError, match="closed"):
        optimizer.step()


class Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input


def tied() -> nn.Sequential:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "must be an nn.Sequential .* got Linear"),
        (lambda: Residual(nn.Linear(2, 2)), "must be an nn.Sequential .* got Residual"),
        (lambda: nn.Sequential(nn.Tanh()), "parameters of its own"),
        (tied, "parameters of its own"),
    ],
)
def test_models_that_are_no_chain_are_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMSA(model(), rho=1.0)


def test_a_step_needs_one_backward_pass() -> None:
    model = mlp()
    optimizer = EMSA(model, rho=1.0)
    with pytest.raises(ValueError, match="there were 0"):
        optimizer.step()
    backward(model, *batch())
    backward(model, *batch())
    with pytest.raises(ValueError, match="there were 2"):
        optimizer.step()


BAD = {"lr": -1.0, "rho": -0.1, "inner_iterations": 0, "weight_decay": torch.nan, "reduction": "max"}


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_bad_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.* got {value!r}"):
        EMSA(mlp(), **{"rho": 1.0, name: value})
