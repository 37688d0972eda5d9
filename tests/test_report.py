"""What report() says before training holds in training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CURVATURES
from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Identity, Kronecker
from ddpnopt.columns import WIDEST, DenseColumns, OuterColumns, ScaledColumns
from ddpnopt.reading import read_layer
from ddpnopt.task import Task


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.norm = nn.Linear(4, 4), nn.PReLU(), nn.LayerNorm(4)
        self.again, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.again.weight = self.first.weight
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.again(self.norm(self.act(self.first(x)))))
        return out


def test_every_parameter_has_its_row_and_what_falls_back_a_remedy() -> None:
    model = Tied()
    report = DDPNOpt(model).report()
    by_name = {row.name: row for row in report.rows}
    assert sum(row.parameters for row in report.rows) == sum(p.numel() for p in model.parameters())
    rules = {"first": "linear", "act": "generic", "norm": "norm", "last": "linear"}
    assert {name: row.rule for name, row in by_name.items()} == rules | {
        "first.weight": "linear + linear",
        "last.bias": "none",
    }
    assert {row.name for row in report.rows if row.remedy} == {"act", "last.bias"}
    assert "requires_grad_(True)" in by_name["last.bias"].remedy
    assert by_name["last.bias"].curvature == ""
    assert by_name["first.weight"].curvature == "Kronecker"
    assert by_name["norm"].curvature == "Kronecker"
    said = str(report)
    assert all(row.remedy in said and row.why in said for row in report.rows)
    lines = said.splitlines()
    assert lines[1].split() == ["layer", "type", "parameters", "rule", "curvature", "held", "gram", "why"]


def test_names_of_bare_parameters_are_those_given() -> None:
    weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    named, plain = DDPNOpt([("weight", weight), ("bias", bias)]).report(), DDPNOpt([weight, bias]).report()
    assert [row.name for row in named.rows] == ["weight", "bias"]
    assert [row.name for row in plain.rows] == ["parameter 0", "parameter 1"]
    assert all("DDPNOpt(model)" in row.remedy for row in named.rows)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_numbers_held_are_those_of_the_columns(curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 5), nn.PReLU(5), nn.Linear(5, 3)
    )
    optimizer = DDPNOpt(model, 1e-3, curvature=CURVATURES[curvature])
    held: dict[str, int] = {}

    def spied(task: Task, layer: Any, *rest: Any) -> Any:
        pairs = read_layer(task, layer, *rest)
        for _, columns in pairs:
            columns = columns.columns if isinstance(columns, ScaledColumns) else columns
            if isinstance(columns, OuterColumns):
                per_column = columns.v[0, 0].numel() + columns.x[0].numel()
            else:
                assert isinstance(columns, DenseColumns)
                per_column = columns.values[0, 0].numel()
            held[layer.name] = held.get(layer.name, 0) + per_column
        return pairs

    monkeypatch.setattr("ddpnopt.reading.read_layer", spied)
    nn.functional.cross_entropy(model(torch.randn(5, 2, 4)), torch.randint(3, (5,))).backward()
    optimizer.step()
    assert {row.name: row.held for row in optimizer.report().rows} == held


def test_the_gram_costs_sums_where_the_curvature_is_a_product_and_products_where_not() -> None:
    model = nn.Sequential(nn.Linear(7, 5))
    cost = {c: DDPNOpt(model, curvature=c).report().rows[0].gram for c in CURVATURES.values()}
    assert {type(c): n for c, n in cost.items()} == {Identity: 13, Kronecker: 13, Adaptive: 40, EigenKronecker: 40}


def test_a_base_optimizer_that_needs_no_columns_has_none() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.PReLU())
    settings: dict[str, Any] = {"coupling": "sample", "feedback": False}
    sgd = DDPNOpt(model, curvature=Identity(), **settings).report()
    assert all((row.held, row.gram, row.remedy) == (0, 0, "") for row in sgd.rows)
    ekfac = DDPNOpt(model, curvature=EigenKronecker(), **settings).report()
    assert all(row.held > 0 for row in ekfac.rows)


def test_a_side_too_wide_for_a_factor_is_told() -> None:
    model = nn.Sequential(
        nn.Linear(WIDEST, 2, bias=False), nn.Linear(2, WIDEST + 1, bias=False), nn.Linear(WIDEST + 1, 1)
    )
    kinds = [row.curvature for row in DDPNOpt(model).report().rows]
    assert kinds == ["Kronecker", "Kronecker (diagonal beyond 4,096)", "Kronecker (diagonal beyond 4,096)"]
    assert DDPNOpt(model, curvature=Identity()).report().rows[1].curvature == "Identity"


class Functional(nn.Module):
    """Uses a layer's parameters without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))
        return out


@pytest.mark.parametrize(("coupling", "feedback"), [("batch", True), ("sample", True), ("sample", False)])
def test_a_layer_that_was_never_called_is_named_once_with_a_remedy(coupling: Any, feedback: bool) -> None:
    model = Functional()
    optimizer = DDPNOpt(model, 1e-3, curvature=EigenKronecker(), coupling=coupling, feedback=feedback)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    before = model.first.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"first, Linear: it was not seen to run.*call the module itself") as record:
        step()
    assert len(record) == 1
    assert not torch.equal(before, model.first.weight.detach())
    step()  # warnings are errors here
    assert {row.name for row in optimizer.report().rows if row.rule == "base"} == {"first.weight", "first.bias"}
