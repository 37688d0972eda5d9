"""Through compiled code, however it came about, training makes the very steps it makes without."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import NETWORKS
from ddpnopt import DDPNOpt, Exact, Matched, StepError
from ddpnopt.terminal import Terminal
from graphs import GRAPHS

pytest.importorskip("torch._dynamo")
# the compiler looks at any tensor's .grad, and silences itself unless warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
BACKEND = "eager"  # traces and breaks up as all backends do, and generates no code

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Training:
    """A model, a batch, and steps of training through ``call``."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        torch.manual_seed(0)
        case = NETWORKS["mlp"]()
        self.model, self.x, self.y, self.terminal = case.model, case.x, case.y, terminal
        given = terminal.criterion if terminal is not None else None
        self.criterion: Call = nn.CrossEntropyLoss() if given is None else given

    def loss(self, call: Call) -> Tensor:
        loss: Tensor = self.criterion(call(self.x), self.y)
        return loss

    def steps(self, optimizer: DDPNOpt, call: Call, count: int = 3, form: str = "plain") -> None:
        for _ in range(count):
            optimizer.zero_grad()
            if form == "loss":
                optimizer.step(lambda: self.loss(call))
            else:
                self.loss(call).backward()
                optimizer.step()

    def assert_plain(self, form: str = "plain") -> None:
        """The weights are those of three steps without a compiler."""
        other = Training(self.terminal)
        other.steps(DDPNOpt(other.model, terminal=self.terminal), other.model, form=form)
        for one, two in zip(self.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.fixture
def training() -> Training:
    return Training()


def test_a_compiled_copy_is_given(training: Training) -> None:
    compiled: Any = torch.compile(training.model, backend=BACKEND)
    optimizer = DDPNOpt(compiled)
    assert optimizer.model is training.model
    training.steps(optimizer, compiled)
    training.assert_plain()


@pytest.mark.parametrize("terminal", [None, Exact(nn.CrossEntropyLoss()), Matched(nn.CrossEntropyLoss())])
@pytest.mark.parametrize("form", ["plain", "loss"])
def test_terminals_and_forms(form: str, terminal: Terminal | None) -> None:
    training = Training(terminal)
    optimizer = DDPNOpt(training.model, terminal=terminal)
    training.steps(optimizer, torch.compile(training.model, backend=BACKEND), form=form)
    training.assert_plain(form)


def test_a_fused_backward_pass(training: Training) -> None:
    compiled = torch.compile(training.model, backend="aot_eager")
    training.steps(DDPNOpt(training.model), compiled)
    training.assert_plain()


@pytest.mark.parametrize("part", ["", "2"])
@pytest.mark.parametrize("before", [0, 1])
def test_compiled_in_place(training: Training, part: str, before: int) -> None:
    optimizer = DDPNOpt(training.model)
    training.steps(optimizer, training.model, before)
    training.model.get_submodule(part).compile(backend=BACKEND)
    training.steps(optimizer, training.model, 3 - before)
    training.assert_plain()


def test_a_part_is_a_compiled_copy(training: Training) -> None:
    training.model[2] = torch.compile(training.model[2], backend=BACKEND)  # type: ignore[assignment]
    training.steps(DDPNOpt(training.model), training.model)
    training.assert_plain()


def test_a_compiled_function_that_calls_model_and_criterion() -> None:
    training = Training(Matched(nn.CrossEntropyLoss()))
    optimizer = DDPNOpt(training.model, terminal=training.terminal)
    loss = torch.compile(lambda: training.loss(training.model), backend=BACKEND)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    training.assert_plain()
    assert optimizer.diagnostics()["actual_decrease"] > 0  # the criterion was seen


def test_code_older_than_the_optimizer_leaves_its_hooks_out(training: Training) -> None:
    compiled = torch.compile(training.model, backend=BACKEND)
    training.loss(compiled).backward()
    optimizer = DDPNOpt(training.model)
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(StepError, match=r"saw no forward pass.*torch\.compiler\.reset\(\) after"):
        training.steps(optimizer, compiled)
    assert all(torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True))
    torch.compiler.reset()
    training.steps(optimizer, compiled)
    training.assert_plain()


@pytest.mark.parametrize("how", ["given", "in place", "a part"])
def test_code_of_the_model_that_is_given_is_made_anew(training: Training, how: str) -> None:
    call: Call = training.model
    if how == "given":
        call = torch.compile(training.model, backend=BACKEND)
    elif how == "in place":
        training.model.compile(backend=BACKEND)
    else:
        training.model[2] = torch.compile(training.model[2], backend=BACKEND)  # type: ignore[assignment]
    training.loss(call).backward()
    optimizer = DDPNOpt(call if how == "given" else training.model)  # type: ignore[arg-type]
    training.steps(optimizer, call)
    training.assert_plain()


@pytest.mark.parametrize("end", ["close", "del"])
def test_another_optimizer_after(training: Training, end: str) -> None:
    def weights(model: nn.Module, call: Call) -> list[Tensor]:
        optimizer = DDPNOpt(model)
        training.steps(optimizer, call, 1)
        if end == "close":
            optimizer.close()
        del optimizer
        training.loss(call)
        training.steps(DDPNOpt(model), call)
        return [p.detach() for p in model.parameters()]

    other = copy.deepcopy(training.model)
    compiled = weights(training.model, torch.compile(training.model, backend=BACKEND))
    for one, two in zip(compiled, weights(other, other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_copy_goes_on_and_a_pickle_is_inert(training: Training) -> None:
    optimizer, compiled = DDPNOpt(training.model), torch.compile(training.model, backend=BACKEND)
    training.steps(optimizer, compiled, 1)
    training.model, optimizer = copy.deepcopy((training.model, optimizer))
    training.steps(optimizer, torch.compile(training.model, backend=BACKEND), 2)
    training.assert_plain()
    unpickled: Call = torch.compile(pickle.loads(pickle.dumps(training.model)), backend=BACKEND)
    assert torch.equal(unpickled(training.x), training.model(training.x))


def on_graph(name: str, backend: str | None) -> list[Tensor]:
    torch.manual_seed(0)
    case = GRAPHS[name]()
    call: Call = case.model
    if backend is not None:
        call = torch.compile(case.model, backend=backend)
    optimizer = DDPNOpt(case.model)
    for _ in range(2):
        optimizer.zero_grad()
        loss: Tensor = (call(case.x) ** 2).mean()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in case.model.parameters()]


@pytest.mark.parametrize("name", ["conv residual", "pre-norm", "free stream", "shared"])
def test_the_whole_state_is_found(name: str) -> None:
    for one, other in zip(on_graph(name, BACKEND), on_graph(name, None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_state_inside_a_fused_backward_pass_is_named() -> None:
    with pytest.warns(UserWarning, match=r"not all of the state before it could be followed.*or compiled code"):
        on_graph("free stream", "aot_eager")


def test_what_is_compiled_beside_training_changes_nothing(training: Training) -> None:
    optimizer = DDPNOpt(training.model)
    compiled = torch.compile(training.model, backend=BACKEND)
    training.criterion = torch.compile(training.criterion, backend=BACKEND)
    for _ in range(3):
        with torch.no_grad():
            compiled(training.x)
        training.steps(optimizer, training.model, 1)
    training.assert_plain()
