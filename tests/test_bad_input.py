"""Bad input is refused by name, and a step that fails changes nothing."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CURVATURES, NETWORKS, Case
from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Exact, Gradient, Identity, Kronecker, Matched, Sampled, StepError

NAN = float("nan")


@pytest.mark.parametrize("lr", [-1.0, NAN, float("inf")])
def test_lr(lr: float) -> None:
    with pytest.raises(ValueError, match="Invalid lr"):
        DDPNOpt(nn.Linear(2, 2), lr)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"momentum": 1.0}, ValueError, "Invalid momentum: 1.0"),
        ({"momentum": -0.1}, ValueError, "Invalid momentum"),
        ({"weight_decay": -1e-3}, ValueError, "Invalid weight_decay: -0.001"),
        ({"weight_decay": NAN}, ValueError, "Invalid weight_decay"),
        ({"decoupled_weight_decay": 0.01}, ValueError, "Invalid decoupled_weight_decay: 0.01; give True or False"),
        ({"coupling": "both"}, ValueError, "'both'"),
        ({"curvature": "kronecker"}, TypeError, "Kronecker()"),
        ({"curvature": Kronecker}, TypeError, "Kronecker()"),
        ({"terminal": "exact"}, TypeError, "Gradient()"),
        ({"feedback": 1}, TypeError, "feedback"),
        ({"stages": ["nowhere"]}, ValueError, "nowhere"),
    ],
)
def test_options(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        DDPNOpt(nn.Sequential(nn.Linear(2, 2)), **settings)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Kronecker(damping=-1), "damping"),
        (lambda: Kronecker(damping=NAN), "nan"),
        (lambda: Kronecker(refresh_every=0), "refresh_every"),
        (lambda: Kronecker(beta=1.0), "beta"),
        (lambda: Kronecker(memory=-1), "memory must be a finite number of samples >= 0, got -1"),
        (lambda: EigenKronecker(memory=NAN), "nan"),
        (lambda: EigenKronecker(refresh_every=2.5), "2.5"),  # type: ignore[arg-type]
        (lambda: Adaptive(eps=-1e-8), "eps"),
        (lambda: Adaptive(beta=-0.1), "beta"),
        (lambda: Identity(damping=-1), "damping"),
        (lambda: Gradient(reduction="none"), "'none'"),  # type: ignore[arg-type]
        (lambda: Matched(nn.CrossEntropyLoss(reduction="none")), "'none'"),
        (lambda: Matched(nn.CrossEntropyLoss(), cap=0), "cap"),
        (lambda: Sampled(nn.CrossEntropyLoss(), columns=0), "columns"),
        (lambda: Sampled(nn.CrossEntropyLoss(), cap=-1), "cap"),
        (lambda: Exact(nn.CrossEntropyLoss(), cap=NAN), "cap"),
    ],
)
def test_settings(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_function_is_no_criterion() -> None:
    with pytest.raises(TypeError, match="cross_entropy"):
        Matched(nn.functional.cross_entropy)  # type: ignore[arg-type]


def test_parameters_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError):
        DDPNOpt(torch.randn(3))
    with pytest.raises(ValueError, match="empty"):
        DDPNOpt([])
    with pytest.raises(ValueError, match="model"):
        DDPNOpt(nn.Linear(2, 2).parameters(), stages=["0"])


class Failing(nn.Module):
    """Fails at its ``at``-th run."""

    def __init__(self, at: int, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.at, self.runs, self.error = at, 0, error

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs == self.at:
            raise self.error("the model broke")
        return x


class Counter(nn.Module):
    """Counts its runs in a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x


def snapshot(case: Case, optimizer: DDPNOpt) -> Any:
    return copy.deepcopy((case.model.state_dict(), optimizer.state_dict()))


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def good_step(case: Case, optimizer: DDPNOpt, criterion: nn.Module) -> None:
    optimizer.zero_grad()
    criterion(case.model(case.x), case.y).backward()
    optimizer.step()


@pytest.fixture
def ready() -> tuple[Case, DDPNOpt, nn.Module]:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, momentum=0.5)
    good_step(case, optimizer, criterion)
    return case, optimizer, criterion


Ready = tuple[Case, DDPNOpt, nn.Module]


def fails_unchanged(ready: Ready, attempt: Callable[[], object], says: str, error: Any = StepError) -> None:
    case, optimizer, criterion = ready
    before = snapshot(case, optimizer)
    with pytest.raises(error, match=says):
        attempt()
    assert equal(before, snapshot(case, optimizer))
    good_step(case, optimizer, criterion)
    assert not equal(before, snapshot(case, optimizer))


def test_step_before_any_backward(ready: Ready) -> None:
    case, optimizer, criterion = ready
    optimizer.zero_grad()
    fails_unchanged(ready, optimizer.step, "call loss.backward")
    optimizer.zero_grad()
    case.model(case.x)
    fails_unchanged(ready, optimizer.step, "call loss.backward")
    del criterion


def test_errors_are_value_errors_and_runtime_errors() -> None:
    assert issubclass(StepError, ValueError)
    assert issubclass(StepError, RuntimeError)


@pytest.mark.parametrize("terminal", [Matched(), Exact(), Sampled()])
def test_a_criterion_is_missing(terminal: Any) -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, terminal=terminal)
    before = snapshot(case, optimizer)
    with pytest.raises(ValueError, match=r"\(criterion\)"):
        good_step(case, optimizer, criterion)
    assert equal(before, snapshot(case, optimizer))
    optimizer.step(lambda: criterion(case.model(case.x), case.y))


def test_the_criterion_was_not_called() -> None:
    case = NETWORKS["mlp"]()
    optimizer = DDPNOpt(case.model, terminal=Matched(nn.CrossEntropyLoss()))
    with pytest.raises(ValueError, match="saw no call"):
        good_step(case, optimizer, nn.CrossEntropyLoss())


def test_batch_changed_by_another_forward_pass(ready: Ready) -> None:
    case, optimizer, criterion = ready

    def attempt() -> None:
        optimizer.zero_grad()
        criterion(case.model(case.x), case.y).backward()
        case.model(case.x[:2])
        optimizer.step()

    fails_unchanged(ready, attempt, "batch size 2.* had 5")


def test_batch_changed_in_place(ready: Ready) -> None:
    case, optimizer, criterion = ready

    def attempt() -> None:
        x = case.x.clone()
        optimizer.zero_grad()
        criterion(case.model(x), case.y).backward()
        x.resize_(3, 4)
        optimizer.step()

    fails_unchanged(ready, attempt, "written into|changed between forward and step")


def test_batch_written_into(ready: Ready) -> None:
    case, optimizer, criterion = ready

    def attempt() -> None:
        x = case.x.clone()
        optimizer.zero_grad()
        criterion(case.model(x), case.y).backward()
        x.zero_()
        optimizer.step()

    fails_unchanged(ready, attempt, "written into")


@pytest.mark.parametrize("value", [-0.1, NAN, None, "0.1"])
def test_settings_edited_in_a_group(ready: Ready, value: Any) -> None:
    case, optimizer, criterion = ready

    def attempt() -> None:
        optimizer.param_groups[0]["lr"] = value
        try:
            good_step(case, optimizer, criterion)
        finally:
            optimizer.param_groups[0]["lr"] = 0.1

    fails_unchanged(ready, attempt, f"Invalid lr: {value!r}", ValueError)


def test_a_closure_that_returns_no_number(ready: Ready) -> None:
    case, optimizer, criterion = ready
    fails_unchanged(ready, lambda: optimizer.step(lambda: case.model(case.x)), "shape")
    fails_unchanged(ready, lambda: optimizer.step(lambda: NAN), "nan")
    del criterion


def test_evaluation_between_backward_and_step_is_no_change(ready: Ready) -> None:
    case, optimizer, criterion = ready
    before = snapshot(case, optimizer)
    optimizer.zero_grad()
    criterion(case.model(case.x), case.y).backward()
    with torch.no_grad():
        case.model(case.x[:2])
    optimizer.step()
    assert not equal(before, snapshot(case, optimizer))


@pytest.mark.parametrize("form", ["plain", "closure"])
def test_empty_batch(ready: Ready, form: str) -> None:
    case, optimizer, criterion = ready

    def loss() -> Tensor:
        total: Tensor = case.model(case.x[:0]).sum()
        return total

    def attempt() -> None:
        optimizer.zero_grad()
        if form == "closure":
            optimizer.step(loss)
        loss().backward()
        optimizer.step()

    fails_unchanged(ready, attempt, "empty")
    del criterion


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_batch_of_one(curvature: str, coupling: Any) -> None:
    case, criterion = NETWORKS["mlp"](1), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, 0.01, curvature=CURVATURES[curvature], coupling=coupling)
    loss = criterion(case.model(case.x), case.y).detach()
    for _ in range(5):
        good_step(case, optimizer, criterion)
    assert criterion(case.model(case.x), case.y).detach() < loss


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["plain", "closure", "closure with backward"])
def test_loss_not_finite(ready: Ready, value: float, form: str) -> None:
    case, optimizer, criterion = ready

    def loss() -> Tensor:
        total: Tensor = criterion(case.model(case.x), case.y) * value
        return total

    def with_backward() -> Tensor:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        return total

    def attempt() -> None:
        optimizer.zero_grad()
        if form == "plain":
            loss().backward()
            optimizer.step()
        else:
            optimizer.step(loss if form == "closure" else with_backward)

    fails_unchanged(ready, attempt, "finite|nan|inf")


@pytest.mark.parametrize("coupling", ["batch", "sample"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_nan_in_the_batch(coupling: Any, feedback: bool, curvature: str) -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    M = CURVATURES[curvature]
    optimizer = DDPNOpt(case.model, 1e-3, curvature=M, coupling=coupling, feedback=feedback)
    good_step(case, optimizer, criterion)
    broken = Case(case.model, case.x.clone(), case.y)
    broken.x[2, 1] = NAN
    fails_unchanged((case, optimizer, criterion), lambda: good_step(broken, optimizer, criterion), "finite")


@pytest.mark.parametrize("terminal", [Matched, Exact, Sampled])
def test_nan_in_the_batch_with_a_criterion(terminal: Any) -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, terminal=terminal(criterion))
    good_step(case, optimizer, criterion)
    broken = Case(case.model, case.x.clone(), case.y)
    broken.x[2, 1] = NAN
    fails_unchanged((case, optimizer, criterion), lambda: good_step(broken, optimizer, criterion), "finite")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_in_the_rollout(error: type[BaseException]) -> None:
    torch.manual_seed(0)
    broken = Failing(4, error)
    model = nn.Sequential(nn.Linear(4, 6), Counter(), nn.Tanh(), broken, nn.Linear(6, 3))
    case, criterion = Case(model, torch.randn(5, 4), torch.randint(3, (5,))), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model)
    good_step(case, optimizer, criterion)
    before = snapshot(case, optimizer)
    with pytest.raises(error, match="the model broke"):
        good_step(case, optimizer, criterion)
    after = snapshot(case, optimizer)
    assert int(after[0].pop("1.count")) == int(before[0].pop("1.count")) + 1  # the failed batch's own forward pass
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert equal(before[1], after[1])
    good_step(case, optimizer, criterion)
    assert not equal(before[1], optimizer.state_dict())


def test_exception_in_the_closure(ready: Ready) -> None:
    case, optimizer, criterion = ready

    def closure() -> Tensor:
        criterion(case.model(case.x), case.y).backward()
        raise KeyError("mine")

    fails_unchanged(ready, lambda: optimizer.step(closure), "mine", KeyError)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_frozen_layer(when: str, curvature: str) -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    if when == "before":
        case.model[2].requires_grad_(False)
    optimizer = DDPNOpt(case.model, curvature=CURVATURES[curvature])
    if when == "after":
        good_step(case, optimizer, criterion)
        case.model[2].requires_grad_(False)
    before = copy.deepcopy(case.model.state_dict())
    good_step(case, optimizer, criterion)
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("2.")


def test_frozen_weight_with_a_trained_bias() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    case.model[0].weight.requires_grad_(False)
    optimizer = DDPNOpt(case.model)
    before = copy.deepcopy(case.model.state_dict())
    good_step(case, optimizer, criterion)
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name]) == (name == "0.weight")


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.bare = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.zeros(3))
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        used: Tensor = self.used(x)
        return used + self.bare


@pytest.mark.parametrize("form", ["plain", "closure"])
@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_layer_without_gradient_and_bare_parameters(form: str, coupling: Any) -> None:
    model, criterion = Unused(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    optimizer = DDPNOpt(model, 0.01, coupling=coupling)
    before = copy.deepcopy(model.state_dict())
    if form == "plain":
        criterion(model(x), y).backward()
        optimizer.step()
    else:
        optimizer.step(lambda: criterion(model(x), y))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("unused", "idle"))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_close_takes_every_hook_off(ready: Ready) -> None:
    case, optimizer, criterion = ready
    assert hooks(case.model) > 0
    optimizer.close()
    assert hooks(case.model) == 0
    criterion(case.model(case.x), case.y).backward()
    with pytest.raises(StepError, match="closed"):
        optimizer.step()
    optimizer.close()


def test_deletion_takes_every_hook_off() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, terminal=Matched(criterion))
    good_step(case, optimizer, criterion)
    del optimizer
    gc.collect()
    assert hooks(case.model) == 0
    assert hooks(criterion) == 0
    criterion(case.model(case.x), case.y).backward()


def test_nothing_of_a_pass_survives_its_step(ready: Ready) -> None:
    case, optimizer, criterion = ready

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    good_step(case, optimizer, criterion)
    optimizer.zero_grad()
    before = tensors()
    for _ in range(5):
        good_step(case, optimizer, criterion)
        case.model(case.x)
    optimizer.zero_grad()
    assert tensors() == before


@pytest.mark.parametrize("terminal", [Gradient(), Matched(), Exact()])
def test_no_graph_survives_a_closure(terminal: Any) -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, terminal=terminal)
    graphs: list[Any] = []

    class Marker(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.marker = Failing(0)
            graphs.append(weakref.ref(ctx.marker))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0]

    for _ in range(3):
        optimizer.step(lambda: criterion(Marker.apply(case.model(case.x)), case.y))  # type: ignore[no-untyped-call]
    gc.collect()
    assert graphs
    assert not any(ref() for ref in graphs)
