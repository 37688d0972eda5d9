"""Table 3: methods are what they are called, every method gets the same budget, and the verdicts follow their rules."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ddpnopt import DDPNOpt
from ddpnopt.baselines import EKFAC, VanillaDDP
from ddpnopt.experiments.paper import availability, table3, table3_runs, training
from ddpnopt.experiments.paper.kinds import task
from ddpnopt.experiments.paper.methods import BUDGET, METHODS, Params, Setup
from ddpnopt.experiments.paper.problems import PROBLEMS
from ddpnopt.experiments.paper.table3_runs import Effort, Entry, Row
from ddpnopt.experiments.paper.tuning import thinned
from ddpnopt.experiments.report.section import Table
from ddpnopt.experiments.study.lab import DirectLab, best, combinations
from ddpnopt.experiments.study.task import Kind

BATCH = 6


def trained(make: Any, steps: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = make(model, criterion)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(torch.randn(BATCH, 5)), torch.randint(3, (BATCH,))).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def method(name: str, params: Params, decay: float = 0.0) -> Any:
    return lambda model, criterion: METHODS[name].build(Setup(model, criterion, BATCH, decay), params)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_vanilla_is_the_dense_method(decay: float) -> None:
    torch.set_default_dtype(torch.float64)
    ours = trained(method("vanilla", {"lr": 0.7, "damping": 0.2}, decay))
    dense = trained(lambda m, c: VanillaDDP(m, c, 0.7, damping=0.2, weight_decay=decay))
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if one.open_loop])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_without_feedback_both_readings_are_the_adapted_optimizer(name: str, decay: float) -> None:
    torch.set_default_dtype(torch.float64)
    params = {key: values[-2] for key, values in METHODS[name].grid.items()}
    ours = trained(method(name, params | {"feedback": 0.0}, decay))
    adapted = trained(method(str(METHODS[name].open_loop), params | {"momentum": 0.0}, decay))
    for mine, theirs in zip(ours, adapted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    closed = trained(method(name, params, decay))
    assert any(not torch.allclose(mine, theirs, rtol=1e-6) for mine, theirs in zip(closed, adapted, strict=True))


def test_methods_use_their_parameters() -> None:
    torch.set_default_dtype(torch.float64)
    expected = trained(lambda m, _: EKFAC(m, 0.05, damping=0.2, weight_decay=0.1))
    for mine, theirs in zip(trained(method("ekfac", {"lr": 0.05, "damping": 0.2}, 0.1)), expected, strict=True):
        assert torch.equal(mine, theirs)
    for name, one in METHODS.items():
        for key in one.grid:
            low, high = ({k: v[0] for k, v in one.grid.items()} | {key: value} for value in (0.01, 0.02))
            pairs = zip(trained(method(name, low)), trained(method(name, high)), strict=True)
            assert any(not torch.equal(mine, theirs) for mine, theirs in pairs), (name, key)


@pytest.mark.parametrize("name", METHODS)
def test_every_search_has_the_same_size(name: str) -> None:
    grid = METHODS[name].grid
    assert len(combinations(grid)) == BUDGET
    for trials in range(1, BUDGET + 1):
        cut = thinned(grid, trials)
        assert cut.keys() == grid.keys()
        assert all(set(cut[key]) <= set(grid[key]) for key in grid)
        longest = max(len(values) for values in grid.values())
        assert len(combinations(cut)) == (BUDGET if trials == BUDGET else min(trials, longest))


def test_thinning_leaves_even_gaps() -> None:
    assert thinned({"lr": tuple(range(8))}, 4) == {"lr": (1, 3, 5, 7)}
    assert thinned({"lr": (1.0, 2.0, 3.0, 4.0), "rho": (5.0, 6.0)}, 3) == {"lr": (1.0, 3.0, 4.0), "rho": (5.0,)}


def test_best_takes_the_first_of_equals() -> None:
    asked = [("a", {"lr": 1.0}), ("b", {"lr": 2.0}), ("a", {"lr": 3.0}), ("a", {"lr": 4.0})]
    assert best(asked, [0.5, 0.1, 0.7, 0.7]) == {"a": {"lr": 3.0}, "b": {"lr": 2.0}}


def test_a_run_is_reproducible_and_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"problem": "iris-fcn", "method": "adam", "params": {"lr": 0.01}, "weight_decay": 0.0, "steps": 25}
    one, again, other = (training.run(settings | {"seed": seed}) for seed in (0, 0, 1))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert one["curve"] != other["curve"]
    assert len(one["curve"]) == 3
    assert one["diverged"] is None
    sgd = training.run(settings | {"method": "sgd", "params": {"lr": 1e-9}, "seed": 0, "steps": 1})
    first = training.run(settings | {"seed": 0, "steps": 1})
    assert sgd["curve"] == first["curve"]  # same weights, same batch, before any step


def test_a_diverged_run_says_where() -> None:
    settings = {"problem": "iris-fcn", "method": "sgd", "params": {"lr": 1e38}, "weight_decay": 0.0, "steps": 25}
    found = training.run(settings | {"seed": 0})
    assert found["diverged"] is not None
    assert 1 < found["diverged"] <= 25
    assert found["loss"] is None or math.isfinite(found["loss"])


def test_another_setting_is_another_task() -> None:
    settings = {"problem": "iris-fcn", "seed": 0}
    assert task("train", settings).key == task("train", dict(reversed(settings.items()))).key
    assert task("train", settings).key != task("train", settings | {"seed": 1}).key
    assert task("train", settings).key != replace(task("train", settings), code="other").key


def fake(results: Any) -> DirectLab:
    return DirectLab({"train": Kind(results, ())})


def scored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validation favours the middle of a grid; test accuracy depends on seed and method."""
    rank = list(METHODS).index(settings["method"])
    tuning = settings["seed"] >= table3_runs.FIRST_TUNING_SEED
    lr = settings["params"]["lr"]
    return {
        "validation": 0.9 if 0.01 <= lr <= 0.1 else 0.5,
        "test": math.nan if tuning else 0.5 + 0.01 * rank + 0.001 * settings["seed"],
        "loss": None if lr > 1 else lr,
        "diverged": 3 if lr > 1 else None,
        "curve": [],
        "seconds": 2.0,
    }


def test_tuning_sees_no_test_data_and_no_reported_seed() -> None:
    seen: list[Mapping[str, Any]] = []

    def record(settings: Mapping[str, Any]) -> dict[str, Any]:
        seen.append(settings)
        return scored(settings)

    rows = table3_runs.rows(fake(record), {"iris-fcn": table3_runs.FULL["iris-fcn"]})
    tuning = [one for one in seen if one["seed"] >= table3_runs.FIRST_TUNING_SEED]
    effort = rows[0].effort
    assert len(tuning) == len(METHODS) * effort.trials * effort.tuning_seeds
    assert len(seen) - len(tuning) == (len(METHODS) + 1) * effort.seeds
    for entry in rows[0].entries:
        assert len(entry.tests) == effort.seeds
        assert all(math.isfinite(value) for value in entry.tests)  # a tuning run's test accuracy is NaN here
    chosen = {entry.name: entry.params for entry in rows[0].entries}
    assert chosen["adam"] == {"lr": 0.01}  # three learning rates tie; the lowest train loss decides
    assert chosen["batch-untuned"] == table3_runs.UNTUNED


def test_missing_data_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "missing", lambda name: f"no {name} here" if name == "mnist" else None)
    found = table3_runs.rows(fake(scored), {name: Effort(1, 1, 2, 9) for name in ("iris-fcn", "mnist-fcn")})
    section = table3.section(found)
    cut = {line[0]: list(line[1:]) for line in section.tables[-1].rows}
    assert cut["MNIST, FCN"][1:] == ["no mnist here", ""]
    assert cut["DIGITS, FCN"][1:] == ["not run", ""]
    # 13 tuned methods of 2 s for 9 steps; 160 steps of 8 x 2 + 10 runs are the whole
    assert float(cut["IRIS, FCN"][2]) == pytest.approx(len(METHODS) * 2 / 9 * 160 * 26 / 3600, abs=0.05)
    assert len(section.pictures) == 1


def entry(name: str, *tests: float, tuned: float = 0.9) -> Entry:
    return Entry(name, {"lr": 0.1}, tuned, tests, 0, 1.0)


def row(problem: str, **accuracies: float) -> Row:
    """Five seeds about each mean accuracy, the spread the same for all methods but 0.1 points of their own."""
    entries = [
        entry(name.replace("_", "-"), *(mean + 0.01 * seed + 0.001 * ((seed + place) % 3) for seed in range(5)))
        for place, (name, mean) in enumerate(accuracies.items())
    ]
    return Row(problem, Effort(8, 2, 5, 10), tuple(entries))


def judged(*rows: Row) -> dict[tuple[str, str], str]:
    section = table3.section(rows)
    return {(verdict.claim.split()[0], verdict.form): verdict.judgement for verdict in section.verdicts}


def full(problem: str, own: float, batch: float, rivals: float = 0.8, control: float = 0.8) -> Row:
    return row(
        problem,
        sgd=rivals,
        adam=rivals - 0.1,
        emsa=control,
        vanilla=control - 0.05,
        own_rmsprop=own,
        share_rmsprop=own,
        own_ekfac=own,
        share_ekfac=own,
        batch=batch,
        batch_untuned=batch,
    )


def test_verdicts() -> None:
    better = judged(full("wine-fcn", 0.85, 0.7), full("digits-fcn", 0.85, 0.7))
    assert better == {
        ("outperforms", "published"): "holds",
        ("competitive", "published"): "holds",
        ("outperforms", "batch"): "does not hold",
        ("competitive", "batch"): "does not hold",
    }
    once = judged(full("wine-fcn", 0.85, 0.85), full("digits-fcn", 0.7, 0.8))
    assert once["outperforms", "published"] == "does not hold"  # below on one problem
    assert once["competitive", "published"] == "does not hold"  # 5 points behind on average
    assert once["competitive", "batch"] == "holds"
    assert judged() == {key: "cannot be tested here" for key in better}
    few = replace(full("wine-fcn", 0.85, 0.85), effort=Effort(8, 2, 4, 10))
    assert set(judged(few).values()) == {"cannot be tested here"}
    assert "Not judged: WINE, FCN" in table3.section([few, full("digits-fcn", 0.8, 0.8)]).verdicts[0].evidence


def test_the_published_form_is_read_as_validation_has_it() -> None:
    entries = (entry("own-rmsprop", 0.1, tuned=0.95), entry("share-rmsprop", 0.9, tuned=0.94), entry("batch", 0.5))
    found = Row("wine-fcn", Effort(1, 1, 1, 1), entries)
    assert table3.representative(found, "published").name == "own-rmsprop"
    assert table3.representative(found, "batch").name == "batch"


def test_reported_figures_stand_beside_their_methods() -> None:
    assert table3.reported(PROBLEMS["mnist-fcn"], "share-rmsprop") == 93.30
    assert table3.reported(PROBLEMS["mnist-fcn"], "share-ekfac") is None
    assert table3.reported(PROBLEMS["mnist-cnn"], "own-ekfac") == 98.09
    assert table3.reported(PROBLEMS["mnist-cnn"], "vanilla") is None
    assert table3.reported(PROBLEMS["digits-fcn"], "emsa") == 94.87
    assert table3.reported(PROBLEMS["iris-fcn"], "sgd") is None


def test_every_table_is_whole() -> None:
    section = table3.section([full("wine-fcn", 0.85, 0.85), full("digits-fcn", 0.7, 0.797)])
    for table in section.tables:
        assert all(len(line) == len(table.header) for line in table.rows), table.title
    summary = {line[0]: line[1:] for line in section.tables[0].rows}
    assert summary["SGD, momentum 0.9"][0] == "82.1 ± 2.0"
    assert "not run" not in str(section.tables[0].rows)
    assert len({table.title for table in section.tables}) == len(section.tables)


def test_nothing_is_cut_in_the_uncut_plan() -> None:
    assert set(table3_runs.UNCUT) == set(PROBLEMS) >= set(table3_runs.FULL) >= set(table3_runs.QUICK)
    assert all(effort.trials == BUDGET and effort.seeds == 10 for effort in table3_runs.UNCUT.values())
    found = [replace(full(name, 0.8, 0.8), effort=effort) for name, effort in table3_runs.UNCUT.items()]
    assert table3.section(found, "table3-uncut").tables[-1].rows == []


def test_untuned_means_the_librarys_defaults_without_momentum_and_decay() -> None:
    ours = trained(method(table3_runs.OWN, table3_runs.UNTUNED))
    for mine, default in zip(
        ours, trained(lambda model, _: DDPNOpt(model, momentum=0.0, weight_decay=0.0)), strict=True
    ):
        assert torch.equal(mine, default)


def test_a_device_is_part_of_a_tasks_name() -> None:
    settings = {"problem": "iris-fcn", "method": "adam", "params": {"lr": 0.01}, "weight_decay": 0.0, "steps": 9}
    plain, named = training.run(settings | {"seed": 0}), training.run(settings | {"seed": 0, "device": "cpu"})
    assert plain["curve"] == named["curve"]
    seen: list[Mapping[str, Any]] = []

    def record(settings: Mapping[str, Any]) -> dict[str, Any]:
        seen.append(settings)
        return scored(settings)

    table3_runs.rows(fake(record), {"iris-fcn": Effort(1, 1, 1, 5)}, "cuda")
    assert {one["device"] for one in seen} == {"cuda"}


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_uncut_table_asks_for_a_gpu_where_there_is_one(
    there: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Mapping[str, Any]] = []

    def record(settings: Mapping[str, Any]) -> dict[str, Any]:
        seen.append(settings)
        return scored(settings)

    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr(table3, "UNCUT", {"iris-fcn": Effort(1, 1, 1, 5)})
    monkeypatch.setattr(table3, "_cut", lambda found: Table("cut", [], []))
    assert table3.run_uncut(fake(record), quick=False).name == "table3-uncut"
    assert {one.get("device", "cpu") for one in seen} == {device}


def test_a_convolution_network_that_was_not_run_takes_as_long_as_one_that_was() -> None:
    rows = [full(name, 0.8, 0.8) for name in ("mnist-cnn", "cifar10-cnn")]
    for done, alike in ((rows[:1], "MNIST, CNN"), (rows, "CIFAR-10, CNN")):
        cut = {line[0]: line[-1] for line in table3.section(done).tables[-1].rows}
        assert cut["SVHN, CNN"] == f"about as {alike}"
        assert cut["DIGITS, FCN"] == ""
