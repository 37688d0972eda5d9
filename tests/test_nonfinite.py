"""A step that met nan or inf changes nothing: it is left out and counted, or refused by the layer's name."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CURVATURES, NETWORKS
from ddpnopt import Adaptive, DDPNOpt, Exact, Gradient, Identity, Kronecker, Matched, Sampled, StepError

NAN, INF = float("nan"), float("inf")
Batch = tuple[Tensor, Tensor]
Form = Callable[[DDPNOpt, Callable[[], Tensor]], object]


def backward_then_step(optimizer: DDPNOpt, loss: Callable[[], Tensor]) -> object:
    optimizer.zero_grad()
    loss().backward()
    return optimizer.step()


def closure_with_backward(optimizer: DDPNOpt, loss: Callable[[], Tensor]) -> object:
    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        return total

    return optimizer.step(closure)


def closure_with_loss(optimizer: DDPNOpt, loss: Callable[[], Tensor]) -> object:
    return optimizer.step(loss)


FORMS: dict[str, Form] = {
    "plain": backward_then_step,
    "with backward": closure_with_backward,
    "loss": closure_with_loss,
}


def batches(count: int, broken: int | None, value: float, where: str = "input") -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        x = torch.randn(5, 4, generator=generator)
        y = torch.randint(3, (5,), generator=generator)
        if i == broken:
            x[2, 1] = value
        made.append((x, y))
    return made


def trained(data: list[Batch], form: str = "plain", **settings: Any) -> tuple[list[Tensor], DDPNOpt]:
    torch.manual_seed(5)
    model, criterion = NETWORKS["mlp"]().model, nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, on_nonfinite="skip", **settings)
    for x, y in data:
        FORMS[form](optimizer, lambda x=x, y=y: criterion(model(x), y))  # type: ignore[misc]
    return [p.detach() for p in model.parameters()], optimizer


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("form", FORMS)
def test_one_broken_batch_among_a_hundred(form: str, value: float) -> None:
    data = batches(100, 37, value)
    found, optimizer = trained(data, form, momentum=0.5)
    wanted, other = trained(data[:37] + data[38:], form, momentum=0.5)
    assert equal(found, wanted)
    assert optimizer.diagnostics()["skipped_steps"] == 1
    assert other.diagnostics()["skipped_steps"] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(("coupling", "feedback"), [("batch", False), ("sample", True), ("sample", False)])
def test_in_every_form(form: str, curvature: str, coupling: Any, feedback: bool) -> None:
    settings: dict[str, Any] = {
        "curvature": CURVATURES[curvature],
        "coupling": coupling,
        "feedback": feedback,
        "lr": 1e-3,
    }
    data = batches(8, 3, NAN)
    found, optimizer = trained(data, form, **settings)
    assert equal(found, trained(data[:3] + data[4:], form, **settings)[0])
    assert optimizer.diagnostics()["skipped_steps"] == 1


@pytest.mark.parametrize("make", [Matched, Exact, lambda c: Exact(c, cap=1.0), lambda c: Sampled(c, columns=2)])
@pytest.mark.parametrize("form", FORMS)
def test_with_a_criterion(make: Callable[[nn.Module], Any], form: str) -> None:
    def weights(data: list[Batch]) -> list[Tensor]:
        torch.manual_seed(5)
        model, criterion = NETWORKS["mlp"]().model, nn.CrossEntropyLoss()
        optimizer = DDPNOpt(model, terminal=make(criterion), on_nonfinite="skip")
        for x, y in data:
            FORMS[form](optimizer, lambda x=x, y=y: criterion(model(x), y))  # type: ignore[misc]
        return [p.detach() for p in model.parameters()]

    data = batches(6, 3, NAN)
    assert equal(weights(data), weights(data[:3] + data[4:]))


@pytest.mark.parametrize("form", ["with backward", "loss"])
def test_a_step_left_out_returns_its_loss(form: str) -> None:
    model = NETWORKS["mlp"]().model
    optimizer = DDPNOpt(model, on_nonfinite="skip")
    loss = FORMS[form](optimizer, lambda: model(torch.randn(5, 4)).sum() * INF)
    assert isinstance(loss, Tensor)
    assert not bool(torch.isfinite(loss))


def test_the_count_before_the_first_step_and_after_resuming() -> None:
    data = batches(1, 0, NAN)
    _, optimizer = trained(data)
    assert optimizer.diagnostics() == {"skipped_steps": 1}
    again = DDPNOpt(NETWORKS["mlp"]().model, on_nonfinite="skip")
    again.load_state_dict(optimizer.state_dict())
    assert again.diagnostics() == {"skipped_steps": 1}
    assert copy.deepcopy(again).diagnostics() == {"skipped_steps": 1}
    older = {key: value for key, value in optimizer.state_dict().items() if key != "skipped_steps"}
    again.load_state_dict(older)
    assert again.diagnostics() == {"skipped_steps": 0}


@pytest.mark.parametrize("feedback", [True, False])
def test_a_micro_batch_spoils_its_step_and_no_other(feedback: bool) -> None:
    def weights(steps: list[list[Batch]]) -> list[Tensor]:
        torch.manual_seed(5)
        model, criterion = NETWORKS["mlp"]().model, nn.CrossEntropyLoss()
        coupling: Any = "batch" if feedback else "sample"
        optimizer = DDPNOpt(model, 0.01, coupling=coupling, feedback=feedback, on_nonfinite="skip")
        for micro in steps:
            optimizer.zero_grad()
            for x, y in micro:
                (criterion(model(x), y) / len(micro)).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    data = batches(12, 4, NAN)
    steps = [data[i : i + 3] for i in range(0, 12, 3)]
    assert equal(weights(steps), weights([steps[0], *steps[2:]]))


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_grad_scaler_skips_as_it_always_does(on_nonfinite: Any, feedback: bool) -> None:
    def weights(data: list[Batch]) -> tuple[list[Tensor], DDPNOpt]:
        torch.manual_seed(5)
        model, criterion = NETWORKS["mlp"]().model, nn.CrossEntropyLoss()
        coupling: Any = "batch" if feedback else "sample"
        optimizer = DDPNOpt(model, 0.01, coupling=coupling, feedback=feedback, on_nonfinite=on_nonfinite)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for x, y in data:
            optimizer.zero_grad()
            scaler.scale(criterion(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return [p.detach() for p in model.parameters()], optimizer

    data = batches(8, 3, NAN)
    found, optimizer = weights(data)
    wanted, _ = weights(data[:3] + data[4:])
    assert equal(found, wanted)  # scales are powers of two
    assert optimizer.diagnostics()["skipped_steps"] == 1


def test_an_error_under_a_grad_scaler_leaves_no_scale_behind() -> None:
    model, criterion = NETWORKS["mlp"]().model, nn.CrossEntropyLoss()
    optimizer, scaler = DDPNOpt(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    (x, y), (other, _) = batches(2, None, NAN)
    scaler.scale(criterion(model(x), y)).backward()
    model(other[:2])
    with pytest.raises(StepError, match="batch size"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("value", [NAN, INF])
def test_running_statistics_and_generators_are_the_forward_pass_s_affair(value: float) -> None:
    """Weights are those of a run in which the broken batch had its forward pass and no step."""

    def trained(skipping: bool) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
        criterion = nn.CrossEntropyLoss()
        optimizer = DDPNOpt(model, on_nonfinite="skip")
        for i, (x, y) in enumerate(batches(8, None, NAN)):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            if i == 3:
                if not skipping:
                    continue
                loss = loss * value
            loss.backward()
            optimizer.step()
        return dict(model.state_dict())

    found, wanted = trained(True), trained(False)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert int(found["1.num_batches_tracked"]) == 8


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub(100.0).log()


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * NAN


class SpoilsGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Spoiled.apply(x)  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("coupling", "feedback"), [("batch", True), ("sample", True), ("sample", False)])
@pytest.mark.parametrize(
    ("between", "scale", "says"),
    [
        (Log(), 1.0, r"the input of layer '2' \(Linear\) is not finite \(nan or inf\); weights"),
        (
            SpoilsGradients(),
            1.0,
            r"the gradient at the output of layer '0' \(Linear\) is not finite \(nan or inf\); weights",
        ),
        (nn.Tanh(), NAN, r"the gradient at the output of layer '0' \(Linear\) is not finite, nor is the gradient that"),
    ],
)
def test_the_layer_is_named(
    form: str, coupling: Any, feedback: bool, between: nn.Module, scale: float, says: str
) -> None:
    model, criterion = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3)), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, 0.01, coupling=coupling, feedback=feedback, curvature=Identity())
    ((x, y),) = batches(1, None, NAN)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(StepError, match=says):
        FORMS[form](optimizer, lambda: criterion(model(x), y) * scale)
    assert equal(list(model.state_dict().values()), list(before[0].values()))
    assert optimizer.state_dict() == before[1]
    assert optimizer.diagnostics() == {"skipped_steps": 0}


def test_the_parameter_is_named_where_no_layer_is_at_fault() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = DDPNOpt([("scale", weight)], curvature=Identity())
    weight.grad = torch.tensor([1.0, NAN, 1.0])
    with pytest.raises(StepError, match="the gradient of scale is not finite"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))


def test_parameters_given_the_same_name_are_both_restored() -> None:
    ones = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = DDPNOpt([("same", p) for p in ones], curvature=Identity(), coupling="sample", feedback=False)
    for i, parameter in enumerate(ones):
        parameter.grad = torch.full((2,), NAN if i == 2 else 1.0)
    with pytest.raises(StepError, match="the gradient of parameter 2 is not finite"):
        optimizer.step()
    assert all(torch.equal(p.detach(), torch.ones(2)) for p in ones)


@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_curvature_that_overflows_while_the_weights_do_not(coupling: Any) -> None:
    """A squared gradient of inf would stop its parameter for good, without a word."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float32))
    optimizer = DDPNOpt([weight], 0.1, curvature=Adaptive(), coupling=coupling, feedback=False)
    weight.grad = torch.full((3,), 1e30, dtype=torch.float32)
    with pytest.raises(StepError, match="the curvature of parameter 0 is not finite"):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}


class Finicky(nn.Module):
    """Refuses what is not finite, as a validating distribution does."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise KeyError("bad input")
        return x


@pytest.mark.parametrize("settings", [{}, {"feedback": False}, {"coupling": "sample"}])
def test_moments_that_overflow_while_the_gradients_do_not(settings: dict[str, Any]) -> None:
    """A factor kept as its leading directions has none then."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 3))
    x, y = torch.randn(6, 4, 8, 8), torch.randn(6, 3)
    optimizer = DDPNOpt(model, curvature=Kronecker(rank=1), **settings)
    before = [p.detach().clone() for p in model.parameters()]
    (1e20 * (model(x) - y).sum(1)).mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    with pytest.raises(StepError, match=r"not finite \(nan or inf\); weights and optimizer state are unchanged"):
        optimizer.step()
    assert equal(before, list(model.parameters()))


def test_a_model_that_refuses_the_spoiled_weights_in_the_second_pass() -> None:
    model, criterion = nn.Sequential(nn.Linear(4, 6), Finicky(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, 0.01, on_nonfinite="skip", curvature=Identity(), coupling="sample")
    ((x, y),) = batches(1, None, NAN)
    before = copy.deepcopy(model.state_dict())
    (criterion(model(x), y) * NAN).backward()
    optimizer.step()
    assert optimizer.diagnostics() == {"skipped_steps": 1}
    assert equal(list(model.state_dict().values()), list(before.values()))


def test_an_error_of_the_loop_is_no_step_to_skip() -> None:
    model, criterion = NETWORKS["mlp"]().model, nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, on_nonfinite="skip")
    ((x, y),) = batches(1, None, NAN)
    with pytest.raises(StepError, match="no gradient"):
        optimizer.step()
    criterion(model(x), y).backward()
    x.zero_()
    with pytest.raises(StepError, match="written into"):
        optimizer.step()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.diagnostics() == {"skipped_steps": 0}


def test_a_spoiled_batch_does_not_cost_a_layer_its_columns() -> None:
    """The generic rule checks itself by sums, which nan fails; that says nothing about the layer."""
    model, criterion = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, on_nonfinite="skip", terminal=Gradient())
    before = optimizer.report()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches(3, 1, NAN):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    assert optimizer.report() == before
    assert optimizer.diagnostics()["skipped_steps"] == 1


def test_the_choice_is_checked() -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite must be 'raise'.*'ignore'"):
        DDPNOpt(nn.Linear(2, 2), on_nonfinite="ignore")  # type: ignore[arg-type]
