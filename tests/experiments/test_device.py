"""That a run's device reaches network, data and optimizer, and that nothing of a step is left on the CPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ddpnopt.experiments import data
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.paper import table3_runs, training
from ddpnopt.experiments.paper.methods import METHODS, Params, Setup
from ddpnopt.experiments.paper.problems import Problem
from ddpnopt.experiments.study.task import Result
from experiments.second_device import NAME, second_device

SMALL = {
    "fcn": Problem("digits", "fcn", 8, "tanh", 16, {}),
    "cnn": Problem("digits-images", "cnn", 0, "relu", 8, {}),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    load = data.load

    def few(name: str) -> Dataset:
        whole = load(name)
        parts = (data.Part(part.x[:40], part.y[:40]) for part in (whole.train, whole.validation, whole.test))
        train, validation, test = parts
        return replace(whole, train=train, validation=validation, test=test)

    monkeypatch.setattr(data, "load", few)
    monkeypatch.setattr(training, "PROBLEMS", SMALL)
    training.loaded.cache_clear()
    yield
    training.loaded.cache_clear()


def ran(problem: str, method: str, device: str) -> Result:
    params = {name: values[0] for name, values in METHODS[method].grid.items()}
    settings = {"problem": problem, "method": method, "params": params, "weight_decay": 0.0, "steps": 3, "seed": 0}
    result = training.run(settings | {"device": device})
    del result["seconds"]
    return result


@pytest.mark.parametrize(
    ("problem", "method"), [(name, method) for name in SMALL for method in table3_runs.methods(f"mnist-{name}")]
)
def test_a_run_on_another_device_stays_there_and_is_the_run_on_the_cpu(
    problem: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu, build, built = ran(problem, method, "cpu"), METHODS[method].build, []

    def noted(setup: Setup, params: Params) -> torch.optim.Optimizer:
        built.append((setup.model, build(setup, params)))
        return built[0][1]

    monkeypatch.setattr(training, "METHODS", {method: replace(METHODS[method], build=noted)})
    with second_device(monkeypatch) as device:
        assert ran(problem, method, NAME) == on_cpu
        dataset = training.loaded(SMALL[problem].dataset, NAME)
    assert on_cpu["diverged"] is None
    assert device.ran > 100
    assert device.brought == []
    ((model, optimizer),) = built
    tensors = [*model.parameters(), *tree_leaves(optimizer.state_dict()["state"])]
    tensors += [x for part in (dataset.train, dataset.validation, dataset.test) for x in (part.x, part.y)]
    devices = [tensor.device.type for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim]
    assert len(devices) >= 16
    assert set(devices) == {NAME}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x @ torch.ones(3, 3),
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.ones(3, 3).add_(x),
        lambda x: x[0].dot(torch.ones(3)),
    ],
)
def test_operations_on_two_devices_are_refused(
    wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with second_device(monkeypatch) as device:
        x = torch.eye(3).to(NAME)
        with pytest.raises(RuntimeError, match="on two devices"):
            wrong(x)
        assert float((x * torch.tensor(2.0))[torch.tensor([1]), 1:].mT.sum()) == 2.0  # what an accelerator allows
        assert device.brought == []
        assert x[:2].cpu().tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
        torch.zeros(3).copy_(x[0])
    assert device.brought == [(2, 3), (3,)]
