"""Stages solved again at the state the rollout meets: against the dense reference, and as an option like the others."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CURVATURES, NETWORKS, Case
from ddpnopt import Batch, DDPNOpt, Identity, StepError, linalg, reference
from test_bad_input import equal, snapshot
from test_exact_step import LR, controls, frozen_R, reference_terminal, terminals
from test_forms import FORMS, backward_then_step, trained

ANEW = Batch(relinearise=True)


def tokens(batch: int = 5) -> Case:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )
    return Case(model, torch.randn(batch, 2, 3), torch.randint(3, (batch,)))


CHAINS: dict[str, Callable[..., Case]] = {**NETWORKS, "tokens": tokens}
CAPS = {"mlp": "mlp", "conv": "conv", "tokens": "mlp"}  # whose cap a matched terminal takes


def reference_step(
    case: Case,
    end: reference.Terminal,
    before: Sequence[Tensor],
    R: Sequence[Tensor],
    drift: Sequence[Tensor],
    decay: float,
) -> list[Tensor]:
    """The layers' new controls; what stands between layers is a stage with a control of length 0."""
    layers, nothing = iter(zip(before, R, drift, strict=True)), (torch.empty(0), torch.empty(0, 0), torch.empty(0))
    x, functions, terms = case.x, [], []
    for module in case.model:
        layer = bool(list(module.parameters()))
        by_module = partial(without_control, module, x.shape[1:])
        functions.append(reference.stages_of(nn.Sequential(module), x)[0][0] if layer else by_module)
        terms.append(next(layers) if layer else nothing)
        x = module(x).detach()
    controls, metrics, drifts = zip(*terms, strict=True)
    step = reference.dense_step(
        functions,
        controls,
        case.x.flatten(1),
        end,
        R=metrics,
        decay=[decay] * len(terms),
        drift=drifts,
        relinearise=True,
    )
    return [u for u in step.controls if len(u)]


def without_control(module: nn.Module, shape: torch.Size, u: Tensor, x: Tensor) -> Tensor:
    y: Tensor = module(x.reshape(1, *shape))
    return y.flatten()


def check_second_step(network: str, curvature: str, terminal: str, decay: float, momentum: float) -> None:
    case, criterion, M = CHAINS[network](), nn.CrossEntropyLoss(), CURVATURES[curvature]
    options: dict[str, Any] = {"terminal": terminals(criterion, CAPS[network])[terminal], "momentum": momentum}
    options |= {"weight_decay": decay, "decoupled_weight_decay": False, "max_change": math.inf}
    optimizer = DDPNOpt(case.model, LR, curvature=M, coupling=ANEW, **options)
    first = controls(optimizer)
    backward_then_step(optimizer, case, criterion)
    before = controls(optimizer)
    twin = Case(copy.deepcopy(case.model), case.x, case.y)
    plain = DDPNOpt(twin.model, LR, curvature=M, **options)
    plain.load_state_dict(optimizer.state_dict())
    end = reference_terminal(terminal, CAPS[network], case, step=1)
    backward_then_step(optimizer, case, criterion)
    backward_then_step(plain, twin, criterion)

    drift = [momentum * (u - old) for u, old in zip(before, first, strict=True)]
    R = frozen_R(optimizer, M, decay, batch=len(case.x))
    expected = reference_step(case, end, before, R, drift, decay)
    for new, wanted in zip(controls(optimizer), expected, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)
    matters = [(new - old).abs().max() > 1e-7 for new, old in zip(controls(optimizer), controls(plain), strict=True)]
    assert matters == [False, *[True] * (len(before) - 1)]  # the first stage's input does not move


@pytest.mark.parametrize("network", CHAINS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("terminal", ["gradient", "matched", "exact", "exact, capped"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_one_step_is_the_dense_reference(network: str, curvature: str, terminal: str, decay: float) -> None:
    check_second_step(network, curvature, terminal, decay, momentum=0.0)


# momentum counts in units of M^-1 Q_u: only where M does not change is that the last update itself
@pytest.mark.parametrize("network", CHAINS)
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_with_momentum_it_is_the_dense_reference(network: str, decay: float) -> None:
    check_second_step(network, "identity", "exact", decay, momentum=0.7)


@pytest.mark.parametrize(("feedback", "product"), [(True, 0.0), (False, 0.0), (False, 1.0)])
def test_the_reference_needs_feedback_and_a_product_of_control_and_state(feedback: bool, product: float) -> None:
    """Where ``f_u`` does not depend on the state, or no stage answers to it, relinearising changes nothing."""
    A, B = torch.randn(2, 3, 3)

    def f(u: Tensor, x: Tensor) -> Tensor:
        y: Tensor = A @ x + B @ u + product * u * x
        return y

    x = torch.randn(4, 3)
    controls, R = [*torch.randn(3, 3)], [torch.eye(3)] * 3
    y = x
    for u in controls:
        y = torch.stack([f(u, one) for one in y])
    end = reference.exact(lambda y, target: (y - target).square().sum(), y, torch.randn(4, 3))
    plain, anew = (
        reference.dense_step(
            [f] * 3, controls, x, end, R=R, decay=[0.1] * 3, value_ridge=0.3, feedback=feedback, relinearise=relinearise
        )
        for relinearise in (False, True)
    )
    for new, wanted in zip(anew.controls, plain.controls, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


def test_the_reference_refuses_samples() -> None:
    one = torch.ones(1, 1)
    end = reference.exact(lambda y, target: (y - target).square().sum(), one, one)
    with pytest.raises(ValueError, match="'sample'"):
        reference.dense_step([lambda u, x: u * x], [one[0]], one, end, R=[one], coupling="sample", relinearise=True)


# --- layers that are no outer products, or not linear in their input ---


class Sine(nn.Module):
    """Without a rule of its own: ``scale * sin(x)``; draws a number that it does not use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.sin(x) + 0 * torch.rand(())


@pytest.mark.parametrize("make", [Sine, nn.LayerNorm])
def test_any_last_layer_solves_its_problem_at_the_new_inputs(make: Callable[[int], nn.Module]) -> None:
    last = make(3)
    case = Case(nn.Sequential(nn.Linear(4, 3), last), torch.randn(5, 4), torch.randint(3, (5,)))
    nominal = case.model[0](case.x).detach().requires_grad_()
    output = last(nominal)
    z = torch.autograd.grad(nn.functional.cross_entropy(output, case.y, reduction="sum"), output, retain_graph=True)[0]
    (pulled,) = torch.autograd.grad(output, nominal, z)
    parameters = list(last.parameters())
    old = torch.cat([p.detach().clone() for p in parameters])

    optimizer = DDPNOpt(case.model, 2.0, curvature=Identity(), coupling=ANEW, weight_decay=0.0)
    backward_then_step(optimizer, case, nn.CrossEntropyLoss())
    new, moved = torch.cat([p.detach().clone() for p in parameters]), case.model[0](case.x).detach()
    torch.nn.utils.vector_to_parameters(old, parameters)
    G = torch.stack([torch.cat(torch.autograd.grad(last(x), parameters, v)) for x, v in zip(moved, z, strict=True)])
    r = (pulled * (moved - nominal)).sum(1).detach()
    assert r.norm() > 0.1
    beta = torch.linalg.solve(5 * torch.eye(5) + 2.0 * G @ G.T, 1 + r)
    torch.testing.assert_close(new, old - 2.0 * G.T @ beta, rtol=1e-10, atol=1e-10)


def test_what_a_rule_draws_does_not_shift_the_dropout_masks() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Sine(6), nn.Dropout(0.5), nn.Linear(6, 3))
    masks: list[Tensor] = []
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    case = Case(model, torch.randn(8, 4), torch.randint(3, (8,)))
    backward_then_step(DDPNOpt(model, coupling=ANEW), case, nn.CrossEntropyLoss())
    nominal, again = masks
    assert torch.equal(nominal, again)


class Scale(nn.Module):
    """Without a rule of its own; a parameter, and perhaps a layer inside."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.linspace(0.5, 1.5, 6)), inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * x
        return y if self.inner is None else self.inner(y)


def test_a_layer_inside_a_layer_waits_for_its_own_turn() -> None:
    """The rule of the outer one calls the inner one, which must neither move nor be recorded then."""
    found = []
    for inside in (True, False):
        torch.manual_seed(5)
        first, last = nn.Linear(4, 6), nn.Linear(6, 3)
        model = nn.Sequential(first, Scale(last)) if inside else nn.Sequential(first, Scale(), last)
        case = Case(model, torch.randn(5, 4), torch.randint(3, (5,)))
        optimizer = DDPNOpt(model, 1.0, curvature=Identity(), coupling=ANEW)
        for _ in range(2):
            backward_then_step(optimizer, case, nn.CrossEntropyLoss())
        found.append([p.detach() for p in model.parameters()])
    for new, wanted in zip(*found, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


def test_a_layer_that_runs_twice_keeps_its_nominal_columns() -> None:
    found = []
    for coupling in ("batch", ANEW):
        torch.manual_seed(5)
        model = Twice()
        x, y = torch.randn(6, 4), torch.randint(4, (6,))
        optimizer = DDPNOpt(model, 1.0, coupling=coupling)
        for _ in range(2):
            optimizer.step(lambda x=x, y=y, model=model: nn.functional.cross_entropy(model(x), y))  # type: ignore[misc]
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(new, wanted) for new, wanted in zip(*found, strict=True))


# --- as an optimizer ---


@pytest.mark.parametrize("feedback", [True, False])
def test_without_the_option_or_without_feedback_it_is_the_batch_form(feedback: bool) -> None:
    settings: dict[str, Any] = {"feedback": feedback, "momentum": 0.5, "weight_decay": 0.01}
    wanted = trained(backward_then_step, "exact", coupling="batch", **settings)
    couplings = [Batch()] if feedback else [Batch(), ANEW]
    for coupling in couplings:
        found = trained(backward_then_step, "exact", coupling=coupling, **settings)
        assert all(torch.equal(new, old) for new, old in zip(found, wanted, strict=True))


@pytest.mark.parametrize("network", CHAINS)
@pytest.mark.parametrize("terminal", ["gradient", "matched", "exact", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_forms_give_the_same_bits(
    network: str, terminal: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "tokens", tokens)
    torch.set_default_dtype(dtype)
    settings: dict[str, Any] = {"coupling": ANEW, "momentum": 0.5, "weight_decay": 0.01, "steps": 5}
    first, *others = [trained(form, terminal, network, **settings) for form in FORMS]
    for other in others:
        assert all(torch.equal(new, wanted) for new, wanted in zip(other, first, strict=True))


@pytest.mark.parametrize("network", CHAINS)
def test_micro_batches_are_the_batch(network: str) -> None:
    def weights(parts: list[int]) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = CHAINS[network](6), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 1.0, coupling=ANEW)
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(case.x.split(parts), case.y.split(parts), strict=True):
                (criterion(case.model(x), y) * len(x) / 6).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights([4, 2]), weights([6]), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-8, atol=1e-8)


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    def fresh() -> tuple[Case, DDPNOpt]:
        torch.manual_seed(5)
        case = CHAINS["conv"]()
        return case, DDPNOpt(case.model, coupling=ANEW, momentum=0.5, weight_decay=0.01)

    case, optimizer = fresh()
    for step in range(5):
        backward_then_step(optimizer, case, nn.CrossEntropyLoss())
        if step == 2:
            torch.save([case.model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    expected = [p.detach() for p in case.model.parameters()]
    case, optimizer = fresh()
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    case.model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for _ in range(2):
        backward_then_step(optimizer, case, nn.CrossEntropyLoss())
    assert all(torch.equal(new, wanted) for new, wanted in zip(case.model.parameters(), expected, strict=True))


def test_single_precision_follows_and_the_batch_algebra_is_in_float64() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(5)
        case = CHAINS["mlp"]()
        case = Case(case.model.float().to(dtype), case.x.float().to(dtype), case.y)
        optimizer = DDPNOpt(case.model, curvature=Identity(), coupling=ANEW)
        backward_then_step(optimizer, case, nn.CrossEntropyLoss())
        assert optimizer._last is not None
        grams = [figures.args[1] for figures in optimizer._last.figures.values()]  # type: ignore[attr-defined]
        assert [gram.dtype for gram in grams] == [torch.float64] * 3
        found.append([p.detach().double() for p in case.model.parameters()])
    for new, wanted in zip(*found, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-5, atol=1e-6)


def test_diagnostics() -> None:
    found = []
    for coupling in ("batch", ANEW):
        torch.manual_seed(5)
        case, criterion = CHAINS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(
            case.model, 3.0, curvature=Identity(), terminal=terminals(criterion, "mlp")["exact"], coupling=coupling
        )
        before = criterion(case.model(case.x), case.y).detach()
        backward_then_step(optimizer, case, criterion)
        after = criterion(case.model(case.x), case.y).detach()
        assert optimizer.diagnostics()["actual_decrease"] == pytest.approx(float(before - after))
        found.append(optimizer.diagnostics())
    plain, anew = found
    # the plan is made before the rollout, and is the same one
    assert anew["predicted_decrease"] == plain["predicted_decrease"]
    assert anew["factorisation_failures"] == 0
    assert anew["layers"]["0"] == plain["layers"]["0"]
    for name in ("2", "4"):
        for figure in ("k", "feedback"):
            assert anew["layers"][name][figure] > 0
            assert anew["layers"][name][figure] != pytest.approx(plain["layers"][name][figure])
    assert "Batch(relinearise=True)" in str(optimizer.report())


def test_retried_factorisations_of_both_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    once = linalg.cholesky
    monkeypatch.setattr(linalg, "cholesky", lambda matrix: (once(matrix)[0], 1))
    case = CHAINS["mlp"]()
    optimizer = DDPNOpt(case.model, curvature=Identity(), coupling=ANEW)
    backward_then_step(optimizer, case, nn.CrossEntropyLoss())
    assert optimizer.diagnostics()["factorisation_failures"] == 3 + 2


class Shy(nn.Module):
    """Without a rule of its own; refuses numbers that it does not know."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.scale, self.known = nn.Parameter(torch.ones(6)), known

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isin(x.detach(), self.known).all()):
            raise RuntimeError("never seen")
        return self.scale * x


def test_a_rule_that_fails_in_the_rollout_is_named_and_nothing_changes() -> None:
    first, x, y = nn.Linear(4, 6), torch.randn(8, 4), torch.randint(3, (8,))
    shy = Shy(first(x).detach())
    case = Case(nn.Sequential(first, shy, nn.Linear(6, 3)), x, y)
    optimizer = DDPNOpt(case.model, curvature=Identity(), coupling=ANEW, momentum=0.5)
    before = snapshot(case, optimizer)
    with pytest.raises(StepError, match=r"1, Shy fails in the rollout \(never seen\)"):
        backward_then_step(optimizer, case, nn.CrossEntropyLoss())
    assert equal(snapshot(case, optimizer), before)


@pytest.mark.parametrize("layer", [2, 4])
def test_a_model_that_breaks_in_the_rollout_is_left_as_it_was(layer: int) -> None:
    case, criterion, runs = CHAINS["mlp"](), nn.CrossEntropyLoss(), list[nn.Module]()
    optimizer = DDPNOpt(case.model, coupling=ANEW, momentum=0.5)
    backward_then_step(optimizer, case, criterion)

    def break_again(module: nn.Module, inputs: Any, output: Any) -> None:
        runs.append(module)
        if len(runs) == 2:
            raise KeyError("the model broke")

    before = snapshot(case, optimizer)
    handle = case.model[layer].register_forward_hook(break_again)
    with pytest.raises(KeyError):
        backward_then_step(optimizer, case, criterion)
    assert equal(snapshot(case, optimizer), before)
    handle.remove()
    backward_then_step(optimizer, case, criterion)
    assert not equal(snapshot(case, optimizer), before)


# --- what is refused ---


@pytest.mark.parametrize("relinearise", [1, None, "yes"])
def test_it_is_a_bool(relinearise: Any) -> None:
    with pytest.raises(TypeError, match="relinearise must be True or False"):
        Batch(relinearise=relinearise)


def test_stages_are_refused() -> None:
    model = CHAINS["mlp"]().model
    with pytest.raises(ValueError, match=r"Batch\(relinearise=True\) makes every layer a stage"):
        DDPNOpt(model, coupling=ANEW, stages=["0"])
    DDPNOpt(model, coupling=Batch(), stages=["0"])
