"""Figure 5: the directions shown are the dense gains' singular vectors, and the figures beside them are right."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpnopt import reference
from ddpnopt.experiments.data import Part
from ddpnopt.experiments.paper import availability, fig5, networks, policy
from ddpnopt.experiments.paper.policy import foreground_share, image_direction, leading_directions, unit
from ddpnopt.experiments.study.lab import DirectLab
from ddpnopt.experiments.study.task import Kind, Result, Task

SETTINGS: dict[str, Any] = {
    "dataset": "digits-images",
    "method": "share-sgd",
    "params": {"lr": 0.1},
    "batch_size": 8,
    "seed": 0,
    "moments": [0, 2],
    "layers": [2, 4, 6],
    "shown": 2,
    "measured": 12,
}


def tiny() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Two convolutions and a linear layer on two 4x4 pictures, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    return model, torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 2])


def loss(y: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(y, target)


def test_directions_are_the_dense_gains_leading_singular_vectors() -> None:
    model, x, y = tiny()
    functions, controls = reference.stages_of(model, x)
    end = reference.gradient(loss, model(x).detach(), y)
    # another metric than the identity: the right-singular vector does not depend on it
    metrics = [torch.diag(1 + torch.rand(len(u), dtype=torch.float64)) for u in controls]
    step = reference.dense_step(functions, controls, x.flatten(1), end, R=metrics, coupling="sample")
    directions = leading_directions(model, [2, 5], x, y)
    for K, direction in zip(step.K[1:], directions, strict=True):
        _, sizes, right = torch.linalg.svd(K, full_matrices=False)
        assert (sizes[:, 1] < 1e-12 * sizes[:, 0]).all()  # rank one
        overlap = (right[:, 0] * direction.flatten(1)).sum(1).abs()
        assert overlap == pytest.approx(1, abs=1e-12)


def test_every_layers_direction_has_the_same_image() -> None:
    model, x, y = tiny()
    layers = [0, 2, 5]
    directions = leading_directions(model, layers, x, y)
    images = [image_direction(model, place, x, v) for place, v in zip(layers, directions, strict=True)]
    assert torch.allclose(images[1], images[0], atol=1e-12)
    assert torch.allclose(images[2], images[0], atol=1e-12)
    assert images[0].flatten(1).norm(dim=1) == pytest.approx(1)


def test_image_direction_is_the_jacobians_transpose() -> None:
    model, x, _ = tiny()
    before = nn.Sequential(model[0], model[1])
    J = torch.autograd.functional.jacobian(lambda image: before(image[None]).flatten(), x[0]).flatten(1)
    v = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    expected = unit((J.T @ v[0].flatten()).view(1, 1, 4, 4))
    assert torch.allclose(image_direction(model, 2, x, v)[:1], expected)


def test_share_of_a_picture_worked_out_by_hand() -> None:
    x = torch.tensor([[[[-1.0, -1.0], [0.0, 3.0]]]])  # background -1
    direction = torch.tensor([[[[1.0, 2.0], [3.0, -4.0]]]])
    assert foreground_share(x, direction).tolist() == pytest.approx([25 / 30])
    assert foreground_share(x, 0 * direction).tolist() == [0]


def test_length_of_tiny_and_of_no_vectors() -> None:
    v = torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])
    assert unit(v).tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0]]


def test_classes_take_turns() -> None:
    part = Part(torch.arange(6.0)[:, None], torch.tensor([1, 1, 0, 1, 0, 2]))
    assert policy.chosen(part, 3, 5).x.flatten().tolist() == [2, 0, 5, 4, 1]


@pytest.fixture(scope="module")
def result() -> Result:
    return policy.run(SETTINGS)


def test_result_is_small_strict_json(result: Result) -> None:
    assert len(json.dumps(result, allow_nan=False)) < 300_000
    assert [one["step"] for one in result["moments"]] == [0, 2]
    for one in result["moments"]:
        assert len(one["policy"]) == 2
        assert torch.tensor(one["policy"]).abs().amax((1, 2)).tolist() == [1, 1]
        sizes = [len(one["layers"][place]["energy"][0]) for place in ("2", "4", "6")]
        assert sizes == [8, 4, 4]
        for layer in one["layers"].values():
            assert torch.tensor(layer["energy"]).sum((1, 2)).tolist() == pytest.approx([1, 1], abs=0.01)
    assert len(result["area"]) == len(result["moments"][0]["foreground"]) == 12


def test_looking_does_not_change_training(result: Result) -> None:
    once = policy.run({**SETTINGS, "moments": [2]})
    assert once["moments"] == result["moments"][1:]
    assert result["moments"][0]["policy"] != result["moments"][1]["policy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dataset": "digits"}, "no pictures"), ({"layers": [0, 2]}, "layers"), ({"layers": [4, 2]}, "layers")],
)
def test_what_cannot_be_looked_at_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.run({**SETTINGS, **changes})


class Canned(DirectLab):
    """Answers every task with one result, and keeps the tasks."""

    def __init__(self, result: Result) -> None:
        super().__init__({"policy": Kind(policy.run, ())})
        self.result, self.tasks = result, list[Task]()

    def execute(self, tasks: Sequence[Task]) -> list[Result]:
        self.tasks += tasks
        return [self.result for _ in tasks]


def test_section_shows_the_results_figures(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fig5, "task", lambda kind, settings: Task(kind, settings, ""))
    lab = Canned(result)
    found = fig5.run(lab, quick=True)
    assert [(task.kind, task.settings["dataset"]) for task in lab.tasks] == [("policy", "digits-images")]
    assert not found.verdicts
    (table,) = found.tables
    assert all(len(row) == len(table.header) for row in table.rows)
    share = 100 * sum(result["moments"][1]["foreground"]) / 12
    assert table.rows[1][2].startswith(f"{share:.1f} ±")
    rows, _, lines = (picture.figure for picture in found.pictures)
    assert len(rows.axes) == 2 * (1 + 2)  # two images; the image and two moments
    points = [np.asarray(line.get_ydata()) for line in lines.axes[0].lines]
    policy_line = next(heights for heights in points if len(heights) == 2)  # the first one with two moments
    assert policy_line[1] == pytest.approx(share / 100)


def test_full_run_takes_the_first_pictures_at_hand(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fig5, "task", lambda kind, settings: Task(kind, settings, ""))
    monkeypatch.setattr(availability, "missing", lambda name: None if name == "fashion-mnist" else "no")
    lab = Canned(result)
    fig5.run(lab, quick=False)
    assert lab.tasks[0].settings["dataset"] == "fashion-mnist"


def test_places_are_the_networks_convolutions() -> None:
    model = networks.cnn((1, 8, 8), 10)
    convolutions = [str(place) for place, module in enumerate(model) if isinstance(module, nn.Conv2d)]
    assert list(fig5.LAYERS) == convolutions[1:]
