import itertools
import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import linregress
from scipy.stats import t as student
from torch import nn

from ddpnopt.baselines import VanillaDDP
from ddpnopt.experiments.paper import cost, cost_words, fig3, fig3_groups, table4
from ddpnopt.experiments.paper.cost import DENSE, case
from ddpnopt.experiments.paper.kinds import KINDS
from ddpnopt.experiments.report.cost_figures import FITTED, Curve, exponent, growth, growth_figure, ratio
from ddpnopt.experiments.study.lab import DirectLab
from ddpnopt.experiments.study.task import Result, Task

# a process in which "adam" is an optimizer that holds 200 MiB for a moment in every step
HOLDS_200 = """
from dataclasses import replace
import torch
from ddpnopt.experiments.paper import cost

class Holds(torch.optim.SGD):
    def step(self, closure=None):
        torch.ones(200 * 2**18, dtype=torch.float32)

build = lambda setup, params: Holds(setup.model.parameters(), lr=0.1)
real = cost.METHODS["adam"]
builds = iter([real.build, build])  # the first is the one that only loads libraries
cost.METHODS = {"adam": replace(real, build=lambda setup, params: next(builds)(setup, params))}
cost.main()
"""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and few cases."""
    words = dict(timed=("adam", "ekfac", "share-ekfac", "batch", "vanilla", DENSE), remembered=("adam", "batch"))
    settings: dict[str, Any] = dict(batches=(8,), quick_batches=(8, 16), turns=2, quick_turns=2, repeats=1, **words)
    small = {name: fig3_groups.Group(name, f"short {name}", [3, 4, 2], **settings) for name in ("fcn", "digits")}
    monkeypatch.setattr(fig3, "GROUPS", small)


class Counting(DirectLab):
    """Remembers which tasks it was given; a memory task answers at once, with a figure that the batch size gives."""

    def __init__(self) -> None:
        super().__init__(KINDS)
        self.given: list[Task] = []

    def execute(self, tasks: Any) -> list[Result]:
        self.given += tasks
        return [self.answer(task) for task in tasks]

    def answer(self, task: Task) -> Result:
        if task.kind == "time":
            return super().execute([task])[0]
        batch = task.settings["case"]["batch"]
        return {"added": float(batch), "peak": 100.0 + batch}


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5, -1.0])
def test_the_exponent_of_a_power_law_is_found_exactly(power: float) -> None:
    sizes = [8, 16, 24, 64]
    assert growth(sizes, [3e-4 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_the_exponent_is_that_of_a_linear_regression() -> None:
    sizes, costs = [1, 2, 4, 8, 16], [1.0, 2.2, 3.7, 9.0, 15.0]
    known = linregress([math.log(s) for s in sizes], [math.log(c) for c in costs])
    assert growth(sizes, costs) == pytest.approx(known.slope)


@pytest.mark.parametrize(("sizes", "costs"), [([2], [1.0]), ([2, 2], [1.0, 2.0]), ([2, 4], [0.0, 1.0])])
def test_a_power_law_needs_two_sizes_and_positive_values(sizes: list[int], costs: list[float]) -> None:
    with pytest.raises(ValueError, match="a power law needs two sizes and positive values"):
        growth(sizes, costs)


def test_the_largest_sizes_are_fitted_in_every_turn() -> None:
    sizes = [1, 2, 4, 8, 16]
    curve = Curve(sizes, [[7.0, 7.0, *(slow * size**power for size in sizes[2:])] for slow, power in ((1, 1), (9, 2))])
    fit = exponent(curve)
    assert fit is not None
    assert fit.mean == pytest.approx(1.5)
    assert fit.half == pytest.approx(0.5 * student.ppf(0.975, 1))
    assert exponent(Curve(sizes, [[1.0] * 4 + [0.0]])) is None


def test_a_ratio_is_taken_within_turns() -> None:
    spread = ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert (spread.median, spread.low, spread.high) == (3, 2.5, 3.5)
    assert str(ratio([3.0], [2.0])) == "1.5 (1.5 to 1.5)"


def test_blocks_take_turns_in_rotated_order_and_are_timed_per_step() -> None:
    now, ran = [0.0], list[str]()

    def work(name: str, seconds: float) -> Any:
        def step() -> None:
            ran.append(name)
            now[0] += seconds

        return step

    blocks = cost.take_turns([work("a", 1), work("b", 5)], [3, 1], turns=2, clock=lambda: now[0])
    assert blocks == [[1, 1], [5, 5]]
    assert ran == ["a", "b", *"aaab", *"baaa"]


@pytest.mark.parametrize(("network", "batch"), [([64, 32, 5], 16), ([784, 32, 5], 1), ([2, 2, 2], 64)])
def test_dense_memory_is_what_the_optimizer_itself_says(network: list[int], batch: int) -> None:
    model, criterion = cost.model(network), nn.CrossEntropyLoss()
    optimizer = VanillaDDP(model, criterion, 0.1, memory_limit_gb=1e-9)
    x = torch.randn(batch, network[0], dtype=torch.float32)
    criterion(model(x), torch.zeros(batch, dtype=torch.long)).backward()
    with pytest.raises(ValueError, match=f"about {cost.dense_gib(network, batch):.3g} GiB"):
        optimizer.step()


@pytest.mark.skipif(not cost.STATUS.exists(), reason="the system does not tell a process's peak of memory")
def test_memory_sees_what_a_step_holds_for_a_moment() -> None:
    ballast = torch.ones(300 * 2**18, dtype=torch.float32)  # the peak of this process is not the other's
    settings = {"case": case([8, 4, 2], 4, "adam"), "repeats": 1}
    held = cost.run_memory(settings, child=(sys.executable, "-c", HOLDS_200))
    assert 195 < held["added"] < 215
    assert 215 < held["peak"] - held["added"] + ballast[0] < 500
    assert cost.run_memory(settings)["added"] < 20


@pytest.mark.skipif(not cost.STATUS.exists(), reason="the system does not tell a process's peak of memory")
def test_the_median_of_several_processes_is_taken() -> None:
    counted = "import sys; from pathlib import Path; p = Path('n'); n = len(p.read_text()) if p.exists() else 0\n"
    counted += "p.write_text('x' * (n + 1)); print('{\"added\": %d, \"peak\": %d}' % ((9, 1, 4)[n], n))"
    settings = {"case": case([8, 4, 2], 4, "adam"), "repeats": 3}
    assert cost.run_memory(settings, child=(sys.executable, "-c", counted)) == {"added": 4, "peak": 1}


@pytest.mark.skipif(not cost.STATUS.exists(), reason="the system does not tell a process's peak of memory")
def test_a_process_that_fails_says_why() -> None:
    settings = {"case": case([8, 4, 2], 4, "adam"), "repeats": 1}
    with pytest.raises(ValueError, match=r"'method': 'adam'\} cannot be measured: out of luck"):
        cost.run_memory(settings, child=(sys.executable, "-c", "raise SystemExit('out of luck')"))


def test_every_method_takes_finite_steps_and_results_are_strict_json() -> None:
    methods = dict.fromkeys(m for group in fig3_groups.GROUPS.values() for m in group.timed)
    result = cost.run_time({"cases": [case([6, 4, 3], 4, method) for method in methods], "turns": 1})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [len(block) for block in result["blocks"]] == [1] * len(methods)
    assert all(seconds > 0 for block in result["blocks"] for seconds in block)


def test_gradients_reach_the_first_layer_of_a_deep_network() -> None:
    model = cost.model([64, 64, 32])
    nn.functional.cross_entropy(model(torch.randn(16, 64, dtype=torch.float32)), torch.zeros(16).long()).backward()
    first = next(model.parameters()).grad
    assert first is not None
    assert float(first.norm()) > 1e-4


def verdict_at(over_ekfac: float, over_adam: float) -> str:
    cells = {"adam": 1.0, "ekfac": over_adam / over_ekfac, "batch": over_adam}
    blocks = {
        (name, size, method): [turn * cell for turn in (1.0, 2.0)]
        for name, size in itertools.product(("fcn", "cnn"), (8, 16))
        for method, cell in cells.items()
    }
    return fig3.verdict("batch", blocks).judgement


def test_nearly_as_fast_is_judged_by_both_ratios() -> None:
    assert verdict_at(1.332, 2.27) == "holds"
    assert verdict_at(1.335, 2.2) == "does not hold"
    assert verdict_at(1.3, 2.28) == "does not hold"


def test_nothing_measured_is_nothing_judged() -> None:
    blocks = {("digits", 8, method): [1.0] for method in ("adam", "ekfac", "batch")}
    assert fig3.verdict("batch", blocks).judgement == "cannot be tested here"


def test_one_slow_network_is_enough_to_be_slow() -> None:
    blocks = {(name, 8, method): [1.0] for name in ("fcn", "cnn") for method in ("adam", "ekfac", "batch")}
    assert fig3.verdict("batch", blocks).judgement == "holds"
    assert fig3.verdict("batch", blocks | {("cnn", 8, "batch"): [9.0]}).judgement == "does not hold"


def cut_by(batch: float, width: float) -> str:
    small = {
        (method, axis): Curve([2, 4], [[1.0, turn * over] for turn in (1.0, 3.0)])
        for axis, times in (("B", batch), ("X", width))
        for method, over in (("batch", 1.0), (DENSE, times))
    }
    return table4.verdict("batch", small).judgement


def test_orders_of_magnitude_are_two_at_one_of_the_largest_sizes() -> None:
    assert cut_by(1, 120) == "holds"
    assert cut_by(120, 1) == "holds"
    assert cut_by(90, 90) == "does not hold"


def test_a_picture_leaves_out_costs_that_a_logarithm_cannot_show() -> None:
    figure = growth_figure({"one": ("size", {"a": ([1, 2], [0.0, 5.0]), "b": ([1, 2], [-1.0, 0.0])})}, "cost")
    assert [np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines] == [[2]]
    with pytest.raises(ValueError, match="9 lines apart, got 10"):
        growth_figure({"one": ("size", {str(k): ([1], [1.0]) for k in range(10)})}, "cost")


def test_fig3_end_to_end(few: None) -> None:
    lab = Counting()
    section = fig3.run(lab, True)
    timing = [task.settings for task in lab.given if task.kind == "time"]
    assert [len({one["batch"] for one in settings["cases"]}) for settings in timing] == [1, 1, 1, 1]
    assert all(DENSE in [one["method"] for one in settings["cases"]] for settings in timing)
    assert len(section.tables) == 2 * 2 + (2 if cost.STATUS.exists() else 0)
    assert all(len(row) == len(table.header) == 3 for table in section.tables for row in table.rows)
    compared = {row[0]: row[1:] for row in section.tables[1].rows}
    assert compared["paper: DDPNOpt / Adam"] == ["1.69", "1.89"]
    assert compared["paper: vanilla DDP / Adam"] == ["5.85", "17.55"]
    assert [one.form for one in section.verdicts] == ["published", "batch"]
    assert "at most 1.33 times EKFAC's and 2.27 times Adam's" in " ".join(section.text)
    assert [axes.get_title() for axes in section.pictures[0].figure.axes] == ["short fcn", "short digits"]
    if cost.STATUS.exists():
        memory = {row[0]: row[1:] for row in section.tables[4].rows}
        assert memory["Adam: MiB added"] == ["8.0", "16.0"]
        assert memory["paper: DDPNOpt / Adam"] == ["1.22", "1.28"]


def test_dense_ddp_is_left_out_where_it_would_take_too_much(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LIMIT_GB", (cost.dense_gib([3, 4, 2], 8) + cost.dense_gib([3, 4, 2], 16)) / 2)
    section = fig3.run(Counting(), True)
    row = next(row for row in section.tables[0].rows if row[0] == "vanilla DDP, dense matrices")
    assert float(row[1]) > 0
    assert row[2] == "-"
    assert "up to batch 8" in " ".join(section.text)


def test_table4_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {axis: [table4.Shape(**({"B": 4, "X": 4, "L": 2} | {axis: size})) for size in (2, 4, 8)] for axis in "BXL"}
    large = [table4.Range(axis, shapes[axis], ("adam", "batch"), ("adam",), 1) for axis in "BXL"]
    small = [table4.Range(axis, shapes[axis], (DENSE, "share-ekfac", "batch"), (), 1) for axis in "BXL"]
    monkeypatch.setattr(table4, "ranges", lambda quick: (large, small))
    lab = Counting()
    section = table4.run(lab, True)
    assert [len(task.settings["cases"]) for task in lab.given if task.kind == "time"] == [6, 6, 6, 9, 9, 9]
    assert [table.title[:4] for table in section.tables][:3] == ["Time", "Memo", "Time"]
    assert all(len(row) == len(table.header) for table in section.tables for row in table.rows)
    assert "This rule was set after a first measurement" in " ".join(section.text)
    assert [row[0] for row in section.tables[2].rows] == [cost_words.label(name) for name in ("adam", "batch", DENSE)]
    if cost.STATUS.exists():
        assert section.tables[3].rows[0][1:3] == ["1.00", "1.00"]  # the memory that this lab makes up is B


@pytest.mark.parametrize("quick", [True, False])
def test_every_range_grows_along_its_axis_alone_and_fits_into_memory(quick: bool) -> None:
    for one in [one for part in table4.ranges(quick) for one in part]:
        assert one.sizes == sorted(set(one.sizes))
        assert len(one.sizes) >= FITTED
        assert len({tuple(getattr(s, axis) for axis in "BXL" if axis != one.axis) for s in one.shapes}) == 1
        if DENSE in one.methods:
            assert all(cost.dense_gib((s.X, s.X, s.L), s.B) <= cost.LIMIT_GB for s in one.shapes)
