"""Curvatures: averages, refresh, damping, and the ladder of factorisations down to the last good one."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Identity, Kronecker, linalg
from ddpnopt.columns import Moment, OuterColumns
from ddpnopt.curvature import Curvature
from ddpnopt.curvature.base import State
from ddpnopt.curvature.factor import averaged, inverted, side, split_ridge
from ddpnopt.curvature.kronecker import next_time
from ddpnopt.inverse import LowRank, Separable

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
    curvature, ridge = Kronecker(refresh_every=3, average_every=1, beta=0.99), 0.2
    state, seen = advanced(curvature, 25, ridge)
    S, A = (torch.stack([c.factors()[i] for c in seen[:24]]).mean(0) for i in (0, 1))
    l1, l2 = split_ridge(S.diagonal().mean(), A.diagonal().mean(), ridge)
    inverse = curvature.inverse(state, ridge)
    assert isinstance(inverse, Separable)
    torch.testing.assert_close(inverse.out, torch.linalg.inv(S + l1 * torch.eye(OUT)))
    torch.testing.assert_close(inverse.fan_in, torch.linalg.inv(A + l2 * torch.eye(FAN_IN)))
    torch.testing.assert_close(l1 * l2, torch.tensor(ridge))
    torch.testing.assert_close(l2 / l1, A.diagonal().mean() / S.diagonal().mean())


def test_a_batch_enters_the_averages_every_few_steps() -> None:
    entered = [*range(11), 12, 14, 16, 18, 20, 23]
    for curvature in (Kronecker(refresh_every=2, average_every=3, beta=0.99), Kronecker(refresh_every=3, beta=0.99)):
        state, seen = advanced(curvature, 25)
        torch.testing.assert_close(state["A"], torch.stack([seen[i].factors()[1] for i in entered]).mean(0))


def test_intervals_grow_to_the_given_one() -> None:
    times = [0]
    while times[-1] < 130:
        times.append(next_time(times[-1], 10))
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[:11] == [1] * 10 + [2]
    assert set(gaps[-3:]) == {10}


def decaying(count: int, side: int) -> Tensor:
    """Rows whose second moment has eigenvalues that fall like 1/i^2."""
    return torch.randn(count, side) / torch.arange(1, side + 1)


def test_a_wide_factor_is_exact_where_its_rank_suffices() -> None:
    wide = OuterColumns(torch.randn(1, 3, 1, 40), torch.randn(3, 1, 50))
    curvature = Kronecker(rank=4, refresh_every=1)
    state: State = {}
    for _ in range(2):  # the second step must not lose what the first has found
        state = curvature.advance(state, wide, lambda: torch.zeros(40, 50), 0.1)
    assert "A" not in state
    inverse, whole = curvature.inverse(state, 0.1), Kronecker(rank=None)
    expected = whole.inverse(whole.advance({}, wide, lambda: torch.zeros(40, 50), 0.1), 0.1)
    assert isinstance(inverse, Separable)
    assert isinstance(inverse.out, LowRank)
    gradient = torch.randn(40, 50)
    torch.testing.assert_close(inverse.solve(gradient), expected.solve(gradient))


def test_a_wide_factor_follows_the_moving_average() -> None:
    state: State = {}
    average = torch.zeros(60, 60)
    for t in range(12):
        moment, past = Moment(decaying(30, 60), 30), min(0.9, 1 - 1 / (t + 1))
        state = averaged(state, "A", moment, past, 6)
        average = past * average + (1 - past) * moment.matrix()
    torch.testing.assert_close(state["A_trace"], average.trace())
    basis, values = state["A_basis"], state["A_values"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(6))
    best = torch.linalg.eigvalsh(average)[-6:]
    assert best.sum() * 0.99 < values.sum() <= best.sum() * (1 + 1e-9)
    low = side(inverted(state, "A", torch.tensor(0.3))[0], "A")
    assert isinstance(low, LowRank)
    whole = torch.linalg.inv(low.times(torch.eye(60))) - 0.3 * torch.eye(60)
    torch.testing.assert_close(whole.trace(), average.trace())
    torch.testing.assert_close(whole @ basis, basis * values)


@pytest.mark.parametrize("lr", [1e-6, 1.0, 1e6])
def test_a_wide_factor_keeps_R_positive_and_bounded_below(lr: float) -> None:
    curvature = Kronecker(rank=2, refresh_every=1)
    ridge = curvature.ridge(lr, 0.05, batch=True)
    state: State = {}
    for _ in range(3):
        wide = OuterColumns(decaying(8, 20)[None, :, None], decaying(8, 25)[:, None])
        state = curvature.advance(state, wide, lambda: torch.zeros(20, 25), ridge)
    R = curvature.inverse(state, ridge).to_dense(20, 25) / lr
    assert torch.linalg.eigvalsh(R)[0] >= 0.15 * (1 - 1e-6)


def test_wide_factors_resume_bit_for_bit(tmp_path: Path) -> None:
    def start() -> tuple[torch.nn.Module, DDPNOpt]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))
        return model, DDPNOpt(model, curvature=Kronecker(rank=2, refresh_every=3, average_every=2))

    def steps(model: torch.nn.Module, optimizer: DDPNOpt, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            x, y = torch.randn(6, 30, generator=generator), torch.randint(3, (6,), generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    whole = start()
    steps(*whole, range(8))
    first, resumed = start(), start()
    steps(*first, range(5))
    torch.save(first[1].state_dict(), tmp_path / "state")
    resumed[0].load_state_dict(first[0].state_dict())
    resumed[1].load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    steps(*resumed, range(5, 8))
    assert "A_basis" in resumed[1].state[resumed[0][0].weight]  # type: ignore[index]
    for new, wanted in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(new, wanted)


@pytest.mark.parametrize(("damping", "x"), [(0.1, torch.zeros(4, 30)), (0.0, torch.ones(4, 30))])
def test_wide_factors_without_inputs_or_damping_do_no_harm(damping: float, x: Tensor) -> None:
    model = torch.nn.Linear(30, 20, bias=False)
    optimizer = DDPNOpt(model, curvature=Kronecker(damping=damping, rank=2, refresh_every=1))
    for _ in range(2):  # a dead factor, and one of rank one
        optimizer.step(lambda: model(x.to(model.weight.dtype)).square().mean())
    assert bool(torch.isfinite(model.weight).all())


@pytest.mark.parametrize("option", ["average_every", "rank"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_counts_are_checked(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Kronecker(**{option: value})  # type: ignore[arg-type]


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
    assert optimizer.diagnostics() == {"skipped_steps": 0}
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
