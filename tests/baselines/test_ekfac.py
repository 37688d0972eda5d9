"""EKFAC against a dense Kronecker implementation written apart, and its manners as an optimizer."""

import io
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from ddpnopt.baselines import EKFAC
from ddpnopt.baselines.ekfac import conv_weight_gradients, eigenbasis

DAMPING, LR = 0.05, 0.1
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def dense_net() -> nn.Sequential:
    positions = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Tanh()
    return nn.Sequential(*positions, nn.Flatten(), nn.Linear(6, 4, bias=False))


def conv_net() -> nn.Sequential:
    first = nn.Conv2d(1, 4, 2, stride=(2, 1), padding=(1, 0)), nn.ReLU(inplace=True)
    second = nn.Conv2d(4, 2, 2, groups=2, bias=False), nn.ReLU(inplace=True)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8, 4))


def as_matrix(weight: Tensor, *bias: Tensor) -> Tensor:
    return torch.cat([weight.flatten(1), *(b[:, None] for b in bias)], 1)


class DenseEKFAC:
    """The same algorithm with every Kronecker matrix formed and every per-sample gradient by ``vmap(grad)``."""

    def __init__(self, model: nn.Sequential, **settings: Any) -> None:
        self.model, self.settings = deepcopy(model), settings
        self.states: dict[int, dict[str, Any]] = {i: {} for i, m in enumerate(model) if list(m.parameters())}

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> None:
        directions = {i: self.direction(i, x, y) for i in self.states}
        for i, d in directions.items():
            params = list(self.model[i].parameters())
            for p, part in zip(params, torch.split(d, [p[0].numel() for p in params], 1), strict=True):
                p.sub_(LR * part.reshape(p.shape))

    def direction(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        layer, h = self.model[i], self.model[:i](x)

        def loss_of_output(z: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(self.model[i + 1 :](z[None].clone())[0], y)

        def loss_of_params(params: dict[str, Tensor], h: Tensor, y: Tensor) -> Tensor:
            return loss_of_output(functional_call(layer, params, (h[None],))[0], y)

        gradients = vmap(grad(loss_of_params), (None, 0, 0))(dict(layer.named_parameters()), h, y)
        g = torch.stack([as_matrix(*(p[n] for p in gradients.values())) for n in range(len(x))])
        if isinstance(layer, nn.Linear):
            v = vmap(grad(loss_of_output))(layer(h), y)
            h = h if layer.bias is None else torch.cat([h, torch.ones_like(h[..., :1])], -1)
            A = torch.einsum("n...i,n...j->ij", h, h) / len(h)
            S = torch.einsum("n...i,n...j->ij", v, v) / (v.numel() / v.shape[-1])
        else:
            root = g.square().sum((1, 2)).mean().sqrt()
            A, S = (g.mT @ g).mean(0) / root, (g @ g.mT).mean(0) / root
        return self.solve(self.states[i], A, S, g, as_matrix(*layer.parameters()))

    def solve(self, state: dict[str, Any], A: Tensor, S: Tensor, g: Tensor, u: Tensor) -> Tensor:
        t = state["t"] = state.get("t", 0) + 1
        w = min(self.settings["beta"], 1 - 1 / t)
        state["A"], state["S"] = w * state.get("A", 0) + (1 - w) * A, w * state.get("S", 0) + (1 - w) * S
        if (t - 1) % self.settings["refresh_every"] == 0:
            state["Q"] = torch.kron(torch.linalg.eigh(state["S"])[1], torch.linalg.eigh(state["A"])[1])
        E = ((g.flatten(1) @ state["Q"]) ** 2).mean(0)
        running = self.settings["second_moment"] == "running"
        state["E"] = w * state.get("E", 0) + (1 - w) * E if running else E
        M = state["Q"] @ torch.diag(state["E"]) @ state["Q"].T
        d = (g.mean(0) + self.settings["weight_decay"] * u).flatten()
        d = torch.linalg.solve(M + DAMPING * torch.eye(len(d)), d)
        state["buffer"] = self.settings["momentum"] * state.get("buffer", 0) + d
        return torch.as_tensor(state["buffer"]).reshape(u.shape)


@pytest.mark.parametrize(("net", "shape"), [(dense_net, (3, 4)), (conv_net, (1, 4, 4))])
@pytest.mark.parametrize("second_moment", ["running", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_the_dense_implementation(net: Any, shape: tuple[int, ...], second_moment: str, reduction: str) -> None:
    model, B = net(), 16
    settings: Any = {"second_moment": second_moment, "refresh_every": 2, "beta": 0.6, "momentum": 0.5}
    oracle = DenseEKFAC(model, weight_decay=0.02, **settings)
    times = B if reduction == "sum" else 1  # B times gradient and decay, at lr / B, make the same path
    settings |= {"damping": DAMPING, "reduction": reduction, "weight_decay": 0.02 * times}
    optimizer = EKFAC(model, LR / times, **settings)
    for _ in range(5):
        x, y = torch.randn(B, *shape), torch.randint(4, (B,))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y, reduction=reduction))
        optimizer.step()
        oracle.step(x, y)
    torch.testing.assert_close(weights(model), weights(oracle.model), rtol=1e-9, atol=1e-11)
    for i, state in oracle.states.items():
        ours = optimizer.state_dict()["curvature"][str(i)]
        torch.testing.assert_close((ours["A"], ours["S"]), (state["A"], state["S"]))


def test_one_sample_is_the_exact_fisher() -> None:
    """With one sample ``E`` is the diagonal of g g' in the basis, ``M = g g'``, the step lr g / (|g|^2 + damping)."""
    layer = nn.Linear(4, 3)
    before, optimizer = weights(layer), EKFAC(layer, LR, damping=DAMPING)
    x, y = torch.randn(1, 4), torch.tensor([1])
    assert optimizer.step(lambda: float(len(backward(layer, x, y)))) == 2
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    g = as_matrix(*gradients).flatten()
    state = optimizer.state_dict()["curvature"][""]
    Q = torch.kron(state["Q_S"], state["Q_A"])
    torch.testing.assert_close(state["E"].flatten(), (Q.T @ torch.outer(g, g) @ Q).diagonal())
    expected = [p - LR * d / (g @ g + DAMPING) for p, d in zip(before, gradients, strict=True)]
    torch.testing.assert_close(weights(layer), expected)


GEOMETRIES = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(0, 2), dilation=(1, 2)),
    nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2, groups=2),
    nn.Conv2d(4, 6, 3, padding="valid", padding_mode="reflect"),
    nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular", groups=4, stride=2),
    nn.Conv2d(4, 6, 2, padding="same", padding_mode="replicate"),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # in float32 some are made of patches
@pytest.mark.parametrize("layer", GEOMETRIES, ids=str)
def test_convolution_gradients_of_single_samples(layer: nn.Conv2d, dtype: torch.dtype) -> None:
    layer = deepcopy(layer).to(dtype)
    x = torch.randn(3, 4, *(7, 8)[: layer.weight.ndim - 2], dtype=dtype)
    v = torch.randn_like(layer(x))
    alone = [torch.autograd.grad(layer(x[n : n + 1]), layer.weight, v[n : n + 1])[0] for n in range(3)]
    rounding = 1e-4 if dtype == torch.float32 else 1e-7
    found = conv_weight_gradients(layer, x, v)
    torch.testing.assert_close(found, torch.stack(alone).flatten(2), rtol=rounding, atol=rounding)


def small_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def backward(model: nn.Module, x: Tensor, y: Tensor, scale: float = 1.0) -> list[Tensor]:
    torch.autograd.backward(scale * cross_entropy(model(x), y))
    return [p.grad for p in model.parameters() if p.grad is not None]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        backward(model, x.to(next(model.parameters()).dtype), y)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("case", ["other layers", "own forward", "tied"])
def test_what_has_no_rule_takes_sgd_steps(case: str) -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.PReLU())
    if case != "other layers":
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
        model[2].weight = model[0].weight
    if case == "own forward":
        model = nn.Sequential(
            type("Adapted", (nn.Linear,), {"forward": lambda self, x: 2 * x @ self.weight.T})(6, 6, False)
        )
    twin = deepcopy(model)
    train(model, EKFAC(model, 0.1, momentum=0.9, weight_decay=0.01), range(3))
    train(twin, torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=0.01), range(3))
    torch.testing.assert_close(weights(model), weights(twin))


def test_frozen_parameters_stay_and_a_frozen_bias_counts_as_none() -> None:
    model, plain = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
    nn.init.zeros_(model.bias).requires_grad_(False)
    plain.load_state_dict({"weight": model.weight.detach().clone()})
    frozen = nn.Sequential(nn.Linear(6, 4).requires_grad_(False), model)
    before, (x, y) = weights(frozen), batch()
    ours, theirs = EKFAC(frozen, 0.1), EKFAC(plain, 0.1)
    for optimizer, net, inputs in ((ours, frozen, x), (theirs, plain, frozen[0](x))):
        backward(net, inputs, y)
        optimizer.step()
    after = weights(frozen)
    torch.testing.assert_close(after[2], plain.weight.detach())
    assert [torch.equal(p, q) for p, q in zip(after, before, strict=True)] == [True, True, False, True]
    model.bias.requires_grad_()  # the layer's curvature begins anew
    train(frozen, ours, range(1))
    assert not torch.equal(model.bias, before[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit_from_plain_tensors(dtype: torch.dtype) -> None:
    model = small_net(dtype)
    optimizer = EKFAC(model, 0.05, momentum=0.9, weight_decay=0.01, refresh_every=3)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, range(4, 8))
    resumed = EKFAC(twin := small_net(dtype), 0.9, refresh_every=3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert all(layer["E"].dtype == torch.float32 for layer in resumed.state_dict()["curvature"].values())
    train(twin, resumed, range(4, 8))
    assert_same(weights(model), weights(twin))
    assert_same(optimizer.state_dict(), resumed.state_dict())


def test_a_foreign_state_is_refused() -> None:
    optimizer = EKFAC(small_net(), 0.1)
    with pytest.raises(ValueError, match="not of an EKFAC"):
        optimizer.load_state_dict(torch.optim.SGD(small_net().parameters(), 0.1).state_dict())
    other = EKFAC(narrow := nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.LayerNorm(3), nn.Linear(3, 3)), 0.1)
    train(narrow, other, range(1))
    with pytest.raises(ValueError, match="layer '0'"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("poison", ["moments", "grad", "lr"])
def test_a_step_that_is_not_finite_changes_nothing(poison: str) -> None:
    model = small_net()
    optimizer = EKFAC(model, 0.1, momentum=0.9)
    train(model, optimizer, range(2))
    gradients = backward(model, *batch(), scale=1e200 if poison == "moments" else 1)  # whose squares overflow
    optimizer.param_groups[0]["lr"] = torch.inf if poison == "lr" else 0.1
    if poison == "grad":
        gradients[-1][0] = torch.inf
    before = deepcopy((weights(model), optimizer.state_dict()))
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.step()
    assert_same(before, (weights(model), optimizer.state_dict()))


def test_only_the_backward_pass_that_is_stepped_on_counts() -> None:
    model, twin = small_net(), small_net()
    a, b, (x, y) = EKFAC(model, 0.1), EKFAC(twin, 0.1), batch()
    backward(model, x + 1, y)
    a.zero_grad()  # discards it
    model(x + 2)  # has no backward pass
    loss = cross_entropy(model(x), y) / 2
    torch.autograd.backward(loss, retain_graph=True)
    torch.autograd.backward(loss)  # a retained graph adds up
    model(x + 3)
    backward(twin, x, y)
    a.step()
    b.step()
    torch.testing.assert_close(weights(model), weights(twin))


def test_two_passes_single_samples_and_steps_after_close_are_refused() -> None:
    optimizer = EKFAC(model := small_net(), 0.1)
    for _ in range(2):
        backward(model, *batch())
    with pytest.raises(ValueError, match=r"layer '.': 2 backward passes"):
        optimizer.step()
    torch.autograd.backward(model(torch.randn(6)).sum())
    with pytest.raises(ValueError, match="batch dimension"):
        optimizer.step()
    optimizer.close()
    for module, fresh in zip(model.modules(), small_net().modules(), strict=True):
        assert vars(module).keys() == vars(fresh).keys()
        assert not module._forward_hooks
    with pytest.raises(ValueError, match="closed"):
        optimizer.step()


def test_a_failing_eigendecomposition_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, last, failing, eigh = torch.ones(3, 3).float(), torch.eye(3).float(), [torch.float32], torch.linalg.eigh
    fails = lambda X: torch.linalg.cholesky(-torch.eye(1)) if X.dtype in failing else eigh(X)  # noqa: E731
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    Q = eigenbasis(factor, last)
    torch.testing.assert_close((Q.T @ factor @ Q).diagonal(), torch.tensor([0.0, 0.0, 3.0]).float())
    failing.append(torch.float64)
    assert eigenbasis(factor, last) is last


BAD = {"lr": -1.0, "damping": 0.0, "refresh_every": 0, "beta": 1.0, "momentum": -0.1, "weight_decay": torch.nan}


@pytest.mark.parametrize(("name", "value"), [*BAD.items(), ("second_moment", "none"), ("reduction", "max")])
def test_bad_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.* got {value!r}"):
        EKFAC(nn.Linear(2, 2), **{"lr": 0.1, name: value})
