"""A compiled model is refused by name, whenever it was compiled; what is compiled beside it is not."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import NETWORKS
from ddpnopt import DDPNOpt, StepError

pytest.importorskip("torch._dynamo")
BACKEND = "eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about hooks it cannot trace: that is the point
        yield
    torch._dynamo.reset()


class Training:
    """A model, a batch, and a step of training through ``call``."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        case = NETWORKS["mlp"]()
        self.model, self.x, self.y, self.criterion = case.model, case.x, case.y, nn.CrossEntropyLoss()

    def loss(self, call: Callable[[Tensor], Tensor]) -> Tensor:
        loss: Tensor = self.criterion(call(self.x), self.y)
        return loss

    def step(self, optimizer: DDPNOpt, call: Callable[[Tensor], Tensor], closure: bool = False) -> None:
        optimizer.zero_grad()
        if closure:
            optimizer.step(lambda: self.loss(call))
            return
        self.loss(call).backward()
        optimizer.step()


@pytest.fixture
def training() -> Training:
    return Training()


def refused(training: Training, optimizer: DDPNOpt, call: Any, says: str, closure: bool = False) -> None:
    before = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(2):
        with pytest.raises(StepError, match=says):
            training.step(optimizer, call, closure)
    assert all(torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True))


def test_a_compiled_copy_is_given(training: Training) -> None:
    with pytest.raises(ValueError, match=r"the model is what torch\.compile returned: train the plain module"):
        DDPNOpt(torch.compile(training.model, backend=BACKEND))  # type: ignore[arg-type]


def test_the_model_given_was_compiled_in_place(training: Training) -> None:
    training.model.compile(backend=BACKEND)
    with pytest.raises(ValueError, match=r"the model was compiled in place"):
        DDPNOpt(training.model)


def test_a_part_of_the_model_given_is_compiled(training: Training) -> None:
    training.model[2] = torch.compile(training.model[2], backend=BACKEND)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"2 is what torch\.compile returned"):
        DDPNOpt(training.model)


@pytest.mark.parametrize(("backend", "closure", "stepped"), [("eager", False, False), ("aot_eager", True, True)])
def test_a_copy_compiled_later(training: Training, backend: str, closure: bool, stepped: bool) -> None:
    optimizer = DDPNOpt(training.model)
    if stepped:
        training.step(optimizer, training.model)
    compiled = torch.compile(training.model, backend=backend)
    refused(training, optimizer, compiled, "ran in code compiled by", closure)
    training.step(optimizer, training.model)


@pytest.mark.parametrize("closure", [True, False])
def test_a_copy_compiled_and_run_before(training: Training, closure: bool) -> None:
    """Its compiled code knows nothing of the hooks."""
    compiled = torch.compile(training.model, backend=BACKEND)
    training.loss(compiled).backward()
    optimizer = DDPNOpt(training.model)
    says = "no gradient" if closure else "saw no forward pass.*torch.compile"
    refused(training, optimizer, compiled, says, closure)
    training.step(optimizer, training.model)


@pytest.mark.parametrize("part", ["", "2"])
def test_compiled_in_place_later(training: Training, part: str) -> None:
    optimizer = DDPNOpt(training.model)
    training.step(optimizer, training.model)
    training.model.get_submodule(part).compile(backend=BACKEND)
    refused(training, optimizer, training.model, f"{part or 'the model'} was compiled in place")


def test_a_compiled_function_that_calls_the_model(training: Training) -> None:
    optimizer = DDPNOpt(training.model)
    call = torch.compile(lambda x: training.model(x), backend=BACKEND)
    refused(training, optimizer, call, "ran in code compiled by")


def test_what_is_compiled_beside_training_changes_nothing(training: Training) -> None:
    def weights(compiling: bool) -> list[Tensor]:
        own = Training()
        optimizer = DDPNOpt(own.model)
        compiled = torch.compile(own.model, backend=BACKEND) if compiling else own.model
        criterion = torch.compile(own.criterion, backend=BACKEND) if compiling else own.criterion
        for _ in range(3):
            with torch.no_grad():
                compiled(own.x)
            optimizer.zero_grad()
            criterion(own.model(own.x), own.y).backward()
            optimizer.step()
        return [p.detach() for p in own.model.parameters()]

    for one, other in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
