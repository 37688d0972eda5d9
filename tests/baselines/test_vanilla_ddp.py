"""Dense joint DDP against problems with a known answer, and its manners as an optimizer."""

import io
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from ddpnopt.baselines import VanillaDDP
from ddpnopt.baselines.vanilla_ddp import memory
from ddpnopt.reference import dense_step, exact, stages_of

B = 5


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sigmoid())
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), inner, nn.Linear(4, 3)).to(dtype)


def conv() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ELU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, *(shape or (4,)), generator=generator), torch.randint(3, (B,), generator=generator)


def backward(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> float:
    loss = criterion(model(x), y)
    torch.autograd.backward(loss)
    return float(loss.detach())


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


class Coupled(nn.Module):
    """A convex loss that is no sum over samples."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.logsumexp(output.flatten(), 0) - output[0, target[0]]


def tail_optimal_step(
    model: nn.Sequential, cut: list[int], loss: Any, x: Tensor, r: float, decay: float
) -> list[Tensor]:
    """DDP by its definition: each stage applies the first control of the optimal linear-quadratic plan for itself and
    all that follow, found by one dense solve over their stacked controls; no Bellman recursion."""
    stages = [model[i:j] for i, j in zip(cut, [*cut[1:], len(model)], strict=True)]
    names = [list(dict(stage.named_parameters())) for stage in stages]
    controls = [torch.cat([p.detach().flatten() for p in stage.parameters()]) for stage in stages]

    def f(t: int, u: Tensor, X: Tensor, like: Tensor) -> Tensor:
        parts = torch.split(u, [p.numel() for p in stages[t].parameters()])
        params = {n: v.view_as(p) for n, v, p in zip(names[t], parts, stages[t].parameters(), strict=True)}
        return torch.as_tensor(functional_call(stages[t], params, (X.reshape(like.shape).clone(),)))

    states = [x]
    for t, u in enumerate(controls):
        states.append(f(t, u, states[-1].flatten(), states[-1]).detach())
    f_u = [jacrev(lambda u, t=t: f(t, u, states[t].flatten(), states[t]).flatten())(u) for t, u in enumerate(controls)]
    f_x = [
        jacrev(lambda X, t=t: f(t, controls[t], X, states[t]).flatten())(states[t].flatten())
        for t in range(len(stages))
    ]
    g = jacrev(loss)(states[-1]).flatten()
    H = jacrev(jacrev(loss))(states[-1]).reshape(len(g), len(g))
    new, X = [], x
    for t in range(len(stages)):
        to_end = list(accumulate(reversed(f_x[t:]), lambda P, F: P @ F))[::-1]  # d output / d x_s for s = t .. T - 1
        after = [*to_end[1:], torch.eye(len(g))]
        J = torch.cat([P @ F for P, F in zip(after, f_u[t:], strict=True)], 1)
        tail = torch.cat(controls[t:])
        gradient = J.T @ (g + H @ to_end[0] @ (X - states[t]).flatten()) + decay * tail
        plan = -torch.linalg.solve(J.T @ H @ J + r * torch.eye(len(tail)), gradient)
        new.append(controls[t] + plan[: len(controls[t])])
        X = f(t, new[-1], X.flatten(), X)
    return new


@pytest.mark.parametrize("lr", [0.5, 20.0])
@pytest.mark.parametrize(("net", "cut", "shape"), [(mlp, [0, 3, 4], (4,)), (conv, [0, 4], (1, 5, 5))])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), Coupled()], ids=str)
def test_every_stage_is_optimal_for_the_rest(
    net: Any, cut: list[int], shape: Any, criterion: nn.Module, lr: float
) -> None:
    model, (x, y) = net(), batch(*shape)
    expected = tail_optimal_step(model, cut, lambda z: criterion(z, y), x, 1 / lr + 0.2 + 0.1, 0.1)
    optimizer = VanillaDDP(model, criterion, lr, damping=0.2, weight_decay=0.1)
    backward(model, criterion, x, y)
    optimizer.step()
    torch.testing.assert_close(torch.cat([w.flatten() for w in weights(model)]), torch.cat(expected))


@pytest.mark.parametrize(("net", "shape"), [(mlp, (4,)), (conv, (1, 5, 5))])
def test_equals_the_reference(net: Any, shape: tuple[int, ...]) -> None:
    model, (x, y), lr, decay, damping = net(), batch(*shape), 3.0, 0.1, 0.2
    flat = nn.Sequential(*(m for child in model for m in (child if isinstance(child, nn.Sequential) else [child])))
    functions, controls = stages_of(flat, x)
    R = [(1 / lr + damping + decay) * torch.eye(len(u)) for u in controls]
    end = exact(lambda z, t: nn.functional.cross_entropy(z, t), model(x).detach(), y)
    step = dense_step(functions, controls, x.flatten(1), end, R=R, decay=[decay] * len(R))
    criterion = nn.CrossEntropyLoss()
    optimizer = VanillaDDP(model, criterion, lr, damping=damping, weight_decay=decay)
    backward(model, criterion, x, y)
    optimizer.step()
    for got, expected in zip(stages_of(flat, x)[1], step.controls, strict=True):
        torch.testing.assert_close(got, expected)


def test_affine_dynamics_make_it_newton() -> None:
    """With biases alone to train, the chain is linear in states and controls: one damped Newton step for all."""
    model, criterion = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3)), nn.CrossEntropyLoss()
    (x, y), lr = batch(), 7.0
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    for p in set(model.parameters()) - set(biases.values()):
        p.requires_grad_(False)
    widths = [len(b) for b in biases.values()]

    def loss(b: Tensor) -> Tensor:
        values = dict(zip(biases, torch.split(b, widths), strict=True))
        return torch.as_tensor(criterion(functional_call(model, values, (x,)), y))

    b = torch.cat([p.detach() for p in biases.values()])
    expected = b - torch.linalg.solve(jacrev(jacrev(loss))(b) + (1 / lr + 0.01) * torch.eye(len(b)), jacrev(loss)(b))
    optimizer = VanillaDDP(model, criterion, lr, damping=0.01)
    backward(model, criterion, x, y)
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in biases.values()]), expected)


def test_one_linear_layer_without_damping_is_least_squares() -> None:
    model, criterion, x, y = nn.Sequential(nn.Linear(3, 2)), nn.MSELoss(), torch.randn(20, 3), torch.randn(20, 2)
    optimizer = VanillaDDP(model, criterion, torch.inf, damping=0.0)
    backward(model, criterion, x, y)
    optimizer.step()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1)], 1), y).solution
    torch.testing.assert_close(weights(model), [solution.T[:, :3], solution.T[:, 3]])


# --- Manners ---------------------------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """A criterion with a buffer, a keyword argument and no reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.ones(3, dtype=torch.float32))

    def forward(self, output: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        return scale * nn.functional.cross_entropy(output, target, self.weight, reduction="none")


def test_the_loss_is_whatever_is_made_of_the_criterion() -> None:
    a, b, (x, y) = mlp(torch.float32), mlp(torch.float32), batch()
    weighted, plain = Weighted(), nn.CrossEntropyLoss()
    optimizers = VanillaDDP(a, weighted, 1.0), VanillaDDP(b, plain, 1.0)
    torch.autograd.backward(weighted(a(x.float()), y, scale=torch.tensor(0.5, dtype=torch.float32)).mean() * 2)
    backward(b, plain, x.float(), y)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(weights(a), weights(b))


def test_memory_is_estimated_before_it_is_taken() -> None:
    model, criterion = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)), nn.CrossEntropyLoss()
    before, optimizer = weights(model), VanillaDDP(model, criterion, 1.0, memory_limit_gb=1e-3)
    backward(model, criterion, torch.randn(4, 64), torch.randint(10, (4,)))
    needed = 8 * 2 * (64 * 20 + 20) ** 2 / 2**30  # Q_uu and its factor alone
    with pytest.raises(ValueError, match=r"take about .* GiB .* up to 80 numbers.* 1300 param.* is 0.001 GiB") as error:
        optimizer.step()
    assert needed < float(str(error.value).split()[4]) < 1.3 * needed
    assert_same(weights(model), before)
    last, first = 30 * 16 + 2 * 8 * 46 + 3 * 64 + 256 + 2 * 900 + 960, 480 + 3 * 256 + 2 * 16 * 100 + 20000
    assert memory([64, 16, 8], [100, 30]) == 8 * max(last, first) / 2**30


def test_random_numbers_buffers_and_frozen_parameters() -> None:
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ELU(inplace=True), nn.Linear(4, 3)
    )
    for p in list(model.parameters())[1:3]:
        p.requires_grad_(False)
    criterion, before = nn.CrossEntropyLoss(), weights(model)
    optimizer = VanillaDDP(model, criterion, 0.1)
    tokens, y = torch.randint(7, (B,)), batch()[1]
    output = model(tokens)
    torch.autograd.backward(criterion(output, y))
    random, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    chain = optimizer._chain
    torch.testing.assert_close(chain.sweep(chain.passes[0], torch.float64)[1], output.detach())
    optimizer.step()
    assert_same(torch.get_rng_state(), random)
    assert_same(dict(model.named_buffers()), buffers)
    moved = [not torch.equal(p, q) for p, q in zip(weights(model), before, strict=True)]
    assert moved == [True, False, False, True, True, True, True]


def test_it_learns_resumes_and_obeys_a_scheduler() -> None:
    def train(model: nn.Module, optimizer: VanillaDDP) -> list[float]:
        schedule, losses = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), []
        for _ in range(15):
            optimizer.zero_grad()
            losses.append(optimizer.step(lambda: backward(model, criterion, *batch())) or 0.0)
            schedule.step()
        return losses

    model, twin, criterion = mlp(), mlp(), nn.CrossEntropyLoss()
    optimizer, resumed = VanillaDDP(model, criterion, 10.0, weight_decay=1e-4), VanillaDDP(twin, criterion, 0.1)
    losses = train(model, optimizer)
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10.0 * 0.9**15)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights_of, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights_of)
    resumed.load_state_dict(state)
    assert train(model, optimizer) == train(twin, resumed)
    assert_same(weights(model), weights(twin))


class Power(nn.Module):
    def forward(self, output: Tensor, factor_and_power: tuple[float, int]) -> Tensor:
        factor, power = factor_and_power
        return factor * (output.square() if power == 2 else output).sum()


@pytest.mark.parametrize(("loss", "lr"), [((torch.inf, 2), 1.0), ((-1.0, 2), 1e3), ((1.0, 2), 0.0), ((1.0, 1), 1e50)])
def test_a_step_that_fails_changes_nothing(loss: Any, lr: float) -> None:
    """A loss that is not finite, a concave one, a learning rate that is no step, weights beyond their type."""
    model, criterion = mlp(torch.float32), Power()
    before, optimizer = weights(model), VanillaDDP(model, criterion, 1.0, damping=0.0)
    backward(model, criterion, batch()[0].float(), loss)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.step()
    assert_same(weights(model), before)


def test_only_passes_of_the_model_s_own_output_count() -> None:
    model, twin, criterion, (x, y) = mlp(), mlp(), nn.CrossEntropyLoss(), batch()
    a, b = VanillaDDP(model, criterion, 1.0), VanillaDDP(twin, criterion, 1.0)
    torch.autograd.backward(criterion(model(x) * 2, y))
    with pytest.raises(ValueError, match="there were 0"):
        a.step()
    backward(model, criterion, x - 1, y)
    a.zero_grad()  # discards it
    criterion(model(x + 1), y)  # has no backward pass
    torch.autograd.backward(criterion(torch.randn(B, 3, requires_grad=True), y))  # is not the model's
    loss = criterion(model(x), y)
    with torch.no_grad():
        model(x + 2)
    assert a._chain._entered is None
    torch.autograd.backward(loss)
    backward(twin, criterion, x, y)
    b.step()
    a.step()
    assert_same(weights(model), weights(twin))


def test_close_leaves_nothing_on_model_and_criterion() -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = VanillaDDP(model, criterion, 1.0)
    backward(model, criterion, *batch())
    optimizer.step()
    optimizer.close()
    fresh = [*mlp().modules(), nn.CrossEntropyLoss()]
    for module, new in zip([*model.modules(), criterion], fresh, strict=True):
        assert vars(module).keys() == vars(new).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with pytest.raises(ValueError, match="closed"):
        optimizer.step()


BAD = {"criterion": "mse", "lr": 0.0, "damping": -0.1, "weight_decay": torch.inf, "memory_limit_gb": 0.0}


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_bad_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.* got {value!r}"):
        VanillaDDP(mlp(), **{"criterion": nn.MSELoss(), "lr": 1.0, name: value})
