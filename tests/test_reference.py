"""The dense reference against oracles of another kind: finite differences, autograd, stacked solves."""

import doctest
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddpnopt import reference
from ddpnopt.reference import Function, Stage, Terminal, bellman, dense_step, stages_of

GAMMA = [0.3, 0.2, 0.4]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive_definite(size: int, seed: int) -> Tensor:
    A = randn(size, size, seed=seed)
    return A @ A.T / size + torch.eye(size, dtype=torch.float64)


def metrics(controls: Sequence[Tensor]) -> list[Tensor]:
    return [positive_definite(len(u), seed=70 + t) for t, u in enumerate(controls)]


def assert_same(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result: Tensor = torch.autograd.functional.jacobian(f, x)
    return result


def partials(f: Function, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    f_u, f_x = torch.autograd.functional.jacobian(f, (u, x))
    return f_u, f_x


def central_difference(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Jacobian [m, n] of f at x [n]."""
    steps = step * torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(f(x + e) - f(x - e)) / (2 * step) for e in steps], dim=1)


class Problem:
    """A chain with data, and its cost as one plain function of all controls, stacked."""

    def __init__(self, functions: Sequence[Function], controls: Sequence[Tensor], x: Tensor, target: Tensor) -> None:
        self.functions, self.controls, self.x, self.target = functions, controls, x, target
        self.weight = x.new_full((len(x),), 1 / len(x))

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.split_with_sizes([len(u) for u in self.controls])

    @property
    def start(self) -> Tensor:
        return torch.cat(list(self.controls))

    def outputs(self, stacked: Tensor) -> Tensor:
        ys = []
        for x in self.x:
            for f, u in zip(self.functions, self.split(stacked), strict=True):
                x = f(u, x)
            ys.append(x)
        return torch.stack(ys)

    def cost(self, stacked: Tensor, loss: reference.Loss, decay: Sequence[float] = (0.0,) * 3) -> Tensor:
        phi = torch.stack([loss(y, t) for y, t in zip(self.outputs(stacked), self.target, strict=True)])
        stage = [g / 2 * u.square().sum() for g, u in zip(decay, self.split(stacked), strict=True)]
        return self.weight @ phi + torch.stack(stage).sum()


def network(kind: str = "dense") -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "dense":
            model = nn.Sequential(
                nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3, bias=False)
            )
            x = randn(4, 3, seed=1)
        else:
            model = nn.Sequential(
                nn.AvgPool2d(2),
                nn.Conv2d(1, 2, 3, padding=1, stride=2, bias=False),
                nn.Tanh(),
                nn.Conv2d(2, 2, 2, groups=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(2, 3),
            )
            x = randn(4, 1, 6, 6, seed=1)
    functions, controls = stages_of(model.double(), x)
    return Problem(functions, controls, x.flatten(1), torch.tensor([0, 2, 1, 1]))


def linear_quadratic(B: int) -> tuple[Problem, reference.Loss]:
    """x <- A x + B u three times, and a quadratic terminal cost."""
    sizes, widths = [3, 4, 2, 3], [2, 3, 2]
    functions: list[Function] = []
    for t in range(3):
        A, C = randn(sizes[t + 1], sizes[t], seed=10 + t), randn(sizes[t + 1], widths[t], seed=20 + t)
        functions.append(lambda u, x, A=A, C=C: A @ x + C @ u)  # type: ignore[misc]
    controls = [randn(p, seed=30 + t) for t, p in enumerate(widths)]
    H = positive_definite(3, seed=40)
    problem = Problem(functions, controls, randn(B, 3, seed=41), randn(B, 3, seed=42))
    return problem, lambda y, t: (y - t) @ H @ (y - t) / 2


# --- One stage ---


def test_bellman_equals_finite_difference_jacobians() -> None:
    problem = network()
    f, u = problem.functions[0], problem.controls[0]
    x, V_x, l_u = randn(3, seed=1), randn(4, seed=2), randn(16, seed=4)
    V_xx, R = positive_definite(4, seed=3), positive_definite(16, seed=5)
    f_u = central_difference(lambda u: f(u, x), u)
    f_x = central_difference(lambda x: f(u, x), x)
    Q_u, Q_x = l_u + f_u.T @ V_x, f_x.T @ V_x
    Q_ux, Q_xx = f_u.T @ V_xx @ f_x, f_x.T @ V_xx @ f_x
    for full_Q_uu, Q_uu in [(True, R + f_u.T @ V_xx @ f_u), (False, R)]:
        policy = bellman(
            Stage(f, u, R, l_u, 0 * u),
            x,
            V_x,
            V_xx,
            full_Q_uu=full_Q_uu,
            feedback=True,
            second_order=False,
        )
        assert_same(Q_uu @ policy.k, -Q_u, tolerance=1e-7)
        assert_same(Q_uu @ policy.K, -Q_ux, tolerance=1e-7)
        assert_same(policy.V_x, Q_x - Q_ux.T @ Q_uu.inverse() @ Q_u, tolerance=1e-7)
        assert_same(policy.V_xx, Q_xx - Q_ux.T @ Q_uu.inverse() @ Q_ux, tolerance=1e-7)
        assert_same(policy.decrease, Q_u @ Q_uu.inverse() @ Q_u / 2, tolerance=1e-7)


def test_second_order_is_how_the_gradient_changes_with_the_state() -> None:
    problem = network()
    f, u = problem.functions[0], problem.controls[0]
    x, V_x = randn(3, seed=1), randn(4, seed=2)
    stage = Stage(f, u, torch.eye(16, dtype=torch.float64), 0 * u, 0 * u)
    policy = bellman(stage, x, V_x, 0 * V_x.diag(), full_Q_uu=False, feedback=True, second_order=True)
    Q_ux = central_difference(lambda x: torch.func.grad(lambda u: V_x @ f(u, x))(u), x)
    Q_xx = central_difference(torch.func.grad(lambda x: V_x @ f(u, x)), x)
    assert Q_ux.abs().max() > 0.1
    assert Q_xx.abs().max() > 0.1
    assert_same(-policy.K, Q_ux, tolerance=1e-8)
    assert_same(policy.V_xx, Q_xx - Q_ux.T @ Q_ux, tolerance=1e-8)


# --- The joint problem ---


@pytest.mark.parametrize("B", [1, 3])
def test_one_step_minimises_a_linear_quadratic_problem(B: int) -> None:
    problem, loss = linear_quadratic(B)
    end = reference.exact(loss, problem.outputs(problem.start), problem.target)
    R = [g * torch.eye(len(u), dtype=torch.float64) for g, u in zip(GAMMA, problem.controls, strict=True)]
    step = dense_step(problem.functions, problem.controls, problem.x, end, R=R, decay=GAMMA)

    def cost(stacked: Tensor) -> Tensor:
        return problem.cost(stacked, loss, GAMMA)

    start, new = problem.start, torch.cat(step.controls)
    curvature: Tensor = torch.autograd.functional.hessian(cost, start)
    minimum = start - torch.linalg.solve(curvature, jacobian(cost, start))
    assert (minimum - start).norm() > 1
    assert_same(new, minimum)
    assert_same(jacobian(cost, new), torch.zeros_like(new))
    assert_same(step.predicted_decrease.sum(), cost(start) - cost(new))
    assert_same(step.trajectory[-1], problem.outputs(new))


@pytest.mark.parametrize("weights", ["mean", "uneven"])
def test_curvature_and_drift_are_a_proximal_term(weights: str) -> None:
    problem, loss = linear_quadratic(3)
    end = reference.exact(loss, problem.outputs(problem.start), problem.target)
    if weights == "uneven":
        problem.weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
        end = replace(end, weight=problem.weight)
    M = metrics(problem.controls)
    R = [m + g * torch.eye(len(m), dtype=torch.float64) for m, g in zip(M, GAMMA, strict=True)]
    drift = [randn(len(u), seed=50 + t) for t, u in enumerate(problem.controls)]
    step = dense_step(problem.functions, problem.controls, problem.x, end, R=R, decay=GAMMA, drift=drift)

    def proximal(stacked: Tensor) -> Tensor:
        moves = problem.split(stacked - problem.start)
        terms = [d @ m @ d / 2 - d @ r @ s for d, m, r, s in zip(moves, M, R, drift, strict=True)]
        return problem.cost(stacked, loss, GAMMA) + torch.stack(terms).sum()

    new = torch.cat(step.controls)
    assert_same(jacobian(proximal, new), torch.zeros_like(new))


def gauss_newton(problem: Problem, decay: Sequence[float], R: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient [P] of the whole cost and its Gauss-Newton curvature plus R [P, P], controls stacked."""
    J = jacobian(problem.outputs, problem.start)  # [B, d, P]
    p = problem.outputs(problem.start).softmax(1)
    H = p.diag_embed() - p[:, :, None] * p[:, None, :]
    curvature = torch.einsum("b,bip,bij,bjq->pq", problem.weight, J, H, J)
    gradient = jacobian(lambda u: problem.cost(u, cross_entropy, decay), problem.start)
    return gradient, curvature + torch.block_diag(*R)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_on_linearised_dynamics_the_policies_make_the_whole_gauss_newton_step(kind: str) -> None:
    problem = network(kind)
    R = metrics(problem.controls)
    end = reference.exact(cross_entropy, problem.outputs(problem.start), problem.target)
    step = dense_step(problem.functions, problem.controls, problem.x, end, R=R, decay=GAMMA)
    gradient, curvature = gauss_newton(problem, GAMMA, R)
    newton = -torch.linalg.solve(curvature, gradient)

    du: list[Tensor] = []
    x, dx = problem.x, torch.zeros_like(problem.x)
    for f, u, k, K in zip(problem.functions, problem.controls, step.k, step.K, strict=True):
        du.append(k[0] + K[0] @ dx.flatten())
        moved = [partials(f, u, x_i) for x_i in x]
        dx = torch.stack([f_u @ du[-1] + f_x @ dx_i for (f_u, f_x), dx_i in zip(moved, dx, strict=True)])
        x = torch.stack([f(u, x_i) for x_i in x])
    assert max(K.abs().max() for K in step.K[1:]) > 1e-3
    assert_same(torch.cat(du), newton)
    assert_same(step.predicted_decrease.sum(), -gradient @ newton / 2)


def test_batch_without_feedback_solves_every_layer_alone() -> None:
    problem = network()
    R = metrics(problem.controls)
    drift = [randn(len(u), seed=50 + t) for t, u in enumerate(problem.controls)]
    end = reference.exact(cross_entropy, problem.outputs(problem.start), problem.target)
    step = dense_step(
        problem.functions, problem.controls, problem.x, end, R=R, decay=GAMMA, drift=drift, feedback=False
    )
    gradient, curvature = gauss_newton(problem, GAMMA, R)
    first = 0
    for u, new, r, m in zip(problem.controls, step.controls, R, drift, strict=True):
        own = slice(first, first + len(u))
        assert_same(new, u - torch.linalg.solve(curvature[own, own], gradient[own] - r @ m))
        first += len(u)


@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_rollout_feeds_back_how_far_the_new_trajectory_has_moved(coupling: Literal["batch", "sample"]) -> None:
    problem = network()
    x, B = problem.x, len(problem.x)
    end = reference.exact(cross_entropy, problem.outputs(problem.start), problem.target)
    step = dense_step(
        problem.functions,
        problem.controls,
        x,
        end,
        R=metrics(problem.controls),
        decay=GAMMA,
        coupling=coupling,
    )
    new_x = x
    for t, (f, u) in enumerate(zip(problem.functions, problem.controls, strict=True)):
        assert_same(step.trajectory[t], new_x)
        dx = new_x - x
        if coupling == "batch":
            du = step.k[t][0] + step.K[t][0] @ dx.flatten()
        else:
            du = torch.stack([step.k[t][i] + step.K[t][i] @ dx[i] for i in range(B)]).mean(0)
        assert_same(step.controls[t], u + du)
        x = torch.stack([f(u, x_i) for x_i in x])
        new_x = torch.stack([f(step.controls[t], x_i) for x_i in new_x])
    assert_same(step.trajectory[-1], new_x)


# --- Per-sample policies ---


@pytest.mark.parametrize("weights", ["mean", "sum"])
def test_sample_without_feedback_is_the_preconditioned_gradient_step(weights: str) -> None:
    problem = network()
    R = metrics(problem.controls)
    drift = [randn(len(u), seed=50 + t) for t, u in enumerate(problem.controls)]
    end = reference.gradient(cross_entropy, problem.outputs(problem.start), problem.target)
    if weights == "sum":
        problem.weight = torch.ones_like(problem.weight)
        end = replace(end, weight=problem.weight)
    step = dense_step(
        problem.functions,
        problem.controls,
        problem.x,
        end,
        R=R,
        decay=GAMMA,
        drift=drift,
        coupling="sample",
        feedback=False,
    )
    gradient = jacobian(lambda u: problem.cost(u, cross_entropy, GAMMA), problem.start)
    for u, new, r, g, m in zip(problem.controls, step.controls, R, problem.split(gradient), drift, strict=True):
        assert_same(new, u - torch.linalg.solve(r, g) + m)


def test_sample_with_gradient_terminal_is_one_scalar_per_sample_and_layer() -> None:
    problem = network()
    R = metrics(problem.controls)
    end = reference.gradient(cross_entropy, problem.outputs(problem.start), problem.target)
    step = dense_step(problem.functions, problem.controls, problem.x, end, R=R, coupling="sample")

    T, B = 3, len(problem.x)
    p, g, c = {}, {}, {}  # back-propagated vector, own gradient, scalar: by stage and sample
    for i in range(B):
        states = [problem.x[i]]
        for f, u in zip(problem.functions, problem.controls, strict=True):
            states.append(f(u, states[-1]))
        p[T, i], c[T, i] = end.gradient[i], 1.0
        for t in reversed(range(T)):
            u, x = problem.controls[t].requires_grad_(), states[t].detach().requires_grad_()
            g[t, i], p[t, i] = torch.autograd.grad(problem.functions[t](u, x), (u, x), p[t + 1, i])
            problem.controls[t].requires_grad_(False)
            s = float(g[t, i] @ torch.linalg.solve(R[t], g[t, i]))
            c[t, i] = c[t + 1, i] * (1 - c[t + 1, i] * s)
    x = new_x = problem.x
    for t, (f, u) in enumerate(zip(problem.functions, problem.controls, strict=True)):
        mean = torch.zeros_like(u)
        for i in range(B):
            # K answers to the terminal's V_xx, k to its V_x: both carry the factor c of the stage after
            mean += c[t + 1, i] * (1 + p[t, i] @ (new_x[i] - x[i])) * g[t, i] / B
            assert_same(step.V_x[t][i], c[t, i] * p[t, i])
            assert_same(step.V_xx[t][i], c[t, i] * torch.outer(p[t, i], p[t, i]))
        new = u - torch.linalg.solve(R[t], mean)
        assert_same(step.controls[t], new)
        x, new_x = torch.stack([f(u, z) for z in x]), torch.stack([f(new, z) for z in new_x])


@pytest.mark.parametrize("second_order", [False, True])
def test_couplings_agree_on_one_sample_with_the_same_Q_uu(second_order: bool) -> None:
    problem = network()
    functions, controls, x = problem.functions, problem.controls, problem.x[:1]
    end = reference.exact(cross_entropy, problem.outputs(problem.start)[:1], problem.target[:1])
    R = metrics(controls)
    joint = dense_step(functions, controls, x, end, R=R, decay=GAMMA, second_order=second_order)
    Q_uu, state = [], x[0]
    for t, (f, u) in enumerate(zip(functions, controls, strict=True)):
        f_u, _ = partials(f, u, state)
        Q_uu.append(R[t] + f_u.T @ joint.V_xx[t + 1][0] @ f_u)
        state = f(u, state)
    single = dense_step(functions, controls, x, end, R=Q_uu, decay=GAMMA, coupling="sample", second_order=second_order)
    assert_same(torch.cat(single.controls), torch.cat(joint.controls))


@pytest.mark.parametrize("value_ridge", [0.0, 2.0])
def test_the_value_of_the_tail_is_a_terminal_cost_for_the_head(value_ridge: float) -> None:
    problem = network()
    R = [20 * r for r in metrics(problem.controls)]  # so that V_xx stays positive enough for its Cholesky factor
    end = reference.exact(cross_entropy, problem.outputs(problem.start), problem.target)
    whole = dense_step(
        problem.functions,
        problem.controls,
        problem.x,
        end,
        R=R,
        decay=GAMMA,
        coupling="sample",
        value_ridge=value_ridge,
    )
    for t in range(3):
        eps = 1e-12 + value_ridge  # V_xx alone is singular
        V_xx = whole.V_xx[t + 1] + eps * torch.eye(whole.V_xx[t + 1].shape[1], dtype=torch.float64)
        tail = Terminal(end.weight, whole.V_x[t + 1], torch.linalg.cholesky(V_xx))
        head = dense_step(
            problem.functions[: t + 1],
            problem.controls[: t + 1],
            problem.x,
            tail,
            R=R[: t + 1],
            decay=GAMMA[: t + 1],
            coupling="sample",
            value_ridge=0.0,
        )
        assert_same(head.k[t], whole.k[t], tolerance=1e-10)
        assert_same(head.K[t], whole.K[t], tolerance=1e-10)


# --- Terminal cost ---


def softmax_terms(B: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, target = randn(B, d, seed=8), torch.arange(B) % d
    p = y.softmax(1)
    g = p - torch.eye(d, dtype=torch.float64)[target]
    return y, target, g, p.diag_embed() - p[:, :, None] * p[:, None, :]


def test_exact_terminal_is_the_softmax_hessian() -> None:
    y, target, g, H = softmax_terms(5, 4)
    end = reference.exact(cross_entropy, y, target)
    assert_same(end.gradient, g)
    assert_same(end.factor @ end.factor.mT, H, tolerance=1e-8)  # the root of a zero eigenvalue's rounding
    assert_same(end.weight, torch.full((5,), 0.2, dtype=torch.float64))


def test_exact_terminal_cuts_negative_curvature() -> None:
    y = randn(2, 2, seed=1)
    end = reference.exact(lambda y, _: y[0].square() - 3 * y[1].square(), y, y)
    expected = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64).expand(2, 2, 2)
    assert_same(end.factor @ end.factor.mT, expected)
    assert_same(end.gradient, y * torch.tensor([2.0, -6.0], dtype=torch.float64))


@pytest.mark.parametrize("cap", [0.1, 1.0, 10.0])
def test_matched_terminal_is_exact_along_the_gradient_up_to_its_cap(cap: float) -> None:
    y, target, g, H = softmax_terms(12, 4)
    end = reference.matched(cross_entropy, y, target, cap=cap)
    for g_i, H_i, Z in zip(g, H, end.factor, strict=True):
        c2 = max(1 / cap, float(g_i @ H_i @ g_i / (g_i @ g_i) ** 2))
        assert_same(Z @ Z.T, c2 * torch.outer(g_i, g_i))


def test_matched_terminal_survives_a_gradient_of_zero_or_nearly() -> None:
    y = torch.tensor([[0.0, 0.0], [1e-170, 0.0], [3.0, 4.0]], dtype=torch.float64)
    end = reference.matched(lambda y, _: y.square().sum() / 2, y, y)
    assert end.factor.isfinite().all()
    assert_same(end.factor[0, :, 0], torch.zeros(2, dtype=torch.float64))
    assert_same(end.factor[2, :, 0], y[2])


def test_gradient_terminal_is_an_outer_product_and_the_joint_one_is_weighted() -> None:
    y, target, g, _ = softmax_terms(3, 4)
    end = replace(reference.gradient(cross_entropy, y, target), weight=torch.tensor([1.0, 2, 3]).double())
    joint = end.joint()
    assert_same(end.factor[..., 0], g)
    assert_same(joint.gradient, torch.cat([g[0], 2 * g[1], 3 * g[2]])[None])
    blocks = [w * torch.outer(z, z) for w, z in zip((1, 2, 3), g, strict=True)]
    expected = torch.block_diag(*blocks)
    assert_same((joint.factor @ joint.factor.mT)[0], expected)


def test_sampled_terminal_has_the_hessian_as_its_mean() -> None:
    y, target, g, H = softmax_terms(3, 4)
    rotation = torch.linalg.qr(randn(3, 4, 4, seed=9)).Q  # its columns average to the identity exactly
    end = reference.sampled(cross_entropy, y, target, rotation)
    assert_same(end.factor @ end.factor.mT, H, tolerance=1e-8)
    assert_same(end.gradient, g)
    two = reference.sampled(cross_entropy, y, target, rotation[:, :, :2])
    assert_same(two.factor, end.factor[:, :, :2])


# --- Modules to chain, and refusals ---


def test_stages_of_reproduces_the_model_and_lays_weights_out_by_rows() -> None:
    convolution, dense = nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Linear(16, 3)
    model = nn.Sequential(nn.ReLU(), convolution, nn.Tanh(), nn.Flatten(), dense, nn.Sigmoid()).double()
    x = randn(5, 2, 4, 4, seed=1)
    functions, controls = stages_of(model, x)
    assert_same(controls[0], convolution.weight.detach().flatten())
    assert_same(controls[1].reshape(3, 17)[:, :16], dense.weight.detach())
    assert_same(controls[1].reshape(3, 17)[:, 16], dense.bias.detach())
    for sample, expected in zip(x, model(x), strict=True):
        hidden = functions[0](controls[0], sample.flatten())
        assert_same(functions[1](controls[1], hidden), expected)
    controls[0] += 1  # a copy, not the model's own memory
    assert not torch.equal(controls[0], convolution.weight.detach().flatten())


def test_sequences_and_one_dimensional_convolutions_are_stages() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv1d(5, 2, 3), nn.LayerNorm(2)).double()
    x = randn(2, 5, 3, seed=1)
    functions, controls = stages_of(model, x)
    y = x[0].flatten()
    for f, u in zip(functions, controls, strict=True):
        y = f(u, y)
    assert_same(y, model(x)[0].flatten())


@pytest.mark.parametrize("model", [nn.Sequential(nn.LSTM(3, 3)), nn.Sequential(nn.Tanh())])
def test_stages_of_says_what_it_cannot_split(model: nn.Sequential) -> None:
    with pytest.raises(TypeError, match="one weight"):
        stages_of(model.double(), randn(2, 3, seed=1))


def test_other_dtypes_are_refused_by_name() -> None:
    problem = network()
    y = problem.outputs(problem.start)
    end = reference.exact(cross_entropy, y, problem.target)
    R = metrics(problem.controls)
    with pytest.raises(TypeError, match=r"x is torch\.float32"):
        dense_step(problem.functions, problem.controls, problem.x.float(), end, R=R)
    with pytest.raises(TypeError, match=r"R is torch\.float16"):
        dense_step(problem.functions, problem.controls, problem.x, end, R=[r.half() for r in R])
    with pytest.raises(TypeError, match=r"y is torch\.bfloat16"):
        reference.gradient(cross_entropy, y.bfloat16(), problem.target)
    with pytest.raises(TypeError, match=r"factor is torch\.float32"):
        replace(end, factor=end.factor.float())
    with pytest.raises(TypeError, match=r"weight is torch\.float32"):
        stages_of(nn.Sequential(nn.Linear(3, 2).float()), problem.x)


def test_wrong_options_are_refused() -> None:
    problem = network()
    end = reference.exact(cross_entropy, problem.outputs(problem.start), problem.target)
    R = metrics(problem.controls)
    with pytest.raises(ValueError, match="coupling is 'joint'"):
        dense_step(problem.functions, problem.controls, problem.x, end, R=R, coupling="joint")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="argument"):
        dense_step(problem.functions, problem.controls, problem.x, end, R=R, decay=[0.1])


def test_examples_run() -> None:
    assert doctest.testmod(reference).failed == 0
