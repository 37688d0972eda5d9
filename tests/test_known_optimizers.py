"""Without feedback the sample form is the adapted optimizer: torch's bit for bit, K-FAC and EKFAC as written here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import NETWORKS, Case
from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Identity, Kronecker
from ddpnopt.curvature import Curvature
from ddpnopt.layers import Block, Call, rule_for

STEPS = 7
Make = Callable[[nn.Module], torch.optim.Optimizer]


def train(case: Case, make: Make, steps: int = STEPS) -> list[Tensor]:
    torch.manual_seed(1)
    for layer in case.model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    optimizer = make(case.model)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(case.model(case.x), case.y).backward()
        optimizer.step()
    return [p.detach().clone() for p in case.model.parameters()]


def same_bits(case: Case, ours: Make, theirs: Make) -> None:
    expected = train(case, theirs)
    for new, wanted in zip(train(case, ours), expected, strict=True):
        assert torch.equal(new, wanted)


def open_loop(curvature: Curvature, **settings: Any) -> Make:
    return lambda model: DDPNOpt(model, 0.05, curvature=curvature, coupling="sample", feedback=False, **settings)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_identity_is_sgd(network: str, dtype: torch.dtype, momentum: float, decay: float) -> None:
    torch.set_default_dtype(dtype)
    settings: dict[str, Any] = {"momentum": momentum, "weight_decay": decay}
    ours = open_loop(Identity(), **settings)
    same_bits(NETWORKS[network](), ours, lambda m: torch.optim.SGD(m.parameters(), 0.05, **settings))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_decay_shrinks_the_weights_of_sgd(network: str, momentum: float) -> None:
    class Shrinking(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(1 / (1 + 0.05 * 0.3))
            super().step(closure)

    ours = open_loop(Identity(), momentum=momentum, weight_decay=0.3, decoupled_weight_decay=True)
    same_bits(NETWORKS[network](), ours, lambda m: Shrinking(m.parameters(), 0.05, momentum=momentum))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adaptive_is_rmsprop(network: str, dtype: torch.dtype, momentum: float, decay: float) -> None:
    torch.set_default_dtype(dtype)
    settings: dict[str, Any] = {"momentum": momentum, "weight_decay": decay}
    ours = open_loop(Adaptive(beta=0.9, eps=1e-6), **settings)
    theirs: Make = lambda m: torch.optim.RMSprop(m.parameters(), 0.05, alpha=0.9, eps=1e-6, **settings)  # noqa: E731
    same_bits(NETWORKS[network](), ours, theirs)


def test_default_adaptive_is_default_rmsprop() -> None:
    ours: Make = lambda m: DDPNOpt(m, 0.01, curvature=Adaptive(), coupling="sample", feedback=False)  # noqa: E731
    same_bits(NETWORKS["mlp"](), ours, lambda m: torch.optim.RMSprop(m.parameters(), 0.01))


class PlainKroneckerFactored:
    """K-FAC and EKFAC on an MLP or a conv net by per-sample autograd and explicit Kronecker products."""

    def __init__(self, case: Case, *, eigen: bool, lr: float, damping: float, every: int, beta: float):
        self.case, self.eigen, self.lr, self.damping, self.every, self.beta = case, eigen, lr, damping, every, beta
        self.layers = [m for m in case.model if list(m.parameters())]
        self.t = 0
        self.A: dict[nn.Module, Tensor] = {}
        self.S: dict[nn.Module, Tensor] = {}
        self.E: dict[nn.Module, Tensor] = {}
        self.M_inverse: dict[nn.Module, Tensor] = {}
        self.Q: dict[nn.Module, Tensor] = {}

    def per_sample(self) -> dict[nn.Module, list[Tensor]]:
        found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.layers}
        for x, y in zip(self.case.x, self.case.y, strict=True):
            self.case.model.zero_grad()
            nn.functional.cross_entropy(self.case.model(x[None]), y[None]).backward()
            for layer in self.layers:
                weight, bias = (p.grad for p in (layer.weight, layer.bias))
                assert isinstance(weight, Tensor)
                assert isinstance(bias, Tensor)
                found[layer].append(torch.cat([weight.reshape(len(weight), -1), bias[:, None]], 1))
        return found

    def moments(self, layer: nn.Module, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        B = len(gradients)
        if isinstance(layer, nn.Linear):  # g = v x~', x~ ends in 1: the factors can be read off
            v = torch.stack([g[:, -1] for g in gradients])
            x = torch.stack([g[g[:, -1].abs().argmax()] / g[g[:, -1].abs().argmax(), -1] for g in gradients])
            return v.T @ v / B, x.T @ x / B
        tau = sum((g.square().sum() for g in gradients), torch.zeros(())) / B
        S = torch.stack([g @ g.T for g in gradients]).mean(0)
        A = torch.stack([g.T @ g for g in gradients]).mean(0)
        return S / tau.sqrt(), A / tau.sqrt()

    def step(self) -> None:
        self.t += 1
        w = min(self.beta, 1 - 1 / self.t)
        for layer, gradients in self.per_sample().items():
            S, A = self.moments(layer, gradients)
            self.S[layer] = w * self.S.get(layer, 0) + (1 - w) * S
            self.A[layer] = w * self.A.get(layer, 0) + (1 - w) * A
            S, A = self.S[layer], self.A[layer]
            if (self.t - 1) % self.every == 0:
                pi = (A.trace() / len(A) / (S.trace() / len(S))).sqrt()
                l1, l2 = self.damping**0.5 / pi, self.damping**0.5 * pi
                damped = torch.kron(S + l1 * torch.eye(len(S)), A + l2 * torch.eye(len(A)))
                self.M_inverse[layer] = torch.linalg.inv(damped)
                self.Q[layer] = torch.kron(torch.linalg.eigh(S)[1], torch.linalg.eigh(A)[1])
            g = torch.stack(gradients).mean(0)
            Q = self.Q[layer]
            squares = torch.stack([(Q.T @ one.flatten()).square() for one in gradients]).mean(0)
            self.E[layer] = w * self.E.get(layer, 0) + (1 - w) * squares
            if self.eigen:
                direction = Q @ ((Q.T @ g.flatten()) / (self.E[layer] + self.damping))
            else:
                direction = self.M_inverse[layer] @ g.flatten()
            moved = self.lr * direction.view_as(g)
            with torch.no_grad():
                layer.weight -= moved[:, :-1].reshape(layer.weight.shape)  # type: ignore[operator,arg-type]
                layer.bias -= moved[:, -1]  # type: ignore[operator]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("eigen", [False, True])
def test_kronecker_is_kfac_and_eigen_kronecker_is_ekfac(network: str, eigen: bool) -> None:
    torch.manual_seed(2)
    case = NETWORKS[network](80)  # enough samples for full-rank factors, whose eigenbasis is unique
    case.model[3] = nn.Tanh()
    every = 3 if eigen else 1  # Kronecker's first refreshes come at every step
    settings: dict[str, Any] = {"damping": 0.2, "refresh_every": every, "beta": 0.6}
    curvature = EigenKronecker(**settings) if eigen else Kronecker(**settings, average_every=1, rank=None)
    new = train(case, open_loop(curvature))
    train(case, lambda m: torch.optim.SGD(m.parameters(), 0.0), steps=0)  # the same start
    plain = PlainKroneckerFactored(case, eigen=eigen, lr=0.05, damping=0.2, every=every, beta=0.6)
    for _ in range(STEPS):
        plain.step()
    for ours, theirs in zip(new, case.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-10)


def test_eigen_kronecker_is_the_baseline() -> None:
    from ddpnopt.baselines import EKFAC

    for network in NETWORKS.values():
        case = network()
        settings = {"momentum": 0.8, "weight_decay": 0.1}
        expected = train(case, lambda m: EKFAC(m, 0.05, **settings))  # type: ignore[arg-type] # noqa: B023
        new = train(case, open_loop(EigenKronecker(), **settings))
        # a batch of 4 or 5 leaves eigenspaces of dimension above one, whose basis hangs on the last bit: so must we
        for ours, theirs in zip(new, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("channels", [3, 8])  # by patches, and by groups
def test_gradients_of_convolutions_have_the_bits_of_the_baseline(channels: int) -> None:
    from ddpnopt.baselines.ekfac import conv_weight_gradients

    layer = nn.Conv2d(channels, 5, 3, stride=2, padding=1, bias=False, dtype=torch.float32)
    x = torch.randn(6, channels, 9, 8, dtype=torch.float32)
    v = torch.randn_like(layer(x).detach())
    block = Block(("weight",), tuple(layer.parameters()))
    (columns,) = rule_for(layer).columns(layer, [block], Call((x,), {}, [v[None]]))
    assert torch.equal(columns.dense().values[0], conv_weight_gradients(layer, x, v))


def test_bare_parameters_follow_the_base_rule() -> None:
    def minimise(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
        torch.manual_seed(3)
        parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))]
        optimizer = make(parameters)
        for _ in range(10):
            optimizer.zero_grad()
            sum(((p - 1) ** 2).sum() for p in parameters).backward()  # type: ignore[union-attr]
            optimizer.step()
        return [p.detach() for p in parameters]

    ours = minimise(lambda p: DDPNOpt(p, 0.05, curvature=Identity(), coupling="sample", feedback=False))
    for new, wanted in zip(ours, minimise(lambda p: torch.optim.SGD(p, 0.05)), strict=True):
        assert torch.equal(new, wanted)
    for new, old in zip(minimise(lambda p: DDPNOpt(p, 0.1)), minimise(lambda p: DDPNOpt(p, 0.0)), strict=True):
        assert (new - 1).norm() < 0.8 * (old - 1).norm()
