"""Full per-sample V_xx: against the dense reference, against the sample form, and what it refuses."""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CURVATURES, NETWORKS, Case
from ddpnopt import DDPNOpt, Dense, Exact, Gradient, Identity, Matched, dense, reference
from ddpnopt.coupling import Coupling
from ddpnopt.dense import chain_of
from ddpnopt.terminal import Terminal
from test_exact_step import controls, frozen_R, own_loss

LR = 0.3
CAP = 1.9


def sigmoid_net(batch: int = 5) -> Case:
    """Nested, with modules before the first layer and after the last one."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(4, 6), nn.Sigmoid()),
        nn.Sequential(nn.Sequential(nn.Linear(6, 5)), nn.Sigmoid(), nn.Linear(5, 3, bias=False)),
        nn.Sigmoid(),
    )
    return Case(model, torch.randn(batch, 2, 2), torch.randint(3, (batch,)))


CHAINS: dict[str, Callable[..., Case]] = {**NETWORKS, "sigmoid": sigmoid_net}
BOTH = Dense(eps=0.05, second_order=True)


def terminal_of(name: str, criterion: nn.Module) -> Terminal:
    if name == "gradient":
        return Gradient()
    return Matched(criterion, cap=CAP) if name == "matched" else Exact(criterion)


def reference_terminal(name: str, case: Case) -> reference.Terminal:
    with torch.no_grad():
        output = case.model(case.x)
    if name == "matched":
        return reference.matched(own_loss, output, case.y, cap=CAP)
    return {"gradient": reference.gradient, "exact": reference.exact}[name](own_loss, output, case.y)


def one_step(optimizer: DDPNOpt, case: Case, criterion: nn.Module) -> Any:
    optimizer.zero_grad()
    criterion(case.model(case.x), case.y).backward()
    return optimizer.step()


def trained(network: str, steps: int, terminal: str = "gradient", **settings: Any) -> tuple[list[Tensor], DDPNOpt]:
    torch.manual_seed(5)
    case, criterion = CHAINS[network](40), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, 0.03, terminal=terminal_of(terminal, criterion), **settings)
    for _ in range(steps):
        one_step(optimizer, case, criterion)
    return [p.detach() for p in case.model.parameters()], optimizer


# --- against the dense reference ---


def expected_step(optimizer: DDPNOpt, case: Case, end: reference.Terminal, **options: Any) -> reference.DenseStep:
    """Of the reference; its R from the optimizer's state, which is that of the step just taken."""
    functions, _ = reference.stages_of(nn.Sequential(*chain_of(case.model)), case.x)
    decay = optimizer.param_groups[0]["weight_decay"]
    assert isinstance(optimizer.coupling, Dense)
    return reference.dense_step(
        functions,
        x=case.x.flatten(1),
        terminal=end,
        R=frozen_R(optimizer, optimizer.curvature, decay, batch=None),
        decay=[decay] * len(functions),
        coupling="sample",
        feedback=optimizer.feedback,
        value_ridge=optimizer.coupling.eps,
        second_order=optimizer.coupling.second_order,
        **options,
    )


@pytest.mark.parametrize("network", CHAINS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("terminal", ["gradient", "matched", "exact"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("feedback", [True, False])
def test_one_step_is_the_dense_reference(
    network: str, curvature: str, terminal: str, decay: float, feedback: bool
) -> None:
    check_one_step(network, curvature, terminal, decay, BOTH, feedback=feedback)


@pytest.mark.parametrize("network", CHAINS)
@pytest.mark.parametrize("terminal", ["gradient", "matched", "exact"])
@pytest.mark.parametrize("coupling", [Dense(), Dense(eps=0.05), Dense(second_order=True)])
def test_each_option_is_the_dense_reference(network: str, terminal: str, coupling: Dense) -> None:
    check_one_step(network, "kronecker", terminal, 0.2, coupling, feedback=True)


def check_one_step(
    network: str, curvature: str, terminal: str, decay: float, coupling: Dense, *, feedback: bool
) -> None:
    case, criterion = CHAINS[network](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(
        case.model,
        LR,
        curvature=CURVATURES[curvature],
        terminal=terminal_of(terminal, criterion),
        coupling=coupling,
        feedback=feedback,
        weight_decay=decay,
    )
    start = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    one_step(optimizer, case, criterion)  # so that moving averages hold two different steps
    case.model.load_state_dict(start)
    before, end = controls(optimizer), reference_terminal(terminal, case)
    one_step(optimizer, case, criterion)
    expected = expected_step(optimizer, case, end, controls=before)
    for new, old, wanted in zip(controls(optimizer), before, expected.controls, strict=True):
        assert (wanted - old).norm() > 1e-6
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)
    if feedback:
        layers = optimizer.diagnostics()["layers"].values()
        predicted = torch.tensor([figures["predicted_decrease"] for figures in layers])
        stage_cost = torch.stack(
            [-decay * u @ k.mean(0) / 2 for u, k in zip(before, expected.k, strict=True)]
        )  # counted by the reference, left out by the diagnostics
        torch.testing.assert_close(predicted, expected.predicted_decrease - stage_cost, rtol=1e-9, atol=1e-9)


def test_momentum_is_added_to_the_averaged_policy() -> None:
    case, criterion = CHAINS["sigmoid"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, LR, curvature=Identity(), coupling=BOTH, momentum=0.7, weight_decay=0.1)
    first = controls(optimizer)
    one_step(optimizer, case, criterion)
    before, end = controls(optimizer), reference_terminal("gradient", case)
    one_step(optimizer, case, criterion)
    drift = [0.7 * (new - old) for new, old in zip(before, first, strict=True)]
    expected = expected_step(optimizer, case, end, controls=before, drift=drift)
    for new, wanted in zip(controls(optimizer), expected.controls, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


def test_a_summed_loss_weighs_every_sample_by_one() -> None:
    case, criterion = CHAINS["sigmoid"](), nn.CrossEntropyLoss(reduction="sum")
    optimizer = DDPNOpt(case.model, LR, curvature=Identity(), terminal=Exact(criterion), coupling=BOTH)
    before, end = controls(optimizer), reference_terminal("exact", case)
    one_step(optimizer, case, criterion)
    ones = reference.Terminal(torch.ones(len(case.x)), end.gradient, end.factor)
    for new, wanted in zip(
        controls(optimizer), expected_step(optimizer, case, ones, controls=before).controls, strict=True
    ):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


# --- against the sample form ---


@pytest.mark.parametrize("network", CHAINS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("terminal", ["gradient", "exact"])
def test_without_options_it_is_the_sample_form(network: str, curvature: str, terminal: str) -> None:
    settings: dict[str, Any] = {
        "curvature": CURVATURES[curvature],
        "momentum": 0.5,
        "weight_decay": 0.1,
    }
    # a dead ReLU leaves the eigenbasis free in its null space: there rounding decides the second step's
    steps = 1 if (curvature, network) == ("eigen", "conv") else 3
    plain, by_columns = trained(network, steps, terminal, coupling="sample", **settings)
    full, by_matrices = trained(network, steps, terminal, coupling=Dense(), **settings)
    for new, wanted in zip(full, plain, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)
    expected, found = by_columns.diagnostics(), by_matrices.diagnostics()
    assert found["predicted_decrease"] == pytest.approx(expected["predicted_decrease"])
    for name, figures in expected["layers"].items():
        assert found["layers"][name] == pytest.approx(figures)


@pytest.mark.parametrize("network", CHAINS)
@pytest.mark.parametrize("coupling", [Dense(eps=1.0), Dense(second_order=True)])
def test_each_option_matters(network: str, coupling: Dense) -> None:
    plain, full = (trained(network, 1, curvature=Identity(), coupling=c)[0] for c in (Dense(), coupling))
    assert max(float((new - old).abs().max()) for new, old in zip(full, plain, strict=True)) > 1e-8


def test_without_feedback_it_is_the_adapted_optimizer() -> None:
    plain, full = (trained("mlp", 3, coupling=c, feedback=False)[0] for c in ("sample", BOTH))
    assert all(torch.equal(new, wanted) for new, wanted in zip(full, plain, strict=True))


# --- as an optimizer ---


@pytest.mark.parametrize("terminal", ["gradient", "matched", "exact"])
def test_three_forms_give_the_same_bits(terminal: str) -> None:
    def weights(form: str) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = CHAINS["sigmoid"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 1e-2, terminal=terminal_of(terminal, criterion), coupling=BOTH, momentum=0.5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(case.model(case.x), case.y)
            if form == "closure with backward":
                loss.backward()
            return loss

        for _ in range(10):
            one_step(optimizer, case, criterion) if form == "plain" else optimizer.step(closure)
        return [p.detach() for p in case.model.parameters()]

    first, *others = [weights(form) for form in ("plain", "closure with backward", "closure with the loss")]
    for other in others:
        assert all(torch.equal(new, wanted) for new, wanted in zip(other, first, strict=True))


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    def fresh() -> tuple[Case, DDPNOpt]:
        torch.manual_seed(5)
        case = CHAINS["sigmoid"]()
        return case, DDPNOpt(case.model, coupling=BOTH, momentum=0.5, weight_decay=0.01)

    case, optimizer = fresh()
    for step in range(5):
        one_step(optimizer, case, nn.CrossEntropyLoss())
        if step == 2:
            torch.save([case.model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    expected = [p.detach() for p in case.model.parameters()]
    case, optimizer = fresh()
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    case.model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for _ in range(2):
        one_step(optimizer, case, nn.CrossEntropyLoss())
    assert all(torch.equal(new, wanted) for new, wanted in zip(case.model.parameters(), expected, strict=True))


def test_micro_batches_are_the_batch() -> None:
    def weights(parts: int) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = CHAINS["sigmoid"](6), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, terminal=Exact(criterion), coupling=BOTH)
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(case.x.chunk(parts), case.y.chunk(parts), strict=True):
                (criterion(case.model(x), y) / parts).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(3), weights(1), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


def test_frozen_layers_are_part_of_the_dynamics() -> None:
    case, criterion = CHAINS["mlp"](), nn.CrossEntropyLoss()
    first, layer = case.model[0], case.model[2].requires_grad_(False)
    twin = nn.Sequential(first, case.model[1], _Fixed(layer), *list(case.model)[3:])
    before = {name: p.detach().clone() for name, p in case.model.state_dict().items()}
    found = []
    for model in (case.model, twin):
        case.model.load_state_dict(before)
        one_step(DDPNOpt(model, coupling=BOTH), Case(model, case.x, case.y), criterion)
        found.append([p.detach().clone() for p in case.model.parameters()])
    assert all(torch.equal(new, wanted) for new, wanted in zip(*found, strict=True))
    after = case.model.state_dict()
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not torch.equal(after["0.weight"], before["0.weight"])


class _Fixed(nn.Module):
    """A layer's function, its parameters hidden."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.call: Callable[[Tensor], Tensor] = layer.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def test_layers_without_a_rule_and_activations_in_place() -> None:
    def weights(inplace: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Embedding(7, 4), nn.ReLU(), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 4), nn.ReLU(inplace), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip
        case = Case(model, torch.randint(7, (6, 2)), torch.randint(3, (6,)))
        optimizer = DDPNOpt(model, curvature=Identity(), coupling=Dense(second_order=True))
        start = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            one_step(optimizer, case, nn.CrossEntropyLoss())
        assert all(not torch.equal(new, old) for new, old in zip(model.parameters(), start, strict=True))
        return [p.detach() for p in model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coupling", [Dense(eps=1e-2), BOTH])
def test_float32_follows_float64(coupling: Dense) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(5)
        case = CHAINS["mlp"]()
        model = case.model.to(torch.float32).to(dtype)
        model[2].requires_grad_(False)
        case = Case(model, case.x.float().to(dtype), case.y)
        optimizer = DDPNOpt(model, curvature=Identity(), coupling=coupling)
        one_step(optimizer, case, nn.CrossEntropyLoss())
        assert all(p.dtype == dtype for p in model.parameters())
        found.append([p.detach().double() for p in model.parameters()])
    for new, wanted in zip(*found, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-5, atol=1e-6)


# --- what is refused ---


@pytest.mark.parametrize("eps", [-1e-3, float("nan"), float("inf"), "1e-3", None])
def test_eps_is_checked(eps: Any) -> None:
    with pytest.raises(ValueError, match="eps must be a finite number >= 0"):
        Dense(eps=eps)


def test_second_order_is_checked() -> None:
    with pytest.raises(TypeError, match="second_order must be True or False"):
        Dense(second_order=1)  # type: ignore[arg-type]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.inner(x)
        return result


class Skipping(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self
        result: Tensor = second(first(x)) + x
        return result


LAYER = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Residual(), "an nn.Sequential, got a Residual"),
        (Skipping(nn.Linear(4, 4), nn.Tanh()), "an nn.Sequential, got a Skipping"),
        (list(nn.Linear(4, 4).parameters()), "got parameters without their module"),
        (nn.Sequential(nn.Linear(4, 4), Residual()), "Residual has layers inside"),
        (nn.Sequential(LAYER, nn.Tanh(), LAYER), "uses each layer once"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "BatchNorm1d mixes them"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False).eval()), "BatchNorm1d mixes them"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), "random numbers of Dropout"),
        (nn.Sequential(nn.Linear(4, 4), nn.RReLU()), "random numbers of RReLU"),
    ],
)
def test_models_that_are_no_chain_are_refused(model: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        DDPNOpt(model, coupling=Dense())
    assert "coupling='batch' or coupling='sample'" in str(error.value)
    if isinstance(model, nn.Module):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_chain_may_hold() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).eval())
    case = Case(model, torch.randn(5, 4), torch.randint(3, (5,)))
    optimizer = DDPNOpt(model, coupling=Dense(eps=1e-3))
    assert "Dense(eps=0.001, second_order=False)" in str(optimizer.report())
    one_step(optimizer, case, nn.CrossEntropyLoss())
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    with pytest.raises(ValueError, match="BatchNorm1d mixes them"):
        one_step(optimizer, case, nn.CrossEntropyLoss())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_stages_and_other_types_are_refused() -> None:
    model = CHAINS["mlp"]().model
    with pytest.raises(ValueError, match="leave stages out"):
        DDPNOpt(model, coupling=Dense(), stages=["0"])
    wrong: list[Any] = ["dense", Dense, 1e-3]
    for coupling in wrong:
        with pytest.raises(ValueError, match=r"or Dense\(\.\.\.\), got"):
            DDPNOpt(model, coupling=coupling)


def test_outputs_that_do_not_lead_with_the_batch_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))
    optimizer = DDPNOpt(model, coupling=Dense())
    model(torch.randn(5, 4)).square().mean().backward()
    with pytest.raises(ValueError, match="lead with the batch"):
        optimizer.step()


class Branching(nn.Module):
    """Asks for a value, which no transformation over samples can give."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().sum())


def test_modules_that_cannot_be_expanded_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Branching(), nn.Linear(3, 3), Branching())
    case = Case(model, torch.randn(5, 4), torch.randint(3, (5,)))
    optimizer = DDPNOpt(model, coupling=BOTH)
    with pytest.raises(ValueError, match="cannot expand stage 2, Linear"):
        one_step(optimizer, case, nn.CrossEntropyLoss())


@pytest.mark.parametrize("coupling", ["sample", Dense(), BOTH])
def test_a_failed_step_changes_nothing(coupling: Coupling) -> None:
    case, criterion = CHAINS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, coupling=coupling, momentum=0.5)
    one_step(optimizer, case, criterion)
    weights = [p.detach().clone() for p in case.model.parameters()]
    state = {p: dict(values) for p, values in optimizer.state.items()}
    with pytest.raises(ValueError, match="nan or inf"):
        one_step(optimizer, Case(case.model, case.x / 0, case.y), criterion)
    assert all(torch.equal(p, old) for p, old in zip(case.model.parameters(), weights, strict=True))
    for parameter, values in optimizer.state.items():
        assert all(state[parameter][name] is value for name, value in values.items())
    one_step(optimizer, case, criterion)
    assert not any(torch.equal(p, old) for p, old in zip(case.model.parameters(), weights, strict=True))


def test_the_example_runs() -> None:
    torch.set_default_dtype(torch.float32)
    assert doctest.testmod(dense).failed == 0
