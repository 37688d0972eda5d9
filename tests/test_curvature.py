"""Curvatures: averages, refresh, damping, and the ladder of factorisations down to the last good one."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Identity, Kronecker, linalg
from ddpnopt.columns import OuterColumns
from ddpnopt.curvature import Curvature
from ddpnopt.curvature.base import State
from ddpnopt.curvature.factor import split_ridge
from ddpnopt.inverse import Separable

OUT, FAN_IN = 3, 5


def columns(scale: float = 1.0) -> OuterColumns:
    return OuterColumns(scale * torch.randn(1, 8, 1, OUT), torch.randn(8, 1, FAN_IN))


def advanced(curvature: Curvature, steps: int, ridge: float = 0.1) -> tuple[State, list[OuterColumns]]:
    state: State = {}
    seen = []
    for _ in range(steps):
        seen.append(columns())
        state = curvature.advance(state, seen[-1], lambda: torch.randn(OUT, FAN_IN), ridge)
    return state, seen


def test_moving_averages_start_as_means() -> None:
    state, seen = advanced(Kronecker(beta=0.9, average_every=1), 4)
    for i, name in enumerate(("S", "A")):
        torch.testing.assert_close(state[name], torch.stack([c.factors()[i] for c in seen]).mean(0))


def test_inverses_are_of_the_damped_factors_at_the_last_refresh() -> None:
    curvature, ridge = Kronecker(refresh_every=3, average_every=1), 0.2
    state, seen = advanced(curvature, 5, ridge)
    S, A = (torch.stack([c.factors()[i] for c in seen[:4]]).mean(0) for i in (0, 1))
    l1, l2 = split_ridge(S.diagonal().mean(), A.diagonal().mean(), ridge)
    inverse = curvature.inverse(state, ridge)
    assert isinstance(inverse, Separable)
    torch.testing.assert_close(inverse.out, torch.linalg.inv(S + l1 * torch.eye(OUT)))
    torch.testing.assert_close(inverse.fan_in, torch.linalg.inv(A + l2 * torch.eye(FAN_IN)))
    torch.testing.assert_close(l1 * l2, torch.tensor(ridge))
    torch.testing.assert_close(l2 / l1, A.diagonal().mean() / S.diagonal().mean())


@pytest.mark.parametrize("curvature", [Identity(damping=0.3), Adaptive(), Kronecker(), EigenKronecker()])
def test_R_is_bounded_below_at_every_lr(curvature: Curvature) -> None:
    """In the batch form R = M/lr + damping + decay tends to damping + decay, so lr -> infinity keeps a finite step."""
    decay, damping = 0.05, curvature.damping  # type: ignore[attr-defined]
    for lr in (1e6, 1e8):
        ridge = curvature.ridge(lr, decay, batch=True)
        state: State = curvature.advance({}, columns(), lambda: torch.randn(OUT, FAN_IN), ridge)
        R = curvature.inverse(state, ridge).to_dense(OUT, FAN_IN) / lr
        assert torch.linalg.eigvalsh(R)[0] >= (damping + decay) * (1 - 1e-6)
        assert torch.linalg.eigvalsh(R)[-1] <= (damping + decay) * (1 + 100 / math.sqrt(lr))


def test_advance_leaves_the_old_state_alone() -> None:
    for curvature in (Adaptive(), Kronecker(refresh_every=1), EigenKronecker(refresh_every=1)):
        state, _ = advanced(curvature, 2)
        before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        curvature.advance(state, columns(), lambda: torch.randn(OUT, FAN_IN), 0.1)
        for name, value in before.items():
            assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value))


def test_the_ladder_jitters_then_widens_then_gives_up() -> None:
    fine = torch.eye(3)
    assert linalg.cholesky(fine)[1] == 0
    singular = torch.ones(3, 3)  # rank one
    factor, failures = linalg.cholesky(singular)
    assert factor is not None
    assert failures > 0
    single = torch.tensor([[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]], dtype=torch.float64)
    assert linalg.inverse(single)[1] == 0
    assert linalg.inverse(torch.full((3, 3), float("nan")))[0] is None
    assert linalg.inverse(-fine)[0] is None
    lopsided = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    inverse, _ = linalg.inverse(lopsided)
    assert inverse is not None
    torch.testing.assert_close(inverse, torch.linalg.inv((lopsided + lopsided.T) / 2))


def test_float64_is_tried_after_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.dtype] = []
    exact = torch.linalg.cholesky_ex

    def stubborn(matrix: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(matrix.dtype)
        factor, info = exact(matrix)
        return factor, info if matrix.dtype == torch.float64 else torch.ones_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", stubborn)
    inverse, failures = linalg.inverse(torch.eye(3, dtype=torch.float32))
    assert inverse is not None
    assert inverse.dtype == torch.float32
    assert failures == 3
    assert tried == [torch.float32] * 3 + [torch.float64]


@pytest.mark.parametrize("kind", [Kronecker, EigenKronecker])
def test_the_last_good_factor_is_kept_and_counted(kind: type[Kronecker], monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(4, 3)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    optimizer = DDPNOpt(model, curvature=kind(refresh_every=1))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    assert optimizer.diagnostics()["factorisation_failures"] == 0
    names = ("S_inverse", "A_inverse") if kind is Kronecker else ("S_basis", "A_basis")
    good = [optimizer.state[model.weight][name].clone() for name in names]
    monkeypatch.setattr(linalg, "inverse", lambda matrix: (None, 6))
    monkeypatch.setattr(linalg, "eigenbasis", lambda matrix: (None, 6))
    step()
    for name, before in zip(names, good, strict=True):
        assert torch.equal(optimizer.state[model.weight][name], before)
    assert optimizer.diagnostics()["factorisation_failures"] == 12


@pytest.mark.parametrize("kind", [Kronecker, EigenKronecker])
def test_dead_inputs_and_gradients_do_no_harm(kind: type[Kronecker]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    optimizer = DDPNOpt(model, curvature=kind())
    x, y = torch.zeros(6, 4), torch.randint(3, (6,))
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_diagnostics_tell_the_two_parts_of_a_policy() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    criterion = torch.nn.CrossEntropyLoss()
    from ddpnopt import Matched

    optimizer = DDPNOpt(model, 0.01, curvature=Identity(), terminal=Matched(criterion))
    assert optimizer.diagnostics() == {}
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    said = optimizer.diagnostics()
    assert list(said["layers"]) == ["0", "2"]
    assert said["layers"]["0"]["feedback"] == 0.0  # nothing moved before the first layer
    assert said["layers"]["2"]["feedback"] > 0.0
    decrease = float((loss - criterion(model(x), y)).detach())
    assert said["actual_decrease"] == pytest.approx(decrease)
    # half of the first-order decrease lr |g|^2 is what the quadratic model leaves at R = M / lr
    assert decrease / 3 < said["predicted_decrease"] < decrease


@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_factors_are_of_each_samples_own_loss(coupling: Literal["batch", "sample"]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    biases = []  # the bias's gradient is v, the gradient at the layer's output
    for one_x, one_y in zip(x, y, strict=True):
        loss = torch.nn.functional.cross_entropy(model(one_x[None]), one_y[None])
        biases.append(torch.autograd.grad(loss, model[0].bias)[0])  # type: ignore[arg-type]
    v, inputs = torch.stack(biases), torch.cat([x, torch.ones(8, 1)], 1)
    optimizer = DDPNOpt(model, 1e-12, coupling=coupling)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]  # type: ignore[index]
    torch.testing.assert_close(state["S"], v.T @ v / 8)
    torch.testing.assert_close(state["A"], inputs.T @ inputs / 8)


def test_the_sample_form_builds_its_factors_from_V_x() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    optimizer = DDPNOpt(model, 0.05, coupling="sample")
    weights, loss_of = [p.detach().clone() for p in model.parameters()], torch.nn.functional.cross_entropy
    loss_of(model(x), y).backward()
    optimizer.step()
    last = optimizer.state[model[2].weight]  # type: ignore[index]
    inverse = Kronecker().inverse(last, 0.1)
    squares = []
    for one_x, one_y in zip(x, y, strict=True):
        with torch.no_grad():
            for p, old in zip(model.parameters(), weights, strict=True):
                p.copy_(old)
        loss = loss_of(model(one_x[None]), one_y[None])
        _, v, W, b = torch.autograd.grad(loss, list(model.parameters()))
        g = torch.cat([W, b[:, None]], 1)
        c = 1 - 0.05 * (g * inverse.solve(g)).sum()  # Proposition 3: V_x <- c p behind the last layer
        squares.append((c * v)[:, None] @ (c * v)[None])
    first = optimizer.state[model[0].weight]  # type: ignore[index]
    torch.testing.assert_close(first["S"], torch.stack(squares).mean(0))
