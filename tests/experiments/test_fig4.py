"""Figure 4: the cells are paired, the rules count what they say, and one plan is carried through to a section."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ddpnopt.experiments.paper import availability, fig4, training
from ddpnopt.experiments.paper.fig4_panel import Panel, Runs, gather, tally
from ddpnopt.experiments.paper.fig4_section import section
from ddpnopt.experiments.study.lab import DirectLab
from ddpnopt.experiments.study.task import Kind, Result, Task

NOISE = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
POINTS = 4


def runs(
    accuracy: Sequence[Sequence[float]],
    loss: float = 1.0,
    noise: float = 1.0,
    validation: Sequence[Sequence[float]] | None = None,
) -> Runs:
    """Runs of five seeds with these mean accuracies ``[rate][decay]``, on both parts unless told otherwise."""
    means = np.array(accuracy)
    curve = np.full((*means.shape, len(NOISE), POINTS), loss) + 0.01 * NOISE[:, None]
    chosen_by = np.array(validation or accuracy)[..., None] + 0 * NOISE
    return Runs(means[..., None] + noise * NOISE, chosen_by, curve, np.zeros(means.shape, dtype=np.int64))


def panel(
    closed: Sequence[Sequence[float]], open_: Sequence[Sequence[float]], variant: str = "share-sgd", **changes: Any
) -> Panel:
    rates, decays = tuple(0.1 * 10**place for place in range(len(open_))), tuple(range(len(open_[0])))
    return Panel("wine-fcn", variant, rates, tuple(map(float, decays)), {}, runs(closed, **changes), runs(open_))


# feedback adds 0, 1 and 2 points at three rates; seeds differ in noise that the pairs share in part
GROWING = panel([[90.0, 90.0], [91.0, 91.0], [82.0, 82.0]], [[90.0, 90.0], [90.0, 90.0], [80.0, 80.0]], noise=0.5)


def test_cells_and_trend_are_counted() -> None:
    found = tally(GROWING)
    assert (found.cells, found.better, found.worse) == (6, 4, 0)
    assert (found.high, found.high_better, found.calmer) == (4, 4, 6)
    assert found.trend.mean == pytest.approx(1)  # a point for each factor of ten
    assert found.grows


def test_improvement_that_shrinks_is_not_growth() -> None:
    shrinking = panel([[92.0], [91.0], [90.5]], [[90.0], [90.0], [90.0]], noise=0.5)
    assert tally(shrinking).better == 3
    assert tally(shrinking).trend.mean == pytest.approx(-0.75)
    assert not tally(shrinking).grows


def test_growth_is_judged_by_the_highest_rates_and_by_all() -> None:
    def growing(*added: float) -> Panel:
        return panel([[90 + one] for one in added], [[90.0] for _ in added], noise=0.5)

    low = tally(growing(-10, 1, 1, 0, 0))
    assert low.better > low.worse
    assert low.trend.low > 0
    assert not low.grows  # nothing is better where the claim says it should be most
    harmful = tally(growing(-3, -3, -3, 1, 1))
    assert harmful.high_better == 2
    assert harmful.trend.low > 0
    assert not harmful.grows  # worse in more cells than better
    assert tally(growing(-3, 0, 0, 1, 1)).grows


def test_rates_at_which_neither_trains_are_left_out() -> None:
    failing = panel([[91.0], [92.0], [10.0]], [[90.0], [90.0], [10.0]], noise=0.5)
    assert failing.training == [0, 1]
    assert tally(failing).cells == 2
    rescued = panel([[91.0], [92.0], [80.0]], [[90.0], [90.0], [10.0]], noise=0.5)
    assert rescued.training == [0, 1, 2]  # one of the two still trains


def test_second_rule_wants_lower_loss_whatever_the_variance() -> None:
    level = [[90.0], [90.0]]
    assert tally(panel(level, level, loss=0.5, noise=0.5)).faster
    assert tally(panel(level, level, loss=0.5, noise=2.0)).faster
    assert not tally(panel(level, level, loss=1.5, noise=0.5)).faster


def test_cells_are_chosen_by_validation() -> None:
    level = [[90.0], [90.0], [90.0]]
    open_ = runs([[90.0], [80.0], [10.0]], validation=[[80.0], [90.0], [50.0]])
    found = Panel("wine-fcn", "own-sgd", (0.1, 1.0, 10.0), (0.0,), {}, runs(level, validation=[[9.0]] * 3), open_)
    assert found.usual == (1, 0)
    assert found.training == [0, 1, 2]
    failing = runs(level, validation=[[80.0], [90.0], [40.0]])
    assert Panel("wine-fcn", "own-sgd", (0.1, 1.0, 10.0), (0.0,), {}, failing, failing).training == [0, 1]


def test_drop_is_from_the_best_cell_to_the_mean_of_all() -> None:
    drop = runs([[90.0, 80.0], [70.0, 60.0]]).drop
    assert drop.mean == pytest.approx(15)
    assert drop.half == pytest.approx(0, abs=1e-12)


def test_diverged_run_goes_on_with_its_highest_loss() -> None:
    results = [
        {"test": 0.5, "validation": 0.6, "curve": [3.0, 2.0], "diverged": 21},
        {"test": 0.25, "validation": 0.35, "curve": [], "diverged": 1},
        {"test": 0.75, "validation": 0.85, "curve": [2.0, 1.0, 0.5], "diverged": None},
    ]
    found = gather(results, (1, 1, 3), points=3, classes=10)
    assert found.curve[0, 0].tolist() == [[3.0, 2.0, 3.0], [math.log(10)] * 3, [2.0, 1.0, 0.5]]
    assert found.accuracy.tolist() == [[[50.0, 25.0, 75.0]]]
    assert found.validation.tolist() == [[[60.0, 35.0, 85.0]]]
    assert found.diverged.tolist() == [[2]]


def verdicts(panels: Sequence[Panel]) -> dict[tuple[str, str], str]:
    steps = {"wine-fcn": 40}
    found = section(panels, steps, {}, quick=False).verdicts
    return {(one.claim.partition(" ")[0], one.form): one.judgement for one in found}


def test_published_form_is_judged_by_the_reading_of_higher_validation_accuracy() -> None:
    def harmful_with(validation: float) -> Panel:
        level = [[validation, validation]] * 3
        return panel([[10.0, 10.0]] * 3, [[90.0, 90.0]] * 3, variant="own-sgd", validation=level)

    harmful = harmful_with(50.0)
    flat = panel([[90.0, 90.0]] * 3, [[90.0, 90.0]] * 3, variant="batch")
    assert verdicts([harmful, GROWING, flat])["robust", "published"] == "holds"
    assert verdicts([harmful, GROWING, flat])["robust", "batch"] == "does not hold"
    # the verdict of the other reading would be better, which must not choose it
    assert verdicts([harmful_with(99.0), GROWING, flat])["robust", "published"] == "does not hold"
    other = panel([[90.0, 90.0]] * 3, [[90.0, 90.0]] * 3, variant="share-rmsprop")
    assert verdicts([harmful, GROWING, other])["robust", "published"] == "does not hold"  # one of two grids


def test_form_without_a_grid_is_not_judged() -> None:
    found = verdicts([GROWING])
    assert found["robust", "published"] == "holds"
    assert found["robust", "batch"] == found["faster", "batch"] == "cannot be tested here"


def test_fixed_hyper_parameters_are_those_of_the_panels() -> None:
    found = section([replace(GROWING, params={"damping": 0.7})], {"wine-fcn": 40}, {}, quick=False)
    facts = dict(found.facts)
    assert facts["fixed"].split("; ")[1] == "damping 0.7 for SGD, each sample's share of the mean loss"
    assert "3 learning rates over a factor of 100 x 2 weight decays x 5 paired seeds" in facts["grid"]


def test_few_seeds_are_not_judged() -> None:
    few = Panel(
        "wine-fcn",
        "share-sgd",
        GROWING.rates,
        GROWING.decays,
        {},
        *(
            Runs(one.accuracy[..., :2], one.validation[..., :2], one.curve[..., :2, :], one.diverged)
            for one in (GROWING.closed, GROWING.open)
        ),
    )
    assert set(verdicts([few]).values()) == {"cannot be tested here"}


def small(problem: str, method: str, **params: float) -> Result:
    settings = {"problem": problem, "method": method, "params": params, "weight_decay": 0.01, "steps": 8, "seed": 0}
    return training.run(settings)


@pytest.mark.parametrize(
    ("own", "share", "params"),
    [
        ("own-sgd", "share-sgd", {"lr": 0.3}),
        ("own-rmsprop", "share-rmsprop", {"lr": 0.01}),
        ("own-ekfac", "share-ekfac", {"lr": 0.1, "damping": 0.3}),
    ],
)
def test_readings_are_one_optimizer_without_feedback(own: str, share: str, params: dict[str, float]) -> None:
    losses = [small("wine-fcn", name, feedback=0.0, **params)["loss"] for name in (own, share)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(small("wine-fcn", own, feedback=1.0, **params)["loss"], rel=1e-4)


def test_open_loop_of_sgd_is_sgd_and_the_batch_form_has_one() -> None:
    assert small("wine-fcn", "own-sgd", lr=0.3, feedback=0.0)["loss"] == pytest.approx(
        small("wine-fcn", "sgd", lr=0.3, momentum=0.0)["loss"], rel=1e-5
    )
    batch = [small("wine-fcn", "batch", lr=0.1, damping=0.1, feedback=feedback)["loss"] for feedback in (1.0, 0.0)]
    assert batch[0] != pytest.approx(batch[1], rel=1e-3)


def test_cells_hold_their_own_settings() -> None:
    """Every figure is found where its settings belong: a made-up runner writes them into the result."""
    asked: list[dict[str, Any]] = []

    def made_up(settings: Any) -> Result:
        asked.append(dict(settings))
        feedback = settings["params"]["feedback"]
        test = settings["params"]["lr"] + 10 * settings["weight_decay"] + settings["seed"] / 1000 + feedback / 100
        return {"test": test, "validation": test / 2, "curve": [1.0 - 0.5 * feedback], "diverged": None}

    plan = fig4.Plan({"wine-fcn": 7}, ("own-sgd", "share-sgd"), (1.0, 10.0), (0.0, 0.01), seeds=3)
    own, share = fig4.panels(DirectLab({"train": Kind(made_up, ())}), plan, ["wine-fcn"])
    expected = [
        [[100 * (lr + 10 * decay + seed / 1000) for seed in range(3)] for decay in (0, 0.01)] for lr in (0.03, 0.3)
    ]
    assert own.open.accuracy == pytest.approx(np.array(expected))
    assert own.closed.accuracy - own.open.accuracy == pytest.approx(1)
    assert share.open is not share.closed
    assert share.open.accuracy == pytest.approx(own.open.accuracy)
    assert len(asked) == 3 * 12  # the open loop of both readings is run once
    assert {one["steps"] for one in asked} == {7}
    assert own.differences[0][0].mean == pytest.approx(1)
    assert own.closed.validation == pytest.approx(own.closed.accuracy / 2)


def test_section_says_what_was_found_and_left_out() -> None:
    plan = fig4.Plan({"wine-fcn": 5}, ("share-sgd", "batch"), (1.0, 10.0), (0.0,), seeds=2)
    lab = DirectLab({"train": Kind(training.run, ())})
    panels = fig4.panels(lab, plan, ["wine-fcn"])
    found = section(panels, plan.steps, {"digits-fcn": "no files"}, quick=True)
    assert any("digits was left out: no files" in paragraph for paragraph in found.text)
    assert [picture.name for picture in found.pictures] == ["grid-wine", "curves-wine"]
    assert all(len(row) == len(table.header) for table in found.tables for row in table.rows)
    assert {verdict.judgement for verdict in found.verdicts} == {"cannot be tested here"}
    maps = found.pictures[0].figure.axes[1]  # of the batch form
    texts = [text.get_text().rstrip("*") for text in maps.texts]
    assert texts == [f"{round(row[0].mean, 1) + 0.0:+.1f}" for row in panels[1].differences]


def test_missing_data_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "missing", lambda dataset: f"no {dataset}")
    found = fig4.run(DirectLab({}), quick=True)
    assert not found.pictures
    assert sum("was left out" in paragraph for paragraph in found.text) == 2


def test_tasks_differ_only_where_cells_do() -> None:
    one: list[Task] = []

    class Collect(DirectLab):
        def execute(self, tasks: Sequence[Task]) -> list[Result]:
            one.extend(tasks)
            return [{"test": 0.5, "validation": 0.5, "curve": [], "diverged": None} for _ in tasks]

    plan = fig4.FULL
    found = fig4.panels(Collect({}), plan, ["wine-fcn"])
    cells = len(plan.factors) * len(plan.decays) * plan.seeds
    assert len(one) == len({task.key for task in one}) == (7 + 4) * cells
    fixed = [{key: value for key, value in task.settings["params"].items() if key == "damping"} for task in one]
    assert [panel.params for panel in found if panel.variant == "batch"] == [fixed[-1]] != [{}]
