"""Penalties on the weights that a loop writes into its loss, and gradients that it edits by hand."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from cases import NETWORKS
from ddpnopt import (
    Adaptive,
    Batch,
    DDPNOpt,
    Dense,
    EigenKronecker,
    Exact,
    Identity,
    Kronecker,
    Matched,
    Sampled,
    StepError,
)
from ddpnopt.stage_cost import is_due, with_curvature

GAMMA = 0.02
Penalty = Callable[[nn.Module], Tensor]


def squares(model: nn.Module) -> Tensor:
    return GAMMA / 2 * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


def nothing(model: nn.Module) -> Tensor:
    return torch.zeros(())


def network() -> nn.Sequential:
    """No weight of it is 0, from where a penalty could not be seen."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        nn.init.normal_(model.get_parameter("2.bias"))
    return model


CRITERION = nn.CrossEntropyLoss()
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "identity": {"curvature": Identity()},
    "adaptive": {"curvature": Adaptive()},
    "eigen": {"curvature": EigenKronecker(refresh_every=2)},
    "exact": {"terminal": Exact(CRITERION)},
    "matched": {"terminal": Matched(CRITERION)},
    "sampled": {"terminal": Sampled(CRITERION)},
    "sample": {"coupling": "sample"},
    "dense": {"coupling": Dense()},
    "relinearised": {"coupling": Batch(relinearise=True)},
    "no feedback": {"feedback": False},
    "momentum": {"momentum": 0.9},
    "two decays": {"weight_decay": 0.01, "decoupled_weight_decay": False},
}


def trained(
    penalty: Penalty,
    form: str = "drop-in",
    steps: int = 12,
    parts: int = 1,
    edit: Callable[[nn.Module, int], object] | None = None,
    save_at: int | None = None,
    **settings: Any,
) -> Tensor:
    """All weights after training with a penalty in the loss."""
    model = network()
    optimizer = DDPNOpt(model, **{"lr": 0.05, "weight_decay": 0.0, **settings})
    x, y = torch.randn(steps, 24, 6), torch.randint(3, (steps, 24))
    for step in range(steps):
        if step == save_at:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.close()
            optimizer = DDPNOpt(model, **{"lr": 0.05, "weight_decay": 0.0, **settings})
            optimizer.load_state_dict(saved)
        if form == "closure":
            optimizer.step(partial(whole_loss, model, x[step], y[step], penalty))
            continue
        optimizer.zero_grad()
        for inputs, target in zip(x[step].chunk(parts), y[step].chunk(parts), strict=True):
            (whole_loss(model, inputs, target, penalty) / parts).backward()
        if edit is not None:
            edit(model, step)
        optimizer.step()
    return parameters_to_vector(model.parameters()).detach()


def whole_loss(model: nn.Module, x: Tensor, y: Tensor, penalty: Penalty) -> Tensor:
    loss: Tensor = CRITERION(model(x), y) + penalty(model)
    return loss


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("form", ["drop-in", "closure"])
def test_a_quadratic_penalty_is_weight_decay(name: str, form: str) -> None:
    settings = FORMS[name]
    coupled = {**settings, "weight_decay": settings.get("weight_decay", 0.0) + GAMMA, "decoupled_weight_decay": False}
    found, wanted = trained(squares, form, **settings), trained(nothing, form, **coupled)
    without = trained(nothing, form, **settings)
    assert (found - wanted).norm() < 1e-9 * (wanted - without).norm()


def test_micro_batches_carry_their_shares_of_a_penalty() -> None:
    torch.testing.assert_close(trained(squares, parts=3), trained(squares), rtol=1e-9, atol=1e-10)


def test_a_penalty_is_clipped_with_the_rest() -> None:
    """Half the gradients are those of half the loss and half the penalty."""

    def halve(model: nn.Module, step: int) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 0.5

    settings: dict[str, Any] = {"weight_decay": GAMMA / 2, "decoupled_weight_decay": False}
    found, wanted = trained(squares, edit=halve, steps=1), trained(nothing, edit=halve, steps=1, **settings)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    assert (found - trained(squares, steps=1)).norm() > 1e-2


@pytest.mark.parametrize("unscale", [False, True])
def test_a_penalty_under_a_scaler(unscale: bool) -> None:
    def weights(scaled: bool) -> Tensor:
        model = network()
        optimizer, scaler = DDPNOpt(model), torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(4):
            optimizer.zero_grad()
            loss = whole_loss(model, torch.randn(12, 6), torch.randint(3, (12,)), squares)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return parameters_to_vector(model.parameters()).detach()

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-9, atol=1e-10)


def test_steps_at_which_all_gradients_are_compared() -> None:
    assert [step for step in range(401) if is_due(step)] == [0, 1, 2, 4, 8, 16, 32, 64, 100, 128, 200, 256, 300, 400]


def test_a_penalty_that_begins_later_is_found_and_one_that_ends_is_forgotten() -> None:
    def states(begin: int, end: int) -> list[bool]:
        model = network()
        optimizer, found = DDPNOpt(model), []
        for step in range(17):
            optimizer.zero_grad()
            penalty = squares if begin <= step < end else nothing
            whole_loss(model, torch.randn(12, 6), torch.randint(3, (12,)), penalty).backward()
            optimizer.step()
            found.append(all("cost" in optimizer.state[model.get_parameter(f"{i}.weight")] for i in (0, 2, 3, 5)))
        return found

    assert states(3, 99) == [False] * 4 + [True] * 13
    assert states(0, 6) == [True] * 8 + [False] * 9


def test_a_resumed_run_with_a_penalty_goes_on_bit_for_bit() -> None:
    for at in (3, 9):  # between two looks
        assert torch.equal(trained(squares, save_at=at), trained(squares))


@pytest.mark.parametrize("name", [name for name in FORMS if name != "sampled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_a_penalty_none_is_found(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    for make in (NETWORKS["mlp"], *([] if name == "dense" else [NETWORKS["conv"]])):
        case = make()
        model, x = case.model.to(dtype), case.x.to(dtype)
        optimizer = DDPNOpt(model, 0.05, **FORMS[name])
        for _ in range(3):
            optimizer.zero_grad()
            (getattr(optimizer.terminal, "criterion", None) or CRITERION)(model(x), case.y).backward()
            optimizer.step()
        assert not any("cost" in state for state in optimizer.state.values())


def test_a_curvature_made_of_gradients_counts_the_cost() -> None:
    """The sample form of one layer is the adapted optimizer, feedback or not: RMSprop, whose squares have the decay."""

    def weights(feedback: bool) -> Tensor:
        torch.manual_seed(5)
        model = nn.Linear(6, 3)
        optimizer = DDPNOpt(model, 0.01, curvature=Adaptive(), coupling="sample", feedback=feedback, weight_decay=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            CRITERION(model(torch.randn(12, 6)), torch.randint(3, (12,))).backward()
            optimizer.step()
        return parameters_to_vector(model.parameters()).detach()

    torch.testing.assert_close(weights(True), weights(False))


def stiff(kind: str, model: nn.Module) -> Penalty:
    at = [p.detach().clone() for p in model.parameters()]

    def distance(model: nn.Module) -> Tensor:
        return 50 * sum(((p - q).square().sum() for p, q in zip(model.parameters(), at, strict=True)), torch.zeros(()))

    def uneven(model: nn.Module) -> Tensor:
        pairs = zip(model.parameters(), at, strict=True)
        terms = ((10 ** torch.linspace(-2, 2, p.numel()).view_as(p) * (p - q) ** 2).sum() for p, q in pairs)
        return sum(terms, torch.zeros(()))

    def orthogonal(model: nn.Module) -> Tensor:
        weights = [p for p in model.parameters() if p.ndim > 1]
        return sum(((w @ w.mT - torch.eye(len(w))).square().sum() for w in weights), torch.zeros(()))

    return {"distance": distance, "uneven": uneven, "orthogonal": orthogonal}[kind]


@pytest.mark.parametrize("kind", ["distance", "uneven", "orthogonal"])
@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
def test_a_stiff_penalty_does_not_diverge(kind: str, lr: float) -> None:
    """Each alone would ask for a learning rate below 0.02 of gradient descent."""
    model = network()
    penalty = stiff(kind, model)
    optimizer = DDPNOpt(model, lr)
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    before = whole_loss(model, x, y, penalty).item()
    for _ in range(60):
        optimizer.zero_grad()
        whole_loss(model, x, y, penalty).backward()
        optimizer.step()
    assert whole_loss(model, x, y, penalty).item() < before


def test_the_curvature_of_a_cost_is_that_of_the_steps_made() -> None:
    u, centre = torch.randn(3, 4), torch.randn(3, 4)
    H = torch.rand(3, 4)
    first, kept = with_curvature(u, H * (u - centre), {}, edited=False)
    assert first == pytest.approx(float((H * (u - centre)).norm() / u.norm()))
    product = square = 0.0
    for _ in range(3):
        step = torch.randn(3, 4)
        u = u + step
        product, square = product / 2 + float((H * step * step).sum()), square / 2 + float(step.square().sum())
        found, kept = with_curvature(u, H * (u - centre), kept, edited=False)
        assert found == pytest.approx(product / square)
    # gradients edited by hand are no function of the weights
    assert with_curvature(u + 1, 100 * u, kept, edited=True) == (found, kept)
    assert with_curvature(u, 100 * u, {}, edited=True) == (0.0, {})
    # nor is a cost that falls as the weights leave: it has no curvature to hold them by
    assert with_curvature(u + 100, H * (u - centre) - 1e3, kept, edited=False)[0] == 0.0
    assert with_curvature(torch.zeros(2, 2), torch.ones(2, 2), {}, edited=False)[0] == 0.0


def edited(factors: Sequence[float], **settings: Any) -> list[Tensor]:
    """The first step's changes, by layer, of gradients that are multiplied by a factor each."""
    model = network()
    optimizer = DDPNOpt(model, 0.05, weight_decay=0.0, **settings)
    layers = [model[i] for i in (0, 2, 3, 5)]
    before = [parameters_to_vector(layer.parameters()).detach() for layer in layers]
    CRITERION(model(torch.randn(12, 6)), torch.randint(3, (12,))).backward()
    for layer, factor in zip(layers, factors, strict=True):
        for p in layer.parameters() if factor != 1 else ():
            assert p.grad is not None
            p.grad *= factor
    optimizer.step()
    return [parameters_to_vector(layer.parameters()).detach() - old for layer, old in zip(layers, before, strict=True)]


@pytest.mark.parametrize("curvature", [Identity(), Kronecker()])
def test_gradients_edited_by_hand_reach_the_layers(curvature: Any) -> None:
    """Without feedback a layer's step is linear in its gradient: each must be its factor times the whole one."""
    settings: dict[str, Any] = {"curvature": curvature, "feedback": False}
    whole, found = edited([1, 1, 1, 1], **settings), edited([1, 0.25, 0, 3], **settings)
    for own, one, factor in zip(found, whole, [1, 0.25, 0, 3], strict=True):
        torch.testing.assert_close(own, factor * one, rtol=1e-7, atol=1e-9)


def test_clipping_by_value_reaches_the_layers_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    def clip(model: nn.Module, step: int) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-6)

    start, found = trained(nothing, steps=0), trained(nothing, edit=clip, momentum=0.0)
    assert (found - start).norm() < 1e-2 * (trained(nothing, momentum=0.0) - start).norm()
    assert not recwarn.list


def negate(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.neg_()


@pytest.mark.parametrize("edit", [negate, lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)])
def test_gradients_edited_between_unscaling_and_the_step_hide_the_scale(edit: Callable[[nn.Module], object]) -> None:
    model = network()
    optimizer, scaler = DDPNOpt(model), torch.amp.GradScaler("cpu")
    scaler.scale(CRITERION(model(torch.randn(12, 6)), torch.randint(3, (12,)))).backward()
    scaler.unscale_(optimizer)
    edit(model)
    with pytest.raises(StepError, match="so the scale cannot be told"):
        scaler.step(optimizer)


class Twice:
    """Losses made of the model's derivatives with respect to its inputs."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = model(x)
        if self.kind == "gradient penalty":
            loss: Tensor = CRITERION(out, y)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss + 30 * slope.square().sum()
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual: Tensor = bend.sum(1) - torch.sin(x.sum(1)) + out.sum(1)
        return residual.square().mean()


def differentiated_twice(
    kind: str, form: str, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 1
) -> Tensor:
    """How far weights move."""
    model, loss_of = network(), Twice(kind)
    optimizer, before = make(model), parameters_to_vector(model.parameters()).detach()
    x, y = torch.randn(steps, 12, 6), torch.randint(3, (steps, 12))
    for step in range(steps):

        def closure(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            if form != "closure":
                loss.backward()
            return loss

        if form == "drop-in":
            closure(x[step], y[step])
            optimizer.step()
        else:
            optimizer.step(partial(closure, x[step], y[step]))  # type: ignore[arg-type]  # torch's says float
    return parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.parametrize("kind", ["gradient penalty", "differential equation"])
@pytest.mark.parametrize("form", ["drop-in", "closure", "closure with backward"])
def test_a_loss_made_of_derivatives_is_followed(kind: str, form: str) -> None:
    """Second derivatives pass by the columns, and first ones that only led to the loss do not count twice."""
    settings: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "curvature": Identity()}
    found = differentiated_twice(kind, form, lambda model: DDPNOpt(model, 1e-6, **settings))
    wanted = differentiated_twice(kind, "drop-in", lambda model: torch.optim.SGD(model.parameters(), 1e-6))
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("kind", ["gradient penalty", "differential equation"])
def test_all_call_forms_take_the_same_step_from_derivatives(kind: str) -> None:
    found = [
        differentiated_twice(kind, form, DDPNOpt, steps=6) for form in ("drop-in", "closure", "closure with backward")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", ["drop-in", "closure", "closure with backward"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.LeakyReLU, nn.Identity])
def test_a_step_from_a_penalty_on_derivatives_alone(activation: Callable[[], nn.Module], form: str) -> None:
    """As a lazy one is. Without curvature in between no gradient comes to any output; layers keep their columns."""
    settings: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "curvature": Identity()}

    def moved(make: Callable[[nn.Module], torch.optim.Optimizer], form: str) -> tuple[Tensor, Any]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 1))
        optimizer, before = make(model), torch.zeros(())
        for lazy in (False, True, False, True):
            before = parameters_to_vector(model.parameters()).detach()
            x = torch.randn(12, 6, requires_grad=True)

            def closure(x: Tensor, lazy: bool) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = nn.functional.softplus(model(x)).mean()
                if lazy:
                    loss = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().sum(1).mean()
                if form != "closure":
                    loss.backward()
                return loss

            if form == "drop-in":
                closure(x, lazy)
                optimizer.step()
            else:
                optimizer.step(partial(closure, x, lazy))  # type: ignore[arg-type]
        return parameters_to_vector(model.parameters()).detach() - before, optimizer

    found, optimizer = moved(lambda model: DDPNOpt(model, 1e-6, **settings), form)
    wanted, _ = moved(lambda model: torch.optim.SGD(model.parameters(), 1e-6), "drop-in")
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
    assert [row.rule for row in optimizer.report().rows] == ["linear"] * 2
    moved(DDPNOpt, form)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("settings", [{}, {"coupling": "sample", "feedback": False, "curvature": Identity()}])
def test_a_backward_pass_with_a_graph_is_a_backward_pass(settings: dict[str, Any]) -> None:
    def weights(create_graph: bool) -> Tensor:
        model = network()
        optimizer = DDPNOpt(model, **settings)
        for _ in range(3):
            optimizer.zero_grad()
            CRITERION(model(torch.randn(12, 6)), torch.randint(3, (12,))).backward(create_graph=create_graph)
            optimizer.step()
        return parameters_to_vector(model.parameters()).detach()

    assert torch.equal(weights(True), weights(False))


@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
def test_a_differential_equation_is_solved(lr: float) -> None:
    """u'' = -pi^2 sin(pi x), u = 0 at -1 and 1, from squared residuals at random points."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer, ends = DDPNOpt(model, lr), torch.tensor([[-1.0], [1.0]])
    for _ in range(400):
        x = (2 * torch.rand(32, 1) - 1).requires_grad_()
        optimizer.zero_grad()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        force = torch.pi**2 * torch.sin(torch.pi * x)
        ((bend + force).square().mean() + 10 * model(ends).square().mean()).backward()
        optimizer.step()
    x = torch.linspace(-1, 1, 50)[:, None]
    with torch.no_grad():
        assert (model(x) - torch.sin(torch.pi * x)).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("form", ["drop-in", "closure", "closure with backward"])
def test_a_pass_that_only_derivatives_were_taken_of_is_no_part_of_the_batch(form: str) -> None:
    """Monitoring, say; and a gradient penalty on a chain of linear layers, whose slope no activation depends on."""

    def weights(watched: bool) -> Tensor:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        optimizer = DDPNOpt(model)

        def closure(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            if watched:
                inputs = torch.ones(12, 6, requires_grad=True)
                torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
            loss: Tensor = CRITERION(model(x), y)
            if form != "closure":
                loss.backward()
            return loss

        for _ in range(3):
            x, y = torch.randn(12, 6), torch.randint(3, (12,))
            if form == "drop-in":
                closure(x, y)
                optimizer.step()
            else:
                optimizer.step(partial(closure, x, y))
        return parameters_to_vector(model.parameters()).detach()

    torch.testing.assert_close(weights(True), weights(False))


@pytest.mark.parametrize("form", ["drop-in", "closure", "closure with backward"])
def test_a_derivative_is_found_at_any_step(form: str) -> None:
    """At step 3 nothing is due, but that gradients came with graphs tells."""
    settings: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "curvature": Identity()}

    def moved(make: Callable[[nn.Module], torch.optim.Optimizer], form: str) -> Tensor:
        model, lazy = network(), Twice("gradient penalty")
        optimizer, before = make(model), torch.zeros(())
        for step in range(4):
            before = parameters_to_vector(model.parameters()).detach()
            x, y = torch.randn(12, 6), torch.randint(3, (12,))

            def closure(x: Tensor, y: Tensor, last: bool) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = lazy(model, x, y) if last else CRITERION(model(x), y)
                loss = loss + CRITERION(model(x + 1), y)  # another pass begins while gradients wait
                if form != "closure":
                    loss.backward()
                return loss

            if form == "drop-in":
                closure(x, y, step == 3)
                optimizer.step()
            else:
                optimizer.step(partial(closure, x, y, step == 3))  # type: ignore[arg-type]
        return parameters_to_vector(model.parameters()).detach() - before

    found = moved(lambda model: DDPNOpt(model, 1e-6, **settings), form)
    wanted = moved(lambda model: torch.optim.SGD(model.parameters(), 1e-6), "drop-in")
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_a_penalty_on_derivatives_of_a_pass_of_its_own_goes_with_relinearising_and_not_with_dense() -> None:
    def step(coupling: Any) -> None:
        model = network()
        optimizer = DDPNOpt(model, 1e-3, coupling=coupling)
        x = torch.randn(12, 6, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (CRITERION(model(torch.randn(12, 6)), torch.randint(3, (12,))) + slope.square().mean()).backward()
        optimizer.step()

    step(Batch(relinearise=True))
    with pytest.raises(StepError, match="cannot follow a loss made of the model's derivatives"):
        differentiated_twice("gradient penalty", "drop-in", lambda model: DDPNOpt(model, coupling=Dense()))


class Skipping(nn.Module):
    """Leaves its middle layer out when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        out: Tensor = self.last(x if self.skips else x + self.middle(x).tanh())
        return out


def test_a_layer_that_sits_a_step_out_keeps_its_columns() -> None:
    """A penalty gives it a gradient nevertheless."""
    model = Skipping()
    optimizer = DDPNOpt(model)
    for skips in (False, True, False):
        model.skips, before = skips, model.middle.weight.detach().clone()
        optimizer.zero_grad()
        (CRITERION(model(torch.randn(12, 6)), torch.randint(3, (12,))) + squares(model)).backward()
        optimizer.step()
        assert torch.equal(model.middle.weight, before) == skips
    assert [row.rule for row in optimizer.report().rows] == ["linear"] * 3


def test_a_penalty_whose_gradient_is_nan_fails_the_step() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("3.bias").zero_()
    optimizer, before = DDPNOpt(model, on_nonfinite="skip"), parameters_to_vector(model.parameters()).detach()
    loss = CRITERION(model(torch.randn(12, 6)), torch.randint(3, (12,)))
    (loss + model.get_parameter("3.bias").square().sum().sqrt()).backward()
    optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 1
    assert torch.equal(parameters_to_vector(model.parameters()).detach(), before)


def test_a_bias_before_a_norm_has_no_gradient_and_no_cost() -> None:
    """All it has is rounding."""
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    conv = [model.get_parameter("0.weight")]
    others = [p for p in model.parameters() if p is not conv[0]]
    optimizer = DDPNOpt(model)
    optimizer.param_groups.clear()
    for group in ({"params": conv}, {"params": others, "weight_decay": 0.0}):
        optimizer.add_param_group(group)
    for _ in range(3):
        optimizer.zero_grad()
        CRITERION(model(torch.randn(12, 2, 8)), torch.randint(3, (12,))).backward()
        optimizer.step()
    assert not any("cost" in state for state in optimizer.state.values())
