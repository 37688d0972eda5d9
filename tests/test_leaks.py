"""Nothing of a pass outlives its step, whichever way it was called and however it ended."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ddpnopt import DDPNOpt, Exact, Gradient, StepError
from ddpnopt.passes import Pass

STATM = Path("/proc/self/statm")


class Trap(nn.Module):
    """Fails when armed, at its next run but ``after``."""

    def __init__(self) -> None:
        super().__init__()
        self.after: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.after == 0:
            self.after = None
            raise RuntimeError("the model broke")
        if self.after is not None:
            self.after -= 1
        return x


class Training:
    def __init__(self, form: str, **settings: Any):
        torch.manual_seed(0)
        self.trap = Trap()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), self.trap, nn.Linear(6, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = DDPNOpt(self.model, 1e-3, **settings)
        self.form = form

    def loss(self, spoiled: float = 1.0) -> Tensor:
        loss: Tensor = self.criterion(self.model(torch.randn(5, 4)), torch.randint(3, (5,))) * spoiled
        return loss

    def step(self, spoiled: float = 1.0) -> None:
        if self.form == "loss":
            self.optimizer.step(lambda: self.loss(spoiled))
            return
        if self.form == "with backward":
            self.optimizer.step(lambda: self.backward(spoiled))
            return
        self.backward(spoiled)
        self.optimizer.step()

    def backward(self, spoiled: float) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(spoiled)
        loss.backward()
        return loss

    def broken_step(self, kind: int) -> None:
        if kind == 0:
            with pytest.raises(StepError, match=r"not finite|nan"):
                self.step(float("nan"))
            return
        self.trap.after = kind - 1  # 1: in the first pass, 2: in the second
        with pytest.raises(RuntimeError, match="the model broke"):
            self.step()


def live() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor | Pass) for thing in gc.get_objects())


def resident() -> int:
    """Bytes in memory; 0 where the system does not say."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0


@pytest.mark.parametrize("form", ["plain", "with backward", "loss"])
def test_a_thousand_steps_every_tenth_of_which_fails(form: str) -> None:
    training = Training(form)
    before, memory = 0, 0
    for i in range(1000):
        if i % 10 == 9:
            training.broken_step(i // 10 % 3)
        else:
            training.step()
        if i == 99:
            training.optimizer.zero_grad()
            before, memory = live(), resident()
    training.optimizer.zero_grad()
    assert live() <= before
    assert resident() - memory < 16 << 20


@pytest.mark.parametrize(
    "settings",
    [
        {"terminal": Exact(nn.CrossEntropyLoss())},
        {"coupling": "sample"},
        {"coupling": "sample", "feedback": False},
        {"terminal": Gradient(), "on_nonfinite": "skip"},
    ],
)
@pytest.mark.parametrize("form", ["plain", "with backward", "loss"])
def test_other_settings(form: str, settings: dict[str, Any]) -> None:
    training = Training(form, **settings)
    if isinstance(settings.get("terminal"), Exact):
        training.criterion = settings["terminal"].criterion
    skipping = "on_nonfinite" in settings
    second_pass = settings.get("feedback", True)
    before = 0
    for i in range(60):
        if i % 10 == 9:
            if skipping:
                training.step(float("nan"))
            else:
                training.broken_step(i // 10 % (3 if second_pass else 2))
            training.trap.after = None
        else:
            training.step()
        if i == 19:
            training.optimizer.zero_grad()
            before = live()
    training.optimizer.zero_grad()
    assert live() == before


def test_activations_are_gone_when_step_returns() -> None:
    training = Training("plain")
    training.step()
    training.step()  # momentum's first drift is the second step's
    training.optimizer.zero_grad(set_to_none=False)
    before = live()
    loss = training.loss()
    loss.backward()
    assert live() > before
    training.optimizer.step()
    del loss
    assert live() == before


class Watch(nn.Module):
    """Notes in every run without gradients which of the tensors of earlier runs with gradients are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.nominal: list[StorageWeakRef] = []
        self.left: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.nominal.append(StorageWeakRef(x.untyped_storage()))
        else:
            self.left.append(sum(not ref.expired() for ref in self.nominal))
        return x


@pytest.mark.parametrize("form", ["loss", "with backward", "plain"])
@pytest.mark.parametrize("chain", [True, False])
def test_nominal_states_are_gone_before_the_second_forward_pass(form: str, chain: bool) -> None:
    """Of convolutions, whose columns do not hold them."""
    torch.manual_seed(0)
    start, watch, end = nn.Conv2d(1, 8, 3), Watch(), nn.Sequential(nn.Conv2d(8, 2, 3), nn.Flatten())
    model = nn.Sequential(start, nn.Tanh(), watch, end) if chain else Branched(start, watch, end)
    x, y, criterion = torch.randn(5, 1, 5, 5), torch.randint(2, (5,)), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, 1e-3)

    def backward() -> Tensor:
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        return loss.detach()

    for _ in range(2):
        if form == "loss":
            optimizer.step(lambda: criterion(model(x), y))
        elif form == "with backward":
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()
    assert len(watch.nominal) == 2
    assert watch.left == [0, 0]


class Branched(nn.Module):
    def __init__(self, start: nn.Module, watch: nn.Module, end: nn.Module):
        super().__init__()
        self.start, self.watch, self.end = start, watch, end

    def forward(self, x: Tensor) -> Tensor:
        h = self.watch(torch.tanh(self.start(x)))
        end: Tensor = self.end(h) + h.flatten(1)[:, :2]
        return end


def evaluate(training: Training) -> None:
    training.loss()


def differentiate_and_drop(training: Training) -> None:
    training.loss().backward()
    training.model.zero_grad()


def input_gradients(training: Training) -> None:
    x = torch.randn(5, 4, requires_grad=True)
    torch.autograd.grad(training.model(x).sum(), x)


@pytest.mark.parametrize("what", [evaluate, differentiate_and_drop, input_gradients])
@pytest.mark.parametrize("training_mode", [True, False])
def test_a_loop_that_never_steps_holds_nothing(what: Callable[[Training], None], training_mode: bool) -> None:
    training = Training("plain")
    training.model.train(training_mode)
    for _ in range(5):
        what(training)
    before, memory = live(), resident()
    for _ in range(300):
        what(training)
    assert live() <= before
    assert resident() - memory < 8 << 20


def test_passes_of_an_optimizer_that_is_gone_go_with_it() -> None:
    training = Training("plain")
    training.loss().backward()
    training.optimizer.zero_grad()
    del training.optimizer
    before = live()
    for _ in range(20):
        training.loss()
    assert live() == before
